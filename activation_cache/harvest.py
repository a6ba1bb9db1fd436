"""Tokens -> activations on disk.

    saebase harvest --model gpt2 --data corpus.jsonl --hookpoints layers.6.resid_post --out acts

In: a `LanguageModel` and a text source. Out: an `ActivationCache`: `manifest.json`, then shards of
whole token blocks, each committed by its record. Interrupted at any moment and called again, it
goes on after the last committed shard and ends with the same bytes as if it had never stopped.
"""

import datetime
import importlib.metadata
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from .cache import ActivationCache
from .documents import Corpus, open_corpus
from .durable import locked, sweep
from .errors import CacheError, CorpusError, DiskFull
from .language_model import LanguageModel
from .manifest import MANIFEST, SHARDS, Fingerprint, Manifest, ShardRecord, read_records
from .packing import Packing, Position, TokenBlock, pack
from .shards import STORAGE_DTYPES, commit_shard, writing_shard


class HarvestConfig(BaseModel):
    """How text becomes activations on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_tokens: int = Field(10_000_000, gt=0, description="Rows to store; rounded up to blocks.")
    ctx_len: int = Field(256, gt=1, description="Tokens of a block, BOS included.")
    prepend_bos: bool | None = Field(
        None, description="Start every block with BOS. Left out: as the tokenizer does by itself."
    )
    keep_first_position: bool = Field(
        True,
        description="Use the first row of every block. Where it is an attention sink it is left "
        "out as a row of massive norm anyway; false leaves it out always.",
    )
    separate_documents: bool = Field(True, description="Close every document with the EOS token.")
    max_doc_tokens: int | None = Field(None, gt=0, description="Use no more of a document.")
    storage_dtype: str = Field("bfloat16", description=f"One of {', '.join(STORAGE_DTYPES)}.")
    batch_blocks: int = Field(8, gt=0, description="Blocks in one forward pass.")
    shard_bytes: int = Field(200_000_000, gt=0, description="Size of one shard file, about.")
    text_column: str = Field("text", description="The column or key that holds the text.")


class HarvestProgress(NamedTuple):
    """Where a harvest stands: rows on disk (uncommitted ones included), rows wanted, rows a second
    since this call began."""

    n_tokens: int
    n_tokens_wanted: int
    tokens_per_s: float


def harvest(
    lm: LanguageModel,
    data: Any,
    *,
    hookpoints: Sequence[str],
    out: str | Path,
    config: HarvestConfig | None = None,
    on_progress: Callable[[HarvestProgress], None] | None = None,
    **options: Any,
) -> ActivationCache:
    """Store the activations at `hookpoints` over `data` in the folder `out`.

    data: what `open_corpus` takes. config: a `HarvestConfig`; or give its fields as keywords.
    Returns: the cache, complete. A folder that already holds it is opened at once.
    Raises: ModelError, HookpointError, CorpusError before anything is written; CacheMismatch if
        `out` was made from something else; CacheBusy; DiskFull (what was committed stays).
    """
    config = config or HarvestConfig(**options)
    folder = Path(out)
    corpus = open_corpus(data, text_column=config.text_column)
    fingerprint = fingerprint_of(lm, corpus, hookpoints, config)
    _make_folder(folder)
    with locked(folder):
        manifest = _open_manifest(folder, fingerprint, config)
        if not manifest.is_complete:
            _harvest_rest(lm, corpus, folder, manifest, on_progress)
    return ActivationCache.open(folder)


def fingerprint_of(
    lm: LanguageModel, corpus: Corpus, hookpoints: Sequence[str], config: HarvestConfig
) -> Fingerprint:
    """What the activations depend on. Raises: ActivationCacheError for what can't be."""
    if not hookpoints:
        raise CacheError("no hookpoint given: name at least one, such as layers.6.resid_post")
    if config.storage_dtype not in STORAGE_DTYPES:
        raise CacheError(
            f"unknown storage_dtype {config.storage_dtype!r}: expected {', '.join(STORAGE_DTYPES)}"
        )
    longest = lm.max_ctx_len
    if longest and config.ctx_len > longest:
        raise CacheError(f"ctx_len={config.ctx_len} is longer than {lm.name} allows ({longest})")
    return Fingerprint(
        model=lm.name,
        model_revision=lm.revision,
        model_dtype=str(lm.dtype).removeprefix("torch."),
        tokenizer=tokenizer_hash(lm.tokenizer),
        data=corpus.name,
        data_revision=corpus.revision,
        text_column=config.text_column,
        hookpoints={name: lm.width(name) for name in hookpoints},
        ctx_len=config.ctx_len,
        bos_id=_bos_id(lm, config.prepend_bos),
        separator_id=lm.tokenizer.eos_token_id if config.separate_documents else None,
        max_doc_tokens=config.max_doc_tokens,
        keep_first_position=config.keep_first_position,
        storage_dtype=config.storage_dtype,
        batch_blocks=config.batch_blocks,
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer: its vocabulary, and how it cuts a text that has everything in it."""
    sample = "Hello  world! \n\t’naïve’ 12345 日本 🙂 <s>"
    content = [sorted(tokenizer.get_vocab().items()), tokenizer(sample).input_ids]
    return "xxh3:" + xxhash.xxh3_128(json.dumps(content).encode()).hexdigest()


def bytes_per_token(fingerprint: Fingerprint) -> int:
    """Disk that one row of the cache takes, all hookpoints and the token's record together."""
    itemsize = STORAGE_DTYPES[fingerprint.storage_dtype].itemsize
    return 16 + sum(width * itemsize + 4 for width in fingerprint.hookpoints.values())


def _bos_id(lm: LanguageModel, wanted: bool | None) -> int | None:
    if not (lm.prepends_bos if wanted is None else wanted):
        return None
    if lm.tokenizer.bos_token_id is None:
        raise CacheError(f"prepend_bos=true, but the tokenizer of {lm.name} has no BOS token")
    return int(lm.tokenizer.bos_token_id)


def _make_folder(folder: Path) -> None:
    foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).exists()
    known = {".lock", SHARDS, f"{MANIFEST}.partial"}
    if foreign and not {f.name for f in folder.iterdir()} <= known:
        raise CacheError(f"{folder} holds other files and no cache: choose an empty folder")
    try:
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"can't make the folder {folder}: {error.strerror}") from error


def _open_manifest(folder: Path, fingerprint: Fingerprint, config: HarvestConfig) -> Manifest:
    """The manifest to harvest under: a new one, or that of a cache which is to go on."""
    if not (folder / MANIFEST).exists():
        manifest = Manifest(
            saebase_version=importlib.metadata.version("saebase"),
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            fingerprint=fingerprint,
            shard_rows=_shard_rows(fingerprint, config.shard_bytes),
            n_tokens_wanted=config.n_tokens,
            is_complete=False,
            is_exhausted=False,
        )
        manifest.write(folder)
        return manifest
    manifest = Manifest.read(folder)
    manifest.fingerprint.require_equal(fingerprint, folder)
    if config.n_tokens != manifest.n_tokens_wanted:
        raise CacheError(
            f"{folder} is a cache of {manifest.n_tokens_wanted:,} tokens, now {config.n_tokens:,} "
            "are wanted: use the same number, or another folder"
        )
    return manifest


def _shard_rows(fingerprint: Fingerprint, shard_bytes: int) -> int:
    """Rows of a full shard: whole forward passes, about `shard_bytes` in the widest file."""
    itemsize = STORAGE_DTYPES[fingerprint.storage_dtype].itemsize
    row_bytes = max(fingerprint.hookpoints.values()) * itemsize
    batch_rows = fingerprint.batch_blocks * fingerprint.ctx_len
    return max(shard_bytes // row_bytes // batch_rows, 1) * batch_rows


def _harvest_rest(
    lm: LanguageModel,
    corpus: Corpus,
    folder: Path,
    manifest: Manifest,
    on_progress: Callable[[HarvestProgress], None] | None,
) -> None:
    """Harvest from the last committed shard on, and mark the cache complete."""
    sweep(folder / SHARDS)
    records = read_records(folder)
    n_done = sum(record.n_rows for record in records)
    start = Position(*records[-1].end) if records else Position()
    _require_space(folder, manifest, n_done)
    blocks = _blocks_from(
        lm, corpus, manifest.fingerprint, start, manifest.n_tokens_wanted - n_done
    )
    report = _Reporter(n_done, manifest.n_tokens_wanted, on_progress)
    shard = len(records)
    while first := next(blocks, None):
        record = _harvest_shard(
            lm, folder, shard, manifest, itertools.chain([first], blocks), start, report
        )
        commit_shard(folder, record)
        shard, start, n_done = shard + 1, Position(*record.end), n_done + record.n_rows
    if n_done == 0:
        raise CorpusError(f"{corpus.name} is empty: no document holds a token")
    manifest.model_copy(
        update={"is_complete": True, "is_exhausted": n_done < manifest.n_tokens_wanted}
    ).write(folder)


def _harvest_shard(
    lm: LanguageModel,
    folder: Path,
    shard: int,
    manifest: Manifest,
    blocks: Iterator[TokenBlock],
    start: Position,
    report: "_Reporter",
) -> ShardRecord:
    """Run the model over the blocks of one shard and write its files."""
    fingerprint = manifest.fingerprint
    n_passes = manifest.shard_rows // (fingerprint.batch_blocks * fingerprint.ctx_len)
    with writing_shard(folder, shard, fingerprint, manifest.shard_rows) as writer:
        for _ in range(n_passes):
            batch = list(itertools.islice(blocks, fingerprint.batch_blocks))
            if not batch:
                break
            writer.append(batch, activations_of(lm, batch, list(fingerprint.hookpoints)))
            report(sum(len(block.token_ids) for block in batch))
        return writer.finish(start)


def activations_of(
    lm: LanguageModel, blocks: list[TokenBlock], hookpoints: list[str]
) -> dict[str, torch.Tensor]:
    """Activations of packed blocks, hookpoint -> [rows of all blocks, width].

    The last block of a corpus may be shorter than the others: it is run by itself.
    """
    whole = [b for b in blocks if len(b.token_ids) == len(blocks[0].token_ids)]
    parts = [whole, *([b] for b in blocks[len(whole) :])]
    captured = [
        lm.capture(torch.stack([torch.from_numpy(b.token_ids) for b in part]), hookpoints).acts
        for part in parts
    ]
    return {h: torch.cat([acts[h].flatten(0, 1) for acts in captured]) for h in hookpoints}


def _blocks_from(
    lm: LanguageModel, corpus: Corpus, fingerprint: Fingerprint, start: Position, n_rows: int
) -> Iterator[TokenBlock]:
    """The blocks from `start` on, until at least `n_rows` rows are out."""
    packing = Packing(
        fingerprint.ctx_len,
        fingerprint.bos_id,
        fingerprint.separator_id,
        fingerprint.max_doc_tokens,
    )
    documents = corpus.documents(start.document)
    n_blocks = -(-n_rows // fingerprint.ctx_len)
    return itertools.islice(pack(documents, lm.tokenizer, packing, start), max(n_blocks, 0))


def _require_space(folder: Path, manifest: Manifest, n_done: int) -> None:
    needed = (manifest.n_tokens_wanted - n_done) * bytes_per_token(manifest.fingerprint)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFull(
            f"disk full: the cache needs {needed / 1e9:,.2f} GB more and {folder} has "
            f"{free / 1e9:,.2f} GB free. Free some space, or lower n_tokens"
        )


class _Reporter:
    """Counts rows and tells how fast they come."""

    def __init__(
        self, n_done: int, wanted: int, on_progress: Callable[[HarvestProgress], None] | None
    ):
        self._n, self._first, self._wanted = n_done, n_done, wanted
        self._tell, self._start = on_progress, time.perf_counter()

    def __call__(self, n_rows: int) -> None:
        self._n += n_rows
        if self._tell:
            speed = (self._n - self._first) / (time.perf_counter() - self._start)
            self._tell(HarvestProgress(self._n, self._wanted, speed))
