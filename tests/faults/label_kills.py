"""One who labels features is killed at a random moment: every label that was kept is there."""

import random
import shutil
import time
from pathlib import Path

from feature_db import FeatureDB, FeatureDBError

from .index_kills import made_wholes
from .indexer import D_SAE, label_in_turn
from .outcome import Broken, Lost, Outcome, Trial, tally
from .processes import TIMEOUT_S
from .workplace import Workplace, require_done

_LONGEST_S = 0.5
_AT_WORK = 0.8  # the others are killed while they begin


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: kills, several of one database after another."""
    wholes, kept = made_wholes(place), list[int]()
    template = place.new_path("features.duckdb")
    template.parent.mkdir()
    require_done(wholes.start(place, template, 1).wait())
    trials = [
        Trial(f"labels {i}", lambda i=i: _kill(place, template, random.Random(f"{seed} {i}"), kept))
        for i in range(n)
    ]
    outcome = tally("labels: kill -9 at a random moment", trials)
    return outcome._replace(note=f"{sum(kept):,} labels told as kept")


def _kill(place: Workplace, template: Path, rng: random.Random, kept: list[int]) -> bool:
    out = place.new_path("features.duckdb")
    out.parent.mkdir()
    shutil.copy(template, out)
    trace, first = out.with_name("trace"), 0
    for _ in range(3):
        trace.touch()
        labeller = place.start(label_in_turn, db=str(out), trace=str(trace), first=first)
        if rng.random() < _AT_WORK:
            _await_more(trace)
        time.sleep(rng.random() * _LONGEST_S)
        if not labeller.kill().was_killed:
            raise Broken("the one who labels ended by himself")
        told = [int(line) for line in trace.read_text().splitlines()]
        first = max(told, default=-1) + 1
        _require_kept(out, first)
    kept.append(first)
    return True


def _await_more(trace: Path) -> None:
    size, deadline = trace.stat().st_size, time.monotonic() + TIMEOUT_S
    while trace.stat().st_size == size and time.monotonic() < deadline:
        time.sleep(0.005)


def _require_kept(out: Path, n: int) -> None:
    """Raises: Lost unless the labels 0 to n - 1 are kept; one more may be, which was not told."""
    try:
        with FeatureDB.open(out, read_only=False) as db:  # a writer replays what was logged
            found = dict(db.sql("SELECT feature_id, label FROM features").fetchall())
    except FeatureDBError as error:
        raise Lost(f"the database doesn't open: {error}") from error
    for number in range(max(0, n - D_SAE), n):
        wanted = {f"label {number}", f"label {n}" if number % D_SAE == n % D_SAE else ""}
        if found[number % D_SAE] not in wanted:
            raise Lost(f"label {number} was told as kept, and {found[number % D_SAE]!r} is there")
