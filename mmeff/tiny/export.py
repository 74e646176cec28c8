"""Write trained tiny models as ordinary model folders: float16 safetensors, config, tokenizer, card and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmeff.tiny import codec, image_model, video_model, video_vlm_model, vla_model, vlm_model

LIMIT = 5 * 2**20  # bytes a committed model may have
HASHES = "SHA256SUMS"


def export_vlm(net: Any, folder: str | Path) -> Path:
    """Save a trained LLaVA model and its processor; float16 on disk."""
    has_class_token = net.config.vision_feature_select_strategy == "default"
    return _export_llava(net, vlm_model.processor(class_token=has_class_token), folder)


def export_video_vlm(net: Any, folder: str | Path) -> Path:
    """Save a trained video VLM and its processor; float16 on disk."""
    return _export_llava(net, video_vlm_model.processor(), folder)


def export_vla(net: Any, folder: str | Path) -> Path:
    """Save a trained VLA and its processor; float16 on disk."""
    return _export_llava(net, vla_model.processor(), folder)


def _export_llava(net: Any, processor: Any, folder: str | Path) -> Path:
    def write(draft: Path) -> None:
        torch.nn.Module.half(net)
        net.save_pretrained(draft)
        processor.save_pretrained(draft)
        net.float()

    return _replace(Path(folder), write)


def export_video(student: Any, folder: str | Path) -> Path:
    """Save a trained student as a `WanPipeline` folder plus the position table; float16 on disk."""
    from diffusers import WanPipeline

    def write(draft: Path) -> None:
        net = video_model.transformer()
        net.load_state_dict(student.net.state_dict())
        pipeline = WanPipeline(
            tokenizer=video_model.tokenizer(),
            text_encoder=video_model.text_encoder().half(),
            transformer=net.half(),
            vae=codec.build().half(),
            scheduler=video_model.scheduler(),
        )
        pipeline.save_pretrained(draft, safe_serialization=True)
        video_model.save_table(draft, student.table().detach())

    return _replace(Path(folder), write)


def export_image(student: Any, folder: str | Path) -> Path:
    """Save a trained student as a `FluxPipeline` folder; float16 on disk."""

    def write(draft: Path) -> None:
        net = image_model.transformer()
        net.load_state_dict(student.net.state_dict())
        pipeline = image_model.pipeline(net)
        for part in (net, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            torch.nn.Module.half(part)
        pipeline.save_pretrained(draft, safe_serialization=True)

    return _replace(Path(folder), write)


def _replace(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write into a fresh folder beside `folder`, then swap, so that a half-written model never looks complete."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(draft, folder)
    return folder


def seal(folder: str | Path, card: str, gate: dict[str, Any]) -> None:
    """Add the model card, the gate's figures and the hashes of every file.

    Raises:
        ValueError: the folder is larger than a committed model may be.
    """
    folder = Path(folder)
    (folder / "README.md").write_text(card)
    (folder / "gate.json").write_text(json.dumps(gate, indent=1) + "\n")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    if size > LIMIT:
        raise ValueError(f"{folder} has {size} bytes; a committed model may have {LIMIT}")
    (folder / HASHES).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(hashes(folder).items())))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every file of a folder but the hash list itself, by relative name."""
    folder = Path(folder)
    return {p.relative_to(folder).as_posix(): digest(p) for p in folder.rglob("*") if p.is_file() and p.name != HASHES}


def verify(folder: str | Path) -> None:
    """Raise ValueError if a file of a sealed folder is missing, changed or not listed."""
    folder = Path(folder)
    listed = dict(line.split("  ", 1)[::-1] for line in (folder / HASHES).read_text().splitlines())
    found = hashes(folder)
    bad = sorted(name for name in {*listed, *found} if listed.get(name) != found.get(name))
    if bad:
        raise ValueError(f"{folder} does not match its {HASHES}: {', '.join(bad)}")
