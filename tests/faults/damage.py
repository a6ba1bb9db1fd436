"""What damage to a finished cache may come to: an error that names the file, or no harm at all."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash
from torch import Tensor

from activation_cache import ActivationCache, CacheError

from .outcome import Broken, Lost
from .workplace import HOOKPOINTS, LONG, Workplace, names, require_one_line

KINDS: dict[str, Callable[[str], bool]] = {
    "activations": lambda name: ".layers." in name,
    "tokens": lambda name: ".tokens." in name,
    "record": lambda name: name.startswith("shards/") and name.endswith(".json"),
    "manifest": lambda name: name == "manifest.json",
}


class Damaged:
    """A copy of a finished cache whose files are damaged, one at a time."""

    def __init__(self, place: Workplace):
        self.path = Path(shutil.copytree(place.whole(LONG).path, place.new_path()))
        self.n_harmless = 0
        self._truth = list(_contents(self.path))

    def choose(self, rng: random.Random) -> Path:
        """A file, each kind as often as the others."""
        kind = KINDS[rng.choice(list(KINDS))]
        return self.path / rng.choice(sorted(filter(kind, names(self.path))))

    def check(self, file: Path, damaged: bytes) -> bool:
        """Put `damaged` in the place of `file`, see what verifying and reading say, restore it.

        Raises: Lost if the damage isn't found and does harm, Broken if the file isn't named.
        """
        content = file.read_bytes()
        file.write_bytes(damaged)
        try:
            is_told = self._is_told(file, lambda: ActivationCache.open(self.path).verify())
            is_told_reading = self._is_told(file, self._read)
        finally:
            file.write_bytes(content)
        if not is_told:
            if file.suffix != ".json":
                raise Lost(f"damage to {file.name} is not found by verify")
            self.n_harmless += 1  # white space: everything was read, and was the truth
        if is_told and not is_told_reading:
            raise Lost(f"damage to {file.name} is not found by reading everything")
        return True

    def note(self, n: int) -> str:
        """What became of `n` faults."""
        harmless = f"; {self.n_harmless} took white space only" if self.n_harmless else ""
        return f"{n - self.n_harmless} found, the file named{harmless}"

    def _read(self) -> None:
        n = 0
        for n, found in enumerate(_contents(self.path), 1):
            if n > len(self._truth) or found != self._truth[n - 1]:
                raise Lost("altered data were returned")
        if n != len(self._truth):
            raise Lost("some data were left out in silence")

    def _is_told(self, file: Path, read: Callable[[], object]) -> bool:
        try:
            read()
        except CacheError as error:
            require_one_line(str(error), file)
            return True
        except Broken:
            raise
        except Exception as error:
            raise Broken(f"{type(error).__name__} instead of an error of the cache") from error
        return False


def _contents(folder: Path) -> Iterator[object]:
    """All that a reader can have of a cache, piece by piece, always in the same order."""
    cache = ActivationCache.open(folder)
    yield cache.manifest.model_dump(), cache.n_tokens, cache.n_documents, cache.n_bytes
    for hookpoint in HOOKPOINTS:
        for rows in cache.batches(hookpoint, 256):
            yield _hash(rows)
        for chunk in cache.chunks(hookpoint, rows=512):
            yield [_hash(part) for part in chunk[:-1]], chunk.first_row
    yield from cache.documents()


def _hash(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(tensor.contiguous().numpy().data)
