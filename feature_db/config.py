"""What an index holds and how it is made: the options of `build_index`."""

from collections.abc import Callable
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field


class IndexConfig(BaseModel):
    """Options of `build_index`.

    Memory while building, beside one chunk: about
    `d_sae * (n_top + quantile_sample) * (4 * (tokens_before + 1 + tokens_after) + 48)` bytes
    (180 MB at 16,384 features and the defaults), and what one bucket of token counts takes.
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
    keep_documents: bool = Field(default=True, description="write every document's text")
    seed: int = Field(default=0, ge=0, description="which activations the quantile sample holds")
    chunk_rows: int = Field(
        default=32768,
        ge=1,
        description="tokens read at once; changes memory and speed, not the result",
    )

    def identity(self) -> dict[str, object]:
        """The options that change what the index holds: all but `chunk_rows`."""
        return self.model_dump(exclude={"chunk_rows"})


class IndexProgress(NamedTuple):
    """Told to `on_progress` as the work goes on.

    stage: "activations", "features" or "documents".
    done, total: tokens, features or documents so far and in all.
    """

    stage: str
    done: int
    total: int


OnProgress = Callable[[IndexProgress], None]
