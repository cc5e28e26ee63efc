"""A run directory: what lies where, who may write it, and how it is brought back to a checkpoint's step.

config.yaml, environment.json, metrics.jsonl, ledger.jsonl, stragglers.jsonl, norms.jsonl, fp8.jsonl, tensorboard/,
checkpoints/. Only rank 0 writes; but heartbeats/ (see watchdog.py) holds files of every rank.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_vlm
from megatron_vlm.config import load
from megatron_vlm.config.schema import Config

#: Logs with one JSON object per line, each with its step.
LOGS = ("metrics.jsonl", "ledger.jsonl", "stragglers.jsonl", "norms.jsonl", "fp8.jsonl")
#: Settings that may change between a checkpoint and the run that goes on from it: they do not touch what is learnt.
MAY_CHANGE = (
    "run", "init", "parallel", "checkpoint", "guard", "eval", "log", "kernels",
    "data.workers", "data.plan_cache", "data.bad_samples", "data.bad_ceiling", "train.micro_batch", "train.recompute",
    "train.logit_chunk", "fp8.shadow_every",
)  # fmt: skip
PACKAGES = ("torch", "megatron-core", "numpy", "tokenizers", "webdataset", "pyarrow", "pillow", "transformer-engine")


def path(config: Config) -> Path:
    """Where the run of `config` lives."""
    return config.run.path


def checkpoints(config: Config) -> Path:
    """Folder of the run's checkpoints."""
    return path(config) / "checkpoints"


def differences(saved: dict[str, Any], now: Config) -> dict[str, str]:
    """Settings that differ from a checkpoint's and may not, unless run.accept names them: `was X, is Y` by name.

    With a constant schedule, `train.steps` may differ: the learning rates of the steps done do not depend on it.
    A setting that did not exist yet when the checkpoint was saved had its default.
    """
    may_change = {*MAY_CHANGE, *(("train.steps",) if now.optim.schedule == "constant" else ())}
    was, is_ = _flat(load.to_dict(Config())) | _flat(saved), _flat(load.to_dict(now))
    return {
        name: f"was {was.get(name, 'not set')!r}, is {is_.get(name, 'not set')!r}"
        for name in dict.fromkeys([*was, *is_])
        if was.get(name) != is_.get(name)
        and not any(name == free or name.startswith(f"{free}.") for free in may_change)
    }


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def prepare(config: Config, step: int, facts: dict[str, Any]) -> Path:
    """Make the directory ready for a run that starts after `step` (0 = a new run), and give its path.

    Log lines of later steps, left by a run that went on after its last checkpoint, move to `<log>.cut`.
    `facts`: what the caller knows about the run, for environment.json.
    """
    folder = path(config)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.yaml", load.dump(config))
    _write(folder / "environment.json", json.dumps(environment() | facts, indent=2) + "\n")
    for name in LOGS:
        cut(folder / name, step)
    return folder


def cut(log: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; move what follows, an unfinished line included, to `<log>.cut`."""
    if not log.exists():
        return
    kept: list[bytes] = []
    moved: list[bytes] = []
    for line in log.read_bytes().splitlines(keepends=True):
        try:
            early = line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            early = False
        # Everything after the first line that goes, goes: order in the log is order in time.
        (kept if early and not moved else moved).append(line)
    if moved:
        with open(f"{log}.cut", "ab") as file:
            file.write(b"".join(moved).rstrip(b"\n") + b"\n")
        _write(log, b"".join(kept).decode())


def environment() -> dict[str, Any]:
    """Versions of the packages, of Python and of this code. Holds no environment variables."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "megatron_vlm": megatron_vlm.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
        "command": sys.argv,
    }


def _commit() -> str | None:
    """Commit of the code, with `+` where files differ from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        run: dict[str, Any] = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", "."], **run).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _write(file: Path, text: str) -> None:
    """Replace a file in one step: a reader finds the old text or the new."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
