"""The tab Benchmarks: committed rows as figures, each with its machine, losses included, predictions apart."""

from __future__ import annotations

import csv
import io
import json
from types import SimpleNamespace

import pytest

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
