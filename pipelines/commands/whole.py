"""Verbs about whole runs: run, plan, doctor, demo."""

from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from ..cli import app, console
from ..config import PipelineConfig, read_config
from ..console_tables import checks_table
from ..demo import demo_config, show_demo
from ..doctor import State, examine
from ..errors import PipelineError
from ..plan import make_plan
from ..ranks import require_one_process
from ..stages import run_pipeline
from ..trackers import require_wandb
from .arguments import Local

ConfigFile = Annotated[Path, Parameter(help="YAML file; `saebase run --help` tells what is in it.")]
Out = Annotated[Local | None, Parameter(help="Folder to write to, instead of the file's `out`.")]


@app.command(name="run")
def run_command(
    config: ConfigFile,
    *,
    out: Out = None,
    wandb_project: Annotated[
        str | None, Parameter(help="Also log to this Weights & Biases project.")
    ] = None,
) -> None:
    """Run all stages of a configuration, skipping what is already made.

    The file has the keys `model`, `dataset`, `hookpoints`, `out`, if need be `acts`, `wiring` and
    `sweep`, and the sections `harvest`, `sae`, `train`, `evaluate` and `index`, which take the
    flags of those verbs.
    """
    require_one_process("run")
    settings = read_config(config, out=out)
    if wandb_project is not None:
        require_wandb()
    print_plan(settings)
    run_pipeline(settings, console, wandb_project)
    sql = "SELECT feature_id, label, density FROM features ORDER BY density DESC LIMIT 10"
    db = quote(str(settings.database))
    console.print(f'[dim]next:[/] saebase query "{sql}" --db {db}', highlight=False, soft_wrap=True)


@app.command
def plan(config: ConfigFile, *, out: Out = None) -> None:
    """Say what a configuration will take: tokens, disk, memory and time. Nothing is started."""
    print_plan(read_config(config, out=out))


@app.command
def doctor(
    *, folder: Annotated[Path, Parameter(help="Where artifacts would go.")] = Path()
) -> None:
    """Check this machine and environment."""
    checks = examine(folder)
    console.print(checks_table(checks))
    problems = [check for check in checks if check.state is State.PROBLEM]
    if problems:
        names = ", ".join(check.what for check in problems)
        raise PipelineError(f"doctor found {len(problems)} to mend: {names}")


@app.command
def demo(
    *,
    out: Annotated[Path, Parameter(help="Folder to write to, or to go on in.")] = Path("demo"),
) -> None:
    """Do it all on a small real model and a slice of Wikipedia, in about ten minutes."""
    require_one_process("demo")
    config = demo_config(out)
    print_plan(config)
    seconds = run_pipeline(config, console)
    show_demo(config, seconds, console)


def print_plan(config: PipelineConfig) -> None:
    """The plan as a table. Raises: PipelineError for what can't fit on the disk."""
    with console.status("planning"):
        estimate = make_plan(config)
    console.print(estimate.table())
    for warning in estimate.warnings():
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    console.print()
