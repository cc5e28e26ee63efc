"""Vision tower and connector as operators on a tape: what each allocates, keeps and computes. Sizes are bytes."""

from __future__ import annotations

from megatron_vlm.plan.layers import FLOAT, INDEX, Layers
from megatron_vlm.plan.tape import Tape, Tensor


class Encoder(Layers):
    """From pixels to the image features of a micro-batch."""

    def vision_embedding(self, tape: Tape, pixels: Tensor) -> Tensor:
        """Pixels to the tower's first hidden states."""
        vision, crops = self.arch.vision, self.load.crops
        trains = "vision" not in self.frozen
        numbers = crops * vision.patches * vision.patch_values
        values = tape.op(numbers * FLOAT, pixels, forward=numbers * FLOAT)
        if self.e != FLOAT:
            values = tape.op(numbers * self.e, values)
        out = crops * self.patch_tokens * vision.width * self.e
        weight = vision.patch_values * vision.width * self.e if trains else 0
        flops = 2 * numbers * vision.width
        hidden = tape.op(out, values, keeps=(values,), trains=trains, weight=weight, flops=flops,
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
            tape, x, rows, vision.width, vision.mlp, vision.heads, vision.activation, trains, False,
            self.patch_tokens,
        )  # fmt: skip

    def vision_norm(self, tape: Tape, x: Tensor) -> Tensor:
        """The norm after the last layer, where no layer is tapped."""
        rows, width = self.load.crops * self.patch_tokens, self.arch.vision.width
        return self.layer_norm(tape, x, rows, width, "vision" not in self.frozen)

    def vision_output(self, tape: Tape, x: Tensor) -> Tensor:
        """Tapped layers side by side, without class tokens. x: the last layer's output."""
        size = self.load.crops * self.arch.vision.patches * self.arch.feature_width * self.e
        joined = tape.op(size, x, passes=len(self.arch.connector.taps) < 2)
        return tape.op(size, joined) if self.arch.vision.class_token else joined

    def connector(self, tape: Tape, features: Tensor) -> Tensor:
        """Windows of patches to vectors as wide as the decoder."""
        kind, trains = self.arch.connector.kind, "connector" not in self.frozen
        connector, load, hidden = self.arch.connector, self.load, self.arch.language.hidden
        inside, n, shards = self.arch.feature_width, load.windows, self.settings.vision_tensor
        mlp = connector.mlp // shards
        if kind == "resampler":
            return self.resampler(tape, features, trains)
        taken = self.take(tape, features, n * load.slots, inside)
        summed = tape.op(n * inside * self.e, taken, passes=True)
        mean = tape.op(n * inside * self.e, summed, keeps=(tape.constant(n * self.e),))
        if kind == "attention_pooling":
            width = connector.width // shards
            query = self.linear(tape, mean, n, inside, width, trains, bias=shards > 1)
            rows = n * load.slots
            key_value = self.linear(tape, taken, rows, inside, 2 * width, trains, bias=shards > 1)
            key, value = self.halves(tape, key_value, *[rows * width * self.e] * 2)
            size = n * width * self.e
            work = (n * connector.heads // shards, rows * width)
            pooled = self.full_attention(tape, query, key, value, size, work, rows * self.e)
            pooled = tape.op(size, pooled, passes=True)
            pooled = self.bias(tape, self.linear(tape, pooled, n, width, connector.width, trains), trains)
            inner = self.linear(tape, pooled, n, connector.width, 2 * mlp, trains)
            inner = self.swiglu(tape, inner, n * mlp * self.e)
            return self.linear(tape, inner, n, mlp, hidden, trains)
        if kind == "linear":
            return self.gathered_linear(tape, mean, n, inside, hidden, trains)
        inner = self.bias(tape, self.linear(tape, mean, n, inside, mlp, trains), trains)
        inner = self.gelu(tape, inner, n * mlp * self.e, "gelu")
        return self.bias(tape, self.linear(tape, inner, n, mlp, hidden, trains), trains)

    def gathered_linear(self, tape: Tape, x: Tensor, rows: int, inside: int, outside: int, trains: bool) -> Tensor:
        """A linear layer whose output every rank that shares its weights gets whole."""
        shards = self.settings.vision_tensor
        out = self.linear(tape, x, rows, inside, outside // shards, trains, bias=shards > 1)
        return out if shards == 1 else tape.op(rows * outside * self.e, out, forward=rows * outside * self.e)

    def take(self, tape: Tape, features: Tensor, count: int, width: int) -> Tensor:
        """Patches of windows, zero where a window has none."""
        size = count * width * self.e
        taken = tape.op(size, features, keeps=(tape.constant(count * INDEX),), backward=features.size)
        return tape.op(size, taken, keeps=(tape.constant(count),))

    def resampler(self, tape: Tape, features: Tensor, trains: bool) -> Tensor:
        connector, load = self.arch.connector, self.load
        width, inside, crops = connector.width, self.arch.feature_width, load.windows
        patches = self.arch.vision.patches
        rows, size = crops * connector.queries, crops * connector.queries * width * self.e
        projected = self.gathered_linear(tape, features, load.crops * patches, inside, width, trains)
        taken = self.take(tape, projected, crops * load.slots, width)
        x = tape.op(size, taken, trains=trains)
        x.grad = tape.grad

        def layer(tape: Tape, x: Tensor, taken: Tensor, size: int, rows: int) -> Tensor:
            return self.encoder_layer(
                tape, x, rows, width, 4 * width, connector.heads, "gelu", trains, crops > 1,
                connector.queries, (taken, crops * load.slots, load.slots),
            )  # fmt: skip

        for _ in range(connector.layers):
            if self.settings.full and tape.grad:
                x = tape.checkpoint(layer, x, taken, size=size, argument=rows)
            else:
                x = layer(tape, x, taken, size, rows)
        x = self.layer_norm(tape, x, rows, width, trains)
        return self.gathered_linear(tape, x, rows, width, self.arch.language.hidden, trains)

    def gather(self, tape: Tape, pooled: Tensor) -> Tensor:
        """Every rank's vectors, in the order of the windows. Nothing where one rank has all."""
        ranks = self.settings.tensor * self.settings.context // self.settings.vision_tensor
        if ranks == 1:
            return pooled
        vectors = max(1, self.arch.connector.queries)
        row = vectors * self.arch.language.hidden * self.e
        gathered = tape.op(ranks * self.load.most_windows * row, pooled)
        whole = self.load.all_windows * row
        return tape.op(whole, gathered, keeps=(tape.constant(self.load.all_windows * INDEX),), backward=gathered.size)
