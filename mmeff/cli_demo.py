"""`mmeff demo`: the library in a browser, dense and fast side by side.

    mmeff demo
    mmeff demo --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --device cuda

Visitors choose among the models that were named here, and the embedded ones; they cannot make the server load another.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

import mmeff
from mmeff.errors import BackendUnavailable

err_console = Console(stderr=True)


def register(app: typer.Typer) -> None:
    """Add `demo` to the command line."""
    app.command("demo")(demo)


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="A folder or hub name that visitors may choose as well. May be repeated."),
    ] = None,
    embedded: Annotated[bool, typer.Option(help="Offer the embedded tiny models too.")] = True,
    backbones: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints for the tab Backbones, such as nat_mini.safetensors.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets the network in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one from 7860 on.")] = 7860,
    share: Annotated[bool, typer.Option(help="Also a public address, through Gradio's relay.")] = False,
    per_user: Annotated[int, typer.Option(help="Runs that one visitor may have waiting or running.")] = 2,
    queue: Annotated[int, typer.Option(help="Runs that all visitors may have waiting or running.")] = 24,
    max_upload_mb: Annotated[float, typer.Option(help="Largest file that a visitor may send, in MB.")] = 20,
    max_steps: Annotated[int, typer.Option(help="Most denoising steps of a run.")] = 100,
    max_frames: Annotated[int, typer.Option(help="Most frames of a video.")] = 161,
    max_pixels: Annotated[int, typer.Option(help="Most pixels of a frame, height times width.")] = 1280 * 1280,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Open the demo in a browser: generate and ask, dense and accelerated side by side, on the embedded models or your own.

    One run at a time, in the order of arrival, because every figure on the page is a time. It listens on this machine alone
    unless --host or --share says otherwise.
    """
    demos = load_demos()
    names = (*(demos.EMBEDDED if embedded else ()), *(model or ()))
    if not names:
        raise ValueError("--no-embedded leaves no model to offer; pass --model")
    settings = demos.Settings(
        models=names, device=device, dtype=dtype, per_user=per_user, queue=queue, max_upload_mb=max_upload_mb,
        max_steps=max_steps, max_frames=max_frames, max_pixels=max_pixels,
        backbones=None if backbones is None else str(backbones),
    )  # fmt: skip
    err_console.print("starting; the models are loaded at their first use", style="dim")
    server = demos.serve(settings, host=host, port=port or None, share=share)
    try:
        print(f"mmeff demo: {server.url}" + (f" and {server.shared}" if server.shared else ""), flush=True)
        err_console.print("Ctrl+C stops it", style="dim")
        server.wait()
    finally:
        server.close()


def load_demos() -> Any:
    """The package of the demo: inside an installed mmeff, or beside it in a checkout.

    Raises:
        BackendUnavailable: Gradio is not installed. FileNotFoundError: the demo is not there.
    """
    if importlib.util.find_spec("gradio") is None:
        raise BackendUnavailable("the demo needs Gradio, which is not installed; pip install 'mmeff[demo]'")
    name, package = "mmeff.demos", Path(mmeff.__file__).resolve().parent
    if name in sys.modules:
        return sys.modules[name]
    for folder in (package / "demos", package.parent / "demos"):
        if (folder / "__init__.py").is_file():
            return _package(name, folder)
    raise FileNotFoundError(
        f"the demo is neither in {package / 'demos'} nor in {package.parent / 'demos'}; reinstall mmeff"
    )


def _package(name: str, folder: Path) -> ModuleType:
    """Import a folder as a package of this name, whatever else on the path is called `demos`."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None  # for a file that is there
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
