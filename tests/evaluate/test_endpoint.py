"""The judge behind a real HTTP server that answers, fails, stalls and talks nonsense; and the judge without a model."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from megatron_vlm.evaluate import kinds, statements
from megatron_vlm.evaluate.endpoint import PATIENCE, Endpoint
from megatron_vlm.evaluate.statements import JudgeError, Overlap
from tests.data.server import Server, send

PATH = "/v1/chat/completions"
TRUTH = "A red cup. Two dogs sleep."


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.stop()


def drip(handler: BaseHTTPRequestHandler, _: int) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(6):
        handler.wfile.write(b" ")
        time.sleep(0.04)


def judge(server: Server, **settings) -> Endpoint:
    """One that is patient enough for a busy machine, unless a test is about waiting."""
    return Endpoint(f"{server.address}/v1/", "judge-1", key="secret", **{"timeout_s": 20.0, "wait_s": 0.01} | settings)


def reply(handler: BaseHTTPRequestHandler, text: object) -> None:
    send(handler, body=json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode())


def sensible(server: Server, handler: BaseHTTPRequestHandler) -> None:
    """Splits at full stops; a statement is stated if the caption holds its words in this order."""
    question = json.loads(server.bodies[-1])["messages"][0]["content"]
    caption = question.split("Caption:\n")[1].split("\n\nStatements:\n")
    if len(caption) == 1:
        found = [part.strip() for part in caption[0].split(".") if part.strip()]
    else:
        asked = [line.split(". ", 1)[1] for line in caption[1].splitlines()]
        found = ["stated" if one.lower() in caption[0].lower() else "not stated" for one in asked]
    reply(handler, f"Here you are:\n```json\n{json.dumps(found)}\n```")


def test_a_caption_is_judged_by_its_statements(server):
    server.answers[PATH] = lambda handler, _: sensible(server, handler)
    scores = statements.caption("Two dogs sleep. A blue hat. A red cup.", TRUTH, judge(server))
    assert scores["recall"] == (1.0, 1) and scores["consistency"] == (pytest.approx(2 / 3), 1)
    assert scores["statement F1"] == (pytest.approx(0.8), 1)
    body = json.loads(server.bodies[0])
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert server.requests[0][1]["Authorization"] == "Bearer secret"
    # Statements that the data set gives are not made up again.
    known = statements.caption("Two dogs sleep.", TRUTH, judge(server), ["Two dogs sleep", "A fire"])
    assert known["recall"] == (0.5, 1)


def test_a_judge_that_fails_stalls_and_babbles_is_asked_again(server):
    def answer(handler: BaseHTTPRequestHandler, seen: int) -> None:
        if seen == 0:
            send(handler, 503)
        elif seen == 1:
            time.sleep(0.7)
            send(handler)
        elif seen == 2:
            reply(handler, "I would rather not say.")
        else:
            reply(handler, '["stated", "not stated"]')

    server.answers[PATH] = answer
    assert judge(server, timeout_s=0.5, tries=8).stated(["a", "b"], "c") == [True, False]
    assert len(server.requests) >= 4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda handler, _: send(handler, 500), "status 500"),
        (lambda handler, _: send(handler, body=b"<html>"), "no chat completion"),
        (lambda handler, _: send(handler, body=b"\xff" * 100), "no chat completion"),
        (lambda handler, _: reply(handler, None), "without text"),
        (lambda handler, _: reply(handler, '["yes", "no"]'), "no list of 2 verdicts"),
        (lambda handler, _: reply(handler, '["stated"]'), "no list of 2 verdicts"),
        (lambda handler, _: reply(handler, "[1, [2]"), "without a list"),
        (lambda handler, _: handler.connection.shutdown(socket.SHUT_RDWR), "no connection"),
    ],
    ids=["fails", "html", "bytes", "empty", "other words", "too few", "nonsense", "hangs up"],
)
def test_no_verdict_is_not_scored_and_named(server, answer, reason):
    server.answers[PATH] = answer
    with pytest.raises(JudgeError, match=reason):
        judge(server, tries=2).stated(["a", "b"], "c")
    assert len(server.requests) == 2
    question = kinds.Question("", TRUTH, {"statements": ["a", "b"]}, judge=judge(server, tries=1))
    found = kinds.verdict(kinds.KINDS["caption"], question, "A red cup.")
    assert found.outcome == "not scored" and found.scores == {} and reason in found.reason


@pytest.mark.parametrize("answer", [lambda handler, _: time.sleep(0.3), drip], ids=["stalls", "drips"])
def test_no_answer_in_time_is_no_verdict(server, answer):
    server.answers[PATH] = answer
    with pytest.raises(JudgeError, match="no answer in time"):
        judge(server, tries=1, timeout_s=0.15).stated(["a", "b"], "c")


def test_verdicts_are_kept_and_not_asked_for_again(server, tmp_path):
    server.answers[PATH] = lambda handler, _: sensible(server, handler)
    kept = tmp_path / "evaluation" / "judge.jsonl"
    first = statements.caption("Two dogs sleep.", TRUTH, judge(server, kept=kept))
    count = len(server.requests)
    with kept.open("a") as file:
        file.write('["torn')  # the process was killed while it wrote
    assert statements.caption("Two dogs sleep.", TRUTH, judge(server, kept=kept)) == first
    assert len(server.requests) == count > 0
    other = Endpoint(f"{server.address}/v1", "judge-2", kept=kept)  # another model is another judge
    assert statements.caption("Two dogs sleep.", TRUTH, other) == first and len(server.requests) == 2 * count


def test_a_judge_that_is_down_is_not_asked_for_ever():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    down = Endpoint(f"http://127.0.0.1:{port}/v1", "m", timeout_s=0.2, tries=1)
    for _ in range(PATIENCE):
        with pytest.raises(JudgeError, match="no connection"):
            down.stated(["a"], "b")
    with pytest.raises(JudgeError, match=f"not asked any more: no verdict {PATIENCE} times in a row"):
        down.stated(["a"], "b")


def test_a_refusal_ends_the_evaluation_without_the_key(server):
    server.answers[PATH] = lambda handler, _: send(handler, 401, b"bad key")
    with pytest.raises(ValueError, match=r"refuses \(status 401\): 'bad key'. Check --judge") as error:
        kinds.verdict(kinds.KINDS["caption"], kinds.Question("", TRUTH, judge=judge(server)), "A cup.")
    assert "secret" not in str(error.value) and len(server.requests) == 1
    with pytest.raises(ValueError, match="is no http"):
        Endpoint("ftp://host", "m")


def test_overlap_compares_words():
    judge = Overlap()
    assert judge.statements("A red cup; two dogs. 3.5 m away!") == ["A red cup", "two dogs", "3.5 m away"]
    assert judge.stated(["red cup", "red dog", "a red cup on it"], "There is a red cup.") == [True, False, True]
    # Nothing said, nothing wrong, nothing right.
    assert statements.caption("", TRUTH, judge)["statement F1"] == (0.0, 1)
    half = statements.caption("A red cup. A cat.", TRUTH, judge)
    assert half["recall"] == (0.5, 1) and half["consistency"] == (0.5, 1) and half["statement F1"] == (0.5, 1)
