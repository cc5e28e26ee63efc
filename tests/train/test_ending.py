"""Reasons to end early: noted on one rank, agreed on all."""

import json
import os
import signal
import time

import pytest

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.train import ending
from megatron_vlm.train.ending import Ending, Watch


@pytest.fixture
def watch(tmp_path, one_rank):
    def make(**run):
        return Watch(RunConfig(**run), tmp_path)

    return make


def test_nothing_happens_without_a_reason(watch):
    with watch() as watching:
        assert watching.agreed() == ""


@pytest.mark.parametrize("number", ending.SIGNALS)
def test_a_signal_is_a_reason_and_does_not_end_the_process(watch, number):
    before = signal.getsignal(number)
    with watch() as watching:
        os.kill(os.getpid(), number)
        assert watching.agreed() == number.name
        assert watching.agreed() == number.name
    assert signal.getsignal(number) == before


def test_the_stop_file_is_a_reason_and_a_signal_the_stronger_one(watch, tmp_path):
    with watch() as watching:
        (tmp_path / "stop").touch()
        assert watching.agreed() == "stop file"
        os.kill(os.getpid(), signal.SIGTERM)
        assert watching.agreed() == "SIGTERM"


def test_the_time_limit_leaves_time_for_a_step_and_a_save(watch):
    long = watch(time_limit="00:01:00")
    long._began = time.monotonic()  # as if this process were new: the tests' own may be older than the limit
    assert long.agreed() == ""  # 3 s for a save of unknown length
    long.saved(50.0)
    assert long.agreed() == "time limit"
    assert watch(time_limit="0.001").agreed() == "time limit"  # this process is older


def _on_each_rank(folder, hit):
    import torch.distributed as dist

    with Watch(RunConfig(), folder) as watching:
        # pool tasks run in the main thread of each rank
        first = watching.agreed()
        if dist.get_rank() == hit:
            signal.raise_signal(signal.SIGUSR1)
        return first, watching.agreed()


def test_what_one_rank_has_seen_all_ranks_do(pool, tmp_path):
    assert pool(2).run(_on_each_rank, tmp_path, 1) == [("", "SIGUSR1")] * 2


def test_exit_json_says_how_it_ended(tmp_path):
    Ending("requeue", "SIGTERM", 7).write(tmp_path)
    assert json.loads((tmp_path / "exit.json").read_text()) == {"outcome": "requeue", "reason": "SIGTERM", "step": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]
    assert [Ending(outcome, "", 1).code for outcome in ("finished", "requeue", "failed")] == [0, 85, 1]
