"""What sparse attention costs in quality: every method on the tiny video model, against dense, on the same prompts and noise.

A variant is a method with a setting and a stable name. Prompts are drawn and generated in batches of `BATCH`; batch i is a
pure function of i, so that two processes share the work by batches and a run that was stopped goes on where it stopped.
`run` appends a row per prompt and variant; `quality_table` makes means and standard errors of them. All of a clip is judged in
24 x 24 cells, the 2 x 2 averages of its pixels: the codec keeps no more, and the detector looks at the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
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

from . import scored
from .results import FOLDER, ROOT

ROWS, SUMMARY = FOLDER / "quality.jsonl", FOLDER / "quality-summary.jsonl"
CACHE = ROOT / "runs" / "quality"  # dense runs, 12 MB a batch; outside git

SEED = 6_000  # a split of its own: no setting was chosen by looking at its prompts
OTHER_NOISE = 500_000  # added to the noise seeds of the floor
BATCH = 16  # prompts per call of the pipeline
STEPS, GUIDANCE = 20, 2.0
DENSE_STEPS = 5  # of STEPS, in every variant

DETECTOR = ("found", "colour", "shape", "direction", "all")
CLOSENESS = ("psnr", "corrected", "ssim", "drift")
DENSE = "dense"


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
    return scored.read(path, "quality", Score, {v.name: v.setting for v in which}, lambda row: row.prompt)


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
        dense = dense_run(pipeline, index, count, options.cache)
        started = time.process_time()
        scored.append(options.out, judge(pipeline, variant, index, count, dense))
        spent[variant.name].append((time.process_time() - started) / count)
        done += 1
    seconds = {name: float(np.mean(values)) for name, values in spent.items()}
    return Outcome(done=done, done_before=before, left=len(work) - done, seconds=seconds)


def batch(index: int) -> clips.ClipLabels:
    """The labels of the prompts [BATCH * index, BATCH * (index + 1))."""
    return clips.sample(SEED, index, BATCH, frames=1, pooled=True)[1]


@contextmanager
def opening(pipeline: Any, outputs: list[Tensor]) -> Iterator[None]:
    """Inside the block, the forwards of the first DENSE_STEPS steps give `outputs`, or fill them where the list is empty.

    Those steps are dense in every variant and begin with the same noise: computing them once per batch changes no bit.
    """
    model, stored, calls = pipeline.transformer, bool(outputs), iter(range(2 * DENSE_STEPS))  # two branches of guidance
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        at = next(calls, None)
        if at is not None and stored:
            return (outputs[at],)
        found = inner(*args, **kwargs)
        if at is not None:
            outputs.append(found[0])
        return cast(tuple[Tensor], found)

    own = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


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


@dataclass(frozen=True)
class DenseRun:
    """The dense clips of a batch, and what the transformer gave in the steps that all variants share."""

    clips: np.ndarray
    outputs: list[Tensor]


def dense_run(pipeline: Any, index: int, count: int, folder: Path) -> DenseRun:
    """The dense run of a batch, made once and kept in `folder`."""
    path = folder / f"dense-{Variant(name=DENSE, family=DENSE).setting}-{index}-{count}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        outputs: list[Tensor] = []
        with opening(pipeline, outputs):
            videos = generate(pipeline, index, count)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"clips": torch.from_numpy(np.ascontiguousarray(videos)), "outputs": torch.stack(outputs)}, partial)
        partial.replace(path)
    stored = load_file(path)
    return DenseRun(stored["clips"].numpy(), list(stored["outputs"]))


def judge(pipeline: Any, variant: Variant, index: int, count: int, dense: DenseRun) -> list[Score]:
    """Generate a batch with a variant, and score each clip.

    Raises: RuntimeError if the method fell back to dense: its figures would be those of something else.
    """
    density = None
    if variant.name == DENSE:
        videos = dense.clips
    elif variant.method is None:
        videos = generate(pipeline, index, count, variant.noise)
    else:
        method = variant.method
        if isinstance(method, RandomAttention):  # a batch must not depend on which ran before it
            method = method.replace(seed=SEED + index)
        with mmeff.accelerate(pipeline, method) as handle, opening(pipeline, list(dense.outputs)):
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
            **(dict.fromkeys(CLOSENESS) if variant.name == DENSE else closeness(dense.clips[i], videos[i])),
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
