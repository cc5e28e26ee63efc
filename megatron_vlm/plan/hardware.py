"""GPUs and networks: published figures, and the shares of them that programs reach.

Units: bytes, seconds, operations per second.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One device in its usual server."""

    name: str
    memory: int
    """Bytes that the driver reports."""
    flops: int
    """Dense bf16 operations per second."""
    fp8_flops: int
    """Dense FP8 operations per second; 0 where the device has none."""
    float32_flops: int
    """Float32 operations per second, without tensor cores."""
    bandwidth: int
    """Bytes per second of its memory."""
    link: int
    """Bytes per second to other devices of the node, one direction."""
    network: int
    """Bytes per second to other nodes, per device, in the usual server. `--network` changes it."""


def _gpu(
    name: str, memory: float, tflops: int, fp8: int, float32: float, memory_gb_s: int, link: int, network: int
) -> Gpu:
    giga, tera = 10**9, 10**12
    return Gpu(
        name,
        int(memory * GIB),
        tflops * tera,
        fp8 * tera,
        int(float32 * tera),
        memory_gb_s * giga,
        link * giga,
        network * giga,
    )


#: Vendors' data sheets (dense, without sparsity): memory in GiB as the driver reports it, NVLink or PCIe one direction.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100", 79.1, 989, 1979, 67, 3350, 450, 50),
        _gpu("h100-nvl", 93.1, 835, 1671, 60, 3900, 300, 50),
        _gpu("h100-pcie", 79.1, 756, 1513, 51, 2000, 64, 25),
        _gpu("h200", 139.8, 989, 1979, 67, 4800, 450, 50),
        _gpu("h800", 79.1, 989, 1979, 67, 3350, 200, 50),
        _gpu("b200", 178.3, 2250, 4500, 75, 7700, 900, 50),
        _gpu("a100-80", 79.2, 312, 0, 19.5, 2039, 300, 25),
        _gpu("a100-40", 39.4, 312, 0, 19.5, 1555, 300, 25),
        _gpu("a800-80", 79.2, 312, 0, 19.5, 2039, 200, 25),
        _gpu("l40s", 44.5, 362, 733, 91, 864, 32, 12),
        _gpu("rtx-4090", 23.5, 165, 330, 82, 1008, 32, 12),
    )
}


def find(name: str) -> Gpu:
    """The device of that name. Raises ValueError naming the known ones."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, 1, 0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"GPU {name!r} is not known; known are: {', '.join(GPUS)}.{hint}")


#: What the CUDA context, NCCL's buffers and libraries' workspaces take of a device.
RESERVED = int(2.5 * GIB)
#: Share of what is allocated that the caching allocator loses between blocks.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Reach:
    """Shares of the peaks that are reached. Assumptions, to be replaced by measurements (`--reach`)."""

    matmul: float = 0.65
    """Of the arithmetic, in matrix products, attention included."""
    memory: float = 0.75
    """Of the memory's bandwidth."""
    link: float = 0.75
    """Of links and network."""


#: Seconds that a collective takes however small: inside a node, and between nodes.
LATENCY_S, NETWORK_LATENCY_S = 10e-6, 25e-6


@dataclass(frozen=True)
class Cluster:
    """`nodes` servers with `per_node` devices each."""

    gpu: Gpu
    nodes: int
    per_node: int
    reach: Reach = Reach()

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def usable(self) -> int:
        """Bytes of a device that tensors may take."""
        return int((self.gpu.memory - RESERVED) / (1 + FRAGMENTATION))

    def seconds(self, flops: int, moved: int, precision: str) -> float:
        """An operator's time: arithmetic or memory, whichever takes longer. precision: that of its products."""
        peak = {"float32": self.gpu.float32_flops, "bf16": self.gpu.flops, "fp8": self.gpu.fp8_flops}[precision]
        return max(flops / (peak * self.reach.matmul), moved / (self.gpu.bandwidth * self.reach.memory))

    def transfer(self, kind: str, size: int, ranks: int, stride: int) -> float:
        """Time of one collective of `size` bytes (the larger of what goes in and comes out) over `ranks` ranks whose
        numbers lie `stride` apart."""
        if ranks == 1:
            return 0.0
        inside = max(1, min(ranks, self.per_node // stride))  # of them in one node
        factor = {"all_reduce": 2.0, "send": 1.0}.get(kind, 1.0)
        share = 1.0 if kind == "send" else (ranks - 1) / ranks
        if kind == "send":
            crosses = stride * ranks > self.per_node
            speed = self.gpu.network if crosses else self.gpu.link
        else:
            crosses = inside < ranks
            # Every device of a node has its own way out; an all-to-all sends most of its bytes through it.
            speed = min(self.gpu.link, self.gpu.network * (1 if kind == "all_to_all" else inside))
            speed = speed if crosses else self.gpu.link
        latency = NETWORK_LATENCY_S if crosses else LATENCY_S
        return latency + factor * share * size / (speed * self.reach.link)
