"""The examples of docs/pipelines.md run as they stand, one after another, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import small_ltx
from diffusers import LTXImageToVideoPipeline

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pipelines.md"


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 9
    names: dict[str, Any] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"docs/pipelines.md, example {i + 1}", "exec"), names)
    assert {"square.mp4", "square.yaml", "ring.mp4", "ring.yaml"} <= {file.name for file in tmp_path.iterdir()}
    pipe = small_ltx.make_pipe(kind=LTXImageToVideoPipeline)
    call = {"height": 96, "width": 160, "num_frames": 9, "num_inference_steps": 1, "max_sequence_length": 16}
    clip = names["animate"](pipe, **call)
    assert clip.frames.shape == (9, 96, 160, 3) and (tmp_path / "moving.png").is_file()
