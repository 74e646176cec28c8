"""The quality benchmark: its variants, its random control, runs that share and continue work, and what the table says of rows."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import __main__ as cli
from benchmarks import plots, quality, quality_table, results, scored
from mmeff import registry
from mmeff.diffusion_attn.rectified import RectifiedSpaAttn
from mmeff.tiny.video_model import GRID

RAN = ("dense", "dense, other noise", "topk-25", "rectified-25", "random-25")


def silent(what, done, total):
    pass


# ---------------------------------------------------------------- variants


def test_variants_have_names_and_settings_of_their_own_and_fit_the_grid():
    which = quality.variants()
    assert len({v.name for v in which}) == len(which)
    assert len({v.setting for v in which}) == len(which)
    for v in which:
        if v.method is not None:
            v.method.check_grid(GRID)
            schedule = [v.method.is_dense(step=s, num_steps=quality.STEPS, layer=0, num_layers=4) for s in (4, 5, 19)]
            assert schedule == [True, False, False], v.name


def test_a_rectified_variant_differs_from_its_twin_in_rectification_alone():
    which = {v.name: v for v in quality.variants()}
    rectified = [v for v in which.values() if isinstance(v.method, RectifiedSpaAttn) and v.method.rectify]
    assert len(rectified) == 7
    for v in rectified:
        assert v.twin is not None and which[v.twin].family == v.family
        assert which[v.twin].method == (v.method.base or v.method.replace(rectify=False))


def test_the_setting_follows_what_decides_the_clips(monkeypatch):
    v = next(v for v in quality.variants() if v.name == "topk-25")
    before = v.setting
    assert quality.Variant(name="x", family="y", method=v.method).setting == before
    assert quality.Variant(name="x", family="y", method=v.method.replace(drop=0.7)).setting != before
    monkeypatch.setattr(quality, "STEPS", 10)
    assert v.setting != before


# ---------------------------------------------------------------- the control


def tokens(grid, B=2, H=3, D=8):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(B, math.prod(grid), H, D, generator=draw) for _ in range(3)]


@pytest.mark.parametrize("grid", [(3, 4, 4), (3, 5, 7)])
def test_random_blocks_are_fresh_keep_the_diagonal_and_have_their_share(grid):
    method = quality.RandomAttention(share=0.5, seed=3)
    q, k, v = tokens(grid)
    first, second = (method.kernel_layout(grid=grid, q=q) for _ in range(2))
    masks = [x.layout.block_mask() for x in (first, second)]
    assert masks[0].diagonal(dim1=-2, dim2=-1).all()
    assert (masks[0].sum(-1) == int(0.5 * masks[0].shape[-1])).all()
    assert not torch.equal(*masks) and not torch.equal(masks[0][0, 0], masks[0][0, 1])
    again = method.replace(seed=3).kernel_layout(grid=grid, q=q)
    assert torch.equal(again.layout.block_mask(), masks[0])

    out = method.attend(q, k, v, grid=grid, layout=first)
    slots = first.inverse
    mask = first.layout.to_dense_mask()[:, :, slots][..., slots]
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_all_random_blocks_are_dense_attention():
    q, k, v = tokens((3, 4, 4))
    out = quality.RandomAttention(share=1.0).attend(q, k, v, grid=(3, 4, 4))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_the_control_is_no_method_of_the_library_and_says_what_it_cannot_do():
    assert quality.RandomAttention not in registry.all_methods().values()
    method = quality.RandomAttention()
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        quality.RandomAttention(share=0.0)
    with pytest.raises(ValueError, match="video alone, got text_len=4"):
        method.check_grid((3, 4, 4), 4)
    with pytest.raises(ValueError, match="pass q="):
        method.kernel_layout(grid=(3, 4, 4))
    with pytest.raises(TypeError, match="no layout in the order of the video"):
        method.layout(grid=(3, 4, 4))


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Two prompts, a batch each, by two shards; two steps, the second one sparse. Yields the options and outcomes."""
    folder = tmp_path_factory.mktemp("quality")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "BATCH", 1)
        patch.setattr(quality, "STEPS", 2)
        patch.setattr(quality, "DENSE_STEPS", 1)
        pipeline = quality.video_pipeline()
        patch.setattr(quality, "video_pipeline", lambda: pipeline)
        given = {"prompts": 2, "only": ("dense", *RAN[2:]), "out": folder / "rows.jsonl", "cache": folder / "cache"}
        outcomes = [quality.run(quality.Options(**given, shard=(i, 2)), silent) for i in (1, 2)]
        yield given, outcomes


def test_shards_share_the_work_and_a_second_run_has_none(ran):
    given, outcomes = ran
    assert [o.done for o in outcomes] == [len(RAN)] * 2 and all(set(o.seconds) == set(RAN) for o in outcomes)
    rows = quality.read(given["out"], quality.variants())
    assert {name: sorted(rows[name]) for name in RAN} == {name: [0, 1] for name in RAN}
    again = quality.run(quality.Options(**given), silent)
    assert (again.done, again.done_before, again.left) == (0, 2 * len(RAN), 0)
    assert len(list(given["cache"].iterdir())) == 2


def test_rows_say_what_happened(ran):
    given, _ = ran
    rows = quality.read(given["out"], quality.variants())
    assert rows["dense"][0].density is None and rows["dense"][0].psnr is None
    assert rows["dense, other noise"][0].psnr < rows["topk-25"][0].psnr  # one sparse step against other clips
    assert rows["topk-25"][0].density == pytest.approx(0.25, abs=0.02)
    assert rows["random-25"][1].density == pytest.approx(0.25, abs=0.02)
    assert rows["rectified-25"][0].psnr != rows["topk-25"][0].psnr


def test_a_batch_does_not_depend_on_what_ran_before_it(ran, tmp_path):
    given, _ = ran
    alone = {**given, "out": tmp_path / "rows.jsonl", "only": ("random-25",)}
    quality.run(quality.Options(**alone, shard=(2, 2)), silent)
    which = quality.variants()
    rows, others = (quality.read(path, which)["random-25"][1] for path in (alone["out"], given["out"]))
    assert rows == others


def test_no_time_leaves_everything(ran, tmp_path):
    given, _ = ran
    outcome = quality.run(quality.Options(**{**given, "out": tmp_path / "rows.jsonl"}, seconds=0.0), silent)
    assert (outcome.done, outcome.left) == (0, 2 * len(RAN)) and not (tmp_path / "rows.jsonl").exists()


def test_a_method_that_fell_back_is_refused(monkeypatch):
    handle = SimpleNamespace(report=lambda: SimpleNamespace(fallbacks={"no kernel": 3}, density=0.5))
    monkeypatch.setattr(quality.mmeff, "accelerate", lambda *args: nullcontext(handle))
    monkeypatch.setattr(quality, "generate", lambda *args: None)
    monkeypatch.setattr(quality, "opening", lambda *args: nullcontext())
    variant = next(v for v in quality.variants() if v.name == "gna-25")
    with pytest.raises(RuntimeError, match=r"gna-25 did not run as it should: .*no kernel"):
        quality.judge(None, variant, 0, 1, quality.DenseRun(np.zeros((1, 17, 24, 24, 3)), []))


# ---------------------------------------------------------------- figures of clips and of rows


def test_closeness_of_a_shifted_clip():
    clip = np.random.default_rng(0).uniform(0.29, 0.31, (2, 24, 24, 3))
    clip[:, 4:10, 4:10] = 0.9
    found = quality.closeness(clip, clip + 0.05)
    assert found["drift"] == pytest.approx(0.05, rel=1e-4) and found["psnr"] == pytest.approx(
        -20 * math.log10(0.05), rel=1e-4
    )
    assert found["corrected"] > 100 and found["ssim"] < 1
    assert quality.closeness(clip, clip)["psnr"] is None


def rows_of(name, drifts, *, setting=None, **fields):
    variant = next(v for v in quality.variants() if v.name == name)
    plain = {
        "density": 0.25,
        "found": 1,
        "colour": 1,
        "shape": 1,
        "direction": 1,
        "psnr": 20.0,
        "corrected": 22.0,
        "ssim": 0.8,
    }
    return [
        quality.Score(variant=name, setting=setting or variant.setting, prompt=i, drift=d, **{**plain, **fields})
        for i, d in enumerate(drifts)
    ]  # fmt: skip


@pytest.fixture
def machine():
    return results.Machine.here(torch.device("cpu"), commit="c0ffee")


def test_summary_means_errors_and_the_paired_ratio(tmp_path, machine):
    path = tmp_path / "q.jsonl"
    twin, mine = np.array([0.08, 0.04, 0.06, 0.10]), np.array([0.03, 0.02, 0.03, 0.06])
    scored.append(path, rows_of("topk-25", [9.0] * 4, setting="another"))  # another setting: never mixed in
    scored.append(path, rows_of("topk-25", [9.0]))  # an older row of prompt 0
    scored.append(path, [*rows_of("topk-25", twin, shape=0), *rows_of("rectified-25", mine, psnr=None)])
    top, rectified = quality_table.summarise(path, machine)
    assert (top.variant, rectified.twin, top.prompts) == ("topk-25", "topk-25", 4)
    assert top.figures["drift"] == pytest.approx([twin.mean(), twin.std(ddof=1) / 2])
    assert top.figures["all"] == [0.0, 0.0] and rectified.figures["all"] == [1.0, 0.0]
    assert rectified.figures["psnr"] is None  # identical clips only
    ratio, error = rectified.against_twin["drift_ratio"]
    assert ratio == pytest.approx(0.5)
    leave_one_out = [np.delete(mine, i).mean() / np.delete(twin, i).mean() for i in range(4)]
    jackknife = math.sqrt(3 / 4 * sum((r - np.mean(leave_one_out)) ** 2 for r in leave_one_out))
    assert error == pytest.approx(jackknife, rel=0.2)
    assert rectified.against_twin["shape"] == [1.0, 0.0] and "psnr" not in rectified.against_twin

    table = quality_table.markdown([top, rectified])
    assert "| topk-25 | 4 | 0.250 | 1.000 ± 0.000 |" in table and "| rectified-25 | topk-25 | 0.500 ±" in table
    assert "What this table cannot tell" in table
    quality_table.write_summary([top, rectified], tmp_path / "s.jsonl")
    stored = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert stored[1]["against_twin"]["drift_ratio"][0] == pytest.approx(0.5) and stored[0]["commit"] == "c0ffee"


def test_rows_that_cannot_be_read_or_summarised(tmp_path, machine):
    path = tmp_path / "q.jsonl"
    with pytest.raises(ValueError, match="holds no variant with two prompts"):
        quality_table.summarise(path, machine)
    scored.append(path, rows_of("topk-25", [0.1]))
    path.write_text(path.read_text() + '{"variant": "topk-25"}\n')
    with pytest.raises(ValueError, match="line 2, is no row of quality"):
        quality_table.summarise(path, machine)


def test_the_figure_needs_a_density(tmp_path, machine):
    scored.append(
        tmp_path / "q.jsonl", rows_of("dense", [None] * 2, density=None, psnr=None, corrected=None, ssim=None)
    )
    with pytest.raises(ValueError, match="no sparse variant was measured"):
        plots.quality(quality_table.summarise(tmp_path / "q.jsonl", machine), tmp_path / "q.png")


# ---------------------------------------------------------------- the command line


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_line_draws_and_prints(tmp_path, monkeypatch, capsys):
    path = tmp_path / "q.jsonl"
    none = {"density": None, "psnr": None, "corrected": None, "ssim": None}
    scored.append(path, rows_of("dense", [None] * 3, **none))
    for name, density in (("topk-50", 0.5), ("topk-25", 0.25), ("rectified-25", 0.25), ("random-25", 0.24)):
        scored.append(path, rows_of(name, [0.1, 0.2, 0.3], density=density))
    assert call(monkeypatch, "quality-table", path) == 0
    assert "| random-25 | 3 | 0.240 |" in capsys.readouterr().out
    assert Image.open(tmp_path / "q.png").width > 1000 and (tmp_path / "q-summary.jsonl").exists()
    assert call(monkeypatch, "quality", "--dry-run", "--only", "gna-25") == 0
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()] == ["gna-25", "gna-25-rectified"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--shard", "3/2"), "--shard i/n with 1 <= i <= n, got 256 and 3/2"),
        (("--shard", "half"), "--shard must be i/n, such as 1/2, got 'half'"),
        (("--prompts", "0"), "--prompts must be >= 1"),
        (("--only", "nothing"), "leaves no variant; known: dense, "),
        (("--seconds", "0"), "--seconds must be > 0"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, tmp_path, args, message):
    assert call(monkeypatch, "quality", "--out", tmp_path / "q.jsonl", *args) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_table_of_no_file(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "quality-table", tmp_path / "none.jsonl") == 1
    assert "no rows at" in capsys.readouterr().err
