"""A reader opens, verifies and reads a cache again and again while it is being written.

It always sees a beginning of the uninterrupted cache, which never shrinks, and never an error; nor
does it when the writer is killed and another one goes on, or when shards are committed faster than
a long folder can be listed.
"""

import itertools
import random
import shutil
import time
from pathlib import Path

import torch

from activation_cache import ActivationCache, LanguageModel

from .failing_calls import KILL, FailingCall
from .outcome import Broken, Lost, Outcome, Trial, tally
from .processes import Result
from .workplace import HOOKPOINTS, LONG, MANY, Workplace, require_done

_TIMEOUT_S = 50.0


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: harvests that are read while they last; in every second one the writer is killed once.
    With two or more, twice as many caches of 300 shards are opened while they appear."""
    n_rounds = list[int]()
    trials = [
        Trial(
            f"harvest {i}",
            lambda i=i: _read_during(place, random.Random(f"{seed} {i}"), i % 2 == 1, n_rounds),
        )
        for i in range(n)
    ]
    if n > 1:
        manifest = _manifest_of_many(place)
        trials += [
            Trial(f"many shards {i}", lambda: _read_many(place, manifest)) for i in range(2 * n)
        ]
    outcome = tally("a reader while writing", trials, lanes=1)
    return outcome._replace(note=f"{sum(n_rounds)} times opened")


def read_until_complete(_: LanguageModel, *, folder: str, whole: str | None = None) -> int:
    """From the first shard on, open a cache until it is complete; read it too, if it is to be
    compared with `whole`. Returns: how often.

    Raises: AssertionError for what isn't a beginning of `whole`, and whatever reading raises.
    """
    truth, n_tokens = ActivationCache.open(whole) if whole else None, 0
    deadline = time.monotonic() + _TIMEOUT_S
    while not (Path(folder) / "shards" / "000000.json").exists():
        time.sleep(0.001)
    for n_rounds in itertools.count(1):
        cache = ActivationCache.open(folder)
        assert cache.n_tokens >= n_tokens, f"{n_tokens} rows, then {cache.n_tokens}"
        n_tokens = cache.n_tokens
        if truth:
            cache.verify()
            _compare(cache, truth, HOOKPOINTS[n_rounds % 2])
        if cache.manifest.is_complete:
            return n_rounds
        assert time.monotonic() < deadline, "the cache was never complete"
    raise AssertionError


def _compare(cache: ActivationCache, truth: ActivationCache, hookpoint: str) -> None:
    n_rows = 0
    for found, expected in zip(cache.chunks(hookpoint), truth.chunks(hookpoint), strict=False):
        for field in ("acts", "token_ids", "doc_ids", "positions", "block_offsets"):
            assert torch.equal(getattr(found, field), getattr(expected, field)), field
        n_rows += len(found.acts)
    assert n_rows == cache.n_tokens, f"{n_rows} rows of {cache.n_tokens} were read"
    for some, same in zip(cache.documents(), truth.documents(), strict=False):
        assert some.token_ids == same.token_ids[: len(some.token_ids)], f"document {some.doc_id}"


def _read_during(place: Workplace, rng: random.Random, is_killed: bool, counts: list[int]) -> bool:
    out, whole = place.new_path(), place.whole(LONG)
    reader = place.start(read_until_complete, folder=str(out), whole=str(whole.path))
    writer = place.start_harvest(out, LONG)
    if is_killed:
        time.sleep(whole.seconds * rng.random())
        if not (ended := writer.kill()).was_killed:
            require_done(ended)
        writer = place.start_harvest(out, LONG)
    require_done(writer.wait())
    counts.append(_rounds(reader.wait()))
    place.require_whole(out, LONG)
    return True


def _rounds(result: Result) -> int:
    if "AssertionError" in result.kinds:
        raise Lost(f"the reader saw something else: {result.message}")
    if not result.is_done:
        raise Broken(f"the reader met {result.kinds[:1]}: {result.message}")
    return int(result.value)


def _read_many(place: Workplace, manifest: Path) -> bool:
    whole, out = place.whole(MANY), place.new_path()
    reader = place.start(read_until_complete, folder=str(out))
    committing = {"manifest": str(manifest), "whole": str(whole.path), "out": str(out)}
    require_done(place.start(commit_at_once, **committing).wait())
    _rounds(reader.wait())
    return True


def _manifest_of_many(place: Workplace) -> Path:
    """The manifest of a cache that is being written."""
    begun = place.new_path()
    call = FailingCall(str(begun), 100, KILL, f"{begun.parent}.trace")
    place.harvest(begun, MANY, fail=(call, place.way))
    return begun / "manifest.json"


def commit_at_once(_: LanguageModel, *, manifest: str, whole: str, out: str) -> None:
    """Let the files of a cache appear in the order in which a writer commits them."""
    source, target = Path(whole), Path(out)
    (target / "shards").mkdir(parents=True)
    shutil.copy(manifest, target)
    for record in sorted((source / "shards").glob("*.json")):
        for file in [*sorted(source.glob(f"shards/{record.stem}.*.safetensors")), record]:
            (target / "shards" / file.name).hardlink_to(file)
    shutil.copy(source / "manifest.json", target / "manifest.json.partial")
    (target / "manifest.json.partial").replace(target / "manifest.json")
