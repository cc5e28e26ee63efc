"""Stage 3 at its real length on a real film, through its script: two processes that share a row of 36,864 tokens."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.examples.test_launch import LAUNCHER, ROOT

TOKENS, FRAMES = 36_864, 384


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_row_of_36864_tokens_with_384_frames_trains(tmp_path):
    """One step: its time is that of a laptop's core. Memory tells that nothing of S x S exists on any rank."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    done = subprocess.run(
        ["bash", "examples/longcontext_stage3.sh", "init.checkpoint=", f"run.dir={tmp_path / 'run'}", "train.steps=1"],
        cwd=ROOT,
        env=env | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "RECIPE": "tiny_film", "NPROC": "2"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr
    (step,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert (step["tokens"], step["crops"], step["image_tokens"]) == (TOKENS, FRAMES, FRAMES * 64)
    assert step["fill"] > 0.99 and step["samples"] > 1
    # Random weights: near the logarithm of the vocabulary.
    assert 7 < step["loss"] < 9 and step["loss/film"] > 7 and min(step[f"grad_norm_{c}"] for c in COMPONENTS) > 0
    peaks = [float(peak) for peak in re.search(r"Peak memory by rank: (.+) GB\.", done.stdout)[1].split(", ")]
    print(f"peak memory {peaks} GB, step {step['step_time_s']:.0f} s")
    # One S x S tensor in float32 would take 5.4 GB.
    assert len(peaks) == 2 and max(peaks) < 2.7


COMPONENTS = ("vision", "connector", "language")
