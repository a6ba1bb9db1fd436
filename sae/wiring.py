"""What an SAE reads and what it reconstructs: one place, another place, or several at once."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sae.config import Config
from sae.errors import ConfigError


class Wiring(Config):
    """Activations at `reads`, side by side, are encoded; those at `writes` are reconstructed."""

    reads: tuple[str, ...] = Field(min_length=1, description="Hookpoints that are encoded.")
    writes: tuple[str, ...] = Field(min_length=1, description="Hookpoints that are decoded to.")
    skip: bool = Field(
        default=False, description="Whether a linear map of what is read is added to the output."
    )

    @property
    def is_tied(self) -> bool:
        """Whether what is read is what is reconstructed, as in an SAE or a crosscoder."""
        return self.reads == self.writes

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """Every place once, those that are read first."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    @property
    def name(self) -> str:
        """What to call it in a line: a -> b, or a + b."""
        reads = " + ".join(self.reads)
        return reads if self.is_tied else f"{reads} -> {' + '.join(self.writes)}"


def transcoder(reads: str, writes: str, *, skip: bool = False) -> Wiring:
    """Sparse replacement of what lies between two places, an MLP say: x at reads -> y at writes.

        y_hat = acts(x) @ W_dec + b_dec (+ x @ W_skip)

    Source: Dunefsky et al. 2024, arXiv 2406.11944; the skip: Paulo et al. 2025, arXiv 2501.18823.
    Raises: ConfigError if both are the same place.
    """
    if reads == writes:
        raise ConfigError(f"a transcoder maps one place to another; both are {reads!r}")
    return Wiring(reads=(reads,), writes=(writes,), skip=skip)


def crosscoder(*hookpoints: str) -> Wiring:
    """One dictionary for several places: all are encoded together, and all are reconstructed.

    Source: Lindsey et al. 2024, transcoder-circuits.pub/2024/crosscoders.
    Raises: ConfigError if there are fewer than two places, or one stands twice.
    """
    if len(hookpoints) < 2 or len(set(hookpoints)) < len(hookpoints):
        raise ConfigError(f"a crosscoder needs two places or more, each once; got {hookpoints!r}")
    return Wiring(reads=hookpoints, writes=hookpoints)


def wiring_of(hookpoint: str | Wiring) -> Wiring:
    """An SAE's wiring where a single hookpoint is named."""
    if isinstance(hookpoint, Wiring):
        return hookpoint
    return Wiring(reads=(hookpoint,), writes=(hookpoint,))


def wiring_from(description: dict[str, Any]) -> Wiring | None:
    """The wiring that an SAE's description has; None if it doesn't say."""
    if description.get("wiring") is not None:
        return Wiring(**description["wiring"])
    hookpoint = description.get("hookpoint")
    return None if hookpoint is None else wiring_of(hookpoint)
