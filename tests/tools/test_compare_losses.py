"""Losses of runs side by side: what agrees, what differs, what is missing."""

from __future__ import annotations

import json

import pytest

from tools import compare_losses


@pytest.fixture
def run(tmp_path):
    """A run directory with (step, loss) lines."""

    def make(name, *steps):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": x}) + "\n" for s, x in steps))
        return folder

    return make


def test_equal_runs_agree_exactly(run, capsys):
    runs = [run("one", (1, 2.5), (2, 2.0)), run("two", (1, 2.5), (2, 2.0))]
    assert compare_losses.main([*map(str, runs), "--tolerance", "0"]) == 0
    assert "2.5000000000" in capsys.readouterr().out


def test_the_largest_difference_decides(run, capsys):
    runs = [run("one", (1, 2.0), (2, 1.0)), run("two", (1, 2.0), (2, 1.0)), run("three", (1, 2.0), (2, 1.001))]
    assert compare_losses.table(runs)[1] == pytest.approx(1e-3)
    assert compare_losses.main([*map(str, runs), "--tolerance", "1e-2"]) == 0
    assert compare_losses.main([*map(str, runs), "--tolerance", "1e-4"]) == 1
    assert "Largest relative difference: 1.0e-03; allowed: 1.0e-04" in capsys.readouterr().out


def test_a_step_done_again_after_a_resume_counts_once(run):
    runs = [run("straight", (1, 3.0), (2, 2.0)), run("resumed", (1, 3.0), (2, 9.0), (2, 2.0))]
    assert compare_losses.table(runs)[1] == 0


@pytest.mark.parametrize("other", [[(1, 3.0)], [(1, 3.0), (2, None)]], ids=["missing", "not a number"])
def test_a_missing_step_or_loss_is_a_difference(run, other, capsys):
    runs = [run("one", (1, 3.0), (2, 2.0)), run("two", *other)]
    assert compare_losses.main([str(path) for path in runs]) == 1
    assert "a step is missing" in capsys.readouterr().err


def test_long_runs_show_first_and_last_step_and_compare_all(run):
    steps = [(step, 1.0) for step in range(1, 101)]
    other = [(step, 1.5 if step == 50 else 1.0) for step in range(1, 101)]
    text, worst = compare_losses.table([run("one", *steps), run("two", *other)])
    assert worst == 0.5 and len(text.splitlines()) == 13
    assert text.splitlines()[1].split()[0] == "1" and text.splitlines()[-1].split()[0] == "100"


def test_what_is_no_run_is_named(run, tmp_path, capsys):
    assert compare_losses.main([str(run("one", (1, 1.0))), str(tmp_path / "gone")]) == 1
    assert "gone/metrics.jsonl cannot be read" in capsys.readouterr().err
    assert compare_losses.main([str(run("two", (1, 1.0))), str(run("empty"))]) == 1
    assert "holds no steps yet" in capsys.readouterr().err
