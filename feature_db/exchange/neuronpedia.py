"""The files that Neuronpedia imports: {model}/{source}/ with features, activations, explanations.

The layout and the names are those of neuronpedia-utils (export-data.py, and the converter of
Llama Scope 2; read in November 2026). A source is `{layer}-{set}`; where a hookpoint has no layer,
its name stands for it. Figures have four decimals, as theirs. What we don't have stays empty:
alignment with neurons, correlated neurons and features, histograms of logits, decoder weights.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..database import FeatureDB
    from ..feature import Context, Feature

_AT_ONCE = 1024
_DECIMALS = 4
_EMPTY = (
    "vector",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)

Row = dict[str, Any]


def write_neuronpedia(
    db: "FeatureDB",
    folder: Path,
    ids: Sequence[tuple[int, int]],
    on_exported: Callable[[int, int], None],
) -> None:
    """A source for each SAE, in batches of 1,024 features."""
    done = 0
    for sae in db.saes().arrow().to_pylist():
        mine = [pair for pair in ids if pair[0] == sae["sae_id"]]
        if not mine:
            continue
        source = _Source(sae)
        home = folder / source.model / source.name
        for name, row in source.about():
            _write(home / f"{name}.jsonl", [row])
        for batch, first in enumerate(range(0, len(mine), _AT_ONCE)):
            some = mine[first : first + _AT_ONCE]
            pages = list(db.pages(some))
            for name, rows in (
                ("features", [source.feature(page) for page in pages]),
                ("activations", [row for page in pages for row in source.activations(page)]),
                ("explanations", [row for page in pages for row in source.explanations(page)]),
            ):
                _write(home / name / f"batch-{batch}.jsonl.gz", rows)
            done += len(some)
            on_exported(done, len(ids))


class _Source:
    """One SAE in Neuronpedia's words."""

    def __init__(self, sae: Row) -> None:
        hookpoint = str(sae["hookpoint"])
        layer = re.search(r"layers\.(\d+)\.(.+)", hookpoint)
        self.model = _identifier(sae["model"])
        self.set = _identifier(f"{layer[2] if layer else hookpoint}-{sae['name']}")
        self.name = f"{layer[1] if layer else _identifier(hookpoint)}-{self.set}"
        self.hookpoint, self._created_at = hookpoint, datetime.now(UTC).isoformat()
        self._sae = sae

    def about(self) -> Iterator[tuple[str, Row]]:
        """(file, its row): release, model, sourceset, source."""
        made = {"createdAt": self._created_at, "creatorName": "saebase"}
        release = f"saebase-{self.set}"
        title = f"{self._sae['name']}: {self._sae['architecture']}, {self._sae['d_sae']} features"
        yield (
            "release",
            {"name": release, "description": title, "descriptionShort": title, "urls": [], **made},
        )
        names = {"displayName": self._sae["model"], "displayNameShort": self._sae["model"]}
        yield "model", {"id": self.model, **names, "instruct": False, **made}
        described = {"description": title, "releaseName": release, "visibility": "PUBLIC"}
        yield "sourceset", {"modelId": self.model, "name": self.set, **described, **made}
        yield (
            "source",
            {
                "id": self.name,
                "modelId": self.model,
                "setName": self.set,
                "visibility": "PUBLIC",
                "dataset": "",
                "num_prompts": None,
                "num_tokens_in_prompt": None,
                "hfRepoId": None,
                "hfFolderId": None,
            },
        )

    def feature(self, page: "Feature") -> Row:
        """A row of features/."""
        return {
            **self._keys(page),
            "createdAt": self._created_at,
            "maxActApprox": _short(page.max_act or 0.0),
            "frac_nonzero": page.density,
            "hasVector": False,
            "vectorLabel": None,
            "hookName": self.hookpoint,
            "sourceSetName": self.set,
            "topkCosSimIndices": [near.feature_id for near in page.neighbors],
            "topkCosSimValues": [_short(near.cosine) for near in page.neighbors],
            "pos_str": [token.token for token in page.promoted],
            "pos_values": [_short(token.logit) for token in page.promoted],
            "neg_str": [token.token for token in page.suppressed],
            "neg_values": [_short(token.logit) for token in page.suppressed],
            "freq_hist_data_bar_values": [_short((b.lo + b.hi) / 2) for b in page.histogram],
            "freq_hist_data_bar_heights": [b.n for b in page.histogram],
            **{name: [] for name in _EMPTY},
        }

    def activations(self, page: "Feature") -> Iterator[Row]:
        """Rows of activations/: the strongest contexts, then those by quantile."""
        for kind, contexts in (("top", page.top), ("quantile", page.quantiles)):
            for context in contexts:
                yield self._activation(page, context, f"{kind}-{context.rank}")

    def explanations(self, page: "Feature") -> Iterator[Row]:
        """Rows of explanations/: the label that is shown."""
        if page.label:
            yield {
                "id": f"{self.name}-{page.feature_id}-label",
                **self._keys(page),
                "description": page.label,
                "typeName": page.label_method,
                "explanationModelName": None,
                "createdAt": self._created_at,
            }

    def _activation(self, page: "Feature", context: "Context", name: str) -> Row:
        return {
            "id": f"{self.name}-{page.feature_id}-{name}",
            **self._keys(page),
            "createdAt": self._created_at,
            "tokens": list(context.tokens),
            "values": [_short(act) for act in context.acts],
            "maxValue": _short(max(context.acts)),
            "maxValueTokenIndex": max(range(len(context.acts)), key=context.acts.__getitem__),
            "minValue": _short(min(context.acts)),
            "qualifyingTokenIndex": context.peak,
            "dataIndex": str(context.doc_id),
            "dataSource": None,
            "binMin": None,
            "binMax": None,
            "binContains": None,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
        }

    def _keys(self, page: "Feature") -> Row:
        return {"modelId": self.model, "layer": self.name, "index": str(page.feature_id)}


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _identifier(name: str) -> str:
    """Letters, digits, dots and dashes of a name, the last part of a path."""
    return (
        re.sub(r"[^a-z0-9.]+", "-", str(name).rstrip("/").split("/")[-1].lower()).strip("-.") or "x"
    )


def _short(value: float) -> float:
    return round(float(value), _DECIMALS)
