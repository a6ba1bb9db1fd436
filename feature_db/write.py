"""The state of an SAE -> rows of the database, some features at a time."""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import TYPE_CHECKING, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from sae import Report

from . import tables
from .codes import Int64
from .collect import SAEState, TokenSpool
from .config import IndexConfig, IndexProgress, OnProgress
from .directions import LogitEffects, logit_effects, logit_spread, nearest_features
from .labels import Evidence, PeakContext, TokenUse, token_label
from .tables import Features, TokenUses
from .token_text import vocabulary, words_of

if TYPE_CHECKING:
    from activation_cache import ActivationCache, LanguageModel

_FEATURES_AT_ONCE = 2048
_DOCUMENTS_AT_ONCE = 512
_USES_IN_A_LABEL = 12


class ModelWords(NamedTuple):
    """What the index takes from the language model.

    texts: every token's text, by id; arrow: the same. logit_matrix: [d_model, vocab].
    """

    texts: list[str]
    arrow: pa.Array
    logit_matrix: torch.Tensor

    @classmethod
    def of(cls, lm: "LanguageModel") -> "ModelWords":
        """Read them from a model."""
        texts = vocabulary(lm)
        return cls(texts, pa.array(texts, pa.string()), lm.logit_matrix())


class Writer:
    """Writes a database, table by table.

    connection: open for writing, the tables there. spool: the tokens of every row of the cache.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        lm: "LanguageModel",
        cache: "ActivationCache",
        spool: TokenSpool,
        config: IndexConfig,
        on_progress: OnProgress,
    ) -> None:
        self._connection, self._lm, self._cache = connection, lm, cache
        self._spool, self._config, self._on_progress = spool, config, on_progress
        self.words = ModelWords.of(lm)
        self._spread = logit_spread(self.words.logit_matrix)

    def write_sae(self, state: SAEState) -> None:
        """Write everything about one SAE, in one transaction."""
        sae_id, d_sae = state.indexed.sae_id, state.indexed.sae.d_sae
        word_rates = _word_rates(self.words.texts, state.totals.token_counts)
        with transaction(self._connection):
            insert(self._connection, "saes", _sae_row(state, self._cache))
            if state.indexed.report is not None:
                insert(self._connection, "metrics", _metric_rows(sae_id, state.indexed.report))
            for first in range(0, d_sae, _FEATURES_AT_ONCE):
                where = Features(sae_id, first, min(first + _FEATURES_AT_ONCE, d_sae))
                for table, rows in self._rows(where, state, word_rates):
                    insert(self._connection, table, rows)
                self._on_progress(IndexProgress("features", where.stop, d_sae))

    def write_documents(self) -> None:
        """Write the text of every document of the cache, as far as it is cached."""
        documents, n_done = self._cache.documents(), 0
        with transaction(self._connection):
            while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
                texts = [self._lm.tokenizer.decode(each.token_ids) for each in batch]
                columns = {
                    "doc_id": [each.doc_id for each in batch],
                    "source": [each.source for each in batch],
                    "text": texts,
                    "n_tokens": [len(each.token_ids) for each in batch],
                }
                insert(self._connection, "documents", pa.table(columns))
                n_done += len(batch)
                self._on_progress(IndexProgress("documents", n_done, self._cache.n_documents))

    def _rows(
        self, where: Features, state: SAEState, word_rates: dict[str, float]
    ) -> Iterator[tuple[str, pa.Table]]:
        """(table, rows) of a range of features."""
        totals, W_dec, texts = state.totals, state.indexed.sae.W_dec, self.words.arrow
        pairs = state.pairs.of_features(where.first, where.stop)
        uses = tables.token_uses(pairs, totals, self._config)
        contexts = self._contexts(where, state)
        effects = self._effects(where, W_dec)
        nearest = nearest_features(W_dec, where.first, where.stop, self._config.n_neighbors)
        best = tables.best_uses(uses, uses.lifts, self._config.n_tokens)
        evidence = _evidence(where, uses, contexts, effects, self.words.texts, totals.token_counts)
        is_active = totals.n_active[where.first : where.stop] > 0
        labels = [
            token_label(each, word_rates) if active else None
            for each, active in zip(evidence, is_active, strict=True)
        ]
        yield "features", tables.features_table(where, totals, labels)
        yield "contexts", contexts
        yield "feature_tokens", tables.tokens_table(where, best, texts)
        yield "feature_histogram", tables.histogram_table(where, totals)
        yield "neighbors", tables.neighbors_table(where, nearest)
        if effects is not None:
            yield "feature_logits", tables.logits_table(where, effects, texts)

    def _contexts(self, where: Features, state: SAEState) -> pa.Table:
        top = state.top.of_features(where.first, where.stop)
        sample = state.sample.of_features(where.first, where.stop)
        chosen = tables.choose_quantiles(sample, self._config)
        contexts = tables.contexts_table(where, top, chosen, self._spool, self.words.arrow)
        return self._with_whole_characters(contexts)

    def _with_whole_characters(self, contexts: pa.Table) -> pa.Table:
        """The same, `text` decoded as a whole where a character is spread over tokens."""
        is_split = pc.match_substring(contexts.column("text"), "<0x").combine_chunks()
        token_ids = contexts.column("token_ids").filter(is_split).to_pylist()
        texts = pa.array([self._lm.tokenizer.decode(ids) for ids in token_ids], pa.string())
        text = pc.replace_with_mask(contexts.column("text").combine_chunks(), is_split, texts)
        return contexts.set_column(contexts.column_names.index("text"), "text", text)

    def _effects(self, where: Features, W_dec: torch.Tensor) -> LogitEffects | None:
        """Logit effects, or None where the SAE isn't as wide as the residual stream."""
        if W_dec.shape[1] != self.words.logit_matrix.shape[0]:
            return None
        rows = W_dec[where.first : where.stop]
        return logit_effects(rows, self.words.logit_matrix, self._spread, self._config.n_logits)


@contextmanager
def transaction(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Commit when the context closes; roll back when it closes with an error."""
    connection.execute("BEGIN TRANSACTION").fetchall()
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK").fetchall()
        raise
    connection.execute("COMMIT").fetchall()


def insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    """Append Arrow rows to a table, columns matched by name."""
    connection.register("incoming", rows)
    connection.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming").fetchall()
    connection.unregister("incoming")


def _evidence(
    where: Features,
    uses: TokenUses,
    contexts: pa.Table,
    effects: LogitEffects | None,
    texts: Sequence[str],
    token_counts: Int64,
) -> Iterator[Evidence]:
    """What there is to make a label of, for each feature of the range."""
    seen, promoted = token_counts > 0, None if effects is None else effects.promoted.ids
    score = uses.shares * np.log(np.maximum(uses.lifts, 1e-9))
    telling = tables.best_uses(uses, score, _USES_IN_A_LABEL)
    top = contexts.filter(pc.equal(contexts.column("kind"), "top"))
    shown_columns = (top.column(name).to_pylist() for name in ("text", "tokens", "peak", "act"))
    peaks = [PeakContext(*row) for row in zip(*shown_columns, strict=True)]
    uses_of = _grouped(telling.features, where)
    contexts_of = _grouped(top.column("feature_id").to_numpy(), where)
    ids, shares, lifts = (x.tolist() for x in (telling.token_ids, telling.shares, telling.lifts))
    for i, (used, shown) in enumerate(zip(uses_of, contexts_of, strict=True)):
        yield Evidence(
            [TokenUse(texts[ids[j]], shares[j], lifts[j]) for j in range(*used)],
            peaks[slice(*shown)],
            [] if promoted is None else [texts[t] for t in promoted[i].tolist() if seen[t]],
            0.0 if effects is None else float(effects.strengths[i]),
        )


def _grouped(sorted_features: Int64, where: Features) -> list[tuple[int, int]]:
    """First row and end of each feature of the range, in a column sorted by feature."""
    edges = np.searchsorted(sorted_features, np.arange(where.first, where.stop + 1)).tolist()
    return list(pairwise(edges))


def _word_rates(texts: Sequence[str], token_counts: Int64) -> dict[str, float]:
    """Frequency of each word in the text: the tokens that are that word."""
    n_tokens, rates = max(int(token_counts.sum()), 1), dict[str, float]()
    for token_id in np.flatnonzero(token_counts).tolist():
        for word in words_of(texts[token_id]):
            rates[word] = rates.get(word, 0.0) + int(token_counts[token_id]) / n_tokens
    return rates


def _sae_row(state: SAEState, cache: "ActivationCache") -> pa.Table:
    indexed, sae = state.indexed, state.indexed.sae
    provenance, report = cache.provenance(indexed.hookpoint), indexed.report
    row = {
        "sae_id": indexed.sae_id,
        "name": indexed.name,
        "model": provenance["model"],
        "model_revision": provenance["model_revision"],
        "hookpoint": indexed.hookpoint,
        "architecture": sae.architecture,
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "k": sae.expected_l0,
        "fvu": report and report.fvu,
        "l0": report and report.l0,
        "ce_recovered": report and report.ce_recovered,
        "n_tokens_trained": sae.origin.n_tokens_trained or None,
        "n_tokens_indexed": state.totals.n_indexed,
        "n_tokens_skipped": state.totals.n_skipped,
        "weights_hash": indexed.weights_hash,
        "cache_fingerprint": cache.fingerprint_hash,
        "created_at": datetime.datetime.now(datetime.UTC).replace(tzinfo=None),
    }
    return pa.Table.from_pylist([row])


def _metric_rows(sae_id: int, report: Report) -> pa.Table:
    figures = report.figures()
    return pa.table(
        {
            "sae_id": pa.array([sae_id] * len(figures), pa.int32()),
            "name": [figure.name for figure in figures],
            "value": pa.array([figure.value for figure in figures], pa.float64()),
            "definition": [figure.definition for figure in figures],
        }
    )
