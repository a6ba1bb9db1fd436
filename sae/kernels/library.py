"""The C++ kernels: built with this machine's compiler when first needed, kept, and loaded.

The library lies in the user's cache folder under a name made from all it depends on: the source,
the compiler and the processor's instructions. It is renamed into place whole, so processes that
build at once, or die while they do, leave no half of it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "clang++")
# No -ffast-math: sums keep their order, and NaN its meaning.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
TIMEOUT_S = 300


class Unavailable(Exception):
    """Why there is no library on this machine, in one line."""


@functools.cache
def missing() -> str | None:
    """Why the library can't be had; None if it is loaded. Builds it on the first call."""
    try:
        load()
    except Unavailable as error:
        log.info("the compiled kernels can't be used: %s", error)
        return str(error)
    return None


@functools.cache
def load() -> ctypes.CDLL:
    """The library, built if it isn't yet.

    Raises: Unavailable.
    """
    flags = _cpu_flags()
    if lacking := [each for each in NEEDED if each not in flags]:
        raise Unavailable(f"this CPU has no {', '.join(lacking)}")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise Unavailable(f"no C++ compiler ({' or '.join(COMPILERS)}) on PATH")
    path = _cache_folder() / f"kernels-{_key(compiler, flags)}.so"
    try:
        if not path.exists():
            _build(compiler, path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} could not be made or loaded: {error}") from None
    library.sae_select.restype = ctypes.c_int64
    return library


def _build(compiler: str, path: Path) -> None:
    """Compile into path's folder and rename. Raises: Unavailable, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log.info("building the compiled kernels, once for this machine: %s", path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
        built = Path(folder) / path.name
        sources = [str(each) for each in sorted(SOURCE.glob("*.cpp"))]
        output = _run([compiler, *FLAGS, *sources, "-o", str(built)])
        if not built.exists():
            raise Unavailable(f"{compiler} wrote no library: {output}")
        built.replace(path)


def _run(command: list[str]) -> str:
    """First line of what a command says. Raises: Unavailable if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} did not run: {error}") from None
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    if done.returncode != 0:
        told = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"{command[0]} failed with status {done.returncode}: {told}")
    return lines[0]


def _key(compiler: str, cpu_flags: frozenset[str]) -> str:
    """Hash of all that the built library depends on."""
    parts = [_run([compiler, "--version"]), *FLAGS, *sorted(cpu_flags)]
    for path in sorted(SOURCE.iterdir()):
        if path.suffix in (".cpp", ".h"):
            parts += [path.name, path.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cache_folder() -> Path:
    return Path.home() / ".cache" / "saebase"


def _cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((line for line in lines if line.startswith("flags")), ":")
    return frozenset(found.partition(":")[2].split())
