"""routed_attention on the Triton kernels: the groups are rows of block-sparse attention, whose backend can be named."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close_to_reference, gradient_terms, plain_attention

from mmeff.kernels import record, routed_attention

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_forward_and_backward(triton_device, dtype):
    g = torch.Generator().manual_seed(0)
    shapes = (1, 40, 2, 16), (1, 50, 1, 16), (1, 50, 1, 16)
    inputs = [torch.randn(s, generator=g, dtype=torch.float64).to(triton_device, dtype) for s in shapes]
    routes = (torch.rand(1, 2, 40, 4, generator=g) < 0.4).to(triton_device)
    routes[0, 0, 3] = False  # a query without picks
    mask = routes.repeat_interleave(13, -1)[..., :50]
    dout = torch.randn(shapes[0], generator=g).to(triton_device, dtype)
    dlse = torch.randn(1, 2, 40, generator=g).to(triton_device)

    def results(attend, q, k, v):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*leaves)
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (out * dout.to(out.dtype)).sum() + (finite * dlse.to(lse.dtype)).sum()
        return [out, lse, *torch.autograd.grad(loss, leaves)]

    with record() as calls:
        actual = results(
            lambda *x: routed_attention(*x, routes, kv_block=13, backend="triton", return_lse=True), *inputs
        )
    assert "triton" in [call.backend for call in calls]
    same = results(lambda *x: plain_attention(*x, mask), *inputs)
    reference = results(lambda *x: plain_attention(*x, mask), *(x.double() for x in inputs))
    terms = gradient_terms(*inputs, dout)
    for name, a, p, r in zip(("out", "lse", "dq", "dk", "dv"), actual, same, reference, strict=True):
        at = terms if name in ("dq", "dk") else 0.0
        assert_close_to_reference(a, p, r, name=name, terms=at, times=3.0)  # merged from parts: one more rounding
