"""Small vision backbones that read handwritten digits: `data/tiny-backbones`, written by `python -m benchmarks digits --weights`.

Two files each: `NAME.json` with timm's name, the arguments that make it small, and how pictures are prepared; `NAME.safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = "tiny-backbones"


def names(folder: Path) -> tuple[str, ...]:
    """The models of a folder, in order; none where there is no folder."""
    return tuple(sorted(path.stem for path in folder.glob("*.safetensors")))


def save(model: Any, folder: Path, name: str, config: dict[str, Any]) -> None:
    """Write a trained model: weights in float16, and its config.

    Args: config: `model` and `args` for `timm.create_model`; `input_size` (C, H, W), `mean` and `std` per channel of pixels in
    [0, 1]; what else is known of it.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {key: x.half() if x.is_floating_point() else x for key, x in model.state_dict().items()}
    save_file({key: x.contiguous() for key, x in state.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(config, indent=1) + "\n")


def load(folder: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """A model in float32 and evaluation mode, and its config.

    Raises: ValueError for a name that the folder does not hold.
    """
    import timm
    from safetensors.torch import load_file

    import mmeff.vision_backbones  # noqa: F401  # registers its models with timm

    known = names(folder)
    if name not in known:
        raise ValueError(f"a tiny backbone must be one of {', '.join(known) or 'none'}, got {name!r}")
    config: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    model = timm.create_model(config["model"], **config["args"])
    model.load_state_dict(
        {key: x.float() if x.is_floating_point() else x for key, x in load_file(folder / f"{name}.safetensors").items()}
    )
    return model.eval(), config
