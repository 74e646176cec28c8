"""Compiling kernels at first use: the cache, its keys, and what is said where it cannot work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmeff.kernels import native_build

COMPILER = next(filter(shutil.which, native_build.COMPILERS), None)
needs_compiler = pytest.mark.skipif(
    COMPILER is None or native_build.instruction_set() is None, reason="no C compiler, or no AVX2"
)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "answer.c"
    path.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    return path


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache of this test's own, and a process that has found nothing out yet."""
    monkeypatch.setenv("MMEFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MMEFF_NATIVE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    forget()
    yield
    forget()


def forget():
    native_build._build.cache_clear()


@pytest.fixture
def commands(monkeypatch):
    """Every compiler command that runs."""
    seen, run = [], subprocess.run

    def recorded(command, **options):
        seen.append(command)
        return run(command, **options)

    monkeypatch.setattr(native_build.subprocess, "run", recorded)
    return seen


def compiled(commands):
    return sum("-o" in command for command in commands)


def files(tmp_path):
    return sorted((tmp_path / "cache" / "native").iterdir())


@needs_compiler
def test_a_process_compiles_once_and_later_ones_find_it(source, commands, tmp_path):
    built = native_build.build(source, source.with_name("answer.h"))
    assert built.reason is None and built.library.answer() == 42
    assert native_build.build(source, source.with_name("answer.h")) is built
    assert len(files(tmp_path)) == 1 and compiled(commands) == 1
    forget()  # what another process starts with
    assert native_build.build(source, source.with_name("answer.h")).library.answer() == 42
    assert compiled(commands) == 1


@needs_compiler
@pytest.mark.parametrize("change", ["header", "flags", "compiler"])
def test_whatever_could_change_the_library_makes_a_new_one(source, commands, tmp_path, monkeypatch, change):
    header = source.with_name("answer.h")
    native_build.build(source, header)
    forget()
    if change == "header":
        header.write_text("#define ANSWER 43\n")
    elif change == "flags":
        monkeypatch.setattr(native_build, "COMMON_FLAGS", (*native_build.COMMON_FLAGS, "-DX"))
    else:
        found = native_build.find_compiler()
        newer = native_build.Compiler(found.command, found.version + ".1")
        monkeypatch.setattr(native_build, "find_compiler", lambda: newer)
    assert native_build.build(source, header).library.answer() == (43 if change == "header" else 42)
    assert compiled(commands) == 2 and len(files(tmp_path)) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["cut short", "empty", "altered"])
def test_a_damaged_file_is_never_loaded(source, commands, tmp_path, damage):
    native_build.build(source)
    forget()
    (path,) = files(tmp_path)
    content = path.read_bytes()
    path.unlink()  # the library of this process stays as it was
    path.write_bytes({"cut short": content[:-100], "empty": b"", "altered": b"\0" + content[1:]}[damage])
    assert native_build.build(source).library.answer() == 42
    assert compiled(commands) == 2 and native_build._is_whole(path)


@needs_compiler
def test_processes_may_compile_at_the_same_time(source, tmp_path):
    code = (
        "import sys; from pathlib import Path; from mmeff.kernels import native_build\n"
        "print(native_build.build(Path(sys.argv[1])).library.answer())"
    )

    def process(_):
        return subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True).stdout.strip()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(process, range(3))) == ["42"] * 3
    assert [x.suffix for x in files(tmp_path)] == [".so"], "temporary files are removed"


@needs_compiler
def test_the_checked_in_kernel_compiles_without_a_warning():
    from mmeff.kernels.block_sparse import native

    isa, flags = native_build.instruction_set()
    command = [COMPILER, *native_build.COMMON_FLAGS, *flags, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run([*command, str(native.HERE / "native.c")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert native._build().reason is None and native._build().isa == isa


# ---------------------------------------------------------------- what cannot work says why


@pytest.mark.skipif(not os.path.exists("/bin/false"), reason="no /bin/false")
def test_a_compiler_that_fails(source, monkeypatch, commands):
    monkeypatch.setenv("CC", "/bin/false")
    built = native_build.build(source)
    assert built.library is None
    if native_build.instruction_set() is not None:
        assert built.reason == "the C compiler '/bin/false' fails (exit status 1); set CC to one that works"
        assert native_build.build(source) is built and len(commands) == 1, "a process asks once"


@needs_compiler
def test_a_compiler_that_is_not_there(source, monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc -m64")
    reason = native_build.build(source).reason
    assert reason.startswith("the C compiler cannot be run (") and reason.endswith("; set CC to one that works")
    monkeypatch.delenv("CC")
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    forget()
    assert native_build.build(source).reason == (
        "there is no C compiler: none of cc, gcc, clang is on the PATH; install gcc or set CC"
    )


@needs_compiler
def test_a_compiler_with_options(source, monkeypatch, commands):
    monkeypatch.setenv("CC", f"{COMPILER} -DEXTRA")
    assert native_build.build(source).library.answer() == 42
    assert all(command[:2] == [COMPILER, "-DEXTRA"] for command in commands)


@needs_compiler
def test_a_source_that_does_not_compile(source, tmp_path):
    source.write_text("int answer(void) { return nothing; }\n")
    reason = native_build.build(source).reason
    assert reason.startswith(f"the C compiler {COMPILER!r} fails (") and "error" in reason and "nothing" in reason
    assert files(tmp_path) == []


@needs_compiler
def test_a_cache_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMEFF_CACHE", str(tmp_path / "file"))
    reason = native_build.build(source).reason
    assert reason.startswith("the compiled kernel cannot be kept or loaded (")
    assert reason.endswith("; set MMEFF_CACHE to a directory of yours")


@needs_compiler
def test_it_can_be_switched_off_at_any_time(source, monkeypatch, commands):
    monkeypatch.setenv("MMEFF_NATIVE", "0")
    assert native_build.build(source).reason == "native kernels are switched off by MMEFF_NATIVE=0"
    assert not commands
    monkeypatch.setenv("MMEFF_NATIVE", "1")
    assert native_build.build(source).library.answer() == 42


@pytest.mark.parametrize(
    ("machine", "flags", "isa"),
    [
        ("x86_64", "avx512f avx512bw avx512dq avx512vl avx512_bf16 avx2 fma f16c", "avx512_bf16"),
        ("x86_64", "avx512f avx512bw avx512dq avx512vl avx2 fma f16c", "avx512"),
        ("AMD64", "avx512f avx2 fma f16c", "avx2"),
        ("x86_64", "avx2", None),
        ("aarch64", "", "aarch64"),
    ],
)
def test_the_best_instruction_set_is_taken(source, monkeypatch, machine, flags, isa):
    monkeypatch.setattr(native_build.platform, "machine", lambda: machine)
    monkeypatch.setattr(native_build, "processor_flags", lambda: frozenset(flags.split()))
    found = native_build.instruction_set()
    assert (found and found[0]) == isa
    if found is None:
        assert native_build.build(source).reason == "the processor has neither AVX-512 nor AVX2 with FMA"
