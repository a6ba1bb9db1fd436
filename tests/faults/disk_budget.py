"""A stream with a disk budget under a slow consumer, killed at random moments.

The shards never take more than the budget; nothing that a durable checkpoint may need again is
gone for good: gone on from its last checkpoint, the reader gets the batches of an unkilled one.
"""

import contextlib
import hashlib
import json
import random
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

from activation_cache import ActivationStream, LanguageModel

from . import writer
from .outcome import Broken, Lost, Outcome, Trial, tally
from .workplace import Workplace, require_done

HOOKPOINT = "layers.1.resid_post"
SHARD_BYTES, BUDGET = 64_000, 400_000
BATCH, N_BATCHES = 200, 60
OPTIONS = {"ctx_len": 16, "batch_blocks": 4, "storage_dtype": "float32", "shard_bytes": SHARD_BYTES}
CHECKPOINT = "checkpoint.json"


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: streams, each killed one to three times."""
    most: list[int] = []
    whole = _whole(place)
    trials = [
        Trial(f"stream {i}", lambda i=i: _kill(place, whole, random.Random(f"{seed} {i}"), most))
        for i in range(n)
    ]
    outcome = tally("disk budget, slow consumer, kill -9", trials)
    return outcome._replace(note=f"at most {max(most, default=0):,} of {BUDGET:,} bytes")


def read_stream(lm: LanguageModel, *, folder: str, slow_s: float) -> list[str]:
    """Read all batches, going on from the checkpoint. Returns: a hash of each, from the first."""
    checkpoint = Path(folder) / CHECKPOINT
    hashes: list[str] = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    options: dict[str, Any] = {"folder": Path(folder) / "stream", "max_disk_bytes": BUDGET}
    with ActivationStream.open(
        lm, writer.texts(), hookpoints=HOOKPOINT, **options, **OPTIONS
    ) as stream:
        batches = stream.batches(HOOKPOINT, BATCH, seed=1, start_batch=len(hashes))
        for x in islice(batches, N_BATCHES - len(hashes)):
            hashes.append(hashlib.sha256(x.numpy().tobytes()).hexdigest())
            time.sleep(slow_s)
            n_rows = len(hashes) * BATCH
            if len(hashes) % 7 == 0 or stream.wants_checkpoint(n_rows, [HOOKPOINT]):
                aside = checkpoint.with_suffix(".new")
                aside.write_text(json.dumps(hashes))
                aside.replace(checkpoint)
                stream.release(n_rows, [HOOKPOINT])
    return hashes


def _whole(place: Workplace) -> list[str]:
    out = place.new_path("stream")
    out.mkdir(parents=True)
    result = place.start(read_stream, folder=str(out), slow_s=0.0).wait()
    require_done(result)
    return list(result.value)


def _kill(place: Workplace, whole: list[str], rng: random.Random, most: list[int]) -> bool:
    out, is_over, sizes = place.new_path("stream"), threading.Event(), [0]
    out.mkdir(parents=True)
    watcher = threading.Thread(target=_watch, args=(out, is_over, sizes))
    watcher.start()
    try:
        for _ in range(rng.choice((1, 2, 3))):
            reader = place.start(read_stream, folder=str(out), slow_s=0.005)
            time.sleep(rng.random() * 1.5)
            reader.kill()
        result = place.start(read_stream, folder=str(out), slow_s=0.005).wait()
    finally:
        is_over.set()
        watcher.join()
    require_done(result)
    if list(result.value) != whole:
        first = next(i for i, (a, b) in enumerate(zip(result.value, whole, strict=False)) if a != b)
        raise Lost(f"batch {first} of the continued stream differs from the unkilled one's")
    most.append(max(sizes))
    if max(sizes) > BUDGET:
        raise Broken(f"shards took {max(sizes):,} bytes, the budget is {BUDGET:,}")
    return True


def _watch(out: Path, is_over: threading.Event, sizes: list[int]) -> None:
    """Note what shards take, at moments when no file came or went while they were counted."""
    before: dict[str, int] = {}
    while not is_over.is_set():
        now = _sizes(out / "stream" / "shards")
        if now.keys() == before.keys():
            sizes.append(sum(before.values()))
        before = now
        time.sleep(0.001)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each shard's file, finished or not."""
    found = {}
    for file in folder.glob("*.safetensors*"):
        with contextlib.suppress(FileNotFoundError):
            found[file.name] = file.stat().st_size
    return found
