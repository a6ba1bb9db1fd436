"""Prompts, answers and scores: pure functions, and text that means harm."""

import contextlib
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_db import LabelConfig
from feature_db.labelling.answers import (
    MalformedAnswerError,
    explanation_schema,
    judgements_schema,
    read_explanation,
    read_judgements,
)
from feature_db.labelling.passages import (
    Examples,
    FeatureEvidence,
    Passage,
    choose_examples,
    detection_questions,
    fuzzing_questions,
)
from feature_db.labelling.prompts import (
    detect_messages,
    explain_messages,
    fuzz_messages,
    marked,
    plain,
)
from feature_db.labelling.scoring import Judged, Question, balanced_accuracy, score

HOSTILE = [
    "<<", ">>", "<<<", "<", ">", "a<", ">b", "<<x>>", "\n3. <<fake>>", "\r\n", "\u2028", "\x00",
    "\u202e", " ", "", "word", '"}', "{n}", "{explanation}", "日", "\ud800",
]  # fmt: skip


# -- what is shown ---------------------------------------------------------------------------------


def test_marked_tokens_side_by_side_share_their_marks() -> None:
    tokens = ["The", " golden", " gate", " stood", "."]
    assert marked(tokens, [False, True, True, False, True]) == "The<< golden gate>> stood<<.>>"
    assert marked(tokens, [False] * 5) == "The golden gate stood."
    assert marked(["a\n", "b"], [True, False]) == "<<a↵>>b"


@given(st.lists(st.tuples(st.sampled_from(HOSTILE), st.booleans()), max_size=8))
def test_marks_are_ours_alone_whatever_the_text_says(pieces: list[tuple[str, bool]]) -> None:
    tokens, is_marked = [text for text, _ in pieces], [mark for _, mark in pieces]
    shown = marked(tokens, is_marked)
    runs = [mark for i, mark in enumerate(is_marked) if mark and not (i and is_marked[i - 1])]
    assert shown.count("<<") == shown.count(">>") == len(runs)
    assert not re.search("<<<|>>>", shown)
    assert shown.isprintable()
    bare = re.sub(r"[ <>]", "", shown)
    assert bare == re.sub(r"[ <>]", "", plain("".join(tokens)))
    assert not re.search("<<|>>", plain("".join(tokens)))


def test_a_passage_cannot_begin_a_line_or_leave_its_place() -> None:
    passages = [plain("a\n2. planted"), plain("b {n} {explanation}")]
    for messages in (
        explain_messages(passages),
        detect_messages("x\n1. <<y>>", passages),
        fuzz_messages("x", passages),
    ):
        (message,) = messages
        assert message["role"] == "user"
        listed = re.findall(r"^(\d+)\. (.*)$", message["content"], flags=re.MULTILINE)
        assert listed == [("1", "a↵2. planted"), ("2", "b {n} {explanation}")]
        message["content"].encode()


# -- what comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        '{"explanation": "court rulings"}',
        ' {"explanation": " court\\n rulings "}\n',
        '```json\n{"explanation": "court rulings"}\n```',
        'Here it is: {"explanation": "court rulings"} I hope it helps.',
        '<think>maybe {"explanation": "dogs"}?</think>{"explanation": "court rulings"}',
        '{"explanation": "dogs"} No, rather {"explanation": "court rulings"}',
        "Explanation: court rulings",
        "I looked at them.\n**Explanation:** court rulings",
    ],
)
def test_explanations_are_read(answer: str) -> None:
    assert read_explanation(answer) == "court rulings"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "court rulings",
        '{"explanation": ""}',
        '{"explanation": "  \\n"}',
        '{"explanation": 3}',
        '{"explanation": ["court"]}',
        '{"explanation": "court rul',
        '{"answer": "court rulings"}',
        '<think>{"explanation": "court rulings"}',
        json.dumps({"explanation": "x" * 1001}),
        "[" * 5000,
    ],
)
def test_what_is_no_explanation_is_refused(answer: str) -> None:
    with pytest.raises(MalformedAnswerError):
        read_explanation(answer)


@pytest.mark.parametrize(
    "answer",
    [
        '{"answers": [1, 0, 1]}',
        '{"answers": [true, false, true]}',
        '```\n{"answers": [1,0,1]}\n```',
        "[1, 0, 1]",
        'First [1, 1, 1], no: {"answers": [1, 0, 1]}',
        "<think>[0, 0, 0]</think> [1, 0, 1]",
    ],
)
def test_judgements_are_read(answer: str) -> None:
    assert read_judgements(answer, 3) == [True, False, True]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "1, 0, 1",
        "[1, 0]",
        "[1, 0, 1, 0]",
        "[1, 0, 2]",
        "[1, 0, 1.0]",
        '["1", "0", "1"]',
        "[1, 0, null]",
        '{"answers": [1, 0,',
        '{"answers": "101"}',
        '{"answers": {"1": 1}}',
        '{"answers": []}',
    ],
)
def test_what_are_no_judgements_is_refused(answer: str) -> None:
    with pytest.raises(MalformedAnswerError):
        read_judgements(answer, 3)


@given(st.text(max_size=60), st.integers(1, 4))
def test_any_answer_is_read_or_refused(answer: str, n: int) -> None:
    for read in (read_explanation, lambda text: read_judgements(text, n)):
        with contextlib.suppress(MalformedAnswerError):
            assert read(answer)


def test_schemas_admit_what_is_asked_for() -> None:
    assert explanation_schema()["required"] == ["explanation"]
    array = judgements_schema(4)["properties"]["answers"]
    assert (array["minItems"], array["maxItems"], array["items"]["enum"]) == (4, 4, [0, 1])


# -- scores ----------------------------------------------------------------------------------------


def judged(*pairs: tuple[bool, bool]) -> list[Judged]:
    return [Judged(Question("top", "", expected), answer) for expected, answer in pairs]


def test_balanced_accuracy_weighs_both_sides_alike() -> None:
    yes, no = (True, True), (False, True)
    assert balanced_accuracy(judged(*[yes] * 12, *[no] * 4)) == 0.5  # always yes
    right = [(True, True)] * 4 + [(False, False)] * 30
    assert balanced_accuracy(judged(*right)) == 1.0
    mixed = [(True, True)] * 3 + [(True, False)] + [(False, False)] * 2 + [(False, True)] * 6
    assert balanced_accuracy(judged(*mixed)) == (3 / 4 + 2 / 8) / 2


def test_too_few_judgements_give_no_score() -> None:
    assert balanced_accuracy(judged(*[(True, True)] * 3, *[(False, False)] * 9)) is None
    found = score(judged((True, True), (True, False)), n_unread=5)
    assert found.value is None
    assert (found.n, found.n_unread, found.parts["top"]) == (2, 5, (2, 1))


# -- the choice of contexts ------------------------------------------------------------------------


def passage(part: str, doc_id: int, start: int, act: float = 1.0, width: int = 6) -> Passage:
    tokens = tuple(f" w{doc_id}-{start + i}" for i in range(width))
    acts = tuple(act if i == 2 else 0.0 for i in range(width))
    return Passage(part, doc_id, start, act, "".join(tokens), tokens, acts)


@st.composite
def evidences(draw: st.DrawFn) -> FeatureEvidence:
    def some(part: str, act: float) -> list[Passage]:
        places = st.tuples(st.integers(0, 3), st.integers(0, 60))
        return [passage(part, *place, act) for place in draw(st.lists(places, max_size=15))]

    active = [*some("top", 3.0), *some("quantile 0-0.25", 1.0), *some("quantile 0.5-0.75", 2.0)]
    silent = (some(part, 1.0) for part in ("negative", "neighbor", "random"))
    return FeatureEvidence(0, draw(st.integers(0, 9)), active, *silent)


@given(evidences(), st.integers(0, 3))
def test_examples_never_overlap_and_repeat_with_the_seed(
    evidence: FeatureEvidence, seed: int
) -> None:
    config = LabelConfig(n_shown=5, n_scored=4, seed=seed)
    examples = choose_examples(evidence, config)
    assert examples == choose_examples(evidence, config)
    every = [*examples.shown, *examples.active, *examples.silent]
    taken = [(each.doc_id, token) for each in every for token in range(each.start, each.stop)]
    assert len(taken) == len(set(taken))
    own = {
        (each.doc_id, token) for each in evidence.active for token in range(each.start, each.stop)
    }
    for each in examples.silent:
        assert not own & {(each.doc_id, token) for token in range(each.start, each.stop)}
    assert len(examples.shown) <= 5
    assert len(examples.silent) <= len(examples.active) <= 4
    assert bool(examples.shown) == bool(evidence.active)
    strengths = [each.strength for each in examples.shown]
    assert strengths == sorted(strengths, reverse=True)


def test_both_kinds_of_context_are_shown_and_judged() -> None:
    active = [passage("top", 0, 10 * i, 3.0) for i in range(20)]
    active += [passage("quantile 0-0.25", 1, 10 * i) for i in range(20)]
    evidence = FeatureEvidence(0, 7, active, [], [], [])
    examples = choose_examples(evidence, LabelConfig(n_shown=10, n_scored=10))
    for some in (examples.shown, examples.active):
        assert 3 <= sum(each.part == "top" for each in some) <= 7
        assert len(some) == 10


def test_few_contexts_are_shared_out_in_proportion() -> None:
    active = [passage("top", 0, 10 * i) for i in range(6)]
    evidence = FeatureEvidence(0, 7, active, [], [], [])
    examples = choose_examples(evidence, LabelConfig(n_shown=20, n_scored=20))
    assert (len(examples.shown), len(examples.active)) == (3, 3)
    alone = choose_examples(evidence._replace(active=active[:1]), LabelConfig())
    assert (len(alone.shown), len(alone.active)) == (1, 0)


def test_hard_and_random_silent_contexts_stand_in_for_each_other() -> None:
    active = [passage("top", 0, 10 * i) for i in range(16)]
    near = [passage("neighbor", 1, 10 * i) for i in range(16)]
    others = [passage("random", 2, 10 * i) for i in range(16)]
    config = LabelConfig(n_shown=8, n_scored=8, hard_fraction=0.25)

    def parts(near: list[Passage], others: list[Passage]) -> dict[str, int]:
        found = choose_examples(FeatureEvidence(0, 7, active, [], near, others), config).silent
        names = [each.part for each in found]
        return {name: names.count(name) for name in sorted(set(names))}

    assert parts(near, others) == {"neighbor": 2, "random": 6}
    assert parts([], others) == {"random": 8}
    assert parts(near, []) == {"neighbor": 8}
    assert parts(near[:1], others[:2]) == {"neighbor": 1, "random": 2}


def test_fuzzing_marks_each_context_rightly_once_and_wrongly_once() -> None:
    active = [passage("top", 0, 10 * i) for i in range(7)]
    every = Passage("top", 9, 0, 1.0, "ab", ("a", "b"), (1.0, 1.0))
    config = LabelConfig(contexts_per_request=4)
    requests = fuzzing_questions(Examples([], [*active, every], []), config)
    assert [len(each) for each in requests] == [4, 3, 4, 3]
    for request in requests:
        bare = [each.passage.replace("<<", "").replace(">>", "") for each in request]
        assert len(bare) == len(set(bare))
    questions = [each for request in requests for each in request]
    rights = {each.passage for each in questions if each.expected}
    assert rights == {marked(each.tokens, [act > 0 for act in each.acts]) for each in active}
    assert sum(not each.expected for each in questions) == 7
    assert all(each.passage.count("<<") == 1 for each in questions)


def test_detection_asks_about_all_in_requests_of_like_size() -> None:
    active = [passage("top", 0, 10 * i) for i in range(11)]
    silent = [passage("random", 1, 10 * i) for i in range(11)]
    requests = detection_questions(
        Examples([], active, silent), LabelConfig(contexts_per_request=10)
    )
    assert sorted(len(each) for each in requests) == [7, 7, 8]
    assert sum(each.expected for request in requests for each in request) == 11
    assert all(0 < sum(each.expected for each in request) < len(request) for request in requests)
