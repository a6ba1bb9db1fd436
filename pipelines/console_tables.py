"""Tables of the command line, drawn with rich."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from feature_db import visible
from interp import SteeringOutcome

from .doctor import Check, State

_COLOUR = {State.OK: "green", State.NOTE: "yellow", State.PROBLEM: "red"}


def checks_table(checks: Sequence[Check]) -> Table:
    """What `doctor` found."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        state = Text(check.state.value, style=_COLOUR[check.state])
        table.add_row(state, check.what, Text(check.finding))
    return table


def outcome_table(outcome: SteeringOutcome) -> Table:
    """Unsteered and steered side by side, with what steering cost."""
    table = Table(expand=True)
    table.add_column(f"unsteered  (perplexity {outcome.baseline_perplexity:.1f})", ratio=1)
    table.add_column(
        f"steered  (perplexity {outcome.steered_perplexity:.1f}, KL {outcome.kl:.2f})", ratio=1
    )
    table.add_row(Text(visible(outcome.baseline)), Text(visible(outcome.steered)))
    return table
