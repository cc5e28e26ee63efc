"""examples/slurm without SLURM: the commands of its README exist, the check of a node finds faults."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "examples" / "slurm" / "README.md").read_text(encoding="utf-8")


def test_commands_of_the_readme_have_their_files_and_options():
    lines = README.replace("\\\n", " ").splitlines()
    commands = [line.split("#")[0] for line in lines if re.match(r"(\w+=\S+ )*(python|bash|sbatch|srun)\b", line)]
    assert len(commands) >= 9
    for command in commands:
        files = re.findall(r"\b(?:tools|examples)/[\w./]+\.(?:py|sh|sbatch|yaml)\b", command)
        assert files and all((ROOT / file).exists() for file in files), command
        if files[0].endswith(".py"):
            source = (ROOT / files[0]).read_text()
            options = re.findall(r" (--[\w-]+)", command)
            assert all(f'"{option}"' in source for option in options), command


@pytest.mark.parametrize(
    "gpus, asked, words",
    [(8, "8", ""), (8, "4", ""), (7, "8", "node7: nvidia-smi finds 7 of the 8 GPUs of this job"), (0, "", "")],
)
def test_node_check(tmp_path, gpus, asked, words):
    """The command that every node runs first, with a made-up nvidia-smi."""
    check = re.search(r"<< 'CHECK'\n(.*?)\nCHECK\n", (ROOT / "examples/slurm/train.sbatch").read_text(), re.S)
    assert check
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "echo NVIDIA H100\n" * gpus)
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_PROCID": "0", "SLURMD_NODENAME": "node7"}
    environment["SLURM_GPUS_ON_NODE"] = asked
    words_given = ["bash", "-c", check[1], str(tmp_path)]
    done = subprocess.run(words_given, env=environment, capture_output=True, text=True, timeout=20)
    assert done.stdout.strip() == words and done.returncode == bool(words)
    gone = subprocess.run([*words_given[:3], str(tmp_path / "no")], env=environment, capture_output=True, text=True)
    assert gone.returncode == 1 and "node7: cannot write in" in gone.stdout
