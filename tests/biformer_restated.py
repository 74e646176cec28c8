"""The published BiFormer said again in float64, on official weights: what tests compare the library's with.

Written from the description of the architecture, region by region and head by head, without the library.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor


def official_shapes(form: str, depths, widths, ratio: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official checkpoint, from the list of the published layouts."""
    found: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def batch_norm(name: str, width: int) -> None:
        layer(name, width)
        found.update({f"{name}.running_mean": (width,), f"{name}.running_var": (width,)})
        found[f"{name}.num_batches_tracked"] = ()

    one = (1, 1) if form == "stl_nchw" else ()
    for i, width in enumerate(widths):
        down = f"downsample_layers.{i}"
        if form == "conv":
            if i == 0:
                layer(f"{down}.0", width // 2, 3, 3, 3)
                batch_norm(f"{down}.1", width // 2)
            layer(f"{down}.{0 if i else 3}", width, widths[i - 1] if i else width // 2, 3, 3)
            batch_norm(f"{down}.{1 if i else 4}", width)
        elif i == 0:
            layer(f"{down}.0", width, 3, 4, 4)
            batch_norm(f"{down}.1", width)
        else:
            batch_norm(f"{down}.0", widths[i - 1])
            layer(f"{down}.1", width, widths[i - 1], 2, 2)
        for j in range(depths[i]):
            block = f"stages.{i}.{j}" if form == "conv" else f"stages.{i}.blocks.{j}"
            if form == "conv":
                layer(f"{block}.pos_embed", width, 1, 3, 3)
            layer(f"{block}.norm1", width)
            layer(f"{block}.norm2", width)
            layer(f"{block}.attn.lepe", width, 1, 5, 5)
            nchw = form == "stl_nchw"
            qkv, out = ("qkv", "proj") if i == 3 else ("qkv_linear", "output_linear") if nchw else ("qkv.qkv", "wo")
            layer(f"{block}.attn.{qkv}", 3 * width, width, *one, bias=i < 3)
            layer(f"{block}.attn.{out}", width, width, *one)
            layer(f"{block}.mlp.0", ratio * width, width, *one)
            layer(f"{block}.mlp.{3 if form == 'conv' else 2}", width, ratio * width, *one)
    batch_norm("norm", widths[-1])
    layer("head", classes, widths[-1])
    return dict(found)


def official_state(form: str, depths, widths, ratio: int, classes: int) -> dict[str, Tensor]:
    """Random weights under which every layer has a say, all of them float32 numbers."""
    state = {}
    for name, shape in official_shapes(form, depths, widths, ratio, classes).items():
        if name.endswith("tracked"):
            state[name] = torch.zeros(shape, dtype=torch.long)
        elif name.endswith("var") or (name.endswith("weight") and len(shape) == 1):
            state[name] = torch.rand(shape) + 0.5
        elif len(shape) == 1:
            state[name] = 0.1 * torch.randn(shape)
        else:
            state[name] = torch.randn(shape) / math.sqrt(math.prod(shape[1:]))
    return state


class Restated:
    """The published network on an official state dict, region by region. `gap` is the narrowest choice of a region."""

    def __init__(self, form: str, state: dict[str, Tensor], depths, topk=(1, 4, 16)) -> None:
        self.form, self.depths, self.topk, self.gap = form, depths, topk, math.inf
        self.state = {key: x.double() for key, x in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].flatten(1).T + self.state.get(f"{name}.bias", 0)

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        weight = self.state[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, padding, groups=groups)

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def down(self, i: int, x: Tensor) -> Tensor:
        name = f"downsample_layers.{i}"
        if self.form != "conv":
            if i == 0:
                return self.batch_norm(f"{name}.1", self.conv(f"{name}.0", x, 4))
            return self.conv(f"{name}.1", self.batch_norm(f"{name}.0", x), 2)
        if i == 0:
            x = F.gelu(self.batch_norm(f"{name}.1", self.conv(f"{name}.0", x, 2, 1)))
            return self.batch_norm(f"{name}.4", self.conv(f"{name}.3", x, 2, 1))
        return self.batch_norm(f"{name}.1", self.conv(f"{name}.0", x, 2, 1))

    def heads(self, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
        """(N, C), (M, C), (M, C) -> (N, C)."""
        parts = zip(*(x.chunk(heads, -1) for x in (q, k, v)), strict=True)
        return torch.cat([torch.softmax(scale * a @ b.T, -1) @ c for a, b, c in parts], -1)

    def routed(self, name: str, x: Tensor, topk: int) -> Tensor:
        """One map (H, W, C)."""
        H, W, C = x.shape
        nchw = self.form == "stl_nchw"
        names = ("qkv_linear", "output_linear") if nchw else ("qkv.qkv", "wo")
        size = (H // 7, W // 7) if nchw else (-(-H // 7), -(-W // 7))
        rows, cols = (-(-H // size[0]), -(-W // size[1])) if nchw else (7, 7)
        grow = (0, 0, 0, cols * size[1] - W, 0, rows * size[0] - H)
        real = F.pad(torch.ones(H, W, 1, dtype=torch.bool), grow)[..., 0].flatten()
        if nchw:
            qkv = F.pad(self.linear(f"{name}.{names[0]}", x), grow)
        else:
            qkv = self.linear(f"{name}.{names[0]}", F.pad(x, grow))
        q, k, v = qkv.flatten(0, 1).chunk(3, -1)
        row, col = torch.arange(rows * size[0])[:, None] // size[0], torch.arange(cols * size[1]) // size[1]
        region = (row * cols + col).flatten()
        counted = real if nchw else torch.ones_like(real)
        mean_q, mean_k = (torch.stack([t[(region == r) & counted].mean(0) for r in range(rows * cols)]) for t in (q, k))
        affinity = mean_q @ mean_k.T
        best, picks = affinity.sort(descending=True)
        # between two regions of nothing but padding there is no choice to make
        empty = torch.stack([~real[region == r].any() for r in range(rows * cols)])
        chosen = ~(empty[picks[:, topk - 1]] & empty[picks[:, topk]])
        gaps = (best[:, topk - 1] - best[:, topk])[chosen] / affinity.std()
        self.gap = min(self.gap, gaps.min().item())
        out = torch.empty_like(q)
        for r in range(rows * cols):
            seen = torch.isin(region, picks[r, :topk])
            out[region == r] = self.heads(q[region == r], k[seen], v[seen], C // 32, C**-0.5)
        of = v.view(rows * size[0], cols * size[1], C)
        if nchw:
            of = of[:H, :W]
        lepe = self.conv(f"{name}.lepe", of.permute(2, 0, 1)[None], padding=2)[0].permute(1, 2, 0)
        out = out.view(rows * size[0], cols * size[1], C)[:H, :W] + lepe[:H, :W]
        return self.linear(f"{name}.{names[1]}", out)

    def dense(self, name: str, x: Tensor) -> Tensor:
        H, W, C = x.shape
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, -1)
        of = v if self.form == "stl_nchw" else x
        out = self.heads(*(t.flatten(0, 1) for t in (q, k, v)), 8, (C // 8) ** -0.5).view(H, W, C)
        out = out + self.conv(f"{name}.lepe", of.permute(2, 0, 1)[None], padding=2)[0].permute(1, 2, 0)
        return self.linear(f"{name}.proj", out)

    def __call__(self, image: Tensor) -> Tensor:
        """One image (3, H, W) -> (classes,)."""
        x = image[None]
        for i, depth in enumerate(self.depths):
            x = self.down(i, x)
            for j in range(depth):
                block = f"stages.{i}.{j}" if self.form == "conv" else f"stages.{i}.blocks.{j}"
                if self.form == "conv":
                    x = x + self.conv(f"{block}.pos_embed", x, padding=1)
                y = x[0].permute(1, 2, 0)
                normed = self.layer_norm(f"{block}.norm1", y)
                attn = f"{block}.attn"
                y = y + (self.routed(attn, normed, self.topk[i]) if i < 3 else self.dense(attn, normed))
                hidden = F.gelu(self.linear(f"{block}.mlp.0", self.layer_norm(f"{block}.norm2", y)))
                y = y + self.linear(f"{block}.mlp.{3 if self.form == 'conv' else 2}", hidden)
                x = y.permute(2, 0, 1)[None]
        return self.linear("head", self.batch_norm("norm", x).mean((2, 3)))[0]
