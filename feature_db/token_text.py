"""Token text: made safe to show, and read as words.

Token text is hostile: it may hold control characters that drive a terminal, characters that turn
the writing direction, or markup. Everything shown to a person goes through `visible` first.
"""

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from activation_cache import LanguageModel

_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥"}
_WORD = re.compile(r"(?<= )[^\W\d_]{3,}(?!\w)")
# Cc control, Cf format (all bidirectional marks), Zl and Zp line breaks, Cs, Co and Cn: no glyph.
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}


def visible(text: str) -> str:
    """`text` with whitespace that moves as a sign and with unsafe characters as their code point.

    A newline becomes ↵, a tab ⇥, a right-to-left override <U+202E>. What is returned holds no
    control, format or bidirectional character; it may hold markup: escape it for HTML.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible_character(c) for c in text)


def quoted(token: str) -> str:
    """A token in double quotes, so that its spaces show: `" president"`."""
    return f'"{visible(token)}"'


def vocabulary(lm: "LanguageModel") -> list[str]:
    """The text of every token of the model, by token id."""
    return lm.token_strings(range(lm.vocab_size))


def words_of(text: str) -> list[str]:
    """The words in a text that follow a space, three letters or more, in lower case."""
    return _WORD.findall(text.casefold())


def _visible_character(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    if unicodedata.category(character) in _UNSAFE_CATEGORIES:
        return f"<U+{ord(character):04X}>"
    return character
