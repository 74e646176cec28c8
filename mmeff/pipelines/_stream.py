"""The clock of an answer, and the answer as it comes: pieces of text out of a thread that can be stopped."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from mmeff.pipelines._question import Answer
from mmeff.pipelines._wrapper import Cancel


class Clock(StoppingCriteria):
    """Called by `generate` after every token: notes when the first one came, and ends the answer when it is cancelled."""

    def __init__(self, device: torch.device, cancel: Cancel | None) -> None:
        self._device, self._cancel = device, cancel
        self._first: float | None = None
        self.began = 0.0
        self.cancelled = False

    def start(self) -> None:
        self._wait()
        self.began = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Seconds up to the first token, and after it."""
        self._wait()
        ended = time.perf_counter()
        first = ended if self._first is None else self._first
        return {"prefill": first - self.began, "decode": ended - first}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self._first is None:
            self._wait()
            self._first = time.perf_counter()
        if self._cancel is not None and self._cancel():
            self.cancelled = True
        return torch.full((len(input_ids),), self.cancelled, device=input_ids.device)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class AnswerStream:
    """An answer as it comes: an iterator over pieces of text. A `with` block, or `cancel`, ends it before its time.

    Whatever went wrong in the thread is raised where the pieces are read.
    """

    def __init__(self, work: Callable[[Clock], Answer], streamer: TextIteratorStreamer, device: torch.device) -> None:
        self._stop = threading.Event()
        self._streamer = streamer
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._ended = False

        def answer(clock: Clock) -> None:
            try:
                self._answer = work(clock)
            except BaseException as error:  # raised again by the one who reads
                self._error = error
            finally:
                self._streamer.on_finalized_text("", stream_end=True)  # generate ends the stream only when it ends well

        clock = Clock(device, self._stop.is_set)
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(answer, clock), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._ended:
            try:
                piece = next(self._streamer)
            except StopIteration:
                self._ended = True
                break
            if piece:
                return str(piece)
        self._finish()
        raise StopIteration

    def cancel(self) -> None:
        """End the answer after the token that is being made, and wait for that."""
        self._stop.set()
        self._thread.join()

    def result(self) -> Answer:
        """The whole answer; waits for it. Where it was cancelled, what there is of it, with `complete` False."""
        self._finish()
        assert self._answer is not None  # a thread ends with an answer or an error
        return self._answer

    def _finish(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()
