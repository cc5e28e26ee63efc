"""The command on one rank of a large run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.test_imports import ROOT

# Rehearsals take half a minute together: the full run only.
pytestmark = pytest.mark.slow


def run(*arguments: str, timeout_s: int = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/rehearse.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_tiny(tmp_path):
    done = run("examples/recipes/tiny/stage1.yaml", "--world", "4", "--rank", "3", "--micro-batches", "2",
               "parallel.tensor=2", "parallel.sequence=true", "--json", str(tmp_path / "found.json"))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 3 of 4: tensor 1 of 2" in done.stdout and "differs" not in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["calls"] == found["planned_calls"] and len(found["calls"]) > 5
    assert found["static_bytes"] == pytest.approx(found["planned_static_bytes"], abs=8)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--world", "64", "--rank", "64"], "rank 64 does not exist in a world of 64"),
        (["--world", "6"], "6 processes cannot be divided into models of 4"),
        (["--world", "0"], "0 processes are no run; needed: 1 or more"),
        (["--world", "64", "--micro-batches", "0"], "--micro-batches 0: needed 1 or more"),
        (["--world", "64", "--json", "no/such/a.json"], "no/such/a.json is not there, nor is its folder no/such."),
    ],
)
def test_wrong_input(arguments, words):
    done = run("examples/recipes/molmo2_8b/stage2.yaml", *arguments)
    assert done.returncode == 1 and words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_real_sizes():
    """Rank 17 of 64 of the released 4B recipe at 36,864 tokens: a model of 4.5 billion parameters on a laptop."""
    done = run("examples/recipes/molmo2_4b/stage3.yaml", "--world", "64", "--rank", "17", "--micro-batches", "1",
               timeout_s=1100)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
