"""Small models of every name that `mmeff.vision_backbones` registers, and which of them differ.

A class that `SMALL` does not mention runs at full size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

import mmeff.vision_backbones as backbones

SIZE, CLASSES = 64, 7
NAMES = backbones.registered()

_PYRAMID = {"embed_dim": 32, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
_ISOTROPIC = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
# Arguments that make a class small, and the stages of `features_only` where the default ones are then missing.
SMALL: dict[str, dict[str, Any]] = {
    "NAT": _PYRAMID,
    "DiNATs": _PYRAMID,
    "NATIso": _ISOTROPIC,
    "ViTRPB": {**_ISOTROPIC, "img_size": SIZE},
    "BiFormer": {"widths": (32, 64, 96, 128), "depths": (1, 1, 1, 1)},
    "FocalNetIso": {"embed_dim": 16, "depths": (2,)},
    "FocalNet": {"embed_dim": 16, "depths": (1, 1)},
}
FEATURES: dict[str, dict[str, Any]] = {name: {"out_indices": (0, 1)} for name in ("NATIso", "ViTRPB", "FocalNet")}


@functools.cache
def class_of(name: str) -> str:
    """The class that a name makes."""
    return type(timm.create_model(name, device="meta")).__name__


def small(name: str, **kwargs: Any) -> Any:
    """The small model of a name, in eval mode, the same weights at every call with the same arguments."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": CLASSES, **SMALL.get(class_of(name), {}), **kwargs}).eval()
    for parameter in model.parameters():  # as after some training: a scale of 1e-5 would hide what it scales
        if parameter.ndim == 1 and parameter.device.type != "meta":
            nn.init.normal_(parameter, 1.0 if parameter.any() else 0.0, 0.1)
    return model


def _everything(model: nn.Module) -> list[Any]:
    """Every plain attribute of every module, and the shapes of its weights."""
    plain = (bool, int, float, str, tuple)
    found: list[Any] = [
        (name, type(module), sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain)))
        for name, module in model.named_modules()
    ]
    return [found, [(key, tuple(value.shape)) for key, value in model.state_dict().items()]]


def _switches(model: nn.Module) -> list[Any]:
    """The classes of its modules and their attributes that are no numbers."""
    switch = bool | str | None
    found = {
        (type(module).__name__, key, str(value))
        for module in model.modules()
        for key, value in vars(module).items()
        if isinstance(value, switch)
    }
    return [type(model), *sorted(found)]


def _groups(key: Callable[[nn.Module], list[Any]]) -> list[list[str]]:
    """The names, those together whose small models have the same key."""
    found: dict[str, list[str]] = {}
    for name in NAMES:
        model = timm.create_model(name, device="meta", **SMALL.get(class_of(name), {}))
        found.setdefault(str(key(model)), []).append(name)
    return list(found.values())


DISTINCT = _groups(_everything)
KINDS = _groups(_switches)


def images(batch: int = 2, height: int = SIZE, width: int | None = None, chans: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, chans, height, width or height, generator=generator)


def maps_of(model: Any, x: Tensor, **kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = model.forward_intermediates(x, intermediates_only=True, **kwargs)
    return found


def stages_of(model: Any) -> list[Any]:
    return [model.get_submodule(info["module"]) for info in model.feature_info]


def count_stages(model: Any) -> list[int]:
    """How often each stage has run, from now on."""
    calls = [0] * len(model.feature_info)

    def counter(i: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[i] += 1

        return count

    for i, stage in enumerate(stages_of(model)):
        stage.register_forward_hook(counter(i))
    return calls


def in_nchw(model: Any, x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2) if getattr(model, "output_fmt", "NCHW") == "NHWC" else x
