"""Whose code computes what: settings, the device and what is installed -> one choice each, with its reason."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.config.schema import Config
from megatron_vlm.parallel import cpu

_INSTALL = {
    "transformer_engine": "Install it (`pip install --no-build-isolation 'transformer-engine[pytorch]'`, on a machine "
    "with CUDA), or use NVIDIA's PyTorch container, which has it",
    "apex": "NVIDIA's apex is installed from its source (https://github.com/NVIDIA/apex, with its CUDA extensions); "
    "NVIDIA's PyTorch container has it",
}


#: Least compute capability, and the largest major version that has the recipe's instructions.
CAPABILITY = {"tensorwise": ((8, 9), 99), "delayed": ((8, 9), 99), "blockwise": ((9, 0), 99), "mxfp8": ((10, 0), 10)}


@dataclass(frozen=True)
class Kernels:
    """What was chosen."""

    spec: str = "local"
    norm: str = "torch"
    optimizer: str = "torch"
    gradients: str = "separate"
    reasons: tuple[str, ...] = ()
    """One line for each of them, `kernels.spec: local (why)`."""


@dataclass
class PartConfig(TransformerConfig):
    """Megatron's configuration of a part of the model, which says to each of its modules whose code to use."""

    kernels: Kernels = field(default_factory=Kernels)


def choose(config: Config) -> Kernels:
    """The choices for this process; the same on every rank of machines that are alike.

    Raises ValueError, saying what to install, where a setting names what is not there.
    """
    asked, fast = config.kernels, not cpu.enabled()
    if config.train.precision == "fp8":
        # Megatron ignores FP8 without a word where Transformer Engine is missing.
        if asked.spec == "local":
            raise ValueError(
                "train.precision=fp8 needs kernels.spec=transformer_engine (or auto): the layers of the spec local "
                "have no FP8."
            )
        fault = missing("transformer_engine")
        if fault:
            raise ValueError(
                f"train.precision=fp8 needs Transformer Engine, but {fault}. {_INSTALL['transformer_engine']}; or set "
                "train.precision=bf16."
            )
        spec, why_spec = "transformer_engine", "train.precision=fp8"
        _check_fp8(config.fp8.recipe)
    else:
        spec, why_spec = _pick("spec", asked.spec, ("transformer_engine", "local"), fast)
    order = ("transformer_engine", "apex", "torch") if spec == "transformer_engine" else ("apex", "torch")
    norm, why_norm = _pick("norm", asked.norm, order, fast)
    optimizer, why_optimizer = _pick("optimizer", asked.optimizer, ("transformer_engine", "apex", "torch"), fast)
    gradients, why_gradients = _gradients(asked.gradients, spec, fast)
    chosen = {"spec": spec, "norm": norm, "optimizer": optimizer, "gradients": gradients}
    reasons = (why_spec, why_norm, why_optimizer, why_gradients)
    lines = tuple(f"kernels.{name}: {each} ({why})" for (name, each), why in zip(chosen.items(), reasons, strict=True))
    return Kernels(**chosen, reasons=lines)


def _pick(name: str, asked: str, order: tuple[str, ...], fast: bool) -> tuple[str, str]:
    """What `kernels.<name>=asked` gives, and why. order: what auto tries, the last of which always works."""
    if asked != "auto":
        fault = missing(asked)
        if fault:
            raise ValueError(
                f"kernels.{name}={asked}, but {fault}. {_INSTALL[asked]}; or set kernels.{name}=auto, which takes what "
                "is there."
            )
        return asked, "set"
    *better, last = order
    if not fast:
        names = [_NAMES[each] for each in better]
        return last, f"{' and '.join(names)} compute{'s' * (len(names) == 1)} on CUDA only"
    faults = [missing(each) for each in better]
    for each, fault in zip(better, faults, strict=True):
        if not fault:
            return each, f"{_version(each)} is installed"
    return last, "; ".join(faults)


def _check_fp8(recipe: str) -> None:
    """Raises ValueError where the GPU has no instructions for the recipe."""
    least, newest = CAPABILITY[recipe]
    found = torch.cuda.get_device_capability()
    if found < least or found[0] > newest:
        fits = [name for name, (low, high) in CAPABILITY.items() if low <= found and found[0] <= high]
        raise ValueError(
            f"fp8.recipe={recipe} needs a GPU of compute capability {least[0]}.{least[1]}"
            f"{' to ' + str(newest) + '.x' if newest < 99 else ' or higher'}; this one has {found[0]}.{found[1]}. "
            f"It can do: {', '.join(fits) or 'no FP8; set train.precision=bf16'}."
        )


_NAMES = {"transformer_engine": "Transformer Engine", "apex": "apex"}


def _gradients(asked: str, spec: str, fast: bool) -> tuple[str, str]:
    """The same for weight gradients."""
    if asked == "separate":
        return asked, "set"
    if spec == "transformer_engine" and fast:
        return "fused", "Transformer Engine's layers do it" if asked == "auto" else "set"
    fault = "" if fast and _found("fused_weight_gradient_mlp_cuda") else "apex's extension is not there"
    if not fast:
        fault = "it is a CUDA kernel"
    if not fault:
        return "fused", "apex's extension is installed" if asked == "auto" else "set"
    if asked == "fused":
        raise ValueError(
            f"kernels.gradients=fused, but {fault} (fused_weight_gradient_mlp_cuda). {_INSTALL['apex']}; or set "
            "kernels.gradients=auto."
        )
    return "separate", fault


def missing(package: str) -> str:
    """What keeps `package` (a name of the settings) from being used here; empty = nothing."""
    if package == "transformer_engine":
        return _transformer_engine()
    return _apex() if package == "apex" else ""


def _transformer_engine() -> str:
    if not _found("transformer_engine"):
        return "Transformer Engine is not installed"
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:
        return "Transformer Engine is installed but `import transformer_engine.pytorch` fails"
    return "" if torch.cuda.is_available() else "Transformer Engine computes on CUDA only, and torch finds no device"


def _apex() -> str:
    """PyPI's package of this name is something else, and so is one without the CUDA extensions."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "apex is not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "normalization").is_dir() and (folder / "optimizers").is_dir() for folder in folders):
        where = folders[0] if folders else spec.origin
        return f"the package apex in {where} is not NVIDIA's (PyPI's apex is a web toolkit; `pip uninstall apex`)"
    if not (_found("amp_C") and _found("fused_layer_norm_cuda")):
        return "apex was installed without its CUDA extensions (amp_C, fused_layer_norm_cuda)"
    return ""


def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str:
    distribution = {"transformer_engine": "transformer-engine"}.get(package, package)
    try:
        return f"{_NAMES[package]} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return _NAMES[package]
