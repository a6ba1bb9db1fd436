"""docs/cookbook.md: its queries, and its answers written anew.

    python -m tests.feature_db.cookbook.page demo/cookbook.duckdb

The answers stand under their queries as text blocks.
"""

import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from feature_db import FeatureDB, Result

PAGE = Path(__file__).parents[3] / "docs" / "cookbook.md"
_QUERY = re.compile(r"```sql\n(.*?)\n```\n(\n```text\n(.*?)\n```\n)?", re.S)
_WIDTH = 118


class Question(NamedTuple):
    """One query of the page. answer: as it stands there, None where there is none."""

    title: str
    sql: str
    answer: str | None


def questions() -> list[Question]:
    """All queries of the page, in order."""
    found = []
    for section in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        title = section.partition("\n")[0]
        found += [Question(title, each[1], each[3]) for each in _QUERY.finditer(section)]
    return found


def shown(result: Result) -> str:
    """Rows as the page shows them."""
    console = Console(width=_WIDTH, no_color=True, file=io.StringIO(), force_terminal=False)
    with console.capture() as captured:
        console.print(result)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines).strip("\n") if len(result) else "(no rows)"


def main(path: str) -> None:
    """Write the answers of a database into the page."""
    with FeatureDB.open(path) as db:

        def answered(query: re.Match[str]) -> str:
            return f"```sql\n{query[1]}\n```\n\n```text\n{shown(db.sql(query[1]))}\n```\n"

        PAGE.write_text(_QUERY.sub(answered, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
