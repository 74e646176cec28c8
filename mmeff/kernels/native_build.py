"""Compile a C kernel at first use, keep it in the user's cache, and load it; or say why that cannot be.

The library ships no binaries: what is compiled here fits the processor it runs on, and depends on no version of Python
or PyTorch, because arguments go in as plain pointers. A file in the cache is named after everything that could change
it (sources, flags, compiler), and ends with a checksum of itself: a file that is cut short must never be loaded, since
that can kill the process. Processes that compile at the same time each replace the file in one step.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_dir

COMMON_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
)
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT = 300  # seconds; it takes three
CHECKSUM_BYTES = hashlib.sha256().digest_size

# From most to least: the processor's own flags (of /proc/cpuinfo) that a build needs, and the compiler's.
_AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c"}
_AVX512 = {**_AVX2, **{f"avx512{x}": f"-mavx512{x}" for x in ("f", "bw", "dq", "vl")}}
X86_BUILDS: dict[str, dict[str, str]] = {
    "avx512_bf16": {**_AVX512, "avx512_bf16": "-mavx512bf16"},
    "avx512": _AVX512,
    "avx2": _AVX2,
}


@dataclass(frozen=True)
class Build:
    """A loaded library, or the reason why there is none."""

    library: ctypes.CDLL | None
    reason: str | None
    isa: str  # the instruction set it was compiled for


def build(*sources: Path) -> Build:
    """Return the library made of a C file, compiled if the cache does not hold it yet.

    Args:
        sources: the C file, then the headers beside it that it includes.

    Returns: a Build. What a process once found out, it remembers; MMEFF_NATIVE=0 is looked at on every call.
    """
    if os.environ.get("MMEFF_NATIVE") == "0":
        return Build(None, "native kernels are switched off by MMEFF_NATIVE=0", "")
    return _build(sources)


def processor_flags() -> frozenset[str]:
    """Return what /proc/cpuinfo says that the first processor can do; nothing where there is no such file."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def instruction_set() -> tuple[str, tuple[str, ...]] | None:
    """Return the name and the compiler flags of the best build for this processor, or None if none is fast on it."""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return machine, ()
    flags = processor_flags()
    return next(((name, tuple(x.values())) for name, x in X86_BUILDS.items() if flags.issuperset(x)), None)


@functools.cache
def _build(sources: tuple[Path, ...]) -> Build:
    found = instruction_set()
    if found is None:
        return Build(None, "the processor has neither AVX-512 nor AVX2 with FMA", "")
    isa, isa_flags = found
    try:
        compiler = find_compiler()
        flags = (*COMMON_FLAGS, *isa_flags)
        path = cache_dir("native") / f"{sources[0].stem}-{_key(sources, flags, compiler)}.so"
        if not _is_whole(path):
            _compile(compiler, flags, sources[0], path)
        return Build(ctypes.CDLL(str(path)), None, isa)
    except _CannotBuild as error:
        return Build(None, str(error), isa)
    except OSError as error:
        return Build(
            None,
            f"the compiled kernel cannot be kept or loaded ({error}); set MMEFF_CACHE to a directory of yours",
            isa,
        )


class _CannotBuild(Exception):
    """There is no compiler, or it fails; the message says which."""


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C, and what it says its version is."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """Return $CC if it is set, else the first of cc, gcc and clang that exists."""
    named = os.environ.get("CC")
    if named:
        command = tuple(shlex.split(named))
    else:
        command = next(((x,) for x in COMPILERS if shutil.which(x)), ())
    if not command:
        raise _CannotBuild(
            f"there is no C compiler: none of {', '.join(COMPILERS)} is on the PATH; install gcc or set CC"
        )
    return Compiler(command, _run([*command, "--version"]).splitlines()[0])


def _run(command: list[str]) -> str:
    """Run a compiler command and return what it says, or raise what the user should know."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _CannotBuild(f"the C compiler cannot be run ({error}); set CC to one that works") from error
    if done.returncode or (not done.stdout and "--version" in command):
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise _CannotBuild(f"the C compiler {command[0]!r} fails ({said}); set CC to one that works")
    return done.stdout


def _key(sources: tuple[Path, ...], flags: tuple[str, ...], compiler: Compiler) -> str:
    digest = hashlib.sha256()
    for part in (
        *(source.read_bytes() for source in sources),
        *map(str.encode, (*flags, *compiler.command, compiler.version)),
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:24]


def _compile(compiler: Compiler, flags: tuple[str, ...], source: Path, path: Path) -> None:
    """Compile into a temporary file beside `path`, add the checksum, and move it there in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    os.close(handle)
    partial = Path(name)
    try:
        _run([*compiler.command, *flags, "-o", name, str(source), "-lm"])
        content = partial.read_bytes()
        partial.write_bytes(content + hashlib.sha256(content).digest())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Whether the file is there and ends with its own checksum, which the loader of libraries ignores."""
    if not path.exists():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-CHECKSUM_BYTES]).digest() == content[-CHECKSUM_BYTES:]
