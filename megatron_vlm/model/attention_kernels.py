"""Which kernel serves which attention of the model, and why: decided once, at start, and printed.

flash-attn is imported here only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.parallel import cpu

#: Where flash-attn's functions for runs of different lengths stand: version 3 (Hopper only), version 2.
FLASH_MODULES = ("flash_attn_interface", "flash_attn")
INSTALL_FLASH = (
    "Install flash-attn 2 (pip install --no-build-isolation flash-attn; docker/Dockerfile has it), or set "
    "kernels.attention=flex"
)


@dataclass(frozen=True)
class AttentionKernels:
    """What serves what. blocks: torch's attention, block by block (plan.py); flex: FlexAttention; torch: torch's
    scaled-dot-product attention; flash: flash-attn."""

    images: str = "blocks"
    """Rows of the decoder with images or branches."""
    plain: str = "blocks"
    """Its rows without: each token sees what stands before it in its example."""
    crops: str = "torch"
    """The vision tower."""
    why: tuple[str, ...] = ()
    """A line for each part."""


def of(config: Config) -> AttentionKernels:
    """The kernels of a run, on the device that this process uses. Raises ValueError as `choose` does."""
    return choose(
        config.kernels.attention,
        on_cuda=not cpu.enabled(),
        half=config.train.precision != "float32",
        ring=config.parallel.context > 1 and config.parallel.context_method == "ring",
    )


def choose(
    asked: str, *, on_cuda: bool, half: bool, ring: bool, find_flash: Callable[[], object | None] | None = None
) -> AttentionKernels:
    """The kernels for `kernels.attention=asked`.

    half: bf16, the only numbers that flash-attn takes. ring: parallel.context_method passes keys around.
    find_flash: gives flash-attn's function, or None where it is not installed.
    Raises ValueError for a kernel that was asked for by name and cannot serve, with what to install or set.
    """
    flash = (find_flash or flash_function)() is not None
    _check(asked, on_cuda=on_cuda, half=half, ring=ring, flash=flash)
    if asked == "blocks" or not on_cuda or ring:
        reason = "asked for" if asked == "blocks" else "keys travel in a ring" if ring else "there is no CUDA device"
        images = plain = "blocks"
    else:
        reason = "it takes the whole mask rule"
        images = plain = "flex"
    crops, crop_reason = "torch", reason if images == "blocks" else ""
    if asked in ("auto", "flash") and on_cuda and not ring:
        missing = "" if flash else "flash-attn is not installed"
        missing = missing if half else f"flash-attn takes bf16 only{', and is not installed' * (not flash)}"
        crops, crop_reason = ("torch", missing) if missing else ("flash", "each crop sees itself, whole")
        plain = plain if missing else "flash"
    why = [f"attention of the decoder, rows with images or branches: {images} ({reason})"]
    plain_reason = "they are plain causal" if plain == "flash" else crop_reason or reason
    why.append(f"attention of the decoder, rows of text alone: {plain} ({plain_reason})")
    why.append(
        f"attention of the vision tower: {crops} ({crop_reason or 'asked for flex, which has nothing to mask here'})"
    )
    why.append("attention of the connector: torch (a query or a few for each window)")
    return AttentionKernels(images, plain, crops, tuple(why))


def _check(asked: str, *, on_cuda: bool, half: bool, ring: bool, flash: bool) -> None:
    if asked not in ("flex", "flash"):
        return
    if not on_cuda:
        reason = "FlexAttention has no backward there" if asked == "flex" else "flash-attn runs on CUDA only"
        raise ValueError(f"kernels.attention={asked} on a CPU: {reason}. Set kernels.attention=auto.")
    if ring:
        raise ValueError(
            f"kernels.attention={asked} with parallel.context_method=ring, which has a kernel of its own. Set "
            "kernels.attention=auto, or another parallel.context_method."
        )
    if asked == "flash" and not flash:
        raise ValueError(f"kernels.attention=flash, but flash-attn cannot be imported. {INSTALL_FLASH}.")
    if asked == "flash" and not half:
        raise ValueError(
            "kernels.attention=flash takes bf16 only, but train.precision=float32. Set train.precision=bf16, or "
            "kernels.attention=flex."
        )


def flash_function() -> Callable[..., Any] | None:
    """flash-attn's `flash_attn_varlen_func`, the newest that this GPU can use; None where there is none."""
    for name in FLASH_MODULES:
        if name == "flash_attn_interface" and (
            not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9
        ):
            continue
        try:
            return importlib.import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError, OSError):  # OSError: a library that it links to is missing
            continue
    return None
