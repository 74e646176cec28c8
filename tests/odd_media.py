"""Sixty files that are damaged, odd, or no clips at all, as folders of clips from the web hold them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from video_files import clip, encode, turn


def write_odd_media(folder: Path) -> dict[str, bool | None]:
    """Write the files and say of each whether PyAV can read frames from it; None where the damage decides."""
    import av

    readable: dict[str, bool | None] = {}

    def add(name: str, content: bytes, can: bool | None) -> None:
        (folder / name).write_bytes(content)
        readable[name] = can

    def make(name: str, frames: np.ndarray, can: bool = True, **options: object) -> bytes:
        encode(folder / name, frames, **options)
        readable[name] = can
        return (folder / name).read_bytes()

    twenty = clip(20)
    mp4, mkv = make("plain.mp4", twenty), make("plain.mkv", twenty)
    ts, avi = make("plain.ts", twenty), make("plain.avi", twenty, codec="mpeg4")
    chance = np.random.default_rng(0)
    for i in range(8):  # cut off anywhere
        add(f"cut-{i}.mp4", mp4[: len(mp4) * (i + 1) // 9], False)
        add(f"cut-{i}.mkv", mkv[: len(mkv) * (i + 1) // 9], None)
    pictures = mp4.index(b"mdat") + 4, mp4.index(b"moov") - 4
    for i in range(8):  # bytes turned over, in the pictures or anywhere
        broken = np.frombuffer(mp4, np.uint8).copy()
        low, high = pictures if i < 4 else (0, len(mp4))
        broken[chance.integers(low, high, size=40)] ^= 255
        add(f"flipped-{i}.mp4", broken.tobytes(), None)
    for suffix in (".mp4", ".mkv", ".webm"):
        add(f"zero{suffix}", b"", False)
    # what the name does not say
    add("matroska.mp4", mkv, True)
    add("stream.mp4", ts, True)
    add("avi.mp4", avi, True)
    add("mp4.avi", mp4, True)
    add("text.mp4", b"this is no clip\n" * 40, False)
    add("page.mp4", b"<!doctype html><title>404</title>", False)
    add("noise.mp4", chance.bytes(4000), False)
    add("nul.mp4", b"\0" * 4000, False)
    add("only-head.mp4", mp4[:32], False)
    Image.fromarray(twenty[0]).save(folder / "picture.png")
    add("picture.mp4", (folder / "picture.png").read_bytes(), None)  # FFmpeg takes a picture for a clip of one frame
    (folder / "picture.png").unlink()
    # no files
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "gone.mp4").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.mp4")
    readable |= dict.fromkeys(("folder.mp4", "loop.mp4", "gone.mp4", "pipe.mp4"), False)
    # odd and whole
    make("one-frame.mp4", twenty[:1])
    make("two-by-two.mp4", twenty[:, :2, :2])
    make("wide.mp4", np.repeat(twenty[:, :2], 10, axis=2))
    make("varying.mp4", twenty, pts=[100 * i + 37 * (i % 3) for i in range(20)])
    make("late.mp4", twenty, pts=[60_000 + 100 * i for i in range(20)])
    make("slow.mp4", twenty[:4], pts=[0, 60_000, 120_000, 180_000])
    for angle, matrix in {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}.items():
        shutil.copy(folder / "plain.mp4", folder / f"turned-{angle}.mp4")
        turn(folder / f"turned-{angle}.mp4", matrix)
        readable[f"turned-{angle}.mp4"] = True
    for name, codec, pix_fmt, (H, W) in (
        ("ten-bit.mkv", "libx265", "yuv420p10le", (48, 64)),
        ("grey.mkv", "ffv1", "gray", (47, 63)),
        ("one-pixel.mkv", "ffv1", "yuv444p", (1, 1)),
        ("full-chroma.mkv", "libx264", "yuv444p", (47, 63)),
        ("motion.mkv", "mjpeg", "yuvj420p", (48, 64)),
        ("vp9.webm", "libvpx-vp9", "yuv420p", (48, 64)),
    ):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width, stream.pix_fmt = H, W, pix_fmt
            for image in twenty[:4, :H, :W]:
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        readable[name] = True
    with av.open(str(folder / "sound.mkv"), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        quiet = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        quiet.rate = 16000
        container.mux(sound.encode(quiet))
        container.mux(sound.encode())
    with av.open(str(folder / "no-frames.mkv"), "w") as container:
        empty = container.add_stream("libx264", rate=10)
        empty.height, empty.width, empty.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    readable |= {"sound.mkv": False, "no-frames.mkv": False}
    Image.fromarray(twenty[0]).save(
        folder / "moving.gif", save_all=True, append_images=[Image.fromarray(f) for f in twenty[1:5]], duration=100
    )
    readable["moving.gif"] = True
    return readable
