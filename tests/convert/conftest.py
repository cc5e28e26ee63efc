"""Megatron on the CPU, and the presets of the small models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def small_presets() -> Iterator[None]:
    """`cpu.enable` comes before anything imports Megatron, so tests import what needs it inside."""
    from megatron_vlm.parallel import cpu

    cpu.enable("cpu")
    from megatron_vlm.config import presets
    from tests.convert import world

    presets.PRESETS.update(world.PRESETS)
    yield
    for name in world.PRESETS:
        del presets.PRESETS[name]
