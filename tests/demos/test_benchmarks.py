"""The tab Benchmarks: committed rows as figures, each with its machine, losses included, predictions apart."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import denoisers, engine, prefill, rows, setting
from demos import charts
from demos.app import Page
from demos.results import UNRECORDED, Figure, Results, as_csv, rows_folder, table
from demos.settings import Settings
from demos.tab_benchmarks import Panel, _skipped


@pytest.fixture(scope="module")
def results():
    return Results()


@pytest.fixture
def panel(results, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return Panel(SimpleNamespace(results=lambda: results), Page(Settings()))


def figure(**fields):
    given = {"topic": "cpu", "metric": "speedup over sdpa", "case": "a case", "method": "native", "value": 2.0}
    return Figure(**{**given, **fields})


# ---------------------------------------------------------------- reading


def test_every_committed_file_gives_figures_with_their_machine(results):
    assert results.problems == [] and results.note == ""
    files = {path.stem for path in rows_folder().glob("*.jsonl") if not path.stem.endswith("-summary")}
    assert {f.topic for f in results.figures} == files
    assert all(f.hardware for f in results.figures)
    timed = [f for f in results.figures if "second" in f.metric or "speedup" in f.metric or "MiB" in f.metric]
    assert timed and all(f.hardware != UNRECORDED for f in timed), "a time without its machine means nothing"


def test_accuracy_is_that_of_the_rows(results):
    rows = [json.loads(line) for line in (rows_folder() / "pruning-tiny-vlm.jsonl").read_text().splitlines()]
    hits = "".join(row["hits"] for row in rows if row["variant"] == "FastV 25%")
    (found,) = [
        f for f in results.select(topic="pruning-tiny-vlm", metric="exact match, %", cases=["all kinds of question"], methods=["FastV"])
        if f.x < 40
    ]  # fmt: skip
    assert found.value == pytest.approx(100 * hits.count("1") / len(hits))
    assert found.count == f"{len(hits)} questions"
    assert found.low < found.value < found.high


def test_losses_stay(results):
    lost = [f for f in results.select(topic="cpu", metric="speedup over sdpa") if f.loss]
    assert lost and all(f.value < 1 for f in lost)
    assert not figure(value=1.2, neutral=1.0, better="high").loss
    assert figure(value=0.9, neutral=1.0, better="high").loss
    assert not figure(value=0.9).loss


def test_predictions_are_never_among_measurements(results):
    both = results.select(topic="video", metric="speedup of attention")
    measured, predicted = (
        results.select(topic="video", metric="speedup of attention", kind=k) for k in ("measured", "predicted")
    )
    assert measured and predicted and len(measured) + len(predicted) == len(both)
    assert not {id(f) for f in measured} & {id(f) for f in predicted}


def test_what_could_not_run_is_said(results):
    reasons = {s.what: s.reason for s in results.skipped_of("pruning-tiny-vlm")}
    assert "prunes first before layer 1" in reasons["FastV 12.5%"]
    assert "not measured, and why" in _skipped(results, "pruning-tiny-vlm")
    assert _skipped(results, "no such topic") == ""


def test_a_folder_without_rows_says_so(tmp_path):
    empty = Results(tmp_path)
    assert empty.topics == [] and empty.figures == []
    assert "No benchmark rows were found" in empty.note and "python -m benchmarks" in empty.note
    assert "No benchmark rows" in Results(tmp_path / "nowhere").note


def test_broken_lines_and_foreign_files_are_named(tmp_path):
    good = next(line for line in (rows_folder() / "roofline.jsonl").read_text().splitlines())
    (tmp_path / "roofline.jsonl").write_text(f"{good}\n{{broken\n[1]\n")
    (tmp_path / "other.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "cpu.jsonl").write_text('{"case": "c", "operator": "o", "peer": "p"}\n')
    found = Results(tmp_path)
    assert {f.topic for f in found.figures} == {"roofline"}
    assert "roofline.jsonl, line 2" in found.note and "line 3" in found.note
    assert "other.jsonl is of no kind" in found.note and "cpu.jsonl is of no kind" in found.note
    assert str(tmp_path) not in found.note, "the page must not tell where the server keeps its files"


def test_rows_of_another_setting_are_not_mixed_in(tmp_path):
    row = {
        "model": "tiny-vlm",
        "variant": "FastV 25%",
        "batch": 0,
        "kinds": "00",
        "counts": {},
        "dense": {},
        "reason": None,
    }
    counts = {"mean": 36.0, "last": 14.0, "operations": 0.3, "cache_kib": 200.0}
    lines = [
        {**row, "setting": "old", "hits": "00", "counts": counts},
        {**row, "setting": "new", "hits": "11", "counts": counts},
    ]
    (tmp_path / "pruning-tiny-vlm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = Results(tmp_path).select(metric="exact match, %", cases=["all kinds of question"])
    assert found.value == 100.0 and found.count == "2 questions"


# ---------------------------------------------------------------- rows of a GPU


@pytest.fixture(scope="module")
def gpu_rows():
    """What the real code writes of every part but the backbones, which take too long, at tiny sizes; as if an H200 had."""
    here = setting.here(smoke=True, commit="c0ffee")
    file = rows.File(Path("kept in memory"), here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "SHAPES", prefill.SHAPES[:1])
        every = denoisers.scenes(smoke=True)
        patch.setattr(denoisers, "scenes", lambda *, smoke: [s for s in every if s.model.family is denoisers.WAN])
        parts = [
            import_module(f"benchmarks.gpu.{name}").PART for name in ("gate", "sweep", "kernels", "forward", "prefill")
        ]
        assert engine.run(parts, file, seconds=6000, again=False, tick=lambda *_: None).failed == 0
    return [{**asdict(row), "hardware": "NVIDIA H200"} for row in file.rows]


def gpu_row(part, name, status="measured", figures=None, reason=None, hardware="NVIDIA H200"):
    return {"part": part, "name": name, "status": status, "reason": reason, "figures": figures or {}, "took": 1.0, "gpu": {},
            "hardware": hardware, "environment": {"torch": "2.11.0"}, "commit": "c0ffee", "date": "2026-12-01T10:00:00+00:00"}  # fmt: skip


def of(tmp_path, lines):
    (tmp_path / "h200.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = Results(tmp_path)
    assert found.problems == []
    return found


def test_rows_of_a_gpu_are_figures_with_their_machine(tmp_path, gpu_rows):
    ratio = {"p20": 1.1, "p50": 1.25, "p80": 1.3}
    biformer = {
        "value": 3120.0,
        "memory": 2**30,
        "peers": {"swin_tiny": {"ratio": ratio}, "plain form": {"ratio": ratio}},
    }
    found = of(tmp_path, [*gpu_rows, gpu_row("backbones", "biformer_tiny | 224 x 224 | batch 128", figures=biformer)])
    assert {f.hardware for f in found.figures} == {"NVIDIA H200"} and {f.device for f in found.figures} == {"cuda"}
    assert all("torch" in f.versions and f.commit == "c0ffee" and f.date for f in found.figures)
    assert found.topics == [("Everything on an NVIDIA H200", "h200")]
    metrics = set(found.choices("metric", kind="measured"))
    assert metrics >= {
        "error, share of what is allowed", "runs with the same bits", "gain over the table of tiles", "ceiling, Tbytes/s",
        "speedup over the fastest dense attention", "milliseconds per call", "useful TFLOP/s", "speedup of the forward pass",
        "speedup of forward and backward", "speedup of attention", "density of attention", "prefill saved, % of dense",
        "selection, % of dense prefill", "speedup of a whole answer", "pictures per second", "speedup over its plain form",
        "speedup over the swin of its size",
    }  # fmt: skip
    (row,) = [r for r in gpu_rows if r["part"] == "forward" and r["figures"]["direction"] == "forward"]
    (measured,) = found.select(metric="speedup of the forward pass", kind="measured")
    (predicted,) = found.select(metric="speedup of the forward pass", kind="predicted")
    assert (measured.value, measured.low) == (row["figures"]["ratio"]["p50"], row["figures"]["ratio"]["p20"])
    assert measured.loss and measured.method == predicted.method == "radial" and "layers 1 of 40" in measured.case
    assert predicted.value == row["figures"]["predicted"]["speedup"] and predicted.kind == "predicted"
    (estimated,) = found.select(metric="speedup of the forward pass, estimated for all layers")
    assert estimated.kind == "predicted", "an estimate is no measurement"
    assert not found.select(metric="speedup of forward and backward", kind="predicted"), "no plan predicts training"
    (gna,) = found.select(metric="speedup over the fastest dense attention", methods=["GNA"])
    assert gna.value == next(r for r in gpu_rows if r["name"].startswith("GNA"))["figures"]["value"]


def test_blocks_on_a_gpu_are_a_curve_and_calibrations_are_kept(tmp_path, gpu_rows):
    row = next(r for r in gpu_rows if r["figures"].get("what", "").startswith("random"))
    sparser = {
        **row,
        "name": "another",
        "figures": {**row["figures"], "what": "random 16-blocks, sparsity 0.75", "block_density": 0.25},
    }
    rates = gpu_row("kernels", "calibration, forward", figures={"ratios": {"triton": 0.7, "masked": 0.3}})
    found = of(tmp_path, [row, sparser, rates])
    curve = found.select(metric="speedup over the fastest dense attention")
    assert [f.x for f in curve] == [50.0, 75.0] and len({f.case for f in curve}) == 1
    assert all(f.axis == "blocks left out, %" and f.low <= f.value <= f.high for f in curve)
    ratios = found.select(metric="throughput per visited pair over dense")
    assert {f.method: f.value for f in ratios} == {"triton": 0.7, "masked": 0.3}


def test_what_a_gpu_could_not_run_is_said(tmp_path, gpu_rows):
    made = [
        *gpu_rows, gpu_row("prefill", "LLaVA | x | batch 32 | FastV", "skipped", reason="out of memory"),
        gpu_row("forward", "a | b", "failed", reason="TypeError in call"),
        gpu_row("gate", "a kernel | case", figures={"of_allowed": 0.5}),
        gpu_row("gate", "a kernel | case", "wrong", reason="red gate: off by 3"),
        gpu_row("sweep", "a key | N64", figures={"gain": None, "best": None, "key": "a key"}),
    ]  # fmt: skip
    found = of(tmp_path, made)
    reasons = {s.what: s.reason for s in found.skipped_of("h200")}
    assert reasons == {
        "gate: tests of the kernels": "the tests that are marked gpu need a CUDA device; `make test` runs the others",
        "prefill: LLaVA | x | batch 32 | FastV": "out of memory", "forward: a | b": "failed: TypeError in call",
        "gate: a kernel | case": "wrong: red gate: off by 3", "sweep: a key | N64": "no candidate runs and is right",
    }  # fmt: skip
    assert not found.select(metric="error, share of what is allowed", methods=["a kernel"]), (
        "what is wrong now, was not right"
    )


def test_of_a_task_on_a_gpu_the_last_measurement_counts_and_machines_stay_apart(tmp_path):
    def ceiling(value, **more):
        return gpu_row("kernels", "ceiling: copy", figures={"value": value, "unit": "bytes/s"}, **more)

    later = gpu_row("kernels", "ceiling: copy", "skipped", reason="busy")
    found = of(tmp_path, [ceiling(1e12), ceiling(4e12), later, ceiling(2e12, hardware="NVIDIA H100")])
    assert {f.hardware: f.value for f in found.figures} == {"NVIDIA H200": 4.0, "NVIDIA H100": 2.0}
    assert found.skipped == []


def test_csv_holds_every_field(results):
    chosen = results.select(topic="roofline")
    read = list(csv.DictReader(io.StringIO(as_csv(chosen))))
    assert [float(row["value"]) for row in read] == [f.value for f in chosen]
    assert {row["hardware"] for row in read} == {f.hardware for f in chosen}
    assert len(table(chosen)) == len(chosen)


# ---------------------------------------------------------------- drawing


def test_a_chart_names_the_machine_and_escapes_its_texts():
    chart = charts.of_figures(
        [figure(hardware="<b>EPYC</b>", method="<i>m</i>", low=1.5, high=2.5, spread="x")], heading="<h>"
    )
    assert "&lt;b&gt;EPYC" in chart and "<b>EPYC" not in chart and "<i>m" not in chart and "<h>" not in chart
    assert chart.count("<svg") == 2, "one for wide pages and one for narrow ones"
    assert "#1c2128" not in chart and "var(--mm-ink)" in chart, "its ink is the theme's"


def test_one_case_over_an_axis_is_drawn_as_curves_and_several_as_bars(results):
    shown = results.select(topic="cpu", metric="speedup over sdpa")
    first = [f for f in shown if f.case == shown[0].case]
    assert "blocks left out" in charts.of_figures(first, heading="h").split("<svg")[1]
    bars = charts.of_figures(shown, heading="h")
    assert "orange: a loss" in bars and f"of {len(shown)} are drawn" in bars
    assert "No rows fit" in charts.of_figures([], heading="h")


# ---------------------------------------------------------------- the tab


def test_opening_lists_the_benchmarks(panel, results):
    note, topics = panel.open()
    assert note == "" and topics["value"] == results.topics[0][1]


def test_choices_follow_the_benchmark(panel):
    kind, metric, hardware, cases, methods = panel.narrow("video", "predicted", "seconds of attention", None)
    assert kind["value"] == "predicted" and metric["value"] == "speedup of attention", "seconds are not predicted"
    assert "EPYC" in hardware["value"] and methods["choices"] == ["radial", "gna", "rectified"]
    assert panel.narrow(None, None, None, None)[0]["choices"] == []


def test_showing_draws_what_is_chosen(panel, results):
    machine = results.choices("hardware", topic="prefill")[0]
    plot, rows, file, skipped = panel.show(
        "prefill", "measured", "speedup of prefill over dense", machine, [], ["FastV"]
    )
    assert machine in plot and {row[0] for row in rows} == {"FastV"}
    with open(file) as text:
        assert len(list(csv.DictReader(text))) == len(rows)
    assert panel.show(None, "", "", "", [], [])[1] == []
