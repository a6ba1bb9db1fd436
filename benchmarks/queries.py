"""Milliseconds of what one asks a feature database: median and 99th percentile of random requests.

    python benchmarks/queries.py --db l6.duckdb [--n-requests 1000] [--json]
    python benchmarks/queries.py --acts demo/acts --d-sae 16384

Without a database one is made of the cache and an untrained TopK SAE of `--d-sae` features, k 32:
as many features, contexts and words as a trained one of that size. Each request is a random feature
or a random word of a random context.
"""

import random
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import arguments, show

from activation_cache import ActivationCache, LanguageModel
from feature_db import FeatureDB, build_index
from sae import Origin, TopKConfig
from sae.initialisation import initial_sae


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--db", type=Path)
    parser.add_argument("--acts", default="demo/acts")
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--n-requests", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = args.db or make(Path(folder) / "q.duckdb", args.acts, args.d_sae)
        with FeatureDB.open(path) as db:
            db.sql(f"SET threads = {args.threads}")
            rows = measured(db, args.n_requests)
    show("queries", rows, args.json)


def make(path: Path, acts: str, d_sae: int) -> Path:
    """A database of an untrained SAE."""
    cache = ActivationCache.open(acts)
    made_with, hookpoint = cache.manifest.fingerprint, cache.hookpoints[0]
    lm = LanguageModel.load(made_with.model, dtype=made_with.model_dtype)
    x = next(cache.batches(hookpoint, 4096))
    origin = Origin(hookpoint=hookpoint, max_norm=cache.max_norm(hookpoint))
    sae = initial_sae(TopKConfig(d_sae=d_sae, k=32), x.mean(0), 0, origin)
    return build_index(lm, [sae], cache, out=path)


def requests(db: FeatureDB) -> dict[str, Callable[[], Any]]:
    """What is asked, each time with another random subject."""
    rng = random.Random(0)
    alive = [row[0] for row in db.sql("SELECT feature_id FROM features WHERE NOT is_dead")]
    texts = db.sql("SELECT text FROM contexts USING SAMPLE 2000 ROWS (reservoir, 0)").fetchall()
    words = [word for (text,) in texts for word in re.findall(r" ([a-z]{4,}) ", text)[:1]]
    words = words or ["the"]
    pairs = [pair for (text,) in texts for pair in re.findall(r" ([a-z]{3,} [a-z]{3,}) ", text)[:1]]
    pairs = pairs or ["of the"]
    return {
        "a feature's page": lambda: db.feature(rng.choice(alive)),
        "neighbors": lambda: db.neighbors(rng.choice(alive)),
        "search, a word": lambda: db.search(rng.choice(words)),
        "search, two words": lambda: db.search(rng.choice(pairs)),
        "contexts_of": lambda: db.sql(f"FROM contexts_of({rng.choice(alive)}, 20)"),
        "SQL: labels that hold a word": lambda: db.sql(_LABELLED, [f"%{rng.choice(words)}%"]),
        "SQL, untrusted": lambda: db.sql("SELECT count(*) FROM features", untrusted=True),
    }


# How many times fewer of these are made.
_SLOW = {"search, two words": 10, "SQL, untrusted": 50}
_LABELLED = "SELECT sae_id, feature_id, label FROM features WHERE label ILIKE ? ORDER BY density"


def measured(db: FeatureDB, n_requests: int) -> list[dict[str, Any]]:
    """The rows of the table; of slow requests a tenth or a fiftieth are made, ten at least."""
    return [
        measure(name, ask, max(n_requests // _SLOW.get(name, 1), 10))
        for name, ask in requests(db).items()
    ]


def measure(name: str, ask: Callable[[], Any], n: int) -> dict[str, Any]:
    """One row of the table."""
    for _ in range(5):
        ask()
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        ask()
        seconds.append(time.perf_counter() - started)
    median, high = np.quantile(seconds, [0.5, 0.99]) * 1000
    return {"request": name, "median_ms": float(median), "p99_ms": float(high), "n": n}


if __name__ == "__main__":
    main()
