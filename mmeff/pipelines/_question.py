"""What goes into a vision-language model and what comes out: a question with its media read, and its answer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmeff.report import Report
from mmeff.video_io import Video, read

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_FRAMES = 8  # of a video, where neither a number nor a rate is asked for


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Which frames of a video a model was shown: positions in the file, seconds since its first frame, who read them, and
    whether they were shown as a video or as images."""

    path: str
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    backend: str
    shown_as: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """A question with its media read: `VisionLanguageModel.question` makes it, `ask` takes it.

    Fields: `text`; `pictures` RGB; `videos` those that the processor is given as videos; `frames` which frames of every
    video are shown, as a video or as pictures; `history` earlier questions of a conversation, and what was answered.
    """

    text: str
    pictures: tuple[Image, ...] = ()
    videos: tuple[Video, ...] = ()
    frames: tuple[Frames, ...] = ()
    history: tuple[tuple[Question, str], ...] = ()

    @property
    def turns(self) -> tuple[Question, ...]:
        """The questions of the conversation, this one last."""
        return (*(question for question, _ in self.history), self)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it; media come before the text of their question."""
        found = []
        for question, said in zip(self.turns, (*(said for _, said in self.history), None), strict=True):
            content: list[dict[str, str]] = [{"type": "image"}] * len(question.pictures)
            content += [{"type": "video"}] * len(question.videos) + [{"type": "text", "text": question.text}]
            found.append({"role": "user", "content": content})
            if said is not None:
                found.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
        return found


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was answered.

    Fields: `text`; `tokens` generated, the end token included; `prompt_tokens` read, visual ones included; `seconds` of
    "preparation" (the processor), "prefill" (up to the first token, with vision encoder and selection), "decode" (the
    tokens after it) and "total", of the whole batch of `batch` questions; `frames` of every video that was shown;
    `reports` of the methods that were on, over the batch; `complete` is False where it was cancelled.
    """

    question: str
    text: str
    tokens: int
    prompt_tokens: int
    seconds: dict[str, float]
    batch: int = 1
    frames: tuple[Frames, ...] = ()
    reports: tuple[Report, ...] = field(default=(), repr=False)
    complete: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "question": self.question, "answer": self.text, "tokens": self.tokens, "prompt_tokens": self.prompt_tokens,
            "seconds": dict(self.seconds), "batch": self.batch, "complete": self.complete,
            "frames": [{**vars(f), "indices": list(f.indices), "timestamps": list(f.timestamps)} for f in self.frames],
            "reports": [report.to_dict() for report in self.reports],
        }  # fmt: skip

    def __str__(self) -> str:
        return self.text


def media_of(asked: Sequence[Question]) -> dict[str, Any]:
    """Pictures and videos as processors take them: pictures row by row, as some count them, and videos in one list."""
    turns = [question.turns for question in asked]
    found: dict[str, Any] = {}
    pictures = [[image for turn in row for image in turn.pictures] for row in turns]
    if any(pictures):
        found["images"] = pictures
    videos = [video for row in turns for turn in row for video in turn.videos]
    if videos:
        found["videos"] = [video.frames for video in videos]
        found["do_sample_frames"] = False
        found["video_metadata"] = [
            {
                "total_num_frames": int(video.indices.max()) + 1, "fps": video.fps, "video_backend": video.backend,
                "frames_indices": video.indices.tolist(), "height": video.frames.shape[1], "width": video.frames.shape[2],
            }
            for video in videos
        ]  # fmt: skip
    return found


def as_video(value: Any, num_frames: int | None, fps: float | None) -> Video:
    if isinstance(value, Video):
        if (num_frames, fps) != (None, None):
            raise ValueError(
                f"the frames of {value!r} are chosen already; leave num_frames and fps out, or pass its path"
            )
        return value
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"a video must be a path or a mmeff.video_io.Video, got {type(value).__name__}; pictures go into images"
        )
    if num_frames is None and fps is None:
        num_frames = NUM_FRAMES
    return read(value, num_frames=num_frames, fps=fps)


def listed(value: Any) -> list[Any]:
    """Nothing, one, or several, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def rows_of(name: str, value: Any, count: int, single: bool) -> list[list[Any]]:
    """The media of each question."""
    if value is None:
        return [[]] * count
    if single:
        return [listed(value)]
    if not isinstance(value, list | tuple) or len(value) != count:
        got = f"{len(value)}" if isinstance(value, list | tuple) else repr(value)
        raise ValueError(
            f"{name} must be a list with one entry per question (None for no {name}), got {got} for {count}"
        )
    return [listed(one) for one in value]


def length_of(tokens: list[int], ends: int | Sequence[int] | None) -> int:
    """Tokens up to the first end token, which counts."""
    stops = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    return next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
