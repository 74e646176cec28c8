"""The page on a service that runs nothing: it is drawn without listening, and every error becomes a message."""

from __future__ import annotations

import logging
import subprocess
import sys

import gradio as gr
import pytest

from demos import Settings, build_app
from demos.app import Page, message, public
from demos.service import Service
from demos.tab_generate import Panel
from mmeff.errors import MediaError


class FakeGenerating:
    def defaults(self, model):
        return {"note": "a fake"}

    def plan(self, wish):
        raise ValueError(f"no plan for {wish.prompt}, looked in /srv/secret/models/a.json")


@pytest.fixture
def service():
    """A service whose models are never loaded."""
    made = Service(Settings(models=("tiny-video", "tiny-vlm")))
    made.generating = FakeGenerating()
    yield made
    made.close()


@pytest.fixture
def page():
    return Page(Settings())


def test_the_page_is_drawn_and_nothing_is_loaded(service):
    app = build_app(service)
    assert isinstance(app, gr.Blocks) and not app.is_running and app.analytics_enabled is False
    assert not service.models.loaded("tiny-video")


def test_importing_the_package_loads_neither_gradio_nor_torch():
    code = "import sys, demos; demos.Settings(); print([m for m in ('gradio', 'torch') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_every_public_endpoint_is_documented(service):
    named = build_app(service).get_api_info()["named_endpoints"]
    assert {"/models", "/methods", "/plan", "/generate", "/cancel"} <= named.keys()
    for name, endpoint in named.items():
        assert endpoint.get("description"), name
    given = {one["parameter_name"] for one in named["/generate"]["parameters"]}
    assert given == {"prompt", "model", "methods", "seed", "sizes", "image"}


def test_no_model_of_a_kind_is_said(service):
    texts = [str(block.value) for block in build_app(service).blocks.values() if isinstance(block, gr.HTML)]
    assert any("No model that makes pictures is offered" in text for text in texts)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("steps must be > 0, got <b>-1</b>"), "steps must be &gt; 0, got &lt;b&gt;-1&lt;/b&gt;"),
        (MediaError("/srv/secret/up/photo.png is empty"), "photo.png is empty"),
        (FileNotFoundError("no folder at '/srv/secret/model'"), "no folder at 'model'"),
        (KeyError("/srv/secret/x"), "internal error; the server's log says more"),
        (RuntimeError("CUDA went away at /srv/secret/x"), "internal error; the server's log says more"),
        (gr.Error("as it is"), "as it is"),
    ],
)
def test_what_a_visitor_is_told(page, caplog, error, text):
    def fails():
        raise error

    def fails_later():
        yield 1
        raise error

    for call in (page.run(fails), lambda: list(page.run(fails_later)())):
        with caplog.at_level(logging.ERROR), pytest.raises(gr.Error) as caught:
            call()
        assert caught.value.message == text and "secret" not in caught.value.message
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert ("a run failed" in caplog.text) == ("internal" in text)


def test_long_messages_are_cut():
    assert len(message(ValueError("x" * 100_000)).message) <= 800


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read /tmp/gradio/abc/photo.png: broken", "cannot read photo.png: broken"),
        ("'/a/b c/d.txt' and (/e/f)", "'b c/d.txt' and (f)"),
        ("at https://example.org/a/b and 3/4 of 1/2", "at https://example.org/a/b and 3/4 of 1/2"),
        ("size 8 / 16", "size 8 / 16"),
    ],
)
def test_paths_are_cut_to_their_names(text, shown):
    assert public(text) == shown


def test_wrapped_functions_keep_their_names_and_values(page):
    def doubled(x: int) -> int:
        """Twice."""
        return 2 * x

    assert (
        page.run(doubled)(3) == 6 and page.run(doubled).__name__ == "doubled" and page.run(doubled).__doc__ == "Twice."
    )
    assert list(page.run(lambda: (i for i in range(3)))()) == [0, 1, 2]


def test_a_plan_that_cannot_be_made_is_shown_in_its_place(service, page):
    with gr.Blocks():
        panel = Panel(service, page, "video", ["tiny-video"])
        panel.draw()
    fields = [component.value for form in panel.forms for component in form.components]
    values = ["<i>p</i>", None, "tiny-video", ["radial"], 0, 20, 2.0, 48, 48, 17, *fields]
    plan, _, banner = panel.look_ahead(*values)
    assert "no plan for &lt;i&gt;p&lt;/i&gt;, looked in a.json" in plan and "mm-error" in plan and "a fake" in banner
    values[3] = []
    assert "Tick a method" in panel.look_ahead(*values)[0]


def test_the_components_become_a_wish(service, page):
    with gr.Blocks():
        panel = Panel(service, page, "video", ["tiny-video"])
        panel.draw()
    fields = [component.value for form in panel.forms for component in form.components]
    made = panel.wish("p", None, "tiny-video", ["gna", "radial"], 7, 20, None, 48, None, 17, *fields)
    assert [method.name() for method in made.methods] == ["gna", "radial"] and made.seed == 7
    assert made.sizes == {"num_inference_steps": 20, "height": 48, "num_frames": 17}
    assert made.methods[1].block == 4  # what suits the embedded model
