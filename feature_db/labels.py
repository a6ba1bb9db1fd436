"""Labels without a language model, from what the index already knows. Deterministic.

A label says first what a feature fires on, then, where that is plain, what it promotes. The first
of these that holds is taken; a *family* is a word with its spaces, capitals and plural.

1. One family carries at least half of the feature's whole activation: its tokens, strongest first.
                                                                    `" president", " presidents"`
2. A few families carry half of it together: the best of each.            `" he", " she", " they"`
3. The strongest contexts, weighted by act, mostly peak on one family:  `strongest on " treaty"`
4. ... or mostly have one word just before their peak:                         `after " according"`
5. Words that the strongest contexts share, rare in the text and far beyond their frequency there:
                                                                 `in text on court, judge, ruling`
6. None of these: the tokens, words first, of highest share and lift.
                                                                    `mixed: " severe", " exact"`

`→ " Obama", " Trump"` follows where the most promoted tokens are words of the indexed text and
stand out of the vocabulary by more than noise does.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from .token_text import quoted, words_of

_MAJORITY = 0.5
_PEAK_MAJORITY = 0.6
_FEW = 4
_MAX_PROMOTED = 3
# Standard deviations above the vocabulary's mean: the largest of 50,000 normal draws is at 4.2.
_PLAINLY_PROMOTED = 6.0
_MIN_CONTEXTS = 3
_MIN_CONTEXT_SHARE = 0.3
# Words more frequent than this in the text (1 in 1,500) are no topic.
_TOPIC_RATE = 1 / 1500


class TokenUse(NamedTuple):
    """share: part of the feature's whole activation on the token; lift: see `token_uses`."""

    token: str
    share: float
    lift: float


class PeakContext(NamedTuple):
    """Where a feature is strongly active. before: the token before, None at the text's beginning.

    text: of n_tokens tokens around.
    """

    text: str
    act: float
    token: str
    before: str | None
    n_tokens: int


class Evidence(NamedTuple):
    """What a label is made from.

    uses: the feature's tokens, the most telling first (share * log lift).
    contexts: the strongest ones.
    promoted: tokens of largest logit; strength: of the first, in standard deviations.
    """

    uses: Sequence[TokenUse]
    contexts: Sequence[PeakContext]
    promoted: Sequence[str]
    strength: float


def token_label(evidence: Evidence, word_rates: dict[str, float]) -> str:
    """The label of one active feature; see the head of this file.

    word_rates: frequency in the text of each word, as words_of gives it.
    """
    fires = (
        _one_family(evidence.uses)
        or _few_families(evidence.uses)
        or _common_token([(c.token, c.act) for c in evidence.contexts], "strongest on")
        or _common_token([(c.before, c.act) for c in evidence.contexts], "after")
        or _shared_words(evidence.contexts, word_rates)
        or _mixed(evidence)
    )
    promoted = _promoted(evidence)
    return f"{fires} → {promoted}" if promoted else fires


@lru_cache(1 << 16)
def family(token: str) -> str:
    """What tokens that read alike have in common: no spaces, lower case, no plural s."""
    stem = token.strip().casefold()
    if not stem:
        return token
    return stem[:-1] if len(stem) > 3 and stem.endswith("s") and not stem.endswith("ss") else stem


def _one_family(uses: Sequence[TokenUse]) -> str | None:
    shares = _family_shares(uses)
    if not shares:
        return None
    best, share = max(shares.items(), key=lambda item: item[1])
    if share < _MAJORITY:
        return None
    members = sorted((use for use in uses if family(use.token) == best), key=lambda u: -u.share)
    return _listed([use.token for use in members if use.share >= 0.1 * members[0].share][:3])


def _few_families(uses: Sequence[TokenUse]) -> str | None:
    shares = sorted(_family_shares(uses).items(), key=lambda item: -item[1])[:_FEW]
    if sum(share for _, share in shares) < _MAJORITY:
        return None
    best: dict[str, TokenUse] = {}
    for use in sorted(uses, key=lambda u: -u.share):
        best.setdefault(family(use.token), use)
    return _listed([best[name].token for name, share in shares if share >= 0.05])


def _common_token(places: Sequence[tuple[str | None, float]], relation: str) -> str | None:
    """The family of most of the tokens. places: the token at each, and the act that it weighs."""
    weights: dict[str, float] = {}
    tokens: Counter[str] = Counter()
    for token, act in places:
        if token is not None:
            weights[family(token)] = weights.get(family(token), 0.0) + act
            tokens[token] += 1
    best = max(weights, key=lambda name: weights[name], default=None)
    total = sum(act for _, act in places)
    if best is None or len(places) < _MIN_CONTEXTS or weights[best] < _PEAK_MAJORITY * total:
        return None
    members = [token for token, _ in tokens.most_common() if family(token) == best]
    return f"{relation} {_listed(members[:2])}"


def _shared_words(contexts: Sequence[PeakContext], word_rates: dict[str, float]) -> str | None:
    n_with = Counter(word for context in contexts for word in set(words_of(context.text)))
    n_tokens = sum(context.n_tokens for context in contexts)
    least = max(_MIN_CONTEXTS, _MIN_CONTEXT_SHARE * len(contexts))
    scores = {
        word: n * math.log(n / (word_rates.get(word, 0.0) * n_tokens + 0.1))
        for word, n in n_with.items()
        if n >= least and word_rates.get(word, 0.0) < _TOPIC_RATE
    }
    best = sorted(scores, key=lambda word: (-scores[word], word))[:3]
    return f"in text on {', '.join(best)}" if best else None


def _mixed(evidence: Evidence) -> str:
    tokens = [use.token for use in evidence.uses]
    tokens = tokens or [context.token for context in evidence.contexts]
    tokens = [token for token in tokens if token.strip().isalpha()] or tokens
    return f"mixed: {_listed(list(dict.fromkeys(tokens))[:3])}"


def _promoted(evidence: Evidence) -> str | None:
    if evidence.strength < _PLAINLY_PROMOTED:
        return None
    names: dict[str, str] = {}
    for token in evidence.promoted:
        if token.strip().isalpha():
            names.setdefault(family(token), token)
    return _listed(list(names.values())[:_MAX_PROMOTED]) if names else None


def _family_shares(uses: Sequence[TokenUse]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for use in uses:
        if use.lift > 1:
            shares[family(use.token)] = shares.get(family(use.token), 0.0) + use.share
    return shares


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(quoted(token) for token in tokens)
