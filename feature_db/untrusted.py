"""SQL that comes from a page or from another person -> rows, in a locked process of its own.

DuckDB calls SQL code, and has no boundary inside: a query may read files, fill memory or never end.
So the query goes to `untrusted_child`, in a new interpreter without the environment, and whatever
becomes of it there, here it is an Arrow table or one line of error.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from .errors import OpenError, QueryError, QueryLimitError

Params = Sequence[Any] | Mapping[str, Any]

# SQL and parameters together: what people write has some thousand characters.
_REQUEST_BYTES = 1 << 20
# Beside the rows, an answer is two lines.
_LINES_BYTES = 1 << 16
# From the interpreter's start to the query's first word: 0.2 s, unless the machine is busy.
_START_S = 30.0
_CHILD = Path(__file__).with_name("untrusted_child.py")
# Arrow's own allocators and glibc's arenas reserve address space, which is what is limited.
_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "LC_ALL": "C.UTF-8"}


class SqlLimits(BaseModel):
    """How much a query of `FeatureDB.sql(untrusted=True)` may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time_s: float = Field(
        default=5.0, gt=0, le=3600, description="seconds before the query is stopped"
    )
    memory_bytes: int = Field(
        default=1_000_000_000,
        ge=100_000_000,
        description="memory that the query may take, its result included",
    )
    result_bytes: int = Field(
        default=64_000_000, ge=1, description="size of the result, as Arrow IPC"
    )


def run_untrusted(
    path: Path,
    query: str,
    params: Params | None,
    limits: SqlLimits,
    buckets: Sequence[str] = (),
) -> pa.Table:
    """The rows of one SELECT over the database at `path`. buckets: tables that lie in files beside
    it, as `feature_db.bucketed` has them.

    Raises: QueryError for SQL that isn't one SELECT, that DuckDB refuses or that fails, in DuckDB's
        words; QueryLimitError where it takes too much, or ends its process; OpenError if the
        database can't be opened for reading.
    """
    request = _request(path, query, params, limits, buckets)
    with _child(path.absolute().parent) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(BrokenPipeError), child.stdin:  # it reads this before it does anything else
            child.stdin.write(request)
        received = _received(child.stdout.fileno(), limits)
        told, rows = _parts(received)
        if told is None:
            raise _ended(child, limits)
    if "error" in told:
        raise _refusal(told["error"], told["message"], path, limits)
    return pa.ipc.open_stream(rows).read_all()


def _request(
    path: Path, query: str, params: Params | None, limits: SqlLimits, buckets: Sequence[str] = ()
) -> bytes:
    """What the child reads. Raises: QueryError for what can't be sent."""
    names = params if isinstance(params, Mapping) else map(str, range(len(params or ())))
    values = params.values() if isinstance(params, Mapping) else params or ()
    head = {"file": path.name, "query": query, "named": isinstance(params, Mapping)}
    head["buckets"] = list(buckets)
    try:
        query.encode()
        columns = {name: pa.array([value]) for name, value in zip(names, values, strict=True)}
    except (ValueError, TypeError, OverflowError, NotImplementedError) as error:
        raise QueryError(
            f"the SQL or a parameter can't be sent to another process: {error}; expected text, and "
            "parameters that are numbers, text, dates, lists or NULL"
        ) from None
    request = json.dumps(head | limits.model_dump()).encode() + b"\n" + _encoded(columns)
    if len(request) > _REQUEST_BYTES:
        raise QueryLimitError(
            f"the SQL and its parameters take {len(request):,} bytes: expected at most "
            f"{_REQUEST_BYTES:,}"
        )
    return request


def _encoded(columns: dict[str, pa.Array]) -> bytes:
    """A table of one row as Arrow IPC; nothing for no columns."""
    if not columns:
        return b""
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


@contextmanager
def _child(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The locked process, working in `folder`; it and all it started are gone at the end."""
    libraries = {str(Path(str(module.__file__)).parents[1]) for module in (duckdb, pa)}
    try:
        process = subprocess.Popen(
            # No environment, no user's packages, no .pth files, no bytecode written.
            [sys.executable, "-I", "-S", "-B", str(_CHILD), *sorted(libraries)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_ENVIRONMENT,
            start_new_session=True,
        )
    except OSError as error:
        raise OpenError(
            f"no process for untrusted SQL can be started in {folder}: {error.strerror}"
        ) from None
    with process:
        try:
            yield process
        finally:
            if process.returncode is None:  # not waited for, so its number is no other's yet
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)


def _received(pipe: int, limits: SqlLimits) -> bytearray:
    """All that the child writes. Raises: QueryLimitError if it is too slow or writes too much."""
    received, deadline = bytearray(), time.monotonic() + _START_S
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0)):
            part = os.read(pipe, 1 << 20)
            if not part:
                return received
            if not received:  # the locks are on: the query's own time starts
                deadline = time.monotonic() + limits.time_s
            received += part
            if len(received) > limits.result_bytes + _LINES_BYTES:
                raise _too_large(limits)
    if not received:
        raise QueryLimitError(
            f"the process for untrusted SQL didn't start within {_START_S:g} s: the machine is "
            "too busy, try again later"
        )
    raise _too_slow(limits)


def _parts(received: bytearray) -> tuple[dict[str, Any] | None, bytes]:
    """(line, rows) of an answer that is whole; (None, b"") of one that isn't."""
    begin = 1 if received.startswith(b"\n") else 0
    end = received.find(b"\n", begin)
    if end < 0:
        return None, b""
    try:
        told: dict[str, Any] = json.loads(received[begin:end])
    except ValueError:
        return None, b""
    rows = bytes(memoryview(received)[end + 1 :])
    return (told, rows) if len(rows) == told.get("rows", 0) else (None, b"")


def _refusal(kind: str, message: str, path: Path, limits: SqlLimits) -> Exception:
    if kind == "open":
        return OpenError(
            f"{path} can't be opened for untrusted SQL, which needs it open for reading alone, "
            f"here and elsewhere: use FeatureDB.open(path) ({message})"
        )
    if kind == "memory":
        return _too_much_memory(limits)
    return _too_large(limits) if kind == "result" else QueryError(message)


def _ended(child: "subprocess.Popen[bytes]", limits: SqlLimits) -> QueryLimitError:
    """What to say of a process that ended before it had answered."""
    try:
        status = child.wait(1.0)
    except subprocess.TimeoutExpired:
        return _too_slow(limits)
    if -status in (signal.SIGXCPU, signal.SIGALRM):
        return _too_slow(limits)
    how = f"status {status}" if status >= 0 else signal.Signals(-status).name
    return QueryLimitError(
        f"the query brought its process down ({how}): ask for less, in simpler words, or raise "
        f"SqlLimits.memory_bytes (now {_megabytes(limits.memory_bytes)})"
    )


def _too_slow(limits: SqlLimits) -> QueryLimitError:
    return QueryLimitError(
        f"the query was stopped after {limits.time_s:g} s: ask for less, or raise SqlLimits.time_s"
    )


def _too_much_memory(limits: SqlLimits) -> QueryLimitError:
    return QueryLimitError(
        f"the query needs more than {_megabytes(limits.memory_bytes)} of memory: ask for less, or "
        "raise SqlLimits.memory_bytes"
    )


def _too_large(limits: SqlLimits) -> QueryLimitError:
    return QueryLimitError(
        f"the result is larger than {_megabytes(limits.result_bytes)}: add a LIMIT or name fewer "
        "columns, or raise SqlLimits.result_bytes"
    )


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.4g} MB"
