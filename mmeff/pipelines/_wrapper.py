"""What the wrappers share: a model by name or as it is, the methods installed on it, and one run at a time.

The model stays the stock one. A wrapper adds what surrounds a call: it checks the inputs before anything runs, installs
methods through `mmeff.accelerate`, keeps the record of each run apart, and takes everything back when it is closed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

from mmeff.accelerate import accelerate, find_host
from mmeff.config import MethodConfig
from mmeff.errors import MmeffError, UnsupportedModel, suggest
from mmeff.handle import HandleStack
from mmeff.pipelines.loading import Kind, Loaded, load
from mmeff.registry import build
from mmeff.report import Report

if TYPE_CHECKING:
    from PIL.Image import Image

Cancel = Callable[[], bool]


class Cancelled(MmeffError, RuntimeError):
    """A run was stopped by its `cancel` callback. `done` holds the results that were complete by then."""

    def __init__(self, message: str, done: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.done = list(done)


class Wrapper:
    """The base of `VideoGenerator` and `VisionLanguageModel`: loading, methods, closing.

    `handle` is the stack of what is installed, None without methods; `handle.enabled = False` makes calls dense.
    `methods` are the resolved configs. One run at a time: a second one, from any thread, is refused. A subclass calls `use`
    when it has checked all else, so that an error leaves nothing installed.
    """

    kind: ClassVar[Kind]
    mistaken: ClassVar[str]  # what to say of a model of the other kind

    def __init__(self, loaded: Loaded) -> None:
        if loaded.kind != self.kind:
            raise UnsupportedModel(f"{loaded.source} {self.mistaken}")
        self._loaded: Loaded | None = loaded
        self._busy = threading.Lock()
        self.handle: HandleStack | None = None
        self.methods: tuple[MethodConfig, ...] = ()

    @property
    def source(self) -> str:
        """The name or folder that the model was loaded from; empty for a model that was passed in."""
        return self._open().source

    def use(self, methods: Any) -> None:
        """Install other methods in place of the present ones.

        Args:
            methods: a config, its class, its name, a mapping or a YAML path; a list of these is stacked, as `accelerate`
                does; None or an empty list leaves the stock model.
        Raises:
            UnsupportedModel, UnknownMethod, TypeError, ValueError: as `accelerate`; the present methods then stay, unless the
                new ones failed while they were being installed, which leaves the stock model.
        """
        model, configs = self._open().model, resolved(methods)
        for config in configs:
            find_host(model, config)
        with self._alone():
            self._uninstall()
            if configs:
                self.handle = accelerate(model, list(configs))
                self.methods = configs

    def close(self) -> None:
        """Remove the methods and let go of the model. A model that was passed in is the caller's, and stock again."""
        with self._alone():
            self._uninstall()
            self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._loaded is None:
            return f"<{type(self).__name__}: closed>"
        names = ", ".join(config.name() for config in self.methods) or "dense"
        return f"<{type(self).__name__} {self.source or type(self._loaded.model).__name__}: {names}>"

    def _open(self) -> Loaded:
        if self._loaded is None:
            raise RuntimeError(f"this {type(self).__name__} is closed; make another one")
        return self._loaded

    def _uninstall(self) -> None:
        handle, self.handle, self.methods = self.handle, None, ()
        if handle is not None:
            handle.remove()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the model for one run."""
        self._take()
        try:
            yield
        finally:
            self._busy.release()

    def _take(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(f"this {type(self).__name__} is running already; let that run end, or cancel it")

    @contextmanager
    def _recorded(self, dense: bool) -> Iterator[list[Report]]:
        """Record one run of the model, without what ran before it.

        Yields: a list that holds the report of each method that was on, once the block has ended well.
        Raises: NothingAccelerated if the model ran and a method that was on never acted.
        """
        handles = self.handle.handles if self.handle is not None else []
        switches = [handle.enabled for handle in handles]
        acting = [handle for handle in handles if handle.enabled and not dense]
        reports: list[Report] = []
        for handle in handles:
            handle.reset()
            handle.enabled = handle in acting
        try:
            yield reports
        finally:
            for handle, switch in zip(handles, switches, strict=True):
                handle.enabled = switch
        for handle in acting:
            handle.check()
            reports.append(handle.report())

    def _acting(self, dense: bool) -> tuple[MethodConfig, ...]:
        """The methods that a call would run under."""
        if dense or self.handle is None:
            return ()
        return tuple(handle.method for handle in self.handle.handles if handle.enabled)


def taken(
    kind: Kind, model: Any, *, device: str | None, dtype: str | None, load_device: str | None = None, processor: Any = None
) -> Loaded:  # fmt: skip
    """Load a model by name, or take one as it is.

    Args:
        device, dtype: as `load`; None is "auto" for a name. load_device: where to load to, if not to `device`.
    Raises:
        TypeError: device or dtype for a model that was passed in.
    """
    if isinstance(model, str):
        return load(model, device=load_device or device or "auto", dtype=dtype or "auto")
    given = [name for name, value in (("device", device), ("dtype", dtype)) if value is not None]
    if given:
        raise TypeError(
            f"{' and '.join(given)} can be chosen for a model that is loaded by name; this {type(model).__name__} is loaded "
            "already: move it with its own `to`, then pass it"
        )
    return Loaded(kind=kind, model=model, processor=processor)


def resolved(methods: Any) -> tuple[MethodConfig, ...]:
    """Configs of one method, of a list, or of none."""
    if methods is None:
        return ()
    return tuple(build(method) for method in (methods if isinstance(methods, list | tuple) else [methods]))


def check_prompts(prompts: Any, what: str) -> tuple[list[str], bool]:
    """The texts as a list, and whether there was a single one.

    Raises:
        TypeError: something other than text. ValueError: no text, or an empty one.
    """
    single = isinstance(prompts, str)
    if not single and (isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Sequence)):
        raise TypeError(f"a {what} must be a text or a list of texts, got {type(prompts).__name__}")
    texts = [prompts] if single else list(prompts)
    if not texts:
        raise ValueError(f"the list of {what}s is empty; pass at least one")
    for i, text in enumerate(texts):
        where = f"the {what}" if single else f"{what} {i}"
        if not isinstance(text, str):
            raise TypeError(f"{where} must be a text, got {text!r} of type {type(text).__name__}")
        if not text.strip():
            raise ValueError(f"{where} must be a text that is not empty, got {text!r}")
    return texts, single


def picture(value: Any, where: str) -> Image:
    """An image as RGB.

    Args: value: a path, a PIL image, or an array (H, W, 3) of uint8.
    Raises: MediaError for a file that cannot be read; TypeError, ValueError for anything else.
    """
    import numpy as np
    from PIL import Image

    from mmeff.video_io import read_image

    if isinstance(value, str | os.PathLike):
        return read_image(value)
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[-1] != 3 or 0 in value.shape:
            raise ValueError(f"{where} must be uint8 (H, W, 3), got {value.dtype} {value.shape}")
        return Image.fromarray(value)
    raise TypeError(f"{where} must be a path, a PIL image or a uint8 array (H, W, 3), got {type(value).__name__}")


def check_names(given: Mapping[str, Any], known: Sequence[str], advice: Mapping[str, str], who: str) -> None:
    """Raise TypeError for a setting that cannot be set here: what to do instead, or near matches."""
    for name in given:
        if name in advice:
            raise TypeError(f"{name} cannot be set for {who}: {advice[name]}")
        if name not in known:
            listed = f" Settings: {', '.join(known)}." if len(known) <= 40 else ""
            raise TypeError(f"{who} has no setting {name!r}.{suggest(name, known)}{listed}")
