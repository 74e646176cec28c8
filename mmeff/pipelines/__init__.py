"""One object for a whole job: `VideoGenerator` and `VisionLanguageModel`; beside them, loading, calibration and training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmeff.pipelines._question import Answer as Answer
    from mmeff.pipelines._wrapper import Cancelled as Cancelled
    from mmeff.pipelines.recipe import Recipe as Recipe
    from mmeff.pipelines.video_generator import Clip as Clip
    from mmeff.pipelines.video_generator import VideoGenerator as VideoGenerator
    from mmeff.pipelines.video_generator import repeat as repeat
    from mmeff.pipelines.vision_language_model import Conversation as Conversation
    from mmeff.pipelines.vision_language_model import VisionLanguageModel as VisionLanguageModel

_WHERE = {
    "Answer": "_question", "Cancelled": "_wrapper", "Clip": "video_generator",
    "Conversation": "vision_language_model", "Recipe": "recipe", "VideoGenerator": "video_generator",
    "VisionLanguageModel": "vision_language_model", "repeat": "video_generator",
}  # fmt: skip
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:  # torch and the model libraries are loaded with the first of these
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
