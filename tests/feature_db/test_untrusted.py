"""SQL of strangers: what it may ask, and that nothing else happens, whatever it is."""

import datetime
import decimal
import hashlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

import feature_db.untrusted
from feature_db import (
    FeatureDB,
    OpenError,
    QueryError,
    QueryLimitError,
    SqlLimits,
)

from .conftest import World
from .hostile_sql import ENDLESS, REFUSED, SIZE, TIME, TOO_MUCH

SMALL = SqlLimits(time_s=2.0, memory_bytes=300_000_000, result_bytes=1_000_000)
BRIEF = SqlLimits(time_s=0.4, memory_bytes=300_000_000, result_bytes=1_000_000)


def state_of(path: Path) -> dict[str, str]:
    """Every file of the database's folder, by its content."""
    files = [file for file in path.parent.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(autouse=True)
def _unharmed(world: World) -> Iterator[None]:
    """No file is changed or made, no process and no thread is left, and no descriptor."""
    files, threads = state_of(world.path), set(threading.enumerate())
    descriptors = psutil.Process().num_fds()
    yield
    assert state_of(world.path) == files
    assert set(threading.enumerate()) <= threads
    assert not psutil.Process().children(recursive=True)
    assert psutil.Process().num_fds() <= descriptors


# -- what it may ask -------------------------------------------------------------------------------

LEGITIMATE = {
    "rows": "SELECT * FROM features ORDER BY feature_id",
    "lists and text": """SELECT token_ids, tokens_of(token_ids) AS tokens, acts, text
        FROM contexts ORDER BY ALL LIMIT 20""",
    "join": """SELECT f.feature_id, c.text, t.token, lift FROM features f
        JOIN contexts c USING (sae_id, feature_id) JOIN feature_tokens t USING (sae_id, feature_id)
        WHERE c.rank = 1 ORDER BY ALL""",
    "aggregates": """SELECT kind, count(*), avg(act), max_by(token, act), list(DISTINCT token
        ORDER BY token), quantile_cont(act, [0.1, 0.9]) FROM contexts GROUP BY kind ORDER BY 1""",
    "window": """SELECT feature_id, density, rank() OVER (ORDER BY density DESC, feature_id),
        sum(n_active) OVER (ORDER BY feature_id) FROM features ORDER BY feature_id""",
    "recursion": """WITH RECURSIVE walk(feature_id, depth) AS (SELECT 3, 0 UNION
        SELECT neighbor_id, depth + 1 FROM walk JOIN neighbors USING (feature_id) WHERE depth < 3)
        SELECT * FROM walk ORDER BY ALL""",
    "FROM first": "FROM saes",
    "VALUES": "VALUES (1, 'a'), (2, NULL)",
    "DESCRIBE": "DESCRIBE contexts",
    "SHOW": "SHOW TABLES",
    "SUMMARIZE": "SUMMARIZE SELECT density FROM features",
    "unnest": "SELECT feature_id, unnest(tokens_of(token_ids)) FROM contexts ORDER BY ALL LIMIT 50",
    "pivot": "FROM features PIVOT (count(feature_id) FOR is_dead IN (true, false)) ORDER BY ALL",
    "lambda": "SELECT list_transform(acts, lambda a: a * 2) FROM contexts ORDER BY ALL LIMIT 5",
    "all types": "SELECT * EXCLUDE (double_array) FROM test_all_types()",  # NaN isn't itself
    "no rows": "SELECT * FROM contexts WHERE false",
    "many batches": "SELECT range AS n, range::VARCHAR AS text FROM range(100000)",
    "semicolon": "SELECT 1 AS one;",
    "comment": "/* hello */ SELECT 1 AS one -- done",
    "pattern": "SELECT token FROM contexts WHERE regexp_matches(text, '^\\W*The') ORDER BY 1",
    "JSON": """SELECT '{"a": [1, 2]}'::JSON -> '$.a[1]' AS second""",
    "time zone": "SELECT TIMESTAMPTZ '2026-01-02 03:04:05+00' AS t",
    "two columns of a name": "SELECT 1 AS a, 2 AS a",
}


@pytest.mark.parametrize("sql", LEGITIMATE.values(), ids=LEGITIMATE)
def test_the_same_rows_and_types_as_trusted_sql(db: FeatureDB, sql: str) -> None:
    trusted, untrusted = db.sql(sql), db.sql(sql, untrusted=True)
    assert untrusted.arrow().schema == trusted.arrow().schema
    assert untrusted.arrow().equals(trusted.arrow())


PARAMETERS = [
    None,
    True,
    -7,
    2**63 - 1,
    0.1,
    "'; DROP TABLE features; -- é日本",
    b"\x00\xff",
    datetime.date(2026, 1, 2),
    datetime.time(1, 2, 3),
    datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    datetime.timedelta(days=1, seconds=2),
    decimal.Decimal("12.50"),
    uuid.UUID(int=7),
    [1, 2, 3],
    ["a", "b"],
    [],
    {"a": 1, "b": "x"},
]


def test_parameters_are_bound_as_in_trusted_sql(db: FeatureDB) -> None:
    sql = "SELECT ? AS value, typeof(value) AS type"
    both = ", ".join(f"? AS value{i}, typeof(value{i})" for i in range(len(PARAMETERS)))
    trusted = [row for value in PARAMETERS for row in db.sql(sql, [value])]
    ((*untrusted,),) = db.sql(f"SELECT {both}", PARAMETERS, untrusted=True)
    assert list(zip(untrusted[::2], untrusted[1::2], strict=True)) == trusted


def test_parameters_by_place_and_by_name(db: FeatureDB) -> None:
    sql = "SELECT feature_id FROM features WHERE feature_id IN (?, ?) ORDER BY ALL"
    assert db.sql(sql, [5, 2], untrusted=True).fetchall() == [(2,), (5,)]
    named = db.sql("SELECT $b - $a AS d", {"a": 1, "b": 5}, untrusted=True)
    assert named.fetchall() == [(4,)]


# -- what it may not -------------------------------------------------------------------------------


def refused(db: FeatureDB, sql: str, says: str, kind: type[QueryError], **more: Any) -> str:
    """The one line that `sql` ends in, in time; the database answers after it as before."""
    started = time.monotonic()
    with pytest.raises(QueryError, match=says) as caught:
        db.sql(sql, untrusted=True, **more)
    assert time.monotonic() - started < 6
    assert type(caught.value) is kind
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 3000
    assert db.sql("SELECT count(*) FROM features").fetchall() == [(48,)]
    return message


@pytest.mark.parametrize(("sql", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_reading_of_this_database_is_refused(db: FeatureDB, sql: str, says: str) -> None:
    refused(db, sql, says, QueryError, limits=SMALL)


@pytest.mark.parametrize(("sql", "says"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_takes_too_much_is_stopped(db: FeatureDB, sql: str, says: str) -> None:
    refused(db, sql, says, QueryLimitError, limits=SMALL)


@pytest.mark.parametrize(("sql", "says"), ENDLESS.values(), ids=ENDLESS)
def test_what_does_not_end_is_stopped(db: FeatureDB, sql: str, says: str) -> None:
    refused(db, sql, says, QueryLimitError, limits=BRIEF)


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("SELECT sum(range) FROM range(1000000000000)", r"stopped after 5 s"),
        ("SELECT list(range) FROM range(1000000000000)", r"more than 1,000 MB of memory|5 s"),
        ("FROM generate_series(1, 1000000000000)", r"larger than 64 MB: add a LIMIT"),
    ],
)
def test_the_limits_hold_unless_others_are_given(db: FeatureDB, sql: str, says: str) -> None:
    refused(db, sql, says, QueryLimitError)


def test_a_larger_limit_lets_the_same_query_through(db: FeatureDB) -> None:
    sql = "SELECT repeat('x', 1500000) AS text"
    refused(db, sql, SIZE, QueryLimitError, limits=SMALL)
    larger = SMALL.model_copy(update={"result_bytes": 2_000_000})
    assert len(db.sql(sql, untrusted=True, limits=larger).fetchall()[0][0]) == 1_500_000


def test_impossible_limits_and_limits_for_trusted_sql_are_refused(db: FeatureDB) -> None:
    for wrong in ({"time_s": 0}, {"memory_bytes": 1}, {"result_bytes": 0}, {"seconds": 3}):
        with pytest.raises(ValidationError):
            SqlLimits.model_validate(wrong)
    with pytest.raises(QueryError, match="untrusted=True"):
        db.sql("SELECT 1", limits=SMALL)


@pytest.mark.parametrize("value", [object(), 2**64, [1, "a"], "\ud800"])
def test_parameters_that_can_not_be_sent_are_named(db: FeatureDB, value: object) -> None:
    with pytest.raises(QueryError, match="a parameter can't be sent"):
        db.sql("SELECT ?", [value], untrusted=True)


def test_a_huge_parameter_is_refused_before_anything_starts(db: FeatureDB) -> None:
    with pytest.raises(QueryLimitError, match="SQL and its parameters take"):
        db.sql("SELECT length(?)", ["x" * 10_000_000], untrusted=True)


# -- the database ----------------------------------------------------------------------------------


def test_open_for_writing_it_can_not_be_asked(world: World, tmp_path: Path) -> None:
    path = tmp_path / "copy.duckdb"
    path.write_bytes(world.path.read_bytes())
    with (
        FeatureDB.open(path, read_only=False) as writing,
        pytest.raises(OpenError, match="needs it open for reading alone") as caught,
    ):
        writing.sql("SELECT 1", untrusted=True)
    assert "\n" not in str(caught.value)
    with FeatureDB.open(path) as reading:
        assert reading.sql("SELECT 1", untrusted=True).fetchall() == [(1,)]


def test_closed_or_gone_it_can_not_be_asked(world: World, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "copy.duckdb"
    path.parent.mkdir()
    path.write_bytes(world.path.read_bytes())
    with FeatureDB.open(path) as db:
        path.unlink()
        with pytest.raises(OpenError, match=r"copy\.duckdb can't be opened"):
            db.sql("SELECT 1", untrusted=True)
        path.parent.rmdir()
        with pytest.raises(OpenError, match=r"can be started in .*folder: No such file"):
            db.sql("SELECT 1", untrusted=True)
    with pytest.raises(QueryError, match="closed"):
        db.sql("SELECT 1", untrusted=True)


def test_several_can_ask_at_once(db: FeatureDB) -> None:
    sql = "SELECT feature_id, label FROM features WHERE feature_id % 4 = ? ORDER BY 1"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: db.sql(sql, [i], untrusted=True).fetchall(), range(4)))
    assert found == [db.sql(sql, [i]).fetchall() for i in range(4)]


# -- the process -----------------------------------------------------------------------------------


def test_the_process_is_locked_while_the_query_runs(db: FeatureDB, world: World) -> None:
    """Seen from outside: its environment, limits, files, group and libraries."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(db.sql, "SELECT sleep_ms(100000)", untrusted=True, limits=SMALL)
        child = None
        while child is None or child.rlimit(psutil.RLIMIT_CPU)[1] < 0:  # the last one it sets
            assert not asked.done()
            child = next(iter(psutil.Process().children()), None)
        assert child.environ() == feature_db.untrusted._ENVIRONMENT
        for nothing in ("RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_CORE"):
            assert child.rlimit(getattr(psutil, nothing)) == (0, 0)
        assert child.rlimit(psutil.RLIMIT_CPU)[1] <= 5
        assert 0 < child.rlimit(psutil.RLIMIT_AS)[1] < 2_000_000_000
        assert [file.path for file in child.open_files()] == [str(world.path)]
        assert child.num_threads() <= 2
        assert os.getpgid(child.pid) == child.pid != os.getpgid(0)
        libraries = " ".join(each.path for each in child.memory_maps())
        assert "_duckdb" in libraries
        assert not any(name in libraries for name in ("torch", "numpy", "openblas"))
        with pytest.raises(QueryLimitError):
            asked.result()


def test_duckdb_s_own_locks_are_on(db: FeatureDB) -> None:
    off = ["enable_external_access", "autoinstall_known_extensions", "autoload_known_extensions"]
    off += ["allow_community_extensions", "allow_persistent_secrets"]
    off += ["python_enable_replacements", "python_scan_all_frames"]
    wanted = dict.fromkeys(off, "false") | {"lock_configuration": "true", "temp_directory": ""}
    wanted |= {"access_mode": "read_only", "threads": "1", "async_threads": "0"}
    sql = "SELECT name, value FROM duckdb_settings() WHERE list_contains(?, name)"
    assert dict(db.sql(sql, [list(wanted)], untrusted=True)) == wanted


def test_its_parent_killed_it_ends_by_itself(world: World) -> None:
    limits = SqlLimits(time_s=0.2)
    sql = "SELECT sum(range) FROM range(1000000000000)"
    request = feature_db.untrusted._request(world.path, sql, None, limits)
    with feature_db.untrusted._child(world.path.parent) as child:
        assert child.stdin is not None
        with child.stdin:
            child.stdin.write(request)
        assert -child.wait(10) in (signal.SIGALRM, signal.SIGXCPU)


def test_interrupted_nothing_is_left(db: FeatureDB) -> None:
    main = threading.main_thread().ident
    assert main is not None
    # A shell's background jobs ignore the signal, and so would these tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer = threading.Timer(0.6, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            db.sql("SELECT sleep_ms(100000)", untrusted=True)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


TAKEN_OVER = {
    "floods its output": ("while True: os.write(1, b'x' * 65536)", "larger than 1 MB"),
    "floods the error stream": ("while True: os.write(2, b'x' * 65536)", "didn't start within"),
    "says nothing": ("time.sleep(100)", r"didn't start within 0\.8 s"),
    "stops half-way": ("os.write(1, b'\\n{\"rows\": 100}\\nabc')", "brought its process down"),
    "answers no JSON": ("os.write(1, b'\\nhello}\\n')", r"brought its process down \(status 0\)"),
    "lives on": ("os.write(1, b'\\n'); os.close(1); time.sleep(100)", TIME),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", r"brought its process down \(SIGSEGV\)"),
    "starts others": ("os.write(1, b'\\n'); os.fork(); time.sleep(100)", TIME),
}


@pytest.mark.parametrize(("code", "says"), TAKEN_OVER.values(), ids=TAKEN_OVER)
def test_whatever_the_process_does_it_ends_in_one_line(
    db: FeatureDB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    """A process that a hole in DuckDB has handed to the query."""
    child = tmp_path / "child.py"
    child.write_text(f"import os, signal, sys, time\nsys.stdin.buffer.read()\n{code}\n")
    monkeypatch.setattr(feature_db.untrusted, "_CHILD", child)
    monkeypatch.setattr(feature_db.untrusted, "_START_S", 0.8)
    refused(db, "SELECT 1", says, QueryLimitError, limits=BRIEF)
