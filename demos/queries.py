"""What a visitor asks about a picture or a clip, checked before anything runs, and what comes back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmeff.config import MethodConfig
from mmeff.report import Plan, environment

from .settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmeff.video_io import Video

    from .runs import Run

Stage = Literal["waiting", "loading", "warming up", "answering", "measuring"]


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question about a picture or about frames of a clip, dense and with each of `methods`."""

    model: str
    question: str
    image: Image | None = None
    video: Video | None = None
    methods: tuple[MethodConfig, ...] = ()
    new_tokens: int = 16

    def check(self, settings: Settings) -> None:
        """Raises: TypeError, ValueError: something is missing or beyond the demo's limits."""
        if not isinstance(self.question, str) or not self.question.strip():
            raise ValueError("the question is empty; ask something about the picture or the clip")
        if len(self.question) > settings.max_text:
            raise ValueError(f"the question must be at most {settings.max_text} characters, got {len(self.question)}")
        if self.image is None and self.video is None:
            raise ValueError("there is nothing to look at; choose an example, or upload a picture or a clip")
        if self.image is not None and self.video is not None:
            raise ValueError("ask about a picture or about a clip, and take the other one away")
        if self.video is not None and self.model == "tiny-vlm":
            raise ValueError("tiny-vlm was trained on single pictures; choose tiny-video-vlm to ask about a clip")
        if not self.methods:
            raise ValueError("no method is chosen; tick at least one to compare with dense")
        if len(self.methods) > settings.max_variants:
            raise ValueError(
                f"at most {settings.max_variants} methods can be compared at a time, got {len(self.methods)}"
            )
        if type(self.new_tokens) is not int or not 1 <= self.new_tokens <= settings.max_new_tokens:
            raise ValueError(
                f"tokens of the answer must be a whole number in [1, {settings.max_new_tokens}], got {self.new_tokens!r}"
            )

    @property
    def media(self) -> dict[str, Any]:
        """As `VisionLanguageModel.question` takes it."""
        return {"images": self.image} if self.image is not None else {"video": self.video}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a run is. `before` runs are ahead while it waits; `texts` is what each variant has said so far, `variant` the one
    that is talking."""

    stage: Stage
    before: int = 0
    variant: str = ""
    texts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One variant's answer. Times in seconds, medians over the rounds of an `Asked`; `None` is what dense has no figure for.

    `last`, `mean`: visual tokens at the last layer, and over the layers; `operations` of prefill and `cache_kib` of the prompt
    as counted; `operations` is a share of dense.
    """

    name: str
    text: str
    tokens: int
    prefill: float
    decode: float
    total: float
    selection: float | None = None
    visual: float | None = None
    last: float | None = None
    mean: float | None = None
    operations: float | None = None
    cache_kib: float | None = None
    prefill_speedup: float | None = None
    total_speedup: float | None = None
    predicted: float | None = None
    remarks: tuple[str, ...] = ()
    report: str = ""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a run came to. `run` keeps which tokens stayed; `pictures` the model saw, `layers` it has, `stages` by variant the
    layers at which tokens were dropped; `rounds` behind each time; `unknown` words that the model's vocabulary lacks."""

    run: Run
    model: str
    note: str
    question: str
    replies: tuple[Reply, ...]
    plans: dict[str, Plan]
    layers: int
    pictures: int
    stages: dict[str, tuple[int, ...]]
    rounds: int
    unknown: tuple[str, ...] = ()
    frames: tuple[str, ...] = ()  # the moment of each picture, for a clip
    environment: dict[str, str] = field(default_factory=environment)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "run": self.run.name, "model": self.model, "note": self.note, "question": self.question, "rounds": self.rounds,
            "layers": self.layers, "pictures": self.pictures, "stages": {k: list(v) for k, v in self.stages.items()},
            "unknown_words": list(self.unknown), "answers": [asdict(reply) for reply in self.replies],
            "plans": {name: plan.to_dict() for name, plan in self.plans.items()}, "environment": self.environment,
        }  # fmt: skip
