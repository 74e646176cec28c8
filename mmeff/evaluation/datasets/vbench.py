"""VBench's prompt lists: what to generate, and how often, for `vbench evaluate`.

Three forms: one text file with a prompt in each line (`all_dimension.txt`, or any list of one's own); a folder
`prompts_per_dimension/` with `<dimension>.txt`; `VBench_full_info.json`, a list of {prompt_en, dimension: [...], and for some
auxiliary_info}. VBench takes five videos of each prompt, 25 where temporal flickering is judged.

Five dimensions have no list of their own and use another's: background consistency that of scene, aesthetic and imaging quality
that of overall consistency, dynamic degree and motion smoothness that of subject consistency.

Source: Huang et al., CVPR 2024, arXiv:2311.17982; github.com/Vchitect/VBench, prompts/README.md and README.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmeff.errors import suggest
from mmeff.evaluation.datasets.base import SampleList, plain
from mmeff.evaluation.datasets.tables import need_columns, read_rows, read_text, the_folder
from mmeff.evaluation.samples import Sample

SHARED = {
    "background_consistency": "scene",
    "aesthetic_quality": "overall_consistency",
    "imaging_quality": "overall_consistency",
    "dynamic_degree": "subject_consistency",
    "motion_smoothness": "subject_consistency",
}
DIMENSIONS = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color",
    "spatial_relationship", "scene", "temporal_style", "appearance_style", "overall_consistency",
)  # fmt: skip
SAMPLES, FLICKERING_SAMPLES = 5, 25  # videos of a prompt


def open_vbench(
    path: Path, *, dimensions: str | Sequence[str] | None = None, samples: int | None = None, seed: int = 0
) -> SampleList:
    """Prompts to generate, each as many times as it is judged; the category is the first dimension that a prompt serves.

    Args:
        path: a list, a folder of lists, or VBench_full_info.json.
        dimensions: which of VBench's 16; None for all. A plain list of prompts knows none.
        samples: videos of each prompt; None for VBench's 5, and 25 for temporal flickering.
        seed: another one gives every video another noise. The seed of a video is made from it, the prompt and the number, so
            that no two videos share one, and a video keeps its own whatever else is generated.
    Raises: ValueError for a dimension that is not known; FileNotFoundError for one that is not there.
    """
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
        raise ValueError(f"samples must be a positive number of videos of each prompt, got {samples!r}")
    wanted = [dimensions] if isinstance(dimensions, str) else None if dimensions is None else list(dimensions)
    for name in wanted or ():
        if name not in DIMENSIONS:
            raise ValueError(
                f"VBench has no dimension {name!r}; known are {', '.join(DIMENSIONS)}.{suggest(name, DIMENSIONS)}"
            )
    notes: list[str] = []
    if path.is_dir():
        prompts = _from_folder(path, wanted)
    elif path.suffix.lower() == ".json":
        prompts = _from_info(path, wanted)
    else:
        if wanted:
            raise ValueError(
                f"{path} is a plain list that knows no dimensions; pass the folder prompts_per_dimension/ instead"
            )
        lines = _lines(path)
        prompts = {prompt: {} for prompt in lines}
        if len(prompts) < len(lines):  # VBench's own list has two
            notes.append(f"{len(lines) - len(prompts)} lines of {path} repeat a prompt; each is generated once")
    found = []
    for prompt, about in prompts.items():
        most = FLICKERING_SAMPLES if "temporal_flickering" in about.get("dimensions", ()) else SAMPLES
        found += [_sample(prompt, about, number, seed) for number in range(most if samples is None else samples)]
    return SampleList(f"VBench {path.stem}", found, root=path.parent, notes=notes)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _from_folder(path: Path, wanted: list[str] | None) -> dict[str, dict[str, Any]]:
    """Prompts of the lists of a folder; one that several dimensions use is generated once."""
    folder = the_folder(path, ("prompts_per_dimension", "prompts/prompts_per_dimension"), None, "prompts")
    folder = folder if folder.is_dir() else path
    prompts: dict[str, dict[str, Any]] = {}
    for name in wanted or DIMENSIONS:
        file = folder / f"{SHARED.get(name, name)}.txt"
        if not file.is_file():
            if wanted:
                raise FileNotFoundError(f"{folder} holds no {file.name}, the prompts of {name}")
            continue
        for prompt in dict.fromkeys(_lines(file)):
            prompts.setdefault(prompt, {"dimensions": []})["dimensions"].append(name)
    if not prompts:
        raise FileNotFoundError(
            f"{path} holds no lists of VBench; expected prompts_per_dimension/{DIMENSIONS[0]}.txt and others"
        )
    return prompts


def _from_info(path: Path, wanted: list[str] | None) -> dict[str, dict[str, Any]]:
    rows = read_rows(path)
    need_columns(rows, ["prompt_en", "dimension"], str(path))
    prompts: dict[str, dict[str, Any]] = {}
    for row in rows:
        names = [name for name in row["dimension"] if wanted is None or name in wanted]
        if names:
            about = prompts.setdefault(row["prompt_en"].strip(), {"dimensions": []})
            about["dimensions"] += names
            if "auxiliary_info" in row:
                about["auxiliary_info"] = plain(row["auxiliary_info"])
    if not prompts:
        raise ValueError(f"{path} has no prompt of {', '.join(wanted or ())}")
    return prompts


def _sample(prompt: str, about: dict[str, Any], number: int, seed: int) -> Sample:
    drawn = hashlib.sha256(f"{seed} {number} {prompt}".encode()).digest()
    return Sample(
        id=f"{prompt}-{number}", task="generate", prompt=prompt, category=next(iter(about.get("dimensions", ())), ""),
        seed=int.from_bytes(drawn[:4], "big") % 2**31, meta={"number": number, **about},
    )  # fmt: skip
