"""Freed memory is kept while a context is open, and given back afterwards."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from activation_cache.kept_memory import kept_memory

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told to keep memory"
)
CPU = torch.device("cpu")
BLOCK = 20 << 20


def _take_and_free() -> int:
    """200 MB in blocks; the page faults that it took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.zeros(BLOCK, dtype=torch.uint8) for _ in range(10)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def test_freed_memory_is_used_again_and_goes_back_at_the_end() -> None:
    with kept_memory(CPU):
        pass  # what other tests left goes back
    before = _resident_bytes()

    with kept_memory(CPU):
        at_first = _take_and_free()
        again = sum(_take_and_free() for _ in range(5))
        kept = _resident_bytes() - before

    assert again < at_first
    assert kept > 5 * BLOCK
    assert _resident_bytes() - before < BLOCK
