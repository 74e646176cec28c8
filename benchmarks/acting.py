"""What dropping visual tokens costs a policy that acts: success of the tiny vision-language-action model in closed loop.

A variant is a method, the layer it prunes before, and the fraction of the visual tokens that stay from there on: how the papers
of this field count. Episodes come in batches of `BATCH`, batch i holding numbers i * BATCH to (i + 1) * BATCH - 1 of a split
of its own; `run` appends a row per batch and variant and goes on where it stopped; `acting_table` makes success rates of them.

Methods are compared before the same layer, so that a difference between them is one of what they keep. Layer 3 is the number
published for VLA-Pruner, layer 2 that for FastV, both for 32 layers. The later a method prunes the less it can lose: more layers
have then moved what they found in the picture into the text.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmeff import tiny
from mmeff.evaluation.closed_loop import closed_loop
from mmeff.pruning._base import TokenPruner
from mmeff.pruning.fastv import FastV
from mmeff.pruning.randompruning import RandomPruning
from mmeff.pruning.vlapruner import VLAPruner
from mmeff.tiny import manipulation

from . import scored
from .results import FOLDER

MODEL = "tiny-vla"
SEED = 29_000  # a split of its own: no setting was chosen by looking at it
BATCH = 25  # episodes that act together
KEEPS = (0.5, 0.25, 0.125)
LAYERS = (3, 2)
DENSE = "dense"
ROWS = FOLDER / "acting-tiny-vla.jsonl"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method, or dense without one. setting: digest of all that decides what it does; rows of another are never mixed in."""

    name: str
    label: str = DENSE
    layer: int | None = None
    keep: float | None = None
    method: TokenPruner | None = None
    setting: str = ""


def variants() -> list[Variant]:
    """Dense, then every method at every layer and fraction, in the order of the table."""
    weights = hashlib.sha256((tiny.data_folder() / MODEL / "model.safetensors").read_bytes()).hexdigest()

    def made(**fields: Any) -> Variant:
        method = fields.get("method")
        parts = [method and method.to_dict(), SEED, BATCH, manipulation.HORIZON, weights]
        return Variant(**fields, setting=hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8])

    found = [made(name=DENSE)]
    kinds: dict[str, Callable[..., TokenPruner]] = {"VLA-Pruner": VLAPruner, "FastV": FastV, "random": RandomPruning}
    for layer in LAYERS:
        for label, kind in kinds.items():
            found += [
                made(name=f"{label}, layer {layer}, {100 * keep:g}%", label=label, layer=layer, keep=keep, method=kind(layer=layer, keep=keep))
                for keep in KEEPS
            ]  # fmt: skip
    return found


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant in a batch of episodes.

    taken: control steps of each episode, None where it failed. counts: visual tokens of a control step, a mean over steps, by
    "last" (after the last pruning) and "mean" (over layers). seconds: of a control step of the batch, by part.
    """

    variant: str
    setting: str
    batch: int
    taken: list[int | None]
    counts: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def read(path: Path, which: list[Variant]) -> dict[str, dict[int, Row]]:
    """The last row of every variant and batch; rows of other settings are left out. Raises ValueError as `scored.read`."""
    return scored.read(path, "acting", Row, {v.name: v.setting for v in which}, lambda row: row.batch)


def run(
    *, episodes: int, only: tuple[str, ...], seconds: float | None, shard: tuple[int, int], out: Path,
    tick: Callable[[str, int, int], None],
) -> tuple[int, int, int]:  # fmt: skip
    """Act what the file does not hold yet, batch by batch. Returns the batches done, done before and left.

    Raises: ValueError for episodes that make no whole batches, an impossible shard, or texts that leave no variant.
    """
    part, parts = shard
    if episodes < BATCH or episodes % BATCH or not 1 <= part <= parts:
        raise ValueError(
            f"--episodes must be a multiple of {BATCH} and --shard i/n with 1 <= i <= n, got {episodes} and {part}/{parts}"
        )
    which = [v for v in variants() if not only or any(text in v.name for text in only)]
    if not which:
        raise ValueError(f"--only {' '.join(only)} leaves no variant; known: {'; '.join(v.name for v in variants())}")
    have = read(out, which)
    asked = [(index, v) for index in range(part - 1, episodes // BATCH, parts) for v in which]
    work = [(index, v) for index, v in asked if index not in have[v.name]]
    model, processor = tiny.vla()
    began, done = time.perf_counter(), 0
    for index, variant in work:
        if seconds is not None and time.perf_counter() - began > seconds:
            break
        tick(f"batch {index}: {variant.name}", done, len(work))
        scored.append(out, [act(model, processor, variant, index)])
        done += 1
    return done, len(asked) - len(work), len(work) - done


def act(model: Any, processor: Any, variant: Variant, index: int) -> Row:
    """One batch of episodes. Raises RuntimeError if the method fell back to dense: such actions are not the method's."""
    went = closed_loop(
        model, processor, seed=SEED, first=index * BATCH, episodes=BATCH, batch=BATCH, method=variant.method
    )
    counts = {}
    if went.report is not None:
        if went.report.fallbacks:
            raise RuntimeError(f"{variant.name} did not run as it should: {went.report}")
        counts = {
            short: float(went.report.tokens[long])
            for short, long in (("last", "kept at last"), ("mean", "mean over layers"))
        }
    return Row(
        variant=variant.name, setting=variant.setting, batch=index, taken=list(went.taken), counts=counts,
        seconds={part: float(f"{value:.4g}") for part, value in went.seconds.items()},
    )  # fmt: skip
