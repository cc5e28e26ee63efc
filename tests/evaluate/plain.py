"""Greedy answers the plain way: no cache, every round reads everything again. The reference of evaluate/decode.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_vlm.evaluate.prompt import Prompt, Running, encode, row


def generate(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    max_new_tokens: int,
    device: torch.device | str = "cpu",
) -> list[list[list[int]]]:
    """Answers by prompt and question, as ids without the end of sequence; all prompts in one row. A whole model."""
    answers: list[list[list[int]]] = [[[] for _ in prompt.questions] for prompt in prompts]
    running = [Running(prompt, said, list(range(len(said)))) for prompt, said in zip(prompts, answers, strict=True)]
    model.eval()
    with torch.no_grad():
        encode(model, running, tokenizer, device)
        while running := [item for item in running if item.open]:
            batch, ends = row(running, tokenizer)
            images = torch.cat([item.features for item in running if item.features is not None])
            logits = model(batch.to(device), logits_at=torch.tensor(ends, device=device), images=images)
            following = iter(logits.argmax(dim=-1).tolist())
            for item in running:
                for question in list(item.open):
                    token = next(following)
                    if token != tokenizer.eos:
                        item.answers[question].append(token)
                    if token == tokenizer.eos or len(item.answers[question]) >= max_new_tokens:
                        item.open.remove(question)
    return answers
