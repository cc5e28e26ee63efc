"""Which attention kernel is chosen, and what is said where the one that was asked for cannot serve."""

from __future__ import annotations

import pytest

from megatron_vlm.model import attention_kernels
from megatron_vlm.model.attention_kernels import choose

GPU = {"on_cuda": True, "half": True, "ring": False}


def found() -> object:
    return print


def missing() -> None:
    return None


@pytest.mark.parametrize(
    "asked, facts, flash, images, plain, crops",
    [
        ("auto", GPU, found, "flex", "flash", "flash"),
        ("auto", GPU, missing, "flex", "flex", "torch"),
        ("auto", GPU | {"half": False}, found, "flex", "flex", "torch"),
        ("auto", GPU | {"ring": True}, found, "blocks", "blocks", "torch"),
        ("auto", {"on_cuda": False, "half": True, "ring": False}, found, "blocks", "blocks", "torch"),
        ("flash", GPU, found, "flex", "flash", "flash"),
        ("flex", GPU, found, "flex", "flex", "torch"),
        ("blocks", GPU, found, "blocks", "blocks", "torch"),
    ],
)
def test_choice(asked, facts, flash, images, plain, crops):
    chosen = choose(asked, **facts, find_flash=flash)
    assert (chosen.images, chosen.plain, chosen.crops) == (images, plain, crops)
    assert len(chosen.why) == 4 and all("()" not in line for line in chosen.why), chosen.why


def test_reasons():
    lines = "\n".join(choose("auto", **GPU, find_flash=missing).why)
    assert "images or branches: flex (it takes the whole mask rule)" in lines
    assert "vision tower: torch (flash-attn is not installed)" in lines
    lines = "\n".join(choose("auto", **GPU | {"half": False}, find_flash=found).why)
    assert "text alone: flex (flash-attn takes bf16 only)" in lines


@pytest.mark.parametrize(
    "asked, facts, flash, words",
    [
        ("flash", GPU, missing, "pip install --no-build-isolation flash-attn"),
        ("flash", GPU | {"half": False}, found, "takes bf16 only, but train.precision=float32"),
        ("flash", GPU | {"on_cuda": False}, found, "flash-attn runs on CUDA only"),
        ("flex", GPU | {"on_cuda": False}, found, "FlexAttention has no backward there"),
        ("flex", GPU | {"ring": True}, found, "parallel.context_method=ring, which has a kernel of its own"),
    ],
)
def test_refusals(asked, facts, flash, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        choose(asked, **facts, find_flash=flash)


def test_flash_attn_is_looked_for_where_it_stands(tmp_path, monkeypatch):
    assert attention_kernels.flash_function() is None
    (tmp_path / "flash_attn.py").write_text("def flash_attn_varlen_func():\n    return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = attention_kernels.flash_function()
    assert function is not None and function() == 2
