"""From logits to the next token: greedy or drawn. Pure functions; n answers, v ids of the vocabulary.

Rules and their order are transformers': repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Divides the logits. 0 = greedy: the most likely token, and top_k and top_p mean nothing."""
    top_k: int = 0
    """Only the k most likely tokens. 0 = all."""
    top_p: float = 1.0
    """Only the fewest tokens that together have at least this probability. 1 = all."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0, multiplies those below, of tokens that prompt or answer hold already. 1 = off."""
    seed: int = 6198
    """Of the draws."""

    def __post_init__(self) -> None:
        for name, value, good, needed in (
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1 (all)"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0; 1 is off"),
        ):
            if not good:
                raise ValueError(f"{name}={value}: needed {needed}.")


def choose(
    logits: torch.Tensor, seen: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
) -> list[int]:
    """The next token of each answer. logits: (n, v) float32. seen: ids of each prompt and its answer so far."""
    scores = penalized(logits, seen, sampling.repetition_penalty) if sampling.repetition_penalty != 1 else logits
    if not sampling.temperature:
        return scores.argmax(dim=-1).tolist()
    kept = narrowed(scores / sampling.temperature, sampling.top_k, sampling.top_p)
    drawn = torch.multinomial(kept.softmax(dim=-1).cpu(), 1, generator=generator)
    return drawn[:, 0].tolist()


def penalized(logits: torch.Tensor, seen: Sequence[Sequence[int]], penalty: float) -> torch.Tensor:
    """(n, v) with the tokens of `seen` made less likely. Ids beyond the vocabulary (image tokens) have no logit."""
    scores = logits.clone()
    for row, ids in zip(scores, seen, strict=True):
        places = torch.tensor(sorted({number for number in ids if number < len(row)}), device=row.device)
        if len(places):
            found = row[places]
            row[places] = torch.where(found < 0, found * penalty, found / penalty)
    return scores


def narrowed(scores: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """(n, v) with minus infinity outside the top_k most likely, then outside the fewest that make up top_p."""
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        # From the least likely on: what together has no more than 1 - top_p goes, but never the likeliest.
        ordered, places = scores.sort(dim=-1)
        gone = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        gone[:, -1] = False
        scores = scores.masked_fill(gone.scatter(-1, places, gone), -torch.inf)
    return scores
