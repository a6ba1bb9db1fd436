"""A small file system fills up, before a harvest or during it.

The error is DiskFull in one line, what was committed verifies, and once there is space again the
harvest goes on to the uninterrupted cache.
"""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from activation_cache import HarvestProgress, LanguageModel

from .outcome import Outcome, Trial, tally
from .processes import Result
from .workplace import LONG, SHARD_ROWS, Workplace, records, require_done, require_told
from .writer import harvest_texts


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: levels of free space, half of them before the harvest begins."""
    fault = "a full disk (tmpfs)"
    with _tmpfs(place.new_path("disk"), 1 << 20) as why_not:
        if why_not:
            return Outcome(fault, 0, 0, 0, f"not possible here: {why_not}")
    trials = [
        Trial(f"level {i}", lambda i=i: _fill(place, random.Random(f"{seed} {i}"), i % 2 == 1))
        for i in range(n)
    ]
    outcome = tally(fault, trials)
    return outcome._replace(note=f"{n // 2} before a harvest, {n - n // 2} during one")


def harvest_and_fill(
    lm: LanguageModel, *, out: str, options: dict[str, Any], at_row: int, leave_bytes: int
) -> None:
    """Harvest, and take all the disk but `leave_bytes` when `at_row` is reached."""

    def fill(progress: HarvestProgress) -> None:
        if progress.n_tokens >= at_row and not _ballast(Path(out).parent).exists():
            _take_all_but(leave_bytes, Path(out).parent)

    harvest_texts(lm, out=out, options=options, on_progress=fill)


def _fill(place: Workplace, rng: random.Random, is_before: bool) -> bool:
    """Both in a file system of their own, with room for twice the cache."""
    whole = place.whole(LONG)
    disk = place.new_path("disk")
    with _tmpfs(disk, 2 * whole.n_bytes):
        out = disk / "acts"
        if is_before:
            _take_all_but(rng.randrange(whole.n_bytes), disk)
            result = place.harvest(out, LONG)
        else:
            result = _fill_meanwhile(place, out, rng)
        require_told(result, "DiskFull", out)
        place.require_committed(out, LONG, records(out))
        _ballast(disk).unlink()
        require_done(place.harvest(out, LONG))
        place.require_whole(out, LONG)
    return True


def _fill_meanwhile(place: Workplace, out: Path, rng: random.Random) -> Result:
    whole = place.whole(LONG)
    shard = rng.randrange(whole.n_shards - 3)
    return place.start(
        harvest_and_fill,
        out=str(out),
        options=LONG.options,
        at_row=shard * SHARD_ROWS + rng.randrange(1, SHARD_ROWS),
        leave_bytes=rng.randrange(2 * whole.n_bytes // whole.n_shards),
    ).wait()


def _ballast(disk: Path) -> Path:
    return disk / "ballast"


def _take_all_but(leave_bytes: int, disk: Path) -> None:
    """Fill the file system until only `leave_bytes` are free."""
    with _ballast(disk).open("wb", buffering=0) as file:
        stat = os.statvfs(disk)
        n_bytes = stat.f_bavail * stat.f_frsize - leave_bytes
        if n_bytes > 0:
            os.posix_fallocate(file.fileno(), 0, n_bytes)


@contextmanager
def _tmpfs(folder: Path, n_bytes: int) -> Iterator[str | None]:
    """A file system of its own at `folder`. Yields: why there is none, if there is none."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        yield str(error)
        return
    if done.returncode:
        yield done.stderr.strip().splitlines()[0]
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
