"""Megatron's optimizer for the model's components: groups, learning rates, clipping. No loop, no gradients of its own.

Components are those of `model.build.component_of`. One Megatron optimizer holds up to two parameter groups per
component (with and without weight decay); each group knows its component by `lr_mult` (see TAGS).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_vlm.config.architecture import COMPONENTS
from megatron_vlm.config.schema import Config, OptimConfig
from megatron_vlm.model import kernels, linear
from megatron_vlm.model.build import component_of
from megatron_vlm.parallel import cpu, groups
from megatron_vlm.plan import params
from megatron_vlm.train import overlap
from megatron_vlm.train.schedule import learning_rate

#: `lr_mult` of each component's groups. Megatron finds a loaded group by (wd_mult, lr_mult, ...) and not by its
#: learning rate, so groups without tags would take each other's rates after a resume. Nothing multiplies by it.
TAGS = {component: float(1 + index) for index, component in enumerate(COMPONENTS)}
#: Numbers whose squares are summed in float32.
RUN = 1024


def wrap(models: Sequence[torch.nn.Module], config: Config) -> list[DistributedDataParallel]:
    """The models, one per virtual pipeline stage, in Megatron's data parallelism: gradients are summed, in float32.

    Sums, because the loss divisor is the weight of the global batch, which `step.py` applies afterwards.
    """
    ranks = groups.data().size(), groups.data_and_context().size()
    bucket = params.bucket_numbers(config.parallel, *ranks, cuda=not cpu.enabled())
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=bucket is not None,
        bucket_size=bucket,
        overlap_param_gather=False,
    )
    kind = DistributedDataParallel if bucket is None else overlap.OverlappingDataParallel
    wrapped = []
    for index, model in enumerate(models):
        model_config: Any = model.config
        model_config.calculate_per_token_loss = True  # gradients are summed over data-parallel ranks, not averaged
        wrapped.append(kind(model_config, settings, model, disable_bucketing=index > 0))
        if kernels.choose(config).gradients == "fused":
            linear.fuse_gradients(model)
    if bucket is not None:
        overlap.connect(wrapped)
    return wrapped


def build(models: Sequence[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """AdamW over the parameters that train, sharded over the data-parallel ranks. Learning rates are not set yet."""
    optim = config.optim
    settings = OptimizerConfig(
        optimizer="adam",
        lr=optim.language.lr,
        min_lr=optim.language.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=0.0,  # one norm over everything; ours is per component
        bf16=config.train.precision != "float32",
        params_dtype=torch.float32 if config.train.precision == "float32" else torch.bfloat16,
        use_distributed_optimizer=True,
    )
    overrides: dict[ParamKey, Any] = {}
    for component in COMPONENTS:
        for decays in (False, True):
            overrides[_key(component, decays)] = {"lr_mult": TAGS[component], "wd_mult": float(decays)}
    package = kernels.choose(config).optimizer
    with _adam(package):
        optimizer = get_megatron_optimizer(settings, list(models), config_overrides=overrides)
    # Megatron saves the step of torch's Adam only where neither of the others is installed.
    distrib: Any = distrib_optimizer
    distrib.HAVE_APEX_OR_TE = package != "torch"
    for name, group in _named_groups(optimizer):
        own = optim.of(name)
        # The table's only group is one without decay, unless the component itself has some.
        decays = name == "base_embeddings" or group["wd_mult"]
        group["weight_decay"] = own.weight_decay if decays else 0.0
        group["betas"], group["eps"] = own.betas, own.eps
        if "fused" in group:  # torch's AdamW; on a CPU it would go through the tensors operator by operator
            group["fused"] = True
    return optimizer


@contextlib.contextmanager
def _adam(package: str) -> Iterator[None]:
    """Megatron takes Adam of the first of Transformer Engine, apex and torch that there is; inside, of `package`.

    All three are AdamW with the same arguments.
    """
    changes: list[tuple[Any, str, Any]] = [(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", package == "torch")]
    if package == "transformer_engine":
        from transformer_engine.pytorch.optimizers import FusedAdam
    elif package == "apex":
        from apex.optimizers import FusedAdam
    if package != "torch":
        # The distributed optimizer looks whether it got the one that it would have taken itself.
        changes += [(module, "Adam", FusedAdam) for module in (megatron_optimizer, distrib_optimizer)]
    before = [getattr(module, name) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)


def _key(component: str, decays: bool) -> ParamKey:
    def matches(parameter: torch.nn.Parameter, name: str) -> bool:
        plain = name.removeprefix("module.")
        return component_of(plain) == component and decayed(plain, parameter) == decays

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=f"{component}-{decays}", fn=matches))


def decayed(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: to matrices that multiply activations, so not to norms, biases and embeddings."""
    table = component_of(name) == "base_embeddings" or any(
        part in name for part in ("embedding", "position", "class_token", "queries")
    )
    projection = "patch" in name and name.endswith("weight")  # the patch "embedding" is a linear layer
    return parameter.ndim > 1 and (projection or not table)


def reported(config: Config) -> tuple[str, ...]:
    """Components whose learning rate and norm are reported: the base embeddings only where they train."""
    return tuple(name for name in COMPONENTS if name != "base_embeddings" or name not in config.model.freeze)


def set_learning_rates(optimizer: MegatronOptimizer, config: Config, step: int) -> dict[str, float]:
    """Write the learning rates of `step` (from 1) into the groups; gives those that are reported."""
    optim = config.optim
    rates = {
        name: learning_rate(optim.of(name), optim.schedule, step, config.train.steps, optim.decay_steps)
        for name in reported(config)
    }
    for name, group in _named_groups(optimizer):
        group["lr"] = rates[name]
    return rates


def _named_groups(optimizer: MegatronOptimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    names = {tag: component for component, tag in TAGS.items()}
    for group in optimizer.param_groups:
        yield names[group["lr_mult"]], group


def own_parts(optimizer: MegatronOptimizer) -> dict[torch.nn.Parameter, slice]:
    """Of each parameter that trains, flattened: the numbers whose reduced gradient lies on this data-parallel rank."""
    parts = {}
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in getattr(each, "model_param_gbuf_map", {}):
            with contextlib.suppress(KeyError):  # all of it belongs to other ranks
                part = each._get_model_param_range_map(parameter)["param"]
                parts[parameter] = slice(part.start, part.end)
    return parts


@torch.no_grad()
def clip(optimizer: MegatronOptimizer, config: Config) -> dict[str, float]:
    """Scale the gradients to the largest norms that `config.optim` allows; gives the norms before, of `reported`.

    Call it between `prepare_grads` and `step_with_ready_grads`, on every rank, also on one without parameters.
    Each number is counted once: ranks hold disjoint shards over the data-parallel ranks; of a parameter that every
    tensor-parallel rank holds whole, the first one counts, and of a tied table the copy on the first stage.
    """
    names = reported(config)
    group = groups.tensor()
    first = group.rank() == 0
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    counted: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name, parameters in _named_groups(optimizer):
        for parameter in parameters["params"]:
            if parameter.grad is None:
                continue
            gradients[name].append(parameter.grad)
            if not getattr(parameter, "shared", False) and (
                first or param_is_not_tensor_parallel_duplicate(parameter, group)
            ):
                counted[name].append(parameter.grad)
    squares = torch.zeros(len(names), dtype=torch.float64, device=torch.cuda.current_device())
    for index, name in enumerate(names):
        if counted[name]:
            squares[index] = _square(counted[name])
    groups.add_up(squares, optimizer.get_grad_stats_parallel_group())
    norms = dict(zip(names, squares.sqrt().tolist(), strict=True))
    for name, scale in clip_scales(norms, config.optim).items():
        if scale < 1 and gradients[name]:
            torch._foreach_mul_(gradients[name], scale)
    return norms


def _square(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all numbers, float64.

    In float32 the norm of a large tensor and that of its parts differ in the fifth digit, and clipping would carry the
    difference into the weights. Short runs of numbers are summed in float32 (converting all of them takes four times as
    long), the sums in float64.
    """
    norms = []
    short = [each for each in gradients if each.numel() < 16 * RUN]
    for each in gradients:
        if each.numel() >= 16 * RUN:
            whole = each.numel() // RUN * RUN
            norms.append(torch.linalg.vector_norm(each.view(-1)[:whole].view(-1, RUN), dim=1).double())
            short.append(each.view(-1)[whole:])
    return torch.cat([torch.stack(torch._foreach_norm(short, dtype=torch.float64)), *norms]).square().sum()


def clip_scales(norms: dict[str, float], optim: OptimConfig) -> dict[str, float]:
    """What the gradients of each component are multiplied by; 1 where the norm is small enough, or not a number."""
    most = {name: optim.of(name).clip_norm for name in norms}
    if optim.clip_by == "global":
        norms = dict.fromkeys(norms, math.sqrt(sum(norm**2 for norm in norms.values())))
    scales = {name: (most[name] or math.inf) / (norm + 1e-6) for name, norm in norms.items()}
    return {name: scale if 0 < scale < 1 else 1.0 for name, scale in scales.items()}
