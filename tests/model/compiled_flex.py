"""FlexAttention as it is compiled: its forward on this CPU is the mask rule's; new rows of one length compile nothing.

`python -m tests.model.compiled_flex`, a process of its own: one that has sent Megatron to the CPU compiles nothing.
"""

from __future__ import annotations

from unittest import mock

import torch
import torch._dynamo
from torch.nn.attention.flex_attention import flex_attention

from megatron_vlm.model import flex
from tests.model.test_attention import ROWS, dense_attention, random_qkv, renumbered


def main() -> None:
    """Raises AssertionError where it is not so."""
    compiled = torch.compile(flex_attention, fullgraph=True)
    marks = torch.stack([renumbered(tokens) for tokens in ROWS], 1)
    s = marks.shape[2]
    query, key, value = (x.detach() for x in random_qkv(s, 2, torch.float32))
    with mock.patch.object(flex, "_kernel", lambda device: compiled):
        for rows in (marks, marks.flip(1).contiguous()):
            out = flex.FlexRows(rows, 0, s).attend(query, key, value)
            expected = dense_attention(query, key, value, [rows[:, row] for row in range(2)])
            worst = (out - expected).abs().max().item()
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            print(f"largest difference {worst:.1e}, {graphs} graph(s) compiled")
            assert worst < 1e-5 and graphs == 1


if __name__ == "__main__":
    main()
