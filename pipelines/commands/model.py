"""Verbs that run the model: steer."""

from typing import Annotated

from cyclopts import Parameter

from interp import Ablate, Add, Clamp, Operation, compare
from sae import SAE

from ..cli import app, console
from ..console_tables import outcome_table
from ..errors import PipelineError
from ..stages import model_of
from .arguments import Device, Dtype, Sae

Doses = Annotated[
    list[str] | None,
    Parameter(negative=(), help="FEATURE:STRENGTH, in maxima of the feature; may be repeated."),
]


@app.command
def steer(
    prompt: Annotated[str, Parameter(help="The text to continue.")],
    *,
    sae: Sae,
    add: Doses = None,
    clamp: Doses = None,
    ablate: Annotated[
        list[int] | None, Parameter(negative=(), help="FEATURE; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, Parameter(help="Tokens to generate.")] = 40,
    temperature: Annotated[float, Parameter(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, Parameter(help="For temperatures above 0.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Continue a prompt without and with features added, clamped or ablated."""
    operations: dict[int, Operation] = {}
    operations |= {i: Add(strength) for i, strength in map(_dose, add or [])}
    operations |= {i: Clamp(strength) for i, strength in map(_dose, clamp or [])}
    operations |= {i: Ablate() for i in ablate or []}
    if not operations:
        raise PipelineError("nothing to steer by: give --add, --clamp or --ablate")
    with console.status("generating"):
        loaded = SAE.load(sae)
        outcome = compare(
            model_of(loaded, device, dtype),
            loaded,
            operations,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    console.print(outcome_table(outcome))


def _dose(text: str) -> tuple[int, float]:
    feature, _, strength = text.partition(":")
    try:
        return int(feature), float(strength)
    except ValueError as error:
        raise PipelineError(
            f"dose {text!r}: expected FEATURE:STRENGTH, such as 4021:2.5"
        ) from error
