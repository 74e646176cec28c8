"""`benchmarks gpu` without a GPU: every part at tiny sizes, its time, its file, what ends a run, and wheels."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import zipfile
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks.cases import Unavailable
from benchmarks.commands_gpu import PARTS
from benchmarks.gate import GateFailed
from benchmarks.gpu import denoisers, engine, forward, gate, prefill, report, rows, setting, sweep, workers
from benchmarks.gpu.engine import Clock, Part, Task
from benchmarks.gpu.workers import Answer, Workers
from mmeff.accelerate import find_host
from mmeff.diffusion_attn.gna import GNA
from mmeff.diffusion_attn.vmoba import VMoBA
from mmeff.kernels import tuned
from mmeff.kernels.calibration import sparse_ratio
from mmeff.kernels.tuned import Tiles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def smoke():
    return setting.here(smoke=True, commit="c0ffee")


@pytest.fixture
def real(smoke, tmp_path):
    """A file that is written, as on a GPU, whose device here is the CPU."""
    return rows.File(tmp_path / "h200.jsonl", replace(smoke, smoke=False))


@pytest.fixture
def bench(capsys, monkeypatch):
    """Runs `python -m benchmarks gpu ARGS` in this process: (exit code, stdout, stderr on one line)."""

    def call(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, " ".join(err.split())

    return call


def part(*tasks, name="kernels", **more):
    def every(on, file):
        yield from tasks

    return Part(name=name, weight=1, tasks=every, **more)


def task(name, run=lambda: {"value": 2.0, "unit": "x"}, seconds=0.1):
    return Task(name=name, seconds=seconds, run=run)


def run(parts, file, seconds=60.0, again=False):
    return engine.run(parts, file, seconds=seconds, again=again, tick=lambda *_: None)


def raising(error):
    def call():
        raise error

    return call


# --- every part, at tiny sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(p, marks=pytest.mark.slow) if p == "backbones" else p for p in PARTS])
def test_a_smoke_run_of_a_part_keeps_no_row(bench, tmp_path, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "240")
    out = tmp_path / "h200.jsonl"
    code, text, err = bench("--smoke", "--part", name, "--out", out)
    assert code == 0, err
    assert not out.exists()
    assert "nothing of it is a measurement, and no row is kept" in text and "failed 0" in text and "left 0" in text
    assert any(line.startswith(name) for line in text.splitlines())


def test_the_gate_notices_a_wrong_kernel(bench, tmp_path, monkeypatch):
    from benchmarks import workloads

    true = workloads.TokenScoresWork._ours

    def wrong(work, backend):
        contender = true(work, backend)
        return replace(contender, forward=lambda: contender.forward() * 1.01)

    monkeypatch.setattr(workloads.TokenScoresWork, "_ours", wrong)
    code, text, err = bench("--smoke", "--part", "gate", "--part", "sweep")
    assert code == cli.RED_GATE
    assert "red gate: backend 'chunked' is wrong in token_scores" in err
    assert "sweep" not in text, "nothing is measured behind a red gate"
    assert "checks passed" in text, "the other checks were made all the same"


def test_figures_of_a_forward(smoke):
    scene = next(s for s in denoisers.scenes(smoke=True) if s.model.family is denoisers.HUNYUAN)
    stage = forward.Stage(smoke)
    layers = {"transformer_blocks": 1, "single_transformer_blocks": 2}
    x = forward.measure(scene, scene.setups[0], layers, stage)
    assert 0 < x["attention_seconds"] < x["seconds"] and 0 < x["dense_attention_seconds"] < x["dense_seconds"]
    assert 0 < x["density"] < 1 and x["layers"] == layers and x["of_layers"] == scene.model.layers
    assert x["estimated"]["dense_seconds"] > x["dense_seconds"], "sixty layers take longer than three"
    assert x["estimated"]["value"] == pytest.approx(x["estimated"]["with_dense_layers"]), "no layer of it stays dense"
    assert x["predicted"]["attention"] > x["predicted"]["speedup"] > 1 and x["predicted"]["ratio"] > 0
    assert x["quoted"]["value"] == 1.9 and x["quoted"]["by"] == "arXiv:2506.19852"


@pytest.mark.parametrize("scene", denoisers.SCENES, ids=lambda s: f"{s.model.name} {s.what}")
def test_plans_are_of_the_grid_that_is_measured(scene):
    model = denoisers.construct(scene.model, scene.cut or scene.model.cut, torch.device("meta"))
    host = find_host(model, GNA())
    found = host.dimensions(model, model, **scene.model.family.pixels(model.config, scene.grid))
    assert found.grid == scene.grid and not found.reasons
    assert host.joint == scene.model.family.joint


def small(family, train=False):
    return next(s for s in denoisers.scenes(smoke=True) if s.model.family is family and s.train == train)


def test_what_is_predicted_counts_every_layer_that_was_built():
    scene = small(denoisers.WAN)
    model = denoisers.construct(scene.model, {"blocks": 3}, torch.device("meta"))
    method = VMoBA(chunks=((2,), (2, 2), (1, 3, 4)), top_k=2, threshold=None)  # three ways to cut the video, in turn
    found = forward.predicted(model, scene, method)
    each = [method.expect(grid=scene.grid, layer=layer).speedup for layer in range(3)]
    assert len(set(each)) == 3
    assert found["attention"] == pytest.approx(3 / sum(1 / x for x in each))
    assert found["attention"] < found["speedup"] < 1, "tiny chunks are a loss, and called one"
    assert found["ratio"] == sparse_ratio("cpu")


def test_text_in_self_attention_is_part_of_what_is_predicted():
    scene = small(denoisers.FLUX)
    model = denoisers.construct(scene.model, scene.model.cut, torch.device("meta"))
    method = GNA(window=(1, 4, 4), tile=(1, 2, 4), block=8)
    expected = method.expect(grid=scene.grid, text_len=scene.model.text).speedup
    assert forward.predicted(model, scene, method)["attention"] == pytest.approx(expected)
    assert expected != pytest.approx(method.expect(grid=scene.grid).speedup), "the text changes it"


def test_where_nothing_is_predicted_the_row_says_why():
    scene = small(denoisers.WAN, train=True)
    model = denoisers.construct(scene.model, scene.model.cut, torch.device("meta"))
    found = forward.predicted(model, scene, scene.setups[0].make())
    assert found["speedup"] is None and "a forward and a backward pass" in found["reason"]
    every = replace(small(denoisers.WAN).setups[0].make(), dense_layers=1)
    found = forward.predicted(model, replace(scene, train=False), every)
    assert found["attention"] is None and found["reason"] == "the schedule leaves no layer and step to the method"


def test_an_estimate_adds_the_layers_that_are_not_there(smoke):
    scene = denoisers.SCENES[1]  # Wan: 40 layers, of which the first stays dense
    pairs = [({"seconds": 5.0, "layers": {"blocks": 1.0}}, {"seconds": 3.0, "layers": {"blocks": 0.5}})] * 2
    found = forward.estimate(scene, scene.setups[0], {"blocks": 4}, pairs)
    assert found == {
        "dense_seconds": 41.0, "seconds": 21.0, "value": 41 / 21, "with_dense_layers": 41 / 21.5,
    }  # fmt: skip


def test_scenes_hold_what_was_published():
    for scene in denoisers.SCENES:
        assert set(scene.model.layers) == set(scene.model.cut) == set(scene.model.family.stacks)
        assert all(n <= scene.model.layers[stack] for stack, n in (scene.cut or scene.model.cut).items())
        assert set(scene.full) <= {setup.name for setup in scene.setups}
        for setup in scene.setups:
            method = setup.make()
            method.check_grid(scene.grid)
            assert not method.counts_steps and not method.dense_layer_ids(40), "a single forward, every layer sparse"
    tokens = {scene.what: scene.tokens for scene in denoisers.SCENES}
    assert tokens["768 x 1280, 117 frames"] == 115_200 and tokens["576 x 1024, 93 frames"] == 55_296


BILLIONS = {"Wan2.1-14B": 14.3, "Wan2.1-1.3B": 1.42, "HunyuanVideo": 12.8, "CogVideoX1.5-5B": 5.57, "FLUX.1-dev": 11.9,
            "LLaVA-1.5-7B": 7.06, "LLaVA-OneVision-7B": 8.03, "Qwen2.5-VL-7B": 8.29}  # fmt: skip


@pytest.mark.parametrize("model", {s.model.name: s.model for s in denoisers.SCENES}.values(), ids=lambda m: m.name)
def test_denoisers_have_the_parameters_of_their_checkpoints(model):
    full = denoisers.construct(model, model.layers, torch.device("meta"))
    assert sum(p.numel() for p in full.parameters()) / 1e9 == pytest.approx(BILLIONS[model.name], rel=0.01)


@pytest.mark.parametrize("shape", prefill.SHAPES, ids=lambda s: s.name)
def test_vision_language_models_have_the_parameters_of_their_checkpoints(shape):
    with torch.device("meta"):
        full = shape.make(False)
    assert sum(p.numel() for p in full.parameters()) / 1e9 == pytest.approx(BILLIONS[shape.name], rel=0.01)


# --- the sweep ---------------------------------------------------------------------------------------------------------


def test_candidates_fit_their_blocks_and_names_are_looked_up():
    every = list(sweep.groups(smoke=False))
    assert len({group.key for group in every}) == len(every)
    for group in every:
        tried = sweep.candidates(group)
        assert len(tried) == len(set(tried)) >= 6
        if group.blocks is not None:
            assert all(t.rows <= group.blocks[0] and t.cols <= group.blocks[1] for t in tried)


def test_an_entry_is_in_the_table_only_while_it_is_tried(monkeypatch):
    group, old = next(sweep.groups(smoke=False)), Tiles(64, 64, 4, 2)
    monkeypatch.setattr(tuned, "TUNED", {"sm90": {group.key: old}})
    with sweep.entered(group, "sm90", Tiles(128, 64, 8, 3)):
        assert tuned.TUNED["sm90"][group.key] == Tiles(128, 64, 8, 3)
        with sweep.entered(group, "sm90", None):
            assert group.key not in tuned.TUNED["sm90"]
    assert {"sm90": {group.key: old}} == tuned.TUNED


def test_what_is_worth_it_is_printed_to_be_checked_in(real):
    group = next(sweep.groups(smoke=False))
    found = {"key": group.key, "arch": "sm90", "best": [128, 64, 8, 4], "gain": 1.3, "worth": True}
    assert sweep.entries(real) == ""
    real.add("sweep", "a", "measured", took=1, **found)
    real.add("sweep", "b", "measured", took=1, **{**found, "key": "other", "gain": 1.001, "worth": False})
    table: dict = {"Tiles": Tiles}
    exec(sweep.entries(real), {"dict": dict, "str": str}, table)
    assert table["TUNED"] == {"sm90": {group.key: Tiles(128, 64, 8, 4)}}


def test_a_candidate_that_is_wrong_or_does_not_compile_is_none(smoke, monkeypatch):
    group = next(sweep.groups(smoke=True))
    first, second = sweep.candidates(group)
    true = sweep.judge

    def judge(group, tiles, arch, device):
        if tiles == first:
            raise ValueError("out of resource: shared memory")
        return true(group, tiles, arch, device)

    monkeypatch.setattr(sweep, "judge", judge)
    monkeypatch.setattr(sweep, "_not_everywhere", lambda *a: None)
    x = sweep.sweep(group, smoke, Workers(smoke))
    assert x["candidates"][0] == {
        "tiles": list(first),
        "seconds": None,
        "refused": "ValueError: out of resource: shared memory",
    }
    assert x["best"] == list(second) and x["candidates"][1]["seconds"] > 0
    monkeypatch.setattr(sweep.triton_configs, "_agree", lambda x, y: False)
    assert true(group, second, "sm90", CPU) == "its results differ from those of the table"


# --- time, the file, and what ends a run -------------------------------------------------------------------------------


def test_parts_share_the_time_and_pass_on_what_they_leave():
    now = [100.0]
    clock = Clock(105.0, lambda: now[0])  # 5 of them for the table
    clock.begin_part(1, 4)
    assert clock.allows(25) and not clock.allows(26)
    now[0] += 10
    clock.begin_part(1, 3)
    assert clock.allows(30) and not clock.allows(31)
    now[0] += 60
    clock.begin_part(2, 2)
    assert clock.allows(30) and not clock.allows(31)
    now[0] += 40
    assert not clock.allows(0.1) and clock.allows(0)


def test_nothing_is_begun_that_cannot_end(real):
    long = task("long", seconds=1000)
    outcome = run([part(long, task("short"))], real)
    assert (outcome.done, outcome.left) == (1, 1)
    assert [row.name for row in real.latest()] == ["short"]
    assert run([part(long)], real, seconds=2000).done == 1


def test_the_same_command_continues(real, smoke):
    assert run([part(task("a"))], real).done == 1
    again = rows.File(real.path, real.setting)
    outcome = run([part(task("a"), task("b"))], again)
    assert (outcome.done, outcome.before) == (1, 1)
    assert run([part(task("a"))], again, again=True).done == 1
    assert [json.loads(line)["name"] for line in real.path.read_text().splitlines()] == ["a", "b", "a"]
    (a, _) = rows.File(real.path, real.setting).latest()
    assert (
        a.figures == {"value": 2.0, "unit": "x"}
        and a.commit == "c0ffee"
        and a.environment["torch"] in torch.__version__
    )
    other = replace(real.setting, machine=replace(real.setting.machine, hardware="another GPU"))
    assert rows.File(real.path, other).latest() == [], "rows of another machine are not this one's"


def test_a_gate_holds_for_the_commit_that_it_judged(real):
    run([part(task("a"), name="gate", judges=True)], real)
    assert real.held("gate", "a") is not None

    def at(commit):
        machine = replace(real.setting.machine, commit=commit)
        return rows.File(real.path, replace(real.setting, machine=machine)).held("gate", "a")

    assert at("c0ffee") is not None
    assert at("another") is None and at("c0ffee-dirty") is None and at(None) is None


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Unavailable("no such kernel"), "skipped", "no such kernel"),
        (torch.OutOfMemoryError("2 GiB"), "skipped", "out of memory: 2 GiB"),
        (TypeError("surprise"), "failed", "TypeError in call"),
    ],
)
def test_what_goes_wrong_is_a_row_and_the_run_goes_on(real, error, status, reason):
    outcome = run([part(task("bad", raising(error)), task("good"))], real)
    bad, good = real.latest()
    assert (bad.status, good.status) == (status, "measured") and bad.reason.startswith(reason)
    assert (outcome.done, outcome.failed) == ((2, 0) if status == "skipped" else (1, 1))
    assert real.held("kernels", "bad") is None, "it is tried again"


def test_what_was_found_wrong_later_is_not_hidden_by_an_older_measurement(real):
    for status in ("measured", "wrong", "skipped"):
        real.add("kernels", "a", status, took=1.0, reason=None if status == "measured" else "why")
    assert [row.status for row in real.latest()] == ["wrong"]
    assert real.held("kernels", "a") is None, "it is tried again"
    real.add("kernels", "a", "measured", took=1.0)
    assert [row.status for row in real.latest()] == ["measured"]


def test_a_red_gate_ends_the_run_once_all_is_judged(real):
    red = task("red", raising(GateFailed("red gate: wrong")))
    outcome = run([part(red, task("green"), name="gate", judges=True), part(task("never"))], real)
    assert outcome.red == "red gate: wrong"
    assert [(row.name, row.status) for row in real.latest()] == [("red", "wrong"), ("green", "measured")]
    outcome = run([part(red, task("never"))], real)
    assert outcome.red and "never" not in [row.name for row in real.latest()]


def test_a_lost_device_ends_the_run(real):
    lost = task("lost", raising(RuntimeError("CUDA error: an illegal memory access")))
    outcome = run([part(lost, task("never"), name="gate", judges=True)], real)
    assert "illegal memory access" in outcome.red and [row.status for row in real.latest()] == ["failed"]


def test_a_signal_ends_a_run_in_order(real):
    let_go = []

    def every(on, file):
        try:
            yield task("a")
            yield task("b", lambda: os.kill(os.getpid(), signal.SIGTERM) or {"value": 1.0, "unit": "x"})
        finally:
            let_go.append(True)

    before = signal.getsignal(signal.SIGTERM)
    outcome = run([Part(name="kernels", weight=1, tasks=every), part(task("c"), name="forward")], real)
    assert outcome.stopped == "SIGTERM" and let_go == [True]
    assert [row.name for row in rows.File(real.path, real.setting).latest()] == ["a"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_line_that_is_no_row(tmp_path, smoke):
    (tmp_path / "x.jsonl").write_text('{"case": "of another file"}\n')
    with pytest.raises(ValueError, match=r"x.jsonl, line 1, is no row of `python -m benchmarks gpu`"):
        rows.File(tmp_path / "x.jsonl", replace(smoke, smoke=False))


# --- processes ---------------------------------------------------------------------------------------------------------


def test_answers():
    assert workers.attempt(lambda: 3) == Answer("result", 3)
    assert workers.attempt(raising(Unavailable("x"))).kind == "unavailable"
    with pytest.raises(GateFailed, match="wrong"):
        workers.attempt(raising(GateFailed("wrong"))).result()
    with pytest.raises(RuntimeError, match="KeyError"):
        workers.attempt(raising(KeyError("k"))).result()
    with pytest.raises(GateFailed, match="the kernel crashed"):
        workers.attempt(raising(RuntimeError("CUDA error: misaligned address"))).result()


def test_what_goes_to_other_processes_gets_there(smoke):
    """And comes out as it went in: entries are looked up by it."""
    group = next(sweep.groups(smoke=False))
    calls = [partial(sweep.judge, group, tiles, "sm90", CPU) for tiles in sweep.candidates(group)]
    calls += [partial(gate.check, case, smoke) for case in gate.cases("bfloat16", small=False)]
    calls += [partial(gate.repeat, make, smoke, 2) for make in gate.REPEATED.values()]
    for call in calls:
        there = pickle.loads(pickle.dumps(call))
        assert (there.func, str(there.args)) == (call.func, str(call.args))


def _dies():
    os._exit(3)


def test_a_process_that_dies_does_not_hold_up_the_run(smoke):
    pool = Workers(replace(smoke, workers=1), processes=True)
    found = pool.ask({"good": partial(int, "7"), "bad": partial(int, "x")}, patience=60)
    assert found["good"] == Answer("result", 7) and found["bad"].kind == "error" and "ValueError" in found["bad"].value
    found = pool.ask({"dead": _dies}, patience=3)
    assert found["dead"].value.startswith("no answer within 3 s")
    pool.close()


# --- the setting -------------------------------------------------------------------------------------------------------


def test_clocks_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "1980, 3201, 1980, 3201, 700.00, 121.5, 41, 580.159.04"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = setting.clocks(torch.device("cuda", 0))
    assert found["sm_mhz"] == "1980" and found["power_limit_w"] == "700.00" and found["driver"] == "580.159.04"
    assert list(found) == list(setting.QUERY.values())
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "CalledProcessError" in setting.clocks(torch.device("cuda", 0))["nvidia-smi"]
    assert setting.clocks(CPU) == {}


def test_wheels_are_unpacked_and_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(FileNotFoundError, match=r"holds no \*.whl"):
        setting.bring_wheels(tmp_path, tmp_path / "into")
    with zipfile.ZipFile(tmp_path / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "brought_along/__init__.py", "import pathlib; text = (pathlib.Path(__file__).parent / 'x').read_text()"
        )
        wheel.writestr("brought_along/x", "beside the module")
    with pytest.raises(
        Unavailable, match="needs the package brought_along, which is not installed here; bring it as a wheel"
    ):
        setting.need("brought_along", "a test")
    assert setting.bring_wheels(tmp_path, tmp_path / "into") == ["brought-1.0-py3-none-any.whl"]
    setting.need("brought_along", "a test")
    assert import_module("brought_along").text == "beside the module"


def test_a_package_that_lacks_another_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "half_there.py").write_text("import not_there_at_all\n")
    with pytest.raises(
        Unavailable, match="cannot be imported: No module named 'not_there_at_all'; bring what is missing"
    ):
        setting.need("half_there", "a test")


def test_wrong_calls(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "gpu needs a CUDA device" in bench("--out", tmp_path / "x")[2]
    assert "--part must be among gate, sweep" in bench("--part", "speed")[2]
    assert "--minutes must be > 0" in bench("--minutes", 0)[2]


def test_a_dry_run_lists_every_task(bench):
    code, text, _ = bench("--dry-run")
    names = text.splitlines()
    assert code == 0 and len(names) == len(set(names)) > 200
    assert {line.partition(" |")[0] for line in names} == set(PARTS)
    for what in ("N115200 H4 D128 bfloat16 | random 128-blocks, sparsity 0.75 | forward+backward", "GNA 18x24x24",
                 "AdaptInfer-64", "batch 32", "maxvit_tiny_tf | 512 x 512", "radial: for_model hunyuanvideo-4x"):  # fmt: skip
        assert what in text


# --- the table ---------------------------------------------------------------------------------------------------------


def test_the_table_shows_bars_and_what_ran_short_of_them(real):
    real.add("gate", "a", "measured", took=1, of_allowed=0.4)
    real.add("gate", "b", "measured", took=1, of_allowed=0.7)
    real.add("kernels", "slow", "measured", took=1, value=2.5, unit="times as fast as cudnn", bar=3.0,
             seconds={"p50": 0.002}, dense_seconds={"p50": 0.005})  # fmt: skip
    real.add("kernels", "rate", "measured", took=1, value=7.9e14, unit="FLOP/s", seconds={"p50": 0.001})
    real.add("forward", "no", "skipped", took=1, reason="needs the package diffusers")
    found = report.lines(real.latest())
    assert found[0][0] == ("gate", "2 checks passed", "", "", "0.70 of the error allowed", "")
    assert found[1] == (("kernels", "slow", "2 ms", "5 ms", "2.5 times as fast as cudnn", "3 !"), "yellow")
    assert found[2][0][4] == "790 TFLOP/s"
    assert found[3] == (("forward", "no", "", "", "skipped: needs the package diffusers", ""), "dim")


def test_of_a_task_the_measured_row_counts(real):
    real.add("kernels", "a", "measured", took=1, value=1.0, unit="x")
    real.add("kernels", "a", "skipped", took=1, reason="later")
    assert [row.status for row in real.latest()] == ["measured"]


def test_the_gate_judges_awkward_sizes_in_every_dtype():
    names = [case.name for dtype in gate.DTYPES for case in gate.cases(dtype, small=False)]
    assert len(names) == len(set(names))
    for operator in ("block_sparse_attention", "routed_attention", "neighborhood_attention", "token_scores"):
        for dtype in gate.DTYPES:
            assert any(name.startswith(operator) and dtype in name for name in names)
