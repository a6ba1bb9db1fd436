"""An index is killed at random moments, up to three times in a row, and made again.

Half of them extend a database that is there by a second SAE; it is read all the while. What is at
its place is the old database or the new one, whole, and a reader is never kept waiting.
"""

import random
import threading
import time
from pathlib import Path
from typing import NamedTuple

from feature_db import FeatureDB, FeatureDBError

from .indexer import index_saes, save_saes
from .outcome import Broken, Lost, Outcome, Trial, tally
from .processes import Process
from .workplace import LONG, Workplace, names, require_done

_N_IN_A_ROW = (1, 1, 2, 3)


class Wholes(NamedTuple):
    """What uninterrupted indexes make. hashes: content of those of the first SAE, and of both.
    names: of all files beside both databases. seconds: how long the second took."""

    acts: Path
    folders: list[str]
    hashes: tuple[str, str]
    names: frozenset[str]
    seconds: float

    def start(self, place: Workplace, out: Path, n_saes: int) -> Process:
        """Index the first n_saes."""
        arguments = {"acts": str(self.acts), "folders": self.folders[:n_saes], "out": str(out)}
        return place.start(index_saes, **arguments)


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: indexes, each killed at least once."""
    wholes, reads = made_wholes(place), list[int]()
    trials = [
        Trial(f"index {i}", lambda i=i: _kill(place, wholes, random.Random(f"{seed} {i}"), reads))
        for i in range(n)
    ]
    outcome = tally("index: kill -9 at a random moment", trials)
    return outcome._replace(note=f"read {sum(reads):,} times meanwhile, without waiting")


def made_wholes(place: Workplace) -> Wholes:
    """Both databases, made without any fault."""
    acts, out = place.whole(LONG).path, place.new_path("features.duckdb")
    out.parent.mkdir()
    folders = [str(place.new_path(f"sae-{n}")) for n in range(2)]
    require_done(place.start(save_saes, acts=str(acts), folders=folders).wait())
    wholes = Wholes(acts, folders, ("", ""), frozenset(), 0.0)
    require_done(wholes.start(place, out, 1).wait())
    first = _hash(out)
    began = time.perf_counter()
    require_done(wholes.start(place, out, 2).wait())
    seconds = time.perf_counter() - began
    return wholes._replace(hashes=(first, _hash(out)), names=names(out.parent), seconds=seconds)


def _kill(place: Workplace, wholes: Wholes, rng: random.Random, reads: list[int]) -> bool:
    out, is_extended = place.new_path("features.duckdb"), rng.random() < 0.5
    out.parent.mkdir()
    if is_extended:
        require_done(wholes.start(place, out, 1).wait())
    n_left = n_wanted = rng.choice(_N_IN_A_ROW)
    for _ in range(10 * n_wanted):  # some come too late: the database is there
        if not n_left or (out.exists() and _hash(out) == wholes.hashes[1]):
            break
        indexer = wholes.start(place, out, 2)
        with _Reader(out, wholes, is_extended) as reader:
            time.sleep(rng.random() * wholes.seconds)
            was_killed = indexer.kill().was_killed
        n_left -= was_killed
        reads.append(reader.n_reads)
        _require_old_or_new(out, wholes, is_extended)
    if n_left == n_wanted:
        raise Broken("no kill came in time")
    require_done(wholes.start(place, out, 2).wait())
    if _hash(out) != wholes.hashes[1]:
        raise Lost("the index that was gone on with differs from the uninterrupted one")
    if stray := names(out.parent) - wholes.names:
        raise Broken(f"a stray file was left: {sorted(stray)[0]}")
    return True


class _Reader:
    """Reads what is at a database's place, again and again, while the context is open."""

    def __init__(self, out: Path, wholes: Wholes, is_there: bool):
        self.n_reads, self._error = 0, list[BaseException]()
        self._is_over = threading.Event()
        read = (out, wholes, is_there)
        self._thread = threading.Thread(target=self._read, args=read)

    def __enter__(self) -> "_Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        if self._error:
            raise self._error[0]

    def _read(self, out: Path, wholes: Wholes, is_there: bool) -> None:
        try:
            while not self._is_over.wait(0.02):
                self.n_reads += _require_old_or_new(out, wholes, is_there)
        except (Broken, FeatureDBError) as error:
            self._error.append(error)


def _require_old_or_new(out: Path, wholes: Wholes, is_there: bool) -> bool:
    """Returns: whether there is a database. Raises: Lost unless it is one of the two whole ones."""
    if not out.exists():
        if is_there:
            raise Lost("the database that was extended is gone")
        return False
    if _hash(out) not in wholes.hashes:
        raise Lost("what is at the database's place is neither the old one nor the new one")
    return True


def _hash(path: Path) -> str:
    try:
        with FeatureDB.open(path) as db:
            return db.content_hash()
    except FeatureDBError as error:
        raise Lost(f"the database doesn't open: {error}") from error
