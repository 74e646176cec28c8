"""A dataset of sixty damaged and odd files through a whole run: every one ends as a result or as a failure that names it."""

from __future__ import annotations

import json

import pytest
from odd_media import write_odd_media

from mmeff.evaluation.evaluate import evaluate
from mmeff.evaluation.units import Factory, Pace


@pytest.mark.parametrize("workers", [0, 1])
def test_odd_clips_end_as_results_or_as_failures_that_name_them(tmp_path, workers):
    folder = tmp_path / "clips"
    folder.mkdir()
    readable = write_odd_media(folder)
    rows = [{"id": name, "video": name, "question": "what moves ?", "answer": "a ring"} for name in sorted(readable)]
    manifest = folder / "odd.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = evaluate(
        Factory(function="benchmarks.evaluation:decoder"),
        Factory(function="mmeff.evaluation.datasets:open_dataset", arguments={"spec": str(manifest)}),
        out=tmp_path / "run",
        workers=workers,
        pace=Pace(readers=1, threads=1),
    )
    assert done.finished and not done.stopped
    found = {row["sample"]: row for row in done.merged.rows}
    assert set(found) == set(readable) and len(readable) >= 60
    for name, can in readable.items():
        if can is not None:
            assert (found[name]["status"] == "done") == can, (name, found[name].get("reason"))
        if found[name]["status"] == "failed":
            assert found[name]["stage"] == "read" and name in found[name]["reason"], found[name]["reason"]
    assert len({row["reason"] for row in done.merged.failed}) > 5, "reasons tell kinds of damage apart"
