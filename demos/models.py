"""The models that visitors may choose from: known by name at once, loaded on first use, then shared by all.

Nothing is loaded that `Settings.models` does not name. A model is used inside `use` only, by one run at a time; methods are
installed there and gone afterwards, so no visitor meets another's.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .settings import Settings
from .turns import Ticket, Turns

Kind = Literal["video", "image", "vlm"]
EMBEDDED: dict[str, Kind] = {
    "tiny-video": "video", "tiny-image": "image", "tiny-vlm": "vlm", "tiny-video-vlm": "vlm",
}  # fmt: skip
IMAGE_PIPELINES = ("Flux",)  # beginnings of the class names of pipelines that make pictures, among those with a host


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One model of the demo: `name` that visitors see, `source` that is loaded (never shown), `kind`, and whether it is
    `embedded`."""

    name: str
    source: str
    kind: Kind
    embedded: bool


class Models:
    """Loads each model once.

    `offers` maps the names that visitors see to what they stand for. An embedded model that this installation does not carry
    is not offered.
    """

    def __init__(self, settings: Settings, turns: Turns) -> None:
        self.settings, self.turns = settings, turns
        self.offers: dict[str, Offer] = {}
        for source in settings.models:
            offer = offered(source)
            if offer is None:
                continue
            if offer.name in self.offers:
                raise ValueError(f"two models of the demo are both called {offer.name!r}; rename one of the folders")
            self.offers[offer.name] = offer
        if not self.offers:
            raise ValueError(f"none of the models {', '.join(settings.models)} is there; pass one by name or folder")
        self._loaded: dict[str, Any] = {}
        self._loading = threading.Lock()

    def names(self, *kinds: Kind) -> list[str]:
        """The names of the models of these kinds, in the order of the settings."""
        return [offer.name for offer in self.offers.values() if offer.kind in kinds]

    def offer(self, name: str, *kinds: Kind) -> Offer:
        """What a name stands for.

        Raises: ValueError for a name that is not offered, or is of another kind than one of `kinds`.
        """
        found = self.offers.get(name) if isinstance(name, str) else None
        if found is None or (kinds and found.kind not in kinds):
            known = ", ".join(self.names(*kinds) if kinds else self.offers) or "none"
            raise ValueError(f"model must be one that this demo offers here ({known}), got {str(name)[:80]!r}")
        return found

    @contextmanager
    def use(
        self, name: str, ticket: Ticket, *, waiting: Callable[[int], None] = lambda before: None,
        loading: Callable[[], None] = lambda: None,
    ) -> Iterator[Any]:  # fmt: skip
        """The `VideoGenerator` or `VisionLanguageModel` of this name for one run, alone, without methods; loads it at its first use.

        Args: waiting: told how many runs are before this one. loading: called where the model has to be loaded.
        Raises: ValueError as `offer`; Cancelled while it waits; whatever loading raises.
        """
        offer = self.offer(name)
        with self.turns.turn(ticket, waiting):
            if name not in self._loaded:
                loading()
            model = self.load(offer)
            try:
                yield model
            finally:
                model.use(None)

    def load(self, offer: Offer) -> Any:
        """The wrapper of a model, made at the first call."""
        with self._loading:
            if offer.name not in self._loaded:
                from mmeff.pipelines import VideoGenerator, VisionLanguageModel

                make: Any = VisionLanguageModel if offer.kind == "vlm" else VideoGenerator
                model = make(offer.source, device=self.settings.device, dtype=self.settings.dtype)
                if offer.kind != "vlm":
                    model.pipe.set_progress_bar_config(disable=True)  # the page shows the steps
                self._loaded[offer.name] = model
            return self._loaded[offer.name]

    def loaded(self, name: str) -> bool:
        """Whether the model is in memory."""
        return name in self._loaded


def offered(source: str) -> Offer | None:
    """What a name of the settings stands for; None for an embedded model that is not there.

    Raises: FileNotFoundError, UnsupportedModel for a name that leads to no model.
    """
    if source in EMBEDDED:
        from mmeff import tiny

        if not (tiny.data_folder() / source).is_dir():
            return None
        return Offer(name=source, source=source, kind=EMBEDDED[source], embedded=True)
    folder = Path(source)
    name = folder.resolve().name if folder.is_dir() else source
    return Offer(name=name, source=source, kind=_kind(source), embedded=False)


def _kind(source: str) -> Kind:
    """What a folder or a hub name holds, by the file that every diffusers pipeline has."""
    folder = Path(source)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(
                    f"{folder} holds neither model_index.json nor config.json; it is no model folder"
                )
            return "vlm"
    else:
        if folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"no model at {source}; pass a folder, a hub name such as organisation/model, or one of {', '.join(EMBEDDED)}"
            )
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            index = Path(hf_hub_download(source, "model_index.json"))
        except EntryNotFoundError:
            return "vlm"
    name = str(json.loads(index.read_text("utf-8")).get("_class_name", ""))
    return "image" if name.startswith(IMAGE_PIPELINES) else "video"
