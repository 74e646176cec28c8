"""What a run is worth: quality with its uncertainty, per variant and category, and each variant against the first one.

Everything is computed from the rows of a run, so a table can be made again, or of a run that is still going on. A mean comes
with a 95 % interval: Wilson's for shares, the bootstrap's for others. Two variants answered the same samples, so their
difference is bootstrapped over pairs, which is far sharper than comparing two intervals.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmeff.evaluation.evaluate import Run
from mmeff.evaluation.rows import DONE

RESAMPLES = 4000
SEED = 20240607  # of the bootstrap, so that a table is the same each time
Z = 1.959963984540054  # of a two-sided 95 % interval
SHARES = ("exact match", "multiple choice", "same answer")  # metrics that are 0 or 1 for each unit
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over `count` units with its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """The mean of paired differences, with `p`: how often a difference at least as far from 0 would come by chance alone."""

    p: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**super().to_dict(), "p": self.p}

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True, kw_only=True)
class VariantScores:
    """What one variant is worth.

    Fields: `done` and `failed` units; `metrics` by name; `categories` the first metric by category; `against` differences to
    the first variant, over samples that both did; `seconds` the median per unit in the model, the first unit of each worker
    apart; `speedup` the median over samples of the first variant's seconds through its own; `tokens` means.
    """

    name: str
    done: int
    failed: int
    metrics: dict[str, Estimate] = field(default_factory=dict)
    categories: dict[str, Estimate] = field(default_factory=dict)
    against: dict[str, Difference] = field(default_factory=dict)
    seconds: float | None = None
    speedup: float | None = None
    tokens: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name, "done": self.done, "failed": self.failed, "seconds": self.seconds, "speedup": self.speedup,
            "metrics": {k: v.to_dict() for k, v in self.metrics.items()},
            "categories": {k: v.to_dict() for k, v in self.categories.items()},
            "against": {k: v.to_dict() for k, v in self.against.items()}, "tokens": self.tokens,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The table of a run. `main` is the metric that categories and plots show; `values[variant][sample]` every unit's metrics;
    `notes` what the reader must know."""

    variants: tuple[VariantScores, ...]
    main: str
    values: Mapping[str, Mapping[str, Mapping[str, float]]]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the values of single units."""
        return {"variants": [v.to_dict() for v in self.variants], "main": self.main, "notes": list(self.notes)}

    @property
    def metrics(self) -> list[str]:
        """Every metric, in the order in which they came up."""
        return list(dict.fromkeys(m for v in self.variants for m in v.metrics))


def score(run: Run, *, measures: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None) -> Scores:
    """Score a run, finished or not.

    Args:
        run: of `evaluate` or `look`. measures: of its videos, as `measures.measure` returns them.
    Returns:
        `Scores`. A metric is of the units for which it means something: exact match needs an answer, multiple choice options.
    """
    names = [v["name"] for v in run.config["variants"]]
    hashes = {v["hash"]: v["name"] for v in run.config["variants"]}
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    failed: dict[str, int] = defaultdict(int)
    for row in run.merged.rows:
        name = hashes[row["hash"]]
        if row["status"] == DONE:
            rows[name][row["sample"]] = row
        else:
            failed[name] += 1
    first = names[0]
    values: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        values[name] = {
            sample: {
                **_answer_metrics(row, rows[first].get(sample) if name != first else None),
                **((measures or {}).get(name, {}).get(sample, {})),
            }
            for sample, row in rows[name].items()
        }
    everything = dict.fromkeys(m for name in names for found in values[name].values() for m in found)
    main = next((m for m in ("multiple choice", "exact match", "PSNR to first", "same answer") if m in everything), "")
    variants = []
    for name in names:
        done = values[name]
        variants.append(
            VariantScores(
                name=name,
                done=len(done),
                failed=failed[name],
                metrics={
                    m: estimate(m, [found[m] for found in done.values() if m in found])
                    for m in everything
                    if any(m in found for found in done.values())
                },
                categories=_by_category(rows[name], done, main),
                against={} if name == first else _against(values[first], done, list(everything)),
                seconds=_median_seconds(rows[name].values()),
                speedup=_speedup(rows[first], rows[name]),
                tokens=_token_means(rows[name].values()),
            )
        )
    return Scores(variants=tuple(variants), main=main, values=values, notes=tuple(_notes(run)))


def _notes(run: Run) -> list[str]:
    notes = []
    if run.left:
        notes.append(f"{run.left} units were not run yet; the table is of those that were.")
    if run.merged.failed:
        notes.append(
            f"{len(run.merged.failed)} units failed and count in no mean; the list of failures says why, and --retry-failed runs them again."
        )
    machines = {(s.get("environment", {}).get("cpu"), s.get("environment", {}).get("gpu")) for s in run.merged.sessions}
    if len(machines) > 1:
        notes.append("Workers ran on different machines, so seconds mix them.")
    return notes


# ---------------------------------------------------------------- answers


def _answer_metrics(row: Mapping[str, Any], first: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics of one answer; `first` is the row of the first variant for the same sample."""
    if row.get("answer") is None:
        return {}
    answer, expected, options = str(row["answer"]), row.get("expected"), row.get("options") or []
    found: dict[str, float] = {}
    if expected is not None and options:
        found["multiple choice"] = float(choice(answer, options) == expected)
    elif expected is not None:
        found["exact match"] = float(normal(answer) == normal(expected))
        found |= rouge(answer, expected)
    if first is not None and first.get("answer") is not None:
        if options:
            mine, theirs = choice(answer, options), choice(str(first["answer"]), options)
            same = mine == theirs if mine or theirs else normal(answer) == normal(str(first["answer"]))
        else:
            same = normal(answer) == normal(str(first["answer"]))
        found["same answer"] = float(same)
    return found


def normal(text: str) -> str:
    """An answer as it is compared: case, spaces around and between words, and punctuation at the ends do not count."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`")


_HEAD = re.compile(
    r"^(?:the\s+)?(?:correct\s+|best\s+|final\s+)?(?:answer|option|choice)(?:\s+is)?\s*[:\-]?\s*", re.IGNORECASE
)
_LETTER = re.compile(r"^[\(\[]?([A-Za-z])(?:[\)\]\.:,]|\s*$)")


def choice(answer: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer means: "B", "(b)", "B. the dog", "The answer is B", or the text of one option.

    Returns: the letter; None where the answer means no option, or more than one.
    """
    letters = LETTERS[: len(options)]
    text = answer.strip()
    found = [i for i, option in enumerate(options) if normal(text) == normal(option)]
    if len(found) == 1:
        return letters[found[0]]
    for candidate in (text, _HEAD.sub("", text)):
        match = _LETTER.match(candidate.strip())
        if match and match[1].upper() in letters:
            return match[1].upper()
    said = [m for m in re.findall(r"\b([A-Z])\b(?!')", text) if m in letters and m not in ("A", "I")]
    if len(set(said)) == 1 and re.search(rf"\b(?:answer|option|choice)\b[^.]*\b{said[0]}\b", text, re.IGNORECASE):
        return said[0]
    words = _words(text)
    inside = [i for i, option in enumerate(options) if _words(option).strip() and _words(option) in words]
    return letters[inside[0]] if len(inside) == 1 else None


def _words(text: str) -> str:
    """The words of a text, with a space before and after each."""
    return " " + " ".join(re.findall(r"\w+", text.casefold())) + " "


def rouge(answer: str, expected: str) -> dict[str, float]:
    """ROUGE-1 and ROUGE-L, the F measure of each.

    Source: torchmetrics `rouge_score`, words without stemming.
    """
    from torchmetrics.functional.text import rouge_score

    found = rouge_score(answer, expected, rouge_keys=("rouge1", "rougeL"))
    return {
        "ROUGE-1": float(found["rouge1_fmeasure"]),
        "ROUGE-L": float(found["rougeL_fmeasure"]),
    }


# ---------------------------------------------------------------- uncertainty


def estimate(metric: str, values: Sequence[float]) -> Estimate:
    """The mean of a metric with its 95 % interval. Raises: ValueError for no values."""
    if not values:
        raise ValueError(f"{metric} needs at least one value, got none")
    finite = [v for v in values if math.isfinite(v)]
    if not finite:  # the PSNR of identical videos only
        return Estimate(mean=math.inf, low=math.inf, high=math.inf, count=len(values))
    mean = math.fsum(finite) / len(finite)
    if metric in SHARES:
        low, high = wilson(sum(values), len(values))
    else:
        low, high = bootstrap(finite)
    return Estimate(mean=mean, low=low, high=high, count=len(values))


def wilson(hits: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; it stays in [0, 1] and is not empty at 0 and 1.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212.
    """
    p = hits / count
    middle = (p + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(p * (1 - p) / count + Z**2 / (4 * count**2))
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))  # rounding must not put p outside


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of a mean, over resampled values."""
    means = _resampled(np.asarray(values, dtype=np.float64))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The mean of second - first over pairs, bootstrapped over pairs.

    Returns: a `Difference`. `p` is two-sided: twice the smaller share of resampled means on either side of 0, at least
        1 / RESAMPLES; 1 where no pair differs.
    Raises: ValueError for no pairs, or different numbers.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"paired needs as many values on both sides, and at least one, got {len(first)} and {len(second)}"
        )
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    mean = float(differences.mean())
    if not differences.any():
        return Difference(mean=0.0, low=0.0, high=0.0, count=len(first), p=1.0)
    means = _resampled(differences)
    low, high = np.percentile(means, [2.5, 97.5])
    tail = min(float((means <= 0).mean()), float((means >= 0).mean()))
    return Difference(
        mean=mean, low=float(low), high=float(high), count=len(first), p=min(1.0, max(2 * tail, 1 / RESAMPLES))
    )


def _resampled(values: np.ndarray) -> np.ndarray:
    """Means of RESAMPLES draws with replacement; in portions, as a large run would not fit in memory at once."""
    chance = np.random.default_rng(SEED)
    portion = max(1, 4_000_000 // len(values))
    parts = []
    for start in range(0, RESAMPLES, portion):
        draws = chance.integers(0, len(values), size=(min(portion, RESAMPLES - start), len(values)))
        parts.append(values[draws].mean(1))
    return np.concatenate(parts)


# ---------------------------------------------------------------- parts of the table


def _by_category(
    rows: Mapping[str, Mapping[str, Any]], values: Mapping[str, Mapping[str, float]], metric: str
) -> dict[str, Estimate]:
    groups: dict[str, list[float]] = defaultdict(list)
    for sample, row in rows.items():
        if row.get("category") and metric in values[sample]:
            groups[row["category"]].append(values[sample][metric])
    return {category: estimate(metric, found) for category, found in sorted(groups.items())}


def _against(
    first: Mapping[str, Mapping[str, float]], mine: Mapping[str, Mapping[str, float]], metrics: Sequence[str]
) -> dict[str, Difference]:
    found = {}
    for metric in metrics:
        both = [s for s in mine if metric in mine[s] and metric in first.get(s, {})]
        pairs = [(first[s][metric], mine[s][metric]) for s in both]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if pairs:
            found[metric] = paired([a for a, _ in pairs], [b for _, b in pairs])
    return found


def _warm(rows: Any) -> list[Mapping[str, Any]]:
    """Rows that are no worker's first of their variant, where there are any: the first one compiles and warms caches."""
    rows = list(rows)
    return [row for row in rows if not row.get("cold")] or rows


def _median_seconds(rows: Any) -> float | None:
    spent = [row["seconds"]["model"] for row in _warm(rows) if "model" in row.get("seconds", {})]
    return statistics.median(spent) if spent else None


def _speedup(first: Mapping[str, Mapping[str, Any]], mine: Mapping[str, Mapping[str, Any]]) -> float | None:
    ratios = [
        first[s]["seconds"]["model"] / mine[s]["seconds"]["model"]
        for s in mine
        if s in first and not first[s].get("cold") and not mine[s].get("cold") and mine[s]["seconds"]["model"] > 0
    ]
    return statistics.median(ratios) if ratios else None


def _token_means(rows: Any) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in (row.get("tokens") or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                groups[name].append(value)
    return {name: statistics.fmean(found) for name, found in groups.items()}
