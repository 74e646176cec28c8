"""Small random LLaVA models, prompts whose padding overlaps other rows' images, and the full-length reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

IMAGE = 4
VISUAL = 16


def random_llava(*, layers: int = 5, kv_heads: int = 2, seed: int = 0, attention: str = "sdpa") -> Any:
    """A stock LLaVA of `layers` language layers with 16 visual tokens per image and loud random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
        text_config=LlamaConfig(
            vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=kv_heads, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        image_token_id=IMAGE, image_seq_length=VISUAL, vision_feature_layer=-2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed_tokens" not in name:
                p.mul_(6.0)  # the default 0.02 leaves attention almost uniform: every selection would look alike
        model.model.language_model.embed_tokens.weight.normal_(std=1.0)
    model.set_attn_implementation(attention)
    return model


def prompts(texts: list[int], *, images: list[int] | None = None, seed: int = 3) -> dict[str, torch.Tensor]:
    """A left-padded batch: row i has `images[i]` pictures behind a start token, then `texts[i]` text tokens."""
    images = images or [1] * len(texts)
    draw = torch.Generator().manual_seed(seed)
    rows = [
        torch.cat([torch.tensor([1]), torch.full((VISUAL * n,), IMAGE), torch.randint(5, 48, (t,), generator=draw)])
        for t, n in zip(texts, images, strict=True)
    ]
    size = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(size - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([(torch.arange(size) >= size - len(r)).long() for r in rows])
    pixels = torch.randn(sum(images), 3, 32, 32, generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def dropped_columns(inputs: dict[str, torch.Tensor], kept: torch.Tensor) -> torch.Tensor:
    """Bool (B, S): the columns of visual tokens that are not in `kept` (B, K), indices among each row's visual tokens."""
    visual = inputs["input_ids"] == IMAGE
    rank = visual.cumsum(dim=1) - 1
    stays = torch.zeros_like(visual)
    for b in range(len(visual)):
        for k in kept[b].tolist():
            stays[b] |= visual[b] & (rank[b] == k)
    return visual & ~stays


class MaskedReference:
    """The same model at full length, eager, with columns hidden from given layers on; `hidden[layer]` is bool (B, S)."""

    def __init__(self, model: Any, hidden: dict[int, torch.Tensor]) -> None:
        self.model = model
        self.hooks = []
        for index, layer in enumerate(model.model.language_model.layers):
            stages = [k for k in hidden if k <= index]
            if stages:
                self.hooks.append(layer.register_forward_pre_hook(self._hook(hidden[max(stages)]), with_kwargs=True))

    @staticmethod
    def _hook(hidden: torch.Tensor) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"].clone()
            rows = hidden.repeat_interleave(len(mask) // len(hidden), dim=0)
            wide = torch.zeros(len(mask), mask.shape[-1], dtype=torch.bool)
            wide[:, : rows.shape[1]] = rows
            mask = mask.expand(len(wide), -1, -1, -1).masked_fill(wide[:, None, None], torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, *exc: Any) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.fixture
def make_llava() -> Any:
    return random_llava


@pytest.fixture
def tools() -> Any:
    """The helpers above, as one namespace."""
    from types import SimpleNamespace

    return SimpleNamespace(
        llava=random_llava,
        prompts=prompts,
        dropped=dropped_columns,
        Reference=MaskedReference,
        VISUAL=VISUAL,
        IMAGE=IMAGE,
    )
