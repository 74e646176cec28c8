"""The kinds of rows that the benchmarks write, each made into figures. One function per kind; `figures_of` knows which is which."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .results import Figure, Skipped

Row = dict[str, Any]
Found = tuple[list[Figure], list[Skipped]]
PERCENTILES, ERRORS, RANGE = "20th to 80th percentile", "standard errors", "fastest to slowest round"


def figures_of(topic: str, rows: Sequence[Row]) -> Found:
    """The figures of a file's rows, and what they say could not run.

    Raises: ValueError for rows of a kind that is not known; KeyError, TypeError for rows that lack what their kind has.
    """
    figures: list[Figure] = []
    skipped: list[Skipped] = []
    if not rows:
        return figures, skipped
    for marks, read in READERS:
        if marks <= rows[0].keys():
            for found in read(topic, rows):
                (figures if isinstance(found, Figure) else skipped).append(found)  # type: ignore[arg-type]
            return figures, skipped
    raise ValueError(f"its rows have the fields {', '.join(list(rows[0])[:6])}, ...")


def _where(row: Row) -> dict[str, Any]:
    """The machine, versions and date of a row."""
    environment = row.get("environment") or row
    names = [name for name in ("torch", "transformers", "diffusers", "timm", "mmeff") if name in environment]
    hardware = row["hardware"]
    return {
        "hardware": hardware, "versions": ", ".join(f"{name} {environment[name]}" for name in names),
        "device": row.get("device") or ("cuda" if "NVIDIA" in hardware else "cpu"),
        "commit": row.get("commit") or "", "date": row.get("date") or "",
    }  # fmt: skip


def _percentiles(values: dict[str, float]) -> dict[str, Any]:
    return {"value": values["p50"], "low": values["p20"], "high": values["p80"], "spread": PERCENTILES}


def _rounds(values: Sequence[float]) -> dict[str, Any]:
    if len(values) < 2:
        return {"value": values[0], "count": "1 round"}
    return {
        "value": statistics.median(values), "low": min(values), "high": max(values), "spread": RANGE,
        "count": f"median of {len(values)} rounds",
    }  # fmt: skip


def _mean(values: Sequence[float], scale: float = 1.0) -> dict[str, Any]:
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    if math.isnan(error):
        return {"value": scale * mean}
    return {
        "value": scale * mean, "low": scale * (mean - error), "high": scale * (mean + error), "spread": ERRORS,
    }  # fmt: skip


def _latest(rows: Iterable[Row], of: str) -> dict[str, list[Row]]:
    """Rows by `of`, those of its last setting alone: rows of other settings are never mixed."""
    last = {row[of]: row["setting"] for row in rows}
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["setting"] == last[row[of]]:
            found.setdefault(row[of], []).append(row)
    return found


# ---------------------------------------------------------------- speed


def kernels(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """Kernels against a peer of PyTorch: paired ratios, seconds and memory."""
    for row in {(r["case"], r["backend"], r["peer"], r["hardware"]): r for r in rows}.values():
        if row["status"] == "skipped":
            yield Skipped(
                topic=topic, what=f"{row['case']}, {row['backend']} against {row['peer']}", reason=row["reason"]
            )
            continue
        shape = " ".join(f"{k}{v}" for k, v in row["shape"].items() if not (k == "Hk" and v == row["shape"].get("H")))
        what = row["what"]
        point: dict[str, Any] = {}
        if what.startswith("random") and row["block_density"] is not None:
            what = what.partition(",")[0]
            point = {"x": round(100 * (1 - row["block_density"]), 2), "axis": "blocks left out, %"}
        shared: dict[str, Any] = {
            "topic": topic, "case": f"{row['operator']}, {what}, {row['direction']}, {row['dtype']}, {shape}",
            "method": row["backend"], "count": f"{row['rounds']} rounds", **point, **_where(row),
        }  # fmt: skip
        ratio: dict[str, Any] = {"metric": f"speedup over {row['peer']}", "neutral": 1.0, "better": "high"}
        yield Figure(**shared, **ratio, **_percentiles(row["ratio"]))
        yield Figure(**shared, metric="milliseconds per call", better="low", **_percentiles(_scaled(row["ours"], 1e3)))
        peer: dict[str, Any] = {**shared, "method": f"{row['peer']}, the peer of {row['backend']}"}
        yield Figure(**peer, metric="milliseconds per call", better="low", **_percentiles(_scaled(row["theirs"], 1e3)))
        if row["ours_bytes"] is not None:
            yield Figure(**shared, metric="memory of a call, MiB", better="low", value=row["ours_bytes"] / 2**20)


def _scaled(values: dict[str, float], factor: float) -> dict[str, float]:
    return {name: factor * value for name, value in values.items()}


def video(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """Video transformers end to end, and attention as videos get longer."""
    for row in rows:
        found, sizes = row["figures"], row["sizes"]
        if row["status"] == "skipped":
            yield Skipped(topic=topic, what=f"{row['kind']}, {row['method']}", reason=row["reason"])
        elif row["kind"] == "scaling":
            yield Figure(
                topic=topic, metric="seconds of attention", method=row["method"], better="low", x=found["tokens"],
                axis="tokens of the video", **_rounds(found["seconds"]), **_where(row),
                case=f"attention alone, {' x '.join(map(str, sizes['frame']))} tokens per frame, {sizes['heads']} heads",
            )  # fmt: skip
        elif row["kind"] == "fit":
            yield Figure(
                topic=topic, metric="exponent of time in the tokens", method=row["method"], value=found["exponent"],
                case=f"attention alone, {' x '.join(map(str, sizes['frame']))} tokens per frame", better="low",
                **_where(row),
            )  # fmt: skip
        elif row["kind"] == "summary":
            yield from _forward(topic, row, found, sizes)


def _forward(topic: str, row: Row, found: Row, sizes: Row) -> Iterable[Figure]:
    shared: dict[str, Any] = {
        "topic": topic, "method": row["method"], "count": f"{found['rounds']} round{'s' * (found['rounds'] != 1)}",
        "case": f"forward pass, {sizes['layers']} layers, grid {' x '.join(map(str, sizes['grid']))}, random weights",
        **_where(row),
    }  # fmt: skip
    gain: dict[str, Any] = {"neutral": 1.0, "better": "high"}
    for name, metric in (("attention", "speedup of attention"), ("forward", "speedup of the forward pass")):
        yield Figure(**shared, **gain, metric=metric, value=found[f"{name}_speedup"])
        if found.get(f"predicted_{name}") is not None:
            yield Figure(**shared, **gain, metric=metric, kind="predicted", value=found[f"predicted_{name}"])
    yield Figure(**shared, metric="density of attention", better="low", value=found["density"])
    yield Figure(**shared, metric="seconds of the forward pass", better="low", value=found["seconds"])
    if found.get("overhead") is not None:
        yield Figure(
            **shared, metric="selecting and reordering, share of attention", value=found["overhead"], better="low"
        )


def prefill(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """Prefill with tokens dropped, in alternation with dense."""
    for row in {(r["method"], r["budget"], str(r["sizes"]), r["hardware"]): r for r in rows}.values():
        sizes = row["sizes"]
        shared: dict[str, Any] = {
            "topic": topic, "method": row["method"], "x": round(100 * row["token_layers"], 2), "axis": "tokens left over all layers, %",
            "case": f"batch {sizes['batch']}, {sizes['layers']} layers of width {sizes['width']}, {sizes['side'] ** 2} visual tokens",
            **_where(row),
        }  # fmt: skip
        gained: dict[str, Any] = _rounds([dense / ours for dense, ours, _ in row["rounds"]])
        yield Figure(**shared, metric="speedup of prefill over dense", neutral=1.0, better="high", **gained)
        share = _rounds([100 * spent / ours for _, ours, spent in row["rounds"]])
        yield Figure(**shared, metric="selection, % of the shortened prefill", better="low", **share)


def backbones(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """Backbones against those of timm and their own plain form."""
    for row in {(r["model"], r["height"], r["width"], r["batch"], r["hardware"]): r for r in rows}.values():
        case = f"{row['height']} x {row['width']} pixels, batch {row['batch']}"
        if row["ours"] is None:
            yield Skipped(topic=topic, what=f"{row['model']}, {case}", reason=row["reason"])
            continue
        shared: dict[str, Any] = {
            "topic": topic, "case": case, "method": row["model"], "count": f"{len(row['rounds'])} rounds", **_where(row),
        }  # fmt: skip
        seconds, ours = row["ours"]["seconds"], row["ours"]
        rate: dict[str, Any] = {
            "p50": row["batch"] / seconds["p50"],
            "p20": row["batch"] / seconds["p80"],
            "p80": row["batch"] / seconds["p20"],
        }
        yield Figure(**shared, metric="pictures per second", better="high", **_percentiles(rate))
        for peer in row["peers"]:
            name = peer["name"] if peer["name"] == "plain form" else peer["name"].partition("_")[0]
            metric = f"speedup over {'its plain form' if name == 'plain form' else f'the {name} of its size'}"
            yield Figure(**shared, metric=metric, neutral=1.0, better="high", **_percentiles(peer["ratio"]))
        if ours["memory"] is not None:
            yield Figure(**shared, metric="memory beyond the weights, MiB", better="low", value=ours["memory"] / 2**20)


def roofline(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """The sparse kernel against what the vector units could do."""
    for row in rows:
        shared: dict[str, Any] = {
            "topic": topic, "case": "block_sparse_attention, float32", "x": round(100 * row["sparsity"], 2), "axis": "blocks left out, %",
            **_where(row),
        }  # fmt: skip
        gain: dict[str, Any] = {"metric": "speedup over dense attention", "neutral": 1.0, "better": "high"}
        yield Figure(**shared, **gain, method="native", value=row["speedup"])
        yield Figure(**shared, **gain, method="bound by the vector units", kind="predicted", value=row["bound"])
        for method in ("peak", "dense", "native"):
            yield Figure(**shared, metric="GFLOP/s over visited pairs", better="high", method=method, value=row[method])


# ---------------------------------------------------------------- on a GPU


GAIN: dict[str, Any] = {"neutral": 1.0, "better": "high"}


def gpu(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """`benchmarks gpu`: of every task on every machine the row that was measured last, or found wrong; what else is a reason."""
    found: dict[tuple[str, str, str], Row] = {}
    final = ("measured", "wrong")
    for row in rows:
        key = (row["hardware"], row["part"], row["name"])
        if key not in found or row["status"] in final or found[key]["status"] not in final:
            found[key] = row
    for row in found.values():
        if row["status"] == "measured":
            yield from GPU_PARTS[row["part"]](row["name"], row["figures"], {"topic": topic, **_where(row)})
        else:
            reason = row["reason"] if row["status"] == "skipped" else f"{row['status']}: {row['reason']}"
            yield Skipped(topic=topic, what=f"{row['part']}: {row['name']}", reason=reason)


def _gpu_gate(name: str, x: Row, shared: Row) -> Iterable[Figure]:
    what, _, case = name.partition(" | ")
    if "of_allowed" in x:
        metric = "error, share of what is allowed"
        yield Figure(**shared, metric=metric, case=case, method=what, value=x["of_allowed"], neutral=1.0, better="low")
    elif "repeats" in x:
        yield Figure(
            **shared, metric="runs with the same bits", case=what, method=what, value=x["repeats"], better="high"
        )


def _gpu_sweep(name: str, x: Row, shared: Row) -> Iterable[Figure | Skipped]:
    if x["gain"] is None:
        yield Skipped(topic=shared["topic"], what=f"sweep: {name}", reason="no candidate runs and is right")
        return
    tiles = " x ".join(map(str, x["best"]))
    yield Figure(**shared, **GAIN, metric="gain over the table of tiles", case=x["key"], method=tiles, value=x["gain"])


def _gpu_kernels(name: str, x: Row, shared: Row) -> Iterable[Figure]:
    if name.startswith("ceiling: "):
        tera: dict[str, Any] = {"metric": f"ceiling, T{x['unit']}", "value": x["value"] / 1e12, "better": "high"}
        yield Figure(**shared, **tera, case="what this GPU does at most", method=name.removeprefix("ceiling: "))
    elif "ratios" in x:
        for method, ratio in x["ratios"].items():
            metric = "throughput per visited pair over dense"
            yield Figure(**shared, metric=metric, case=name, method=method, value=ratio, better="high")
    else:
        yield from _gpu_against_dense(name, x, shared)


def _gpu_against_dense(name: str, x: Row, shared: Row) -> Iterable[Figure]:
    """A kernel, or GNA with its permutation, against the fastest dense attention."""
    point: dict[str, Any] = {}
    case, method = name.replace(" | ", ", "), x.get("ran") or "GNA"
    if "operator" in x:
        what = x["what"]
        if what.startswith("random") and x["block_density"] is not None:
            what = what.partition(",")[0]
            point = {"x": round(100 * (1 - x["block_density"]), 2), "axis": "blocks left out, %"}
        shape = " ".join(f"{letter}{size}" for letter, size in x["shape"].items())
        case = f"{x['operator']}, {what}, {x['direction']}, {x['dtype']}, {shape}"
    shared = {**shared, "case": case, **point}
    dense: dict[str, Any] = {"metric": "speedup over the fastest dense attention"}
    if "peers" in x:
        best = x["peers"][x["fastest_dense"]]
        yield Figure(
            **shared, **dense, **GAIN, method=method, count=f"{best['rounds']} rounds", **_percentiles(best["ratio"])
        )
        if x["over_flex"] is not None:
            yield Figure(**shared, **GAIN, metric="speedup over FlexAttention", method=method, value=x["over_flex"])
    else:
        yield Figure(**shared, **dense, **GAIN, method=method, value=x["value"])
    for side, seconds in ((method, x["seconds"]), (f"dense, {x['fastest_dense']}", x["dense_seconds"])):
        values = _percentiles(_scaled(seconds, 1e3))
        yield Figure(**shared, metric="milliseconds per call", better="low", method=side, **values)
    if x.get("useful_flops") is not None:
        useful = x["useful_flops"] / 1e12
        yield Figure(**shared, metric="useful TFLOP/s", better="high", method=method, value=useful)


def _gpu_forward(name: str, x: Row, shared: Row) -> Iterable[Figure]:
    model, size, _, layers, *rest = name.split(" | ")
    case = ", ".join([model, size, layers, *rest, "random weights"])
    shared = {**shared, "case": case, "method": x["method"], "count": f"{x['rounds']} rounds"}
    whole = "speedup of the forward pass" if x["direction"] == "forward" else "speedup of forward and backward"
    attention = "speedup of attention"
    yield Figure(**shared, **GAIN, metric=whole, **_percentiles(x["ratio"]))
    yield Figure(**shared, **GAIN, metric=attention, value=x["attention_ratio"])
    for metric, key in ((whole, "speedup"), (attention, "attention")):
        if x["predicted"][key] is not None:
            yield Figure(**shared, **GAIN, kind="predicted", metric=metric, value=x["predicted"][key])
    if "estimated" in x:  # from the time of the layers that were built: nothing that was measured
        value = x["estimated"]["value"]
        yield Figure(**shared, **GAIN, kind="predicted", metric=f"{whole}, estimated for all layers", value=value)
    if x["density"] is not None:
        yield Figure(**shared, metric="density of attention", better="low", value=x["density"])
    yield Figure(**shared, metric="seconds of the pass", better="low", value=x["seconds"])


def _gpu_prefill(name: str, x: Row, shared: Row) -> Iterable[Figure]:
    *case, method = name.split(" | ")
    shared = {**shared, "case": ", ".join(case), "method": method, "count": f"{x['rounds']} rounds"}
    saved, selection = 100 * x["value"], 100 * x["selection_of_dense"]
    yield Figure(**shared, metric="prefill saved, % of dense", better="high", neutral=0.0, value=saved)
    yield Figure(**shared, metric="selection, % of dense prefill", better="low", value=selection)
    yield Figure(**shared, **GAIN, metric="speedup of a whole answer", value=x["answer_ratio"])
    yield Figure(**shared, **GAIN, metric="speedup of decoding", value=x["decode_ratio"])


def _gpu_backbones(name: str, x: Row, shared: Row) -> Iterable[Figure]:
    model, *case = name.split(" | ")
    shared = {**shared, "case": ", ".join(case), "method": model}
    yield Figure(**shared, metric="pictures per second", better="high", value=x["value"])
    for peer, found in x["peers"].items():
        of = "its plain form" if peer == "plain form" else f"the {peer.partition('_')[0]} of its size"
        yield Figure(**shared, **GAIN, metric=f"speedup over {of}", **_percentiles(found["ratio"]))
    if x["memory"] is not None:
        yield Figure(**shared, metric="memory of a call, MiB", better="low", value=x["memory"] / 2**20)


GPU_PARTS: dict[str, Callable[[str, Row, Row], Iterable[Figure | Skipped]]] = {
    "gate": _gpu_gate, "sweep": _gpu_sweep, "kernels": _gpu_kernels, "forward": _gpu_forward, "prefill": _gpu_prefill,
    "backbones": _gpu_backbones,
}  # fmt: skip


# ---------------------------------------------------------------- quality


def quality(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """Clips of the tiny video model against dense ones; times are not in these rows."""
    names: dict[str, tuple[str, Any]] = {
        "psnr": ("PSNR to dense, dB", "high"), "corrected": ("PSNR to dense, background corrected, dB", "high"),
        "ssim": ("SSIM to dense", "high"), "drift": ("drift of the background", "low"),
        "found": ("shape found, %", "high"), "colour": ("colour right, %", "high"), "shape": ("shape right, %", "high"),
        "direction": ("direction right, %", "high"),
    }  # fmt: skip
    for variant, mine in _latest(rows, "variant").items():
        rectified = variant.endswith("-rectified")
        family = variant.removesuffix("-rectified").partition("-")[0] + (", rectified" if rectified else "")
        density = [r["density"] for r in mine if r["density"] is not None]
        point: dict[str, Any] = (
            {"x": round(statistics.fmean(density), 4), "axis": "density where the method acts"} if density else {}
        )
        for name, (metric, better) in names.items():
            values = [r[name] for r in mine if r[name] is not None]
            if values:
                yield Figure(
                    topic=topic, case="tiny-video, same noise as dense", method=family if density else variant, metric=metric,
                    better=better, count=f"{len(values)} prompts", **point, **_mean(values, 100 if "%" in metric else 1),
                )  # fmt: skip


def pruning(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """Answers of a tiny model with visual tokens dropped: overall, and by kind of question."""
    from mmeff.tiny import motions, scenes

    for variant, mine in _latest(rows, "variant").items():
        known = motions.KINDS if "video" in mine[0]["model"] else scenes.KINDS
        label, _, budget = variant.rpartition(" ") if variant.endswith("%") else (variant, "", "")
        reason = next((r["reason"] for r in mine if r["reason"]), None)
        if reason is not None:
            yield Skipped(topic=topic, what=variant, reason=reason)
            continue
        asked = {r["batch"]: r for r in mine}.values()
        hits = [(int(h), known[int(k)]) for r in asked for h, k in zip(r["hits"], r["kinds"], strict=True)]
        total = sum(len(r["hits"]) for r in asked)

        def mean(name: str, asked: Any = asked, total: int = total) -> float:
            of = [(r["counts"] or {**r["dense"], "operations": 1.0}, len(r["hits"])) for r in asked]
            return sum(counts[name] * n for counts, n in of) / total

        if label == "dense" and not any(r["counts"] or r["dense"] for r in asked):
            point: dict[str, Any] = {}
        else:
            point = {"x": round(mean("mean"), 2), "axis": "visual tokens, mean over layers"}
        shared: dict[str, Any] = {"topic": topic, "method": label, **point}
        for case in ("all kinds of question", *known):
            of_kind = [h for h, kind in hits if case in (kind, "all kinds of question")]
            if len(of_kind) > 1:
                yield Figure(
                    **shared, case=case, metric="exact match, %", better="high", count=f"{len(of_kind)} questions",
                    **_mean(of_kind, 100),
                )  # fmt: skip
        for name, metric in (
            ("operations", "prefill operations, share of dense"), ("cache_kib", "cache of the prompt, KiB"), ("last", "visual tokens at the last layer"),
        ):  # fmt: skip
            if point:
                yield Figure(
                    **shared, case="all kinds of question", metric=metric, better="low", value=round(mean(name), 4),
                    count=f"{total} questions",
                )  # fmt: skip


def acting(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """Success of the tiny policy in closed loop with visual tokens dropped."""
    for variant, mine in _latest(rows, "variant").items():
        taken = [t for r in {r["batch"]: r for r in mine}.values() for t in r["taken"]]
        label, layer, keep = (*variant.split(", "), "", "")[:3]
        point: dict[str, Any] = (
            {"x": float(keep.rstrip("%")), "axis": "visual tokens kept from there on, %"} if keep else {}
        )
        for case in (f"pruned before {layer}",) if layer else ("pruned before layer 2", "pruned before layer 3"):
            yield Figure(
                topic=topic, case=case, method=label, metric="episodes that succeed, %", better="high",
                count=f"{len(taken)} episodes", **point, **_mean([float(t is not None) for t in taken], 100),
            )  # fmt: skip


def digits(topic: str, rows: Sequence[Row]) -> Iterable[Figure | Skipped]:
    """Backbones trained on handwritten digits, on our kernels and on their reference."""
    for variant, mine in _latest(rows, "variant").items():
        row = mine[-1]
        shared: dict[str, Any] = {
            "topic": topic,
            "case": "handwritten digits, 48 or 64 pixels",
            "method": variant,
            **_where(row),
        }
        accuracy, error = 100 * row["accuracy"], 100 * row["error"]
        yield Figure(
            **shared, metric="held-out accuracy, %", better="high", value=accuracy, low=accuracy - error,
            high=min(100.0, accuracy + error), spread=ERRORS, count=f"{row['held_out']} pictures",
        )  # fmt: skip
        yield Figure(
            **shared,
            metric="processor seconds of training",
            better="low",
            value=row["seconds"],
            count=f"{row['steps']} steps",
        )


# What only rows of one kind have. The first that matches is taken.
READERS = (
    ({"case", "operator", "peer"}, kernels), ({"kind", "figures", "sizes"}, video), ({"token_layers", "budget"}, prefill),
    ({"part", "name", "took"}, gpu), ({"ours", "peers", "rounds"}, backbones), ({"peak", "bound"}, roofline), ({"prompt", "drift"}, quality),
    ({"hits", "kinds"}, pruning), ({"taken", "variant"}, acting), ({"family", "losses"}, digits),
)  # fmt: skip
