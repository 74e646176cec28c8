"""What all trainings share: optimisers, schedule, EMA, step-seeded randomness, logs and resumable checkpoints.

A run is a pure function of its config: every step draws from a generator seeded by (seed, step), so stopping and resuming
at any step gives the same run up to the order of floating-point sums. Checkpoints are safetensors and JSON; nothing is
pickled.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

# glibc gives large buffers back to the kernel by default, and a small model on a CPU then spends most of its time in page
# faults; idle OpenMP threads spin. Both are settled before Python starts, so training re-executes itself once.
CPU_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "200000000",
    "MALLOC_ARENA_MAX": "1",
    "GOMP_SPINCOUNT": "30000",
}


def reexec_with_cpu_environment() -> None:
    """Start this very command again with the allocator settings that CPU training needs, once, on Linux only."""
    if not sys.platform.startswith("linux") or os.environ.get("MMEFF_TRAIN_ENVIRONMENT"):
        return
    os.environ.update({k: os.environ.get(k, v) for k, v in CPU_ENVIRONMENT.items()}, MMEFF_TRAIN_ENVIRONMENT="1")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def rng(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The numpy generator of one step; streams keep data, dropout and noise apart."""
    return np.random.default_rng([seed, stream, step])


def torch_rng(seed: int, step: int) -> torch.Generator:
    """The torch generator of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (2**63))


class Optimizer:
    """Torch optimisers that step together at one learning rate, and whose state travels as flat tensors."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self.parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]

    def step(self, lr: float, *, clip: float = 1.0) -> float:
        """Clip to a global norm, step both at `lr`, clear gradients; return the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The optimiser state as flat tensors."""
        flat = {}
        for o, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    flat[f"optimizer.{o}.{i}.{name}"] = torch.as_tensor(value).contiguous()
        return flat

    def load_tensors(self, flat: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        for o, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in flat.items():
                if key.startswith(f"optimizer.{o}."):
                    _, _, i, name = key.split(".", 3)
                    state.setdefault(int(i), {})[name] = value
            full = optimizer.state_dict()
            full["state"] = state
            optimizer.load_state_dict(full)


class MuonWithAdamW(Optimizer):
    """Muon for the matrices inside layers, AdamW for everything else, at one learning rate."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], *, weight_decay: float = 0.0) -> None:
        muon = torch.optim.Muon(
            matrices, lr=1.0, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        super().__init__([muon, torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)])


def split_matrices(
    named: Iterable[tuple[str, nn.Parameter]], is_matrix: Callable[[str], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Two lists of trainable parameters: 2-D ones whose name satisfies `is_matrix`, and the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (matrices if parameter.ndim == 2 and is_matrix(name) else others).append(parameter)
    return matrices, others


def warmup_constant_linear(step: int, *, steps: int, lr: float, warmup: int, constant: float) -> float:
    """Linear warm-up, constant up to the fraction `constant` of all steps, then linear to zero."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = step / max(steps, 1)
    return lr if done < constant else lr * max(0.0, (1 - done) / max(1e-9, 1 - constant))


class Ema:
    """An exponential moving average of a module's parameters, with a warm-up so that early steps do not linger."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the module's weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in module.named_parameters():
            self.shadow[name].lerp_(p.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into `module`."""
        for name, p in module.named_parameters():
            p.copy_(self.shadow[name])


class Run:
    """The folder of one training: `log.jsonl`, and a checkpoint that is replaced atomically.

    A checkpoint holds tensors and a small JSON state. A folder that holds a run of another config is refused, so that two
    recipes never mix in one checkpoint.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.config = json.loads(json.dumps(config))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        stored = self.folder / "config.json"
        if stored.exists():
            before = json.loads(stored.read_text())
            if before != self.config:
                changed = sorted(k for k in {*before, *self.config} if before.get(k) != self.config.get(k))
                raise ValueError(
                    f"{self.folder} holds a run with other values of {', '.join(changed)}; "
                    "choose another --work folder, or delete the folder to start again"
                )
        else:
            stored.write_text(json.dumps(self.config, indent=1) + "\n")

    def log(self, **row: Any) -> None:
        """Append one row, stamped with seconds since this process began."""
        row = {**row, "seconds": round(time.monotonic() - self._began, 1)}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, tensors: dict[str, torch.Tensor], **state: Any) -> None:
        """Write a checkpoint under a temporary name and move it into place."""
        path = self.folder / "checkpoint.safetensors"
        draft = path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in tensors.items()}, draft, metadata={"state": json.dumps(state)})
        os.replace(draft, path)

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The last checkpoint's tensors and state, or None."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return None
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
        return load_file(path), state


def logged(folder: str | Path) -> list[dict[str, Any]]:
    """Every row that the run of a folder has logged, oldest first."""
    path = Path(folder) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def with_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` with every key behind `prefix.`, cloned so that tied weights may be saved twice."""
    return {f"{prefix}.{k}": v.detach().clone() for k, v in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors behind `prefix.`, keys shortened."""
    return {k.removeprefix(prefix + "."): v for k, v in tensors.items() if k.startswith(prefix + ".")}
