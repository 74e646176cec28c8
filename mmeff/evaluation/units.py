"""What an evaluation is made of: samples, variants of a model, and the units that pair one with the other.

A unit of work is (sample id, hash of the methods): it is done once, recorded once, and skipped when a run is resumed. What a
model has to offer is the `Model` protocol: `prepare` on the processor, `run` on the accelerator. A `Job` says everything a
worker needs in plain data, so that it starts in this process, in another one or on another machine alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mmeff.config import MethodConfig
from mmeff.errors import MmeffError
from mmeff.evaluation.comparison import variant_names
from mmeff.evaluation.run_folder import to_plain
from mmeff.video_io import replacing

CONFIG = "run.json"  # what the run in a folder is; written once, compared when the run is resumed
DENSE = "dense"


class OtherRun(MmeffError, ValueError):
    """A folder holds a run with another configuration than the one that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the model: the methods installed together, in order; none of them is the dense model.

    `name` is for people; `hash` is what units are known by, and depends on the resolved configs alone.
    """

    name: str
    methods: tuple[MethodConfig, ...] = ()

    @property
    def hash(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the resolved configs."""
        return digest([m.to_dict() for m in self.methods])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"name": self.name, "hash": self.hash, "methods": [m.to_dict() for m in self.methods]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Variant:
        """The inverse of `to_dict`."""
        from mmeff.registry import build

        return cls(name=values["name"], methods=tuple(build(m) for m in values["methods"]))


def variants(methods: Sequence[Any], *, dense: bool = True) -> tuple[Variant, ...]:
    """Name the variants of a run: the dense model first, then one per entry.

    Args:
        methods: each a config, its class, its name, or a list of those that are installed together.
        dense: whether the model is also run as it is.
    Raises:
        ValueError: nothing to run, or the same methods twice. UnknownMethod, TypeError: as `mmeff.registry.build`.
    """
    from mmeff.registry import build

    stacks = [tuple(build(m) for m in (entry if isinstance(entry, list | tuple) else [entry])) for entry in methods]
    alone = [stack[0] for stack in stacks if len(stack) == 1]
    names = dict(zip(map(id, alone), variant_names(alone), strict=True))
    found = [Variant(name=DENSE)] if dense else []
    for stack in stacks:
        if not stack:
            raise ValueError("a variant must hold at least one method, got an empty list; pass dense=True instead")
        name = names[id(stack[0])] if len(stack) == 1 else " + ".join(m.name() for m in stack)
        found.append(Variant(name=name, methods=stack))
    if not found:
        raise ValueError("an evaluation needs at least one variant, got no method and dense=False")
    hashes = [v.hash for v in found]
    if len(set(hashes)) != len(hashes):
        raise ValueError(f"an evaluation got the same methods twice: {', '.join(v.name for v in found)}")
    taken: dict[str, int] = {}
    for i, v in enumerate(
        found
    ):  # stacks of the same methods with other fields share their name; the hash tells them apart
        taken[v.name] = taken.get(v.name, 0) + 1
        if taken[v.name] > 1:
            found[i] = Variant(name=f"{v.name} ({v.hash[:6]})", methods=v.methods)
    return tuple(found)


# ---------------------------------------------------------------- what a model offers


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A sample made ready for the model. `value` is whatever its `run` takes; `frames` says which frames were read, one mapping
    per medium, such as `{"path": "clip.mp4", "indices": [0, 12, 24], "backend": "pyav"}`."""

    value: Any
    frames: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one sample.

    Fields: `text` an answer; `video` frames (T, H, W, 3), uint8 or float in [0, 1], at `fps` frames per second; `tokens` counts;
    `seconds` by phase; `report` a summary of what the method did, as plain data.
    """

    text: str | None = None
    video: Any = None
    fps: float = 8
    tokens: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)


class Model(Protocol):
    """A model as the runner sees it."""

    def prepare(self, sample: Any) -> Prepared:
        """Read and transform what a sample needs, on the processor. Called from several threads at a time."""

    def run(self, prepared: Sequence[Prepared], methods: Sequence[MethodConfig]) -> Sequence[Outcome]:
        """One outcome per prepared sample, in order, with the methods installed; none of them is the dense model."""


@dataclass(frozen=True, kw_only=True)
class Factory:
    """How to build an object in any process: a function as "package.module:function", and its keyword arguments as plain data."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """Call the function. Raises: ValueError where there is none of that name; else what the function raises."""
        module, colon, name = self.function.partition(":")
        if not colon:
            raise ValueError(f"Factory.function must be 'package.module:function', got {self.function!r}")
        found = getattr(import_module(module), name, None)
        if not callable(found):
            raise ValueError(f"Factory.function must name a function, and {module} has none called {name!r}")
        return found(**self.arguments)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"function": self.function, "arguments": to_plain(self.arguments, "arguments")}


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How a worker goes about its work. Nothing here decides what comes out, so a run may be resumed with other values.

    Fields: `batch` samples that the model sees at a time; `prefetch` samples that are ready or being read ahead of the model;
    `readers` threads that read; `read_timeout` seconds until a sample that is being read is given up; `threads` of PyTorch in
    each worker, None leaves them as they are; `restarts` how often a sample may take its worker down, alone, until it is given up.

    Numerics: padding and kernels depend on the batch, and sums on the threads, in the last bits. Keep both for equal bits.
    """

    batch: int = 1
    prefetch: int = 4
    readers: int = 2
    read_timeout: float = 300.0
    threads: int | None = None
    restarts: int = 2

    def __post_init__(self) -> None:
        for name in ("batch", "prefetch", "readers", "restarts"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"Pace.{name} must be an integer >= 1, got {getattr(self, name)!r}")
        if not self.read_timeout > 0:
            raise ValueError(f"Pace.read_timeout must be > 0 seconds, got {self.read_timeout!r}")
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise ValueError(f"Pace.threads must be an integer >= 1, or None, got {self.threads!r}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a worker needs, as plain data: where to write, how to build model and dataset, and what to run."""

    out: str
    model: Factory
    dataset: Factory
    variants: tuple[Variant, ...]
    pace: Pace = field(default_factory=Pace)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        return {
            "out": self.out, "model": self.model.to_dict(), "dataset": self.dataset.to_dict(),
            "variants": [v.to_dict() for v in self.variants], "pace": asdict(self.pace),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """A job from plain data."""
        return cls(
            out=values["out"], model=Factory(**values["model"]), dataset=Factory(**values["dataset"]),
            variants=tuple(Variant.from_dict(v) for v in values["variants"]), pace=Pace(**values["pace"]),
        )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Samples that go through the model together: pairs of a sample's index and the variants, by position, that it still needs.

    Which samples share a batch follows from the dataset alone (`number` counts batches), so that who runs a batch, and after how
    many interruptions, does not change what comes out of it.
    """

    number: int
    todo: tuple[tuple[int, tuple[int, ...]], ...]

    def alone(self) -> list[Task]:
        """One task per sample."""
        return [Task(self.number, (one,)) for one in self.todo]


# ---------------------------------------------------------------- the configuration of a run


def configuration(job: Job, dataset: Any) -> dict[str, Any]:
    """What decides the results of a run: the model, the content of the dataset, and the methods."""
    return {
        "model": job.model.to_dict(),
        "dataset": {"name": dataset.name, "digest": dataset.digest, "samples": len(dataset)},
        "variants": [v.to_dict() for v in job.variants],
    }


def guard(folder: Path, config: Mapping[str, Any]) -> bool:
    """Claim a folder for a run, or make sure that it is this run's.

    Args: folder: made if it is missing. config: plain data that decides the results.
    Returns: whether the folder held the run already.
    Raises:
        OtherRun: it holds another one; the message lists every value that differs.
        NotADirectoryError, PermissionError: it cannot be used.
    """
    blocking = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if blocking is not None:
        raise NotADirectoryError(f"cannot use {folder} as output folder: {blocking} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PermissionError(f"cannot make the output folder {folder}: {error.strerror}") from error
    path = folder / CONFIG
    wanted = json.loads(json.dumps(to_plain(config)))
    resumed = path.exists()
    if not resumed:
        with replacing(path) as partial:  # ranks that start together write the same; one that differs is refused below
            partial.write_text(json.dumps(wanted, indent=1, ensure_ascii=False) + "\n", "utf-8")
    differing = differences(read_config(folder), wanted)
    if differing:
        listed = "\n".join(f"  {line}" for line in differing[:20])
        more = f"\n  and {len(differing) - 20} more" if len(differing) > 20 else ""
        raise OtherRun(
            f"{folder} holds a run with another configuration, so this one cannot continue it:\n{listed}{more}\n"
            "Use the values of the folder, or another output folder."
        )
    return resumed


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of the run in a folder. Raises: FileNotFoundError where there is none; OtherRun for a damaged file."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no evaluation: there is no {CONFIG} in it; `mmeff eval` writes one")
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise OtherRun(
            f"{path} is damaged ({error}), so it is not known what its run was; use another folder"
        ) from error
    if not isinstance(values, dict):
        raise OtherRun(f"{path} must hold a mapping, got {type(values).__name__}; it is not a run of this library")
    return values


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Say where two values of plain data differ, one line per place."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            place = f"{where}.{key}" if where else str(key)
            if key not in new:
                lines.append(f"{place}: {_short(old[key])} in the folder, absent now")
            elif key not in old:
                lines.append(f"{place}: absent in the folder, {_short(new[key])} now")
            else:
                lines += differences(old[key], new[key], place)
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{where}[{i}]")
        ]
    return [] if old == new and type(old) is type(new) else [f"{where}: {_short(old)} in the folder, {_short(new)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that plain data is known by."""
    text = json.dumps(to_plain(value), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
