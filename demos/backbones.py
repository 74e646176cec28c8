"""Two vision backbones look at one picture: what they take it for, what their stages see, and how fast they are, in turn.

Any model that timm knows, those of `mmeff.vision_backbones` among them. Nothing is downloaded: weights come with the embedded
models, which read handwritten digits, or from a folder that the settings name; where there are none they are random, which every
result says.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmeff import tiny
from mmeff.errors import UnknownMethod, UnsupportedModel, suggest

from .looks import DIRECTIONS, OURS, At, Look, Seen, Sight
from .settings import Settings
from .turns import Turns
from .working import working

if TYPE_CHECKING:
    from PIL.Image import Image

    from .turns import Ticket

# Offered before timm is imported; any other of its names can be typed.
SUGGESTED = (
    *tiny.backbones(), "nat_mini", "dinat_mini", "nat_tiny", "dinat_tiny", "dinat_s_tiny", "nat_iso_small", "biformer_tiny", "focalnet_tiny_iso",
    "maxvit_tiny_rw_224", "maxvit_pico_rw_256", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet18",
    "vit_tiny_patch16_224",
)  # fmt: skip
MOST_PARAMETERS = 120_000_000
KEPT = 4  # models in memory
ROUNDS, BUDGET = 9, 6.0  # of timing, and the seconds that it may take
TOP = 5
STAGES = 5  # whose maps are drawn; of more, as many are chosen evenly
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class _Model:
    """A model in memory."""

    model: Any
    config: dict[str, Any]  # how pictures are prepared for it
    random: bool
    parameters: int


class Backbones:
    """Builds models on demand, keeps the last few, and lets two of them look at a picture."""

    def __init__(self, settings: Settings, turns: Turns) -> None:
        self.settings, self.turns = settings, turns
        self._models: OrderedDict[tuple[str, int, str], _Model] = OrderedDict()
        self._building = threading.Lock()

    def names(self) -> list[str]:
        """Every name that can be asked for, the embedded and ours first; imports timm."""
        import timm

        from mmeff.vision_backbones import registered

        ours = registered()
        return [*tiny.backbones(), *ours, *(name for name in timm.list_models() if name not in ours)]

    def note(self, names: tuple[str, ...]) -> str:
        """What must be known about the weights of these models; empty where all have trained ones."""
        embedded = [name for name in dict.fromkeys(names) if name in tiny.backbones()]
        without = [name for name in dict.fromkeys(names) if name not in embedded and self._weights(name) is None]
        if not without:
            return "" if not embedded else (
                f"Tiny models: {', '.join(embedded)}. They learnt handwritten digits in this project, bright strokes on dark ground, and "
                "take every picture for one"
            )  # fmt: skip
        return (
            f"Random weights: {', '.join(without)}. Feature maps show what the architecture does to a picture, not what it learned, and "
            "there are no classes. Speed hardly depends on weights. With a folder of checkpoints "
            "(mmeff demo --backbones FOLDER) they classify"
        )

    def run(self, look: Look, user: str) -> Iterator[At | Sight]:
        """Let both models look; yields where it is, and at last the result.

        Raises: ValueError: as `Look.check`, a model too large, or a size that it refuses; UnknownMethod: a name that timm does
            not know; UnsupportedModel: `OURS` for a model without such windows; Busy; Cancelled.
        """
        look.check()
        yield from working(self.turns, user, lambda ticket, tell: self._run(look, ticket, tell))

    # ---------------------------------------------------------------- one run, in its thread

    def _run(self, look: Look, ticket: Ticket, tell: Callable[[At], None]) -> Sight:
        import torch

        import mmeff
        from mmeff.pipelines import Cancelled

        def on() -> None:
            if ticket.cancelled():
                raise Cancelled("cancelled before the models were done")

        with self.turns.turn(ticket, lambda before: tell(At(stage="waiting", before=before))), torch.inference_mode():
            sides, inputs, outputs, seen = [], [], [], []
            for name, how in zip(look.models, look.how, strict=True):
                tell(At(stage="loading", model=name))
                sides.append(self._model(name, look.size, how))
                on()
            for name, how, side in zip(look.models, look.how, sides, strict=True):
                tell(At(stage="looking", model=name))
                picture, x = _prepared(look.image, side.config)
                if how == OURS:
                    with mmeff.accelerate(side.model, "windowattention") as handle:
                        output, one = _look(name, how, side, picture, x, look)
                        handle.enabled = (
                            handle.recorder.total("sparse") > 0
                        )  # taking no call is told below, and is no error
                        one = replace(one, ran=_ran(handle.report()))
                else:
                    output, one = _look(name, how, side, picture, x, look)
                inputs.append(x.repeat(max(look.batch, 1), 1, 1, 1))
                outputs.append(output)
                seen.append(one)
                on()
            times: list[list[float]] = []
            if look.batch:
                tell(At(stage="timing"))
                times = _timed(sides, look, inputs, on)
        both = look.models[0] == look.models[1] and look.how[0] != look.how[1]
        apart = float((outputs[0] - outputs[1]).norm() / outputs[0].norm()) if both else None
        if times:
            seen = [_with_times(one, [t[i] for t in times], [t[1 - i] for t in times]) for i, one in enumerate(seen)]
        return Sight(seen=(seen[0], seen[1]), batch=look.batch, rounds=len(times), apart=apart)

    # ---------------------------------------------------------------- models

    def _model(self, name: str, size: int, how: str) -> _Model:
        """A model, built at its first use. Each way of running has an instance of its own, with the same weights."""
        key = (name, size, how)
        with self._building:
            if key not in self._models:
                self._models[key] = self._build(name, size, how)
                while len(self._models) > KEPT:
                    self._models.popitem(last=False)
            self._models.move_to_end(key)
            return self._models[key]

    def _build(self, name: str, size: int, how: str) -> _Model:
        import timm
        import torch

        import mmeff.vision_backbones  # noqa: F401  # registers its models with timm
        from mmeff.accelerate import find_host
        from mmeff.registry import build

        if name in tiny.backbones():
            if how == OURS:
                raise UnsupportedModel(
                    f"{name} has no window attention that mmeff can take over; run it as timm runs it"
                )
            model, config = tiny.backbone(name)
            if size:
                config = {**config, "input_size": (config["input_size"][0], size, size)}
            return _Model(model, config, False, sum(p.numel() for p in model.parameters()))
        if not timm.is_model(name):
            names = self.names()
            raise UnknownMethod(f"timm has no model called {name!r}.{suggest(name, names)}")
        with torch.device("meta"):
            parameters = sum(p.numel() for p in _created(name, size).parameters())
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"a model of this demo must have at most {MOST_PARAMETERS / 1e6:.0f} M parameters, and {name} has {parameters / 1e6:.0f} M"
            )
        file = self._weights(name)
        given = (
            {}
            if file is None
            else {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "source": "file"}}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _created(name, size, **given).eval()
        if how == OURS:
            try:
                find_host(model, build("windowattention"))
            except UnsupportedModel as error:
                raise UnsupportedModel(
                    f"{name} has no window attention that mmeff can take over; MaxViT, Swin, DaViT and GC ViT of timm have"
                ) from error
        config = timm.data.resolve_model_data_config(model)
        if size:
            config = {**config, "input_size": (config["input_size"][0], size, size)}
        return _Model(model, config, file is None, parameters)

    def _weights(self, name: str) -> Path | None:
        """The checkpoint of a model in the settings' folder, called after it."""
        folder = self.settings.backbones
        if folder is None:
            return None
        files = [Path(folder) / f"{name}{suffix}" for suffix in SUFFIXES]
        return next((file for file in files if file.is_file()), None)


def _created(name: str, size: int, **given: Any) -> Any:
    """A model of timm, told the size where it must know it. Raises ValueError for a size that it refuses."""
    import timm

    if size:
        try:
            return timm.create_model(name, img_size=size, **given)
        except TypeError:  # takes pictures of any size, and has no such argument
            pass
        except AssertionError as error:
            raise ValueError(
                f"{name} cannot be made for {size} x {size} pixels: {str(error) or 'it refuses that size'}"
            ) from error
    return timm.create_model(name, **given)


# ---------------------------------------------------------------- looking


def _prepared(image: Any, config: dict[str, Any]) -> tuple[Image, Any]:
    """A picture as a model gets it: to look at, and as a tensor (1, C, H, W)."""
    import timm
    import torch
    from PIL import Image as Pictures

    size = config["input_size"]
    if size[0] == 1:
        grey = image.convert("L").resize((size[2], size[1]), Pictures.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(grey, dtype=np.float32)) / 255
        return grey.convert("RGB"), ((pixels - config["mean"][0]) / config["std"][0])[None, None]
    if size[0] != 3:
        raise ValueError(
            f"only models of grey or colour pictures can be shown here, and this one takes {size[0]} channels"
        )
    x = timm.data.create_transform(**{**config, "input_size": size}, is_training=False)(image.convert("RGB"))
    mean, deviation = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    pixels = ((x * deviation + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Pictures.fromarray(pixels), x[None]


def _look(name: str, how: str, side: _Model, picture: Image, x: Any, look: Look) -> tuple[Any, Seen]:
    """What a model makes of a picture: its output, and all but the times."""
    output, macs = _counted(side.model, x, name)
    maps = _maps(side.model, x, name)
    chosen = [maps[round(i)] for i in np.linspace(0, len(maps) - 1, min(STAGES, len(maps)))]
    return output, Seen(
        name=name, how=how, random=side.random, classes=() if side.random else _classes(output), size=tuple(x.shape[-2:]),
        parameters=side.parameters, gmacs=macs / 1e9, image=picture,
        maps=tuple((_drawn(values, look.coloured), tuple(values.shape)) for values in chosen),
    )  # fmt: skip


def _counted(model: Any, x: Any, name: str) -> tuple[Any, float]:
    """A model's output, and its multiply-adds: convolutions, linear layers, products, and the pairs of our attention kernels."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def neighbours(
        q: Any, k: Any, v: Any, bias: Any, extra_k: Any, extra_v: Any, window: Any, *rest: Any, **out: Any
    ) -> int:
        return 4 * q.numel() * math.prod(window)  # a product with k and one with v; a multiply-add is two operations

    def windows(q: Any, k: Any, v: Any, bias: Any, mask: Any, window: Any, *rest: Any, **out: Any) -> int:
        return 4 * q.numel() * math.prod(window)

    neighbours._get_raw = windows._get_raw = True  # type: ignore[attr-defined]  # tensors rather than their shapes
    ours = {torch.ops.mmeff.neighborhood_attention: neighbours, torch.ops.mmeff.partitioned_attention: windows}
    try:
        with FlopCounterMode(display=False, custom_mapping=ours) as counter:
            output = model(x)
    except (AssertionError, RuntimeError) as error:
        height, width = x.shape[-2:]
        raise ValueError(
            f"{name} refuses pictures of {height} x {width} pixels: {str(error).splitlines()[0] or 'no reason'}"
        ) from error
    return output, counter.get_total_flops() / 2


def _maps(model: Any, x: Any, name: str) -> list[Any]:
    """The maps (C, H, W) behind every stage, channels first."""
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"timm cannot tell the feature maps of {name}; take another model")
    found = model.forward_intermediates(x, output_fmt="NCHW", intermediates_only=True)
    return [values[0].float() for values in found]


def _drawn(values: Any, coloured: str) -> Image:
    """A map (C, H, W) as a picture: its three main directions over the places as colours, or its norm."""
    import torch
    from PIL import Image as Pictures

    C, H, W = values.shape
    if coloured == DIRECTIONS:
        flat = values.reshape(C, -1).T
        flat = flat - flat.mean(0)
        _, vectors = torch.linalg.eigh(flat.T @ flat)
        axes = vectors[:, -3:].flip(-1)
        axes = axes * axes[axes.abs().argmax(0), torch.arange(axes.shape[1])].sign()  # the same colours at every call
        found = (flat @ axes).reshape(H, W, -1)
    else:
        found = values.norm(dim=0)[..., None].expand(H, W, 3)
    low, high = (torch.quantile(found.reshape(H * W, -1), q, dim=0) for q in (0.01, 0.99))
    pixels = ((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    pixels = torch.nn.functional.pad(pixels, (0, 3 - pixels.shape[-1]))  # of fewer than three channels
    return Pictures.fromarray((pixels * 255).round().byte().numpy())


def _classes(output: Any) -> tuple[tuple[str, float], ...]:
    """The likeliest classes and their probabilities; names are those of ImageNet where there are a thousand."""
    from timm.data import ImageNetInfo

    likely = output[0].float().softmax(-1).topk(min(TOP, output.shape[-1]))
    names = ImageNetInfo() if output.shape[-1] == 1000 else None
    return tuple(
        (names.index_to_description(int(i)) if names else f"class {int(i)}", float(p))
        for p, i in zip(likely.values, likely.indices, strict=True)
    )


def _ran(report: Any) -> tuple[str, ...]:
    """What took over the window attention, and why it stayed with timm elsewhere."""
    total = sum(report.calls.values())
    backends = ", ".join(report.backends) or "none"
    lines = [f"{report.accelerated} of {total} window attentions by mmeff ({backends})"]
    return (*lines, *(f"{count} stayed with timm: {reason}" for reason, count in report.fallbacks.items()))


def _timed(sides: list[_Model], look: Look, inputs: list[Any], on: Callable[[], None]) -> list[list[float]]:
    """Seconds of both models, round by round; the order turns around, and the first call of each is not counted."""
    import contextlib

    import mmeff

    times: list[list[float]] = []
    with contextlib.ExitStack() as stack:
        for side, how in zip(sides, look.how, strict=True):
            if how == OURS:
                stack.callback(mmeff.accelerate(side.model, "windowattention").remove)
        for side, x in zip(sides, inputs, strict=True):
            side.model(x)
        began = time.perf_counter()
        for turn in range(ROUNDS):
            taken = [0.0, 0.0]
            for i in (0, 1) if turn % 2 == 0 else (1, 0):
                on()
                start = time.perf_counter()
                sides[i].model(inputs[i])
                taken[i] = time.perf_counter() - start
            times.append(taken)
            if time.perf_counter() - began > BUDGET and len(times) >= 3:
                break
    return times


def _with_times(one: Seen, mine: list[float], others: list[float]) -> Seen:
    low, middle, high = np.percentile(mine, (20, 50, 80)).tolist()
    ratio = statistics.median(other / own for own, other in zip(mine, others, strict=True))
    return replace(one, milliseconds=(1e3 * middle, 1e3 * low, 1e3 * high), speedup=ratio)
