"""The newest Megatron-core that is supported, beside the pinned one: tests of several processes pass on both.

Which these are says the marker `processes` (conftest.py); those that stay out on the newest one are named here.

Its wheel asks for Python 3.12 and runs on 3.11 as well; it is unpacked into a folder of its own, before the pinned one
on the path of a subprocess. It imports triton, which installs without a GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEWEST = "0.19.2"
#: Tests that start processes and stay out there, all of them slow ones (together ten minutes), and why.
LEFT_OUT = {
    "what a run does around Megatron: signals, kills, bad samples, guards, full disks, scores": (
        "tests/train/test_faults.py::test_above_the_ceiling_it_stops_and_goes_on_the_same_later",
        "tests/train/test_faults.py::test_bad_samples_are_counted_and_named",
        "tests/train/test_faults.py::test_every_layout_leaves_out_the_same",
        "tests/train/test_faults.py::test_the_loss_is_that_of_the_other_samples",
        "tests/train/test_full_disk.py",
        "tests/train/test_guard.py::test_a_planted_spike",
        "tests/train/test_guard.py::test_rollback_goes",
        "tests/train/test_kills.py",
        "tests/train/test_main.py",
        "tests/train/test_scoring.py::test_data_tensor_and_pipeline_ranks_have_the_scores_of_one",
        "tests/train/test_scoring.py::test_training_does_not_notice",
        "tests/train/test_watchdog.py",
        "tests/tools/test_evaluate.py",
    ),
    "the layouts of tests/model once more, over ten steps": ("tests/tools/test_parity.py",),
    "the plan counts the bytes of the pinned version": ("tests/plan/test_memory.py",),
}


def version() -> str:
    import megatron.core

    return megatron.core.__version__


@pytest.mark.slow
def test_every_process_has_it(pool):
    """In the subprocess, the newest; else, the pinned one."""
    pinned = re.search(r"^megatron-core==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned
    assert pool(2).run(version) == [os.environ.get("EXPECTED_MEGATRON", pinned[1])] * 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_newest_supported_version(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    wheel = ["--ignore-requires-python", "--python-version", "3.12", "--only-binary=:all:"]
    wheel += ["--platform", "manylinux_2_28_x86_64", f"megatron-core=={NEWEST}"]
    for words in ([*install, *wheel], [*install, "triton"]):
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "EXPECTED_MEGATRON": NEWEST,
    }
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "processes", "tests"]
    for each in (name for names in LEFT_OUT.values() for name in names):
        assert (ROOT / each.partition("::")[0]).exists(), each
        words += ["--deselect", each]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 200, done.stdout[-500:]
    print(done.stdout.splitlines()[-1])
