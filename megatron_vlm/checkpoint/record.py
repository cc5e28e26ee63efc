"""What a checkpoint says about itself in JSON files beside its tensors. Needs no Megatron."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.checkpoint import verify
from megatron_vlm.config import presets
from megatron_vlm.config.load import to_dict
from megatron_vlm.config.schema import Config

STATE = "state.json"
ARCHITECTURE = "architecture.json"
CONFIG = "config.json"
#: Keys of optimizer tensors in a checkpoint begin so.
OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class Record:
    """What a checkpoint says about itself, without its tensors."""

    path: Path
    """The checkpoint."""
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """What `save` was given as `state`."""
    config: dict[str, Any]
    """Settings of the run that wrote it, nested by section."""
    architecture: dict[str, Any]
    """Its model, as the fields of config.architecture.Architecture."""


def read(directory: str | Path) -> Record:
    """The record of the checkpoint at `directory` (itself, the newest in it, or a run's newest). No collectives.

    Raises ValueError where there is none or its files are damaged.
    """
    path = names.find(directory)
    step = verify.read_manifest(path)["step"]
    return Record(path, step, _json(path / STATE), _json(path / CONFIG), _json(path / ARCHITECTURE))


def documents(config: Config, state: dict[str, Any]) -> dict[str, str]:
    """The JSON files beside the tensors, by name."""
    try:
        state_text = json.dumps(state, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the training state cannot be written as JSON: {error}. It may hold numbers, text, lists and dicts."
        ) from error
    if json.loads(state_text) != state:
        raise ValueError(
            "the training state does not come back equal from JSON: tuples or keys that are not text in it?"
        )
    architecture = dataclasses.asdict(presets.architecture(config.model))
    return {
        STATE: state_text + "\n",
        ARCHITECTURE: json.dumps(architecture, indent=1) + "\n",
        CONFIG: json.dumps(to_dict(config), indent=1) + "\n",
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint is not complete. Use another checkpoint.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Use another checkpoint.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}. Use another checkpoint.")
    return value
