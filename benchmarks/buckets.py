"""What one asks of a database in one file, in a folder of buckets, and at an S3-compatible server.

    python benchmarks/buckets.py --db l6.duckdb [--n-requests 50] [--json]

The server is moto's, on loopback, in a process of its own: no delay of a network is in the figures,
but all its requests and bytes are. Cold: nothing of the database is on this machine; each request
is of another random feature, so that most of them meet new groups of files whose footers are known
after a while. First: the very first request of its kind. Warm: the same requests again.
"""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from machine import arguments, show

from activation_cache import configure_block_cache
from activation_cache.remote_files import RemoteFiles
from feature_db import FeatureDB

_BUCKET = "benchmark"
_SERVER = """
import sys, time
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False).start()
time.sleep(3600)
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--db", type=Path, required=True)
    parser.add_argument("--n-requests", type=int, default=50)
    args = parser.parse_args()
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as temporary, served():
        folder, url = Path(temporary) / "buckets", f"s3://{_BUCKET}/db"
        with FeatureDB.open(args.db) as db:
            for out in (folder, url):
                started = time.perf_counter()
                db.export(out, "buckets")
                rows.append(_size(out, folder, time.perf_counter() - started))
        places = {"one file": args.db, "folder": folder, "S3": url}
        for name, place in places.items():
            rows += measured(name, place, args.n_requests, args.threads, Path(temporary))
    show("buckets", rows, args.json)


def _size(out: Path | str, folder: Path, elapsed_s: float) -> dict[str, Any]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "place": "S3" if isinstance(out, str) else "folder",
        "request": f"export, {len(files)} files",
        "median_ms": elapsed_s * 1000,
        "p99_ms": elapsed_s * 1000,
        "n": 1,
        "reads": 0.0,
        "kB": sum(path.stat().st_size for path in files) / 1000,
    }


def measured(
    name: str, place: Path | str, n: int, threads: int, temporary: Path
) -> Iterator[dict[str, Any]]:
    """Rows of the table: opening, then each request cold and warm."""
    with counted() as count:
        configure_block_cache(temporary / "open")
        for state in ("cold", "warm"):
            yield _row(
                name, f"open, {state}", [_timed(lambda: FeatureDB.open(place).close())], count
            )
        with FeatureDB.open(place) as db:
            db.sql(f"SET threads = {threads}")
            db.vocabulary()
            asked = [what for what, _ in repeatable(db)]
        for what in asked:
            configure_block_cache(temporary / what)
            for state in ("cold", "warm"):
                with FeatureDB.open(place) as db:
                    db.sql(f"SET threads = {threads}")
                    db.vocabulary()
                    ask = dict(repeatable(db))[what]
                    count.clear()
                    first = _timed(lambda ask=ask: ask(0))
                    if state == "cold":
                        yield _row(name, f"{what}, first", [first], count)
                    times = [_timed(lambda i=i, ask=ask: ask(i)) for i in range(1, n)]
                    yield _row(name, f"{what}, {state}", times, count)


def repeatable(db: FeatureDB) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """The requests of `queries`, the i-th of them the same each time."""
    rng = random.Random(0)
    alive = [row[0] for row in db.sql("SELECT feature_id FROM features WHERE NOT is_dead")]
    ids = [rng.choice(alive) for _ in range(1000)]
    words = ["house", "king", "river", "music", "science", "war", "book", "church", "film", "team"]
    pairs = ["new york", "of the", "in the", "united states", "it was"]
    yield "a feature's page", lambda i: db.feature(ids[i])
    yield "neighbors", lambda i: db.neighbors(ids[i])
    yield "search, a word", lambda i: db.search(words[i % len(words)])
    yield "search, two words", lambda i: db.search(pairs[i % len(pairs)])
    yield "contexts_of", lambda i: db.sql(f"FROM contexts_of({ids[i]}, 20)")


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _row(name: str, what: str, seconds: list[float], count: list[int]) -> dict[str, Any]:
    """One row; `count` is empty afterwards."""
    median, high = np.quantile(seconds, [0.5, 0.99]) * 1000
    row = {
        "place": name,
        "request": what,
        "median_ms": float(median),
        "p99_ms": float(high),
        "n": len(seconds),
        "reads": len(count) / len(seconds),
        "kB": sum(count) / len(seconds) / 1000,
    }
    count.clear()
    return row


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of every read over the network, while the context is open."""
    count, read = list[int](), RemoteFiles.read

    def counting(files: RemoteFiles, *place: Any) -> bytes:
        data = read(files, *place)
        count.append(len(data))
        return data

    with patch.object(RemoteFiles, "read", counting):
        yield count


@contextmanager
def served() -> Iterator[None]:
    """A server of S3 with an empty bucket, found through the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(port)], stderr=subprocess.DEVNULL)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        _make_bucket()
        yield
    finally:
        server.terminate()
        server.wait()


def _make_bucket() -> None:
    import boto3
    from botocore.exceptions import EndpointConnectionError

    for _ in range(100):
        try:
            boto3.client("s3").create_bucket(Bucket=_BUCKET)
            return
        except EndpointConnectionError:
            time.sleep(0.2)
    raise SystemExit("the server of S3 doesn't start")


if __name__ == "__main__":
    main()
