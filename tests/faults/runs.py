"""What training promises: runs as they are without any fault, and what may differ from them."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from sae.atomic_files import held
from sae.checkpoints import PREFIX, STATE_FILE, Checkpoint, load_newest_checkpoint
from sae.errors import CheckpointError
from sae.run_folder import CHECKPOINTS_FOLDER, LOCK_FILE, METRICS_FILE
from sae.storage import CONFIG_FILE, WEIGHTS_FILE

from . import failing_calls
from .outcome import Broken, Lost
from .processes import Process, Result
from .trainer import TrainJob, train_job
from .workplace import LONG, Workplace, names, require_done

_TIMES = ("tokens_per_s", "elapsed_s")
_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, LOCK_FILE})


class WholeRuns(NamedTuple):
    """What a job leaves that was never disturbed. seconds: that it takes. calls: system calls on
    its folders."""

    path: Path
    seconds: float
    calls: list[str]


class Runs:
    """Where jobs are trained, in processes of their own, from one cache."""

    def __init__(self, place: Workplace):
        self._place, self._making = place, threading.Lock()
        self._cache = str(place.whole(LONG).path)
        self._wholes: dict[TrainJob, WholeRuns] = {}

    @property
    def way(self) -> str:
        """How system calls are made to fail here."""
        return self._place.way

    def new_path(self, start: Path | None = None) -> Path:
        """A folder for a job's runs that isn't there yet, or a copy of `start`."""
        out = self._place.new_path("runs")
        out.parent.mkdir()
        return Path(shutil.copytree(start, out)) if start else out

    def whole(self, job: TrainJob) -> WholeRuns:
        """What `job` makes without any fault; trained when it is first asked for."""
        with self._making:
            if job not in self._wholes:
                self._wholes[job] = self._make_whole(job)
            return self._wholes[job]

    def start(
        self, out: Path, job: TrainJob, *, nth: int = 0, error: int = 0, **options: Any
    ) -> Process:
        """Train into `out`; the `nth` system call on it fails with `error` (see FailingCall)."""
        trace = str(trace_of(out))
        fail = (failing_calls.FailingCall(str(out), nth, error, trace), self.way) if nth else None
        arguments = {"out": str(out), "job": list(job), "cache": self._cache, "fail": fail}
        return self._place.start(train_job, **arguments, **options)

    def train(self, out: Path, job: TrainJob, **options: Any) -> Result:
        return self.start(out, job, **options).wait()

    def n_calls(self, start: Path, job: TrainJob) -> int:
        """System calls that going on from what lies in `start` takes."""
        out = self.new_path(start)
        require_done(self.train(out, job, nth=10**9, error=0))
        return len(trace_of(out).read_text().splitlines())

    def _make_whole(self, job: TrainJob) -> WholeRuns:
        counted, out = self.new_path(), self.new_path()
        require_done(self.train(counted, job, nth=10**9, error=0))
        start = time.perf_counter()  # the second one is warm
        require_done(self.train(out, job))
        seconds = time.perf_counter() - start
        return WholeRuns(out, seconds, trace_of(counted).read_text().splitlines())

    # -- promises --------------------------------------------------------------------------------

    def require_whole(self, out: Path, job: TrainJob) -> None:
        """Raises: Lost if a run isn't the undisturbed one, Broken for stray files."""
        for name in job.architectures:
            _require_same(out / name, self.whole(job).path / name, job)

    def require_kept(self, out: Path, job: TrainJob, acknowledged: dict[str, int]) -> None:
        """Raises: Lost if a checkpoint of a step in `acknowledged`, or a later one, is gone."""
        for name, step in acknowledged.items():
            if (out / name / CONFIG_FILE).exists():
                continue
            found = newest_checkpoint(out / name)
            if found is None or step_of(found) < step:
                raise Lost(f"{name} had a checkpoint of step {step}, and goes on from {found}")


def trace_of(out: Path) -> Path:
    """Where the system calls on a folder are written down."""
    return out.with_name("trace")


def acknowledged(out: Path, job: TrainJob) -> dict[str, int]:
    """The step of each run's newest checkpoint."""
    return {name: step for name in job.architectures if (step := newest_step(out / name))}


def newest_step(run: Path) -> int:
    """The step of the checkpoint in a run's folder that has the newest name; 0 without any."""
    return max((_step(path) for path in _checkpoints(run)), default=0)


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """What a run would go on from. Raises: Lost if it can't."""
    try:
        return load_newest_checkpoint(run / CHECKPOINTS_FOLDER)
    except CheckpointError as error:
        raise Lost(f"no checkpoint can be used: {error}") from error


def step_of(checkpoint: Checkpoint) -> int:
    return int(checkpoint.values["counters"]["step"])


def lines(run: Path) -> list[dict[str, Any]]:
    """Metrics of a run, without the clock."""
    found = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [{name: each for name, each in line.items() if name not in _TIMES} for line in found]


def _require_same(run: Path, whole: Path, job: TrainJob) -> None:
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (run / name).exists():
            raise Lost(f"the run is over, and {name} is missing")
        if (run / name).read_bytes() != (whole / name).read_bytes():
            raise Lost(f"{name} differs from the undisturbed run's")
    if lines(run) != lines(whole):
        steps = [line["step"] for line in lines(run)]
        raise Lost(f"{METRICS_FILE} differs from the undisturbed run's; it has steps {steps}")
    _require_tidy(run, job)
    last = f"{CHECKPOINTS_FOLDER}/{PREFIX}{job.n_steps:06d}/{STATE_FILE}"
    if (run / last).read_bytes() != (whole / last).read_bytes():
        raise Lost("the last checkpoint differs from the undisturbed run's")


def _require_tidy(run: Path, job: TrainJob) -> None:
    checkpoints = _checkpoints(run)
    theirs = frozenset(
        str((path / name).relative_to(run))
        for path in checkpoints
        for name in (STATE_FILE, "manifest.json")
    )
    if stray := names(run) - theirs - _FILES:
        raise Broken(f"a stray file was left: {sorted(stray)[0]}")
    if stray_folders := set((run / CHECKPOINTS_FOLDER).iterdir()) - set(checkpoints):
        raise Broken(f"a stray folder was left: {sorted(stray_folders)[0]}")
    if not 1 <= len(checkpoints) <= job.keep:
        raise Broken(f"{len(checkpoints)} checkpoints were kept, and {job.keep} asked for")
    with held(run / LOCK_FILE) as is_free:
        if not is_free:
            raise Broken("the lock is still held")


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / CHECKPOINTS_FOLDER).glob(f"{PREFIX}*"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))
