"""A file of a run's newest checkpoint, or its SAE, loses its end, or one of its bits is flipped.

The checkpoint is passed over, with a warning that names it, for the one before; it is never used.
Without one before, the error is sae's and names the file. A damaged SAE is refused.
"""

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sae import SAE
from sae.checkpoints import MANIFEST_FILE, PREFIX, STATE_FILE, Checkpoint, load_newest_checkpoint
from sae.errors import CheckpointError, CorruptFileError
from sae.run_folder import CHECKPOINTS_FOLDER
from sae.storage import CONFIG_FILE, WEIGHTS_FILE

from .outcome import Broken, Lost, Outcome, Trial, tally
from .runs import Runs, step_of
from .trainer import TrainJob
from .workplace import Workplace, require_done, require_one_line

JOB = TrainJob(("jumprelu",), n_steps=20)
GONE_ON_WITH = 12  # every so many faults, the run is gone on with as well
_KINDS = (STATE_FILE, MANIFEST_FILE, WEIGHTS_FILE)


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: damaged files, two in three by a bit and the others cut short."""
    damaged, rng, trials = _Damaged(Runs(place)), random.Random(seed), list[Trial]()
    for i in range(n):
        file = damaged.files[_KINDS[i % len(_KINDS)]]
        content = file.read_bytes()
        if rng.random() < 2 / 3:
            bit = rng.randrange(8 * len(content))
            spoilt, label = _flipped(content, bit), f"bit {bit} of {file.name}"
        else:
            n_kept = rng.randrange(len(content))
            spoilt, label = content[:n_kept], f"{file.name} cut to {n_kept} bytes"
        is_gone_on = i % GONE_ON_WITH == 0
        trials.append(Trial(label, lambda f=file, s=spoilt, g=is_gone_on: damaged.check(f, s, g)))
    outcome = tally("training: a damaged checkpoint or SAE", trials, lanes=1)
    harmless = f"; {damaged.n_harmless} took white space only" if damaged.n_harmless else ""
    note = f"{n - damaged.n_harmless} found{harmless}; {damaged.n_gone_on} runs gone on with"
    return outcome._replace(note=note)


class _Damaged:
    """A run that was killed while it saved the SAE: two checkpoints, whose files are damaged one at
    a time; and the SAE, from the run that wasn't."""

    def __init__(self, runs: Runs):
        self._runs = runs
        self._start = runs.new_path(runs.whole(JOB).path)
        self._run = self._start / JOB.architectures[0]
        self._finished = runs.new_path(runs.whole(JOB).path) / JOB.architectures[0]
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (self._run / name).unlink()
        self._folder = self._run / CHECKPOINTS_FOLDER
        self._older, newest = sorted(self._folder.glob(f"{PREFIX}*"))
        self.files = {name: newest / name for name in (STATE_FILE, MANIFEST_FILE)}
        self.files[WEIGHTS_FILE] = self._finished / WEIGHTS_FILE
        self._newest_truth = _loaded(self._folder)
        with _replaced(self.files[STATE_FILE], b""), _warnings():
            self._older_truth = _loaded(self._folder)
        if step_of(self._older_truth) >= step_of(self._newest_truth):
            raise RuntimeError("no older checkpoint to fall back to")
        self.n_harmless, self.n_gone_on = 0, 0

    def check(self, file: Path, spoilt: bytes, is_gone_on: bool) -> bool:
        """Put `spoilt` in the place of `file`, see what comes of it, restore it."""
        with _replaced(file, spoilt):
            if file.name == WEIGHTS_FILE:
                _require_refused(lambda: SAE.load(self._finished), CorruptFileError, file)
            elif self._is_passed_over(file):
                self._require_refused_alone(file)
                if is_gone_on:
                    self._go_on()
        return True

    def _is_passed_over(self, file: Path) -> bool:
        """Raises: Lost if anything else than a whole checkpoint is used."""
        with _warnings() as told:
            found = _loaded(self._folder)
        if _same(found, self._newest_truth) and file.name == MANIFEST_FILE:
            self.n_harmless += 1  # white space: all that was written is there
            return False
        if not _same(found, self._older_truth):
            raise Lost(f"a checkpoint with a damaged {file.name} is used")
        if not any(str(file.parent) in line and "\n" not in line for line in told):
            raise Broken(f"no warning names {file.parent}: {told}")
        return True

    def _require_refused_alone(self, file: Path) -> None:
        aside = self._older.rename(self._folder / ".older")
        try:
            with _warnings():
                _require_refused(lambda: _loaded(self._folder), CheckpointError, file.parent.name)
        finally:
            aside.rename(self._older)

    def _go_on(self) -> None:
        out = self._runs.new_path(self._start)
        require_done(self._runs.train(out, JOB))
        self._runs.require_whole(out, JOB)
        shutil.rmtree(out)
        self.n_gone_on += 1


def _require_refused(load: Callable[[], object], kind: type[Exception], named: str | Path) -> None:
    try:
        load()
    except kind as error:
        require_one_line(str(error), named)
    except Exception as error:
        raise Broken(f"{type(error).__name__} instead of {kind.__name__}: {error}") from error
    else:
        raise Lost(f"a damaged {Path(named).name} is used")


def _loaded(folder: Path) -> Checkpoint:
    found = load_newest_checkpoint(folder)
    assert found is not None
    return found


def _same(a: Checkpoint, b: Checkpoint) -> bool:
    is_equal = a.values == b.values and a.tensors.keys() == b.tensors.keys()
    return is_equal and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@contextmanager
def _replaced(file: Path, content: bytes) -> Iterator[None]:
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What sae.checkpoints warns of meanwhile."""
    told, logger = list[str](), logging.getLogger("sae.checkpoints")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield told
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def _flipped(content: bytes, bit: int) -> bytes:
    data = bytearray(content)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)
