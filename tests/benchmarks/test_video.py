"""The video benchmark at tiny sizes: what a line says, that a run goes on where it stopped, bars, fits, the figure, the CLI."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as cli
from benchmarks import plots, video
from benchmarks.results import Machine
from benchmarks.video import DENSE, Budget, File, Line, Sizes

SIZES = Sizes(layers=2, heads=2, head_dim=16, ffn_dim=32, grid=(3, 8, 10), text=12)
SPARSE = ["radial", "rectified", "vmoba"]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine.here(torch.device("cpu"), commit="c0ffee")


@pytest.fixture
def file(tmp_path, machine) -> File:
    return File(tmp_path / "video.jsonl", machine)


def forward(file: File, methods=SPARSE, *, rounds=2, dense_rounds=1, seconds=None) -> int:
    return video.forward(
        file, SIZES, list(methods), rounds=rounds, dense_rounds=dense_rounds, budget=Budget(seconds), tick=lambda *_: None
    )  # fmt: skip


def scaling(file: File, frames, seconds=None) -> int:
    return video.scaling(
        file, frames, frame=(16, 24), heads=1, head_dim=16, rounds=2, budget=Budget(seconds), tick=lambda *_: None
    )  # fmt: skip


def line(kind: str, method: str, **figures) -> Line:
    sizes = {"frame": [30, 52], "heads": 2, "head_dim": 64}
    return Line(
        kind=kind, method=method, sizes=sizes, figures=figures, hardware="a processor", environment={"torch": "2"}
    )


# --- end to end --------------------------------------------------------------------------------------------------------


def test_a_line_per_forward_in_alternating_order(file):
    assert forward(file) == 0
    lines = [x for x in file.lines if x.kind == "forward"]
    assert [(x.method, x.figures["round"]) for x in lines] == [
        (DENSE, 0), *((m, 0) for m in SPARSE), *((m, 1) for m in reversed(SPARSE))
    ]  # fmt: skip
    for x in lines:
        f = x.figures
        assert len(f["layer_seconds"]) == SIZES.layers  # and not the cross-attentions
        assert 0 < sum(f["layer_seconds"]) == pytest.approx(f["attention_seconds"])
        assert f["attention_seconds"] < f["seconds"]
        assert x.commit == "c0ffee" and x.hardware and x.environment["torch"] and x.date
    by_name = {x.method: x.figures for x in lines}
    assert by_name["rectified"]["spans"].keys() >= {"selection", "permute", "rectification"}
    assert by_name["vmoba"]["backends"] and by_name["radial"]["predicted_attention"] > 0
    assert all(by_name[m]["predicted_forward"] > 0 for m in SPARSE)
    assert video.read(file.path) == file.lines


def test_summaries_are_medians_of_the_lines(file):
    forward(file, ["radial"], rounds=3)
    runs = [
        x.figures["seconds"]
        for x in file.of("forward", video._plain(dataclasses.asdict(SIZES)))
        if x.method == "radial"
    ]
    summary = {x.method: x for x in file.latest("summary")}
    assert summary["radial"].figures["seconds"] == sorted(runs)[1] and summary["radial"].figures["rounds"] == 3
    assert summary["radial"].config["dense_steps"] == 0 and "bar" not in summary[DENSE].figures


def test_what_was_measured_is_not_measured_again(file, machine):
    forward(file, ["radial"], rounds=1)
    before = file.path.read_text()
    again = File(file.path, machine)
    assert forward(again, ["radial"], rounds=1) == 0 and again.path.read_text() == before
    forward(again, ["radial"], rounds=2)
    added = [json.loads(text) for text in again.path.read_text()[len(before) :].splitlines()]
    assert [(x["kind"], x["method"]) for x in added] == [
        ("forward", "radial"),
        ("summary", DENSE),
        ("summary", "radial"),
    ]
    other = dataclasses.replace(machine, hardware="another machine")
    assert File(file.path, other).of("forward", added[0]["sizes"]) == []


def test_no_forward_starts_without_time(file):
    assert forward(file, seconds=1e-9) == 1 + 2 * len(SPARSE)
    assert not file.lines


def test_a_method_that_cannot_serve_the_grid_is_skipped_once(file):
    for _ in range(2):
        forward(file, ["gna"], rounds=1)
    skipped = [x for x in file.lines if x.status == "skipped"]
    assert [x.method for x in skipped] == ["gna"] and "GNA.window" in skipped[0].reason
    assert {x.method for x in file.of("forward", skipped[0].sizes)} == {DENSE}


def test_the_clock_leaves_everything_as_it_was():
    from diffusers.models.transformers import transformer_wan

    from mmeff.diffusion_attn.hosts._denoiser import Session

    stock, sparse = transformer_wan.dispatch_attention_fn, Session.attend
    with pytest.raises(KeyError), video._attention_clock(240):
        assert transformer_wan.dispatch_attention_fn is not stock and Session.attend is not sparse
        raise KeyError
    assert transformer_wan.dispatch_attention_fn is stock and Session.attend is sparse


def test_copies_share_their_weights_and_see_the_same_input():
    bench = video._Transformer(SIZES)
    bench.run("radial", video._setting("radial")[1])
    copy, handle, _ = bench._ready["radial"]
    assert copy is not bench.stock
    pairs = zip(copy.parameters(), bench.stock.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    handle.enabled = False
    with torch.no_grad():
        torch.testing.assert_close(copy(**bench.inputs)[0], bench.stock(**bench.inputs)[0], rtol=0, atol=0)


def test_a_grid_as_long_as_the_text_is_refused(file):
    with pytest.raises(ValueError, match="12 tokens"):
        dataclasses.replace(SIZES, grid=(1, 3, 4)).check()
    with pytest.raises(ValueError, match=">= 1"):
        dataclasses.replace(SIZES, layers=0).check()


@pytest.mark.parametrize(("attention", "reaches"), [(2.4, True), (2.6, False)])
@pytest.mark.parametrize(("selection", "within"), [(0.1, True), (0.3, False)])
def test_bars(attention, reaches, selection, within):
    lines = [
        line("forward", DENSE, seconds=12.0, attention_seconds=10.0, density=1.0, spans={}, process="a"),
        line("forward", "radial", seconds=5.0, attention_seconds=attention, density=0.1875, process="b",
             spans={"selection": selection, "permute": 0.1}),
    ]  # fmt: skip
    figures = video.summaries(lines)[1]["figures"]
    assert figures["bar"] == pytest.approx(4.0) and figures["attention_speedup"] == pytest.approx(10 / attention)
    assert figures["reaches_bar"] is reaches and figures["overhead_within"] is within
    assert figures["overhead"] == pytest.approx((selection + 0.1) / attention)
    assert figures["forward_speedup"] == pytest.approx(2.4) and figures["processes"] == 2
    assert video.summaries(lines[1:]) == []  # nothing to compare with


# --- scaling -----------------------------------------------------------------------------------------------------------


def test_scaling_measures_each_length_once(file):
    assert scaling(file, [8, 6]) == 0
    lines = [x for x in file.lines if x.kind == "scaling"]
    assert [(x.figures["frames"], x.method) for x in lines] == [
        (F, m) for F in (6, 8) for m in (DENSE, "radial", "gna")
    ]  # fmt: skip
    for x in lines:
        assert len(x.figures["seconds"]) == 2 and x.figures["tokens"] == x.figures["frames"] * 16 * 24
    radial = {x.figures["frames"]: x for x in lines if x.method == "radial"}
    method = video.SCALING["radial"][1]()
    assert radial[8].figures["blocks"] == method.layout(grid=(8, 16, 24)).visited_blocks
    assert {x.method for x in file.latest("fit")} == {DENSE, "radial", "gna"}
    before = file.path.read_text()
    assert scaling(file, [6, 8]) == 0 and file.path.read_text() == before
    assert scaling(file, [10, 12], seconds=1e-9) == 2


def series(method: str, power: float, block_power: float = 1.0, layout: float = 0.0, last: float = 1.0) -> list[Line]:
    """Times that follow a power of the tokens; the last one is `last` times longer."""
    return [
        line("scaling", method, frames=F, tokens=100 * F, seconds=[1e-3 * F**power * (last if F == 8 else 1)] * 3,
             blocks=10 * F**block_power, layout_seconds=layout * F**power)
        for F in (2, 4, 8)
    ]  # fmt: skip


def test_fits_recover_exponents():
    lines = series(DENSE, 2.0) + series("radial", 1.5, 1.5, 1e-5) + series("gna", 1.0, 1.0, 1e-4)
    fit = {x["method"]: x["figures"] for x in video.fits(lines)}
    assert [fit[m]["exponent"] for m in (DENSE, "radial", "gna")] == pytest.approx([2.0, 1.5, 1.0])
    assert fit["radial"]["blocks_exponent"] == pytest.approx(1.5)
    assert fit["radial"]["in_proportion"] and fit["radial"]["layout_within"]
    assert fit["gna"]["layout_share"] == pytest.approx(0.1)
    assert video.fits(lines[:1]) == []


@pytest.mark.parametrize(("last", "layout", "even", "cheap"), [(1.19, 1e-5, True, True), (1.21, 3e-5, False, False)])
def test_fits_judge_radial(last, layout, even, cheap):
    figures = video.fits(series("radial", 1.5, 1.5, layout, last))[0]["figures"]
    assert figures["spread_per_block"] == pytest.approx(last - 1)
    assert figures["in_proportion"] is even and figures["layout_within"] is cheap


def test_the_figure(tmp_path):
    lines = series(DENSE, 2.0) + series("radial", 1.5, 1.5) + series("gna", 1.0)
    fits = [line("fit", x["method"], **x["figures"]) for x in video.fits(lines)]
    path = plots.scaling(lines, fits, tmp_path / "new" / "scaling.png")
    with Image.open(path) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 100


# --- the command line and the file -------------------------------------------------------------------------------------


@pytest.fixture
def command(capfd, monkeypatch):
    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return code, out, " ".join(err.split())

    return run


def test_the_command_measures_and_prints(command, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.out_console, "width", 200, raising=False)
    options = (
        "--part",
        "forward",
        "--method",
        "radial",
        "--rounds",
        1,
        "--layers",
        1,
        "--heads",
        1,
        "--grid",
        "3x8x10",
    )
    out = tmp_path / "rows.jsonl"
    code, printed, _ = command("video", *options, "-o", out)
    assert code == 0 and "1 layers, 1 heads x 64, grid 3 x 8 x 10" in printed and "radial" in printed
    size = out.stat().st_size
    code, printed, _ = command("video", *options, "-o", out)
    assert code == 0 and "radial" in printed and out.stat().st_size == size


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--part", "none"), "--part"),
        (("--grid", "16x30"), "3 positive numbers"),
        (("--frames", "8,,16"), "--frames"),
        (("--method", "dense"), "--method must be one of radial"),
        (("--rounds", 0), "--rounds must be > 0"),
        (("--seconds", -1), "--seconds"),
    ],
)
def test_bad_options(command, tmp_path, args, said):
    code, _, err = command("video", *args, "-o", tmp_path / "rows.jsonl")
    assert code == 1 and said in err and not (tmp_path / "rows.jsonl").exists()


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = Path(tmp_path / "rows.jsonl")
    path.write_text('{"case": 1}\n')
    with pytest.raises(ValueError, match="line 1, was not written by"):
        video.read(path)
