"""What an evaluation asks: one question about pictures and clips, or one prompt to generate a video from.

Every dataset yields `Sample`s, whatever its files look like, so that the runner, the models and the scores know one shape.
A sample is plain data: it goes to a worker as JSON and comes back the same, and holds no pixels. `mmeff.evaluation.media`
reads what its media name.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

TASKS = ("ask", "generate")
KINDS = ("video", "image")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INSTRUCTION = "Answer with the letter of the right option only."


@dataclass(frozen=True, kw_only=True)
class Media:
    """A picture or a clip of a sample.

    Fields:
        path: a file; a folder of frames in name order (a clip that a benchmark ships as pictures); or the name of something
            generated, such as "motions://24000/7", that is drawn when it is read.
        kind: what the model is shown: "video" or "image".
        start, end: seconds; the clip is only what lies between them. None is the beginning, or the end, of the file.
        fps: frames per second of a folder of frames; None for everything that knows its own times.
    Raises: ValueError for an unknown kind, times that are negative or out of order, or a cut of an image.
    """

    path: str
    kind: str = "video"
    start: float | None = None
    end: float | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind of {self.path} must be {' or '.join(KINDS)}, got {self.kind!r}")
        check_cut(self.start, self.end, self.path)
        if self.kind == "image" and (self.start, self.end, self.fps) != (None, None, None):
            raise ValueError(
                f"{self.path} is an image, which has no start, end or fps; leave them out, or say kind='video'"
            )
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps of {self.path} must be a positive number, got {self.fps!r}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One unit of an evaluation, before a method is chosen.

    Fields:
        id: unique in its dataset, and the same whenever the dataset is opened: results are found again by it.
        task: "ask" (a vision-language model answers) or "generate" (a video is made).
        prompt: all the text that the model is given, options and instruction included.
        answer: what is right: for options the letter of the right one, "A" to "Z", as two options may read the same; else
            the text. None where it is not known, as in test splits whose answers are held back.
        options: the texts to choose from, without letters; empty for an open answer.
        category: what scores are grouped by; "" for none.
        media: what the question is about, or what a video starts from, in the order in which it is shown.
        seed: of the noise that a video is made from; None for questions.
        meta: anything else worth keeping with a result, as plain JSON: the bare question, the duration group, references.
    Raises: ValueError for an empty id, an unknown task, a single option or an answer that is no option's letter; TypeError
        for meta that is not JSON.
    """

    id: str
    task: str
    prompt: str
    answer: str | None = None
    options: tuple[str, ...] = ()
    category: str = ""
    media: tuple[Media, ...] = ()
    seed: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("a sample needs an id that is not empty; results are found again by it")
        if self.task not in TASKS:
            raise ValueError(f"task of sample {self.id!r} must be {' or '.join(TASKS)}, got {self.task!r}")
        if len(self.options) == 1:
            raise ValueError(f"sample {self.id!r} has one option, {self.options[0]!r}; give two or more, or none")
        if len(self.options) > len(LETTERS):
            raise ValueError(
                f"sample {self.id!r} has {len(self.options)} options; at most {len(LETTERS)} have a letter"
            )
        if self.options and self.answer is not None and self.answer not in self.letters:
            raise ValueError(
                f"answer of sample {self.id!r} must be the letter of one of its {len(self.options)} options "
                f"({self.letters[0]} to {self.letters[-1]}), got {self.answer!r}"
            )
        try:
            json.dumps(self.meta, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"meta of sample {self.id!r} must be plain JSON: {error}") from error

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters of the options: "A", "B", ..."""
        return tuple(LETTERS[: len(self.options)])

    @property
    def answer_text(self) -> str | None:
        """What is right, in words: the text of the right option, or the open answer."""
        if self.answer is None or not self.options:
            return self.answer
        return self.options[LETTERS.index(self.answer)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, from which `from_dict` makes the same sample."""
        values = {name: getattr(self, name) for name in _FIELDS}
        values["options"] = list(self.options)
        values["media"] = [{k: v for k, v in vars(m).items() if v is not None} for m in self.media]
        values["meta"] = copy.deepcopy(self.meta)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sample:
        """The sample that `to_dict` described.

        Raises: ValueError for keys that a sample does not have.
        """
        unknown = sorted(set(values) - set(_FIELDS))
        if unknown:
            raise ValueError(f"a sample has no {', '.join(unknown)}; pass what Sample.to_dict returned")
        values = dict(values)
        values["options"] = tuple(values.get("options", ()))
        values["media"] = tuple(Media(**m) for m in values.get("media", ()))
        return cls(**values)


_FIELDS = tuple(f.name for f in fields(Sample))


def with_options(question: str, options: Sequence[str], instruction: str | None = None) -> str:
    """The prompt of a multiple-choice question: the question, one lettered line per option, and what to answer with.

    Args:
        question: without options. options: texts; with none, only the question is returned.
        instruction: the last line; None for "Answer with the letter of the right option only.", "" for none.
    """
    if not options:
        return question
    last = INSTRUCTION if instruction is None else instruction
    lines = [
        question,
        *(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)),
        *([last] if last else []),
    ]
    return "\n".join(lines)


def letter_of(answer: str, options: Sequence[str], where: str) -> str:
    """The letter of the option that `answer` means: its text, or else its letter.

    Args: where: what to call the row in an error.
    Raises: ValueError where it is neither.
    """
    for same in (
        str,
        lambda text: text.strip().casefold(),
    ):  # published files differ in spaces and capitals here and there
        texts = [same(text) for text in options]
        if same(answer) in texts:
            return LETTERS[texts.index(same(answer))]
    letters = LETTERS[: len(options)]
    bare = answer.strip().strip("().").upper()
    if len(bare) == 1 and bare in letters:
        return bare
    raise ValueError(
        f"answer of {where} must be one of its options, or a letter from {letters[0]} to {letters[-1]}, got {answer!r}; "
        f"the options are {', '.join(map(repr, options))}"
    )


def check_cut(start: float | None, end: float | None, what: str) -> None:
    """Raise ValueError unless `start` and `end` are seconds that can be the ends of a cut."""
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise ValueError(f"{name} of {what} must be a number of seconds, 0 or more, got {value!r}")
    if start is not None and end is not None and end <= start:
        raise ValueError(f"end of {what} must lie after its start at {start:g} s, got {end:g} s")
