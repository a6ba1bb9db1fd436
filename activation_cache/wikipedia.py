"""The demo's text: about a hundred articles of English Wikipedia, as prose.

In: the dump slice that the `gensim` wheel carries among its test data (CC BY-SA 3.0, the articles'
authors). Out: (title, prose). Templates, tables, references and link markup go; mwparserfromhell
reads the wikitext.
"""

import bz2
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from .errors import CorpusError

_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NOT_PROSE = re.compile(
    r"^\s*(thumb|left|right|upright|frame|\d+px|Category:|File:|Image:|\{\||\||!|[*#:;]).*$", re.M
)
PROSE_VERSION = 2
"""Raised when `prose_of` makes another text of the same article: a part of the text's revision."""
_FOOTNOTE = re.compile(r"<!--.*?-->|<ref[^<>]*/>|<ref[^<>]*>.*?</ref>", re.S | re.I)
_NOT_TEXT_LINK = re.compile(r"\s*(File|Image|Category):", re.I)
_LAST_SECTIONS = re.compile(r"^\s*(See also|References|Notes|External links|Further reading)\s*$")


def demo_articles_file() -> Path:
    """The dump slice inside the gensim package. Raises: CorpusError where it isn't installed."""
    spec = importlib.util.find_spec("gensim")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    file = folder / "test" / "test_data" / _FILE
    if not spec or not file.is_file():
        raise CorpusError(
            "data 'demo' lives in the package gensim, which is not installed: "
            "pip install --no-deps gensim"
        )
    return file


def demo_articles() -> Iterator[tuple[str, str]]:
    """(title, prose) of each article of the slice, redirects and near-empty pages left out."""
    with bz2.open(demo_articles_file()) as dump:
        for _, page in ElementTree.iterparse(dump):
            if not page.tag.endswith("}page"):
                continue
            wikitext = page.findtext("{*}revision/{*}text") or ""
            is_article = page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None
            title = page.findtext("{*}title") or ""
            page.clear()
            if is_article and len(prose := prose_of(wikitext)) > 1_000:
                yield title, prose


def prose_of(wikitext: str) -> str:
    """The running text of an article up to its references. Raises: CorpusError without a parser."""
    try:
        import mwparserfromhell
    except ImportError as error:
        raise CorpusError(
            "data 'demo' is wikitext and needs a parser: pip install mwparserfromhell"
        ) from error
    code = mwparserfromhell.parse(_FOOTNOTE.sub("", wikitext))
    for link in code.filter_wikilinks(recursive=False):
        if _NOT_TEXT_LINK.match(str(link.title)):
            code.remove(link)  # captions would stand in the middle of sentences
    text = str(code.strip_code())
    lines: list[str] = []
    for line in _NOT_PROSE.sub("", text).splitlines():
        if _LAST_SECTIONS.match(line):
            break
        lines.append(line.strip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
