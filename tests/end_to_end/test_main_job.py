"""What `make run` does, whole: both embedded models, the folder, the page."""

from __future__ import annotations

import json
import sys

import pytest

from mmeff import cli
from mmeff.evaluation import embedded


@pytest.mark.slow
def test_compare_without_arguments(tmp_path, monkeypatch, capsys):
    run = embedded.run
    monkeypatch.setattr(embedded, "run", lambda out, **options: run(out, questions=16, **options))
    monkeypatch.setattr(embedded, "PROMPTS", embedded.PROMPTS[:1])
    monkeypatch.setattr(sys, "argv", ["mmeff", "compare", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    out = tmp_path / "run"
    report = json.loads((out / "report.json").read_text())
    video, vlm = report["comparisons"]
    assert (video["kind"], vlm["kind"]) == ("video", "vlm")
    assert video["accelerated_nothing"] == vlm["accelerated_nothing"] == []
    assert vlm["measured"]["variants"]["dense"]["answers"] == ["white", "top right", "five"]
    assert {row["policy"] for row in report["accuracy"]} == {
        "dense", "FastV before layer 1", "FastV before layer 2", "random tokens at the input",
    }  # fmt: skip
    assert all(row["dense"]["median_s"] > 0 for row in report["attention"])
    assert all((out / name).is_file() for name in report["files"])
    assert "report.html" in capsys.readouterr().out
    with pytest.raises(SystemExit) as again:
        cli.main()
    assert again.value.code == cli.Exit.ERROR, "a finished run is not overwritten unless asked"
    assert "overwrite" in capsys.readouterr().err
