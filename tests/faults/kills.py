"""A writer is killed at a random moment, up to three times in a row, and gone on from.

What was committed before each kill is still there and right; the end is the uninterrupted cache.
"""

import random
import time

from .outcome import Broken, Outcome, Trial, tally
from .workplace import LONG, Workplace, names, records, require_done

_N_IN_A_ROW = (1, 1, 1, 2, 3)


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: harvests, each killed at least once."""
    half_made = list[bool]()
    trials = [
        Trial(f"harvest {i}", lambda i=i: _kill(place, random.Random(f"{seed} {i}"), half_made))
        for i in range(n)
    ]
    outcome = tally("kill -9 at a random moment", trials)
    note = f"{len(half_made)} kills, {sum(half_made)} with half-made files on disk"
    return outcome._replace(note=note)


def _kill(place: Workplace, rng: random.Random, half_made: list[bool]) -> bool:
    """half_made: gets one entry a kill, whether it left files that no uninterrupted cache has."""
    n_left = rng.choice(_N_IN_A_ROW)
    out, was_killed = place.new_path(), False
    whole = place.whole(LONG)
    for _ in range(20):  # some come too late: the harvest has ended
        if not n_left:
            break
        writer = place.start_harvest(out, LONG)
        share_left = 1 - len(records(out)) / whole.n_shards
        time.sleep(rng.random() * whole.seconds * share_left)
        acknowledged = records(out)
        result = writer.kill()
        if not result.was_killed:
            require_done(result)
        else:
            n_left, was_killed = n_left - 1, True
            half_made.append(bool(names(out) - whole.names))
        place.require_committed(out, LONG, acknowledged)
    if not was_killed:
        raise Broken("no kill came in time")
    require_done(place.harvest(out, LONG))
    place.require_whole(out, LONG)
    return True
