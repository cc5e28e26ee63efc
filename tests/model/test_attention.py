"""The attention kernel against dense attention with the mask rule, and the memory it takes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vlm.batch import PAD, PREFIX_BRANCH
from megatron_vlm.model.mask import Mark
from megatron_vlm.model.plan import KEPT_PER_TOKEN, Plan
from tests.model.test_mask import from_rule, row_of

HEADS, KV_HEADS, SIZE = 4, 2, 16
#: An image block with text inside, long enough for several blocks, then branches; then examples without images.
LONG = (
    [(0, PREFIX_BRANCH, False)]
    + [(0, PREFIX_BRANCH, True)] * 280
    + [(0, PREFIX_BRANCH, False)] * 4
    + [(0, PREFIX_BRANCH, True)] * 60
    + [(0, branch, False) for branch in range(12) for _ in range(9)]
    + [(1, 0, False)] * 150
    + [(2, branch, False) for branch in range(3) for _ in range(20)]
    + [(PAD, PAD, False)] * 7
)
#: The same with the first example last.
ROWS = [LONG, LONG[453:] + LONG[:453]]


def random_qkv(s: int, b: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, b, heads, SIZE, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def renumbered(tokens: list[tuple[int, int, bool]]) -> torch.Tensor:
    """Marks of tokens whose examples are numbered by the order in which they stand."""
    numbers: dict[int, int] = {}
    return row_of([(e if e == PAD else numbers.setdefault(e, len(numbers)), b, v) for e, b, v in tokens])


def dense_attention(query, key, value, rows):
    """Scores of all pairs, in float32."""
    query, key, value = (x.float().permute(1, 2, 0, 3) for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    sees = torch.stack([from_rule(row) for row in rows])[:, None]
    scores = (query @ key.transpose(2, 3) / SIZE**0.5).masked_fill(~sees, -1e30)
    weights = scores.softmax(-1) * sees  # padding sees nothing
    return (weights @ value).permute(2, 0, 1, 3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["float32", "bf16"])
@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_forward_and_backward_equal_dense_attention(dtype, tolerance, kernel):
    from megatron_vlm.model import attention

    rows = [renumbered(tokens) for tokens in ROWS]
    query, key, value = inputs = random_qkv(len(LONG), len(rows), dtype)
    plans = [Plan(row) for row in rows]
    kernels = {"cpu": attention.attend, "torch": lambda *args: attention._block_by_block(*args, None)}
    out = kernels[kernel](query, key, value, plans)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = (out, *torch.autograd.grad(out, inputs, upstream))
    dense = dense_attention(query, key, value, rows)
    expected = (dense, *torch.autograd.grad(dense, inputs, upstream.float()))
    for name, one, other in zip("out query key value".split(), found, expected, strict=True):
        worst = (one.float() - other.float()).abs().max().item()
        print(f"{kernel} {dtype} {name}: {worst:.1e}")
        assert worst < tolerance, name
    padding = torch.stack([row[Mark.EXAMPLE] == PAD for row in rows]).t()
    assert not out[padding].any()
    for gradient in found[1:]:
        assert not gradient[padding].any()


def test_what_was_made_of_marks_is_kept_for_the_rows_in_flight():
    from megatron_vlm.model.attention import Kept

    kept, made = Kept(rows=4), []

    def of(marks: torch.Tensor, key: str = "") -> object:
        return kept.of(marks, (key,), lambda: made.append(object()) or made[-1])

    micro_batches = [torch.stack([row_of(LONG)] * 2, 1) for _ in range(3)]
    first = of(micro_batches[0])
    assert of(micro_batches[0].detach()) is first  # as recomputation hands it over
    assert of(micro_batches[0], "other queries") is not first
    assert of(micro_batches[0]) is first and len(made) == 2
    for marks in micro_batches[1:]:
        of(marks)
    assert of(micro_batches[0]) is not first  # let go for those of later rows
    # Marks of a batch that is gone lie where no later ones can: they would be taken for them.
    place = torch.stack([row_of(LONG)] * 2, 1)
    address = place.data_ptr()
    of(place)
    del place
    assert torch.stack([row_of(LONG)] * 2, 1).data_ptr() != address


class Largest(TorchDispatchMode):
    """Most numbers in any tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.element_size())
        return out


def test_no_tensor_of_row_by_row_entries():
    """A packed row of 8,192 tokens with one long image example: nothing near 8,192 x 8,192, forward and backward."""
    from megatron_vlm.model.attention import attend

    s = 8192
    image = [(0, PREFIX_BRANCH, True)] * 5000
    tokens = [(0, PREFIX_BRANCH, False)] + image + [(0, b, False) for b in range(10) for _ in range(100)]
    tokens += [(1 + i // 200, 0, False) for i in range(s - len(tokens))]
    query, key, value = random_qkv(s, 1, torch.float32)
    with Largest() as largest:
        plan = Plan(row_of(tokens))
        attend(query[:, :, :1], key[:, :, :1], value[:, :, :1], [plan]).sum().backward()
    # Queries, keys and values have s x 4 x 16 numbers, a block's mask at most 256 x 6,001.
    print(f"largest tensor: {largest.numbers:,} numbers; S x S would be {s * s:,}")
    assert largest.numbers < s * s / 16
    kept = sum(block.kept.numel() for block in plan.blocks if block.kept is not None)
    assert kept <= KEPT_PER_TOKEN * s
