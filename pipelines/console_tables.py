"""Tables of the command line, drawn with rich."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from .doctor import Check, State

_COLOUR = {State.OK: "green", State.NOTE: "yellow", State.PROBLEM: "red"}


def checks_table(checks: Sequence[Check]) -> Table:
    """What `doctor` found."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in checks:
        state = Text(check.state.value, style=_COLOUR[check.state])
        table.add_row(state, check.what, Text(check.finding))
    return table
