"""The errors mmeff raises on purpose. Each message says what must hold, what arrived and what to do.

`ValueError` and `TypeError` stay what they are everywhere else; the types below exist where a caller may want to
tell one cause from another. All of them derive from a builtin, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MmeffError(Exception):
    """Base of every error that only mmeff raises."""


class UnknownMethod(MmeffError, LookupError):
    """A method name that nothing in the registry answers to; the message lists near matches."""


class UnsupportedModel(MmeffError, TypeError):
    """No host knows this model, or the host knows why this particular model cannot be accelerated."""


class BackendUnavailable(MmeffError, RuntimeError):
    """A kernel backend named by the user cannot run this problem here; the message carries its `why_not`."""


class AlreadyAccelerated(MmeffError, RuntimeError):
    """A second method of the same stage on the same model."""


class NothingAccelerated(MmeffError, RuntimeError):
    """A method was installed and the model ran, but the method never acted."""


class MediaError(MmeffError, ValueError):
    """An image or video that is missing, empty, corrupt or of a kind that cannot be read."""


def suggest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ` Did you mean ...?` for near matches of `name` among `known`, or an empty string."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), [k.lower() for k in known], n=limit, cutoff=0.5)
    spelled = [k for n in near for k in known if k.lower() == n]
    return f" Did you mean {' or '.join(repr(s) for s in dict.fromkeys(spelled))}?" if spelled else ""
