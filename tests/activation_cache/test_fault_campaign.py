"""A few faults of every kind; `make faults` has many. What the campaign itself is worth."""

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import __main__ as command
from tests.faults.campaign import KINDS, Row
from tests.faults.damage import Damaged
from tests.faults.failing_calls import KILL, PATCHED, FailingCall
from tests.faults.outcome import Broken, Lost, Outcome, Trial, tally
from tests.faults.system_calls import committed
from tests.faults.workplace import SHORT, Workplace, records, require_done, require_told

SEED = 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with Workplace(tmp_path_factory.mktemp("faults")) as place:
        yield place


@pytest.mark.parametrize("name", KINDS)
def test_cache_survives(place: Workplace, name: str) -> None:
    outcome = KINDS[name].run(place, KINDS[name].n_quick, SEED)
    if not outcome.tried:
        pytest.skip(outcome.note)
    assert outcome.complaints == ()
    assert (outcome.survived, outcome.lost) == (outcome.tried, 0)


# -- what the campaign is worth: it must notice ---------------------------------------------------


@pytest.fixture
def done(place: Workplace) -> Path:
    """A complete cache that may be spoilt."""
    out = place.new_path()
    require_done(place.harvest(out, SHORT))
    place.require_whole(out, SHORT)
    return out


def test_a_shard_that_is_gone_altered_or_unknown_is_noticed(place: Workplace, done: Path) -> None:
    acknowledged = records(done)
    place.require_committed(done, SHORT, acknowledged)
    record, tokens = done / "shards/000001.json", done / "shards/000001.tokens.safetensors"
    whole = record.read_bytes()
    record.unlink()
    with pytest.raises(Lost, match=r"000001\.json was committed and is gone"):
        place.require_committed(done, SHORT, acknowledged)
    record.write_bytes(whole)
    (done / "shards/000009.json").write_bytes(whole)
    with pytest.raises(Lost, match="should not exist"):
        place.require_committed(done, SHORT, acknowledged)
    (done / "shards/000009.json").unlink()
    tokens.write_bytes(tokens.read_bytes()[:-1] + b"x")
    for check in (
        lambda: place.require_committed(done, SHORT, set()),
        lambda: place.require_whole(done, SHORT),
    ):
        with pytest.raises(Lost, match=r"000001\.tokens"):
            check()


def test_a_stray_file_is_noticed(place: Workplace, done: Path) -> None:
    (done / "shards/000001.json.partial").touch()
    with pytest.raises(Broken, match="a stray file was left"):
        place.require_whole(done, SHORT)


def test_data_that_a_reader_returns_altered_are_noticed(place: Workplace) -> None:
    cache = Damaged(place)
    file = cache.path / "manifest.json"
    manifest = json.loads(file.read_text())
    assert cache.check(file, json.dumps(manifest).encode())  # the same, in other words
    assert cache.note(3) == "2 found, the file named; 1 took white space only"
    cache._truth[-1] = "something else"
    with pytest.raises(Lost, match="altered data were returned"):
        cache.check(file, file.read_bytes())


def test_what_is_acknowledged_is_read_from_the_calls(place: Workplace) -> None:
    whole = place.whole(SHORT)
    assert committed(whole.calls, whole.path) == records(whole.path)
    assert committed(whole.calls[: len(whole.calls) // 2], whole.path) == {"shards/000000.json"}


@pytest.mark.parametrize("how", ["here", PATCHED])
def test_a_call_fails_when_it_should(place: Workplace, how: str) -> None:
    how = place.way if how == "here" else how
    trace = place.new_path("trace")
    trace.parent.mkdir()
    for error, kind in ((errno.EIO, "CacheError"), (errno.ENOSPC, "DiskFull"), (KILL, None)):
        out = place.new_path()
        trace.unlink(missing_ok=True)
        counted = FailingCall(str(out), 0, 0, str(trace))
        require_done(place.harvest(out, SHORT, fail=(counted, how)))
        calls = [line.replace(str(out), "acts") for line in trace.read_text().splitlines()]
        assert calls[0] == "mkdir acts"
        nth = calls.index("fsync acts/shards/000001.json.partial") + 1
        out = place.new_path()
        failing = FailingCall(str(out), nth, error, str(trace))
        result = place.harvest(out, SHORT, fail=(failing, how))
        assert records(out) == {"shards/000000.json"}
        if kind:
            require_told(result, kind, out)
        else:
            assert result.was_killed


def test_failures_are_counted_and_told() -> None:
    def fail(error: Exception) -> bool:
        raise error

    trials = [
        Trial("one", lambda: True),
        Trial("two", lambda: fail(Broken("a traceback"))),
        Trial("three", lambda: False),
        Trial("four", lambda: fail(Lost("a shard"))),
    ]
    outcome = tally("a fault", trials)
    assert outcome[:4] == ("a fault", 3, 1, 1)
    assert outcome.complaints == ("two: a traceback", "four: a shard")
    with pytest.raises(KeyError):
        tally("a fault", [Trial("a defect of the campaign", lambda: fail(KeyError()))])


@pytest.mark.parametrize("survived", [4, 3])
def test_command_prints_a_table_and_fails_with_the_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], survived: int
) -> None:
    asked = list[Any]()

    def rows(folder: Path, names: list[str], *, is_quick: bool, seed: int) -> Iterator[Row]:
        asked.append((list(folder.iterdir()), names, is_quick, seed))
        complaints = ("call 3: a traceback",)[: 4 - survived]
        yield Row("kills", Outcome("kill -9", 4, survived, 0, "a note", complaints), 2.0)

    monkeypatch.setattr(command, "rows", rows)
    failed = int(survived < 4)
    assert command.main(["--quick", "--only", "kills", "--seed", "7"]) == failed
    assert command.main(["--json", "--seed", "8"]) == failed
    assert asked == [([], ["kills"], True, 7), ([], list(KINDS), False, 8)]
    out = capsys.readouterr().out
    table, _, printed = out.partition("{")
    assert re.search(rf"kill -9 +│ +4 │ +{survived} │ +0 │ +2 │ a note", table)
    assert "seed 7" in table
    assert ("kills: call 3: a traceback" in table) == bool(failed)
    assert json.loads("{" + printed)["rows"][0]["survived"] == survived
