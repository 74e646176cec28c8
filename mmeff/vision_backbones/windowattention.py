"""Window attention of timm's backbones on our partitioned kernel: MaxViT, Swin, DaViT and GC ViT, as they were trained.

Nothing is approximated: the same pairs attend with the same bias, and only the way to them changes. timm cuts a map into
windows by copies, rolls it for Swin's shift, builds the relative bias anew in every call and masks all windows for the sake
of a few; the kernel reads the map where it lies.

What a call gains depends on who asks: the figures behind `when="faster"` stand at `WindowAttention.why_not`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mmeff.config import option
from mmeff.kernels.partitioned import native, partitioned_attention
from mmeff.registry import register
from mmeff.vision_backbones._windowed import WindowCall, WindowMethod

__all__ = ["WindowAttention"]


@register
@dataclass(frozen=True, kw_only=True)
class WindowAttention(WindowMethod):
    """Exact window attention of timm's MaxViT, Swin, DaViT and GC ViT on a faster kernel.

    Results differ from timm's by rounding. Calls inside a compiled or exported graph are decided when it is traced, and the
    report does not count them.
    """

    source: ClassVar[str] = "arXiv:2103.14030, 2204.01697, 2204.03645, 2206.09959; timm's models"

    when: Literal["faster", "always"] = option(
        "faster",
        "which calls to take: those that were measured to be faster than timm's on such a machine, or all that can be",
        source="ours",
    )
    backend: Literal["auto", "native", "sdpa", "reference"] = option(
        "auto", "backend of partitioned_attention; a named one also takes calls that may be slower", source="ours"
    )
    pad: bool = option(
        False,
        "let MaxViT take images of any size: pad maps that its windows do not divide, and hide the padding",
        source="ours; timm refuses such sizes",
    )

    @property
    def pads(self) -> bool:
        return self.pad

    def why_not(self, call: WindowCall) -> str | None:
        """A sentence why this call stays with timm, or None.

        Measured on one CPU core with AVX-512 in float32, at 224 and 448 pixels, CPU time of timm's attention layers over ours
        (of the whole model): MaxViT tiny 1.27 to 1.32 (1.03 to 1.05), Swin tiny 1.10 to 1.22 (1.01 to 1.14). At 224, whole
        models: GC ViT tiny 1.06; DaViT tiny, where timm's attention is fused and has no bias, 0.97. Forward and backward: 0.89 to
        1.00, because weights are computed again.
        """
        if call.pads or self.when == "always" or self.backend != "auto":
            return None  # timm cannot compute the first, and the user decided the others
        if call.device.type != "cpu":
            return (
                f"nothing was measured on {call.device.type}, so it may be slower than timm's; when='always' takes it"
            )
        if call.grad:
            return "a backward pass may follow, which is slower than timm's; infer under torch.no_grad()"
        if call.stock_fused and not call.biased:
            return "timm's attention is fused and has no bias here, which is as fast"
        if call.dtype not in native.DTYPES:
            return f"the C kernel computes in float32, and this is {call.dtype}"
        reason = native.unavailable()
        return None if reason is None else f"without the C kernel it is slower than timm's: {reason}"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Sequence[int],
        *,
        partition: Literal["window", "grid"] = "window",
        shift: Sequence[int] = (0, 0),
        rel_bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention within windows, on the backend of the config; as `partitioned_attention`."""
        return partitioned_attention(
            q, k, v, window, partition=partition, shift=shift, rel_bias=rel_bias, key_mask=key_mask, scale=scale,
            backend=self.backend,
        )  # fmt: skip
