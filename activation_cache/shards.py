"""One shard on disk: safetensors that are streamed in, hashed by blocks, mapped and verified.

A shard is one file of tokens and one file for each hookpoint, all with the same rows, and a commit
record. Layout of a file: 8 bytes of header length, a JSON header padded to a fixed size (so that
rows can be streamed before their number is known), the main tensor, then the small ones. Any
safetensors reader opens it.

    tokens       token_ids int32 [rows], doc_ids int64 [rows], positions int32 [rows],
                 block_offsets int64 [n_blocks + 1]: first row of each packed block
    HOOKPOINT    acts [rows, width], norms float32 [rows]: L2 norm of each row before storage
"""

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from .durable import DurableFile, written
from .errors import CacheCorrupt
from .manifest import (
    BLOCK_ROWS,
    FileRecord,
    Fingerprint,
    ShardRecord,
    shard_file,
)
from .packing import PackedBlock, Position

TOKENS = "tokens"
HEADER_BYTES = 1_024
STORAGE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SAFETENSORS_NAME = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
}
_TORCH_DTYPE = {name: dtype for dtype, name in _SAFETENSORS_NAME.items()}


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
        self.n_rows = 0
        file.write(b" " * (8 + HEADER_BYTES))

    def append(self, rows: Tensor) -> None:
        """rows: [n, *row_shape] of the main tensor, in its dtype, on the CPU."""
        data = as_bytes(rows)
        row_bytes = len(data) // max(len(rows), 1)
        at = 0
        while at < len(rows):
            n = min(BLOCK_ROWS - self.n_rows % BLOCK_ROWS, len(rows) - at)
            self._hash.update(data[at * row_bytes : (at + n) * row_bytes])
            at, self.n_rows = at + n, self.n_rows + n
            if self.n_rows % BLOCK_ROWS == 0:
                self._close_block()
        self._file.write(data)

    def finish(self, small: Mapping[str, Tensor]) -> FileRecord:
        """Write the small tensors and the header; the file is complete."""
        if self.n_rows % BLOCK_ROWS:
            self._close_block()
        tensors = {self._name: _entry(self._dtype, (self.n_rows, *self._row_shape), 0)}
        rest = b""
        for name, tensor in small.items():
            start = tensors[self._name]["data_offsets"][1] + len(rest)
            tensors[name] = _entry(tensor.dtype, tuple(tensor.shape), start)
            rest += bytes(as_bytes(tensor))
        header = json.dumps(tensors).encode().ljust(HEADER_BYTES)
        prefix = struct.pack("<Q", HEADER_BYTES) + header
        self._file.write(rest)
        self._file.write(prefix, at=0)
        return FileRecord(
            n_bytes=self._file.n_bytes,
            block_hashes=self._hashes,
            rest_hash=xxhash.xxh3_64_hexdigest(prefix + rest),
        )

    def _close_block(self) -> None:
        self._hashes.append(self._hash.hexdigest())
        self._hash.reset()


class ShardWriter:
    """Takes token blocks with their activations, and commits them as one shard."""

    def __init__(
        self, folder: Path, shard: int, fingerprint: Fingerprint, files: Mapping[str, DurableFile]
    ):
        self._folder, self._shard = folder, shard
        self._dtype = STORAGE_DTYPES[fingerprint.storage_dtype]
        self._acts = {
            hookpoint: TensorFileWriter(files[hookpoint], "acts", (width,), self._dtype)
            for hookpoint, width in fingerprint.hookpoints.items()
        }
        self._tokens = TensorFileWriter(files[TOKENS], "token_ids", (), torch.int32)
        self._norms: dict[str, list[Tensor]] = {h: [] for h in fingerprint.hookpoints}
        self._blocks: list[PackedBlock] = []

    @property
    def n_rows(self) -> int:
        return self._tokens.n_rows

    def append(self, blocks: list[PackedBlock], acts: Mapping[str, Tensor]) -> None:
        """acts: hookpoint -> [rows of all blocks, width], any float dtype, on any device."""
        self._blocks += blocks
        ids = np.concatenate([block.token_ids for block in blocks])
        self._tokens.append(torch.from_numpy(ids.astype(np.int32)))
        for hookpoint, rows in acts.items():
            self._norms[hookpoint].append(rows.float().norm(dim=-1).cpu())
            self._acts[hookpoint].append(rows.to(self._dtype).cpu())

    def finish(self, start: Position) -> ShardRecord:
        """Close every file's content; `start` is where the shard's text begins."""
        blocks = self._blocks
        lengths = np.cumsum([0, *(len(block.token_ids) for block in blocks)])
        files = {
            TOKENS: self._tokens.finish(
                {
                    "doc_ids": torch.from_numpy(np.concatenate([b.doc_ids for b in blocks])),
                    "positions": torch.from_numpy(np.concatenate([b.positions for b in blocks])),
                    "block_offsets": torch.from_numpy(lengths.astype(np.int64)),
                }
            )
        }
        for hookpoint, writer in self._acts.items():
            files[hookpoint] = writer.finish({"norms": torch.cat(self._norms[hookpoint])})
        sources = {doc: source for block in blocks for doc, source in block.sources.items()}
        return ShardRecord(
            shard=self._shard,
            n_rows=self.n_rows,
            start=start,
            end=blocks[-1].end,
            files=files,
            sources=sources,
        )


@contextmanager
def writing_shard(
    folder: Path, shard: int, fingerprint: Fingerprint, max_rows: int
) -> Iterator[ShardWriter]:
    """A writer of at most `max_rows` rows, whose files appear when the context closes. The shard
    exists once its record is written too.

    Raises: DiskFull before anything is written, if `max_rows` rows have no room.
    """
    itemsize = STORAGE_DTYPES[fingerprint.storage_dtype].itemsize
    sizes = {
        h: HEADER_BYTES + 8 + max_rows * (w * itemsize + 4)
        for h, w in fingerprint.hookpoints.items()
    }
    sizes[TOKENS] = HEADER_BYTES + 8 + max_rows * 24 + 8
    with ExitStack() as stack:
        files = {
            stream: stack.enter_context(
                written(shard_file(folder, shard, stream), reserve_bytes=n_bytes)
            )
            for stream, n_bytes in sizes.items()
        }
        yield ShardWriter(folder, shard, fingerprint, files)


class TensorFile:
    """A mapped safetensors file of a shard. Header and small tensors are verified as it is opened,
    each block of the main tensor as it is read. Raises: CacheCorrupt that names the file."""

    def __init__(self, path: Path, record: FileRecord):
        self.path, self._record = path, record
        try:
            n_bytes = path.stat().st_size
            self._data: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise CacheCorrupt(_damaged(path, f"it can't be read ({error})")) from error
        if n_bytes != record.n_bytes:
            raise CacheCorrupt(_damaged(path, f"it has {n_bytes} bytes, not {record.n_bytes}"))
        self._start = 8 + HEADER_BYTES
        prefix = bytes(self._data[: self._start])
        try:
            self._header: dict[str, Any] = json.loads(prefix[8:])
            self._main = next(iter(self._header))
            self._main_end = self._start + int(self._header[self._main]["data_offsets"][1])
        except (ValueError, TypeError, AttributeError, LookupError, StopIteration) as error:
            raise CacheCorrupt(_damaged(path, "its header is malformed")) from error
        rest = self._data[self._main_end :].tobytes()
        if xxhash.xxh3_64_hexdigest(prefix + rest) != record.rest_hash:
            raise CacheCorrupt(_damaged(path, "its header or end does not match its checksum"))
        self.n_rows = int(self._header[self._main]["shape"][0])
        self._row_bytes = (self._main_end - self._start) // max(self.n_rows, 1)

    def blocks(self, first: int, last: int) -> Tensor:
        """Rows of blocks first..last-1 of the main tensor, verified, as a copy in memory.

        Raises: CacheCorrupt that names the file and the block.
        """
        rows = range(first * BLOCK_ROWS, min(last * BLOCK_ROWS, self.n_rows))
        begin = self._start + rows.start * self._row_bytes
        data = np.array(self._data[begin : begin + len(rows) * self._row_bytes])
        block_bytes = BLOCK_ROWS * self._row_bytes
        for number, block in enumerate(range(first, last)):
            piece = data[number * block_bytes : (number + 1) * block_bytes]
            if xxhash.xxh3_64_hexdigest(piece.data) != self._record.block_hashes[block]:
                raise CacheCorrupt(
                    _damaged(self.path, f"block {block} does not match its checksum")
                )
        return self._as_tensor(data, self._main, len(rows))

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first..last-1 of the main tensor; the blocks they lie in are verified."""
        block = first // BLOCK_ROWS
        loaded = self.blocks(block, -(-last // BLOCK_ROWS))
        return loaded[first - block * BLOCK_ROWS : last - block * BLOCK_ROWS]

    def small(self) -> dict[str, Tensor]:
        """The small tensors."""
        main_bytes = self._main_end - self._start
        rest = np.array(self._data[self._main_end :])
        return {
            name: self._as_tensor(
                rest[first - main_bytes : last - main_bytes], name, entry["shape"][0]
            )
            for name, entry in self._header.items()
            if name != self._main
            for first, last in [entry["data_offsets"]]
        }

    def verify(self) -> None:
        """Read everything once. Raises: CacheCorrupt."""
        for block in range(len(self._record.block_hashes)):
            self.blocks(block, block + 1)

    def _as_tensor(self, data: NDArray[np.uint8], name: str, n: int) -> Tensor:
        entry = self._header[name]
        flat = torch.from_numpy(data.copy() if data.ctypes.data % 8 else data).view(
            _TORCH_DTYPE[entry["dtype"]]
        )
        return flat.reshape(n, *entry["shape"][1:])


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, without a copy where it is contiguous."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _entry(dtype: torch.dtype, shape: tuple[int, ...], start: int) -> dict[str, Any]:
    n_bytes = dtype.itemsize * int(np.prod(shape))
    return {
        "dtype": _SAFETENSORS_NAME[dtype],
        "shape": list(shape),
        "data_offsets": [start, start + n_bytes],
    }


def _damaged(path: Path, how: str) -> str:
    return f"{path} is damaged: {how}. Harvest into a new folder, or restore the file"
