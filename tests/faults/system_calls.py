"""Every i-th system call of a writer fails, or the writer is killed right before it.

Afterwards there is the old state or the new one, never a mix; the error is one of the cache's, in
one line that names a path in it; going on ends with the uninterrupted cache. It is done to a
harvest from an empty folder, and to one that goes on from what a killed writer left.
"""

import errno
import random
import shutil
from pathlib import Path

from .failing_calls import KILL, FailingCall, shown
from .outcome import Broken, Outcome, Trial, tally
from .workplace import SHORT, Workplace, names, records, require_done, require_told

_ERRORS = (errno.EIO, errno.ENOSPC, KILL)


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: calls of each of the two harvests that fail, chosen at random if there are more; each in
    three ways."""
    rng = random.Random(seed)
    begun = _interrupted(place)
    trials = list[Trial]()
    counts = list[int]()
    for start, word in ((None, "call"), (begun, "call of a continued harvest,")):
        n_calls = len(_calls_from(place, start))
        counts.append(n_calls)
        for nth in sorted(rng.sample(range(1, n_calls + 1), min(n, n_calls))):
            for error in _ERRORS:
                trials.append(_trial(place, start, nth, error, f"{word} {nth} {shown(error)}"))
    outcome = tally("the i-th system call fails", trials)
    return outcome._replace(
        note=f"of {counts[0]} + {counts[1]} calls, EIO, ENOSPC and SIGKILL; {place.way}"
    )


def _trial(place: Workplace, start: Path | None, nth: int, error: int, label: str) -> Trial:
    return Trial(label, lambda: _fail(place, start, nth, error))


def _fail(place: Workplace, start: Path | None, nth: int, error: int) -> bool:
    out = _folder(place, start)
    before = records(out)
    trace = out.parent / "trace"
    call = FailingCall(str(out), nth, error, str(trace))
    result = place.harvest(out, SHORT, fail=(call, place.way))
    calls = trace.read_text().splitlines()
    try:
        if len(calls) >= nth:
            place.require_committed(out, SHORT, before | committed(calls[: nth - 1], out))
        if result.is_done:  # a call that may fail, or one that did not come this time
            place.require_whole(out, SHORT)
        elif error == KILL and not result.was_killed:
            raise Broken(f"the process was not killed: {result.message}")
        elif error != KILL:
            require_told(result, "CacheError", out)
        require_done(place.harvest(out, SHORT))
        place.require_whole(out, SHORT)
    except Broken as broken:
        failed = calls[nth - 1].replace(str(out), "acts") if len(calls) >= nth else "none"
        raise type(broken)(f"({failed}) {broken}") from broken
    return len(calls) >= nth


def committed(calls: list[str], out: Path) -> set[str]:
    """The records that these calls have put in their place and made durable. A call is traced
    before it is made: what follows it in the same thread says that it is done."""
    is_durable, found = False, set[str]()
    for call in reversed(calls):
        name, _, path = call.partition(" ")
        is_durable |= name == "fsync" and path == f"{out}/shards"
        if is_durable and name == "rename" and path.startswith(f"{out}/shards/"):
            found.add(str(Path(path).relative_to(out)))
    return {name for name in found if name.endswith(".json")}


def _interrupted(place: Workplace) -> Path:
    """What a writer leaves that is killed after its first shard and before its last."""
    whole = place.whole(SHORT)
    for share in (0.55, 0.5, 0.6, 0.45, 0.65):
        out = place.new_path()
        middle = int(len(whole.calls) * share)
        call = FailingCall(str(out), middle, KILL, f"{out.parent}.trace")
        place.harvest(out, SHORT, fail=(call, place.way))
        if 0 < len(records(out)) < whole.n_shards and names(out) - whole.names:
            return out
    raise RuntimeError("no interrupted harvest to go on with")


def _calls_from(place: Workplace, start: Path | None) -> list[str]:
    """The calls that a harvest makes, from an empty folder or from `start` on."""
    if not start:
        return place.whole(SHORT).calls
    out = _folder(place, start)
    trace = out.parent / "trace"
    call = FailingCall(str(out), 0, 0, str(trace))
    require_done(place.harvest(out, SHORT, fail=(call, place.way)))
    return trace.read_text().splitlines()


def _folder(place: Workplace, start: Path | None) -> Path:
    """A new folder for a harvest, empty or with what was begun."""
    out = place.new_path()
    out.parent.mkdir()
    if start:
        shutil.copytree(start, out)
    return out
