"""Processes of this program's own: run a function on every rank of a gloo world on the CPU, `Pool(2).run(function)`.

Starting processes costs seconds, so a pool keeps its own between calls. All are forked from one server that has
imported torch and Megatron. Every call gets process groups of its own. For parity checks and tests; a training run
is started by a launcher.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: After one rank has failed, the others may finish or fail by themselves for so long; then the pool is killed.
GRACE_S = 2.0
#: gloo now and then fails to connect the ranks, also on one machine, and then waits for its whole time-out. So groups
#: get a short time to form, and a call whose groups did not form is made again.
CONNECT_S = 15.0
TRIES = 3
#: Key in the ranks' store: how many are connected to all others.
CONNECTED = "connected"


class Pool:
    """`world` processes, one per rank, started on first use.

    device: cuda = each on a GPU of its own, over NCCL. All pools of a process have the same device.
    """

    def __init__(self, world: int, device: str = "cpu") -> None:
        self.world, self.device = world, device
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """Call `function(*args)` on every rank; the results by rank.

        `function` stands at the top level of a module; arguments and results are pickled. On each rank
        torch.distributed is initialised over gloo and Megatron runs on the CPU; Megatron's groups are the function's to
        make (parallel.groups.initialize) and are destroyed afterwards. Raises RuntimeError with the traceback of the
        first rank that fails, TimeoutError when not all ranks answer within `timeout_s`; then the processes are killed
        and the next call starts new ones.
        """
        for _ in range(TRIES - 1):
            try:
                return self._run(function, args, timeout_s)
            except ConnectionError as error:
                # torch counts a group that did not form, but not on the ranks where it did: their names would differ.
                self.close()
                print(f"{error}\nTrying again.", file=sys.stderr)
        return self._run(function, args, timeout_s)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], timeout_s: float) -> list[Any]:
        """One try. Raises ConnectionError where the ranks did not find each other."""
        self._start()
        folder = tempfile.mkdtemp(prefix="pool-")
        task = pickle.dumps((os.path.join(folder, "store"), timeout_s, function, args))
        # The path comes first: the function's module is found through it.
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps(sys.path))
            pipe.send_bytes(task)
        try:
            return self._collect(timeout_s)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if self._processes:
            return
        context = multiprocessing.get_context("forkserver")
        os.environ["VLM_POOL_DEVICE"] = self.device
        # The server finds the preload through PYTHONPATH only (Python 3.11 does not hand it sys.path).
        root = str(Path(__file__).parents[2])
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        context.set_forkserver_preload(["megatron_vlm.parallel.preload"])
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, self.device, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        dead = False
        waiting: dict[Any, int] = dict(zip(self._pipes, range(self.world), strict=True))
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready: list[Any] = wait(list(waiting), timeout=left)
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    failed_at, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join()
                    dead = True
                    failed_at, answer = 0.1, f"the process died with exit code {self._processes[rank].exitcode}"
                if failed_at:
                    failures.append((failed_at, rank, answer))
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                else:
                    results[rank] = answer
        silent = sorted(waiting.values())
        if silent or dead:
            self.close()
        if failures:
            failed_at, rank, text = min(failures)
            if failed_at < 0:
                raise ConnectionError(f"rank {rank} of {self.world} found no other rank:\n{text}")
            others = f" (ranks {silent} did not answer any more)" if silent else ""
            raise RuntimeError(f"rank {rank} of {self.world} failed{others}:\n{text}")
        if silent:
            raise TimeoutError(f"ranks {silent} of {self.world} gave no answer within {timeout_s} s: see stderr.")
        return [results[rank] for rank in range(self.world)]


def _serve(rank: int, world: int, device: str, pipe: Connection) -> None:
    """Body of one process: answer calls until the pipe closes."""
    import torch

    # Where the data's workers have started the fork server, it was told no imports, and is deaf (data.workers).
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    import megatron_vlm.parallel.preload  # noqa: F401

    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name may not resolve
    while True:
        try:
            sys.path[:] = pickle.loads(pipe.recv_bytes())
            task = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(pickle.dumps(_call(rank, world, device, task)))


def _call(rank: int, world: int, device: str, task: bytes) -> tuple[float, Any]:
    """(time of failure, 0 for none or -1 where no group formed; result or traceback)."""
    import torch.distributed as dist

    from megatron_vlm.parallel import groups

    store, timeout_s, function, args = pickle.loads(task)
    timeout = timedelta(seconds=timeout_s)
    faulthandler.dump_traceback_later(max(timeout_s - 2.0, 1.0), exit=False)
    try:
        shared = dist.FileStore(store, world)
        try:
            connect = timedelta(seconds=min(timeout_s, CONNECT_S))
            backend = "nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, store=shared, rank=rank, world_size=world, timeout=connect)
            dist.distributed_c10d._set_pg_timeout(timeout)
        except Exception:
            return -1.0, traceback.format_exc()
        shared.add(CONNECTED, 1)
        return 0.0, function(*args)
    except BaseException:
        # The time is taken before the groups go: other ranks fail because of that, and later.
        return time.monotonic(), traceback.format_exc()
    finally:
        groups.destroy()
        if dist.is_initialized():
            # Others may be connecting still where this rank's function was short; without this rank they would fail.
            patience = time.monotonic() + CONNECT_S
            while shared.add(CONNECTED, 0) < world and time.monotonic() < patience:
                time.sleep(0.01)
            dist.destroy_process_group()
        forget_models()
        faulthandler.cancel_dump_traceback_later()  # the end of a group may hang, too


def forget_models() -> None:
    """Let go of the models that `train.optim.wrap` wrapped, and so of their groups.

    Each group over gloo has threads that wake every 10 ms. The models are in reference cycles, some hidden from Python:
    Megatron's hooks hang on nodes of autograd. So the wrappers, which all of these go through, are emptied.
    """
    from megatron.core.distributed import DistributedDataParallel

    for wrapper in [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]:
        vars(wrapper).clear()
    gc.collect()
