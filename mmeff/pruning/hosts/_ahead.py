"""What scoring has projected of the layer that is about to run, which that layer is then spared.

A method that asks what the next layer would look at needs the keys of all tokens and the queries of some. Those of tokens
that stay are what the layer computes anyway: its projections are given the other tokens alone, and the rest is put in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmeff.pruning.hosts._view import Projected, gather_rows


class Given(NamedTuple):
    """Values (B, R, C) of a projection at places (B, R) among the tokens that the layer gets; None for all of them."""

    places: Tensor | None
    values: Tensor


def carried(projected: Mapping[str, Projected], taken: Tensor) -> dict[str, Given]:
    """What is left of it where the tokens at `taken`, (B, n) ascending places among those projected, stay.

    The time of the projection is taken off the selection by the share that the layer is spared. Tokens that were chosen as
    query rows are text, which stays.
    """
    found = {}
    for which, (slots, values, span) in projected.items():
        if slots is None:
            found[which] = Given(None, gather_rows(values, taken, dim=1))
            span.share = -taken.shape[1] / values.shape[1]
        else:
            found[which] = Given(torch.searchsorted(taken, slots.contiguous()), values)
            span.share = -1.0
    return found


def spare(projection: Any, which: str, ahead: Callable[[], dict[str, Given]]) -> Iterator[Callable[[], None]]:
    """Hook a layer's projection so that it takes what is given ahead, once; yields what removes the hooks."""

    def pending() -> bool:
        return not torch.compiler.is_compiling() and which in ahead()

    def narrow(module: Any, args: Any) -> Any:
        if not pending():
            return None
        x, places = args[0], ahead()[which].places
        return (x[:, :1] if places is None else gather_rows(x, _others(places, x.shape[1]), dim=1), *args[1:])

    def complete(module: Any, args: Any, output: Any) -> Any:
        if not pending():
            return None
        places, values = ahead().pop(which)
        if places is None:
            return values
        whole = output.new_empty(len(output), output.shape[1] + values.shape[1], output.shape[2])
        for at, part in ((places, values), (_others(places, whole.shape[1]), output)):
            whole.scatter_(1, at[..., None].expand_as(part), part)
        return whole

    yield projection.register_forward_pre_hook(narrow).remove
    yield projection.register_forward_hook(complete).remove


def _others(places: Tensor, count: int) -> Tensor:
    """The places (B, count - R) that are not among `places` (B, R), ascending."""
    taken = torch.zeros(len(places), count, dtype=torch.uint8, device=places.device).scatter_(1, places, 1)
    return taken.argsort(dim=1, stable=True)[:, : count - places.shape[1]]
