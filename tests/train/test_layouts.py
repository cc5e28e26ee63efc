"""The first promise, in the fast run: ten real steps on two data-parallel ranks, against one process.

tests/tools/test_parity.py has all other layouts.
"""

import dataclasses

import numpy as np
import pytest

from megatron_vlm.train import parity
from tests.data import world as data
from tests.train import world

STEPS = (1, 5, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("world")
    data.build(path)
    return path


@pytest.fixture(scope="module")
def reference(folder, pool):
    """Of one process."""
    return pool(1).run(world.steps, world.config(folder), STEPS, timeout_s=120)


def _close(found, wanted):
    """Norm of the difference per module, relative to the module's gradient; rounding alone (k-biases) has a floor."""
    found, wanted = world.assemble(found), world.assemble(wanted)
    assert found.keys() == wanted.keys()
    return parity.module_errors(
        {name: (np.linalg.norm(found[name] - wanted[name]), np.linalg.norm(wanted[name])) for name in wanted}
    )


def test_losses_and_gradients_equal_those_of_one_process(folder, reference, pool):
    settings = world.config(folder, overlap_grad_reduce=True, bucket_size=20_000)  # 17 buckets
    ranks = pool(2).run(world.steps, settings, STEPS, timeout_s=120)
    (wanted,) = reference
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
    np.testing.assert_allclose(found["losses"], reference[0]["losses"], rtol=1e-5)
