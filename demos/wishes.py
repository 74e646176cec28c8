"""What a visitor asks to be generated, checked before anything runs, and what comes back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmeff.config import MethodConfig
from mmeff.report import Plan, Report

from .settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from .runs import Run

Stage = Literal["waiting", "loading", "planning", "warming up", "running", "measuring"]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """One comparison: `methods` on `model` with a `prompt` and a `seed`, each against the dense run.

    `sizes` are settings of the pipeline call (`height`, `width`, `num_frames`, `num_inference_steps`, `guidance_scale`);
    those that are left out are the model's own. `image` is the first frame, for a model that takes one.
    """

    model: str
    prompt: str
    methods: tuple[MethodConfig, ...]
    seed: int = 0
    sizes: dict[str, Any] = field(default_factory=dict)
    image: Image | None = None

    def check(self, settings: Settings) -> None:
        """Raises: TypeError, ValueError: something is missing or beyond the demo's limits."""
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("the prompt is empty; describe what the video or the picture should show")
        if len(self.prompt) > settings.max_text:
            raise ValueError(f"the prompt must be at most {settings.max_text} characters, got {len(self.prompt)}")
        if not self.methods:
            raise ValueError("no method is chosen; tick at least one to compare with dense")
        if len(self.methods) > settings.max_variants:
            raise ValueError(
                f"at most {settings.max_variants} methods can be compared at a time, got {len(self.methods)}"
            )
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed must be a whole number from 0 on, got {self.seed!r}")
        for name, most in (("num_inference_steps", settings.max_steps), ("num_frames", settings.max_frames)):
            value = self.sizes.get(name, 1)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{_WORDS[name]} must be a whole number in [1, {most}], got {value!r}")
        for name in ("height", "width"):
            value = self.sizes.get(name, 1)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of pixels, got {value!r}")
        pixels = self.sizes.get("height", 1) * self.sizes.get("width", 1)
        if pixels > settings.max_pixels:
            raise ValueError(f"height x width must be at most {settings.max_pixels:,} pixels here, got {pixels:,}")
        guidance = self.sizes.get("guidance_scale", 1.0)
        if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 0 <= guidance <= 100:
            raise ValueError(f"guidance must be a number in [0, 100], got {guidance!r}")


_WORDS = {"num_inference_steps": "steps", "num_frames": "frames"}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is. `before` runs are ahead of it while it waits; `variant` of `variants` runs, at `step` of `steps`;
    `seconds` since it was asked for."""

    stage: Stage
    before: int = 0
    variant: str = ""
    number: int = 0
    variants: int = 0
    step: int = 0
    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a result; the first one of a result is dense.

    `seconds` of the whole pipeline call, once; `speedup` against dense; `predicted` by the plan; `psnr` in dB (None: equal) and
    `ssim` to dense; `background_shift` in [0, 1]; `dense_steps` of `steps` that ran dense; `earlier` seconds since it was
    measured, None for now; `files` their addresses; `report` as text.
    """

    name: str
    seconds: float
    steps: int
    dense_steps: int
    speedup: float = 1.0
    predicted: float | None = None
    density: float | None = None
    psnr: float | None = None
    corrected_psnr: float | None = None
    ssim: float | None = None
    background_shift: float | None = None
    identical: bool = False
    earlier: float | None = None
    files: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    report: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to. `run` holds its files and frames; `plans`, `reports` by variant; `note` about the model."""

    run: Run
    model: str
    kind: str
    note: str
    prompt: str
    seed: int
    settings: dict[str, Any]
    variants: tuple[Variant, ...]
    plans: dict[str, Plan]
    reports: dict[str, Report]
    frames: int
    size: tuple[int, int]  # width and height
    fps: float
    environment: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "run": self.run.name, "model": self.model, "kind": self.kind, "note": self.note, "prompt": self.prompt,
            "seed": self.seed, "settings": self.settings, "frames": self.frames, "size": list(self.size), "fps": self.fps,
            "variants": [asdict(variant) for variant in self.variants],
            "plans": {name: plan.to_dict() for name, plan in self.plans.items()},
            "environment": self.environment,
        }  # fmt: skip
