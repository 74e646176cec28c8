"""What sparse attention costs in quality: every method on the tiny video model, against dense, on the same prompts and noise.

A variant is a method with a setting and a stable name. Prompts are drawn and generated in batches of `BATCH`; batch i is a
pure function of i, so that two processes share the work by batches and a run that was stopped goes on where it stopped.
`run` appends a row per prompt and variant; `summarise` makes means and standard errors of them. All of a clip is judged in
24 x 24 cells, the 2 x 2 averages of its pixels: the codec keeps no more, and the detector looks at the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

import mmeff
from mmeff.config import option
from mmeff.diffusion_attn._base import Grid, SparseAttention
from mmeff.diffusion_attn._ordered import KernelLayout, OrderedLayout
from mmeff.diffusion_attn.gna import GNA
from mmeff.diffusion_attn.radial import Radial
from mmeff.diffusion_attn.rectified import RectifiedSpaAttn
from mmeff.diffusion_attn.sliding_tile import SlidingTile
from mmeff.diffusion_attn.vmoba import VMoBA
from mmeff.evaluation.metrics import background_corrected_psnr, background_shift, psnr, ssim
from mmeff.kernels import BlockLayout
from mmeff.kernels.permute import Permutation, gilbert_permutation
from mmeff.tiny import clips, data_folder, video_pipeline

from .results import FOLDER, ROOT, Machine

ROWS, SUMMARY = FOLDER / "quality.jsonl", FOLDER / "quality-summary.jsonl"
CACHE = ROOT / "runs" / "quality"  # dense clips, 2 MB a batch; outside git

SEED = 6_000  # a split of its own: no setting was chosen by looking at its prompts
OTHER_NOISE = 500_000  # added to the noise seeds of the floor
BATCH = 16  # prompts per call of the pipeline
STEPS, GUIDANCE = 20, 2.0
DENSE_STEPS = 5  # of STEPS, in every variant

DETECTOR = ("found", "colour", "shape", "direction", "all")
CLOSENESS = ("psnr", "corrected", "ssim", "drift")
DENSE = "dense"

CANNOT_TELL = """\
What this table cannot tell:

* It ranks no method for a real model. This one has 1.1 M parameters and 324 tokens, and runs in blocks of 4 tokens where real
  ones take 64 or 128. A mean over 4 tokens lies closer to each of them than a mean over 128, which favours rectification.
* A table of positions fixes the coarse layout of every clip, so the model leans less on far tokens than a real one: windows
  look better here than they should.
* The clips hold one shape over one flat colour. There is no texture, no camera motion and no change of scene to lose, and a
  shift of the flat colour decides raw PSNR: read it with the corrected PSNR and the detector, never alone.
* PSNR and SSIM say how far a clip is from the dense one of the same noise. A clip can be far and as good: "dense, other
  noise" is what the dense model itself scores against its own clips from other noise.
* The detector picks among six colours, three shapes and four directions; it does not see flicker or soft edges.
* One model, trained once with one seed; standard errors are over prompts and noise alone, and 0 where all clips agree."""


# ---------------------------------------------------------------- variants


@dataclass(frozen=True, kw_only=True)
class RandomAttention(SparseAttention):
    """Control: random key blocks, fresh in every call and for every head; the diagonal always. No method of the library.

    Blocks are those of RectifiedSpaAttn, runs along the curve, so that only the choice differs.
    """

    dynamic: ClassVar[bool] = True

    share: float = option(0.25, "visited share of the key blocks, the diagonal included", unit="ratio")
    block: int = option(4, "tokens in a block", unit="tokens")
    seed: int = option(0, "of the draws; calls of one config continue one stream")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.share <= 1, "share", "be in (0, 1]")
        object.__setattr__(self, "_draws", torch.Generator().manual_seed(self.seed))  # no field: it is state

    def check_grid(self, grid: Grid, text_len: int = 0) -> None:
        super().check_grid(grid, text_len)
        if text_len:
            raise ValueError(f"RandomAttention serves video alone, got text_len={text_len}; pass a grid without text.")

    def layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> BlockLayout:
        """Raise TypeError: blocks along the curve are not blocks of the video."""
        raise TypeError("RandomAttention has no layout in the order of the video; kernel_layout(grid=..., q=...) has.")

    def kernel_layout(
        self, *, grid: Grid, text_len: int = 0, q: Tensor | None = None, k: Tensor | None = None, layer: int = 0
    ) -> KernelLayout:
        """Draw the blocks of one call. Raises ValueError without q, which says how many samples and heads there are."""
        self.check_grid(grid, text_len)
        if q is None:
            raise ValueError("RandomAttention draws for every sample and head; pass q=....")
        tokens = math.prod(grid)
        blocks = -(-tokens // self.block)
        scores = torch.rand(q.shape[0], q.shape[2], blocks, blocks, generator=cast(Any, self)._draws)
        scores.diagonal(dim1=-2, dim2=-1).fill_(2.0)
        picked = scores.topk(max(1, int(self.share * blocks)), -1).indices
        mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, picked, True)
        layout = BlockLayout.from_block_mask(mask, q_len=tokens, kv_len=tokens, q_block=self.block, kv_block=self.block)
        return OrderedLayout.of(layout, _curve(grid)).to(q.device)


@lru_cache(maxsize=4)
def _curve(grid: Grid) -> Permutation:
    with torch.inference_mode(False):
        return gilbert_permutation(grid, (2, 1, 0))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of the table.

    `family` is its curve in the figure; method None is dense; `noise` is added to the noise seeds; `twin` names the variant
    with the same choice of blocks and no rectification.
    """

    name: str
    family: str
    method: SparseAttention | None = None
    noise: int = 0
    twin: str | None = None

    @property
    def setting(self) -> str:
        """Digest of everything that decides the clips of this variant; rows of another one are never mixed in."""
        method = self.method and self.method.to_dict()
        parts = [method, self.noise, SEED, BATCH, STEPS, GUIDANCE, _weights()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def variants() -> list[Variant]:
    """All lines of the table in its order. Numbers in names are nominal densities in percent; rows hold the measured ones."""
    when: dict[str, Any] = {"dense_steps": DENSE_STEPS, "dense_layers": 0}
    runs: dict[str, Any] = {"p_threshold": 0.0, "block": 4, "first_frame": False, "neighbours": False}
    radial: dict[str, Any] = {"block": 4, **when}
    tiles: dict[str, Any] = {"tile": (1, 2, 2), "dense_steps": DENSE_STEPS}
    # half a frame, a column two wide through all frames, boxes of 12 tokens: 18, 18 and 27 chunks of 9 x 6 x 6
    chunks: dict[str, Any] = {"chunks": ((0.5,), (1, 2), (3, 2, 2)), "dense_steps": DENSE_STEPS}
    found = [
        Variant(name=DENSE, family=DENSE),
        Variant(name="dense, other noise", family="floor", noise=OTHER_NOISE),
        Variant(name="radial-70", family="Radial", method=Radial(decay=1.0, drop_below=16, **radial)),
        Variant(name="radial-48", family="Radial", method=Radial(decay=0.2, drop_below=32, **radial)),
        Variant(name="radial-21", family="Radial", method=Radial(decay=0.2, drop_below=64, **radial)),
        Variant(name="gna-54", family="GNA", method=GNA(window=(7, 5, 5), **tiles)),
        Variant(name="gna-25", family="GNA", method=GNA(window=(5, 4, 4), stride=(1, 2, 2), **tiles)),
        Variant(name="gna-15", family="GNA", method=GNA(window=(3, 4, 4), stride=(1, 2, 2), **tiles)),
        Variant(name="slidingtile-56", family="SlidingTile", method=SlidingTile(window=(5, 3, 3), **tiles)),
        Variant(name="slidingtile-25", family="SlidingTile", method=SlidingTile(window=(5, 2, 2), **tiles)),
        Variant(name="slidingtile-15", family="SlidingTile", method=SlidingTile(window=(3, 2, 2), **tiles)),
        Variant(name="vmoba-threshold", family="VMoBA", method=VMoBA(threshold=0.25, **chunks)),
        Variant(name="vmoba-50", family="VMoBA", method=VMoBA(top_k=(9, 9, 13), **chunks)),
        Variant(name="vmoba-25", family="VMoBA", method=VMoBA(top_k=(4, 4, 7), **chunks)),
        Variant(name="vmoba-12", family="VMoBA", method=VMoBA(top_k=(2, 2, 3), **chunks)),
    ]
    for percent, kept in ((50, 0.5), (25, 0.25), (12, 0.125)):
        top, control = f"topk-{percent}", RandomAttention(share=kept, dense_steps=DENSE_STEPS)
        found += [
            Variant(name=top, family="top-k", method=RectifiedSpaAttn(drop=1 - kept, rectify=False, **runs, **when)),
            Variant(name=f"rectified-{percent}", family="top-k", twin=top, method=RectifiedSpaAttn(drop=1 - kept, **runs, **when)),
            Variant(name=f"random-{percent}", family="random", method=control),
        ]  # fmt: skip
    bases = {v.name: v for v in found}
    for name in ("radial-48", "radial-21", "gna-54", "gna-25"):
        method = RectifiedSpaAttn(base=bases[name].method, **when)
        found.append(Variant(name=f"{name}-rectified", family=bases[name].family, method=method, twin=name))
    return found


@cache
def _weights() -> str:
    files = sorted((data_folder() / "tiny-video" / "transformer").glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Score:
    """One clip. The closeness to dense is None for dense itself, and for a PSNR that is infinite."""

    variant: str
    setting: str
    prompt: int
    density: float | None  # attended share of the pairs where the method acted; mean over the batch
    found: int
    colour: int
    shape: int
    direction: int
    psnr: float | None
    corrected: float | None
    ssim: float | None
    drift: float | None

    @property
    def all(self) -> int:
        """Whether everything is right."""
        return self.colour * self.shape * self.direction


def read(path: Path, which: Sequence[Variant]) -> dict[str, dict[int, Score]]:
    """The last row of every variant and prompt; rows of other settings are left out.

    Raises: ValueError for a line that is no row, with its number.
    """
    settings = {v.name: v.setting for v in which}
    rows: dict[str, dict[int, Score]] = {v.name: {} for v in which}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            row = Score(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}, is no row of quality: {error}; take the line out.") from None
        if settings.get(row.variant) == row.setting:
            rows[row.variant][row.prompt] = row
    return rows


def _append(path: Path, rows: Iterable[Score]) -> None:
    """Add the rows of a batch in one write, which two processes cannot interleave."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(row), separators=(",", ":"), allow_nan=False) + "\n" for row in rows)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())


# ---------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where and how much. `shard` (i, n): batches i - 1, i - 1 + n, ...; `seconds`: no batch of a variant begins later."""

    prompts: int = 256
    only: tuple[str, ...] = ()
    seconds: float | None = None
    shard: tuple[int, int] = (1, 1)
    out: Path = ROWS
    cache: Path = CACHE


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did, in batches of a variant; `seconds` of processor time per prompt of each variant, metrics included."""

    done: int
    done_before: int
    left: int
    seconds: dict[str, float]


def chosen(only: Sequence[str]) -> list[Variant]:
    """The variants whose name holds one of the texts, or all. Raises ValueError where none does."""
    found = [v for v in variants() if not only or any(text in v.name for text in only)]
    if not found:
        raise ValueError(f"--only {' '.join(only)} leaves no variant; known: {', '.join(v.name for v in variants())}")
    return found


def run(options: Options, tick: Callable[[str, int, int], None]) -> Outcome:
    """Generate and judge what the file does not hold yet, batch by batch, so that a run cut short is fair to all variants.

    Raises: ValueError for no prompts, an impossible shard, or texts that leave no variant.
    """
    part, parts = options.shard
    if options.prompts < 1 or not 1 <= part <= parts:
        raise ValueError(
            f"--prompts must be >= 1 and --shard i/n with 1 <= i <= n, got {options.prompts} and {part}/{parts}; 1/2 and 2/2 "
            "share the work of two processes"
        )
    which = chosen(options.only)
    have = read(options.out, which)
    work, before = [], 0
    for index in range(part - 1, -(-options.prompts // BATCH), parts):
        prompts = range(index * BATCH, min((index + 1) * BATCH, options.prompts))
        for variant in which:
            if have[variant.name].keys() >= set(prompts):
                before += 1
            else:
                work.append((index, len(prompts), variant))
    began, done = time.perf_counter(), 0
    spent: dict[str, list[float]] = defaultdict(list)
    pipeline = video_pipeline() if work else None
    for index, count, variant in work:
        if options.seconds is not None and time.perf_counter() - began > options.seconds:
            break
        tick(f"batch {index}: {variant.name}", done, len(work))
        dense = dense_clips(pipeline, index, count, options.cache)
        started = time.process_time()
        _append(options.out, judge(pipeline, variant, index, count, dense))
        spent[variant.name].append((time.process_time() - started) / count)
        done += 1
    seconds = {name: float(np.mean(values)) for name, values in spent.items()}
    return Outcome(done=done, done_before=before, left=len(work) - done, seconds=seconds)


def batch(index: int) -> clips.ClipLabels:
    """The labels of the prompts [BATCH * index, BATCH * (index + 1))."""
    return clips.sample(SEED, index, BATCH, frames=1, pooled=True)[1]


def generate(pipeline: Any, index: int, count: int, noise: int = 0) -> np.ndarray:
    """The first `count` clips of a batch in cells, float32 (count, 17, 24, 24, 3)."""
    seeds = [SEED + noise + index * BATCH + i for i in range(count)]
    videos = pipeline(
        batch(index).prompts()[:count], height=clips.SIZE, width=clips.SIZE, num_frames=clips.FRAMES,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).frames  # fmt: skip
    half = clips.SIZE // 2
    return cast(np.ndarray, videos.reshape(count, clips.FRAMES, half, 2, half, 2, 3).mean((3, 5), dtype=np.float32))


def dense_clips(pipeline: Any, index: int, count: int, folder: Path) -> np.ndarray:
    """The dense clips of a batch, generated once and kept in `folder`."""
    path = folder / f"dense-{Variant(name=DENSE, family=DENSE).setting}-{index}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.save(file, generate(pipeline, index, count))
        partial.replace(path)
    return cast(np.ndarray, np.load(path))


def judge(pipeline: Any, variant: Variant, index: int, count: int, dense: np.ndarray) -> list[Score]:
    """Generate a batch with a variant, and score each clip.

    Raises: RuntimeError if the method fell back to dense: its figures would be those of something else.
    """
    density = None
    if variant.name == DENSE:
        videos = dense
    elif variant.method is None:
        videos = generate(pipeline, index, count, variant.noise)
    else:
        method = variant.method
        if isinstance(method, RandomAttention):  # a batch must not depend on which ran before it
            method = method.replace(seed=SEED + index)
        with mmeff.accelerate(pipeline, method) as handle:
            videos = generate(pipeline, index, count, variant.noise)
            report = handle.report()
        if report.fallbacks or report.density is None:
            raise RuntimeError(f"{variant.name} did not run as it should: {report}")
        density = _rounded(report.density)
    seen, labels = clips.detect(videos), batch(index)
    right = {name: seen.found & (getattr(seen, name) == getattr(labels, name)[:count]) for name in DETECTOR[1:4]}
    return [
        Score(
            variant=variant.name, setting=variant.setting, prompt=index * BATCH + i, density=density,
            found=int(seen.found[i]), **{name: int(hit[i]) for name, hit in right.items()},
            **(dict.fromkeys(CLOSENESS) if variant.name == DENSE else closeness(dense[i], videos[i])),
        )
        for i in range(count)
    ]  # fmt: skip


def closeness(dense: np.ndarray, video: np.ndarray) -> dict[str, Any]:
    """The figures of CLOSENESS for one clip."""
    return {
        "psnr": _rounded(psnr(dense, video).mean),
        "corrected": _rounded(background_corrected_psnr(dense, video).mean),
        "ssim": _rounded(ssim(dense, video).mean),
        "drift": _rounded(background_shift(dense, video)),
    }


def _rounded(value: float) -> float | None:
    """Five digits say more than the figures mean; an infinite PSNR is None."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One variant over its prompts. Figures are (mean, standard error), None where there are none.

    against_twin: for a rectified variant, over the prompts that both have: `drift_ratio`, its mean drift over the twin's, and
    the mean difference (rectified - twin) of every other figure.
    """

    variant: str
    family: str
    twin: str | None
    method: dict[str, Any] | None
    setting: str
    prompts: int
    density: float | None
    figures: dict[str, list[float] | None]
    against_twin: dict[str, list[float]] | None
    environment: dict[str, str]
    commit: str | None
    date: str


def summarise(path: Path, machine: Machine) -> list[Summary]:
    """Means and standard errors of every variant that has at least two prompts.

    Raises: ValueError if none has.
    """
    which = variants()
    rows = read(path, which)
    found = []
    for variant in which:
        mine = rows[variant.name]
        if len(mine) < 2:
            continue
        densities = [r.density for r in mine.values() if r.density is not None]
        found.append(Summary(
            variant=variant.name, family=variant.family, twin=variant.twin,
            method=None if variant.method is None else variant.method.to_dict(), setting=variant.setting, prompts=len(mine),
            density=float(np.mean(densities)) if densities else None,
            figures={name: _mean([getattr(r, name) for r in mine.values()]) for name in (*DETECTOR, *CLOSENESS)},
            against_twin=_against(mine, rows[variant.twin]) if variant.twin else None,
            environment=machine.environment, commit=machine.commit,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        ))  # fmt: skip
    if not found:
        raise ValueError(f"{path} holds no variant with two prompts; run `python -m benchmarks quality` first")
    return found


def _mean(values: Iterable[float | None]) -> list[float] | None:
    x = np.array([v for v in values if v is not None], dtype=np.float64)
    return None if len(x) < 2 else [float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))]


def _against(mine: dict[int, Score], twin: dict[int, Score]) -> dict[str, list[float]] | None:
    both = sorted(mine.keys() & twin.keys())
    if len(both) < 2:
        return None
    found = {}
    for name in (*DETECTOR, "psnr", "corrected", "ssim"):
        pairs = [(getattr(mine[i], name), getattr(twin[i], name)) for i in both]
        difference = _mean(a - b for a, b in pairs if a is not None and b is not None)
        if difference is not None:
            found[name] = difference
    a, b = (np.array([side[i].drift for i in both], dtype=np.float64) for side in (mine, twin))
    if b.mean() > 0:
        ratio = a.mean() / b.mean()  # of means, and its standard error by the delta method
        found["drift_ratio"] = [ratio, float((a - ratio * b).std(ddof=1) / math.sqrt(len(both)) / b.mean())]
    return found


def write_summary(summaries: Iterable[Summary], path: Path) -> None:
    """Replace the file: its rows are derived from the scores, which stay."""
    path.write_text("".join(json.dumps(asdict(s), ensure_ascii=False, allow_nan=False) + "\n" for s in summaries))


def markdown(summaries: Sequence[Summary]) -> str:
    """The table, rectification against none, and what neither can tell."""
    labels = {"psnr": "PSNR, dB", "corrected": "background-corrected, dB", "ssim": "SSIM", "drift": "background drift"}
    digits = {"psnr": 2, "corrected": 2, "drift": 4}
    names: tuple[str, ...] = (*DETECTOR, *CLOSENESS)
    lines = [
        f"Means and standard errors over prompts; {STEPS} steps, the first {DENSE_STEPS} dense, guidance {GUIDANCE:g}. Density is "
        "the attended share of the pairs in the other steps, as measured.\n",
        *_head("variant", "prompts", "density", *(labels.get(name, name) for name in names)),
    ]
    for s in summaries:
        density = "" if s.density is None else f"{s.density:.3f}"
        cells = [_cell(s.figures[name], digits.get(name, 3)) for name in names]
        lines.append(f"| {' | '.join([s.variant, str(s.prompts), density, *cells])} |")
    pairs = [s for s in summaries if s.against_twin]
    if pairs:
        names = ("drift_ratio", "all", "psnr", "corrected", "ssim")
        lines.append("\nRectification against none, paired by prompt: drift as a ratio, the others as differences.\n")
        lines += _head("variant", "against", "drift ratio", *(labels.get(name, name) for name in names[1:]))
        for s in pairs:
            cells = [_cell((s.against_twin or {}).get(name), digits.get(name, 3)) for name in names]
            lines.append(f"| {' | '.join([s.variant, str(s.twin), *cells])} |")
    return "\n".join([*lines, "", CANNOT_TELL])


def _head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]


def _cell(figure: Sequence[float] | None, digits: int) -> str:
    return "" if figure is None else f"{figure[0]:.{digits}f} ± {figure[1]:.{digits}f}"
