"""Training on the kernels is training on their references: loss curves agree step by step, and the proof of it is kept right.

Each family of `benchmarks/digits.py` takes a dozen steps of AdamW from the same weights on the same handwritten digits, on its
kernel path and on its reference path, in float32. What a wrong gradient does to the curve is tested too, so that the tolerance
is known to mean something. The full runs, to 97 % and above, are `python -m benchmarks digits`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("sklearn", reason="the handwritten digits come with scikit-learn (pip install 'mmeff[dev]')")

from benchmarks import digits, digits_table
from benchmarks.digits import FAMILIES, KERNEL, REFERENCE, Family
from benchmarks.results import Machine
from mmeff.kernels import neighborhood_attention, record
from mmeff.vision_backbones import nat

ROOT = Path(__file__).resolve().parents[2]
MACHINE = Machine(device=torch.device("cpu"), hardware="a processor", environment={"torch": "x"}, commit="c")
BY_NAME = {f.name: f for f in FAMILIES}
WITH_KERNEL = [f for f in FAMILIES if KERNEL in f.paths]

STEPS, BATCH, RATE = 12, 16, 1e-3
# Largest relative difference of the losses in any step, ten times the worst that was seen. A backward pass that forgets the
# gradient of the bias table, the least of its results, is 2e-5 off after these steps; see `test_a_wrong_gradient_shows`.
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def losses(model: Any, pixels: int) -> torch.Tensor:
    """The loss before each step, (STEPS,)."""
    model.train()
    optimizer = digits.optimizer_of(model, RATE)
    found = []
    for x, y in islice(digits.batches(digits.pictures(pixels), 1, BATCH), STEPS):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).abs() / b.abs()).max())


# ---------------------------------------------------------------- kernel against reference


@pytest.mark.parametrize("family", WITH_KERNEL, ids=lambda f: f.name)
def test_loss_curves_agree_step_by_step(family: Family) -> None:
    with record() as calls:
        ours = losses(family.build(KERNEL), family.pixels)
    assert calls and not any("reference" in call.backend for call in calls), "the kernel path did not run a kernel"
    theirs = losses(family.build(REFERENCE), family.pixels)
    assert theirs[-3:].mean() < theirs[:3].mean(), "nothing was learnt, so that agreeing says little"
    assert apart(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("backend", ["masked", "gather"])
def test_every_routing_backend_trains_alike(backend: str) -> None:
    family = BY_NAME["biformer"]
    other = replace(family, paths={**family.paths, KERNEL: {"routing_backend": backend}})
    ours, theirs = (losses(other.build(path), family.pixels) for path in (KERNEL, REFERENCE))
    assert apart(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("forgotten", ["rel_bias", "k"])
def test_a_wrong_gradient_shows(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that forgets the gradient of the keys, or only that of the bias table, misses the tolerance."""
    family, right = BY_NAME["nat"], neighborhood_attention

    def wrong(q: Any, k: Any, v: Any, window: Any, *, rel_bias: Any, **rest: Any) -> Any:
        given = {"k": k, "rel_bias": rel_bias}
        given[forgotten] = given[forgotten].detach()
        return right(q, given["k"], v, window, rel_bias=given["rel_bias"], **rest)

    wanted = losses(family.build(REFERENCE), family.pixels)
    monkeypatch.setattr(nat, "neighborhood_attention", wrong)
    assert apart(losses(family.build(KERNEL), family.pixels), wanted) > TOLERANCE


# ---------------------------------------------------------------- the benchmark


def test_pictures_are_split_evenly_and_always_alike() -> None:
    data = digits.pictures(16)
    assert len(data.train) + len(data.test) == 1797 and data.train.shape[1:] == (1, 16, 16)
    share = data.test_digits.bincount() / (data.test_digits.bincount() + data.train_digits.bincount())
    assert ((share - digits.HELD_OUT).abs() < 0.005).all()
    rows = {tuple(x.flatten().tolist()) for x in data.train}
    assert not any(tuple(x.flatten().tolist()) in rows for x in data.test), "a held-out picture is trained on"
    assert torch.equal(data.test, digits.pictures(16).test)
    once, again = (list(islice(digits.batches(data, 1), 2)) for _ in range(2))
    for (x, y), (x_again, y_again) in zip(once, again, strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)


def test_both_paths_start_from_the_same_weights() -> None:
    for family in WITH_KERNEL:
        ours, theirs = (family.build(path).state_dict() for path in (KERNEL, REFERENCE))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def short(family: Family) -> Family:
    return replace(family, epochs=1, pixels=16, small={**family.small, "patch_size": 4, "depth": 2})


def test_runs_are_kept_continued_and_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digits, "FAMILIES", (short(BY_NAME["nat_iso"]),))
    monkeypatch.setattr(digits, "BAR", 0.0)
    out = tmp_path / "rows.jsonl"
    asked: dict[str, Any] = {"only": (), "seconds": None, "out": out, "machine": MACHINE, "tick": lambda *_: None}
    assert digits.run(**asked) == (2, 0, 0)
    assert digits.run(**asked) == (0, 2, 0), "a run of the file was done again"
    ours, theirs = digits.read(out).values()
    assert (ours.path, theirs.path) == (KERNEL, REFERENCE) and ours.steps == len(ours.losses) == 44
    assert ours.backends.keys() != theirs.backends.keys()
    assert digits_table.apart(ours, theirs, STEPS) <= TOLERANCE

    monkeypatch.setattr(digits, "FAMILIES", (replace(short(BY_NAME["nat_iso"]), rate=1e-5),))
    assert not digits.read(out), "rows of other settings were mixed in"
    monkeypatch.setattr(digits, "BAR", 0.97)
    with pytest.raises(
        RuntimeError, match=r"below the bar of 97% held-out accuracy: nat_iso, kernel: .*; nat_iso, ref"
    ):
        digits.run(**asked)
    with pytest.raises(ValueError, match="--only nut leaves no family; known: nat_iso"):
        digits.run(**{**asked, "only": ("nut",)})


def test_the_figure_and_the_table_show_every_run(tmp_path: Path) -> None:
    def row(family: Family, path: str, accuracy: float) -> digits.Row:
        return digits.Row(
            variant=digits.variant(family, path), setting="", family=family.name, path=path, model=family.model,
            parameters=315_716, accuracy=accuracy, error=0.004, held_out=360, seconds=12.3, steps=3, backends={},
            losses=[2.0, 1.0, 0.5], hardware="a processor",
        )  # fmt: skip

    found = [row(f, path, 0.99) for f in FAMILIES for path in f.paths]
    found[0] = row(FAMILIES[0], KERNEL, 0.95)
    rows = {r.variant: r for r in found}
    text = digits_table.markdown(rows)
    assert len(text.splitlines()) == 2 + len(FAMILIES)
    assert "| nat | 0.32 M | 95.0% ± 0.4 ! | 99.0% ± 0.4 | 12 | 12 | < 1e-4 |" in text
    digits_table.draw(rows, tmp_path / "new" / "digits.png")
    assert (tmp_path / "new" / "digits.png").stat().st_size > 20_000
    with pytest.raises(ValueError, match="no row of the present settings"):
        digits_table.markdown({})


def test_every_family_has_reached_the_bar() -> None:
    """In the committed rows, with the present settings."""
    rows = digits.read(digits.ROWS)
    assert set(rows) == {digits.variant(f, path) for f, path in digits.runs()}
    for name, row in rows.items():
        assert row.accuracy >= digits.BAR, name
        assert row.losses[-1] < 0.5 * row.losses[0], name


def test_the_page_is_current(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("make_backbones", ROOT / "docs" / "make_backbones.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--check"]) == 0, capsys.readouterr().err
