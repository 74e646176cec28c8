"""On a GPU: kernels without atomics give the same bits every time. A race shows as a difference in some of many runs."""

from __future__ import annotations

import pytest
import torch

from mmeff.kernels import BlockLayout, block_sparse_attention, neighborhood_attention, token_scores

pytestmark = pytest.mark.gpu
RUNS = 250


def tensors(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g).to("cuda", torch.bfloat16).requires_grad_() for s in shapes]


def check(run):
    first = run()
    for i in range(RUNS):
        for j, (x, y) in enumerate(zip(run(), first, strict=True)):
            assert torch.equal(x, y), f"run {i}, result {j}: {int((x != y).sum())} of {x.numel()} elements differ"


def test_block_sparse_attention():
    q, k, v = tensors((2, 1000, 8, 64), (2, 1000, 2, 64), (2, 1000, 2, 64))
    mask = torch.rand(2, 8, 1000, 1000, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, :, 300:600, :500] = False
    mask[:, :, :300, 700:] = True
    layout = BlockLayout.from_dense_mask(mask.cuda(), q_block=64, kv_block=64)

    def run():
        out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="triton")
        return [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v))]

    check(run)


def test_neighborhood_attention():
    q, k, v = tensors(*[(2, 5, 30, 22, 4, 64)] * 3)

    def run():
        out, lse = neighborhood_attention(q, k, v, (3, 7, 9), return_lse=True, backend="triton")
        return [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v))]

    check(run)


def test_token_scores():
    q, k = tensors((2, 100, 8, 64), (2, 3000, 2, 64))

    def run():
        scores = token_scores(q, k, backend="triton")
        return [scores, *torch.autograd.grad(scores.square().sum(), (q, k))]

    check(run)
