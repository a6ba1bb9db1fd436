"""What one does with a model, an SAE and a feature database: for now, steering."""

from .errors import InterpError, SteeringError
from .steering import (
    Ablate,
    Add,
    Clamp,
    Operation,
    SteeringOutcome,
    compare,
    perplexity,
    steer,
    stream_edit,
)

__all__ = [
    "Ablate",
    "Add",
    "Clamp",
    "InterpError",
    "Operation",
    "SteeringError",
    "SteeringOutcome",
    "compare",
    "perplexity",
    "steer",
    "stream_edit",
]
