"""One optimizer step over a global batch, and the loss of held-out batches, by Megatron's schedules.

The loss is sum(w x token loss) / Z with Z the weight sum of the global batch: over all micro-batches and data-parallel
ranks. Megatron's own divisor is an integer counted per micro-batch, so it gets 0 and each micro-batch's sum is divided
here, by Z, which is known before forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_vlm.batch import Batch
from megatron_vlm.config.schema import Config
from megatron_vlm.cost import Work
from megatron_vlm.model import scaling
from megatron_vlm.parallel import context, cpu, groups
from megatron_vlm.train import evidence, optim
from megatron_vlm.train.evidence import Evidence, Seen
from megatron_vlm.train.guard import Event
from megatron_vlm.train.pulse import Pulse
from megatron_vlm.train.work import work_of

Judge = Callable[[int, Mapping[str, float]], Event | None]


@dataclass(frozen=True)
class Outcome:
    """What a step, or an evaluation, gave: the same on every rank."""

    loss: float
    """Weighted mean of the token losses over the global batch. NaN where no token has a weight."""
    losses: dict[str, float]
    """The same over the tokens of each data set that has any."""
    weight: float
    """Sum of the loss weights, Z."""
    work: Work
    """What was computed, over the global batch."""
    norms: dict[str, float] = field(default_factory=dict)
    """Gradient norm of each component before clipping. Empty in an evaluation and in a step without loss weights."""
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rate of each component. Empty in an evaluation."""
    event: Event | None = None
    """What a guard found."""
    applied: bool = True
    """Whether the weights were updated."""

    @property
    def grad_norm(self) -> float:
        """Norm of all gradients together."""
        return math.sqrt(sum(norm**2 for norm in self.norms.values()))


class Stepper:
    """The models of this rank with their optimizer.

    models:  one per virtual pipeline stage, wrapped by `optim.wrap`.
    sources: names of the data sets that Batch.sources counts.
    pulse:   told the phases of a step.
    """

    def __init__(
        self,
        models: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer | None,
        config: Config,
        sources: Sequence[str],
        pulse: Pulse | None = None,
    ):
        self.pulse = pulse or Pulse()
        self.models, self.optimizer, self.config, self.sources = list(models), optimizer, config, tuple(sources)
        self.device = torch.device(torch.cuda.current_device())
        self._divisor = 1.0
        self._schedule = ExitStack()
        self._seen: list[Seen] = []
        for model in self.models:
            model_config: Any = model.config
            model_config.finalize_model_grads_func = self._finalize

    def train(self, micro_batches: Sequence[Batch], step: int, judge: Judge | None = None) -> Outcome:
        """Forward, backward and update number `step` (from 1) on this data rank's micro-batches.

        A global batch without loss weights updates nothing: `norms` is empty then. Nor does one that `judge` (which
        gets the step, and loss and norms that are the same on all ranks) refuses by an event other than a note.
        Raises FloatingPointError, before anything is updated, where loss or gradients are not finite and nobody judges.
        """
        assert self.optimizer is not None
        # The optimizer's gradients are views of these buffers, which prepare_grads takes anew: nothing else to clear.
        with cpu.direct():
            for model in self.models:
                if not model.training:
                    model.train()
                model.zero_grad_buffer()
        self.pulse.enter("collective")
        weight, work = self._measure(micro_batches)
        if weight == 0:
            rates = optim.set_learning_rates(self.optimizer, self.config, step)
            return Outcome(math.nan, {}, 0.0, work, rates=rates, applied=False)
        self._seen.clear()
        self._divisor = weight
        outcome = self._outcome(self._run(micro_batches, forward_only=False), weight, work)
        self.pulse.enter("optimizer")
        with cpu.direct():
            self.optimizer.prepare_grads()
            norms = optim.clip(self.optimizer, self.config)
        rates = optim.set_learning_rates(self.optimizer, self.config, step)
        with self.pulse.during("collective"):
            values = self._agreed({"loss": outcome.loss, **norms})
        event = (judge or _raise)(step, values)
        applied = event is None or event.policy == "note"
        if applied:
            with cpu.direct():
                self.optimizer.step_with_ready_grads()
        self.pulse.enter("other")
        return replace(outcome, norms=norms, rates=rates, event=event, applied=applied)

    def evidence(self, outcome: Outcome) -> Evidence:
        """What there is to know about the step just done, of the whole global batch. Collective."""
        assert self.optimizer is not None
        scales = optim.clip_scales(outcome.norms, self.config.optim)
        return evidence.gather(self._seen, self.models, self.optimizer, scales)

    def module_norms(self, outcome: Outcome) -> dict[str, dict[str, float]]:
        """Gradient and weight norm of each module after the step just done. Collective."""
        assert self.optimizer is not None
        scales = optim.clip_scales(outcome.norms, self.config.optim)
        return evidence.module_norms(self.models, self.optimizer, scales)

    def _agreed(self, values: dict[str, float]) -> dict[str, float]:
        """The values of rank 0: ranks that differ in the last digit could come to different verdicts."""
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        if dist.get_world_size() > 1:
            dist.broadcast(numbers, src=0)
        return dict(zip(values, numbers.tolist(), strict=True))

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Sequence[Batch]]) -> Outcome:
        """Loss over several global batches, all tokens weighted as one batch."""
        for model in self.models:
            model.eval()
        sums = torch.zeros(1 + 2 * len(self.sources), dtype=torch.float64, device=self.device)
        total, done = 0.0, Work(0, 0, 0, 0, 0, 0)
        for micro_batches in batches:
            weight, work = self._measure(micro_batches)
            total += weight
            self._seen.clear()
            done = Work(*map(sum, zip(astuple(done), astuple(work), strict=True)))
            sums += self._run(micro_batches, forward_only=True)
            self.pulse.enter("other")
        scaling.forget_unused(self.models)
        return self._outcome(sums, total, done)

    def _measure(self, micro_batches: Sequence[Batch]) -> tuple[float, Work]:
        """Sum of the loss weights, and what is to be computed, of the global batch."""
        numbers = torch.zeros(1 + len(fields(Work)), dtype=torch.float64)
        with cpu.direct():
            for batch in micro_batches:
                weight = batch.loss_weights.sum(dtype=torch.float64).item()
                numbers += torch.tensor([weight, *astuple(work_of(batch))], dtype=torch.float64)
        numbers = numbers.to(self.device)
        groups.add_up(numbers, groups.data())
        weight, *counts = numbers.tolist()
        return weight, Work(*map(int, counts))

    def _run(self, micro_batches: Sequence[Batch], *, forward_only: bool) -> torch.Tensor:
        """Sums of the global batch, on every rank: [loss, loss by source ..., weight by source ...] float64."""
        iterators = [iter(micro_batches) for _ in self.models]
        with ExitStack() as self._schedule:
            reports = get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.models if len(self.models) > 1 else self.models[0],
                num_microbatches=len(micro_batches),
                seq_length=self.config.data.sequence_length,
                micro_batch_size=self.config.train.micro_batch,
                forward_only=forward_only,
            )
        sums = torch.zeros(1 + 2 * len(self.sources), dtype=torch.float64, device=self.device)
        self.pulse.enter("collective")
        for report in reports:  # of the last pipeline stage; empty elsewhere
            sums += report
        groups.add_up(sums, groups.data_and_context())
        return groups.add_up(sums, groups.pipeline())

    def _forward(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        self.pulse.enter("forward")
        # From here on, backward included, a schedule names no CUDA device any more.
        self._schedule.enter_context(cpu.direct())
        batch = next(batches)
        if self.device.type == "cuda":
            batch = batch.pin_memory()  # from other memory, a copy waits until the GPU has done all before it
        batch = batch.to(self.device)
        output = model(batch)
        self.pulse.enter("backward")  # the loss, and what the schedule does until it comes here again
        return output, partial(self._loss, batch)

    def _loss(self, batch: Batch, token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """token_losses: (b, s_local) float32, this context rank's chunk of the rows."""
        weights = context.chunk(batch.loss_weights, 1, groups.context())
        sources = context.chunk(batch.sources, 1, groups.context())
        self._seen.append(Seen(batch.rows, token_losses.detach(), weights))
        weighted = token_losses * weights
        with torch.no_grad():
            counted = weights != 0
            count = len(self.sources)
            index = sources[counted].long()
            by_source = weighted.new_zeros(2 * count, dtype=torch.float64)
            by_source.index_add_(0, index, weighted[counted].double())
            by_source.index_add_(0, index + count, weights[counted].double())
            report = torch.cat((by_source[:count].sum().view(1), by_source))
        return weighted.sum() / self._divisor, torch.zeros((), dtype=torch.int, device=self.device), report

    def _finalize(self, models: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
        self.pulse.enter("collective")
        finalize_model_grads(models, None, **options)

    def _outcome(self, sums: torch.Tensor, weight: float, work: Work) -> Outcome:
        total, *by_source = sums.tolist()
        count = len(self.sources)
        losses = {
            name: loss / source_weight
            for name, loss, source_weight in zip(self.sources, by_source[:count], by_source[count:], strict=True)
            if source_weight
        }
        return Outcome(total / weight if weight else math.nan, losses, weight, work)


def _raise(step: int, values: Mapping[str, float]) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(f"step {step} has no finite {' or '.join(broken)}. Nothing was updated.")
