"""Answers with a cache: each round computes one token of every open answer, and nothing else again.

A prompt's prefix (its images) goes through the model once, for all of its questions, and its keys and values are kept
once. Same answers as without a cache: tests compare them token for token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import nn

from megatron_vlm.data.tokens import Tokenizer
from megatron_vlm.evaluate import stages
from megatron_vlm.evaluate.kvcache import Cache
from megatron_vlm.evaluate.prompt import Prompt, Running, encode, row
from megatron_vlm.evaluate.sampling import Sampling, choose
from megatron_vlm.parallel import cpu

#: Told prompt, question and token as soon as it is chosen.
Said = Callable[[int, int, int], None]


def decode(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    row_tokens: int = 4096,
    device: torch.device | str = "cpu",
    said: Said = lambda prompt, question, token: None,
    progress: Callable[[int], None] = lambda finished: None,
) -> list[list[list[int]]]:
    """Answers by prompt and question, as ids without the end of sequence. Every rank of the model calls it.

    model:      a VlmModel, or this rank's part of it (no context or sequence parallelism, no interleaved pipeline).
    sampling:   None = greedy. With draws, an answer depends on what is decoded beside it.
    stop:       strings after which an answer ends; the token that completes one is its last.
    row_tokens: most tokens of prompts in the first forward pass of a group, which is then answered together.
    progress:   told the number of prompts just finished.
    Raises ValueError where a prompt and its answer are longer than the model's positions.
    """
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(sampling.seed)
    _check_lengths(prompts, max_new_tokens, model.arch.language.max_positions)
    answers: list[list[list[int]]] = [[[] for _ in prompt.questions] for prompt in prompts]
    model.eval()
    with torch.no_grad(), cpu.direct():
        for numbers in _groups(prompts, row_tokens):
            items = [Running(prompts[n], answers[n], list(range(len(answers[n])))) for n in numbers]

            def pick(
                logits: torch.Tensor | None, items: Sequence[Running] = items, numbers: list[int] = numbers
            ) -> None:
                opened = [(place, question) for place, item in enumerate(items) for question in item.open]
                chosen = None
                if logits is not None:
                    seen = [items[place].ids(question) for place, question in opened]
                    chosen = choose(logits, seen, sampling, generator)
                for (place, question), token in zip(opened, stages.agree(chosen, len(opened), device), strict=True):
                    item = items[place]
                    if token != tokenizer.eos:
                        item.answers[question].append(token)
                        said(numbers[place], question, token)
                    if token == tokenizer.eos or _ended(item.answers[question], max_new_tokens, stop, tokenizer):
                        item.open.remove(question)

            _answer(model, items, tokenizer, max_new_tokens, device, pick)
            progress(len(items))
    return answers


def _check_lengths(prompts: Sequence[Prompt], max_new_tokens: int, most: int) -> None:
    for number, prompt in enumerate(prompts):
        longest = len(prompt.prefix) + max((len(question) for question in prompt.questions), default=0)
        if longest + max_new_tokens > most:
            raise ValueError(
                f"prompt {number} has {longest} tokens and may get {max_new_tokens} more, but the model was made for "
                f"{most} positions. Ask for fewer new tokens, or show fewer or smaller images or frames."
            )


def _groups(prompts: Sequence[Prompt], row_tokens: int) -> Iterator[list[int]]:
    """Numbers of prompts that are answered together; one that is longer than `row_tokens` by itself."""
    group: list[int] = []
    used = longest = 0
    for number, prompt in enumerate(prompts):
        length = len(prompt.prefix) + sum(map(len, prompt.questions))
        widest = max(longest, len(prompt.prefix))
        # The cache gives every prefix the room of the longest.
        if group and (used + length > row_tokens or widest * (len(group) + 1) > 2 * row_tokens):
            yield group
            group, used, widest = [], 0, len(prompt.prefix)
        group.append(number)
        used, longest = used + length, widest
    if group:
        yield group


def _ended(answer: list[int], most: int, stop: Sequence[str], tokenizer: Tokenizer) -> bool:
    if len(answer) >= most:
        return True
    if not stop:
        return False
    # A character has up to four bytes, and a token at least one.
    text = tokenizer.decode(answer[-4 * max(map(len, stop)) :])
    return any(string in text for string in stop)


def _answer(
    model: Any,
    items: Sequence[Running],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    device: torch.device | str,
    pick: Callable[[torch.Tensor | None], None],
) -> None:
    """Answer the questions of `items`, whose `open` and `answers` `pick` changes."""
    if not any(item.open for item in items):
        return
    images = None
    if model.pre_process:
        encode(model, items, tokenizer, device)
        images = torch.cat([item.features for item in items if item.features is not None])
    batch, ends = row(items, tokenizer)
    batch, places = batch.to(device), torch.tensor(ends, device=device)
    # 1. All prompts as one row; the keys and values of every layer are kept.
    cache = Cache(items, max_new_tokens, device)
    with _attending(model, lambda _, attention: _Keeping(cache, attention)):
        pick(stages.through(model, batch.tokens.shape[1], lambda: model(batch, logits_at=places, images=images)))
    # 2. The last token of every open answer.
    with _attending(model, lambda layer, attention: _Reading(cache, layer, attention.scale)):
        while cache.keep_open():
            latest = [(item.answers[question][-1], item.position(question)) for item in items for question in item.open]
            tokens, positions = torch.tensor(latest, device=device).t()[:, None]
            pick(stages.through(model, len(latest), partial(_step, model, tokens, positions)))
            cache.grow()


def _step(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One token of each answer, (1, n) ids at positions, through this stage; the last one's logits (n, v) float32."""
    language = model.language
    hidden = language.embedding(tokens).transpose(0, 1) if model.pre_process else None
    # The marks of a row mean nothing here: the cache knows who sees whom.
    hidden = language.decode(hidden, tokens, positions)
    if not model.post_process:
        return hidden
    logits = (hidden[:, 0] @ language.head_weight.t()).float()
    return gather_from_tensor_model_parallel_region(logits, group=model.tp_group)


@contextmanager
def _attending(model: Any, make: Callable[[int, nn.Module], nn.Module]) -> Iterator[None]:
    """Other attention in the layers of this stage, given by number and the layer's own."""
    layers = [layer.self_attention for layer in model.language.decoder.layers]
    own = [layer.core_attention for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.core_attention = make(number, own[number])
        yield
    finally:
        for layer, attention in zip(layers, own, strict=True):
            layer.core_attention = attention


class _Keeping(nn.Module):
    """The layer's own attention; its keys and values go into the cache."""

    def __init__(self, cache: Cache, attention: nn.Module) -> None:
        super().__init__()
        self._cache, self._attention = cache, attention

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any) -> Any:
        self._cache.keep(key[:, 0], value[:, 0])
        return self._attention(query, key, value, attention_mask, **others)


class _Reading(nn.Module):
    """Attention of one new token of each answer to its prefix and its own branch."""

    def __init__(self, cache: Cache, layer: int, scale: float | None) -> None:
        super().__init__()
        self._cache, self._layer, self._scale = cache, layer, scale

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any) -> Any:
        """Query (n, 1, h, d), key and value (n, 1, k, d): one token of n answers -> (n, 1, h x d)."""
        scale = self._scale if self._scale is not None else query.shape[-1] ** -0.5
        return self._cache.attend(self._layer, query[:, 0], key[:, 0], value[:, 0], scale)[:, None]
