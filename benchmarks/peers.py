"""What the operators are compared with: PyTorch's dense attention in its kernels, and FlexAttention at the equal layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmeff.kernels import BlockLayout

from .cases import Unavailable

# None leaves the choice of the kernel to PyTorch, as nearly all model code does.
DENSE: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}
SPARSE = ("flex",)


def dense(name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Callable[[], Tensor]:
    """Return a call of dense attention on heads-last tensors, which are passed as the views that models pass.

    Raises: Unavailable for a kernel that cannot run these tensors.
    """
    kernel = DENSE[name]
    gqa = q.shape[2] != k.shape[2]

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=gqa
        )

    if kernel is None:
        return attend
    if q.device.type != "cuda":
        raise Unavailable(f"the {name} kernel of scaled_dot_product_attention is for CUDA, and q is on {q.device}")

    def attend_by() -> Tensor:
        with sdpa_kernel(kernel):
            return attend()

    return attend_by


def flex(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, direction: str) -> Callable[[], Tensor]:
    """Return a call of compiled FlexAttention over the same blocks; output (B, N, H, D). Its first call compiles.

    Raises: Unavailable for block sizes that its kernels do not have, and for gradients on CPU.
    """
    if q.device.type == "cpu" and direction != "forward":
        raise Unavailable("FlexAttention has no backward pass on CPU")
    if q.device.type == "cuda" and (layout.q_block % 64 or layout.kv_block % 64):
        raise Unavailable(f"FlexAttention needs multiples of 64, got blocks {layout.q_block} x {layout.kv_block}")
    mask = layout.to_flex()
    options = _small_tiles() if q.device.type == "cuda" and min(layout.q_block, layout.kv_block) < 128 else None
    gqa = q.shape[2] != k.shape[2]
    compiled = _compiled_flex()

    def attend() -> Tensor:
        out: Tensor = compiled(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask, enable_gqa=gqa,
            kernel_options=options,
        )  # fmt: skip
        return out.transpose(1, 2)

    return attend


def _small_tiles() -> dict[str, Any]:
    """Tiles of 64: the default ones of 128 rows do not fit into blocks of 64, and are an error there."""
    forward = {f"fwd_BLOCK_{side}": 64 for side in "MN"}
    return {**forward, **{f"bwd_BLOCK_{side}{i}": 64 for side in "MN" for i in (1, 2)}}


@functools.cache
def _compiler() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _compiled_flex() -> Callable[..., Any]:
    # every mask is new code to dynamo, which gives up compiling after a few of them
    torch._dynamo.reset()
    return _compiler()
