"""Peak memory of one process that writes a cache or reads it, beyond that of `import torch`.

    python benchmarks/peak_memory.py FOLDER write --rows 1000000 [--d-model 576]
    python benchmarks/peak_memory.py FOLDER shuffled [--seconds 60]
    python benchmarks/peak_memory.py FOLDER in_order

Prints one JSON object. The peak is the kernel's (VmHWM): what is mapped from files and touched
counts, and so do our own imports (given apart too). `benchmarks/storage.py --memory-gb` runs all
three, each in a process of its own.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peers.peak import peak_bytes

START_BYTES = peak_bytes()

from made_cache import HOOKPOINT, random_passes, write_cache  # noqa: E402

from activation_cache import ActivationCache  # noqa: E402

IMPORTED_BYTES = peak_bytes()


def write(args: argparse.Namespace) -> int:
    write_cache(args.folder, random_passes(8, args.d_model), args.rows)
    return int(args.rows)


def shuffled(args: argparse.Namespace) -> int:
    n_rows, end = 0, time.perf_counter() + args.seconds
    cache = ActivationCache.open(args.folder)
    for batch in cache.batches(HOOKPOINT, 4_096, split="all", epochs=None):
        n_rows += len(batch)
        if time.perf_counter() > end:
            break
    return n_rows


def in_order(args: argparse.Namespace) -> int:
    cache = ActivationCache.open(args.folder)
    return sum(len(chunk.acts) for chunk in cache.chunks(HOOKPOINT))


TASKS = {task.__name__: task for task in (write, shuffled, in_order)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    n_rows = TASKS[args.task](args)
    result = {
        "rows": n_rows,
        "seconds": time.perf_counter() - started,
        "import_torch_gb": START_BYTES / 1e9,
        "our_imports_gb": (IMPORTED_BYTES - START_BYTES) / 1e9,
        "beyond_it_gb": (peak_bytes() - START_BYTES) / 1e9,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
