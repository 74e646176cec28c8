"""What a handle keeps while a diffusers denoiser runs: the step, the token grid, the layouts; shared by the hosts.

`watch` follows every forward of a transformer. Plain PyTorch hooks open and close the forward, because they run however
other hooks wrap `forward` and come off cleanly in any order. diffusers' own hook registry is used for one thing only: its
stateful hooks are told by the pipeline which step and guidance branch a call belongs to.

Reading order: `Forward`, `Session`, `watch`. Importing this module imports diffusers, so hosts do it on installation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from mmeff.diffusion_attn._base import Grid, SparseAttention, timed_by
from mmeff.diffusion_attn._ordered import KernelLayout
from mmeff.handle import Handle
from mmeff.kernels import record
from mmeff.kernels.block_sparse import native
from mmeff.report import DENSE, FULL, SPARSE

MAX_GRIDS = 4  # sizes whose layouts a handle keeps; a server that sees more rebuilds the oldest in milliseconds


@dataclass(frozen=True)
class Forward:
    """One forward of one transformer: where in the generation it is and which layers the schedule keeps dense."""

    grid: Grid
    text_len: int
    step: int | None  # denoising step, shared by the guidance branches; None where nothing tells it
    dense_layers: frozenset[int]
    text_valid: Tensor | None = None  # (B,) text tokens in use of each sample, where prompts are padded
    obstacle: str | None = None  # why no layer of it can be sparse, where one is known: an unknown step or grid


@dataclass(frozen=True)
class KeptLayout:
    """A static layout on one device as `attend` takes it, with what is asked of it at every call."""

    layout: KernelLayout
    density: float
    is_full: bool


class Session:
    """The state of one handle: the forward that is running, and the layouts of the grids seen so far.

    Only the layouts outlive a forward, so nothing passes from one step, guidance branch or generation to the next.
    """

    def __init__(self, handle: Handle, method: SparseAttention, pipeline: Any | None) -> None:
        self.handle = handle
        self.method = method
        self.pipeline = pipeline  # whose scheduler tells the step where the pipeline's cache context does not
        self._now: Forward | None = None
        self._last: Forward | None = None
        self._layouts: OrderedDict[Hashable, dict[Hashable, KeptLayout]] = OrderedDict()

    # ---------------------------------------------------------------- a forward

    @property
    def now(self) -> Forward | None:
        """The forward that is running; in a backward pass, the one whose layers gradient checkpointing computes again.

        Padded prompts belong to one forward alone, so with them a recomputation is refused rather than guessed.
        """
        if self._now is None and self._last is not None and self._last.text_valid is None and _in_backward():
            return self._last
        return self._now

    @now.setter
    def now(self, forward: Forward | None) -> None:
        self._now = forward
        if forward is not None:
            self._last = forward

    def begin(
        self,
        *,
        grid: Grid,
        text_len: int,
        num_layers: int,
        device: torch.device,
        context: Any,
        text_valid: Tensor | None = None,
    ) -> Forward:
        """Start a forward: check the grid, find the step, and build the layouts that it will need.

        Raises: ValueError if the method cannot serve the grid, also when its schedule keeps this step dense, or if the
            schedule has more dense steps than there are, so that a generation fails at its start and not in its middle.
        """
        method = self.method
        method.check_grid(grid, text_len)
        step, num_steps = self._locate(context)
        if num_steps is not None and self.handle.enabled:
            method.check_steps(num_steps)
        obstacle = None
        if method.counts_steps and (step is None or num_steps is None):
            obstacle = "the pipeline tells neither its step nor the number of steps, which the schedule counts"
            dense = frozenset(range(num_layers))
        else:
            dense = frozenset(
                layer
                for layer in range(num_layers)
                if method.is_dense(step=step, num_steps=num_steps, layer=layer, num_layers=num_layers)
            )
        self.now = Forward(grid, text_len, step, dense, text_valid, obstacle)
        self.handle.recorder.forwards += 1
        for layer in sorted(set(range(num_layers)) - dense):
            self.layout(layer, device)  # here, so that its time is not part of the first layer's
        return self.now

    def begin_dense(self, obstacle: str, *, num_layers: int, context: Any) -> Forward:
        """Start a forward that no layer can serve, for a reason that each of them will record."""
        step, _ = self._locate(context)
        self.now = Forward((0, 0, 0), 0, step, frozenset(range(num_layers)), obstacle=obstacle)
        self.handle.recorder.forwards += 1
        return self.now

    def _locate(self, context: Any) -> tuple[int | None, int | None]:
        """The step and the number of steps, from the cache context or from the pipeline's scheduler."""
        step, num_steps = getattr(context, "step_index", None), getattr(context, "num_inference_steps", None)
        if step is not None and num_steps is not None:
            return step, num_steps
        scheduler = getattr(self.pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if scheduler is None or timesteps is None:
            return None, None
        # A video-to-video run enters the schedule late: its steps are the last `num_timesteps` of the scheduler's.
        num_steps = getattr(self.pipeline, "num_timesteps", None) or len(timesteps)
        start = len(timesteps) - num_steps
        if hasattr(scheduler, "step_index"):
            index = scheduler.step_index  # None until the first step was taken
            return (0 if index is None else index - start), num_steps
        index = _position(timesteps, getattr(self.pipeline, "_current_timestep", None))  # CogVideoX's own schedulers
        return (None, None) if index is None else (index - start, num_steps)

    # ---------------------------------------------------------------- a layer

    def admits(self, layer: int, device: torch.device, *, tokens: int, obstacle: str | None) -> bool:
        """Whether a layer call goes to `attend`. If not, the host serves it dense, and it is recorded here.

        Args:
            tokens: tokens in the layer's input. obstacle: why the host cannot run this call sparse, or None.
        """
        now, recorder = self.now, self.handle.recorder
        if not self.handle.enabled:
            return False
        if now is None:
            recorder.fallback("the layer was called outside the forward of its transformer: step and grid are unknown")
            recorder.call(layer, DENSE)
            return False
        if now.obstacle is None and layer in now.dense_layers:
            recorder.call(layer, DENSE, step=now.step)
            return False
        F, H, W = now.grid
        obstacle = now.obstacle or obstacle
        if obstacle is None and tokens != F * H * W + now.text_len:
            obstacle = (
                f"the layer got {tokens} tokens, not those of the grid {F}x{H}x{W} and {now.text_len} text tokens"
            )
        if obstacle is not None:
            recorder.fallback(obstacle)
            recorder.call(layer, DENSE, step=now.step)
            return False
        kept = self.layout(layer, device)
        if kept is not None and kept.is_full:
            recorder.call(layer, FULL, step=now.step, density=1.0)
            return False
        return True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run the method on a call that was admitted, and record it. q, k, v and the result: (B, N, H, D)."""
        now, recorder = self.now, self.handle.recorder
        assert now is not None  # nothing is admitted outside a forward
        kept = self.layout(layer, q.device)
        layout = kept.layout if kept is not None else None
        with record() as calls, timed_by(recorder):
            out = self.method.attend(
                q, k, v, grid=now.grid, text_len=now.text_len, layer=layer, text_valid=now.text_valid, layout=layout
            )
        # a method may call kernels for its text or its parts too: the sparsest call is the one that is meant
        counted = [(call.density, i) for i, call in enumerate(calls) if call.density is not None]
        kernel = calls[min(counted)[1]] if counted else None
        density = kept.density if kept is not None else kernel.density if kernel is not None else None
        backend = kernel.backend if kernel is not None else None
        recorder.call(layer, FULL if density == 1.0 else SPARSE, step=now.step, density=density, backend=backend)
        slow = q.device.type == "cpu" and any(call.backend in ("gather", "sdpa") for call in calls)
        if slow and (reason := native.unavailable()) is not None:
            recorder.remark(f"no native kernels, so attention ran slower than it could: {reason}")
        return out

    # ---------------------------------------------------------------- layouts

    def layout(self, layer: int, device: torch.device) -> KeptLayout | None:
        """The layout of a layer in the current forward, built on first use; None for a dynamic method."""
        now = self.now
        assert now is not None
        if self.method.dynamic:
            return None
        of_grid = self._layouts.setdefault((now.grid, now.text_len), {})
        self._layouts.move_to_end((now.grid, now.text_len))
        while len(self._layouts) > MAX_GRIDS:
            self._layouts.popitem(last=False)
        key = (device, self.method.layout_key(layer))
        if key not in of_grid:
            # built outside inference mode, so that a layout made while sampling can serve a training step
            with self.handle.recorder.time("layout"), torch.inference_mode(False), torch.no_grad():
                layout = self.method.kernel_layout(grid=now.grid, text_len=now.text_len, layer=layer)
                of_grid[key] = KeptLayout(layout.to(device), layout.density, layout.is_full)
        return of_grid[key]

    def close(self) -> None:
        """Forget everything."""
        self._now = self._last = None
        self._layouts.clear()


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


# -------------------------------------------------------------------- following a transformer


def _position(timesteps: Any, now: Any) -> int | None:
    """Where the timestep of a pipeline's loop stands in its schedule, or None if it does not.

    The loop goes through views of the schedule, whose place is known without reading them from the device.
    """
    if not isinstance(timesteps, Tensor) or not isinstance(now, Tensor) or timesteps.ndim != 1 or now.ndim != 0:
        return None
    if now.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr():
        return int(now.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)
    found = (timesteps == now).nonzero()
    return int(found[0]) if len(found) else None


class _ContextReceiver(ModelHook):
    """Changes nothing. It is a stateful hook, so `transformer.cache_context(...)` leaves step and branch in it."""

    _is_stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.manager = StateManager(BaseState)  # diffusers annotates the instance, wants the class

    @property
    def context(self) -> Any:
        return self.manager._context  # the public property raises where no pipeline has set a context

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.manager.reset()
        return module


def watch(
    transformer: Any, session: Session, *, num_layers: int, sizes: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
) -> None:
    """Follow every forward of a transformer until the handle is removed.

    Args:
        num_layers: its attention layers.
        sizes: `(transformer, args, kwargs) -> (grid, text_len, device, text_valid)` of a forward, or None if the
            arguments do not tell; the model itself will complain about them. Where the forward cannot be sparse, the
            grid is a str, the reason.
    """
    handle = session.handle
    receiver = _ContextReceiver()
    open_spans = ExitStack()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        close()  # an interrupted forward may have left its span open
        found = sizes(module, args, kwargs)
        if found is None:
            return
        grid, text_len, device, text_valid = found
        if not handle.enabled:  # timed all the same: a disabled handle is how dense runs are measured
            open_spans.enter_context(handle.recorder.time("denoising, dense steps", device))
            return
        if isinstance(grid, str):
            now = session.begin_dense(grid, num_layers=num_layers, context=receiver.context)
        else:
            now = session.begin(
                grid=grid,
                text_len=text_len,
                num_layers=num_layers,
                device=device,
                context=receiver.context,
                text_valid=text_valid,
            )
        acts = len(now.dense_layers) < num_layers
        open_spans.enter_context(
            handle.recorder.time("denoising, sparse steps" if acts else "denoising, dense steps", device)
        )

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        close()

    def close() -> None:
        session.now = None
        open_spans.close()

    handle.on_remove(session.close)
    _receive_context(transformer, receiver, handle)
    handle.on_remove(transformer.register_forward_pre_hook(before, with_kwargs=True).remove)
    handle.on_remove(transformer.register_forward_hook(after, always_call=True).remove)


def _receive_context(module: Any, receiver: _ContextReceiver, handle: Handle) -> None:
    """Register the receiver, and hand its undo to the handle."""
    had_registry, had_forward = ("_diffusers_hook" in module.__dict__), ("forward" in module.__dict__)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    name = f"mmeff_context_{id(receiver):x}"
    registry.register_hook(receiver, name)
    _forget_children(registry)
    ours = module.__dict__["forward"]

    def undo() -> None:
        index = registry._hook_order.index(name)
        outer = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
        if outer is None and module.__dict__.get("forward") is not ours:
            return  # something else wrapped `forward` since: leave our empty wrapper inside it rather than lose theirs
        replaces = outer is not None and outer.original_forward is not None
        outer_forward = outer.forward if outer is not None else None
        registry.remove_hook(name, recurse=False)
        if outer is not None and replaces:
            # remove_hook puts the inner forward where the outer hook keeps its own; it belongs one attribute further
            outer.original_forward, outer.forward = outer.forward, outer_forward
        _forget_children(registry)
        # diffusers leaves `forward` and an empty registry in the instance: take out what came with us
        if not had_forward and module.__dict__.get("forward") == type(module).forward.__get__(module):
            del module.__dict__["forward"]
        if not had_registry and not registry.hooks:
            del module.__dict__["_diffusers_hook"]

    handle.on_remove(undo)


def _forget_children(registry: Any) -> None:
    """Drop diffusers' list of hooked children; without it a hook that came later is never told the context."""
    forget = getattr(registry, "invalidate_child_registries_cache", None)
    if forget is not None:  # older versions of diffusers keep no such list
        forget()
