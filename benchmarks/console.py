"""What the commands share: where they print, a progress bar, and checks of options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

out_console = Console()
err_console = Console(stderr=True)


def shard_of(text: str) -> tuple[int, int]:
    """(i, n) of i/n. Raises ValueError for other text."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit()):
        raise ValueError(f"--shard must be i/n, such as 1/2, got {text!r}")
    return int(part), int(parts)


def positive(name: str, value: float | None) -> None:
    """Raise ValueError for an option that is given and not above 0."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} must be > 0, got {value:g}")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error; yields the callback (what, done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err_console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tick(what: str, done: int, total: int) -> None:
            bar.update(task, description=escape(what[:90].ljust(90)), completed=done, total=total)

        yield tick
