"""Loss and head against logits of all tokens: time where a tenth of the tokens carry a loss, memory by prompt length.

    python benchmarks/loss.py [--tokens 512] [--threads 1] [--rounds 3]

The head of Qwen3-0.6B: 1,024 wide, 151,936 rows. Ours selects the loss tokens, then computes their logits chunk by
chunk; the other side is what transformers does: logits of all tokens in float32, cross-entropy that ignores prompts.
Forward and backward to the hidden states, and to the head where it trains. Memory: most bytes that operators held at
once beyond the hidden states and the head, for 64 loss tokens after prompts of different length.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, trainers  # noqa: E402

HIDDEN, VOCABULARY, LOSS_TOKENS = 1024, 151_936, 64
PROMPTS = (0, 448, 1984, 8128)
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def tensors(tokens: int, chosen: int, dtype: torch.dtype, trains: bool) -> tuple[torch.Tensor, ...]:
    """Hidden states (s, h), head (v, h), targets (s,) with -100 where there is no loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.02).to(dtype).requires_grad_(trains)
    targets = torch.full((tokens,), -100)
    targets[-chosen:] = torch.randint(VOCABULARY, (chosen,), generator=generator)
    return hidden, weight, targets


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of the losses of the chosen tokens."""
    from megatron_vlm.model.loss import token_losses
    from megatron_vlm.parallel import groups

    chosen = (targets >= 0).nonzero()[:, 0]
    losses = token_losses(hidden.index_select(0, chosen), weight, targets[chosen], z_loss=0.0, chunk=1024,
                          group=groups.tensor())  # fmt: skip
    return losses.sum()


def whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same from logits of all tokens."""
    logits = (hidden @ weight.t()).float()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def compare(tokens: int, precision: str, trains: bool, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    made = tensors(tokens, tokens // 10, DTYPES[precision], trains)
    wanted = [each for each in made[:2] if each.requires_grad]
    runs = {name: lambda loss=loss: torch.autograd.grad(loss(*made), wanted)
            for name, loss in (("ours", ours), ("whole", whole))}  # fmt: skip
    differ = abs(ours(*made).item() / whole(*made).item() - 1)
    found = record.medians(record.alternate(runs, rounds))
    return {
        "precision": precision, "head": "trains" if trains else "frozen", "tokens": tokens,
        "loss tokens": tokens // 10, "ours ms": 1000 * found["ours"], "whole logits ms": 1000 * found["whole"],
        "times faster": found["whole"] / found["ours"], "relative difference of losses": differ,
    }  # fmt: skip


def memory(prompt: int) -> dict[str, Any]:
    """Most bytes of ours and of whole logits, head frozen, float32."""
    from megatron_vlm.train.pretend import Meter

    found: dict[str, Any] = {"prompt tokens": prompt, "loss tokens": LOSS_TOKENS}
    for name, loss in (("ours", ours), ("whole logits", whole)):
        if name == "whole logits" and prompt > 1000:
            found["whole logits MB"] = "not run"
            continue
        made = tensors(prompt + LOSS_TOKENS, LOSS_TOKENS, torch.float32, False)
        meter = Meter()
        for each in made:
            meter.known(each.data)
        with meter:
            torch.autograd.grad(loss(*made), [made[0]])
        found[f"{name} MB"] = meter.peak / 1e6
    return found


def main() -> None:
    parser = record.options(__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with trainers.alone():
        used = [memory(prompt) for prompt in PROMPTS]
        found = [compare(asked.tokens, precision, trains, asked.rounds) for precision in DTYPES
                 for trains in (False, True)]  # fmt: skip
    for row in [*used, *found]:
        print(row)
    if not asked.dry_run:
        key = {f"{row['precision']}, head {row['head']}": round(row["times faster"], 2) for row in found}
        key["memory, longest prompt over none"] = round(used[-1]["ours MB"] / used[0]["ours MB"], 4)
        what = (__doc__ or "").split("\n\n")[-1].strip() + f"\n\n{record.table(used)}"
        faster = ", ".join(f"{row['precision']} {row['times faster']:.1f}" for row in found if row["head"] == "frozen")
        trained = ", ".join(f"{row['precision']} {row['times faster']:.1f}" for row in found if row["head"] != "frozen")
        summary = [
            ("loss and head where a tenth of the tokens carry a loss against logits of all, frozen head; trained head",
             f"{faster} times faster; {trained}"),
            (f"its peak memory after {PROMPTS[-1]:,} prompt tokens over that after none",
             f"{used[-1]['ours MB'] / used[0]['ours MB']:.4f}"),
        ]  # fmt: skip
        record.write("loss", what, {"speed": found, "memory": used}, found, key, summary, asked.threads)


if __name__ == "__main__":
    main()
