"""What lies where in a bucketed database.

    manifest.json                     what it is; written last: without it the place is no database
    features.duckdb                   the tables that aren't in buckets
    files.parquet                     one row for each file of the rest, see `BucketFile`
    contexts/0-000004096.parquet      rows of SAE 0's features from 4,096
    documents/000002048.parquet       documents from the 2,048th row
    words/000001.parquet              words, in their order

In: a manifest's text. Out: what it says, checked.
"""

import json
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import OpenError, SchemaVersionError
from ..schema import SCHEMA_VERSION

FORMAT, FORMAT_VERSION = "buckets", 1
MANIFEST, SMALL, FILES = "manifest.json", "features.duckdb", "files.parquet"
FEATURES_A_FILE = 4096
WORDS, DOCUMENTS = "words", "documents"
# Features in a row group: about 10 to 100 kB, which is what is read for one of them.
FEATURES_A_GROUP = {
    "contexts": 16,
    "feature_tokens": 64,
    "feature_nearby_tokens": 64,
    "feature_logits": 64,
    "feature_histogram": 64,
    "feature_positions": 64,
    "feature_documents": 64,
    "neighbors": 64,
    "coactivations": 64,
    "similar_features": 64,
}
BUCKETED = (*FEATURES_A_GROUP, DOCUMENTS, WORDS)


class Rows(NamedTuple):
    """Rows of a table that isn't cut by features: in a file, and in one of its groups."""

    a_file: int
    a_group: int


DOCUMENT_ROWS = Rows(4096, 64)
WORD_ROWS = Rows(1 << 20, 8192)


class Part(BaseModel):
    """A file that the manifest vouches for."""

    model_config = ConfigDict(frozen=True)

    n_bytes: int = Field(ge=0, description="its size")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of its content, in hexadecimal")


class Manifest(BaseModel):
    """What a place says of itself; exports say more, which readers don't need."""

    model_config = ConfigDict(frozen=True)

    format: str = Field(description="buckets")
    format_version: int = Field(description="of this layout")
    schema_version: int = Field(description="of the tables")
    small: Part = Field(description="features.duckdb")
    files: Part = Field(description="files.parquet")


def read_manifest(text: bytes, root: str) -> Manifest:
    """Raises: OpenError for what is no manifest of buckets; SchemaVersionError."""
    try:
        said = json.loads(text)
        kind, version = said["format"], said["format_version"]
    except (ValueError, KeyError, TypeError):
        raise OpenError(
            f"{root}/{MANIFEST} is damaged, or of something else: expected a database exported "
            "with --format buckets"
        ) from None
    if kind != FORMAT:
        raise OpenError(
            f"{root} is an export as {str(kind)[:40]!r}: expected a feature database, or one "
            "exported with --format buckets"
        )
    _check_versions(root, version, said.get("schema_version"))
    try:
        return Manifest.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise OpenError(
            f"{root}/{MANIFEST} is damaged ({where}: {first['msg']}): export again"
        ) from None


def _check_versions(root: str, version: object, schema: object) -> None:
    for name, found, known in (
        ("layout", version, FORMAT_VERSION),
        ("schema", schema, SCHEMA_VERSION),
    ):
        if isinstance(found, int) and found > known:
            raise SchemaVersionError(
                f"{root} has {name} version {found}, newer than version {known} that this saebase "
                "reads: upgrade with `pip install -U saebase`, or export again"
            )
        if isinstance(found, int) and found < known:
            raise SchemaVersionError(
                f"{root} has {name} version {found}, older than version {known} that this saebase "
                "reads: export again from the database that it was made from"
            )
