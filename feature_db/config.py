"""What an index holds and how it is made: the options of `build_index`."""

from collections.abc import Callable
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

_OF_PARTS = {
    "n_top",
    "max_per_document",
    "quantile_sample",
    "tokens_before",
    "tokens_after",
    "n_neighbors",
    "n_negatives",
    "keep_activations",
    "seed",
}


class IndexConfig(BaseModel):
    """Options of `build_index`.

    Memory while building, beside one chunk: 2 bytes an activation of a part (4 with more than
    65,536 features), and 100 MB. Disk while a part is counted: 8 bytes an activation of it (10).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_top: int = Field(default=20, ge=1, description="strongest contexts kept a feature")
    max_per_document: int = Field(
        default=2,
        ge=1,
        description="of the top contexts of one feature, at most this many a document",
    )
    n_quantiles: int = Field(
        default=10, ge=1, description="equal parts that a feature's acts are cut in"
    )
    contexts_per_quantile: int = Field(default=2, ge=0, description="contexts kept of each part")
    quantile_sample: int = Field(
        default=40, ge=1, description="activations sampled a feature, from which the parts are cut"
    )
    tokens_before: int = Field(
        default=24, ge=0, description="tokens of a context before its active one"
    )
    tokens_after: int = Field(
        default=8, ge=0, description="tokens of a context after its active one"
    )
    n_logits: int = Field(
        default=10, ge=1, description="promoted and suppressed tokens kept a feature"
    )
    n_tokens: int = Field(default=10, ge=1, description="tokens of highest lift kept a feature")
    min_token_count: int = Field(
        default=2,
        ge=1,
        description="times a feature must fire on a token before the token is listed",
    )
    lift_prior: float = Field(
        default=10.0,
        ge=0,
        description="occurrences added to each token at the feature's own rate: tames rare tokens",
    )
    n_neighbors: int = Field(default=10, ge=1, description="nearest features by decoder cosine")
    n_similar: int = Field(
        default=5, ge=1, description="features kept of each other SAE, by decoder cosine"
    )
    n_coactivations: int = Field(
        default=10, ge=0, description="features kept that are active on the same tokens"
    )
    n_documents: int = Field(
        default=5, ge=0, description="documents kept in which a feature is most active"
    )
    n_negatives: int = Field(
        default=10,
        ge=0,
        description="hard negatives kept a feature: contexts of its neighbours where it is silent",
    )
    keep_activations: bool = Field(
        default=False, description="keep every activation, as Parquet beside the database"
    )
    keep_documents: bool = Field(default=True, description="write every document's text")
    seed: int = Field(default=0, ge=0, description="which activations the quantile sample holds")
    chunk_rows: int = Field(
        default=32768,
        ge=1,
        description="tokens read at once; changes memory and speed, not the result",
    )

    part_rows: int = Field(
        default=1 << 20,
        ge=1,
        description="tokens counted as one part of the text: what a killed build may lose",
    )

    def identity(self) -> dict[str, object]:
        """The options that change what the index holds."""
        return self.model_dump(exclude={"chunk_rows", "part_rows"})

    def of_parts(self) -> dict[str, object]:
        """The options that the parts of the text are counted with."""
        return self.model_dump(include=_OF_PARTS)


class IndexProgress(NamedTuple):
    """Told to `on_progress` as the work goes on.

    stage: "activations", "features" or "documents".
    done, total: tokens, features or documents so far and in all.
    """

    stage: str
    done: int
    total: int


OnProgress = Callable[[IndexProgress], None]
