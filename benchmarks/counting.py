"""Microseconds a token of an index's counting, and of each share of it; peak memory.

    python benchmarks/counting.py [--n-tokens 1048576] [--d-sae 16384] [--k 32]

Prints one JSON object. `benchmarks/index.py --synthetic` runs it, each time in a process of its
own: the peak is the kernel's, less what the process had when the synthetic text was made.
"""

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from made_codes import N_VOCAB, made_codes, made_rows
from peers.peak import peak_bytes

from feature_db import IndexConfig
from feature_db.indexing.counting import Counting, write_counts
from feature_db.indexing.part_files import PartWriter
from feature_db.indexing.spool import EntrySpool
from feature_db.indexing.statistics import Scales
from feature_db.indexing.text_rows import PartRows

# What is timed together: functions of feature_db/indexing.
SHARES = {
    "reading, by feature": ("of_features", "by_row"),
    "top and sampled contexts": ("_top", "_sample", "_context_columns"),
    "tokens": ("_token_columns",),
    "companions": ("_companion_columns",),
    "near misses": ("_near_miss_columns",),
    "documents": ("_document_columns",),
    "sums and histograms": ("fixed_acts", "_totals", "_totals_columns"),
    "Parquet": ("write", "end_bucket", "close"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-tokens", type=int, default=1 << 20)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    count(made_rows(1 << 15), args.d_sae, args.k)  # kernels are compiled, or loaded
    rows = made_rows(args.n_tokens)
    before = psutil.Process().memory_info().rss
    microseconds = count(rows, args.d_sae, args.k)
    print(json.dumps({"microseconds": microseconds, "peak_gb": (peak_bytes() - before) / 1e9}))


def count(rows: PartRows, d_sae: int, k: int) -> dict[str, float]:
    """Spool and count codes of some rows. Returns: microseconds a token by what took them."""
    spool_s, profile = 0.0, cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        spool = EntrySpool(Path(folder), d_sae)
        for codes in made_codes(rows, d_sae, k):
            started = time.perf_counter()
            spool.add(*codes)
            spool_s += time.perf_counter() - started
        neighbors = np.random.default_rng(0).integers(0, d_sae, (d_sae, 10))
        started = time.perf_counter()
        counting = Counting(
            rows, rows.records(), d_sae, N_VOCAB, Scales.of(100.0), neighbors, IndexConfig()
        )
        profile.enable()
        with PartWriter(Path(folder)) as writer:
            write_counts(counting, spool, writer)
        profile.disable()
        counting_s = time.perf_counter() - started
    shares = {name: seconds_of(profile, functions) for name, functions in SHARES.items()}
    rest = {"the rest": counting_s - sum(shares.values())}
    seconds = {"spool": spool_s, "counting": counting_s, **shares, **rest}
    return {name: 1e6 * s / len(rows.token_ids) for name, s in seconds.items()}


def seconds_of(profile: cProfile.Profile, functions: tuple[str, ...]) -> float:
    """Of some functions of the index, with all that they call."""
    stats: Any = pstats.Stats(profile)
    found = {
        name: total
        for (file, _, name), (_, _, _, total, _) in stats.stats.items()
        if "feature_db/indexing" in file or "pyarrow/parquet" in file
    }
    return sum(found[name] for name in functions)


if __name__ == "__main__":
    main()
