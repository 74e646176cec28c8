"""Let a vision-language-action policy act in the small manipulation task, and count successes.

At every control step the policy gets one picture and the instruction through the stock processor and `generate`, all
environments as one left-padded batch. Finished episodes stay in the batch, at rest: methods that keep a history per row, such as
VLA-Pruner, need every row to keep its place. Batches of episodes follow each other; each begins with `reset_episode`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mmeff.evaluation.questions import chat, picture
from mmeff.tiny import manipulation
from mmeff.tiny.vla_model import ACTION_TOKENS

Look = Callable[[np.ndarray], np.ndarray]
Hear = Callable[[list[str]], list[str]]


@dataclass(frozen=True, kw_only=True)
class ClosedLoop:
    """How a policy did.

    taken: control steps of each episode, None where it failed; control_steps: forward batches that ran; seconds: mean per
    control step of a batch, by part: "world" (rendering and moving), "prepare" (processor), "first" (until the first action
    token), "rest" (further tokens); report: what the method did, None for the plain model.
    """

    taken: tuple[int | None, ...]
    control_steps: int
    seconds: dict[str, float] = field(default_factory=dict)
    report: Any = None

    @property
    def episodes(self) -> int:
        """How many there were."""
        return len(self.taken)

    @property
    def successes(self) -> int:
        """How many succeeded."""
        return sum(steps is not None for steps in self.taken)

    @property
    def success(self) -> float:
        """Success rate."""
        return self.successes / self.episodes

    @property
    def error(self) -> float:
        """One standard error of the success rate, by Agresti and Coull's estimate, so that it is not 0 at 0 % and 100 %."""
        rate = (self.successes + 2) / (self.episodes + 4)
        return float(np.sqrt(rate * (1 - rate) / (self.episodes + 4)))

    @property
    def steps(self) -> float:
        """Mean control steps of the successful episodes, NaN without any."""
        return float(np.mean([s for s in self.taken if s is not None])) if self.successes else float("nan")

    def first(self, episodes: int) -> ClosedLoop:
        """The first episodes alone, to compare with a shorter run; times and report stay those of the whole."""
        return replace(self, taken=self.taken[:episodes])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the report."""
        return {
            "episodes": self.episodes, "success": self.success, "error": self.error,
            "steps": self.steps if self.successes else None, "control_steps": self.control_steps, "seconds": self.seconds,
        }  # fmt: skip


class ProcessorPolicy:
    """A model and its stock processor as a `manipulation.Policy`; measures what its parts take.

    Args:
        look, hear: change pictures and instructions before the model gets them, for controls such as a blind policy.
    """

    def __init__(self, model: Any, processor: Any, *, look: Look | None = None, hear: Hear | None = None) -> None:
        self.model, self.processor, self.look, self.hear = model, processor, look, hear
        self.spent = {"prepare": 0.0, "first": 0.0, "rest": 0.0}
        self.calls = 0

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, instructions: list[str]) -> np.ndarray:
        began = time.perf_counter()
        if self.look is not None:
            images = self.look(images)
        if self.hear is not None:
            instructions = self.hear(instructions)
        batch = self.processor(
            text=[chat(self.processor, text, 1) for text in instructions], images=[picture(image) for image in images],
            return_tensors="pt", padding=True,
        ).to(self.model.device)  # fmt: skip
        batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        ready, clock = time.perf_counter(), _Clock(self.model.device)
        out = self.model.generate(**batch, max_new_tokens=ACTION_TOKENS, do_sample=False, logits_processor=[clock])
        ended = clock.now()
        self.calls += 1
        for part, seconds in (
            ("prepare", ready - began), ("first", clock.first - ready), ("rest", ended - clock.first),
        ):  # fmt: skip
            self.spent[part] += seconds
        said = self.processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return np.array([manipulation.read_action(text) for text in said])


class _Clock:
    """A logits processor that changes nothing and notes when it is called first: the end of prefill."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.first = device, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first = self.first or self.now()
        return scores


def closed_loop(
    model: Any,
    processor: Any,
    *,
    seed: int,
    episodes: int,
    method: Any = None,
    batch: int = 32,
    horizon: int = manipulation.HORIZON,
    first: int = 0,
    look: Look | None = None,
    hear: Hear | None = None,
    progress: Callable[[int, int], None] | None = None,
    **fields: Any,
) -> ClosedLoop:
    """Run `episodes` episodes of the split `seed`, from number `first` on, the same ones whatever the batch.

    Args:
        method: a method, its class or its name, with `fields`, or a list; None runs the plain model.
        batch: environments that act together. horizon: control steps after which an episode has failed.
        look, hear: change pictures and instructions before the model gets them.
    Raises:
        ValueError: for sizes below 1.
    """
    for name, value in (("episodes", episodes), ("batch", batch), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if first < 0:
        raise ValueError(f"first must be the number of an episode, at least 0, got {first}")
    policy = ProcessorPolicy(model, processor, look=look, hear=hear)
    if method is None:
        return _run(policy, None, seed, range(first, first + episodes), batch, horizon, progress)
    import mmeff

    with mmeff.accelerate(model, method, **fields) as handle:
        return _run(policy, handle, seed, range(first, first + episodes), batch, horizon, progress)


def _run(
    policy: ProcessorPolicy, handle: Any, seed: int, episodes: range, batch: int, horizon: int,
    progress: Callable[[int, int], None] | None,
) -> ClosedLoop:  # fmt: skip
    began = time.perf_counter()
    taken: list[int | None] = []
    for start in range(0, len(episodes), batch):
        tables, state = manipulation.sample(seed, episodes[start : start + batch])
        begin_episode(handle)
        went = manipulation.rollout(policy, tables, state, horizon=horizon)
        taken += [int(n) if won else None for n, won in zip(went.steps, went.success, strict=True)]
        if progress:
            progress(start + len(tables), len(episodes))
    whole = time.perf_counter() - began
    seconds = {"world": whole - sum(policy.spent.values()), **policy.spent}
    return ClosedLoop(
        taken=tuple(taken),
        control_steps=policy.calls,
        seconds={part: total / max(policy.calls, 1) for part, total in seconds.items()},
        report=handle.report() if handle is not None else None,
    )


def begin_episode(handle: Any) -> None:
    """Tell every installed method that keeps a history that new episodes begin; others have none to forget."""
    for one in getattr(handle, "handles", [handle]) if handle is not None else []:
        try:
            one.reset_episode()
        except TypeError as error:  # how a method says that it keeps nothing
            if "no episode to reset" not in str(error):
                raise
