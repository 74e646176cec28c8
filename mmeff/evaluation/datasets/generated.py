"""The generated scenes and motions as datasets: pictures and clips of coloured shapes, each with one question.

Nothing is stored: sample i of a seed is the same on every machine, and its picture or clip is drawn when it is read. Where
files are wanted, to exercise decoding as well, `files` names a folder that they are written into at first use.

Sample i is item i % BATCH of batch i // BATCH of `mmeff.tiny.scenes.sample` or `mmeff.tiny.motions.sample`; its question is
the first that is drawn for it, as in `mmeff.evaluation.questions`.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmeff.evaluation.samples import Media, Sample
from mmeff.tiny import motions, scenes

BATCH = 16  # what is drawn together; a part of every sample's definition
FPS = 8.0  # of a clip of motions: its eight frames last a second
VERSION = 1  # goes into the digest; raise it when the generators draw something else
DRAWN = ("scenes", "motions")


def open_scenes(
    *, count: int = 256, seed: int = scenes.PRUNING_SEED, files: str | os.PathLike[str] | None = None
) -> Generated:
    """Pictures of two to five shapes, with a question each.

    Args:
        count: samples. seed: the split; any but the training seed of the tiny models.
        files: a folder for the pictures as PNG; None draws them in memory.
    """
    return Generated("scenes", count=count, seed=seed, files=files)


def open_motions(
    *, count: int = 256, seed: int = motions.PRUNING_SEED, files: str | os.PathLike[str] | None = None
) -> Generated:
    """Clips of eight frames with one to three moving shapes, with a question each; see `open_scenes`.

    Args:
        files: a folder for the clips as mp4, which changes their pixels a little; None draws them in memory.
    """
    return Generated("motions", count=count, seed=seed, files=files)


class Generated:
    """A dataset that is drawn sample by sample; the samples of a batch are drawn together.

    Raises: ValueError: a count that is not positive, a negative seed, or the seed that the tiny models were trained on.
        FileNotFoundError: the folder that `files` lies in does not exist.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, kind: str, *, count: int, seed: int, files: str | os.PathLike[str] | None = None) -> None:
        for name, value, least in (("count", count, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} of {kind} must be an integer of at least {least}, got {value!r}")
        trained = {"scenes": scenes.TRAIN_SEED, "motions": motions.TRAIN_SEED}[kind]
        if seed == trained:
            raise ValueError(f"seed {seed} of {kind} is what the tiny models were trained on; pass any other")
        self.name, self.count, self.seed = kind, count, seed
        self.files = None if files is None else Path(files)
        if self.files is not None:
            if not self.files.absolute().parent.is_dir():
                raise FileNotFoundError(f"files of {kind} must be a folder in one that exists, got {self.files}")
            self.files.mkdir(exist_ok=True)

    @property
    def digest(self) -> str:
        words = f"{self.name} {VERSION} {BATCH} seed {self.seed} count {self.count} files {self.files is not None}"
        return hashlib.sha256(words.encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        index = range(self.count)[index]
        text, answer, kind = _asked(self.name, self.seed, index // BATCH)[index % BATCH]
        path = f"{self.name}://{self.seed}/{index}"
        if self.files is not None:
            path = str(self._written(path, index))
        media = Media(path=path, kind="image" if self.name == "scenes" else "video")
        return Sample(
            id=f"{self.name}-{self.seed}-{index}", task="ask", prompt=text, answer=answer, category=kind, media=(media,)
        )  # fmt: skip

    def _written(self, path: str, index: int) -> Path:
        """The file of a sample, written unless it is there; whole or not at all, whoever else writes it."""
        from mmeff.video_io import replacing, write

        assert self.files is not None
        target = self.files / f"{self.name}-{self.seed}-{index}.{'png' if self.name == 'scenes' else 'mp4'}"
        if target.is_file():
            return target
        frames, fps = draw(path)
        if self.name == "motions":
            return write(target, frames, fps=fps)
        from PIL import Image

        with replacing(target) as partial:
            Image.fromarray(frames[0]).save(partial)
        return target

    def __repr__(self) -> str:
        return f"<{self.name}: {self.count} samples of seed {self.seed}>"


def draw(path: str) -> tuple[np.ndarray, float]:
    """Draw what a name such as "motions://24000/7" stands for.

    Returns: uint8 frames (T, H, W, 3), one for a scene and eight for a motion, and frames per second.
    Raises: ValueError for a name of another form.
    """
    kind, _, rest = path.partition("://")
    seed, _, index = rest.partition("/")
    if kind not in DRAWN or not seed.isdecimal() or not index.isdecimal():
        raise ValueError(
            f"a generated picture or clip is named {' or '.join(f'{k}://seed/index' for k in DRAWN)}, got {path!r}"
        )
    frames = _pixels(kind, int(seed), int(index) // BATCH)[int(index) % BATCH]
    return frames, FPS


@lru_cache(maxsize=8)
def _batch(kind: str, seed: int, number: int) -> Any:
    return {"scenes": scenes, "motions": motions}[kind].sample(seed, number, BATCH)


@lru_cache(maxsize=8)
def _pixels(kind: str, seed: int, number: int) -> np.ndarray:
    """(BATCH, T, H, W, 3) uint8."""
    batch = _batch(kind, seed, number)
    drawn = batch.images[:, None] if kind == "scenes" else batch.videos
    return (drawn * 255).round().astype(np.uint8)


@lru_cache(maxsize=1024)
def _asked(kind: str, seed: int, number: int) -> tuple[tuple[str, str, str], ...]:
    """Text, answer and kind of the question of every item of a batch."""
    from mmeff import training  # loads torch, which a worker that only draws does without

    generator: Any = {"scenes": scenes, "motions": motions}[kind]
    batch, chance = _batch(kind, seed, number), training.rng(seed, number, stream=1)
    questions = [generator.ask(batch, b, chance, 1)[0] for b in range(BATCH)]
    return tuple((q.text, q.answer, q.kind) for q in questions)
