"""Loss on held-out rows, always the same ones. Collective."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from megatron_vlm.batch import Batch
from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data.faults import Fault
from megatron_vlm.data.loader import Loader, Share, Step
from megatron_vlm.train import faults
from megatron_vlm.train.step import Stepper


def evaluate(config: Config, stepper: Stepper, share: Share) -> tuple[dict[str, float], tuple[Fault, ...]]:
    """Loss on the first `eval.rows` held-out rows, and what of them could not be loaded."""
    began = time.perf_counter()
    loader = open_loader(config, share)
    if loader.sources != stepper.sources:
        raise ValueError(
            f"data.mixture={config.data.mixture!r} was changed while the run went on: its data sets were "
            f"{', '.join(stepper.sources)}, now {', '.join(loader.sources)}. Put it back, and start the run again: it "
            "goes on from its latest checkpoint."
        )
    count = max(1, config.eval.rows // config.train.global_batch)
    unread: list[Fault] = []
    steps = (faults.settle(step, config.data.bad_samples) for step in itertools.islice(iter(loader), count))
    outcome = stepper.evaluate(_micro_batches(steps, unread))
    loader.close()
    losses = {f"eval_loss/{name}": loss for name, loss in outcome.losses.items()}
    scores = {"eval_loss": outcome.loss, **losses, "eval_time_s": time.perf_counter() - began}
    return scores | ({"eval_skipped_samples": len(unread)} if unread else {}), tuple(unread)


def open_loader(config: Config, share: Share) -> Loader:
    """Raises ValueError where there are no such rows."""
    try:
        return Loader(config, presets.architecture(config.model), share, split=config.eval.split, one_pass=True)
    except ValueError as error:
        raise ValueError(
            f"there are no rows for the held-out loss: {error} Build the shards with held-out samples, set eval.split "
            f"to a split that has some, or switch it off with eval.every=0 (now {config.eval.every})."
        ) from error


def _micro_batches(steps: Iterator[Step], unread: list[Fault]) -> Iterator[tuple[Batch, ...]]:
    """Those of each step; what the steps lack is added to `unread`."""
    for step in steps:
        unread += step.skipped
        yield step.micro_batches
