"""Crops dealt to ranks: features and gradients of one process, whatever the deal; only patches that must, travel."""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.batch import PAD
from megatron_vlm.config.architecture import Architecture, ConnectorArchitecture
from megatron_vlm.config.geometry import image_geometry, image_layout
from megatron_vlm.config.presets import SIGLIP2_SO400M, TINY_LANGUAGE
from megatron_vlm.data.crops import windows as image_windows
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.split import even_counts
from tests.model.reference import randomize

#: 6 x 6 patches, of which a crop adds 4 to its neighbour: windows of 2 x 2 straddle crops, as in Molmo2.
VISION = dataclasses.replace(SIGLIP2_SO400M, image_size=24, patch_size=4, width=48, heads=2, mlp=64, layers=3)
HIDDEN = 32
LANGUAGE = dataclasses.replace(TINY_LANGUAGE, hidden=HIDDEN)
#: Width x height of images: tilings of 2 x 4 and 1 x 1, so 9 + 2 crops.
IMAGES = ((72, 40), (24, 24))
CROPS = 11
#: Relative to the norm of one process's gradient. In bf16 a bias, added up over all patches in other parts, differs by
#: 0.031; a factor of T too much or too little would be 0.5 or more.
TOLERANCE, TOLERANCE_BF16 = 1e-5, 0.05


def architecture(kind: str) -> Architecture:
    queries, layers = (3, 1) if kind == "resampler" else (0, 0)
    return Architecture(
        VISION,
        ConnectorArchitecture(
            kind=kind,
            taps=(2, 0),
            image_pool=2,
            video_pool=3,
            width=48,
            heads=2,
            mlp=40,
            queries=queries,
            layers=layers,
        ),
        LANGUAGE,
    )


def micro_batch(
    kind: str, seed: int, images: tuple[tuple[int, int], ...] = IMAGES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops (c, p, d) and windows (n, w) of the images."""
    geometry = image_geometry(architecture(kind), max_crops=8)
    layouts = [image_layout(width, height, geometry) for width, height in images]
    starts = [0, *accumulate(layout.crops for layout in layouts)]
    tables = [image_windows(layout, geometry) for layout in layouts]
    shifted = [
        np.where(table == PAD, PAD, table + start * VISION.patches)
        for table, start in zip(tables, starts, strict=False)
    ]
    generator = torch.Generator().manual_seed(seed)
    shape = (starts[-1], VISION.patches, VISION.patch_values)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    empty = np.zeros((0, 4), np.int64)
    return crops, torch.from_numpy(np.concatenate([empty, *shifted]) if not images else np.concatenate(shifted))


# --- the plan, without processes -------------------------------------------------------------------------------------


def plans(windows: torch.Tensor, counts: tuple[int, ...], patches: int):
    from megatron_vlm.parallel import cpu

    cpu.enable("cpu")
    from megatron_vlm.model.features import plan

    return [plan(windows, counts, patches, rank) for rank in range(len(counts))]


def check_plans(windows: torch.Tensor, counts: tuple[int, ...], patches: int) -> int:
    """Play the exchange with patch numbers in the place of features; returns how many patches travelled."""
    todo = plans(windows, counts, patches)
    starts = [0, *accumulate(count * patches for count in counts)]
    own = [torch.arange(start, end) for start, end in zip(starts, starts[1:], strict=False)]
    sent = [dict(enumerate(numbers[each.send].split(each.sent))) for numbers, each in zip(own, todo, strict=True)]
    pooled = torch.full((len(counts), todo[0].most, max(1, windows.shape[1])), -7)
    for rank, each in enumerate(todo):
        arrived = [sent[source][rank] for source in range(len(counts))]
        assert [len(x) for x in arrived] == each.received
        assert each.sent[rank] == each.received[rank] == 0
        at_hand = torch.cat([own[rank], *arrived, torch.tensor([PAD])])  # PAD, as index -1, finds PAD
        pooled[rank, : len(each.windows)] = at_hand[each.windows]
    assert torch.equal(pooled.flatten(0, 1)[todo[0].order], windows)
    assert all(each.travels == any(sum(x.sent) for x in todo) for each in todo)
    return sum(sum(each.sent) for each in todo)


@st.composite
def deals(draw) -> tuple[torch.Tensor, tuple[int, ...], int]:
    counts = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)))
    patches, n, w = draw(st.integers(1, 6)), draw(st.integers(0, 12)), draw(st.integers(1, 5))
    slot = st.integers(PAD, sum(counts) * patches - 1)
    numbers = draw(st.lists(slot, min_size=n * w, max_size=n * w))
    return torch.tensor(numbers, dtype=torch.int64).view(n, w), counts, patches


@given(deals())
@settings(max_examples=200, deadline=None)
def test_every_window_finds_its_patches(deal):
    check_plans(*deal)


@pytest.mark.parametrize("counts", [(6, 5), (4, 4, 3), (0, 2, 9), (3, 3, 3, 2), (11, 0)])
def test_only_patches_of_windows_across_ranks_travel(counts):
    _, windows = micro_batch("attention_pooling", 0)
    owner = np.repeat(np.arange(len(counts)), np.array(counts) * VISION.patches)
    foreign = set()
    for row in windows.tolist():
        patches = [patch for patch in row if patch != PAD]
        foreign |= {(owner[patches[0]], patch) for patch in patches if owner[patch] != owner[patches[0]]}
    assert check_plans(windows, counts, VISION.patches) == len(foreign)
    assert (len(foreign) > 0) == (counts != (11, 0))


def test_a_window_outside_the_crops_is_refused():
    with pytest.raises(ValueError, match="patches 0 to 50, but the micro-batch has 2 crops of 25 patches = 50"):
        plans(torch.tensor([[0, 50]]), (1, 1), 25)


# --- real ranks ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout and deal. `counts`: crops of each rank of the TP x CP group."""

    layout: Layout
    counts: tuple[int, ...]
    sequence: bool = False
    kind: str = "attention_pooling"
    frozen: tuple[str, ...] = ()
    images: tuple[tuple[int, int], ...] = IMAGES
    recompute: bool = False
    overlap: bool = False
    bf16: bool = False


def build(case: Case) -> torch.nn.ModuleDict:
    from megatron_vlm.model.connector import build_connector
    from megatron_vlm.model.vision import VisionTower
    from megatron_vlm.parallel import cpu, groups

    arch = architecture(case.kind)
    common: dict[str, Any] = dict(cpu.TRANSFORMER_SETTINGS)
    if case.bf16:
        common |= {"params_dtype": torch.bfloat16, "bf16": True}
    if case.recompute:
        common |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = torch.nn.ModuleDict(
        {
            "vision": VisionTower(VISION, arch.connector.taps, common, groups.replicated()),
            "connector": build_connector(arch, common, groups.replicated()),
        }
    )
    randomize(model)
    for name in case.frozen:
        model[name].requires_grad_(False)
    return model


def loss_of(features: torch.Tensor, case: Case, tensor, context) -> torch.Tensor:
    """A stand-in for the decoder with its real layout: merge on the whole row, context chunk, sequence parallelism, an
    MLP sharded over the tensor-parallel ranks. Returns this rank's part of the loss."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_vlm.parallel import cpu
    from megatron_vlm.parallel.context import chunk

    length = 12 * ((len(features) + 17) // 12 + 1)  # divides by every TP x CP of these tests
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(length, 1, HIDDEN, generator=generator)
    weights = torch.rand(length, 1, HIDDEN, generator=generator)
    places = torch.randperm(length, generator=generator)[: len(features)].sort().values
    row = row.index_add(0, places, features[:, None].float())
    row, weights = chunk(row, 0, context), chunk(weights, 0, context)
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=12, kv_channels=8, ffn_hidden_size=48,
        add_bias_linear=False, tensor_model_parallel_size=tensor.size(), sequence_parallel=case.sequence,
        **cpu.TRANSFORMER_SETTINGS,
    )  # fmt: skip
    torch.manual_seed(9)
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = MLP(config, linear, ffn_hidden_size=48, tp_group=tensor).requires_grad_(False)
    if case.sequence:
        row = scatter_to_sequence_parallel_region(row, group=tensor)
        weights = chunk(weights, 0, tensor)
    return ((row + 40 * mlp(row)[0]).tanh() * weights).sum()


def distributed(case: Case) -> dict[str, float]:
    """On one rank: relative error of the features and of each component's worst parameter, and its gradients' norms."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_vlm.model.features import encode
    from megatron_vlm.parallel import cpu, groups

    layout = case.layout
    groups.initialize(layout, timeout_s=30)
    rank, data_rank = groups.tensor_and_context().rank(), groups.data().rank()
    start = sum(case.counts[:rank])

    # One process: all crops of all data-parallel ranks, one after the other.
    alone = build(case)
    everything = [micro_batch(case.kind, seed, case.images) for seed in range(layout.data)]
    expected = []
    for crops, windows in everything:
        expected.append(encode(alone["vision"], alone["connector"], crops, windows, (len(crops),)))
        single = dataclasses.replace(case, sequence=False)
        loss_of(expected[-1], single, groups.this_rank(), groups.this_rank()).backward()

    model = build(case)
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=12, kv_channels=8,
        tensor_model_parallel_size=layout.tensor, context_parallel_size=layout.context,
        sequence_parallel=case.sequence, calculate_per_token_loss=True,
        **cpu.TRANSFORMER_SETTINGS,
    )  # fmt: skip
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=case.overlap), model)
    ddp.zero_grad_buffer()
    crops, windows = everything[data_rank]
    mine = crops[start : start + case.counts[rank]]
    found = encode(model["vision"], model["connector"], mine, windows, case.counts, groups.tensor_and_context())
    assert found.shape == expected[data_rank].shape
    loss_of(found, case, groups.tensor(), groups.context()).backward()
    finalize_model_grads([ddp])

    errors = {"features": relative(found, expected[data_rank])}
    reference = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        component = name.split(".")[0]
        if not parameter.requires_grad:
            assert parameter.grad is None and not hasattr(parameter, "main_grad"), name
            continue
        assert reference[name].grad is not None, name
        errors[component] = max(errors.get(component, 0.0), relative(parameter.main_grad, reference[name].grad))
        errors[component + " norm"] = errors.get(component + " norm", 0.0) + float(parameter.main_grad.norm())
    return errors


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6)) if expected.numel() else 0.0


TP2, TP3 = Layout(2, tensor=2), Layout(3, tensor=3)
CP2, CP3 = Layout(2, context=2), Layout(3, context=3)
TP2_CP2, TP2_DP2, CP2_DP2 = Layout(4, tensor=2, context=2), Layout(4, tensor=2), Layout(4, context=2)
CASES = {
    "tp2": Case(TP2, even_counts(CROPS, 2)),
    "tp2 sp": Case(TP2, even_counts(CROPS, 2), sequence=True),
    "tp2, one rank without crops": Case(TP2, (CROPS, 0), overlap=True),
    "tp2, first rank without crops": Case(TP2, (0, CROPS), sequence=True, overlap=True),
    "tp2, one crop": Case(TP2, (10, 1), recompute=True),
    "tp2, frozen tower": Case(TP2, even_counts(CROPS, 2), frozen=("vision",)),
    "tp2, frozen connector": Case(TP2, (CROPS, 0), frozen=("connector",), overlap=True),
    "tp2, no images": Case(TP2, (0, 0), images=(), overlap=True),
    "tp2, resampler": Case(TP2, even_counts(CROPS, 2), kind="resampler", sequence=True),
    "tp2, mlp": Case(TP2, even_counts(CROPS, 2), kind="mlp"),
    "cp2": Case(CP2, even_counts(CROPS, 2)),
    "cp2, frozen tower, no crops": Case(CP2, (0, CROPS), frozen=("vision",), overlap=True, recompute=True),
    "cp2, resampler, no crops": Case(CP2, (CROPS, 0), kind="resampler", recompute=True),
    "tp3": Case(TP3, even_counts(CROPS, 3)),
    "tp3 sp, 0 2 9": Case(TP3, (0, 2, 9), sequence=True, overlap=True),
    "cp3": Case(CP3, (5, 1, 5)),
    "cp3, recompute": Case(CP3, even_counts(CROPS, 3), recompute=True),
    "tp2 cp2": Case(TP2_CP2, even_counts(CROPS, 4)),
    "tp2 cp2 sp, 2 0 6 3": Case(TP2_CP2, (2, 0, 6, 3), sequence=True, overlap=True),
    "tp2 cp2, all on one": Case(TP2_CP2, (0, 0, CROPS, 0), recompute=True),
    "tp2 cp2, bf16": Case(TP2_CP2, even_counts(CROPS, 4), bf16=True),
    "tp2 dp2 sp": Case(TP2_DP2, even_counts(CROPS, 2), sequence=True),
    "cp2 dp2": Case(CP2_DP2, even_counts(CROPS, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(pool, name):
    case = CASES[name]
    trained = {"vision", "connector"} - set(case.frozen)
    for errors in pool(case.layout.world).run(distributed, case):
        assert {key for key in errors if key in ("vision", "connector")} == trained
        tolerance = TOLERANCE_BF16 if case.bf16 else TOLERANCE
        assert all(errors[key] < tolerance for key in ("features", *trained)), errors
        # The comparison means something: gradients are far from zero, unless there is nothing to learn from.
        assert all((errors[key + " norm"] > 0.1) == bool(case.images) for key in trained), errors


def deal_that_does_not_fit(counts: tuple[int, ...]) -> None:
    from megatron_vlm.model.features import encode
    from megatron_vlm.parallel import groups

    groups.initialize(TP2, timeout_s=30)
    model = build(CASES["tp2"])
    crops, windows = micro_batch("attention_pooling", 0)
    encode(model["vision"], model["connector"], crops[:5], windows, counts, groups.tensor_and_context())


@pytest.mark.parametrize("counts", [(6, 6), (5, 3, 3)])
def test_crops_that_do_not_fit_the_group_are_refused(pool, counts):
    with pytest.raises(RuntimeError, match=r"holds 5 crops, but the batch deals \("):
        pool(2).run(deal_that_does_not_fit, counts)
