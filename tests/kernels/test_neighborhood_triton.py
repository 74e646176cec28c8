"""The Triton kernels of neighborhood_attention against the rule in float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from neighborhood_oracle import CASES, check, tensors

from mmeff.kernels import tuned
from mmeff.kernels.neighborhood import neighborhood_attention, triton_impl

pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def small_boxes(monkeypatch):
    """Several boxes along each axis even of a tiny grid, on any GPU."""
    monkeypatch.setattr(tuned, "TUNED", {})
    for table in ("FORWARD_BLOCKS", "BACKWARD_BLOCKS"):
        blocks = getattr(triton_impl, table)
        small = {size: {D: (16, 32 if D < 64 else 16, 4, 1) for D in row} for size, row in blocks.items()}
        monkeypatch.setattr(triton_impl, table, small)


def on(device, inputs):
    return [None if x is None else x.to(device) for x in inputs]


@pytest.mark.parametrize("case", CASES)
def test_cases(triton_device, case):
    grid, *rule = CASES[case]
    check("triton", rule, on(triton_device, tensors(grid, rule[0], B=1, H=2, Hk=1)))


@pytest.mark.parametrize("case", ["1-D even, stride, causal, dilated", "2-D", "3-D causal time, dilated space"])
def test_bias_and_extra_keys(triton_device, case):
    grid, *rule = CASES[case]
    check("triton", rule, on(triton_device, tensors(grid, rule[0], B=1, H=2, Hk=2, T=5, bias=True)))


@pytest.mark.parametrize("D", [8, 24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_widths(triton_device, dtype, D):
    rule = [(3, 4), (1, 2), (1, 1), (False, False)]
    check("triton", rule, on(triton_device, tensors((5, 7), (3, 4), B=1, H=2, Hk=1, D=D, T=3, bias=True, dtype=dtype)))


def test_batch_groups_and_a_float32_bias(triton_device):
    rule = [(3, 3), (1, 1), (1, 1), (False, False)]
    inputs = tensors((4, 6), (3, 3), B=2, H=4, Hk=2, dtype=torch.float16)
    inputs[3] = tensors((4, 6), (3, 3), H=4, bias=True)[3]
    check("triton", rule, on(triton_device, inputs))


def test_the_default_boxes(triton_device, monkeypatch):
    monkeypatch.undo()
    rule = [(3, 5), (1, 1), (1, 1), (False, False)]
    check("triton", rule, on(triton_device, tensors((9, 10), (3, 5), B=1, H=1, Hk=1, D=16, bias=True)))


def test_without_lse_and_without_gradients(triton_device):
    rule = [(3, 3), (1, 1), (1, 1), (False, False)]
    inputs = on(triton_device, tensors((5, 6), (3, 3), B=1, H=2, Hk=1, T=2))
    check("triton", rule, inputs, with_lse=False)
    q, k, v, _, ek, ev = inputs
    with torch.no_grad():
        out = neighborhood_attention(q, k, v, 3, extra_k=ek, extra_v=ev, backend="triton")
    want = neighborhood_attention(q, k, v, 3, extra_k=ek, extra_v=ev, backend="reference")
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_views_of_a_fused_projection(triton_device):
    qkv = torch.randn(1, 5, 6, 3, 2, 8, generator=torch.Generator().manual_seed(0)).to(triton_device)
    q, k, v = qkv.unbind(3)
    want = neighborhood_attention(*(x.contiguous() for x in (q, k, v)), 3, backend="triton")
    assert torch.equal(neighborhood_attention(q, k, v, 3, backend="triton"), want)


def test_what_it_refuses(triton_device):
    from mmeff.errors import BackendUnavailable

    q = torch.randn(1, 4, 4, 1, 8, dtype=torch.float64, device=triton_device)
    with pytest.raises(BackendUnavailable, match=r"take float32, float16 and bfloat16, got torch.float64"):
        neighborhood_attention(q, q, q, 3, backend="triton")
    q = torch.randn(1, 4, 4, 1, 300, device=triton_device)
    with pytest.raises(BackendUnavailable, match="heads of up to 256 channels, got 300"):
        neighborhood_attention(q, q, q, 3, backend="triton")
