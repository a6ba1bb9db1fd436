"""What all parts say of an SAE -> rows of the database, a bucket of features at a time."""

import datetime
import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from sae import Report

from ..config import IndexConfig, IndexProgress, OnProgress
from ..inputs import IndexedSAE
from ..labels import Evidence, PeakContext, TokenUse, token_label
from ..token_text import vocabulary, words_of
from ..transactions import insert, transaction
from . import tables
from .collect import RowCounts
from .context_tables import contexts_table, shown_contexts
from .counting import CURRENT, FOLLOWING, PREVIOUS
from .directions import (
    LogitEffects,
    NearestFeatures,
    logit_effects,
    logit_spread,
    similar_features,
)
from .merging import MergedBucket, merged_buckets
from .part_files import PartReader
from .parts import record
from .sorting import Int64
from .statistics import FeatureTotals, Scales
from .tables import Features, TokenUses
from .text_rows import TextRows

if TYPE_CHECKING:
    from activation_cache import LanguageModel

_DOCUMENTS_AT_ONCE = 512
_USES_IN_A_LABEL = 12


class ModelWords(NamedTuple):
    """What the index takes from the language model.

    texts: every token's text, by id; arrow: the same. unembedding: [vocab, d_model].
    """

    texts: list[str]
    arrow: pa.Array
    unembedding: torch.Tensor

    @classmethod
    def of(cls, lm: "LanguageModel") -> "ModelWords":
        """Read them from a model."""
        texts = vocabulary(lm)
        return cls(texts, pa.array(texts, pa.string()), lm.logit_matrix().T.contiguous())


class SAERows(NamedTuple):
    """What all parts together say of one SAE.

    parts: in the order of the text. rows: counts of the indexed ones. n_active: of every feature,
    int64 [d_sae]. scales: of the sums.
    """

    indexed: IndexedSAE
    parts: list[PartReader]
    rows: RowCounts
    n_indexed: int
    n_skipped: int
    scales: Scales

    @classmethod
    def of(cls, indexed: IndexedSAE, folders: Sequence[Path], max_norm: float) -> "SAERows":
        """folders: of its parts. max_norm: of the rows."""
        records = [record(folder) for folder in folders]
        counts = [RowCounts.load(folder) for folder in folders]
        return cls(
            indexed,
            [PartReader(folder) for folder in folders],
            functools.reduce(lambda a, b: a + b, counts),
            sum(each.n_indexed for each in records),
            sum(each.n_skipped for each in records),
            Scales.of(min(max_norm, indexed.sae.max_norm)),
        )

    def n_active(self) -> Int64:
        """Rows on which each feature is active: int64 [d_sae]."""
        buckets = merged_buckets(self.parts, self.indexed.sae.d_sae)
        return np.concatenate([bucket.n_active() for bucket in buckets])


class Writer:
    """Writes a database, table by table.

    connection: open for writing, the tables there. text: the tokens of all rows.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        lm: "LanguageModel",
        text: TextRows,
        nearest: NearestFeatures,
        config: IndexConfig,
        on_progress: OnProgress,
    ) -> None:
        self._nearest = nearest
        self._connection, self._lm, self._text = connection, lm, text
        self._config, self._on_progress = config, on_progress
        self.words = ModelWords.of(lm)
        self._spread = logit_spread(self.words.unembedding)

    def write_sae(self, found: SAERows, about: pa.Table) -> None:
        """Write everything about one SAE, in one transaction. about: its row of `saes`."""
        sae_id, d_sae = found.indexed.sae_id, found.indexed.sae.d_sae
        word_rates, n_active = _word_rates(self.words.texts, found.rows.tokens), found.n_active()
        with transaction(self._connection):
            insert(self._connection, "saes", about)
            if found.indexed.report is not None:
                insert(self._connection, "metrics", _metric_rows(sae_id, found.indexed.report))
            for bucket in merged_buckets(found.parts, d_sae):
                where = Features(sae_id, bucket.first, bucket.stop, found.n_indexed, found.scales)
                for table, rows in self._rows(where, bucket, found, n_active, word_rates):
                    insert(self._connection, table, rows)
                self._on_progress(IndexProgress("features", where.stop, d_sae))

    def write_vocabulary(self) -> None:
        """Write the text of every token."""
        token_ids = np.arange(len(self.words.texts), dtype=np.int32)
        rows = pa.table({"token_id": token_ids, "token": self.words.arrow})
        insert(self._connection, "vocabulary", rows)

    def write_similar(self, saes: Sequence[IndexedSAE]) -> None:
        """Write which features of other SAEs of the same width lie nearest to each."""
        with transaction(self._connection):
            for one, other in permutations(saes, 2):
                if one.sae.W_dec.shape[1] == other.sae.W_dec.shape[1]:
                    similar = similar_features(
                        one.sae.W_dec, other.sae.W_dec, self._config.n_similar
                    )
                    rows = tables.similar_table(one.sae_id, other.sae_id, similar)
                    insert(self._connection, "similar_features", rows)

    def write_documents(self, sources: Mapping[int, str]) -> None:
        """Write the text of every document. sources: document's number -> its source."""
        documents, n_done = self._text.documents(), 0
        with transaction(self._connection):
            while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
                columns = {
                    "doc_id": [doc_id for doc_id, _ in batch],
                    "source": [sources[doc_id] for doc_id, _ in batch],
                    "text": [self._lm.tokenizer.decode(ids.tolist()) for _, ids in batch],
                    "n_tokens": [len(ids) for _, ids in batch],
                }
                insert(self._connection, "documents", pa.table(columns))
                n_done += len(batch)
                self._on_progress(IndexProgress("documents", n_done, len(sources)))

    def _rows(
        self,
        where: Features,
        bucket: MergedBucket,
        found: SAERows,
        n_active: Int64,
        word_rates: dict[str, float],
    ) -> Iterator[tuple[str, pa.Table]]:
        """(table, rows) of a bucket of features."""
        config, W_dec, texts = self._config, found.indexed.sae.W_dec, self.words.arrow
        totals, rows = bucket.totals(), found.rows
        counts = {CURRENT: rows.tokens, PREVIOUS: rows.previous, FOLLOWING: rows.following}
        uses = {
            place: tables.token_uses(bucket.tokens(place), where, totals, n_on, config)
            for place, n_on in counts.items()
        }
        best = {place: tables.best_uses(u, u.lifts, config.n_tokens) for place, u in uses.items()}
        contexts = self._contexts(where, bucket, totals)
        effects = self._effects(where, W_dec)
        nearest = self._nearest.of(found.indexed.weights_hash, W_dec)
        near = nearest.of_features(where.first, where.stop)
        labels = self._labels(where, uses.pop(CURRENT), contexts, effects, rows.tokens, word_rates)
        shown = [label if n else None for label, n in zip(labels, totals.n_active, strict=True)]
        yield "features", tables.features_table(where, totals, shown)
        yield "contexts", contexts
        yield "feature_tokens", tables.tokens_table(where, best.pop(CURRENT), texts)
        yield "feature_nearby_tokens", tables.nearby_tokens_table(where, best, texts)
        yield "feature_histogram", tables.histogram_table(where, totals)
        yield "feature_positions", tables.positions_table(where, totals, rows.positions)
        documents = bucket.documents()
        yield (
            "feature_documents",
            tables.documents_table(where, documents, totals, config.n_documents),
        )
        pairs = bucket.companions()
        yield (
            "coactivations",
            tables.coactivations_table(where, pairs, n_active, config.n_coactivations),
        )
        yield (
            "neighbors",
            tables.neighbors_table(where, near),
        )
        if effects is not None:
            yield "feature_logits", tables.logits_table(where, effects, texts)

    def _contexts(self, where: Features, bucket: MergedBucket, totals: FeatureTotals) -> pa.Table:
        config = self._config
        top, sample = bucket.contexts(config, self._text)
        missed = bucket.near_misses(config.n_negatives)
        missed = missed.take(np.flatnonzero(totals.n_active[missed.features]))  # of the living
        shown = shown_contexts(top, sample, missed, totals.histogram, config)
        contexts = contexts_table(where, shown, self._text, self.words.arrow)
        return self._with_whole_characters(contexts)

    def _labels(
        self,
        where: Features,
        uses: TokenUses,
        contexts: pa.Table,
        effects: LogitEffects | None,
        token_counts: Int64,
        word_rates: dict[str, float],
    ) -> list[str]:
        evidence = _evidence(where, uses, contexts, effects, self.words.texts, token_counts)
        return [token_label(each, word_rates) for each in evidence]

    def _with_whole_characters(self, contexts: pa.Table) -> pa.Table:
        """The same, `text` decoded as a whole where a character is spread over tokens."""
        is_split = pc.match_substring(contexts.column("text"), "<0x").combine_chunks()
        token_ids = contexts.column("token_ids").filter(is_split).to_pylist()
        texts = pa.array([self._lm.tokenizer.decode(ids) for ids in token_ids], pa.string())
        text = pc.replace_with_mask(contexts.column("text").combine_chunks(), is_split, texts)
        return contexts.set_column(contexts.column_names.index("text"), "text", text)

    def _effects(self, where: Features, W_dec: torch.Tensor) -> LogitEffects | None:
        """Logit effects, or None where the SAE isn't as wide as the residual stream."""
        if W_dec.shape[1] != self.words.unembedding.shape[1]:
            return None
        rows = W_dec[where.first : where.stop]
        return logit_effects(rows, self.words.unembedding, self._spread, self._config.n_logits)


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
    peaks = _peaks(top, texts)
    uses_of = _grouped(telling.features + where.first, where)
    contexts_of = _grouped(top.column("feature_id").to_numpy(), where)
    ids, shares, lifts = (x.tolist() for x in (telling.token_ids, telling.shares, telling.lifts))
    for i, (used, shown) in enumerate(zip(uses_of, contexts_of, strict=True)):
        yield Evidence(
            [TokenUse(texts[ids[j]], shares[j], lifts[j]) for j in range(*used)],
            peaks[slice(*shown)],
            [] if promoted is None else [texts[t] for t in promoted[i].tolist() if seen[t]],
            0.0 if effects is None else float(effects.strengths[i]),
        )


def _peaks(contexts: pa.Table, texts: Sequence[str]) -> list[PeakContext]:
    """texts: of every token."""
    ids = contexts.column("token_ids").combine_chunks()
    ends, peaks = ids.offsets.to_numpy(), contexts.column("peak").to_numpy()
    before = ids.values.to_numpy()[ends[:-1] + np.maximum(peaks - 1, 0)].tolist()
    columns = (contexts.column(name).to_pylist() for name in ("text", "act", "token"))
    rows = zip(*columns, peaks.tolist(), before, np.diff(ends).tolist(), strict=True)
    return [
        PeakContext(text, act, token, texts[token_id] if peak else None, n_tokens)
        for text, act, token, peak, token_id, n_tokens in rows
    ]


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


def sae_row(
    found: SAERows, provenance: Mapping[str, Any], fingerprint: str, created_at: datetime.datetime
) -> pa.Table:
    """The row of `saes`. provenance, fingerprint: of the text. created_at: UTC."""
    indexed, sae = found.indexed, found.indexed.sae
    report = indexed.report
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
        "n_tokens_indexed": found.n_indexed,
        "n_tokens_skipped": found.n_skipped,
        "weights_hash": indexed.weights_hash,
        "cache_fingerprint": fingerprint,
        "created_at": created_at,
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
