"""Generalised neighborhood attention: every token sees a window of the video around it, and groups of tokens share theirs.

Paper: Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light", 2025,
arXiv:2504.16922. The rule is that of NATTEN's current release (`mmeff/kernels/neighborhood/rule.py` states it); FreeSwim's
inward window (arXiv:2511.14712) is the same rule with stride 1 and all frames.

Differs:

* windows may be fractions of the grid or all of an axis, so that one config serves any resolution, and may change from
  layer to layer;
* text tokens are further keys in the same softmax, where NATTEN merges a second attention;
* FreeSwim changes the softmax scale for its resolution, runs a full branch beside the windows and shares its
  cross-attention; here are its windows alone, at the usual scale.

Attention runs in tile order: a block of the kernel is a small box of the grid and meets few other boxes, and where windows
begin and end on borders of tiles no block needs a mask. `layout` shows the same pairs in the order of the video.
Tiles mix the classes of a dilated window, so dilation costs more here than its density promises.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor

from mmeff.config import option
from mmeff.diffusion_attn import _windows
from mmeff.diffusion_attn._base import Grid, SparseAttention
from mmeff.diffusion_attn._ordered import KernelLayout, on_device
from mmeff.diffusion_attn._windows import AXES, Extent, Window
from mmeff.errors import suggest
from mmeff.kernels import BlockLayout
from mmeff.kernels.neighborhood.layout import window_layout
from mmeff.kernels.neighborhood.rule import Axis, Rule
from mmeff.kernels.neighborhood.tiling import pick_tile
from mmeff.registry import register

_COSMOS = "cosmos-transfer2.5, sparse_2B.py, grids of 44 x 80"
_LOCAL, _WIDE, _DENSE = ("all", 12, 24), ("all", 28, 56), ("all", "all", "all")

# window, stride and where they are from
_PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "hunyuanvideo": (
        {"window": (18, 24, 24), "stride": (16, 8, 8)},
        "arXiv:2504.16922, HunyuanVideo at 30 x 48 x 80; tiles of 2 x 8 x 8 make it perfectly block-sparse",
    ),
    "cosmos-90": ({"window": _LOCAL, "stride": (1, 4, 8)}, f"the layers marked 90 % in {_COSMOS}"),
    "cosmos-50": ({"window": _WIDE, "stride": (1, 4, 8)}, f"the layers marked 50 % in {_COSMOS}"),
    "cosmos-2b": (
        {
            "window": _LOCAL,
            "windows_per_layer": tuple(
                _DENSE if layer in (15, 18, 19, 23) else _WIDE if layer in (1, 9) or layer > 10 else _LOCAL
                for layer in range(28)
            ),
            "stride": (1, 4, 8),
        },
        f"COMB01 of {_COSMOS}: 28 layers, trained with these windows",
    ),
    "wan-freeswim": (
        {"window": ("all", 31, 53), "stride": 1},
        "arXiv:2511.14712: 2 * (base // 2) + 1 for the base 30 x 52 of 480 x 832 pixels (Wan2.1-1.3B)",
    ),
    "wan-freeswim-720p": (
        {"window": ("all", 45, 81), "stride": 1},
        "the same rule for the base 45 x 80 of 720 x 1280 pixels (Wan2.1-14B)",
    ),
}


@register
@dataclass(frozen=True, kw_only=True)
class GNA(SparseAttention):
    """Neighborhood attention over the video: a window around every token, shared by groups of `stride` tokens.

    The default is the window of HunyuanVideo as fractions of the grid; `for_model` has published settings. The window
    "all" on every axis is dense attention.
    """

    source: ClassVar[str] = "arXiv:2504.16922; the rule of NATTEN"

    window: tuple[Extent, Extent, Extent] = option(
        (0.6, 0.5, 0.3),
        "keys along F, H and W that a query sees: a number of tokens, a fraction of the axis (0.5), or 'all' (-1)",
        unit="tokens, or fractions",
        source="18 x 24 x 24 of 30 x 48 x 80, arXiv:2504.16922",
    )
    windows_per_layer: tuple[Window | None, ...] = option(
        (), "windows in place of `window`: layer i takes entry i modulo their number; None is `window`", unit="tokens"
    )
    stride: int | tuple[int, int, int] = option(
        1,
        "queries along F, H and W that share a window, at most the window; along an axis seen in full it changes nothing",
        unit="tokens",
        source="1 is a sliding window",
    )
    dilation: int | tuple[int, int, int] = option(
        1, "distance between the keys of a window along F, H and W", unit="tokens", source="1 has no gaps"
    )
    causal: bool | tuple[bool, bool, bool] = option(
        False, "whether F, H and W hide keys behind the query", source="NATTEN's is_causal"
    )
    tile: tuple[int, int, int] | None = option(
        None,
        "tokens of a tile along F, H and W, cut to the grid; None picks one of 64 to 128 tokens that visits the fewest "
        "pairs, or keeps the order of the video where that is cheaper",
        unit="tokens",
    )
    block: int = option(128, "tokens in a block where the order is that of the video", unit="tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = tuple(None if w is None else _windows.normal(w) for w in self.windows_per_layer)
        object.__setattr__(self, "window", _windows.normal(self.window))
        object.__setattr__(self, "windows_per_layer", layers)
        for field in ("stride", "dilation"):
            self.require(min(_three(getattr(self, field))) >= 1, field, "be >= 1 along every axis")
        if self.tile is not None:
            self.require(min(self.tile) >= 1, "tile", "be >= 1 token along every axis", "None picks it")
        self.require(self.block >= 1, "block", "be >= 1 token")
        for name, window in self._windows():
            _windows.check(name, window, "tokens")
            for axis, w, s, d in zip(AXES, window, _three(self.stride), _three(self.dilation), strict=True):
                if w == "all" and d > 1:
                    raise ValueError(
                        f"{name} must be a number or a fraction along a dilated axis, got 'all' along {axis} with dilation "
                        f"{d}; a dilated window never holds all of an axis."
                    )
                if type(w) is int and s > w:
                    raise self._stride_error(name, axis, s, w, "")

    @classmethod
    def for_model(cls, model: str, **fields: Any) -> GNA:
        """A published setting, with some fields changed.

        Args:
            model: hunyuanvideo (30 x 48 x 80); cosmos-2b, cosmos-90 or cosmos-50 (44 x 80; trained per layer, or one of the
                two windows throughout); wan-freeswim or wan-freeswim-720p, for sizes above 480 x 832 and 720 x 1280.
        Raises: ValueError for a model without a setting; TypeError for unknown fields.
        """
        found = _PRESETS.get(model.lower())
        if found is None:
            raise ValueError(
                f"GNA.for_model has no published setting for {model!r}.{suggest(model, _PRESETS)} "
                f"Known: {', '.join(_PRESETS)}; pass GNA(window=..., stride=...) for other models."
            )
        return cls(**found[0]).replace(**fields)

    # ---------------------------------------------------------------- windows

    def window_of(self, layer: int) -> Window:
        """The window of a layer as the config writes it."""
        if not self.windows_per_layer:
            return self.window
        return self.windows_per_layer[layer % len(self.windows_per_layer)] or self.window

    def rule(self, grid: Grid, layer: int = 0) -> Rule:
        """Which keys each query of a layer sees, for the kernels and the simulator. Raises as `check_grid`."""
        self.check_grid(grid)
        dilation, stride = _three(self.dilation), _three(self.stride)
        window = _windows.resolve(self.window_of(layer), [n // d for n, d in zip(grid, dilation, strict=True)])
        # an axis seen in full may have any stride in the config; the rule wants one that fits
        stride = tuple(min(s, w) for s, w in zip(stride, window, strict=True))
        axes = zip(grid, window, stride, dilation, _three(self.causal), strict=True)
        return Rule(tuple(Axis(*axis) for axis in axes))

    def layout_key(self, layer: int) -> Hashable:
        return self.window_of(layer)

    def check_grid(self, grid: Grid, text_len: int = 0) -> None:
        super().check_grid(grid, text_len)
        dilation, stride = _three(self.dilation), _three(self.stride)
        for axis, n, d in zip(AXES, grid, dilation, strict=True):
            if d > n:
                raise ValueError(
                    f"GNA.dilation must be <= the grid along every axis, got {d} along {axis} of {n} tokens at {grid}."
                )
        for name, window in self._windows():
            lengths = [n // d for n, d in zip(grid, dilation, strict=True)]
            sizes = _windows.resolve(window, lengths)
            for i, axis in enumerate(AXES):
                if sizes[i] > lengths[i]:
                    raise ValueError(
                        f"{name} * dilation must be <= the grid along every axis, got {sizes[i]} * {dilation[i]} along {axis} of "
                        f"{grid[i]} tokens at {grid}; pass at most {lengths[i]}, a fraction such as 0.5, or 'all'."
                    )
                if window[i] != "all" and stride[i] > sizes[i]:
                    raise self._stride_error(name, axis, stride[i], sizes[i], f" at {grid}")

    def _windows(self) -> list[tuple[str, Window]]:
        """Every window of the config with the name of its field."""
        found = [] if self.windows_per_layer and None not in self.windows_per_layer else [("GNA.window", self.window)]
        layers = enumerate(self.windows_per_layer)
        return found + [(f"GNA.windows_per_layer[{i}]", window) for i, window in layers if window is not None]

    def _stride_error(self, name: str, axis: str, stride: int, window: int, where: str) -> ValueError:
        return ValueError(
            f"GNA.stride must be <= the window along every axis, or some keys are seen by no query; got stride {stride} and "
            f"{name} {window} along {axis}{where}; pass a stride of at most {window}."
        )

    # ---------------------------------------------------------------- layouts

    def layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> BlockLayout:
        """The windows of a layer in the order of the video, with bounds for the pairs of partly attended blocks.

        Args: as `SparseAttention.layout`; k changes nothing.
        Returns: a BlockLayout of blocks of `block` tokens; text sees and is seen by all.
        Raises: as `check_grid`.
        Numerics: exact integers. Kept for the last rules asked for, on the CPU.
        Source: arXiv:2504.16922.
        """
        self.check_grid(grid, text_len)
        found = window_layout(self.rule(grid, layer), tile=None, block=self.block, text_len=text_len)
        return cast(BlockLayout, on_device(found.layout, None, text_len, None if q is None else q.device))

    def kernel_layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> KernelLayout:
        """The same windows in tile order, or `layout` where no tile pays for the reordering.

        Dense attention under a mask ("sdpa") computes every pair in any order, and takes no padding: it gets `layout` too.
        """
        self.check_grid(grid, text_len)
        rule = self.rule(grid, layer)
        tile = pick_tile(rule, self.block) if self.tile is None else tuple(map(min, self.tile, grid))
        if tile is None or self.backend == "sdpa":
            return self.layout(grid=grid, text_len=text_len, q=q, layer=layer)
        found = window_layout(rule, tile=tile, block=self.block, text_len=text_len)
        return on_device(found.layout, found.order, text_len, None if q is None else q.device)


def _three(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * 3
