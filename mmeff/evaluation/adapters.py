"""The models of this library as the runner sees them: questions to a vision-language model, videos from a pipeline.

    Factory(function="mmeff.evaluation.adapters:load_model", arguments={"source": "tiny-video-vlm", "num_frames": 8})

`load_model` gives either kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmeff.config import MethodConfig
from mmeff.evaluation.media import read_media
from mmeff.evaluation.units import Outcome, Prepared
from mmeff.report import Report

NUM_FRAMES = 8  # of a clip, where neither a number nor a rate is asked for


def load_model(source: str, *, task: str = "ask", device: str = "auto", dtype: str = "auto", **settings: Any) -> Any:
    """Load a model for `evaluate`.

    Args:
        source: as `mmeff.pipelines.loading.load`. task: "ask" or "generate", what its samples want.
        device, dtype: as `load`. settings: as `Answers` or `Videos`.
    Raises:
        UnsupportedModel, FileNotFoundError: as `load`. ValueError: an unknown task. TypeError: a setting that is not there.
    """
    if task == "ask":
        from mmeff.pipelines.vision_language_model import VisionLanguageModel

        return Answers(VisionLanguageModel(source, device=device, dtype=dtype), **settings)
    if task == "generate":
        from mmeff.pipelines.video_generator import VideoGenerator

        return Videos(VideoGenerator(source, device=device, dtype=dtype), **settings)
    raise ValueError(f"task must be 'ask' or 'generate', got {task!r}")


class Answers:
    """A `VisionLanguageModel` that answers the questions of samples.

    Args:
        vlm: the model. new_tokens: generated at most.
        num_frames, fps: which frames of a clip are shown, as `mmeff.video_io.read`. backend: that reads them.
        video_as: "video", "images" or "auto", as `VisionLanguageModel.question`.
        generation: settings of transformers' `GenerationConfig`.
    """

    def __init__(
        self, vlm: Any, *, new_tokens: int = 32, num_frames: int | None = None, fps: float | None = None,
        backend: str = "auto", video_as: str = "auto", generation: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if num_frames is not None and fps is not None:
            raise ValueError(f"pass one of num_frames and fps, got {num_frames} and {fps}")
        self.vlm, self.new_tokens, self.video_as = vlm, new_tokens, video_as
        self.sampling: dict[str, Any] = {
            "num_frames": NUM_FRAMES if num_frames is None and fps is None else num_frames,
            "fps": fps,
        }
        self.backend, self.generation = backend, dict(generation or {})

    def prepare(self, sample: Any) -> Prepared:
        """Read the pictures and the frames that a question is about. Raises: MediaError: a file that cannot be read."""
        _check_task(sample, "ask", "answers questions")
        read = [(media, read_media(media, **self.sampling, backend=self.backend)) for media in sample.media]
        videos = [clip for media, clip in read if media.kind == "video"]
        question = self.vlm.question(
            sample.prompt,
            images=[clip.frames[0] for media, clip in read if media.kind == "image"],
            video=videos,
            **({"video_as": self.video_as} if videos else {}),
        )
        return Prepared(value=question, frames=tuple(_frames(media, clip) for media, clip in read))

    def run(self, prepared: Sequence[Prepared], methods: Sequence[MethodConfig]) -> list[Outcome]:
        """Answer a batch of questions."""
        _use(self.vlm, methods)
        answers = self.vlm.ask([p.value for p in prepared], new_tokens=self.new_tokens, **self.generation)
        return [
            Outcome(
                text=a.text, tokens={"generated": a.tokens, "prompt": a.prompt_tokens},
                seconds={k: v / a.batch for k, v in a.seconds.items()}, report=_summary(a.reports),
            )
            for a in answers
        ]  # fmt: skip


class Videos:
    """A `VideoGenerator` that makes the videos of samples.

    Args: generator: the pipeline. settings: of its call, such as `height`, `num_frames`, `num_inference_steps`, `fps`.
    Raises: ValueError: a setting that the pipeline would ignore.
    """

    def __init__(self, generator: Any, **settings: Any) -> None:
        from mmeff.pipelines.loading import check_honoured

        check_honoured(generator.pipe, settings)
        self.generator, self.settings = generator, settings

    def prepare(self, sample: Any) -> Prepared:
        """Read the picture that a video starts from, if there is one. Raises: MediaError, ValueError: it cannot be used."""
        _check_task(sample, "generate", "makes videos")
        if len(sample.media) > 1:
            raise ValueError(
                f"a video starts from one picture at most, and {sample.id!r} has {len(sample.media)} media"
            )
        read = [(media, read_media(media, num_frames=1)) for media in sample.media]
        picture = read[0][1].frames[0] if read else None
        value = (sample.prompt, 0 if sample.seed is None else sample.seed, picture)
        return Prepared(value=value, frames=tuple(_frames(media, clip) for media, clip in read))

    def run(self, prepared: Sequence[Prepared], methods: Sequence[MethodConfig]) -> list[Outcome]:
        """Make a batch of videos."""
        _use(self.generator, methods)
        prompts, seeds, pictures = (list(part) for part in zip(*(p.value for p in prepared), strict=True))
        image = {} if all(p is None for p in pictures) else {"image": pictures}
        clips = self.generator.generate(prompts, seed=seeds, **image, **self.settings)
        return [
            Outcome(
                video=c.frames, fps=c.fps, seconds={"pipeline": c.seconds / c.batch}, report=_summary(c.reports)
            )
            for c in clips
        ]  # fmt: skip


def _use(wrapper: Any, methods: Sequence[MethodConfig]) -> None:
    if tuple(wrapper.methods) != tuple(methods):
        wrapper.use(list(methods))


def _check_task(sample: Any, task: str, does: str) -> None:
    if sample.task != task:
        raise ValueError(
            f"this model {does}, and sample {sample.id!r} is to {sample.task}; choose another model or dataset"
        )


def _frames(media: Any, clip: Any) -> dict[str, Any]:
    return {
        "path": media.path, "indices": clip.indices.tolist(), "backend": clip.backend,
        "seconds": [round(float(t), 6) for t in clip.timestamps],
    }  # fmt: skip


def _summary(reports: Sequence[Report]) -> dict[str, Any]:
    """What the methods did, without the figures per layer and step."""
    return {
        r.method["method"]: {
            "calls": r.calls, "density": r.density, "tokens": r.tokens, "seconds": r.seconds, "fallbacks": r.fallbacks
        }
        for r in reports
    }  # fmt: skip
