"""Questions about generated clips for `train_cacovid`, as the tiny video VLM is asked them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from mmeff.evaluation.questions import Turn, motion_turns
from mmeff.pipelines.train_cacovid_prompts import VideoQuestion
from mmeff.tiny import motions

TRAIN_SEED, HELDOUT_SEED = 31_000, 32_000  # splits of their own: the model was not trained on these clips


class ClipQuestions:
    """A `VideoQuestions` that draws a new clip and one question about it for every step.

    Args: processor: of the tiny video VLM. held_out: questions that are never trained on.
    Raises: ValueError for none held out.
    """

    def __init__(self, processor: Any, *, held_out: int = 64) -> None:
        if held_out < 1:
            raise ValueError(f"held_out must be >= 1 question, got {held_out}")
        self._processor, self._count = processor, held_out

    def describe(self) -> dict[str, Any]:
        return {"name": "generated clips of mmeff.tiny.motions", "frames": motions.FRAMES, "held out": self._count}

    def training(self, seed: int, step: int) -> VideoQuestion:
        return self._question(motion_turns(TRAIN_SEED + seed, step, 1)[0])

    def held_out(self) -> Sequence[VideoQuestion]:
        return self._held_out

    @cached_property
    def _held_out(self) -> list[VideoQuestion]:
        return [self._question(turn) for turn in motion_turns(HELDOUT_SEED, 0, self._count)]

    def _question(self, turn: Turn) -> VideoQuestion:
        pictures, text, asked = turn
        tokenizer = self._processor.tokenizer
        answer = [*tokenizer(asked.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        inputs = self._processor(text=[text], images=pictures, return_tensors="pt")
        return VideoQuestion(dict(inputs), torch.tensor(answer), len(pictures))
