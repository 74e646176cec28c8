"""A folder of generated videos as `vbench evaluate` takes it: one folder per variant, one file per prompt and seed.

VBench pins old versions of what this library builds on, so it is never imported: it runs in an environment of its own, on the
folder that is written here. The `command.txt` beside the videos is what to run there.

VBench finds prompts by file name, "<prompt>-<i>.mp4". Its own prompt list wants five videos each, of i = 0 to 4; any other
prompts are judged with `--mode=custom_input`, and their names in a JSON file, for names cannot hold every prompt.
Source: github.com/Vchitect/VBench, README and vbench/__init__.py.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmeff.evaluation.comparison import slug
from mmeff.evaluation.evaluate import Run
from mmeff.evaluation.rows import DONE
from mmeff.evaluation.units import digest
from mmeff.video_io import replacing

PER_PROMPT = 5  # videos of a prompt that the standard mode wants
CUSTOM = (
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
    "imaging_quality",
)  # fmt: skip
LONGEST = 255  # bytes of a file name


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written for one variant: the folder of its `videos`, how many they are, the `command` to run, and `notes` on what
    VBench will not find."""

    variant: str
    videos: Path
    count: int
    command: str
    notes: tuple[str, ...]


def export(
    run: Run, out: str | os.PathLike[str], *, dimensions: Sequence[str] = (), custom: bool = False
) -> list[Export]:
    """Write the videos of a run for VBench.

    Args:
        run: of a dataset of prompts, with a dataset of `vbench` prompt lists for the standard mode.
        out: a folder; made if it is missing. Videos of an earlier export to it are replaced.
        dimensions: to be named in the commands; empty is all of VBench's, or those that custom prompts have.
        custom: whether the prompts are the user's own; without it VBench's own list must be behind the run.
    Returns:
        an `Export` per variant. Files are hard links where the file system has them, and copies elsewhere.
    Raises:
        ValueError: the run made no video, or a dimension that custom prompts do not have.
        OSError: the folder cannot be written to.
    """
    out = Path(out)
    wrong = [d for d in dimensions if custom and d not in CUSTOM]
    if wrong:
        raise ValueError(
            f"VBench judges custom prompts by {', '.join(CUSTOM)}, got {', '.join(wrong)}; leave those out"
        )
    made: dict[str, list[dict[str, Any]]] = defaultdict(list)
    names = {v["hash"]: v["name"] for v in run.config["variants"]}
    for row in run.merged.rows:
        if row["status"] == DONE and row.get("artifact"):
            made[names[row["hash"]]].append(row)
    if not made:
        raise ValueError(
            f"{run.folder} holds no videos to export: VBench judges what a run of a dataset of prompts made"
        )
    return [_export(run.folder, out / slug(name), name, rows, dimensions, custom) for name, rows in made.items()]


def _export(
    source: Path, folder: Path, variant: str, rows: list[dict[str, Any]], dimensions: Sequence[str], custom: bool
) -> Export:
    videos = folder / "videos"
    if videos.is_dir():
        shutil.rmtree(videos)
    videos.mkdir(parents=True)
    prompts: dict[str, str] = {}
    seen: dict[str, int] = defaultdict(int)
    unfit = 0
    for row in rows:
        prompt = row["prompt"]
        name = f"{prompt}-{seen[prompt]}.mp4"
        if "/" in prompt or "\0" in prompt or len(name.encode()) > LONGEST:
            name = f"{slug(prompt)[:80]}-{digest(prompt)[:8]}-{seen[prompt]}.mp4"
            unfit += 1
        seen[prompt] += 1
        _link(source / row["artifact"], videos / name)
        prompts[name] = prompt
    listed = folder / "prompts.json"  # beside the videos: VBench takes every file among them for a video
    with replacing(listed) as partial:
        partial.write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", "utf-8")
    wanted = list(dimensions) or (list(CUSTOM) if custom else [])
    parts = ["vbench", "evaluate", "--videos_path", str(videos.absolute())]
    parts += ["--dimension", *wanted] if wanted else []
    parts += ["--mode=custom_input", "--prompt_file", str(listed.absolute())] if custom else []
    notes = []
    if not custom:
        short = sum(count < PER_PROMPT for count in seen.values())
        if short:
            notes.append(
                f"{short} of {len(seen)} prompts have fewer than the {PER_PROMPT} videos that VBench's own list wants"
            )
        if unfit:
            notes.append(f"{unfit} videos have prompts that no file name can hold; VBench will not find them")
        if not wanted:
            notes.append("VBench wants --dimension: name those of the prompt list")
    command = shlex.join(parts)
    with replacing(folder / "command.txt") as partial:
        partial.write_text(command + "\n", "utf-8")
    return Export(variant=variant, videos=videos, count=len(prompts), command=command, notes=tuple(notes))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
