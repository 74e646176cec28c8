"""The sample pictures and clips under `data/samples`: drawn by this project's generators, free to use (CC0).

`python -m mmeff.tiny.samples data/samples` writes them again, byte for byte where the encoders are the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from mmeff.tiny import clips, scenes
from mmeff.tiny.export import HASHES, hashes

SEED = 16_000
PICTURES = {"scene-1.jpg": 2, "scene-2.png": 5, "scene-3.png": 9}  # file name: scene of the batch
CLIPS = {"clip-1.mp4": 3, "clip-2.mp4": 11}
LICENCE = """The files in this folder were drawn by the generators of mmeff (mmeff/tiny/scenes.py and mmeff/tiny/clips.py).
To the extent possible under law, the authors have waived all copyright and related or neighbouring rights to them:
CC0 1.0 Universal, https://creativecommons.org/publicdomain/zero/1.0/
"""


def write(folder: str | Path) -> None:
    """Write the samples, their manifest, licence and hashes."""
    from PIL import Image

    from mmeff.video_io import write as write_video

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {}
    drawn = scenes.sample(SEED, 0, 16)
    for name, b in PICTURES.items():
        picture = Image.fromarray((drawn.images[b] * 255).round().astype(np.uint8))
        picture.save(folder / name, quality=95)  # PNG has no quality and takes no notice
        questions = scenes.ask(drawn, b, np.random.default_rng(SEED), 40)
        manifest[name] = {
            "generator": "mmeff.tiny.scenes.sample", "seed": SEED, "index": 0, "scene": b,
            "questions": sorted({(q.text, q.answer) for q in questions}),
        }  # fmt: skip
    videos, labels = clips.sample(SEED, 0, 16)
    for name, b in CLIPS.items():
        write_video(folder / name, videos[b], fps=8)
        manifest[name] = {
            "generator": "mmeff.tiny.clips.sample", "seed": SEED, "index": 0, "clip": b, "prompt": labels.prompts()[b],
        }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (folder / "LICENSE").write_text(LICENCE)
    (folder / HASHES).write_text("".join(f"{d}  {n}\n" for n, d in sorted(hashes(folder).items())))


if __name__ == "__main__":
    write(sys.argv[1])
