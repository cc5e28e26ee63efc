"""What can be shown of the images without Docker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker" / "Dockerfile"


def instructions(stage: str) -> list[tuple[str, str]]:
    """(instruction, words) of one image."""
    found: list[tuple[str, str]] = []
    inside = False
    for each in DockerfileParser(path=str(FILE)).structure:
        if each["instruction"] == "FROM":
            inside = each["value"].endswith(f" AS {stage}")
        elif inside:
            found.append((each["instruction"], each["value"]))
    assert found, stage
    return found


def test_the_linter_finds_nothing():
    done = subprocess.run(["hadolint", str(FILE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_linter_would_find_something(tmp_path):
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python:latest\nRUN pip install numpy\n")
    assert subprocess.run(["hadolint", str(wrong)], capture_output=True, timeout=60).returncode == 1


@pytest.mark.parametrize("stage", ["gpu", "cpu"])
def test_images_are_checked_when_built_and_do_not_run_as_root(stage):
    names = instructions(stage)
    assert ("USER", "10001") in names
    assert any(f"docker/check.py {stage}" in words for name, words in names if name == "RUN")


@pytest.mark.slow
def test_the_check_names_what_is_missing():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docker" / "check.py"), "gpu"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "transformer_engine.pytorch: " in done.stderr and "apex.optimizers: " in done.stderr
    assert "torch" in done.stdout and "webdataset" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_lines_of_the_cpu_image_run_in_a_clean_environment(tmp_path):
    """All RUN lines but the one that adds a user of the machine."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=120)
    names = ("docker", "examples", "megatron_vlm", "tools")
    for name in names:
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "clone" / name)
    keep = {name: words for name, words in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = keep | {"PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"}
    environment["TORCH_INDEX"] = os.environ.get("VLM_TORCH_INDEX", "")
    lines = [words for name, words in instructions("cpu") if name == "RUN" and not words.startswith("useradd")]
    assert len(lines) == 3
    for line in lines:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=tmp_path / "clone",
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
