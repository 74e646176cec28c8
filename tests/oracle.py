"""The comparator of the oracle tests: errors are judged against float64, and against what PyTorch achieves itself.

A kernel passes if its largest error is at most twice the largest error of a plain PyTorch computation in the same
dtype, plus a floor of a few roundings of the largest value. The bound adapts to dtype, size and values, so there is no
tolerance to loosen; tests/kernels/test_oracle.py shows that it rejects small mistakes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Roundings of the largest value that the floor grants. A float64 result is judged by a reference that is no better.
FLOOR_ROUNDINGS = {torch.float64: 64, torch.float32: 4, torch.float16: 1, torch.bfloat16: 1}
# The largest value counts at least this much, for results that are zero by cancellation of terms of order one.
FLOOR_SCALE = 0.25


def assert_close_to_reference(
    actual: Tensor,
    plain: Tensor,
    reference: Tensor,
    *,
    name: str = "result",
    times: float = 2.0,
    terms: float = 0.0,
    weighted: float = 0.0,
) -> None:
    """Assert that `actual` is about as close to the float64 `reference` as `plain` is.

    Args:
        actual: what the kernel under test returned.
        plain: the same quantity from plain PyTorch; its dtype is the one `actual` must have.
        reference: the same quantity in float64. Infinities must sit in the same places; NaN is never accepted.
        times: how many times the error of `plain` is allowed.
        weighted: size of a sum whose weights are exponentials, each rounded in the dtype of the computation; see
            `weighted_terms`.
        terms: size of the terms whose difference the result is, where they may cancel; see `gradient_terms`.
    """
    assert reference.dtype == torch.float64, f"{name}: the reference must be float64, got {reference.dtype}"
    assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(reference.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: dtype {actual.dtype}, wanted {plain.dtype}"
    assert not reference.isnan().any(), f"{name}: the reference itself holds NaN"
    actual64, plain64 = actual.detach().double(), plain.detach().double()
    assert not actual64.isnan().any(), f"{name}: {int(actual64.isnan().sum())} NaN of {actual.numel()}"
    infinite = reference.isinf()
    same = torch.equal(actual64[infinite], reference[infinite]) and torch.equal(actual64.isinf(), infinite)
    assert same, f"{name}: infinities differ from the reference's"
    finite = reference.detach()[~infinite]
    if not finite.numel():
        return
    error = (actual64[~infinite] - finite).abs().max().item()
    plain_error = (plain64[~infinite] - finite).abs().max().item()
    floor = (
        FLOOR_ROUNDINGS[actual.dtype]
        * torch.finfo(actual.dtype).eps
        * max(finite.abs().max().item(), FLOOR_SCALE, terms)
    )
    wide = torch.promote_types(actual.dtype, torch.float32)  # scores and weights are computed in at least float32
    floor += FLOOR_ROUNDINGS[wide] * torch.finfo(wide).eps * weighted
    bound = times * plain_error + floor
    assert error <= bound, (
        f"{name}: error {error:.3g} exceeds {times} x {plain_error:.3g} (plain {plain.dtype}) + floor {floor:.3g}"
    )


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Masked attention in the dtype of the inputs, as anyone would write it: out (B, Nq, H, D) and lse (B, H, Nq).

    mask is broadcastable to (B, H, Nq, Nk). Half-precision inputs get a float32 lse, computed in float32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    attends = mask.any(-1, keepdim=True)

    def scores_of(q: Tensor, k: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
        return torch.where(attends, torch.where(mask, scores, -torch.inf), 0.0)

    weights = torch.softmax(scores_of(q, k), -1)
    out = torch.einsum("bhqk,bkhd->bqhd", torch.where(attends, weights, 0.0), v)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.logsumexp(scores_of(q.to(wide), k.to(wide)), -1)
    return out, torch.where(attends[..., 0], lse, -torch.inf)


def gradient_terms(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scale: float | None = None) -> float:
    """Return the size of the terms that cancel in dq and dk: dout v^T against its mean under the weights.

    A backward pass that does not keep the weights takes that mean from dout * out, rounded in another order than dout v^T;
    where a query has one key the exact difference is 0, and what is left is a rounding of the terms.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    largest = (x.detach().double().norm(dim=-1).max().item() for x in (dout, v))
    return scale * next(largest) * next(largest) * max(x.detach().double().abs().max().item() for x in (q, k))


def weighted_terms(q: Tensor, k: Tensor, dout: Tensor, scale: float | None = None) -> float:
    """Return the size of the sums in dv, for a backward pass that makes the weights from the scores and the log-sum-exp.

    A weight is then off by roundings of its score, where plain softmax gives exactly 1 to a query with one key; over the
    queries that a key collects from, these errors add up like the square root of their number.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = scale * q.detach().double().norm(dim=-1).max() * k.detach().double().norm(dim=-1).max()
    queries = q.shape[1] * q.shape[2] // k.shape[2]
    return float(score * dout.detach().double().abs().max() * queries**0.5)
