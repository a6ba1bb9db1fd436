"""Two processes begin to train into one folder at the same moment.

One goes on to the undisturbed run, the other is told that the folder is in use. A trainer that is
killed leaves no lock behind.
"""

import random

from .failing_calls import KILL
from .outcome import Broken, Outcome, Trial, tally
from .races import race
from .runs import Runs
from .trainer import TrainJob
from .workplace import Workplace, require_done, require_told

JOB = TrainJob(("topk",))


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: races; before every second one, a trainer is killed in the same folder."""
    runs = Runs(place)
    trials = [
        Trial(f"race {i}", lambda i=i: _race(runs, random.Random(f"{seed} {i}"), i % 2 == 1))
        for i in range(n)
    ]
    outcome = tally("training: two processes, one folder", trials, lanes=1)
    return outcome._replace(note=f"{n // 2} of the folders had the lock of a killed trainer")


def _race(runs: Runs, rng: random.Random, is_stale: bool) -> bool:
    out, whole = runs.new_path(), runs.whole(JOB)
    if is_stale:
        nth = rng.randint(6, len(whole.calls) // 2)  # the lock is taken
        if not runs.train(out, JOB, nth=nth, error=KILL).was_killed:
            raise Broken("the kill did not come")
    ended = race(rng, lambda start_at: runs.start(out, JOB, start_at=start_at))
    if ended is None:
        return False
    require_told(ended.loser, "RunInUseError", out)
    require_done(ended.winner)
    runs.require_whole(out, JOB)
    return True
