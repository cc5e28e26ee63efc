"""Some steps of a recipe on the ranks of one layout, every gradient compared with those that another run wrote down.

What the caller of a trial needs, without torch; what the ranks do stands in `observe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.config.schema import Config


@dataclass(frozen=True)
class Plan:
    """What to run. Steps count from 1."""

    last: int
    """Step to stop after."""
    folder: Path
    """Where the tensors of the reference are."""
    writes: bool = False
    """This is the reference: it writes them. Else it compares."""
    compares: bool = True
    """False: neither; a run that only saves."""
    weights: tuple[int, ...] = ()
    """Steps after which weights are looked at; 0 = before the first."""
    packed: bool = True
    resume: Path | None = None
    """Checkpoint to go on from."""
    save: Path | None = None
    """Folder for a checkpoint after the last step."""
    timeout_s: float = 600.0


def run(config: Config, plan: Plan) -> dict[str, Any] | None:
    """Run `plan`; every rank of a pool calls it. On rank 0:

    steps: of each {step, loss, losses (by data set), grad_norm, norms (by component), keys_hash, gradients};
    weights: by step. Gradients and weights by checkpoint name: norm of the difference to the reference, and of the
    reference.
    """
    from megatron_vlm.train import observe  # Megatron: only on the ranks

    return observe.run(config, plan)
