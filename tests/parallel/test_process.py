"""Which GPU is a process's own, and how many cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.parallel import process
from megatron_vlm.parallel.process import own_device


@pytest.mark.parametrize("local_rank, devices, own", [(0, 1, 0), (3, 8, 3), (7, 8, 7), (5, 1, 0)])
def test_own_device(local_rank, devices, own):
    """The last: SLURM shows each task its own GPU only (--gpus-per-task)."""
    assert own_device(local_rank, devices) == own


def test_more_processes_than_gpus():
    with pytest.raises(ValueError, match="process 4 of this node sees 4 GPUs: start one process for each"):
        own_device(4, 4)


@pytest.mark.parametrize("processes, given, threads", [(8, None, "4"), (64, None, "1"), (1, None, None), (8, "2", "2")])
def test_the_processes_of_a_node_share_its_cores(monkeypatch, processes, given, threads):
    """One process alone takes all; what the user has set stays."""
    monkeypatch.setenv("RAYON_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("RAYON_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(process.cpu, "enable", lambda device: None)
    monkeypatch.setattr(process.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    process.start(RunConfig(device="cpu"))
    assert os.environ.get("RAYON_NUM_THREADS") == threads


def test_the_tokenizers_library_keeps_to_it():
    code = (
        "import os\n"
        "from tokenizers import Tokenizer, models\n"
        "from megatron_vlm.parallel import process\n"
        "process.share_cores(2)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "Tokenizer(models.WordLevel({'a': 0}, 'a')).encode_batch_fast(['a'] * 1000)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    wanted = max(1, (os.cpu_count() or 1) // 2)
    environment = {name: value for name, value in os.environ.items() if name != "RAYON_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert int(done.stdout) == wanted, done.stderr
