"""What a stream of rows is a function of, and whether a run may go on with another one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_vlm.config.geometry import ImageGeometry
from megatron_vlm.config.schema import Config
from megatron_vlm.data.mixture import Mixture
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tokens import Tokenizer

#: Settings of the section `data` that decide what the rows hold, beside the files.
SETTINGS = (
    "seed",
    "window",
    "sequence_length",
    "max_crops",
    "image_crops",
    "max_images",
    "multi_image_crops",
    "prompts",
    "loss_weighting",
)


def of(
    config: Config,
    shards: Shards,
    mixture: Mixture,
    tokenizer: Tokenizer,
    geometry: ImageGeometry,
    split: str,
    one_pass: bool,
) -> dict[str, Any]:
    """By name, as JSON values. What does not touch this stream is left out, so that it may change."""
    data, train = config.data, config.train
    found = {
        "manifest": shards.hash,
        "tokenizer": tokenizer.hash,
        "mixture": mixture.hash,
        "split": split,
        "one_pass": one_pass,
        "geometry": repr(geometry),
        **{name: getattr(data, name) for name in SETTINGS},
    }
    if any(member.high_resolution for member in mixture.members):
        found["high_resolution_crops"] = data.high_resolution_crops
    if shards.has_videos:
        found["videos"] = f"{data.frames_per_second} {data.max_frames} {geometry.video_pool}"
    if data.balance_batches > 1 and not one_pass:
        ramp = [train.rampup_steps, train.rampup_from, train.rampup_by]
        found["balance"] = f"{data.balance_batches} batches of {train.global_batch} rows, {ramp}"
    return found


def check(before: Mapping[str, Any], now: Mapping[str, Any], accept: Collection[str]) -> dict[str, str]:
    """What differs between two streams and is accepted: `was X and is now Y` by name.

    accept: run.accept; a setting goes by its whole name there (data.seed), contents (manifest, mixture, tokenizer) by
    theirs. Raises ValueError where anything else differs.
    """
    different = {
        name: f"was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in {**now, **before}
        if before.get(name) != now.get(name)
    }
    asked = {name: f"data.{name}" if name in SETTINGS else name for name in different}
    refused = [f"{name} {words}" for name, words in different.items() if not {name, asked[name]} & {*accept}]
    if refused:
        raise ValueError(
            f"the data are not those that the run was stopped on: {'; '.join(refused)}. Set them back, or start "
            "a new run from the weights (init.checkpoint). To go on all the same, at the next window of the new "
            f"order: run.accept=[{','.join(asked.values())}]."
        )
    return different
