"""README's first command: its dry run, and, in the full run of tests, the command itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def quickstart(*arguments: str, cwd: Path, timeout_s: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "quickstart.sh"), *arguments],
        cwd=cwd,
        env=dict(os.environ) | env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_a_dry_run_says_sizes_and_times_and_does_nothing(tmp_path):
    done = quickstart("--dry-run", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Python environment:" in done.stdout and "easy-vqa==1.0" in done.stdout
    assert "MB to download" in done.stdout and "minutes" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_needs_no_package(tmp_path):
    """It is what one runs before anything is installed: -S hides the installed ones."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nexec /usr/bin/env python3 -S "$@"\n')
    python.chmod(0o755)
    done = quickstart("--dry-run", cwd=ROOT, PYTHON=str(python), VIRTUAL_ENV="", CONDA_PREFIX="")
    assert done.returncode == 0 and "easy-vqa==1.0" in done.stdout, done.stderr


def test_an_unknown_argument_is_refused(tmp_path):
    done = quickstart("--dryrun", cwd=tmp_path)
    assert done.returncode == 2 and "usage: bash examples/quickstart.sh [--dry-run]" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script", ["examples/quickstart.sh", "examples/setup.sh", "examples/launch.sh", "tests/run.sh"]
)
def test_scripts_are_valid_bash(script):
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(2700)
def test_the_quickstart_trains_answers_scores_and_resumes(tmp_path):
    done = quickstart(cwd=tmp_path, timeout_s=2600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for stage in (1, 2, 3):
        run = tmp_path / "runs" / f"tiny-stage{stage}"
        losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert (run / "checkpoints" / "latest").exists()
        if stage == 1:
            assert losses[-1] < 0.6 * losses[0]
    demo = tmp_path / "runs" / "quickstart"
    assert list((demo / "pictures-before").glob("*.png")) and list((demo / "pictures-after").glob("*.png"))
    assert (tmp_path / "runs" / "tiny-stage3" / "evaluation.md").read_text()
    assert (demo / "huggingface" / "model.safetensors").stat().st_size > 1e6
    # Two layouts agree within float32, a killed run exactly.
    assert "allowed: 1.0e-05." in done.stdout
    assert "Largest relative difference: 0.0e+00; allowed: 0.0e+00." in done.stdout
    assert "--- killed after step" in done.stdout
