"""The rows of `gpu`, `video`, `prefill` and `kernels` as docs/performance.md: what was measured, predicted and quoted, side by side.

Each of the three has columns of its own. Tables stand under the machine that they were measured on, quotes name theirs. What was
not measured is said in a sentence; a table is never empty. Losses, missed bars and what could not run stay in.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmeff.evaluation.pictures import COLOURS, INK, MARKERS, PAPER, RULE
from mmeff.kernels.calibration import _DEFAULTS

from . import plots
from .backbones import ANCHORS, PLAIN
from .gpu import denoisers, kernels
from .gpu import prefill as answers
from .gpu import report as told
from .performance_rows import Machine, Rows, by_machine, predictions, token_layers, worst
from .prefill import BAR, SELECTION
from .video import Line

VERSIONS = ("torch", "triton", "cuda", "transformers", "diffusers", "timm", "mmeff")
LIMITS = {"max_sm_mhz": "at most {} MHz", "power_limit_w": "{} W", "driver": "driver {}"}
COMMAND = "python -m benchmarks gpu"
NOWHERE = f"Nothing was measured on a GPU yet; `{COMMAND}` does it ([how](../benchmarks/README.md#on-a-gpu))."
FORWARD = ("model", "size", "method and setting", "layers", "measured, forward", "measured, attention", "estimated, all layers",
           "predicted, forward", "predicted, attention", "quoted by its authors", "density", "dense, s", "ours, s")  # fmt: skip
QUOTED = ("what", "quoted", "by", "on", "the least that we expect")
NOT_QUOTED = "nothing at this setting"
ADAPTINFER = "arXiv:2508.06084"
UNKNOWN = denoisers.Quote(value=1, of="", by="").hardware


def page(rows: Rows) -> dict[str, str]:
    """The text between the markers of docs/performance.md, by the name of the marker."""
    machines = by_machine(rows)
    return {
        "end-to-end": end_to_end(machines),
        "kernels": kernel_tables(machines),
        "predictions": how_good(machines),
        "not-run": could_not_run(machines),
    }


def _where(machine: Machine, rows: Sequence[Any]) -> str:
    """The machine, versions and days of the rows of a table."""
    last = rows[-1]
    versions = ", ".join(f"{name} {last.environment[name]}" for name in VERSIONS if name in last.environment)
    days = sorted({row.date[:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    clocks = getattr(last, "gpu", {})
    limits = "".join(f", {what.format(clocks[key])}" for key, what in LIMITS.items() if key in clocks)
    return f"{machine.name}{limits}; {versions}; {when}."


# ---------------------------------------------------------------- end to end


def end_to_end(machines: Sequence[Machine]) -> str:
    """Forwards of video transformers, prefill of vision-language models, backbones."""
    lines: list[str] = []
    for machine in machines:
        parts = [_video(machine), _forward(machine), _prefill(machine), _answers(machine), _backbones(machine)]
        if machine.is_gpu and not any(parts):
            parts = [f"No model was measured on this GPU yet; `{COMMAND}` does it."]
        if any(parts):
            lines += [f"### {machine.name}", *filter(None, parts)]
        if machine.video and not machine.is_gpu:
            lines.append("Backbones on processors have [a page of their own](backbones.md).")
    return "\n\n".join(lines + _quotes(machines, ("forward", "prefill"), NOWHERE))


def _video(machine: Machine) -> str:
    found = machine.summaries()
    if not found:
        return ""
    rows = []
    for line in found:
        x, sizes = line.figures, line.sizes
        rows.append((
            f"Wan, {sizes['heads']} heads x {sizes['head_dim']}, random weights", f"{_by(sizes['grid'])} tokens", _method(line.method, line.preset),
            str(sizes["layers"]), _times(x["forward_speedup"]), _times(x["attention_speedup"], x.get("bar")), "",
            _times(x["predicted_forward"]), _times(x["predicted_attention"]), _quote_of(line), f"{x['density']:.3f}",
            f"{x['seconds'] * x['forward_speedup']:.4g}", f"{x['seconds']:.4g}",
        ))  # fmt: skip
    counts = sorted({line.figures["rounds"] for line in found})
    return "\n\n".join(
        [
            "**Video transformers**, one denoising forward, every layer sparse.",
            table(FORWARD, rows),
            f"{_where(machine, found)} Rounds: {', '.join(map(str, counts))}. Float32.",
        ]
    )


def _quote_of(line: Line) -> str:
    """What the authors of a setting report of it, at their model and size."""
    for scene in denoisers.SCENES:
        for setup in scene.setups:
            if (setup.name, setup.preset) == (line.method, line.preset) and setup.quoted and not scene.train:
                return f"{_quote(vars(setup.quoted))}: {scene.model.name}, {scene.what}"
    return NOT_QUOTED


def _forward(machine: Machine) -> str:
    found = machine.part("forward")
    if not found:
        return ""
    rows = []
    for row in found:
        x = row.figures
        guess, sizes = x["predicted"], (x["layers"], x["of_layers"])
        layers = " of ".join(" + ".join(map(str, of.values())) for of in sizes)
        backward = "" if x["direction"] == "forward" else ", forward + backward"
        rows.append((
            x["model"], x["what"], _method(x["method"], x["preset"]) + backward, layers if sizes[0] != sizes[1] else f"all, {layers.partition(' of ')[0]}",
            _times(x["value"], x.get("bar")), _times(x["attention_ratio"]), _estimated(x.get("estimated")),
            _times(guess["speedup"]), _times(guess["attention"]), _quote(x["quoted"]), "" if x["density"] is None else f"{x['density']:.3f}",
            f"{x['dense_seconds']:.4g}", f"{x['seconds']:.4g}",
        ))  # fmt: skip
    reasons = sorted({x.figures["predicted"]["reason"] for x in found if "reason" in x.figures["predicted"]})
    notes = [f"Without a prediction: {'; '.join(reasons)}."] if reasons else []
    return "\n\n".join(
        [
            "**Video and image transformers**, one denoising forward with random weights, every layer sparse.",
            table(FORWARD, rows),
            " ".join([_where(machine, found), *notes]),
        ]
    )


def _estimated(x: dict[str, float] | None) -> str:
    """What all layers would gain, and with those dense that the published schedule keeps dense."""
    if x is None:
        return ""
    dense = "" if x["value"] == x["with_dense_layers"] else f" ({_times(x['with_dense_layers'])} with its dense layers)"
    return _times(x["value"]) + dense


def _prefill(machine: Machine) -> str:
    found = machine.prefill
    if not found:
        return ""
    rows = []
    for row in found:
        gain = f"{row.gain:.2f}" + ("" if row.reaches_bar else f" ! below {BAR:.2f}")
        share = f"{100 * row.selection:.1f}" + ("" if row.selection_within else f" ! above {100 * SELECTION:.0f}")
        rows.append((
            row.method, f"{100 * row.budget:g} %", str(row.sizes["batch"]), _times(1 / row.time), _times(1 / row.token_layers),
            gain, share, f"{1e3 * row.dense_seconds:.0f}", f"{1e3 * row.seconds:.0f}",
        ))  # fmt: skip
    sizes = found[0].sizes
    head = ("method", "visual tokens, mean over layers", "batch", "measured, prefill", "predicted from the tokens left",
            "time saved over tokens saved", "selection, % of prefill", "dense, ms", "ours, ms")  # fmt: skip
    return "\n\n".join(
        [
            f"**Vision-language models**, prefill of a LLaVA with random weights: {sizes['layers']} layers of width {sizes['width']}, "
            f"{sizes['side'] ** 2} visual tokens.",
            table(head, rows),
            f"{_where(machine, found)} The prediction is that time falls as the tokens of all layers do. Nobody is quoted: no author "
            "reports this model.",
        ]
    )


def _answers(machine: Machine) -> str:
    found = machine.part("prefill")
    if not found:
        return ""
    rows = []
    for row in found:
        x = row.figures
        model, what, batch, method = row.name.split(" | ")
        within = "" if x["selection_within"] else f" ! above {100 * answers.SELECTION:.0f}"
        missed = f" ! below {100 * x['bar']:.1f}" if row.missed else ""
        published = method.startswith("AdaptInfer-64")
        rows.append((
            model, what, batch.removeprefix("batch "), method, f"{100 * x['value']:.1f}{missed}", f"{100 * (1 - token_layers(x)):.1f}",
            f"{100 * answers.CUT:.1f} ({ADAPTINFER}; hardware {UNKNOWN})" if published else "",
            f"{100 * x['selection_of_dense']:.1f}{within}", _times(x["answer_ratio"]), _times(x["decode_ratio"]),
            told.seconds(x["dense_seconds"]), told.seconds(x["seconds"]),
        ))  # fmt: skip
    head = ("model", "prompt", "batch", "method", "measured, % of prefill saved", "predicted from the tokens left, %", "quoted by its authors, %",
            "selection, % of dense prefill", "measured, whole answer", "measured, decoding", "dense prefill", "ours")  # fmt: skip
    decoded = found[-1].figures["decoded"]
    return "\n\n".join(
        [
            f"**Vision-language models**, random weights: prefill and {decoded} decoded tokens.",
            table(head, rows),
            _where(machine, found),
        ]
    )


def _backbones(machine: Machine) -> str:
    found = machine.part("backbones")
    if not found:
        return ""
    rows = []
    for row in found:
        x = row.figures
        ratios = []
        for peer in (*ANCHORS, PLAIN):
            of = [p["ratio"]["p50"] for name, p in x["peers"].items() if name.partition("_")[0] == peer]
            ratios.append(_times(of[0]) if of else "")
        memory = "" if x["memory"] is None else f"{x['memory'] / 2**20:.0f}"
        model = row.name.partition(" | ")[0]
        size = (f"{x['parameters'] / 1e6:.1f}", _by(x["size"]), str(x["batch"]))
        rows.append((model, *size, f"{x['value']:.0f}", *ratios, memory))
    head = ("model", "parameters, M", "pixels", "batch", "measured, pictures/s", "measured over Swin", "over ConvNeXt", "over its plain form",
            "memory, MiB")  # fmt: skip
    return "\n\n".join(["**Vision backbones**, random weights.", table(head, rows), _where(machine, found)])


# ---------------------------------------------------------------- kernels


def kernel_tables(machines: Sequence[Machine]) -> str:
    """Ceilings, kernels against dense attention, GNA, tile sizes and the gate of every GPU."""
    lines = []
    for machine in machines:
        parts = [_gate(machine), _ceilings(machine), _against_dense(machine), _gna(machine), _tiles(machine)]
        if any(parts):
            lines += [f"### {machine.name}", *filter(None, parts)]
    quotes = _quotes(machines, ("kernels",), NOWHERE)
    return "\n\n".join(lines + quotes)


def _gate(machine: Machine) -> str:
    passed = machine.part("gate")
    wrong = [row for row in machine.gpu if row.part == "gate" and row.status == "wrong"]
    if not passed and not wrong:
        return ""
    worst = max((row.figures.get("of_allowed", 0.0) for row in passed), default=0.0)
    red = f" **{len(wrong)} were wrong** ([which](#what-could-not-run))." if wrong else ""
    return f"**Correctness**: {len(passed)} checks passed, the worst with {worst:.2f} of the error that it is allowed.{red}"


def _ceilings(machine: Machine) -> str:
    found = [row for row in machine.part("kernels") if row.name.startswith("ceiling: ")]
    if not found:
        return ""
    rows = [(r.name.removeprefix("ceiling: "), told.number(r.figures["value"]) + r.figures["unit"]) for r in found]
    return "\n\n".join([table(("ceiling of this GPU", "measured"), rows), _where(machine, found)])


def _against_dense(machine: Machine) -> str:
    found = [row for row in machine.part("kernels") if "operator" in row.figures]
    if not found:
        return ""
    rows = []
    for row in found:
        x = row.figures
        slower = " ! slower" if x["not_slower_than_flex"] is False else ""
        shape = " ".join(f"{letter}{size}" for letter, size in x["shape"].items())
        rows.append((
            x["operator"], f"{x['what']}, {x['direction']}, {x['dtype']}, {shape}", _times(x["value"], x.get("bar")),
            "" if x["useful_flops"] is None else f"{x['useful_flops'] / 1e12:.3g}",
            "" if x["block_density"] is None else f"{x['of_dense_rate']:.2f}",
            "" if x["over_flex"] is None else f"{x['over_flex']:.2f}{slower}", told.seconds(x["dense_seconds"]), x["fastest_dense"],
            told.seconds(x["seconds"]),
        ))  # fmt: skip
    head = ("operator", "case", "measured over dense", "useful TFLOP/s", "share of the dense rate", "measured over FlexAttention", "dense", "by",
            "ours")  # fmt: skip
    return "\n\n".join(["**Kernels** against the fastest dense attention of the same run.", table(head, rows), _where(machine, found)])  # fmt: skip


def _gna(machine: Machine) -> str:
    found = [row for row in machine.part("kernels") if row.name == kernels.GNA_NAME]
    if not found:
        return ""
    x = found[0].figures
    row = (_times(x["value"], x.get("bar")), told.seconds(x["dense_seconds"]), told.seconds(x["seconds"]), told.seconds(x["kernel_seconds"]),
           str(x["heads"]), *_gna_quote(x["quoted"]))  # fmt: skip
    head = ("measured over dense", "dense", "ours", "without the permutation", "heads", "quoted", "by", "on")
    return "\n\n".join([f"**{found[0].name}**", table(head, [row]), _where(machine, found)])


def _gna_quote(quoted: dict[str, Any]) -> tuple[str, str, str]:
    dense, ours = quoted["dense_seconds"], quoted["seconds"]
    return f"{_times(dense / ours)} ({1e3 * dense:.4g} to {1e3 * ours:.4g} ms)", quoted["by"], quoted["hardware"]


def _tiles(machine: Machine) -> str:
    found = machine.part("sweep")
    if not found:
        return ""
    rows = []
    for row in found:
        x = row.figures
        best = "none" if x["best"] is None else " x ".join(map(str, x["best"]))
        gain = "" if x["gain"] is None else f"{x['gain']:.2f}"
        rows.append((x["key"], best, gain, "yes" if x["worth"] else "no"))
    head = ("kernel", "best rows x columns x warps x stages", "measured gain over the table", "worth an entry")
    return "\n\n".join(["**Tile sizes**", table(head, rows), _where(machine, found)])


# ---------------------------------------------------------------- quotes


def quotes(part: str) -> list[tuple[str, str, str, str, str]]:
    """What authors quote of what a part measures: cells under QUOTED."""
    if part == "kernels":
        value, by, on = _gna_quote(kernels.GNA_QUOTED)
        return [(f"attention of {kernels.GNA_NAME}", value, by, on, _times(kernels.GNA_BAR))]
    if part == "prefill":
        value = f"{100 * answers.CUT:.1f} % of prefill saved"
        return [("LLaVA-1.5-7B, AdaptInfer-64", value, ADAPTINFER, UNKNOWN, f"{100 * answers.CUT:.1f} %")]
    return [
        (
            f"{scene.model.name}, {scene.what}, {_method(setup.name, setup.preset)}", f"{_times(setup.quoted.value)} for {setup.quoted.of}",
            setup.quoted.by, setup.quoted.hardware, "" if setup.bar is None else _times(setup.bar),
        )
        for scene in denoisers.SCENES for setup in scene.setups if setup.quoted is not None
    ]  # fmt: skip


def _quotes(machines: Sequence[Machine], parts: Sequence[str], nothing: str) -> list[str]:
    """The quotes of parts that nobody has measured on a GPU; those of others stand beside what was measured."""
    open_ = [part for part in parts if not any(machine.part(part) for machine in machines)]
    if not open_:
        return []
    say = nothing
    if any(machine.gpu for machine in machines):
        say = f"Not measured on a GPU yet: {', '.join(open_)} (`{COMMAND} {' '.join(f'--part {p}' for p in open_)}`)."
    say += " Quoted, not measured by us, each on hardware of theirs:"
    return ["### On a GPU", say, table(QUOTED, [row for part in open_ for row in quotes(part)])]


# ---------------------------------------------------------------- predictions


def how_good(machines: Sequence[Machine]) -> str:
    """Predicted over measured of every row, the median and the worst; and the ratio that predictions take for constant."""
    lines: list[str] = []
    for machine in machines:
        found = predictions(machine)
        fits = _fits(machine)
        if not found and not fits:
            continue
        lines.append(f"### {machine.name}")
        if found:
            summary = []
            for kind in dict.fromkeys(p.kind for p in found):
                of = [p for p in found if p.kind == kind]
                far = worst(of)
                summary.append(
                    (kind, str(len(of)), f"{statistics.median(p.ratio for p in of):.2f}", f"{far.ratio:.2f}", far.what)
                )
            rows = [(p.kind, p.what, _times(p.predicted), _times(p.measured), f"{p.ratio:.2f}") for p in found]
            lines += [
                table(("of", "rows", "predicted over measured, median", "worst", "which"), summary),
                table(("of", "what", "predicted", "measured", "predicted over measured"), rows),
            ]  # fmt: skip
        lines += fits
    if not any(machine.part("forward") or machine.part("prefill") for machine in machines):
        lines += ["### On a GPU", "No prediction was compared on a GPU yet."]
    return "\n\n".join(lines)


def _fits(machine: Machine) -> list[str]:
    """The throughput per visited pair that `predicted_speedup()` takes for constant, as densities change."""
    points = []
    for row in machine.cpu:
        random = row.operator == "block_sparse_attention" and row.what.startswith("random")
        if random and row.ratio is not None and row.block_density is not None and row.peer == "sdpa":
            shape = " ".join(f"{letter}{row.shape[letter]}" for letter in ("N", "H", "D"))
            case = f"{row.backend}, {row.what.partition(',')[0]}, {row.direction}, {row.dtype}, {shape}"
            points.append((case, row.block_density, row.ratio["p50"]))
    fits = kernels.visited(points) + kernels.swept(machine.part("kernels"))
    lines = []
    if fits:
        rows = [
            (f.case, f"{f.ratio:.2f}", f"{f.low:.2f} to {f.high:.2f}", f"{100 * f.spread:.0f} %", ", ".join(f"{d:.2g}" for d in f.densities))
            for f in fits
        ]  # fmt: skip
        head = ("kernel", "measured, throughput per visited pair over dense", "over the densities", "spread", "densities")  # fmt: skip
        device = "cuda" if machine.is_gpu else "cpu"
        default = max(r for name, r in _DEFAULTS[device, "forward"].ratios.items() if name != "masked")
        lines += [
            "`BlockLayout.predicted_speedup()` takes one number for all densities: the throughput per visited pair, relative to "
            f"dense attention. Uncalibrated it is {default:.2f} on this kind of device.",
            table(head, rows),
        ]
    found = [row for row in machine.part("kernels") if row.name.startswith(kernels.CALIBRATION)]
    if found:
        measured = [
            (r.name.removeprefix(kernels.CALIBRATION), ", ".join(f"{n} {v:.2f}" for n, v in r.figures["ratios"].items()))
            for r in found
        ]  # fmt: skip
        lines += [table(("direction", "measured by `mmeff calibrate`, relative to dense"), measured)]
    used = sorted({p["ratio"] for r in machine.part("forward") if "ratio" in (p := r.figures["predicted"])})
    lines += [f"The plans above went by {ratio:.2f}." for ratio in used]
    return lines


# ---------------------------------------------------------------- what could not run


def could_not_run(machines: Sequence[Machine]) -> str:
    """Rows that are skipped, failed or wrong, with their reasons."""
    lines = []
    for machine in machines:
        of: list[tuple[str, str, str | None]] = []
        of += [(f"{r.part}: {r.name}", r.status, r.reason) for r in machine.gpu if r.status != "measured"]
        of += [(f"{x.kind}: {x.method}", x.status, x.reason) for x in machine.video if x.status != "measured"]
        of += [(f"{r.case}, {r.backend} against {r.peer}", r.status, r.reason) for r in machine.cpu if r.status != "measured"]  # fmt: skip
        rows = [(what, status, str(reason)) for what, status, reason in of]
        if rows:
            lines += [f"### {machine.name}, not run", table(("what", "status", "reason"), rows)]
    return "\n\n".join(lines) or "Everything that was begun was measured."


# ---------------------------------------------------------------- the figure


def draw(rows: Rows, path: Path) -> None:
    """Draw predicted against measured speedups, a colour per kind; hollow: on a GPU. Raises ValueError if no row holds both."""
    of = [(machine, predictions(machine)) for machine in by_machine(rows)]
    every = [p for _, found in of for p in found]
    if not every:
        raise ValueError("no row holds a prediction; run `python -m benchmarks video --part forward` first")
    ends = [min(min(p.predicted, p.measured) for p in every) / 1.15, max(max(p.predicted, p.measured) for p in every) * 1.15]  # fmt: skip
    kinds = {"forward": "a forward of a video transformer", "attention": "its attention", "prefill": "prefill of a vision-language model"}  # fmt: skip
    with plots._figure(6.6, 5.4) as figure:
        ax = figure.subplots()
        ax.plot(ends, ends, color=INK, linewidth=1.0, linestyle=(0, (5, 3)), zorder=1)
        middle = math.sqrt(ends[0] * ends[1])
        ax.annotate("as predicted", (middle, middle), (12, -8), textcoords="offset points", fontsize=8, color=INK)
        for i, (kind, label) in enumerate(kinds.items()):
            for gpu in (False, True):
                points = [p for machine, found in of for p in found if p.kind == kind and machine.is_gpu == gpu]
                if points:
                    ax.scatter(
                        [p.predicted for p in points], [p.measured for p in points], s=34, marker=MARKERS[i], zorder=3, linewidths=1.2 if gpu else 0.6,
                        facecolors=PAPER if gpu else COLOURS[i], edgecolors=COLOURS[i] if gpu else PAPER, label=f"{label}, GPU" if gpu else label,
                    )  # fmt: skip
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        for axis in (ax.xaxis, ax.yaxis):
            plots._plain_ticks(axis)
        ax.set_xlim(*ends)
        ax.set_ylim(*ends)
        ax.grid(color=RULE, linewidth=0.8)
        ax.set_xlabel("predicted, times as fast as dense")
        ax.set_ylabel("measured")
        ax.legend(loc="upper left", fontsize=8.5)
        names = "; ".join(machine.name for machine, found in of if found)
        plots._heading(figure, "Measured against predicted", f"{names}; above the line more came than was promised")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=plots.DPI)


# ---------------------------------------------------------------- cells


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Bars in cells are escaped; of line breaks and runs of blanks one blank is left."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def _times(value: float | None, bar: float | None = None) -> str:
    """Times as fast as dense; an exclamation mark where that is below a bar."""
    if value is None:
        return ""
    return f"{value:.2f} x" + ("" if bar is None or value >= bar else f" ! below {bar:.2f}")


def _method(name: str, preset: str) -> str:
    return f"`{name}`: {preset}"


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _quote(quoted: dict[str, Any] | None) -> str:
    if quoted is None:
        return NOT_QUOTED
    return f"{_times(quoted['value'])} for {quoted['of']} ({quoted['by']}; hardware {quoted['hardware']})"
