"""A database of very many features, made on purpose: how long it takes, how large it is, and what
one asks of it costs.

    python benchmarks/scale.py --n-features 1000000 --db /tmp/scale.duckdb [--memory 3GB] [--json]
    python benchmarks/scale.py --db /tmp/scale.duckdb --ask            # only the questions

Rows are synthetic and shaped like real ones: contexts of 33 tokens drawn by Zipf's law from a
model's vocabulary, acts on a few of them, ten tokens by lift, twenty beside, twenty logits, a
histogram, neighbours, companions, labels. They go through the index's own writing, bucket by bucket
of 1,024 features, and its own table of words. The peak of memory is the kernel's (VmHWM).
"""

import argparse
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from machine import show
from peers.peak import peak_bytes
from queries import measured

from activation_cache import LanguageModel
from feature_db import FeatureDB
from feature_db.schema import new_database, set_meta
from feature_db.token_text import vocabulary
from feature_db.transactions import insert, transaction
from feature_db.words import write_words

_BUCKET, _LENGTH, _PEAK = 1024, 33, 24
_N_TOKENS, _N_BESIDE, _N_LOGITS, _N_BINS, _N_NEAR = 10, 20, 20, 12, 10

Columns = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--n-features", type=int, default=1_000_000)
    parser.add_argument("--n-contexts", type=int, default=20)
    parser.add_argument("--memory", default="3GB", help="DuckDB's own limit")
    parser.add_argument("--n-requests", type=int, default=1000)
    parser.add_argument("--model", default="demo", help="whose vocabulary the texts are made of")
    parser.add_argument("--db", type=Path, required=True)
    parser.add_argument("--ask", action="store_true", help="the database is there")
    args = parser.parse_args()
    if not args.ask:
        show("scale", made(args), args.json)
    with FeatureDB.open(args.db) as db:
        for setting in ("threads = 1", f"memory_limit = '{args.memory}'"):
            db.sql(f"SET {setting}")
        rows = measured(db, args.n_requests)
        rows.append({"request": "peak memory, GB", "median_ms": peak_bytes() / 1e9})
    show("queries", rows, args.json)


def made(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the database. Returns: seconds and bytes of its steps."""
    texts = pa.array(vocabulary(LanguageModel.load(args.model)), pa.string())
    rng, started, steps = np.random.default_rng(0), time.perf_counter(), []
    with new_database(args.db) as connection:
        for setting in ("threads = 1", f"memory_limit = '{args.memory}'"):
            connection.execute(f"SET {setting}").fetchall()
        insert(connection, "saes", sae_row(args.n_features))
        ids = np.arange(len(texts), dtype=np.int32)
        insert(connection, "vocabulary", pa.table({"token_id": ids, "token": texts}))
        for first in range(0, args.n_features, _BUCKET):
            some = np.arange(first, min(first + _BUCKET, args.n_features), dtype=np.int32)
            with transaction(connection):
                for table, rows in tables(some, args, texts, rng):
                    insert(connection, table, rows)
        steps.append(step("rows of all features", started))
        started = time.perf_counter()
        write_words(connection)
        set_meta(connection, "identity", "made by benchmarks/scale.py")
        ((n_words,),) = connection.execute("SELECT count(*) FROM words").fetchall()
        steps.append(step(f"{n_words:,} words", started))
        started = time.perf_counter()
    steps.append(step(f"checkpoint: {args.db.stat().st_size / 1e9:.2f} GB", started))
    return steps


def step(name: str, started: float) -> dict[str, Any]:
    """One row of the table."""
    seconds = time.perf_counter() - started
    return {"step": name, "seconds": seconds, "peak_memory_gb": peak_bytes() / 1e9}


def sae_row(n_features: int) -> pa.Table:
    """The row of `saes`."""
    row = {
        "sae_id": 0,
        "name": "made",
        "model": "made",
        "hookpoint": "layers.15.resid_post",
        "architecture": "topk",
        "d_in": 576,
        "d_sae": n_features,
        "n_tokens_indexed": 1_000_000_000,
        "n_tokens_skipped": 0,
        "weights_hash": "none",
        "cache_fingerprint": "none",
        "created_at": datetime.datetime(2026, 1, 1),
    }
    return pa.Table.from_pylist([row])


def tables(
    ids: "np.ndarray[Any, Any]", args: argparse.Namespace, texts: pa.Array, rng: np.random.Generator
) -> Iterator[tuple[str, pa.Table]]:
    """(table, rows) of some features."""
    n = len(ids)

    def tokens(size: int) -> "np.ndarray[Any, Any]":
        return (rng.pareto(1.0, size) * 40).astype(np.int64) % len(texts)

    def ranked(each: int, columns: Columns) -> pa.Table:
        rank = np.tile(np.arange(1, each + 1), n)
        keys = {"sae_id": np.zeros(n * each, np.int32), "feature_id": np.repeat(ids, each)}
        return pa.table({**keys, "rank": rank, **columns})

    def used(each: int, **more: Any) -> pa.Table:
        on = tokens(n * each)
        counts = rng.integers(2, 500, n * each)
        columns = {"token_id": on, "token": texts.take(pa.array(on)), "n_active": counts}
        acts = rng.random(n * each)
        return ranked(
            each, {**columns, "n_total": counts * 3, "mean_act": acts, "lift": acts, **more}
        )

    n_active = rng.integers(100, 100_000, n)
    named = texts.take(pa.array(tokens(3 * n)))
    label = pc.binary_join_element_wise(*(named[i * n : (i + 1) * n] for i in range(3)), ", ")
    columns = {"density": n_active / 1e9, "n_active": n_active, "mean_act": rng.random(n)}
    columns |= {"max_act": 1 + rng.random(n), "is_dead": np.zeros(n, bool), "label": label}
    yield (
        "features",
        pa.table({"sae_id": np.zeros(n, np.int32), "feature_id": ids, **columns}),
    )
    yield (
        "contexts",
        contexts(ids, args.n_contexts, tokens(n * args.n_contexts * _LENGTH), texts, rng),
    )
    yield "feature_tokens", used(_N_TOKENS)
    yield "feature_nearby_tokens", used(_N_BESIDE, place=np.tile([-1, 1], n * _N_BESIDE // 2))
    on = tokens(n * _N_LOGITS)
    logits = {"token_id": on, "token": texts.take(pa.array(on)), "logit": rng.random(n * _N_LOGITS)}
    yield "feature_logits", ranked(_N_LOGITS, {**logits, "sign": np.tile([1, -1], n * 10)})
    lo = np.tile(np.arange(_N_BINS), n)
    counts = rng.integers(1, 9000, n * _N_BINS)
    bins = ranked(_N_BINS, {"bin": lo, "lo": lo, "hi": lo + 1, "n": counts}).drop_columns(["rank"])
    yield "feature_histogram", bins
    other, near = rng.integers(0, args.n_features, n * _N_NEAR), rng.random(n * _N_NEAR)
    yield "neighbors", ranked(_N_NEAR, {"neighbor_id": other, "cosine": near})
    both = {"other_id": other, "n_both": rng.integers(2, 99, n * _N_NEAR), "npmi": near}
    yield "coactivations", ranked(_N_NEAR, both)


def contexts(
    ids: "np.ndarray[Any, Any]",
    each: int,
    token_ids: "np.ndarray[Any, Any]",
    texts: pa.Array,
    rng: np.random.Generator,
) -> pa.Table:
    """Rows of `contexts`: the strongest of every feature."""
    n = len(ids) * each
    ends = pa.array(np.arange(n + 1, dtype=np.int32) * _LENGTH)
    acts = np.where(rng.random(n * _LENGTH) < 0.05, rng.random(n * _LENGTH), 0).astype(np.float32)
    peaks = np.arange(n) * _LENGTH + _PEAK
    acts[peaks] = 1 + rng.random(n)
    words = pa.ListArray.from_arrays(ends, texts.take(pa.array(token_ids)))
    return pa.table(
        {
            "sae_id": np.zeros(n, np.int32),
            "feature_id": np.repeat(ids, each),
            "kind": pa.repeat("top", n),
            "rank": np.tile(np.arange(1, each + 1), len(ids)),
            "doc_id": rng.integers(0, 1_000_000, n),
            "position": rng.integers(0, 2000, n),
            "act": acts[peaks],
            "token": texts.take(pa.array(token_ids[peaks])),
            "peak": np.full(n, _PEAK),
            "text": pc.binary_join(words, ""),
            "token_ids": pa.ListArray.from_arrays(ends, pa.array(token_ids.astype(np.int32))),
            "acts": pa.ListArray.from_arrays(ends, pa.array(acts)),
        }
    )


if __name__ == "__main__":
    main()
