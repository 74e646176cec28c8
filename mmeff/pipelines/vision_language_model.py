"""Questions about pictures and videos to a vision-language model of transformers, stock or accelerated.

    with VisionLanguageModel("tiny-vlm", FastV(keep=0.25)) as vlm:
        answer = vlm.ask("what color is the cross ?", images="scene.jpg")
        print(answer.text, answer.seconds["prefill"], answer.reports[0])
        for piece in vlm.stream("where is it ?", images="scene.jpg"):
            print(piece, end="")

The model stays the stock one: `vlm.model` and `vlm.processor` are it. `_question.py` holds what goes in and
comes out, `_stream.py` how an answer comes piece by piece.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, overload

import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer

from mmeff.evaluation.questions import chat
from mmeff.pipelines._question import Answer, Frames, Question, as_video, length_of, listed, media_of, rows_of
from mmeff.pipelines._stream import AnswerStream, Clock
from mmeff.pipelines._wrapper import Cancel, Cancelled, Wrapper, check_names, check_prompts, picture, resolved, taken
from mmeff.pipelines.loading import Kind

VideoAs = Literal["auto", "video", "images"]

_log = logging.getLogger(__name__)
_MODEL = "call the stock model, `vlm.model`, which runs under the same methods"
_ADVICE = {
    "max_new_tokens": "pass new_tokens", "max_length": "pass new_tokens", "streamer": "call stream",
    "stopping_criteria": "pass cancel", "num_return_sequences": "pass the question several times",
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states"), _MODEL),
}  # fmt: skip
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """How to answer: checked arguments of `ask`."""

    new_tokens: int
    seed: int | None
    dense: bool
    generation: dict[str, Any]


class VisionLanguageModel(Wrapper):
    """A vision-language model and its processor, with methods on it.

    Args:
        model: "tiny-vlm", "tiny-video-vlm", a folder, a hub name, or a model that is loaded already.
        methods: what `use` takes; several are stacked. To compare methods, call `mmeff.compare`.
        processor: of a model that is passed in; one that is loaded by name brings its own.
        device, dtype: of a model that is loaded by name, as `mmeff.pipelines.loading.load`.
    Raises:
        as `load` and `use`; UnsupportedModel for a video pipeline; TypeError for a model without its processor, or a
        processor that nothing asked for.

    Weights are read from safetensors, and no code of a repository runs: a model that needs its own code must be loaded by the
    caller, with transformers' `trust_remote_code=True`, and passed in.
    """

    kind: ClassVar[Kind] = "vlm"
    mistaken = "is a pipeline of videos or pictures and answers no questions; use VideoGenerator, or `mmeff generate`"

    def __init__(
        self, model: Any, methods: Any = None, *, processor: Any = None, device: str | None = None, dtype: str | None = None
    ) -> None:  # fmt: skip
        configs = resolved(methods)  # a misspelt method must not cost a model load
        if isinstance(model, str) and processor is not None:
            raise TypeError(f"{model} is loaded with its own processor; leave processor out, or pass the model itself")
        if not isinstance(model, str) and processor is None:
            raise TypeError(
                "a model that is passed in needs its processor; pass processor=AutoProcessor.from_pretrained(...)"
            )
        if not isinstance(model, str) and not callable(getattr(model, "generate", None)):
            raise TypeError(f"VisionLanguageModel needs a name or a model with generate(), got {type(model).__name__}")
        super().__init__(taken("vlm", model, device=device, dtype=dtype, processor=processor))
        self.use(configs)

    @property
    def model(self) -> Any:
        """The stock model."""
        return self._open().model

    @property
    def processor(self) -> Any:
        """The stock processor."""
        return self._open().processor

    def question(
        self, text: str, *, images: Any = None, video: Any = None, num_frames: int | None = None, fps: float | None = None,
        video_as: VideoAs = "auto", history: Sequence[tuple[Question, str]] = (),
    ) -> Question:  # fmt: skip
        """Read the media of a question. This touches no model: it may run in other threads, ahead of `ask`.

        Args:
            text: the question. "<image>" marks in it, if any, say where the pictures belong.
            images: a picture or a list of them: paths, PIL images or uint8 (H, W, 3).
            video: a path or a `mmeff.video_io.Video`, or a list of these.
            num_frames, fps: which frames of a path are shown, as `mmeff.video_io.read`; by default 8. They are chosen here, are
                logged, and no processor samples them again.
            video_as: "video" gives frames to the processor as a video, "images" as pictures, one each; "auto" is "video" for a
                processor that takes videos.
            history: earlier questions with their answers; `conversation` keeps it.
        Raises:
            MediaError: a file that cannot be read. TypeError, ValueError: an argument that is none of these.
        """
        check_prompts(text, "question")
        if not isinstance(text, str):
            raise TypeError(f"a question must be a text, got {type(text).__name__}")
        pictures = [picture(one, f"image {i}") for i, one in enumerate(listed(images))]
        if video_as not in get_args(VideoAs):
            raise ValueError(f"video_as must be one of {', '.join(get_args(VideoAs))}, got {video_as!r}")
        if not listed(video) and (num_frames, fps, video_as) != (None, None, "auto"):
            raise ValueError("num_frames, fps and video_as say how a video is shown; pass video too, or leave them out")
        takes = getattr(self.processor, "video_processor", None) is not None
        if video_as == "video" and not takes:
            raise ValueError(
                f"{type(self.processor).__name__} takes no videos; pass video_as='images', or leave it out"
            )
        videos = [as_video(one, num_frames, fps) for one in listed(video)]
        shown_as = ("video" if takes else "images") if video_as == "auto" else video_as
        frames = tuple(
            Frames(
                path=v.path, indices=tuple(v.indices.tolist()), timestamps=tuple(v.timestamps.tolist()), backend=v.backend,
                shown_as=shown_as,
            )
            for v in videos
        )  # fmt: skip
        for f in frames:
            _log.info("%s: frames %s, read by %s, shown as %s", f.path, list(f.indices), f.backend, f.shown_as)
        if shown_as == "images":
            pictures += [picture(frame, "frame") for v in videos for frame in v.frames]
            videos = []
        return Question(
            text=text, pictures=tuple(pictures), videos=tuple(videos), frames=frames, history=tuple(history)
        )

    @overload
    def ask(self, question: str | Question, **arguments: Any) -> Answer: ...
    @overload
    def ask(self, question: list[Any] | tuple[Any, ...], **arguments: Any) -> list[Answer]: ...
    def ask(
        self, question: str | Question | list[Any] | tuple[Any, ...], *, images: Any = None, video: Any = None,
        num_frames: int | None = None, fps: float | None = None, video_as: VideoAs = "auto", new_tokens: int = 32,
        seed: int | None = None, dense: bool = False, cancel: Cancel | None = None, **generation: Any,
    ) -> Answer | list[Answer]:  # fmt: skip
        """Ask a question, or a list of them as one left-padded batch.

        Args:
            question: a text, or a `Question` that was read before; or a list of either.
            images, video: as `question`; for a list of questions, a list with one entry each: what one question takes, or None.
                Numbers of pictures may differ.
            num_frames, fps, video_as: as `question`.
            new_tokens: generated at most. seed: of sampling. generation: settings of transformers' `GenerationConfig`.
            dense: run this call without the methods. cancel: asked after every token.
        Returns:
            an `Answer`, or a list of them for a list of questions; greedy unless `do_sample=True`.
        Raises:
            MediaError, TypeError, ValueError: an input that cannot be used, before the model runs.
            Cancelled: `cancel` said so. NothingAccelerated: a method that was on never acted.
        """
        settings = self._settings(new_tokens, seed, dense, generation)
        media = {"images": images, "video": video}
        shown: dict[str, Any] = {"num_frames": num_frames, "fps": fps, "video_as": video_as}
        asked = self._questions(question, media, shown)
        prompts = self._prompts(asked, dense)
        with self._alone():
            answers = self._run(asked, prompts, settings, Clock(self.model.device, cancel))
        if not answers[0].complete:
            raise Cancelled(f"cancelled after {max(a.tokens for a in answers)} tokens of “{asked[0].text}”")
        return answers if isinstance(question, list | tuple) else answers[0]

    def stream(
        self, question: str | Question, *, new_tokens: int = 32, seed: int | None = None, dense: bool = False,
        then: Callable[[Answer], None] | None = None, **arguments: Any,
    ) -> AnswerStream:  # fmt: skip
        """Ask one question and return at once; the answer comes piece by piece from a thread.

        Args:
            question, new_tokens, seed, dense: as `ask`.
            then: called with the answer when it has ended, also where it was cancelled.
            arguments: media and settings of `ask`.
        Returns:
            an `AnswerStream`: iterate over it, `cancel()` it, and ask it for its `result()`.
        Raises:
            as `ask` before the model runs; ValueError for beam search, which knows its answer at the end only.
        """
        media = {name: arguments.pop(name, None) for name in ("images", "video")}
        shown: dict[str, Any] = {
            name: arguments.pop(name) for name in ("num_frames", "fps", "video_as") if name in arguments
        }
        settings = self._settings(new_tokens, seed, dense, arguments)
        if settings.generation.get("num_beams", 1) != 1:
            raise ValueError(
                f"an answer of {settings.generation['num_beams']} beams cannot be streamed; leave num_beams out"
            )
        if isinstance(question, list | tuple):
            raise TypeError("stream takes one question; ask takes a list of them")
        asked = self._questions(question, media, shown)
        prompts = self._prompts(asked, dense)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._take()

        def work(clock: Clock) -> Answer:
            try:
                answer = self._run(asked, prompts, settings, clock, streamer)[0]
            finally:
                self._busy.release()
            if then is not None:
                then(answer)
            return answer

        return AnswerStream(work, streamer, self.model.device)

    def conversation(self) -> Conversation:
        """A conversation: every question is asked with the ones before it, their media and answers."""
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"a conversation needs a chat template, and this {type(self.processor).__name__} has none")
        return Conversation(self)

    # ---------------------------------------------------------------- what the verbs share

    def _questions(self, question: Any, media: Mapping[str, Any], shown: dict[str, Any]) -> list[Question]:
        """The questions with their media read."""
        single = not isinstance(question, list | tuple)
        given = [question] if single else list(question)
        rows = {name: rows_of(name, value, len(given), single) for name, value in media.items()}
        if any(isinstance(one, Question) for one in given):
            if not all(isinstance(one, Question) for one in given) or any(map(any, rows.values())) or _is_set(shown):
                raise TypeError("a Question has read its media already; pass Questions only, and media to `question`")
            return given
        check_prompts(question, "question")
        videos = any(rows["video"])
        if not videos and _is_set(shown):
            raise ValueError("num_frames, fps and video_as say how a video is shown; pass video too, or leave them out")
        return [
            self.question(text, images=images, video=video, **(shown if video else {}))
            for text, images, video in zip(given, rows["images"], rows["video"], strict=True)
        ]

    def _prompts(self, asked: Sequence[Question], dense: bool) -> list[str]:
        """The texts for the processor, with as many marks as there are media.

        Raises: ValueError for a number of marks that does not fit, or methods with nothing to act on.
        """
        for config in self._acting(dense):
            if not any(turn.pictures or turn.videos for question in asked for turn in question.turns):
                raise ValueError(
                    f"{config.name()} drops visual tokens, and there is no image; pass images or video, or dense=True"
                )
        texts = []
        for question in asked:
            if question.history or question.videos:
                if not getattr(self.processor, "chat_template", None):
                    raise ValueError(
                        f"this {type(self.processor).__name__} has no chat template; pass video_as='images'"
                    )
                text = self.processor.apply_chat_template(
                    question.messages(), tokenize=False, add_generation_prompt=True
                )
            else:
                text = chat(self.processor, question.text, len(question.pictures))
            for what in ("image", "video"):
                mark = getattr(self.processor, f"{what}_token", None)
                media = sum(len(turn.pictures if what == "image" else turn.videos) for turn in question.turns)
                if mark is not None and text.count(mark) != media:
                    raise ValueError(
                        f"the prompt of {question.text!r} has {text.count(mark)} marks {mark} for {media} {what}s; there must be "
                        "one for each: the marks in the question, or those that the chat template makes"
                    )
            texts.append(text)
        return texts

    def _settings(self, new_tokens: int, seed: int | None, dense: bool, given: dict[str, Any]) -> _Settings:
        if type(new_tokens) is not int or new_tokens < 1:
            raise ValueError(f"new_tokens must be an int >= 1, got {new_tokens!r}")
        known = [name for name in GenerationConfig().to_dict() if name not in _ADVICE and not name.startswith("_")]
        check_names(given, known, _ADVICE, "the generation of an answer")
        if not given.get("do_sample", False):
            idle = [*(["seed"] if seed is not None else []), *(name for name in given if name in _SAMPLING)]
            if idle:
                raise ValueError(f"{', '.join(idle)} only act on sampling; pass do_sample=True too, or leave them out")
        if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
            raise ValueError(f"seed must be an int in [0, 2**63), got {seed!r}")
        return _Settings(new_tokens=new_tokens, seed=seed, dense=dense, generation={"do_sample": False, **given})

    @torch.inference_mode()
    def _run(
        self, asked: Sequence[Question], texts: list[str], settings: _Settings, clock: Clock, streamer: Any = None
    ) -> list[Answer]:
        """One batch through processor and model."""
        model, processor = self.model, self.processor
        began = time.perf_counter()
        batch = processor(text=texts, return_tensors="pt", padding=True, padding_side="left", **media_of(asked))
        batch = batch.to(model.device)
        for name, value in batch.items():
            if name.startswith("pixel_values") and torch.is_tensor(value) and value.is_floating_point():
                batch[name] = value.to(model.dtype)  # and nothing else: times must not be rounded
        extra = {"tokenizer": processor.tokenizer} if "stop_strings" in settings.generation else {}
        if streamer is not None:
            extra["streamer"] = streamer
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices) if settings.seed is not None else nullcontext():
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
            with self._recorded(settings.dense) as reports:
                clock.start()
                out = model.generate(
                    **batch, max_new_tokens=settings.new_tokens, stopping_criteria=StoppingCriteriaList([clock]),
                    **settings.generation, **extra,
                )  # fmt: skip
                spent = clock.stop()
        new = out[:, batch["input_ids"].shape[1] :]
        ends = settings.generation.get("eos_token_id", model.generation_config.eos_token_id)
        seconds = {"preparation": clock.began - began, **spent, "total": time.perf_counter() - began}
        return [
            Answer(
                question=question.text, text=text.strip(), tokens=length_of(row.tolist(), ends), prompt_tokens=int(mask.sum()),
                seconds=seconds, batch=len(asked), frames=tuple(f for turn in question.turns for f in turn.frames),
                reports=tuple(reports), complete=not clock.cancelled,
            )
            for question, text, row, mask in zip(
                asked, processor.batch_decode(new, skip_special_tokens=True), new, batch["attention_mask"], strict=True
            )
        ]  # fmt: skip


class Conversation:
    """Questions that are asked with all that was said before. `turns` holds them with their answers; edit it to take one back.

    The whole conversation is read again for every answer: its cost grows with it, and methods that choose visual tokens by
    the question choose anew.
    """

    def __init__(self, vlm: VisionLanguageModel) -> None:
        self._vlm = vlm
        self.turns: list[tuple[Question, str]] = []

    def ask(
        self, question: str, *, images: Any = None, video: Any = None, num_frames: int | None = None,
        fps: float | None = None, video_as: VideoAs = "auto", **arguments: Any,
    ) -> Answer:  # fmt: skip
        """Ask the next question; arguments as `VisionLanguageModel.ask`. One that was cancelled or failed leaves no trace."""
        asked = self._next(question, images, video, num_frames, fps, video_as)
        answer = self._vlm.ask(asked, **arguments)
        self.turns.append((asked, answer.text))
        return answer

    def stream(
        self, question: str, *, images: Any = None, video: Any = None, num_frames: int | None = None,
        fps: float | None = None, video_as: VideoAs = "auto", **arguments: Any,
    ) -> AnswerStream:  # fmt: skip
        """As `ask`, piece by piece; the answer joins the conversation when it has ended, also where it was cancelled."""
        asked = self._next(question, images, video, num_frames, fps, video_as)
        return self._vlm.stream(asked, then=lambda answer: self.turns.append((asked, answer.text)), **arguments)

    def _next(self, text: str, images: Any, video: Any, num_frames: Any, fps: Any, video_as: VideoAs) -> Question:
        return self._vlm.question(
            text, images=images, video=video, num_frames=num_frames, fps=fps, video_as=video_as, history=self.turns
        )


def _is_set(shown: Mapping[str, Any]) -> bool:
    return any(value not in (None, "auto") for value in shown.values())
