"""python docker/check.py gpu|cpu: what an image must import, with versions; names what is missing and exits with 1."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

#: Module to import -> the distribution that has its version.
CPU = {"torch": "torch", "megatron.core": "megatron-core", "webdataset": "webdataset", "yaml": "PyYAML", "av": "av"}
GPU = CPU | {
    "transformer_engine.pytorch": "transformer_engine",
    "flash_attn": "flash_attn",
    # PyPI's "apex" has no optimizers: this is NVIDIA's. Its extensions are what the trainer uses of it.
    "apex.optimizers": "apex",
    "amp_C": "apex",
    "fused_layer_norm_cuda": "apex",
    "fused_weight_gradient_mlp_cuda": "apex",
}
#: The oldest that Megatron-core 0.16 is known to work with.
AT_LEAST = {"transformer_engine": (2, 9)}


def faults(modules: dict[str, str]) -> list[str]:
    """A line for each that does not import or is too old; the versions found are printed."""
    found = []
    for module, distribution in modules.items():
        try:
            importlib.import_module(module)
            version = importlib.metadata.version(distribution)
        except Exception as error:  # whatever a broken extension raises belongs in the table
            found.append(f"{module}: {type(error).__name__}: {error}")
            continue
        print(f"{distribution:20} {version}")
        least = AT_LEAST.get(distribution, ())
        if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < least:
            found.append(f"{distribution} {version}: needed {'.'.join(map(str, least))} or newer")
    return found


if __name__ == "__main__":
    if sys.argv[1:] not in (["gpu"], ["cpu"]):
        sys.exit("usage: python docker/check.py gpu|cpu")
    wrong = faults(GPU if sys.argv[1] == "gpu" else CPU)
    sys.exit("\n".join(["This image lacks:", *wrong]) if wrong else 0)
