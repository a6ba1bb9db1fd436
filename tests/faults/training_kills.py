"""Training is killed at random moments, up to four times in a row, and gone on with.

Moments are chosen by the clock, and by system calls: while a run begins or goes on, anywhere, and
while the SAE is saved at the end. The end is the run that was never killed, bit for bit.
"""

import random
import time
from collections import Counter
from pathlib import Path

from sae.run_folder import CHECKPOINTS_FOLDER
from sae.storage import CONFIG_FILE, WEIGHTS_FILE

from .failing_calls import KILL
from .outcome import Broken, Outcome, Trial, tally
from .processes import Result
from .runs import Runs, acknowledged, newest_step
from .trainer import ARCHITECTURES, TrainJob
from .workplace import Workplace, names, require_done

JOBS = (
    *(TrainJob((architecture,)) for architecture in ARCHITECTURES),
    TrainJob(("batch_topk", "jumprelu")),
    TrainJob(("topk",), is_streamed=True),
    TrainJob(("matryoshka",), keep=1),
)
_N_IN_A_ROW = (1, 1, 2, 4)
_LAST_CALLS = 16  # those that save the SAE, and some before


def run(place: Workplace, n: int, seed: int) -> Outcome:
    """n: kills, spread over runs of every architecture, over two side by side and over a stream."""
    runs, trials, where = Runs(place), list[Trial](), Counter[str]()
    n_left, rng = n, random.Random(seed)
    while n_left:
        job, n_kills = JOBS[len(trials) % len(JOBS)], min(rng.choice(_N_IN_A_ROW), n_left)
        trials.append(_trial(runs, job, n_kills, f"{seed} {len(trials)}", where))
        n_left -= n_kills
    outcome = tally("training: kill -9 at a random moment", trials)
    found = ", ".join(f"{count} {what}" for what, count in sorted(where.items()))
    note = f"{where.total()} kills of {len(trials)} runs: {found}"
    return outcome._replace(note=note)


def _trial(runs: Runs, job: TrainJob, n_kills: int, seed: str, where: Counter[str]) -> Trial:
    label = f"{job.label}, {n_kills} kills, seed {seed}"
    return Trial(label, lambda: _kill(runs, job, n_kills, random.Random(seed), where))


def _kill(runs: Runs, job: TrainJob, n_kills: int, rng: random.Random, where: Counter[str]) -> bool:
    """where: gets what each kill interrupted."""
    out = runs.new_path()
    for _ in range(10 * n_kills):  # some come too late: the run is over
        if not n_kills:
            break
        before = acknowledged(out, job)
        result = _killed_run(runs, out, job, rng)
        if result.was_killed:
            n_kills -= 1
            where[interrupted(out, job)] += 1
            runs.require_kept(out, job, before)
        else:
            require_done(result)
            runs.require_whole(out, job)
            out = runs.new_path()
    if n_kills:
        raise Broken("no kill came in time")
    require_done(runs.train(out, job))
    runs.require_whole(out, job)
    require_done(finished := runs.train(out, job))  # nothing is left to do
    if finished.value:
        raise Broken("a finished run went on")
    runs.require_whole(out, job)
    return True


def _killed_run(runs: Runs, out: Path, job: TrainJob, rng: random.Random) -> Result:
    """Go on, and be killed at a moment of one of four kinds; if the run isn't over before."""
    whole = runs.whole(job)
    left = 1 - min(newest_step(out / name) for name in job.architectures) / job.n_steps
    n_calls = max(int(len(whole.calls) * left), _LAST_CALLS)
    match rng.choice(("clock", "clock", "any call", "first calls", "last calls")):
        case "clock":
            trainer = runs.start(out, job)
            time.sleep(rng.random() * whole.seconds * left)
            return trainer.kill()
        case "any call":
            nth = rng.randint(1, n_calls)
        case "first calls":
            nth = rng.randint(1, 20)
        case _:
            nth = rng.randint(n_calls - _LAST_CALLS, n_calls) + 1
    return runs.train(out, job, nth=nth, error=KILL)


def interrupted(out: Path, job: TrainJob) -> str:
    """What a kill came into, as far as the files tell."""
    found = {name.partition("/")[2] for name in names(out)} if out.exists() else set[str]()
    checkpoints = [len(list((out / a / CHECKPOINTS_FOLDER).glob("*"))) for a in job.architectures]
    if {f".{WEIGHTS_FILE}.tmp", f".{CONFIG_FILE}.tmp", WEIGHTS_FILE} & found:
        return "in saving the SAE"
    if any("/.step-" in f"/{name}" for name in found) or max(checkpoints) > job.keep:
        return "in a checkpoint"
    if ".metrics.jsonl.tmp" in found:
        return "in the metrics"
    return "in steps or between" if any(checkpoints) else "before the first checkpoint"
