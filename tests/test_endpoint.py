"""Servers that judge: each reply is paid for once, limits hold, failures lose nothing else."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import (
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    ChatServer,
    busy,
    half,
    reset,
    serving,
    trickle,
)

from fastalign.config import ConfigError, EndpointConfig, JudgeConfig
from fastalign.endpoint import DOWN, BudgetSpent, Endpoint, JudgeError, Reply
from fastalign.judge import Answer, Failed, make_judge
from fastalign.model import load_tokenizer
from fastalign.templates import Renderer


@pytest.fixture
def server():
    with serving() as running:
        running.answer = staticmethod(lambda question: (200, f"on {question}"))
        yield running


def endpoint(server: type[ChatServer], folder: Path, **keys: Any) -> Endpoint:
    place = {"base_url": server.url, "model": "m", "max_retries": 0}
    return Endpoint(EndpointConfig(**place | keys), "judge", folder / "replies.jsonl")


def questions(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def texts(replies: list[Reply]) -> list[str | None]:
    return [reply.text for reply in replies]


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------- kept replies


def test_a_question_is_asked_once_also_over_restarts(server, tmp_path):
    first = endpoint(server, tmp_path, max_concurrency=1)
    assert texts(first.ask(questions("a", "b", "a"), 9)) == ["on a", "on b", "on a"]
    assert texts(first.ask(questions("b", "c"), 9)) == ["on b", "on c"]
    assert [r["messages"][0]["content"] for r in server.asked] == ["a", "b", "c"]
    assert {(r["model"], r["max_tokens"], r["temperature"]) for r in server.asked} == {
        ("m", 9, 0.0)
    }
    # Nobody closed the file: what was answered is there the moment it comes.
    assert len(kept(tmp_path)) == 3
    again = endpoint(server, tmp_path)
    assert texts(again.ask(questions("c", "a"), 9)) == ["on c", "on a"]
    assert len(server.asked) == 3
    assert again.figures() == {
        "requests": 3.0,
        "cached": 2.0,
        "prompt_tokens": 3.0 * PROMPT_TOKENS,
        "completion_tokens": 3.0 * COMPLETION_TOKENS,
    }


def test_a_request_has_the_fields_that_the_server_wants(server, tmp_path):
    extra = {"max_tokens": None, "max_completion_tokens": 20, "reasoning_effort": "low"}
    endpoint(server, tmp_path, extra_body=extra).ask(questions("a"), 9)
    (request,) = server.asked
    assert "max_tokens" not in request
    assert (request["max_completion_tokens"], request["reasoning_effort"]) == (20, "low")
    assert request["temperature"] == 0.0


@pytest.mark.parametrize(
    "change", [{"extra_body": {"seed": 1}}, {"model": "n"}, {"temperature": 0.5}, {"max_tokens": 8}]
)
def test_another_setting_is_another_question(server, tmp_path, change):
    endpoint(server, tmp_path).ask(questions("a"), 9)
    other = endpoint(server, tmp_path, **{k: v for k, v in change.items() if k != "max_tokens"})
    other.ask(questions("a"), change.get("max_tokens", 9))
    assert len(server.asked) == len(kept(tmp_path)) == 2


def test_another_server_is_another_question(server, tmp_path):
    endpoint(server, tmp_path).ask(questions("a"), 9)
    with serving() as other:
        other.answer = staticmethod(lambda question: (200, "elsewhere"))
        assert texts(endpoint(other, tmp_path).ask(questions("a"), 9)) == ["elsewhere"]


@pytest.mark.parametrize("cut", [1, 30, -1])
def test_half_a_line_at_the_end_is_dropped_and_asked_again(server, tmp_path, cut):
    endpoint(server, tmp_path, max_concurrency=1).ask(questions("a", "b"), 9)
    path = tmp_path / "replies.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:cut])
    again = endpoint(server, tmp_path, max_concurrency=1)
    assert path.read_bytes() == first
    assert texts(again.ask(questions("a", "b", "c"), 9)) == ["on a", "on b", "on c"]
    assert [r["messages"][0]["content"] for r in server.asked[2:]] == ["b", "c"]
    assert len(kept(tmp_path)) == 3


@pytest.mark.parametrize("line", ["{}", "[1]", "not JSON", '{"hash": "x"}'])
def test_a_line_that_is_no_reply_is_named(server, tmp_path, line):
    endpoint(server, tmp_path).ask(questions("a"), 9)
    with (tmp_path / "replies.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=r"replies\.jsonl:2: not a reply .*: remove the line"):
        endpoint(server, tmp_path)


# ------------------------------------------------------------------------------------ failures

NOT_A_COMPLETION: list[Any] = [
    b"<html>Bad gateway</html>",
    b"",
    {"object": "chat.completion"},
    {"choices": None},
    {"choices": []},
    {"choices": [{"index": 0, "message": None}]},
    {"error": "overloaded"},
]


@pytest.mark.parametrize("body", NOT_A_COMPLETION, ids=str)
def test_a_reply_that_is_none_is_set_aside_and_asked_again_later(server, tmp_path, body):
    server.answer = staticmethod(lambda question: (200, body if question == "b" else "yes"))
    first, second, third = endpoint(server, tmp_path).ask(questions("a", "b", "c"), 9)
    assert (first.text, second.text, third.text) == ("yes", None, "yes")
    assert second.failure
    # What was judged is not lost, and what was not is asked for when the run goes on.
    assert len(kept(tmp_path)) == 2
    server.answer = staticmethod(lambda question: (200, "late"))
    again = endpoint(server, tmp_path).ask(questions("a", "b", "c"), 9)
    assert texts(again) == ["yes", "late", "yes"]


@pytest.mark.parametrize("text", ["", " \n", None])
def test_an_empty_reply_is_set_aside_and_was_paid_for(server, tmp_path, text):
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}}]
    usage = {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}
    said = {"choices": choices, "usage": usage}
    server.answer = staticmethod(lambda question: (200, said if question == "b" else "yes"))
    asked = endpoint(server, tmp_path)
    assert asked.ask(questions("a", "b"), 9)[1] == Reply(None, "the reply is empty")
    assert asked.figures()["prompt_tokens"] == PROMPT_TOKENS + 7
    assert endpoint(server, tmp_path).ask(questions("a", "b"), 9)[1].text is None
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [400, 409, 422, 429, 500, 503])
def test_a_failed_request_costs_one_record(server, tmp_path, status):
    """A question that is too long (400) is that record's fault, a busy server (429) nobody's."""
    server.answer = staticmethod(lambda q: (status, "no, not this") if q == "b" else (200, "yes"))
    replies = endpoint(server, tmp_path).ask(questions("a", "b", "c"), 9)
    assert texts(replies) == ["yes", None, "yes"]
    assert "no, not this" in replies[1].failure


def test_a_busy_server_is_asked_again_with_pauses(server, tmp_path):
    times: list[float] = []

    def answer(question):
        times.append(time.monotonic())
        return (200, "now") if len(times) == 3 else (429, "rate limit")

    server.answer = staticmethod(answer)
    asked = endpoint(server, tmp_path, max_retries=2)
    assert texts(asked.ask(questions("a"), 9)) == ["now"]
    assert times[1] - times[0] > 0.2 and times[2] - times[1] > times[1] - times[0]
    # One request of ours, however often the client had to send it.
    assert asked.figures()["requests"] == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once(server, tmp_path, status):
    server.answer = staticmethod(lambda question: (status, "who are you?\nGo away"))
    asked = endpoint(server, tmp_path, max_concurrency=2)
    with pytest.raises(ConfigError) as caught:
        asked.ask(questions(*map(str, range(50))), 9)
    message = str(caught.value)
    assert message.startswith(f"judge.endpoint: {server.url}, model 'm' refuses: ")
    assert "who are you?" in message and "\n" not in message
    assert len(server.asked) < 10


def test_a_server_that_is_not_there_or_hangs_is_named(server, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match="no reply to any of 2 questions: Connection error"):
            endpoint(server, tmp_path, base_url=url).ask(questions("a", "b"), 9)
    released = threading.Event()

    def answer(question):
        released.wait(10)
        return 200, "too late"

    server.answer = staticmethod(answer)
    with pytest.raises(JudgeError, match="no reply to any of 1 questions: Request timed out"):
        endpoint(server, tmp_path, timeout_s=0.2).ask(questions("a"), 9)
    released.set()


BROKEN = {half: "Connection error", reset: "Connection error", trickle: "Request timed out"}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_reply_that_breaks_off_or_does_not_end_is_asked_for_again(server, tmp_path, breaks):
    """Set aside after all retries, and with one more retry than failures answered."""
    sent: list[str] = []

    def answer(question):
        sent.append(question)
        return (200, breaks) if question == "b" and sent.count("b") < 3 else (200, "yes")

    server.answer = staticmethod(answer)
    asked = endpoint(server, tmp_path, max_retries=1, timeout_s=0.5)
    replies = asked.ask(questions("a", "b"), 9)
    assert replies[0].text == "yes" and replies[1].failure.startswith(BROKEN[breaks])
    assert sent.count("b") == 2 and len(kept(tmp_path)) == 1
    assert texts(asked.ask(questions("a", "b"), 9)) == ["yes", "yes"]


def test_a_server_that_says_when_is_asked_then(server, tmp_path):
    times: list[float] = []

    def answer(question):
        times.append(time.monotonic())
        return (200, "now") if len(times) == 2 else (200, busy)

    server.answer = staticmethod(answer)
    asked = endpoint(server, tmp_path, max_retries=1)
    assert texts(asked.ask(questions("a"), 9)) == ["now"]
    # Retry-After, where the client's own first pause is at most half a second.
    assert times[1] - times[0] >= 0.9


def test_a_server_that_goes_down_is_not_asked_for_all_the_rest(server, tmp_path):
    """What it has answered stays; one that refuses single questions is not down."""
    asked = endpoint(server, tmp_path, max_concurrency=1)
    wanted = [str(i) for i in range(2 * DOWN)]
    assert len(asked.ask(questions(*wanted), 9)) == 2 * DOWN
    more = [f"more {i}" for i in range(3 * DOWN)]
    server.answer = staticmethod(lambda q: (400, "too long") if q != more[-1] else (200, "yes"))
    assert texts(asked.ask(questions(*more), 9))[-2:] == [None, "yes"]
    before = len(server.asked)
    server.answer = staticmethod(lambda q: (200, "yes") if q == "new 3" else (503, "later"))
    new = [f"new {i}" for i in range(4 * DOWN)]
    with pytest.raises(JudgeError) as caught:
        asked.ask(questions(*wanted, *new), 9)
    assert f"no reply to {DOWN} questions, one behind the other: " in str(caught.value)
    assert "later" in str(caught.value) and str(tmp_path / "replies.jsonl") in str(caught.value)
    assert 4 + DOWN <= len(server.asked) - before <= 4 + DOWN + 2
    assert len(kept(tmp_path)) == 2 * DOWN + 2


def test_nothing_to_ask_is_nothing_wrong(server, tmp_path):
    assert endpoint(server, tmp_path).ask([], 9) == []
    assert not (tmp_path / "replies.jsonl").exists()


def test_so_many_requests_run_at_once(server, tmp_path):
    lock, running, most = threading.Lock(), [0], [0]
    together = threading.Barrier(3)

    def answer(question):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        # Three wait for one another; a fourth would be seen.
        together.wait(10)
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return 200, "yes"

    server.answer = staticmethod(answer)
    endpoint(server, tmp_path, max_concurrency=3).ask(questions(*"abcdef"), 9)
    assert most[0] == 3


# -------------------------------------------------------------------------------------- limits


def test_max_requests_counts_the_whole_run(server, tmp_path):
    limited = endpoint(server, tmp_path, max_requests=3, max_concurrency=2)
    with pytest.raises(BudgetSpent) as caught:
        limited.ask(questions(*"abcde"), 9)
    assert str(caught.value) == (
        "judge.endpoint.max_requests = 3 is reached: 3 requests, 300 prompt tokens, 30 completion "
        "tokens"
    )
    assert len(server.asked) == len(kept(tmp_path)) == 3
    # What is known costs nothing, what is not is beyond the limit, also after a restart.
    known = server.asked[0]["messages"][0]["content"]
    for again in (limited, endpoint(server, tmp_path, max_requests=3)):
        assert again.ask(questions(known), 9)[0].text == f"on {known}"
        with pytest.raises(BudgetSpent):
            again.ask(questions("new"), 9)
    assert len(server.asked) == 3
    wider = endpoint(server, tmp_path, max_requests=5)
    assert texts(wider.ask(questions(*"abcde"), 9)) == [f"on {x}" for x in "abcde"]
    assert len(server.asked) == 5


def test_a_limit_that_is_just_enough_does_not_stop(server, tmp_path):
    assert len(endpoint(server, tmp_path, max_requests=2).ask(questions("a", "b"), 9)) == 2


def test_failed_requests_count_too(server, tmp_path):
    server.answer = staticmethod(lambda question: (500, "no"))
    asked = endpoint(server, tmp_path, max_requests=2, max_concurrency=1)
    with pytest.raises(BudgetSpent, match="2 requests, 0 prompt tokens"):
        asked.ask(questions("a", "b", "c"), 9)


def test_max_cost_adds_up_tokens_of_both_kinds(server, tmp_path):
    prices = {"input_cost_per_million": 1000.0, "output_cost_per_million": 20_000.0}
    # 100 x 0.001 + 10 x 0.02 = 0.3 a request: 0.9 is below the limit, 1.2 is not.
    limited = endpoint(server, tmp_path, max_cost=1.0, max_concurrency=1, **prices)
    with pytest.raises(BudgetSpent, match=r"max_cost = 1 is reached: 4 requests, .*, cost 1\.2$"):
        limited.ask(questions(*"abcdef"), 9)
    assert limited.figures()["cost"] == pytest.approx(1.2)
    assert [row["cost"] for row in kept(tmp_path)] == pytest.approx([0.3] * 4)
    # Other prices do not change what was paid.
    cheap = endpoint(server, tmp_path, max_cost=1.3, input_cost_per_million=0.0, max_concurrency=1)
    cheap.ask(questions(*"abcdef"), 9)
    assert cheap.figures()["cost"] == pytest.approx(1.2)


# --------------------------------------------------------------------------- written judgments

USER = ({"role": "user", "content": "the sum"},)


def written(server, model: Path, folder: Path, template: str | None = None, **keys: Any):
    from support import recipe

    place = {"base_url": server.url, "model": "m", "max_retries": 0} | keys
    config = JudgeConfig(type="endpoint", endpoint=place, template=template)
    tokenizer = load_tokenizer(recipe("cut", model, folder))
    renderer = Renderer(tokenizer, written_template=template)
    asked = Endpoint(config.endpoint, "judge", folder / "replies.jsonl")
    return make_judge(config, "written", renderer, asked)


def test_a_server_writes_judgments(server, tiny_llama, tmp_path):
    said = {"one": "The response is perfect.", "two": "It is wrong.\n", "three": "", "four": "No."}
    server.answer = staticmethod(
        lambda question: (200, next(said[x] for x in said if f"\n{x}\n" in question))
    )
    who = written(server, tiny_llama, tmp_path, temperature=0.3)
    judgments = who.judge([Answer(USER, x) for x in said])
    assert judgments == [None, "It is wrong.", Failed("the reply is empty"), "No."]
    request = server.asked[0]
    assert [m["role"] for m in request["messages"]] == ["system", "user"]
    assert request["messages"][0]["content"] == "You judge a response to a conversation."
    assert "### Conversation\nthe sum\n\n### Response\n" in request["messages"][1]["content"]
    assert (request["temperature"], request["max_tokens"]) == (0.3, 256)


def test_the_wording_and_what_means_fine_are_data(server, tiny_llama, tmp_path):
    path = tmp_path / "judge.yaml"
    path.write_text("system: ''\nprompt: '{dialogue}>{answer}'\nfine: [Alles gut, 'OK!']\n")
    answers = {"the sum>a": "ok.", "the sum>b": "Alles gut so", "the sum>c": "Okay, no."}
    server.answer = staticmethod(lambda question: (200, answers[question]))
    who = written(server, tiny_llama, tmp_path, str(path), max_tokens=3)
    assert who.judge([Answer(USER, x) for x in "abc"]) == [None, None, "Okay, no."]
    assert all(len(r["messages"]) == 1 and r["max_tokens"] == 3 for r in server.asked)
