"""The dry run of a sparse attention: what a schedule and a layout would do to a generation, without running the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmeff.diffusion_attn._base import Expected, Grid, SparseAttention
from mmeff.diffusion_attn._ordered import KernelLayout, OrderedLayout
from mmeff.handle import describe_model
from mmeff.kernels import BlockLayout, Bounds
from mmeff.kernels.calibration import Rates, sparse_rates, sparse_ratio
from mmeff.report import Plan

_NAMES = {"cpu": "this CPU", "cuda": "this GPU"}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Multiply-adds of one forward at batch 1: what dense self-attention costs in a layer, and everything else."""

    attention: float  # both products of one layer's self-attention
    layer: float  # the rest of one layer
    outside: float  # what is not in any layer


@dataclass(kw_only=True)
class Dimensions:
    """What a host makes of the sizes a user passed: rows to show and reasons why the run is not what was asked for."""

    grid: Grid
    text_len: int = 0  # text tokens inside self-attention
    rows: list[tuple[str, str]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def make_plan(
    model: Any,
    method: SparseAttention,
    *,
    host: str,
    sizes: Dimensions,
    num_steps: int,
    num_layers: int,
    work: Work,
) -> Plan:
    """Combine the sizes, the schedule, the layouts and the work of a forward into a Plan.

    Returns: a Plan whose `density` is the mean over the calls in which the method acts, as in a report, and whose
        `predicted_speedup` is that of the whole denoising loop on the model's device: the layouts' predictions weighted by
        multiply-adds.
        `layouts["video"]` is what the kernel reads in the first layer that the method serves; its blocks may be tiles.
    Raises: ValueError if the schedule names layers that the model does not have.
    """
    F, H, W = sizes.grid
    tokens = F * H * W + sizes.text_len
    rows, reasons = list(sizes.rows), list(sizes.reasons)
    rows.append(("grid", f"{F} x {H} x {W} = {F * H * W} video tokens, {sizes.text_len} text tokens in self-attention"))
    sparse_layers, dense_steps = _schedule(method, num_steps, num_layers)
    sparse_steps = num_steps - len(dense_steps)
    rows.append(("dense steps", f"{len(dense_steps)} of {num_steps}{_ranges(dense_steps)}"))
    dense_layers = sorted(set(range(num_layers)) - set(sparse_layers))
    rows.append(("dense layers", f"{len(dense_layers)} of {num_layers}{_ranges(dense_layers)}"))
    rows.append(("sparse layer calls", f"{sparse_steps * len(sparse_layers)} of {num_steps * num_layers}"))

    device = _device(model)
    at, ratio = sparse_rates(device.type), sparse_ratio(device.type)
    layouts: dict[int, KernelLayout] = {}
    expected: dict[int, Expected] = {}
    try:
        method.check_grid(sizes.grid, sizes.text_len)
    except ValueError as error:
        reasons.append(f"nothing would run: {error}")
    else:
        if not (sparse_steps and sparse_layers):
            reasons.append("the schedule leaves no layer and step to the method")
        elif method.dynamic:
            rows.append(
                ("note", "the layout depends on the data; density and speed are those of random queries and keys")
            )
            expected = _expected(method, sizes, sparse_layers, ratio)
        else:
            layouts = _layouts(method, sizes, sparse_layers)
            expected = {
                layer: Expected(layout.density, 1.0 if layout.is_full else layout.predicted_speedup(ratio))
                for layer, layout in layouts.items()
            }

    total = num_steps * (work.outside + num_layers * (work.layer + work.attention))
    share = num_steps * num_layers * work.attention / total
    rows.append(("self-attention's share", f"{share:.1%} of the multiply-adds of dense denoising"))
    density = speedup = factor = None
    if layouts:
        blocks = sum(_blocks(layout).block_density for layout in layouts.values()) / len(layouts)
        first = _blocks(next(iter(layouts.values())))
        rows.append(
            ("blocks", f"{first.q_block} x {first.kv_block} tokens, {first.nQ} x {first.nK}; {blocks:.4f} visited")
        )
        rows.append(("layout memory", f"{_bytes(layouts):,} bytes; an N x N mask would take {tokens**2:,}"))
    if expected:
        density = sum(e.density for e in expected.values()) / len(expected)
        saved = sum(1 - 1 / e.speedup for e in expected.values()) * work.attention * sparse_steps
        speedup = total / (total - saved)
        factor = len(expected) / sum(1 / e.speedup for e in expected.values())
        rows.append(("density", f"{density:.4f} of the pairs{_by_layer(expected)}"))
        rows.append(("predicted attention speedup", f"{factor:.2f}x where sparse"))
        known = "measured" if at.measured else "assumed; `mmeff calibrate` measures it"
        rows.append(
            (
                "predicted for",
                f"{_NAMES.get(device.type, device.type)}: {ratio:.2f} of dense throughput per visited pair, {known}",
            )
        )
        rows += _seconds(work.attention, factor, at, device.type)
        rows.append(("predicted denoising speedup", f"{speedup:.2f}x"))
        if layouts and all(layout.is_full for layout in layouts.values()):
            reasons.append("the layout attends to everything, so every call takes the model's own dense attention")
        elif factor < 1:
            rows.append(
                ("note", "dense attention is predicted to be faster here; backend='auto' takes it, with a mask")
            )
    return Plan(
        method=method.to_dict(),
        model=describe_model(model),
        host=host,
        rows=tuple(rows),
        density=density,
        predicted_speedup=speedup,
        predicted_attention=factor,
        fallbacks=tuple(reasons),
        layouts={"video": _blocks(next(iter(layouts.values())))} if layouts else {},
    )


def _device(model: Any) -> torch.device:
    """The device that a model computes on: of a pipeline whose weights wait elsewhere, that which they come to; of a model
    without weights, the one it would go to."""
    found = getattr(model, "_execution_device", None) or getattr(model, "device", None)
    if found is None:
        found = next((p.device for p in model.parameters()), "cpu")
    device = torch.device(found)
    if device.type == "meta":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device


def _schedule(method: SparseAttention, num_steps: int, num_layers: int) -> tuple[list[int], list[int]]:
    """Layers that are not dense by themselves, and steps in which every layer is dense."""
    dense_layers = method.dense_layer_ids(num_layers)
    sparse_layers = [layer for layer in range(num_layers) if layer not in dense_layers]
    dense_steps = [
        step
        for step in range(num_steps)
        if all(
            method.is_dense(step=step, num_steps=num_steps, layer=layer, num_layers=num_layers)
            for layer in sparse_layers
        )
    ]
    return sparse_layers, dense_steps


def _layouts(method: SparseAttention, sizes: Dimensions, layers: list[int]) -> dict[int, KernelLayout]:
    """What the kernel reads in every given layer; layers that share one share the object."""
    by_key: dict[Any, KernelLayout] = {}
    for layer in layers:
        key = method.layout_key(layer)
        if key not in by_key:
            by_key[key] = method.kernel_layout(grid=sizes.grid, text_len=sizes.text_len, layer=layer)
    return {layer: by_key[method.layout_key(layer)] for layer in layers}


def _expected(method: SparseAttention, sizes: Dimensions, layers: list[int], ratio: float) -> dict[int, Expected]:
    """What to expect of every given layer of a dynamic method."""
    by_key: dict[Any, Expected] = {}
    for layer in layers:
        key = method.layout_key(layer)
        if key not in by_key:
            by_key[key] = method.expect(grid=sizes.grid, text_len=sizes.text_len, layer=layer, ratio=ratio)
    return {layer: by_key[method.layout_key(layer)] for layer in layers}


def _by_layer(expected: dict[int, Expected]) -> str:
    """The densities of the layers where they differ: ` (layers 0, 2: 0.1; 1: 0.2)`."""
    layers: dict[str, list[int]] = {}
    for layer, e in expected.items():
        layers.setdefault(f"{e.density:.3f}", []).append(layer)
    if len(layers) == 1:
        return ""
    return " (" + "; ".join(f"layers{_ranges(which)} {density}" for density, which in layers.items()) + ")"


def _seconds(attention: float, factor: float, at: Rates, device_type: str) -> list[tuple[str, str]]:
    """How long one layer's attention takes at batch 1, dense and sparse, where this machine was calibrated."""
    if not at.measured:
        return []
    dense, dtype = attention / at.dense, "float32" if device_type == "cpu" else "bfloat16"
    where = f"attention of a layer on {_NAMES.get(device_type, device_type)}"
    return [(where, f"{dense:.3g} s dense, {dense / factor:.3g} s sparse, in {dtype}")]


def _blocks(layout: KernelLayout) -> BlockLayout:
    return layout.layout if isinstance(layout, OrderedLayout) else layout


def _bytes(layouts: dict[int, KernelLayout]) -> int:
    tensors: dict[int, Tensor] = {}
    parts: list[Any] = list(layouts.values())
    while parts:
        part = parts.pop()
        if isinstance(part, Tensor):
            tensors[id(part)] = part
        elif isinstance(part, (BlockLayout, OrderedLayout, Bounds)):
            parts += [getattr(part, f.name) for f in dataclasses.fields(part)]
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _ranges(numbers: list[int]) -> str:
    """` (0-3, 7)` for [0, 1, 2, 3, 7]; nothing for an empty list."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f" ({text})" if text else ""
