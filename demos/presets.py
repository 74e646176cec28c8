"""Fields that suit the embedded models, where a method's own defaults are those of a model of thousands of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # 9 x 6 x 6 tokens, 20 steps: the settings of docs/quality.md at about a quarter to a half of the pairs
    "tiny-video": {
        "radial": {"block": 4, "dense_layers": 0, "drop_below": 32, "decay": 0.2, "dense_steps": 5},
        "gna": {"window": (5, 4, 4), "stride": (1, 2, 2), "tile": (1, 2, 2), "dense_steps": 5},
        "slidingtile": {"window": (5, 2, 2), "tile": (1, 2, 2), "dense_steps": 5},
        "vmoba": {"threshold": None, "top_k": (4, 4, 7), "chunks": ((0.5,), (1, 2), (3, 2, 2)), "dense_steps": 5},
        "rectifiedspaattn": {
            "drop": 0.5, "p_threshold": 0.0, "block": 4, "first_frame": False, "neighbours": False, "dense_layers": 0,
        },
    },
    # 24 x 24 tokens of one picture, 20 steps: about half of the pairs
    "tiny-image": {
        "radial": {"block": 16, "dense_layers": 0, "drop_below": 32, "dense_steps": 5},
        "gna": {"window": (1, 16, 16), "stride": (1, 2, 2), "tile": (1, 4, 4), "dense_steps": 5},
        "slidingtile": {"window": (1, 4, 4), "tile": (1, 4, 4), "dense_steps": 5},
        "vmoba": {"threshold": None, "top_k": (9,), "chunks": ((4, 4),), "dense_steps": 5},
        "rectifiedspaattn": {
            "drop": 0.5, "p_threshold": 0.0, "block": 4, "first_frame": False, "neighbours": False, "dense_layers": 0,
        },
    },
}  # fmt: skip


def preset(model: str, method: str) -> Mapping[str, Any]:
    """Fields that replace a method's defaults on an embedded model; empty for any other."""
    return _PRESETS.get(model, {}).get(method, {})


SIZES: dict[str, dict[str, Any]] = {
    "tiny-video": {"num_inference_steps": 20, "guidance_scale": 2.0, "height": 48, "width": 48, "num_frames": 17},
    "tiny-image": {"num_inference_steps": 20, "height": 48, "width": 48},
}
PROMPTS: dict[str, tuple[str, ...]] = {
    "video": (
        "a red square moving left", "a cyan ring moving down", "a yellow cross moving right", "a blue square moving up",
    ),
    "image": (
        "a red square in the top left", "a cyan ring in the center", "a yellow triangle in the bottom right",
    ),
}  # fmt: skip
FIRST: dict[str, str] = {"video": "radial", "image": "gna"}  # the method that is ticked when the page opens
