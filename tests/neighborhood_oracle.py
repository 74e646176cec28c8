"""Neighborhood attention from the rule, query by query and without the library's own reading of it, and the comparison."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from oracle import assert_close_to_reference

from mmeff.kernels.neighborhood import neighborhood_attention

# grid, window, stride, dilation, causal
CASES = {
    "1-D": ((13,), (5,), (1,), (1,), (False,)),
    "1-D dilated, ragged classes": ((13,), (3,), (2,), (3,), (False,)),
    "1-D even": ((11,), (4,), (1,), (1,), (False,)),
    "1-D even, stride, causal, dilated": ((17,), (4,), (3,), (2,), (True,)),
    "2-D": ((9, 11), (3, 5), (1, 1), (1, 1), (False, False)),
    "2-D dilated": ((9, 11), (3, 4), (2, 1), (2, 2), (False, False)),
    "2-D last window overlaps": ((10, 9), (7, 3), (7, 3), (1, 2), (False, False)),
    "2-D causal rows": ((7, 9), (3, 5), (1, 2), (1, 1), (True, False)),
    "2-D window of 1": ((6, 8), (1, 3), (1, 1), (1, 1), (False, False)),
    "2-D one row": ((1, 9), (1, 4), (1, 2), (1, 1), (False, False)),
    "3-D": ((4, 5, 7), (3, 2, 5), (1, 2, 1), (1, 1, 1), (False, False, False)),
    "3-D causal time, dilated space": ((4, 7, 6), (2, 3, 2), (1, 3, 1), (1, 2, 3), (True, False, False)),
    "covered": ((6, 8), (3, 4), (1, 2), (2, 2), (False, False)),
    "windows": ((6, 8), (3, 4), (3, 4), (1, 2), (False, False)),
}


def axis_pairs(L, w, s, d, causal):
    """The rule on one axis, query by query: visible (L, L) and key - query in steps of the dilation."""
    visible, offset = torch.zeros(L, L).bool(), torch.zeros(L, L, dtype=torch.long)
    for i in range(L):
        p, n = i // d, len(range(i % d, L, d))
        if causal:
            leader = min(p // s * s + s - 1, n - 1)
            keys = [j for j in range(n) if j <= p and leader - j < w]
        else:
            leader = min(p // s * s + s // 2, n - 1)
            centre = min(max(leader, w // 2), n - 1 - (w - 1) // 2)
            keys = list(range(centre - w // 2, centre + (w - 1) // 2 + 1))
        for j in keys:
            visible[i, j * d + i % d] = True
            offset[i, j * d + i % d] = j - p
    return visible, offset


def pairs(grid, window, stride, dilation, causal):
    """The rule on the grid: visible (N, N), and for every axis the index into its side of the relative bias (N, N)."""
    axes = [axis_pairs(*each) for each in zip(grid, window, stride, dilation, causal, strict=True)]
    at = torch.tensor(list(itertools.product(*map(range, grid))))  # (N, axes)
    visible = torch.ones(len(at), len(at)).bool()
    index = []
    for a, ((seen, offset), w) in enumerate(zip(axes, window, strict=True)):
        visible &= seen[at[:, None, a], at[None, :, a]]
        index.append(offset[at[:, None, a], at[None, :, a]] + w - 1)
    return visible, index


def plain(q, k, v, rule, rel_bias=None, extra_k=None, extra_v=None, scale=None):
    """Dense attention under the rule's mask in the dtype of the inputs, as anyone would write it; float32 LSE at least."""
    grid, H = q.shape[1:-2], q.shape[-2]
    visible, index = pairs(grid, *rule)
    visible, index = visible.to(q.device), [x.to(q.device) for x in index]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    if extra_k is not None:
        k, v = torch.cat([k, extra_k], 1), torch.cat([v, extra_v], 1)
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    everyone = visible.new_ones(len(visible), k.shape[1] - len(visible))
    mask = torch.cat([visible, everyone], 1)

    def scores(q, k, rel_bias):
        s = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if rel_bias is not None:
            s = s + F.pad(rel_bias[(slice(None), *index)].to(s.dtype), (0, everyone.shape[1]))
        return s.masked_fill(~mask, -torch.inf)

    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.einsum("bhqk,bkhd->bqhd", scores(q, k, rel_bias).softmax(-1), v)
    lse = scores(q.to(wide), k.to(wide), rel_bias).logsumexp(-1)
    return out.unflatten(1, grid), lse.unflatten(2, grid)


def tensors(grid, window, *, B=2, H=4, Hk=2, D=8, T=0, bias=False, dtype=torch.float32, seed=0):
    """q, k, v, rel_bias, extra_k and extra_v; None for what is not asked for."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, *grid, H, D), *[(B, *grid, Hk, D)] * 2, (H, *(2 * w - 1 for w in window)), *[(B, T, Hk, D)] * 2]
    wanted = [True, True, True, bias, T > 0, T > 0]
    return [
        torch.randn(s, generator=g, dtype=torch.float64).to(dtype) if want else None
        for s, want in zip(shapes, wanted, strict=True)
    ]


def results(attend, inputs, with_lse=True):
    """out, lse and the gradients of all inputs under a fixed random cotangent of both."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out, lse = attend(*inputs)
    g = torch.Generator().manual_seed(1)
    loss = (out * torch.randn(out.shape, generator=g).to(out)).sum()
    if with_lse:
        loss = loss + (lse * torch.randn(lse.shape, generator=g).to(lse)).sum()
    named = zip(("q", "k", "v", "rel_bias", "extra_k", "extra_v"), inputs, strict=True)
    given = {name: x for name, x in named if x is not None}
    grads = torch.autograd.grad(loss, list(given.values()))
    found = {f"d{name}": grad for name, grad in zip(given, grads, strict=True)}
    return {"out": out, **({"lse": lse} if with_lse else {}), **found}


def attend_with(backend, rule, with_lse=True, **options):
    window, stride, dilation, causal = rule

    def attend(q, k, v, rel_bias, extra_k, extra_v):
        found = neighborhood_attention(
            q, k, v, window, stride=stride, dilation=dilation, causal=causal, rel_bias=rel_bias, extra_k=extra_k,
            extra_v=extra_v, return_lse=with_lse, backend=backend, **options,
        )  # fmt: skip
        return found if with_lse else (found, None)

    return attend


def check(backend, rule, inputs, with_lse=True, times=2.0, **options):
    actual = results(attend_with(backend, rule, with_lse, **options), inputs, with_lse)

    def oracle(q, k, v, *rest):
        return plain(q, k, v, rule, *rest, **options)

    same_dtype = results(oracle, inputs, with_lse)
    reference = results(oracle, [None if x is None else x.double() for x in inputs], with_lse)
    assert actual.keys() == reference.keys()
    for name in reference:
        assert_close_to_reference(
            actual[name], same_dtype[name], reference[name], name=f"{backend} {name}", times=times
        )
