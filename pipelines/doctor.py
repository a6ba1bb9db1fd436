"""What is right and what is wrong on this machine, before a day of computing depends on it."""

import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from packaging.requirements import Requirement

from activation_cache.loading import demo_gguf
from activation_cache.wikipedia import demo_articles_file

OUR_PACKAGES = ("activation_cache", "sae", "feature_db", "interp", "pipelines")
OPTIONAL = {
    "gguf": "models in .gguf files: pip install 'saebase[gguf]'",
    "accelerate": "models in .gguf files: pip install 'saebase[gguf]'",
    "matplotlib": "drawings with --plot: pip install 'saebase[plots]'",
    "polars": "results as polars frames: pip install 'saebase[polars]'",
    "s3fs": "caches at s3://: pip install 'saebase[s3]'",
    "gcsfs": "caches at gs://: pip install 'saebase[gcs]'",
    "openai": "labels by a language model: pip install 'saebase[label]'",
    "wandb": "tracking with --wandb-project: pip install 'saebase[wandb]'",
    "mwparserfromhell": "the demo's text: pip install 'saebase[demo]'",
}


class State(Enum):
    """How a check came out: `problem` keeps saebase from working, `note` only limits it."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


class Check(NamedTuple):
    """One finding: what was looked at, how it is, and what to do."""

    what: str
    state: State
    finding: str


def examine(folder: Path) -> list[Check]:
    """All checks. folder: where artifacts would be written."""
    return [
        *_python(),
        *_requirements(),
        *_import_names(),
        *_hardware(folder),
        *_optional(),
        _demo_part("demo model", demo_gguf),
        _demo_part("demo text", demo_articles_file),
    ]


def _python() -> Iterator[Check]:
    version = platform.python_version()
    fine = sys.version_info >= (3, 11)
    finding = version if fine else f"{version}: saebase needs 3.11 or newer"
    yield Check("Python", State.OK if fine else State.PROBLEM, finding)


def _requirements() -> Iterator[Check]:
    """Every required distribution is there, in a version that pyproject.toml allows."""
    wanted = [Requirement(line) for line in importlib.metadata.requires("saebase") or []]
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(requirement.name, State.PROBLEM, f"missing: pip install '{requirement}'")
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        finding = version if fits else f"{version}: needs {requirement.specifier}"
        yield Check(requirement.name, State.OK if fits else State.PROBLEM, finding)


def _import_names() -> Iterator[Check]:
    """No other installed distribution claims one of our import names."""
    owners = importlib.metadata.packages_distributions()
    for name in OUR_PACKAGES:
        others = sorted(set(owners.get(name, [])) - {"saebase"})
        if others:
            yield Check(
                f"import {name}",
                State.PROBLEM,
                f"also claimed by {', '.join(others)}: pip uninstall {' '.join(others)}",
            )
    if not any(set(owners.get(name, [])) - {"saebase"} for name in OUR_PACKAGES):
        yield Check("import names", State.OK, f"{', '.join(OUR_PACKAGES)} are saebase's alone")


def _hardware(folder: Path) -> Iterator[Check]:
    memory = psutil.virtual_memory()
    yield Check(
        "memory",
        State.OK if memory.available > 4e9 else State.NOTE,
        f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
    )
    home = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(home).free
    yield Check("disk", State.OK if free > 5e9 else State.NOTE, f"{free / 1e9:.1f} GB free")
    cores, bf16 = psutil.cpu_count(logical=False), "fast" if has_fast_bfloat16() else "slow"
    yield Check(
        "CPU", State.OK, f"{cores} cores, {torch.get_num_threads()} threads, bfloat16 {bf16}"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            size = properties.total_memory / 1e9
            yield Check(f"cuda:{i}", State.OK, f"{properties.name}, {size:.0f} GB")
    else:
        yield Check("CUDA", State.NOTE, "no device: everything runs on the CPU")


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _optional() -> Iterator[Check]:
    for name, use in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield Check(name, State.NOTE, f"not installed; for {use}")
        else:
            yield Check(name, State.OK, importlib.metadata.version(name))


def _demo_part(what: str, find: Callable[[], Path]) -> Check:
    try:
        return Check(what, State.OK, find().name)
    except ValueError as error:
        return Check(what, State.NOTE, str(error))
