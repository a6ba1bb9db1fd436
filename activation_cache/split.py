"""Which documents train and which are held out.

In: document numbers. Out: whether each is held out. It depends on a document's number alone, so
that it stays on its side however the cache grows.
"""

import numpy as np
from numpy.typing import NDArray

_SEED = np.uint64(0x5AEBA5E)


def is_held_out(
    doc_ids: NDArray[np.int64], fraction: float, first_documents: list[int]
) -> NDArray[np.bool_]:
    """bool, for each document number.

    fraction: about this share is held out, by a hash of the number; 0 holds out none.
    first_documents: the first two documents that have text. The first always trains and the second
        is always held out, so that a corpus of a few documents has both sides.
    """
    held_out: NDArray[np.bool_] = _chance(doc_ids) < fraction
    if fraction > 0 and len(first_documents) > 1:
        held_out &= doc_ids != first_documents[0]
        held_out |= doc_ids == first_documents[1]
    return held_out


def _chance(doc_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each document, from its number alone (splitmix64's finalizer)."""
    x = doc_ids.astype(np.uint64) + _SEED + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).astype(np.float64) / 2.0**64
