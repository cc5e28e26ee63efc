"""On a GPU: every attention kernel against the mask rule written out, forward and gradients.

`tools/gpu_check.sh` runs it, in a process that has not sent Megatron to the CPU; the differences stand in its report.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_vlm.batch import PAD, PREFIX_BRANCH
from megatron_vlm.model import attention, attention_kernels, flash
from megatron_vlm.model.flex import FlexRows
from megatron_vlm.model.full_attention import CropAttention
from megatron_vlm.model.mask import Mark
from megatron_vlm.model.plan import Plan
from tests.model import test_attention
from tests.model.test_flash import TEXT
from tests.model.test_mask import from_rule, row_of

#: The CPU only where tests/tools/test_gpu_check.py tries the comparison itself.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REPORT = os.environ.get("VLM_GPU_REPORT", "")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not REPORT, reason="tools/gpu_check.sh runs it, in a process of its own"),
]
FLASH = pytest.mark.skipif(
    torch.cuda.is_available() and attention_kernels.flash_function() is None, reason=attention_kernels.INSTALL_FLASH
)
#: Largest difference of outputs and gradients near 1; bf16 has 8 bits. One pair too many or too few: 0.1 and more.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.06}
MIXED = [test_attention.renumbered(tokens) for tokens in test_attention.ROWS]
PLAIN = [row_of(TEXT), row_of([(0, 0, False)] * len(TEXT))]
#: Longer than several of the kernel's blocks, not a multiple of them.
LONG = row_of(
    [(0, PREFIX_BRANCH, False)]
    + [(0, PREFIX_BRANCH, True)] * 2000
    + [(0, branch, False) for branch in range(8) for _ in range(120)]
    + [(1 + i // 300, 0, False) for i in range(1000)]
    + [(PAD, PAD, False)] * 11
)


def dense(query, key, value, rows, first, last):
    """Scores of all pairs in float32, of the queries at [first, last)."""
    query, key, value = (x.float().permute(1, 2, 0, 3) for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    sees = torch.stack([from_rule(row)[first:last] for row in rows])[:, None]
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~sees, -1e30)
    return ((scores.softmax(-1) * sees) @ value).permute(2, 0, 1, 3)


def compare(name, out, expected, inputs, references, dtype):
    """Differences of output and gradients into the report; all within the tolerance."""
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = (out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype)))
    wanted = (expected, *torch.autograd.grad(expected, references, upstream))
    worst = {
        part: (a.float() - b.float()).abs().max().item()
        for part, a, b in zip("out query key value".split(), found, wanted, strict=False)
    }
    with Path(REPORT, "kernels.jsonl").open("a") as lines:
        lines.write(json.dumps({"case": name, "tolerance": TOLERANCE[dtype], **worst}) + "\n")
    assert max(worst.values()) < TOLERANCE[dtype], worst


def tensors(shapes, dtype):
    """The same numbers for the kernel, and in float32 for the reference."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(DEVICE).to(dtype).requires_grad_() for shape in shapes]
    return made, [x.detach().float().requires_grad_() for x in made]


KERNELS = {
    "blocks": lambda marks, first, last: attention.BlockRows(
        [Plan(marks[:, row], first, last) for row in range(marks.shape[1])]
    ),
    "flex": FlexRows,
    "flash": flash.FlashRows,
}
CASES = [
    pytest.param(kernel, rows, dtype, size, marks=FLASH if kernel == "flash" else ())
    for kernel in KERNELS
    for rows in ("mixed", "plain", "long")
    for dtype in (torch.float32, torch.bfloat16)
    for size in (16, 128)
    if kernel != "flash" or (rows == "plain" and dtype == torch.bfloat16)
]


@pytest.mark.parametrize("kernel, rows, dtype, size", CASES)
def test_decoder(kernel, rows, dtype, size):
    """Grouped queries; the whole row, then the queries of three ranks."""
    torch.backends.cuda.matmul.allow_tf32 = False
    marks = torch.stack({"mixed": MIXED, "plain": PLAIN, "long": [LONG]}[rows], 1).to(DEVICE)
    s, b = marks.shape[2], marks.shape[1]
    inputs, references = tensors([(s, b, heads, size) for heads in (8, 2, 2)], dtype)
    for cuts in ((0, s), (0, s // 3, s // 2, s)):
        spans = list(zip(cuts, cuts[1:], strict=False))
        query, key, value = inputs
        out = torch.cat([KERNELS[kernel](marks, *span).attend(query[slice(*span)], key, value) for span in spans])
        query, key, value = references
        rows_of = [marks[:, row] for row in range(b)]
        expected = torch.cat([dense(query[slice(*span)], key, value, rows_of, *span) for span in spans])
        name = f"{kernel}, {rows} rows of {s}, {str(dtype)[6:]}, heads of {size}, {len(spans)} part(s)"
        compare(name, out, expected, inputs, references, dtype)
        assert not out[(marks[Mark.EXAMPLE] == PAD).t()].any()


@pytest.mark.parametrize("kernel", ["torch", pytest.param("flash", marks=FLASH)])
def test_tower(kernel):
    """Crops of 729 patches, heads of 72."""
    crops, tokens, heads, size = 3, 729, 16, 72
    (whole,), (reference,) = tensors([(crops * tokens, 1, heads, 3 * size)], torch.bfloat16)
    out = CropAttention(None, tokens, kernel=kernel)(*whole.split(size, -1), None)
    query, key, value = (x.unflatten(0, (crops, tokens))[:, :, 0].transpose(1, 2) for x in reference.split(size, -1))
    expected = (query @ key.mT / size**0.5).softmax(-1) @ value
    expected = expected.transpose(1, 2).flatten(2).flatten(0, 1)[:, None]
    compare(f"tower, {kernel}", out, expected, [whole], [reference], torch.bfloat16)
