"""Bi-level routing: which regions of a map a region attends to, and attention of its tokens to all tokens of those.

A map is cut into regions of equal size. Mean queries against mean keys say which regions belong together; every query then
attends to the tokens of the `topk` best regions, the same in every head. Reading order: `Regions` cuts a map, `route` picks,
`region_attention` attends by one of several backends, of which `choose` takes the one expected to be fastest.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023 (arXiv 2303.08810).
"""

from __future__ import annotations

import contextlib
import functools
import operator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mmeff.errors import BackendUnavailable, suggest
from mmeff.kernels import BlockLayout, dispatch
from mmeff.kernels.block_sparse import native, triton_impl
from mmeff.kernels.block_sparse.problem import BackwardProblem, Problem

OPERATOR = "region_attention"
RoutingBackend = Literal["auto", "masked", "gather", "kernel", "gather-reference"]
BACKENDS: tuple[str, ...] = get_args(RoutingBackend)
KERNELS: dict[str, ModuleType] = {"cpu": native, "cuda": triton_impl}

# ---------------------------------------------------------------- regions


@dataclass(frozen=True)
class Regions:
    """A map of height x width tokens cut into rows x cols regions of region_height x region_width.

    The regions may reach over the lower and the right border; what lies there is padding.
    """

    height: int
    width: int
    rows: int
    cols: int
    region_height: int
    region_width: int

    @property
    def count(self) -> int:
        """Regions."""
        return self.rows * self.cols

    @property
    def tokens(self) -> int:
        """Tokens of a region, padding included."""
        return self.region_height * self.region_width

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of padding."""
        return self.rows * self.region_height - self.height, self.cols * self.region_width - self.width

    def inside(self, device: torch.device) -> Tensor:
        """Tokens of each region that are not padding, (R,)."""
        sides = ((self.height, self.rows, self.region_height), (self.width, self.cols, self.region_width))
        rows, cols = ((n - torch.arange(count, device=device) * size).clamp(0, size) for n, count, size in sides)
        return (rows[:, None] * cols).flatten()

    def split(self, x: Tensor, fill: Tensor | None) -> Tensor:
        """Sort a map (B, height, width, C) by region, with `fill` (C,) as every token of padding: (B, R, T, C)."""
        if fill is not None:
            if not torch.compiler.is_compiling():  # compilers make one copy of the plain form, too
                out: Tensor = _Split.apply(x, fill, self)
                return out
            x = surround(x, fill, *self.padding)
        return self._cut(x, self.rows, self.cols).transpose(2, 3).reshape(len(x), self.count, self.tokens, -1)

    def _cut(self, x: Tensor, rows: int, cols: int) -> Tensor:
        """View a map of rows x cols regions, whatever their size, by region: (B, rows, height, cols, width, C)."""
        return x.unflatten(2, (cols, -1)).unflatten(1, (rows, -1))

    def join(self, x: Tensor, *, padding: bool = False) -> Tensor:
        """Undo `split`: (B, R, T, C) -> (B, height, width, C), or with the padding still on it."""
        B, _, _, C = x.shape
        x = x.view(B, self.rows, self.cols, self.region_height, self.region_width, C).transpose(2, 3)
        x = x.reshape(B, self.rows * self.region_height, self.cols * self.region_width, C)
        return x if padding else x[:, : self.height, : self.width]


def surround(x: Tensor, fill: Tensor, below: int, right: int) -> Tensor:
    """A map (B, H, W, C) with rows of `fill` (C,) below and columns of it on the right."""
    B, H, W, C = x.shape
    out = fill.expand(B, H + below, W + right, C).clone(memory_format=torch.contiguous_format)
    out[:, :H, :W] = x
    return out


class _Split(torch.autograd.Function):
    """`Regions.split` with padding, in one copy instead of three: whole regions, those that the border cuts, what lies beyond."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fill: Tensor, regions: Regions) -> Tensor:
        ctx.regions = regions
        B, H, W, C = x.shape
        high, wide = regions.region_height, regions.region_width
        (rows, rest_h), (cols, rest_w) = divmod(H, high), divmod(W, wide)
        out = x.new_empty(B, regions.rows, regions.cols, high, wide, C)
        at = out.transpose(2, 3)  # (B, rows, height, cols, width, C), as `_cut`
        for y, count_y, h in ((0, rows, high), (rows, 1, rest_h)):
            for z, count_z, w in ((0, cols, wide), (cols, 1, rest_w)):
                part = x[:, y * high : y * high + count_y * h, z * wide : z * wide + count_z * w]
                if part.numel():
                    at[:, y : y + count_y, :h, z : z + count_z, :w] = regions._cut(part, count_y, count_z)
        for beyond in (
            at[:, rows : rows + 1, rest_h:],
            at[:, rows + 1 :],
            at[:, :, :, cols : cols + 1, rest_w:],
            at[:, :, :, cols + 1 :],
        ):
            beyond[:] = fill
        return out.view(B, regions.count, regions.tokens, C)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        regions = ctx.regions
        padded = regions.join(grad, padding=True)
        below, right = padded[:, regions.height :], padded[:, : regions.height, regions.width :]
        fill = below.sum((0, 1, 2)) + right.sum((0, 1, 2))
        return padded[:, : regions.height, : regions.width], fill, None


def cut(height: int, width: int, regions: int | Literal["scaled"], *, reference: int, floor: bool) -> Regions:
    """Cut a map into regions.

    Args:
        height, width: of the map, in tokens. regions: per side; "scaled" grows it with the map: `reference` tokens have 7, and
            more of them ** (2 / 3) as many, which for squares is the paper's balance of S^2 ~ (HW)^(2/3) regions.
        reference: side of this stage's map in an image of 224 pixels.
        floor: regions of floor(side / regions) tokens, and as many as it takes; otherwise of ceil(side / regions), and as
            many as asked for, though the last ones may be padding only.
    """

    def side(n: int) -> tuple[int, int]:
        if regions == "scaled":
            wanted = 7 * max(1.0, n / reference) ** (2 / 3)
            size = max(1, round(n / wanted))
            return -(-n // size), size
        if floor:
            size = max(1, n // regions)
            return -(-n // size), size
        return regions, -(-n // regions)

    (rows, region_height), (cols, region_width) = side(height), side(width)
    return Regions(height, width, rows, cols, region_height, region_width)


def route(q: Tensor, k: Tensor, topk: int) -> Tensor:
    """Pick the regions that each region attends to.

    Args:
        q, k: (B, R, C) means of the queries and keys of each region, over all channels. topk: regions to pick, at most R.
    Returns: (B, R, topk) int64 regions, the best first. It carries no gradient.
    Numerics: affinities in at least float32, also under autocast; ties go to whichever torch.topk prefers.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with _without_autocast(q.device):
        affinity = q.detach().to(wide) @ k.detach().to(wide).transpose(1, 2)
    return affinity.topk(min(topk, q.shape[1]), dim=-1).indices


def _without_autocast(device: torch.device) -> Any:
    """As the kernels' own, and for devices that know no autocast: "meta", on which parameters and work are counted."""
    return contextlib.nullcontext() if device.type == "meta" else dispatch.without_autocast(device)


# ---------------------------------------------------------------- attention


def region_attention(qkv: Tensor, routes: Tensor, *, heads: int, scale: float, backend: str = "auto") -> Tensor:
    """Attend from the tokens of each region to all tokens of the regions that it picked.

    Args:
        qkv: (B, R, T, 3C) queries, keys and values, sorted by region. routes: (B, R, K) int64, distinct regions each.
        heads: H; channels are sorted by head. scale: factor on the scores.
        backend: "masked" is dense attention under a mask; "gather" copies the keys and values of the picked regions next to
            each other and attends to them densely; "kernel" is block-sparse attention, in C on CPUs and in Triton on GPUs,
            which copies nothing; "gather-reference" is the plain form of the published code, for comparison. "auto" takes
            what `choose` says. A named backend runs or raises.

    Returns: (B, R, T, C) in the dtype of qkv, with a gradient to qkv.
    Raises: BackendUnavailable where "kernel" is named and cannot run here.
    Numerics: softmax in float32 but for "gather-reference", which keeps the dtype of qkv. Gradients of keys and values that
        several regions picked add up in a fixed order, except in "gather-reference" on a GPU; in half precision "gather"
        sums them in float32.
    """
    name, reason = choose(qkv, routes, heads) if backend == "auto" else (backend, "named by the caller")
    if name == "kernel":
        training = torch.is_grad_enabled() and qkv.requires_grad
        return _kernel_op(qkv, routes, heads, scale, training, reason)[0]
    if not torch.compiler.is_compiling():
        R, K = routes.shape[1:]
        dispatch.note(OPERATOR, name, reason, lambda: K / R)
    return _PLAIN[name](qkv, routes, heads, scale)


def choose(qkv: Tensor, routes: Tensor, heads: int) -> tuple[str, str]:
    """Return the backend that "auto" takes, and why.

    On CPUs it is the one whose predicted time is the least. The prediction counts query-key pairs, copied numbers and calls;
    its constants were fitted to one thread of an AMD EPYC with AVX-512, float32, heads of 32 channels, and maps of 14 x 14 to
    133 x 133 tokens; for one image it was within 40 % of the measured time, and the order of the backends in training is the
    same. So BiFormer tiny takes "gather" in stages 1 and 2 and "masked" in stage 3 of an image of 224 pixels, and "kernel"
    throughout at 512. On other devices, where nothing has been measured, masks stay below a million pairs and the kernel waits
    for regions of 64 tokens, which fill its tiles.
    torch.compile compiles anew for every size of image, since the choice depends on it. torch.export gets "gather" whatever
    the size: plain PyTorch, so that the program runs on any machine, and on other sizes if it was exported for them.
    """
    if torch.compiler.is_exporting():
        return "gather", "auto: torch.export, which takes plain PyTorch"
    B, R, T, K, C = qkv.shape[0], *(operator.index(n) for n in qkv.shape[1:3]), routes.shape[2], qkv.shape[3] // 3
    N = R * T
    if qkv.device.type != "cpu":
        if N <= 1024:
            return "masked", "auto: a small map (a guess for this device)"
        if T >= 64 and kernel_missing(qkv.device.type, qkv.dtype) is None:
            return "kernel", "auto: regions that fill the kernel's tiles (a guess for this device)"
        return "gather", "auto: regions too small for the kernel's tiles (a guess for this device)"
    # nanoseconds
    best, name = B * N * N * (2.7 * heads + 2.2) + 4e5, "masked"
    gather = B * (heads * N * K * T * 2.6 + R * K * T * C * 0.92 + R * heads * 4e3) + 2e5
    if gather < best:
        best, name = gather, "gather"
    # keys in lanes of 16, each packed once; and what it takes to make a layout
    kernel = B * (heads * N * K * -(-T // 16) * 16 * 2.0 + N * C * 3.0) + 1.5e6
    if kernel < best and kernel_missing(qkv.device.type, qkv.dtype) is None:
        name = "kernel"
    return name, "auto: the least predicted time"


@torch.compiler.assume_constant_result
def kernel_missing(device_type: str, dtype: torch.dtype) -> str | None:
    """Return why "kernel" cannot run on such tensors here, or None."""
    backend = KERNELS.get(device_type)
    if backend is None:
        return f"there is no kernel for {device_type}"
    missing: str | None = backend.FORWARD.why_not(_probe(device_type, dtype))
    return missing


@functools.cache
def _probe(device_type: str, dtype: torch.dtype) -> Problem:
    x = torch.empty(1, 1, 1, 32, device=device_type, dtype=dtype)
    every = torch.ones(1, 1, dtype=torch.bool, device=device_type)
    return Problem(x, x, x, BlockLayout.from_block_mask(every, q_len=1, kv_len=1, q_block=1, kv_block=1), 1.0, False)


# ---------------------------------------------------------------- plain PyTorch


def _masked(qkv: Tensor, routes: Tensor, heads: int, scale: float) -> Tensor:
    B, R, T, _ = qkv.shape
    picked = torch.zeros(B, R, R, dtype=torch.bool, device=qkv.device).scatter(2, routes, True)
    mask = picked[:, None, :, None, :, None].expand(B, 1, R, T, R, T).reshape(B, 1, R * T, R * T)
    q, k, v = qkv.reshape(B, R * T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).reshape(B, R, T, -1)


def _gather(qkv: Tensor, routes: Tensor, heads: int, scale: float) -> Tensor:
    B, R, T, _ = qkv.shape
    K, C = routes.shape[2], qkv.shape[3] // 3
    picked = _Picked.apply(qkv[..., C:], routes).view(B * R, K * T, 2, heads, -1)
    q = qkv[..., :C].reshape(B * R, T, heads, -1).transpose(1, 2)
    k, v = picked.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(B, R, T, C)


class _Picked(torch.autograd.Function):
    """Rows of regions next to each other: x (B, R, T, C), routes (B, R, K) -> (B, R, K, T, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routes: Tensor) -> Tensor:
        B, R, T, C = x.shape
        ctx.save_for_backward(routes)
        return x.flatten(0, 1).index_select(0, _flat(routes)).view(B, R, -1, T, C)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (routes,) = ctx.saved_tensors
        B, R, K, T, C = grad.shape
        if grad.device.type == "cpu":
            wide = torch.promote_types(grad.dtype, torch.float32)
            total = grad.new_zeros(B * R, T * C, dtype=wide)
            total = total.index_add(0, _flat(routes), grad.reshape(B * R * K, T * C).to(wide))
            return total.view(B, R, T, C).to(grad.dtype), None
        # a product with ones and zeros: scatter-add on a GPU is atomic, so its sums depend on the run
        ones = grad.new_zeros(B, R, R * K).scatter(1, routes.reshape(B, 1, R * K), 1.0)
        with _without_autocast(grad.device):
            return (ones @ grad.reshape(B, R * K, T * C)).view(B, R, T, C), None


def _flat(routes: Tensor) -> Tensor:
    """Regions of all rows of a batch, numbered through: (B * R * K,)."""
    B, R, _ = routes.shape
    return (routes + torch.arange(B, device=routes.device)[:, None, None] * R).flatten()


def _gather_reference(qkv: Tensor, routes: Tensor, heads: int, scale: float) -> Tensor:
    B, R, T, _ = qkv.shape
    K, C = routes.shape[2], qkv.shape[3] // 3
    q, kv = qkv.split((C, 2 * C), -1)
    index = routes[..., None, None].expand(B, R, K, T, 2 * C)
    picked = torch.gather(kv[:, None].expand(B, R, R, T, 2 * C), 2, index)
    k, v = picked.view(B * R, K * T, 2, heads, -1).unbind(2)
    scores = (q.reshape(B * R, T, heads, -1).transpose(1, 2) * scale) @ k.permute(0, 2, 3, 1)
    out = scores.softmax(-1) @ v.transpose(1, 2)
    return out.transpose(1, 2).reshape(B, R, T, C)


_PLAIN = {"masked": _masked, "gather": _gather, "gather-reference": _gather_reference}

# ---------------------------------------------------------------- the kernel, as an operator of torch.library


@torch.library.custom_op("mmeff::region_attention", mutates_args=())
def _kernel_op(
    qkv: Tensor, routes: Tensor, heads: int, scale: float, training: bool, reason: str
) -> tuple[Tensor, Tensor]:
    """Return out (B, R, T, C) and the log-sum-exp (B, H, R * T), which is empty unless training."""
    backend = _kernel(qkv)
    problem = _problem(qkv, routes, heads, scale, training)
    dispatch.note(OPERATOR, "kernel", reason, lambda: problem.layout.density)
    out, lse = backend.FORWARD.run(problem)
    B, R, T, _ = qkv.shape
    return out.reshape(B, R, T, -1), qkv.new_empty(0, dtype=torch.float32) if lse is None else lse.contiguous()


@_kernel_op.register_fake
def _(qkv: Tensor, routes: Tensor, heads: int, scale: float, training: bool, reason: str) -> tuple[Tensor, Tensor]:
    B, R, T, C3 = qkv.shape
    lse = (B, heads, R * T) if training else (0,)
    return qkv.new_empty(B, R, T, C3 // 3), qkv.new_empty(lse, dtype=torch.float32)


@torch.library.custom_op("mmeff::region_attention_backward", mutates_args=())
def _kernel_backward_op(
    qkv: Tensor, routes: Tensor, out: Tensor, lse: Tensor, dout: Tensor, heads: int, scale: float
) -> Tensor:
    B, R, T, _ = qkv.shape
    forward = _problem(qkv, routes, heads, scale, True)
    tokens = (B, R * T, heads, -1)
    problem = BackwardProblem(forward, out.view(tokens), lse, dout.reshape(tokens), None, (True, True, True))
    grads = _kernel(qkv).BACKWARD.run(problem)
    return torch.cat([x.reshape(B, R, T, -1) for x in grads if x is not None], -1)


@_kernel_backward_op.register_fake
def _(qkv: Tensor, routes: Tensor, out: Tensor, lse: Tensor, dout: Tensor, heads: int, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _kernel(qkv: Tensor) -> Any:
    missing = kernel_missing(qkv.device.type, qkv.dtype)
    if missing is not None:
        raise BackendUnavailable(
            f'{OPERATOR}: backend "kernel" cannot run on these tensors: {missing}. Pass routing_backend="auto" to let the '
            "library choose."
        )
    return KERNELS[qkv.device.type]


def _problem(qkv: Tensor, routes: Tensor, heads: int, scale: float, training: bool) -> Problem:
    """The regions as blocks: every block of queries visits the blocks of keys that its region picked, in full."""
    B, R, T, _ = qkv.shape
    K, device = routes.shape[2], routes.device
    counts = torch.full((B * R,), K, dtype=torch.int32, device=device)
    rows = torch.arange(B * R, device=device)
    layout = BlockLayout(
        q_len=R * T, kv_len=R * T, q_block=T, kv_block=T, row_start=rows * K, n_partial=torch.zeros_like(counts),
        n_full=counts, col_idx=routes.sort(-1).values.flatten().to(torch.int32), row_of=rows.view(B, 1, R),
    )  # fmt: skip
    q, k, v = qkv.reshape(B, R * T, 3, heads, -1).unbind(2)
    return Problem(q, k, v, layout, scale, False, training)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, routes, ctx.heads, ctx.scale, _, _ = inputs
    ctx.save_for_backward(qkv, routes, *output)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    qkv, routes, out, lse = ctx.saved_tensors
    return _kernel_backward_op(qkv, routes, out, lse, dout, ctx.heads, ctx.scale), None, None, None, None, None


_kernel_op.register_autograd(_differentiate, setup_context=_setup_context)


def check_backend(name: str) -> str:
    """Return the name if it is that of a backend. Raises: ValueError, with near matches."""
    if name not in BACKENDS:
        raise ValueError(
            f"BiFormer.routing_backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}."
            f"{suggest(str(name), BACKENDS)}"
        )
    return name
