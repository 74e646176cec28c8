"""How many pictures a second vision backbones classify on a GPU, in bfloat16, beside the Swin and the ConvNeXt next to them.

Models and peers are those of `benchmarks backbones`. Where a model has a plain form, both must give the same classes in
float32 before anything is timed. Sides are timed in alternation; short calls are replayed from CUDA graphs where they can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmeff.kernels import record

from .. import backbones, timing
from ..backbones import PLAIN, Size
from ..cases import Unavailable
from .engine import Part, Task
from .rows import File
from .setting import Setting

MODELS = (
    "biformer_tiny",
    "dinat_tiny",
    "maxvit_tiny_tf",
    "nat_tiny",
    "dinat_s_tiny",
    "biformer_base",
    "dinat_base",
    "swin_tiny",
    "convnext_tiny",
)
SIZES: tuple[Size, ...] = ((224, 224), (384, 384), (512, 512))
PICTURES = {224: 128, 384: 48, 512: 32}  # in a batch: about as many tokens at every size
SECONDS = 1.0  # for the rounds of a pair


@torch.inference_mode()
def measure(name: str, size: Size, batch: int, setting: Setting) -> dict[str, Any]:
    """The figures of a model at a size. Raises: GateFailed if it and its plain form disagree."""
    device, dtype = setting.device, torch.float32 if setting.smoke else torch.bfloat16
    try:
        ours = backbones.build(name, size)
        peers = backbones.peers_of(name, backbones._parameters(ours))
        models = {name: ours, **{p: backbones.build(name if p == PLAIN else p, size, plain=p == PLAIN) for p in peers}}
    except (ValueError, AssertionError) as error:  # a family that does not take this size
        raise Unavailable(str(error).splitlines()[0]) from None
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(device)
    apart = None
    if PLAIN in models:
        few = x[: setting.pick(4, 1)]
        mine, its = (models[side].to(device)(few) for side in (name, PLAIN))
        apart = backbones.check_plain(name, models[PLAIN], few, mine, its)
    x = x.to(dtype)
    sides = {side: model.to(device, dtype) for side, model in models.items()}
    with record() as calls:
        sides[name](x)
    runs = {side: partial(_classify, model, x) for side, model in sides.items()}
    found: dict[str, Any] = {}
    for side in [s for s in sides if s != name] or [name]:
        timed = timing.compare(runs[name], runs[side], device, seconds=setting.pick(SECONDS, 0.01), graphs=True)
        found[side] = {
            "seconds": asdict(timed.peer), "ours": asdict(timed.ours), "ratio": asdict(timed.ratio), "clock": timed.clock,
            "per_second": batch / timed.peer.p50, "memory": timed.peer_bytes, "parameters": backbones._parameters(sides[side]),
        }  # fmt: skip
        mine = timed
    return {
        "value": batch / mine.ours.p50, "unit": "pictures per second", "batch": batch, "size": list(size), "dtype": str(dtype).removeprefix("torch."),
        "seconds": asdict(mine.ours), "memory": mine.ours_bytes, "parameters": backbones._parameters(ours), "peers": found,
        "error": apart, "backends": dict(Counter(f"{c.operator}: {c.backend}" for c in calls)),
    }  # fmt: skip


def _classify(model: Any, x: Tensor) -> Tensor:
    classes: Tensor = model(x)
    return classes


def tasks(setting: Setting, file: File) -> Generator[Task, None, None]:
    """Every model at every size."""
    for size in setting.pick(SIZES, ((64, 64),)):
        batch = setting.pick(PICTURES.get(size[0]), 1)
        for name in setting.pick(MODELS, ("biformer_tiny",)):
            run = partial(measure, name, size, batch, setting)
            yield Task(name=f"{name} | {size[0]} x {size[1]} | batch {batch}", seconds=25, run=run)


PART = Part(name="backbones", weight=1, tasks=tasks)
