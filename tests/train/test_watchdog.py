"""Ranks that hang or die, on real processes: who is named, and that nobody is left."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import time
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vlm.config.schema import GuardConfig
from megatron_vlm.parallel import pool as pools
from megatron_vlm.train import watchdog
from tests.data import world as data
from tests.train import kills

#: Seconds that a rank may be in one phase; a step takes a tenth of one on a free core.
LIMIT_S = 4.0


def beat(rank: int, **facts: Any) -> dict[str, Any]:
    """A heartbeat."""
    usual = {
        "host": "a",
        "pid": 1,
        "time": 0.0,
        "step": 7,
        "phase": "forward",
        "for_s": 5.0,
        "waits_in": "",
        "keys": [],
    }
    return {"rank": rank, "answered": True} | usual | facts


def test_the_rank_that_waits_for_nobody_is_at_fault():
    waiting = beat(0, waits_in="all_reduce", for_s=30.0, phase="collective")
    said = watchdog.verdict([waiting, beat(1, phase="data", keys=["captions/a", "captions/b"]), waiting | {"rank": 2}])
    assert said == (
        "The run hangs: rank 1 is in phase data of step 7, since 5.0 s (samples captions/a, captions/b, ...); "
        "2 wait for it."
    )
    silent = beat(1, answered=False, phase="save", time=time.time() - 9)
    assert "rank 1 does not answer, last heard of 9 s ago in phase save" in watchdog.verdict([waiting, silent])
    assert "rank 1 does not answer, never heard of" in watchdog.verdict([waiting, None])
    both = watchdog.verdict([waiting, waiting | {"rank": 1, "waits_in": "all_gather"}])
    assert both == "The run hangs: every rank waits for another, in all_gather, all_reduce."
    assert len(watchdog.table([waiting, None]).splitlines()) == 3


def _asleep(config, where: str, victim: int) -> None:
    """`loop.train`, with one rank that falls asleep or dies in step 3."""
    from megatron_vlm.checkpoint import save
    from megatron_vlm.data.collate import Collator
    from megatron_vlm.model.vlm import VlmModel
    from megatron_vlm.train.step import Stepper

    owner, name, happens = {
        "data": (Collator, "attempt", lambda *_: time.sleep(200)),
        # Holds Python's lock all the while: no thread of this process gets a turn.
        "forward": (VlmModel, "forward", lambda *_: ctypes.PyDLL(None).sleep(200)),
        "collective": (Stepper, "_agreed", lambda *_: time.sleep(200)),
        "save": (save.torch_checkpoint.FileSystemWriter, "write_data", lambda *_: time.sleep(200)),
        "killed": (VlmModel, "forward", lambda *_: os.kill(os.getpid(), signal.SIGKILL)),
    }[where]
    original, calls = getattr(owner, name), 0

    def planted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return happens(*args) if calls >= first else original(*args, **kwargs)

    first = {"save": 1, "collective": 3}.get(where, 7)  # the third step of three micro-batches
    if dist.get_rank() == victim:
        setattr(owner, name, planted)
    kills.train(config)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains on two ranks until `where` happens on rank 1: (exit codes, what the pool says, hang.txt, exit.json)."""
    monkeypatch.setattr(pools, "GRACE_S", 30.0)  # the ranks must end by themselves
    data.build(tmp_path, sizes={"captions": 30, "pointing": 15, "text": 10})

    def go(where: str) -> tuple[list[int], str, str, str]:
        config = kills.settings(tmp_path, tmp_path / "run", "dp2", steps=8, every=2)
        config = dataclasses.replace(config, guard=GuardConfig(hang_s=LIMIT_S))
        pool = pools.Pool(2)
        pool._start()
        processes = list(pool._processes)
        with pytest.raises(RuntimeError) as failure:
            pool.run(_asleep, config, where, 1, timeout_s=90)
        pool.close()
        report = tmp_path / "run" / "hang.txt"
        told = json.loads((tmp_path / "run" / "exit.json").read_text())
        assert told["outcome"] == "failed"
        page = report.read_text() if report.exists() else ""
        return [process.exitcode for process in processes], str(failure.value), page, told["reason"]

    return go


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("where", "words", "stack"),
    [
        ("data", "rank 1 is in phase data of step 3", "result"),
        ("collective", "rank 1 is in phase collective of step 3", "planted"),
        ("save", "rank 1 is in phase save of step 2", "planted"),
    ],
)
def test_a_rank_that_sleeps_is_named_and_every_process_ends(run, where, words, stack):
    codes, _, report, told = run(where)
    assert codes == [watchdog.HUNG_CODE] * 2
    assert words in report.splitlines()[0] and words in told
    table, first, second = report.split("--- rank ")
    assert len(table.strip().splitlines()) == 5 and "captions-" in table
    assert "distributed_c10d" in first and stack in second


@pytest.mark.slow
@pytest.mark.processes
def test_a_rank_that_blocks_python_is_named_too_and_ends(run, tmp_path):
    codes, _, report, told = run("forward")
    assert codes == [watchdog.HUNG_CODE, 1]
    assert "rank 1 does not answer, last heard of " in report and "rank 1" in told
    assert "planted" in (tmp_path / "run" / "heartbeats" / "rank-00001.stacks").read_text()


@pytest.mark.slow
@pytest.mark.processes
def test_a_rank_that_is_killed_is_named(run):
    codes, failure, report, told = run("killed")
    assert codes[1] == -signal.SIGKILL and not report
    assert "The process of rank 1 is gone. Its last heartbeat: phase" in told
