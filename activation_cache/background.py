"""Work that is handed to a thread and done in order, so that the model never waits for the disk."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Background:
    """Does what it is given one after another, on one thread. A context: it ends with all done.

    depth: tasks that may wait; `do` blocks while there are more. After a task has failed, none of
    those behind it is begun, and its error is raised by the next call.
    """

    def __init__(self, depth: int = 4):
        self._depth = depth
        self._waiting: deque[Future[None]] = deque()
        self._error: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._error = self._error or error  # what waits is not begun
        try:
            if error is None:
                self.finish()
        finally:
            self._thread.shutdown(wait=True)

    def do(self, task: Callable[..., object], *arguments: Any) -> None:
        """Hand over a task. Raises: the error of an earlier one."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= self._depth):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._run, task, arguments))

    def finish(self) -> None:
        """Wait for all tasks. Raises: the error of one."""
        while self._waiting:
            self._waiting.popleft().result()

    def _run(self, task: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        if self._error is not None:
            raise self._error
        try:
            task(*arguments)
        except BaseException as error:
            self._error = error
            raise
