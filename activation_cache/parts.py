"""A cache is one or several parts: each the shards of one text, harvested by one process at a time.

In: a store. Out: its `Part`s in order. Most caches have one, at the root. A second text that was
added later, and the ranks of a harvest that ran on several machines, are folders in `parts/`. The
parts of a cache share model, hookpoints and settings; they differ in which documents they hold.
"""

from typing import Any, NamedTuple

import xxhash

from .errors import CacheCorrupt, CacheError
from .manifest import (
    MANIFEST,
    MANIFEST_COPY,
    Fingerprint,
    Manifest,
    ShardRecord,
    read_records,
    record_names,
)
from .store import Store

PARTS = "parts"


class Part(NamedTuple):
    """store: its folder. records: of its committed shards, in order."""

    store: Store
    manifest: Manifest
    records: list[ShardRecord]

    @property
    def next_document(self) -> int:
        """The first number that no document of this part has or will have."""
        n_ranks = self.manifest.fingerprint.world_size
        last = self.records[-1].end[0] if self.records else self.manifest.first_document
        return last + n_ranks


def part_name(number: int, rank: int, world_size: int) -> str:
    """The folder of a part; the root for the first text of a single process."""
    if world_size > 1:
        return f"{PARTS}/{number:04d}-rank-{rank:04d}"
    return f"{PARTS}/{number:04d}" if number else ""


def part_stores(store: Store) -> list[Store]:
    """The folders of the parts that have a manifest. Raises: CacheCorrupt if there are shards
    without one: they must not be taken for rubbish, nor left out in silence."""
    inside = [store.child(f"{PARTS}/{name}") for name in store.names(PARTS) if name[:4].isdigit()]
    parts = []
    for part in [store, *inside]:
        if part.has(MANIFEST):
            parts.append(part)
        elif record_names(part):
            way_out = "restore it, or harvest into another folder"
            if part.has(MANIFEST_COPY):
                way_out = "put it back from its copy with `saebase harvest --repair`"
            raise CacheCorrupt(f"{part.path(MANIFEST)} is missing, and shards are there: {way_out}")
    return parts


def read_parts(store: Store) -> list[Part]:
    """All parts. Raises: CacheError if there is none, CacheMismatch if they don't fit together,
    CacheCorrupt."""
    stores = part_stores(store)
    if not stores:
        Manifest.read(store)  # says what is missing
    parts = []
    for each in stores:
        manifest = Manifest.read(each)
        parts.append(Part(each, manifest, read_records(each, manifest)))
    for part in parts[1:]:
        parts[0].manifest.fingerprint.require_joinable(part.manifest.fingerprint, part.store.root)
    if not any(part.records for part in parts):
        raise CacheError(f"{store.root} holds no finished shard yet: run its harvest again")
    return parts


def is_complete(parts: list[Part]) -> bool:
    """Whether every part is there and finished."""
    by_text: dict[int, set[int]] = {}
    for part in parts:
        text = by_text.setdefault(part.manifest.first_document, set())
        text.add(part.manifest.fingerprint.rank)
    n_ranks = {p.manifest.first_document: p.manifest.fingerprint.world_size for p in parts}
    return all(part.manifest.is_complete for part in parts) and all(
        len(by_text[text]) == n_ranks[text] for text in by_text
    )


def joint_hash(parts: list[Part]) -> str:
    """A short name for all that a cache was made from."""
    hashes = [part.manifest.fingerprint.hash for part in parts]
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_128_hexdigest("".join(hashes).encode())


def text_provenance(texts: list[Fingerprint]) -> dict[str, Any]:
    """Model and texts that rows were made from, for the config of what is made from them."""
    fingerprint = texts[0]
    return {
        "model": fingerprint.model,
        "model_revision": fingerprint.model_revision,
        "model_dtype": fingerprint.model_dtype,
        "tokenizer": fingerprint.tokenizer,
        "data": " + ".join(dict.fromkeys(text.data for text in texts)),
        "data_revision": " + ".join(dict.fromkeys(text.data_revision for text in texts)),
        "ctx_len": fingerprint.ctx_len,
    }
