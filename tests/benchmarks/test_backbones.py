"""The backbones benchmark: whom a model is timed against, what a row says, that a second run measures nothing, and the bars."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import mmeff.vision_backbones
from benchmarks import __main__ as cli
from benchmarks import backbones, backbones_table, results
from benchmarks.gate import GateFailed
from mmeff.kernels import record

SIZE = (64, 64)


@pytest.fixture(scope="module")
def machine():
    return results.Machine.here(torch.device("cpu"), commit="c0ffee")


@pytest.fixture(scope="module")
def ran(tmp_path_factory, machine):
    path = tmp_path_factory.mktemp("backbones") / "rows.jsonl"
    ticks = []

    def run(**more):
        asked = {"batch": 2, "rounds": 3, "seconds": None, "again": False, "tick": lambda *a: ticks.append(a), **more}
        return backbones.run([("swin_tiny", SIZE), ("biformer_tiny", SIZE)], machine, path, **asked)

    return run(), path, run, ticks


def test_rows_hold_paired_ratios_and_what_ran(ran):
    (rows, left), path, _, _ = ran
    swin, biformer = rows
    assert left == 0 and not swin.peers and swin.ours.parameters == pytest.approx(28.3e6, rel=0.01)
    assert [p.name for p in biformer.peers] == ["swin_tiny", "convnext_tiny", "plain form"]
    assert biformer.ours.parameters == biformer.peers[2].parameters == pytest.approx(13.1e6, rel=0.01)
    for i, peer in enumerate(biformer.peers, 1):
        turns = sorted(turn[i] / turn[0] for turn in biformer.rounds)
        assert len(turns) == 3 and peer.ratio["p20"] <= peer.ratio["p50"] <= peer.ratio["p80"]
        assert peer.ratio["p50"] == pytest.approx(turns[1], rel=1e-3)
        assert peer.seconds["p50"] > 0 and (peer.memory is None or peer.memory >= 0)
    assert sum(biformer.peers[2].backends.values()) == sum(biformer.ours.backends.values()) == 12
    assert biformer.peers[2].backends == {"region_attention: gather-reference": 12}
    assert "region_attention: gather-reference" not in biformer.ours.backends
    assert biformer.environment["timm"] == timm.__version__ and biformer.commit == "c0ffee" and biformer.batch == 2
    assert backbones.read(path) == rows


def test_a_second_run_measures_nothing(ran):
    (rows, _), path, run, ticks = ran
    before = len(ticks)
    assert run() == (rows, 0) and len(ticks) == before
    assert len(path.read_text().splitlines()) == len(rows)
    assert run(batch=1, seconds=0.0)[1] == 2, "no time: nothing is begun"


def test_a_model_that_disagrees_with_its_plain_form_is_not_timed(monkeypatch):
    def build(name, size, *, plain=False):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
        with torch.no_grad():
            model[1].weight.fill_(1.0)
            model[1].bias.fill_(0.5 if plain else 0.0)
        return model

    monkeypatch.setattr(backbones, "build", build)
    monkeypatch.setattr(backbones, "_anchor", build)
    with pytest.raises(GateFailed, match="biformer_tiny at 8 x 8 must give the classes of its plain form"):
        backbones.measure("biformer_tiny", (8, 8), 1, 1)


def test_where_rounding_grows_float64_decides():
    plain, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5)), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        theirs, off = exact * 1.004, {"near": exact * 0.997, "far": exact * 0.991}
        assert backbones.check_plain("m", plain, x, theirs, theirs) == 0.0
        assert backbones.check_plain("m", plain, x, off["near"], theirs) == pytest.approx(0.007, abs=1e-4)
        assert backbones.check_plain("m", plain, x, exact.float(), theirs) > backbones.AGREE
        with pytest.raises(GateFailed, match=r"0\.009 from float64 where the plain form is 0\.004 from it"):
            backbones.check_plain("m", plain, x, off["far"], theirs)
        with pytest.raises(GateFailed):
            backbones.check_plain("m", plain, x, exact * torch.nan, theirs)


def test_peers_of_a_size_are_built_once_and_nat_lends_its_weights():
    assert backbones._anchor("convnext_tiny", SIZE) is backbones._anchor("convnext_tiny", SIZE)
    ours = backbones.build("nat_mini", SIZE)
    assert backbones._plain_form("nat_mini", SIZE, ours).model is ours
    assert backbones._plain_form("biformer_tiny", SIZE, ours) is not ours


def test_what_cannot_run_is_a_row_with_its_reason_and_is_tried_again(monkeypatch, machine, tmp_path):
    tried = []

    def measure(name, *_):
        tried.append(name)
        raise ValueError("images must be larger\nthan this")

    monkeypatch.setattr(backbones, "measure", measure)
    asked = {"batch": 1, "rounds": 1, "seconds": None, "again": False, "tick": lambda *a: None}
    for _ in range(2):
        ((row,), _) = backbones.run([("nat_tiny", SIZE)], machine, tmp_path / "rows.jsonl", **asked)
        assert row.reason == "ValueError: images must be larger" and row.ours is None
        assert backbones_table.cells(row)[-1] == "cannot run: ValueError: images must be larger"
        assert len(backbones_table.cells(row)) == len(backbones_table.COLUMNS)
    assert tried == ["nat_tiny", "nat_tiny"]


def test_a_failure_hides_no_figures(ran):
    (rows, _), *_ = ran
    broken = replace(rows[1], ours=None, peers=(), reason="no memory")
    assert backbones.latest([*rows, broken]) == rows and backbones.latest([broken, *rows])[0] == rows[1]


def test_a_line_that_is_no_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"model": "x"}\n')
    with pytest.raises(ValueError, match="line 1, is no row of backbones"):
        backbones.read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "millions", "peers"),
    [
        ("biformer_tiny", 13.1, ["swin_tiny", "convnext_tiny", "plain form"]),
        ("nat_small", 50.7, ["swin_small", "convnext_small", "plain form"]),
        ("maxvit_small_tf", 69, ["swin_base", "convnext_base", "plain form"]),
        ("focalnet_huge_fl3", 687, ["swin_large", "convnext_large"]),
        ("vitrpb_small", 22, ["swin_tiny", "convnext_tiny"]),
        ("convnext_base", 88.6, ["swin_base"]),
        ("swin_base", 87.8, ["swin_tiny"]),
        ("swin_tiny", 28.3, []),
    ],
)
def test_peers_are_of_the_same_size(name, millions, peers):
    assert backbones.peers_of(name, int(millions * 1e6)) == peers


def test_the_full_suite_names_every_variant():
    names = backbones.names()
    assert len(set(names)) == len(names) and set(backbones.QUICK) < set(names)
    assert set(mmeff.vision_backbones.registered()) < set(names)
    assert {"focalnet_xlarge_fl4", "maxvit_xlarge_tf", "swin_large", "convnext_tiny"} < set(names)
    cases = backbones.chosen("quick", ("nat_tiny",), ((8, 8), (8, 16)))
    assert cases == [(n, s) for s in ((8, 8), (8, 16)) for n in ("nat_tiny", "dinat_tiny")]


@pytest.mark.parametrize("size", [(64, 64), (60, 100)])
def test_the_gathering_form_computes_the_same(size):
    """Dilated windows, and maps that are padded up to one."""
    small = {"embed_dim": 32, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 8), "num_classes": 7}
    torch.manual_seed(0)
    fast = timm.create_model("dinat_mini", **small).eval()
    x = torch.randn(2, 3, *size)
    with torch.inference_mode(), record() as calls:
        wanted = fast(x)
        fast_calls = len(calls)
        found = backbones.Gathering(fast)(x)
    assert fast_calls == 6 and len(calls) == 6, "the plain form must not run our operator"
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_maxvit_is_timed_on_our_operator_and_without():
    x = torch.randn(1, 3, 64, 96)
    ours, plain = (backbones.build("maxvit_tiny_tf", (64, 96), plain=p) for p in (False, True))
    counts = []
    with torch.inference_mode():
        for model in (ours, plain):
            with record() as calls:
                out = model(x)
            counts.append(len(calls))
            assert out.shape == (1, 1000)
    assert counts == [22, 0]


# ---------------------------------------------------------------- tables and the figure


def side(name, ratio=None):
    spread = {"p20": 0.9, "p50": 1.0, "p80": 1.1}
    found = None if ratio is None else {"p20": ratio - 0.1, "p50": ratio, "p80": ratio + 0.1}
    return backbones.Side(name=name, parameters=28_000_000, seconds=spread, memory=2**20, backends={}, ratio=found)


def row(model, *peers, size=(512, 512), **more):
    return backbones.Row(
        model=model, height=size[0], width=size[1], batch=1, ours=side(model), peers=tuple(side(*p) for p in peers),
        threads=1, load=0.5, hardware="a processor", environment={"torch": "2"}, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "peer", "ratio", "size", "missed"),
    [
        ("biformer_tiny", "plain form", 1.79, (512, 512), 1.8),
        ("biformer_tiny", "plain form", 1.8, (512, 512), None),
        ("biformer_tiny", "plain form", 1.0, (224, 224), None),
        ("nat_tiny", "plain form", 2.99, (512, 512), 3.0),
        ("dinat_tiny", "swin_tiny", 0.76, (512, 512), 1 / 1.3),
        ("dinat_tiny", "swin_tiny", 0.77, (512, 512), None),
        ("maxvit_tiny_tf", "plain form", 0.99, (256, 384), 1.0),
        ("maxvit_small_tf", "plain form", 0.5, (512, 512), None),
    ],
)
def test_bars(model, peer, ratio, size, missed):
    made = row(model, (peer, ratio), size=size)
    assert made.missed(made.peers[0]) == missed
    assert ("!" in backbones_table.markdown([made]).split("What these")[0]) == (missed is not None)


def test_a_disturbed_row_says_so():
    calm, busy = row("nat_tiny"), replace(row("nat_tiny"), load=3.0)
    assert not calm.disturbed and busy.disturbed
    assert "~" not in backbones_table.cells(calm)[2] and "~1000 (900 to 1100)" in backbones_table.cells(busy)[2]
    assert "A tilde" in backbones_table.markdown([busy]) and "A tilde" not in backbones_table.markdown([calm])


def test_a_single_round_has_no_range_and_is_drawn(tmp_path):
    once = {"p20": 0.7, "p50": 0.7, "p80": 0.7}
    alone = replace(
        row("nat_tiny"),
        ours=replace(side("nat_tiny"), seconds=once),
        peers=(replace(side("swin_tiny", 1.0), ratio=once),),
    )
    found = backbones_table.cells(alone)
    assert found[2] == "700" and found[5] == "0.70 ! below 0.77"
    backbones_table.draw([alone], tmp_path / "one.png")  # 1 / 0.7 comes out a hair off itself
    assert (tmp_path / "one.png").stat().st_size > 5000


def test_time_relative_to_the_smallest_swin_goes_through_the_swin_of_the_class():
    rows = [
        row("swin_tiny"), row("swin_small", ("swin_tiny", 0.5)), row("nat_tiny", ("swin_tiny", 2.0)),
        row("nat_small", ("swin_small", 4.0)), row("nat_base", ("swin_base", 1.0)),
    ]  # fmt: skip
    found = {r.model: middle for r, middle, _, _ in backbones_table.relative(rows)}
    assert found == {"swin_small": 2.0, "nat_tiny": 0.5, "nat_small": 0.5}
    low, high = next((low, high) for r, _, low, high in backbones_table.relative(rows) if r.model == "nat_tiny")
    assert (low, high) == (pytest.approx(1 / 2.1), pytest.approx(1 / 1.9))


def test_the_figure(tmp_path):
    rows = [
        row("swin_tiny"),
        row("nat_tiny", ("swin_tiny", 1.1), ("plain form", 5.0)),
        row("nat_tiny", size=(224, 224)),
    ]
    backbones_table.draw(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no model was measured at 512 x 512"):
        backbones_table.draw(rows[2:], tmp_path / "b.png")


# ---------------------------------------------------------------- the command line


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_commands_print_tables(monkeypatch, capsys, tmp_path, ran):
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(
        backbones, "measure", lambda *a: {"ours": side("nat_tiny"), "peers": (side("swin_tiny", 1.25),), "rounds": []}
    )
    threads = torch.get_num_threads()
    asked = ("--only", "nat_tiny", "--size", "512,48x64", "--threads", threads, "--out", file)
    assert call(monkeypatch, "backbones", *asked) == 0
    out = capsys.readouterr().out
    assert "512 x 512" in out and "48 x 64" in out and "1.25 (1.15 to 1.35)" in out and "dinat_tiny" in out
    assert call(monkeypatch, "backbones-table", file) == 0
    assert "| nat_tiny | 28.0 |" in capsys.readouterr().out and (tmp_path / "rows.png").exists()
    assert call(monkeypatch, "backbones", "--dry-run", *asked) == 0
    assert capsys.readouterr().out.splitlines()[0] == "nat_tiny | 512 x 512"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--suite", "slow"), "--suite must be quick or full, got 'slow'"),
        (("--only", "resnet"), "--only resnet leaves no model of suite quick"),
        (("--size", "224x"), "--size must be sizes such as 224 or 256x384"),
        (("--size", "1x2x3"), "--size must be sizes such as 224 or 256x384"),
        (("--rounds", "0"), "--rounds must be > 0"),
        (("--threads", "0"), "--threads must be > 0"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, tmp_path, args, message):
    assert call(monkeypatch, "backbones", "--out", tmp_path / "r.jsonl", *args) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "r.jsonl").exists()


def test_a_table_of_nothing(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "backbones-table", tmp_path / "none.jsonl") == 1
    assert "no rows at" in capsys.readouterr().err
