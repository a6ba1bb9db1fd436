"""Questions with known answers, and how well a judge answered them: detection and fuzzing scores.

A score is a balanced accuracy: the mean of the accuracy on contexts where the answer is yes and of
that where it is no. 1 is perfect; a judge that guesses, or always says the same, is at 0.5.
"""

from collections.abc import Sequence
from typing import NamedTuple

# Fewer judgements on either side make a score of noise: none is given.
MIN_A_SIDE = 4


class Question(NamedTuple):
    """One context to be judged.

    part: where it comes from. passage: as it is shown. expected: the right answer.
    """

    part: str
    passage: str
    expected: bool


class Judged(NamedTuple):
    """A question with a judge's answer."""

    question: Question
    answer: bool

    @property
    def is_right(self) -> bool:
        """Whether the judge was right."""
        return self.answer == self.question.expected


class PartScore(NamedTuple):
    """Of one part's contexts: how many were judged, how many of them rightly."""

    n: int
    n_right: int


class Score(NamedTuple):
    """value: balanced accuracy, None with fewer than 4 judgements on either side.

    n: contexts judged. n_unread: asked about, with no answer that could be read; they don't count.
    parts: by where the contexts come from.
    """

    value: float | None
    n: int
    n_unread: int
    parts: dict[str, PartScore]


def score(judged: Sequence[Judged], n_unread: int) -> Score:
    """The score of a judge's answers."""
    parts: dict[str, PartScore] = {}
    for each in judged:
        n, n_right = parts.get(each.question.part, (0, 0))
        parts[each.question.part] = PartScore(n + 1, n_right + each.is_right)
    return Score(balanced_accuracy(judged), len(judged), n_unread, parts)


def balanced_accuracy(judged: Sequence[Judged]) -> float | None:
    """(right of those with answer yes + right of those with answer no) / 2, each as a fraction.

    None where either side has fewer than 4. Source: Paulo et al. 2024, arXiv 2410.13928, section 3.
    """
    sides = [
        [each.is_right for each in judged if each.question.expected == side]
        for side in (True, False)
    ]
    if min(map(len, sides)) < MIN_A_SIDE:
        return None
    return sum(sum(side) / len(side) for side in sides) / 2
