"""The folder that `vbench evaluate` takes."""

from __future__ import annotations

import json
import shlex

import pytest
from evaluation_fakes import Numbers, given

from mmeff.evaluation.evaluate import evaluate
from mmeff.evaluation.export_vbench import CUSTOM, export
from mmeff.evaluation.samples import Sample
from mmeff.video_io import read

PROMPTS = ["a cat", "a cat", "a dog / a bird", "x" * 300]


@pytest.fixture
def made(tmp_path, monkeypatch):
    def sample(self, index):
        return Sample(id=f"n/{index}", task="generate", prompt=PROMPTS[index], seed=index)

    monkeypatch.setattr(Numbers, "__getitem__", sample)
    return evaluate(**given(4, task="generate"), methods=["fastv"], out=tmp_path / "run", workers=0)


def test_videos_are_named_by_prompt_and_number(made, tmp_path):
    dense, fastv = export(made, tmp_path / "out", dimensions=["scene"])
    assert dense.variant == "dense" and fastv.videos == tmp_path / "out" / "fastv" / "videos"
    names = sorted(p.name for p in dense.videos.iterdir())
    assert names[:2] == ["a cat-0.mp4", "a cat-1.mp4"] and len(names) == 4 == dense.count
    assert all(len(name.encode()) <= 255 for name in names)
    prompts = json.loads((dense.videos.parent / "prompts.json").read_text())
    assert sorted(prompts) == names and sorted(prompts.values()) == sorted(PROMPTS)
    assert shlex.split(dense.command) == [
        "vbench",
        "evaluate",
        "--videos_path",
        str(dense.videos),
        "--dimension",
        "scene",
    ]
    assert any("3 of 3 prompts have fewer than the 5" in n for n in dense.notes) and any(
        "2 videos" in n for n in dense.notes
    )
    assert len(read(dense.videos / "a cat-1.mp4")) == 3


def test_custom_prompts_have_their_own_mode(made, tmp_path):
    (one, _) = export(made, tmp_path / "out", custom=True)
    parts = shlex.split(one.command)
    assert "--mode=custom_input" in parts and parts[parts.index("--prompt_file") + 1].endswith("prompts.json")
    assert [p for p in parts if p in CUSTOM] == list(CUSTOM) and one.notes == ()
    with pytest.raises(ValueError, match=r"VBench judges custom prompts by .*, got scene"):
        export(made, tmp_path / "out", custom=True, dimensions=["scene"])


def test_a_second_export_replaces_the_first(made, tmp_path):
    for _ in range(2):
        (one, _) = export(made, tmp_path / "out")
    assert len(list(one.videos.iterdir())) == 4


def test_a_run_without_videos_has_nothing_to_export(tmp_path):
    run = evaluate(**given(2), out=tmp_path / "run", workers=0)
    with pytest.raises(ValueError, match="holds no videos to export"):
        export(run, tmp_path / "out")
