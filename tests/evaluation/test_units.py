"""Units, the record of a run, and the guard of its folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from evaluation_fakes import Numbers, given

from mmeff.evaluation.evaluate import evaluate
from mmeff.evaluation.rows import CannotRecord, Recorded, RowWriter, Tail, explained, merge, output_problem
from mmeff.evaluation.runner import pending, without
from mmeff.evaluation.units import (
    Factory,
    Job,
    OtherRun,
    Pace,
    Variant,
    configuration,
    differences,
    guard,
    read_config,
    variants,
)
from mmeff.pruning import FastV


def row(sample="a", status="done", hash="h", index=0, **more):
    return {"kind": "unit", "sample": sample, "hash": hash, "method": "dense", "status": status, "index": index, **more}


# ---------------------------------------------------------------- variants


def test_variants_are_named_and_known_by_their_configs():
    found = variants(["fastv", FastV(keep=0.25), ["fastv", "divprune"]])
    assert [v.name for v in found] == ["dense", "fastv keep=0.5", "fastv keep=0.25", "fastv + divprune"]
    assert len({v.hash for v in found}) == 4
    assert variants([FastV()])[1].hash == variants(["fastv"])[1].hash == found[1].hash
    assert [v.name for v in variants([FastV], dense=False)] == ["fastv"]
    assert Variant.from_dict(json.loads(json.dumps(found[3].to_dict()))) == found[3]


def test_stacks_of_one_name_are_told_apart():
    a, b = variants([["fastv", "divprune"], [FastV(keep=0.25), "divprune"]], dense=False)
    assert a.name == "fastv + divprune" and b.name == f"fastv + divprune ({b.hash[:6]})"


@pytest.mark.parametrize(
    ("methods", "dense", "message"),
    [
        ([], False, "at least one variant"),
        ([[]], True, "at least one method"),
        (["fastv", "FastV"], True, "same method"),
    ],
)
def test_variants_that_make_no_sense(methods, dense, message):
    with pytest.raises(ValueError, match=message):
        variants(methods, dense=dense)


def test_a_job_travels_as_plain_data():
    job = Job(out="x", **given(3, bad=[1]), variants=variants(["fastv"]), pace=Pace(batch=2))
    assert Job.from_dict(json.loads(json.dumps(job.to_dict()))) == job


@pytest.mark.parametrize(
    ("function", "message"),
    [("evaluation_fakes", "'package.module:function'"), ("evaluation_fakes:nothing", "none called 'nothing'")],
)
def test_factories_name_what_they_miss(function, message):
    with pytest.raises(ValueError, match=message):
        Factory(function=function).build()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "Pace.batch must be an integer >= 1, got 0"),
        ({"prefetch": 1.5}, "Pace.prefetch must be an integer >= 1, got 1.5"),
        ({"read_timeout": 0}, "Pace.read_timeout must be > 0 seconds"),
        ({"threads": 0}, "Pace.threads"),
    ],
)
def test_a_pace_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Pace(**fields)


def test_tasks_are_what_is_left_in_fixed_batches():
    data, both = Numbers(5), variants(["fastv"])
    dense, fastv = both[0].hash, both[1].hash
    assert [t.todo for t in pending(data, both, set(), 2)] == [
        ((0, (0, 1)), (1, (0, 1))), ((2, (0, 1)), (3, (0, 1))), ((4, (0, 1)),)
    ]  # fmt: skip
    left = pending(data, both, {("n0", dense), ("n2", dense), ("n2", fastv), ("n4", dense), ("n4", fastv)}, 2)
    assert [(t.number, t.todo) for t in left] == [(0, ((0, (1,)), (1, (0, 1)))), (1, ((3, (0, 1)),))]
    assert without(left[0], {("n0", fastv)}, data, both).alone() == [without(left[0], {("n0", fastv)}, data, both)]


# ---------------------------------------------------------------- the record


def test_rows_are_appended_and_merged(tmp_path):
    with RowWriter(tmp_path, "one") as writer:
        writer.append([row("b", index=1, answer="2"), row("a", "failed", reason="bad")])
    with RowWriter(tmp_path, "two") as writer:
        writer.append([row("a", answer="1")])
        writer.append([row("b", index=1, answer="late")])
        writer.append([{"kind": "session"}])
    merged = merge(tmp_path)
    assert [(r["sample"], r["status"], r["answer"]) for r in merged.rows] == [("a", "done", "1"), ("b", "done", "2")]
    assert merged.repeated == 1 and merged.torn == 0 and len(merged.sessions) == 1 and not merged.failed
    assert {"worker", "host", "time"} <= set(merged.rows[0]) and "worker" not in merged.table()[0]


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_line_costs_its_unit_only(tmp_path, cut):
    with RowWriter(tmp_path, "w") as writer:
        writer.append([row("a")])
        writer.append([row("b", index=1)])
    path = tmp_path / "rows" / "w.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])  # as a kill in the middle of a write leaves it
    with RowWriter(tmp_path, "w") as writer:
        writer.append([row("c", index=2)])
    merged = merge(tmp_path)
    # without its end a line is whole all the same
    assert [r["sample"] for r in merged.rows] == (["a", "b", "c"] if cut == 1 else ["a", "c"])
    assert merged.torn == (0 if cut == 1 else 1)


def test_of_several_failures_the_last_stands(tmp_path):
    with RowWriter(tmp_path, "w") as writer:
        writer.append([row("a", "failed", reason="first")])
        writer.append([row("a", "failed", reason="second")])
    (only,) = merge(tmp_path).failed
    assert only["reason"] == "second"


def test_a_second_writer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(RowWriter._lock, "__defaults__", (0.2,))
    with RowWriter(tmp_path, "w"), pytest.raises(RuntimeError, match=r"another process is writing .*w\.jsonl"):
        RowWriter(tmp_path, "w")
    RowWriter(tmp_path, "w").close()


def test_a_tail_sees_whole_lines_once(tmp_path):
    tail, recorded = Tail(tmp_path), Recorded(tmp_path)
    assert tail.new() == []
    with RowWriter(tmp_path, "w") as writer:
        writer.append([row("a"), row("b", "failed")])
        assert [r["sample"] for r in tail.new()] == ["a", "b"] and tail.new() == []
        with (tmp_path / "rows" / "w.jsonl").open("ab") as file:
            file.write(b'{"kind": "unit", "sa')
        assert tail.new() == []
    assert recorded.units() == {("a", "h"), ("b", "h")}
    assert Recorded(tmp_path).units() == set() and Recorded(tmp_path, before=True).units() == {("a", "h")}


# ---------------------------------------------------------------- disks


def test_a_full_disk_is_named_and_what_was_written_stays(tmp_path, monkeypatch):
    writer = RowWriter(tmp_path, "w")
    writer.append([row("a")])
    path = tmp_path / "rows" / "w.jsonl"
    before, write = path.read_bytes(), os.write

    def half(fd, data):
        if len(data) > 40:
            return write(fd, data[:40])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(CannotRecord, match=r"no space is left\. What was recorded before is safe; free some space"):
        writer.append([row("b", index=1, answer="x" * 500)])
    monkeypatch.undo()
    assert path.read_bytes() == before  # no torn line is left where the file could be cut back
    writer.append([row("c", index=2)])
    assert [r["sample"] for r in merge(tmp_path).rows] == ["a", "c"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is a device of Linux")
def test_a_device_that_is_full(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "w.jsonl").symlink_to("/dev/full")
    with RowWriter(tmp_path, "w") as writer, pytest.raises(CannotRecord, match="no space is left"):
        writer.append([row("a")])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where this process may mount one."""
    where = tmp_path / "disk"
    where.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(where)]
    if not sys.platform.startswith("linux") or subprocess.run(call, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=False)


def test_a_run_survives_a_disk_that_fills_up(small_disk, tmp_path):
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 44 * 1024)
    with pytest.raises(CannotRecord, match="no space is left"):
        evaluate(**given(60), out=small_disk / "run", workers=0)
    kept = len(merge(small_disk / "run").rows)
    assert 0 < kept < 60
    filler.unlink()
    run = evaluate(**given(60), out=small_disk / "run", workers=0)
    whole = evaluate(**given(60), out=tmp_path / "whole", workers=0)
    assert run.merged.table() == whole.merged.table() and run.merged.repeated == 0
    # the same disk, now read-only
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises((CannotRecord, PermissionError), match=r"read-only|not writable|Read-only"):
        evaluate(**given(60), out=small_disk / "run", workers=0, retry=True)
    assert len(merge(small_disk / "run").rows) == 60


def test_errors_of_the_disk_are_told_from_errors_of_a_sample(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = ValueError("cannot encode")
    wrapped.__cause__ = full
    assert output_problem(full) is full and output_problem(wrapped) is full
    assert output_problem(FileNotFoundError(errno.ENOENT, "no such clip")) is None
    assert explained(full, tmp_path).errno == errno.ENOSPC


# ---------------------------------------------------------------- the guard


def config(count=3, methods=(), **options):
    job = Job(out="x", **given(count, **options), variants=variants(methods))
    return configuration(job, job.dataset.build())


def test_a_folder_is_claimed_once(tmp_path):
    assert guard(tmp_path / "a" / "run", config()) is False
    assert guard(tmp_path / "a" / "run", config()) is True
    assert read_config(tmp_path / "a" / "run")["dataset"] == {
        "name": "numbers",
        "digest": "numbers-3-ask",
        "samples": 3,
    }


def test_another_configuration_is_refused_with_the_differences(tmp_path):
    guard(tmp_path, config(3, ["fastv"], bad=[1]))
    with pytest.raises(OtherRun) as caught:
        guard(tmp_path, config(4, [FastV(keep=0.25)], bad=[1, 2]))
    text = str(caught.value)
    assert "holds a run with another configuration" in text and "another output folder" in text
    for line in (
        "model.arguments.bad: [1] in the folder, [1, 2] now",
        "dataset.samples: 3 in the folder, 4 now",
        "variants[1].methods[0].keep: 0.5 in the folder, 0.25 now",
    ):
        assert line in text
    with pytest.raises(OtherRun, match=r"variants: .* in the folder"):
        guard(tmp_path, config(3, ["fastv", "divprune"], bad=[1]))


def test_differences_name_keys_that_came_and_went():
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 2.0}, "d": None}) == [
        "a: 1 in the folder, absent now", "b.c: 2 in the folder, 2.0 now", "d: absent in the folder, null now"
    ]  # fmt: skip
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) == []


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        guard(tmp_path / "file" / "run", config())
    with pytest.raises(FileNotFoundError, match="holds no evaluation"):
        read_config(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OtherRun, match="is damaged"):
        guard(tmp_path, config())
