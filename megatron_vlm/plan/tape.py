"""Allocations of a part of the model, forward and backward, replayed by arithmetic instead of by torch. Bytes.

A part is written down as the operators that it runs: what each allocates, what autograd keeps of it, what its backward
allocates. Replaying follows torch's rules: a tensor lives while something still needs it or autograd keeps it; views
share memory; backward runs the operators in reverse, frees what an operator kept once it has run, and adds up several
gradients of a tensor in a fresh one. Memory inside an operator that torch's dispatcher does not show is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Memory:
    """A block of memory, which tensors share if they are views of one another."""

    size: int


@dataclass(eq=False)
class Tensor:
    """A tensor at some place of the part. Sizes are those of the block behind it."""

    memory: Memory
    grad: bool
    """Autograd wants its gradient."""
    size: int
    """Bytes of the tensor itself, and of its gradient."""


@dataclass(eq=False)
class _Operator:
    out: Tensor
    inputs: Sequence[Tensor]
    keeps: Sequence[Memory]
    kept: int
    passes: bool
    fresh: bool
    forward: int
    backward: int
    weight: int
    flops: int
    backward_flops: int
    linear: bool


#: Of one operator: operations, bytes read and written, and bytes that a linear layer would cast to FP8 (0: no such).
Work = tuple[int, int, int]


@dataclass(frozen=True)
class Profile:
    """What a part needs, over what was there before it.

    kept:         bytes that autograd keeps of it until its backward, the input and the output left out.
    keeps_input:  autograd keeps the input.
    keeps_output: it keeps the output for its own sake.
    output:       bytes of the memory behind the output.
    result:       bytes of the output itself, which may be a part of that.
    forward_peak: most bytes at once in forward, kept and output included, the input left out.
    backward_peak: most bytes at once in backward, kept ones and the output's gradient included, the input left out.
    gradient:     bytes of the input's gradient; 0 where nothing wants it.
    """

    kept: int
    keeps_input: bool
    keeps_output: bool
    output: int
    result: int
    forward_peak: int
    backward_peak: int
    gradient: int
    trains: bool
    """It has a backward at all."""
    forward_work: tuple[Work, ...]
    """Of every operator of forward."""
    backward_work: tuple[Work, ...]
    """Of every operator of backward, those run again included."""


@dataclass
class Tape:
    """Writes operators down, then replays them."""

    grad: bool = True
    """False: under no_grad, nothing is kept."""
    _operators: list[_Operator] = field(default_factory=list)

    def input(self, size: int, grad: bool) -> Tensor:
        """A tensor that is there before the part runs."""
        return Tensor(Memory(size), grad, size)

    def constant(self, size: int) -> Memory:
        """Memory that an operator makes and keeps beside its output (statistics, indices)."""
        return Memory(size)

    def op(
        self,
        size: int,
        *inputs: Tensor,
        keeps: Sequence[Tensor | Memory] = (),
        extra: int = 0,
        trains: bool = False,
        passes: bool = False,
        forward: int = 0,
        backward: int = 0,
        weight: int = 0,
        flops: int = 0,
        backward_flops: int = 0,
        linear: bool = False,
    ) -> Tensor:
        """An operator.

        size: bytes of its fresh output. keeps: what autograd keeps; extra: bytes more of that kind.
        trains: it has a parameter that trains. passes: its backward hands the output's gradient on without a copy.
        forward, backward: bytes that exist only while it runs. weight: bytes of parameter gradients that exist until
        they are added to the gradient buffer, right after. flops, backward_flops: of its matrix products.
        linear: these are products with a weight, which FP8 is for.
        """
        return self._record(Tensor(Memory(size), False, size), inputs, keeps, extra, trains, passes, True, forward,
                            backward, weight, flops, backward_flops, linear)  # fmt: skip

    def view(self, tensor: Tensor, size: int | None = None, *, backward: int = 0, passes: bool = True) -> Tensor:
        """A view. passes False: its backward makes a gradient of the whole."""
        out = Tensor(tensor.memory, False, tensor.size if size is None else size)
        return self._record(out, (tensor,), (), 0, False, passes, False, 0, backward, 0, 0, 0, False)

    def keep(self, out: Tensor) -> Tensor:
        """The operator before keeps its own output too."""
        if out.grad:
            self._operators[-1].keeps = [*self._operators[-1].keeps, out.memory]
        return out

    def checkpoint(
        self,
        build: Callable[..., Tensor],
        *inputs: Tensor,
        size: int,
        argument: Any,
    ) -> Tensor:
        """The operators that build(tape, *inputs, size, argument) writes down, run again in backward."""
        profiles = []
        for grad in (False, True):
            tape = Tape(grad)
            inner = [tape.input(each.size, grad) for each in inputs]
            profiles.append(tape.profile(inner[0], build(tape, *inner, size, argument)))
        quiet, loud = profiles
        held = sum(each.size for each in inputs[1:])  # counted as kept by a profile, which knows one input
        again = max(loud.forward_peak, loud.backward_peak - held - sum(each.size for each in inputs))
        flops = sum(work[0] for work in quiet.forward_work)
        back = flops + sum(work[0] for work in loud.backward_work)
        return self.op(size, *inputs, keeps=inputs, forward=quiet.forward_peak - size, backward=again, flops=flops,
                       backward_flops=back)  # fmt: skip

    def _record(
        self,
        out: Tensor,
        inputs: Sequence[Tensor],
        keeps: Sequence[Tensor | Memory],
        extra: int,
        trains: bool,
        passes: bool,
        fresh: bool,
        forward: int,
        backward: int,
        weight: int,
        flops: int,
        backward_flops: int,
        linear: bool,
    ) -> Tensor:
        out.grad = self.grad and (trains or any(tensor.grad for tensor in inputs))
        kept = [item.memory if isinstance(item, Tensor) else item for item in keeps] if out.grad else []
        self._operators.append(
            _Operator(
                out,
                inputs,
                kept,
                extra if out.grad else 0,
                passes,
                fresh,
                forward,
                backward,
                weight,
                flops,
                backward_flops,
                linear,
            )  # fmt: skip
        )
        return out

    def profile(self, start: Tensor, end: Tensor) -> Profile:
        """The part from its input `start` to its output `end`."""
        held = {memory for operator in self._operators for memory in operator.keeps}
        kept = sum(memory.size for memory in held if memory not in (start.memory, end.memory))
        kept += sum(operator.kept for operator in self._operators)
        return Profile(
            kept,
            start.memory in held,
            end.memory in held and end.memory is not start.memory,
            end.memory.size,
            end.size,
            self._forward(start, end, held),
            self._backward(start, end),
            start.size if start.grad else 0,
            end.grad,
            tuple(self._forward_work()),
            tuple(self._backward_work()),
        )

    def _forward_work(self) -> Iterator[Work]:
        for op in self._operators:
            if op.fresh:
                read = sum(tensor.size for tensor in op.inputs)
                yield op.flops, read + op.out.size + op.kept + op.forward, read * op.linear

    def _backward_work(self) -> Iterator[Work]:
        for op in reversed(self._operators):
            if op.out.grad and not (op.passes and not op.backward_flops):
                read = op.out.size + op.kept + sum(memory.size for memory in op.keeps)
                written = sum(tensor.size for tensor in op.inputs if tensor.grad)
                # A weight's gradient is added to the float32 buffer: read, read, written.
                moved = read + written + 2 * op.backward + 4 * op.weight
                yield op.backward_flops, moved, op.out.size * op.linear

    def _forward(self, start: Tensor, end: Tensor, held: set[Memory]) -> int:
        last = {tensor.memory: at for at, op in enumerate(self._operators) for tensor in (*op.inputs, op.out)}
        live = peak = 0
        for at, op in enumerate(self._operators):
            live += op.kept + (op.out.memory.size if op.fresh else 0)
            peak = max(peak, live + op.forward)
            for memory in {tensor.memory for tensor in (*op.inputs, op.out)}:
                if last[memory] == at and memory not in held and memory not in (start.memory, end.memory):
                    live -= memory.size
        return peak

    def _backward(self, start: Tensor, end: Tensor) -> int:
        users: dict[Memory, int] = {}
        for op in self._operators:
            for memory in op.keeps:
                users[memory] = users.get(memory, 0) + 1
        users.pop(start.memory, None)
        live = sum(memory.size for memory in users) + sum(op.kept for op in self._operators)
        gradients = {end: Memory(end.size)}
        owners = {gradients[end]: 1}
        live += end.size
        peak = live
        for op in reversed(self._operators):
            if not op.out.grad or op.out not in gradients:
                continue
            gradient = gradients.pop(op.out)
            wanted = [tensor for tensor in op.inputs if tensor.grad]
            made = [gradient if op.passes else Memory(tensor.size) for tensor in wanted]
            if not op.passes:
                live += sum(memory.size for memory in made)
            peak = max(peak, live + op.backward + op.weight)
            for memory in made:
                owners[memory] = owners.get(memory, 0) + 1
            live -= self._drop(gradient, owners)
            live -= op.kept
            for memory in op.keeps:
                if memory in users:
                    users[memory] -= 1
                    live -= memory.size if not users[memory] else 0
            for tensor, memory in zip(wanted, made, strict=True):
                if tensor in gradients:
                    total = Memory(tensor.size)
                    live += total.size
                    peak = max(peak, live)
                    live -= self._drop(memory, owners) + self._drop(gradients[tensor], owners)
                    owners[total] = 1
                    memory = total
                gradients[tensor] = memory
        return peak

    @staticmethod
    def _drop(memory: Memory, owners: dict[Memory, int]) -> int:
        """One owner less; the bytes that this frees."""
        owners[memory] -= 1
        return memory.size if not owners[memory] else 0


def profile(build: Callable[[Tape, Tensor], Tensor], size: int, grad: bool, *, enabled: bool = True) -> Profile:
    """The profile of the part that `build` writes down, for an input of `size` bytes.

    grad: the input wants a gradient. enabled: autograd is on.
    """
    tape = Tape(enabled)
    start = tape.input(size, grad and enabled)
    return tape.profile(start, build(tape, start))


def recomputed(build: Callable[[Tape, Tensor], Tensor], size: int, grad: bool) -> Profile:
    """The same, run again in backward: only the input is kept in between.

    While it runs again its output and its input's gradient exist as well.
    """
    quiet, loud = profile(build, size, grad, enabled=False), profile(build, size, True)
    again = max(loud.forward_peak + loud.output, loud.backward_peak + loud.output)
    return Profile(0, True, False, quiet.output, quiet.result, quiet.forward_peak, again, size if grad else 0, True,
                   quiet.forward_work, loud.forward_work + loud.backward_work)  # fmt: skip
