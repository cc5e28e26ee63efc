"""Initial weights by checkpoint name: the same for every layout. Needs no Megatron."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch


def initial(key: str, shape: Sequence[int], seed: int, std: float) -> torch.Tensor | None:
    """The whole initial value of a parameter, by its checkpoint name, float32; None = ones, as norms are built."""
    name = key.rsplit(".", 1)[-1]
    if name == "bias":
        return torch.zeros(tuple(shape))
    if name == "position_embedding" and not std:
        return _sines(*shape)
    if len(shape) > 1 or name == "class_token":
        digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        return torch.randn(tuple(shape), generator=generator) * (std or shape[-1] ** -0.5)
    return None


def _sines(tokens: int, width: int) -> torch.Tensor:
    """Positions of the patches of a square crop, (tokens, width): sines and cosines of row and column.

    A quarter of the width each; frequencies from half a wave to 8 waves per side; spread 0.7. A class token, which
    stands before the patches, gets zeros, and so does what is left of the width.
    """
    side, quarter = math.isqrt(tokens), width // 4
    place = (torch.arange(side) + 0.5) / side
    waves = torch.pi * 2.0 ** (torch.arange(quarter) * 4 / quarter)
    row, column = (x.flatten()[:, None] * waves for x in torch.meshgrid(place, place, indexing="ij"))
    whole = torch.zeros(tokens, width)
    whole[tokens - side**2 :, : 4 * quarter] = torch.cat((row.sin(), row.cos(), column.sin(), column.cos()), dim=1)
    return whole
