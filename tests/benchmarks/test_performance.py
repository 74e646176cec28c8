"""docs/performance.md from rows: measured, predicted and quoted apart, machines apart, losses and misses in, never an empty table."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import performance, performance_rows, results
from benchmarks.gpu import denoisers, engine, kernels, prefill, rows, setting
from benchmarks.performance import Rows
from mmeff.kernels import calibration

ROOT = Path(__file__).parents[2]
H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def script():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("make_performance", ROOT / "docs" / "make_performance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def committed(script):
    """The rows of processors that are committed, without those of a GPU."""
    return replace(script.read(results.FOLDER), gpu=())


@pytest.fixture(scope="module")
def smoke():
    """Rows that the real code writes, of every part but the backbones, which take too long; as if an H200 had made them."""
    here = setting.here(smoke=True, commit="c0ffee")
    file = rows.File(Path("kept in memory"), here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "SHAPES", prefill.SHAPES[:1])
        every = denoisers.scenes(smoke=True)
        patch.setattr(denoisers, "scenes", lambda *, smoke: [s for s in every if s.model.family is denoisers.WAN])
        parts = [
            import_module(f"benchmarks.gpu.{name}").PART for name in ("gate", "sweep", "kernels", "forward", "prefill")
        ]
        outcome = engine.run(parts, file, seconds=6000, again=False, tick=lambda *_: None)
    assert outcome.failed == 0 and outcome.left == 0
    return [replace(row, hardware=H200) for row in file.rows]


@pytest.fixture
def file(tmp_path):
    """A file that is written, as on a GPU, whose device here is the CPU."""
    return rows.File(tmp_path / "h200.jsonl", replace(setting.here(smoke=True), smoke=False))


def row(part="kernels", name="a case", status="measured", hardware=H200, **more):
    figures = more.pop("figures", {})
    made = {
        "took": 1.0,
        "gpu": {"max_sm_mhz": "1980", "power_limit_w": "700.00"},
        "environment": {"torch": "2.11.0"},
        "commit": "c0ffee",
        "date": "2026-12-01T10:00:00+00:00",
        **more,
    }
    return rows.Row(part=part, name=name, status=status, hardware=hardware, figures=figures, **made)


def case(sparsity, value, *, bar=None, flex=None, block=128, **more):
    seconds = {"p20": 0.9e-3, "p50": 1e-3, "p80": 1.1e-3}
    figures = {
        "value": value, "unit": "times as fast as cudnn", **({} if bar is None else {"bar": bar}), "density": 1 - sparsity,
        "block_density": 1 - sparsity, "block": block, "seconds": seconds, "dense_seconds": {k: value * x for k, x in seconds.items()},
        "fastest_dense": "cudnn", "useful_flops": 5.25e14, "of_dense_rate": value * (1 - sparsity), "over_flex": flex,
        "not_slower_than_flex": None if flex is None else flex >= 1, "operator": "block_sparse_attention",
        "what": f"random {block}-blocks, sparsity {sparsity}", "direction": "forward", "dtype": "bfloat16",
        "shape": {"B": 1, "N": 115200, "H": 4, "Hk": 4, "D": 128},
    }  # fmt: skip
    return row(name=f"sparsity {sparsity}", figures=figures, **more)


def backbone():
    ratio = {"p20": 1.1, "p50": 1.25, "p80": 1.3}
    peers = {name: {"ratio": ratio, "seconds": ratio} for name in ("swin_tiny", "convnext_tiny", "plain form")}
    figures = {"value": 3120.0, "unit": "pictures per second", "batch": 128, "size": [224, 224], "parameters": 13_140_000,
               "memory": 2**30, "peers": peers}  # fmt: skip
    return row("backbones", "biformer_tiny | 224 x 224 | batch 128", figures=figures)


def tables(text):
    """Every Markdown table as a list of dicts."""
    found = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("| "):
            head, rule, *body = ([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
            assert body, f"an empty table: {head}"
            assert all(len(line) == len(head) == len(rule) for line in body), head
            found.append([dict(zip(head, line, strict=True)) for line in body])
    return found


def one(text, column):
    """The rows of the only table with a column."""
    (found,) = [t for t in tables(text) if column in t[0]]
    return found


# ---------------------------------------------------------------- the page


def test_the_page_is_current(script, capsys):
    assert script.main(["--check"]) == 0, capsys.readouterr().err
    text = (ROOT / "docs" / "performance.md").read_text()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / picture).is_file()
    for page in re.findall(r"\]\((?!http|images)([^)#]+)", text):
        assert (ROOT / "docs" / page).exists(), page


def test_stale_tables_are_named_and_then_written(script, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    names = ("end-to-end", "kernels", "predictions", "not-run")
    page.write_text("above\n" + "".join(f"<!-- {n}:begin -->\nold\n<!-- {n}:end -->\n" for n in names))
    assert script.main(["--check"], root=tmp_path) == 1
    assert "out of date: end-to-end, kernels, predictions, not-run; run `make docs`" in capsys.readouterr().err
    assert "old" in page.read_text(), "--check changed a file"
    assert script.main([], root=tmp_path) == 0
    assert "old" not in page.read_text() and page.read_text().startswith("above\n")
    assert script.main(["--check"], root=tmp_path) == 0
    assert (tmp_path / "docs" / "images" / "performance.png").stat().st_size > 10_000


def test_without_rows_of_a_gpu_its_sections_hold_quotes_and_no_other_number(committed):
    for name, text in performance.page(committed).items():
        if name == "not-run":
            continue
        section = text.split("### On a GPU")[1]
        assert not re.search(r"\d", re.sub(r"(?m)^\|.*$", "", section)), "a number outside the table of quotes"
        found = tables(section)
        if name == "predictions":
            assert "No prediction was compared on a GPU yet" in section and not found
        else:
            assert "Nothing was measured on a GPU yet; `python -m benchmarks gpu` does it" in section
            assert "Quoted, not measured by us" in section
            assert [list(t[0]) for t in found] == [list(performance.QUOTED)]
            assert all(line["by"] and line["on"] for line in found[0])
    page = performance.page(committed)
    assert "H100" in page["kernels"] and page["kernels"].count("### ") == 1, "kernels of processors have their own page"


def test_every_quote_in_the_code_is_on_the_page(committed):
    lines = one(performance.page(committed)["end-to-end"], "the least that we expect")
    quoted = [(scene, setup) for scene in denoisers.SCENES for setup in scene.setups if setup.quoted]
    assert len(lines) == len(quoted) + 1  # AdaptInfer's
    for (scene, setup), line in zip(quoted, lines, strict=False):
        assert line["what"].startswith(f"{scene.model.name}, {scene.what}") and setup.preset in line["what"]
        assert line["quoted"] == f"{setup.quoted.value:.2f} x for {setup.quoted.of}"
        assert line["by"] == setup.quoted.by and line["on"] == setup.quoted.hardware
    assert "61.3 % of prefill saved" in lines[-1]["quoted"]


def test_processors_are_shown_with_what_was_predicted(committed):
    page = performance.page(committed)
    (machine,) = [m for m in performance_rows.by_machine(committed) if m.video]
    assert f"### {machine.name}" in page["end-to-end"]
    lines = one(page["end-to-end"], "measured, forward")
    for line, summary in zip(lines, machine.summaries(), strict=True):
        x = summary.figures
        assert line["measured, forward"] == f"{x['forward_speedup']:.2f} x"
        assert line["predicted, attention"] == f"{x['predicted_attention']:.2f} x"
        assert line["density"] == f"{x['density']:.3f}"
    radial = next(line for line in lines if line["method and setting"].startswith("`radial`"))
    assert (
        "1.80 x for a whole generation" in radial["quoted by its authors"]
        and "Wan2.1-14B" in radial["quoted by its authors"]
    )
    slow = one(page["end-to-end"], "selection, % of prefill")
    assert len(slow) == len(machine.prefill)
    assert any("! above 5" in line["selection, % of prefill"] for line in slow), "what costs too much is marked"
    assert "[a page of their own](backbones.md)" in page["end-to-end"]


# ---------------------------------------------------------------- rows of a GPU


def test_rows_of_the_real_code_fill_every_section(smoke, committed):
    page = performance.page(replace(committed, gpu=[*smoke, backbone()]))
    end, section_of_kernels = page["end-to-end"], page["kernels"]
    assert end.count("### ") == 2 and "### On a GPU" not in end and "Nothing was measured" not in end
    section = end.split(f"### {H200}")[1]
    lines = one(section, "measured, forward")
    rows_of = [r for r in smoke if r.part == "forward"]
    assert len(lines) == len(rows_of) == 2
    for line, made in zip(lines, rows_of, strict=True):
        assert line["measured, forward"] == f"{made.figures['value']:.2f} x", "a loss is a number like any other"
        assert line["quoted by its authors"].startswith(f"{made.figures['quoted']['value']:.2f} x for ")
        predicted = made.figures["predicted"]["speedup"]
        assert line["predicted, forward"] == ("" if predicted is None else f"{predicted:.2f} x")
        assert line["layers"] in ("1 of 40", "1 of 30")
    assert "Without a prediction: plans predict denoising" in section
    assert {line["model"] for line in one(section, "measured, whole answer")} == {"LLaVA-1.5-7B"}
    (line,) = one(section, "measured, pictures/s")
    assert (
        line["measured, pictures/s"] == "3120"
        and line["measured over Swin"] == "1.25 x"
        and line["memory, MiB"] == "1024"
    )
    assert re.search(r"\*\*Correctness\*\*: 7 checks passed, the worst with 0\.\d\d of the error", section_of_kernels)
    assert {line["ceiling of this GPU"] for line in one(section_of_kernels, "ceiling of this GPU")} == {
        "copy within the device", "bfloat16 matrix product"}  # fmt: skip
    (gna,) = one(section_of_kernels, "without the permutation")
    assert gna["quoted"] == "9.74 x (283.3 to 29.1 ms)" and gna["on"] == "NVIDIA H100, 24 heads"
    assert len(one(section_of_kernels, "measured gain over the table")) == 2
    skipped = one(page["not-run"].split(H200)[1], "reason")
    assert [line["what"] for line in skipped] == ["gate: tests of the kernels"]


def test_a_missed_bar_is_marked_and_a_kernel_slower_than_flex_too():
    made = [case(0.75, 2.9, bar=3.0, flex=0.96), case(0.5, 1.6, bar=1.5, flex=1.2)]
    page = performance.page(Rows(gpu=made))["kernels"]
    missed, reached = one(page, "useful TFLOP/s")
    assert (
        missed["measured over dense"] == "2.90 x ! below 3.00"
        and missed["measured over FlexAttention"] == "0.96 ! slower"
    )
    assert reached["measured over dense"] == "1.60 x" and reached["measured over FlexAttention"] == "1.20"
    assert missed["useful TFLOP/s"] == "525" and missed["share of the dense rate"] == "0.72"  # 2.9 / 4, rounded to even
    assert "NVIDIA H200, at most 1980 MHz, 700.00 W; torch 2.11.0; 2026-12-01." in page
    assert (missed["dense"], missed["by"], missed["ours"]) == ("2.9 ms", "cudnn", "1 ms")


def test_what_failed_or_is_wrong_stands_in_a_list_with_its_reason():
    made = [
        row("gate", "a kernel", figures={"of_allowed": 0.5}),
        row("gate", "a kernel", "wrong", reason="red gate: out | off by 3"),
        row("forward", "a | b | c", "failed", reason="TypeError in call"),
        row("prefill", "too large", "skipped", reason="out of memory"),
        case(0.5, 1.6),
    ]
    page = performance.page(Rows(gpu=made))
    found = {line["what"]: (line["status"], line["reason"]) for line in one(page["not-run"], "reason")}
    assert found == {
        "gate: a kernel": ("wrong", "red gate: out \\| off by 3"),
        "forward: a \\| b \\| c": ("failed", "TypeError in call"),
        "prefill: too large": ("skipped", "out of memory"),
    }
    assert "0 checks passed" in page["kernels"] and "**1 were wrong**" in page["kernels"], "green before counts no more"
    assert "No model was measured on this GPU yet" in page["end-to-end"]
    assert (
        "Not measured on a GPU yet: forward, prefill (`python -m benchmarks gpu --part forward --part prefill`)"
        in page["end-to-end"]
    )
    assert performance.page(Rows())["not-run"] == "Everything that was begun was measured."


def test_machines_have_sections_of_their_own(smoke):
    other = [replace(r, hardware=H100) for r in smoke]
    made = [*smoke, *other, case(0.5, 1.6), case(0.5, 1.1, hardware=H100)]
    page = performance.page(Rows(gpu=made))
    for name in ("end-to-end", "kernels", "predictions"):
        assert page[name].index(f"### {H200}") < page[name].index(f"### {H100}")
    ours, theirs = page["kernels"].split(f"### {H100}")
    assert "1.60 x" in ours and "1.60 x" not in theirs and "1.10 x" in theirs and "1.10 x" not in ours
    assert f"{H100}; torch" in theirs, "the machine stands beside its table"


def test_of_a_task_the_last_row_counts_that_says_something():
    (only,) = performance_rows.latest([case(0.5, 1.0), case(0.5, 2.0), replace(case(0.5, 0.0), status="skipped")])
    assert only.figures["value"] == 2.0
    (only,) = performance_rows.latest([replace(case(0.5, 0.0), status="wrong"), case(0.5, 2.0)])
    assert only.status == "measured"
    assert len(performance_rows.latest([case(0.5, 1.0), case(0.5, 1.0, hardware=H100)])) == 2


def test_a_prefill_that_misses_what_was_published(smoke):
    made = next(r for r in smoke if r.part == "prefill")
    x = {**made.figures, "value": 0.55, "bar": 0.613, "selection_of_dense": 0.021, "selection_within": True, "prompt": 640,
         "tokens": {"mean over layers": 64.0, "visual tokens per prompt": 576.0}}  # fmt: skip
    made = replace(made, name="LLaVA-1.5-7B | a picture, 576 tokens | batch 8 | AdaptInfer-64", figures=x)
    page = performance.page(Rows(gpu=[made]))
    (line,) = one(page["end-to-end"], "measured, % of prefill saved")
    assert line["measured, % of prefill saved"] == "55.0 ! below 61.3" and line["batch"] == "8"
    assert line["predicted from the tokens left, %"] == "80.0"  # 128 of 640 tokens are left
    assert line["quoted by its authors, %"] == "61.3 (arXiv:2508.06084; hardware not known to us)"
    (line,) = one(page["predictions"], "predicted")
    assert (line["predicted"], line["measured"], line["predicted over measured"]) == ("5.00 x", "2.22 x", "2.25")


# ---------------------------------------------------------------- predictions


def forward(smoke, predicted, measured):
    made = next(r for r in smoke if r.part == "forward" and r.figures["direction"] == "forward")
    guess = {"speedup": predicted, "attention": 4.0, "ratio": 0.5}
    x = {**made.figures, "value": measured, "attention_ratio": 4.0, "predicted": guess}
    return replace(made, name=f"model | {predicted}", figures=x)


def test_the_median_and_the_worst_prediction(smoke):
    made = [forward(smoke, 2.0, 1.9), forward(smoke, 2.1, 1.0), forward(smoke, 1.5, 4.0)]
    text = performance.page(Rows(gpu=made))["predictions"]
    of_forward, of_attention = one(text, "worst")
    assert of_forward["predicted over measured, median"] == "1.05" and of_attention["worst"] == "1.00"
    assert (of_forward["worst"], of_forward["which"]) == ("0.38", "model, 1.5"), "too little is as wrong as too much"
    assert len(one(text, "measured")) == 6
    assert "The plans above went by 0.50." in text


def test_the_throughput_per_visited_pair_and_its_spread(committed):
    made = [case(0.5, 1.6), case(0.75, 3.2), case(0.9, 5.0)]
    calibration = row(name="calibration, forward", figures={"value": 0.7, "ratios": {"triton": 0.7, "masked": 0.3}})
    text = performance.page(replace(committed, gpu=[*made, calibration]))["predictions"]
    cpu, gpu = text.split(f"### {H200}")
    column = "measured, throughput per visited pair over dense"
    (line,) = one(gpu, column)
    assert line["kernel"] == "random 128-blocks, forward, bfloat16, N115200 H4 D128"
    assert (line[column], line["over the densities"], line["spread"]) == ("0.68", "0.50 to 0.80", "60 %")
    assert "Uncalibrated it is 0.50" in gpu and "Uncalibrated it is 1.30" in cpu
    (line,) = one(gpu, "measured by `mmeff calibrate`, relative to dense")
    assert line == {
        "direction": "forward",
        "measured by `mmeff calibrate`, relative to dense": "triton 0.70, masked 0.30",
    }
    native = [
        line for line in one(cpu, column) if line["kernel"].startswith("native, random 64-blocks, forward, float32")
    ]
    assert len(native) == 1 and 0.9 < float(native[0][column]) < 1.4


def sparse(file, sparsity, value, block=128):
    file.add("kernels", f"{sparsity}, {block}", "measured", took=1, value=value, block_density=1 - sparsity, direction="forward",
             operator="block_sparse_attention", what=f"random {block}-blocks, sparsity {sparsity}", dtype="bfloat16",
             shape={"B": 1, "N": 115200, "H": 4, "Hk": 4, "D": 128})  # fmt: skip


def test_the_sweep_of_densities_is_fitted_by_a_constant(file):
    for sparsity, value in ((0.5, 1.6), (0.75, 3.2), (0.9, 5.0)):  # 0.8, 0.8 and 0.5 of dense per visited pair
        sparse(file, sparsity, value)
    sparse(file, 0.75, 2.0, block=64)  # one density alone fits everything
    file.add("kernels", "token scores", "measured", took=1, value=9.0, operator="token_scores", what="last 5 rows")
    file.add("kernels", "ceiling: copy", "measured", took=1, value=4e12, unit="bytes/s")
    (found,) = kernels.swept(file.latest())
    assert found.case == "random 128-blocks, forward, bfloat16, N115200 H4 D128"
    assert found.densities == pytest.approx((0.1, 0.25, 0.5))
    assert found.ratio == pytest.approx((0.8 * 0.8 * 0.5) ** (1 / 3)) and (found.low, found.high) == pytest.approx(
        (0.5, 0.8)
    )
    assert found.spread == pytest.approx(0.6)


def test_a_calibration_is_printed_to_be_checked_in(file):
    assert kernels.entries(file) == ""
    for sparsity, value in ((0.5, 1.6), (0.75, 3.2)):
        sparse(file, sparsity, value)
    assert kernels.entries(file) == "", "the sweep alone is no entry"
    ratios = {"triton": 0.7123, "gather": 0.15, "masked": 0.31}
    file.add(
        "kernels", "calibration, forward", "measured", took=1, value=0.71, dense_multiply_adds=3.14e14, ratios=ratios
    )
    file.add("kernels", "calibration, backward", "skipped", took=1, reason="too busy")
    text = kernels.entries(file)
    table: dict = {"Rates": calibration.Rates}
    exec(f"found = {{\n{text}\n}}", table)
    expected = calibration.Rates(3.1e14, {"triton": 0.71, "gather": 0.15, "masked": 0.31})
    assert table["found"] == {("cpu", "forward"): expected}  # the device of this file
    assert file.latest()[0].hardware in text and "0.80 (0.80 to 0.80 over 2 densities)" in text


def test_the_figure(tmp_path, smoke, committed):
    performance.draw(replace(committed, gpu=smoke), tmp_path / "a" / "x.png")
    assert (tmp_path / "a" / "x.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no row holds a prediction"):
        performance.draw(Rows(), tmp_path / "y.png")


def test_cells_cannot_break_a_table():
    assert performance.table(["a"], [["x | y\nz"]]).splitlines()[-1] == "| x \\| y z |"


def test_rows_on_disk_are_those_of_memory(script, tmp_path, smoke):
    (tmp_path / "h200.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in smoke))
    assert script.read(tmp_path).gpu == smoke
