"""What a part of a cache says of itself: a fingerprint of what made it, a record for each shard.

`manifest.json` names the exact model, tokenizer, text and settings. `shards/000017.json` is the
commit record of shard 17: a shard exists only when its record does.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import MEND, CacheCorrupt, CacheError, CacheMismatch
from .quantization import QuantizationSums
from .store import Store

T = TypeVar("T", bound=BaseModel)
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_COPY = "manifest.copy.json"
"""The same again: all shards would be lost with it."""
SHARDS = "shards"
_LISTINGS = 5
BLOCK_ROWS = 1_024
"""Rows that are hashed, shuffled and loaded together."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fingerprint(_Record):
    """Everything that the numbers in a cache depend on. Two caches with equal fingerprints and
    equal length hold equal activations (on one machine, with the same libraries and threads)."""

    model: str
    model_revision: str
    model_dtype: str
    tokenizer: str = Field(description="Hash of the tokenizer's vocabulary and settings.")
    data: str
    data_revision: str
    text_column: str
    hookpoints: dict[str, int] = Field(description="Hookpoint -> width of its rows.")
    ctx_len: int
    bos_id: int | None
    separator_id: int | None
    max_doc_tokens: int | None
    keep_first_position: bool
    storage_dtype: str
    batch_blocks: int = Field(description="Blocks in one forward pass: it can show in the last bit")
    min_doc_tokens: int | None = None
    only: dict[str, str] = Field(default={}, description="Column -> value of the rows taken.")
    drop_duplicates: bool = False
    rank: int = Field(default=0, description="Whose documents these are, of world_size ranks.")
    world_size: int = 1

    @property
    def hash(self) -> str:
        """A short name for the whole. Fields that came later don't change it at their defaults."""
        return xxhash.xxh3_128(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()

    def require_equal(self, other: "Fingerprint", where: str) -> None:
        """Raises: CacheMismatch that names the first field in which `other` differs."""
        for field in type(self).model_fields:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise CacheMismatch(
                    f"{where} was made with {field}={_shown(mine)}, now it is {_shown(theirs)}: "
                    "use the same, or harvest into another folder"
                )

    def require_joinable(self, other: "Fingerprint", where: str) -> None:
        """Raises: CacheMismatch if rows of `other` can't lie in one cache with these."""
        same = {field: getattr(self, field) for field in TEXT_FIELDS}
        self.require_equal(other.model_copy(update=same), where)


TEXT_FIELDS = (
    "data",
    "data_revision",
    "text_column",
    "only",
    "drop_duplicates",
    "min_doc_tokens",
    "max_doc_tokens",
    "rank",
    "world_size",
)
"""In these, parts of one cache may differ: they say which documents it holds."""


class Manifest(_Record):
    """`manifest.json`."""

    format_version: int = FORMAT_VERSION
    saebase_version: str
    created_at: str
    fingerprint: Fingerprint
    shard_rows: int
    n_tokens_wanted: int
    n_shards: int = Field(default=0, description="Shards of the complete cache; 0 before that.")
    is_complete: bool
    is_exhausted: bool = Field(description="The text ended before the wanted tokens.")
    first_document: int = Field(default=0, description="Number of the text's first document.")
    quantization_fvu: dict[str, float] = Field(
        default={}, description="Hookpoint -> FVU that storing in int8 added (`added_fvu`)."
    )

    @classmethod
    def read(cls, store: Store, name: str = MANIFEST) -> "Manifest":
        """Raises: CacheError if the folder is no cache, or is one of a newer format."""
        if not store.has(name):
            found = "it has no manifest.json" if store.exists() else "it does not exist"
            raise CacheError(
                f"{store.root} is no activation cache: {found}. Make one: saebase harvest"
            )
        path = store.path(name)
        raw = read_json(store, name)
        version = raw.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CacheError(
                f"{path} has cache format {version}, this saebase reads up to {FORMAT_VERSION}: "
                "upgrade saebase"
            )
        return _validated(cls, raw, path)

    def write(self, store: Store) -> None:
        for name in (MANIFEST_COPY, MANIFEST):
            write_record(store, name, self)


class FileRecord(_Record):
    """One file of a shard. block_hashes: xxh3-64 of each 1,024 rows of its main tensor and their
    scales; rest_hash: of everything else."""

    n_bytes: int
    block_hashes: list[str]
    rest_hash: str


class ShardRecord(_Record):
    """Commit record of a shard. start, end: (document, token) where its text begins and ends."""

    shard: int
    n_rows: int
    start: tuple[int, int]
    end: tuple[int, int]
    files: dict[str, FileRecord]
    sources: dict[int, str] = Field(description="doc_id -> source, for documents that start here.")
    fingerprint: str = Field(default="", description="Hash of the manifest's fingerprint.")
    calibrations: dict[str, str] = Field(default={}, description="int8: hookpoint -> its hash.")
    quantization: dict[str, QuantizationSums] = {}

    @classmethod
    def read(cls, store: Store, shard: int) -> "ShardRecord":
        name = record_name(shard)
        return cls.parse(store, name, read_json(store, name))

    @classmethod
    def parse(cls, store: Store, name: str, raw: dict[str, Any]) -> "ShardRecord":
        """Raises: CacheCorrupt if it does not match its checksum, or its name."""
        record = _validated(cls, raw, store.path(name))
        if record_name(record.shard) != name:
            raise CacheCorrupt(f"{store.path(name)} is the record of shard {record.shard}")
        return record

    def write(self, store: Store) -> None:
        write_record(store, record_name(self.shard), self)


def shard_name(shard: int, stream: str) -> str:
    """Name of one file of a shard; `stream` is "tokens" or a hookpoint."""
    return f"{SHARDS}/{shard:06d}.{stream}.safetensors"


def record_name(shard: int) -> str:
    """Name of a shard's commit record."""
    return f"{SHARDS}/{shard:06d}.json"


def read_records(store: Store, manifest: Manifest) -> list[ShardRecord]:
    """The commit records in order. Raises: CacheCorrupt if one is missing or altered."""
    names = _names_without_gap(store)
    try:
        read = list(store.read_all(names))
    except OSError as error:
        raise CacheCorrupt(f"a record of {store.root} can't be read: {error}. {MEND}") from error
    records = [
        ShardRecord.parse(store, name, parsed_json(store.path(name), data)) for name, data in read
    ]
    n_shards = max(manifest.n_shards, len(records))
    for expected in range(n_shards):
        if expected >= len(records) or records[expected].shard != expected:
            raise CacheCorrupt(
                f"{store.root} lacks shard {expected} of {n_shards}: "
                f"{store.path(record_name(expected))} is missing. {MEND}"
            )
    return records


def _names_without_gap(store: Store) -> list[str]:
    """The records' names. A listing that is made while a writer commits may show a shard without
    the one before it: then it is made again, a few times."""
    for _ in range(_LISTINGS):
        names = record_names(store)
        if names == [record_name(shard) for shard in range(len(names))]:
            break
    return names


def record_names(store: Store) -> list[str]:
    """Names of the commit records there are, in order."""
    return [
        f"{SHARDS}/{name}"
        for name in store.names(SHARDS)
        if name.endswith(".json") and name[:-5].isdigit()
    ]


def sweep(store: Store, records: Mapping[int, ShardRecord]) -> None:
    """Remove what an interrupted writer left. Only for the holder of the lock."""
    known = {record_name(shard) for shard in records}
    known |= {shard_name(shard, stream) for shard, r in records.items() for stream in r.files}
    for name in store.names(SHARDS):
        if f"{SHARDS}/{name}" not in known:
            store.remove(f"{SHARDS}/{name}")


def read_json(store: Store, name: str) -> dict[str, Any]:
    """A JSON object from a file. Raises: CacheCorrupt."""
    try:
        data = store.read(name)
    except OSError as error:
        raise CacheCorrupt(f"{store.path(name)} can't be read: {error}") from error
    return parsed_json(store.path(name), data)


def parsed_json(path: str, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises: CacheCorrupt."""
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise CacheCorrupt(f"{path} can't be read: {error}. {MEND}") from error
    if not isinstance(raw, dict):
        raise CacheCorrupt(f"{path} holds {type(raw).__name__}: expected a JSON object. {MEND}")
    return raw


def write_record(store: Store, name: str, record: BaseModel) -> None:
    """Write a record as JSON that carries a checksum of itself."""
    raw = record.model_dump(mode="json")
    raw["checksum"] = _checksum(raw)
    store.write(name, (json.dumps(raw, indent=1, ensure_ascii=False) + "\n").encode())


def read_record(kind: type[T], store: Store, name: str) -> T:
    """A record that `write_record` wrote. Raises: CacheCorrupt."""
    return _validated(kind, read_json(store, name), store.path(name))


def _validated(kind: type[T], raw: dict[str, Any], path: str) -> T:
    checksum = raw.pop("checksum", None)
    if checksum != _checksum(raw):
        raise CacheCorrupt(f"{path} is damaged: it does not match its checksum. {MEND}")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CacheCorrupt(f"{path} is malformed at {place}: {first['msg'].lower()}") from error


def _checksum(raw: dict[str, Any]) -> str:
    return "xxh3:" + xxhash.xxh3_64_hexdigest(json.dumps(raw, sort_keys=True).encode())


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
