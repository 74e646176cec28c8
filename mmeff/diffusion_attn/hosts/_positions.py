"""Facts that only a tensor of positions tells: read once per tensor, because reading one from a GPU waits for the GPU.

Pipelines make the positions of their tokens once per generation and pass the same tensor in every step. What was read is
kept by the tensor's identity for as long as the tensor lives, so no step of a generation waits but its first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class ReadOnce(Generic[T]):
    """A function of a tensor's values that is called once per tensor, and again where the tensor was written to.

    Args:
        read: takes a detached copy of the tensor on the CPU.
    """

    def __init__(self, read: Callable[[Tensor], T]) -> None:
        self.read = read
        self._kept: Any = WeakTensorKeyDictionary()  # tensor -> (its version, what was read)

    def __call__(self, positions: Tensor) -> T:
        version = None if positions.is_inference() else positions._version  # inference tensors count no versions
        kept = self._kept.get(positions)
        if kept is None or kept[0] != version:
            kept = self._kept[positions] = (version, self.read(positions.detach().cpu()))
        found: T = kept[1]
        return found


def named(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    """The arguments of a forward by name, whichever way they were passed.

    Args:
        names: the forward's first parameters, in order.
    """
    return dict(zip(names, args, strict=False)) | kwargs
