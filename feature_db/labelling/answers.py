"""What a language model answered -> an explanation or judgements; whatever isn't one is refused.

Strict JSON is asked for. What is taken beside it: thoughts before it, a fence around it, words
before and after it, a bare list of judgements, and `explanation: ...` on a line of its own.
Nothing is guessed: an answer of the wrong length or of other values is malformed.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from ..explanations import MAX_LABEL_CHARACTERS

_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_EXPLANATION_LINE = re.compile(r"^\W*explanation\W*:[\s*_]*(\S.*)$", re.IGNORECASE | re.MULTILINE)
_DECODER = json.JSONDecoder()


class MalformedAnswerError(ValueError):
    """An answer that can't be read; the message says why, to the model too."""


def read_explanation(answer: str) -> str:
    """The explanation in an answer, on one line.

    Raises: MalformedAnswerError for none, an empty one or more than 1,000 characters.
    """
    text = _without_thoughts(answer)
    found = [each["explanation"] for each in _values(text) if _has(each, "explanation")]
    if not found and "{" not in text:  # one that breaks off in its JSON is cut short
        found = _EXPLANATION_LINE.findall(text)
    if not found or not isinstance(found[-1], str):
        raise MalformedAnswerError('it holds no JSON object {"explanation": "..."}')
    line = " ".join(found[-1].split())
    if not line or len(line) > MAX_LABEL_CHARACTERS:
        raise MalformedAnswerError(
            f"the explanation has {len(line)} characters: expected 1 to {MAX_LABEL_CHARACTERS}"
        )
    return line


def read_judgements(answer: str, n: int) -> list[bool]:
    """The n judgements in an answer.

    Raises: MalformedAnswerError for another number of them, or values that are not 0 or 1.
    """
    values = list(_values(_without_thoughts(answer)))
    found = [each["answers"] for each in values if _has(each, "answers")]
    found = found or [each for each in values if isinstance(each, list)]
    if not found or not isinstance(found[-1], list):
        raise MalformedAnswerError('it holds no JSON object {"answers": [...]}')
    judgements = found[-1]
    if any(type(each) not in (int, bool) or each not in (0, 1) for each in judgements):
        raise MalformedAnswerError("its answers are not all 0 or 1")
    if len(judgements) != n:
        raise MalformedAnswerError(f"it has {len(judgements)} answers for {n} passages")
    return [bool(each) for each in judgements]


def explanation_schema() -> dict[str, Any]:
    """JSON schema of an explanation, for servers that hold answers to one."""
    return _object("explanation", {"type": "string"})


def judgements_schema(n: int) -> dict[str, Any]:
    """JSON schema of n judgements."""
    bit = {"type": "integer", "enum": [0, 1]}
    return _object("answers", {"type": "array", "items": bit, "minItems": n, "maxItems": n})


def _object(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: schema},
        "required": [name],
        "additionalProperties": False,
    }


def _without_thoughts(answer: str) -> str:
    """An answer without what stands in <think>; one that never ends its thoughts is all thought."""
    text = _THOUGHTS.sub("", answer)
    return text.partition("<think")[0]


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and key in value


def _values(text: str) -> Iterator[Any]:
    """Every outermost JSON object and list in a text, in order."""
    at = 0
    while (start := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            value, at = _DECODER.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            at = start.end()
        else:
            yield value
