"""Tokens -> activations on disk.

    saebase harvest --model gpt2 --dataset corpus.jsonl --hookpoints layers.6.resid_post --out acts

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
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .cache import ActivationCache
from .documents import Corpus, open_corpus
from .durable import LOCK, PARTIAL_SUFFIX, locked
from .errors import CacheError, CacheMismatch, CorpusError, DiskFull, ModelError
from .language_model import LanguageModel
from .manifest import MANIFEST, SHARDS, Fingerprint, Manifest, ShardRecord, read_records, sweep
from .packing import PackedBlock, Packing, Position, pack
from .shards import STORAGE_DTYPES, writing_shard


class HarvestConfig(BaseModel):
    """How text becomes activations on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_tokens: int = Field(
        default=10_000_000, gt=0, description="Rows to store; rounded up to blocks."
    )
    ctx_len: int = Field(default=256, gt=1, description="Tokens of a block, BOS included.")
    prepend_bos: bool | None = Field(
        default=None,
        description="Start every block with BOS. Left out: as the tokenizer does by itself.",
    )
    keep_first_position: bool = Field(
        default=True,
        description="Use the first row of every block. Where it is an attention sink it is left "
        "out as a row of massive norm anyway; false leaves it out always.",
    )
    separate_documents: bool = Field(
        default=True, description="Close every document with the EOS token, if there is one."
    )
    max_doc_tokens: int | None = Field(default=None, gt=0, description="Use no more of a document.")
    storage_dtype: str = Field(
        default="bfloat16", description=f"One of {', '.join(STORAGE_DTYPES)}."
    )
    batch_blocks: int = Field(default=8, gt=0, description="Blocks in one forward pass.")
    shard_bytes: int = Field(
        default=200_000_000, gt=0, description="Size of one shard file, about."
    )
    text_column: str = Field(default="text", description="The column or key that holds the text.")


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
    hookpoints: str | Sequence[str],
    out: str | Path,
    config: HarvestConfig | None = None,
    on_progress: Callable[[HarvestProgress], None] | None = None,
    **options: Any,
) -> ActivationCache:
    """Store the activations at `hookpoints` over `data` in the folder `out`.

    data: what `open_corpus` takes. config: a `HarvestConfig`; or give its fields as keywords.
    Returns: the cache, complete. A folder that already holds it is opened at once. One that is to
        go on keeps the shard size it was begun with.
    Raises: ModelError, HookpointError, CorpusError (no text), DiskFull (no room for all of it)
        before anything is written; CacheMismatch if `out` was made from something else; CacheBusy;
        DiskFull (what was committed stays).
    """
    config = _config_of(config, options)
    folder = Path(out)
    _require_ours(folder)
    corpus = open_corpus(data, text_column=config.text_column)
    work = _Work(lm, corpus, folder, fingerprint_of(lm, corpus, hookpoints, config), on_progress)
    if not _is_complete(folder, work.fingerprint, config):
        work.run(config)
    return ActivationCache.open(folder)


def fingerprint_of(
    lm: LanguageModel, corpus: Corpus, hookpoints: str | Sequence[str], config: HarvestConfig
) -> Fingerprint:
    """What the activations depend on. Raises: ActivationCacheError for what can't be."""
    if isinstance(hookpoints, str):
        hookpoints = [hookpoints]
    if not hookpoints:
        raise CacheError("no hookpoint given: name at least one, such as layers.6.resid_post")
    if config.storage_dtype not in STORAGE_DTYPES:
        raise CacheError(
            f"unknown storage_dtype {config.storage_dtype!r}: expected {', '.join(STORAGE_DTYPES)}"
        )
    if lm.is_edited:
        raise CacheError(
            f"{lm.name} is being edited: a cache holds what the plain model makes, so close the "
            "edit first"
        )
    if not lm.is_causal:
        raise ModelError(
            f"{lm.name} is no causal language model: its predictions depend on later tokens"
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


def _config_of(config: HarvestConfig | None, options: dict[str, Any]) -> HarvestConfig:
    """The settings. Raises: CacheError that names the setting which can't be."""
    if config and options:
        raise CacheError(f"give {', '.join(options)} in the config or as keywords, not in both")
    try:
        return config or HarvestConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        near = get_close_matches(name, HarvestConfig.model_fields, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
        raise CacheError(
            f"setting {name}={first['input']!r}: {first['msg'].lower()}{hint}"
        ) from error


def _require_ours(folder: Path) -> None:
    """Raises: CacheError if `folder` is a file, or holds something else than a cache."""
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder} is a file: choose a folder")
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return
    if not {f.name for f in folder.iterdir()} <= {LOCK, SHARDS, f"{MANIFEST}{PARTIAL_SUFFIX}"}:
        raise CacheError(f"{folder} holds other files and no cache: choose an empty folder")


def _is_complete(folder: Path, fingerprint: Fingerprint, config: HarvestConfig) -> bool:
    """Whether the cache is there, whole. Raises: CacheMismatch if it is another one."""
    if not (folder / MANIFEST).exists():
        return False
    manifest = Manifest.read(folder)
    if manifest.is_complete:
        _require_same(manifest, folder, fingerprint, config)
    return manifest.is_complete


def _require_same(
    manifest: Manifest, folder: Path, fingerprint: Fingerprint, config: HarvestConfig
) -> None:
    manifest.fingerprint.require_equal(fingerprint, folder)
    if config.n_tokens != manifest.n_tokens_wanted:
        raise CacheMismatch(
            f"{folder} was made with n_tokens={manifest.n_tokens_wanted}, now it is "
            f"{config.n_tokens}: use the same, or harvest into another folder"
        )


def _new_manifest(fingerprint: Fingerprint, config: HarvestConfig) -> Manifest:
    return Manifest(
        saebase_version=importlib.metadata.version("saebase"),
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        fingerprint=fingerprint,
        shard_rows=_shard_rows(fingerprint, config.shard_bytes),
        n_tokens_wanted=config.n_tokens,
        is_complete=False,
        is_exhausted=False,
    )


def _shard_rows(fingerprint: Fingerprint, shard_bytes: int) -> int:
    """Rows of a full shard: whole forward passes, about `shard_bytes` in the widest file."""
    itemsize = STORAGE_DTYPES[fingerprint.storage_dtype].itemsize
    row_bytes = max(fingerprint.hookpoints.values()) * itemsize
    batch_rows = fingerprint.batch_blocks * fingerprint.ctx_len
    return max(shard_bytes // row_bytes // batch_rows, 1) * batch_rows


class _Work(NamedTuple):
    """All that one harvest works with."""

    lm: LanguageModel
    corpus: Corpus
    folder: Path
    fingerprint: Fingerprint
    on_progress: Callable[[HarvestProgress], None] | None

    def run(self, config: HarvestConfig) -> None:
        """Harvest from the last committed shard on, and mark the cache complete."""
        with _locked_folder(self.folder):
            manifest, records = self._standing(config)
            if manifest.is_complete:  # by another process, meanwhile
                return
            n_done = sum(record.n_rows for record in records)
            blocks = self._blocks(records, config.n_tokens - n_done)
            first = next(blocks, None)
            if not first and not records:
                raise CorpusError(f"{self.corpus.name} is empty: no document holds a token")
            _require_space(self.folder, self.fingerprint, config.n_tokens - n_done)
            manifest.write(self.folder)
            sweep(self.folder, records)
            if first:
                n_done += self._write_shards(manifest, records, itertools.chain([first], blocks))
            manifest.model_copy(
                update={
                    "is_complete": True,
                    "is_exhausted": n_done < config.n_tokens,
                    "n_shards": len(records),
                }
            ).write(self.folder)

    def _standing(self, config: HarvestConfig) -> tuple[Manifest, list[ShardRecord]]:
        """The manifest to work under and what is committed. Without a shard there is nothing to
        fit to: a first call that failed does not bind the next one."""
        if (self.folder / MANIFEST).exists():
            manifest = Manifest.read(self.folder)
            if records := read_records(self.folder, manifest):
                _require_same(manifest, self.folder, self.fingerprint, config)
                return manifest, records
        return _new_manifest(self.fingerprint, config), []

    def _blocks(self, records: list[ShardRecord], n_rows: int) -> Iterator[PackedBlock]:
        """The blocks after the last committed one, until at least `n_rows` rows are out."""
        start = Position(*records[-1].end) if records else Position()
        f = self.fingerprint
        packing = Packing(f.ctx_len, f.bos_id, f.separator_id, f.max_doc_tokens)
        numbered = self.corpus.numbered(start.document)
        n_blocks = max(-(-n_rows // f.ctx_len), 0)
        return itertools.islice(pack(numbered, self.lm.tokenizer, packing, start), n_blocks)

    def _write_shards(
        self, manifest: Manifest, records: list[ShardRecord], blocks: Iterator[PackedBlock]
    ) -> int:
        """Write and commit shard after shard; each is added to `records`. Returns: rows."""
        n_before = sum(record.n_rows for record in records)
        report = _Reporter(n_before, manifest.n_tokens_wanted, self.on_progress)
        for first in blocks:
            n_left = manifest.n_tokens_wanted - sum(record.n_rows for record in records)
            n_rows = min(manifest.shard_rows, _whole_blocks(n_left, self.fingerprint))
            shard_blocks = itertools.chain([first], blocks)
            record = self._write_shard(len(records), n_rows, records, shard_blocks, report)
            record.write(self.folder)
            records.append(record)
        return sum(record.n_rows for record in records) - n_before

    def _write_shard(
        self,
        shard: int,
        n_rows: int,
        records: list[ShardRecord],
        blocks: Iterator[PackedBlock],
        report: "_Reporter",
    ) -> ShardRecord:
        """Run the model over the blocks of one shard and write its files."""
        f = self.fingerprint
        start = Position(*records[-1].end) if records else Position()
        n_passes = -(-n_rows // (f.batch_blocks * f.ctx_len))
        with writing_shard(self.folder, shard, f, n_rows) as writer:
            for _ in range(n_passes):
                batch = list(itertools.islice(blocks, f.batch_blocks))
                if not batch:
                    break
                writer.append(batch, activations_of(self.lm, batch, list(f.hookpoints)))
                report(sum(len(block.token_ids) for block in batch))
            return writer.finish(start)


@contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """`folder`, made if it is missing, held for writing. A call that fails before a cache was begun
    leaves things as it found them."""
    try:
        made = [f for f in (folder, *folder.parents) if not f.exists()]
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"can't make the folder {folder}: {error.strerror}") from error
    with locked(folder):
        try:
            yield
        finally:
            if not (folder / MANIFEST).exists():
                shutil.rmtree(folder / SHARDS, ignore_errors=True)
                (folder / LOCK).unlink(missing_ok=True)
                with suppress(OSError):
                    for empty in made:
                        empty.rmdir()


def activations_of(
    lm: LanguageModel, blocks: list[PackedBlock], hookpoints: list[str]
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


def _whole_blocks(n_rows: int, fingerprint: Fingerprint) -> int:
    return -(-n_rows // fingerprint.ctx_len) * fingerprint.ctx_len


def _require_space(folder: Path, fingerprint: Fingerprint, n_rows: int) -> None:
    needed = n_rows * bytes_per_token(fingerprint)
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
