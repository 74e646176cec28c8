"""Workers in other processes: killed, crashing, several at a time; the merged table is always the same."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluation_fakes import given

from mmeff.errors import BackendUnavailable
from mmeff.evaluation.evaluate import evaluate, look
from mmeff.evaluation.executors import Crew, choose
from mmeff.evaluation.executors.local import ORPHANED, take_a_device
from mmeff.evaluation.executors.torchrun import place
from mmeff.evaluation.rows import CannotRecord, RowWriter
from mmeff.evaluation.units import OtherRun, Pace

TESTS = str(Path(__file__).parent.parent)
CALL = """
import json, sys
from evaluation_fakes import given
from mmeff.evaluation.evaluate import evaluate
from mmeff.evaluation.units import Pace
values = json.loads(sys.argv[1])
run = evaluate(**given(**values["given"]), out=values["out"], pace=Pace(**values.get("pace", {})), **values["call"])
print(len(run.merged.rows), run.left)
"""
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'mmeff[ray]'")


def start(out, call, pace=None, env=None, **options):
    """`evaluate` in a process group of its own."""
    values = json.dumps({"given": options, "out": str(out), "call": call, "pace": pace or {}})
    paths = os.pathsep.join([TESTS, str(Path(TESTS).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", CALL, values], start_new_session=True, env={**os.environ, "PYTHONPATH": paths, **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def rows_of(folder):
    return sum(path.read_bytes().count(b'"kind": "unit"') for path in (folder / "rows").glob("*.jsonl"))


def until(condition, timeout=60):
    """Wait for a condition; say whether it came true."""
    end = time.monotonic() + timeout
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(pid):
    """Worker processes of a run, without the process that Python starts to look after its semaphores."""
    return [c for c in children(pid) if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def here(tmp_path, *args, **options):
    return evaluate(**given(*args, **options), out=tmp_path / "undisturbed", workers=0).merged.table()


# ---------------------------------------------------------------- local


def test_two_workers_give_the_same_table_as_none(tmp_path):
    options = {"bad": [3], "wrong": [5], "task": "generate"}
    run = evaluate(**given(20, **options), out=tmp_path / "run", workers=2, pace=Pace(batch=3))
    assert run.merged.table() == here(tmp_path, 20, **options)
    assert {r["worker"] for r in run.merged.rows} <= {"local-0", "local-1"} and run.merged.repeated == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds worker processes in /proc")
def test_sigkill_at_random_moments_loses_nothing_and_repeats_only_what_was_in_flight(tmp_path):
    out, log, chance = tmp_path / "run", tmp_path / "log", random.Random(11)
    log.mkdir()
    options = {"count": 80, "think": 0.03, "bad": [17], "wrong": [30], "log": str(log)}
    kills = 0
    for turn in range(4):
        process = start(out, {"workers": 2}, **options)
        before = rows_of(out)
        assert until(lambda p=process, n=before: rows_of(out) > n or p.poll() is not None)
        time.sleep(chance.uniform(0, 0.4))
        if process.poll() is None:
            kills += 1
            if turn % 2:  # the parent alone: its workers must notice
                orphans = workers(process.pid)
                process.kill()
                assert until(lambda pids=orphans: not any(Path(f"/proc/{p}/task").exists() for p in pids), 20)
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert kills >= 2
    ended(start(out, {"workers": 2}, **options))
    run = look(out)
    log2 = tmp_path / "log2"
    log2.mkdir()
    assert run.finished and run.merged.table() == here(tmp_path, **{**options, "log": str(log2)})
    assert run.merged.repeated == 0
    begun = len(list(log.iterdir()))
    assert 79 <= begun <= 79 + 2 * kills  # 79 samples reach the model; each worker had one in flight at each kill


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds worker processes in /proc")
def test_a_killed_worker_is_replaced_while_the_run_goes_on(tmp_path):
    process = start(tmp_path / "run", {"workers": 2}, count=60, think=0.03)
    assert until(lambda: rows_of(tmp_path / "run") > 5)
    os.kill(workers(process.pid)[0], signal.SIGKILL)
    ended(process)
    run = look(tmp_path / "run")
    assert run.finished and run.merged.table() == here(tmp_path, 60) and run.merged.repeated == 0
    assert len(run.merged.sessions) == 3


def test_a_sample_that_kills_its_worker_is_named_and_the_run_goes_on(tmp_path):
    run = evaluate(**given(12, fatal=[4]), out=tmp_path / "run", workers=2)
    (failed,) = run.merged.failed
    assert failed["sample"] == "n4" and failed["stage"] == "worker"
    assert failed["reason"] == "the worker died while it had this sample alone, 2 times, by SIGSEGV"
    assert run.finished and len(run.merged.done) == 11


def test_a_signal_stops_all_workers_after_their_units(tmp_path):
    process = start(tmp_path / "run", {"workers": 2}, count=200, think=0.03)
    assert until(lambda: rows_of(tmp_path / "run") > 5)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does it: parent and workers get it
    done, left = map(int, ended(process).split())
    assert done + left == 200 and left > 0
    assert look(tmp_path / "run").merged.torn == 0


def test_a_folder_in_use_is_refused(tmp_path):
    process = start(tmp_path / "run", {"workers": 1}, count=200, think=0.05)
    assert until(lambda: rows_of(tmp_path / "run") > 1)
    with pytest.raises(RuntimeError, match=r"another run is going on in .*run; wait for it, end it"):
        evaluate(**given(200, think=0.05), out=tmp_path / "run", workers=0)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("load", "worker local-0 cannot work: OSError: weights are missing"),
        ("die", "died while it started, by SIGKILL"),
    ],
)
def test_workers_that_cannot_start_say_why(tmp_path, broken, message):
    with pytest.raises(RuntimeError, match=message):
        evaluate(**given(3, broken=broken), out=tmp_path, workers=1)


def test_a_worker_that_meets_a_full_disk_ends_the_run(tmp_path):
    with pytest.raises(CannotRecord, match="no space is left"):
        evaluate(**given(3, broken="full"), out=tmp_path, workers=1)


def test_another_configuration_is_refused_before_any_worker_starts(tmp_path):
    evaluate(**given(3), out=tmp_path, workers=0)
    with pytest.raises(OtherRun, match=r"dataset\.samples: 3 in the folder, 4 now"):
        evaluate(**given(4), out=tmp_path, workers=2)


def test_a_second_worker_pays_off_where_reading_is_the_bottleneck(tmp_path):
    """Reading that waits, as for a disk or a decoder on another core: this measures overlap, and needs no free cores."""

    def rate(count):
        out = tmp_path / str(count)
        run = evaluate(**given(60, read=0.08), out=out, workers=count, pace=Pace(readers=1))
        assert run.finished
        first = {r["worker"]: r["time"] for r in reversed(run.merged.rows)}
        first = {w: min(r["time"] for r in run.merged.rows if r["worker"] == w) for w in first}
        began = max(first.values())  # once all workers are there; starting them is not what is measured
        times = [r["time"] for r in run.merged.rows]
        last = min(max(r["time"] for r in run.merged.rows if r["worker"] == w) for w in first)
        assert len(first) == count
        return sum(began < t <= last for t in times) / (last - began)

    assert rate(2) >= 1.6 * rate(1)


def test_each_worker_takes_its_own_device(monkeypatch):
    for number, expected in enumerate(["4", "6", "4"]):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
        take_a_device(number)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    for given_, expected in (("5", "5"), ("", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given_)
        take_a_device(1)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_workers_without_a_parent_have_their_own_exit_code():
    assert ORPHANED not in (0, 1)


# ---------------------------------------------------------------- torchrun


def test_two_ranks_give_the_same_table(tmp_path):
    options = {"count": 15, "bad": [3], "wrong": [8]}
    ranks = [
        start(
            tmp_path / "run",
            {"executor": "torchrun"},
            {"threads": None},
            {"RANK": str(r), "WORLD_SIZE": "2"},
            **options,
        )
        for r in range(2)
    ]
    for rank in ranks:
        ended(rank)
    run = look(tmp_path / "run")
    assert run.finished and run.merged.table() == here(tmp_path, **options) and run.merged.repeated == 0
    by_rank = {name: [r["index"] % 2 for r in run.merged.rows if r["worker"] == name] for name in ("rank-0", "rank-1")}
    assert set(by_rank["rank-0"]) == {0} and set(by_rank["rank-1"]) == {1}


def test_a_lost_rank_costs_its_share_and_the_next_run_makes_up_for_it(tmp_path):
    ended(start(tmp_path / "run", {"executor": "torchrun"}, env={"RANK": "1", "WORLD_SIZE": "2"}, count=10))
    assert look(tmp_path / "run").left == 5
    run = evaluate(**given(10), out=tmp_path / "run", workers=0)
    assert run.finished and run.merged.table() == here(tmp_path, 10) and run.merged.repeated == 0


@pytest.mark.slow
def test_torchrun_itself_starts_two_ranks(tmp_path):
    values = json.dumps({"given": {"count": 12}, "out": str(tmp_path / "run"), "call": {"executor": "torchrun"}})
    script = tmp_path / "call.py"
    script.write_text(CALL)
    paths = os.pathsep.join([TESTS, str(Path(TESTS).parent)])
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), values]
    done = subprocess.run(
        call, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    run = look(tmp_path / "run")
    assert {r["worker"] for r in run.merged.rows} == {"rank-0", "rank-1"} and run.merged.table() == here(tmp_path, 12)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({}, "needs RANK and WORLD_SIZE"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be below WORLD_SIZE"),
        ({"RANK": "x"}, "needs"),
    ],
)
def test_ranks_must_be_known(monkeypatch, env, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        place()


# ---------------------------------------------------------------- Ray


@with_ray
@pytest.mark.slow
def test_two_ray_actors_give_the_same_table_and_outlive_a_crash(tmp_path):
    options = {"count": 14, "bad": [3], "wrong": [5], "task": "generate"}
    run = evaluate(**given(**options, fatal=[7]), out=tmp_path / "run", executor="ray", workers=2)
    assert run.finished and run.merged.repeated == 0
    (crashed,) = [r for r in run.merged.failed if r["stage"] == "worker"]
    assert crashed["sample"] == "n/7"
    assert crashed["reason"] == "the worker died while it had this sample alone, in 2 actors"
    assert len({r["worker"] for r in run.merged.rows if r["worker"].startswith("ray-")}) >= 2
    rest = [r for r in run.merged.table() if r["sample"] != "n/7"]
    assert rest == [r for r in here(tmp_path, **options) if r["sample"] != "n/7"]


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        BackendUnavailable, match=r"needs the package ray .*pip install 'mmeff\[ray\]', or use --executor local"
    ):
        evaluate(**given(3), out=tmp_path, executor="ray")


# ---------------------------------------------------------------- arguments


def test_executors_are_named():
    with pytest.raises(ValueError, match=r"no executor is called 'torchrunn'\. Did you mean 'torchrun'"):
        choose("torchrunn")
    with pytest.raises(ValueError, match="workers must be an integer >= 0, got -1"):
        Crew(workers=-1)


def test_ray_arguments_are_for_ray(tmp_path):
    with pytest.raises(ValueError, match="a Ray address and gpus are for executor='ray', got executor='local'"):
        evaluate(**given(3), out=tmp_path, address="auto")


def test_a_writer_of_a_killed_process_leaves_no_lock(tmp_path):
    code = "import sys, os, time; from pathlib import Path; from mmeff.evaluation.rows import RowWriter\n"
    code += "w = RowWriter(Path(sys.argv[1]), 'w'); w.append([]); print('ready', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline().strip() == "ready"
    holder.kill()
    holder.wait()
    RowWriter(tmp_path, "w").close()
