"""One safetensors file of a shard: streamed in, hashed by blocks, read back verified.

Layout: 8 bytes of header length, a JSON header padded to a fixed size (so that rows can be streamed
before their number is known), the main tensor, its row scales if it has any, then small tensors.
Any safetensors reader opens it. A block is 1,024 rows: its hash covers them and their scales; one
more hash covers all the rest.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from .durable import DurableFile
from .errors import MEND, CacheCorrupt
from .formats import SAFETENSORS_NAMES, TORCH_DTYPES
from .manifest import BLOCK_ROWS, FileRecord
from .store import ByteRange, Store

HEADER_BYTES = 1_024
PREFIX_BYTES = 8 + HEADER_BYTES
ROW_SCALES = "row_scales"
_SCALE_BYTES = 4
_VERIFIED_AT_ONCE = 16


class Block(NamedTuple):
    """Verified rows as they are stored. rows: [n, *row_shape]. row_scales: float32 [n] or None."""

    rows: Tensor
    row_scales: Tensor | None


class TensorFileWriter:
    """Streams the rows of one main tensor into a safetensors file, then adds small tensors.

    name, row_shape, dtype: of the main tensor. Every 1,024 rows are hashed as they pass.
    """

    def __init__(
        self, file: DurableFile, name: str, row_shape: tuple[int, ...], dtype: torch.dtype
    ):
        self._file, self._name, self._row_shape, self._dtype = file, name, row_shape, dtype
        self._hash = xxhash.xxh3_64()
        self._hashes: list[str] = []
        self._scales: list[Tensor] = []
        self._unhashed_scales = b""
        self.n_rows = 0
        file.write(b" " * PREFIX_BYTES)

    def append(self, rows: Tensor, row_scales: Tensor | None = None) -> None:
        """rows: [n, *row_shape] in the main tensor's dtype, on the CPU; row_scales: float32 [n]."""
        data = as_bytes(rows)
        scales = as_bytes(row_scales) if row_scales is not None else memoryview(b"")
        if row_scales is not None:
            self._scales.append(row_scales)
        row_bytes = len(data) // max(len(rows), 1)
        scale_bytes = _SCALE_BYTES if row_scales is not None else 0
        at = 0
        while at < len(rows):
            n = min(BLOCK_ROWS - self.n_rows % BLOCK_ROWS, len(rows) - at)
            self._hash.update(data[at * row_bytes : (at + n) * row_bytes])
            self._unhashed_scales += scales[at * scale_bytes : (at + n) * scale_bytes]
            at, self.n_rows = at + n, self.n_rows + n
            if self.n_rows % BLOCK_ROWS == 0:
                self._close_block()
        self._file.write(data)

    def finish(self, small: Mapping[str, Tensor]) -> FileRecord:
        """Write scales, small tensors and the header; the file is complete."""
        if self.n_rows % BLOCK_ROWS:
            self._close_block()
        tensors = {self._name: _entry(self._dtype, (self.n_rows, *self._row_shape), 0)}
        end = tensors[self._name]["data_offsets"][1]
        if self._scales:
            tensors[ROW_SCALES] = _entry(torch.float32, (self.n_rows,), end)
            end = tensors[ROW_SCALES]["data_offsets"][1]
            self._file.write(as_bytes(torch.cat(self._scales)))
        rest = b""
        for name, tensor in small.items():
            tensors[name] = _entry(tensor.dtype, tuple(tensor.shape), end + len(rest))
            rest += bytes(as_bytes(tensor))
        header = json.dumps(tensors).encode().ljust(HEADER_BYTES)
        assert len(header) == HEADER_BYTES
        prefix = struct.pack("<Q", HEADER_BYTES) + header
        self._file.write(rest)
        self._file.write(prefix, at=0)
        return FileRecord(
            n_bytes=self._file.n_bytes,
            block_hashes=self._hashes,
            rest_hash=xxhash.xxh3_64_hexdigest(prefix + rest),
        )

    def _close_block(self) -> None:
        self._hash.update(self._unhashed_scales)
        self._hashes.append(self._hash.hexdigest())
        self._hash.reset()
        self._unhashed_scales = b""


class TensorFile:
    """A file of a shard, opened for reading. Raises: CacheCorrupt if it is not what was written.

    main: name of its main tensor.
    """

    def __init__(self, store: Store, name: str, main: str, record: FileRecord):
        self._store, self._name, self._record = store, name, record
        self.path = store.path(name)
        try:
            n_bytes = store.size(name)
        except OSError as error:
            raise CacheCorrupt(_damaged(self.path, "it is missing")) from error
        if n_bytes != record.n_bytes or n_bytes < PREFIX_BYTES:
            raise CacheCorrupt(
                _damaged(self.path, f"it has {n_bytes:,} bytes, not {record.n_bytes:,}")
            )
        self._main = main
        self._header, self._rest_begin, _ = self._read_rest()
        entry = self._header[main]
        self.n_rows = int(entry["shape"][0])
        self.row_shape, self.dtype = tuple(entry["shape"][1:]), TORCH_DTYPES[entry["dtype"]]
        self.row_bytes = self.dtype.itemsize * int(np.prod(self.row_shape))
        self._scales_begin = (
            PREFIX_BYTES + self._header[ROW_SCALES]["data_offsets"][0]
            if ROW_SCALES in self._header
            else None
        )

    @property
    def n_blocks(self) -> int:
        return len(self._record.block_hashes)

    def n_rows_of(self, block: int) -> int:
        """Rows of a block."""
        first, last = self._block_rows(block)
        return last - first

    def block_ranges(self, block: int) -> list[ByteRange]:
        """Where a block lies in the file."""
        first, last = self._block_rows(block)
        begin = PREFIX_BYTES + first * self.row_bytes
        found = [ByteRange(self._name, begin, begin + (last - first) * self.row_bytes)]
        if self._scales_begin is not None:
            begin = self._scales_begin + first * _SCALE_BYTES
            found.append(ByteRange(self._name, begin, begin + (last - first) * _SCALE_BYTES))
        return found

    def read_block(
        self, block: int, rows: NDArray[np.uint8], scales: NDArray[np.uint8] | None
    ) -> None:
        """One block into memory that is there for it, verified.

        Raises: CacheCorrupt that names the file and the block.
        """
        parts = [rows.data, *([scales.data] if scales is not None else [])]
        for again in self._tries:
            digest = xxhash.xxh3_64()
            places = zip(self.block_ranges(block), parts, strict=True)
            if all(self._store.read_into(place, part, again=again) for place, part in places):
                for part in parts:
                    digest.update(part)
                if digest.hexdigest() == self._record.block_hashes[block]:
                    return
        raise CacheCorrupt(_damaged(self.path, f"block {block} does not match its checksum"))

    def blocks(self, first: int, last: int) -> Block:
        """Rows of blocks first..last-1, verified."""
        begin = first * BLOCK_ROWS
        n = max(min(last * BLOCK_ROWS, self.n_rows) - begin, 0)
        rows = torch.empty(n, *self.row_shape, dtype=self.dtype)
        scales = torch.empty(n) if self._scales_begin is not None else None
        self._store.fetch([r for block in range(first, last) for r in self.block_ranges(block)])
        for block in range(first, last):
            inside = slice(block * BLOCK_ROWS - begin, (block + 1) * BLOCK_ROWS - begin)
            self.read_block(
                block,
                writable_bytes(rows[inside]),
                None if scales is None else writable_bytes(scales[inside]),
            )
        return Block(rows, scales)

    def rows(self, first: int, last: int) -> Block:
        """Rows first..last-1; the blocks they lie in are verified."""
        block = first // BLOCK_ROWS
        loaded = self.blocks(block, -(-last // BLOCK_ROWS))
        inside = slice(first - block * BLOCK_ROWS, last - block * BLOCK_ROWS)
        scales = loaded.row_scales
        return Block(loaded.rows[inside], None if scales is None else scales[inside])

    def expect(self, first: int, last: int) -> None:
        """Rows first..last-1 are read soon."""
        begin = PREFIX_BYTES + first * self.row_bytes
        end = PREFIX_BYTES + min(last, self.n_rows) * self.row_bytes
        self._store.expect([ByteRange(self._name, begin, end)])

    def small(self) -> dict[str, Tensor]:
        """The small tensors, verified."""
        rest = self._read_rest().small
        start = self._rest_begin - PREFIX_BYTES
        return {
            name: _as_tensor(rest, start, entry)
            for name, entry in self._header.items()
            if name not in (self._main, ROW_SCALES)
        }

    def verify(self) -> None:
        """Read everything once, from where it is stored. Raises: CacheCorrupt."""
        self._store.forget(self._name)
        self._read_rest()
        for block in range(0, self.n_blocks, _VERIFIED_AT_ONCE):
            self.blocks(block, min(block + _VERIFIED_AT_ONCE, self.n_blocks))

    def _block_rows(self, block: int) -> tuple[int, int]:
        return block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self.n_rows)

    @property
    def _tries(self) -> tuple[bool, ...]:
        """Whether each try reads again from where the store is, past copies on this machine."""
        return (False, True) if self._store.is_remote else (False,)

    def _read_rest(self) -> "_Rest":
        """All but the blocks, verified."""
        found: _Rest | CacheCorrupt | None = None
        for again in self._tries:
            try:
                found = self._try_rest(again)
            except CacheCorrupt as error:
                found = error
            else:
                return found
        assert isinstance(found, CacheCorrupt)
        raise found

    def _try_rest(self, again: bool) -> "_Rest":
        prefix = self._bytes(0, PREFIX_BYTES, again)
        try:
            (length,) = struct.unpack_from("<Q", prefix)
            header = json.loads(prefix[8 : 8 + min(length, HEADER_BYTES)])
            last = header[ROW_SCALES] if ROW_SCALES in header else header[self._main]
            begin = PREFIX_BYTES + int(last["data_offsets"][1])
            n_rows = int(header[self._main]["shape"][0])
            if -(-n_rows // BLOCK_ROWS) != self.n_blocks or not begin <= self._record.n_bytes:
                raise ValueError("its sizes do not fit")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CacheCorrupt(_damaged(self.path, "its header can't be read")) from error
        small = self._bytes(begin, self._record.n_bytes, again)
        if xxhash.xxh3_64_hexdigest(prefix + small) != self._record.rest_hash:
            raise CacheCorrupt(_damaged(self.path, "its header or end does not match its checksum"))
        return _Rest(header, begin, small)

    def _bytes(self, begin: int, end: int, again: bool) -> bytes:
        data = bytearray(end - begin)
        place = ByteRange(self._name, begin, end)
        if not self._store.read_into(place, memoryview(data), again=again):
            raise CacheCorrupt(_damaged(self.path, "it is missing or ends too early"))
        return bytes(data)


class _Rest(NamedTuple):
    """header: name -> its entry. begin: where the small tensors do. small: their bytes."""

    header: dict[str, Any]
    begin: int
    small: bytes


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def writable_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The memory of a contiguous CPU tensor as bytes that can be written."""
    data: NDArray[np.uint8] = tensor.view(-1).view(torch.uint8).numpy()
    return data


def _as_tensor(rest: bytes, start: int, entry: dict[str, Any]) -> Tensor:
    first, last = (offset - start for offset in entry["data_offsets"])
    dtype = TORCH_DTYPES[entry["dtype"]]
    if first == last:  # frombuffer takes no empty one
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(rest[first:last]), dtype=dtype).reshape(entry["shape"])


def _entry(dtype: torch.dtype, shape: tuple[int, ...], start: int) -> dict[str, Any]:
    n_bytes = dtype.itemsize * int(np.prod(shape))
    return {
        "dtype": SAFETENSORS_NAMES[dtype],
        "shape": list(shape),
        "data_offsets": [start, start + n_bytes],
    }


def _damaged(path: str, how: str) -> str:
    return f"{path} is damaged: {how}. {MEND}"
