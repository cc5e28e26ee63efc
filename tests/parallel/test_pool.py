"""The process pool: results by rank, failures with their traceback, hangs that end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.pool import Pool


def total(value: int) -> tuple[int, int]:
    tensor = torch.tensor(value + dist.get_rank())
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor.item()


def fail_on(rank: int) -> None:
    dist.barrier()  # a rank that is still looking for the others would say so, and the call would be made again
    if dist.get_rank() == rank:
        raise KeyError("the planted error")
    dist.barrier()


def leave(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def hang() -> None:
    while True:
        time.sleep(1)


def step() -> None:
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups
    from megatron_vlm.train import optim
    from megatron_vlm.train.step import Stepper
    from tests.model import tiny

    layout = Layout(2)
    groups.initialize(layout, seed=0, timeout_s=50)
    config = tiny.config(tiny.ARCH, global_batch=2)
    models = optim.wrap(build(config, layout), config)
    Stepper(models, optim.build(models, config), config, ["data"]).train([tiny.batch(tiny.ARCH, [dist.get_rank()])], 1)
    assert len(os.listdir("/proc/self/task")) > 40


def threads_and_modules() -> tuple[int, int]:
    modules = [each for each in gc.get_objects() if issubclass(type(each), torch.nn.Module)]
    return len(os.listdir("/proc/self/task")), len(modules)


def test_results_come_by_rank_and_groups_are_fresh(pool):
    assert pool(2).run(total, 5) == [(0, 11), (1, 11)]
    assert pool(2).run(total, 6) == [(0, 13), (1, 13)]


def test_models_and_threads_of_a_call_end_with_it(pool):
    """Else hundreds of threads, each waking 100 times a second, make the calls after it slow."""
    pool(2).run(step)
    once = pool(2).run(threads_and_modules)
    pool(2).run(step)
    assert pool(2).run(threads_and_modules) == once
    assert all(threads < 20 and modules == 0 for threads, modules in once)


def test_failing_rank_is_named_with_its_traceback_and_the_pool_recovers(pool):
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed[\s\S]*fail_on[\s\S]*the planted error"):
        pool(2).run(fail_on, 1)
    assert pool(2).run(total, 5) == [(0, 11), (1, 11)]


def test_dead_and_hanging_processes_end_the_call(pool):
    one = Pool(1)
    with pytest.raises(RuntimeError, match="exit code 7"):
        one.run(leave, 0)
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1 gave no answer within 0.5 s"):
        one.run(hang, timeout_s=0.5)
    assert one.run(total, 1) == [(0, 1)]
    one.close()


def test_a_call_whose_groups_did_not_form_is_made_again(monkeypatch, capsys):
    one = Pool(1)
    collect, tries = one._collect, []

    def unconnected_once(timeout_s: float):
        tries.append(collect(timeout_s))
        if len(tries) == 1:
            raise ConnectionError("rank 0 of 1 found no other rank")
        return tries[-1]

    monkeypatch.setattr(one, "_collect", unconnected_once)
    before = one.run(os.getpid)
    tries.clear()
    assert (
        one.run(os.getpid) != before and len(tries) == 2
    )  # processes whose groups did not form may not agree on names
    assert "found no other rank\nTrying again." in capsys.readouterr().err
    one.close()


@pytest.mark.slow
def test_a_short_function_ends_on_no_rank_while_others_connect():
    four = Pool(4)
    processes = four.run(os.getpid)
    for _ in range(60):  # some of 200 such calls failed, for all their tries, when nobody waited
        assert four.run(os.getpid) == processes
    four.close()


def blocked() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_processes_hear_signals_where_the_deaf_workers_of_the_data_have_started_the_server():
    code = """if __name__ == "__main__":
        from megatron_vlm.data import workers
        from megatron_vlm.parallel.pool import Pool
        from tests.parallel.test_pool import blocked
        workers._start_server()
        one = Pool(1)
        print(one.run(blocked))
        one.close()"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout == "[set()]\n", ended.stderr
