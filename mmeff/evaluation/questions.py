"""Ask a vision-language model questions and count right answers, through the stock processor and `generate`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmeff import training
from mmeff.tiny import motions, scenes

Turn = tuple[list[Any], str, scenes.Question]  # pictures, prompt, and what is right


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Exact-match accuracy over `questions` questions, its binomial standard error, and accuracy per kind."""

    questions: int
    exact_match: float
    kinds: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """One standard error of the exact match."""
        return float(np.sqrt(self.exact_match * (1 - self.exact_match) / max(self.questions, 1)))


def picture(image: np.ndarray) -> Any:
    """A float image (h, w, 3) in [0, 1] as a PIL picture."""
    from PIL import Image

    return Image.fromarray((image * 255).round().astype(np.uint8))


@torch.inference_mode()
def answer(
    model: Any, processor: Any, pictures: list[list[Any]], questions: list[str], *, new_tokens: int = 16
) -> list[str]:
    """Greedy answers to one question per row of pictures, as one left-padded batch.

    Args:
        pictures: PIL images per question; a question's own `<image>` marks, or its chat template, take them in order.
        questions: prompts. Where the processor has a chat template it is used.
    """
    texts = [chat(processor, question, len(row)) for question, row in zip(questions, pictures, strict=True)]
    batch = processor(
        text=texts, images=[image for row in pictures for image in row], return_tensors="pt", padding=True
    ).to(model.device)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False)
    new = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def chat(processor: Any, question: str, images: int) -> str:
    """The prompt of one user turn: the processor's chat template, or image marks in front of the question."""
    if "<image>" in question:
        return question
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return "<image>" * images + f"\n{question}"


def scene_turns(seed: int, index: int, batch: int) -> list[Turn]:
    """A question about each scene of batch `index` of the split `seed`."""
    drawn, chance = scenes.sample(seed, index, batch), training.rng(seed, index, stream=1)
    asked = [scenes.ask(drawn, b, chance, 1)[0] for b in range(batch)]
    return [([picture(x)], q.text, q) for x, q in zip(drawn.images, asked, strict=True)]


def motion_turns(seed: int, index: int, batch: int) -> list[Turn]:
    """A question about each clip of batch `index` of the split `seed`; its frames are the pictures."""
    drawn, chance = motions.sample(seed, index, batch), training.rng(seed, index, stream=1)
    asked = [motions.ask(drawn, b, chance, 1)[0] for b in range(batch)]
    return [
        ([picture(x) for x in video], motions.prompt(q.text), q) for video, q in zip(drawn.videos, asked, strict=True)
    ]


def ask_scenes(
    model: Any, processor: Any, *, seed: int, count: int, batch: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:  # fmt: skip
    """Ask `count` generated questions, one per scene, and compare answers word by word.

    Args:
        seed: the split of `mmeff.tiny.scenes`. count: questions; batch: how many are generated together.
    """
    return _ask(model, processor, lambda index: scene_turns(seed, index, batch), count, batch, progress)


def ask_motions(
    model: Any, processor: Any, *, seed: int, count: int, batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:  # fmt: skip
    """Ask `count` generated questions, one per clip of `mmeff.tiny.motions`; see `ask_scenes`."""
    return _ask(model, processor, lambda index: motion_turns(seed, index, batch), count, batch, progress)


def _ask(
    model: Any, processor: Any, draw: Callable[[int], list[Turn]], count: int, batch: int,
    progress: Callable[[int, int], None] | None,
) -> Accuracy:  # fmt: skip
    """Ask the turns of batch after batch, `count` in all."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, count, batch):
        turns = draw(start // batch)[: count - start]
        said = answer(model, processor, [t[0] for t in turns], [t[1] for t in turns], new_tokens=3)
        for (_, _, question), text in zip(turns, said, strict=True):
            hits[question.kind].append(text == question.answer)
        if progress:
            progress(start + len(turns), count)
    every = [h for values in hits.values() for h in values]
    return Accuracy(
        questions=len(every),
        exact_match=float(np.mean(every)),
        kinds={k: float(np.mean(v)) for k, v in sorted(hits.items())},
    )
