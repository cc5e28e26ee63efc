"""Decoding with a cache beside decoding without: 512 new tokens, one question and eight on one image.

The tiny model; a decoder with the widths of Qwen3-0.6B and two layers, 128 new tokens.

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
from megatron_vlm.config.architecture import VISION_TOKENS, Architecture  # noqa: E402
from megatron_vlm.config.schema import Config, ModelConfig  # noqa: E402
from megatron_vlm.convert import probe  # noqa: E402
from megatron_vlm.evaluate.decode import decode  # noqa: E402
from megatron_vlm.evaluate.prompt import Prompt  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from tests.evaluate.plain import generate  # noqa: E402

#: Decoders: the tiny preset, and Qwen3-0.6B's widths with two layers, where a step is arithmetic and not Python.
MODELS = ("tiny", "0.6B widths")


def architecture(name: str) -> Architecture:
    """With the tiny preset's tower, and room for the answers."""
    arch = presets.PRESETS["tiny"]
    language = arch.language
    if name != "tiny":
        wide = presets.PRESETS["qwen3_0.6b"].language
        language = dataclasses.replace(wide, layers=2, vocab_size=language.vocab_size, new_rows=language.new_rows)
    return dataclasses.replace(arch, language=dataclasses.replace(language, max_positions=4096))


def model_and_prompt(name: str) -> tuple[Any, Any, Any]:
    """A model; a prompt with an image; its tokenizer."""
    from megatron_vlm.model.build import build

    arch = presets.PRESETS["decoding"] = architecture(name)
    (model,) = build(Config(model=ModelConfig(preset="decoding")), Layout(1))
    sample = probe.samples(arch)[0]
    tokenizer = SimpleNamespace(
        eos=-1,
        im_patch=arch.token_id("<im_patch>"),
        vision_ids=frozenset(arch.token_id(name) for name in VISION_TOKENS),
    )
    return model, Prompt(sample.prefix, sample.branches[:1], sample.crops, sample.windows), tokenizer


def measure(
    name: str, prompt: Any, questions: int, tokens: int, rounds: int, model: Any, tokenizer: Any
) -> dict[str, Any]:
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
    return {"model": name, "questions": questions, "prompt tokens": len(asked.prefix) + len(asked.questions[0]),
            "new tokens": tokens,
            "without s": took["without"], "cached s": took["cached"],
            "times faster": took["without"] / took["cached"]}  # fmt: skip


def main() -> None:
    parser = record.options(__doc__, rounds=1)
    parser.add_argument("--tokens", type=int, default=512)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with trainers.alone():
        rows = []
        for name in MODELS:
            model, prompt, tokenizer = model_and_prompt(name)
            # Without a cache, 512 tokens at 0.6B widths take many minutes: a quarter of them shows enough.
            for questions, tokens in (
                ((1, asked.tokens), (8, asked.tokens)) if name == "tiny" else ((1, asked.tokens // 4),)
            ):
                rows.append(measure(name, prompt, questions, tokens, asked.rounds, model, tokenizer))
    for row in rows:
        print(row)
    if not asked.dry_run:
        key = {f"{row['model']}, {row['questions']} questions": round(row["times faster"], 2) for row in rows}
        summary = [
            (f"{row['new tokens']} new tokens with a cache over without, {row['model']}, questions on one image: "
             f"{row['questions']}", f"{row['times faster']:.1f} times faster (asked for: 5)")
            for row in rows
        ]  # fmt: skip
        what = f"{(__doc__ or '').strip()}\n\nMedians of {asked.rounds} run(s)."
        record.write("decode", what, {"rows": rows}, rows, key, summary, asked.threads)


if __name__ == "__main__":
    main()
