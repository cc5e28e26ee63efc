"""Whose code computes what: the choice, its reason, and what a missing package's error says."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest
import torch

from megatron_vlm.config.schema import Config, Fp8Config, KernelsConfig, TrainConfig
from tests.model import tiny

#: A package that looks like NVIDIA's apex from outside; its optimizer is torch's under apex's signature.
APEX = {
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": """
import torch
class FusedLayerNorm(torch.nn.LayerNorm): pass
class FusedRMSNorm(torch.nn.RMSNorm): pass
""",
    "apex/optimizers/__init__.py": """
import torch
class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, adam_w_mode, **arguments):
        assert adam_w_mode
        super().__init__(params, **arguments)
""",
}
EXTENSIONS = {"amp_C.py": "", "fused_layer_norm_cuda.py": "", "fused_weight_gradient_mlp_cuda.py": ""}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts files on the path for the length of a test."""

    def put(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield put
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def choice(monkeypatch=None, **asked):
    from megatron_vlm.model import kernels

    if monkeypatch:
        monkeypatch.setattr(kernels.cpu, "enabled", lambda: False)
    return kernels.choose(Config(kernels=KernelsConfig(**asked)))


def test_a_cpu_takes_what_runs_on_it_and_says_so(one_rank):
    found = choice()
    assert (found.spec, found.norm, found.optimizer, found.gradients) == ("local", "torch", "torch", "separate")
    assert found.reasons == (
        "kernels.spec: local (Transformer Engine computes on CUDA only)",
        "kernels.norm: torch (apex computes on CUDA only)",
        "kernels.optimizer: torch (Transformer Engine and apex compute on CUDA only)",
        "kernels.gradients: separate (it is a CUDA kernel)",
    )


def test_without_packages_a_gpu_takes_torch_and_says_what_is_not_installed(monkeypatch):
    found = choice(monkeypatch)
    assert (found.spec, found.norm, found.optimizer, found.gradients) == ("local", "torch", "torch", "separate")
    assert found.reasons[2] == "kernels.optimizer: torch (Transformer Engine is not installed; apex is not installed)"


def test_apex_is_taken_where_it_is_whole(install, monkeypatch):
    install(APEX | EXTENSIONS)
    found = choice(monkeypatch)
    assert (found.spec, found.norm, found.optimizer, found.gradients) == ("local", "apex", "apex", "fused")
    assert found.reasons[1] == "kernels.norm: apex (apex is installed)"
    assert choice(monkeypatch, norm="torch", gradients="separate").gradients == "separate"


PYPI = {"apex/__init__.py": "", "apex/lib/__init__.py": ""}


@pytest.mark.parametrize(
    ("files", "asked", "message"),
    [
        ({}, {"spec": "transformer_engine"}, r"kernels\.spec=transformer_engine, but Transformer Engine is not "
         r"installed\. Install it \(`pip install .*transformer-engine\[pytorch\]'`.*; or set kernels\.spec=auto"),
        ({}, {"norm": "transformer_engine"}, r"kernels\.norm=transformer_engine, but Transformer Engine is not inst"),
        ({}, {"optimizer": "apex"}, r"kernels\.optimizer=apex, but apex is not installed\. NVIDIA's apex is installed"),
        (PYPI, {"norm": "apex"}, r"the package apex in .*/apex is not NVIDIA's \(PyPI's apex is a web toolkit; `pip"),
        (APEX, {"optimizer": "apex"}, r"apex was installed without its CUDA extensions \(amp_C, fused_layer_norm_cuda"),
        ({}, {"gradients": "fused"}, r"kernels\.gradients=fused, but apex's extension is not there \(fused_weight_gr"),
    ],
)  # fmt: skip
def test_what_is_named_and_missing_is_an_error_that_says_what_to_install(install, monkeypatch, files, asked, message):
    install(files)
    with pytest.raises(ValueError, match=message):
        choice(monkeypatch, **asked)


def test_the_unrelated_package_is_passed_over_and_reported(install, monkeypatch):
    install(PYPI)
    found = choice(monkeypatch)
    assert found.optimizer == "torch" and "is not NVIDIA's" in found.reasons[2]


def test_named_norms_and_optimizer_are_those_of_the_package(one_rank, install):
    from megatron.core.optimizer import distrib_optimizer

    from megatron_vlm.model import kernels
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import optim

    install(APEX | EXTENSIONS)
    config = dataclasses.replace(tiny.config(tiny.ARCH), kernels=KernelsConfig(norm="apex", optimizer="apex"))
    (model,) = build(config, Layout(1))
    layer = model.language.decoder.layers[0]
    assert type(layer.input_layernorm).__module__ == type(model.vision.blocks[0].layers[0].input_layernorm).__module__
    assert type(layer.input_layernorm).__name__ == "FusedRMSNorm" and layer.input_layernorm.eps == 1e-6
    assert type(model.vision.blocks[0].layers[0].input_layernorm).__name__ == "FusedLayerNorm"
    expected = {key: tuple(shape) for key, shape in shapes(build(tiny.config(tiny.ARCH), Layout(1))[0]).items()}
    assert shapes(model) == expected
    optimizer = optim.build(optim.wrap([model], config), config)
    assert type(optimizer.chained_optimizers[0].optimizer).__module__ == "apex.optimizers"
    assert kernels.choose(tiny.config(tiny.ARCH)).optimizer == "torch"  # on a CPU, unless it is named
    # Megatron's distributed optimizer refuses one that it would not have taken itself.
    own = distrib_optimizer.Adam
    with optim._adam("apex"):
        assert distrib_optimizer.Adam.__module__ == "apex.optimizers"
    assert distrib_optimizer.Adam is own and own.__module__ != "apex.optimizers"


def shapes(model):
    from megatron_vlm.model import state

    return {shard.key: tuple(shard.global_shape) for shard in state.shards([model])}


def test_fused_gradients_are_switched_on_where_they_exist(one_rank, install):
    from megatron_vlm.model import linear
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel.layout import Layout

    (model,) = build(tiny.config(tiny.ARCH), Layout(1))
    fc1 = model.language.decoder.layers[0].mlp.linear_fc1
    linear.fuse_gradients(model)
    assert not fc1.gradient_accumulation_fusion
    install(EXTENSIONS)
    linear.fuse_gradients(model)
    assert fc1.gradient_accumulation_fusion and not linear._alone(fc1)
    assert torch.is_tensor(model.language.head.weight) and model.language.head.gradient_accumulation_fusion


def test_fp8_is_never_ignored(monkeypatch):
    """Megatron trains in bf16 without a word where Transformer Engine is missing."""
    from megatron_vlm.model import kernels

    config = Config(train=TrainConfig(precision="fp8"))
    with pytest.raises(
        ValueError, match=r"fp8 needs Transformer Engine, but Transformer Engine is not installed\. .*bf16"
    ):
        kernels.choose(config)
    with pytest.raises(ValueError, match=r"fp8 needs kernels\.spec=transformer_engine"):
        kernels.choose(dataclasses.replace(config, kernels=KernelsConfig(spec="local")))


@pytest.mark.parametrize(
    ("capability", "recipe", "words"),
    [
        ((8, 0), "tensorwise", r"needs a GPU of compute capability 8\.9 or higher; this one has 8\.0\. .* no FP8"),
        ((8, 9), "blockwise", r"9\.0 or higher; this one has 8\.9\. It can do: tensorwise, delayed\."),
        ((9, 0), "mxfp8", r"10\.0 to 10\.x; this one has 9\.0\. It can do: tensorwise, delayed, blockwise\."),
        ((12, 0), "mxfp8", r"10\.0 to 10\.x; this one has 12\.0\."),
    ],
)
def test_a_gpu_that_cannot_do_the_recipe_is_refused(monkeypatch, capability, recipe, words):
    from megatron_vlm.model import kernels

    monkeypatch.setattr(kernels, "missing", lambda package: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with pytest.raises(ValueError, match=words):
        kernels.choose(Config(train=TrainConfig(precision="fp8"), fp8=Fp8Config(recipe=recipe)))
