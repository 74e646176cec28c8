"""Who may run, and when: one run at a time on this machine, in the order of arrival, and a bound on what one visitor waits for.

All runs share the cores or the GPU, and every figure of the demo is a time; two runs at once would measure each other.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmeff.errors import MmeffError
from mmeff.pipelines import Cancelled

POLL = 0.1  # seconds between looks at whether a waiting run was cancelled


class Busy(MmeffError, RuntimeError):
    """A visitor, or all of them together, have as many runs waiting as the settings allow."""


class Ticket:
    """One admitted run: its visitor, and whether it was cancelled."""

    def __init__(self, user: str) -> None:
        self.user = user
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask the run to stop; it does so before its next step."""
        self._cancelled.set()

    def cancelled(self) -> bool:
        """Whether it was asked to stop: the `cancel` argument of the library's runs."""
        return self._cancelled.is_set()


class Turns:
    """Admits runs, and lets one at a time go on.

    Args: per_user: runs of one visitor that wait or run; total: runs of all visitors.
    """

    def __init__(self, *, per_user: int, total: int) -> None:
        self.per_user, self.total = per_user, total
        self._changed = threading.Condition()
        self._tickets: list[Ticket] = []
        self._line: deque[Ticket] = deque()

    @contextmanager
    def admit(self, user: str) -> Iterator[Ticket]:
        """Take one of the visitor's places for the length of the block.

        Raises: Busy where the visitor, or the server, has none left.
        """
        with self._changed:
            mine = Counter(ticket.user for ticket in self._tickets)[user]
            if mine >= self.per_user:
                raise Busy(
                    f"you have {mine} runs waiting or running, and {self.per_user} is the most at a time; wait for one to end, "
                    "or cancel it"
                )
            if len(self._tickets) >= self.total:
                raise Busy(
                    f"the server has {len(self._tickets)} runs waiting, which is its limit; try again in a minute"
                )
            ticket = Ticket(user)
            self._tickets.append(ticket)
        try:
            yield ticket
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    @contextmanager
    def turn(self, ticket: Ticket, waiting: Callable[[int], None] = lambda before: None) -> Iterator[None]:
        """Wait until every run that came earlier is done, then run alone for the length of the block.

        Args: waiting: told how many runs are before this one, whenever that changes.
        Raises: Cancelled while it waits.
        """
        with self._changed:
            self._line.append(ticket)
        told = 0
        try:
            while True:
                with self._changed:
                    before = self._line.index(ticket)
                    if before and before == told:
                        self._changed.wait(POLL)
                        before = self._line.index(ticket)
                if ticket.cancelled():
                    raise Cancelled("cancelled while it waited for its turn")
                if not before:
                    break
                if before != told:
                    told = before
                    waiting(before)
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()

    def cancel(self, user: str) -> int:
        """Cancel every run of a visitor; returns how many there were."""
        with self._changed:
            mine = [ticket for ticket in self._tickets if ticket.user == user]
            for ticket in mine:
                ticket.cancel()
            self._changed.notify_all()
        return len(mine)

    @property
    def waiting(self) -> int:
        """Runs that wait or run."""
        with self._changed:
            return len(self._tickets)
