"""The settings of a harvest, and what it tells of its progress."""

from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import CacheError
from .formats import STORAGE_DTYPES


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
    min_doc_tokens: int | None = Field(
        default=None, gt=0, description="Leave out documents that are shorter."
    )
    max_doc_tokens: int | None = Field(default=None, gt=0, description="Use no more of a document.")
    only: dict[str, str] = Field(
        default={}, description="Column and value: take only rows that have it (`language: en`)."
    )
    drop_duplicates: bool = Field(
        default=False, description="Leave out documents whose text came before."
    )
    storage_dtype: str = Field(
        default="bfloat16", description=f"One of {', '.join(STORAGE_DTYPES)}."
    )
    batch_blocks: int = Field(default=8, gt=0, description="Blocks in one forward pass.")
    shard_bytes: int = Field(
        default=200_000_000, gt=0, description="Size of one shard file, about."
    )
    text_column: str = Field(default="text", description="The column or key that holds the text.")

    @classmethod
    def of(cls, config: "HarvestConfig | None", options: dict[str, Any]) -> "HarvestConfig":
        """The settings, given as a whole or one by one. Raises: CacheError that names the setting
        which can't be."""
        if config and options:
            raise CacheError(f"give {', '.join(options)} in the config or as keywords, not in both")
        try:
            made = config or cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            near = get_close_matches(name, cls.model_fields, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
            raise CacheError(
                f"setting {name}={first['input']!r}: {first['msg'].lower()}{hint}"
            ) from error
        if made.storage_dtype not in STORAGE_DTYPES:
            raise CacheError(
                f"unknown storage_dtype {made.storage_dtype!r}: expected "
                f"{', '.join(STORAGE_DTYPES)}"
            )
        return made


class HarvestProgress(NamedTuple):
    """Where a harvest stands: rows on disk (uncommitted ones included), rows wanted, rows a second
    since this call began."""

    n_tokens: int
    n_tokens_wanted: int
    tokens_per_s: float
