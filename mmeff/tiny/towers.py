"""Vision towers of the tiny VLM other than CLIP: small members of the families in `mmeff.vision_backbones`.

The tokens are those of CLIP's tower, one per 8 x 8 pixels: the second map of a pyramid, or the only one of an isotropic network
with such patches. Whatever a name says of size is replaced; what remains of it is the family and its kind. Their tokens get positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from mmeff.errors import UnknownMethod, suggest

WIDTH = 128  # of the tokens
_PYRAMID = {"depths": [2, 4, 1, 1], "mlp_ratio": 2.0}  # the last two stages are dropped again
_NAT = {**_PYRAMID, "embed_dim": WIDTH // 2, "num_heads": [2, 4, 4, 4], "kernel_size": 7, "layer_scale": None}
_ISO = {"embed_dim": WIDTH, "depth": 5, "num_heads": 4, "mlp_ratio": 2.0}
# Pattern of names, index of the map, arguments; the first that fits. Windows fit maps of 24 and 12 tokens.
SMALL: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("*nat_iso_*", -1, {**_ISO, "kernel_size": 5}),  # one map per block
    ("vitrpb_*", -1, _ISO),
    ("focalnet_*_iso", 0, {"embed_dim": WIDTH, "depths": [5], "mlp_ratio": 2.0, "use_post_norm": False, "layerscale_value": None}),
    ("dinat_*", 1, {**_NAT, "dilations": [3, 1, 1, 1]}),
    ("nat_*", 1, _NAT),
    ("biformer_*", 1, {**_PYRAMID, "widths": [WIDTH // 2, WIDTH, WIDTH, WIDTH], "topk": [2, 8, 16, None], "regions": 6}),
)  # fmt: skip


def model_args(name: str, *, size: int, patch: int) -> dict[str, Any]:
    """What `vision_tower` takes to build a small member of a backbone's family.

    Args:
        name: a model of `mmeff.vision_backbones`. size: pixels along a side of a picture; patch: of a token.
    Raises:
        UnknownMethod: no model has this name. ValueError: its family has no small member here.
    """
    import timm

    from mmeff.vision_backbones import registered

    can = [known for known in registered() if _small(known) is not None]
    if not timm.is_model(name):
        raise UnknownMethod(f"no backbone is called {name!r}.{suggest(name, can)} Towers: {', '.join(can)}.")
    found = _small(name) if name in can else None
    if found is None:
        raise ValueError(
            f"the tower of a tiny model must be one of {', '.join(can)}, got {name}, of which none is small"
        )
    index, args = found
    if "iso" in name or name.startswith("vitrpb"):
        args = {**args, "patch_size": patch}
    if name.startswith("vitrpb"):
        args = {**args, "img_size": size}
    return {"backbone": name, "index": index, "backbone_args": args, "grid": [size // patch] * 2}


def _small(name: str) -> tuple[int, dict[str, Any]] | None:
    return next(((index, args) for pattern, index, args in SMALL if fnmatch(name, pattern)), None)


def config(name: str, *, size: int, patch: int) -> Any:
    """The config of the tower: transformers' own for timm models, with what LLaVA reads of a vision tower."""
    from transformers import TimmWrapperConfig

    return TimmWrapperConfig(
        architecture="vision_tower", model_args=model_args(name, size=size, patch=patch), do_pooling=False,
        hidden_size=WIDTH, image_size=size, patch_size=patch,
    )  # fmt: skip


def initialise(tower: Any) -> None:
    """Draw the backbone's weights as its family does: transformers draws them its own way, convolutions far too small."""
    import timm

    args: Mapping[str, Any] = tower.config.model_args
    tower.timm_model.load_state_dict(timm.create_model(tower.config.architecture, **args).state_dict())
