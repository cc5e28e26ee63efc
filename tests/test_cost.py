import dataclasses

from megatron_vlm import cost
from megatron_vlm.config.presets import PRESETS

MOLMO2 = PRESETS["molmo2_4b"]


def _work(**counts):
    empty = dict.fromkeys((field.name for field in dataclasses.fields(cost.Work)), 0)
    return cost.Work(**(empty | counts))


def test_tower_of_molmo2_costs_what_the_reference_says():
    assert abs(3 * cost.forward(MOLMO2, _work(crops=9)).vision / 16.6e12 - 1) < 0.01


def test_decoder_of_molmo2_costs_two_per_parameter_and_token():
    # 3,633,509,376 parameters in the blocks, of which norms (36 x (2 x 2560 + 2 x 128) + 2560) multiply nothing.
    matrices = 3_633_509_376 - 36 * (2 * 2560 + 2 * 128)
    assert abs(cost.forward(MOLMO2, _work(tokens=1)).language / (2 * matrices) - 1) < 1e-5
    assert cost.forward(MOLMO2, _work(pairs=10)).language == 10 * 36 * 4 * 4096
    assert cost.forward(MOLMO2, _work(loss_tokens=3)).language == 3 * 2 * 2560 * 151_936


def test_connector_of_molmo2_costs_its_parameters_per_window():
    # q and o once per window, k and v once per slot, the projector once per window; biases multiply nothing.
    flops = cost.forward(MOLMO2, _work(windows=1, slots=4)).connector
    per_window = 2304 * 1152 + 1152 * 1152 + 2 * 1152 * 9728 + 9728 * 2560
    assert flops == 2 * per_window + 4 * (2 * 2 * 2304 * 1152 + 4 * 1152)


def test_frozen_parts_cost_no_gradients_that_nobody_needs():
    work = _work(tokens=100, pairs=5000, loss_tokens=50, crops=2, windows=10, slots=40)
    flops = cost.forward(MOLMO2, work)
    everything = flops.vision + flops.connector + flops.language
    assert cost.training(MOLMO2, work) == 3 * everything
    assert cost.training(MOLMO2, work, ("vision",)) == flops.vision + 3 * flops.connector + 3 * flops.language
    frozen_ends = cost.training(MOLMO2, work, ("vision", "language"))
    # A trained tower wants gradients through a frozen connector.
    assert cost.training(MOLMO2, work, ("connector",)) == 3 * everything - flops.connector
    assert frozen_ends == flops.vision + 3 * flops.connector + 2 * flops.language
    assert cost.training(MOLMO2, work, ("vision", "connector", "language")) == everything


def test_peak_is_known_for_gpus_and_not_for_a_cpu():
    assert cost.peak_flops("NVIDIA H100 80GB HBM3") == 989 * 10**12
    assert cost.peak_flops("cpu") is None
