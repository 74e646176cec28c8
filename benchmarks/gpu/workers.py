"""Calls in several processes at a time: nearly all of a gate and of a sweep is compilation, which one process does one by one.

Answers are plain values, because not every error of a compiler survives the way between processes. A kernel that crashes
takes its process with it for all calls after that, so what answered with an error of the device is asked again, each in a
process of its own.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from ..cases import Unavailable
from ..gate import GateFailed
from .setting import Setting

K = TypeVar("K", bound=Hashable)
Call = Callable[[], Any]


class Answer(NamedTuple):
    """What came of a call: its result, or what was wrong, could not run here, or went wrong otherwise, in words."""

    kind: Literal["result", "wrong", "unavailable", "error"]
    value: Any

    @property
    def crashed(self) -> bool:
        """Whether the device failed."""
        return self.kind == "error" and lost(self.value)

    def result(self) -> Any:
        """The result. Raises: GateFailed, for a kernel that crashed too, Unavailable or RuntimeError."""
        if self.kind == "result":
            return self.value
        if self.crashed:
            raise GateFailed(f"red gate: the kernel crashed: {self.value}")
        raise {"wrong": GateFailed, "unavailable": Unavailable}.get(self.kind, RuntimeError)(self.value)


def lost(text: str) -> bool:
    """Whether an error is one after which a process can do nothing more on its device."""
    return "CUDA error" in text or "Triton Error [CUDA]" in text


def attempt(call: Call) -> Answer:
    """Make a call, whatever comes of it."""
    try:
        return Answer("result", call())
    except GateFailed as error:
        return Answer("wrong", str(error))
    except Unavailable as error:
        return Answer("unavailable", str(error))
    except Exception as error:
        text = str(error).strip()
        return Answer("error", f"{type(error).__name__}: {text.splitlines()[0][:200] if text else 'no message'}")


class Workers:
    """Processes on a GPU, which live until `close`; this process elsewhere, where there is little to compile."""

    def __init__(self, setting: Setting, *, processes: bool | None = None) -> None:
        self.count = setting.workers
        self._apart = setting.device.type == "cuda" if processes is None else processes
        self._pool: Any = None

    def ask(self, calls: Mapping[K, Call], patience: float) -> dict[K, Answer]:
        """The answers to calls, which must pickle. patience: seconds for all of them."""
        if not self._apart:
            return {key: attempt(call) for key, call in calls.items()}
        spawn = multiprocessing.get_context("spawn")
        if self._pool is None:
            self._pool = spawn.Pool(self.count)
        found = _answers(self._pool, calls, patience)
        crashed = {
            k: calls[k] for k, answer in found.items() if answer.kind == "error" and "CUDA error" in answer.value
        }
        if crashed:
            self.close()
            with spawn.Pool(self.count, maxtasksperchild=1) as alone:
                found |= _answers(alone, crashed, patience)
        return found

    def close(self) -> None:
        """End the processes, whatever they are at."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
            self._pool = None


def _answers(pool: Any, calls: Mapping[K, Call], patience: float) -> dict[K, Answer]:
    asked = {key: pool.apply_async(attempt, (call,)) for key, call in calls.items()}
    deadline, found = time.monotonic() + patience, {}
    for key, answer in asked.items():
        try:
            found[key] = answer.get(timeout=max(0.1, deadline - time.monotonic()))
        except multiprocessing.TimeoutError:
            found[key] = Answer(
                "error", f"no answer within {patience:g} s: its process died, or compiling takes too long"
            )
    return found
