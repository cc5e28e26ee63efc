"""The page about a run: whole, cut off, compared, hostile."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from tools import report

NASTY = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Counts tags, and refuses ones that are left open."""

    VOID = ("meta", "path", "circle")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert self.open == [], self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def run(tmp_path):
    def make(name="a", steps=300, source="captions", **parts):
        folder = tmp_path / name
        (folder / "checkpoints" / "iter_0000100").mkdir(parents=True)
        (folder / "checkpoints" / "iter_0000100" / "x.distcp").write_bytes(b"0" * 2_000_000)
        lines = [
            {
                "step": step, "loss": 8 / step, f"loss/{source}": 8 / step, "grad_norm": 1.0 + step % 3,
                "lr_vision": 1e-4, "useful_tokens": 1000, "image_tokens": 0, "step_time_s": 0.5, "data_wait_s": 0.1,
                "fill": 0.9, "mfu": None, "skipped_steps": 0,
            } | ({"eval_loss": 1.0} if step % 100 == 0 else {})
            for step in range(1, steps + 1)
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + parts.get("tail", "")
        )
        (folder / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": steps}, "run": {"name": source}}))
        (folder / "environment.json").write_text(json.dumps({"python": "3.11", "command": ["train", source]}))
        return folder

    return make


def test_the_page_holds_everything_and_asks_the_network_for_nothing(run):
    folder = run()
    (folder / "exit.json").write_text('{"outcome": "requeue", "reason": "SIGTERM", "step": 300}')
    (folder / "guards").mkdir()
    (folder / "guards" / "events.jsonl").write_text('{"step": 7, "words": "loss is nan", "policy": "skip"}\n{"st')
    (folder / "stragglers.jsonl").write_text(
        '{"step": 300, "ranks": 4, "median_s": {"data": 0.25}, "slowest": [{"rank": 3, "data": 4.5}, 7]}\n'
    )
    assert report.main([str(folder)]) == 0
    text = (folder / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.words)
    for wanted in ("step 300 of 300", "requeue: SIGTERM", "captions", "loss is nan", "iter_0000100", "3.11"):
        assert wanted in words, wanted
    titles = [line for line in re.findall(r"<figcaption>([^<]+) <", text)]
    assert titles[:2] == ["Loss", "Loss per data set"] and "Held-out loss per data set" not in titles
    assert len(titles) == sum(tag == "svg" for tag, _ in page.tags) == 7  # only what the run has numbers for
    assert not re.search(r"https?://|<script|<link|<img|url\(|@import", text)
    assert re.search(r'iter_0000100</td><td class="n">2<', text)  # MB
    assert len(text) < 400_000
    assert re.search(r'useful tokens per second</td><td class="n">2,000<', text)
    assert re.search(r'waiting for data, %</td><td class="n">20<', text)


def test_a_metrics_file_cut_in_the_middle_is_drawn_as_far_as_it_goes(run, capsys):
    folder = run(steps=5, tail='{"step": 6, "loss": 0.')
    assert report.main([str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert "step 5 of 5" in " ".join(Page(text).words) and "1 line(s) of metrics.jsonl are cut off" in text
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole[: len(whole) // 2] + b"\xff\x00")
    assert report.main([str(folder)]) == 0


@pytest.mark.parametrize("length", [1, 2, 199, 201])
def test_short_runs_and_flat_lines_draw(run, length):
    assert report.main([str(run(steps=length))]) == 0


def test_two_runs_share_the_charts_and_show_what_differs(run, tmp_path):
    out = tmp_path / "both.html"
    assert report.main([str(run("a")), str(run("b", steps=50, source="text")), "--out", str(out)]) == 0
    text = out.read_text()
    assert "stroke-dasharray" in text and "solid a, dashed b" in text
    assert re.search(r"<td>train.steps</td><td>300</td><td>50</td>", text)
    Page(text)


def test_words_of_strangers_are_text_on_the_page(run):
    folder = run(source=NASTY)
    (folder / "exit.json").write_text(json.dumps({"outcome": NASTY, "reason": NASTY}))
    (folder / "guards").mkdir()
    (folder / "guards" / "events.jsonl").write_text(json.dumps({"step": NASTY, "words": NASTY, "policy": [NASTY]}))
    assert report.main([str(folder)]) == 0
    page = Page((folder / "report.html").read_text())
    assert not any(tag == "script" for tag, _ in page.tags) and any(NASTY in words for words in page.words)


def test_values_of_wrong_types_are_left_out(run):
    folder = run(steps=3, tail='{"step": 4, "loss": "high", "step_time_s": [1]}\n{"step": 5, "loss": null}\n[]\n')
    (folder / "config.yaml").write_text("[not, a, mapping")
    (folder / "environment.json").write_text("7")
    assert report.main([str(folder)]) == 0


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "metrics.jsonl is not there" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert report.main([str(tmp_path)]) == 1
    assert "holds no steps yet" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert report.main([str(tmp_path), "--out", str(tmp_path)]) == 1
    assert f"error: {tmp_path} is a folder, where a file is needed" in capsys.readouterr().err
