"""The independent way to a sparse result: a stock processor of diffusers whose call of SDPA gets the method's dense mask.

Nothing of a host takes part: what the stock processor projects, orders, pads and drops stays as it is, and the mask is
brought into that order instead.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class MaskedSdpa(TorchFunctionMode):
    """Inside it, every call of SDPA over the video's tokens is masked as the method says.

    text_first: whether the text comes before the video there. A call with fewer text tokens than `text_len` has lost its
    padding.
    """

    def __init__(self, method, layer, grid, text_len, text_first):
        super().__init__()
        self.method, self.layer, self.grid, self.text_len, self.text_first = method, layer, grid, text_len, text_first
        self.calls = 0

    def mask(self, q):
        """(B|1, H|1, N, N) for q (B, H, N, D), in its order."""
        video, tokens = self.grid[0] * self.grid[1] * self.grid[2], q.shape[2]
        text = tokens - video
        assert 0 <= text <= self.text_len
        order = torch.arange(tokens).roll(-text) if self.text_first else torch.arange(tokens)  # ours -> theirs
        # of the padded text, as the host makes it
        layout = self.method.layout(grid=self.grid, text_len=self.text_len, layer=self.layer)
        mask = layout.to_dense_mask()[..., :tokens, :tokens]
        back = order.argsort()
        return mask[..., back, :][..., back]

    def attend(self, q, k, v, padding):
        """In place of SDPA for a method whose choice depends on q and k (B, H, N, D): what it makes of all tokens.

        padding: the stock mask, (B, 1, 1, N), or None.
        """
        video, tokens = self.grid[0] * self.grid[1] * self.grid[2], q.shape[2]
        text = tokens - video
        assert 0 <= text <= self.text_len
        text_valid = None if padding is None else padding[:, 0, 0].sum(dim=1) - video
        order = torch.arange(tokens).roll(-text) if self.text_first else torch.arange(tokens)
        q, k, v = (x[:, :, order].transpose(1, 2) for x in (q, k, v))
        out = self.method.attend(q, k, v, grid=self.grid, text_len=text, layer=self.layer, text_valid=text_valid)
        return out.transpose(1, 2)[:, :, order.argsort()]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            if self.method.dynamic:
                with torch._C.DisableTorchFunction():
                    tensors = args[:3] or (kwargs["query"], kwargs["key"], kwargs["value"])
                    return self.attend(*tensors, kwargs.get("attn_mask"))
            with torch._C.DisableTorchFunction():
                mask = self.mask(args[0] if args else kwargs["query"])
            given = kwargs.get("attn_mask")
            kwargs["attn_mask"] = mask if given is None else mask & given
        return func(*args, **kwargs)


def masked(stock, method, *, layer, grid, text_len=0, text_first=False, dense_calls=0):
    """A processor like `stock`, masked from its call number `dense_calls` on."""
    kind, left = type(stock), [dense_calls]

    class Masked(kind):
        @functools.wraps(kind.__call__)  # the attention modules look at its parameters
        def __call__(self, *args, **kwargs):
            left[0] -= 1
            if left[0] >= 0:
                return super().__call__(*args, **kwargs)
            with MaskedSdpa(method, layer, grid, text_len, text_first) as sdpa:
                out = super().__call__(*args, **kwargs)
            assert sdpa.calls, "the stock processor no longer calls SDPA"
            return out

    return Masked()


@contextmanager
def masked_attentions(attentions, method, *, dense_layers=(), **settings):
    """Inside the block the given attention modules, in layer order, are masked by the method."""
    stock = [attention.processor for attention in attentions]
    for layer, attention in enumerate(attentions):
        if layer not in dense_layers:
            attention.processor = masked(attention.processor, method, layer=layer, **settings)
    try:
        yield
    finally:
        for attention, processor in zip(attentions, stock, strict=True):
            attention.processor = processor
