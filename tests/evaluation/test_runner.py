"""The loop of a worker: reading ahead, failures, memory, stopping; in this process."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from evaluation_fakes import Squares, given, numbers

from mmeff.evaluation.evaluate import Progress, duration, evaluate, look
from mmeff.evaluation.prefetch import ListSource, Prefetch
from mmeff.evaluation.rows import CannotRecord, RowWriter, merge
from mmeff.evaluation.runner import Worker, artifact_name, out_of_memory, pending, reason
from mmeff.evaluation.units import Job, Pace, Prepared, Variant, variants
from mmeff.video_io import read


def run(tmp_path, count=6, *, out="run", **options):
    call = {k: options.pop(k) for k in ("methods", "pace", "retry", "show", "dense") if k in options}
    return evaluate(**given(count, **options), out=tmp_path / out, workers=0, **call)


def by_sample(result, method="dense"):
    return {r["sample"]: r for r in result.merged.rows if r["method"] == method}


def test_every_unit_is_recorded_with_what_it_saw(tmp_path):
    result = run(tmp_path, 8, methods=["fastv"])
    assert result.finished and len(result.merged.rows) == 16 and result.merged.repeated == 0
    row = by_sample(result, "fastv")["n3"]
    assert row["answer"] == " 10" and row["expected"] == "9" and row["category"] == "odd" and row["status"] == "done"
    assert row["frames"] == [{"path": "3.mp4", "indices": [0, 3]}] and row["tokens"] == {"visual": 32}
    assert {"read", "model", "prefill"} <= set(row["seconds"])
    assert sum(r["cold"] for r in result.merged.rows) == 2  # the first unit of each variant
    (session,) = result.merged.sessions
    assert session["environment"]["python"]


def test_a_failure_is_a_result(tmp_path):
    result = run(tmp_path, 8, bad=[2], wrong=[5], methods=["fastv"])
    assert result.finished and len(result.merged.failed) == 4
    dense = by_sample(result)
    assert dense["n2"]["stage"] == "read" and dense["n2"]["reason"].startswith("ValueError: n2 is damaged at <")
    assert "0x..." in dense["n2"]["reason"]  # no address, so that two runs say the same
    assert dense["n5"]["stage"] == "model" and dense["n5"]["reason"] == "RuntimeError: n5 is too odd"


def test_failures_are_kept_until_a_retry_is_asked_for(tmp_path):
    """The clip is repaired in between, which the configuration does not see: here by another process environment."""
    folder = tmp_path / "repaired"
    folder.mkdir()
    broken = given(6, bad=[2], log=str(folder))
    first = evaluate(**broken, out=tmp_path / "run", workers=0)
    assert len(first.merged.failed) == 1
    again = evaluate(**broken, out=tmp_path / "run", workers=0)
    assert len(again.merged.failed) == 1 and len(again.merged.sessions) == 1  # nothing was left, so no worker started
    job = Job(out=str(tmp_path / "run"), **broken, variants=variants([]))
    with RowWriter(tmp_path / "run", "later") as writer:  # what a retry does once the clip can be read
        left = pending(job.dataset.build(), job.variants, first.merged.done)
        Worker(job, Squares(), job.dataset.build(), writer).run(ListSource(left))
    healed = look(tmp_path / "run")
    assert not healed.merged.failed and len(healed.merged.rows) == 6
    retried = evaluate(**broken, out=tmp_path / "run", workers=0, retry=True)
    assert retried.merged.table() == healed.merged.table()


def test_a_retry_runs_what_failed_and_nothing_else(tmp_path):
    log = tmp_path / "log"
    log.mkdir()
    call = {**given(5, wrong=[1], log=str(log)), "out": tmp_path / "run", "workers": 0}
    evaluate(**call)
    assert len(list(log.iterdir())) == 5
    evaluate(**call, retry=True)
    assert sorted(p.name.split("-")[0] for p in log.iterdir()) == ["0", "1", "1", "2", "3", "4"]


def test_memory_that_runs_out_halves_the_batch(tmp_path):
    result = run(tmp_path, 16, memory=3, pace=Pace(batch=8))
    assert not result.merged.failed and result.merged.table() == run(tmp_path, 16, out="one").merged.table()
    # 8 is tried once: what the first batch taught holds for the second one
    assert [r["batch"] for r in result.merged.rows] == [2] * 16


def test_a_sample_that_never_fits_fails_alone(tmp_path):
    result = run(tmp_path, 3, memory=0, pace=Pace(batch=2))
    assert {r["reason"] for r in result.merged.failed} == {"MemoryError: no memory for 1"} and len(
        result.merged.failed
    ) == 3


def test_one_bad_sample_does_not_take_its_batch_along(tmp_path):
    result = run(tmp_path, 8, wrong=[2], bad=[6], pace=Pace(batch=4), methods=["fastv"])
    assert {r["sample"] for r in result.merged.failed} == {"n2", "n6"}
    assert result.merged.table() == run(tmp_path, 8, out="one", wrong=[2], bad=[6], methods=["fastv"]).merged.table()


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_memory(error, is_memory):
    assert out_of_memory(error) is is_memory


def test_a_full_disk_in_the_model_is_no_fault_of_the_sample(tmp_path):
    with pytest.raises(CannotRecord, match="no space is left"):
        run(tmp_path, 3, broken="full")
    assert merge(tmp_path / "run").rows == ()


def test_videos_are_written_whole_and_known_by_their_content(tmp_path):
    result = run(tmp_path, 2, task="generate", methods=["fastv"])
    row = by_sample(result, "fastv")["n/1"]
    assert row["artifact"].startswith("artifacts/fastv-") and row["artifact"].endswith(".mp4")
    clip = read(tmp_path / "run" / row["artifact"])
    assert len(clip) == 3 and clip.fps == 4 and len(row["sha256"]) == 64
    assert not list((tmp_path / "run").rglob("*.partial*"))
    again = run(tmp_path, 2, out="again", task="generate", methods=["fastv"])
    assert again.merged.table() == result.merged.table()


def test_artifacts_of_distinct_samples_have_distinct_names():
    dense = Variant(name="dense")
    names = [artifact_name(i, dense) for i in ("a/b", "a_b", "a b", "../x", "..", "x" * 300, "x" * 301, "é")]
    assert len(set(names)) == len(names) and all(".." not in n.split("/") and len(n) < 200 for n in names)


def test_an_outcome_must_hold_something(tmp_path, monkeypatch):
    monkeypatch.setattr(Squares, "run", lambda self, prepared, methods: [])
    result = run(tmp_path, 1)
    assert result.merged.failed[0]["reason"] == "RuntimeError: the model gave 0 outcomes for 1 samples"


# ---------------------------------------------------------------- reading ahead


def never():
    return False


def prefetch(prepare, count, **options):
    settings = {"depth": 4, "readers": 2, "timeout": 5.0, **options}
    return Prefetch(ListSource(list(range(count))), lambda task: [task], prepare, **settings)


def taken(ahead):
    while (found := ahead.take(never)) is not None:
        yield found[1][0]


def test_reading_goes_on_while_the_model_works_and_stays_bounded():
    inside, most = [], []
    lock = threading.Lock()

    def prepare(item):
        with lock:
            inside.append(item)
            most.append(len(inside))
        time.sleep(0.01)
        with lock:
            inside.remove(item)
        return item

    began = []
    ahead = prefetch(lambda item: (began.append(item), prepare(item))[1], 20, depth=3, readers=2)
    order = []
    for ready in taken(ahead):
        time.sleep(0.03)
        order.append(ready.value)
        assert len(began) <= len(order) + 3  # never more than `depth` ahead of the model
    assert order == list(range(20)) and max(most) == 2


def test_a_reader_that_never_returns_is_given_up():
    ahead = prefetch(lambda item: time.sleep(60) if item == 1 else item, 5, readers=1, timeout=0.2)
    reads = list(taken(ahead))
    assert [r.value for r in reads] == [0, None, 2, 3, 4]
    assert "more than 0.2 s" in str(reads[1].error)


def test_two_hanging_samples_hang_nothing(tmp_path):
    began = time.monotonic()
    result = run(tmp_path, 8, hang=[1, 2], pace=Pace(readers=1, read_timeout=0.3))
    assert time.monotonic() - began < 8
    assert {r["sample"] for r in result.merged.failed} == {"n1", "n2"} and len(result.merged.done) == 6
    assert all("given up" in r["reason"] for r in result.merged.failed)


def test_reading_and_thinking_overlap(tmp_path):
    began = time.monotonic()
    result = run(tmp_path, 12, read=0.05, think=0.05)
    rows = result.merged.rows
    spent = max(r["time"] for r in rows) - min(r["time"] for r in rows)
    assert time.monotonic() - began > 0.6
    assert spent < 0.85 * 11 * 0.1  # one after the other would take 11 x 0.1 s between the first row and the last


def test_a_decoder_may_kill_its_thread_with_anything(tmp_path, monkeypatch):
    def prepare(self, sample):
        raise SystemExit(3)

    monkeypatch.setattr(Squares, "prepare", prepare)
    with pytest.raises(SystemExit):
        run(tmp_path, 1)


# ---------------------------------------------------------------- stopping and progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_unit_in_flight_finish(tmp_path, number):
    timer = threading.Timer(0.35, os.kill, (os.getpid(), number))
    timer.start()
    before = signal.getsignal(number)
    first = run(tmp_path, 40, think=0.05)
    timer.join()
    assert signal.getsignal(number) is before
    assert first.stopped and 0 < len(first.merged.rows) < 40 and first.left == 40 - len(first.merged.rows)
    second = run(tmp_path, 40, think=0.05, show=lambda p: None)
    assert second.finished and not second.stopped and second.merged.repeated == 0
    assert second.merged.table() == run(tmp_path, 40, out="whole").merged.table()


def test_progress_counts_what_was_done_before(tmp_path):
    steps = []
    run(tmp_path, 5, bad=[1])
    run(tmp_path, 5, bad=[1], show=steps.append)
    assert steps[-1].done == 4 and steps[-1].failed == 1 and steps[-1].total == 5 and steps[-1].rate is None
    run(tmp_path, 30, out="b", think=0.05, show=steps.append)
    assert any(s.rate and s.eta for s in steps) and steps[-1].done == 30
    assert str(Progress(done=3, failed=1, total=9, rate=2.0, eta=2.5)) == "4 of 9 units, 1 failed, 2/s, 2 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (61, "1 min 1 s"), (7200, "2 h"), (7500, "2 h 5 min"), (90000, "1 d 1 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_reasons_are_one_line():
    assert reason(ValueError("a\n  b")) == "ValueError: a b" and reason(KeyError()) == "KeyError: no message"
    assert len(reason(ValueError("x" * 5000))) == 1000


def test_the_fakes_are_what_the_tests_think():
    data, model = numbers(4), Squares()
    out = model.run([Prepared(value=model.prepare(data[3]).value)], [])
    assert out[0].text == " 9" and data[3].answer == "9"
