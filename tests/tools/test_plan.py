"""The command: a page, JSON, exit codes, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.test_imports import ROOT

RECIPE = "examples/recipes/molmo2_4b/stage2.yaml"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_fits(tmp_path):
    done = run(RECIPE, "--gpu", "h100", "--nodes", "4", "--json", str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr
    for words in ("Memory of a rank, GiB", "MFU", "days", "Bounded by", "image features", "Fits:"):
        assert words in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["peak_bytes"] < plan["usable_bytes"]


def test_sweep_as_json():
    done = run(RECIPE, "--gpu", "h100", "--nodes", "1", "--sweep", "--json", "-")
    layouts = json.loads(done.stdout)["sweep"]
    assert done.returncode == 0 and len(layouts) > 20
    assert layouts[0]["fits"] and layouts[0]["step_s"] <= min(each["step_s"] for each in layouts if each["fits"])


def test_does_not_fit():
    done = run(RECIPE, "--gpu", "a100-40", "--nodes", "2", "train.recompute=none")
    assert done.returncode == 1
    assert "Does not fit: stage 0 needs" in done.stdout and "Cheapest change: " in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--gpu", "h1000"], "GPU 'h1000' is not known"),
        (["--gpu", "h100", "--nodes", "0"], "0 nodes of 8 GPUs"),
        (["--gpu", "h100", "--gpus-per-node", "3"], "3 processes cannot be divided into models of 2"),
        (["--gpu", "h100", "data.sequence_length=65536"], "65536 is longer than the 40960 positions"),
        (["--gpu", "h100", "parallel.tensor=7"], "parallel.tensor=7 does not divide"),
        (["--gpu", "h100", "--loss-share", "2"], "a loss share of 2.0"),
        (["--gpu", "h100", "paralel.tensor=2"], "paralel"),
        (["--gpu", "h100", "--network", "0"], "--network 0: needed above 0"),
        (["--gpu", "h100", "--reach", "1", "2", "0"], "--reach 1.0 2.0 0.0: needed three shares"),
        (["--gpu", "h100", "--json", "no/such/a.json"], "no/such/a.json is not there, nor is its folder no/such."),
    ],
)
def test_wrong_input(arguments, words):
    done = run(RECIPE, *arguments)
    assert done.returncode == 1 and words in done.stderr and not done.stdout
    assert "Traceback" not in done.stderr


def test_needs_no_torch_and_little_time():
    code = (
        "import runpy, sys, time\n"
        f"sys.argv = ['plan.py', {RECIPE!r}, '--gpu', 'h100', '--nodes', '4']\n"
        "try:\n    runpy.run_path('tools/plan.py', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert time.process_time() < 2, time.process_time()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
