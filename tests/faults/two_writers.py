"""Two processes begin to write one folder at the same moment.

One goes on to the uninterrupted cache, the other is told who holds it. A writer that is killed
leaves no lock behind: of the next two, one goes on at once, and the other names the living one.
"""

import random
import time
from pathlib import Path

from .outcome import Broken, Outcome, Trial, tally
from .races import race
from .workplace import LONG, Workplace, records, require_done, require_told


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: races; before every second one, a writer is killed in the same folder."""
    trials = [
        Trial(f"race {i}", lambda i=i: _race(place, random.Random(f"{seed} {i}"), i % 2 == 1))
        for i in range(n)
    ]
    outcome = tally("two writers", trials, lanes=1)
    return outcome._replace(note=f"{n // 2} of the folders had the lock of a killed writer")


def _race(place: Workplace, rng: random.Random, is_stale: bool) -> bool:
    out = _killed_in(place, rng) if is_stale else place.new_path()
    acknowledged = records(out)
    ended = race(rng, lambda start_at: place.start_harvest(out, LONG, start_at=start_at))
    if ended is None:
        return False
    require_told(ended.loser, "CacheBusy", out)
    if f"process {ended.winner_pid} " not in ended.loser.message:
        raise Broken(f"the loser does not name process {ended.winner_pid}: {ended.loser.message}")
    place.require_committed(out, LONG, acknowledged)
    require_done(place.harvest(out, LONG))
    place.require_whole(out, LONG)
    return True


def _killed_in(place: Workplace, rng: random.Random) -> Path:
    """A folder in which a writer was killed while it held the lock."""
    for _ in range(20):
        out = place.new_path()
        writer = place.start_harvest(out, LONG)
        deadline = time.monotonic() + 30
        while not (out / "manifest.json").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * place.whole(LONG).seconds * 0.3)
        if writer.kill().was_killed:
            return out
    raise Broken("no kill came in time")
