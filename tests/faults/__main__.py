"""Run the fault campaign and print what came of it."""

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .campaign import KINDS, Row, rows


def main(argv: list[str] | None = None) -> int:
    """Returns: 1 if anything was lost or did not survive."""
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    names = arguments.only or list(KINDS)
    start, done = time.perf_counter(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for row in rows(Path(folder), names, is_quick=arguments.quick, seed=arguments.seed):
            done.append(row)
            print(f"{row.name}: {row.seconds:.0f} s", file=sys.stderr)
    elapsed_s = time.perf_counter() - start
    if arguments.json:
        found = [{"name": r.name, "elapsed_s": r.seconds, **r.outcome._asdict()} for r in done]
        print(json.dumps({"seed": arguments.seed, "elapsed_s": elapsed_s, "rows": found}, indent=1))
    else:
        _show(done, arguments.seed, elapsed_s)
    return int(any(row.outcome.survived < row.outcome.tried for row in done))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few of each kind")
    parser.add_argument("--only", action="append", choices=KINDS, help="this kind; may be repeated")
    today = int(datetime.date.today().strftime("%Y%m%d"))
    parser.add_argument("--seed", type=int, default=today, help="left out: the date")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(argv)


def _show(done: list[Row], seed: int, elapsed_s: float) -> None:
    console = Console()
    table = Table("fault", "tried", "survived", "lost", "s", "note")
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in done:
        o = row.outcome
        counts = [f"{count:,}" for count in (o.tried, o.survived, o.lost)]
        table.add_row(o.fault, *counts, f"{row.seconds:.0f}", o.note)
    console.print(table)
    console.print(f"seed {seed}, {elapsed_s:.0f} s")
    for row in done:
        for complaint in row.outcome.complaints:
            console.print(f"{row.name}: {complaint}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
