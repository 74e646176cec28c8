"""Files of past runs."""

from __future__ import annotations

import pytest

from demos.runs import Runs


@pytest.fixture
def runs():
    made = Runs(kept=3, megabytes=0.002)
    yield made
    made.close()


def add(runs, size=10):
    run = runs.new()
    (run.folder / "a.bin").write_bytes(b"x" * size)
    runs.settle(run)
    return run


def test_only_published_files_are_found(runs):
    run = add(runs)
    assert runs.file(run.name, "a.bin") is None
    assert run.publish(run.folder / "a.bin") == f"runs/{run.name}/a.bin"
    assert runs.file(run.name, "a.bin") == run.folder / "a.bin"
    for name in ("../a.bin", "/etc/passwd", "", "b.bin"):
        assert runs.file(run.name, name) is None
    assert runs.file("..", "a.bin") is None and runs.file("", "") is None
    with pytest.raises(ValueError, match="own folder"):
        run.publish(run.folder / ".." / "a.bin")


def test_names_cannot_be_guessed(runs):
    names = {add(runs).name for _ in range(20)}
    assert len(names) == 20 and all(len(name) >= 20 for name in names)


def test_the_one_that_nobody_looked_at_goes(runs):
    a, b, c = add(runs), add(runs), add(runs)
    assert runs.get(a.name) is a
    d = add(runs)
    assert not b.folder.exists() and all(run.folder.exists() for run in (a, c, d))
    with pytest.raises(ValueError, match="not kept any more; run it again"):
        runs.get(b.name)


def test_large_runs_make_room_and_the_latest_stays(runs):
    small = add(runs)
    large = add(runs, 5000)
    assert not small.folder.exists() and large.folder.exists()
    add(runs)
    assert not large.folder.exists()


def test_a_run_that_failed_leaves_nothing(runs):
    run = runs.new()
    runs.drop(run)
    assert not run.folder.exists()
    root = add(runs).folder.parent
    runs.close()
    assert not root.exists()
