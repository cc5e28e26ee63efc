"""This process among the others of a run: its device, torch.distributed, and who of them prints an error."""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_vlm.config import errors
from megatron_vlm.config.schema import RunConfig
from megatron_vlm.parallel import cpu

#: A collective that waits longer than this has lost a rank.
TIMEOUT_S = 1800.0
#: How long a rank waits to hear whether rank 0 failed in the same way.
_LISTEN_S = 3.0
#: Warnings that Megatron-core 0.16 and torch give each other about code which is not ours to change.
_NOT_FOR_USERS: tuple[tuple[str, type[Warning]], ...] = (
    (r"`torch\.distributed\.(reduce_scatter|all_gather)\w*` is deprecated", FutureWarning),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    (r"full scope is deprecated", UserWarning),
)


def start(run: RunConfig) -> str:
    """Choose the device, send Megatron to the CPU where there is no other, join the other processes.

    Call it before Megatron is imported. Gives the backend: gloo on a CPU, nccl on CUDA. Reads torchrun's variables;
    without them the world is this process alone, and no port is opened.
    Raises ValueError where `run.device` is cuda and there is none, or fewer than processes.
    """
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "run.device=cuda, but torch finds no CUDA device here. Set run.device (of a tool: --device) to cpu or auto."
        )
    for text, category in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", text, category)
    share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    on_cpu = run.device == "cpu" or not torch.cuda.is_available()
    if on_cpu:
        cpu.enable("cpu")
    else:
        torch.cuda.set_device(own_device(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()))
    backend = "gloo" if on_cpu else "nccl"
    if not dist.is_initialized():
        timeout = timedelta(seconds=TIMEOUT_S)
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return backend


def share_cores(processes: int) -> None:
    """Divide the threads that make text into ids, by default as many as cores in each of a node's processes.

    The processes plan windows at the same moments. Call it before the tokenizers library encodes its first texts.
    """
    if processes > 1:
        os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def own_device(local_rank: int, devices: int) -> int:
    """The number of this process's GPU among the `devices` that it sees: one alone is its own, whoever dealt them.

    Raises ValueError where a node has more processes than GPUs.
    """
    if devices > 1 and local_rank >= devices:
        raise ValueError(
            f"process {local_rank} of this node sees {devices} GPUs: start one process for each (NPROC={devices}, or "
            f"sbatch --ntasks-per-node={devices})."
        )
    return local_rank if devices > 1 else 0


def device_name() -> str:
    """The name of this process's GPU, or `cpu`."""
    return "cpu" if cpu.enabled() else torch.cuda.get_device_name()


def speaks(error: str) -> bool:
    """Whether this rank should print `error`: rank 0 does, another one only if rank 0 did not fail with the same."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return int(os.environ.get("RANK", 0)) == 0
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set("error", error)
        return True
    try:
        store.wait(["error"], timedelta(seconds=_LISTEN_S))
        return store.get("error").decode() != error
    except (RuntimeError, ValueError):
        return True


def peak_memory() -> list[int]:
    """Most bytes that each rank has held, by rank: on a CPU the whole process, on CUDA the tensors. Collective."""
    if cpu.enabled():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        peak = torch.cuda.max_memory_allocated()
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, peak)
    return peaks


def tool(body: Callable[[], None]) -> int:
    """Run the body of a tool, and leave; its exit code. What a user can mend is one paragraph on stderr."""
    try:
        body()
    except (ValueError, OSError) as error:
        if speaks(str(error)):
            print(f"error: {errors.words(error)}", file=sys.stderr)
        return 1
    finally:
        leave()
    return 0


def leave() -> None:
    """Close Megatron's groups and torch.distributed; nothing to do where they were never opened."""
    if dist.is_initialized():
        from megatron_vlm.parallel import groups  # Megatron

        groups.destroy()
        dist.destroy_process_group()
