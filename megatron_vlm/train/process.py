"""This process among the others of the run: device, torch.distributed, Megatron's groups; and who prints an error."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_vlm.config.schema import Config
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.layout import Layout

#: A collective that waits longer than this has lost a rank.
TIMEOUT_S = 1800.0
#: How long a rank waits to hear whether rank 0 failed in the same way.
_LISTEN_S = 3.0


def run(config: Config) -> None:
    """Join the run and train.

    Raises ValueError where settings and processes do not fit, and what `loop.train` raises.
    """
    device = _device(config)
    if device == "cpu":
        cpu.enable("cpu")
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "gloo" if device == "cpu" else "nccl"
    join(backend)
    layout = Layout.of(config.parallel, dist.get_world_size())

    from megatron_vlm.parallel import groups  # Megatron is imported after cpu.enable
    from megatron_vlm.train import loop

    groups.initialize(layout, backend=backend, seed=config.train.seed, timeout_s=TIMEOUT_S)
    loop.train(config, layout)


def _device(config: Config) -> str:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but torch finds no CUDA device here. Set run.device=cpu or auto.")
    return "cpu" if config.run.device == "cpu" or not torch.cuda.is_available() else "cuda"


def join(backend: str) -> None:
    """torch.distributed, from torchrun's variables; without them, a world of this process alone, without a port."""
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=TIMEOUT_S)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


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


def leave() -> None:
    """Close torch.distributed."""
    if dist.is_initialized():
        dist.destroy_process_group()
