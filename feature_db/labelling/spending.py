"""Tokens and cost: estimated before, counted as answers come, held under a cap."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .config import Endpoint, LabelConfig
from .prompts import Message

# Without the model's tokenizer: English text has about 4 bytes a token, JSON and markup fewer.
_BYTES_A_TOKEN = 3.5
_TOKENS_A_MESSAGE = 8


class CapReachedError(Exception):
    """The cap is used up: nothing new may start."""


@dataclass
class Tokens:
    """Tokens of some requests, and how many of their answers couldn't be read."""

    prompt: int = 0
    answer: int = 0
    n_requests: int = 0
    n_malformed: int = 0

    @property
    def total(self) -> int:
        """Prompt and answer together."""
        return self.prompt + self.answer

    def add(self, other: "Tokens") -> None:
        """Count some more."""
        self.prompt += other.prompt
        self.answer += other.answer
        self.n_requests += other.n_requests
        self.n_malformed += other.n_malformed


class Spending:
    """What a run has used, and has set aside for the features that it works on."""

    def __init__(self, endpoint: Endpoint, config: LabelConfig) -> None:
        self._endpoint, self._config = endpoint, config
        self.used, self._set_aside = Tokens(), Tokens()

    @property
    def cost(self) -> float | None:
        """So far; None without prices."""
        return cost_of(self.used, self._endpoint)

    def set_aside(self, estimate: Tokens) -> bool:
        """Set aside what a feature will take. Returns: False where the cap has no room for it."""
        whole = Tokens(self.used.prompt, self.used.answer)
        whole.add(self._set_aside)
        whole.add(estimate)
        if self._exceeds(whole):
            return False
        self._set_aside.add(estimate)
        return True

    def release(self, estimate: Tokens) -> None:
        """The feature is done with: what it took has been counted."""
        self._set_aside.add(Tokens(-estimate.prompt, -estimate.answer, -estimate.n_requests))

    def require_room(self) -> None:
        """Raises: CapReachedError once the cap is used up."""
        if self._exceeds(self.used, or_meets=True):
            raise CapReachedError

    def _exceeds(self, tokens: Tokens, *, or_meets: bool = False) -> bool:
        cost, most_tokens = cost_of(tokens, self._endpoint), self._config.max_tokens_total
        pairs = [(cost, self._config.max_cost), (tokens.total, most_tokens)]
        return any(
            value > cap or (or_meets and value == cap)
            for value, cap in pairs
            if value is not None and cap is not None
        )


def cost_of(tokens: Tokens, endpoint: Endpoint) -> float | None:
    """In the prices' currency; None where neither price is known (a missing one counts as 0)."""
    if endpoint.price_in is None and endpoint.price_out is None:
        return None
    price_in, price_out = endpoint.price_in or 0.0, endpoint.price_out or 0.0
    return (tokens.prompt * price_in + tokens.answer * price_out) / 1e6


def estimated_tokens(messages: Sequence[Message]) -> int:
    """About how many tokens a prompt has."""
    n_bytes = sum(len(message["content"].encode()) for message in messages)
    return math.ceil(n_bytes / _BYTES_A_TOKEN) + _TOKENS_A_MESSAGE * len(messages)


def answer_tokens(n_judgements: int | None) -> int:
    """About how many tokens an answer has: an explanation (None), or so many judgements."""
    return 50 if n_judgements is None else len(json.dumps([0] * n_judgements)) + 10
