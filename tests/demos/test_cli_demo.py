"""`mmeff demo` and where it finds the demo."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from typer.testing import CliRunner

from mmeff import cli, cli_demo
from mmeff.errors import BackendUnavailable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def served(monkeypatch):
    """What `serve` is called with, in place of serving."""
    calls = []

    def serve(settings, **options):
        calls.append((settings, options))
        nothing = SimpleNamespace(url="http://127.0.0.1:1/", shared=None, wait=lambda: None)
        nothing.close = lambda: calls.append("closed")
        return nothing

    monkeypatch.setattr(cli_demo.load_demos(), "serve", serve)
    return calls


def invoke(*args):
    result = CliRunner().invoke(cli.app, ["demo", *args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_defaults_are_this_machine_and_the_embedded_models(served):
    assert "http://127.0.0.1:1/" in invoke().stdout
    (settings, options), closed = served
    assert options == {"host": "127.0.0.1", "port": 7860, "share": False} and closed == "closed"
    assert settings.models == cli_demo.load_demos().EMBEDDED and settings.per_user == 2


def test_options_reach_the_settings(served):
    invoke("-m", "a/b", "-m", "c/d", "--no-embedded", "--port", "0", "--host", "0.0.0.0", "--per-user", "5", "--queue", "7",
           "--max-upload-mb", "1.5", "--max-steps", "9", "--max-frames", "8", "--max-pixels", "77", "--device", "cpu",
           "--dtype", "float32", "--share")  # fmt: skip
    settings, options = served[0]
    assert settings.models == ("a/b", "c/d") and options == {"host": "0.0.0.0", "port": None, "share": True}
    assert (settings.per_user, settings.queue, settings.max_upload_mb, settings.max_steps) == (5, 7, 1.5, 9)
    assert (settings.max_frames, settings.max_pixels, settings.device, settings.dtype) == (8, 77, "cpu", "float32")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--no-embedded",), "--no-embedded leaves no model to offer"),
        (("--per-user", "0"), "per_user must be > 0, got 0"),
        (("--max-upload-mb", "-1"), r"max_upload_mb must be > 0, got -1\.0"),
    ],
)
def test_settings_that_make_no_sense(served, args, message):
    with pytest.raises(ValueError, match=message):
        invoke(*args)
    assert served == []


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cli_demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'mmeff\[demo\]'"):
        cli_demo.load_demos()


def test_the_package_of_the_checkout_is_found_under_the_librarys_name(monkeypatch, tmp_path):
    found = cli_demo.load_demos()
    assert found.__name__ == "mmeff.demos" and Path(found.__file__) == ROOT / "demos" / "__init__.py"
    monkeypatch.delitem(sys.modules, "mmeff.demos")
    (tmp_path / "mmeff").mkdir()
    monkeypatch.setattr(cli_demo.mmeff, "__file__", str(tmp_path / "mmeff" / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="reinstall mmeff"):
        cli_demo.load_demos()
    (tmp_path / "mmeff" / "demos").mkdir()
    (tmp_path / "mmeff" / "demos" / "__init__.py").write_text("MARK = 3\n")  # as it lies in a wheel
    assert cli_demo.load_demos().MARK == 3
    del sys.modules["mmeff.demos"]


def test_the_command_serves_and_stops(tmp_path):
    """As a user starts it: a page within seconds, and nothing left behind after Ctrl+C."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path), "PYTHONFAULTHANDLER": "1"}
    began = time.monotonic()
    command = [sys.executable, "-m", "mmeff.cli", "demo", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # tests that a shell runs behind `&` ignore it
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert address, line + process.stderr.read()
        page = httpx.get(address.group(), timeout=30)
        seconds = time.monotonic() - began
        assert page.status_code == 200 and "mmeff demo" in page.text
        assert seconds < 60  # under 10 on two idle cores; here other tests run beside it
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # which prints where every thread stands
            pytest.fail(f"Ctrl+C did not stop it:\n{process.communicate()[1]}")
        assert code in (0, 130)
    finally:
        process.kill()
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith("mmeff-")] == []
