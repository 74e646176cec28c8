"""A handle owns everything a method installed on a model, and everything that was measured while it was there."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from mmeff.config import MethodConfig
from mmeff.errors import AlreadyAccelerated, NothingAccelerated
from mmeff.report import DENSE, FULL, SPARSE, Plan, Recorder, Report, make_report

# Which handles are alive on a module: it is only asked "is this stage taken?", it holds no state of any method.
_installed: weakref.WeakKeyDictionary[Any, dict[str, weakref.ref[Handle]]] = weakref.WeakKeyDictionary()


class Host(ABC):
    """Knows one model family. It applies what methods decide, and knows no method by name.

    Class attributes: `name` for reports; `stage` the room whose methods it takes; `models` the classes it is for, as text.
    """

    name: str = ""
    stage: str = ""
    models: str = ""

    @classmethod
    @abstractmethod
    def matches(cls, model: Any) -> bool:
        """Whether this host knows the model. Must not import the model's library unless it is loaded already."""

    @classmethod
    @abstractmethod
    def modules(cls, model: Any) -> list[Any]:
        """The modules that an installation changes; two handles of one stage may not share one."""

    @classmethod
    def why_not(cls, model: Any, method: MethodConfig) -> str | None:
        """A sentence why this method cannot act on this model at all, or None."""
        return None

    @classmethod
    @abstractmethod
    def install(cls, model: Any, method: MethodConfig, handle: Handle) -> None:
        """Install hooks and processors, passing each undo to `handle.on_remove`.

        What is installed must refer to `handle`: that keeps it, and the claim on its stage, as long as the model lives, also
        where the caller does not keep it.
        """

    @classmethod
    @abstractmethod
    def plan(cls, model: Any, method: MethodConfig, *args: Any, **sizes: Any) -> Plan:
        """The dry run; unknown sizes raise TypeError."""


class Handle:
    """What `accelerate` returns: a live dial on one model, a context manager, and the record of what ran.

    `enabled` switches the method off and on without removing it. `remove()` restores the model; it may be called in any
    order relative to other handles, and twice. Leaving a `with` block removes the handle, on errors too; if the model ran
    inside the block and the method never got to act, leaving raises `NothingAccelerated`.
    """

    def __init__(self, model: Any, method: MethodConfig, host: type[Host]) -> None:
        self.method = method
        self.host = host
        self.recorder = Recorder()
        self.enabled = True
        self._model_name = describe_model(model)
        self._note = model_note(model)
        self._undo = ExitStack()
        self._episodes: list[Callable[[], None]] = []
        self._installed = False
        self._modules = host.modules(model)
        self._claim()
        try:
            host.install(model, method, self)
            self._installed = True
        except BaseException:
            self.remove()
            raise

    def _claim(self) -> None:
        for module in self._modules:
            taken = _installed.get(module, {}).get(self.host.stage)
            other = taken() if taken is not None else None
            if other is not None:
                raise AlreadyAccelerated(
                    f"{type(module).__name__} already runs {other.method.name()} of stage {self.host.stage!r}; "
                    f"call remove() on its handle before adding {self.method.name()}, or set enabled = False to compare"
                )
        for module in self._modules:
            _installed.setdefault(module, {})[self.host.stage] = weakref.ref(self)

    def on_remove(self, undo: Callable[[], None]) -> None:
        """Register how to take back one thing that was installed."""
        self._undo.callback(undo)

    def on_reset_episode(self, forget: Callable[[], None]) -> None:
        """Register how to forget what earlier prompts left."""
        self._episodes.append(forget)

    def reset_episode(self) -> None:
        """Forget what earlier prompts of an episode left, where a method keeps such a history; call it when one begins.

        Raises: TypeError for a method that keeps nothing from one prompt to the next.
        """
        if not self._episodes:
            raise TypeError(
                f"{self.method.name()} keeps nothing from one prompt to the next, so it has no episode to reset"
            )
        for forget in self._episodes:
            forget()

    @property
    def installed(self) -> bool:
        """Whether the method is still on the model."""
        return self._installed

    def remove(self) -> None:
        """Take everything back, last installed first. An undo that raises does not stop the others."""
        try:
            self._undo.close()
        finally:
            self._installed = False
            self._release()

    def _release(self) -> None:
        for module in self._modules:
            stages = _installed.get(module)
            mine = stages.get(self.host.stage) if stages else None
            if stages is not None and mine is not None and mine() is self:
                del stages[self.host.stage]
                if not stages:
                    del _installed[module]

    def reset(self) -> None:
        """Forget what was recorded; the method stays installed."""
        self.recorder.reset()

    def report(self) -> Report:
        """What really ran since installation or the last `reset`."""
        return make_report(
            self.recorder, method=self.method.to_dict(), model=self._model_name, host=self.host.name, note=self._note
        )

    def check(self) -> None:
        """Raise `NothingAccelerated` if the model ran and the method never got to act."""
        recorder = self.recorder
        if recorder.forwards and not (recorder.total(SPARSE) or recorder.total(FULL)):
            reasons = "; ".join(recorder.fallbacks) or "its schedule leaves no layer and step to it"
            raise NothingAccelerated(
                f"{self.method.name()} was installed on {self._model_name} and the model ran {recorder.forwards} times, "
                f"but all {recorder.total(DENSE)} layer calls were dense: {reasons}. "
                "Look at mmeff.plan(...) with your sizes, or remove the handle."
            )

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        if kind is None and self.enabled:
            self.check()

    def __repr__(self) -> str:
        state = ("on" if self.enabled else "off") if self.installed else "removed"
        return f"<Handle {self.method.name()} on {self._model_name}: {state}>"


class HandleStack:
    """Several handles installed together; the same verbs, applied to all."""

    def __init__(self, handles: list[Handle]) -> None:
        self.handles = handles

    @property
    def enabled(self) -> bool:
        """True when every handle is enabled."""
        return all(h.enabled for h in self.handles)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for handle in self.handles:
            handle.enabled = value

    def remove(self) -> None:
        """Remove all, last installed first. One that raises does not stop the others."""
        with ExitStack() as stack:
            for handle in self.handles:
                stack.callback(handle.remove)

    def reset(self) -> None:
        """Forget what all of them recorded."""
        for handle in self.handles:
            handle.reset()

    def reset_episode(self) -> None:
        """Begin a new episode for every method that keeps a history."""
        for handle in self.handles:
            handle.reset_episode()

    def report(self) -> list[Report]:
        """One report per method, in the order of the list that was passed."""
        return [handle.report() for handle in self.handles]

    def __enter__(self) -> HandleStack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        if kind is None:
            for handle in self.handles:
                if handle.enabled:
                    handle.check()

    def __repr__(self) -> str:
        return f"<HandleStack {self.handles!r}>"


def describe_model(model: Any) -> str:
    """The class of a model, and where it was loaded from if it remembers."""
    config = getattr(model, "config", None)
    where = getattr(config, "_name_or_path", "") or getattr(model, "name_or_path", "")
    if not where and config is not None and hasattr(config, "get"):
        where = config.get("_name_or_path", "") or ""
    if os.path.isabs(where):  # a folder of this machine means nothing on another one; its name does
        where = os.path.basename(os.path.normpath(where))
    return f"{type(model).__name__} ({where})" if where else type(model).__name__


def model_note(model: Any) -> str:
    """What a report must say about this model; loaders set `mmeff_note` on models that are tiny or random."""
    return str(getattr(model, "mmeff_note", ""))
