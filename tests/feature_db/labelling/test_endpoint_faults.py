"""What endpoints do wrong, over real HTTP: each is got over, counted, or told in one line."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from feature_db import (
    Endpoint,
    EndpointError,
    FeatureDB,
    LabelConfig,
    LabelSummary,
    label_features,
)

from .conftest import Planted
from .judge_server import Fault, JudgeServer
from .test_labelling import said

KEY = "sk-very-secret-0123456789"
FIRST = [0, 1, 2]
PASSING = {
    "500": Fault(500, body='{"error": {"message": "out of cheese"}}'),
    "502 in HTML": Fault(502, {"Content-Type": "text/html"}, body="<h1>Bad gateway</h1>"),
    "no JSON": Fault(body='{"choices": [{"mess'),
    "JSON of something else": Fault(body="{}"),
    "no choices": Fault(body='{"choices": []}'),
    "a page": Fault(200, {"Content-Type": "text/html"}, body="<h1>Hello</h1>"),
    "half an answer": Fault(cut=0.5),
    "connection closed": Fault(drop=True),
    "too slow": Fault(delay_s=0.6),
}
Label = Callable[..., LabelSummary]


@pytest.fixture
def label(planted: Planted, endpoint: Endpoint, config: LabelConfig) -> Label:
    """`label(concurrency=1)`: features 0 to 2, by an endpoint with other settings."""

    def call(
        features: list[int] | str = FIRST,
        limit: int | None = None,
        api_key: str | None = None,
        **settings: object,
    ) -> LabelSummary:
        asked = endpoint.model_copy(update=settings)
        return label_features(
            planted.path, asked, config, features=features, limit=limit, api_key=api_key
        )

    return call


@pytest.mark.parametrize("kind", PASSING)
def test_passing_errors_are_got_over(
    label: Label, planted: Planted, server: JudgeServer, kind: str
) -> None:
    server.fault = lambda number: PASSING[kind] if number in (0, 5) else None
    done = label(timeout_s=0.4 if kind == "too slow" else 5)
    assert (done.n_labelled, done.n_failed, done.n_malformed) == (3, 0, 0)
    assert len(server.seen.starts) == 3 * 5 + 2
    assert {row[3:5] for row in said(planted.path)} == {(1.0, 1.0)}


@pytest.mark.parametrize("kind", PASSING)
def test_a_request_that_fails_again_and_again_fails_its_feature_alone(
    label: Label, planted: Planted, server: JudgeServer, kind: str
) -> None:
    server.fault = lambda number: PASSING[kind] if number < 2 else None
    alone = {"timeout_s": 0.4 if kind == "too slow" else 5, "concurrency": 1, "max_retries": 1}
    done = label(**alone)
    assert (done.n_labelled, done.n_failed) == (2, 1)
    assert done.last_failure is not None
    assert done.last_failure.startswith(f"feature 0: {server.url}: ")
    assert "\n" not in done.last_failure
    assert [row[0] for row in said(planted.path)] == [1, 2]
    assert label(**alone).n_labelled == 1


def test_a_server_that_drips_its_answer_is_given_up_in_time(
    label: Label, server: JudgeServer
) -> None:
    server.delay_s = 30
    started = time.monotonic()
    done = label(timeout_s=0.3, max_retries=0)
    assert time.monotonic() - started < 5
    assert done.n_failed == 3
    assert "no answer within 0.3 s" in (done.last_failure or "")


def in_two_seconds() -> str:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))


@pytest.mark.slow
@pytest.mark.parametrize("value", [lambda: "1", in_two_seconds])
def test_retry_after_is_kept_by_all_requests(
    label: Label, server: JudgeServer, value: Callable[[], str]
) -> None:
    def limited(number: int) -> Fault | None:
        return Fault(429, {"Retry-After": value()}, "{}") if number == 7 else None

    server.fault = limited
    done = label("all")
    assert (done.n_labelled, done.n_failed) == (20, 0)
    starts = sorted(server.seen.starts)
    refused_at = server.seen.starts[7]
    early = [s for s in starts if refused_at + 0.1 < s < refused_at + 0.9]
    assert not early


def test_a_wait_beyond_ten_minutes_ends_the_run(label: Label, server: JudgeServer) -> None:
    server.fault = lambda _: Fault(429, {"Retry-After": "86400"}, "{}")
    with pytest.raises(EndpointError, match="asks to wait 86,400 s"):
        label()


def test_no_credit_ends_the_run(label: Label, planted: Planted, server: JudgeServer) -> None:
    body = json.dumps({"error": {"message": "You exceeded it", "code": "insufficient_quota"}})
    server.fault = lambda number: Fault(429, body=body) if number >= 5 else None
    with pytest.raises(EndpointError, match="no credit left"):
        label(concurrency=1)
    assert len(said(planted.path)) == 1  # what was finished is kept


def test_a_wrong_model_ends_the_run_at_once(label: Label, server: JudgeServer) -> None:
    with pytest.raises(EndpointError, match=r"no model 'judge-9'.*does not exist") as caught:
        label(model="judge-9", concurrency=1)
    assert "\n" not in str(caught.value)
    assert len(server.seen.starts) == 1


def test_a_refused_key_ends_the_run_and_stands_nowhere(
    label: Label, planted: Planted, server: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The server repeats the key in its answer, as some do."""
    server.key = "another"
    caplog.set_level(logging.DEBUG)
    with pytest.raises(EndpointError, match=r"refuses the API key.*\[key\]") as caught:
        label(api_key=KEY)
    error: BaseException | None = caught.value
    while error is not None:
        assert KEY not in f"{error!s}{error!r}"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert KEY not in caplog.text
    assert KEY.encode() not in planted.path.read_bytes()


def test_the_right_key_is_sent_and_kept_nowhere(
    label: Label, planted: Planted, server: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.key = KEY
    caplog.set_level(logging.DEBUG)
    assert label(api_key=KEY).n_labelled == 3
    assert set(server.seen.keys) == {f"Bearer {KEY}"}
    assert KEY not in caplog.text
    for file in planted.path.parent.iterdir():
        assert KEY.encode() not in file.read_bytes()


def test_a_context_that_is_too_long_fails_its_feature_alone(
    label: Label, server: JudgeServer
) -> None:
    body = json.dumps({"error": {"message": "maximum context length is 512 tokens"}})
    server.fault = lambda number: Fault(400, body=body) if number == 0 else None
    done = label(concurrency=1)
    assert (done.n_labelled, done.n_failed) == (2, 1)
    assert "refuses a request (400: maximum context length" in (done.last_failure or "")


def test_malformed_answers_are_asked_for_again_with_the_reason(
    label: Label, planted: Planted, server: JudgeServer
) -> None:
    wrong = Fault(content="Sure! I think 1 and 0.")
    server.fault = lambda number: wrong if number == 1 else None
    done = label(concurrency=1)
    assert (done.n_labelled, done.n_malformed) == (3, 1)
    (again,) = [body["messages"] for body in server.seen.bodies if len(body["messages"]) > 1]
    assert again[0]["content"] == server.seen.prompts[1]
    assert [each["role"] for each in again] == ["user", "assistant", "user"]
    assert "This can't be used" in again[2]["content"]
    with FeatureDB.open(planted.path) as db:
        rows = db.sql("SELECT feature_id, n_malformed FROM explanations WHERE method = 'llm'")
        assert sorted(rows.fetchall()) == [(0, 1), (1, 0), (2, 0)]


def test_judgements_that_stay_unreadable_are_counted_and_never_guessed(
    label: Label, planted: Planted, server: JudgeServer
) -> None:
    """Detection's first request is answered with too few values as often as it comes."""
    wrong = Fault(content='{"answers": [1, 0]}')

    def fault(number: int) -> Fault | None:
        prompts = server.seen.prompts
        return wrong if number and prompts[number] == prompts[1] else None

    server.fault = fault
    done = label(concurrency=1)
    assert (done.n_labelled, done.n_malformed) == (3, 3)
    first = said(planted.path)[0]
    assert first[5] == 8  # of 16
    assert first[3] in (1.0, None)
    assert first[4:5] + first[6:7] == (1.0, 16)


def test_a_model_that_never_answers_as_asked_ends_the_run(
    label: Label, planted: Planted, server: JudgeServer
) -> None:
    server.fault = lambda _: Fault(content="I can't help with that.")
    with pytest.raises(EndpointError, match=r"8 features in a row.*no explanation could be read"):
        label("all", concurrency=1)
    assert len(server.seen.starts) == 8 * 3
    assert said(planted.path) == []


@pytest.mark.slow
def test_the_rate_limit_is_kept(label: Label, server: JudgeServer) -> None:
    """Retries count too: every third request is refused; the server sees 20 a second at most."""
    server.fault = lambda number: Fault(500, body="{}") if number % 3 == 0 else None
    done = label("all", limit=8, requests_per_minute=1200, concurrency=16)
    assert done.n_labelled == 8
    starts = sorted(server.seen.starts)
    assert len(starts) > 40
    busiest = max(sum(s <= other < s + 1 for other in starts) for s in starts)
    assert busiest <= 20 + 2


def test_the_token_limit_is_kept(label: Label) -> None:
    started = time.monotonic()
    done = label("all", limit=2, tokens_per_minute=300_000)
    n_tokens = done.prompt_tokens + done.answer_tokens
    assert n_tokens / (time.monotonic() - started) < 300_000 / 60 * 1.3


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_no_more_requests_are_in_flight_than_allowed(
    label: Label, server: JudgeServer, concurrency: int
) -> None:
    server.delay_s = 0.2  # long enough for all to meet on a busy machine
    label("all", limit=8, concurrency=concurrency)
    assert server.seen.most_in_flight == concurrency


def test_structured_output_asks_for_the_schema(label: Label, server: JudgeServer) -> None:
    label([0], structured_output=True, temperature=None)
    formats = [body["response_format"]["json_schema"] for body in server.seen.bodies]
    assert "explanation" in formats[0]["schema"]["properties"]
    assert formats[1]["schema"]["properties"]["answers"]["maxItems"] == 8
    assert all("temperature" not in body for body in server.seen.bodies)


@pytest.mark.slow
def test_others_read_while_a_run_goes_on(
    label: Label, planted: Planted, server: JudgeServer
) -> None:
    """Another process opens the database again and again; it gets through, and so does the run."""
    server.delay_s = 0.1
    code = (
        "import sys, time\nfrom feature_db import FeatureDB\nfrom feature_db.errors import *\n"
        "n = 0\nend = time.monotonic() + 60\n"
        "while n < 12 and time.monotonic() < end:\n"
        "    try:\n"
        "        with FeatureDB.open(sys.argv[1]) as db:\n"
        "            n_rows = len(db.sql('SELECT * FROM explanations'))\n"
        "            n += 1\n            time.sleep(0.1)\n"
        "    except DatabaseBusyError:\n        pass\n"
        "    time.sleep(0.02)\n"
        "print(n)\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(planted.path)], stdout=subprocess.PIPE, text=True
    )
    done = label("all")
    out, _ = reader.communicate(timeout=90)
    assert (done.n_labelled, out.strip()) == (20, "12")
