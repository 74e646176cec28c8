"""The gate of `benchmarks gpu` on the Triton kernels, in Triton's interpreter or on a GPU: what runs first on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import Neighborhood, TokenScores
from benchmarks.gate import GateFailed
from benchmarks.gpu import gate, setting

pytestmark = pytest.mark.interpreter


@pytest.fixture
def here(triton_device):
    return replace(setting.here(smoke=True, commit="c0ffee"), device=torch.device(triton_device))


@pytest.mark.parametrize("dtype", gate.DTYPES)
@pytest.mark.parametrize("kind", [Neighborhood, TokenScores])
def test_the_kernels_themselves_are_judged(here, kind, dtype):
    case = next(c for c in gate.cases(dtype, small=True) if isinstance(c, kind))
    found = gate.check(case, here)
    assert found["backend"] == ["triton"] and found["of_allowed"] <= 1


def test_other_bits_are_noticed(here):
    assert gate.repeat(gate.REPEATED["token_scores"], here, 2) == {"repeats": 2, "results": 3}
    runs = iter([[torch.ones(3)], [torch.ones(3)], [torch.tensor([1.0, 1.0, 2.0])]])
    with pytest.raises(
        GateFailed, match="run 3 of the same call gives other bits than the first: 1 of 3 elements of result 0"
    ):
        gate.repeat(lambda _: lambda: next(runs), here, 2)
