"""Runs take turns; results, page and history are written together."""

from __future__ import annotations

import json

import pytest

from benchmarks import record


def test_runs_take_turns_and_warm_up_is_left_out():
    order = []
    ticks = iter(range(100))
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = record.alternate(runs, rounds=2, warmup=1, clock=lambda: next(ticks))
    assert order == ["a", "b"] * 3 and seconds == {"a": [1, 1], "b": [1, 1]}
    assert record.medians({"a": [1.0, 9.0, 2.0]}) == {"a": 2.0}


def test_written_together_and_history_only_grows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for ratio in (0.5, 0.75):
        record.write("it", "What it is.", {"rows": [1]}, [{"size": 1200, "ratio": ratio}], {"x": ratio},
                     [("one over another", str(ratio))], 1)  # fmt: skip
    content = json.loads((tmp_path / "it.json").read_text())
    assert content["key"] == {"x": 0.75} and content["rows"] == [1] and content["machine"]["threads"] == 1
    page = (tmp_path / "it.md").read_text()
    assert "| 1,200 | 0.75 |" in page and "What it is." in page and content["commit"] in page
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["x"] for line in lines] == [0.5, 0.75] and lines[0]["benchmark"] == "it"


@pytest.mark.parametrize("values, words", [([0.5], "0.50"), ([2.0, 1.0], "1.00 to 2.00")])
def test_span(values, words):
    assert record.span(values) == words
