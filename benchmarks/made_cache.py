"""Caches of random rows, made without a model by the writer that `harvest` uses.

The one place among the benchmarks that touches what is not public in `activation_cache`.
"""

import datetime
import importlib.metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from activation_cache.formats import STORAGE_DTYPES
from activation_cache.harvest import shard_rows
from activation_cache.manifest import Fingerprint, Manifest, ShardRecord
from activation_cache.packing import PackedBlock, Position
from activation_cache.production import Pass, ShardPlan, ShardSequence
from activation_cache.quantization import calibrate
from activation_cache.shards import Encoder
from activation_cache.store import LocalStore

HOOKPOINT = "layers.0.resid_post"
CTX_LEN, BATCH_BLOCKS = 256, 8
PASS_ROWS = CTX_LEN * BATCH_BLOCKS
"""Rows of a forward pass, and of each of the passes that `write_cache` takes."""


def random_passes(n_passes: int, d_model: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Rows as a model gives them, pass by pass: [2048, d_model], no norm far from the median."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d_model + 1).pow(-0.25)
    return [
        (torch.randn(PASS_ROWS, d_model, generator=generator) * scale).to(dtype)
        for _ in range(n_passes)
    ]


def can_store(storage_dtype: str) -> bool:
    """Whether this version writes rows in `storage_dtype`."""
    return storage_dtype in STORAGE_DTYPES


def write_cache(
    folder: Path,
    passes: list[Tensor],
    n_rows: int,
    *,
    storage_dtype: str = "bfloat16",
    shard_bytes: int = 200_000_000,
) -> None:
    """Write a finished cache of `n_rows` rows (whole passes): the passes in turn, again and again.

    A document is as long as a block. Everything that `harvest` writes is written, as durably.
    """
    fingerprint = _fingerprint(passes[0].shape[1], storage_dtype)
    n_in_shard = shard_rows(fingerprint, shard_bytes)
    store, records = LocalStore(folder), list[ShardRecord]()
    calibrations = {HOOKPOINT: calibrate(passes[0])} if storage_dtype == "int8" else {}
    with store.begin(), ShardSequence(store, fingerprint, records.append) as shards:
        for shard, first in enumerate(range(0, n_rows, n_in_shard)):
            rows = range(first, min(first + n_in_shard, n_rows), PASS_ROWS)
            encoder = Encoder(fingerprint, calibrations)
            for row in rows:
                number = row // PASS_ROWS
                acts = {HOOKPOINT: passes[number % len(passes)]}
                plan = ShardPlan(shard, len(rows) * PASS_ROWS)
                shards.append(plan, Pass.encoded(_blocks(number), acts, encoder))
            shards.commit(Position(first // CTX_LEN))
    Manifest(
        saebase_version=importlib.metadata.version("saebase"),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        fingerprint=fingerprint,
        shard_rows=n_in_shard,
        n_tokens_wanted=n_rows,
        n_shards=len(records),
        is_complete=True,
        is_exhausted=False,
    ).write(store)


def _blocks(pass_number: int) -> list[PackedBlock]:
    """The tokens of one pass; what they are is of no account."""
    tokens, positions = np.arange(CTX_LEN), np.arange(CTX_LEN, dtype=np.int32)
    first = pass_number * BATCH_BLOCKS
    return [
        PackedBlock(tokens, np.full(CTX_LEN, doc), positions, Position(doc + 1), {doc: "made"})
        for doc in range(first, first + BATCH_BLOCKS)
    ]


def _fingerprint(d_model: int, storage_dtype: str) -> Fingerprint:
    return Fingerprint(
        model="made",
        model_revision="",
        model_dtype="bfloat16",
        tokenizer="",
        data="made",
        data_revision="",
        text_column="text",
        hookpoints={HOOKPOINT: d_model},
        ctx_len=CTX_LEN,
        bos_id=None,
        separator_id=None,
        max_doc_tokens=None,
        keep_first_position=True,
        storage_dtype=storage_dtype,
        batch_blocks=BATCH_BLOCKS,
    )
