"""Neuronpedia's layout: files that its importer reads into an instance of one's own.

    {model}/{source}/{release,model,sourceset,source}.jsonl
    {model}/{source}/{features,activations,explanations}/batch-{n}.jsonl.gz

Field names are those of its database, column by column: docs/exchange.md says what is in each, what
stays empty, and which version of it this follows. DuckDB makes the lines.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import ExportError
from .chosen import CHOSEN, SPELLED, Block, Chosen
from .destination import new_folder, opened, write_manifest
from .neuronpedia_names import NeuronpediaNames, SourceNames, source_names
from .parquet_folder import manifest

_BATCH = 1024
# Parts of equal width of a feature's acts, from 0 to its maximum, as in SAEDashboard.
_N_PARTS = 5
# Prisma takes a time only in this form.
_TIME = "strftime(saes.created_at, '%Y-%m-%dT%H:%M:%S.%gZ')"


def write_neuronpedia(chosen: Chosen, out: Path, overwrite: bool, names: NeuronpediaNames) -> None:
    """A folder for every SAE. Raises: ExportError if two would have one name there."""
    saes = {row["sae_id"]: row for row in chosen.db.sql(_SAES).arrow().to_pylist()}
    sources = {sae_id: source_names(saes[sae_id], names) for sae_id in chosen.sae_ids}
    _require_distinct(sources)
    with new_folder(out, overwrite=overwrite) as folder:
        n_done = 0
        for sae_id, source in sources.items():
            place = folder / source.model_id / source.source_id
            for kind in _BATCHES:
                (place / kind).mkdir(parents=True)
            _write_descriptions(place, saes[sae_id], source, names)
            of_sae = chosen.of_sae(sae_id)
            for i, block in enumerate(of_sae.blocks(_BATCH)):
                _write_batch(of_sae, block, place, i, source, names.creator_id)
                chosen.tell(n_done + block.n_after)
            n_done += len(of_sae.ids)
        paths = [f"{source.model_id}/{source.source_id}" for source in sources.values()]
        write_manifest(folder, manifest(chosen, "neuronpedia", sources=paths))


def _require_distinct(sources: dict[int, SourceNames]) -> None:
    first: dict[SourceNames, int] = {}
    for sae_id, source in sources.items():
        if source in first:
            raise ExportError(
                f"SAEs {first[source]} and {sae_id} would both be {source.model_id}/"
                f"{source.source_id} in Neuronpedia: export them one by one (--sae-id), each with "
                "a --source-set of its own"
            )
        first[source] = sae_id


def _write_descriptions(
    place: Path, sae: dict[str, Any], source: SourceNames, names: NeuronpediaNames
) -> None:
    """release, model, sourceset and source: one line each."""
    about = f"{sae['architecture']} of {sae['d_sae']} features at {sae['hookpoint']}"
    common = {"creatorId": names.creator_id, "createdAt": sae["created"], "visibility": "PUBLIC"}
    lines = {
        "release": _release(f"{names.creator}: {about} of {sae['model']}", names),
        "model": _model(source, sae["created"]),
        "sourceset": {
            "modelId": source.model_id,
            "name": source.source_set,
            "description": about,
            "creatorName": names.creator,
            "releaseName": names.release,
            "urls": [],
        },
        "source": {
            "id": source.source_id,
            "modelId": source.model_id,
            "setName": source.source_set,
            "notes": f"{sae['n_tokens_indexed']} tokens indexed; weights {sae['weights_hash']}",
        },
    }
    for name, line in lines.items():
        with opened(place / f"{name}.jsonl") as file:
            file.write(f"{json.dumps(line | common, ensure_ascii=False)}\n".encode())


def _release(description: str, names: NeuronpediaNames) -> dict[str, Any]:
    return {
        "name": names.release,
        "description": description,
        "descriptionShort": names.release,
        "creatorName": names.creator,
        "creatorNameShort": names.creator,
        "urls": [],
    }


def _model(source: SourceNames, created: str) -> dict[str, Any]:
    return {
        "id": source.model_id,
        "displayName": source.model_id,
        "displayNameShort": source.model_id,
        "owner": "",
        "instruct": False,
        "layers": 0,
        "neuronsPerLayer": 0,
        "updatedAt": created,
    }


def _write_batch(
    chosen: Chosen, block: Block, place: Path, i: int, source: SourceNames, creator_id: str
) -> None:
    named = [source.model_id, source.source_id, source.source_set, creator_id]
    for kind, sql in _BATCHES.items():
        lines = [row[0] for row in chosen.ask(sql, block, *named)]
        if not lines:
            continue  # the importer reads the columns off a file's first line
        with opened(place / kind / f"batch-{i}.jsonl.gz", is_compressed=True) as file:
            for line in lines:
                file.write(f"{line}\n".encode())


def _line(fields: dict[str, str]) -> str:
    """SQL of one line of JSON. fields: name -> SQL of its value."""
    values = ", ".join(f"'{name}': {sql}" for name, sql in fields.items())
    return f"to_json({{{values}}})::VARCHAR"


def _effects(sign: int) -> str:
    return f"""(
    SELECT sae_id, feature_id, list(token ORDER BY rank) AS tokens,
        list(logit ORDER BY rank) AS logits
    FROM feature_logits SEMI JOIN chosen USING (sae_id, feature_id)
    WHERE sign = {sign} GROUP BY ALL
)"""


_SAES = f"SELECT *, {_TIME} AS created FROM saes"
# The parameters are those of `CHOSEN`, then these.
_COMMON = f"""{CHOSEN}, named AS (
    SELECT $3 AS model_id, $4 AS source_id, $5 AS source_set, $6 AS creator_id
)"""
_NAMED = {
    "modelId": "named.model_id",
    "layer": "named.source_id",
    "index": "feature_id::VARCHAR",
}
_EMPTY = "[]::DOUBLE[]"
_NEURON = {
    **_NAMED,
    "sourceSetName": "named.source_set",
    "creatorId": "named.creator_id",
    "createdAt": _TIME,
    "maxActApprox": "coalesce(max_act, 0)",
    "hasVector": "false",
    "vector": _EMPTY,
    "vectorLabel": "NULL",
    "hookName": "NULL",
    "topkCosSimIndices": "coalesce(near.ids, [])",
    "topkCosSimValues": "coalesce(near.cosines, [])",
    "neuron_alignment_indices": _EMPTY,
    "neuron_alignment_values": _EMPTY,
    "neuron_alignment_l1": _EMPTY,
    "correlated_neurons_indices": _EMPTY,
    "correlated_neurons_pearson": _EMPTY,
    "correlated_neurons_l1": _EMPTY,
    "correlated_features_indices": _EMPTY,
    "correlated_features_pearson": _EMPTY,
    "correlated_features_l1": _EMPTY,
    "neg_str": "coalesce(down.tokens, [])",
    "neg_values": "coalesce(down.logits, [])",
    "pos_str": "coalesce(up.tokens, [])",
    "pos_values": "coalesce(up.logits, [])",
    "frac_nonzero": "density",
    "freq_hist_data_bar_heights": "coalesce(bars.heights, [])",
    "freq_hist_data_bar_values": "coalesce(bars.middles, [])",
    "logits_hist_data_bar_heights": _EMPTY,
    "logits_hist_data_bar_values": _EMPTY,
    "decoder_weights_dist": _EMPTY,
}
_FEATURES = f"""
WITH {_COMMON}
SELECT {_line(_NEURON)}
FROM chosen JOIN features USING (sae_id, feature_id) JOIN saes USING (sae_id) CROSS JOIN named
LEFT JOIN {_effects(1)} AS up USING (sae_id, feature_id)
LEFT JOIN {_effects(-1)} AS down USING (sae_id, feature_id)
LEFT JOIN (
    SELECT sae_id, feature_id, list(neighbor_id ORDER BY rank) AS ids,
        list(cosine ORDER BY rank) AS cosines
    FROM neighbors SEMI JOIN chosen USING (sae_id, feature_id) WHERE isfinite(cosine) GROUP BY ALL
) AS near USING (sae_id, feature_id)
LEFT JOIN (
    SELECT sae_id, feature_id, list(n ORDER BY bin) AS heights,
        list((lo + hi) / 2 ORDER BY bin) AS middles
    FROM feature_histogram SEMI JOIN chosen USING (sae_id, feature_id) GROUP BY ALL
) AS bars USING (sae_id, feature_id)
ORDER BY place
"""

_IS_TOP = "kind = 'top'"
_ACTIVATION = {
    "id": "'c' || md5(concat_ws('/', weights_hash, feature_id, kind, rank))[:24]",
    **_NAMED,
    "creatorId": "named.creator_id",
    "createdAt": _TIME,
    "tokens": "tokens",
    "values": "acts",
    "maxValue": "list_max(acts)",
    "maxValueTokenIndex": "list_position(acts, list_max(acts)) - 1",
    "minValue": "list_min(acts)",
    "dataIndex": "NULL",
    "dataSource": "NULL",
    "dfaValues": _EMPTY,
    "dfaTargetIndex": "NULL",
    "dfaMaxValue": "NULL",
    "lossValues": _EMPTY,
    "logitContributions": "NULL",
    "binMin": f"CASE WHEN {_IS_TOP} THEN -1 ELSE part * max_act / {_N_PARTS} END",
    "binMax": f"CASE WHEN {_IS_TOP} THEN max_act ELSE (part + 1) * max_act / {_N_PARTS} END",
    "binContains": f"CASE WHEN {_IS_TOP} THEN -1 ELSE coalesce(share, 0) END",
    "qualifyingTokenIndex": "peak",
}
# Of each part: the share of the indexed tokens whose act lies in it, from the histogram; the lowest
# holds all tokens on which the feature is silent.
_SHARES = f"""
    SELECT sae_id, feature_id, part,
        sum(n * greatest(least(top, (part + 1) * step) - greatest(lo, part * step), 0)
            / (top - lo)) / any_value(n_tokens_indexed)
        + CASE part WHEN 0 THEN 1 - any_value(density) ELSE 0 END AS share
    FROM (
        SELECT *, greatest(least(hi, max_act), lo + (hi - lo) / 1e6) AS top,
            max_act / {_N_PARTS} AS step
        FROM feature_histogram SEMI JOIN chosen USING (sae_id, feature_id)
        JOIN features USING (sae_id, feature_id) JOIN saes USING (sae_id)
    ), unnest(range({_N_PARTS})) AS i(part) GROUP BY sae_id, feature_id, part
"""
_ACTIVATIONS = f"""
WITH {_COMMON}, {SPELLED}, shares AS ({_SHARES}), placed AS (
    SELECT spelled.*, place, max_act,
        least(floor(act / max_act * {_N_PARTS}), {_N_PARTS} - 1)::BIGINT AS part
    FROM spelled JOIN chosen USING (sae_id, feature_id)
    JOIN features USING (sae_id, feature_id)
    WHERE kind <> 'negative'
)
SELECT {_line(_ACTIVATION)}
FROM placed JOIN saes USING (sae_id) CROSS JOIN named
LEFT JOIN shares USING (sae_id, feature_id, part)
ORDER BY place, kind DESC, rank
"""

_EXPLANATION = {
    "id": "'c' || md5(concat_ws('/', weights_hash, feature_id, 'explanation', label))[:24]",
    **_NAMED,
    "authorId": "named.creator_id",
    "description": "label",
    "typeName": "NULL",
    "explanationModelName": "NULL",
    "notes": "label_method",
    "createdAt": _TIME,
}
_EXPLANATIONS = f"""
WITH {_COMMON}
SELECT {_line(_EXPLANATION)}
FROM chosen JOIN features USING (sae_id, feature_id) JOIN saes USING (sae_id) CROSS JOIN named
WHERE label IS NOT NULL ORDER BY place
"""
_BATCHES = {"features": _FEATURES, "activations": _ACTIVATIONS, "explanations": _EXPLANATIONS}
