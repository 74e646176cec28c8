"""What the tabs ask for. No Gradio here: the same calls serve the page, the API and the tests."""

from __future__ import annotations

import functools

from .asking import Asking
from .backbones import Backbones
from .generating import Generating
from .models import Models
from .results import Results
from .runs import Runs
from .settings import Settings
from .turns import Turns


class Service:
    """Everything that visitors share: the models, the order in which runs go, and the files of past runs.

    `generating` makes videos and pictures, `asking` answers questions. A tab that needs more brings its own class, which is
    made here.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.turns = Turns(per_user=self.settings.per_user, total=self.settings.queue)
        self.models = Models(self.settings, self.turns)
        self.runs = Runs(self.settings.kept_results, self.settings.kept_results_mb)
        self.generating = Generating(self.settings, self.models, self.turns, self.runs)
        self.asking = Asking(self.settings, self.models, self.turns, self.runs, self.results)
        self.backbones = Backbones(self.settings, self.turns)

    @functools.cache  # noqa: B019  # a service lives as long as its process
    def results(self) -> Results:
        """The committed benchmark rows, read at the first call."""
        return Results(self.settings.results)

    def cancel(self, user: str) -> int:
        """Stop every run of a visitor before its next step; returns how many there were."""
        return self.turns.cancel(user)

    def close(self) -> None:
        """Delete the files of all runs."""
        self.runs.close()
