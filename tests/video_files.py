"""Video files that tests read: clips whose frames can be told apart, in containers and with times of the tests' choosing."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest

from mmeff import video_io

USABLE = [name for name, reason in video_io.backends().items() if reason is None]
each_backend = pytest.mark.parametrize("backend", video_io.BACKENDS)


def need(backend):
    reason = video_io.backends()[backend]
    if reason is not None:
        pytest.skip(f"{backend} is not usable here: {reason}")


def clip(T=20, H=48, W=64):
    """A clip whose frames can be told apart: frame i is grey of level 10 i + 20, with a bright bar at column 3 i."""
    frames = np.zeros((T, H, W, 3), np.uint8)
    for i in range(T):
        frames[i] = (10 * i + 20) % 236
        frames[i, :, (3 * i) % W : (3 * i) % W + 4] = (250, 220, 40)
    return frames


def encode(path, frames, *, pts=None, rate=10, gop=6, codec="libx264"):
    """Write with chosen display times (milliseconds), B-frames and several keyframes, which `write` does not offer."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def level(frame):
    """Which frame of `clip` this is, read from its grey."""
    return round((float(np.median(frame)) - 20) / 10)


def write_media(folder):
    """Files that several tests read, each of the twenty frames of `clip`."""
    frames = clip()
    video_io.write(folder / "plain.mp4", frames, fps=10)
    encode(folder / "gops.mp4", frames)
    encode(folder / "late.mp4", frames, pts=[700 + 100 * i for i in range(20)])  # starts at 0.7 s
    encode(folder / "uneven.mp4", frames, pts=[100 * i + 20 * (i % 3) for i in range(20)])
    encode(folder / "gops.mkv", frames)
    encode(folder / "stream.ts", frames)
    encode(folder / "old.avi", frames, codec="mpeg4")
    return folder


def turn(path, matrix):
    """Write a display matrix (a, b, c, d) into the one track of an mp4: (x, y) is shown at (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # behind times, track number, duration, layer, group and volume
    a, b, c, d = (round(v * 2**16) for v in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(content)
    return path
