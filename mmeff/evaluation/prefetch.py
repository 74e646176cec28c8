"""Reading ahead: samples are prepared in threads while the model works, a bounded number of them, in order.

Decoders release Python's lock while they decode, so threads overlap with the model, and there is nothing to copy between
processes. A decoder that never returns must not stop a run: after a time its sample is given up and its thread left behind,
which a pool of threads would not allow.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

TaskT = TypeVar("TaskT")
ItemT = TypeVar("ItemT")
ReadyT = TypeVar("ReadyT")
CovT = TypeVar("CovT", covariant=True)


class Source(Protocol[CovT]):
    """Where tasks come from."""

    def get(self, block: bool) -> CovT | None:
        """The next task, or None if there is none yet, which is never the answer to block=True.

        Raises: StopIteration: there will be no more.
        """


class ListSource(Generic[TaskT]):
    """Tasks that are all known beforehand."""

    def __init__(self, tasks: Sequence[TaskT]) -> None:
        self._tasks = deque(tasks)

    def get(self, block: bool) -> TaskT | None:
        """The next task. Raises: StopIteration at the end."""
        if not self._tasks:
            raise StopIteration
        return self._tasks.popleft()


class Read(Generic[ItemT, ReadyT]):
    """An item that is being prepared, or was: `value` or `error`, and `seconds` spent on it."""

    def __init__(self, item: ItemT) -> None:
        self.item = item
        self.value: ReadyT | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.began: float | None = None
        self.ended = threading.Event()


class Prefetch(Generic[TaskT, ItemT, ReadyT]):
    """Prepares the items of tasks ahead of who takes them.

    Args:
        source: of tasks. items: the items of a task, which are taken together.
        prepare: called in a thread for each item.
        depth: items that are ready or being prepared, at most, unless one task alone has more. readers: threads that prepare at
            a time.
        timeout: seconds until an item that is being prepared is given up, with TimeoutError as its `error`.
    """

    def __init__(
        self,
        source: Source[TaskT],
        items: Callable[[TaskT], list[ItemT]],
        prepare: Callable[[ItemT], ReadyT],
        *,
        depth: int,
        readers: int,
        timeout: float,
    ) -> None:
        self._source, self._items, self._prepare = source, items, prepare
        self._depth, self._timeout = depth, timeout
        self._free = threading.Semaphore(readers)
        self._ahead: deque[tuple[TaskT, list[Read[ItemT, ReadyT]]]] = deque()
        self._more = True

    def take(self, stop: Callable[[], bool]) -> tuple[TaskT, list[Read[ItemT, ReadyT]]] | None:
        """The next task with its items, all ended; None when there are no more, or on `stop`."""
        self._fill(block=not self._ahead)
        if not self._ahead:
            return None
        task, reads = self._ahead[0]
        for read in reads:
            while not read.ended.wait(0.05):
                if stop():
                    return None
                self._give_up_on_late_ones()
        if stop():
            return None
        self._ahead.popleft()
        self._fill(block=False)  # so that reading goes on while the caller works
        return task, reads

    def _fill(self, block: bool) -> None:
        while self._more and sum(len(reads) for _, reads in self._ahead) < self._depth:
            try:
                task = self._source.get(block)
            except StopIteration:
                self._more = False
                return
            if task is None:
                return
            block = False
            reads: list[Read[ItemT, ReadyT]] = [Read(item) for item in self._items(task)]
            self._ahead.append((task, reads))
            for read in reads:
                # a thread per item costs far less than the item; daemons do not hold up the end of the process
                threading.Thread(target=self._read, args=(read,), daemon=True, name="mmeff-read").start()

    def _read(self, read: Read[ItemT, ReadyT]) -> None:
        self._free.acquire()
        read.began = time.perf_counter()
        try:
            value: ReadyT | None = self._prepare(read.item)
            error: BaseException | None = None
        except BaseException as caught:  # whose fault it is, the taker decides
            value, error = None, caught
        if not read.ended.is_set():  # one that was given up has released its place, and stays given up
            read.value, read.error, read.seconds = value, error, time.perf_counter() - read.began
            read.ended.set()
            self._free.release()

    def _give_up_on_late_ones(self) -> None:
        for read in (read for _, reads in self._ahead for read in reads):
            late = time.perf_counter() - read.began if read.began is not None and not read.ended.is_set() else 0.0
            if late > self._timeout:
                read.error = TimeoutError(f"reading took more than {self._timeout:g} s, so it was given up")
                read.seconds = late
                read.ended.set()
                self._free.release()
