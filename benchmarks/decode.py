"""Decoding with a cache beside decoding without: 512 new tokens of the tiny model, one question and eight on one image.

Random weights and no end of sequence, so every answer has its full length; both give the same tokens, and encode the
image once, which is checked. Float32, on a CPU.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, trainers  # noqa: E402
from megatron_vlm.config import presets  # noqa: E402
from megatron_vlm.config.architecture import VISION_TOKENS  # noqa: E402
from megatron_vlm.config.schema import Config, ModelConfig  # noqa: E402
from megatron_vlm.convert import probe  # noqa: E402
from megatron_vlm.evaluate.decode import decode  # noqa: E402
from megatron_vlm.evaluate.prompt import Prompt  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from tests.evaluate.plain import generate  # noqa: E402


def model_and_prompt(tokens: int) -> tuple[Any, Any, Any]:
    """The tiny preset with room for the answers; a prompt with an image; its tokenizer."""
    from megatron_vlm.model.build import build

    arch = presets.PRESETS["tiny"]
    language = dataclasses.replace(arch.language, max_positions=arch.language.max_positions + tokens)
    arch = presets.PRESETS["tiny"] = dataclasses.replace(arch, language=language)
    (model,) = build(Config(model=ModelConfig(preset="tiny")), Layout(1))
    sample = probe.samples(arch)[0]
    tokenizer = SimpleNamespace(
        eos=-1,
        im_patch=arch.token_id("<im_patch>"),
        vision_ids=frozenset(arch.token_id(name) for name in VISION_TOKENS),
    )
    return model, Prompt(sample.prefix, sample.branches[:1], sample.crops, sample.windows), tokenizer


def measure(prompt: Any, questions: int, tokens: int, rounds: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """One row: so many questions on one image, answered in both ways."""
    asked = dataclasses.replace(prompt, questions=[[number, *prompt.questions[0]] for number in range(questions)])
    said: dict[str, Any] = {}
    encoded: list[int] = []
    encode = model.encode

    def run(name: str, way: Callable[..., Any]) -> None:
        encoded.clear()
        said[name] = way(model, [asked], tokenizer, max_new_tokens=tokens)
        assert encoded == [len(prompt.crops)], "the image was encoded more than once"

    model.encode = lambda batch: encoded.append(len(batch.crops)) or encode(batch)
    ways = {"without": partial(run, "without", generate), "cached": partial(run, "cached", decode)}
    took = record.medians(record.alternate(ways, rounds, warmup=0))
    model.encode = encode
    assert said["without"] == said["cached"], "the cache changed an answer"
    return {"questions": questions, "prompt tokens": len(asked.prefix) + len(asked.questions[0]), "new tokens": tokens,
            "without s": took["without"], "cached s": took["cached"],
            "times faster": took["without"] / took["cached"]}  # fmt: skip


def main() -> None:
    parser = record.options(__doc__, rounds=1)
    parser.add_argument("--tokens", type=int, default=512)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with trainers.alone():
        model, prompt, tokenizer = model_and_prompt(asked.tokens)
        rows = [measure(prompt, questions, asked.tokens, asked.rounds, model, tokenizer) for questions in (1, 8)]
    for row in rows:
        print(row)
    if not asked.dry_run:
        key = {f"{row['questions']} questions": round(row["times faster"], 2) for row in rows}
        times = ", ".join(f"{row['questions']}: {row['times faster']:.1f}" for row in rows)
        summary = [(f"{asked.tokens} new tokens with a cache over without, tiny, by questions on one image",
                    f"{times} times faster (asked for: 5)")]  # fmt: skip
        what = f"{(__doc__ or '').strip()}\n\nMedians of {asked.rounds} run(s)."
        record.write("decode", what, {"rows": rows}, rows, key, summary, asked.threads)


if __name__ == "__main__":
    main()
