"""A store in memory: what a stream without a disk budget keeps its shards in."""

from collections.abc import Iterator
from contextlib import contextmanager

from .durable import DurableFile
from .store import ByteRange, Store


class MemoryStore(Store):
    """Files as bytes in this process."""

    def __init__(self, root: str = "memory", files: dict[str, bytearray] | None = None):
        self.root = root
        self._files: dict[str, bytearray] = {} if files is None else files

    def child(self, folder: str) -> Store:
        raise NotImplementedError(f"a store in memory has no folders such as {folder}")

    def exists(self) -> bool:
        return bool(self._files)

    def has(self, name: str) -> bool:
        return name in self._files

    def names(self, folder: str = "") -> list[str]:
        inside = [name for name in self._files if name.startswith(f"{folder}/")]
        return sorted(name.removeprefix(f"{folder}/") for name in inside)

    def read(self, name: str) -> bytes:
        return bytes(self._files[name])

    def size(self, name: str) -> int:
        if name not in self._files:
            raise FileNotFoundError(name)
        return len(self._files[name])

    def read_into(self, place: ByteRange, out: memoryview, *, again: bool = False) -> bool:
        del again  # there is but this one
        data = self._files.get(place.name)
        if data is None or len(data) < place.begin + len(out):
            return False
        with memoryview(data) as view:
            out[:] = view[place.begin : place.begin + len(out)]
        return True

    @contextmanager
    def written(self, name: str, *, reserve_bytes: int = 0) -> Iterator[DurableFile]:
        file = _MemoryFile(reserve_bytes)
        yield file
        self._files[name] = file.whole()

    def remove(self, name: str) -> None:
        self._files.pop(name, None)

    @contextmanager
    def begin(self) -> Iterator[None]:
        yield


class _MemoryFile(DurableFile):
    """A file in memory that is being made."""

    def __init__(self, reserve_bytes: int):
        self._data = bytearray(reserve_bytes)
        self.n_bytes = 0

    def write(self, data: bytes | memoryview, *, at: int | None = None) -> None:
        start = self.n_bytes if at is None else at
        self._data[start : start + len(data)] = data
        self.n_bytes = max(self.n_bytes, start + len(data))

    def whole(self) -> bytearray:
        del self._data[self.n_bytes :]
        return self._data
