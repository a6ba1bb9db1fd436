"""The command `saebase`: one function for each verb, flags made from the configs' fields.

    saebase --help              saebase VERB --help

`--config file.yaml` gives any flag of a verb; flags on the line win. Blocks of caches at URLs are
kept in SAEBASE_BLOCKS, at most SAEBASE_BLOCKS_GB of them. A mistake of the user's is one
line and exit status 2; `--debug` shows where it came from. Interrupted work ends with status 130
and goes on when the same command is called again.
"""

import importlib.metadata
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError
from cyclopts.config import Dict
from rich.console import Console

from activation_cache import configure_block_cache
from sae import ConfigError

from .config import read_yaml, unknown_key
from .errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, USER_ERRORS, PipelineError
from .ranks import SilentExit, is_first_rank
from .sweep import texts_of

console = Console()
error_console = Console(stderr=True)

app = App(
    name="saebase",
    help="Stream a language model's activations to disk, train sparse autoencoders on them, "
    "query every feature with SQL, and steer the model by them.",
    version=lambda: importlib.metadata.version("saebase"),
    console=console,
    error_console=error_console,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
    help_flags=["--help", "-h"],
)
app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(help="YAML file with any flags of the verb.")] = None,
    debug: Annotated[bool, Parameter(negative=(), help="Show tracebacks.")] = False,
) -> None:
    level = logging.WARNING if is_first_rank() else logging.ERROR
    logging.basicConfig(level=logging.DEBUG if debug else level, format="%(message)s")
    if config is not None:
        app.config = Dict(_flags_in(config), source=str(config), use_commands_as_keys=False)
    _configure_blocks(os.environ.get("SAEBASE_BLOCKS"), os.environ.get("SAEBASE_BLOCKS_GB"))
    app(tokens, exit_on_error=False, print_error=False)


def _flags_in(config: Path) -> dict[str, Any]:
    """Flags of a YAML file; a sweep may stand there as `sweep: {k: [16, 32]}`."""
    flags = read_yaml(config)
    if isinstance(flags.get("sweep"), dict):
        flags["sweep"] = texts_of(flags["sweep"])
    return flags


def _configure_blocks(folder: str | None, gigabytes: str | None) -> None:
    """Where blocks of remote caches are kept, from the environment."""
    try:
        max_bytes = int(float(gigabytes) * 1e9) if gigabytes else None
    except ValueError as error:
        raise PipelineError(f"SAEBASE_BLOCKS_GB={gigabytes}: expected a number") from error
    configure_block_cache(folder, max_bytes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process: 0, 2 (a user's mistake) or 130 (interrupted)."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: Sequence[str]) -> int:
    """Run one command. Returns: its exit status."""
    _load_commands()
    signal.signal(signal.SIGTERM, _interrupt)
    tokens = list(arguments) or ["--help"]
    try:
        app.meta(tokens, exit_on_error=False, print_error=False)
    except (*USER_ERRORS, CycloptsError) as error:
        if "--debug" in tokens:
            error_console.print_exception()
        if is_first_rank() or not isinstance(error, CycloptsError | ConfigError):
            _tell(_message(error))  # a mistake on the line is every process's, and told by one
        return EXIT_USER_ERROR
    except SilentExit:
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if is_first_rank():
            error_console.print("saebase: interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED
    except Exception as error:
        if "No space left on device" not in str(error):
            raise
        _tell(f"disk full: {error}. What was finished is safe: free some space and run it again")
        return EXIT_USER_ERROR
    finally:
        app.config = ()
    return 0


def _load_commands() -> None:
    """Register the verbs. Imported here, because they import `app` from this module."""
    from . import commands  # noqa: F401


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _tell(message: str) -> None:
    """Say one line on stderr."""
    line = f"saebase: {' '.join(message.split())}"
    error_console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)


def _message(error: Exception) -> str:
    """One line for the user, with the nearest known name where a name is unknown."""
    if isinstance(error, UnknownOptionError) and error.token.source not in ("", "cli"):
        key = (error.token.keyword or error.token.value).strip("[]")
        names = [name for argument in error.argument_collection for name in argument.names]
        known = [name.removeprefix("--").replace("-", "_") for name in names]
        return f"{error.token.source}: {unknown_key(key, known)}"
    text = " ".join(str(error).split())
    if "validation error" in text:  # pydantic's, in several lines
        text = text.partition("Value error, ")[2].partition(" [type=")[0] or _flag_error(text)
    config, _, complaint = text.partition(": ")  # `TrainConfig.lr: Input should be ...`
    field = config.partition("Config.")[2]
    return f"--{field.replace('_', '-')}: {complaint}" if field.isidentifier() else text


def _flag_error(text: str) -> str:
    """`1 validation error for X ctx_len Input should be ... [type=..., input_value='-1', ...`"""
    field, _, rest = text.partition(" validation error for ")[2].partition(" ")[2].partition(" ")
    value = rest.partition("input_value=")[2].partition(", input_type")[0]
    return f"--{field.replace('_', '-')} {value}: {rest.partition(' [type=')[0].lower()}"
