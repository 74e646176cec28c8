"""The demo: the same video, picture or answer, dense and fast, side by side, in a browser.

No algorithm lives here: what runs is `mmeff.pipelines`, `mmeff.plan` and `mmeff.evaluation`. `Service` does what the tabs ask
for and knows no Gradio; `build_app` draws the page on any object that answers as `Service` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .settings import EMBEDDED as EMBEDDED
from .settings import Settings as Settings

if TYPE_CHECKING:
    from .app import build_app as build_app
    from .server import Server as Server
    from .server import serve as serve
    from .service import Service as Service

_WHERE = {"Server": "server", "Service": "service", "build_app": "app", "serve": "server"}
__all__ = ["EMBEDDED", "Server", "Service", "Settings", "build_app", "serve"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:  # Gradio is loaded with `build_app`, the models with their first use
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
