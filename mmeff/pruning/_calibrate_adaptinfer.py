"""Fit the stages of `AdaptInfer` to a model: where its text turns to the picture, and away from it, over its layers.

trajectory = Trajectory(layers=32)
for view in views:                                  # of every layer, over many prompts, with nothing pruned
    seen = view.received("text").mean(1) / view.text.sum(1, keepdim=True)
    trajectory.update(view.point.layer - 1, seen)   # "before": the layer that just ran
method = to_config(trajectory, budget=128)

Paper: arXiv:2508.06084 finds its prune points by change-point detection on the attention from text to picture, gathered over
some thousand prompts. Which algorithm it used is not published: here it is binary segmentation with a squared cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mmeff.pruning.adaptinfer import DECAY, AdaptInfer, solve_keeps

__all__ = ["Trajectory", "change_points", "solve_keeps", "to_config"]


@dataclass
class Trajectory:
    """Attention from text to picture over the layers of an unpruned model, gathered sample by sample in float64.

    layers: of the model. All samples must have the same number of visual tokens, so that their maps can be averaged.
    """

    layers: int
    samples: list[int] = field(init=False)  # by layer
    total: Tensor = field(init=False)  # (layers, V) sum of the maps

    def __post_init__(self) -> None:
        if self.layers < 3:
            raise ValueError(f"Trajectory.layers must be >= 3 to hold a change, got {self.layers}.")
        self.samples = [0] * self.layers
        self.total = torch.zeros(self.layers, 0, dtype=torch.float64)

    def update(self, layer: int, attention: Tensor) -> None:
        """Add samples of one layer.

        Args:
            layer: whose attention it is, from 0.
            attention: (B, V) that each visual token received in B samples, mean over heads and text tokens.
        Raises: ValueError for a layer outside the model, another V than before, or numbers that are not finite.
        """
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer must be in [0, {self.layers - 1}] for this trajectory, got {layer}")
        if attention.ndim != 2 or 0 in attention.shape:
            raise ValueError(
                f"attention must be (samples, visual tokens), none of them 0, got {tuple(attention.shape)}"
            )
        visual = attention.shape[1]
        if self.total.shape[1] not in (0, visual):
            raise ValueError(
                f"all samples must have the same visual tokens, got {visual} after {self.total.shape[1]}; resize the pictures"
            )
        found = attention.detach().cpu().double()
        if not bool(found.isfinite().all()):
            raise ValueError(f"attention of layer {layer} must be finite; leave padded rows out")
        if self.total.shape[1] == 0:
            self.total = torch.zeros(self.layers, visual, dtype=torch.float64)
        self.total[layer] += found.sum(0)
        self.samples[layer] += len(found)

    def maps(self) -> Tensor:
        """(layers, V): mean attention to each visual token, a_l. Raises: ValueError while a layer has no samples."""
        missing = [layer for layer, n in enumerate(self.samples) if n == 0]
        if missing:
            raise ValueError(f"every layer needs samples, got none for {missing}; update the trajectory with them")
        return self.total / torch.tensor(self.samples, dtype=torch.float64)[:, None]

    def curves(self) -> Tensor:
        """(layers, 2): mass on the picture summed up to each layer, and how far its map turned from the layer before.

        The mass c_l is the share of a text token's attention that lies on the picture; the turn is d_l = 1 - cos(a_l, a_l-1),
        0 where a map is empty. Layer 0, behind which nothing lies, gets that of layer 1, so that it makes no change there.
        """
        maps = self.maps()
        turn = 1 - torch.nn.functional.cosine_similarity(maps[1:], maps[:-1], dim=1)
        empty = (maps == 0).all(1)
        turn = turn.masked_fill(empty[1:] | empty[:-1], 0.0)
        return torch.stack([maps.sum(1).cumsum(0), torch.cat([turn[:1], turn])], dim=1)


def change_points(curves: Tensor, count: int) -> tuple[int, ...]:
    """Where the curves change: the first index of each new segment, ascending.

    Binary segmentation: again and again the one split is made that lowers the sum of squared distances to segment means
    most. Columns are brought to mean 0 and variance 1 before; one that spreads less than 1e-9 is rounding noise, and counts
    as flat. Ties go to the earlier index.

    Args: curves: (L, C). count: how many to find; fewer come back where nothing changes any more.
    Raises: ValueError for a count outside [1, L - 1], or curves that are not finite.
    """
    size = len(curves)
    if not 1 <= count <= size - 1:
        raise ValueError(f"count must be in [1, {size - 1}] for curves over {size} layers, got {count}")
    x = curves.detach().cpu().double()
    if not bool(x.isfinite().all()):
        raise ValueError("curves must be finite")
    spread = x.std(0, correction=0)
    flat = spread < 1e-9
    x = torch.where(flat, 0.0, (x - x.mean(0)) / spread.masked_fill(flat, 1.0))
    sums = torch.cat([x.new_zeros(1, x.shape[1]), x.cumsum(0)])
    borders = [0, size]
    while len(borders) < count + 2:
        best, at = 1e-9, 0
        for start, end in pairwise(borders):
            whole = _explained(sums, start, end)
            for split in range(start + 1, end):
                gain = _explained(sums, start, split) + _explained(sums, split, end) - whole
                if gain > best + 1e-12:
                    best, at = gain, split
        if at == 0:
            break
        borders = sorted([*borders, at])
    return tuple(borders[1:-1])


def to_config(trajectory: Trajectory, budget: int | float, points: int = 3) -> AdaptInfer:
    """An `AdaptInfer` whose schedule prunes behind the layers where the trajectory changes.

    A change at layer l prunes before layer l + 1, with the scores of l, as the published schedules do. The last layer is
    left out, since nothing runs behind it. Keeps are fractions whose mean over layers is the budget.

    Args:
        budget: mean over layers, a fraction as a float, an int in visual tokens of the trajectory's samples.
        points: stages at most; a shallow model has fewer.
    Raises: ValueError if nothing changes, or the changes come too late for the budget.
    """
    found = change_points(trajectory.curves()[:-1], min(points, trajectory.layers - 2))
    if not found:
        raise ValueError("the trajectory changes nowhere, so there is no layer to prune at; gather more samples")
    at = [layer + 1 for layer in found]
    initial = trajectory.total.shape[1]
    method = AdaptInfer(budget=budget, initial=initial)  # which checks the budget
    mean = budget if isinstance(budget, float) else budget / initial
    keeps = solve_keeps(at, mean, trajectory.layers, DECAY)
    return method.replace(schedule=",".join(f"{layer}:{keep!r}" for layer, keep in zip(at, keeps, strict=True)))


def _explained(sums: Tensor, start: int, end: int) -> float:
    """What the mean of x[start:end] explains of its sum of squares, from the running sums of x."""
    total = sums[end] - sums[start]
    return float((total * total).sum()) / (end - start)
