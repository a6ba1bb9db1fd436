"""Pages: the rows that features' pages are made of, the tables of a database asked side by side.

Each table's query is short and mostly planning: two threads ask half of them each.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from .feature_rows import OF_THESE, FeatureRows, ids_of

Rows = list[dict[str, Any]]
Ask = Callable[[str, Sequence[Any] | Mapping[str, Any]], Rows]

# What a page shows of each table; the texts of tokens are in the vocabulary. One thread asks for
# these, another one for all others: about half of the time each.
SHOWN = {
    "contexts": "kind, rank, quantile, doc_id, position, act, token, peak, text, token_ids, acts",
    "feature_nearby_tokens": "place, rank, token_id, n_active, n_total, mean_act, lift",
    "feature_tokens": "rank, token_id, n_active, n_total, mean_act, lift",
    "feature_logits": "sign, rank, token_id, logit",
}
SHOWN_MEANWHILE = {
    "neighbors": "rank, neighbor_id, cosine",
    "coactivations": "rank, other_id, n_both, npmi",
    "feature_histogram": "lo, hi, n",
}
# What names the other feature.
_OTHERS = {"neighbors": "neighbor_id", "coactivations": "other_id"}


class Pages:
    """Reads the rows of pages.

    ask: runs one query; threads may call it at once. threads: ask half of the queries.
    """

    def __init__(self, ask: Ask, features: FeatureRows, threads: Executor) -> None:
        self._ask, self._features, self._threads = ask, features, threads

    def rows(self, sae_id: int, feature_ids: Sequence[int]) -> dict[str, Rows]:
        """Table -> its rows of features of one SAE; those that there aren't have none.

        Rows of `neighbors` and `coactivations` have the other feature's label too.
        """
        ids = list(feature_ids)
        some = self._threads.submit(self._of, SHOWN, sae_id, ids)
        rows = self._of(SHOWN_MEANWHILE, sae_id, ids)
        self._add_features(rows, sae_id, ids)
        return rows | some.result()

    def _add_features(self, rows: dict[str, Rows], sae_id: int, ids: Sequence[int]) -> None:
        """Add the rows of `features`, and give those of other tables the other feature's label."""
        others = {row[name] for table, name in _OTHERS.items() for row in rows[table]}
        known = self._features.of([(sae_id, feature_id) for feature_id in {*ids, *others}])
        pairs = [(sae_id, feature_id) for feature_id in ids]
        rows["features"] = [known[pair] for pair in pairs if pair in known]
        for table, name in _OTHERS.items():
            for row in rows[table]:
                row["label"] = known[sae_id, row[name]]["label"]

    def _of(self, shown: Mapping[str, str], sae_id: int, ids: list[int]) -> dict[str, Rows]:
        return {table: self._in(table, names, sae_id, ids) for table, names in shown.items()}

    def _in(self, table: str, names: str, sae_id: int, ids: list[int]) -> Rows:
        select = f"SELECT feature_id, {names} FROM {table}"
        if len(ids) == 1:
            return self._ask(f"{select} WHERE sae_id = ? AND feature_id = ?", [sae_id, ids[0]])
        return self._ask(f"{select} {OF_THESE}", ids_of([(sae_id, i) for i in ids]))
