"""A run in a thread of its own, read as a generator: a reader that stops reading cancels it, and no lock hangs on a browser."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .turns import Ticket, Turns


def working(turns: Turns, user: str, work: Callable[[Ticket, Callable[[Any], None]], Any]) -> Iterator[Any]:
    """Admit a run of a visitor and let it work; yields what it tells, and at last what it returns.

    Args: work: given its ticket, and whom to tell; runs in a thread.
    Raises: Busy; whatever `work` raises.
    """
    news: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    with turns.admit(user) as ticket:

        def run() -> None:
            try:
                news.put((True, work(ticket, lambda told: news.put((False, told)))))
            except BaseException as error:  # raised again by the one who reads
                news.put((True, error))

        thread = threading.Thread(target=run, name="mmeff-demo-run", daemon=True)
        thread.start()
        try:
            ended = False
            while not ended:
                ended, found = news.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            ticket.cancel()
            thread.join()
