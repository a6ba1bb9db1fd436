"""Opening a database's file: what can be wrong with it, in one line."""

import re
from pathlib import Path

import duckdb

from .errors import DatabaseBusyError, OpenError
from .schema import get_meta

# A DuckDB file is three headers of 4 KiB, then blocks.
_HEADER_BYTES = 3 * 4096


def require_file(path: Path) -> None:
    """Raises: OpenError unless there is a file."""
    if not path.is_file():
        raise OpenError(
            f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: expected a feature "
            "database, such as `saebase index` makes, or a folder that one was exported to with "
            "--format buckets"
        )


def connected(path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
    """A connection to a file. Raises: OpenError if it is no DuckDB file, torn or in use."""
    try:
        return duckdb.connect(str(path), read_only=read_only)
    except duckdb.Error as error:
        message = one_line(str(error))
        if "not a valid DuckDB database" in message:
            what = "is no DuckDB file: expected a feature database, such as `saebase index` makes"
        elif "Could not set lock" in message:
            raise DatabaseBusyError(
                f"{path} is open elsewhere{_holder(message)}: close it there first"
            ) from None
        elif "different configuration" in message:
            what = "is open in this process in another way: close that FeatureDB first"
        elif "Could not read enough bytes" in message:
            what = f"is torn: build the index again ({message})"
        else:
            what = f"can't be opened: build the index again if it is damaged ({message})"
        raise OpenError(f"{path} {what}") from None


def version_of(connection: duckdb.DuckDBPyConnection, path: Path) -> int:
    """The schema_version of a database that is whole. Raises: OpenError if it isn't."""
    try:
        # Free blocks at the end are cut off when a database is closed, and still counted.
        block_bytes, n_used = connection.execute(
            "SELECT block_size, used_blocks FROM pragma_database_size()"
        ).fetchall()[0]
        if path.stat().st_size < _HEADER_BYTES + int(block_bytes) * int(n_used):
            raise OpenError(f"{path} is torn: its end is missing. Build the index again")
        version = get_meta(connection, "schema_version")
    except duckdb.CatalogException:
        version = None
    except duckdb.Error as error:
        raise OpenError(
            f"{path} is damaged: build the index again ({one_line(str(error))})"
        ) from None
    if version is None or not version.isdecimal():
        raise OpenError(
            f"{path} is a DuckDB file but no feature database: expected one that `saebase index` "
            "made"
        )
    return int(version)


def one_line(message: str) -> str:
    """DuckDB's message without its line breaks and its picture of where the error is."""
    text, _, picture = message.partition("\nLINE ")
    near = re.search(r"^( *)\^", picture, re.MULTILINE)
    if near and "near" not in text:
        line = picture.splitlines()[0]
        shown = line[max(len(near[1]) - len("LINE "), 0) :].strip()
        text = f"{text.strip()}; near {shown[:60]!r}"
    return " ".join(text.split())


def _holder(message: str) -> str:
    """Who holds the file, as DuckDB says it: ` (python3 (PID 812))`."""
    found = re.search(r"held in (.*?\(PID \d+\))", message)
    return f" ({found.group(1)})" if found else ""
