"""What dropping visual tokens gains in prefill: a LLaVA of a 7B's proportions, scaled down, with random weights.

Every method is timed in alternation with the same model dense, on the same prompt and with its pictures encoded before, so
that only the language model counts. Beside the time stands the share of token-layers that is left: tokens of all kinds,
summed over the layers. Two bars: time falls by at least `BAR` of what token-layers do, and choosing tokens takes at most
`SELECTION` of the shortened prefill.

Weights are random, so attention is nearly even and what is kept means nothing; what it costs to choose does not depend on
that. Methods that look at the vision encoder are left out: its tower here is a stub.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import mmeff
from mmeff.pruning._base import TokenPruner
from mmeff.pruning.adaptinfer import AdaptInfer
from mmeff.pruning.cdpruner import CDPruner
from mmeff.pruning.divprune import DivPrune
from mmeff.pruning.fastv import FastV
from mmeff.pruning.pyramiddrop import PyramidDrop
from mmeff.pruning.randompruning import RandomPruning
from mmeff.pruning.sparsevlm import SparseVLM
from mmeff.pruning.transprune import TransPrune
from mmeff.report import Report

from .results import FOLDER, Machine

ROWS = FOLDER / "prefill.jsonl"
BAR, SELECTION = 0.8, 0.05
BUDGETS = (0.5, 0.35)  # mean over layers; methods that prune before layer 2 of 8 keep a quarter at least
METHODS: dict[str, TokenPruner] = {
    "FastV": FastV(), "AdaptInfer": AdaptInfer(budget=0.5), "SparseVLM": SparseVLM(), "PyramidDrop": PyramidDrop(),
    "TransPrune": TransPrune(), "DivPrune": DivPrune(), "CDPruner": CDPruner(), "random": RandomPruning(),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model and its prompt. side: visual tokens along a side of the picture."""

    layers: int = 8
    width: int = 1024
    inner: int = 2752
    heads: int = 16
    side: int = 24
    text: int = 64
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method at a budget against dense. Times in seconds, medians over the rounds, which are in `rounds` one by one.

    time: prefill over that of dense, the median of paired ratios. token_layers: what is left of them. gain: 1 - time over
    1 - token_layers. selection: its share of the shortened prefill.
    """

    method: str
    budget: float
    config: dict[str, Any]
    sizes: dict[str, int]
    dense_seconds: float
    seconds: float
    selection_seconds: float
    time: float
    token_layers: float
    gain: float
    selection: float
    rounds: list[list[float]]
    hardware: str
    environment: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes a second measurement of the same thing unnecessary."""
        return (self.method, self.budget, json.dumps(self.config), json.dumps(self.sizes), self.hardware)

    @property
    def reaches_bar(self) -> bool:
        """Whether time falls nearly as much as token-layers."""
        return self.gain >= BAR

    @property
    def selection_within(self) -> bool:
        """Whether choosing tokens is cheap enough."""
        return self.selection <= SELECTION


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no file. Raises ValueError for a line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is no row of prefill: {error}; take the line out.") from None
    return rows


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each key."""
    return list({row.key: row for row in rows}.values())


def llava(sizes: Sizes) -> Any:
    """The model with random weights, in evaluation mode; its vision tower is a stub of two narrow layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=8 * sizes.side, patch_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=512, hidden_size=sizes.width, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads, max_position_embeddings=4096,
        ),
        image_token_id=4, image_seq_length=sizes.side**2, vision_feature_layer=-2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()


@torch.inference_mode()
def prompt(model: Any, sizes: Sizes) -> dict[str, Any]:
    """Arguments of a prefill: a start token, the picture's tokens, then text; the picture is encoded already."""
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(5, 512, (sizes.batch, sizes.text - 1), generator=draw)
    start = torch.ones(sizes.batch, 1, dtype=torch.long)
    visual = torch.full((sizes.batch, sizes.side**2), model.config.image_token_id)
    pixels = torch.randn(sizes.batch, 3, 8 * sizes.side, 8 * sizes.side, generator=draw)
    return {
        "input_ids": torch.cat([start, visual, text], dim=1), "logits_to_keep": 1, "use_cache": True,
        "mm_encoder_outputs": {"image": model.model.get_image_features(pixels)},
    }  # fmt: skip


def run(
    methods: list[str], sizes: list[Sizes], machine: Machine, path: Path, *, rounds: int, again: bool,
    tick: Callable[[str, int, int], None],
) -> list[Row]:  # fmt: skip
    """Measure what the file does not hold yet, and append a row as soon as it is known; return all rows asked for.

    Raises: ValueError for a method that cannot reach a budget on this model, before anything runs.
    """
    work = [
        (name, METHODS[name].at_budget(budget, size.layers), budget, size)
        for size in sizes for name in methods for budget in BUDGETS
    ]  # fmt: skip
    held = {row.key: row for row in read(path)}
    found: list[Row] = []
    model: Any = None
    built: Sizes | None = None
    for done, (name, method, budget, size) in enumerate(work):
        key = (name, budget, json.dumps(method.to_dict()), json.dumps(asdict(size)), machine.hardware)
        if not again and key in held:
            found.append(held[key])
            continue
        tick(f"{name} {100 * budget:g}%, batch {size.batch}", done, len(work))
        if built is None or asdict(built) | {"batch": 0} != asdict(size) | {"batch": 0}:
            model, built = llava(size), size
        figures = measure(model, prompt(model, size), method, rounds)
        row = Row(
            method=name, budget=budget, config=method.to_dict(), sizes=asdict(size), hardware=machine.hardware,
            environment=machine.environment, commit=machine.commit, date=datetime.now(UTC).isoformat(timespec="seconds"),
            **figures,
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n")
        found.append(row)
    return found


@torch.inference_mode()
def measure(model: Any, given: dict[str, Any], method: TokenPruner, rounds: int) -> dict[str, Any]:
    """Dense and fast in alternation, one round of each to warm up; the figures of a `Row`."""
    tokens = given["input_ids"]
    visual = int((tokens[0] == model.config.image_token_id).sum())
    times: list[list[float]] = []
    report: Report | None = None
    with mmeff.accelerate(model, method) as handle:

        def once(enabled: bool) -> tuple[float, Report]:
            handle.enabled = enabled
            handle.reset()
            began = time.perf_counter()
            model(**given)
            return time.perf_counter() - began, handle.report()

        for turn in range(rounds + 1):
            seconds = {}
            for enabled in (False, True) if turn % 2 else (True, False):
                seconds[enabled], found = once(enabled)
                report = found if enabled else report
            if turn and report is not None:
                times.append([seconds[False], seconds[True], report.seconds["selection"]])
        handle.enabled = False  # its record may end with a dense round
    if report is None or not report.accelerated or report.fallbacks:
        raise RuntimeError(f"{method.name()} did not run as it should: {report}")
    left = float(report.tokens["mean over layers"]) + tokens.shape[1] - visual
    ratio = statistics.median(fast / dense for dense, fast, _ in times)
    token_layers = left / tokens.shape[1]
    return {
        "dense_seconds": statistics.median(x[0] for x in times), "seconds": statistics.median(x[1] for x in times),
        "selection_seconds": statistics.median(x[2] for x in times), "time": ratio, "token_layers": token_layers,
        "gain": (1 - ratio) / (1 - token_layers), "selection": statistics.median(x[2] / x[1] for x in times), "rounds": times,
    }  # fmt: skip
