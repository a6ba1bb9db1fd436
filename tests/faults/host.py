"""A warm process that forks a child for every task, so that a campaign imports torch and makes its
model once.

    python -m tests.faults.host HANDLE FOLDER

Started by `processes.Host`. With each byte on the control socket (its handle is HANDLE) comes one
end of a socket pair: the child that is forked for it reads a task from it, answers with its process
id, works, and answers with what came out. The model goes into FOLDER. The host runs on one thread:
a fork copies the thread that calls it and no other.
"""

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from activation_cache import LanguageModel

from . import campaign, failing_calls, writer
from .tiny_model import save_tiny_model

_PRELOADED = campaign.__name__  # every module that a child may need, imported once


def main(control: socket.socket, model: Path) -> None:
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread for progress bars
    save_tiny_model(model)
    writer.texts()
    lm = LanguageModel.load(model, device="cpu")
    lm.capture(["ba do ki"], ["layers.1.resid_post"])  # whatever is made on first use
    assert lm.is_causal
    assert lm.revision
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system reaps the children
    control.sendall(json.dumps({"way": failing_calls.way(), "pid": os.getpid()}).encode() + b"\n")
    for connection in _connections(control):
        _require_one_thread()
        if os.fork() == 0:
            control.close()
            _work(connection, lm)
        connection.close()


def _connections(control: socket.socket) -> Iterator[socket.socket]:
    """A socket for every task, until the campaign closes its end."""
    while True:
        data, handles, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        yield socket.socket(fileno=handles[0])


def _work(connection: socket.socket, lm: LanguageModel) -> None:
    """The whole life of a child."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with suppress(OSError), connection.makefile("rw") as stream:  # the campaign may be gone
            task = json.loads(stream.readline())
            print(json.dumps({"pid": os.getpid()}), file=stream, flush=True)
            print(json.dumps(_result(task, lm)), file=stream, flush=True)
    finally:
        os._exit(0)


def _result(task: dict[str, Any], lm: LanguageModel) -> dict[str, Any]:
    module, name = task["function"]
    try:
        function = getattr(importlib.import_module(module), name)
        time.sleep(max(task["start_at"] - time.monotonic(), 0))
        return {"value": function(lm, **task["arguments"])}
    except Exception as error:  # noqa: BLE001  (whatever it is, the campaign judges it)
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"kinds": kinds, "message": str(error), "traceback": traceback.format_exc()}


def _require_one_thread() -> None:
    tasks = Path("/proc/self/task").glob("*/comm")
    others = [file.read_text().strip() for file in tasks if file.parent.name != str(os.getpid())]
    if others := [name for name in others if "jemalloc" not in name]:  # pyarrow's: it minds forks
        raise RuntimeError(f"the host has another thread, {others}: its children could hang")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
