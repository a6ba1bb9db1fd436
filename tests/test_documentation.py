"""The documentation names what there is, and nothing that there is not."""

import re
from pathlib import Path

import duckdb
import pytest

from feature_db.schema import migrate
from pipelines.cli import app, run

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))


def verbs() -> set[str]:
    """The commands as they are typed: `train`, `cache stats`."""
    run(["--version"])
    return {
        " ".join([name, *inner])
        for name in app
        if not name.startswith("-")
        for inner in [[i] for i in app[name] if not i.startswith("-")] or [[]]
    }


def named_in(text: str, after: str = "") -> set[str]:
    """The commands that a page names, with their second word where they have one."""
    groups = "|".join(verb.split()[0] for verb in verbs() if " " in verb)
    return set(re.findall(rf"`saebase ((?:{groups}) [a-z]+|[a-z]+){after}", text))


def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    assert named_in((ROOT / "docs" / "commands.md").read_text()) == verbs()


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_pages_speak_of_existing_commands_and_files(page: Path) -> None:
    text = page.read_text()
    assert named_in(text, after=" ") <= verbs()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_table_and_column_of_the_database_is_documented() -> None:
    text = (ROOT / "docs" / "database.md").read_text()
    with duckdb.connect() as connection:
        migrate(connection)
        columns = connection.execute(
            "SELECT table_name, list(column_name) FROM duckdb_columns() "
            "WHERE NOT internal AND table_name <> 'meta' GROUP BY ALL"
        ).fetchall()
    assert len(columns) > 10
    for table, names in columns:
        assert f"## {table}\n" in text, table
        section = text.partition(f"## {table}\n")[2].partition("\n## ")[0]
        for name in names:
            assert f"`{name}`" in section, f"{table}.{name}"


def test_the_architecture_page_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for package in ("activation_cache", "sae", "feature_db", "interp", "pipelines"):
        for file in (ROOT / package).glob("*.py"):
            if not file.name.startswith("__"):
                assert f"`{file.stem}`" in text, f"{package}/{file.name} is not on the map"
