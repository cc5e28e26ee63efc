"""The newest Megatron-core that is supported, beside the pinned one: tests of several processes pass on both.

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
#: Layouts of every kind, checkpoints from one to another, training steps with the optimizer.
CHOSEN = (
    "tests/test_megatron_versions.py::test_every_process_has_it",
    *(
        f"tests/model/test_layouts.py::test_one_step_equals_one_process[{case}]"
        for case in ("tp2_sp_full_recompute_dropout", "pp2_vpp2_dropout", "tp2_cp2_sp_vision", "cp3_ring_dropout")
    ),
    "tests/checkpoint/test_load.py",
    "tests/train/test_layouts.py",
    "tests/checkpoint/test_vlm.py",
)


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
@pytest.mark.timeout(900)
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
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHOSEN]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    print(done.stdout.splitlines()[-1])
