"""The decoder as operators on a tape: what each allocates, keeps and computes. Sizes are bytes."""

from __future__ import annotations

import math

from megatron_vlm.plan.encoder import Encoder
from megatron_vlm.plan.layers import FLOAT, INDEX
from megatron_vlm.plan.tape import Tape, Tensor


class Parts(Encoder):
    """All parts of one model, for one rank: those of the tower and the connector, and the decoder's."""

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
        return tape.op(size, x, residual, keeps=(scale,), forward=3 * draws)

    def attention(self, tape: Tape, x: Tensor, rows: int, trains: bool) -> Tensor:
        """From the normed input to the heads' output, RoPE and exchange included."""
        language, tensor = self.arch.language, self.settings.tensor
        size = language.head_dim * self.e
        heads, kv_heads = language.heads // tensor, max(1, language.kv_heads // tensor)
        q, k = rows * heads * size, rows * kv_heads * size
        width = (language.heads + 2 * language.kv_heads) * language.head_dim // tensor
        qkv = self.linear(tape, x, rows, language.hidden, width, trains, bias=language.qkv_bias and tensor > 1,
                          sharded_input=self.settings.sequence)  # fmt: skip
        if language.kv_heads < tensor:  # keys and values of a head are spread over ranks
            qkv = tape.op(rows * width * tensor * self.e, qkv)
        query, key, value = self.halves(tape, qkv, q, k, k)
        if heads != kv_heads:
            query = tape.op(q, query, passes=True)
        if language.qk_norm:
            query = self.rms_norm(tape, query, rows * heads, language.head_dim, trains)
            key = self.rms_norm(tape, key, rows * kv_heads, language.head_dim, trains)
        query, key = (self.rope(tape, each) for each in (query, key))
        if self.settings.selective:
            return tape.checkpoint(self.packed_attention, query, key, value, size=q, argument=rows)
        return self.packed_attention(tape, query, key, value, q, rows)

    def rope(self, tape: Tape, x: Tensor) -> Tensor:
        """Rotary embedding; its table is made once for all layers."""
        return tape.op(x.size, x)

    def packed_attention(
        self, tape: Tape, query: Tensor, key: Tensor, value: Tensor, out_size: int, rows: int
    ) -> Tensor:
        """Attention under the mask rule, with the exchange of context parallelism."""
        language, context, dealt = self.arch.language, self.settings.context, self.settings.head_ranks
        heads = language.heads // self.settings.tensor
        kv_heads = max(1, language.kv_heads // self.settings.tensor)
        size = language.head_dim * self.e
        tokens = self.load.rows * self.load.length
        queries = self.load.rows * self.load.queries
        if dealt > 1:
            spread = math.lcm(kv_heads, dealt)
            if spread != kv_heads:
                key, value = (tape.op(rows * spread * size, each, backward=0) for each in (key, value))
            exchanged = [
                (query, queries * heads // dealt * size),
                (key, queries * spread // dealt * size),
                (value, queries * spread // dealt * size),
            ]
            query, key, value = (tape.op(to, each, forward=each.size, backward=each.size) for each, to in exchanged)
            heads, kv_heads = heads // dealt, spread // dealt
        if self.settings.ring:
            out = self.ring(tape, query, key, value, queries, heads, kv_heads, size)
        else:
            if context > dealt:
                key, value = (tape.op(tokens * kv_heads * size, each) for each in (key, value))
            out = self.blocks(tape, query, key, value, (queries, tokens), heads, kv_heads, size)
        if dealt > 1:
            out = tape.op(out_size, out, forward=out.size, backward=out.size)
        return out

    def blocks(
        self,
        tape: Tape,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: tuple[int, int],
        heads: int,
        kv_heads: int,
        size: int,
    ) -> Tensor:
        """model/attention.py: on a CPU one function over all blocks, on a GPU torch's attention block by block.

        tokens: of queries, and of keys, all rows.
        """
        statistics = tokens[0] * heads * FLOAT
        flops = 4 * self.load.pairs * heads * self.arch.language.head_dim
        longest = self.load.longest
        block = longest * heads * size
        if self.settings.cuda:
            repeated = 2 * block * (heads != kv_heads)
            return tape.op(query.size, query, key, value, keeps=(query, key, value),
                           extra=statistics + query.size + self.load.masked * self.e,
                           forward=repeated, backward=query.size + 2 * key.size + repeated, flops=flops,
                           backward_flops=2 * flops * query.grad)  # fmt: skip
        sums = 2 * tokens[1] * kv_heads * (size // self.e) * FLOAT
        out = tape.op(query.size, query, key, value, keeps=(query, key, value), extra=statistics,
                      forward=block, backward=sums * (self.e != FLOAT) + block + 2 * longest * kv_heads * size,
                      flops=flops, backward_flops=2 * flops * query.grad)  # fmt: skip
        return tape.keep(out)

    def ring(
        self, tape: Tape, query: Tensor, key: Tensor, value: Tensor, queries: int, heads: int, kv_heads: int, size: int
    ) -> Tensor:
        """model/ring_attention.py: keys and values of two ranks at a time, gradients of them in float32."""
        flops = 4 * self.load.pairs * heads * self.arch.language.head_dim
        pair, block = 2 * queries * kv_heads * size, min(queries, self.load.longest) * heads * size
        widened, wide = query.size // self.e * FLOAT * (self.e != FLOAT), pair // self.e * FLOAT
        out = tape.op(query.size, query, key, value, keeps=(query, key, value), extra=queries * heads * FLOAT,
                      forward=widened + 2 * pair + block, backward=widened + 2 * pair + 2 * wide + block + pair,
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
        last = chosen - max(0, chosen - 1) // settings.logit_chunk * settings.logit_chunk if chosen else 0
        logits, trains, copies = chunk * vocab, self.head_trains, self.e * (self.e != FLOAT)
        # Of the last chunk the gradients of the logits are kept, of all tokens those of the hidden states.
        kept = last * vocab * self.e * trains
        forward = max(0, logits * (2 * FLOAT + copies) - kept)
        backward = chosen * hidden * 2 + (chosen > last) * trains * logits * (FLOAT + copies)
        flops = 2 * language.hidden * vocab  # of a token; the product for the hidden states' gradients runs in forward
        losses = tape.op(chosen * FLOAT, selected, keeps=(selected,),
                         extra=chosen * (INDEX + FLOAT + hidden * selected.grad) + kept, trains=trains,
                         forward=forward, backward=backward, weight=vocab * hidden * trains, flops=flops * chosen,
                         backward_flops=flops * (chosen * selected.grad + (2 * chosen - last) * trains))  # fmt: skip
        return tape.op(rows * FLOAT, losses, extra=chosen * INDEX)

    @property
    def head_trains(self) -> bool:
        """The head's weights train; a tied one is the embedding table."""
        return ("base_embeddings" if self.arch.language.tied_head else "language") not in self.frozen
