"""The tiny VLM: a stock `LlavaForConditionalGeneration` of 1.6 M parameters with a word-level tokenizer."""

from __future__ import annotations

from typing import Any

import torch

from mmeff.tiny import scenes, towers

PATCH = 8
SIDE = scenes.SIZE // PATCH  # 12 x 12 visual tokens
VISUAL = SIDE * SIDE
DIM = 128
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def tokenizer(known: list[str] | None = None) -> Any:
    """Word level over the words `known`, those of `scenes` by default; `<s>` is put in front, others become <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate([*SPECIAL, *(known or scenes.words())])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    return words


def processor(
    *, size: int = scenes.SIZE, known: list[str] | None = None, template: str = CHAT_TEMPLATE, class_token: bool = True
) -> Any:
    """The stock LLaVA processor for square pictures of `size` pixels, of a tower with or without a class token."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(known),
        patch_size=PATCH,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=int(class_token),
        chat_template=template,
    )


def model(*, size: int = scenes.SIZE, tower: str = "") -> Any:
    """The untrained network for `size` pixels: CLIP vision of 4 layers, LLaVA's two-layer projector, Llama of 6 layers.

    Args: tower: a backbone in CLIP's place; see `mmeff.tiny.towers`.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision: Any = (
        towers.config(tower, size=size, patch=PATCH)
        if tower
        else CLIPVisionConfig(
            image_size=size,
            patch_size=PATCH,
            hidden_size=DIM,
            intermediate_size=2 * DIM,
            num_hidden_layers=4,
            num_attention_heads=4,
            projection_dim=DIM,
        )
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(
            vocab_size=64,
            hidden_size=DIM,
            intermediate_size=2 * DIM,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
        ),
        image_token_id=SPECIAL.index("<image>"),
        image_seq_length=(size // PATCH) ** 2,
        vision_feature_layer=-1 if tower else -2,
        vision_feature_select_strategy="full" if tower else "default",
        tie_word_embeddings=False,
    )
    net = LlavaForConditionalGeneration(config)
    net.generation_config.pad_token_id = 0
    net.generation_config.bos_token_id = 1
    net.generation_config.eos_token_id = 2
    eye, places = net.model.vision_tower, _sincos_2d(size // PATCH, DIM) * 0.5
    with torch.no_grad():
        if tower:
            towers.initialise(eye)
            eye.timm_model.positions.copy_(places)
        else:
            eye.embeddings.position_embedding.weight[1:] = places
    return net


def _sincos_2d(side: int, dim: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine features (side * side, dim); learning places from nothing would take most of the budget."""
    quarter = dim // 4
    rates = 1.0 / (30.0 ** (torch.arange(quarter) / quarter))
    axis = torch.arange(side)[:, None] * rates
    one = torch.cat([axis.sin(), axis.cos()], dim=1)
    rows = one[:, None].expand(side, side, -1)
    columns = one[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, dim)


def pixels(images: Any) -> torch.Tensor:
    """What the processor makes of pictures (B, h, w, 3) in [0, 1]: rounded to bytes, scaled to [-1, 1], (B, 3, h, w)."""
    x = torch.as_tensor(images)
    return ((x * 255).round() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
