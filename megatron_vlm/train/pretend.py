"""One rank of a run that is not there: process groups that answer at once, tensors without numbers.

Integers and the batch are real, so that masks and shapes take the paths that they would; floating-point tensors that
are made are fake (a shape, a dtype and a size), so that a model of any size fits a laptop.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_vlm.parallel.layout import Layout


@contextmanager
def rank_of(layout: Layout, rank: int) -> Iterator[None]:
    """Process groups of `layout` as `rank` sees them. Megatron must have been sent to the CPU (parallel.cpu)."""
    from megatron_vlm.parallel import groups

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    module: Any = dist
    new_group = dist.new_group
    try:
        # Megatron asks for gloo twins of its groups by name; there is nobody to connect to.
        module.new_group = lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})
        groups.initialize(layout, backend="fake")
        module.new_group = new_group
        yield
    finally:
        module.new_group = new_group
        groups.destroy()
        dist.destroy_process_group()


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, until each is freed.

    Allocations inside an operator are its own business and not seen, as in the plan.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.run(func, args, kwargs or {})
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return out

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operator itself."""
        return func(*args, **kwargs)

    def known(self, tensor: torch.Tensor) -> None:
        """A tensor made before: not counted."""
        storage = tensor.untyped_storage()
        self._seen[storage._cdata] = 0
        weakref.finalize(storage, self._seen.pop, storage._cdata, None)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)


class Call(NamedTuple):
    """A collective as a rank sees it."""

    kind: str
    ranks: tuple[int, ...]
    size: int
    """Bytes, the larger of what goes in and what comes out."""


#: Name of each of torch's collectives; a coalesced one is a call for each of its tensors.
KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
#: Those that return nothing but the work to wait for.
ONLY_WORK = (
    "alltoall_base_",
    "send",
    "recv_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
    "barrier",
)


class Pretend(Meter):
    """While entered, floating-point tensors are fake and collectives are written down and done at once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [item for item in tree_iter((args, kwargs)) if isinstance(item, torch.Tensor)]
        fakes = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, fakes)
        if fakes and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1  # a result that the step reads: any number will do
        if fakes and func is torch.ops.aten.index.Tensor:
            args = (args[0], _places(args[1]))
        if fakes or (not tensors and _makes_floats(func, args, kwargs)):
            with self.fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _collective(self, func: Any, args: Any, kwargs: dict[str, Any], fakes: bool) -> Any:
        name = func._schema.name.split("::")[1]
        if name in KINDS:
            group = next(ProcessGroup.unbox(item) for item in args if isinstance(item, torch.ScriptObject)
                         and "ProcessGroup" in str(item._type()))  # fmt: skip
            ranks = tuple(dist.get_process_group_ranks(group))
            sides = [[t for t in tree_iter(item) if isinstance(t, torch.Tensor)] for item in args[:2]]
            for given, taken in _pairs(sides):
                self.calls[Call(KINDS[name], ranks, max(given, taken))] += 1
        if not fakes:  # the fake backend answers with what it was given
            return func(*args, **kwargs)
        work = FakeWork().boxed()
        return work if name in ONLY_WORK else (args[0], work)


def _pairs(sides: list[list[torch.Tensor]]) -> Iterator[tuple[int, int]]:
    first, second = ([tensor.nbytes for tensor in side] for side in sides)
    yield from zip(first, second or [0] * len(first), strict=True)


def _makes_floats(func: Any, args: Any, options: dict[str, Any]) -> bool:
    """Whether an operator without tensor arguments gives a floating-point tensor."""
    if options.get("dtype") is not None:
        return options["dtype"].is_floating_point
    if func._schema.name in ("aten::arange", "aten::full", "aten::scalar_tensor"):
        return any(isinstance(item, float) for item in tree_iter(args))
    return True


def _places(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Boolean indices as the places where they are true: a fake tensor cannot tell how many those are."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
