"""A system call of a run in training fails: EIO or ENOSPC.

Afterwards the run goes on from the checkpoint that it had or from a newer one; the error is sae's,
in one line that names a path of the run; going on ends with the undisturbed run. It is done to a
run from an empty folder, and to one that goes on.
"""

import errno
import random
from pathlib import Path

from .failing_calls import KILL, shown
from .outcome import Broken, Outcome, Trial, tally
from .runs import Runs, acknowledged, trace_of
from .trainer import TrainJob
from .workplace import Workplace, require_done, require_told

JOB = TrainJob(("batch_topk",), n_steps=12, checkpoint_every=3)
_ERRORS = (errno.EIO, errno.ENOSPC)


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: calls of each of the two runs that fail, chosen at random; each in two ways."""
    runs, rng, trials, counts = Runs(place), random.Random(seed), list[Trial](), list[int]()
    begun = _interrupted(runs)
    for start, word in ((None, "call"), (begun, "call of a continued run,")):
        n_calls = runs.n_calls(begun, JOB) if start else len(runs.whole(JOB).calls)
        counts.append(n_calls)
        for nth in sorted(rng.sample(range(1, n_calls + 1), min(n, n_calls))):
            for error in _ERRORS:
                trials.append(_trial(runs, start, nth, error, f"{word} {nth} {shown(error)}"))
    outcome = tally("training: the i-th system call fails", trials)
    note = f"of {counts[0]} + {counts[1]} calls, EIO and ENOSPC; {runs.way}"
    return outcome._replace(note=note)


def _trial(runs: Runs, start: Path | None, nth: int, error: int, label: str) -> Trial:
    return Trial(label, lambda: _fail(runs, start, nth, error))


def _fail(runs: Runs, start: Path | None, nth: int, error: int) -> bool:
    out = runs.new_path(start)
    before = acknowledged(out, JOB)
    result = runs.train(out, JOB, nth=nth, error=error)
    calls = trace_of(out).read_text().splitlines()
    try:
        if not result.is_done:
            require_told(result, "SAEError", out)
            runs.require_kept(out, JOB, before)
            require_done(runs.train(out, JOB))
        runs.require_whole(out, JOB)
    except Broken as broken:
        failed = calls[nth - 1].replace(str(out), "runs") if len(calls) >= nth else "none"
        raise type(broken)(f"({failed}) {broken}") from broken
    return len(calls) >= nth


def _interrupted(runs: Runs) -> Path:
    """What is left of a run that was killed in the middle, with a checkpoint and half of one."""
    calls = runs.whole(JOB).calls
    out, middle = runs.new_path(), len(calls) // 2
    nth = next(i for i in range(middle, len(calls)) if "state.safetensors" in calls[i]) + 1
    if not runs.train(out, JOB, nth=nth, error=KILL).was_killed or not acknowledged(out, JOB):
        raise RuntimeError("no interrupted run to go on with")
    return out
