"""The parts of the model as operators on a tape: what each allocates and keeps. Follows model/ operator by operator.

Sizes are bytes. Letters: n rows of a matrix (tokens or patches of all rows of the micro-batch), h hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_vlm.config.architecture import Architecture, LanguageArchitecture
from megatron_vlm.plan.params import connector_width_in
from megatron_vlm.plan.tape import Tape, Tensor

FLOAT = 4
INDEX = 8


@dataclass(frozen=True)
class Load:
    """What one micro-batch asks of one rank.

    rows: rows of the micro-batch. length: tokens in a row. part: tokens of a row that this context rank holds.
    crops: crops that this rank encodes. windows and slots: windows that it pools, patches in a window.
    all_windows: windows of the whole micro-batch. loss_tokens: tokens with a loss in this rank's part, all rows.
    longest: tokens of the longest example. pairs: query-key pairs that the mask allows, all rows.
    masked: numbers in the masks of the blocks that need one, all rows.
    """

    rows: int
    length: int
    part: int
    crops: int
    windows: int
    slots: int
    all_windows: int
    loss_tokens: int
    longest: int
    pairs: int
    masked: int = 0


@dataclass(frozen=True)
class Settings:
    """What else decides about memory. element: bytes of a number in the model's precision."""

    element: int
    tensor: int
    sequence: bool
    context: int
    dropout: bool
    selective: bool
    cuda: bool
    logit_chunk: int


@dataclass(frozen=True)
class Parts:
    """Writes the parts of one model down for one rank."""

    arch: Architecture
    settings: Settings
    load: Load
    frozen: frozenset[str]

    @property
    def e(self) -> int:
        """Bytes of a number."""
        return self.settings.element

    # --- layers that parts share

    def rms_norm(self, tape: Tape, x: Tensor, rows: int, width: int, trains: bool) -> Tensor:
        """RMSNorm as model/norm.py computes it: statistics in float32, without a fused kernel."""
        wide = rows * width * FLOAT
        x32 = x if self.e == FLOAT else tape.op(wide, x)
        square = tape.op(wide, x32, keeps=(x32,), backward=2 * wide)
        mean = tape.op(rows * FLOAT, square)
        mean = tape.op(rows * FLOAT, mean, passes=True)
        rsqrt = tape.op(rows * FLOAT, mean)
        scaled = tape.op(wide, x32, rsqrt, keeps=(x32, rsqrt), backward=wide)
        if self.e != FLOAT:
            scaled = tape.op(rows * width * self.e, scaled)
        keeps = (scaled,) if trains else ()
        return tape.op(
            rows * width * self.e, scaled, keeps=keeps, trains=trains, backward=trains * rows * width * self.e
        )

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
        """A linear layer of (outside, inside) weights on this rank. sharded_input: with sequence parallelism, gathered
        into a shared buffer. copies: bytes of the output's gradient made contiguous in backward."""
        out = rows * outside * self.e
        keeps = (x,) if trains else ()
        gathered = rows * inside * self.e if sharded_input else 0
        weight = inside * outside * self.e if trains else 0
        flops = 2 * rows * inside * outside
        return tape.op(out, x, keeps=keeps, trains=trains, forward=out * bias, backward=gathered + copies,
                       weight=weight, flops=flops, backward_flops=flops * (x.grad + trains))  # fmt: skip

    def add(self, tape: Tape, size: int, x: Tensor, residual: Tensor) -> Tensor:
        return tape.op(size, x, residual, passes=True)

    def swiglu(self, tape: Tape, x: Tensor, size: int) -> Tensor:
        """silu(gate) x (up + 0) of the two halves of x; size: bytes of a half."""
        gate, up = self.halves(tape, x, size, size)
        activated = tape.op(size, gate, keeps=(gate,))
        shifted = tape.op(size, up, passes=True)
        return tape.op(size, activated, shifted, keeps=(activated, shifted))

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

    # --- vision

    def vision_embedding(self, tape: Tape, pixels: Tensor) -> Tensor:
        """Pixels to the tower's first hidden states."""
        vision, crops = self.arch.vision, self.load.crops
        trains = "vision" not in self.frozen
        numbers = crops * vision.patches * vision.patch_values
        values = tape.op(numbers * FLOAT, pixels, forward=numbers * FLOAT)
        if self.e != FLOAT:
            values = tape.op(numbers * self.e, values)
        if crops > 1:  # the linear layer wants it contiguous
            values = tape.op(numbers * self.e, values)
        out = crops * self.patch_tokens * vision.width * self.e
        weight = vision.patch_values * vision.width * self.e if trains else 0
        flops = 2 * numbers * vision.width
        hidden = tape.op(out, values, keeps=(values,), trains=trains, forward=out, weight=weight, flops=flops,
                         backward_flops=flops * trains)  # fmt: skip
        if vision.class_token:
            hidden = tape.op(out, hidden)
        hidden = tape.op(out, hidden, passes=True, trains=trains, backward=0)
        if vision.pre_norm:
            hidden = self.layer_norm(tape, hidden, crops * self.patch_tokens, vision.width, trains)
        return hidden

    @property
    def patch_tokens(self) -> int:
        """Tokens of a crop in the tower."""
        return self.arch.vision.patches + self.arch.vision.class_token

    def vision_layer(self, tape: Tape, x: Tensor) -> Tensor:
        """One layer of the tower."""
        vision = self.arch.vision
        trains = "vision" not in self.frozen
        rows = self.load.crops * self.patch_tokens
        return self.encoder_layer(
            tape, x, rows, vision.width, vision.mlp, vision.heads, vision.activation, trains, self.load.crops > 1,
            self.patch_tokens,
        )  # fmt: skip

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
        """A pre-norm layer with biases.

        length: rows that see each other. transposed: gradients have to be made contiguous. context: what
        cross-attention reads, its rows, and its sequence length.
        """
        size = rows * width * self.e
        copies = size if transposed else 0
        normed = self.layer_norm(tape, x, rows, width, trains)
        qkv = self.linear(tape, normed, rows, width, 3 * width, trains, bias=True)
        query, key, value = self.halves(tape, qkv, size, size, size)
        attended = self.full_attention(tape, query, key, value, size, (rows * heads, rows * length * width))
        out = self.linear(tape, attended, rows, width, width, trains, copies=copies)
        out = tape.op(size, out, passes=True)  # bias
        x = self.add(tape, size, out, x)
        if context is not None:
            patches, patch_rows, slots = context
            normed = self.layer_norm(tape, x, rows, width, trains)
            key_value = self.linear(tape, patches, patch_rows, width, 2 * width, trains, bias=True)
            key, value = self.halves(tape, key_value, *[patch_rows * width * self.e] * 2)
            query = self.linear(tape, normed, rows, width, width, trains, bias=True)
            # The mask as numbers to add, spread over heads by the kernel.
            pairs = length * patch_rows * width
            attended = self.full_attention(tape, query, key, value, size, (rows * heads, pairs), patch_rows * self.e)
            out = self.linear(tape, attended, rows, width, width, trains, copies=copies)
            out = tape.op(size, out, passes=True)
            x = self.add(tape, size, out, x)
        normed = self.layer_norm(tape, x, rows, width, trains)
        inner = rows * mlp * self.e
        hidden = self.linear(tape, normed, rows, width, mlp, trains)
        hidden = tape.op(inner, hidden, passes=True)  # bias
        hidden = self.gelu(tape, hidden, inner, activation)
        out = self.linear(tape, hidden, rows, mlp, width, trains, copies=copies)
        out = tape.op(size, out, passes=True)
        return self.add(tape, size, out, x)

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

    def vision_norm(self, tape: Tape, x: Tensor) -> Tensor:
        """The norm after the last layer, where no layer is tapped."""
        rows, width = self.load.crops * self.patch_tokens, self.arch.vision.width
        return self.layer_norm(tape, x, rows, width, "vision" not in self.frozen)

    def vision_output(self, tape: Tape, x: Tensor) -> Tensor:
        """Tapped layers side by side, then crops before patches. x: the last layer's output."""
        size = self.load.crops * self.arch.vision.patches * connector_width_in(self.arch) * self.e
        joined = tape.op(size, x, passes=len(self.arch.connector.taps) < 2)
        return tape.op(size, joined, passes=True)

    # --- connector

    def connector(self, tape: Tape, features: Tensor) -> Tensor:
        """Windows of patches to vectors as wide as the decoder."""
        kind, trains = self.arch.connector.kind, "connector" not in self.frozen
        connector, load, hidden = self.arch.connector, self.load, self.arch.language.hidden
        inside, n = connector_width_in(self.arch), load.windows
        if kind == "resampler":
            return self.resampler(tape, features, trains)
        taken = self.take(tape, features, n * load.slots, inside)
        summed = tape.op(n * inside * self.e, taken, passes=True)
        mean = tape.op(n * inside * self.e, summed, keeps=(tape.constant(n * self.e),))
        if kind == "attention_pooling":
            width = connector.width
            query = self.linear(tape, mean, n, inside, width, trains, bias=True)
            rows = n * load.slots
            key_value = self.linear(tape, taken, rows, inside, 2 * width, trains, bias=True)
            key, value = self.halves(tape, key_value, *[rows * width * self.e] * 2)
            size = n * width * self.e
            work = (n * connector.heads, rows * width)
            pooled = self.full_attention(tape, query, key, value, size, work, rows * self.e)
            pooled = tape.op(size, pooled, passes=True)
            pooled = self.linear(tape, pooled, n, width, width, trains, bias=True)
            inner = self.linear(tape, pooled, n, width, 2 * connector.mlp, trains)
            inner = self.swiglu(tape, inner, n * connector.mlp * self.e)
            return self.linear(tape, inner, n, connector.mlp, hidden, trains)
        if kind == "linear":
            return self.linear(tape, mean, n, inside, hidden, trains, bias=True)
        inner = self.linear(tape, mean, n, inside, connector.mlp, trains)
        inner = tape.op(n * connector.mlp * self.e, inner, passes=True)
        inner = self.gelu(tape, inner, n * connector.mlp * self.e, "gelu")
        out = self.linear(tape, inner, n, connector.mlp, hidden, trains)
        return tape.op(n * hidden * self.e, out, passes=True)

    def take(self, tape: Tape, features: Tensor, count: int, width: int) -> Tensor:
        """Patches of windows, zero where a window has none."""
        size = count * width * self.e
        taken = tape.op(size, features, keeps=(tape.constant(count * INDEX),), backward=features.size)
        return tape.op(size, taken, keeps=(tape.constant(count),))

    def resampler(self, tape: Tape, features: Tensor, trains: bool) -> Tensor:
        connector, load = self.arch.connector, self.load
        width, inside, crops = connector.width, connector_width_in(self.arch), load.windows
        patches = self.arch.vision.patches
        rows, size = crops * connector.queries, crops * connector.queries * width * self.e
        projected = self.linear(tape, features, load.crops * patches, inside, width, trains, bias=True)
        taken = self.take(tape, projected, crops * load.slots, width)
        x = tape.op(size, taken, trains=trains)
        x.grad = tape.grad
        for _ in range(connector.layers):
            x = self.encoder_layer(
                tape, x, rows, width, 4 * width, connector.heads, "gelu", trains, crops > 1,
                connector.queries, (taken, crops * load.slots, load.slots),
            )  # fmt: skip
        x = self.layer_norm(tape, x, rows, width, trains)
        return self.linear(tape, x, rows, width, self.arch.language.hidden, trains, bias=True)

    def gather(self, tape: Tape, pooled: Tensor) -> Tensor:
        """Every rank's vectors, in the order of the windows. Nothing where one rank has all."""
        ranks = self.settings.tensor * self.settings.context
        if ranks == 1:
            return pooled
        vectors = max(1, self.arch.connector.queries)
        row = vectors * self.arch.language.hidden * self.e
        gathered = tape.op(ranks * self.load.windows * row, pooled)
        whole = self.load.all_windows * row
        return tape.op(whole, gathered, keeps=(tape.constant(self.load.all_windows * INDEX),), backward=gathered.size)

    # --- decoder

    def embedding(self, tape: Tape, images: Tensor) -> Tensor:
        """Token embeddings with the image features added, then this rank's part of the row."""
        load, hidden, language = self.load, self.arch.language.hidden, self.arch.language
        size = load.rows * load.length * hidden * self.e
        ids = load.rows * load.length * INDEX
        base_trains, new_trains = "base_embeddings" not in self.frozen, "connector" not in self.frozen
        table = language.vocab_size // self.settings.tensor * hidden * self.e
        none = tape.input(0, False)
        base = tape.op(size, none, extra=ids, trains=base_trains, weight=table * base_trains)
        fresh = tape.op(
            size, none, extra=ids, trains=new_trains, weight=language.new_rows * hidden * self.e * new_trains
        )
        embedded = tape.op(size, base, fresh, keeps=(tape.constant(load.rows * load.length),))
        added = tape.op(
            size, embedded, images, keeps=(tape.constant(images.size // max(1, hidden * self.e) * INDEX),), passes=False
        )
        if load.rows > 1:  # from rows first to tokens first; one row's part is a view of the row
            added = tape.op(load.rows * load.part * hidden * self.e, added)
        return added if added.size == self.part_size else tape.view(added, self.part_size, passes=False)

    @property
    def hidden_rows(self) -> int:
        """Rows of hidden states that this rank holds between layers, all rows of the micro-batch."""
        shards = self.settings.tensor if self.settings.sequence else 1
        return self.load.rows * self.load.part // shards

    @property
    def part_size(self) -> int:
        return self.hidden_rows * self.arch.language.hidden * self.e

    def decoder_layer(self, tape: Tape, x: Tensor) -> Tensor:
        """One decoder layer."""
        language, tensor = self.arch.language, self.settings.tensor
        trains, sequence = "language" not in self.frozen, self.settings.sequence
        hidden, held, rows = language.hidden, self.hidden_rows, self.load.rows * self.load.part
        size = held * hidden * self.e
        copies = rows * hidden * self.e if self.load.rows > 1 and not sequence else 0
        normed = self.rms_norm(tape, x, held, hidden, trains)
        out = self.attention(tape, normed, rows, trains)
        out = self.row_linear(tape, out, rows, language.heads * language.head_dim // tensor, trains, copies)
        x = self.drop_add(tape, size, out, x)
        normed = self.rms_norm(tape, x, held, hidden, trains)
        mlp = language.mlp // tensor
        inner = self.linear(tape, normed, rows, hidden, 2 * mlp, trains, sharded_input=sequence)
        inner = self.swiglu(tape, inner, rows * mlp * self.e)
        out = self.row_linear(tape, inner, rows, mlp, trains, copies)
        return self.drop_add(tape, size, out, x)

    def row_linear(self, tape: Tape, x: Tensor, rows: int, inside: int, trains: bool, copies: int) -> Tensor:
        """The second linear layer of a pair; with sequence parallelism its output is scattered."""
        hidden = self.arch.language.hidden
        out = self.linear(tape, x, rows, inside, hidden, trains, copies=copies)
        if self.settings.sequence:
            out = tape.op(self.part_size, out)
        return out

    def drop_add(self, tape: Tape, size: int, x: Tensor, residual: Tensor) -> Tensor:
        """Residual add, with our dropout where it is on."""
        if not self.settings.dropout:
            return self.add(tape, size, x, residual)
        scale = tape.constant(size)
        draws = size // self.e * FLOAT
        kept = tape.op(size, x, residual, keeps=(scale,), forward=3 * draws)
        return kept

    def attention(self, tape: Tape, x: Tensor, rows: int, trains: bool) -> Tensor:
        """From the normed input to the heads' output, RoPE and exchange included."""
        language, tensor = self.arch.language, self.settings.tensor
        size = language.head_dim * self.e
        heads, kv_heads = language.heads // tensor, max(1, language.kv_heads // tensor)
        q, k = rows * heads * size, rows * kv_heads * size
        width = (language.heads + 2 * language.kv_heads) * language.head_dim // tensor
        qkv = self.linear(tape, x, rows, language.hidden, width, trains, bias=language.qkv_bias,
                          sharded_input=self.settings.sequence)  # fmt: skip
        if language.kv_heads < tensor:  # keys and values of a head are spread over ranks
            qkv = tape.op(rows * width * tensor * self.e, qkv)
        query, key, value = self.halves(tape, qkv, q, k, k)
        if heads != kv_heads:
            query = tape.op(q, query, passes=True)
        if language.qk_norm:
            query = self.rms_norm(tape, query, rows * heads, language.head_dim, trains)
            key = self.rms_norm(tape, key, rows * kv_heads, language.head_dim, trains)
        query, key = (self.rope(tape, each, rows) for each in (query, key))
        if self.settings.selective:
            return tape.checkpoint(self.packed_attention, query, key, value, size=q, argument=rows)
        return self.packed_attention(tape, query, key, value, q, rows)

    def rope(self, tape: Tape, x: Tensor, rows: int) -> Tensor:
        """Megatron's unfused rotary embedding."""
        angles = rows * self.arch.language.head_dim
        nothing = tape.input(0, False)
        work = angles * (2 * FLOAT - self.e)
        cosine = tape.op(angles * self.e, nothing, forward=work)
        sine = tape.op(angles * self.e, nothing, forward=work)
        straight = tape.op(x.size, x, cosine, keeps=(cosine,))
        # Half of it negated, both halves joined; backward slices, negates and joins.
        turned = tape.op(x.size, x, forward=x.size // 2, backward=3 * x.size // 2)
        turned = tape.op(x.size, turned, sine, keeps=(sine,))
        out = self.add(tape, x.size, straight, turned)
        return tape.op(x.size, out, passes=True)

    def packed_attention(
        self, tape: Tape, query: Tensor, key: Tensor, value: Tensor, out_size: int, rows: int
    ) -> Tensor:
        """Attention under the mask rule, with the exchange of context parallelism."""
        language, context = self.arch.language, self.settings.context
        heads = language.heads // self.settings.tensor
        kv_heads = max(1, language.kv_heads // self.settings.tensor)
        size = language.head_dim * self.e
        tokens = self.load.rows * self.load.length
        if context > 1:
            spread = kv_heads * context // math.gcd(kv_heads, context)
            if spread != kv_heads:
                key, value = (tape.op(rows * spread * size, each, backward=0) for each in (key, value))
            exchanged = [
                (query, tokens * heads // context * size),
                (key, tokens * spread // context * size),
                (value, tokens * spread // context * size),
            ]
            query, key, value = (tape.op(to, each, forward=each.size, backward=each.size) for each, to in exchanged)
            heads, kv_heads = heads // context, spread // context
        out = self.blocks(tape, query, key, value, tokens, heads, kv_heads, size)
        if context > 1:
            out = tape.op(out_size, out, forward=out.size, backward=out.size)
        return out

    def blocks(
        self, tape: Tape, query: Tensor, key: Tensor, value: Tensor, tokens: int, heads: int, kv_heads: int, size: int
    ) -> Tensor:
        """model/attention.py: on a CPU one function over all blocks, on a GPU torch's attention block by block."""
        statistics = tokens * heads * FLOAT
        flops = 4 * self.load.pairs * heads * self.arch.language.head_dim
        longest = self.load.longest
        repeated = 2 * longest * heads * size * (heads != kv_heads)
        block = longest * heads * size
        if self.settings.cuda:
            out = tape.op(query.size, query, key, value, keeps=(query, key, value),
                          extra=statistics + query.size + self.load.masked * self.e,
                          forward=repeated, backward=query.size + 2 * key.size + repeated, flops=flops,
                          backward_flops=2 * flops * query.grad)  # fmt: skip
            return out
        sums = 2 * tokens * kv_heads * (size // self.e) * FLOAT
        out = tape.op(query.size, query, key, value, keeps=(query, key, value), extra=statistics,
                      forward=repeated + block, backward=sums * (self.e != FLOAT) + repeated + 3 * block,
                      flops=flops, backward_flops=2 * flops * query.grad)  # fmt: skip
        return tape.keep(out)

    # --- head

    def final_norm(self, tape: Tape, x: Tensor) -> Tensor:
        return self.rms_norm(tape, x, self.hidden_rows, self.arch.language.hidden, "language" not in self.frozen)

    def head(self, tape: Tape, x: Tensor) -> Tensor:
        """Loss tokens selected, their logits chunk by chunk, their losses."""
        load, language, settings = self.load, self.arch.language, self.settings
        chosen, rows = load.loss_tokens, load.rows * load.part
        hidden = language.hidden * self.e
        if settings.sequence:
            x = tape.op(rows * hidden, x, backward=0)
        if load.rows > 1:
            x = tape.op(rows * hidden, x, passes=True)
        selected = tape.op(chosen * hidden, x, keeps=(tape.constant(chosen * INDEX),), backward=rows * hidden)
        vocab = language.vocab_size // settings.tensor
        chunk = min(chosen, settings.logit_chunk)
        more = chosen > settings.logit_chunk
        logits = chunk * vocab
        forward = logits * (2 * FLOAT + (2 if more and self.e != FLOAT else 0))
        backward = logits * (2 * FLOAT if more else FLOAT + (self.e if self.e != FLOAT else 0)) + chunk * hidden
        trains = self.head_trains
        flops = 2 * chosen * language.hidden * vocab  # and once more in backward, where logits are made anew
        losses = tape.op(chosen * FLOAT, selected, keeps=(selected,), extra=chosen * (INDEX + FLOAT), trains=trains,
                         forward=forward, backward=backward, weight=vocab * hidden * trains, flops=flops,
                         backward_flops=flops * (1 + selected.grad + trains))  # fmt: skip
        return tape.op(rows * FLOAT, losses, extra=chosen * INDEX)

    @property
    def head_trains(self) -> bool:
        table: LanguageArchitecture = self.arch.language
        return ("base_embeddings" if table.tied_head else "language") not in self.frozen
