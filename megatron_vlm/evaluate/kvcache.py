"""Keys and values of prompts that share a row: of each prefix once, of each open answer its own.

Letters: n open answers of P prompts, p tokens of the longest prefix, c tokens of the longest answer's own part, h query
heads and k key-value heads of this tensor-parallel rank, g = h / k, d numbers in a head, L layers of this stage. All
answers are one batch, whatever prompts they belong to: a step takes the same few operators for one as for many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_vlm.evaluate.prompt import Running


class Cache:
    """Filled by one forward pass over the row of all prompts, then grown by a token of every open answer at a time.

    Where no prompt has several questions nothing is shared: the prefix is then the beginning of the answer's own part.
    """

    def __init__(self, items: Sequence[Running], room: int, device: torch.device | str) -> None:
        """room: tokens that an answer may grow by."""
        self._items = list(items)
        #: (item, question) of each answer, in order.
        self._answers = [(place, question) for place, item in enumerate(items) for question in item.open]
        self._shares = any(len(item.open) > 1 for item in items)
        self._prefixes = [len(item.prompt.prefix) for item in items]
        self._own = [
            items[place].position(question) + 1 - (self._prefixes[place] if self._shares else 0)
            for place, question in self._answers
        ]
        self._room = max(self._own, default=0) + room
        self._lengths = torch.tensor(self._own, device=device)
        self._longest = max(self._own, default=0)
        #: (n, 1, 1, room): 0 where an answer may look, minus infinity elsewhere.
        self._mask = _beyond(self._lengths, self._room)
        self._shared_mask: torch.Tensor | None = None
        if len(set(self._prefixes)) > 1:
            self._shared_mask = _beyond(torch.tensor(self._prefixes, device=device), max(self._prefixes))
        self._layers: list[list[torch.Tensor]] = []
        self._prefix: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._seat()

    def _seat(self) -> None:
        """Where each answer sits among those of its prompt: the row of a table (P, most answers of a prompt)."""
        self._rows = torch.arange(len(self._answers), device=self._lengths.device)
        counts = [sum(place == each for each, _ in self._answers) for place in range(len(self._items))]
        self._most = max(counts, default=0)
        seats = [place * self._most + seat for place, count in enumerate(counts) for seat in range(count)]
        self._seats = torch.tensor(seats, dtype=torch.int64, device=self._lengths.device)
        self._full = len(seats) == len(counts) * self._most

    def keep(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keys and values of the whole row, (s, k, d), one layer after another."""
        heads, size = key.shape[1:]
        own = [key.new_zeros(len(self._answers), heads, self._room, size) for _ in range(2)]
        prefix = [key.new_zeros(len(self._items), heads, max(self._prefixes), size) for _ in range(2)]
        at = answer = 0
        for place, item in enumerate(self._items):
            start, at = at, at + self._prefixes[place]
            for buffer, whole in zip(prefix, (key, value), strict=True):
                buffer[place, :, : self._prefixes[place]] = whole[start:at].transpose(0, 1)
            for _ in item.open:
                first = 0 if self._shares else self._prefixes[place]
                end = at + self._own[answer] - first
                for buffer, whole in zip(own, (key, value), strict=True):
                    buffer[answer, :, :first] = whole[start : start + first].transpose(0, 1)
                    buffer[answer, :, first : self._own[answer]] = whole[at:end].transpose(0, 1)
                at, answer = end, answer + 1
        self._layers.append(own)
        if self._shares:
            self._prefix.append((prefix[0], prefix[1]))

    def keep_open(self) -> bool:
        """Drop the answers that have ended, make room for a token of each other; whether any is left."""
        kept = [row for row, (place, question) in enumerate(self._answers) if question in self._items[place].open]
        if len(kept) < len(self._answers):
            self._answers = [self._answers[row] for row in kept]
            self._lengths, self._mask = self._lengths[kept], self._mask[kept]
            self._layers = [[buffer[kept] for buffer in layer] for layer in self._layers]
            self._seat()
        self._mask[self._rows, 0, 0, self._lengths] = 0
        self._longest += 1
        return bool(self._answers)

    def grow(self) -> None:
        """The token that `attend` has put into every layer is part of each answer now."""
        self._lengths += 1

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Add one key and value of every open answer, (n, k, d), and attend with its query, (n, h, d) -> (n, h x d)."""
        keys, values = self._layers[layer]
        keys[self._rows, :, self._lengths] = key
        values[self._rows, :, self._lengths] = value
        keys, values = keys[:, :, : self._longest], values[:, :, : self._longest]
        grouped = query.unflatten(1, (key.shape[1], -1)) * scale
        # 1. Scores of the answer itself: (n, k, g, d) x (n, k, d, c).
        own = grouped @ keys.transpose(2, 3) + self._mask[..., : self._longest]
        if not self._shares:
            return (own.float().softmax(dim=-1).to(values.dtype) @ values).flatten(1)
        # 2. Scores of the prefix, all answers of a prompt at once: (P, k, m g, d) x (P, k, d, p).
        prefix_keys, prefix_values = self._prefix[layer]
        shared = self._apart(self._together(grouped) @ prefix_keys.transpose(2, 3))
        # 3. One softmax over both, in float32.
        weights = torch.cat([shared, own], dim=-1).float().softmax(dim=-1).to(values.dtype)
        to_shared, to_own = weights.split([shared.shape[-1], own.shape[-1]], dim=-1)
        seen = self._apart(self._together(to_shared) @ prefix_values, masked=False)
        return (seen + to_own @ values).flatten(1)

    def _together(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, k, g, x) -> (P, k, m g, x): the answers of each prompt side by side."""
        if not self._full:
            table = rows.new_zeros(len(self._items) * self._most, *rows.shape[1:])
            rows = table.index_copy(0, self._seats, rows)
        return rows.unflatten(0, (len(self._items), -1)).transpose(1, 2).flatten(2, 3)

    def _apart(self, table: torch.Tensor, *, masked: bool = True) -> torch.Tensor:
        """(P, k, m g, x) -> (n, k, g, x); masked: x are the places of a prefix, those beyond its end not to be seen."""
        if masked and self._shared_mask is not None:
            table = table + self._shared_mask
        rows = table.unflatten(2, (self._most, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self._full else rows.index_select(0, self._seats)


def _beyond(lengths: torch.Tensor, places: int) -> torch.Tensor:
    """(n, 1, 1, places) float32: minus infinity from each length on."""
    beyond = torch.arange(places, device=lengths.device) >= lengths[:, None]
    return torch.zeros(beyond.shape, device=lengths.device).masked_fill(beyond, -torch.inf)[:, None, None]
