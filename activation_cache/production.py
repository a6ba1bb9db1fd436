"""Blocks of text -> the model -> shards: what harvest, repair and streams have in common.

The model runs in the calling thread. Encoded rows travel to a writer thread, which hashes and
writes them and commits each shard: writing never stalls the forward pass.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import cached_property
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from .background import Background
from .documents import Corpus
from .language_model import LanguageModel
from .manifest import Fingerprint, ShardRecord
from .packing import PackedBlock, Packing, Position, pack
from .quantization import Calibration, calibrate
from .shards import EncodedRows, Encoder, ShardWriter
from .store import Store

CALIBRATION_ROWS = 8_192
"""Rows at the beginning of the text that int8's center and scales are taken from."""


class ShardPlan(NamedTuple):
    """A shard that is to be written: its number, and its rows (the text may end earlier)."""

    shard: int
    n_rows: int


class Producer:
    """One text and one model, and what becomes of them."""

    def __init__(
        self,
        lm: LanguageModel,
        corpus: Corpus,
        fingerprint: Fingerprint,
        *,
        first_document: int = 0,
    ):
        self.lm, self.corpus, self.fingerprint = lm, corpus, fingerprint
        self.first_document = first_document
        self.calibrations: Mapping[str, Calibration] | None = None

    @property
    def start(self) -> Position:
        """Where the text begins."""
        return Position(self.first_document)

    def blocks(self, start: Position) -> Generator[PackedBlock]:
        """The blocks from `start` on, to the end of the text. Who leaves them early closes them."""
        f = self.fingerprint
        return self._packed(start, f.rank, f.world_size)

    def passes(self, blocks: Iterator[PackedBlock], n_rows: int) -> Iterator["Pass"]:
        """Run the model over blocks of `n_rows` rows in all, some blocks at a time."""
        f, encoder = self.fingerprint, self.encoder()
        blocks = itertools.islice(blocks, -(-n_rows // f.ctx_len))
        while batch := list(itertools.islice(blocks, f.batch_blocks)):
            acts = activations_of(self.lm, batch, list(f.hookpoints))
            yield Pass.encoded(batch, acts, encoder)

    def write_shards(
        self,
        store: Store,
        plans: Iterator[ShardPlan],
        blocks: Iterator[PackedBlock],
        start: Position,
        *,
        on_pass: Callable[[int], None] = lambda _: None,
        on_commit: Callable[[ShardRecord], None],
    ) -> None:
        """Write and commit shards one after another, until the plans or the text end.

        start: where the first shard's text begins. on_pass: gets the rows of each forward pass.
        on_commit: gets each record, in the writer's thread.
        """
        with ShardSequence(store, self.fingerprint, on_commit) as shards:
            for plan in plans:
                first = next(blocks, None)
                if first is None:
                    return
                for each in self.passes(itertools.chain([first], blocks), plan.n_rows):
                    shards.append(plan, each)
                    on_pass(sum(len(block.token_ids) for block in each.blocks))
                    end = each.blocks[-1].end
                shards.commit(start)
                start = end

    def encoder(self) -> Encoder:
        """A new encoder. Raises: what running the model over the sample raises."""
        if self.fingerprint.storage_dtype != "int8":
            return Encoder(self.fingerprint, {})
        if self.calibrations is None:
            self.calibrations = self._calibrated()
        return Encoder(self.fingerprint, self._on_device)

    @cached_property
    def _on_device(self) -> dict[str, Calibration]:
        assert self.calibrations is not None
        device = self.lm.device
        return {
            hookpoint: Calibration(c.center.to(device), c.channel_scales.to(device), c.max_norm)
            for hookpoint, c in self.calibrations.items()
        }

    def _calibrated(self) -> dict[str, Calibration]:
        """Center and scales from the beginning of the text: the same for every rank."""
        f, samples = self.fingerprint, list[dict[str, Tensor]]()
        with contextlib.closing(self._packed(self.start, 0, 1)) as blocks:
            for _ in range(-(-CALIBRATION_ROWS // (f.batch_blocks * f.ctx_len))):
                if batch := list(itertools.islice(blocks, f.batch_blocks)):
                    samples.append(activations_of(self.lm, batch, list(f.hookpoints)))
        return {h: calibrate(torch.cat([s[h] for s in samples])) for h in f.hookpoints}

    def _packed(self, start: Position, rank: int, world_size: int) -> Generator[PackedBlock]:
        f = self.fingerprint
        packing = Packing(f.ctx_len, f.bos_id, f.separator_id, f.max_doc_tokens, f.min_doc_tokens)
        shift = self.first_document
        numbered = self.corpus.numbered(start.document - shift, rank=rank, world_size=world_size)
        shifted = ((number + shift, document) for number, document in numbered)
        return pack(shifted, self.lm.tokenizer, packing, start)


class ShardSequence:
    """The writer's side: shards written one after another on a thread. A context: left by an error,
    the shard that was being written leaves nothing behind."""

    def __init__(
        self, store: Store, fingerprint: Fingerprint, on_commit: Callable[[ShardRecord], None]
    ):
        self._store, self._fingerprint, self._on_commit = store, fingerprint, on_commit
        self._thread = Background()
        self._writer: ShardWriter | None = None  # of the thread alone

    def __enter__(self) -> "ShardSequence":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._thread.__exit__(kind, error, trace)
        finally:
            if self._writer is not None:
                self._writer.__exit__(_Abandoned, _Abandoned(), None)

    def append(self, plan: ShardPlan, each: "Pass") -> None:
        """Hand over a forward pass."""
        self._thread.do(self._append, plan, each)

    def commit(self, start: Position) -> None:
        """Hand over that the shard is complete."""
        self._thread.do(self._commit, start)

    def _append(self, plan: ShardPlan, each: "Pass") -> None:
        if self._writer is None:
            writer = ShardWriter(
                self._store, plan.shard, self._fingerprint, each.encoder, plan.n_rows
            )
            self._writer = writer.__enter__()
        self._writer.append(each.blocks, each.rows.arrived())

    def _commit(self, start: Position) -> None:
        assert self._writer is not None
        record = self._writer.commit(start)
        self._writer = None
        self._on_commit(record)


class _Abandoned(Exception):
    """What closes a shard that will not be committed."""


class OnTheWay(NamedTuple):
    """Encoded rows that are being copied from a GPU: `arrived` waits for them."""

    encoded: dict[str, EncodedRows]
    event: torch.cuda.Event | None

    @classmethod
    def to_cpu(cls, encoded: dict[str, EncodedRows]) -> "OnTheWay":
        """Begin to copy into pinned memory, without waiting."""
        device = next(iter(encoded.values())).rows.device
        if device.type != "cuda":
            moved = {
                h: EncodedRows(*(None if t is None else t.cpu() for t in e))  # type: ignore[arg-type]
                for h, e in encoded.items()
            }
            return cls(moved, None)
        pinned = {
            h: EncodedRows(*(None if t is None else _pinned_copy(t) for t in e))  # type: ignore[arg-type]
            for h, e in encoded.items()
        }
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return cls(pinned, event)

    def arrived(self) -> dict[str, EncodedRows]:
        if self.event is not None:
            self.event.synchronize()
        return self.encoded


class Pass(NamedTuple):
    """What one forward pass made."""

    blocks: list[PackedBlock]
    rows: OnTheWay
    encoder: Encoder

    @classmethod
    def encoded(
        cls, blocks: list[PackedBlock], acts: Mapping[str, Tensor], encoder: Encoder
    ) -> "Pass":
        """acts: hookpoint -> [rows of all blocks, width]."""
        return cls(blocks, OnTheWay.to_cpu(encoder.encode(acts)), encoder)


def activations_of(
    lm: LanguageModel, blocks: list[PackedBlock], hookpoints: list[str]
) -> dict[str, Tensor]:
    """Activations of packed blocks, hookpoint -> [rows of all blocks, width].

    The last block of a text may be shorter than the others: it is run by itself.
    """
    alike = itertools.groupby(blocks, key=lambda block: len(block.token_ids))
    captured = [
        lm.capture(torch.stack([torch.from_numpy(b.token_ids) for b in part]), hookpoints).acts
        for _, part in alike
    ]
    return {h: torch.cat([acts[h].flatten(0, 1) for acts in captured]) for h in hookpoints}


def _pinned_copy(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
