"""What timm asks of a model that registers from outside, and how official checkpoints reach our modules.

A family file holds, in this order: `default_cfgs = generate_default_cfgs({"name.tag": cfg(...)})`, then its entry points,
each decorated with `register` and returning `build(Class, name, pretrained, ...)`. Its checkpoint filter is called by timm with
the file's content and the model; it renames keys and ends in `check_keys`, which refuses what does not fit and lists it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from mmeff.errors import UnknownMethod, suggest

State = dict[str, Tensor]
EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])

_registered: list[str] = []

# What only one family has in its keys; the first that matches names it.
_SIGNATURES = (
    (r"^(dinat\.|nat\.)?encoder\.levels\.\d+\.layers\.\d+\.attention\.self\.rpb$", "NAT or DiNAT in the layout of transformers"),
    (r"^levels\.\d+\.blocks\.\d+\.attn\.rpb$", "NAT or DiNAT"),
    (r"^layers\.\d+\.blocks\.\d+\.attn\.rpb$", "DiNAT_s"),
    (r"^layers\.\d+\.attn\.rpb$", "an isotropic NAT, DiNAT or ViT with relative bias"),
    (r"^stages\.\d+\.blocks\.\d+\.attn\.rpb$", "NAT, DiNAT or one of their kin as this package saves them"),
    (r"\.modulation\.|\.focal_layers\.", "FocalNet"),
    (r"attn_grid\.|\.attn_block\.", "MaxViT"),
    (r"^downsample_layers\.\d+\.\d+\.(weight|bias)$|\.attn\.lepe\.", "BiFormer or another network with downsample_layers"),
    (r"relative_position_bias_table$", "Swin or another network with window attention"),
    (r"\.conv_dw\.weight$|\.dwconv\.weight$", "ConvNeXt"),
    (r"^(cls_token|class_token|pos_embed)$", "a plain vision transformer"),
    (r"^layer\d\.\d+\.conv\d\.weight$", "ResNet"),
)  # fmt: skip


def register(entry_point: EntryPoint) -> EntryPoint:
    """Register an entry point with timm under its own name, unless timm has a model of that name: that one stays.

    Call it as a decorator, behind the module's `default_cfgs`. Returns: the entry point.
    """
    if not timm.is_model(entry_point.__name__):
        register_model(entry_point)
        _registered.append(entry_point.__name__)
    return entry_point


def registered() -> list[str]:
    """The names that this package added to timm, sorted."""
    return sorted(_registered)


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """`timm.create_model` for the names of this package, with near matches for a name that does not exist.

    Args:
        name: a model, with or without a tag: "nat_tiny"; kwargs: as for timm.create_model.
    Returns: the model.
    Raises:
        UnknownMethod: timm has no model of this name, nor do we.
    """
    known = registered()
    if not timm.is_model(name):
        raise UnknownMethod(f"no backbone is called {name!r}.{suggest(name, known)} Known here: {', '.join(known)}.")
    model: nn.Module = timm.create_model(name, **kwargs)
    return model


def cfg(**fields: Any) -> dict[str, Any]:
    """A pretrained cfg: ImageNet-1k at 224 with ImageNet's mean and deviation, no download address; fields win."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        "license": "mit",
        **fields,
    }


def build(
    cls: Callable[..., nn.Module],
    name: str,
    pretrained: bool,
    filter_fn: Callable[..., State],
    args: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    *,
    out_indices: tuple[int, ...] = (0, 1, 2, 3),
) -> Any:
    """Build a model the way timm does.

    Args:
        cls: the model class; name: the entry point's; pretrained: whether to load the weights of its cfg.
        filter_fn: (content of a checkpoint, model) -> state dict of the model.
        args: arguments of the variant; kwargs: those of the caller, which win.
        out_indices: the stages of `features_only` unless the caller names others; their maps come as NCHW.
    """
    return build_model_with_cfg(
        cls,
        name,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**args, **kwargs},
    )


# ---------------------------------------------------------------- checkpoints


def unwrap(content: Mapping[str, Any]) -> State:
    """The tensors of a checkpoint file: out of {"model": ...} or {"state_dict": ...}, without a leading "module."."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        inner = content.get(key)
        if isinstance(inner, Mapping):
            return unwrap(inner)
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def family_of(keys: Iterable[str]) -> str | None:
    """What network a checkpoint's keys belong to, as far as they tell, in words."""
    keys = list(keys)
    for pattern, family in _SIGNATURES:
        if any(re.search(pattern, key) for key in keys):
            return family
    return None


def check_keys(state: State, model: nn.Module, original: Iterable[str], *, family: str) -> State:
    """Return the state dict if it fits the model.

    The classifier and the first convolution are left to timm, which drops the one and adapts the other where the number of
    classes or channels differs.

    Args:
        state: the tensors under the model's names; original: the keys of the file, for the message.
        family: the model's family, in words.
    Raises:
        ValueError: keys are missing or too many, or shapes differ; all are listed, up to 12 of a kind.
    """
    target = model.state_dict()
    config = getattr(model, "pretrained_cfg", {}) or {}
    free = tuple(f"{name}." for key in ("classifier", "first_conv") for name in _names(config.get(key)))

    def strict(keys: Iterable[str]) -> list[str]:
        return sorted(key for key in keys if not key.startswith(free))

    missing, unexpected = strict(target.keys() - state.keys()), strict(state.keys() - target.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(target[key].shape)}"
        for key in strict(target.keys() & state.keys())
        if state[key].shape != target[key].shape
    ]
    if not (missing or unexpected or shapes):
        return state
    found = family_of(original)
    said = f"; its keys look like those of {found}" if found else ""
    raise ValueError(
        f"the checkpoint must hold the weights of {family} of exactly this size, in the official layout or as saved here"
        f"{said}.{_listed('Missing', missing)}{_listed('Unexpected', unexpected)}{_listed('Of another shape', shapes)} Create "
        "the variant that the file was trained as, or pass a complete file."
    )


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _listed(what: str, items: list[str], most: int = 12) -> str:
    if not items:
        return ""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return f" {what} ({len(items)}): {', '.join(items[:most])}{more}."
