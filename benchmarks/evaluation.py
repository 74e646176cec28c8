"""How the evaluation runner scales and what it survives, with real clips and a real decoder.

    python -m benchmarks.evaluation throughput --clips 200            # one worker against two, on decoding alone
    python -m benchmarks.evaluation kills --clips 2000 --kills 20     # SIGKILL at random moments, against an undisturbed run

`throughput` wants an idle machine: two workers on one core decode no faster than one. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mmeff.evaluation.evaluate import Run, evaluate, look
from mmeff.evaluation.media import read_media
from mmeff.evaluation.units import Factory, Outcome, Pace, Prepared

CALL = "import json, sys; from benchmarks.evaluation import work; work(json.loads(sys.argv[1]))"


class Decoder:
    """A model that only decodes: its answer is the mean of the pixels that it was shown."""

    def prepare(self, sample: Any) -> Prepared:
        clips = [read_media(media) for media in sample.media]
        return Prepared(
            value=float(clips[0].frames.mean()),
            frames=tuple({"path": c.path, "indices": c.indices.tolist(), "backend": c.backend} for c in clips),
        )

    def run(self, prepared: list[Prepared], methods: Any) -> list[Outcome]:
        return [Outcome(text=f"{p.value:.6f}") for p in prepared]


def decoder() -> Decoder:
    """For `Factory`."""
    return Decoder()


def write_clips(folder: Path, count: int, *, frames: int = 90, size: int = 256) -> Path:
    """Clips of moving noise, which take a decoder about as long as real ones; and a manifest."""
    import numpy as np

    from mmeff.video_io import write

    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    small = chance.integers(0, 255, (frames + 8, size // 8 + 16, size // 8 + 16, 3), dtype=np.uint8)
    clip = np.stack(
        [np.roll(small[0], t // 3, 0)[: size // 8, : size // 8].repeat(8, 0).repeat(8, 1) for t in range(frames)]
    )
    first = write(folder / "0.mp4", clip, fps=30)
    for i in range(1, count):
        (folder / f"{i}.mp4").write_bytes(first.read_bytes())
    rows = [{"id": str(i), "video": f"{i}.mp4", "question": "how bright is it ?"} for i in range(count)]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "clips.jsonl"


def work(values: dict[str, Any]) -> Run:
    """One run, in this process or as a command."""
    tiny = values.get("model")
    model = (
        Factory(
            function="mmeff.evaluation.adapters:load_model",
            arguments={"source": tiny, "num_frames": 8, "new_tokens": 4},
        )
        if tiny
        else Factory(function="benchmarks.evaluation:decoder")
    )
    return evaluate(
        model,
        Factory(function="mmeff.evaluation.datasets:open_dataset", arguments=values["dataset"]),
        values.get("methods", []),
        out=values["out"],
        workers=values["workers"],
        pace=Pace(readers=1, threads=1),
    )


def throughput(clips: int) -> dict[str, Any]:
    """Units per second with one worker and with two, without the time that they take to start."""
    found: dict[str, Any] = {"clips": clips, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as scratch:
        manifest = write_clips(Path(scratch) / "clips", clips)
        for count in (1, 2):
            run = work({"dataset": {"spec": str(manifest)}, "out": f"{scratch}/run-{count}", "workers": count})
            times: dict[str, list[float]] = {}
            for row in run.merged.rows:
                times.setdefault(row["worker"], []).append(row["time"])
            began, ended = max(map(min, times.values())), min(map(max, times.values()))
            between = sum(began < row["time"] <= ended for row in run.merged.rows)
            found[f"{count} workers, clips/s"] = round(between / (ended - began), 2)
    found["ratio"] = round(found["2 workers, clips/s"] / found["1 workers, clips/s"], 3)
    return found


def kills(clips: int, times: int, methods: list[str], seed: int, *, decode_only: bool) -> dict[str, Any]:
    """A run that is killed again and again, against one that is not; of the tiny model, or of a decoder alone."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "files").mkdir()
        values = {
            "dataset": {"spec": "motions", "count": clips, "files": f"{scratch}/files"}, "workers": 2,
            **({} if decode_only else {"methods": methods, "model": "tiny-video-vlm"}),
        }  # fmt: skip
        began = time.perf_counter()
        whole = work({**values, "out": f"{scratch}/whole"})
        seconds = time.perf_counter() - began
        out, killed = Path(scratch) / "killed", 0
        while True:
            argument = json.dumps({**values, "out": str(out)})
            process = subprocess.Popen([sys.executable, "-c", CALL, argument], start_new_session=True)
            try:
                code = process.wait(timeout=chance.uniform(0.05, 1.5) * seconds / times if killed < times else None)
            except subprocess.TimeoutExpired:
                killed += 1
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                continue
            if code:
                raise RuntimeError(f"the run ended with exit code {code}")
            break
        run = look(out)
        return {
            "units": len(run.merged.rows), "kills": killed, "undisturbed_s": round(seconds, 1), "left": run.left,
            "same_table": run.merged.table() == whole.merged.table(), "done_twice": run.merged.repeated,
            "torn_lines": run.merged.torn, "failed": len(run.merged.failed),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "kills"))
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--decode-only", action="store_true", help="kills: no model, which starts in a second")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.what == "throughput":
        print(json.dumps(throughput(given.clips), indent=1))
    else:
        methods = given.method or ["fastv", "divprune"]
        print(json.dumps(kills(given.clips, given.kills, methods, given.seed, decode_only=given.decode_only), indent=1))


if __name__ == "__main__":
    main()
