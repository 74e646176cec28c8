"""Write the tables of docs/performance.md from committed rows, and its figure.

    python docs/make_performance.py            # rewrite what stands between the markers, draw the figure
    python docs/make_performance.py --check    # change nothing; exit 1 and name the tables that are out of date

Only what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is touched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the benchmarks are no part of the package

from make_tables import put_between  # noqa: E402

from benchmarks import performance, prefill, results, video  # noqa: E402
from benchmarks.gpu import rows as gpu  # noqa: E402

PAGE = "docs/performance.md"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, rows: Path = results.FOLDER) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/performance.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args(arguments).check
    path = root / PAGE
    found = read(rows)
    stale = []
    for name, text in performance.page(found).items():
        old = path.read_text()
        new = put_between(old, text, PAGE, name)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new)
    if check and stale:
        print(f"{PAGE}: out of date: {', '.join(stale)}; run `make docs`", file=sys.stderr)
        return 1
    if not check:
        performance.draw(found, root / "docs" / "images" / "performance.png")
    print(f"{', '.join(stale)} rewritten" if stale else f"{PAGE} is current")
    return 0


def read(folder: Path) -> performance.Rows:
    """The rows of a folder of results; files that are not there have none."""
    return performance.Rows(
        gpu=gpu.read(folder / "h200.jsonl"),
        video=video.read(folder / "video.jsonl"),
        prefill=prefill.read(folder / "prefill.jsonl"),
        cpu=results.read(folder / "cpu.jsonl"),
    )


if __name__ == "__main__":
    sys.exit(main())
