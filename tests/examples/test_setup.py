"""The environment part of the two commands: which Python, which environment, and what it says before it downloads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_ENVIRONMENT = {"VIRTUAL_ENV": "", "CONDA_PREFIX": "", "CONDA_DEFAULT_ENV": "", "PYTHON": sys.executable}


def sourced(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run shell code after `. examples/setup.sh`."""
    return subprocess.run(
        ["bash", "-c", f". examples/setup.sh; {code}"],
        cwd=ROOT,
        env=dict(os.environ) | NO_ENVIRONMENT | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def old_python(tmp_path) -> Path:
    program = tmp_path / "python3.9"
    program.write_text("#!/bin/sh\necho 3.9.18\nexit 1\n")
    program.chmod(0o755)
    return program


def test_a_python_that_is_too_old_is_named_before_anything_else(old_python, tmp_path):
    done = sourced(f"prepare_environment {tmp_path} run", PYTHON=str(old_python))
    assert done.returncode == 1 and list(tmp_path.iterdir()) == [old_python]
    assert "Python 3.11 or newer is needed; found:" in done.stderr and "python3.9 3.9.18" in done.stderr


def test_no_python_at_all(tmp_path):
    done = sourced(f"prepare_environment {tmp_path} run", PYTHON="/nowhere/python")
    assert done.returncode == 1 and "Python 3.11 or newer is needed; found: none." in done.stderr


def test_describing_downloads_nothing(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\n# comment\nnumpy==2.4.6\n")
    done = sourced(f"describe_environment {tmp_path}")
    assert done.returncode == 0 and "the 2 pinned packages" in done.stdout and "MB to download" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["requirements.txt"]


@pytest.mark.parametrize(
    ("env", "active"),
    [
        ({}, "no"),
        ({"VIRTUAL_ENV": "/v"}, "yes"),
        ({"CONDA_PREFIX": "/c", "CONDA_DEFAULT_ENV": "work"}, "yes"),
        ({"CONDA_PREFIX": "/c", "CONDA_DEFAULT_ENV": "base"}, "no"),
    ],
)
def test_which_environments_count_as_active(env, active):
    assert sourced("environment_is_active && echo yes || echo no", **env).stdout.strip() == active


def test_an_active_environment_that_lacks_packages_is_left_alone_and_they_are_named(tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    path = f"{tmp_path / 'env' / 'bin'}:{os.environ['PATH']}"
    done = sourced(f"prepare_environment {ROOT} run", VIRTUAL_ENV=str(tmp_path / "env"), PATH=path)
    assert done.returncode == 1
    assert "lacks torch==2.13.0, megatron-core==0.16.1" in done.stderr and "hypothesis" not in done.stderr
    done = sourced(f"prepare_environment {ROOT} tests", VIRTUAL_ENV=str(tmp_path / "env"), PATH=path)
    assert "hypothesis==" in done.stderr and "sympy" not in done.stderr


def test_a_made_environment_is_used_again_until_the_pins_change(tmp_path):
    (tmp_path / "requirements.txt").write_text("numpy==2.4.6\n")
    venv.create(tmp_path / ".venv", with_pip=False, symlinks=True)
    stamp = f'environment_stamp {tmp_path} {tmp_path}/.venv/bin/python > "{tmp_path}/.venv/installed"'
    ready = f"environment_is_ready {tmp_path} && echo ready || echo not"
    assert sourced(ready).stdout.strip() == "not"
    assert sourced(f"{stamp}; {ready}; describe_environment {tmp_path}").stdout.startswith(
        "ready\nPython environment: "
    )
    (tmp_path / "requirements.txt").write_text("numpy==2.4.5\n")
    assert sourced(ready).stdout.strip() == "not"


def test_the_pins_lie_in_the_ranges_of_setup_py():
    """Every range of setup.py has a pin, and the pin keeps it."""
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {Requirement(line).name.lower().replace("_", "-"): line.split("==")[1] for line in lines if "==" in line}
    ranges = [
        Requirement(text) for text in re.findall(r'^ +"([a-zA-Z_-]+[^"]*)",$', (ROOT / "setup.py").read_text(), re.M)
    ]
    assert len(ranges) >= 20
    for wanted in ranges:
        assert pins[wanted.name.lower().replace("_", "-")] in wanted.specifier, wanted
