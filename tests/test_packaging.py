"""What a user installs: light import, entry points, files in the wheel, pins within the ranges, current docs."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmeff

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("torch", "triton", "diffusers", "transformers", "timm", "gradio", "cv2")


# --- import ------------------------------------------------------------------------------------------------------------


def probe(statement: str) -> tuple[list[str], float]:
    """The heavy modules that a statement loads in a fresh interpreter, and the CPU seconds it takes."""
    code = (
        f"import sys, time, json; begin = time.process_time(); {statement}; spent = time.process_time() - begin\n"
        f"print(json.dumps([[m for m in {HEAVY!r} if m in sys.modules], spent]))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded, seconds = json.loads(out)
    return loaded, seconds


def test_import_is_light():
    results = [probe("import mmeff") for _ in range(3)]
    assert results[0][0] == []
    assert min(seconds for _, seconds in results) < 0.5


def test_the_probe_sees_what_is_loaded():
    assert probe("import mmeff.kernels")[0] == ["torch"]


# --- metadata ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed() -> str:
    try:
        return version("mmeff")
    except PackageNotFoundError:
        pytest.skip("mmeff is not installed in this environment; `make venv` installs it")


def test_version_has_one_source(installed):
    assert installed == mmeff.__version__, "the installed metadata is older than the code; run pip install -e . again"
    assert "version" in PROJECT["project"]["dynamic"]


def test_command_resolves(installed):
    (point,) = entry_points(group="console_scripts", name="mmeff")
    assert callable(point.load())


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines)}


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_pin_lies_in_the_range(requirement):
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_ranges_admit_the_oldest_supported_versions():
    oldest = {"torch": "2.11.0", "torchvision": "0.26.0", "transformers": "5.17.0"}
    ranges = {r.name: r.specifier for r in requirements()}
    assert all(ranges[name].contains(v) for name, v in oldest.items())
    assert not ranges["torch"].contains("2.10.0")


# --- the built package -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_copy(tmp_path):
    """The project's packaging files around a few files of each kind that must travel."""
    for name in ("pyproject.toml", "LICENSE", ".gitignore", "mmeff/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in (
        "README.md",
        "mmeff/kernels/block_sparse/native.c",
        "mmeff/evaluation/report.html.j2",
        "data/tiny-vlm/model.safetensors",
        "data/tiny-video/transformer/config.json",
        "data/samples/clip.mp4",
        "demos/app.py",
        "demos/static/demo.js",
        "benchmarks/results/cpu.jsonl",
        "benchmarks/runner.py",
        "tests/test_x.py",
        "runs/first/results.json",
        "data/samples/__pycache__/x.pyc",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def build(root: Path, kind: str, version: str = "standard") -> Path:
    builder = pytest.importorskip(
        f"hatchling.builders.{kind}", reason="hatchling is not installed; it is in mmeff[dev]"
    )
    make = {"wheel": "WheelBuilder", "sdist": "SdistBuilder"}[kind]
    return Path(next(getattr(builder, make)(str(root)).build(directory=str(root / "dist"), versions=[version])))


def unpacked_sdist(root: Path) -> Path:
    shutil.unpack_archive(build(root, "sdist"), root / "unpacked", filter="data")
    (source,) = (root / "unpacked").iterdir()
    return source


@pytest.mark.parametrize("through_sdist", [False, True], ids=["from checkout", "from sdist"])
def test_wheel_carries_data_and_sources(small_copy, through_sdist):
    source = unpacked_sdist(small_copy) if through_sdist else small_copy
    names = {n for n in zipfile.ZipFile(build(source, "wheel")).namelist() if ".dist-info/" not in n}
    assert names == {
        "mmeff/__init__.py",
        "mmeff/kernels/block_sparse/native.c",
        "mmeff/evaluation/report.html.j2",
        "mmeff/data/tiny-vlm/model.safetensors",
        "mmeff/data/tiny-video/transformer/config.json",
        "mmeff/data/samples/clip.mp4",
        "mmeff/demos/app.py",
        "mmeff/demos/static/demo.js",
        "mmeff/demos/rows/cpu.jsonl",
    }


def test_editable_install_copies_nothing(small_copy):
    wheel = zipfile.ZipFile(build(small_copy, "wheel", "editable"))
    (path,) = (n for n in wheel.namelist() if ".dist-info/" not in n)
    assert path.endswith(".pth")
    assert Path(wheel.read(path).decode().strip()) == small_copy.resolve()


def test_wheel_states_licence_and_command(small_copy):
    wheel = zipfile.ZipFile(build(small_copy, "wheel"))
    info = f"mmeff-{mmeff.__version__}.dist-info"
    assert "License-Expression: Apache-2.0" in wheel.read(f"{info}/METADATA").decode()
    assert "mmeff = mmeff.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


# --- repository --------------------------------------------------------------------------------------------------------


def test_tests_are_no_package():
    """tests/kernels with an __init__.py would become a package called `kernels`, which transformers looks for."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tables():
    return script("make_tables")


def test_measured_tables_are_current(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    results = script("make_results")
    assert results.main(["--check"]) == 0, capsys.readouterr().err
    for page in ("quality.md", "pruning-results.md", "acting.md"):
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "docs" / page).read_text()):
            assert (ROOT / "docs" / picture).is_file(), f"{page} shows {picture}"


@pytest.mark.parametrize("name", ["README.md", "docs/methods.md"])
def test_method_tables_are_current(tables, name, tmp_path, capsys):
    empty = f"{BEGIN}\n{END}\n"
    for other in ("README.md", "docs/methods.md"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(empty)
    assert tables.main([], root=tmp_path) == 0
    (tmp_path / name).write_text((ROOT / name).read_text())
    assert tables.main(["--check"], root=tmp_path) == 0, capsys.readouterr().err


def test_stale_tables_are_named_and_then_written(tables, tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    (tmp_path / "docs/methods.md").write_text(f"{BEGIN}\n{END}\n")
    assert tables.main(["--check"], root=tmp_path) == 1
    assert "README.md, docs/methods.md" in capsys.readouterr().err
    assert "old" in (tmp_path / "README.md").read_text(), "--check changed a file"
    assert tables.main([], root=tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert all(f"`{m.config.__name__}`" in text for m in mmeff.methods())
    assert tables.main(["--check"], root=tmp_path) == 0


@pytest.mark.parametrize("text", ["no markers", "{END}{BEGIN}", "{BEGIN}{BEGIN}{END}"])
def test_missing_markers_are_named(tables, text):
    text = text.format(BEGIN=BEGIN, END=END)
    with pytest.raises(ValueError, match=r"README.md must hold the line <!-- methods:begin --> once"):
        tables.put_between(text, "new", "README.md")


def test_cells_cannot_break_a_table(tables):
    assert tables.table(["a"], [["x | y\nz"]]).splitlines()[-1] == "| x \\| y z |"
