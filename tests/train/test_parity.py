"""The comparison of two runs, on made-up numbers: what is relative to what, and which tensor gets named."""

import copy
import math

import numpy as np
import pytest

from megatron_vlm.train import parity

TENSORS = {
    "vision.layers.0.norm.weight": 1.0,
    "connector.linear.weight": 2.0,
    "connector.linear.bias": 1.0,
    "language.embedding.new_rows": 1.0,
    "language.decoder.layers.0.mlp.weight": 3.0,
}


def told(steps=2):
    gradients = {name: (0.0, size) for name, size in TENSORS.items()}
    each = {"loss": 2.0, "losses": {"a": 1.0, "b": 3.0}, "grad_norm": 4.0, "norms": {"vision": 1.0},
            "keys_hash": "a" * 64, "gradients": gradients}  # fmt: skip
    return {
        "steps": [{"step": step, **copy.deepcopy(each)} for step in range(1, steps + 1)],
        "weights": {0: dict(gradients), steps: dict(gradients)},
    }


def compare(found):
    return parity.compare("x", 2, found, told(), 1e-5, 1e-3)


def test_equal_runs_have_no_fault():
    report = compare(told())
    assert report.faults == () and report.data
    assert report.loss == report.grad_norm == report.weights == 0
    assert report.components == dict.fromkeys(parity.COMPONENTS, 0.0)


def test_gradients_are_compared_by_module():
    found = told()
    found["steps"][1]["gradients"]["connector.linear.bias"] = (5e-5, 1.0)
    report = compare(found)
    assert report.modules["connector.linear"] == pytest.approx(5e-5 / math.sqrt(5))
    assert report.components["connector"] == report.modules["connector.linear"]
    assert report.faults == (
        "step 2: the gradient of connector.linear.bias differs by 2.2e-05, allowed 1e-05 (1 of 4 modules differ)",
    )


def test_first_in_the_backward_pass_is_named_unless_the_forward_pass_differs():
    found = told()
    for name, error in (("vision.layers.0.norm.weight", 0.5), ("language.decoder.layers.0.mlp.weight", 0.01)):
        found["steps"][0]["gradients"][name] = (error, TENSORS[name])
    assert "step 1: the gradient of language.decoder.layers.0.mlp.weight" in compare(found).faults[0]
    found["steps"][0]["loss"] = 2.001
    faults = compare(found).faults
    assert faults[0] == "step 1: the loss is 2.001, the reference's 2"
    assert "vision.layers.0.norm.weight" in faults[1]


def test_rounding_has_a_floor_and_what_is_no_number_is_a_fault():
    found = told()
    found["steps"][0]["gradients"]["vision.layers.0.norm.weight"] = (1e-12, 0.0)
    assert compare(found).faults == ()
    found["steps"][0]["gradients"]["vision.layers.0.norm.weight"] = (math.nan, 1.0)
    found["steps"][0]["loss"] = math.nan
    report = compare(found)
    assert math.isnan(report.loss) and math.isnan(report.components["vision"]) and len(report.faults) == 2


@pytest.mark.parametrize(("step", "error", "fault"), [(0, 1e-4, True), (2, 1e-4, False), (2, 1e-2, True)])
def test_weights_may_differ_more_after_updates_than_before(step, error, fault):
    found = told()
    found["weights"][step]["language.decoder.layers.0.mlp.weight"] = (3 * error, 3.0)
    report = compare(found)
    assert bool(report.faults) == fault
    assert not fault or "language.decoder.layers.0.mlp.weight" in report.faults[0]


def test_other_samples_and_other_norms_are_faults():
    found = told()
    found["steps"][0]["keys_hash"] = "b" * 64
    found["steps"][1]["grad_norm"] = 4.1
    report = compare(found)
    assert not report.data and report.grad_norm == pytest.approx(0.025)
    assert "other samples" in report.faults[0] and "4.1, not 4" in report.faults[1]


def test_a_data_set_and_a_component_are_compared_by_themselves():
    found = told()
    found["steps"][0]["losses"] = {"a": 1.001}
    found["steps"][1]["norms"]["vision"] = 1.1
    assert compare(found).faults == (
        "step 1: the loss of data set a is 1.001, not 1",
        "step 1: the loss of data set b is None, not 3",
        "step 2: the gradient norm of vision is 1.1, not 1",
    )


def test_parts_are_put_together_and_copies_compared():
    first = np.ones((2, 3), np.float32)
    parts = [{"a": ((4, 3), [((0, 0), first)])}, {"a": ((4, 3), [((2, 0), 2 * first)])}]
    whole, apart = parity.assemble(parts)
    assert whole["a"].tolist() == [[1] * 3] * 2 + [[2] * 3] * 2 and apart == {"a": 0}
    copies = {"a": ((4, 3), [((2, 0), 2 * first + 1)])}
    assert parity.assemble([*parts, copies])[1]["a"] == pytest.approx(math.sqrt(6))
    with pytest.raises(ValueError, match="a: a part is held by no rank"):
        parity.assemble(parts[:1])


def test_copies_on_two_ranks_that_differ_count_as_a_difference(one_rank, tmp_path):
    from megatron_vlm.train import observe, trial

    def norms(*copies, **plan):
        parts = [((0,), np.array(copy, np.float32)) for copy in copies]
        return observe._norms({"a.weight": ((2,), parts)}, trial.Plan(1, tmp_path, **plan), "gradients_1")["a.weight"]

    assert norms([3, 4], writes=True) == (0, 5)
    assert norms([3, 4], [3, 4]) == (0, 5)
    assert norms([3, 3], [3, 4]) == (1, 5)
