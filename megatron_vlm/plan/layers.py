"""Layers as operators on a tape: what each allocates, keeps and computes. Follows model/ operator by operator.

Sizes are bytes. Letters: n rows of a matrix (tokens or patches of all rows of the micro-batch), h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.plan.tape import Tape, Tensor

FLOAT = 4
INDEX = 8


@dataclass(frozen=True)
class Load:
    """What one micro-batch asks of one rank.

    rows: rows of the micro-batch. length: tokens in a row. part: tokens of a row that this context rank holds.
    crops: crops that this rank encodes. windows and slots: windows that it pools, patches in a window.
    most_windows: windows of the rank that pools most.
    all_windows: windows of the whole micro-batch. loss_tokens: tokens with a loss in this rank's part, all rows.
    longest: tokens of the longest example. pairs: query-key pairs that the mask allows, all rows.
    queries: tokens of a row whose queries this rank works on; pairs and masked are of these, on the average rank.
    masked: numbers in the masks of the blocks that need one, all rows.
    """

    rows: int
    length: int
    part: int
    crops: int
    windows: int
    most_windows: int
    slots: int
    all_windows: int
    loss_tokens: int
    longest: int
    pairs: int
    queries: int
    masked: int = 0


@dataclass(frozen=True)
class Settings:
    """What else decides about memory. element: bytes of a number in the model's precision."""

    element: int
    tensor: int
    vision_tensor: int
    """Ranks that share each weight of tower and connector."""
    sequence: bool
    context: int
    head_ranks: int
    """Context ranks among which attention deals its heads; the others of them gather keys and values."""
    ring: bool
    """Those others pass them around instead."""
    dropout: bool
    selective: bool
    full: bool
    """Whole layers run again in backward."""
    cuda: bool
    logit_chunk: int


@dataclass(frozen=True)
class Layers:
    """What the parts of a model are made of, for one rank."""

    arch: Architecture
    settings: Settings
    load: Load
    frozen: frozenset[str]

    @property
    def e(self) -> int:
        """Bytes of a number."""
        return self.settings.element

    def rms_norm(self, tape: Tape, x: Tensor, rows: int, width: int, trains: bool) -> Tensor:
        """RMSNorm as model/norm.py computes it: statistics in float32, the input kept for backward."""
        wide, copies = rows * width * FLOAT, self.e != FLOAT
        return tape.op(rows * width * self.e, x, keeps=(x,), extra=rows * FLOAT, trains=trains,
                       forward=2 * wide * copies, backward=(2 + copies) * wide)  # fmt: skip

    def layer_norm(self, tape: Tape, x: Tensor, rows: int, width: int, trains: bool) -> Tensor:
        """torch's LayerNorm."""
        statistics = 2 * rows * (FLOAT if self.settings.cuda else self.e)
        return tape.op(rows * width * self.e, x, keeps=(x,), extra=statistics, trains=trains)

    def linear(
        self,
        tape: Tape,
        x: Tensor,
        rows: int,
        inside: int,
        outside: int,
        trains: bool,
        *,
        bias: bool = False,
        sharded_input: bool = False,
        copies: int = 0,
    ) -> Tensor:
        """A linear layer of (outside, inside) weights on this rank.

        bias: added after the product (a rank alone has it inside). sharded_input: with sequence parallelism, gathered
        into a shared buffer. copies: bytes of the output's gradient made contiguous in backward.
        """
        out = rows * outside * self.e
        keeps = (x,) if trains else ()
        gathered = rows * inside * self.e if sharded_input else 0
        weight = inside * outside * self.e if trains else 0
        flops = 2 * rows * inside * outside
        return tape.op(out, x, keeps=keeps, trains=trains, forward=out * bias, backward=gathered + copies,
                       weight=weight, flops=flops, backward_flops=flops * (x.grad + trains), linear=True)  # fmt: skip

    def add(self, tape: Tape, size: int, x: Tensor, residual: Tensor) -> Tensor:
        return tape.op(size, x, residual, passes=True)

    def swiglu(self, tape: Tape, x: Tensor, size: int) -> Tensor:
        """silu(gate) x up of the two halves of x, as model/activation.py computes it; size: bytes of a half."""
        return tape.op(size, x, keeps=(x,), backward=size)

    def halves(self, tape: Tape, x: Tensor, *sizes: int) -> list[Tensor]:
        """Views of x side by side; backward joins their gradients in a new tensor."""
        whole = tape.view(x, passes=False)
        return [tape.view(whole, size, passes=True) for size in sizes]

    def gelu(self, tape: Tape, x: Tensor, size: int, kind: str) -> Tensor:
        if kind == "quick_gelu":
            scaled = tape.op(size, x)
            sigmoid = tape.op(size, scaled)
            return tape.op(size, x, sigmoid, keeps=(x, sigmoid))
        return tape.op(size, x, keeps=(x,))

    def encoder_layer(
        self,
        tape: Tape,
        x: Tensor,
        rows: int,
        width: int,
        mlp: int,
        heads: int,
        activation: str,
        trains: bool,
        transposed: bool,
        length: int,
        context: tuple[Tensor, int, int] | None = None,
    ) -> Tensor:
        """A pre-norm layer with biases, of tower or connector, on one of the ranks that share its weights.

        length: rows that see each other. transposed: gradients have to be made contiguous. context: what
        cross-attention reads, its rows, and its sequence length.
        """
        size, shards = rows * width * self.e, self.settings.vision_tensor
        copies = size if transposed else 0
        own, part, mlp = width // shards, size // shards, mlp // shards
        normed = self.layer_norm(tape, x, rows, width, trains)
        qkv = self.linear(tape, normed, rows, width, 3 * own, trains, bias=shards > 1)
        query, key, value = self.halves(tape, qkv, part, part, part)
        scores = rows * heads // shards
        attended = self.full_attention(tape, query, key, value, part, (scores, rows * length * own))
        out = self.linear(tape, attended, rows, own, width, trains, copies=copies)
        x = self.add(tape, size, self.bias(tape, out, trains), x)
        if context is not None:
            patches, patch_rows, slots = context
            normed = self.layer_norm(tape, x, rows, width, trains)
            key_value = self.linear(tape, patches, patch_rows, width, 2 * own, trains, bias=shards > 1)
            key, value = self.halves(tape, key_value, *[patch_rows * own * self.e] * 2)
            query = self.linear(tape, normed, rows, width, own, trains, bias=shards > 1)
            # The mask as numbers to add, spread over heads by the kernel.
            pairs = length * patch_rows * own
            attended = self.full_attention(tape, query, key, value, part, (scores, pairs), patch_rows * self.e)
            out = self.linear(tape, attended, rows, own, width, trains, copies=copies)
            x = self.add(tape, size, self.bias(tape, out, trains), x)
        normed = self.layer_norm(tape, x, rows, width, trains)
        inner = rows * mlp * self.e
        hidden = self.linear(tape, normed, rows, width, mlp, trains)
        hidden = self.gelu(tape, self.bias(tape, hidden, trains), inner, activation)
        out = self.linear(tape, hidden, rows, mlp, width, trains, copies=copies)
        return self.add(tape, size, self.bias(tape, out, trains), x)

    def bias(self, tape: Tape, x: Tensor, trains: bool) -> Tensor:
        """The bias that a sharded layer of tower or connector leaves to be added; a whole one adds it inside."""
        return x if self.settings.vision_tensor == 1 else tape.op(x.size, x, trains=trains, passes=True)

    def full_attention(
        self, tape: Tape, query: Tensor, key: Tensor, value: Tensor, size: int, work: tuple[int, int], mask: int = 0
    ) -> Tensor:
        """Fused attention: keeps its inputs, its output and one float32 a query and head.

        work: queries x heads, and query-key pairs x width.
        """
        if self.settings.selective and not mask:
            return tape.checkpoint(self._full, query, key, value, size=size, argument=work)
        return self._full(tape, query, key, value, size, work, mask)

    def _full(
        self, tape: Tape, query: Tensor, key: Tensor, value: Tensor, size: int, work: tuple[int, int], mask: int = 0
    ) -> Tensor:
        queries, pairs = work
        out = tape.op(size, query, key, value, keeps=(query, key, value), extra=queries * FLOAT + mask,
                      flops=4 * pairs, backward_flops=8 * pairs * query.grad)  # fmt: skip
        return tape.keep(out)
