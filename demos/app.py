"""The page: header, tabs, style, and how a tab's function meets the browser.

`build_app` only draws; nothing is loaded and nothing listens until `launch`.
"""

from __future__ import annotations

import functools
import html
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from mmeff.errors import MmeffError
from mmeff.report import environment

from . import views
from .settings import Settings

EXPECTED = (ValueError, TypeError, OSError, MmeffError)
LONGEST = 800  # characters of a message; some repeat what a visitor sent
log = logging.getLogger("mmeff.demo")


class Page:
    """What tabs share: the settings, how a function is called for a visitor, and the queue's arguments."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Waiting happens in `Turns`, which knows visitors; Gradio's own queue must let every admitted run in, and one more,
        # which is told that the server is busy.
        self.concurrency: dict[str, Any] = {"concurrency_limit": settings.queue + 8, "concurrency_id": "runs"}
        self.quick: dict[str, Any] = {"concurrency_limit": 8, "concurrency_id": "quick"}  # what only reads

    def user(self, request: gr.Request | None) -> str:
        """Who asks: the page's or the client's session."""
        return str(getattr(request, "session_hash", None) or "nobody")

    def leave(self, service: Any) -> Callable[..., None]:
        """What happens when a visitor closes the page: nothing goes on for nobody."""

        def leave(request: gr.Request) -> None:
            service.cancel(self.user(request))

        return leave

    def run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with every error turned into a message: the text of those that explain themselves, one line for others."""
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
                try:
                    yield from function(*args, **kwargs)
                except Exception as error:
                    raise message(error) from None

            return stream

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                raise message(error) from None

        return call


def message(error: Exception) -> gr.Error:
    """What a visitor is told of an error."""
    if isinstance(error, gr.Error):
        return error
    if isinstance(error, EXPECTED):
        return gr.Error(html.escape(public(str(error)), quote=False), duration=None, print_exception=False)
    log.error("a run failed", exc_info=error)
    return gr.Error("internal error; the server's log says more", duration=None, print_exception=False)


def public(text: str) -> str:
    """A message without the server's folders: an absolute path is cut to its last name, and what is too long to read, too."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return re.sub(r"(?<![\w:/.<])/(?:[^\s/:'\",;()]+/)+([^\s/:'\",;()]*)", r"\1", text)


def build_app(service: Any) -> gr.Blocks:
    """The page on a service. Nothing is loaded and nothing listens.

    Args: service: a `Service`, or anything that answers as it does.
    """
    from . import endpoints, tab_ask, tab_backbones, tab_benchmarks, tab_generate

    page = Page(service.settings)
    with gr.Blocks(title="mmeff demo", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as app:
        endpoints.build(service, page)  # first: a page's own functions must not take their names
        gr.HTML(views.header(environment()), elem_id="header", padding=False, elem_classes="mm-html")
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Generate", id="generate"):
                tab_generate.build(service, page, "video")
            with gr.Tab("Images", id="images"):
                tab_generate.build(service, page, "image")
            with gr.Tab("Ask", id="ask"):
                tab_ask.build(service, page)
            with gr.Tab("Backbones", id="backbones"):
                tab_backbones.build(service, page)
            with gr.Tab("Benchmarks", id="benchmarks"):
                tab_benchmarks.build(service, page)
        app.unload(page.leave(service))
    return app
