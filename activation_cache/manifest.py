"""What a cache says of itself: the fingerprint of what made it, and one record for each shard.

`manifest.json` names the exact model, tokenizer, text and settings. `shards/000017.json` is the
commit record of shard 17: a shard exists only when its record does.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .durable import write_text
from .errors import CacheCorrupt, CacheError, CacheMismatch

T = TypeVar("T", bound=BaseModel)
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARDS = "shards"
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

    @property
    def hash(self) -> str:
        """A short name for the whole."""
        return xxhash.xxh3_128(self.model_dump_json().encode()).hexdigest()

    def require_equal(self, other: "Fingerprint", where: Path) -> None:
        """Raises: CacheMismatch that names the first field in which `other` differs."""
        for field in type(self).model_fields:
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise CacheMismatch(
                    f"{where} was made with {field}={_shown(mine)}, now it is {_shown(theirs)}: "
                    "use the same, or harvest into another folder"
                )


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

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises: CacheError if the folder is no cache, or is one of a newer format."""
        path = folder / MANIFEST
        if not path.is_file():
            found = "it has no manifest.json" if folder.is_dir() else "it does not exist"
            raise CacheError(f"{folder} is no activation cache: {found}. Make one: saebase harvest")
        raw = read_json(path)
        version = raw.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CacheError(
                f"{path} has cache format {version}, this saebase reads up to {FORMAT_VERSION}: "
                "upgrade saebase"
            )
        return _validated(cls, raw, path)

    def write(self, folder: Path) -> None:
        _write_record(folder / MANIFEST, self)


class FileRecord(_Record):
    """One file of a shard. block_hashes: xxh3-64 of each 1,024 rows of its main tensor;
    rest_hash: of everything before and after that tensor."""

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

    @classmethod
    def read(cls, path: Path) -> "ShardRecord":
        return _validated(cls, read_json(path), path)

    def write(self, folder: Path) -> None:
        _write_record(record_file(folder, self.shard), self)


def shard_file(folder: Path, shard: int, stream: str) -> Path:
    """Path of one file of a shard; `stream` is "tokens" or a hookpoint."""
    return folder / SHARDS / f"{shard:06d}.{stream}.safetensors"


def record_file(folder: Path, shard: int) -> Path:
    """Path of a shard's commit record."""
    return folder / SHARDS / f"{shard:06d}.json"


def read_records(folder: Path, manifest: Manifest) -> list[ShardRecord]:
    """The commit records in order. Raises: CacheCorrupt if one is missing or altered."""
    paths = sorted((folder / SHARDS).glob("[0-9]*.json"))
    records = [ShardRecord.read(path) for path in paths]
    n_shards = max(manifest.n_shards, len(records))
    for expected in range(n_shards):
        if expected >= len(records) or records[expected].shard != expected:
            raise CacheCorrupt(
                f"{folder} lacks shard {expected} of {n_shards}: "
                f"{record_file(folder, expected)} is missing. Put it back, or harvest again"
            )
    return records


def sweep(folder: Path, records: list[ShardRecord]) -> None:
    """Remove what an interrupted writer left. Only for the holder of the lock."""
    known = {record_file(folder, r.shard) for r in records}
    known |= {shard_file(folder, r.shard, stream) for r in records for stream in r.files}
    for path in (folder / SHARDS).iterdir():
        if path not in known:
            path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: CacheCorrupt."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CacheCorrupt(f"{path} can't be read: {error}") from error
    if not isinstance(raw, dict):
        raise CacheCorrupt(f"{path} holds {type(raw).__name__}: expected a JSON object")
    return raw


def _write_record(path: Path, record: BaseModel) -> None:
    """Write a record as JSON that carries a checksum of itself."""
    raw = record.model_dump(mode="json")
    raw["checksum"] = _checksum(raw)
    write_text(path, json.dumps(raw, indent=1, ensure_ascii=False) + "\n")


def _validated(kind: type[T], raw: dict[str, Any], path: Path) -> T:
    checksum = raw.pop("checksum", None)
    if checksum != _checksum(raw):
        raise CacheCorrupt(
            f"{path} is damaged: it does not match its checksum. Restore it, or harvest again"
        )
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
