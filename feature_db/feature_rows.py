"""Rows of `features` by their ids: of a small table out of memory, of a large one by a query.

Pages, searches and neighbours all show labels and densities of features far apart.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Pair = tuple[int, int]
Row = dict[str, Any]
Ints = npt.NDArray[np.int64]
# Of at most so many features, about 10 MB: read once in some milliseconds.
_IN_MEMORY = 131_072
_SHOWN = "sae_id, feature_id, density, n_active, mean_act, max_act, is_dead, label, label_method"
# A join, unlike IN, passes over the row groups without such features.
OF_THESE = """JOIN (
    SELECT unnest($sae_ids::INTEGER[]) AS sae_id, unnest($feature_ids::INTEGER[]) AS feature_id
) USING (sae_id, feature_id)"""


def ids_of(features: Sequence[Pair]) -> dict[str, list[int]]:
    """The parameters of OF_THESE."""
    return {
        "sae_ids": [sae_id for sae_id, _ in features],
        "feature_ids": [feature_id for _, feature_id in features],
    }


class FeatureRows:
    """The table `features`. ask: runs a query, gives Arrow. Threads may read it at once."""

    def __init__(self, ask: Callable[[str, Any], pa.Table]) -> None:
        self._ask = ask
        self._is_small: bool | None = None
        self._held: _Held | None = None

    def of(self, features: Sequence[Pair]) -> dict[Pair, Row]:
        """What a feature shows of itself, by (sae_id, feature_id); of those that there are."""
        if self._is_small is None:
            (n,) = self._ask("SELECT count(*) AS n FROM features", None).column("n").to_pylist()
            self._is_small = n <= _IN_MEMORY
        if self._is_small:
            found = self._looked_up(features)
        else:
            found = self._ask(f"SELECT {_SHOWN} FROM features {OF_THESE}", ids_of(features))
        return {(row["sae_id"], row["feature_id"]): row for row in found.to_pylist()}

    def forget(self) -> None:
        """Read the table anew when next asked: labels were written."""
        self._held = None

    def _looked_up(self, features: Sequence[Pair]) -> pa.Table:
        held = self._held
        if held is None:
            table = self._ask(f"SELECT {_SHOWN} FROM features ORDER BY sae_id, feature_id", None)
            sae_ids, feature_ids = (table.column(i).to_numpy() for i in (0, 1))
            held = self._held = _Held(_keys(sae_ids, feature_ids), table)
        wanted = _keys(*np.array(features, np.int64).reshape(-1, 2).T)
        at = np.searchsorted(held.keys, wanted)
        there = at < len(held.keys)
        return held.table.take(pa.array(at[there][held.keys[at[there]] == wanted[there]]))


class _Held(NamedTuple):
    """The table, and what its rows are sorted by: int64 [rows]."""

    keys: Ints
    table: pa.Table


def _keys(sae_ids: Ints, feature_ids: Ints) -> Ints:
    return sae_ids.astype(np.int64) << 32 | feature_ids
