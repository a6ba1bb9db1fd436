"""A feature's contexts -> what is shown to be explained, and what its explanation is judged on.

Contexts shown and contexts judged never overlap in the text. Every choice depends on the seed, the
feature and the contexts alone, so that it can be made again.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from .config import LabelConfig
from .prompts import marked, plain
from .scoring import Question

T = TypeVar("T")

VERIFIED, NEIGHBOR, RANDOM = "negative", "neighbor", "random"


class Passage(NamedTuple):
    """A context. part: where it comes from: "top", "quantile 0.25-0.5", "neighbor", ...

    doc_id, start: its document, and the position there of its first token. acts: those of the
    feature that it is a context of, one a token; strength: the one it was kept for.
    """

    part: str
    doc_id: int
    start: int
    strength: float
    text: str
    tokens: tuple[str, ...]
    acts: tuple[float, ...]

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)


class FeatureEvidence(NamedTuple):
    """All that the database offers for one feature.

    active: its contexts, strongest kind first. verified: contexts known to be silent. neighbors:
    contexts of the nearest features. others: contexts of any features, the same list for all.
    """

    sae_id: int
    feature_id: int
    active: Sequence[Passage]
    verified: Sequence[Passage]
    neighbors: Sequence[Passage]
    others: Sequence[Passage]


class Examples(NamedTuple):
    """shown: to be explained, strongest first. active, silent: to be judged."""

    shown: list[Passage]
    active: list[Passage]
    silent: list[Passage]


def choose_examples(evidence: FeatureEvidence, config: LabelConfig) -> Examples:
    """The examples of one feature.

    Active contexts that overlap an earlier one are left out; the rest is shared out between
    showing and scoring, part by part, in proportion where there are too few. Silent contexts
    overlap none of the feature's own: first verified ones, then those of near features, as
    hard_fraction says; the others are drawn from all features.
    """
    rng = random.Random(f"{config.seed} {evidence.feature_id}")
    shown, active = _shared_out(_distinct(evidence.active, []), config, rng)
    n_hard = round(len(active) * config.hard_fraction)
    hard = [*_shuffled(evidence.verified, rng), *_shuffled(evidence.neighbors, rng)]
    usable = _distinct(hard, evidence.active)
    silent = usable[:n_hard]
    anywhere = _distinct(_shuffled(evidence.others, rng), [*evidence.active, *silent])
    silent += anywhere[: len(active) - len(silent)]
    silent += _distinct(usable[n_hard:], silent)[: len(active) - len(silent)]
    shown.sort(key=lambda each: -each.strength)
    return Examples(shown, active, silent)


def detection_questions(examples: Examples, config: LabelConfig) -> list[list[Question]]:
    """Requests of active and silent contexts in random order, unmarked."""
    questions = [Question(each.part, plain(each.text), True) for each in examples.active]
    questions += [Question(each.part, plain(each.text), False) for each in examples.silent]
    random.Random(f"{config.seed} detection").shuffle(questions)
    return _in_requests(questions, config.contexts_per_request)


def fuzzing_questions(examples: Examples, config: LabelConfig) -> list[list[Question]]:
    """Requests of active contexts, each once with the right tokens marked and once with others.

    Wrong marks are as many as right ones where there are so many silent tokens, drawn at random.
    One context's two markings are never judged in the same request. A context without a silent
    token is left out.
    """
    rng = random.Random(f"{config.seed} fuzzing")
    first, second = list[Question](), list[Question]()
    for i, each in enumerate(_shuffled(examples.active, rng)):
        is_active = [act > 0 for act in each.acts]
        silent = [place for place, active in enumerate(is_active) if not active]
        if not silent:
            continue
        drawn = set(rng.sample(silent, min(len(silent), sum(is_active))))
        is_drawn = [place in drawn for place in range(len(each.tokens))]
        right = Question(each.part, marked(each.tokens, is_active), True)
        wrong = Question(each.part, marked(each.tokens, is_drawn), False)
        (first if i % 2 else second).append(right)
        (second if i % 2 else first).append(wrong)
    requests = list[list[Question]]()
    for questions in (first, second):
        rng.shuffle(questions)
        requests += _in_requests(questions, config.contexts_per_request)
    return requests


def shown_passages(examples: Examples) -> list[str]:
    """What the explanation is made from, as it is shown."""
    return [marked(each.tokens, [act > 0 for act in each.acts]) for each in examples.shown]


def _shared_out(
    passages: Sequence[Passage], config: LabelConfig, rng: random.Random
) -> tuple[list[Passage], list[Passage]]:
    """(shown, scored): alternately from a list in which the parts take turns."""
    mixed = list(_by_turns(passages, rng))[: config.n_shown + config.n_scored]
    shown, scored = list[Passage](), list[Passage]()
    total = config.n_shown + config.n_scored
    for i, each in enumerate(mixed):
        is_shown = (i + 1) * config.n_shown // total > i * config.n_shown // total
        (shown if is_shown else scored).append(each)
    if scored and not shown:  # one context alone is there to be explained
        shown.append(scored.pop())
    return shown, scored


def _by_turns(passages: Sequence[Passage], rng: random.Random) -> Iterator[Passage]:
    """One passage of each part in each round, parts in a new order every round."""
    parts: dict[str, list[Passage]] = {}
    for each in _shuffled(passages, rng):
        parts.setdefault(each.part, []).append(each)
    while parts:
        for name in _shuffled(sorted(parts), rng):
            yield parts[name].pop()
            if not parts[name]:
                del parts[name]


def _distinct(passages: Iterable[Passage], taken: Iterable[Passage]) -> list[Passage]:
    """The passages that overlap no earlier one and none of `taken`."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for each in taken:
        spans.setdefault(each.doc_id, []).append((each.start, each.stop))
    kept = []
    for each in passages:
        here = spans.setdefault(each.doc_id, [])
        if all(each.stop <= start or stop <= each.start for start, stop in here):
            here.append((each.start, each.stop))
            kept.append(each)
    return kept


def _in_requests(questions: list[Question], most: int) -> list[list[Question]]:
    """Questions in as few requests as there may be, of equal size to one."""
    n_requests = -(-len(questions) // most)
    return [questions[i::n_requests] for i in range(n_requests)]


def _shuffled(values: Sequence[T], rng: random.Random) -> list[T]:
    return rng.sample(values, len(values))
