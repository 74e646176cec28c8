"""What fine-tuning trains on: a folder of videos with captions, or the generated clips of the tiny model.

Both answer the same four questions (`Clips`). Which clips a step sees is a pure function of the seed and the step, so that
a run that was interrupted goes on with the clips it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mmeff.errors import MediaError
from mmeff.pipelines.finetune_models import WanVideo
from mmeff.tiny import clips, codec
from mmeff.training import rng

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True, kw_only=True)
class ClipSize:
    """The size of every clip of a run: frames, and pixels."""

    frames: int
    height: int
    width: int


class Clips(Protocol):
    """Clips with their texts. Latents are normalised, (B, C, f, h, w), on the CPU."""

    def describe(self) -> dict[str, Any]:
        """What the clips are, in plain values: it goes into the run's config and its card."""

    def prepare(self, model: WanVideo, size: ClipSize, held_out: int, folder: Path) -> None:
        """Check everything that can be checked, and encode what can be encoded once, before the first step."""

    def training(self, seed: int, step: int, batch: int) -> tuple[Tensor, list[str]]:
        """The latents and texts of one batch."""

    def held_out(self) -> tuple[Tensor, list[str]]:
        """All clips that are never trained on."""


class VideoFolder:
    """Videos of a folder that has a `manifest.jsonl`, one `{"file": "a.mp4", "text": "..."}` per line.

    A clip is the first frames of its file, at the file's own rate, scaled to cover the size and cropped around the centre.
    The last rows of the manifest are held out. Latents are encoded once into the run's folder.

    Raises: FileNotFoundError, ValueError: the manifest is missing, a line of it cannot be used, or a file is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        manifest = self.folder / MANIFEST
        if not manifest.is_file():
            raise FileNotFoundError(
                f'{self.folder} holds no {MANIFEST}; write one with a line {{"file": "a.mp4", "text": "what it shows"}} '
                "for every video"
            )
        self.rows: list[tuple[Path, str]] = []
        for number, line in enumerate(manifest.read_text().splitlines(), start=1):
            if line.strip():
                self.rows.append(self._row(line, f"{manifest}, line {number}"))
        if not self.rows:
            raise ValueError(f"{manifest} lists no video; write one line for each")
        self._encoded: list[Path] = []
        self._held_out = 0

    def _row(self, line: str, where: str) -> tuple[Path, str]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if (
            not isinstance(row, dict)
            or set(row) != {"file", "text"}
            or not all(isinstance(v, str) for v in row.values())
        ):
            raise ValueError(f'{where} must be {{"file": "a.mp4", "text": "what it shows"}}, got {line.strip()}')
        if not row["text"].strip():
            raise ValueError(f"{where} has an empty text; say what {row['file']} shows")
        path = self.folder / row["file"]
        if not path.is_file():
            raise MediaError(f"{where} names {row['file']}, and there is no such file in {self.folder}")
        return path, row["text"]

    def describe(self) -> dict[str, Any]:
        manifest = (self.folder / MANIFEST).read_bytes()
        return {
            "kind": "videos", "folder": self.folder.name, "videos": len(self.rows),
            "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
        }  # fmt: skip

    def prepare(self, model: WanVideo, size: ClipSize, held_out: int, folder: Path) -> None:
        if len(self.rows) <= held_out:
            raise ValueError(
                f"held_out must be smaller than the {len(self.rows)} videos of {self.folder}, got {held_out}; hold out fewer, "
                "or add videos"
            )
        self._held_out = held_out
        encoded = folder / "encoded"
        encoded.mkdir(parents=True, exist_ok=True)
        self._encoded = [self._encode(path, model, size, encoded) for path, _ in self.rows]

    def _encode(self, path: Path, model: WanVideo, size: ClipSize, folder: Path) -> Path:
        """The file of a video's latents, made unless it is there."""
        from safetensors.torch import save_file

        state = path.stat()
        vae = sorted((k, str(v)) for k, v in model.pipeline.vae.config.items())
        key = f"{path.relative_to(self.folder)} {state.st_size} {state.st_mtime_ns} {size} {model.name} {vae}"
        target = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        if not target.is_file():
            draft = target.with_suffix(".tmp")
            save_file({"latents": model.encode_video(read_clip(path, size)).contiguous()}, draft)
            os.replace(draft, target)
        return target

    def _load(self, rows: list[int]) -> tuple[Tensor, list[str]]:
        from safetensors.torch import load_file

        latents = torch.stack([load_file(self._encoded[i])["latents"].float() for i in rows])
        return latents, [self.rows[i][1] for i in rows]

    def training(self, seed: int, step: int, batch: int) -> tuple[Tensor, list[str]]:
        count = len(self.rows) - self._held_out
        chosen = []
        for place in range(step * batch, (step + 1) * batch):  # every epoch sees every video once, in a new order
            epoch, i = divmod(place, count)
            chosen.append(int(rng(seed, epoch, stream=2).permutation(count)[i]))
        return self._load(chosen)

    def held_out(self) -> tuple[Tensor, list[str]]:
        return self._load(list(range(len(self.rows) - self._held_out, len(self.rows))))


def read_clip(path: Path, size: ClipSize) -> Tensor:
    """The first frames of a video, (F, H, W, 3) in [0, 1], scaled to cover the size and cropped around the centre.

    Raises: MediaError for a file that cannot be read or is too short.
    """
    from mmeff.video_io import read

    try:
        video = read(path, indices=range(size.frames))
    except MediaError as error:
        raise MediaError(f"{path.name} gives no clip of {size.frames} frames: {error}") from error
    frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2).float() / 255
    H, W = frames.shape[2:]
    scale = max(size.height / H, size.width / W)
    wanted = (max(size.height, round(H * scale)), max(size.width, round(W * scale)))
    if wanted != (H, W):
        frames = F.interpolate(frames, size=wanted, mode="bilinear", antialias=True)
    top, left = (wanted[0] - size.height) // 2, (wanted[1] - size.width) // 2
    return frames[:, :, top : top + size.height, left : left + size.width].permute(0, 2, 3, 1)


class GeneratedClips:
    """The generated clips that the tiny video model was trained on, of any length: one shape that moves across.

    A longer clip spreads the same way over more frames, so the shape stays inside and moves more slowly. Training never
    repeats a clip. Latents come from the tiny codec directly, which equals the pipeline's VAE up to rounding.
    """

    def __init__(self) -> None:
        self._frames = 0
        self._held_out = 0

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "generated clips of mmeff.tiny", "training_seed": clips.TUNE_SEED,
            "held_out_seed": clips.TUNE_HELDOUT_SEED,
        }  # fmt: skip

    def prepare(self, model: WanVideo, size: ClipSize, held_out: int, folder: Path) -> None:
        if model.pipeline.vae.config.z_dim != codec.LATENT_CHANNELS:
            raise ValueError(
                f"generated clips are for the tiny video model, whose VAE has {codec.LATENT_CHANNELS} channels; this one has "
                f"{model.pipeline.vae.config.z_dim}; pass a folder of videos with --data"
            )
        if (size.height, size.width) != (clips.SIZE, clips.SIZE):
            raise ValueError(
                f"generated clips are {clips.SIZE} x {clips.SIZE} pixels, got height={size.height}, width={size.width}; "
                "leave the size out, or pass a folder of videos"
            )
        self._frames, self._held_out = size.frames, held_out

    def _clips(self, seed: int, index: int, count: int) -> tuple[Tensor, list[str]]:
        videos, labels = clips.sample(seed, index, count, frames=self._frames, pooled=True)
        return codec.pack(torch.from_numpy(videos), pooled=True), labels.prompts()

    def training(self, seed: int, step: int, batch: int) -> tuple[Tensor, list[str]]:
        return self._clips(clips.TUNE_SEED + seed, step, batch)

    def held_out(self) -> tuple[Tensor, list[str]]:
        return self._clips(clips.TUNE_HELDOUT_SEED, 0, self._held_out)
