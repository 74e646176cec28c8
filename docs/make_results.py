"""Write the measured tables of docs/quality.md, docs/pruning-results.md and docs/acting.md, and their figures, from the committed rows.

    python docs/make_results.py            # rewrite what stands between the markers, draw the figures
    python docs/make_results.py --check    # change nothing; exit 1 and name the pages that are out of date

Only what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is touched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the benchmarks are no part of the package

from make_tables import put_between  # noqa: E402

from benchmarks import acting_table, plots, pruning_table, quality_table  # noqa: E402
from benchmarks.acting import ROWS as ACTING  # noqa: E402
from benchmarks.pruning import rows_file  # noqa: E402
from benchmarks.quality import ROWS as QUALITY  # noqa: E402
from benchmarks.results import Machine  # noqa: E402
from mmeff import tiny  # noqa: E402

Made = tuple[str, Callable[[Path], object]]  # the table, and what draws its figure


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description="Write the measured tables of the documentation from the committed rows."
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    machine = Machine.here(torch.device("cpu"))
    stale = []
    for page, name, make in (
        ("quality.md", "quality", quality),
        ("pruning-results.md", "pruning-tiny-vlm", lambda m: pruning("tiny-vlm", m)),
        ("pruning-results.md", "pruning-tiny-video-vlm", lambda m: pruning("tiny-video-vlm", m)),
        ("acting.md", "acting", acting),
    ):
        path = root / "docs" / page
        old = path.read_text()
        text, draw = make(machine)
        new = put_between(old, text.strip(), f"docs/{page}", name)
        if new != old:
            stale.append(f"{page} ({name})")
        if not check:
            path.write_text(new)
            draw(root / "docs" / "images" / f"{name}.png")
    if check and stale:
        print(f"{', '.join(stale)}: out of date; run `make docs`", file=sys.stderr)
        return 1
    print(f"{', '.join(stale)} rewritten" if stale else "the measured tables are current")
    return 0


def quality(machine: Machine) -> Made:
    """What sparse attention costs, from the rows of `benchmarks quality`."""
    found = quality_table.summarise(QUALITY, machine)
    return quality_table.markdown(found), lambda path: plots.quality(found, path)


def pruning(model: str, machine: Machine) -> Made:
    """What dropping visual tokens costs in answers, from the rows of `benchmarks pruning`."""
    policy = str(tiny.data_folder() / "cacovid-policy") if model == "tiny-video-vlm" else ""
    found = pruning_table.summarise(rows_file(model), model, machine, policy)
    return pruning_table.markdown(found), lambda path: plots.pruning(found, path)


def acting(machine: Machine) -> Made:
    """What dropping visual tokens costs a policy that acts, from the rows of `benchmarks acting`."""
    found = acting_table.summarise(ACTING, machine)
    return acting_table.markdown(found), lambda path: plots.acting(found, path)


if __name__ == "__main__":
    sys.exit(main())
