"""The pruning benchmark: variants at equal budgets, runs that share and continue work, and what the tables say of rows."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as cli
from benchmarks import pruning, pruning_table, results, scored
from mmeff import tiny
from mmeff.evaluation.budget import layer_mean
from mmeff.pruning import FastV, RandomPruning
from mmeff.pruning._base import TokenPruner
from mmeff.pruning._cacovid_policy import Policy
from mmeff.registry import all_methods
from mmeff.tiny import motions, scenes, video_vlm_model

RAN = ("dense", "FastV 50%", "VisionZip 25%", "random 6.25%")


def silent(what, done, total):
    pass


@pytest.fixture(scope="module")
def embedded():
    return pruning.load("tiny-vlm")


@pytest.fixture(scope="module")
def which(embedded):
    return pruning.variants("tiny-vlm", embedded[0])


# ---------------------------------------------------------------- variants


def test_every_registered_method_is_there_at_its_budget_or_with_a_reason(embedded, which):
    methods = {type(start) for starts in pruning.bases().values() for start in starts}
    assert methods == {c for c in all_methods().values() if issubclass(c, TokenPruner)}
    assert len({v.name for v in which}) == len(which)
    ready = [v for v in which if v.method is not None]
    assert len({v.setting for v in ready}) == len(ready)
    for v in which[1:]:
        assert (v.method is None) == (v.reason is not None), v.name
        if v.method is not None:
            assert layer_mean(embedded[0], v.method, []) == pytest.approx(v.budget), v.name


def test_what_cannot_be_reached_says_why(which):
    named = {v.name: v for v in which}
    assert "least 0.1667 of all, got a budget of 0.125" in named["FastV 12.5%"].reason
    assert "least 0.3333 of all" in named["random, layer 2 25%"].reason
    assert "pass --policy" in named["CaCoVID 50%"].reason
    assert "episode" in named["VLAPruner 50%"].reason
    assert named["FastV 50%"].method.points(6)[0].layer == 2 and named["FastV 25%"].method.points(6)[0].layer == 1


def test_the_setting_follows_what_decides_the_answers(embedded, which, monkeypatch):
    before = {v.name: v.setting for v in which}
    monkeypatch.setitem(pruning.SEEDS, "tiny-vlm", 1)
    assert all(v.setting != before[v.name] for v in pruning.variants("tiny-vlm", embedded[0]))


def test_splits_are_their_own():
    taken = {scenes.TRAIN_SEED, scenes.GATE_SEED, scenes.HELDOUT_SEED, scenes.PRUNING_SEED}
    taken |= {motions.TRAIN_SEED, motions.GATE_SEED, motions.HELDOUT_SEED, motions.PRUNING_SEED}
    assert not taken & set(pruning.SEEDS.values())


# ---------------------------------------------------------------- runs


def shrink(patch, embedded):
    """Batches of four questions, and a model that is loaded once."""
    for module in (pruning, pruning_table):
        patch.setattr(module, "BATCH", 4)
        patch.setattr(module, "load", lambda name: embedded)


@pytest.fixture(scope="module")
def finished(embedded, tmp_path_factory):
    """Six questions in batches of four, by two shards."""
    given = {
        "questions": 6,
        "only": (*RAN, "FastV 12.5%"),
        "out": tmp_path_factory.mktemp("pruning") / "rows.jsonl",
    }
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, embedded)
        return given, [pruning.run(pruning.Options(**given, shard=(i, 2)), silent) for i in (1, 2)]


@pytest.fixture
def ran(finished, embedded, monkeypatch):
    shrink(monkeypatch, embedded)
    return finished


def test_shards_share_the_work_and_a_second_run_has_none(ran, embedded):
    given, outcomes = ran
    # "FastV 50%" is the name of a Debiased variant's end too
    names = [v.name for v in pruning.chosen(pruning.variants("tiny-vlm", embedded[0]), given["only"]) if not v.reason]
    assert set(RAN) <= set(names) and [o.done for o in outcomes] == [len(names)] * 2
    rows = pruning.read(given["out"], pruning.variants("tiny-vlm", embedded[0]))
    assert {name: [len(rows[name][i].hits) for i in (0, 1)] for name in RAN} == {name: [4, 2] for name in RAN}
    assert rows["FastV 12.5%"][-1].reason.startswith("FastV prunes first before layer 1 of 6")
    again = pruning.run(pruning.Options(**given), silent)
    assert (again.done, again.done_before, again.left) == (0, 2 * len(names), 0)
    assert pruning.read(given["out"], pruning.variants("tiny-vlm", embedded[0])) == rows


def test_rows_hold_what_was_kept_and_how_long_it_took(ran, embedded):
    given, _ = ran
    rows = pruning.read(given["out"], pruning.variants("tiny-vlm", embedded[0]))
    counts = rows["FastV 50%"][0].counts
    assert (counts["last"], counts["mean"]) == (36, 72) and 0.45 < counts["operations"] < 0.55
    assert rows["FastV 50%"][0].dense["last"] == 144 and rows["dense"][0].counts == {}
    assert rows["random 6.25%"][0].counts["last"] == 9
    assert rows["dense"][0].seconds["prefill"] > 0 and rows["dense"][0].seconds["selection"] == 0
    assert rows["FastV 50%"][0].seconds["selection"] > 0


def test_encoding_once_changes_no_answer(ran, embedded):
    model, processor = embedded
    batch = pruning.prepare("tiny-vlm", model, processor, 0, 4)
    method = RandomPruning(keep=0.25)
    with pruning.mmeff.accelerate(model, method):
        cached = pruning.answers(model, processor, batch, method)
        out = model.generate(**batch.inputs, pixel_values=batch.pixels, max_new_tokens=3, do_sample=False)
    new = out[:, batch.inputs["input_ids"].shape[1] :]
    assert cached == [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]


def test_a_method_that_fell_back_is_refused(embedded, which, monkeypatch):
    model, processor = embedded
    batch = pruning.prepare("tiny-vlm", model, processor, 0, 2)
    monkeypatch.setattr(pruning, "answers", lambda model, processor, batch, method: fall_back(model, batch))
    variant = next(v for v in which if v.name == "FastV 50%")
    with pytest.raises(RuntimeError, match=r"(?s)FastV 50% did not run as it should: .*every prompt token"):
        pruning.judge("tiny-vlm", model, processor, variant, 0, batch)


def fall_back(model, batch):
    with torch.inference_mode():
        model(**batch.inputs, pixel_values=batch.pixels, logits_to_keep=1)
        model(**batch.inputs, pixel_values=batch.pixels)  # all logits are wanted, so nothing is pruned
    return ["red", "red"]


def test_clips_are_asked_about_too(tmp_path, monkeypatch):
    torch.manual_seed(0)
    made = video_vlm_model.model().eval(), video_vlm_model.processor()
    monkeypatch.setattr(pruning, "load", lambda name: made)
    monkeypatch.setattr(pruning, "_weights", lambda name: "random")
    monkeypatch.setattr(pruning, "BATCH", 2)
    options = pruning.Options(
        model="tiny-video-vlm", questions=2, only=("random 25%", "dense"), out=tmp_path / "rows.jsonl"
    )
    assert pruning.run(options, silent).done == 2
    rows = pruning.read(options.out, pruning.variants("tiny-video-vlm", made[0]))
    assert rows["random 25%"][0].counts["last"] == 72 and len(rows["random 25%"][0].kinds) == 2


# ---------------------------------------------------------------- tables


def rows_of(which, name, hits, kinds=None):
    variant = next(v for v in which if v.name == name)
    seconds, counts, dense = dict.fromkeys(pruning.PHASES, 0.001), {}, {}
    if variant.method is not None:
        counts, dense = dict.fromkeys(pruning.COUNTS, 36.0), dict.fromkeys(pruning.OF_DENSE, 144.0)
    text = "".join(map(str, hits))
    return pruning.Row(
        model="tiny-vlm", variant=name, setting=variant.setting, batch=0, kinds=kinds or "0" * len(text), hits=text,
        counts=counts, dense=dense, seconds=seconds,
    )  # fmt: skip


def test_differences_are_paired(which, embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning_table, "load", lambda name: embedded)
    path = tmp_path / "p.jsonl"
    dense, fastv, other = [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1]
    scored.append(path, [rows_of(which, "dense", dense, "0011"), rows_of(which, "FastV 50%", fastv)])
    scored.append(path, [rows_of(which, "DivPrune 50%", other, "0011")])
    machine = results.Machine.here(torch.device("cpu"), commit="c0ffee")
    found = {s.variant: s for s in pruning_table.summarise(path, "tiny-vlm", machine)}
    assert found["dense"].accuracy == pytest.approx([0.75, 0.25]) and found["dense"].counts["mean"] == 144
    difference = np.array(other) - np.array(dense)
    assert found["DivPrune 50%"].against_dense == pytest.approx([difference.mean(), difference.std(ddof=1) / 2])
    assert found["DivPrune 50%"].against_fastv[0] == pytest.approx(0)
    assert found["FastV 50%"].against_fastv is None and found["dense"].against_dense is None
    assert found["DivPrune 50%"].kinds == {"colour_of": [0.5, 0.5], "shape_of": [0.5, 0.5]}
    assert [found[n].group for n in ("FastV 50%", "DivPrune 50%")] == [pruning_table.GROUPS[0], pruning_table.GROUPS[2]]
    text = pruning_table.markdown(list(found.values()))
    assert "| dense | 4 | 144.0 | 144.0 | 1.000 | 144 | 75.0 ± 25.0 |" in text
    assert "What these tables cannot tell" in text


def test_rows_that_cannot_be_read_or_summarised(which, embedded, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning_table, "load", lambda name: embedded)
    machine = results.Machine.here(torch.device("cpu"), commit="c0ffee")
    path = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match=r"holds no answers; run .*--model tiny-vlm"):
        pruning_table.summarise(path, "tiny-vlm", machine)
    path.write_text('{"variant": "dense"}\n')
    with pytest.raises(ValueError, match="line 1, is no row of pruning"):
        pruning.read(path, which)


# ---------------------------------------------------------------- the command line


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_line_draws_and_prints(ran, tmp_path, monkeypatch, capsys):
    given, _ = ran
    assert call(monkeypatch, "pruning-table", given["out"], "--out", tmp_path / "s.jsonl", "--figures", tmp_path) == 0
    out = capsys.readouterr().out
    assert "| random 6.25% | 6 | 9.0 | 9.0 |" in out and "| FastV | 12.5% | FastV prunes first" in out
    assert Image.open(tmp_path / "rows.png").width > 1000
    stored = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert stored[0]["variant"] == "dense" and stored[0]["questions"] == 6
    assert call(monkeypatch, "pruning", "--dry-run", "--only", "DivPrune") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == [f"DivPrune {b}%" for b in ("50", "25", "12.5", "6.25")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--model", "llava"), "--model must be tiny-vlm or tiny-video-vlm, got 'llava'"),
        (("--questions", "0"), "--questions must be >= 1"),
        (("--shard", "3/2"), "got 1500 and 3/2"),
        (("--only", "nothing"), "leaves no variant; known: dense, FastV, "),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, tmp_path, args, message):
    assert call(monkeypatch, "pruning", "--out", tmp_path / "p.jsonl", *args) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "p.jsonl").exists()


def test_a_model_without_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(pruning.tiny, "data_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="mmeff train tiny-video-vlm"):
        pruning.load("tiny-video-vlm")


def test_the_table_starts_from_settings_that_prune_where_they_may():
    assert [b.layer for b in pruning.bases()["FastV"]] == [2, 1]
    assert pruning.bases("folder")["CaCoVID"][0].policy == "folder"
    assert isinstance(pruning.bases()["Debiased FastV"][0].inner, FastV)


def test_a_policy_counts_by_its_weights_and_has_an_untrained_twin(tmp_path):
    folder = tiny.data_folder() / "cacovid-policy"
    model, _ = pruning.load("tiny-video-vlm")
    found = {v.name: v for v in pruning.variants("tiny-video-vlm", model, str(folder))}
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = {v.name: v for v in pruning.variants("tiny-video-vlm", model, str(tmp_path / "elsewhere"))}
    assert {n: v.setting for n, v in moved.items()} == {n: v.setting for n, v in found.items()}
    mine, twin = found["CaCoVID 25%"], found["CaCoVID, untrained 25%"]
    assert mine.setting != twin.setting and mine.method.keep == twin.method.keep == 0.25
    trained, fresh = Policy.load(folder), Policy.load(twin.method.policy)
    assert trained.config.hidden_size == fresh.config.hidden_size
    own = model.model.language_model.layers[0].state_dict()["self_attn.q_proj.weight"]
    assert torch.equal(fresh.layer.state_dict()["self_attn.q_proj.weight"], own)
    assert not torch.equal(trained.layer.state_dict()["self_attn.q_proj.weight"], own)
