"""Neuronpedia's files: its columns, filled with what the database says."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from feature_db import (
    ExportError,
    FeatureDB,
    FeatureSet,
    NeuronpediaNames,
    build_index,
)
from feature_db.exchange import neuronpedia as module
from feature_db.exchange.neuronpedia_names import source_names
from tests.feature_db.conftest import World, small_config

from .conftest import HOSTILE

# Columns of Activation in Neuronpedia's database, less those for attention heads and relations.
ACTIVATION = {
    *("id", "tokens", "dataIndex", "index", "layer", "modelId", "dataSource", "maxValue"),
    *("maxValueTokenIndex", "minValue", "values", "dfaValues", "dfaTargetIndex", "dfaMaxValue"),
    *("creatorId", "createdAt", "lossValues", "logitContributions", "binMin", "binMax"),
    *("binContains", "qualifyingTokenIndex"),
}


def lines(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def place(db: FeatureDB, tmp_path: Path) -> Path:
    return db.export(tmp_path / "out", "neuronpedia") / "tiny-0" / "1-resid_post-48"


def test_the_layout_is_the_importer_s(place: Path) -> None:
    assert {p.name for p in place.iterdir() if p.is_file()} == {
        *("release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl")
    }
    for kind in ("features", "activations", "explanations"):
        assert [p.name for p in (place / kind).iterdir()] == ["batch-0.jsonl.gz"]


def test_descriptions_name_each_other(place: Path) -> None:
    one = {name: lines(place / f"{name}.jsonl") for name in ("release", "model", "sourceset")}
    ((release,), (model,), (sourceset,)) = one.values()
    (source,) = lines(place / "source.jsonl")
    assert sourceset["releaseName"] == release["name"]
    assert sourceset["modelId"] == source["modelId"] == model["id"] == place.parent.name
    assert source["setName"] == sourceset["name"]
    assert source["id"] == place.name
    assert {"layers", "neuronsPerLayer", "owner"} <= set(model)
    for line in (release, model, sourceset, source):
        assert line["createdAt"].endswith("Z")
        assert line["creatorId"]


def test_a_feature_s_line_says_what_its_page_says(db: FeatureDB, place: Path) -> None:
    found = lines(place / "features" / "batch-0.jsonl.gz")
    assert [line["index"] for line in found] == [str(i) for i in range(48)]
    for line in (found[3], found[7]):
        page = db.feature(int(line["index"]))
        assert line["layer"] == place.name
        assert line["maxActApprox"] == page.max_act
        assert line["frac_nonzero"] == page.density
        assert line["pos_str"] == [t.token for t in page.promoted]
        assert line["pos_values"] == sorted(line["pos_values"], reverse=True)
        assert line["neg_str"] == [t.token for t in page.suppressed]
        assert line["neg_values"] == sorted(line["neg_values"])
        assert line["freq_hist_data_bar_heights"] == [b.n for b in page.histogram]
        assert line["freq_hist_data_bar_values"] == [(b.lo + b.hi) / 2 for b in page.histogram]
        assert line["topkCosSimIndices"] == [n.feature_id for n in page.neighbors]
    assert (found[47]["maxActApprox"], found[47]["frac_nonzero"]) == (0, 0)


def activations_of(place: Path, feature_id: int) -> Iterator[dict[str, Any]]:
    for line in lines(place / "activations" / "batch-0.jsonl.gz"):
        if line["index"] == str(feature_id):
            yield line


def test_contexts_become_activations(db: FeatureDB, place: Path) -> None:
    page = db.feature(3)
    found = list(activations_of(place, 3))
    contexts = sorted([*page.top, *page.quantiles], key=lambda c: (c.kind != "top", c.rank))
    assert [line["tokens"] for line in found] == [list(c.tokens) for c in contexts]
    for line, context in zip(found, contexts, strict=True):
        assert set(line) == ACTIVATION
        assert line["values"] == list(context.acts)
        assert line["maxValue"] == max(context.acts)
        assert line["values"][line["maxValueTokenIndex"]] == line["maxValue"]
        assert line["minValue"] == min(context.acts)
        assert line["qualifyingTokenIndex"] == context.peak
        if context.kind == "top":
            assert (line["binMin"], line["binMax"]) == (-1, page.max_act)
        else:
            assert line["binMin"] <= context.act <= line["binMax"] * (1 + 1e-6)


def test_the_parts_of_all_acts_hold_all_tokens(
    db: FeatureDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = f"""
    WITH {module.CHOSEN}, shares AS ({module._SHARES})
    SELECT feature_id, list(share ORDER BY part) FROM shares GROUP BY ALL"""
    ids = [i for (i,) in db.sql("SELECT feature_id FROM features WHERE NOT is_dead")]
    found = db.sql(sql, [[0] * len(ids), ids]).fetchall()
    assert len(found) == len(ids)
    for feature_id, shares in found:
        page = db.feature(feature_id)
        assert len(shares) == 5
        assert sum(shares) == pytest.approx(1)
        assert 1 - page.density <= shares[0] + 1e-9
        assert all(share >= 0 for share in shares)


def test_ids_are_unique_and_the_same_each_time(db: FeatureDB, tmp_path: Path, place: Path) -> None:
    again = db.export(tmp_path / "again", "neuronpedia") / "tiny-0" / "1-resid_post-48"
    for kind in ("features", "activations", "explanations"):
        name = Path(kind) / "batch-0.jsonl.gz"
        assert (again / name).read_bytes() == (place / name).read_bytes()
    ids = [line["id"] for line in lines(place / "activations" / "batch-0.jsonl.gz")]
    assert len(set(ids)) == len(ids) > 100


def test_labels_become_explanations(hostile: FeatureDB, tmp_path: Path) -> None:
    out = hostile.export(tmp_path / "out", "neuronpedia")
    (file,) = out.rglob("explanations/*.gz")
    said = {line["index"]: (line["description"], line["notes"]) for line in lines(file)}
    for feature_id, label in HOSTILE.items():
        assert said[str(feature_id)] == (label, "human")


def test_names_that_are_hostile_make_no_paths(hostile: FeatureDB, tmp_path: Path) -> None:
    out = hostile.export(tmp_path / "out", "neuronpedia")
    for path in out.rglob("*"):
        assert set(path.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-."), path


def test_batches_hold_so_many_features(
    some: FeatureSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 2)
    out = some.export(tmp_path / "out", "neuronpedia")
    files = sorted(out.rglob("features/*.gz"))
    assert [[line["index"] for line in lines(file)] for file in files] == [["7", "3"], ["11"]]


def test_two_saes_of_one_name_are_refused(world: World, tmp_path: Path) -> None:
    path = build_index(
        world.lm,
        [world.sae, world.other],
        world.cache,
        out=tmp_path / "two.duckdb",
        config=small_config(),
    )
    with FeatureDB.open(path) as db:
        out = db.export(tmp_path / "both", "neuronpedia")
        assert {p.name for p in (out / "tiny-0").iterdir()} == {
            "1-resid_post-48",
            "1-resid_post-20",
        }
        same = NeuronpediaNames(source_set="mine")
        with pytest.raises(ExportError, match="would both be tiny-0/1-mine"):
            db.export(tmp_path / "same", "neuronpedia", neuronpedia=same)
        db.export(tmp_path / "one", "neuronpedia", features=[(1, 3)], neuronpedia=same)


def test_a_place_without_a_layer_needs_one() -> None:
    sae = {"sae_id": 0, "hookpoint": "embed", "name": "embed-16", "model": "org/My.Model"}
    with pytest.raises(ExportError, match="--layer"):
        source_names(sae, NeuronpediaNames())
    found = source_names(sae, NeuronpediaNames(layer=0))
    assert found == ("my-model", "embed-16", "0-embed-16")
    with pytest.raises(ValidationError):
        NeuronpediaNames(model_id="../../etc")


def test_names_are_for_this_format_alone(db: FeatureDB, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not for csv"):
        db.export(tmp_path / "a.csv", "csv", neuronpedia=NeuronpediaNames())
