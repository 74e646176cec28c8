"""Where visual tokens lie in their pictures: what a report needs to draw them, and nothing that a method decides by.

A box is (left, top, right, bottom) in shares of the width and height of the picture as the model is given it: as the
processor scales it and, where it cuts out a square, of that square. Padding lies outside. Tokens of tiles of a picture
that the model also sees whole are told from those of the whole view, for both cover the same places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_GRAIN = 16  # samples along a side of a tile, by which tiles are compared with the whole view


def cells(row: Tensor, column: Tensor, rows: Tensor | int, columns: Tensor | int) -> Tensor:
    """Boxes (..., 4) float32 of cells of grids that cover their picture."""
    return torch.stack([column / columns, row / rows, (column + 1) / columns, (row + 1) / rows], dim=-1).float()


def runs(visual: Tensor) -> list[list[int]]:
    """Lengths of the runs of visual tokens in each row of visual (B, q)."""
    found = []
    for here in visual:
        edges = F.pad(here.long(), (1, 1)).diff().nonzero()[:, 0]
        found.append((edges[1::2] - edges[::2]).tolist())
    return found


def in_tiles(
    frame: Tensor, row: Tensor, column: Tensor, side: int, tiles: Sequence[Sequence[int]], pixels: Sequence[Tensor | None]
) -> dict[str, Tensor]:  # fmt: skip
    """`picture`, `tile` and `box` of tokens (B, q) in square tiles of side x side tokens.

    Args:
        tiles: for each row, how many tiles each of its pictures has; the last of several is the view of the whole picture.
        pixels: for each row its tiles (frames, 3, height, width), or None where they are not known.
    Returns: as in `Places`. The box is NaN in tiles whose arrangement cannot be told.
    """
    width = max((sum(counts) for counts in tiles), default=0) + 1  # one more, which tokens of other kinds point at
    picture = frame.new_zeros(len(frame), width)
    tile = torch.zeros_like(picture, dtype=torch.bool)
    corner = torch.zeros(len(frame), width, 2, device=frame.device)  # row and column of the tile in its picture
    shape = torch.ones_like(corner)  # tiles below and beside each other in the picture
    for b, counts in enumerate(tiles):
        at = 0
        for number, count in enumerate(counts):
            picture[b, at : at + count] = number
            if count > 1:
                mine, seen = slice(at, at + count - 1), pixels[b]
                found = None if seen is None else arrangement(seen[at : at + count])
                tile[b, mine] = True
                if found is None:
                    shape[b, mine] = torch.nan
                else:
                    corner[b, mine] = torch.cartesian_prod(*map(torch.arange, found)).to(corner)
                    shape[b, mine] = torch.tensor(found).to(corner)
            at += count
    at_tile = frame[..., None].expand(-1, -1, 2)
    y, x = corner.gather(1, at_tile).unbind(-1)
    high, wide = shape.gather(1, at_tile).unbind(-1)
    return {
        "picture": picture.gather(1, frame), "tile": tile.gather(1, frame),
        "box": cells(y * side + row, x * side + column, high * side, wide * side),
    }  # fmt: skip


def arrangement(tiles: Tensor) -> tuple[int, int] | None:
    """(rows, columns) in which tiles (n, 3, height, width) make the picture of which the last one is a small view.

    Models are not told. It is the way in which the tiles, shrunk to the size of the view, look like it; None where no way
    does so more than twice as well as all others, as for a picture of one colour.
    """
    *parts, whole = F.adaptive_avg_pool2d(tiles.float(), _GRAIN)
    count, found = len(parts), []
    for rows in (n for n in range(1, count + 1) if count % n == 0):
        lines = [torch.cat(parts[i : i + count // rows], dim=2) for i in range(0, count, count // rows)]
        small = F.adaptive_avg_pool2d(torch.cat(lines, dim=1), _GRAIN)
        found.append((float((small - whole).square().mean()), rows))
    found.sort()
    if len(found) > 1 and not found[0][0] < found[1][0] / 2:
        return None
    return found[0][1], count // found[0][1]


def in_square(box: Tensor, height: int, width: int) -> Tensor:
    """Boxes in a picture of this size, from boxes in a square that it was padded to at the middle; NaN where nothing of it
    lies in the box."""
    pad = torch.tensor([max(0, height - width), max(0, width - height)] * 2, device=box.device) / 2
    size = torch.tensor([width, height] * 2, device=box.device)
    return clipped((box * max(height, width) - pad) / size)


def clipped(box: Tensor) -> Tensor:
    """What of boxes (..., 4) lies in the picture; NaN where nothing does."""
    inside = box.clamp(0.0, 1.0)
    empty = (inside[..., 2:] <= inside[..., :2]).any(dim=-1)
    return inside.masked_fill(empty[..., None], torch.nan)
