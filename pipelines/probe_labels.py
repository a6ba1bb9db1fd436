"""A cache and its tokens' texts -> rows with labels, for k-sparse probing and feature absorption.

Labels are made of what is certain: a token's own characters, the token before it, the document it
stands in. Probes on a token's properties are fitted on some documents and scored on others; those
on documents are fitted on the first half of each document and scored on the second.
"""

import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from activation_cache import ActivationCache, LanguageModel
from sae.config import Split
from sae.evaluating.labelled import Label, LabelledRows

ROWS_OF_A_TOKEN = 8
"""Of one token, so many rows count for its first letter: " the" is not all of t."""
N_DOCUMENTS = 5
"""The largest documents are labels."""

_TOKEN_PROPERTIES: dict[str, Callable[[str], bool]] = {
    "capital": lambda text: text.strip()[:1].isupper(),
    "number": lambda text: text.strip().isdigit(),
    "punctuation": lambda text: (
        bool(text.strip()) and all(unicodedata.category(c)[0] == "P" for c in text.strip())
    ),
    "space before": lambda text: text[:1] == " ",
}


class TokenRows(NamedTuple):
    """x: [n, d_model]. token_ids, doc_ids, positions: int64 [n]. previous_ids: int64 [n], the token
    before in the document; -1 where that isn't known."""

    x: Tensor
    token_ids: Tensor
    previous_ids: Tensor
    doc_ids: Tensor
    positions: Tensor


def labels_of_model(
    lm: LanguageModel, acts: ActivationCache, hookpoint: str, n_rows: int, split: Split
) -> LabelledRows:
    """probe_labels with the texts of the model's tokens."""
    texts = lm.token_strings(range(lm.vocab_size))
    return probe_labels(acts, hookpoint, texts, n_rows, split)


def probe_labels(
    acts: ActivationCache, hookpoint: str, texts: Sequence[str], n_rows: int, split: Split
) -> LabelledRows:
    """The first n_rows rows of a split, with every label that can be made of them.

    texts: what each token of the model stands for, by id.
    """
    rows = token_rows(acts, hookpoint, n_rows, split)
    is_test = _is_test_by_document(rows.doc_ids)
    labels = [*_token_labels(rows, texts, is_test), *_first_letters(rows, texts, is_test)]
    return LabelledRows(rows.x, (*labels, *_documents(rows)))


def token_rows(acts: ActivationCache, hookpoint: str, n_rows: int, split: Split) -> TokenRows:
    """The first n_rows rows of a split in order; those of massive norm and BOS are left out."""
    parts: list[TokenRows] = []
    n_read = 0
    for part in _pieces(acts, hookpoint, split):
        parts.append(TokenRows(*(column[: n_rows - n_read] for column in part)))
        n_read += len(parts[-1].x)
        if n_read == n_rows:
            break
    if not parts:
        none = torch.zeros(0, dtype=torch.int64)
        return TokenRows(torch.zeros(0, acts.d_model(hookpoint)), none, none, none, none)
    return TokenRows(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _pieces(acts: ActivationCache, hookpoint: str, split: Split) -> Iterator[TokenRows]:
    for chunk in acts.chunks(hookpoint, split=split):
        for piece in chunk.by_document():
            kept = ~piece.is_massive
            if kept.any():
                previous = torch.cat([torch.tensor([-1]), piece.token_ids[:-1]])
                ids = (piece.token_ids, previous, piece.doc_ids, piece.positions.long())
                yield TokenRows(piece.acts[kept], *(column[kept] for column in ids))


def _token_labels(rows: TokenRows, texts: Sequence[str], is_test: Tensor) -> Iterator[Label]:
    for name, has in _TOKEN_PROPERTIES.items():
        yield Label(name, _of_tokens(texts, has)[rows.token_ids], ~is_test, is_test)
    is_known = rows.previous_ids >= 0
    ends_line = _of_tokens(texts, lambda text: text.endswith("\n"))[rows.previous_ids.clamp(min=0)]
    yield Label("after a newline", ends_line, is_known & ~is_test, is_known & is_test)


def _first_letters(rows: TokenRows, texts: Sequence[str], is_test: Tensor) -> Iterator[Label]:
    """Of tokens of ASCII letters alone, whatever their case, with or without a space before."""
    is_word = _of_tokens(texts, lambda text: text.strip().isascii() and text.strip().isalpha())
    is_used = is_word[rows.token_ids] & (_occurrence(rows.token_ids) < ROWS_OF_A_TOKEN)
    for letter in string.ascii_lowercase:
        begins = torch.tensor([text.strip()[:1].lower() == letter for text in texts])
        is_positive = begins[rows.token_ids]
        name = f"first letter {letter}"
        yield Label(name, is_positive, is_used & ~is_test, is_used & is_test, is_broad=True)


def _documents(rows: TokenRows) -> Iterator[Label]:
    """The largest documents, each against all others."""
    ids, places, counts = rows.doc_ids.unique(return_inverse=True, return_counts=True)
    is_second_half = _occurrence(rows.doc_ids) >= (counts // 2)[places]
    for place in counts.argsort(descending=True, stable=True)[:N_DOCUMENTS].tolist():
        is_here = places == place
        yield Label(f"document {int(ids[place])}", is_here, ~is_second_half, is_second_half)


def _of_tokens(texts: Sequence[str], has: Callable[[str], bool]) -> Tensor:
    """Whether each token has a property: bool [vocab]."""
    return torch.tensor([has(text) for text in texts], dtype=torch.bool)


def _occurrence(ids: Tensor) -> Tensor:
    """How often each row's id occurred before it: int64 [n]."""
    ordered, order = ids.sort(stable=True)
    _, counts = ordered.unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    occurrence = torch.empty_like(ids)
    occurrence[order] = torch.arange(len(ids)) - starts
    return occurrence


def _is_test_by_document(doc_ids: Tensor) -> Tensor:
    """Whole documents for the test, about half of the rows; of a single one, its second half."""
    ids, places, counts = doc_ids.unique(return_inverse=True, return_counts=True)
    if len(ids) < 2:
        return torch.arange(len(doc_ids)) >= len(doc_ids) // 2
    sides, sizes = torch.zeros(len(ids), dtype=torch.bool), [0, 0]
    for place in counts.argsort(descending=True, stable=True).tolist():
        side = int(sizes[1] < sizes[0])
        sides[place] = bool(side)
        sizes[side] += int(counts[place])
    return sides[places]
