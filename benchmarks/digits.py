"""Whether every family learns: scikit-learn's handwritten digits, enlarged, from nothing, on our kernels and on their reference.

A run is a family in a small configuration on one path. Both paths of a family start from the same weights and see the same
pictures in the same order, so that their loss curves lie on top of each other until rounding has grown; what the reference
learns, the kernels must learn. `run` trains what the results file does not hold, and appends a row per run.

1,797 pictures of 8 x 8 are few and easy: this shows that gradients, norms and bias tables work together, not which family is
the better one. The held-out pictures are a random fifth of each digit; their writers also wrote some of the others.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

import mmeff
import mmeff.vision_backbones  # registers the models
from mmeff.kernels import record
from mmeff.tiny import digit_backbones
from mmeff.vision_backbones.windowattention import WindowAttention

from . import scored
from .results import FOLDER, Machine

ROWS = FOLDER / "digits.jsonl"
KERNEL, REFERENCE = "kernel", "reference"
BAR = 0.97  # held-out accuracy that every run must reach
HELD_OUT = 0.2
BATCH = 32
SEED = 31_000
DECAY, SMOOTHING, CLIP = 0.05, 0.1, 5.0  # of weights, of labels, of the gradient's norm
TURN, SCALE, SHIFT = 0.15, 0.1, 0.1  # at most: radians, share of the size, half pictures


@dataclass(frozen=True, kw_only=True)
class Family:
    """A small member of a family and how it is trained.

    model: a timm name; small: the arguments that make it small; paths: what makes its kernel path and its reference path of it,
    further arguments or a method to accelerate it with. A family without attention has one path.
    """

    name: str
    model: str
    small: dict[str, Any]
    paths: dict[str, dict[str, Any] | WindowAttention]
    pixels: int = 48
    epochs: int = 24
    rate: float = 4e-3  # the highest of the one-cycle schedule

    def build(self, path: str) -> Any:
        """The untrained model on a path; the same weights for all of them."""
        torch.manual_seed(SEED)
        way = self.paths[path]
        more = way if isinstance(way, dict) else {}
        model = timm.create_model(self.model, in_chans=1, num_classes=10, drop_path_rate=0.0, **self.small, **more)
        if not isinstance(way, dict):
            mmeff.accelerate(model, way)
        return model

    def setting(self, path: str) -> str:
        """Digest of all that decides what a run does."""
        way = self.paths[path]
        parts = {**asdict(self), "paths": way if isinstance(way, dict) else way.to_dict()}
        parts["recipe"] = (HELD_OUT, BATCH, SEED, DECAY, SMOOTHING, CLIP, TURN, SCALE, SHIFT)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


_NA: dict[str, dict[str, Any] | WindowAttention] = {KERNEL: {"backend": "auto"}, REFERENCE: {"backend": "reference"}}
# Maps of 12, 6 and 3 tokens a side.
_PYRAMID = {"embed_dim": 32, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "mlp_ratio": 2.0, "kernel_size": 3}
FAMILIES = (
    Family(name="nat", model="nat_mini", small={**_PYRAMID, "dilations": (1, 1, 1)}, paths=_NA),
    Family(name="dinat", model="dinat_mini", small={**_PYRAMID, "dilations": (3, 2, 1)}, paths=_NA),
    Family(name="dinat_s", model="dinat_s_tiny", small={**_PYRAMID, "dilations": (3, 2, 1)}, paths=_NA),
    Family(
        name="nat_iso", model="nat_iso_small", paths=_NA, pixels=64, epochs=32, rate=3e-3,
        small={"embed_dim": 96, "depth": 5, "num_heads": 3, "mlp_ratio": 2.0, "kernel_size": 3},
    ),
    Family(
        name="biformer", model="biformer_tiny", epochs=12, rate=2e-3,
        small={"depths": (1, 1, 1, 1), "widths": (32, 64, 96, 128), "regions": 3, "topk": (1, 4, 8, None)},
        paths={KERNEL: {"routing_backend": "kernel"}, REFERENCE: {"routing_backend": "gather-reference"}},
    ),
    Family(
        name="focalnet_iso", model="focalnet_tiny_iso", paths={REFERENCE: {}}, pixels=64, epochs=20, rate=3e-3,
        small={"embed_dim": 96, "depths": (5,)},
    ),
    Family(
        name="maxvit", model="maxvit_pico_rw_256", epochs=12, rate=3e-3,
        paths={KERNEL: WindowAttention(when="always"), REFERENCE: {}},
        small={
            "img_size": 48, "stem_width": 16, "depths": (1, 1, 1), "embed_dim": (32, 64, 96), "block_type": ("M",) * 3,
            "transformer_window_size": (3, 3), "transformer_grid_size": (3, 3),
        },
    ),
)  # fmt: skip


class Pictures(NamedTuple):
    """Pictures (N, 1, S, S), about mean 0 and deviation 1, and their digits (N,); what pixels in [0, 1] had of both."""

    train: Tensor
    train_digits: Tensor
    test: Tensor
    test_digits: Tensor
    mean: float
    std: float


def pictures(pixels: int) -> Pictures:
    """The digits at a size, split the same way at every call.

    Raises: ModuleNotFoundError without scikit-learn, with what to install.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the handwritten digits come with scikit-learn, which is not installed; pip install 'mmeff[dev]'"
        ) from None
    data, digits = load_digits(return_X_y=True)
    x = torch.from_numpy(data).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(digits).long()
    mean, std = float(x.mean()), float(x.std())
    x = F.interpolate((x - mean) / std, (pixels, pixels), mode="bilinear", align_corners=False)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SEED))
    held = torch.zeros(len(y), dtype=torch.bool)
    for digit in range(10):
        of_digit = order[y[order] == digit]
        held[of_digit[: round(HELD_OUT * len(of_digit))]] = True
    return Pictures(x[~held], y[~held], x[held], y[held], mean, std)


def batches(data: Pictures, epochs: int, batch: int = BATCH) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of training, slightly turned, shifted and scaled; the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    most = torch.tensor([TURN, SCALE, SHIFT, SHIFT])[:, None]
    for _ in range(epochs):
        order = torch.randperm(len(data.train), generator=generator)
        for rows in order[: len(order) // batch * batch].split(batch):
            turn, scale, right, down = (2 * torch.rand(4, batch, generator=generator) - 1) * most
            cos, sin = turn.cos() * (1 + scale), turn.sin() * (1 + scale)
            matrix = torch.stack([cos, -sin, right, sin, cos, down], -1).view(-1, 2, 3)
            grid = F.affine_grid(matrix, [batch, *data.train.shape[1:]], align_corners=False)
            x = F.grid_sample(data.train[rows], grid, padding_mode="border", align_corners=False)
            yield x, data.train_digits[rows]


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW as timm sets it up: no decay of biases, norms and what the model itself names."""
    groups = param_groups_weight_decay(model, DECAY, getattr(model, "no_weight_decay", set)())
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def train(family: Family, path: str, data: Pictures, tick: Callable[[int, int], None]) -> tuple[Any, list[float]]:
    """Train from nothing; returns the model, in eval mode, and the loss of every step. Raises RuntimeError if it diverges."""
    model = family.build(path).train()
    optimizer = optimizer_of(model, family.rate)
    steps = family.epochs * (len(data.train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, family.rate, total_steps=steps, pct_start=0.25)
    losses = []
    for x, y in batches(data, family.epochs):
        loss = F.cross_entropy(model(x), y, label_smoothing=SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if not losses[-1] < 100:
            raise RuntimeError(f"{family.name} diverges on the {path} path: loss {losses[-1]} in step {len(losses)}")
        tick(len(losses), steps)
    return model.eval(), losses


def keep(model: Any, family: Family, data: Pictures, folder: Path, seconds: float) -> None:
    """Write a trained model as one of `mmeff.tiny.backbones`, with the accuracy that it has after rounding to float16."""
    name, pixels = f"digits-{family.name}", family.pixels
    config = {
        "model": family.model, "args": {"in_chans": 1, "num_classes": 10, "drop_path_rate": 0.0, **family.small},
        "input_size": [1, pixels, pixels], "mean": [data.mean], "std": [data.std], "classes": [str(i) for i in range(10)],
    }  # fmt: skip
    digit_backbones.save(model, folder, name, config)
    rounded, _ = digit_backbones.load(folder, name)
    found = accuracy(rounded, data.test, data.test_digits)
    about = {"held_out": len(data.test), "accuracy": round(found, 5), "processor_seconds": round(seconds, 1)}
    digit_backbones.save(model, folder, name, {**config, **about})


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, digits: Tensor) -> float:
    """Fraction that the model reads right."""
    right = sum(int((model(a).argmax(-1) == b).sum()) for a, b in zip(x.split(BATCH), digits.split(BATCH), strict=True))
    return right / len(x)


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. variant: family and path; setting: digest of what decides it; rows of another are never mixed in.

    error: standard error of the accuracy over held-out pictures. seconds: of one thread's processor time, training alone.
    backends: calls of each operator's backends in the first forward pass. losses: of every step.
    """

    variant: str
    setting: str
    family: str
    path: str
    model: str
    parameters: int
    accuracy: float
    error: float
    held_out: int
    seconds: float
    steps: int
    backends: dict[str, int]
    losses: list[float]
    hardware: str
    environment: dict[str, str] = field(default_factory=dict)
    commit: str | None = None


def runs(only: tuple[str, ...] = ()) -> list[tuple[Family, str]]:
    """Every family on each of its paths. Raises: ValueError if `only` leaves none."""
    found = [(f, path) for f in FAMILIES for path in f.paths if not only or any(text in f.name for text in only)]
    if not found:
        raise ValueError(f"--only {' '.join(only)} leaves no family; known: {', '.join(f.name for f in FAMILIES)}")
    return found


def variant(family: Family, path: str) -> str:
    """The name of a run in the file."""
    return f"{family.name}, {path}"


def read(path: Path) -> dict[str, Row]:
    """The last row of every run with its present settings, in the order of `FAMILIES`. Raises ValueError as `scored.read`."""
    settings = {variant(f, way): f.setting(way) for f, way in runs()}
    rows = scored.read(path, "digits", Row, settings, lambda row: row.path)
    return {name: next(iter(found.values())) for name, found in rows.items() if found}


def run(
    *,
    only: tuple[str, ...],
    seconds: float | None,
    out: Path,
    machine: Machine,
    tick: Callable[[str, int, int], None],
    weights: Path | None = None,
) -> tuple[int, int, int]:
    """Train what the file does not hold. Returns the runs done, done before and left.

    weights: folder for what the kernel paths have learnt, as the models of `mmeff.tiny.backbones`.

    Raises: RuntimeError if a run misses the bar; its row is written all the same.
    """
    have = read(out)
    asked = runs(only)
    work = [(f, way) for f, way in asked if variant(f, way) not in have]
    began, done, missed = time.perf_counter(), 0, []
    for family, way in work:
        if seconds is not None and time.perf_counter() - began > seconds:
            break
        name = variant(family, way)
        row = measure(family, way, machine, partial(tick, name), weights if way == KERNEL else None)
        scored.append(out, [row])
        done += 1
        if row.accuracy < BAR:
            missed.append(f"{name}: {row.accuracy:.1%}")
    if missed:
        raise RuntimeError(f"below the bar of {BAR:.0%} held-out accuracy: {'; '.join(missed)}")
    return done, len(asked) - len(work), len(work) - done


def measure(
    family: Family, path: str, machine: Machine, tick: Callable[[int, int], None], weights: Path | None = None
) -> Row:
    """One run; its weights go to the folder `weights`."""
    data = pictures(family.pixels)
    with record() as calls:
        family.build(path)(data.train[:BATCH])
    began = time.process_time()
    model, losses = train(family, path, data, tick)
    seconds = time.process_time() - began
    found = accuracy(model, data.test, data.test_digits)
    if weights is not None:
        keep(model, family, data, weights, seconds)
    return Row(
        variant=variant(family, path), setting=family.setting(path), family=family.name, path=path, model=family.model,
        parameters=sum(p.numel() for p in model.parameters()), accuracy=round(found, 5),
        error=round((found * (1 - found) / len(data.test)) ** 0.5, 5), held_out=len(data.test),
        seconds=round(seconds, 1), steps=len(losses), losses=[round(x, 4) for x in losses],
        backends=dict(Counter(f"{c.operator}: {c.backend}" for c in calls)),
        hardware=machine.hardware, environment=machine.environment, commit=machine.commit,
    )  # fmt: skip
