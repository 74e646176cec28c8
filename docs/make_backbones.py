"""Write the tables of docs/backbones.md: the models from timm's registry, their speed and what they learn from committed rows.

    python docs/make_backbones.py            # rewrite what stands between the markers, draw the figure
    python docs/make_backbones.py --check    # change nothing; exit 1 and name the tables that are out of date

Only what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is touched.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import timm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the benchmarks are no part of the package

from make_tables import put_between, table  # noqa: E402

import mmeff.vision_backbones  # noqa: E402
from benchmarks import backbones, backbones_table, digits, digits_table  # noqa: E402
from mmeff.tiny import data_folder  # noqa: E402

PAGE = "docs/backbones.md"
TOWERS = (
    "tower", "held-out questions answered", "of each kind, %", "random 25 % of the tokens cost, points",
    "FastV at 25 %", "gate",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/backbones.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args(arguments).check
    path = root / PAGE
    rows = digits.read(digits.ROWS)
    timed = backbones.latest(backbones.read(backbones.ROWS))
    tables = {
        "models": models(), "speed": backbones_table.markdown(timed), "digits": digits_table.markdown(rows),
        "towers": towers(data_folder(), ROOT / "benchmarks" / "results"),
    }  # fmt: skip
    stale = []
    for name, text in tables.items():
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
        digits_table.draw(rows, root / "docs" / "images" / "digits.png")
        backbones_table.draw(timed, root / "docs" / "images" / "backbones.png")
    print(f"{', '.join(stale)} rewritten" if stale else f"{PAGE} is current")
    return 0


def models() -> str:
    """A row per registered name: parameters are counted, the rest is what its entry point says of the official model."""
    rows = []
    for name in mmeff.vision_backbones.registered():
        model = timm.create_model(name, device="meta")
        cfg = timm.get_pretrained_cfg(name)
        parameters = sum(p.numel() for p in model.parameters())
        said = (timm.model_entrypoint(name).__doc__ or "").split("\n")[0]
        rows.append((f"`{name}`", f"{parameters / 1e6:.2f} M", str(cfg.input_size[-1]), said))
    return table(("name", "parameters, counted", "made for", "official model, as published"), rows)


def towers(embedded: Path, results: Path) -> str:
    """A row per tower of the tiny VLM: CLIP's, which is embedded, and the backbones whose gate.json lies among the results."""
    gates = {"CLIP, 4 layers (the embedded model)": embedded / "tiny-vlm" / "gate.json"}
    gates |= {f"`{path.stem.removeprefix('tower-')}`": path for path in sorted(results.glob("tower-*.json"))}
    rows = []
    for name, path in gates.items():
        gate = json.loads(path.read_text())
        held, costs, least = gate["held_out"], gate["costs"], gate["thresholds"]
        rows.append((
            name, f"{100 * held['exact_match']:.1f} % of {held['questions']}",
            ", ".join(f"{kind} {100 * share:.0f}" for kind, share in held["kinds"].items()),
            f"{100 * costs['random_cost']:.1f}", f"{100 * costs['fastv_cost']:.1f}",
            "passed" if gate["passed"] else f"missed (>= {100 * least['exact_match']:.0f} %, and what pruning costs)",
        ))  # fmt: skip
    return table(TOWERS, rows)


if __name__ == "__main__":
    sys.exit(main())
