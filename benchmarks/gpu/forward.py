"""A denoising forward, dense and under every method, in alternation: whole forwards, their layers and their attention.

Dense attention is the fastest kernel that PyTorch has for these tensors, without the mask of a prompt that has no padding: what
a user gets from the stock class is timed beside it. Where a model is built with fewer layers, rows say how many, and
`estimated` holds what all of them would take: the measured time of a layer times their number, plus what lies outside.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

import mmeff
from mmeff.diffusion_attn._base import SparseAttention
from mmeff.kernels.calibration import sparse_ratio
from mmeff.report import Span

from .. import peers, timing
from ..workloads import Contender
from . import denoisers
from .denoisers import Scene, Setup
from .engine import Part, Task
from .rows import File
from .setting import Setting, need
from .workers import lost

ROUNDS = 4
LONG = 4.0  # seconds of a dense forward from which on two rounds have to do
STACK = "blocks of {}"


class Stage:
    """The model of a scene, built when it is first asked for and kept until another one is: tasks of a scene share it."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._key: Any = None
        self._held: tuple[Any, dict[str, Any]] | None = None

    def model(self, scene: Scene, layers: dict[str, int]) -> tuple[Any, dict[str, Any]]:
        """The transformer and its inputs."""
        key = (scene.model.name, scene.what, scene.train, tuple(layers.items()))
        if self._key != key or self._held is None:
            self.drop()
            dtype = torch.float32 if self.setting.smoke else torch.bfloat16
            self._held, self._key = denoisers.build(scene, layers, self.setting.device, dtype), key
        return self._held

    def drop(self) -> None:
        """Let go of the model."""
        self._key = self._held = None
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- clocks


class Clocks:
    """Spans of one forward, read when it has ended: its attention, and its blocks by stack."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spans: list[Span] = []

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Add a span."""
        span = Span(name, self.device)
        try:
            yield
        finally:
            span.end()
            self.spans.append(span)

    def seconds(self) -> dict[str, list[float]]:
        """Seconds of every span, by name; waits for the device."""
        found: dict[str, list[float]] = {}
        for span in self.spans:
            found.setdefault(span.name, []).append(span.seconds())
        return found


@contextmanager
def attention(scene: Scene, clocks: Clocks, kernel: str | None) -> Iterator[None]:
    """Time self-attention, stock or under a handle. kernel: run the stock one by this kernel and without masks; None: as it is."""
    from mmeff.diffusion_attn.hosts._denoiser import Session

    stock, sparse = F.scaled_dot_product_attention, Session.attend
    chosen = None if kernel is None else peers.DENSE[kernel]

    def dense(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if key.shape[-2] < scene.tokens:  # cross-attention, or the text's own
            return stock(query, key, value, *args, **kwargs)
        with clocks.time("attention"):
            if kernel is None:
                return stock(query, key, value, *args, **kwargs)
            kwargs.pop("attn_mask", None)  # no prompt here is padded, so that it hides nothing
            if chosen is None:
                return stock(query, key, value, **kwargs)
            with sdpa_kernel(chosen):
                return stock(query, key, value, **kwargs)

    def attend(session: Session, *args: Any, **kwargs: Any) -> Tensor:
        with clocks.time("attention"):
            return sparse(session, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", dense), mock.patch.object(Session, "attend", attend):
        yield


@contextmanager
def layers_of(transformer: nn.Module, scene: Scene, clocks: Clocks) -> Iterator[None]:
    """Time every block."""
    handles, began = [], {}

    def before(module: nn.Module, *_: Any, name: str) -> None:
        began[module] = Span(name, clocks.device)

    def after(module: nn.Module, *_: Any) -> None:
        span = began.pop(module)
        span.end()
        clocks.spans.append(span)

    for stack, found in denoisers.blocks(transformer, scene).items():
        for block in found:
            handles.append(block.register_forward_pre_hook(partial(before, name=STACK.format(stack))))
            handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def once(
    transformer: Any, inputs: dict[str, Any], scene: Scene, device: torch.device, kernel: str | None
) -> dict[str, Any]:
    """Seconds of one forward, or of a forward and backward: whole, in attention, and of each stack's blocks on the mean."""
    clocks = Clocks(device)
    transformer.zero_grad(set_to_none=True)
    with attention(scene, clocks, kernel):
        if scene.train:
            with clocks.time("whole"):
                transformer(**inputs)[0].float().square().mean().backward()
        else:
            with torch.no_grad(), layers_of(transformer, scene, clocks), clocks.time("whole"):
                transformer(**inputs)
    parts = clocks.seconds()
    (total,) = parts["whole"]
    if "attention" not in parts:
        raise RuntimeError("no self-attention was seen")
    stacks = {
        name: statistics.mean(parts[STACK.format(name)]) for name in scene.model.layers if STACK.format(name) in parts
    }
    return {"seconds": total, "attention": sum(parts["attention"]), "layers": stacks}


# ---------------------------------------------------------------- a task


def predicted(transformer: Any, scene: Scene, method: SparseAttention) -> dict[str, Any]:
    """What `mmeff.plan` says of one forward of this transformer, and of its attention, before anything runs.

    Returns: speedup and attention, times as fast as dense, both None with a `reason` where nothing is predicted; and `ratio`, the
        throughput per visited pair that the plan goes by.
    """
    nothing = {"speedup": None, "attention": None}
    if scene.train:
        return {**nothing, "reason": "plans predict denoising, and this is a forward and a backward pass"}
    sizes = {**scene.model.family.pixels(transformer.config, scene.grid), "text_tokens": scene.model.text}
    plan = mmeff.plan(transformer, method, **sizes, num_inference_steps=1)
    if plan.predicted_speedup is None:
        return {**nothing, "reason": "; ".join(plan.fallbacks)}
    return {
        "speedup": plan.predicted_speedup, "attention": plan.predicted_attention,
        "ratio": sparse_ratio(transformer.device.type),
    }  # fmt: skip


def measure(scene: Scene, setup: Setup, layers: dict[str, int], stage: Stage) -> dict[str, Any]:
    """The figures of a method on a scene with so many layers."""
    need("diffusers", "a denoising transformer")
    device = stage.setting.device
    method = setup.make()
    method.check_grid(scene.grid)
    transformer, inputs = stage.model(scene, layers)
    foretold = predicted(transformer, scene, method)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stock = once(transformer, inputs, scene, device, None)  # warms up, too
    kernel = _fastest(scene, device)
    began = time.perf_counter()
    with mmeff.accelerate(transformer, method) as handle:

        def run(enabled: bool) -> dict[str, Any]:
            handle.enabled = enabled
            return once(transformer, inputs, scene, device, None if enabled else kernel)

        run(True)  # plans, layouts, compilation
        first = time.perf_counter() - began
        handle.reset()
        rounds: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for turn in range(2 if stock["seconds"] > LONG else ROUNDS):
            found = {enabled: run(enabled) for enabled in ((False, True) if turn % 2 else (True, False))}
            rounds.append((found[False], found[True]))
        report = handle.report()
    if report.fallbacks or not report.accelerated:
        raise RuntimeError(f"{setup.name} did not run as it should: {dict(report.fallbacks)}, {report.calls}")
    ratio = timing.Spread.of([dense["seconds"] / fast["seconds"] for dense, fast in rounds])
    figures: dict[str, Any] = {
        "value": ratio.p50, "unit": "times as fast as dense", **({} if setup.bar is None else {"bar": setup.bar}),
        "ratio": asdict(ratio), "direction": "forward+backward" if scene.train else "forward",
        "seconds": _median(rounds, 1, "seconds"), "dense_seconds": _median(rounds, 0, "seconds"), "stock_seconds": stock["seconds"],
        "attention_seconds": _median(rounds, 1, "attention"), "dense_attention_seconds": _median(rounds, 0, "attention"),
        "attention_ratio": statistics.median(d["attention"] / f["attention"] for d, f in rounds),
        "dense_kernel": kernel, "first_seconds": first, "rounds": len(rounds),
        "layers": layers, "of_layers": scene.model.layers, "tokens": scene.tokens, "text": scene.model.text,
        "density": report.density, "backends": report.backends,
        "spans": {name: x / len(rounds) for name, x in report.seconds.items() if not name.startswith("denoising")},
        "model": scene.model.name, "what": scene.what, "method": setup.name, "preset": setup.preset, "config": method.to_dict(),
        "predicted": foretold, "quoted": None if setup.quoted is None else asdict(setup.quoted),
        "memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }  # fmt: skip
    if layers != scene.model.layers and not scene.train:
        figures["estimated"] = estimate(scene, setup, layers, rounds)
    return figures


def _fastest(scene: Scene, device: torch.device) -> str:
    """The dense kernel with which attention of these sizes takes the least time; PyTorch's own choice outside CUDA."""
    if device.type != "cuda":
        return "sdpa"
    config, found = scene.model.config, {}
    shape = (1, scene.tokens, config["num_attention_heads"], config["attention_head_dim"])
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=scene.train) for _ in range(3))
    direction = "forward+backward" if scene.train else "forward"
    for name in peers.DENSE:
        run = timing.runnable(Contender(peers.dense(name, q, k, v), (q, k, v)), direction)
        try:
            run()
            found[name] = timing._seconds(run, 1, device)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or lost(str(error)):
                raise
            # a kernel that does not take these tensors
    return min(found, key=found.__getitem__)


def _median(rounds: list[tuple[dict[str, Any], dict[str, Any]]], side: int, name: str) -> float:
    return statistics.median(pair[side][name] for pair in rounds)


def estimate(
    scene: Scene, setup: Setup, layers: dict[str, int], rounds: list[tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, float]:
    """What all layers would take: every layer sparse, and with those dense that the published schedule keeps dense."""
    per: list[dict[str, float]] = [
        {stack: statistics.median(pair[side]["layers"][stack] for pair in rounds) for stack in layers}
        for side in (0, 1)
    ]
    outside = [
        _median(rounds, side, "seconds") - sum(n * per[side][stack] for stack, n in layers.items()) for side in (0, 1)
    ]
    order = [stack for stack, n in scene.model.layers.items() for _ in range(n)]
    dense = outside[0] + sum(per[0][stack] for stack in order)
    sparse = outside[1] + sum(per[1][stack] for stack in order)
    scheduled = outside[1] + sum(per[int(i not in setup.dense_layers)][stack] for i, stack in enumerate(order))
    return {"dense_seconds": dense, "seconds": sparse, "value": dense / sparse, "with_dense_layers": dense / scheduled}


def tasks(setting: Setting, file: File) -> Generator[Task, None, None]:
    """Every method on every scene with few layers; then the headlines with all of them."""
    stage = Stage(setting)
    try:
        for full in (False, True):
            for scene in denoisers.scenes(smoke=setting.smoke):
                layers = scene.model.layers if full else scene.cut or scene.model.cut
                for setup in scene.setups:
                    if not full or setup.name in scene.full:
                        yield _task(scene, setup, layers, stage)
    finally:
        stage.drop()


def _task(scene: Scene, setup: Setup, layers: dict[str, int], stage: Stage) -> Task:
    depth = " + ".join(map(str, layers.values()))
    of = " + ".join(map(str, scene.model.layers.values()))
    name = f"{scene.model.name} | {scene.what} | {setup.name}: {setup.preset} | layers {depth} of {of}"
    run: Callable[[], dict[str, Any]] = partial(measure, scene, setup, layers, stage)
    # seven forwards at what a pair of tokens in a layer of 3072 channels may take, everything included
    pairs = scene.tokens**2 * sum(layers.values())
    return Task(name=name + (" | forward+backward" if scene.train else ""), seconds=25 + 7 * pairs * 3.5e-11, run=run)


PART = Part(name="forward", weight=3, tasks=tasks)
