"""Which rank does what: rank arithmetic of a parallel layout. Integers only, no process groups.

Ranks are counted as Megatron-core counts them by default (`tp-cp-ep-dp-pp`): tensor fastest, then context, data,
pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vlm.config import context, presets
from megatron_vlm.config.schema import Config


@dataclass(frozen=True)
class Coordinates:
    """Place of one rank on each axis, from 0."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of a run over `world` processes."""

    world: int
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    ulysses: int = 0
    """Context ranks, neighbours, among which attention deals its heads; 0 = all of them."""
    vision: str = "data"
    """`parallel.vision`: how tower and connector are spread."""

    def __post_init__(self) -> None:
        for name in ("world", "tensor", "context", "pipeline", "virtual_pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a degree of parallelism is at least 1.")
        model = self.tensor * self.context * self.pipeline
        if self.world % model:
            raise ValueError(
                f"{self.world} processes cannot hold whole models of {model} processes each (tensor {self.tensor} x "
                f"context {self.context} x pipeline {self.pipeline}). Start a multiple of {model} processes, or change "
                "parallel.tensor, parallel.context or parallel.pipeline."
            )
        if self.context % self.head_ranks:
            raise ValueError(
                f"heads dealt among {self.head_ranks} of {self.context} context ranks; needed a divisor of "
                f"{self.context}."
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline > 1, which is 1: there is "
                "no pipeline to interleave. Set parallel.virtual_pipeline=1 or use more pipeline stages."
            )

    @classmethod
    def of(cls, config: Config, world: int) -> Layout:
        """The layout that `config` gives on `world` processes. Raises ValueError where they do not fit."""
        p = config.parallel
        heads = context.head_ranks(p, presets.architecture(config.model).language)
        return cls(world, p.tensor, p.context, p.pipeline, p.virtual_pipeline, heads, p.vision)

    @property
    def data(self) -> int:
        """Data-parallel degree: copies of the model that read different rows."""
        return self.world // (self.tensor * self.context * self.pipeline)

    @property
    def head_ranks(self) -> int:
        """Context ranks among which attention deals its heads."""
        return self.ulysses or self.context

    @property
    def key_ranks(self) -> int:
        """Context ranks with the same heads: they gather each other's keys and values."""
        return self.context // self.head_ranks

    @property
    def chunks(self) -> int:
        """Pipeline chunks of the whole model: stages x virtual stages."""
        return self.pipeline * self.virtual_pipeline

    def coordinates(self, rank: int) -> Coordinates:
        """Place of `rank`. Raises ValueError for a rank outside the world."""
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} does not exist in a world of {self.world}; ranks are 0 to {self.world - 1}.")
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(tensor, context, data, pipeline)

    def rank(self, coordinates: Coordinates) -> int:
        """The rank at `coordinates`."""
        at = coordinates
        return at.tensor + self.tensor * (at.context + self.context * (at.data + self.data * at.pipeline))

    def context_groups(self, *, heads: bool) -> Iterator[tuple[int, ...]]:
        """Ranks of every group that deals heads, or of every group that gathers keys, in the order of their chunks."""
        inside, across = self.head_ranks, self.key_ranks
        for rank in range(self.world):
            at = self.coordinates(rank)
            first = at.context % inside == 0 if heads else at.context < inside
            if first:
                places = range(inside) if heads else range(0, inside * across, inside)
                yield tuple(rank + self.tensor * place for place in places)

    @property
    def vision_tensor(self) -> int:
        """Ranks that share each weight of tower and connector, and encode the same crops."""
        return self.tensor if self.vision == "tensor" else 1

    @property
    def crop_ranks(self) -> int:
        """Parts into which the crops of one micro-batch are cut: a part for each rank of the TP x CP group, or, with
        sharded weights, for each context rank."""
        return self.tensor * self.context // self.vision_tensor

    def crop_rank(self, rank: int) -> int:
        """Which part is that of `rank`. In the TP x CP group: context x TP + tensor."""
        at = self.coordinates(rank)
        return (at.context * self.tensor + at.tensor) // self.vision_tensor
