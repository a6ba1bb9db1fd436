"""Work on a thread: in order, bounded, and its errors told soon."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activation_cache import DiskFull, HarvestProgress, LanguageModel, harvest
from activation_cache.background import Background


class _FailedError(Exception):
    pass


def _fail() -> None:
    raise _FailedError


def _writer_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("cache-writer")]


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


def test_tasks_are_done_in_order_and_all_of_them() -> None:
    done: list[int] = []
    with Background(depth=3) as thread:
        for i in range(50):
            thread.do(done.append, i)
    assert done == list(range(50))
    assert not _writer_threads()


def test_nothing_to_do_is_fine() -> None:
    with Background():
        pass
    assert not _writer_threads()


def test_error_is_raised_by_the_next_call_and_nothing_behind_it_is_begun() -> None:
    done: list[int] = []
    go = threading.Event()
    thread = Background(depth=8)

    def fail() -> None:
        go.wait(10)
        raise _FailedError

    thread.do(done.append, 0)
    thread.do(fail)
    waiting = thread._waiting[-1]
    thread.do(done.append, 1)  # waits behind it
    go.set()
    _wait_until(waiting.done)
    with pytest.raises(_FailedError):  # the queue has room, but the error is known
        thread.do(done.append, 2)
    with pytest.raises(_FailedError), thread:
        raise _FailedError
    assert done == [0]
    assert not _writer_threads()


def test_error_of_the_last_task_is_raised_at_the_end() -> None:
    with pytest.raises(_FailedError), Background() as thread:
        thread.do(_fail)


def test_at_most_depth_tasks_wait() -> None:
    go = threading.Event()
    thread = Background(depth=3)
    handed: list[int] = []

    def task() -> None:
        go.wait(10)

    def hand_over() -> None:
        for i in range(6):
            thread.do(task)
            handed.append(i)

    caller = threading.Thread(target=hand_over)
    with thread:
        caller.start()
        _wait_until(lambda: len(handed) == 3)
        time.sleep(0.05)
        assert len(handed) == 3  # the fourth call waits
        go.set()
        caller.join(10)
        assert len(handed) == 6


@pytest.mark.parametrize("kind", [_FailedError, KeyboardInterrupt, GeneratorExit])
def test_error_of_the_caller_ends_the_thread(kind: type[BaseException]) -> None:
    done: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go.wait(10)
        done.append(0)

    thread = Background(depth=8)
    thread.do(slow)
    thread.do(done.append, 1)
    begun.wait(10)
    threading.Timer(0.05, go.set).start()
    with pytest.raises(kind), thread:
        raise kind
    assert done == [0]  # what was begun is finished, what waited is not begun
    assert not _writer_threads()


def test_error_of_the_caller_is_not_hidden_by_one_of_the_thread() -> None:
    thread = Background(depth=8)
    thread.do(_fail)
    _wait_until(thread._waiting[-1].done)
    with pytest.raises(KeyboardInterrupt), thread:
        raise KeyboardInterrupt


# -- the writer of a harvest ---------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hookpoints": ["layers.1.resid_post"],
    "n_tokens": 100_000,
    "ctx_len": 16,
    "batch_blocks": 2,
    "shard_bytes": 8_192,
    "storage_dtype": "float32",
}


def test_model_does_not_run_on_when_the_disk_is_full(
    tiny_lm: LanguageModel, tiny_corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most the passes that may wait are made in vain."""
    reports: list[HarvestProgress] = []
    failed_at: list[int] = []
    real = os.pwrite

    def pwrite(*args: Any) -> int:
        if len(reports) > 12:
            failed_at.append(len(reports))
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    def pause(progress: HarvestProgress) -> None:
        reports.append(progress)
        time.sleep(0.002)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DiskFull):
        harvest(tiny_lm, tiny_corpus, out=tmp_path, on_progress=pause, **SMALL)
    assert len(reports) - failed_at[0] <= 4
    assert not list(tmp_path.rglob("*.partial"))
    assert not _writer_threads()


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_model_that_raises_leaves_no_thread_no_file_and_no_half_shard(
    tiny_lm: LanguageModel,
    tiny_corpus: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[BaseException],
) -> None:
    out, real, n_passes = tmp_path / "acts", LanguageModel.capture, 0

    def capture(self: LanguageModel, inputs: Any, hookpoints: Any) -> Any:
        nonlocal n_passes
        n_passes += getattr(inputs, "shape", (0,))[0] == 2
        if n_passes == 14:
            raise kind("out of memory")
        return real(self, inputs, hookpoints)

    n_open = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "capture", capture)
        with pytest.raises(kind):
            harvest(tiny_lm, tiny_corpus, out=out, **SMALL)
    assert len(list(Path("/proc/self/fd").iterdir())) == n_open
    assert not list(out.rglob("*.partial"))
    assert not _writer_threads()
    harvest(tiny_lm, tiny_corpus, out=out, **SMALL)
    harvest(tiny_lm, tiny_corpus, out=tmp_path / "whole", **SMALL)
    assert _files(out) == _files(tmp_path / "whole")


def _files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted((folder / "shards").iterdir())}
