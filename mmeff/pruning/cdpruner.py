"""CDPruner: keep visual tokens that are unlike each other, given what the prompt asks for.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS 2025
(arXiv 2506.10967); code Theia-4869/CDPruner.

The kept set is the greedy MAP estimate of a determinantal point process with kernel r_i * cos_ij * r_j: cosines between
projected features, r the relevance of each token to the prompt, brought to [0, 1]. Each pick is the token that adds most to
the determinant; a Cholesky factor grows by a row per pick (Chen et al., NeurIPS 2018).

Relevance:

* "clip", the paper's: minus the mean cosine between CLIP's image embedding of a patch and CLIP's embedding of the prompt's
  text, minus because in CLIP the patches of the background are those most like the text. It needs the CLIP model that
  the vision tower is from, and the language model's tokenizer, which are loaded at the first prompt;
* "embeddings": the mean cosine between projected features and text embeddings in the language model's input space. For
  models whose vision tower has no text tower; it is no published setting for LLaVA;
* "none": 1 for all tokens, diversity alone.

Differs: relevance is brought to [0, 1] within a prompt, where the published code takes the extremes of its whole batch.
"clip" reads all text behind the image, the end of the chat template included, where the published evaluation passes
the question alone; each piece of a long text gets its own start and end token. Once as many tokens are picked as features
have dimensions, determinants are 0 and the published code follows rounding errors; here the most relevant tokens follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmeff.config import option
from mmeff.pruning._base import Decision, InputPruner, LayerView, Need
from mmeff.pruning._select import cosines, extremes, greedy, pools, row_of, wide
from mmeff.registry import register


@register
@dataclass(frozen=True, kw_only=True)
class CDPruner(InputPruner):
    """Keep visual tokens that are relevant to the prompt and unlike each other, by a determinantal point process."""

    source: ClassVar[str] = "arXiv 2506.10967 (NeurIPS 2025); code Theia-4869/CDPruner"

    relevance: Literal["clip", "embeddings", "none"] = option(
        "embeddings", "what makes a token relevant; see the module", unit="measure",
        source="the paper has clip, which needs `clip` and `tokenizer`",
    )  # fmt: skip
    clip: str = option(
        "", "CLIP model of the vision tower, for its text tower and projections: a folder or hub name",
        unit="name", source="the paper has openai/clip-vit-large-patch14-336 for LLaVA-1.5",
    )  # fmt: skip
    tokenizer: str = option(
        "", "tokenizer of the language model, which turns the prompt back into text: a folder or hub name", unit="name",
        source="that of the pruned model",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("clip", "tokenizer"):
            named = bool(getattr(self, field))
            if self.relevance == "clip":
                self.require(
                    named, field, 'be a folder or hub name for relevance="clip"', 'or pass relevance="embeddings"'
                )
            else:
                self.require(not named, field, f'be empty for relevance="{self.relevance}"', 'pass relevance="clip"')
        needs: set[Need] = {"encoder", "projector", "text ids"} if self.relevance == "clip" else set()
        object.__setattr__(self, "needs", frozenset(needs))  # in place of the class's, which are those of the defaults

    def new_state(self) -> Clip | None:
        return Clip(self.clip, self.tokenizer) if self.relevance == "clip" else None

    def decide(self, view: LayerView) -> Decision:
        embedded = view.embeddings()
        pool = pools(view.counts, view.frame, view.present, apart=self.quota == "frame")
        kernel = cosines(pool.split(embedded))
        if self.relevance != "none":
            r = unit_range(pool.split(self.measure(view, embedded)), pool.present)
            kernel = r[:, :, None] * kernel * r[:, None, :]
        return Decision(pool.join(greedy_map(kernel, pool.counts, pool.present)))

    def measure(self, view: LayerView, embedded: Tensor) -> Tensor:
        """(B, V): relevance before it is brought to [0, 1]."""
        if self.relevance == "clip":
            state: Clip = view.state
            return -state.likeness(view.encoder().features(), view.text_ids(), view.text)
        return likeness(embedded, view.text_embeddings(), view.text)


def likeness(visual: Tensor, text: Tensor, real: Tensor) -> Tensor:
    """(B, V): mean cosine of each vector of visual (B, V, D) to those of text (B, T, D) that are real (B, T); 0 without any."""
    words = normalize(wide(text), dim=-1).where(real[..., None], 0.0)
    mean = words.sum(dim=1) / real.sum(dim=1).clamp(min=1)[:, None]
    return (normalize(wide(visual), dim=-1) @ mean[..., None])[..., 0]


def unit_range(x: Tensor, present: Tensor) -> Tensor:
    """x (B, V) brought to [0, 1] over each row's present entries, with the published 1e-6 above; 1 where all are equal."""
    low, high = extremes(x, present)
    return torch.where(high > low, (x - low + 1e-6) / (high - low), torch.ones_like(x).where(~x.isnan(), torch.nan))


def greedy_map(kernel: Tensor, counts: Tensor, present: Tensor) -> Tensor:
    """Greedy MAP estimate (B, V) bool of determinantal point processes with kernels (B, V, V), batched.

    Numerics: in the kernel's dtype. A token of whose diagonal entry rounding error alone is left adds no volume; such
    tokens come behind all others, by that entry. Ties go to the earlier token.
    Source: Chen et al., "Fast Greedy MAP Inference for Determinantal Point Process", NeurIPS 2018, algorithm 1.
    """
    whole = kernel.diagonal(dim1=1, dim2=2)
    gain = whole.clone()
    noise, behind = 64 * torch.finfo(kernel.dtype).eps * whole, -1 / (1 + whole)
    turns = min(int(counts.max()), kernel.shape[1])
    factor = kernel.new_zeros(len(kernel), turns, kernel.shape[1])
    done = 0

    def value() -> Tensor:
        return torch.where(gain <= noise, behind, gain)

    def after(best: Tensor) -> Tensor:
        nonlocal gain, done
        own = factor[:, :done].gather(2, best[:, None].expand(-1, done, -1))  # (B, done, 1)
        row = row_of(kernel, best) - (own.transpose(1, 2) @ factor[:, :done])[:, 0]
        left = gain.gather(1, best)
        row = torch.where(left <= noise.gather(1, best), 0.0, row / left.sqrt())
        factor[:, done], done = row, done + 1
        gain = gain - row * row
        return value()

    return greedy(value(), counts, present, after)


class Clip:
    """CLIP's text tower and the projections of both towers, loaded at the first prompt, and the way back from ids to text."""

    def __init__(self, clip: str, tokenizer: str) -> None:
        self._names = (clip, tokenizer)
        self._model: Any = None

    def likeness(self, features: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """(B, V) float32: mean cosine of CLIP's image embeddings to its embedding of each piece of the text.

        Args: features: (B, V, Dv) of the vision tower. ids: (B, T) of the language model's text tokens. real: (B, T) bool.
        Raises: ValueError for features of another width than this CLIP model's.
        """
        if self._model is None:
            self._load()
        model = self._model.to(features.device)
        width = model["visual_projection"].in_features
        if features.shape[-1] != width:
            raise ValueError(
                f"CDPruner.clip must name the CLIP model that the vision tower is from; {self._names[0]!r} has features of "
                f"width {width}, the tower of width {features.shape[-1]}"
            )
        texts = [row[keep].tolist() for row, keep in zip(ids.cpu(), real.cpu(), strict=True)]
        words = self._reader.batch_decode(texts, skip_special_tokens=True)
        pieces = self._tokenizer(
            [text.strip() for text in words], truncation=True, max_length=model["text_model"].config.max_position_embeddings,
            return_overflowing_tokens=True, padding=True, return_tensors="pt",
        ).to(features.device)  # fmt: skip
        owner = pieces.pop("overflow_to_sample_mapping")
        text = model["text_projection"](model["text_model"](**pieces).pooler_output)
        images = model["visual_projection"](model["post_layernorm"](features.float()))
        theirs = owner == torch.arange(len(ids), device=owner.device)[:, None]
        return likeness(images, text.expand(len(ids), -1, -1), theirs)

    def _load(self) -> None:
        from transformers import AutoTokenizer, CLIPModel

        clip, tokenizer = self._names
        self._reader = AutoTokenizer.from_pretrained(tokenizer)
        self._tokenizer = AutoTokenizer.from_pretrained(clip)
        whole = CLIPModel.from_pretrained(clip, dtype=torch.float32).eval().requires_grad_(False)
        parts = {name: getattr(whole, name) for name in ("text_model", "text_projection", "visual_projection")}
        parts["post_layernorm"] = whole.vision_model.post_layernorm  # the rest of the vision tower is not needed twice
        self._model = torch.nn.ModuleDict(parts)
