"""What a step is reported as: its line of metrics.jsonl, its line of ledger.jsonl. Numbers of the global batch."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_vlm import cost
from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data.loader import Step
from megatron_vlm.parallel import process
from megatron_vlm.train import faults
from megatron_vlm.train.step import Outcome


def record(step: int, fetched: Step, outcome: Outcome) -> dict[str, Any]:
    """What metrics.jsonl says about the step, speed not included."""
    return {
        "step": step,
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        **{f"grad_norm_{name}": norm for name, norm in outcome.norms.items()},
        **{f"lr_{name}": rate for name, rate in outcome.rates.items()},
        "tokens": fetched.tokens,
        "useful_tokens": fetched.useful_tokens,
        "image_tokens": fetched.image_tokens,
        "crops": fetched.crops,
        "samples": fetched.samples,
        "cut_tokens": fetched.cut_tokens,
        "dropped_branches": fetched.dropped_branches,
        "dropped_images": fetched.dropped_images,
        "fill": fetched.useful_tokens / fetched.tokens,
        "loss_weight": outcome.weight,
        **{f"loss/{name}": loss for name, loss in outcome.losses.items()},
    }


def speed(config: Config, outcome: Outcome, step_time_s: float, waited_s: float) -> dict[str, Any]:
    """Times, model FLOP/s of all ranks together, and the share of the devices' peak (null where it is not known)."""
    flops = cost.training(presets.architecture(config.model), outcome.work, config.model.freeze)
    peak = cost.peak_flops(process.device_name())
    per_second = flops / step_time_s
    return {
        "step_time_s": step_time_s,
        "data_wait_s": waited_s,
        "model_flops_per_s": per_second,
        "mfu": per_second / (peak * dist.get_world_size()) if peak else None,
    }


def ledger(fetched: Step) -> dict[str, Any]:
    """Which samples the step had, without its number."""
    return {
        "window": fetched.window,
        "offset": fetched.offset,
        "keys_hash": fetched.keys_hash,
        "skipped": [faults.entry(fault) for fault in fetched.skipped],
        "cut": list(fetched.cut),
    }
