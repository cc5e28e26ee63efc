"""Keys and values of prompts that share a row: of each prefix once, of each open answer its own.

Letters: p tokens of a prefix, m open answers of a prompt, c tokens of the longest of them, h query heads and k
key-value heads, g = h / k, d numbers in a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_vlm.evaluate.generate import Running


@dataclass
class _Layer:
    """Of one prompt in one layer."""

    prefix: tuple[torch.Tensor, torch.Tensor]
    """Keys and values (k, p, d)."""
    branches: tuple[torch.Tensor, torch.Tensor]
    """Keys and values (m, k, room, d)."""


@dataclass
class _Prompt:
    """A prompt in the cache."""

    item: Running
    questions: list[int]
    """Those with a place in `branches`, in order."""
    lengths: torch.Tensor
    """(m,) tokens of each that are in the cache."""
    layers: list[_Layer] = field(default_factory=list)


class Cache:
    """Filled by one forward pass over the row of all prompts, then grown by a token of every open answer at a time."""

    def __init__(self, items: Sequence[Running], room: int) -> None:
        """room: tokens that an answer may grow by."""
        self._room = room
        self._prompts = [
            _Prompt(
                item, list(item.open), torch.tensor([len(item.ids(q)) - len(item.prompt.prefix) for q in item.open])
            )
            for item in items
        ]

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys and values of the whole row, (s, k, d), layer after layer."""
        at = 0
        for prompt in self._prompts:
            assert len(prompt.layers) == layer, "layers come in their order"
            end = at + len(prompt.item.prompt.prefix)
            prefix = [whole[at:end].transpose(0, 1).clone() for whole in (key, value)]
            shape = (
                len(prompt.questions),
                key.shape[1],
                int(max(prompt.lengths, default=0)) + self._room,
                key.shape[2],
            )
            branches = [key.new_zeros(shape) for _ in range(2)]
            for number, length in enumerate(prompt.lengths.tolist()):
                for buffer, whole in zip(branches, (key, value), strict=True):
                    buffer[number, :, :length] = whole[end : end + length].transpose(0, 1)
                end += length
            prompt.layers.append(_Layer((prefix[0], prefix[1]), (branches[0], branches[1])))
            at = end

    def keep_open(self) -> bool:
        """Drop the answers that have ended; whether any is left."""
        for prompt in self._prompts:
            kept = [place for place, question in enumerate(prompt.questions) if question in prompt.item.open]
            if len(kept) == len(prompt.questions):
                continue
            prompt.questions = [prompt.questions[place] for place in kept]
            prompt.lengths = prompt.lengths[kept]
            for layer in prompt.layers:
                layer.branches = layer.branches[0][kept], layer.branches[1][kept]
        return any(prompt.questions for prompt in self._prompts)

    def grow(self) -> None:
        """The token that `attend` has put into every layer is part of each answer now."""
        for prompt in self._prompts:
            prompt.lengths = prompt.lengths + 1

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Add one key and value of every open answer, (n, k, d), and attend with its query, (n, h, d) -> (n, h x d)."""
        out = torch.empty_like(query)
        at = 0
        for prompt in self._prompts:
            end = at + len(prompt.questions)
            if at < end:
                out[at:end] = _attend(prompt, layer, query[at:end], key[at:end], value[at:end], scale)
            at = end
        return out.flatten(1)


def _attend(
    prompt: _Prompt, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Of one prompt: (m, h, d), (m, k, d), (m, k, d) -> (m, h, d)."""
    layer, lengths = prompt.layers[number], prompt.lengths.to(query.device)
    answers = torch.arange(len(lengths), device=query.device)
    for buffer, new in zip(layer.branches, (key, value), strict=True):
        buffer[answers, :, lengths] = new
    longest = int(prompt.lengths.max()) + 1
    own_key, own_value = (buffer[:, :, :longest] for buffer in layer.branches)
    kv_heads = key.shape[1]
    grouped = query.unflatten(1, (kv_heads, -1)) * scale
    # 1. Scores of the prefix, which all answers share: (k, m g, d) x (k, d, p).
    together = grouped.transpose(0, 1).flatten(1, 2)
    shared = (together @ layer.prefix[0].transpose(1, 2)).unflatten(1, (len(lengths), -1)).transpose(0, 1)
    # 2. Scores of the answer itself: (m, k, g, d) x (m, k, d, c).
    own = grouped @ own_key.transpose(2, 3)
    beyond = torch.arange(longest, device=query.device) > lengths[:, None]
    own = own.masked_fill(beyond[:, None, None], -torch.inf)
    # 3. One softmax over both, in float32.
    weights = torch.cat([shared, own], dim=-1).float().softmax(dim=-1).to(query.dtype)
    to_shared, to_own = weights.split([shared.shape[-1], longest], dim=-1)
    seen = (to_shared.transpose(0, 1).flatten(1, 2) @ layer.prefix[1]).unflatten(1, (len(lengths), -1)).transpose(0, 1)
    return (seen + to_own @ own_value).flatten(1, 2)
