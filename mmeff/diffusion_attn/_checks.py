"""What methods that look at q and k before they choose must not be given."""

from __future__ import annotations

import torch
from torch import Tensor


def require_finite(who: str, **tensors: Tensor) -> None:
    """Raise ValueError if a tensor holds NaN or an infinity: a selection made from it would be arbitrary.

    Tensors on a GPU are not looked at, because that would wait for the device. There a query of NaN attends to what is
    forced, and gives NaN as it does in dense attention.
    """
    for name, x in tensors.items():
        if x.device.type != "cpu":
            continue
        x = x.detach()
        # the sum is one fast pass, and not finite if a value is not; only large finite values need a second look
        if not torch.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32))):
            bad = int((~torch.isfinite(x)).sum())
            if bad:
                raise ValueError(
                    f"{who}: {name} must be finite, got {bad} NaN or infinite of {x.numel()} values; look for an overflow in "
                    "the layers before, or run them in bfloat16 or float32."
                )
