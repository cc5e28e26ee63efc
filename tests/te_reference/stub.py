"""Transformer Engine's own Python layers on a CPU: a stand-in for its compiled extension, kernels written in torch.

Real: everything in the package transformer_engine (layers, tensor-parallel communication, FP8 recipes and quantizers of
its pure-torch reference). Not real: the kernels (products, norms, sums), which are the plain formulas below, and the
device. An extension function that is not written here raises when it is called. Call `install` before anything imports
Megatron or Transformer Engine, in a process that does nothing else.
"""

from __future__ import annotations

import enum
import os
import sys
import types
import warnings
from typing import Any

import torch

VERSION = "2.12.0"
#: What it imports beside torch and numpy; `pip install --no-deps --target`.
PACKAGES = (f"transformer-engine=={VERSION}", "einops==0.8.2", "onnx==1.23.2", "onnxscript==0.7.2", "onnx_ir==1.1.0",
            "ml_dtypes==0.6.0")  # fmt: skip


class DType(enum.IntEnum):
    """Numbers of the extension's types."""

    kByte = 0
    kInt16 = 1
    kInt32 = 2
    kInt64 = 3
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat8E8M0 = 9
    kFloat4E2M1 = 10


#: Places of a layer's quantizers: three for each product forward, two backward.
FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors",
    [f"GEMM{product}_{what}" for product in (1, 2, 3) for what in ("INPUT", "WEIGHT", "OUTPUT")],
    start=0,
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"{what}{product}" for product in (1, 2, 3) for what in ("GRAD_OUTPUT", "GRAD_INPUT")], start=0
)

TORCH = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


class _AnyEnum(type):
    """An enumeration of whatever members are asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = f"{cls.__name__}.{name}"
        setattr(cls, name, value)
        return value


class _Extension(types.ModuleType):
    """The module transformer_engine_torch."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper() or name.startswith("NVTE_"):
            found: Any = _AnyEnum(name, (), {})
        else:

            def found(*args: Any, **kwargs: Any) -> Any:
                raise NotImplementedError(f"the extension's {name} has no reference kernel")

        setattr(self, name, found)
        return found


def layernorm_fwd(x, weight, bias, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """Normalised rows, their means and 1 / standard deviations."""
    rows = x.float()
    mean = rows.mean(-1)
    scale = (rows.var(-1, unbiased=False) + eps).rsqrt()
    gamma = weight.float() + zero_centered
    normed = (rows - mean[:, None]) * scale[:, None] * gamma + (0 if bias is None else bias.float())
    return _quantized(normed.to(TORCH[dtype]), quantizer), mean, scale


def layernorm_bwd(gradient, x, mean, scale, weight, sm_margin, zero_centered):
    """Gradients of the input, weight and bias."""
    normed = (x.float() - mean[:, None]) * scale[:, None]
    gradient32 = gradient.float()
    along = gradient32 * (weight.float() + zero_centered)
    rest = along.mean(-1, keepdim=True) + normed * (along * normed).mean(-1, keepdim=True)
    grad = (along - rest) * scale[:, None]
    return grad.to(x.dtype), (gradient32 * normed).sum(0).to(weight.dtype), gradient32.sum(0).to(weight.dtype)


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """Normalised rows, None, and 1 / root mean squares."""
    rows = x.float()
    scale = (rows.square().mean(-1) + eps).rsqrt()
    normed = rows * scale[:, None] * (weight.float() + zero_centered)
    return _quantized(normed.to(TORCH[dtype]), quantizer), None, scale


def rmsnorm_bwd(gradient, x, scale, weight, sm_margin, zero_centered):
    """Gradients of the input and the weight."""
    normed = x.float() * scale[:, None]
    gradient32 = gradient.float()
    along = gradient32 * (weight.float() + zero_centered)
    grad = (along - normed * (along * normed).mean(-1, keepdim=True)) * scale[:, None]
    return grad.to(x.dtype), (gradient32 * normed).sum(0).to(weight.dtype)


def _quantized(x: torch.Tensor, quantizer: Any) -> Any:
    return x if quantizer is None else quantizer(x)


def quantize(x, quantizer, out=None, noop=None):
    """x in 8 bits by delayed scaling: times a scale that is known before, its largest value noted for the next one."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, Float8Tensor, Float8TensorStorage

    assert type(quantizer) is Float8Quantizer, "no reference kernel for other recipes"
    quantizer.amax.copy_(torch.maximum(quantizer.amax, x.abs().max().float()))
    kind = TORCH[quantizer.dtype]
    limit = torch.finfo(kind).max
    data = (x.float() * quantizer.scale).clamp(-limit, limit).to(kind).view(torch.uint8)
    turned = fp8_transpose(data, quantizer.dtype) if quantizer.columnwise_usage else None
    if out is not None:
        out._data, out._transpose, out._transpose_invalid = data, turned, turned is None
        out._scale_inv = 1 / quantizer.scale
        return out
    options = {
        "data": data if quantizer.rowwise_usage else None,
        "fp8_scale_inv": 1 / quantizer.scale,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": turned,
        "quantizer": quantizer,
    }
    if quantizer.internal:
        return Float8TensorStorage(**options)
    return Float8Tensor(shape=x.shape, dtype=x.dtype, **options)


def fp8_transpose(data, dtype, out=None):
    """[..., columns] -> [columns, ...]"""
    return data.reshape(-1, data.shape[-1]).t().contiguous().view(data.shape[-1], *data.shape[:-1])


def dequantize(x, dtype):
    """Back from 8 bits."""
    return _value(x).to(TORCH[dtype])


def _value(x: Any) -> torch.Tensor:
    """What an operand of a product stands for: 8 bits, or just their transpose, in float32."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8TensorStorage

    if not isinstance(x, Float8TensorStorage):
        return x
    data = x._data if x._data is not None else x._transpose.reshape(x._transpose.shape[0], -1).t()
    return data.view(TORCH[x._fp8_dtype]).float() * x._scale_inv


def generic_gemm(a, transpose_a, b, transpose_b, out, quantizer, dtype, bias, bias_type, gelu, gelu_in, grad, workspace,
                 workspace_size, accumulate, use_split_accumulator, **options):  # fmt: skip
    """op(b) @ op(a) of row-major matrices: "TN" is b @ a^T, a linear layer. With `grad` also sums for a bias."""
    assert not gelu and not options.get("bulk_overlap"), "reference products do nothing else"
    a, b = _value(a), _value(b)
    rows = b.reshape(-1, b.shape[-1])
    columns = a.reshape(-1, a.shape[-1])
    result = (rows.t() if transpose_b else rows) @ (columns.t() if transpose_a else columns)
    bias_gradient = None
    if bias is not None:
        if grad:
            bias_gradient = b.reshape(-1, b.shape[-1]).sum(0).to(bias.dtype)
        else:
            result = result + bias
    if not transpose_b:
        result = result.view(*b.shape[:-1], -1)
    result = result.to(TORCH[dtype])
    if out is not None:
        out.add_(result) if accumulate else out.copy_(result)
        result = out
    return _quantized(result, quantizer), bias_gradient, None, None


def bgrad_quantize(gradient, quantizer):
    """Sums over rows, and the quantized gradient."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantizer(gradient)


def multi_tensor_l2norm(chunk, overflow, lists, per_tensor):
    """Norm of all tensors together."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm()[None], norms


def multi_tensor_scale(chunk, overflow, lists, scale):
    """Each tensor of the first list times `scale`, into the second."""
    for tensor, out in zip(*lists, strict=True):
        out.copy_(tensor * scale)


KERNELS = (layernorm_fwd, layernorm_bwd, rmsnorm_fwd, rmsnorm_bwd, generic_gemm, bgrad_quantize, multi_tensor_l2norm,
           multi_tensor_scale, quantize, dequantize, fp8_transpose)  # fmt: skip


def install(folder: str) -> None:
    """Make `import transformer_engine.pytorch` work in this process; `folder`: where PACKAGES were installed."""
    sys.path.insert(0, folder)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the package looks for no CUDA libraries then
    os.environ["NVTE_TORCH_COMPILE"] = "0"
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # delayed scaling's update in Python and not by a kernel
    for name in ("pytorch", "common"):
        _fake_triton(f"transformer_engine.{name}.triton")
    extension = _Extension("transformer_engine_torch")
    for enumeration in (DType, FP8FwdTensors, FP8BwdTensors):
        setattr(extension, enumeration.__name__, enumeration)
    for kernel in KERNELS:
        setattr(extension, kernel.__name__, kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_engine.common as common

        common.load_framework_extension = lambda framework: sys.modules.__setitem__(
            f"transformer_engine_{framework}", extension
        )
        import transformer_engine.pytorch  # noqa: F401
    _pretend()


def _pretend() -> None:
    """The layers ask whether their input and this machine are of CUDA: they are told so, and for that moment only.

    torch.distributed and checkpoints believe what a tensor says of itself.
    """
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    tensor: Any = torch.Tensor
    prepare = TransformerEngineBaseModule.prepare_forward

    def prepared(module: Any, *args: Any, **options: Any) -> Any:
        tensor.is_cuda = property(lambda self: True)
        try:
            return prepare(module, *args, **options)
        finally:
            del tensor.is_cuda

    TransformerEngineBaseModule.prepare_forward = prepared
    tensor.cuda = lambda self, *args, **options: self
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(major=9, minor=0)
    from transformer_engine.pytorch import distributed
    from transformer_engine.pytorch.quantization import DelayedScalingRecipeState as History
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    # What delayed scaling makes lies on the GPU, whatever the layer's device.
    here, begin, empty = {"device": torch.device("cpu")}, History.__init__, Float8Quantizer.make_empty
    History.__init__ = lambda self, recipe, **options: begin(self, recipe, **options | here)
    Float8Quantizer.make_empty = lambda self, shape, **options: empty(self, shape, **options | here)
    # What recomputation keeps of the random generators.
    distributed._get_cuda_rng_state = lambda *device, **options: torch.default_generator.get_state()
    distributed._set_cuda_rng_state = lambda state, *device, **options: torch.default_generator.set_state(state)


def _fake_triton(package: str) -> None:
    """The layers under test use none of TE's triton kernels, and triton is a gigabyte."""
    import importlib.abc
    import importlib.machinery

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            inside = name == package or name.startswith(package + ".")
            return importlib.machinery.ModuleSpec(name, self, is_package=True) if inside else None

        def create_module(self, spec: Any) -> types.ModuleType:
            return _Extension(spec.name)

        def exec_module(self, module: types.ModuleType) -> None:
            module.__path__ = []

    sys.meta_path.insert(0, Finder())
