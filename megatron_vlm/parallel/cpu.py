"""Megatron-core on a CPU: sends its CUDA calls to the CPU. Does nothing where the run uses CUDA.

Megatron-core asks for `device="cuda"`, for `torch.cuda.current_device()` and for CUDA random states by name. `enable`
answers those calls with the CPU, so that the modules, schedules, optimizers and checkpoints that train on GPUs run over
gloo as well. It changes no arithmetic. Cost: 1.5 microseconds per torch call.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

#: Fields of Megatron's TransformerConfig (and ModelParallelConfig) that a CPU needs.
TRANSFORMER_SETTINGS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,  # a CUDA extension
    "masked_softmax_fusion": False,  # a CUDA extension
    "bias_activation_fusion": False,  # torch.compile
    "bias_dropout_fusion": False,  # torch.compile
    "apply_rope_fusion": False,
    "persist_layer_norm": False,  # apex
    "cross_entropy_loss_fusion": False,  # torch.compile
    "batch_p2p_comm": False,  # gloo has no batched send and receive
    "deallocate_pipeline_outputs": False,  # asks autograd's C++ engine for outputs of one element
}

_active: TorchFunctionMode | None = None


def enabled() -> bool:
    """Whether this process sends Megatron's CUDA calls to the CPU."""
    return _active is not None


def enable(device: str = "auto") -> None:
    """Send Megatron's CUDA calls to the CPU, in this process and on the calling thread, from now on.

    Call it before Megatron modules are imported or built; a second call does nothing. `device` is `run.device`: `auto`
    leaves a machine with CUDA as it is, `cuda` always does, `cpu` always redirects.
    """
    global _active
    if _active is not None or device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return
    _redirect_cuda_functions()
    # Entered for the life of the process: factory functions are C functions, which only a mode can intercept without
    # replacing them (a replaced torch.empty is invisible to `with torch.device("meta")`).
    _active = _Redirect()
    _active.__enter__()
    _redirect_megatron()


def direct() -> AbstractContextManager[None]:
    """For code that names no CUDA device: its torch calls do not pass through this module."""
    return torch._C.DisableTorchFunction() if _active is not None else contextlib.nullcontext()


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Redirect(TorchFunctionMode):
    """Every torch call passes here while entered, so the common case is two comparisons."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": "cpu"}
        else:
            kwargs = {}
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(arg) else arg for arg in args)
        elif func is torch.Tensor.cuda:
            return args[0]
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizers decide by these names which parameters need float32 copies.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Stream:
    """The one queue that a CPU has: everything before is done already."""

    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: object = None) -> None: ...


def _get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
    torch.default_generator.set_state(new_state)


def _redirect_cuda_functions() -> None:
    cpu, stream = torch.device("cpu"), _Stream()
    cuda: Any = torch.cuda
    # One function object per name: torch's compiler keeps its rules by object and refuses one object under two rules.
    cuda.current_device = lambda: cpu
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(seed) and None
    cuda.manual_seed_all = cuda.random.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed) and None
    cuda.get_rng_state = cuda.random.get_rng_state = _get_state
    cuda.set_rng_state = cuda.random.set_rng_state = _set_state
    module_class: Any = torch.nn.Module
    module_class.cuda = lambda module, device=None: module


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective of Megatron's gradient and weight buffers; a group of one has its result already, in the same place.

    NCCL sees that; gloo copies everything twice.
    """

    def call(output: torch.Tensor, part: torch.Tensor, *, group: dist.ProcessGroup, **options: Any) -> Any:
        return collective(output, part, group=group, **options) if group.size() > 1 else None

    return call


def _redirect_megatron() -> None:
    """Import Megatron so that what it marks for torch.compile stays as it is, and redirect its random states.

    Compiling costs a C++ build per function and gains nothing here; importing the compiler alone takes seconds.
    """
    # True of every CPU machine, and said by five files; and advice about GPU queues.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch_module: Any = torch
    compile_function = torch.compile
    torch_module.compile = lambda model=None, **options: model if model is not None else (lambda function: function)
    try:
        from megatron.core import jit
        from megatron.core.tensor_parallel import random
    finally:
        torch_module.compile = compile_function
    from megatron.core.distributed import param_and_grad_buffer

    jit.disable_jit_fuser()
    buffers: Any = param_and_grad_buffer
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))
    megatron_random: Any = random
    megatron_random._get_cuda_rng_state = _get_state
    megatron_random._set_cuda_rng_state = _set_state
