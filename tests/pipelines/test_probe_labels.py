"""Labels made of a real cache's tokens are true of those tokens, and its rows are theirs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from activation_cache import ActivationCache, LanguageModel
from pipelines.probe_labels import ROWS_OF_A_TOKEN, _of_tokens, probe_labels, token_rows
from sae import Report
from sae.evaluating import Label
from tests.pipelines.conftest import Outcome, SmallRun

HOOKPOINT = "layers.1.resid_post"


@pytest.fixture(scope="module")
def texts(tiny_lm: LanguageModel) -> list[str]:
    return tiny_lm.token_strings(range(tiny_lm.vocab_size))


@pytest.fixture(scope="module")
def labels(tiny_cache: ActivationCache, texts: list[str]) -> dict[str, Label]:
    made = probe_labels(tiny_cache, HOOKPOINT, texts, 100_000, "train")
    assert all(len(label.is_positive) == len(made.x) for label in made.labels)
    return {label.name: label for label in made.labels}


def test_rows_are_those_of_the_split_with_their_own_tokens(tiny_cache: ActivationCache) -> None:
    for split in ("train", "heldout"):
        rows = token_rows(tiny_cache, HOOKPOINT, 100_000, split)  # type: ignore[arg-type]
        assert len(rows.x) == tiny_cache.n_rows(HOOKPOINT, split=split)
        wanted = {
            (d.doc_id, int(p)): (int(t), x)
            for d in tiny_cache.document_acts(HOOKPOINT, split=split)
            for p, t, x in zip(d.positions, d.token_ids, d.acts, strict=True)
        }
        for i in range(0, len(rows.x), 7):
            token, x = wanted[int(rows.doc_ids[i]), int(rows.positions[i])]
            assert int(rows.token_ids[i]) == token
            assert torch.equal(rows.x[i], x)
            before = wanted.get((int(rows.doc_ids[i]), int(rows.positions[i]) - 1))
            if int(rows.previous_ids[i]) >= 0:
                assert before is not None
                assert int(rows.previous_ids[i]) == before[0]
        assert int((rows.previous_ids >= 0).sum()) > len(rows.x) / 2
    assert len(token_rows(tiny_cache, HOOKPOINT, 50, "train").x) == 50


def test_labels_are_true_of_their_tokens(
    labels: dict[str, Label], tiny_cache: ActivationCache, texts: list[str]
) -> None:
    rows = token_rows(tiny_cache, HOOKPOINT, 100_000, "train")
    shown = [texts[i] for i in rows.token_ids.tolist()]

    def positives(name: str) -> list[bool]:
        return labels[name].is_positive.tolist()

    assert positives("space before") == [text.startswith(" ") for text in shown]
    assert positives("number") == [text.strip().isdigit() for text in shown]
    assert [t for t, yes in zip(shown, positives("punctuation"), strict=True) if yes]
    assert {t for t, yes in zip(shown, positives("punctuation"), strict=True) if yes} == {"."}
    assert all(
        t.strip()[0].isupper() for t, yes in zip(shown, positives("capital"), strict=True) if yes
    )
    assert any(positives("capital"))
    letter = labels["first letter t"]
    for text, yes in zip(shown, letter.is_positive.tolist(), strict=True):
        assert yes == text.strip().lower().startswith("t")


def test_letters_are_of_words_and_no_token_counts_too_often(
    labels: dict[str, Label], tiny_cache: ActivationCache, texts: list[str]
) -> None:
    rows = token_rows(tiny_cache, HOOKPOINT, 100_000, "train")
    label = labels["first letter t"]
    is_used = label.is_train | label.is_test
    assert label.is_broad
    assert not labels["capital"].is_broad
    assert all(texts[i].strip().isalpha() for i in rows.token_ids[is_used].tolist())
    assert int(rows.token_ids[is_used].bincount().max()) == ROWS_OF_A_TOKEN
    assert int(rows.token_ids.bincount().max()) > ROWS_OF_A_TOKEN


def test_token_labels_are_tested_on_other_documents(
    labels: dict[str, Label], tiny_cache: ActivationCache
) -> None:
    docs = token_rows(tiny_cache, HOOKPOINT, 100_000, "train").doc_ids
    label = labels["capital"]
    train, test = set(docs[label.is_train].tolist()), set(docs[label.is_test].tolist())
    assert train
    assert test
    assert not train & test
    assert 0.4 < float(label.is_test.double().mean()) < 0.6


def test_document_labels_are_tested_on_the_second_halves(
    labels: dict[str, Label], tiny_cache: ActivationCache
) -> None:
    rows = token_rows(tiny_cache, HOOKPOINT, 100_000, "train")
    found = [label for name, label in labels.items() if name.startswith("document ")]
    assert len(found) == 5
    for label in found:
        doc = int(label.name.split()[1])
        assert torch.equal(label.is_positive, rows.doc_ids == doc)
        here = label.is_positive
        last_train = int(rows.positions[here & label.is_train].max())
        assert last_train < int(rows.positions[here & label.is_test].min())


def test_after_a_newline_is_of_the_token_before() -> None:
    texts = ["a", "b\n", "\n", "c"]
    has: Callable[[str], bool] = lambda text: text.endswith("\n")  # noqa: E731
    found: Tensor = _of_tokens(texts, has)
    assert found.tolist() == [False, True, True, False]


def test_evaluate_probes_and_compares_seeds_from_the_command_line(
    small_run: SmallRun, saebase: Callable[..., Outcome], tmp_path: object
) -> None:
    before = (small_run.sae / "report.json").read_text()
    try:
        done = saebase(
            "evaluate", small_run.sae, "--acts", small_run.acts, "--no-with-model",
            "--n-probe-rows", 500,
        )  # fmt: skip
        assert done.status != 0
        assert "needs the model's tokenizer" in done.err
        done = saebase(
            "evaluate", small_run.sae, "--acts", small_run.acts, "--n-probe-rows", 2000,
            "--split", "train", "--batch-size", 64, "--other-seeds", small_run.sae,
        )  # fmt: skip
        assert done.status == 0, done.err
        report = Report.read(small_run.sae / "report.json")
        assert report.probing is not None
        assert {"space before", "capital"} <= {each.name for each in report.probing.labels}
        assert report.probing.features["5"].accuracy > 0.6
        assert report.stability is not None
        assert report.stability.matched_fraction == 1
        assert "k-sparse probing, means over" in done.out
        assert "beside 1 of other seeds: 100.0%" in done.out
    finally:
        (small_run.sae / "report.json").write_text(before)
