"""Datasets of the Hugging Face hub, and `datasets` objects -> rows.

In: a dataset's id, a local dataset folder, or a `Dataset` or `IterableDataset` the user made. Out:
a `Source`. Where a reading begins is always counted in documents from the first one: the library's
own way to resume loses what stood in a shuffle buffer. Ranks are split as
`datasets.distributed.split_dataset_by_node` splits them.
"""

import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from .errors import CorpusError
from .hub import hub_answers
from .rows import Columns, Rows, Share, Source, documents_of, first_line

_DIVISIBLE = frozenset(
    f"{name}ExamplesIterable"
    for name in (
        "",
        "Arrow",
        "RebatchedArrow",
        "SelectColumns",
        "Formatted",
        "Mapped",
        "Filtered",
        "InterleavedShards",
        "BufferShuffled",
        "VerticallyConcatenatedMultiSources",
    )
)
"""Steps of a stream that may be done on each rank's files by itself: together the ranks see every
row once. `take`, `skip` and `interleave_datasets` are none of them: measured with `datasets` 5.2,
the ranks' rows are others than those of the whole."""


def is_dataset(data: Any) -> bool:
    """Whether `data` is an object of `datasets`, which then has been imported."""
    datasets: Any = sys.modules.get("datasets")
    return bool(datasets) and isinstance(data, datasets.Dataset | datasets.IterableDataset)


def open_dataset(data: Any, name: str, columns: Columns) -> Source:
    """A `Dataset` or `IterableDataset` of the user's. Raises: CorpusError for a missing column.

    Of a stream that is shuffled the revision tells the seed: one that was shuffled without a seed
    is another one each time, and nothing is continued from it.
    """
    if data.column_names:
        columns.require(data.column_names, name)
    if hasattr(data, "select"):  # a map-style one
        return Source(name, str(data._fingerprint), lambda s: _read_table(data, s, columns, name))
    return _stream_source(data, name, _order_revision(data), columns)


def open_hub(
    name: str, columns: Columns, split: str, subset: str | None, revision: str | None
) -> Source:
    """A hub dataset or a local dataset folder, streamed by `datasets` in its own order.

    Raises: CorpusError if there is none, or it lacks a column.
    """
    import datasets

    unknown = (
        f"unknown data {name!r}: it is no .jsonl, .txt or .parquet file, no folder of them, "
        "and not to be had from the Hugging Face hub ({}). Check the path or the name"
    )
    if not Path(name).expanduser().exists() and not hub_answers():
        raise CorpusError(unknown.format("it can't be reached"))
    try:
        stream = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        there = stream.column_names
    except (OSError, ValueError, RuntimeError) as error:
        raise CorpusError(unknown.format(first_line(error))) from error
    if there:
        columns.require(there, name)
    label = ":".join(part for part in (name, subset, split) if part)
    return _stream_source(stream, label, _hub_revision(stream) or revision or "unknown", columns)


def has_own_files(stream: Any, world_size: int) -> bool:
    """Whether each of `world_size` ranks reads files (shards) of the stream that no other reads.

    As in `split_dataset_by_node`, if their number divides by `world_size`; and only if reading
    them apart makes the same rows as reading them together.
    """
    n_shards = stream.num_shards if world_size > 1 and _is_fresh(stream) else 0
    return n_shards > 0 and n_shards % world_size == 0 and _is_divisible(stream._ex_iterable)


def _stream_source(stream: Any, name: str, revision: str, columns: Columns) -> Source:
    def read(share: Share) -> Rows:
        numbers = itertools.count(share.next(0), share.world_size)
        rows = zip(numbers, _rows_of(stream, share), strict=False)
        return documents_of(rows, columns, name)

    return Source(name, revision, read, lambda world_size: has_own_files(stream, world_size))


def _rows_of(stream: Any, share: Share) -> Iterator[Any]:
    """The rows of a share: by files where ranks have their own, else every `world_size`-th row.

    `.shard` divides files as `split_dataset_by_node` does, but `.skip` after it is exact in all of
    `datasets` 4.0 to 5.2: after a split it gave each rank the whole (huggingface/datasets#8568).
    """
    from datasets.distributed import split_dataset_by_node

    first, rank, world_size = share.next(0), share.rank, share.world_size
    if not _is_fresh(stream):
        return itertools.islice(stream, first, None, world_size)
    if has_own_files(stream, world_size):
        own = stream.shard(num_shards=world_size, index=rank, contiguous=False)
        return iter(own.skip(first // world_size))
    if stream.num_shards % world_size:
        return iter(split_dataset_by_node(stream.skip(first - rank), rank, world_size))
    return itertools.islice(stream.skip(first), 0, None, world_size)


def _read_table(table: Any, share: Share, columns: Columns, name: str) -> Rows:
    first = share.next(0)
    rows: Iterable[Any] = table.select(range(first, len(table))) if first < len(table) else ()
    numbers = itertools.count(first, share.world_size)
    own = itertools.islice(rows, 0, None, share.world_size)
    return documents_of(zip(numbers, own, strict=False), columns, name)


def _is_fresh(stream: Any) -> bool:
    """Whether what is derived from the stream begins where it begins: an epoch, a loaded state and
    a split between nodes are lost or taken another way by `.skip` and `.shard`."""
    return (
        stream.epoch == 0
        and getattr(stream, "_starting_state_dict", None) is None
        and getattr(stream, "_distributed", None) is None
    )


def _is_divisible(step: Any) -> bool:
    if type(step).__name__ not in _DIVISIBLE:
        return False
    if getattr(step, "batched", False) or getattr(step, "with_indices", False):
        return False
    return all(map(_is_divisible, _inner_steps(step)))


def _inner_steps(step: Any) -> list[Any]:
    inner = getattr(step, "ex_iterable", None)
    return [inner] if inner is not None else list(getattr(step, "ex_iterables", []))


def _order_revision(stream: Any) -> str:
    """What is known of the order of a user's stream: its epoch and the seeds of its shuffles."""
    steps, states = [stream._ex_iterable, getattr(stream, "_shuffling", None)], []
    while steps:
        step = steps.pop()
        steps += _inner_steps(step)
        generator = getattr(step, "generator", None)
        states += [str(generator.bit_generator.state)] if generator is not None else []
    if not states:
        return "unknown"
    digest = xxhash.xxh3_128(repr([stream.epoch, states]).encode())
    return f"unknown/shuffled:{digest.hexdigest()}"


def _hub_revision(stream: Any) -> str | None:
    """The commit that stands in the checksummed addresses of a hub dataset, where it does."""
    checksums = getattr(stream.info, "download_checksums", None) or {}
    found = (re.search(r"@([0-9a-f]{40})/", str(address)) for address in checksums)
    return next((match[1] for match in found if match), None)
