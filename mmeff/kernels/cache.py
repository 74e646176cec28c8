"""Where the kernels keep what they make once per machine: compiled code, calibrations, tuning tables."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """Return the directory for such files, made if need be.

    It is $MMEFF_CACHE if that is set, else $XDG_CACHE_HOME/mmeff, else ~/.cache/mmeff; `parts` are folders below it.
    Everything in it may be deleted at any time and is made again on demand.

    Raises: OSError if the directory cannot be made.
    """
    named = os.environ.get("MMEFF_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmeff"
    path = base.expanduser().joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path
