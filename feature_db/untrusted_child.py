"""The process that untrusted SQL runs in: one SELECT comes in, Arrow rows or one complaint go out.

`feature_db.untrusted` starts this file by its path, in an interpreter of its own that sees neither
the environment nor our packages: it imports DuckDB and pyarrow, from the folders that it is called
with, and nothing else.

    stdin    one line of JSON (`Request`), then the parameters: a table of one row, as Arrow IPC
    stdout   an empty line when the locks are on, which starts the query's clock; one line of JSON,
             {"rows": n_bytes} or {"error": kind, "message": text}; n_bytes of Arrow IPC

Before a word of the query is read, DuckDB has no files but the database (read-only), no network, no
extensions, no Python variables, and a locked configuration; the kernel gives the process no further
file, socket, thread or process, no byte of any file to write, and bounds its memory and its time.
"""

import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
from importlib.abc import MetaPathFinder
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

# Both libraries take them where they are there, and need them for nothing that is done here.
_LEFT_OUT = ("numpy", "pandas", "polars")
# DuckDB converts parameters to and from these, and imports them when the first one comes.
_NEEDED_LATER = ("datetime", "decimal", "uuid")
_ROWS_AT_ONCE = 8192
_MESSAGE_CHARACTERS = 2000
# Of the memory that the query may take, what DuckDB plans with: its own error is clearer than the
# kernel's refusal, which also has to leave room for rows on their way out.
_ENGINE_SHARE = 0.7
_DATASETS = Path(__file__).with_name("bucketed") / "datasets.py"
_FILES_OF_BUCKETS = 64


class Request(NamedTuple):
    """What the parent asks for.

    file: the database, in the working directory. query: SQL, not looked at yet. named: whether the
    parameters are for `$name` rather than `?`. buckets: tables in files beside the database, which
    the query may name. memory_bytes, time_s, result_bytes: see SqlLimits.
    """

    file: str
    query: str
    named: bool
    buckets: list[str]
    memory_bytes: int
    time_s: float
    result_bytes: int


class Refusal(Exception):
    """The answer is a complaint. kind: "open", "query", "memory" or "result"."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(message)
        self.kind = kind


def main() -> NoReturn:
    """Answer one request and end, without the interpreter's own slow way out."""
    answers = _answers()
    sys.path += sys.argv[1:]
    request = Request(**json.loads(sys.stdin.buffer.readline()))
    try:
        rows = _answered(request, sys.stdin.buffer.read(), answers)
        _tell(answers, {"rows": len(rows)})
        answers.write(rows)
    except Refusal as refusal:
        message = str(refusal).encode(errors="replace").decode()[:_MESSAGE_CHARACTERS]
        _tell(answers, {"error": refusal.kind, "message": message})
    answers.flush()
    os._exit(0)


def _answers() -> BufferedWriter:
    """The pipe to the parent; what else is written to stdout goes where stderr goes, to nowhere."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _tell(answers: BufferedWriter, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what).encode() + b"\n")


def _answered(request: Request, encoded_params: bytes, answers: BufferedWriter) -> "pa.Buffer":
    """The rows of the query as Arrow IPC, made behind the locks. Raises: Refusal."""
    _import_libraries()
    import duckdb
    import pyarrow as pa

    params = _decoded(encoded_params, request.named)
    try:
        connection = _opened(request)
        _encoded(connection.sql("SELECT 1 AS warm"), request.result_bytes)
    except duckdb.Error as error:
        raise Refusal("open", str(error)) from None
    try:
        _attach(connection, request.buckets)
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise Refusal("query", f"buckets can't be read: {error}") from None
    _lock(request)
    answers.write(b"\n")
    answers.flush()
    try:
        statement = _only_select(connection, request.query)
        return _encoded(connection.sql(statement, params=params), request.result_bytes)
    except (duckdb.OutOfMemoryException, pa.ArrowMemoryError, MemoryError):
        raise Refusal("memory") from None
    except (duckdb.Error, pa.ArrowException, OSError, RuntimeError, ValueError) as error:
        raise Refusal("query", str(error)) from None


def _import_libraries() -> None:
    """Import what answering needs, while files can still be opened."""
    sys.meta_path.insert(0, _LeftOut())
    for name in ("duckdb", "pyarrow", "pyarrow.ipc", *_NEEDED_LATER):
        __import__(name)


class _LeftOut(MetaPathFinder):
    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname.partition(".")[0] in _LEFT_OUT:
            raise ModuleNotFoundError(f"no {fullname} here", name=fullname)


def _decoded(encoded: bytes, named: bool) -> dict[str, Any] | list[Any] | None:
    import pyarrow as pa

    if not encoded:
        return None
    row: dict[str, Any] = pa.ipc.open_stream(encoded).read_all().to_pylist()[0]
    return row if named else list(row.values())


def _opened(request: Request) -> "duckdb.DuckDBPyConnection":
    """The database, with DuckDB's own locks on."""
    import duckdb

    connection = duckdb.connect(
        request.file,
        read_only=True,
        config={
            "enable_external_access": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "allow_persistent_secrets": False,
            "python_enable_replacements": False,
            "python_scan_all_frames": False,
            "temp_directory": "",
            "threads": 1,
            "async_threads": 0,
            "memory_limit": f"{int(_ENGINE_SHARE * request.memory_bytes)}B",
        },
    )
    connection.execute("SET lock_configuration = true").fetchall()
    return connection


def _attach(connection: "duckdb.DuckDBPyConnection", tables: list[str]) -> None:
    """Make files of buckets tables. DuckDB itself opens none: pyarrow reads these and no others."""
    if not tables:
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    datasets = _datasets()
    # One thread each, started by a first read: behind the locks there are no new ones.
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    files = datasets.files_by_table(pq.read_table("files.parquet"))
    for table in tables:
        if of := files.get(table):
            made = datasets.dataset(of, lambda file: file.name, pq.read_schema(of[0].name))
            made.head(1)
            connection.register(table, made)
        else:
            datasets.make_empty(connection, table)


def _datasets() -> Any:
    """The module of that name, which needs nothing else of ours."""
    spec = importlib.util.spec_from_file_location("datasets", _DATASETS)
    assert spec is not None
    assert spec.loader is not None
    datasets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(datasets)
    return datasets


def _lock(request: Request) -> None:
    """Take from this process what the query doesn't need. Nothing gives it back."""
    if sys.platform == "linux":
        _limit(resource.RLIMIT_AS, _address_space() + request.memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    # Those that are open stay open. Of buckets, pyarrow opens some at a time.
    _limit(resource.RLIMIT_NOFILE, _FILES_OF_BUCKETS if request.buckets else 0)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + request.time_s) + 1)
    # The parent kills at the same time; this is for a parent that has been killed itself.
    signal.setitimer(signal.ITIMER_REAL, request.time_s + 1)


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _address_space() -> int:
    """Bytes of address space that this process has by now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _only_select(connection: "duckdb.DuckDBPyConnection", query: str) -> "duckdb.Statement":
    """The one statement of the query, which only reads. Raises: Refusal."""
    import duckdb

    statements = connection.extract_statements(query)
    if len(statements) != 1:
        raise Refusal("query", f"the SQL holds {len(statements)} statements: give one SELECT")
    statement = statements[0]
    if statement.type != duckdb.StatementType.SELECT:
        raise Refusal(
            "query", f"untrusted SQL is one SELECT, SHOW or DESCRIBE: this is {statement.type.name}"
        )
    return statement


def _encoded(relation: "duckdb.DuckDBPyRelation", most: int) -> "pa.Buffer":
    """All rows as an Arrow IPC stream. Raises: Refusal if that has more than `most` bytes."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    reader = relation.to_arrow_reader(_ROWS_AT_ONCE)
    with reader, pa.ipc.new_stream(sink, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
            if sink.tell() > most:
                raise Refusal("result")
    if sink.tell() > most:
        raise Refusal("result")
    return sink.getvalue()


if __name__ == "__main__":
    main()
