"""What flash-attn is asked for: with a plain implementation of its function in its place, the result is the rule's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from megatron_vlm.batch import PAD, PREFIX_BRANCH
from megatron_vlm.model import attention_kernels, flash
from megatron_vlm.model.mask import Mark
from tests.model import flash_attn
from tests.model.test_attention import dense_attention, random_qkv
from tests.model.test_mask import dense, row_of
from tests.model.test_mask import rows as packed_rows

TEXT = (
    [(0, PREFIX_BRANCH, False)] * 9
    + [(0, 0, False)] * 30
    + [(1, 0, False)] * 40
    + [(2, PREFIX_BRANCH, False)] * 21
    + [(PAD, PAD, False)] * 12
)
#: The second row is full, and of one example.
MARKS = torch.stack([row_of(TEXT), row_of([(0, 0, False)] * len(TEXT))], 1)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(attention_kernels, "flash_function", lambda: flash_attn.flash_attn_varlen_func)


@pytest.mark.parametrize("cuts", [(0, 112), (0, 30, 60, 90, 112), (0, 102, 107, 112)])
def test_rows_of_text(cuts):
    """Whole, and with the queries of several ranks: examples cut in the middle, a rank of padding alone."""
    query, key, value = inputs = random_qkv(len(TEXT), 2, torch.bfloat16)
    out = torch.cat(
        [
            flash.FlashRows(MARKS, first, last).attend(query[first:last], key, value)
            for first, last in zip(cuts, cuts[1:], strict=False)
        ]
    )
    expected = dense_attention(query, key, value, [MARKS[:, 0], MARKS[:, 1]])
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    found = (out, *torch.autograd.grad(out, inputs, upstream.bfloat16()))
    wanted = (expected, *torch.autograd.grad(expected, inputs, upstream))
    worst = [(a.float() - b.float()).abs().max().item() for a, b in zip(found, wanted, strict=True)]
    print("out, query, key, value:", *(f"{each:.1e}" for each in worst))
    assert max(worst) < 0.05  # rounding to bf16; a key too many or too few: more than 0.1
    padding = (MARKS[Mark.EXAMPLE] == PAD).t()
    assert not out[padding].any() and all(not gradient[padding].any() for gradient in found[1:])


def test_lengths_of_a_ranks_runs():
    runs = flash.FlashRows(MARKS[:, :1], 30, 90).runs
    # Queries 30 to 90: nine of example 0, all of example 1, eleven of example 2; each against its example from its
    # start up to the last of them.
    assert runs.cu_queries.tolist() == [0, 9, 49, 60] and runs.cu_keys.tolist() == [0, 39, 79, 90]
    assert (runs.most_queries, runs.most_keys) == (40, 40)


@settings(max_examples=80)
@given(packed_rows())
def test_plain_rows_are_those_that_are_causal_in_their_examples(row):
    example = row[Mark.EXAMPLE]
    causal = (example[:, None] == example) & (example != PAD) & torch.ones(len(example), len(example)).tril().bool()
    same = torch.equal(dense(row), causal)
    assert flash.plain(row[:, None]) == (same and not row[Mark.VISION].any())


def test_crops():
    from megatron_vlm.model.full_attention import CropAttention

    crops, tokens, heads, size = 3, 10, 2, 72
    generator = torch.Generator().manual_seed(0)
    # As Megatron cuts them out of one tensor: not contiguous.
    query, key, value = torch.randn(crops * tokens, 1, heads, 3 * size, generator=generator).bfloat16().split(size, -1)
    found = CropAttention(None, tokens, kernel="flash")(query, key, value, None)
    expected = CropAttention(None, tokens)(query, key, value, None)
    assert found.shape == expected.shape == (crops * tokens, 1, heads * size)
    assert (found.float() - expected.float()).abs().max() < 0.02
