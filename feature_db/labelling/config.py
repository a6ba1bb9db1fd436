"""Settings of labelling with a language model, and what a run tells of itself."""

import json
from collections.abc import Callable
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .prompts import PROMPT_VERSION


class Endpoint(BaseModel):
    """An OpenAI-compatible endpoint and how it may be used. Its key is never part of this."""

    # An address may hold a password by mistake: errors don't repeat it.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    base_url: str = Field(description="address of the API, such as http://localhost:8000/v1")
    model: str = Field(min_length=1, description="name of the model there")
    concurrency: int = Field(default=8, ge=1, description="requests in flight at once, at most")
    requests_per_minute: float | None = Field(
        default=None, gt=0, description="requests started a minute, at most, retries included"
    )
    tokens_per_minute: float | None = Field(
        default=None, gt=0, description="prompt and answer tokens a minute, at most, as estimated"
    )
    timeout_s: float = Field(
        default=120.0, gt=0, description="seconds until an answer has come whole, or is given up"
    )
    max_retries: int = Field(
        default=6, ge=0, description="times a request is sent again after a passing error"
    )
    temperature: float | None = Field(
        default=0.0, ge=0, description="0 takes the likeliest token; none leaves it to the server"
    )
    max_answer_tokens: int = Field(
        default=1024, ge=16, description="an answer is cut here; models that think need more"
    )
    structured_output: bool = Field(
        default=False,
        description="ask the server to hold answers to their JSON schema (vLLM, llama.cpp, OpenAI)",
    )
    price_in: float | None = Field(default=None, ge=0, description="of a million prompt tokens")
    price_out: float | None = Field(default=None, ge=0, description="of a million answer tokens")

    @field_validator("temperature", mode="before")
    @classmethod
    def _left_to_the_server(cls, temperature: object) -> object:
        return None if temperature == "none" else temperature  # as a command line writes it

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        if parts.username or parts.password:
            raise ValueError("base_url holds a user name or password: give the key apart from it")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"base_url {base_url!r}: expected an address such as http://localhost:8000/v1"
            )
        return base_url


class LabelConfig(BaseModel):
    """What is asked of the language model about each feature, and what it may cost in all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_shown: int = Field(
        default=20, ge=1, description="contexts that the explanation is made from, a feature"
    )
    n_scored: int = Field(
        default=20,
        ge=1,
        description="other active contexts that scores are measured on, and as many silent ones",
    )
    contexts_per_request: int = Field(
        default=10, ge=1, description="contexts judged in one request, at most"
    )
    hard_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="of the silent contexts, the part that comes from near features",
    )
    detection: bool = Field(default=True, description="measure the detection score")
    fuzzing: bool = Field(default=True, description="measure the fuzzing score")
    malformed_retries: int = Field(
        default=2, ge=0, description="times an answer that can't be read is asked for again"
    )
    seed: int = Field(
        default=0, ge=0, description="which contexts are shown, scored and wrongly marked"
    )
    max_cost: float | None = Field(
        default=None, gt=0, description="no new request starts once this much is spent"
    )
    max_tokens_total: int | None = Field(
        default=None, gt=0, description="no new request starts once this many tokens are used"
    )


def recipe_of(endpoint: Endpoint, config: LabelConfig) -> str:
    """All that shapes an explanation beside the model, as JSON: what a run is gone on by."""
    asked = config.model_dump(exclude={"malformed_retries", "max_cost", "max_tokens_total"})
    sent = endpoint.model_dump(include={"temperature", "max_answer_tokens", "structured_output"})
    return json.dumps({"prompts": PROMPT_VERSION, **asked, **sent}, sort_keys=True)


class LabelEstimate(NamedTuple):
    """What a run would take, told before anything is sent.

    n_features: to be labelled now; n_done: labelled so by earlier runs; n_empty: without contexts.
    n_requests, prompt_tokens, answer_tokens: in all, from the prompts of n_sampled features.
    cost: None where prices weren't given.
    """

    n_features: int
    n_done: int
    n_empty: int
    n_sampled: int
    n_requests: int
    prompt_tokens: int
    answer_tokens: int
    cost: float | None


class LabelProgress(NamedTuple):
    """Told to `on_progress` after each feature. cost: so far, None without prices."""

    n_done: int
    n_total: int
    n_failed: int
    n_tokens: int
    cost: float | None


class LabelSummary(NamedTuple):
    """What a run has done.

    ended: "done", "stopped" (asked to stop) or "cap" (max_cost or max_tokens_total is used up).
    n_labelled, n_failed: features; failed ones are asked about again by the next run.
    last_failure: why, of the last that failed. n_malformed: answers that couldn't be read.
    """

    ended: Literal["done", "stopped", "cap"]
    n_labelled: int
    n_failed: int
    last_failure: str | None
    n_requests: int
    n_malformed: int
    prompt_tokens: int
    answer_tokens: int
    cost: float | None


OnLabelProgress = Callable[[LabelProgress], None]
