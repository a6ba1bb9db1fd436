"""One shard: a file of tokens, a file for each hookpoint, all with the same rows, and a record.

tokens       token_ids int32 [rows], doc_ids int64 [rows], positions int32 [rows],
             block_offsets int64 [n_blocks + 1]: first row of each packed block
HOOKPOINT    acts [rows, width], norms float32 [rows]: L2 norm of each row before storage
             int8 only: row_scales float32 [rows], center and channel_scales float32 [width],
             exact_above float32 [1]: the norm above which rows are kept as they are,
             exact_at int64 [n] and exact_acts float32 [n, width]: these rows
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import CacheCorrupt
from .formats import STORAGE_DTYPES, reserved_bytes
from .manifest import Fingerprint, ShardRecord, record_name, shard_name
from .packing import PackedBlock, Position
from .quantization import Calibration, ErrorMeter, quantize
from .store import Store
from .tensor_file import PREFIX_BYTES, TensorFile, TensorFileWriter

TOKENS = "tokens"


class EncodedRows(NamedTuple):
    """Rows of one forward pass at one hookpoint, as they will be stored, on their way to the CPU.

    rows: [n, width] in the storage dtype. norms: float32 [n]. exact: rows [n, width] that int8
    keeps in float32, those whose scale is 0.
    """

    rows: Tensor
    norms: Tensor
    row_scales: Tensor | None = None
    exact: Tensor | None = None


class Encoder:
    """Turns activations into what is stored, on the device where they are."""

    def __init__(self, fingerprint: Fingerprint, calibrations: Mapping[str, Calibration]):
        self._dtype = STORAGE_DTYPES[fingerprint.storage_dtype]
        self.calibrations = calibrations
        self.meters = {hookpoint: ErrorMeter() for hookpoint in calibrations}

    def encode(self, acts: Mapping[str, Tensor]) -> dict[str, EncodedRows]:
        """acts: hookpoint -> [rows, width], any float dtype, on any device."""
        return {hookpoint: self._encode(hookpoint, rows) for hookpoint, rows in acts.items()}

    def _encode(self, hookpoint: str, rows: Tensor) -> EncodedRows:
        norms = rows.float().norm(dim=-1)
        if self._dtype != torch.int8:
            return EncodedRows(rows.to(self._dtype), norms)
        calibration = self.calibrations[hookpoint]
        coded = quantize(rows, norms, calibration)
        self.meters[hookpoint].add(rows, coded, calibration)
        exact = rows[coded.row_scales == 0].float()
        return EncodedRows(coded.codes, norms, coded.row_scales, exact)


class ShardWriter:
    """Takes token blocks with their activations, and commits them as one shard.

    A context: left by an error, it leaves nothing behind. max_rows: room that is reserved.
    Raises: DiskFull on entering, before anything is written, if that has no room.
    """

    def __init__(
        self, store: Store, shard: int, fingerprint: Fingerprint, encoder: Encoder, max_rows: int
    ):
        self._store, self._shard, self._fingerprint = store, shard, fingerprint
        self._encoder, self._max_rows = encoder, max_rows
        self._norms: dict[str, list[Tensor]] = {h: [] for h in fingerprint.hookpoints}
        self._exact: dict[str, list[tuple[Tensor, Tensor]]] = {h: [] for h in encoder.calibrations}
        self._blocks: list[PackedBlock] = []
        self._stack = ExitStack()

    def __enter__(self) -> "ShardWriter":
        f = self._fingerprint
        dtype = STORAGE_DTYPES[f.storage_dtype]
        with ExitStack() as stack:

            def begun(stream: str, n_bytes: int, *main: object) -> TensorFileWriter:
                name = shard_name(self._shard, stream)
                file = self._store.written(name, reserve_bytes=PREFIX_BYTES + n_bytes)
                return TensorFileWriter(stack.enter_context(file), *main)  # type: ignore[arg-type]

            self._acts = {
                h: begun(h, reserved_bytes(w, f.storage_dtype, self._max_rows), "acts", (w,), dtype)
                for h, w in f.hookpoints.items()
            }
            n_bytes = self._max_rows * 24 + 8
            self._tokens = begun(TOKENS, n_bytes, "token_ids", (), torch.int32)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def append(self, blocks: list[PackedBlock], encoded: Mapping[str, EncodedRows]) -> None:
        """encoded: hookpoint -> rows of all blocks, on the CPU."""
        first = self._tokens.n_rows
        self._blocks += blocks
        ids = np.concatenate([block.token_ids for block in blocks])
        self._tokens.append(torch.from_numpy(ids.astype(np.int32)))
        for hookpoint, each in encoded.items():
            self._norms[hookpoint].append(each.norms)
            self._acts[hookpoint].append(each.rows, each.row_scales)
            if each.exact is not None and each.row_scales is not None:
                places = (each.row_scales == 0).nonzero()[:, 0] + first
                self._exact[hookpoint].append((places, each.exact))

    def commit(self, start: Position) -> ShardRecord:
        """Close the files and write the record; `start` is where the shard's text begins."""
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
            files[hookpoint] = writer.finish(self._small(hookpoint))
        calibrations = self._encoder.calibrations
        record = ShardRecord(
            shard=self._shard,
            n_rows=self._tokens.n_rows,
            start=start,
            end=blocks[-1].end,
            files=files,
            sources={doc: source for block in blocks for doc, source in block.sources.items()},
            fingerprint=self._fingerprint.hash,
            calibrations={h: c.hash for h, c in calibrations.items()},
            quantization={h: self._encoder.meters[h].sums() for h in calibrations},
        )
        self._stack.close()
        record.write(self._store)
        return record

    def _small(self, hookpoint: str) -> dict[str, Tensor]:
        small = {"norms": torch.cat(self._norms[hookpoint])}
        if calibration := self._encoder.calibrations.get(hookpoint):
            exact = self._exact[hookpoint]
            small |= {
                "center": calibration.center.cpu(),
                "channel_scales": calibration.channel_scales.cpu(),
                "exact_above": torch.tensor([calibration.max_norm]),
                "exact_at": torch.cat([places for places, _ in exact]),
                "exact_acts": torch.cat([rows for _, rows in exact]),
            }
        return small


def open_file(store: Store, record: ShardRecord, stream: str) -> TensorFile:
    """A file of a committed shard. Raises: CacheCorrupt."""
    if stream not in record.files:
        raise CacheCorrupt(f"{store.path(record_name(record.shard))} has no entry for {stream}")
    main = "token_ids" if stream == TOKENS else "acts"
    return TensorFile(store, shard_name(record.shard, stream), main, record.files[stream])


def verify_shard(store: Store, record: ShardRecord, hookpoints: Iterable[str]) -> None:
    """Read a shard whole. Raises: CacheCorrupt that names the damaged file."""
    expected = {TOKENS, *hookpoints}
    if set(record.files) != expected:
        path = store.path(record_name(record.shard))
        raise CacheCorrupt(f"{path} lists {sorted(record.files)}, not {sorted(expected)}")
    for stream in record.files:
        open_file(store, record, stream).verify()


def calibration_in(small: Mapping[str, Tensor]) -> Calibration:
    """The calibration that a shard's file was coded by, from its small tensors."""
    return Calibration(small["center"], small["channel_scales"], float(small["exact_above"]))


def stored_calibrations(
    store: Store, records: Sequence[ShardRecord]
) -> dict[str, Calibration] | None:
    """The calibrations of the newest shard that can be read; None if there is none."""
    for record in reversed(records):
        try:
            return {
                hookpoint: calibration_in(open_file(store, record, hookpoint).small())
                for hookpoint in record.calibrations
            } or None
        except CacheCorrupt:
            continue
    return None
