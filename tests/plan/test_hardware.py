"""Devices and wires."""

from __future__ import annotations

import pytest

from megatron_vlm import cost
from megatron_vlm.plan import hardware


def cluster(name: str = "h100", nodes: int = 4) -> hardware.Cluster:
    return hardware.Cluster(hardware.find(name), nodes, 8)


def test_unknown_gpu_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'h10' is not known; known are: h100, .*Did you mean h100"):
        hardware.find("h10")


@pytest.mark.parametrize("name", ["h100", "h200", "b200", "a100-80", "a100-40"])
def test_peak_is_the_trainers(name):
    """MFU in a plan and in metrics.jsonl mean the same."""
    assert hardware.find(name).flops == cost.peak_flops(name.split("-")[0].upper())


def test_roofline():
    h100 = cluster()
    assert h100.seconds(10**15, 0, "bf16") == pytest.approx(10**15 / (989e12 * 0.65))
    assert h100.seconds(0, 10**9, "bf16") == pytest.approx(10**9 / (3350e9 * 0.75))
    assert h100.seconds(10**15, 10**9, "bf16") == h100.seconds(10**15, 0, "bf16")
    assert h100.seconds(10**15, 0, "fp8") == pytest.approx(10**15 / (1979e12 * 0.65))
    assert h100.seconds(10**12, 0, "float32") > 10 * h100.seconds(10**12, 0, "bf16")


def test_tensors_get_what_the_context_and_the_allocator_leave():
    assert cluster().usable / hardware.GIB == pytest.approx((79.1 - 2.5) / 1.05)


def test_wires():
    h100 = cluster()
    inside, across = (h100.transfer("all_gather", 10**9, 8, stride) for stride in (1, 8))
    assert across > 5 * inside  # one way out for each device against NVLink
    assert h100.transfer("all_reduce", 10**9, 8, 1) == pytest.approx(2 * inside, rel=0.01)
    assert h100.transfer("all_gather", 10**9, 1, 1) == 0
    assert h100.transfer("all_gather", 1, 32, 1) >= hardware.NETWORK_LATENCY_S
    assert h100.transfer("send", 10**9, 2, 8) > h100.transfer("send", 10**9, 2, 4)
    # Eight devices of a node share the way to the next.
    assert inside < h100.transfer("all_gather", 10**9, 32, 1) < across
