"""What dropping visual tokens gains at the sizes of real models: a whole answer of 64 tokens, dense and pruned, in alternation.

Three vision-language models of seven billion random parameters, their vision encoders included. One call of generate() is
timed and taken apart by the handle: encoding the pictures, prefill, what choosing tokens took of it, and decoding. Prefill is
the language model's. Attention of random weights is nearly even, so that what is kept means nothing here; its cost does not
depend on that.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mmeff
from mmeff.errors import UnsupportedModel
from mmeff.pruning._base import TokenPruner
from mmeff.pruning.adaptinfer import AdaptInfer
from mmeff.pruning.cdpruner import CDPruner
from mmeff.pruning.divprune import DivPrune
from mmeff.pruning.fastv import FastV
from mmeff.pruning.pyramiddrop import PyramidDrop
from mmeff.pruning.randompruning import RandomPruning
from mmeff.pruning.sparsevlm import SparseVLM
from mmeff.pruning.transprune import TransPrune
from mmeff.pruning.visionzip import VisionZip

from .. import timing
from ..cases import Unavailable
from .engine import Part, Task
from .rows import File
from .setting import Setting

BATCHES = (1, 8, 32)
ROUNDS = 3
BUDGET = 0.25  # mean of visual tokens over the layers, where no published setting is for the model
DECODED = 64
CUT, SELECTION = 0.613, 0.03  # of dense prefill: what AdaptInfer-64 saves on LLaVA-1.5-7B, and what choosing may cost
TEXT = 64
IMAGE, VIDEO, START, END = 4, 5, 1, 2  # ids of the stand-ins for visual tokens, and of what Qwen puts around them


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and its prompt. make: config sizes to the model; prompt: model, batch and text tokens to generate()'s inputs."""

    name: str
    what: str
    make: Callable[[bool], Any]
    prompt: Callable[[Any, int, int, torch.device], dict[str, Any]]


# ---------------------------------------------------------------- models


def _llama(smoke: bool) -> dict[str, int]:
    if smoke:
        return {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 2,
                "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    return {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}  # fmt: skip


def _qwen(smoke: bool) -> dict[str, int]:
    if smoke:
        return {**_llama(True), "num_attention_heads": 4}
    return {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768}  # fmt: skip


def _vision(smoke: bool, **full: int) -> dict[str, int]:
    tiny = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
    }
    return tiny if smoke else full


def _llava(smoke: bool) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = _vision(smoke, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                     image_size=336, patch_size=14)  # fmt: skip
    side = vision["image_size"] // vision["patch_size"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, projection_dim=768), text_config=LlamaConfig(**_llama(smoke)),
        image_token_id=IMAGE, image_seq_length=side**2, vision_feature_layer=-2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _onevision(smoke: bool) -> Any:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    vision = _vision(smoke, hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16,
                     image_size=384, patch_size=14)  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False), text_config=Qwen2Config(**_qwen(smoke)),
        image_token_index=IMAGE, video_token_index=VIDEO,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def _qwen_vl(smoke: bool) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text: dict[str, Any] = _qwen(smoke)
    width = text["hidden_size"] // text["num_attention_heads"]
    section = [16, 24, 24] if not smoke else [2, 1, 1]
    assert 2 * sum(section) == width
    vision = (
        {"depth": 3, "num_heads": 2, "hidden_size": 16, "intermediate_size": 32, "patch_size": 4, "window_size": 16,
         "fullatt_block_indexes": [1]}
        if smoke
        else {"depth": 32, "num_heads": 16, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14,
              "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    config = Qwen2_5_VLConfig(
        vision_config={**vision, "out_hidden_size": text["hidden_size"], "in_channels": 3}, text_config={**text, "rope_parameters": rope},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


# ---------------------------------------------------------------- prompts


def _ids(batch: int, visual: list[int], text: int, device: torch.device) -> Tensor:
    """A start token, the visual tokens, and words, the same number for every prompt."""
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(8, 64, (batch, text - 1), generator=draw)
    start = torch.full((batch, 1), 7)
    return torch.cat([start, torch.tensor(visual).expand(batch, -1), words], dim=1).to(device)


def _pixels(*shape: int, like: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(like.device, like.dtype)


def _llava_prompt(model: Any, batch: int, text: int, device: torch.device) -> dict[str, Any]:
    size = model.config.vision_config.image_size
    ids = _ids(batch, [IMAGE] * model.config.image_seq_length, text, device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _pixels(batch, 3, size, size, like=model),
    }


def _onevision_prompt(model: Any, batch: int, text: int, device: torch.device, frames: int = 32) -> dict[str, Any]:
    vision = model.config.vision_config
    frames = 2 if vision.hidden_size == 16 else frames
    side = -(-(vision.image_size // vision.patch_size) // 2)  # pooled by two along both axes
    ids = _ids(batch, [VIDEO] * (frames * side**2 + 1), text, device)
    pixels = _pixels(batch, frames, 3, vision.image_size, vision.image_size, like=model)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}


def _qwen_prompt(model: Any, batch: int, text: int, device: torch.device) -> dict[str, Any]:
    vision = model.config.vision_config
    rows, columns = (8, 12) if vision.hidden_size == 16 else (64, 64)  # patches: a picture of 896 x 896 pixels
    ids = _ids(batch, [START, *[IMAGE] * (rows * columns // vision.spatial_merge_size**2), END], text, device)
    patches = _pixels(batch * rows * columns, 3 * vision.temporal_patch_size * vision.patch_size**2, like=model)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int(), "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, rows, columns]] * batch, device=device),
    }  # fmt: skip


SHAPES = (
    Shape(name="LLaVA-1.5-7B", what="a picture, 576 tokens", make=_llava, prompt=_llava_prompt),
    Shape(name="LLaVA-OneVision-7B", what="32 frames, 6273 tokens", make=_onevision, prompt=_onevision_prompt),
    Shape(name="Qwen2.5-VL-7B", what="a picture, 1024 tokens", make=_qwen_vl, prompt=_qwen_prompt),
)


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """A method at a setting; only: the models that it is for, where not all."""

    name: str
    method: TokenPruner
    only: tuple[str, ...] = ()
    published: bool = False  # a setting of its authors: bars are for those


def pruners(layers: int) -> list[Pruner]:
    """Every method that works without training or a second model, at the same mean budget, and AdaptInfer-64 as published."""
    every: dict[str, TokenPruner] = {
        "FastV": FastV(), "AdaptInfer": AdaptInfer(budget=BUDGET), "SparseVLM": SparseVLM(), "PyramidDrop": PyramidDrop(),
        "TransPrune": TransPrune(), "DivPrune": DivPrune(), "CDPruner": CDPruner(), "VisionZip": VisionZip(), "random": RandomPruning(),
    }  # fmt: skip
    found = []
    if layers == 32:
        found.append(Pruner(name="AdaptInfer-64", method=AdaptInfer(budget=64), only=("LLaVA-1.5-7B",), published=True))
    for name, method in every.items():
        try:
            found.append(Pruner(name=f"{name} {BUDGET:.0%}", method=method.at_budget(BUDGET, layers)))
        except ValueError:  # it prunes too late to leave so few on the mean: half of them is what it can do
            found.append(Pruner(name=f"{name} 50%", method=method.at_budget(0.5, layers)))
    return found


# ---------------------------------------------------------------- measuring


class Stage:
    """One model on the device, until another one is asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._name: str | None = None
        self._model: Any = None

    def model(self, shape: Shape) -> Any:
        """The model of a shape with random weights."""
        if self._name != shape.name:
            self.drop()
            with torch.random.fork_rng(devices=[]), self.setting.device:
                torch.manual_seed(0)
                model = shape.make(self.setting.smoke)
            self._model = model.to(torch.float32 if self.setting.smoke else torch.bfloat16).eval()
            self._model.generation_config.eos_token_id = None  # an answer of random weights must not end early
            self._model.generation_config.pad_token_id = 0
            self._name = shape.name
        return self._model

    def drop(self) -> None:
        """Let go of the model."""
        self._name = self._model = None
        gc.collect()
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def measure(shape: Shape, pruner: Pruner, batch: int, stage: Stage) -> dict[str, Any]:
    """The figures of a method on a shape."""
    setting = stage.setting
    model = stage.model(shape)
    given = shape.prompt(model, batch, setting.pick(TEXT, 9), setting.device)
    decoded = setting.pick(DECODED, 3)
    answer = partial(model.generate, **given, max_new_tokens=decoded, min_new_tokens=decoded, do_sample=False)
    try:
        installed = mmeff.accelerate(model, pruner.method)
    except UnsupportedModel as error:
        raise Unavailable(str(error)) from None
    with installed as handle:

        def once(enabled: bool) -> tuple[dict[str, float], Any]:
            handle.enabled = enabled
            handle.reset()
            seconds = timing._seconds(answer, 1, setting.device)
            report = handle.report()
            return {"answer": seconds, "selection": 0.0, **report.seconds}, report

        rounds: list[tuple[dict[str, float], dict[str, float]]] = []
        fast: Any = None
        for turn in range(setting.pick(ROUNDS, 1) + 1):  # the first one warms up
            found = {}
            for enabled in (False, True) if turn % 2 else (True, False):
                found[enabled], report = once(enabled)
                fast = report if enabled else fast
            if turn:
                rounds.append((found[False], found[True]))
    if not fast.accelerated or fast.fallbacks:
        raise RuntimeError(f"{pruner.name} did not run as it should: {dict(fast.fallbacks)}, {fast.calls}")

    def median(side: int, name: str) -> float:
        return statistics.median(pair[side].get(name, 0.0) for pair in rounds)

    cut = statistics.median(1 - pruned["prefill"] / dense["prefill"] for dense, pruned in rounds)
    selection = statistics.median(pruned["selection"] / dense["prefill"] for dense, pruned in rounds)
    bars = pruner.published and batch in (1, 8)
    phases = ("vision encoder", "prefill", "selection", "decode", "answer")
    return {
        "value": cut, "unit": "of dense prefill saved", **({"bar": CUT} if bars else {}),
        "selection_of_dense": selection, "selection_within": selection <= SELECTION,
        "seconds": {name: median(1, name) for name in phases}, "dense_seconds": {name: median(0, name) for name in phases},
        "answer_ratio": statistics.median(dense["answer"] / pruned["answer"] for dense, pruned in rounds),
        "decode_ratio": statistics.median(dense["decode"] / pruned["decode"] for dense, pruned in rounds),
        "rounds": len(rounds), "batch": batch, "text": setting.pick(TEXT, 9), "decoded": decoded,
        "prompt": int(given["input_ids"].shape[1]), "tokens": {k: v for k, v in fast.tokens.items() if isinstance(v, int | float)},
        "config": pruner.method.to_dict(),
    }  # fmt: skip


def tasks(setting: Setting, file: File) -> Generator[Task, None, None]:
    """Model by model, batch by batch; the published settings first."""
    stage = Stage(setting)
    try:
        for shape in SHAPES:
            layers = (_llama if shape.make is _llava else _qwen)(setting.smoke)["num_hidden_layers"]
            every = pruners(layers)
            for batch in setting.pick(BATCHES, (2,)):
                for pruner in every[:2] if setting.smoke else every:
                    if pruner.only and shape.name not in pruner.only:
                        continue
                    name = f"{shape.name} | {shape.what} | batch {batch} | {pruner.name}"
                    tokens = batch * 6400 if shape.make is _onevision else batch * 1100
                    # building, eight answers of 64 steps, and eight prefills of a seven-billion model at half the peak
                    seconds = 12 + 8 * (DECODED * 0.035 + tokens * 1.5e10 / 4e14)
                    yield Task(name=name, seconds=seconds, run=partial(measure, shape, pruner, batch, stage))
    finally:
        stage.drop()


PART = Part(name="prefill", weight=2, tasks=tasks)
