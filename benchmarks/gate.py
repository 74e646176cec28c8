"""The gate: nothing is timed before it computed the right thing, on the tensors that are then timed.

The budget is the one of the tests: at most twice the error that plain PyTorch makes in the same dtype against float64, plus
a millionth of the largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Unavailable
from .workloads import Contender, Workload

TIMES = 2.0
FLOOR = 1e-6
# A peer is only asked whether it computes the same thing; how exactly is its own affair.
PEER_TOLERANCE = 0.02

Errors = dict[str, tuple[float, float]]  # of "out" and each gradient: the largest error, and what was allowed


class GateFailed(Exception):
    """A backend computed something wrong. Its speed means nothing, and neither may that of the others."""


class Gate:
    """Exact results of a workload, computed once, and the judgement of those who claim to compute the same.

    times: of the error that plain PyTorch makes, how much is allowed. floor: of the largest value, beyond that.
    """

    def __init__(self, work: Workload, times: float = TIMES, floor: float = FLOOR) -> None:
        self.work, self.times, self.floor = work, times, floor
        self._exact = work.exact(torch.float64)
        plain = work.exact(work.dtype)
        self._allowed = {
            name: times * _largest(plain[name] - x) + floor * _largest(x) for name, x in self._exact.items()
        }

    def errors(self, contender: Contender) -> Errors:
        """Return the errors of a contender and what is allowed, in the units of the values."""
        with torch.no_grad():
            found = {"out": self.work.sample(contender.forward())}
        if self.work.gradients:
            found |= self.work.sampled_gradients(contender)
        for name, x in found.items():
            if x.shape != self._exact[name].shape:
                raise GateFailed(f"{name} has shape {tuple(x.shape)}, wanted {tuple(self._exact[name].shape)}")
        return {name: (_largest(x - self._exact[name]), self._allowed[name]) for name, x in found.items()}

    def check(self, contender: Contender, who: str) -> Errors:
        """Return the errors of one of our backends. Raises GateFailed if one of them is too large."""
        errors = self.errors(contender)
        wrong = [f"{name}: error {e:.3g}, allowed {a:.3g}" for name, (e, a) in errors.items() if not e <= a]
        if wrong:
            raise GateFailed(
                f"red gate: {who} is wrong in {self.work.case.name}: {'; '.join(wrong)} ({self.times:g} x the error of plain "
                f"{self.work.case.dtype} attention + {self.floor:.2g} of the largest value). Nothing more is timed; repair the "
                "backend, or leave the case out with --only."
            )
        return errors

    def check_peer(self, contender: Contender, name: str) -> None:
        """Raise Unavailable if a peer that should compute the same thing does not."""
        error, _ = self.errors(contender)["out"]
        scale = _largest(self._exact["out"])
        if not error <= PEER_TOLERANCE * scale:
            raise Unavailable(f"{name} computes something else here: error {error:.3g} where values reach {scale:.3g}")


def _largest(x: Tensor) -> float:
    """The largest magnitude; NaN counts as infinite."""
    return x.detach().abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() if x.numel() else 0.0
