"""The rows of `pruning` as tables: accuracy of every method and budget, overall and by kind of question, against dense and FastV."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mmeff.pruning._base import TokenPruner
from mmeff.pruning.normtopk import NormTopK
from mmeff.pruning.randompruning import RandomPruning
from mmeff.pruning.uniformpruning import UniformPruning
from mmeff.tiny import motions, scenes

from .pruning import BATCH, COUNTS, DENSE, PHASES, Row, Variant, load, read, variants
from .results import Machine

GROUPS = ("inside the language model", "before it, by what the encoder saw", "before it, by its inputs", "controls")
CANNOT_TELL = """\
What these tables cannot tell:

* They rank no method for a real model. This one has 1.6 M parameters, six layers, four heads and short questions.
* In training it saw prompts with background tokens dropped, so it tolerates that better than a model that never did.
* On six layers a method that prunes inside the language model keeps a sixth of the tokens at least, a third where it prunes
  before layer 2. On 32 layers the same settings keep 3 % and 6 %, and the small budgets are open to it.
* Schedules were brought to six layers by depth and to the budgets by proportion; no setting was tuned, and rates and
  constants are those published for LLaVA-1.5.
* Answers are one or two words of a closed vocabulary. Nothing here is read off a page, and nothing is generated at length.
* Times are of batches on a machine that may have had other work: read operations and cache instead.
* One model, trained once with one seed; standard errors are over questions alone."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One variant over its questions. Figures are (mean, standard error), None where there are none.

    against_dense, against_fastv: mean difference of right answers, question by question; FastV is that of the same budget.
    """

    model: str
    variant: str
    label: str
    group: str
    budget: float | None
    method: dict[str, Any] | None
    setting: str
    reason: str | None
    questions: int
    accuracy: list[float] | None
    kinds: dict[str, list[float]]
    counts: dict[str, float]
    seconds: dict[str, float]
    against_dense: list[float] | None
    against_fastv: list[float] | None
    environment: dict[str, str]
    commit: str | None
    date: str


def summarise(path: Path, name: str, machine: Machine, policy: str = "") -> list[Summary]:
    """Figures of every variant that has at least two questions, and the reasons of those that cannot run.

    Raises: ValueError if no variant has answers; as `load`.
    """
    model, _ = load(name)
    which = variants(name, model, policy)
    rows = read(path, which)
    layers = int(model.config.get_text_config().num_hidden_layers)
    hits = {v.name: _hits(rows[v.name]) for v in which}
    whole: dict[str, float] = {}
    for row in (row for of in rows.values() for row in of.values() if row.dense):
        whole = {"operations": 1.0, **row.dense}
        break
    found = []
    for variant in which:
        mine = hits[variant.name]
        if len(mine) < 2 and -1 not in rows[variant.name]:
            continue
        answered = [row for batch, row in rows[variant.name].items() if batch >= 0]
        twin = None if variant.budget is None or variant.label == "FastV" else f"FastV {100 * variant.budget:g}%"
        found.append(Summary(
            model=name, variant=variant.name, label=variant.label, group=_group(variant, layers), budget=variant.budget,
            method=None if variant.method is None else variant.method.to_dict(), setting=variant.setting,
            reason=variant.reason, questions=len(mine), accuracy=_mean(mine.values()),
            kinds=_by_kind(name, rows[variant.name], mine), counts=whole if variant.label == DENSE else _weighted(answered, "counts"),
            seconds=_weighted(answered, "seconds"),
            against_dense=None if variant.label == DENSE else _difference(mine, hits[DENSE]),
            against_fastv=None if twin is None else _difference(mine, hits.get(twin, {})),
            environment=machine.environment, commit=machine.commit,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        ))  # fmt: skip
    if not any(s.accuracy for s in found):
        raise ValueError(f"{path} holds no answers; run `python -m benchmarks pruning --model {name}` first")
    return found


def _group(variant: Variant, layers: int) -> str:
    method: TokenPruner | None = variant.method
    if method is None:
        return ""
    if isinstance(method, RandomPruning | UniformPruning | NormTopK):
        return GROUPS[3]
    if method.points(layers)[0].layer > 0:
        return GROUPS[0]
    return GROUPS[1] if method.needs & {"encoder", "class token"} else GROUPS[2]


def _hits(rows: Mapping[int, Row]) -> dict[int, int]:
    """Whether each question was answered rightly, by its number."""
    return {b * BATCH + i: int(hit) for b, row in rows.items() if b >= 0 for i, hit in enumerate(row.hits)}


def _by_kind(name: str, rows: Mapping[int, Row], hits: Mapping[int, int]) -> dict[str, list[float]]:
    known = scenes.KINDS if name == "tiny-vlm" else motions.KINDS
    of: dict[str, list[int]] = {kind: [] for kind in known}
    for batch, row in rows.items():
        for i, digit in enumerate(row.kinds):
            of[known[int(digit)]].append(hits[batch * BATCH + i])
    return {kind: figure for kind, values in of.items() if (figure := _mean(values)) is not None}


def _weighted(rows: Sequence[Row], what: str) -> dict[str, float]:
    """Means over questions of figures that rows hold as means over theirs."""
    total = sum(len(row.hits) for row in rows)
    names = getattr(rows[0], what) if rows else ()
    return {n: sum(getattr(row, what)[n] * len(row.hits) for row in rows) / total for n in names}


def _mean(values: Iterable[int]) -> list[float] | None:
    x = np.array(list(values), dtype=np.float64)
    return None if len(x) < 2 else [float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))]


def _difference(mine: Mapping[int, int], other: Mapping[int, int]) -> list[float] | None:
    return _mean(mine[i] - other[i] for i in sorted(mine.keys() & other.keys()))


def write_summary(summaries: Iterable[Summary], path: Path) -> None:
    """Replace the file: its rows are derived from the answers, which stay."""
    path.write_text("".join(json.dumps(asdict(s), ensure_ascii=False, allow_nan=False) + "\n" for s in summaries))


def markdown(summaries: Sequence[Summary]) -> str:
    """The table at every budget, the table by kind of question, what cannot run, and what none of it can tell."""
    ran = [s for s in summaries if s.accuracy is not None]
    lines = [
        "Exact match in percent with standard errors; differences are paired by question. Budgets are means over layers.\n",
        *_head(
            "method and budget", "questions", "tokens at last", "mean over layers", "operations", "cache, KiB", "exact match",
            "against dense", "against FastV", *(f"{phase}, ms" for phase in PHASES),
        ),
    ]  # fmt: skip
    for s in ran:
        cells = [f"{s.counts[c]:.{d}f}" if s.counts else "" for c, d in zip(COUNTS, (1, 1, 3, 0), strict=True)]
        times = [f"{1e3 * s.seconds[phase]:.2f}" if s.seconds else "" for phase in PHASES]
        figures = [_cell(s.accuracy), _cell(s.against_dense, "+"), _cell(s.against_fastv, "+")]
        lines.append(f"| {' | '.join([s.variant, str(s.questions), *cells, *figures, *times])} |")
    kinds = list(dict.fromkeys(kind for s in ran for kind in s.kinds))
    lines += ["\nBy kind of question, exact match in percent.\n", *_head("method and budget", *kinds)]
    lines += [f"| {' | '.join([s.variant, *(_cell(s.kinds.get(kind)) for kind in kinds)])} |" for s in ran]
    reasons: dict[tuple[str, str], list[str]] = {}
    for s in summaries:
        if s.reason is not None:
            reasons.setdefault((s.label, s.reason.split(", got a budget of")[0]), []).append(
                f"{100 * (s.budget or 0):g}%"
            )
    if reasons:
        lines += ["\nNot measured.\n", *_head("method", "budgets", "reason")]
        lines += [
            f"| {label} | {', '.join(budgets)} | {why.replace('|', '/')} |" for (label, why), budgets in reasons.items()
        ]
    return "\n".join([*lines, "", CANNOT_TELL])


def _head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]


def _cell(figure: Sequence[float] | None, sign: str = "") -> str:
    return "" if figure is None else f"{100 * figure[0]:{sign}.1f} ± {100 * figure[1]:.1f}"
