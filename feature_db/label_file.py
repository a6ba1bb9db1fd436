"""A JSONL file of labels -> labels, every line checked before the first is used.

{"feature_id": 4021, "label": "plural subjects"}
{"sae_id": 1, "feature_id": 7, "label": "court rulings", "method": "my-tool"}
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import LabelError
from .explanations import HUMAN, LLM, OFFLINE, FeatureLabel, label_text


class LabelRow(NamedTuple):
    """One line of a file. sae_id: None where the database holds one SAE. line: from 1."""

    line: int
    sae_id: int | None
    feature_id: int
    text: str
    method: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    feature_id: int = Field(ge=0)
    label: str
    sae_id: int | None = Field(default=None, ge=0)
    method: str = Field(default=HUMAN, min_length=1, max_length=40)


def read_label_file(path: str | Path) -> list[LabelRow]:
    """All labels of a file; empty lines are passed over.

    Raises: LabelError that names the line for what is no label, one feature labelled twice by one
        method, or a method that is saebase's own.
    """
    rows = list[LabelRow]()
    lines: dict[tuple[int | None, int, str], int] = {}
    for number, line in _lines(Path(path)):
        row = _row(Path(path), number, line)
        first = lines.setdefault((row.sae_id, row.feature_id, row.method), number)
        if first != number:
            raise LabelError(
                f"{path}, line {number}: feature {row.feature_id} has a label in line {first} "
                "already: give it one"
            )
        rows.append(row)
    if not rows:
        raise LabelError(f"{path} holds no labels: expected lines such as {_EXAMPLE}")
    return rows


_EXAMPLE = '{"feature_id": 4021, "label": "plural subjects"}'


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LabelError(f"can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise LabelError(f"{path} is not UTF-8 text: byte {error.start} isn't") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _row(path: Path, number: int, line: str) -> LabelRow:
    try:
        found = _Line.model_validate(json.loads(line))
        text = label_text(found.label)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the line"
        raise LabelError(
            f"{path}, line {number}: {place}: {first['msg'].lower()}; expected {_EXAMPLE}"
        ) from None
    except ValueError as error:
        raise LabelError(f"{path}, line {number}: {error}; expected {_EXAMPLE}") from None
    if found.method in (LLM, OFFLINE):
        raise LabelError(
            f"{path}, line {number}: method {found.method!r} is given by saebase alone: leave it "
            "out for labels by a person, or name it after what made them"
        )
    return LabelRow(number, found.sae_id, found.feature_id, text, found.method)


def label_of(row: LabelRow, sizes: Mapping[int, int], path: Path | str) -> FeatureLabel:
    """A line's label with its SAE. sizes: features of each SAE. Raises: LabelError."""
    sae_id = next(iter(sizes)) if row.sae_id is None and len(sizes) == 1 else row.sae_id
    if sae_id is None or sae_id not in sizes:
        held = ", ".join(map(str, sizes))
        raise LabelError(f"line {row.line}: sae_id={sae_id}, and {path} holds SAEs {held}: say one")
    if row.feature_id >= sizes[sae_id]:
        raise LabelError(
            f"line {row.line}: no feature {row.feature_id} in SAE {sae_id} of {path}: expected 0 "
            f"to {sizes[sae_id] - 1}"
        )
    return FeatureLabel(sae_id, row.feature_id, row.text, row.method)
