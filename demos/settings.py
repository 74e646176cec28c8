"""What the person who starts the demo decides: its models, its limits, where it keeps files. Visitors change none of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

EMBEDDED = ("tiny-video", "tiny-image", "tiny-vlm", "tiny-video-vlm")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The demo's limits.

    Fields: `models` names, folders or hub names that visitors may choose from, and no others; `device`, `dtype` of them as
    `mmeff.pipelines.loading.load` takes them; `max_upload_mb` of one file; `max_upload_pixels` of a picture or of a frame;
    `max_upload_seconds` of a clip; `per_user` runs that one visitor may have waiting or running; `queue` runs in all;
    `max_steps`, `max_frames`, `max_pixels` (height times width) of what is generated; `max_variants` methods side by side;
    `max_text` characters of a prompt; `max_new_tokens` of an answer; `kept_results` runs whose files stay on disk,
    and `kept_results_mb` of them;
    `dense_cache_mb` of dense runs that are kept for the next comparison; `results` folder of benchmark rows, None for those
    that come with the library; `backbones` folder of checkpoints for the tab Backbones, each called after its model, such as
    nat_mini.safetensors.
    """

    models: tuple[str, ...] = EMBEDDED
    device: str = "auto"
    dtype: str = "auto"
    max_upload_mb: float = 20
    max_upload_pixels: int = 25_000_000
    max_upload_seconds: float = 60
    per_user: int = 2
    queue: int = 24
    max_steps: int = 100
    max_frames: int = 161
    max_pixels: int = 1280 * 1280
    max_variants: int = 3
    max_text: int = 2000
    max_new_tokens: int = 256
    kept_results: int = 64
    kept_results_mb: float = 4000
    dense_cache_mb: float = 256
    results: str | None = None
    backbones: str | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("the demo needs at least one model; leave models out for the embedded ones")
        for name in ("max_upload_mb", "max_upload_pixels", "max_upload_seconds", "per_user", "queue", "max_steps",
                     "max_frames", "max_pixels", "max_variants", "max_text", "max_new_tokens", "kept_results", "kept_results_mb"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}")
        if self.dense_cache_mb < 0:
            raise ValueError(f"dense_cache_mb must be >= 0, got {self.dense_cache_mb!r}; 0 keeps nothing")
        if self.backbones is not None and not Path(self.backbones).is_dir():
            raise ValueError(f"backbones must be a folder of checkpoints, and {self.backbones} is no folder")
