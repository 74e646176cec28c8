"""A dataset and a model for the tests of the runner: nothing to load, and as quick, slow or fatal as a test wants.

They stand at the top of tests/ so that worker processes, which import them by name, find them.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import numpy as np

from mmeff.evaluation.rows import Merged
from mmeff.evaluation.samples import Sample
from mmeff.evaluation.units import Factory, Outcome, Prepared


class Numbers:
    """Samples that ask for the square of their number."""

    name = "numbers"
    notes = ()

    def __init__(self, count, task="ask"):
        self.count, self.task = count, task

    @property
    def digest(self):
        return f"numbers-{self.count}-{self.task}"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        if self.task == "generate":
            return Sample(
                id=f"n/{index}",
                task="generate",
                prompt=f"number {index}",
                seed=index,
                category=("even", "odd")[index % 2],
            )
        return Sample(
            id=f"n{index}",
            task="ask",
            prompt=f"{index} squared?",
            answer=str(index**2),
            category=("even", "odd")[index % 2],
        )


class Squares:
    """Answers with squares, wrongly for every seventh sample where a method is on.

    Args:
        read, think: seconds that `prepare` and a `run` of one sample take.
        bad: samples whose reading fails; `fatal` those whose reading kills the worker; `hang` those that never end; `wrong` those
            on which the model raises.
        memory: samples that the model takes at a time. log: a folder that notes every unit that begins, one file each.
    """

    def __init__(self, read=0.0, think=0.0, bad=(), fatal=(), hang=(), wrong=(), memory=99, log="", broken="", size=16):
        if broken == "load":
            raise OSError("weights are missing")
        if broken == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        self.read, self.think, self.memory, self.log, self.broken, self.size = read, think, memory, log, broken, size
        self.bad, self.fatal, self.hang, self.wrong = set(bad), set(fatal), set(hang), set(wrong)

    def prepare(self, sample):
        time.sleep(self.read)
        number = int(sample.id.lstrip("n/"))
        if number in self.bad:
            raise ValueError(f"{sample.id} is damaged at {self!r}")
        if number in self.fatal:
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(5)
        if number in self.hang:
            time.sleep(600)
        return Prepared(value=(number, sample), frames=({"path": f"{number}.mp4", "indices": [0, number]},))

    def run(self, prepared, methods):
        if len(prepared) > self.memory:
            raise MemoryError(f"no memory for {len(prepared)}")
        out = []
        for number, sample in (p.value for p in prepared):
            time.sleep(self.think)
            if self.log:
                where = (
                    Path(self.log)
                    / f"{number}-{'-'.join(m.name() for m in methods) or 'dense'}-{os.getpid()}-{time.time_ns()}"
                )
                where.touch()
            if number in self.wrong:
                raise RuntimeError(f"{sample.id} is too odd")
            if self.broken == "full":
                raise OSError(errno.ENOSPC, "No space left on device")
            if sample.task == "generate":
                frames = np.full((3, self.size, self.size, 3), (37 * number) % 256, np.uint8)
                frames[:, : self.size // 2] += 11 * len(methods)
                out.append(Outcome(video=frames, fps=4, seconds={"denoise": self.think}))
            else:
                value = number**2 + (1 if methods and number % 7 == 3 else 0)
                out.append(
                    Outcome(
                        text=f" {value}", tokens={"visual": 64 // (1 + len(methods))}, seconds={"prefill": self.think}
                    )
                )
        return out


def numbers(count, task="ask"):
    return Numbers(count, task)


def squares(**options):
    return Squares(**options)


def given(count=6, task="ask", **options):
    """The model and dataset of an `evaluate` call."""
    return {
        "model": Factory(function="evaluation_fakes:squares", arguments=options),
        "dataset": Factory(function="evaluation_fakes:numbers", arguments={"count": count, "task": task}),
    }


def plain_table(merged: Merged):
    return merged.table()
