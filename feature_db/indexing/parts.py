"""The folder of parts beside a database: which parts of the text were counted for which SAE.

    l6.duckdb.parts/index.json                            what all parts depend on
    l6.duckdb.parts/000000000000-000001048576/            rows of the text: tokens, documents
    l6.duckdb.parts/.../3f2a.../                          counted for the SAE of that hash

A database is made from parts alone, so a longer text or another SAE costs only what is new, a
killed build goes on after its last whole part, and machines may each count some of them. A part is
there whole, with its `part.json`, or not at all.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae.atomic_files import commit, write_json

from ..config import IndexConfig
from ..errors import IndexingError

if TYPE_CHECKING:
    from activation_cache import ActivationCache

FORMAT_VERSION = 1
_INDEX, _PART = "index.json", "part.json"


def parts_folder(database: Path) -> Path:
    """Where the parts of a database lie."""
    return database.with_name(f"{database.name}.parts")


class PartRange(NamedTuple):
    """Rows first <= row < stop of a text, which are these shards of its cache."""

    first: int
    stop: int
    shards: range

    @property
    def name(self) -> str:
        return f"{self.first:012d}-{self.stop:012d}"


class PartRecord(NamedTuple):
    """`part.json`. source: hash of the rows that were counted."""

    source: str
    n_indexed: int
    n_skipped: int


class PartsFolder:
    """Parts of one text, counted with one set of options."""

    def __init__(self, folder: Path, others: Sequence[Path] = ()) -> None:
        """others: folders from which parts are taken too, and into which nothing is written."""
        self.folder, self._others = folder, others

    def require(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that the parts were made with; `settings` where there are none yet.

        Settings under "found" are those of the first build and aren't compared.
        Raises: IndexingError if they are others.
        """
        wanted, is_first = {"format_version": FORMAT_VERSION, **settings}, True
        for folder in (self.folder, *self._others):
            path = folder / _INDEX
            if not path.exists():
                continue
            found = _read(path)
            wanted["found"] = found["found"] if is_first else wanted["found"]
            is_first = False
            for name in wanted:
                if found.get(name) != wanted[name]:
                    raise IndexingError(_difference(folder, name, found.get(name), wanted[name]))
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / _INDEX).exists():
            write_json(self.folder / _INDEX, wanted)
        return wanted

    def ranges(self, cache: "ActivationCache", part_rows: int) -> list[PartRange]:
        """The text cut into parts: those that are there, and new ones of about `part_rows` rows.

        Cuts lie between shards. A part that is there is used where it begins at the end of the one
        before; of several the longest.
        """
        edges, ranges, shard = cache.shard_edges, list[PartRange](), 0
        known = self._known_ranges()
        while shard < len(edges) - 1:
            first = edges[shard]
            stops = [stop for begin, stop in known if begin == first and stop in edges]
            next_known = min((b for b, _ in known if b > first and b in edges), default=edges[-1])
            limit = min(next_known, first + part_rows)
            within = [edge for edge in edges[shard + 1 :] if edge <= limit]
            stop = max(stops or within or [edges[shard + 1]])
            last = edges.index(stop)
            ranges.append(PartRange(first, stop, range(shard, last)))
            shard = last
        return ranges

    def of(self, part: PartRange, sae_hash: str, source: str) -> Path | None:
        """The folder of a part that was counted for an SAE from these very rows; None if none."""
        for folder in (self.folder, *self._others):
            counted = folder / part.name / sae_hash
            if (counted / _PART).exists() and record(counted).source == source:
                return counted
        return None

    @contextmanager
    def making(self, part: PartRange, sae_hashes: Sequence[str]) -> Iterator[list[Path]]:
        """Empty folders for the parts of some SAEs, which one process holds.

        Raises: IndexingError if the place can't be written, or another process makes them.
        """
        home = self.folder / part.name
        try:
            home.mkdir(parents=True, exist_ok=True)
            lock = (home / "lock").open("a+")
        except OSError as error:
            raise IndexingError(
                f"can't write {home}: {error.strerror}; choose another place"
            ) from None
        with lock:
            take_lock(lock.fileno(), home)
            folders = [home / f"{each}.building" for each in sae_hashes]
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            try:
                yield folders
            finally:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)

    def commit(self, made: Path, record: PartRecord) -> None:
        """Make a part that was counted durable under its name."""
        write_json(made / _PART, record._asdict())
        final = made.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        commit(made, final)

    def rows_folder(self, part: PartRange) -> Path:
        """The folder that holds the tokens of a part."""
        folders = [folder / part.name for folder in (self.folder, *self._others)]
        return next((each for each in folders if (each / "token_ids.npy").exists()), folders[0])

    def _known_ranges(self) -> list[tuple[int, int]]:
        found = set()
        for folder in (self.folder, *self._others):
            for entry in folder.iterdir() if folder.is_dir() else ():
                first, _, stop = entry.name.partition("-")
                if first.isdigit() and stop.isdigit() and any(entry.glob(f"*/{_PART}")):
                    found.add((int(first), int(stop)))
        return sorted(found)


def record(folder: Path) -> PartRecord:
    """`part.json` of a part."""
    return PartRecord(**_read(folder / _PART))


def part_settings(
    config: IndexConfig, vocab_size: int, max_norms: Mapping[str, float]
) -> dict[str, Any]:
    """What parts depend on, for `PartsFolder.require`. max_norms: used where parts say no other."""
    return {
        "config": config.of_parts(),
        "vocab_size": vocab_size,
        "found": {"max_norms": {name: repr(norm) for name, norm in max_norms.items()}},
    }


def take_lock(lock: int, path: Path) -> None:
    """Hold an open lock file. Raises: IndexingError that names who holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(lock, 64, 0).decode() or "another process"
        raise IndexingError(
            f"{path} is being built by {holder}: wait for it, or choose another out"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()}".encode(), 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
        return found
    except (ValueError, AssertionError):
        raise IndexingError(f"{path} is damaged: remove {path.parent} and index again") from None


def _difference(folder: Path, name: str, found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        name = next(key for key in wanted if found.get(key) != wanted[key])
        found, wanted = found.get(name), wanted[name]
    return (
        f"the parts in {folder} were counted with {name}={found}, now {name}={wanted}: pass "
        "overwrite=True to count again, or another out"
    )
