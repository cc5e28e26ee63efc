"""What a rank does in a trial: the steps, and every gradient written down or compared with what was.

A reference run writes whole tensors into a folder; a compared run sends its parts to rank 0 step by step, which keeps
only norms: of each difference and of each reference tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_vlm.batch import Batch
from megatron_vlm.checkpoint import load as checkpoint_load
from megatron_vlm.checkpoint import save as checkpoint_save
from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data.loader import Loader
from megatron_vlm.data.unpacked import UnpackedLoader
from megatron_vlm.model.build import build
from megatron_vlm.parallel import groups
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.train import faults, optim, parity, pieces
from megatron_vlm.train.state import share
from megatron_vlm.train.step import Stepper
from megatron_vlm.train.trial import Plan

#: Tensor -> (norm of the difference to the reference, norm of the reference).
Norms = dict[str, tuple[float, float]]


def run(config: Config, plan: Plan) -> dict[str, Any] | None:
    """Run `plan`; every rank of the layout calls it. What it tells stands in `trial.run`."""
    layout = Layout.of(config, dist.get_world_size())
    backend = dist.get_backend()
    groups.initialize(layout, backend=backend, seed=config.train.seed, timeout_s=plan.timeout_s)
    record = None if plan.resume is None else checkpoint_load.read(plan.resume)
    loader = _loader(config, layout, plan.packed, record.state["data"] if record else None)
    models = optim.wrap(build(config, layout), config)
    optimizer = optim.build(models, config)
    if record:
        checkpoint_load.load(record.path, models=models, optimizer=optimizer, config=config)
    elif config.init.checkpoint:
        checkpoint_load.load(config.init.checkpoint, models=models, config=config)
        optimizer.reload_model_params()
    trainer = _Watched(models, optimizer, config, loader.sources)
    first = record.step if record else 0
    steps, weights = [], {}
    try:
        batches = iter(loader)
        for step in range(first, plan.last + 1):
            if step > first:
                fetched = faults.settle(next(batches), config.data.bad_samples)
                trainer.watches = plan.compares or plan.writes
                outcome = trainer.train(fetched.micro_batches, step)
                told = {name: getattr(outcome, name) for name in ("loss", "losses", "grad_norm", "norms")}
                told["step"] = step
                # A global batch without loss weights has no gradients, on no layout.
                gradients = (
                    _norms(trainer.found, plan, f"gradients_{step}") if trainer.watches and outcome.norms else {}
                )
                steps.append({**told, "keys_hash": fetched.keys_hash, "gradients": gradients})
            if step in plan.weights or (record and step == first):
                weights[step] = _norms(pieces.weights(models), plan, f"weights_{step}")
        if plan.save:
            state = {"data": loader.state_dict(), "counters": {}}
            checkpoint_save.save(
                plan.save, models=models, optimizer=optimizer, step=plan.last, config=config, state=state
            )
    finally:
        loader.close()
    return {"steps": steps, "weights": weights} if dist.get_rank() == 0 else None


class _Watched(Stepper):
    """Keeps the gradients of each step as they are before clipping."""

    watches = True
    found: parity.Pieces

    def _run(self, micro_batches: Sequence[Batch], *, forward_only: bool) -> torch.Tensor:
        sums = super()._run(micro_batches, forward_only=forward_only)
        self.found = pieces.gradients(self.models, self.optimizer) if self.watches else {}
        return sums


def _loader(config: Config, layout: Layout, packed: bool, state: dict[str, Any] | None) -> Loader:
    loader = (Loader if packed else UnpackedLoader)(
        config, presets.architecture(config.model), share(layout), state=state
    )
    if isinstance(loader, UnpackedLoader) and layout.virtual_pipeline > 1:
        loader.multiple = layout.pipeline  # the interleaved schedule deals micro-batches in such groups
    return loader


def _norms(found: parity.Pieces, plan: Plan, name: str) -> Norms:
    """Send the parts to rank 0, which writes or compares them. Collective; {} on the other ranks."""
    if not (plan.writes or plan.compares):
        return {}
    by_rank: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, by_rank, dst=0)
    if by_rank is None:
        return {}
    whole, apart = parity.assemble(by_rank)
    file = plan.folder / f"{name}.npz"
    if plan.writes:
        np.savez(file, **whole)  # type: ignore[arg-type]
        return {key: (0.0, _norm(tensor)) for key, tensor in whole.items()}
    with np.load(file) as reference:
        if set(reference.files) != set(whole):
            different = sorted(set(reference.files) ^ set(whole))
            raise ValueError(f"{different[0]} exists on one layout only: a parameter is missing or too many.")
        # Copies that should be equal count like a difference to the reference.
        return {
            key: (max(_norm(whole[key] - reference[key]), apart[key]), _norm(reference[key])) for key in reference.files
        }


def _norm(tensor: np.ndarray) -> float:
    return float(np.linalg.norm(tensor.astype(np.float64)))
