"""One bit of a finished cache is flipped: verifying and reading find it and name the file."""

import random

from .damage import Damaged
from .outcome import Outcome, Trial, tally
from .workplace import Workplace


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: flips, spread over the kinds of files."""
    cache, rng = Damaged(place), random.Random(seed)
    trials = []
    for _ in range(n):
        file = cache.choose(rng)
        bit = rng.randrange(8 * file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        label = f"bit {bit} of {file.name}"
        trials.append(Trial(label, lambda f=file, d=bytes(data): cache.check(f, d)))
    outcome = tally("a flipped bit", trials, lanes=1)
    return outcome._replace(note=cache.note(n))
