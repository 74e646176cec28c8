"""Rows of a results file: one JSON object per line, complete in itself, appended as soon as it is known."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

import mmeff
from mmeff.report import environment

from .cases import Case
from .gate import Errors
from .timing import Timing
from .workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(__file__).resolve().parent / "results"

Key = tuple[str, str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: `backend` of ours with `peer` in one case on one machine. Times in seconds, memory in bytes.

    ratio is the peer's time over ours, paired within rounds, so that above 1 ours is faster. errors are (error, allowed) of the
    output and each gradient. A skipped row says why and holds no figures.
    """

    status: Literal["measured", "skipped"]
    reason: str | None = None
    case: str
    operator: str
    what: str
    direction: str
    dtype: str
    shape: dict[str, int]
    block: int | None = None
    density: float | None = None  # attended fraction of the query-key pairs
    block_density: float | None = None  # visited fraction of the blocks
    backend: str  # as asked for
    ran: str | None = None  # what "auto" took
    peer: str
    ours: dict[str, float] | None = None  # p20, p50, p80
    theirs: dict[str, float] | None = None
    ratio: dict[str, float] | None = None
    bar: float | None = None  # the ratio that is expected
    rounds: int | None = None
    calls: list[int] | None = None  # in one measurement, ours and theirs
    clock: str | None = None
    ours_bytes: int | None = None
    theirs_bytes: int | None = None
    errors: dict[str, list[float]] | None = None
    device: str  # "cpu" or "cuda"
    hardware: str  # the processor and its threads, or the GPU
    environment: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""

    @property
    def key(self) -> Key:
        """What makes a second measurement of the same thing unnecessary."""
        return (self.case, self.backend, self.peer, self.device, self.hardware)

    @property
    def bar_missed(self) -> bool:
        """Whether the median ratio is below what is expected."""
        return self.bar is not None and self.ratio is not None and self.ratio["p50"] < self.bar

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Machine:
    """Where and with what a run is made; the same for all its rows."""

    device: torch.device
    hardware: str
    environment: dict[str, str]
    commit: str | None

    @classmethod
    def here(cls, device: torch.device, commit: str | None = None) -> Machine:
        """Look around. `commit` is for places where git cannot tell."""
        if device.type == "cuda":
            torch.cuda.init()  # environment() names the GPU once it is in use
        found = environment()
        found["mmeff"] = mmeff.__version__
        if device.type == "cuda":
            found["cuda"] = str(torch.version.cuda)
            hardware = torch.cuda.get_device_name(device)
        else:
            hardware = f"{found['cpu']}, {found['threads']} thread{'s' * (found['threads'] != '1')}"
        return cls(device, hardware, found, commit or _commit())


def row(machine: Machine, case: Case, backend: str, peer: str, *, reason: str | None = None, **more: Any) -> Row:
    """Make a row of a case; without figures it is a skipped one, which needs a reason."""
    bar = case.bar[2] if case.bar is not None and case.bar[:2] == (backend, peer) else None
    return Row(
        status="skipped" if reason is not None else "measured", reason=reason, case=case.name, operator=case.operator,
        what=case.what, direction=case.direction, dtype=case.dtype, shape=case.shape,
        backend=backend, peer=peer, bar=bar,
        device=machine.device.type, hardware=machine.hardware, environment=machine.environment, commit=machine.commit,
        date=datetime.now(UTC).isoformat(timespec="seconds"), **more,
    )  # fmt: skip


def figures(work: Workload, timing: Timing, errors: Errors, ran: str | None) -> dict[str, Any]:
    """What a measured row holds beyond its case and its machine."""
    return {
        "block": work.block, "density": work.density, "block_density": work.block_density, "ran": ran, "ours": asdict(timing.ours),
        "theirs": asdict(timing.peer), "ratio": asdict(timing.ratio), "rounds": timing.rounds,
        "calls": list(timing.calls), "clock": timing.clock, "ours_bytes": timing.ours_bytes,
        "theirs_bytes": timing.peer_bytes, "errors": {name: list(pair) for name, pair in errors.items()},
    }  # fmt: skip


def read(path: Path) -> list[Row]:
    """Read a results file; one that does not exist has no rows.

    Raises: ValueError for a line that is no row, with its number.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, line {number}, is no row of a results file: {error}; pass a file that `python -m benchmarks "
                "kernels` wrote, or take the line out."
            ) from None
    return rows


def append(path: Path, new: Row) -> None:
    """Add a row at the end, on disk before the next case begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(new.to_json() + "\n")


def latest(rows: list[Row]) -> list[Row]:
    """Return the last row of each key, measured rather than skipped, in the order of first appearance."""
    found: dict[Key, Row] = {}
    for r in rows:
        if r.key not in found or r.status == "measured" or found[r.key].status == "skipped":
            found[r.key] = r
    return list(found.values())


def _commit() -> str | None:
    """The commit of the checkout, marked where the code differs from it; None where git cannot tell."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain", "--", "mmeff", "benchmarks/*.py") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*args: str) -> str:
    run = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True, timeout=10)
    return run.stdout.strip()
