"""VLAPruner: visual tokens that either the prompt looks at now or the last actions looked at, thinned to unlike ones.

"VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient Vision-Language-Action Inference",
arXiv 2511.16449; the published code covers OpenVLA.

At each control step a robot's policy reads one prompt and writes a few action tokens. M tokens are kept as follows:

1. Semantic score: attention received in layer K - 1 from all tokens of the prompt, mean over heads.
2. Action score: attention paid by the rows that produced action tokens (the prompt's last one, then each decoded one but
   the last) in one layer near the middle, mean over heads and rows, a vector S per control step. Smoothed over time by
   sum over i = 1..w of decay**i * S(t - i), the newest step weighing most, then divided by its sum.
3. The candidates are the M best of either score; among them M are picked greedily, each the one farthest (cosine, between
   the tokens as they entered the language model) from those picked before.

Until w steps of an episode have been seen nothing is dropped, whatever the budget says. Tokens that a step dropped count 0 in its
S. S covers all cameras of the prompt. Rows of a batch are environments: each has its own history, and keeps its place.

Differs: the published code gives the newest step the least weight, by a slip; here as in the paper. The paper speaks of the
later half of the layers, the code observes layer 15 of 32: here that layer, at the same depth in other models. Attention is
recomputed for the rows that count, where the code returns all maps of all layers; batches are supported.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmeff.config import option
from mmeff.pruning._base import Decision, LayerPruner, LayerView, require_keep
from mmeff.pruning._schedule import PrunePoint
from mmeff.pruning._select import max_min_diversity, pools
from mmeff.registry import register


class History:
    """What the actions of an episode looked at: finished control steps, and the one whose rows are still coming in.

    A prompt's tokens are chosen before its own action rows are seen: the step before ends when the next prompt is decided
    upon, or when its first row is seen where nothing was to decide.
    """

    def __init__(self, window: int) -> None:
        self.steps: deque[Tensor] = deque(maxlen=window)  # (B, V0) each, newest last
        self.sizes: list[int] | None = None  # visual tokens of each row's prompt, as the steps had them
        self._sum: Tensor | None = None
        self._rows = 0

    @property
    def full(self) -> bool:
        return len(self.steps) == self.steps.maxlen

    def begin(self, attention: Tensor) -> None:
        """The first row (B, V0) of a new control step."""
        self.finish()
        self._check(tuple(attention.shape))
        self._sum, self._rows = attention.detach().clone(), 1

    def add(self, attention: Tensor) -> None:
        """A further row; dropped where its step did not begin here, as after a reset in the middle of one."""
        if self._sum is not None:
            self._check(tuple(attention.shape))
            self._sum, self._rows = self._sum + attention.detach(), self._rows + 1

    def finish(self) -> None:
        """End the step whose rows came in, if there is one."""
        if self._sum is not None:
            self.steps.append(self._sum / self._rows)
            self._sum, self._rows = None, 0

    def expect(self, sizes: list[int]) -> None:
        """Prompts of these sizes are coming. Raises: ValueError where the history is of others."""
        if self.steps and self.sizes not in (None, sizes):
            raise _mismatch(f"prompts of {self.sizes} visual tokens", f"{sizes}")
        self._check((len(sizes), max(sizes, default=0)))
        self.sizes = sizes

    def smoothed(self, decay: float) -> Tensor:
        """(B, V0): the sum over the steps, the newest weighted by `decay`, the one before by its square, and so on."""
        weights = [decay**i for i in range(len(self.steps), 0, -1)]
        return torch.stack([weight * step for weight, step in zip(weights, self.steps, strict=True)]).sum(dim=0)

    def clear(self) -> None:
        self.steps.clear()
        self.sizes = self._sum = None
        self._rows = 0

    def _check(self, shape: tuple[int, ...]) -> None:
        seen = self._sum if self._sum is not None else self.steps[-1] if self.steps else None
        if seen is not None and tuple(seen.shape) != shape:
            raise _mismatch(f"(rows, visual tokens) = {tuple(seen.shape)}", f"{shape}")


def _mismatch(had: str, got: str) -> ValueError:
    return ValueError(
        f"VLAPruner has a history of the wrong camera size: it was of {had}, got {got}; call handle.reset_episode() "
        "before an episode with other cameras or another number of environments"
    )


@register
@dataclass(frozen=True, kw_only=True)
class VLAPruner(LayerPruner):
    """Keep tokens that the prompt or the last actions looked at, as unlike each other as possible; for robot policies.

    Call `handle.reset_episode()` between episodes. Nothing is dropped in the first `window` control steps of each.
    """

    source: ClassVar[str] = "arXiv 2511.16449 and its published code"

    keep: float | int = option(
        0.5,
        "visual tokens kept: a fraction as a float, a number as an int",
        unit="fraction or tokens",
        source="1 - r for the least r of the published runs, of 0.5, 0.75 and 0.875",
    )
    layer: int = option(3, "first layer that runs without the dropped tokens", unit="layer from 0", source="paper, K")
    action_layer: int | None = option(
        None,
        "layer whose attention the action tokens are observed in; None is 15/32 of the layers, behind the pruning",
        unit="layer from 0",
        source="the published code, layer 15 of 32",
    )
    window: int = option(3, "control steps remembered", unit="control steps", source="paper, w")
    decay: float = option(0.8, "weight of a step relative to the one after it", unit="factor", source="paper, gamma")
    rows: Literal["all", "text", "last"] = option(
        "all", "whose attention gives the semantic score: every token, the text behind the image, or the last token",
        unit="query rows", source="the published code, which has all three",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer >= 1, "layer", "be at least 1, because layer - 1 supplies the scores", "pass layer=3")
        require_keep(self, "keep")
        self.require(self.window >= 1, "window", "be at least 1 control step", "the paper uses 3")
        self.require(0 < self.decay <= 1, "decay", "be in (0, 1]", "the paper uses 0.8")

    def default_points(self, layers: int) -> tuple[PrunePoint, ...]:
        self.require(
            self.layer < layers, "layer", f"be in [1, {layers - 1}] for a model of {layers} layers", "pass layer=3"
        )
        return (PrunePoint(layer=self.layer, keep=self.keep),)

    def observes(self, layers: int) -> int:
        """The action layer. It must not come before a prune point, or a step would be seen before it is decided upon."""
        least = self.points(layers)[-1].layer
        if self.action_layer is None:
            return max(least, round(15 * layers / 32))
        self.require(
            least <= self.action_layer < layers,
            "action_layer",
            f"be in [{least}, {layers - 1}], from the last prune point to the last of {layers} layers",
            "pass None for 15/32 of the layers",
        )
        return self.action_layer

    def new_state(self) -> History:
        return History(self.window)

    def observe(self, state: History, attention: Tensor, *, prefill: bool) -> None:
        if prefill:
            state.begin(attention)
        else:
            state.add(attention)

    def reset_episode(self, state: History) -> None:
        state.clear()

    def decide(self, view: LayerView) -> Decision:
        """The candidates of both scores, thinned; all present tokens until the history is full.

        Raises: ValueError if the rows or their visual tokens are not as many as those of the history.
        """
        history: History = view.state
        history.finish()
        history.expect(view.initial.tolist())
        if not history.full:
            return Decision(view.present)
        semantic = view.received(self.rows).mean(dim=1)  # over heads; the number of rows does not change the order
        action = history.smoothed(self.decay).gather(1, view.original.masked_fill(~view.present, 0))
        action = normalize(action.masked_fill(~view.present, 0.0), p=1, dim=1)
        candidates = self.take(view, semantic) | self.take(view, action)
        pool = pools(view.counts, view.frame, view.present, apart=self.quota == "frame")
        unlike = max_min_diversity(pool.split(view.embeddings()), pool.counts, pool.split(candidates) & pool.present)
        return Decision(pool.join(unlike))
