"""Which part of the program may import which: read from the source, so imports inside functions count too."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: From the top down. A part sees the parts below its own line; parts on one line do not see each other.
ORDER = (
    ("tools",),
    ("train",),
    ("evaluate", "convert"),
    ("checkpoint",),
    ("model",),
    ("data",),
    ("plan",),
    ("parallel",),
    ("batch", "cost"),
    ("config",),
)
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}
#: Modules that start in under a second: nothing that they import may import torch.
WITHOUT_TORCH = ["config", "parallel/layout.py", "parallel/split.py", "cost.py", "plan"]
FILES = sorted([*(ROOT / "megatron_vlm").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


def part_of(path: Path) -> str:
    """tools, or the name after megatron_vlm; '' for megatron_vlm/__init__.py."""
    first, *rest = path.relative_to(ROOT).with_suffix("").parts
    return "tools" if first == "tools" else rest[0].replace("__init__", "")


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it; `from a import b` gives a.b as well as a."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno} imports relatively; write the whole name."
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def parts_imported(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("megatron_vlm.")} & set(LEVEL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path):
    part, names = part_of(path), imports(path)
    if part == "":
        assert not names, "megatron_vlm/__init__.py holds the version and imports nothing"
        return
    assert part in LEVEL, f"{part} has no place in ORDER"
    up = {other for other in parts_imported(names) if other != part and LEVEL[other] <= LEVEL[part]}
    assert not up, f"{name_of(path)} is part of {part} and must not import {', '.join(sorted(up))}"


def test_the_check_sees_wrong_imports():
    """data may not import train, nor evaluate convert."""
    names = {"megatron_vlm.train.loop", "megatron_vlm.data.tokens", "megatron_vlm.convert"}
    assert parts_imported(names) == {"train", "data", "convert"}
    assert LEVEL["train"] < LEVEL["data"] and LEVEL["evaluate"] == LEVEL["convert"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_megatron_training_is_never_imported(path):
    assert not {name for name in imports(path) if name.startswith("megatron.training")}


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "data"], ids=name_of)
def test_data_never_asks_for_a_process_group(path):
    assert not {name for name in imports(path) if name.startswith(("torch.distributed", "megatron."))}


def test_tools_that_need_no_model_do_not_load_megatron():
    """What reads files of a run alone: Megatron would take seconds, and warn of what a CPU has not."""
    code = (
        "import runpy, sys\n"
        "for name in ('ckpt', 'replay', 'report', 'compare_losses', 'convert_hf'):\n"
        "    runpy.run_path(f'tools/{name}.py')\n"
        "    assert 'megatron.core' not in sys.modules, f'{name} imports Megatron'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_what_must_start_fast_does_not_load_torch():
    """In a fresh process, since this one has torch already."""
    paths = [ROOT / "megatron_vlm" / name for name in WITHOUT_TORCH]
    files = [
        file for path in paths if path.exists() for file in ([path] if path.is_file() else sorted(path.glob("*.py")))
    ]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert "megatron_vlm.config.rules" in modules and "megatron_vlm.parallel.layout" in modules
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
