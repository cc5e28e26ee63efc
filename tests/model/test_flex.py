"""FlexAttention's block mask is the mask rule, and attention through it is dense attention under the rule."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention import flex_attention as torch_flex

from megatron_vlm.batch import PAD
from megatron_vlm.model import flex
from megatron_vlm.model.mask import Mark
from tests.model.test_attention import ROWS, Largest, dense_attention, random_qkv, renumbered
from tests.model.test_mask import dense, from_rule, row_of
from tests.model.test_mask import rows as packed_rows
from tests.test_imports import ROOT


def seen(mask, queries: int, keys: int) -> torch.Tensor:
    """What a BlockMask lets through, read as its kernel reads it: (b, q, s) bool."""
    block = flex.BLOCK
    sees = torch.zeros(mask.kv_num_blocks.shape[0], queries + block, keys + block, dtype=torch.bool)
    for b in range(len(sees)):
        for line in range(mask.kv_num_blocks.shape[2]):
            q = torch.arange(line * block, (line + 1) * block)
            for number in mask.kv_indices[b, 0, line, : mask.kv_num_blocks[b, 0, line]].tolist():
                k = torch.arange(number * block, (number + 1) * block)
                asked = mask.mask_mod(
                    torch.tensor(b), torch.tensor(0), q.clamp(max=queries - 1)[:, None], k.clamp(max=keys - 1)[None]
                )
                sees[b, q[:, None], k[None]] = asked
            for number in mask.full_kv_indices[b, 0, line, : mask.full_kv_num_blocks[b, 0, line]].tolist():
                sees[b, q[:, None], torch.arange(number * block, (number + 1) * block)[None]] = True
    return sees[:, :queries, :keys]


@settings(max_examples=40)
@given(packed_rows())
def test_block_mask_is_the_rule(row):
    """For the whole row, and for the queries of each of three ranks."""
    saved = flex.BLOCK, flex.QUERIES
    flex.BLOCK, flex.QUERIES = 4, 8
    try:
        expected, s = dense(row), row.shape[1]
        cuts = (0, s // 3, s // 2, s)
        for first, last in [(0, s), *zip(cuts, cuts[1:], strict=False)]:
            if first < last:
                found = seen(flex.block_mask(row[:, None], first, last), last - first, s)
                assert torch.equal(found[0], expected[first:last])
    finally:
        flex.BLOCK, flex.QUERIES = saved


@pytest.mark.slow
def test_blocks_are_those_that_torch_finds_pair_by_pair():
    marks = torch.stack([renumbered(tokens) for tokens in ROWS], 1)
    s = marks.shape[2]
    sees = torch.stack([from_rule(marks[:, row]) for row in range(2)])
    expected = torch_flex.create_block_mask(lambda b, h, q, k: sees[b, q, k], 2, None, s, s, device="cpu")
    found = flex.block_mask(marks, 0, s)
    assert found.sparsity() == expected.sparsity() > 20
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for count, index in (("kv_num_blocks", "kv_indices"), ("full_q_num_blocks", "full_q_indices")):
        used = torch.arange(getattr(found, index).shape[-1]) < getattr(found, count)[..., None]
        assert torch.equal(getattr(found, index)[used], getattr(expected, index)[used])


@pytest.fixture
def backward_on_cpu(monkeypatch):
    """torch has FlexAttention's backward in plain operators and refuses it on a CPU, where it has no fused one."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)


def test_attention_and_gradients_are_those_of_the_rule(backward_on_cpu):
    """Two rows, grouped queries, padding; and with the queries of two ranks."""
    marks = torch.stack([renumbered(tokens) for tokens in ROWS], 1)
    s = marks.shape[2]
    query, key, value = inputs = random_qkv(s, 2, torch.float32)
    expected = dense_attention(query, key, value, [marks[:, row] for row in range(2)])
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = (expected, *torch.autograd.grad(expected, inputs, upstream))
    for cuts in ((0, s), (0, 200, s)):
        parts = [
            flex.FlexRows(marks, first, last).attend(query[first:last], key, value)
            for first, last in zip(cuts, cuts[1:], strict=False)
        ]
        out = torch.cat(parts)
        found = (out, *torch.autograd.grad(out, inputs, upstream))
        worst = [(a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)]
        print("out, query, key, value:", *(f"{each:.1e}" for each in worst))
        assert max(worst) < 1e-5  # one pair too many or too few: 1e-2
        assert not out[(marks[Mark.EXAMPLE] == PAD).t()].any()


def test_a_wrong_rule_would_be_noticed(backward_on_cpu, monkeypatch):
    marks = renumbered(ROWS[0])[:, None]
    query, key, value = (x.detach() for x in random_qkv(marks.shape[2], 1, torch.float32))
    expected = dense_attention(query, key, value, [marks[:, 0]])
    monkeypatch.setattr(flex, "visible", lambda query, key: (key.index <= query.index) & (query.example == key.example))
    out = flex.FlexRows(marks, 0, marks.shape[2]).attend(query, key, value)
    assert (out - expected).abs().max() > 0.01


@pytest.mark.slow
def test_compiled():
    """The kernel that torch generates for a CPU; it has a forward only."""
    words = [sys.executable, "-m", "tests.model.compiled_flex"]
    # Another test of this process may have set it: parallel.cpu switches the compiler off.
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("1 graph(s) compiled") == 2, done.stdout


@pytest.mark.slow
def test_building_it_makes_no_tensor_of_row_by_row_entries():
    s = 16_384
    row = row_of([(i // 4000, 0, i % 4000 < 3000) for i in range(s)])
    with Largest() as largest:
        flex.block_mask(row[:, None], 0, s)
    print(f"largest tensor: {largest.numbers:,} numbers; S x S would be {s * s:,}")
    assert largest.numbers <= flex.QUERIES * s
