"""Starts and stops the demo: a private folder for uploads, the page's style, the addresses of runs, and nothing else served."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from .runs import ROUTE
from .settings import Settings

STATIC = Path(__file__).parent / "static"
log = logging.getLogger("mmeff.demo")


class Server:
    """A running demo. `url` is where it listens, `shared` the public address where one was asked for."""

    def __init__(self, app: Any, service: Any, url: str, shared: str | None, uploads: str, *, warm: bool) -> None:
        self.app, self.service, self.url, self.shared = app, service, url, shared
        self._uploads, self._closed = uploads, threading.Event()
        self._warming = threading.Thread(
            target=_warm, args=(service, self._closed), name="mmeff-demo-warm", daemon=True
        )
        if warm:
            self._warming.start()

    def wait(self) -> None:
        """Serve until the process is interrupted."""
        self.app.block_thread()

    def close(self) -> None:
        """Stop listening, and delete uploads and runs."""
        self._closed.set()
        self.app.close(verbose=False)
        self.service.close()
        shutil.rmtree(self._uploads, ignore_errors=True)


def serve(
    settings: Settings | None = None, *, host: str = "127.0.0.1", port: int | None = 7860, share: bool = False,
    warm: bool = True, service: Any = None,
) -> Server:  # fmt: skip
    """Start the demo and return at once.

    Args:
        host: "127.0.0.1" is this machine alone; "0.0.0.0" lets the network in.
        port: None takes a free one from 7860 on.
        share: also a public address through Gradio's relay.
        warm: import the model libraries, and load the embedded models, in the background while the page is already there.
        service: in place of `Service(settings)`.
    Raises:
        OSError: the port is taken. ValueError: as `Settings` and `Models`.
    """
    uploads = mkdtemp(prefix="mmeff-uploads-")
    # Gradio takes what lies in its folder for uploads, and by default shares that folder with every other app of the machine.
    os.environ["GRADIO_TEMP_DIR"] = uploads
    from .app import build_app
    from .service import Service
    from .style import theme

    service = service or Service(settings)
    app = build_app(service)
    most = service.settings.queue
    app.queue(max_size=2 * most + 64, default_concurrency_limit=8, api_open=False)
    head = f"<style>{(STATIC / 'page.css').read_text('utf-8')}</style>"
    head += f"<script type='module'>{(STATIC / 'demo.js').read_text('utf-8')}</script>"
    _, url, shared = app.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, inbrowser=False,
        show_error=False, footer_links=[], run_history=False, enable_monitoring=False, ssr_mode=False, mcp_server=False,
        pwa=False, max_threads=most + 48, max_file_size=int(service.settings.max_upload_mb * 1_000_000),
        allowed_paths=[], theme=theme(), css_paths=sorted(STATIC.glob("*.css")), head=head,
        favicon_path=STATIC / "favicon.svg", app_kwargs={"routes": [_route(service)], "docs_url": None, "redoc_url": None},
    )  # fmt: skip
    return Server(app, service, url, shared, uploads, warm=warm)


def _route(service: Any) -> Any:
    """The files of runs, by their published names."""
    from starlette.requests import Request
    from starlette.responses import FileResponse, PlainTextResponse, Response
    from starlette.routing import Route

    def answer(request: Request) -> Response:
        found = service.runs.file(request.path_params["run"], request.path_params["name"])
        if found is None or not found.is_file():
            return PlainTextResponse("this file is not kept any more; run it again", status_code=404)
        return FileResponse(found, filename=found.name, content_disposition_type="inline",
                            headers={"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"})  # fmt: skip

    return Route(ROUTE, answer, methods=["GET", "HEAD"])


def _warm(service: Any, closed: threading.Event) -> None:
    """Load what is small, so that the first visitor does not wait for imports."""
    from mmeff.registry import all_methods

    all_methods()
    for offer in list(service.models.offers.values()):
        if offer.embedded:
            while service.turns.waiting and not closed.is_set():  # a run is being timed
                time.sleep(0.2)
            if closed.is_set():
                return
            try:
                service.models.load(offer)
            except Exception:  # the visitor who chooses it is told; the others can go on
                log.exception("%s could not be loaded", offer.name)
