"""Where the visual tokens of a prompt lie: in which picture, which tile or frame, and where in it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mmeff.pruning.hosts._view import gather_rows
from mmeff.report import TokenPlaces


@dataclass
class Places:
    """Where the visual tokens of a chunk lie, (B, q) each.

    visual: bool. marker: bool, newline embeddings and separators inside a picture, which always stay. frame: which image,
    tile or video frame of the row, from 0. row, column: in that frame's grid. picture: which image of the row, or which
    frame of its videos, as the model merges them, from 0. tile: bool, tokens of a part of a picture that is also seen whole.
    box: (B, q, 4) where in the picture, see `_boxes`, NaN where that cannot be told. padded: share of a token's area that
    is padding, or None where the host cannot tell.
    """

    visual: Tensor
    marker: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor
    picture: Tensor
    tile: Tensor
    box: Tensor
    padded: Tensor | None = None

    def repeat(self, n: int) -> Places:
        """Each row n times, as beams have them."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        rows: dict[str, Any] = {name: x if x is None else x.repeat_interleave(n, 0) for name, x in given.items()}
        return Places(**rows)

    def of_tokens(self) -> TokenPlaces:
        """Pictures and boxes by visual token of a row, in place of column."""
        width = int(self.visual.sum(dim=1).max())
        order = (~self.visual).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        there = self.visual.gather(1, order)
        box = gather_rows(self.box, order, dim=1).masked_fill(~there[..., None], torch.nan)
        picture = self.picture.gather(1, order).masked_fill(~there, -1)
        return TokenPlaces(picture.cpu(), box.cpu(), (self.tile.gather(1, order) & there).cpu())
