"""Prose of wikitext: what is said stays, what is only markup goes."""

import pytest

from activation_cache.wikipedia import prose_of


@pytest.mark.parametrize(
    ("wikitext", "prose"),
    [
        ("'''Cats''' are [[mammal]]s.", "Cats are mammals."),
        ("They [[sleep|doze]] a lot.", "They doze a lot."),
        ('Cats<ref name="a/b" /> purr.<ref>Smith</ref> Softly.', "Cats purr. Softly."),
        ("<!-- no <ref> here -->Cats<ref>Smith</ref> purr.", "Cats purr."),
        ("Cats purr.[[File:cat.jpg|thumb|a [[cat]]]] Softly.", "Cats purr. Softly."),
        ("{{Infobox|name=Cat}}\nCats purr.", "Cats purr."),
        ("Cats purr.\n\n== References ==\n* Smith", "Cats purr."),
        ("Cats purr.\n[[Category:Cats]]", "Cats purr."),
    ],
)
def test_prose_keeps_sentences_and_drops_markup(wikitext: str, prose: str) -> None:
    assert prose_of(wikitext) == prose
