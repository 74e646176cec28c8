"""MaxViT on our window and grid attention, and on images of any size.

Paper: Tu et al., "MaxViT: Multi-Axis Vision Transformer", ECCV 2022, arXiv:2204.01697. The models are timm's `maxvit_*`, with
their weights; nothing is registered here.

timm cuts a map into windows, or into a grid, of a size that was fixed with the model, and refuses maps that it does not divide:
a model for 224 pixels takes multiples of 224. `any_size` lifts that. Each attention layer pads its own map at the bottom
and at the right to the next multiple of its window, hides the padding from every query, and drops it again, so that windows
keep their size and their bias, and convolutions see the image as it is. Where a map of odd length is halved, timm's
convolution rounds up; its pooled shortcut, which rounds down in variants without TF's padding, is made to round up too. On
sizes that timm takes nothing is padded, and the result is timm's.

Differs: timm's own way to other sizes, `set_input_size`, changes the windows and interpolates their bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from timm.models.maxxvit import AttentionCl, Downsample2d, ParallelPartitionAttention, PartitionAttentionCl
from torch import Tensor, nn

from mmeff.kernels.partitioned import partitioned_attention
from mmeff.vision_backbones._windowed import rel_bias_of, rel_pos_obstacle

__all__ = ["any_size", "fixed_size"]

ModelT = TypeVar("ModelT", bound=nn.Module)
Attend = Callable[..., Tensor]
PARTITIONS = (PartitionAttentionCl, ParallelPartitionAttention)
ATTRIBUTE = "_partition_attn"  # timm's step from a normed map to attention over it, on both classes


def any_size(model: ModelT, *, small_input: Literal["pad", "error"] = "pad", backend: str = "auto") -> ModelT:
    """Let a timm MaxViT take images of any size, by padding each map to whole windows and hiding the padding.

    Args:
        model: a `maxvit_*` of timm, also as `features_only`; it is changed in place, its weights are not.
        small_input: what to do with a map smaller than a window: "pad" it to one window, or raise an "error".
        backend: of `partitioned_attention`.
    Returns: the same model. Copies and pickles of it take any size too; `fixed_size` undoes it.
    Raises:
        TypeError: the model has no MaxViT attention. ValueError: a layer of it cannot be served, or an unknown option.
    Numerics: on sizes that timm takes, those of `partitioned_attention`; padding is never seen, whatever it holds.
    """
    if small_input not in ("pad", "error"):
        raise ValueError(f"any_size: small_input must be 'pad' or 'error', got {small_input!r}.")
    found = _partitions(model, "any_size")
    for name, module in found:
        reason = obstacle(module) or taken(module)
        if reason is not None:
            raise ValueError(f"any_size cannot serve {name}: {reason}.")
    for _, module in found:
        setattr(module, ATTRIBUTE, AnySize(module, small_input, backend))
    round_up(model, True)
    return model


def fixed_size(model: ModelT) -> ModelT:
    """Undo `any_size`: the model is timm's own again.

    Raises: TypeError if the model has no MaxViT attention. ValueError if `any_size` did not act on it.
    """
    found = [
        module for _, module in _partitions(model, "fixed_size") if isinstance(vars(module).get(ATTRIBUTE), AnySize)
    ]
    if not found:
        raise ValueError(f"fixed_size: any_size did not act on this {type(model).__name__}; there is nothing to undo.")
    for module in found:
        delattr(module, ATTRIBUTE)
    round_up(model, False)
    return model


def round_up(model: nn.Module, up: bool) -> None:
    """Let the pooled shortcuts of a MaxViT halve an odd length as its convolutions do, or as timm has it.

    Even lengths, and variants with TF's padding, are not affected. The last pool of an odd length averages what there is.
    """
    for module in model.modules():
        if (
            isinstance(module, Downsample2d)
            and type(module.pool) in (nn.AvgPool2d, nn.MaxPool2d)
            and not module.pool.padding
        ):
            module.pool.ceil_mode = up


class AnySize:
    """What `any_size` puts in the place of one layer's `_partition_attn`; copied and pickled with its layer."""

    def __init__(self, module: Any, small_input: str, backend: str) -> None:
        self.module = module
        self.small_input = small_input
        self.backend = backend

    def __call__(self, x: Tensor) -> Tensor:
        window: tuple[int, int] = self.module.partition_size
        if self.small_input == "error" and (x.shape[1] < window[0] or x.shape[2] < window[1]):
            raise ValueError(
                f"MaxViT with small_input='error' needs maps of at least a window, {window[0]} x {window[1]}, in every layer, "
                f"got {x.shape[1]} x {x.shape[2]}; pass a larger image, or small_input='pad'."
            )
        return partition_attention(self.module, x, attend=partitioned_attention, backend=self.backend)


# ---------------------------------------------------------------- a layer


def partition_attention(module: Any, x: Tensor, *, attend: Attend, **options: Any) -> Tensor:
    """What timm's `_partition_attn` computes, without cutting the map into windows, and for maps of any size.

    Args:
        module: a PartitionAttentionCl or ParallelPartitionAttention. x: (B, H, W, C), normed.
        attend: `partitioned_attention` or a method's; options: further arguments of it.
    Returns: (B, H, W, C).
    """
    if isinstance(module, ParallelPartitionAttention):
        branches = ((module.attn_block, "window"), (module.attn_grid, "grid"))
        return torch.cat([_branch(a, x, module.partition_size, p, attend, options) for a, p in branches], -1)
    partition = "window" if module.partition_block else "grid"
    return _branch(module.attn, x, module.partition_size, partition, attend, options)


def _branch(
    attn: AttentionCl, x: Tensor, window: tuple[int, int], partition: str, attend: Attend, options: dict[str, Any]
) -> Tensor:
    H, W = x.shape[1:3]
    pad_h, pad_w = -H % window[0], -W % window[1]
    qkv = attn.qkv(x)
    mask = None
    if pad_h or pad_w:
        qkv = F.pad(qkv, (0, 0, 0, pad_w, 0, pad_h))
        rows, columns = (torch.arange(n, device=x.device) for n in (H + pad_h, W + pad_w))
        mask = ((rows < H)[:, None] & (columns < W))[None]
    if attn.head_first:  # each head's q, k and v lie together
        q, k, v = qkv.unflatten(-1, (attn.num_heads, 3 * attn.dim_head)).chunk(3, -1)
    else:
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.dim_head)).unbind(3)
    bias = rel_bias_of(attn.rel_pos)
    out = attend(q, k, v, window, partition=partition, rel_bias=bias, key_mask=mask, scale=attn.scale, **options)
    if mask is not None:
        out = out[:, :H, :W]
    projected: Tensor = attn.proj_drop(attn.proj(out.flatten(-2)))
    return projected


def obstacle(module: Any) -> str | None:
    """Why our attention cannot stand in for this layer's, or None."""
    for attn in attentions(module):
        if attn.attn_drop.p and attn.training:
            return f"it drops attention weights in training (attn_drop={attn.attn_drop.p}), which our operator does not"
        reason = rel_pos_obstacle(attn.rel_pos)
        if reason is not None:
            return reason
    return None


def attentions(module: Any) -> list[AttentionCl]:
    """The one or two attentions of a layer."""
    return [module.attn_block, module.attn_grid] if isinstance(module, ParallelPartitionAttention) else [module.attn]


def taken(module: nn.Module) -> str | None:
    """Who changed this layer's attention before us, in words, or None."""
    other = vars(module).get(ATTRIBUTE)
    if other is None:
        return None
    if isinstance(other, AnySize):
        return "any_size acts on it already; fixed_size undoes that"
    return f"its {ATTRIBUTE} was replaced by a {type(other).__name__}; remove that first"


def _partitions(model: nn.Module, who: str) -> list[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who} needs a timm MaxViT, got {type(model).__name__}.")
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, PARTITIONS)]
    if not found:
        raise TypeError(
            f"{who} needs a timm MaxViT such as maxvit_tiny_tf_224, got a {type(model).__name__}, which has no window or grid "
            "attention of timm's."
        )
    return found
