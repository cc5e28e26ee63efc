"""The first promise: layouts do not change the result. Ten real steps each, against one process."""

import dataclasses

import numpy as np
import pytest

from megatron_vlm.train import parity
from tests.data import world as data
from tests.train import world

STEPS = (1, 5, 10)
LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "dp2": (2, {}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
}
FAST = (("dp2", "trainable_vision"),)
FROZEN = {"frozen_vision": ("vision", "base_embeddings"), "trainable_vision": ("base_embeddings",)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("world")
    data.build(path)
    return path


@pytest.fixture(scope="module")
def reference(folder, pool):
    """Of one process, by what is frozen."""
    return {
        name: pool(1).run(world.steps, world.config(folder, freeze=freeze), STEPS, timeout_s=120)
        for name, freeze in FROZEN.items()
    }


def _close(found, wanted):
    """Norm of the difference per module, relative to the module's gradient; rounding alone (k-biases) has a floor."""
    found, wanted = parity.by_module(world.assemble(found)), parity.by_module(world.assemble(wanted))
    assert found.keys() == wanted.keys()
    floor = 1e-6 * max(np.linalg.norm(vector) for vector in wanted.values())
    return {
        name: np.linalg.norm(found[name] - wanted[name]) / max(np.linalg.norm(wanted[name]), floor) for name in wanted
    }


CASES = [
    # The fast run has the layouts of one model replica in their hardest form.
    pytest.param(layout, frozen, marks=[] if (layout, frozen) in FAST else [pytest.mark.slow], id=f"{layout}-{frozen}")
    for layout in LAYOUTS
    for frozen in FROZEN
]


@pytest.mark.parametrize(("layout", "frozen"), CASES)
def test_losses_and_gradients_equal_those_of_one_process(layout, frozen, folder, reference, pool):
    world_size, parallel = LAYOUTS[layout]
    settings = world.config(folder, freeze=FROZEN[frozen], **parallel)
    ranks = pool(world_size).run(world.steps, settings, STEPS, timeout_s=120)
    wanted = reference[frozen][0]
    for rank in ranks:
        np.testing.assert_allclose(rank["losses"], wanted["losses"], rtol=1e-5)
        for found, expected in zip(rank["by_source"], wanted["by_source"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        for found, expected in zip(rank["norms"], wanted["norms"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
    for step in STEPS:
        errors = _close([rank["gradients"][step] for rank in ranks], [wanted["gradients"][step]])
        worst = max(errors, key=errors.get)
        assert errors[worst] < 1e-5, f"step {step}: {worst} differs by {errors[worst]:.1e}"
    assert wanted["losses"][-1] < wanted["losses"][0] - 0.3


@pytest.mark.slow
def test_micro_batches_do_not_change_the_result(folder, reference, pool):
    settings = world.config(folder)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, micro_batch=4))
    (found,) = pool(1).run(world.steps, settings, timeout_s=120)
    np.testing.assert_allclose(found["losses"], reference["trainable_vision"][0]["losses"], rtol=1e-5)
