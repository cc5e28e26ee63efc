"""Whether two runs of a recipe are the same run: differences by quantity, the verdict, the first tensor that diverges.

Works on parts of tensors and on what `trial.run` told; no torch. Differences are relative to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Components in the order in which the backward pass leaves them behind last.
COMPONENTS = ("vision", "connector", "language", "embeddings")
#: Gradients smaller than this part of the largest module's are rounding (those of key biases are nothing else).
FLOOR = 1e-6

#: Checkpoint name -> (whole shape, [(offset in it, values float32)]): what one rank holds.
Pieces = dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], np.ndarray]]]]
Told = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """One layout against the reference."""

    name: str
    world: int
    loss: float
    """Largest relative difference over the steps."""
    grad_norm: float
    components: dict[str, float]
    """Largest difference of a module's gradient, ||g - g'|| / ||g'||, over steps and the component's modules."""
    modules: dict[str, float]
    """The same of each module, over the steps."""
    weights: float
    """Of the weights: largest of a module, after the last step."""
    data: bool
    """Every step had the same samples."""
    faults: tuple[str, ...]
    """What is out of tolerance, the earliest first."""
    steps: tuple[Told, ...] = field(default=(), repr=False)
    """Step by step: step, loss, grad_norm, keys_hash, modules."""


def compare(name: str, world: int, told: Told, reference: Told, tolerance: float, weight_tolerance: float) -> Report:
    """`told` of a layout against that of the reference, at the steps that `told` has.

    tolerance: for losses, gradient norms and gradients; weight_tolerance: for weights after an update. Weights before
    the first update, and those that a checkpoint gave back, are held to `tolerance`.
    """
    by_step = {each["step"]: each for each in reference["steps"]}
    first = min(told["weights"], default=0)
    faults: list[str] = []
    weights = 0.0
    steps: list[Told] = []
    modules: dict[str, float] = {}

    def check_weights(step: int) -> float:
        errors = module_errors(told["weights"][step])
        worst = max(errors.values(), default=0.0)
        allowed = tolerance if step == first == 0 else weight_tolerance
        if not worst <= allowed:
            module = next(module for module, error in errors.items() if not error <= allowed)
            tensor = _worst_tensor(told["weights"][step], module)
            when = f"after step {step}" if step else "before the first step"
            faults.append(f"weights {when}: {tensor} differs by {errors[module]:.1e}, allowed {allowed:.0e}")
        return worst

    if first in told["weights"]:
        check_weights(first)
    losses, norms = [0.0], [0.0]
    same_data = True
    for each in told["steps"]:
        expected = by_step[each["step"]]
        at = f"step {each['step']}"
        losses.append(_relative(each["loss"], expected["loss"]))
        norms.append(_relative(each["grad_norm"], expected["grad_norm"]))
        if each["keys_hash"] != expected["keys_hash"]:
            same_data = False
            faults.append(f"{at}: other samples than the reference's ({each['keys_hash'][:12]})")
        if not losses[-1] <= tolerance:
            faults.append(f"{at}: the loss is {each['loss']:.9g}, the reference's {expected['loss']:.9g}")
        errors = module_errors(each["gradients"])
        diverging = [module for module, error in errors.items() if not error <= tolerance]
        if diverging:
            # The backward pass goes from the end of the model to its beginning: the last one diverged first. Where the
            # forward pass differs, all gradients do; the worst says most.
            forward = not losses[-1] <= tolerance
            module = max(diverging, key=lambda module: errors[module]) if forward else diverging[-1]
            tensor = _worst_tensor(each["gradients"], module)
            faults.append(
                f"{at}: the gradient of {tensor} differs by {errors[module]:.1e}, allowed {tolerance:.0e} "
                f"({len(diverging)} of {len(errors)} modules differ)"
            )
        if not norms[-1] <= tolerance:
            faults.append(f"{at}: the gradient norm is {each['grad_norm']:.9g}, not {expected['grad_norm']:.9g}")
        for kind, what in (("losses", "loss of data set"), ("norms", "gradient norm of")):
            for part, value in expected[kind].items():
                if not _relative(each[kind].get(part, math.nan), value) <= tolerance:
                    faults.append(f"{at}: the {what} {part} is {each[kind].get(part)}, not {value:.9g}")
        for module, error in errors.items():
            modules[module] = _larger(modules.get(module, 0.0), error)
        steps.append(
            {**{key: each[key] for key in ("step", "loss", "grad_norm", "norms", "keys_hash")}} | {"modules": errors}
        )
    for step in sorted(told["weights"]):
        if step != first:
            weights = check_weights(step)
    components = {name: 0.0 for name in COMPONENTS}
    for module, error in modules.items():
        components[component_of(module)] = _larger(components[component_of(module)], error)
    return Report(
        name,
        world,
        _largest(losses),
        _largest(norms),
        components,
        modules,
        weights,
        same_data,
        tuple(faults),
        tuple(steps),
    )


def assemble(by_rank: Iterable[Pieces]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Whole tensors by name, and how far copies of a part differ (norm of the largest difference of two, by name).

    Raises ValueError where no rank has some part of a tensor.
    """
    whole: dict[str, np.ndarray] = {}
    apart: dict[str, float] = {}
    for pieces in by_rank:
        for key, (shape, parts) in pieces.items():
            target = whole.setdefault(key, np.full(shape, np.nan, np.float32))
            for offset, part in parts:
                place = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
                known = ~np.isnan(target[place])
                difference = float(np.linalg.norm((target[place] - part)[known])) if known.any() else 0.0
                apart[key] = max(apart.get(key, 0.0), difference)
                target[place] = part
    missing = [key for key, tensor in whole.items() if np.isnan(tensor).any()]
    if missing:
        raise ValueError(f"{missing[0]}: a part is held by no rank, or is not a number.")
    return whole, apart


def module_of(name: str) -> str:
    """The module of a parameter: its name without the last part."""
    return name.rsplit(".", 1)[0]


def failed(name: str, world: int, why: str) -> Report:
    """The report on a layout that did not come to its end."""
    nothing = dict.fromkeys(COMPONENTS, math.nan)
    return Report(name, world, math.nan, math.nan, nothing, {}, math.nan, False, (f"did not finish: {why}",))


def component_of(module: str) -> str:
    """The column of a module."""
    return "embeddings" if module.startswith("language.embedding") else module.split(".", 1)[0]


def module_errors(norms: dict[str, Any]) -> dict[str, float]:
    """||difference|| / ||reference|| of each module, its tensors together, from (difference, reference) of tensors."""
    squares: dict[str, list[float]] = {}
    for name, (difference, size) in norms.items():
        both = squares.setdefault(module_of(name), [0.0, 0.0])
        both[0] += difference**2
        both[1] += size**2
    floor = FLOOR * math.sqrt(max((size for _, size in squares.values()), default=0.0))
    return {name: _divide(math.sqrt(d), max(math.sqrt(s), floor)) for name, (d, s) in squares.items()}


def _worst_tensor(norms: dict[str, Any], module: str) -> str:
    """The tensor of a module with the largest difference."""
    return max(_of(norms, module), key=lambda name: _sortable(norms[name][0]))


def _of(norms: dict[str, Any], module: str) -> Iterator[str]:
    return (name for name in norms if module_of(name) == module)


def _relative(value: float, reference: float) -> float:
    if math.isnan(value) and math.isnan(reference):
        return 0.0  # a step without loss weights
    return _divide(abs(value - reference), abs(reference))


def _divide(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size else math.inf


def _largest(values: list[float]) -> float:
    found = 0.0
    for value in values:
        found = _larger(found, value)
    return found


def _larger(one: float, other: float) -> float:
    """The larger of two; not a number counts as larger than any."""
    return max(one, other, key=_sortable)


def _sortable(value: float) -> float:
    return math.inf if math.isnan(value) else value
