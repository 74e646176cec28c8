"""Fit methods to a model by watching its attention on a data set, with nothing pruned.

    found = calibrate_adaptinfer(model, processor, generated("tiny-vlm", 256), budget=0.5)
    found.method.to_yaml("adaptinfer.yaml")     # for accelerate(model, "adaptinfer.yaml") and --config

Attention comes through the hooks that pruning itself uses, by a method that keeps every token: so it is found in every
family of models, for the text rows alone, and without attention matrices.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import mmeff
from mmeff.config import MethodConfig, option
from mmeff.evaluation.questions import chat, motion_turns, scene_turns
from mmeff.pruning._base import Decision, LayerView, Need, TokenPruner
from mmeff.pruning._calibrate_adaptinfer import Trajectory, change_points
from mmeff.pruning._calibrate_adaptinfer import to_config as adaptinfer_of
from mmeff.pruning._calibrate_debiased import Trend, accumulate
from mmeff.pruning._calibrate_debiased import to_config as debiased_of
from mmeff.pruning._schedule import PrunePoint
from mmeff.pruning.debiased import Debiased

SEEDS = {"tiny-vlm": 19_000, "tiny-video-vlm": 29_000}  # splits of their own
GENERATED = 64  # questions drawn at a time

Sample = tuple[list[Any], str]  # PIL pictures, question
See = Callable[[LayerView], None]


@dataclass(frozen=True, kw_only=True)
class Watcher(TokenPruner):
    """Keeps every token, and shows the view of each prune point to the function given to `showing`. Not registered."""

    inner: TokenPruner | None = option(  # noqa: RUF009 - a field like the others
        None, "whose points are watched; None is before every layer"
    )

    @classmethod
    def showing(cls, see: See, inner: TokenPruner | None = None) -> Watcher:
        """A watcher that calls `see`."""
        made = cls(inner=inner)
        object.__setattr__(made, "_see", see)  # no field: it is no setting
        return made

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return self.inner.needs if self.inner else frozenset()

    def points(self, layers: int) -> tuple[PrunePoint, ...]:
        at = [p.layer for p in self.inner.points(layers)] if self.inner else range(layers)
        return tuple(PrunePoint(layer=layer, keep=1.0) for layer in at)

    def at_budget(self, mean: float, layers: int) -> Watcher:
        """Raises ValueError unless the budget is everything."""
        self.require(mean == 1, "inner", "be left alone by budgets", "a watcher keeps every token")
        return self

    def watches(self, layers: int) -> frozenset[int]:
        return self.inner.watches(layers) if self.inner else frozenset()

    def new_state(self) -> Any:
        return self.inner.new_state() if self.inner else None

    def decide(self, view: LayerView) -> Decision:
        self._see(view)  # type: ignore[attr-defined]
        return Decision(view.present)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A fitted method, of how many samples, and figures that say what it was fitted to."""

    method: MethodConfig
    samples: int
    figures: dict[str, Any]


def calibrate_adaptinfer(
    model: Any, processor: Any, samples: Iterable[Sample], *, budget: int | float, points: int = 3, batch: int = 8,
    tick: Callable[[int], None] = lambda done: None,
) -> Calibrated:  # fmt: skip
    """Find the layers where attention from text to the picture shifts, and solve the keeps for a budget.

    Args:
        samples: pictures and questions; all prompts must have the same number of visual tokens.
        budget: mean of visual tokens over layers: a fraction as a float, tokens as an int. points: stages at most.
        batch: prompts of a forward. tick: called with the samples done.
    Raises: ValueError without samples, where nothing changes, or where changes come too late for the budget.
    """
    layers = int(model.config.get_text_config().num_hidden_layers)
    trajectory = Trajectory(layers=layers)

    def see(view: LayerView) -> None:
        received = view.received("text", where="next").mean(1) / view.text.sum(1, keepdim=True).clamp(min=1)
        trajectory.update(view.point.layer, received)

    count = watch(model, processor, samples, Watcher.showing(see), batch=batch, tick=tick)
    method = adaptinfer_of(trajectory, budget, points)
    changes = change_points(trajectory.curves()[:-1], min(points, layers - 2))
    mass = [float(f"{x:.4g}") for x in trajectory.maps().sum(1).tolist()]
    return Calibrated(
        method=method, samples=count, figures={"changes at layers": list(changes), "text on picture": mass}
    )


def calibrate_debiased(
    model: Any, processor: Any, samples: Iterable[Sample], inner: TokenPruner, *, batch: int = 8,
    tick: Callable[[int], None] = lambda done: None, **fields: Any,
) -> Calibrated:  # fmt: skip
    """Fit how much more attention later tokens of a picture get in the scores of `inner`, whatever they show.

    Args: fields: of `Debiased`, such as padding; tokens that pad more than it are left out. Others as above.
    Raises: ValueError for a method that cannot be debiased, or without samples.
    """
    limit = Debiased(inner=inner, **fields).padding  # which says whether the method can be wrapped
    trend = Trend.empty()

    def see(view: LayerView) -> None:
        nonlocal trend
        shows = view.present if view.padded is None else view.present & (view.padded <= limit)
        trend = accumulate(trend, inner.score(view), view.raster, shows)

    count = watch(model, processor, samples, Watcher.showing(see, inner), batch=batch, tick=tick)
    method = debiased_of(trend, inner, **fields)
    return Calibrated(method=method, samples=count, figures={"rate": method.rate, "positions": len(trend.total)})


@torch.inference_mode()
def watch(
    model: Any, processor: Any, samples: Iterable[Sample], watcher: Watcher, *, batch: int, tick: Callable[[int], None]
) -> int:
    """Run the model over the prompts of all samples; returns how many there were. Raises ValueError for none."""
    done, left = 0, iter(samples)
    with mmeff.accelerate(model, watcher):
        while group := list(islice(left, batch)):
            inputs = processor(
                text=[chat(processor, question, len(pictures)) for pictures, question in group],
                images=[picture for pictures, _ in group for picture in pictures], return_tensors="pt", padding=True,
            ).to(model.device)  # fmt: skip
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            model(**inputs, logits_to_keep=1, use_cache=False)
            done += len(group)
            tick(done)
    if not done:
        raise ValueError("calibration needs samples, got none")
    return done


# -------------------------------------------------------------------- data


def generated(name: str, count: int) -> Iterable[Sample]:
    """Questions about generated scenes or clips, for the embedded model of that name, drawn as they are needed."""
    draw = scene_turns if name == "tiny-vlm" else motion_turns
    for start in range(0, count, GENERATED):
        for pictures, question, _ in draw(SEEDS[name], start // GENERATED, GENERATED)[: count - start]:
            yield pictures, question


def listed(path: str | Path, count: int | None = None) -> Sequence[Sample]:
    """Samples of a JSONL file, or of `questions.jsonl` in a folder: {"image": file or files, "question": text} per line.

    Files are relative to the JSONL file. All lines are checked before any picture is read.

    Raises: FileNotFoundError, MediaError: a file that is not there or no picture. ValueError: a line of another form.
    """
    from mmeff.video_io import read_image

    path = Path(path)
    file = path / "questions.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f'no questions at {file}; write {{"image": ..., "question": ...}} per line')
    rows: list[tuple[list[Path], str]] = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            names, question = row["image"], row["question"]
            names = [names] if isinstance(names, str) else names
            if not names or not isinstance(question, str) or not question.strip():
                raise ValueError("an image and a question that is not empty are needed")
            rows.append(([file.parent / name for name in names], question))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f'{file}, line {number}, must be {{"image": file or files, "question": text}}: {type(error).__name__}: {error}'
            ) from None
    for names, _ in rows[:count]:
        for name in names:
            if not name.is_file():
                raise FileNotFoundError(f"{file} names {name}, which does not exist")
    return _Read(rows[:count], read_image)


class _Read(Sequence[Sample]):
    """Samples whose pictures are read when they are asked for."""

    def __init__(self, rows: list[tuple[list[Path], str]], read: Callable[[Path], Any]) -> None:
        self._rows, self._read = rows, read

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        names, question = self._rows[index]
        return [self._read(name) for name in names], question
