"""Decoding with a cache beside decoding without: 512 new tokens of the tiny model, one question and eight on one image.

    python benchmarks/decode.py [--tokens 512] [--rounds 1]

Random weights and no end of sequence, so every answer has its full length; both give the same tokens, which is
checked. Times are medians of alternating runs, generation alone. On this machine's CPU, float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def model_and_prompt(tokens: int) -> tuple[Any, Any, Any]:
    """The tiny preset with room for the answers; a prompt with an image; its tokenizer."""
    from megatron_vlm.config import presets
    from megatron_vlm.config.architecture import VISION_TOKENS
    from megatron_vlm.config.schema import Config, ModelConfig
    from megatron_vlm.convert import probe
    from megatron_vlm.evaluate.generate import Prompt
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel.layout import Layout

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


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    answers = run()
    return time.perf_counter() - began, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    asked = parser.parse_args()
    from megatron_vlm.parallel import cpu

    cpu.enable("cpu")
    import torch

    from megatron_vlm.convert.answers import alone
    from megatron_vlm.evaluate.decode import decode
    from megatron_vlm.evaluate.generate import generate

    rows = []
    with alone():
        model, prompt, tokenizer = model_and_prompt(asked.tokens)
        encoded: list[int] = []
        own = model.encode
        model.encode = lambda batch: encoded.append(len(batch.crops)) or own(batch)
        for questions in (1, 8):
            each = dataclasses.replace(
                prompt, questions=[[number, *prompt.questions[0]] for number in range(questions)]
            )
            seconds: dict[Any, list[float]] = {generate: [], decode: []}
            for _ in range(asked.rounds):
                said = []
                for way, times in seconds.items():
                    encoded.clear()
                    took, answers = timed(lambda w=way, e=each: w(model, [e], tokenizer, max_new_tokens=asked.tokens))
                    times.append(took)
                    said.append(answers)
                assert said[0] == said[1], "the cache changed an answer"
                assert encoded == [len(prompt.crops)], "the image was encoded more than once"
            without, with_cache = (statistics.median(times) for times in seconds.values())
            rows.append(
                {
                    "questions": questions,
                    "prompt_tokens": len(each.prefix) + len(each.questions[0]),
                    "new_tokens": asked.tokens,
                    "without_seconds": round(without, 2),
                    "cached_seconds": round(with_cache, 2),
                    "times_faster": round(without / with_cache, 1),
                    "image_encodings": len(encoded),
                }
            )
            print(rows[-1], flush=True)
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
               "torch": torch.__version__, "rounds": asked.rounds}  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
    (asked.out / "decode.json").write_text(text, encoding="utf-8")
    lines = [
        "# Decoding with a cache",
        "",
        f"The tiny model, random weights, float32, {machine['cores']} CPU cores ({machine['threads']} threads), torch "
        f"{machine['torch']}; `python benchmarks/decode.py`.",
        "",
        "| questions on one image | new tokens each | without, s | cached, s | times faster | image encoded |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['questions']} | {row['new_tokens']} | {row['without_seconds']} | {row['cached_seconds']} | "
            f"{row['times_faster']} | {row['image_encodings']} time |"
            for row in rows
        ),
    ]
    (asked.out / "decode.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
