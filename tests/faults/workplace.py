"""Where the faults happen: a folder, a warm process, and the cache as it is without any fault."""

import itertools
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from activation_cache import ActivationCache, CacheCorrupt, CacheError

from . import failing_calls
from .outcome import Broken, Lost
from .processes import Host, Process, Result
from .writer import harvest_texts

HOOKPOINTS = ("layers.1.resid_post", "layers.1.mlp_out")
SHARD_ROWS = 1_536  # more than the 1,024 rows of a checksum


class Job(NamedTuple):
    """A harvest: rows stored, packed blocks run at once, rows of a shard."""

    n_tokens: int
    batch_blocks: int
    shard_rows: int = SHARD_ROWS

    @property
    def options(self) -> dict[str, Any]:
        return {
            "hookpoints": list(HOOKPOINTS),
            "n_tokens": self.n_tokens,
            "batch_blocks": self.batch_blocks,
            "ctx_len": 16,
            "storage_dtype": "float32",
            "shard_bytes": self.shard_rows * 32 * 4,
        }


LONG = Job(n_tokens=13 * SHARD_ROWS + 400, batch_blocks=4)
"""14 shards: lasts about a second."""
SHORT = Job(n_tokens=2 * SHARD_ROWS + 400, batch_blocks=32)
"""Three shards, with as few system calls as a shard can have."""
MANY = Job(n_tokens=300 * 16, batch_blocks=1, shard_rows=16)
"""300 shards: a folder that can't be listed in one system call."""


class Whole(NamedTuple):
    """The cache that an uninterrupted harvest makes. names: of all its files. shards: name ->
    content, without the manifest, which tells the time. seconds: how long it took. calls: the
    system calls that it made."""

    path: Path
    names: frozenset[str]
    shards: dict[str, bytes]
    seconds: float
    calls: list[str]

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.shards.values()))

    @property
    def n_shards(self) -> int:
        return sum(name.endswith(".json") for name in self.shards)


class Workplace:
    """Use as a context. folder: empty, on the disk that is to be tested."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._numbers = itertools.count()
        self._wholes: dict[Job, Whole] = {}
        self._making = threading.Lock()

    def __enter__(self) -> "Workplace":
        library = failing_calls.built_library(self.folder)
        self._host = Host(self.folder / "model", library)
        return self

    def __exit__(self, *_: object) -> None:
        self._host.close()

    @property
    def way(self) -> str:
        """How system calls are made to fail here."""
        return self._host.way

    def new_path(self, name: str = "acts") -> Path:
        """Where nothing is yet."""
        return self.folder / f"{next(self._numbers):05d}" / name

    def whole(self, job: Job) -> Whole:
        """What `job` makes without any fault; harvested when it is first asked for."""
        with self._making:
            if job not in self._wholes:
                self._wholes[job] = self._make_whole(job)
            return self._wholes[job]

    def start(self, function: Any, **arguments: Any) -> Process:
        return self._host.start(function, **arguments)

    def start_harvest(self, out: Path, job: Job, **arguments: Any) -> Process:
        return self.start(harvest_texts, out=str(out), options=job.options, **arguments)

    def harvest(self, out: Path, job: Job, **arguments: Any) -> Result:
        return self.start_harvest(out, job, **arguments).wait()

    def _make_whole(self, job: Job) -> Whole:
        out, trace = self.new_path(), self.new_path("trace")
        trace.parent.mkdir()
        counted = failing_calls.FailingCall(str(out), 0, 0, str(trace))
        require_done(self.harvest(out, job, fail=(counted, self.way)))
        shutil.rmtree(out)
        start = time.perf_counter()  # the second one is warm
        require_done(self.harvest(out, job))
        seconds = time.perf_counter() - start
        return Whole(out, names(out), _shards(out), seconds, trace.read_text().splitlines())

    # -- promises --------------------------------------------------------------------------------

    def require_whole(self, out: Path, job: Job) -> None:
        """Raises: Lost if the cache isn't the uninterrupted one, Broken for stray files."""
        whole = self.whole(job)
        if missing := whole.names - names(out):
            raise Lost(f"the continued cache lacks {sorted(missing)[0]}")
        for name, content in whole.shards.items():
            if (out / name).read_bytes() != content:
                raise Lost(f"{name} of the continued cache differs from the uninterrupted one's")
        cache = _opened(out)
        if not cache.manifest.is_complete:
            raise Lost("the harvest returned, but its cache is not complete")
        if stray := names(out) - whole.names:
            raise Broken(f"a stray file was left: {sorted(stray)[0]}")

    def require_committed(self, out: Path, job: Job, acknowledged: set[str]) -> None:
        """Raises: Lost unless all acknowledged records are there, and what is there is right."""
        whole = self.whole(job)
        found = records(out)
        if missing := acknowledged - found:
            raise Lost(f"{sorted(missing)[0]} was committed and is gone")
        for name in (n for n in whole.shards if record_of(n) in found):
            if not (out / name).exists() or (out / name).read_bytes() != whole.shards[name]:
                raise Lost(f"{name} is committed, and missing or altered")
        if unknown := found - set(whole.shards):
            raise Lost(f"{sorted(unknown)[0]} is committed, and should not exist")
        if found:
            _opened(out)
        else:
            _require_no_cache(out)


def records(out: Path) -> set[str]:
    """Names of the commit records in a cache, relative to its folder."""
    return {f"shards/{path.name}" for path in (out / "shards").glob("*.json")}


def record_of(name: str) -> str:
    """shards/000001.tokens.safetensors -> shards/000001.json"""
    return name.split(".")[0] + ".json"


def names(out: Path) -> frozenset[str]:
    """Names of all the files in a folder, relative to it."""
    return frozenset(str(f.relative_to(out)) for f in out.rglob("*") if not f.is_dir())


def require_done(result: Result) -> None:
    """Raises: Broken unless the process came to its end."""
    if not result.is_done:
        raise Broken(f"the harvest failed: {result.message or result}")


def require_told(result: Result, kind: str, named: str | Path) -> None:
    """Raises: Broken unless the process ended in an error of this `kind`, in one line with the
    name of a file in it."""
    if kind not in result.kinds:
        raise Broken(f"expected {kind}, it was {result.kinds[:1] or result}: {result.message}")
    require_one_line(result.message, named)


def require_one_line(message: str, named: str | Path) -> None:
    if "\n" in message:
        raise Broken(f"the message has several lines: {message!r}")
    if str(named) not in message:
        raise Broken(f"the message does not name {named}: {message}")


def _shards(out: Path) -> dict[str, bytes]:
    return {n: (out / n).read_bytes() for n in sorted(names(out)) if n.startswith("shards/")}


def _opened(out: Path) -> ActivationCache:
    try:
        cache = ActivationCache.open(out)
        cache.verify()
    except CacheError as error:
        raise Lost(f"what was committed does not verify: {error}") from error
    return cache


def _require_no_cache(out: Path) -> None:
    """Without a shard, opening says so; nothing is taken for damaged."""
    try:
        ActivationCache.open(out)
    except CacheError as error:
        if isinstance(error, CacheCorrupt):
            raise Broken(f"nothing was committed, and opening it says: {error}") from error
        require_one_line(str(error), out)
    else:
        raise Lost("a cache without a shard opens")
