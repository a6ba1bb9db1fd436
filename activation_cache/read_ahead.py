"""The next item is made on a thread while the last one is used; so are copies to a GPU."""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_END = object()


def read_ahead(items: Iterable[T]) -> Generator[T]:
    """The items, in order, each made while the one before it is used. Errors come where they would.

    Two items are in memory at a time at most, if the caller drops one before it asks for the next.
    The thread ends with the generator: who may leave it early closes it.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        coming = thread.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, iterator, _END)
            yield item  # type: ignore[misc]
            del item


def in_parallel(work: Callable[..., None], calls: Iterable[tuple[Any, ...]], n: int) -> None:
    """Call `work` with each of the arguments, on n threads. Raises: the first error."""
    with ThreadPoolExecutor(n, thread_name_prefix="read") as threads:
        done = [threads.submit(work, *arguments) for arguments in calls]
        try:
            for each in done:
                each.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def copied_ahead(
    batches: Iterator[dict[str, Tensor]], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Batches that are put on a device: on CUDA, each is copied while the one before it is used.

    The copies and what decodes them run on a stream of their own.
    """
    return _one_ahead_on_gpu(batches, device) if device.type == "cuda" else batches


def _one_ahead_on_gpu(
    batches: Iterator[dict[str, Tensor]], device: torch.device
) -> Iterator[dict[str, Tensor]]:
    side = torch.cuda.Stream(device)

    def made() -> Iterator[dict[str, Tensor]]:
        while True:
            with torch.cuda.stream(side):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    coming = made()
    batch = next(coming, None)
    while batch is not None:
        used_on = torch.cuda.current_stream(device)
        used_on.wait_stream(side)
        for tensor in batch.values():
            tensor.record_stream(used_on)
        following = next(coming, None)
        yield batch
        batch = following
