"""Labels made without a language model."""

from feature_db.labels import Evidence, PeakContext, TokenUse, family, token_label
from feature_db.token_text import words_of


def evidence(
    uses: list[tuple[str, float, float]] | None = None,
    contexts: list[PeakContext] | None = None,
    promoted: list[str] | None = None,
    strength: float = 0.0,
) -> Evidence:
    found = [TokenUse(*use) for use in uses or []]
    return Evidence(found, contexts or [], promoted or [], strength)


def peaks(*tokens: str, before: str = "") -> list[PeakContext]:
    """Contexts of one token, or two, of falling act."""
    return [
        PeakContext("", float(len(tokens) - i + 10), token, before or f" w{i}", 2)
        for i, token in enumerate(tokens)
    ]


def test_a_feature_of_one_word_is_named_after_its_forms() -> None:
    uses = [(" president", 0.5, 90.0), (" presidents", 0.2, 80.0), (" of", 0.1, 1.1)]
    assert token_label(evidence(uses), {}) == '" president", " presidents"'


def test_a_feature_of_a_few_words_lists_them() -> None:
    uses = [(" he", 0.3, 20.0), (" she", 0.2, 30.0), (" they", 0.1, 9.0), (" x", 0.01, 2.0)]
    assert token_label(evidence(uses), {}) == '" he", " she", " they"'


def test_tokens_that_are_common_everywhere_do_not_name_a_feature() -> None:
    uses = [(" the", 0.9, 0.8)]
    assert token_label(evidence(uses, peaks(" a", " b")), {}) == 'mixed: " the"'


def test_a_feature_that_peaks_on_one_word_says_so() -> None:
    found = evidence([(" of", 0.1, 2.0)], peaks(*[" treaty"] * 7, " of", " in", " to"))
    assert token_label(found, {}) == 'strongest on " treaty"'


def test_a_feature_that_follows_one_word_says_so() -> None:
    found = evidence(contexts=peaks(*"abcdef", before=" according"))
    assert token_label(found, {}) == 'after " according"'


def test_a_feature_of_a_topic_is_named_by_the_words_its_contexts_share() -> None:
    words = ["judge", "ruling", "treaty", "gate", "keys", "doors"]
    contexts = [
        PeakContext(f" the court{word} of the court on {word}", 1.0, word, word, 3)
        for word in words
    ]
    assert token_label(evidence(contexts=contexts), {"the": 0.06}) == "in text on court"
    assert token_label(evidence(contexts=contexts), {"the": 0.06, "court": 0.01}).startswith(
        "mixed"
    )


def test_promoted_words_follow_where_they_stand_out() -> None:
    found = evidence(
        [(" Barack", 0.9, 99.0)], promoted=[" Obama", "\x00", " obama", "ama"], strength=7.0
    )
    assert token_label(found, {}) == '" Barack" → " Obama", "ama"'
    assert token_label(found._replace(strength=4.0), {}) == '" Barack"'


def test_labels_hold_no_control_characters() -> None:
    assert token_label(evidence([("\n\u202e", 0.9, 9.0)]), {}) == '"↵<U+202E>"'


def test_families_join_spaces_capitals_and_plurals() -> None:
    assert family(" Keys") == family("key") == "key"
    assert family(" class") == "class"
    assert family("  ") == "  "


def test_words_follow_a_space_and_are_letters_alone() -> None:
    assert words_of("be presidential of, x a1 Élan (no) it's") == ["presidential", "élan"]
