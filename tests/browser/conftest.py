"""A real browser on a real server with the embedded models.

The browser is the system's Chromium. Where there is none the tests are skipped with a reason, unless MMEFF_REQUIRE_BROWSER is
set, as the continuous integration does: there its absence is a failure. MMEFF_SCREENSHOTS=folder writes the pictures of the docs.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from browsing import DESKTOP, SLOW

REQUIRED = bool(os.environ.get("MMEFF_REQUIRE_BROWSER"))


def missing(reason):
    (pytest.fail if REQUIRED else pytest.skip)(reason)


@pytest.fixture(scope="session")
def server():
    pytest.importorskip("gradio", reason="Gradio is not installed; it is in mmeff[demo]")
    from demos import Settings, serve

    running = serve(Settings(per_user=2, max_upload_mb=1, max_steps=1000), port=None, warm=False)
    yield running
    running.close()


@pytest.fixture(scope="session")
def chromium():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("Playwright is not installed; it is in mmeff[dev]")
    path = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
    if path is None:
        missing("no Chromium on this machine; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def desktop(chromium):
    """A context that plain pages share, so that Gradio's scripts are read once; every page is a visitor of its own anyway."""
    context = chromium.new_context(**DESKTOP)
    yield context
    context.close()


@pytest.fixture
def open_page(chromium, desktop, server):
    """Open the demo; afterwards no page may have failed, asked another host, or opened a dialog.

    With options, in a context of its own.
    """
    opens, problems = [], []

    def opened(tab=None, **options):
        context = chromium.new_context(**{**DESKTOP, **options}) if options else desktop
        page = context.new_page()
        opens.append(context if options else page)
        page.set_default_timeout(SLOW)
        page.on("pageerror", lambda error: problems.append(f"script: {error}"))
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: foreign(request.url))
        page.goto(server.url)
        page.get_by_role("tab", name="Generate").wait_for()
        if tab:
            page.get_by_role("tab", name=tab).click()
        return page

    def foreign(url):
        if not url.startswith((server.url, "data:", "blob:")):
            problems.append(f"request to {url}")

    yield opened
    for one in opens:
        one.close()
    assert problems == []


@pytest.fixture
def screenshot():
    """Write a picture of the page for the docs, where they are asked for."""

    def take(page, name, **options):
        folder = os.environ.get("MMEFF_SCREENSHOTS")
        if folder:
            page.screenshot(path=Path(folder) / f"demo-{name}.png", **options)

    return take
