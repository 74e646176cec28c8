"""Dense runs that were made before: the same model, prompt, seed and settings need not run again for the next method."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmeff.pipelines import Clip


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A dense clip, and when it was made, in seconds since 1970."""

    clip: Clip
    made: float


class DenseRuns:
    """The dense clips that were asked for last, as many as fit.

    Args: megabytes: of frames; a clip that is larger is not kept.
    """

    def __init__(self, megabytes: float) -> None:
        self._most = int(megabytes * 1_000_000)
        self._clips: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Kept | None:
        """The clip of this key, if it is still there."""
        with self._lock:
            if key in self._clips:
                self._clips.move_to_end(key)
            return self._clips.get(key)

    def put(self, key: Hashable, clip: Clip) -> None:
        """Keep a clip; those that were not asked for longest make room."""
        with self._lock:
            self._clips[key] = Kept(clip=clip, made=time.time())
            self._clips.move_to_end(key)
            while self._clips and sum(kept.clip.frames.nbytes for kept in self._clips.values()) > self._most:
                self._clips.popitem(last=False)

    def __len__(self) -> int:
        return len(self._clips)
