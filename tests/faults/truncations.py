"""A file of a finished cache loses its end: verifying and reading find it and name the file."""

import random

from .damage import Damaged
from .outcome import Outcome, Trial, tally
from .workplace import Workplace


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: truncations, spread over the kinds of files; some take a few bytes only, some all."""
    cache, rng = Damaged(place), random.Random(seed)
    trials = []
    for _ in range(n):
        file = cache.choose(rng)
        size = file.stat().st_size
        kept = rng.choice([0, rng.randrange(size), rng.randrange(size), size - rng.randint(1, 9)])
        data = file.read_bytes()[:kept]
        label = f"{file.name} cut to {kept} of {size} bytes"
        trials.append(Trial(label, lambda f=file, d=data: cache.check(f, d)))
    outcome = tally("a truncated file", trials, lanes=1)
    return outcome._replace(note=cache.note(n))
