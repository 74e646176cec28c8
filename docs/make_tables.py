"""Write the tables of methods in README.md and docs/methods.md, from the registry.

    python docs/make_tables.py            # rewrite what stands between the markers
    python docs/make_tables.py --check    # change nothing; exit 1 and name the files that are out of date

Only what stands between `<!-- methods:begin -->` and `<!-- methods:end -->` is touched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import mmeff
from mmeff.config import describe

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of methods from the registry.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    check = parser.parse_args(arguments).check

    methods = [
        m for m in mmeff.methods() if m.config.__module__.startswith("mmeff.")
    ]  # not the plugins of this machine
    stale = []
    for name, text in {"README.md": overview(methods), "docs/methods.md": details(methods)}.items():
        path = root / name
        old = path.read_text()
        new = put_between(old, text, name)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new)
    if check and stale:
        print(f"{', '.join(stale)}: the tables of methods are out of date; run `make docs`", file=sys.stderr)
        return 1
    print(f"{', '.join(stale)} rewritten" if stale else f"the tables are current ({len(methods)} methods)")
    return 0


def overview(methods: Iterable[mmeff.MethodInfo]) -> str:
    """One table: a row per method."""
    rows = [
        (f"`{m.config.__name__}`", m.summary, m.stage, "yes" if m.needs_training else "no", m.source) for m in methods
    ]
    return table(("method", "what it does", "room", "needs training", "source"), rows)


def details(methods: Iterable[mmeff.MethodInfo]) -> str:
    """A section per room, in it a section per method with a table of its fields."""
    parts = []
    for stage, group in groupby(methods, key=lambda m: m.stage):
        members = list(group)
        parts.append(f"## mmeff.{stage}\n\nHosts: {', '.join(members[0].hosts) or 'none yet'}.")
        for m in members:
            rows = [(f"`{f.name}`", f.type, f"`{f.default!r}`", f.unit, f.doc, f.source) for f in describe(m.config)]
            training = " Needs training." if m.needs_training else ""
            parts.append(f"### {m.config.__name__}\n\n{m.summary}{training}\n\nSource: {m.source}.")
            parts.append(table(("field", "type", "default", "unit", "meaning", "default from"), rows))
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars and line breaks in cells are made harmless."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def put_between(text: str, new: str, name: str, marker: str = "methods") -> str:
    """`text` with `new` between the lines `<!-- MARKER:begin -->` and `<!-- MARKER:end -->`.

    Raises:
        ValueError: the markers do not stand there once each, in order.
    """
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{name} must hold the line {begin} once and, below it, the line {end} once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{new}\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    sys.exit(main())
