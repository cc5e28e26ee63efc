"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

# Before anything imports torch: the machine's cores are shared by the processes of the pools.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

from megatron_vlm.config.presets import PRESETS  # noqa: E402
from megatron_vlm.parallel.pool import Pool, forget_models  # noqa: E402

# A machine that does other work at the same time is slow now and then: that is no failure.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


def pytest_collection_finish() -> None:
    gc.freeze()  # what the imports made stays; `one_rank` need not walk over it


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker("processes")


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(world)` are the processes for that world size; `pool(world).run(function, *args)` calls on each."""
    pools: dict[int, Pool] = {}

    def of(world: int) -> Pool:
        return pools.setdefault(world, Pool(world))

    yield of
    for each in pools.values():
        each.close()


@pytest.fixture(scope="module", autouse=True)
def own_presets() -> Iterator[None]:
    """Presets that tests make do not outlive their file."""
    before = dict(PRESETS)
    yield
    PRESETS.clear()
    PRESETS.update(before)


@pytest.fixture
def one_rank(tmp_path) -> Iterator[None]:
    """Megatron on the CPU in this process, with torch.distributed and Megatron's groups for a world of one."""
    import torch.distributed as dist

    from megatron_vlm.parallel import cpu

    cpu.enable("cpu")
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    groups.initialize(Layout(1), seed=0)
    yield
    groups.destroy()
    dist.destroy_process_group()
    forget_models()
