"""What dropping visual tokens costs in answers: every pruning method on a tiny model, at equal budgets, on the same questions.

A variant is a method at a budget, the mean of visual tokens over the layers. Questions are drawn and answered in batches of
`BATCH`; batch i is a pure function of i, so that two processes share the work by batches and a run that was stopped goes on
where it stopped. Pictures are drawn, processed and encoded once per batch; only methods that look at the vision encoder run
it again. `run` appends a row per batch and variant; `pruning_table` makes accuracies and differences of them.

Published settings are for 32 layers. `bases` holds what each method starts from on six: nothing in it was tuned, it follows
from where methods may prune at all. A method that prunes before layer 1 at the earliest keeps a sixth of the tokens at least.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import mmeff
from mmeff import tiny
from mmeff.accelerate import find_host
from mmeff.config import MethodConfig
from mmeff.errors import UnsupportedModel
from mmeff.evaluation.questions import Turn, chat, motion_turns, scene_turns
from mmeff.pipelines.train_cacovid import CaCoVIDRecipe
from mmeff.pipelines.train_cacovid_prompts import language_model
from mmeff.pruning._base import TokenPruner
from mmeff.pruning._cacovid_policy import Policy
from mmeff.pruning.adaptinfer import AdaptInfer
from mmeff.pruning.cacovid import CaCoVID
from mmeff.pruning.debiased import Debiased
from mmeff.pruning.fastv import FastV
from mmeff.pruning.pyramiddrop import PyramidDrop
from mmeff.pruning.randompruning import RandomPruning
from mmeff.pruning.sparsevlm import SparseVLM
from mmeff.registry import all_methods
from mmeff.tiny import motions, scenes

from . import scored
from .results import FOLDER

SEEDS = {"tiny-vlm": 18_000, "tiny-video-vlm": 28_000}  # splits of their own: no setting was chosen by looking at them
BATCH = 50  # questions answered together
BUDGETS = (0.5, 0.25, 0.125, 0.0625)
NEW_TOKENS = 3  # two words and the end
DENSE = "dense"
COUNTS = {
    "last": "kept at last", "mean": "mean over layers", "operations": "prefill operations, of dense",
    "cache_kib": "cache of the prompt, KiB",
}  # fmt: skip
OF_DENSE = {
    "last": "visual tokens per prompt",
    "mean": "visual tokens per prompt",
    "cache_kib": "cache of the prompt, dense, KiB",
}
PHASES = ("prefill", "selection", "decode")


def rows_file(model: str) -> Path:
    """Where the rows of a model lie unless the user says otherwise."""
    return FOLDER / f"pruning-{model}.jsonl"


# ---------------------------------------------------------------- variants


def bases(policy: str = "", untrained: str = "") -> dict[str, tuple[TokenPruner, ...]]:
    """By label, the settings that `at_budget` starts from on six layers; the first that can reach a budget counts.

    Methods that are not named here start from their defaults; those of a plugin are found too.
    """
    later, first = FastV(layer=2), FastV(layer=1)  # layer 2 is the paper's, and keeps a third of the tokens at least
    early = PyramidDrop(stages=(1 / 6, 1 / 2, 5 / 6))
    named: dict[str, tuple[TokenPruner, ...]] = {
        "FastV": (later, first),
        "AdaptInfer": (AdaptInfer(budget=0.5),),
        "SparseVLM": (SparseVLM(),),
        "SparseVLM+": (SparseVLM(version="v2"),),
        "PyramidDrop": (PyramidDrop(), early),
        "Debiased FastV": (Debiased(inner=later), Debiased(inner=first)),
        "random": (RandomPruning(),),
        "random, layer 2": (RandomPruning(layer=2),),
        "CaCoVID": (CaCoVID(policy=policy),),
        "CaCoVID, untrained": (CaCoVID(policy=untrained),),
    }
    taken = {type(b) for found in named.values() for b in found}
    others = [c for c in all_methods().values() if issubclass(c, TokenPruner) and c not in taken]
    return named | {c.__name__: (c(),) for c in others}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of the table: a method at a budget, dense without one, or the reason why there is none.

    label: of its curve in the figure. setting: digest of all that decides its answers; rows of another are never mixed in.
    """

    label: str
    budget: float | None = None
    method: TokenPruner | None = None
    reason: str | None = None
    setting: str

    @property
    def name(self) -> str:
        """Label and budget."""
        return self.label if self.budget is None else f"{self.label} {100 * self.budget:g}%"


def variants(name: str, model: Any, policy: str = "") -> list[Variant]:
    """Dense, and every method at every budget, in the order of the table."""

    def made(**fields: Any) -> Variant:
        method = fields.get("method")
        settings = method and method.to_dict()
        if isinstance(method, CaCoVID) and method.policy:
            settings = {**method.to_dict(), "policy": _policy_weights(method.policy)}  # what it is, not where it lies
        parts = [
            name,
            settings,
            fields.get("reason"),
            SEEDS[name],
            BATCH,
            NEW_TOKENS,
            _weights(name),
        ]
        return Variant(**fields, setting=hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8])

    layers = int(model.config.get_text_config().num_hidden_layers)
    found = [made(label=DENSE)]
    for label, starts in bases(policy, _untrained(model).name if policy else "").items():
        why = _why_not(model, starts[0], layers)
        for budget in BUDGETS:
            method, reason = (None, why) if why else _at(starts, budget, layers)
            found.append(made(label=label, budget=budget, method=method, reason=reason))
    return found


@cache
def _untrained(model: Any) -> tempfile.TemporaryDirectory[str]:
    """A folder with the policy that `mmeff train cacovid` starts from; it is there as long as this object."""
    folder = tempfile.TemporaryDirectory(prefix="mmeff-untrained-")
    language = language_model(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CaCoVIDRecipe().seed)
        Policy.from_layer(language.layers[0], language.config).save(folder.name)
    return folder


def _why_not(model: Any, method: TokenPruner, layers: int) -> str | None:
    """Why a method is left out at every budget, or None."""
    if isinstance(method, CaCoVID) and not method.policy:
        return "needs a trained policy; pass --policy with a folder that `mmeff train cacovid` wrote"
    try:
        find_host(model, method)
    except UnsupportedModel as error:
        return str(error)
    if method.observes(layers) is not None:
        return "scores tokens by what earlier steps of an episode looked at, and questions have nothing to do with each other"
    return None


def _at(starts: Sequence[TokenPruner], budget: float, layers: int) -> tuple[TokenPruner | None, str | None]:
    """The first setting brought to the budget, or what the last one says against it."""
    reason = None
    for start in starts:
        try:
            return start.at_budget(budget, layers), None
        except ValueError as error:
            reason = str(error)
    return None, reason


@cache
def _weights(name: str) -> str:
    return hashlib.sha256((tiny.data_folder() / name / "model.safetensors").read_bytes()).hexdigest()


@cache
def _policy_weights(folder: str) -> str:
    return hashlib.sha256((Path(folder) / "policy.safetensors").read_bytes()).hexdigest()


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant on a batch of questions; with a reason, a variant that cannot run.

    kinds: a digit per question, the place of its kind in the generator's KINDS. hits: 1 where the answer was right. counts:
    means over the prompts, by the names in COUNTS; dense: what dense has in their place. seconds: per question, of the phases.
    """

    model: str
    variant: str
    setting: str
    batch: int
    kinds: str = ""
    hits: str = ""
    counts: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


def read(path: Path, which: Sequence[Variant]) -> dict[str, dict[int, Row]]:
    """The last row of every variant and batch; rows of other settings are left out.

    Raises: ValueError for a line that is no row, with its number.
    """
    return scored.read(path, "pruning", Row, {v.name: v.setting for v in which}, lambda row: row.batch)


# ---------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how much. `shard` (i, n): batches i - 1, i - 1 + n, ...; `seconds`: no variant begins a batch later."""

    model: str = "tiny-vlm"
    questions: int = 1500
    only: tuple[str, ...] = ()
    seconds: float | None = None
    shard: tuple[int, int] = (1, 1)
    policy: str = ""
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did, in batches of a variant, and how many variants cannot run."""

    done: int
    done_before: int
    left: int
    unreachable: int
    out: Path


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Questions as the model takes them: token ids and mask, pixels, and what the vision encoder makes of them."""

    turns: Sequence[Turn]
    inputs: dict[str, Any]
    pixels: Any
    encoded: Any


def load(name: str) -> tuple[Any, Any]:
    """Model and processor. Raises: ValueError for another name; FileNotFoundError where the weights are not there."""
    if name not in SEEDS:
        raise ValueError(f"--model must be {' or '.join(SEEDS)}, got {name!r}")
    if not (tiny.data_folder() / name).is_dir():
        raise FileNotFoundError(f"no weights at {tiny.data_folder() / name}; `mmeff train {name}` makes them")
    return tiny.vlm() if name == "tiny-vlm" else tiny.video_vlm()


def chosen(which: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    """The variants whose name holds one of the texts, or all. Raises ValueError where none does."""
    found = [v for v in which if not only or any(text in v.name for text in only)]
    if not found:
        labels = ", ".join(dict.fromkeys(v.label for v in which))
        raise ValueError(f"--only {' '.join(only)} leaves no variant; known: {labels}, each with a budget such as 25%")
    return found


def run(options: Options, tick: Callable[[str, int, int], None]) -> Outcome:
    """Answer what the file does not hold yet, batch by batch, so that a run cut short is fair to all variants.

    Raises: ValueError for no questions, an impossible shard, or texts that leave no variant; as `load`.
    """
    part, parts = options.shard
    if options.questions < 1 or not 1 <= part <= parts:
        raise ValueError(
            f"--questions must be >= 1 and --shard i/n with 1 <= i <= n, got {options.questions} and {part}/{parts}; 1/2 and "
            "2/2 share the work of two processes"
        )
    out = options.out or rows_file(options.model)
    model, processor = load(options.model)
    which = chosen(variants(options.model, model, options.policy), options.only)
    have = read(out, which)
    refused = [v for v in which if v.reason is not None]
    scored.append(out, [
        Row(model=options.model, variant=v.name, setting=v.setting, batch=-1, reason=v.reason)
        for v in refused if -1 not in have[v.name] and part == 1
    ])  # fmt: skip
    work, before = [], 0
    for index in range(part - 1, -(-options.questions // BATCH), parts):
        count = min(BATCH, options.questions - index * BATCH)
        for variant in (v for v in which if v.reason is None):
            row = have[variant.name].get(index)
            if row is not None and len(row.hits) >= count:
                before += 1
            else:
                work.append((index, count, variant))
    began, done = time.perf_counter(), 0
    drawn: tuple[int, Batch] | None = None
    for index, count, variant in work:
        if options.seconds is not None and time.perf_counter() - began > options.seconds:
            break
        tick(f"batch {index}: {variant.name}", done, len(work))
        if drawn is None or drawn[0] != index:
            drawn = index, prepare(options.model, model, processor, index, count)
        scored.append(out, [judge(options.model, model, processor, variant, index, drawn[1])])
        done += 1
    return Outcome(done=done, done_before=before, left=len(work) - done, unreachable=len(refused), out=out)


@torch.inference_mode()
def prepare(name: str, model: Any, processor: Any, index: int, count: int) -> Batch:
    """The first `count` questions of a batch, with their pictures drawn, processed and encoded."""
    draw = scene_turns if name == "tiny-vlm" else motion_turns
    turns = draw(SEEDS[name], index, BATCH)[:count]
    inputs = dict(processor(
        text=[chat(processor, text, len(pictures)) for pictures, text, _ in turns],
        images=[picture for pictures, _, _ in turns for picture in pictures], return_tensors="pt", padding=True,
    ))  # fmt: skip
    pixels = inputs.pop("pixel_values")
    return Batch(turns=turns, inputs=inputs, pixels=pixels, encoded=model.model.get_image_features(pixels))


@torch.inference_mode()
def answers(model: Any, processor: Any, batch: Batch, method: MethodConfig | None) -> list[str]:
    """Greedy answers; the encoder runs again only for methods that look at it."""
    watched = isinstance(method, TokenPruner) and bool(method.needs & {"encoder", "class token", "projector"})
    given = {"pixel_values": batch.pixels} if watched else {"mm_encoder_outputs": {"image": batch.encoded}}
    out = model.generate(**batch.inputs, **given, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = out[:, batch.inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def judge(name: str, model: Any, processor: Any, variant: Variant, index: int, batch: Batch) -> Row:
    """Answer a batch with a variant.

    Raises: RuntimeError if the method fell back to dense: such answers are not the method's.
    """
    known: Sequence[str] = scenes.KINDS if name == "tiny-vlm" else motions.KINDS
    dense = variant.method is None
    # a method that is switched off leaves the model as it is, and times it
    with mmeff.accelerate(model, variant.method or FastV()) as handle:
        handle.enabled = not dense
        said = answers(model, processor, batch, variant.method)
        report = handle.report()
    if not dense and report.fallbacks:
        raise RuntimeError(f"{variant.name} did not run as it should: {report}")
    spent = {phase: report.seconds.get(phase, 0.0) for phase in PHASES}
    spent["prefill"] -= spent["selection"]
    return Row(
        model=name, variant=variant.name, setting=variant.setting, batch=index,
        kinds="".join(str(known.index(question.kind)) for _, _, question in batch.turns),
        hits="".join(str(int(text == q.answer)) for text, (_, _, q) in zip(said, batch.turns, strict=True)),
        counts={} if dense else {short: float(report.tokens[long]) for short, long in COUNTS.items()},
        dense={} if dense else {short: float(report.tokens[long]) for short, long in OF_DENSE.items()},
        seconds={phase: float(f"{value / len(said):.4g}") for phase, value in spent.items()},
    )  # fmt: skip
