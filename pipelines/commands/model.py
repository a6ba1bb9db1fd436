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
    operations = _operations(add or [], clamp or [], ablate or [])
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


def _operations(add: list[str], clamp: list[str], ablate: list[int]) -> dict[int, Operation]:
    """One operation a feature. Raises: PipelineError for none, or two of the same feature."""
    given: list[tuple[int, Operation]] = [(i, Add(dose)) for i, dose in map(_dose, add)]
    given += [(i, Clamp(dose)) for i, dose in map(_dose, clamp)]
    given += [(i, Ablate()) for i in ablate]
    if not given:
        raise PipelineError("nothing to steer by: give --add, --clamp or --ablate")
    operations = dict(given)
    if len(operations) < len(given):
        twice = next(i for i, _ in given if [j for j, _ in given].count(i) > 1)
        raise PipelineError(f"feature {twice} is given two doses: give it one")
    return operations


def _dose(text: str) -> tuple[int, float]:
    feature, _, strength = text.partition(":")
    try:
        return int(feature), float(strength)
    except ValueError as error:
        raise PipelineError(
            f"dose {text!r}: expected FEATURE:STRENGTH, such as 4021:2.5"
        ) from error
