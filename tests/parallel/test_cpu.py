"""The redirection: what Megatron asks of CUDA is answered by the CPU, and torch itself stays as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_vlm.parallel import cpu


@pytest.fixture(autouse=True)
def redirected() -> None:
    cpu.enable("cpu")


def test_factories_and_moves_land_on_the_cpu():
    for made in (
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", 3)),
        torch.empty(2, device=torch.cuda.current_device()),
        torch.ones(2).to("cuda:1"),
        torch.ones(2).to(torch.device("cuda"), torch.float64),
        torch.ones(2).to(device="cuda"),
        torch.ones(2).cuda(),
        torch.nn.Linear(2, 2).cuda().weight,
    ):
        assert made.device.type == "cpu"
    assert torch.ones(2).to(torch.device("cuda"), torch.float64).dtype == torch.float64


def test_meta_device_still_works():
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    assert torch.ones(2, device="meta").to("meta").device.type == "meta"


def test_type_names_are_what_the_optimizers_compare_with():
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.int32).dtype == torch.int32


def test_random_state_is_the_cpus():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_second_call_changes_nothing():
    before = torch.cuda.current_device, cpu._active
    cpu.enable("cpu")
    assert (torch.cuda.current_device, cpu._active) == before and cpu.enabled()


@pytest.mark.slow
def test_cuda_runs_are_left_alone_and_the_compiler_is_not_imported():
    code = (
        "import sys, torch; from megatron_vlm.parallel import cpu; before = torch.cuda.current_device, torch.compile;"
        "cpu.enable('cuda'); assert torch.cuda.current_device is before[0] and not cpu.enabled();"
        "cpu.enable('cpu'); assert cpu.enabled() and torch.compile is before[1];"
        "import megatron.core.models.gpt; assert 'torch._dynamo' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stderr == "", "a CPU run must not start with warnings about GPU packages"
