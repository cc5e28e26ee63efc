"""Plans, remedies, rankings: what they say holds together."""

from __future__ import annotations

import dataclasses
import json

import pytest
from rich.console import Console

from megatron_vlm.config import load
from megatron_vlm.plan import hardware, report, sweep, workload
from megatron_vlm.plan import time as plan_time
from tests.test_imports import ROOT


def plan(recipe: str, gpu: str = "h100", nodes: int = 4, per_node: int = 8, *settings: str) -> sweep.Plan:
    config = load.load(ROOT / "examples" / "recipes" / recipe, settings)
    return sweep.plan(config, hardware.Cluster(hardware.find(gpu), nodes, per_node), workload.assume(config))


def test_shares_add_up():
    for settings in ((), ("parallel.pipeline=2",), ("parallel.pipeline=2", "parallel.virtual_pipeline=2")):
        time = plan("molmo2_8b/stage2.yaml", "h100", 4, 8, *settings).time
        assert sum(time.shares.values()) == pytest.approx(time.total)
        assert time.shares[time.bound] == max(time.shares.values())
        assert 0 < time.mfu < 0.7
        assert (time.bubble > 0) == bool(settings)


def test_more_virtual_stages_shrink_the_bubble_and_keep_more():
    plain, interleaved = (
        plan("molmo2_8b/stage2.yaml", "h100", 4, 8, "parallel.pipeline=2", f"parallel.virtual_pipeline={virtual}")
        for virtual in (1, 2)
    )
    assert interleaved.time.bubble < plain.time.bubble
    assert sum(interleaved.memory[0].activations.values()) > sum(plain.memory[0].activations.values())


def test_backward_hides_reductions_but_for_the_last_bucket_of_the_first_stage():
    during, after = (
        plan("molmo2_4b/stage2.yaml", "h100", 4, 8, f"parallel.overlap_grad_reduce={overlap}").time
        for overlap in ("null", "false")
    )
    assert 0 < during.reduce < after.reduce and during.stages == after.stages
    stages = [plan_time.StageTime(0, busy, 0, 0, 0) for busy in (6.0, 9.0)]  # four seconds of backward pass, and six
    assert plan_time._hidden([3, 0.5, 0.25], stages[:1]) == 3.5
    assert plan_time._hidden([3, 2, 1], stages[:1]) == 4
    assert plan_time._hidden([3], stages) == 3 and plan_time._hidden([5], stages) == 4


def test_recompute_trades_time_for_memory():
    kinds = [plan("molmo2_4b/stage2.yaml", "h200", 4, 8, f"train.recompute={kind}") for kind in sweep.RECOMPUTE]
    assert [p.peak for p in kinds] == sorted((p.peak for p in kinds), reverse=True)
    assert [p.time.total for p in kinds] == sorted(p.time.total for p in kinds)


def test_remedy_fits_and_changes_one_setting_where_one_is_enough():
    found = plan("molmo2_8b/stage3.yaml", "a100-40", 8, 8, "train.recompute=none")
    assert not found.fits
    change = sweep.remedy(found)
    assert change is not None and change.plan.fits
    assert change.plan.config == sweep.changed(found.config, change.settings)
    assert len(change.settings) == 1
    impossible = dataclasses.replace(found.cluster.gpu, memory=8 * hardware.GIB)
    found = dataclasses.replace(found, cluster=dataclasses.replace(found.cluster, gpu=impossible))
    assert sweep.remedy(found) is None


def test_ranking():
    found = plan("qwen3_0.6b/stage1.yaml", "a100-40", 1, 4)
    changes = sweep.ranked(found)
    fitting = [change for change in changes if change.plan.fits]
    assert changes[: len(fitting)] == fitting
    times = [change.plan.time.total for change in fitting]
    assert times == sorted(times) and times[0] <= found.time.total
    assert len({change.words for change in changes}) == len(changes)
    for change in changes:
        assert change.plan.layout.world == 4


def test_fp8_takes_less_time_for_the_products_of_its_layers_and_some_for_its_casts():
    """Every product of a layer is bound by arithmetic here; by hand from the sizes of Molmo2-4B and an H100's sheet."""
    common = ("train.recompute=none", "parallel.tensor=1", "parallel.sequence=false", "parallel.context=1")
    bf16 = plan("molmo2_4b/stage2.yaml", "h100", 1, 8, *common)
    fp8 = plan("molmo2_4b/stage2.yaml", "h100", 1, 8, *common, "train.precision=fp8")
    rows = 16_384 * bf16.config.train.micro_batch
    hidden, heads, mlp = 2560, 32 * 128, 9728
    qkv = heads + 2 * 8 * 128
    flops = 3 * 2 * rows * (hidden * qkv + heads * hidden + 3 * hidden * mlp)
    cast = 2 * rows * ((hidden + heads + hidden + mlp) + (qkv + hidden + 2 * mlp + hidden))
    saved = flops * (1 / 989e12 - 1 / 1979e12) / 0.65 - 3 * cast / (3350e9 * 0.75)
    (before,), (after,) = bf16.time.stages, fp8.time.stages
    assert before.language - after.language == pytest.approx((36 - 2) * saved, rel=1e-6)
    assert before.vision == after.vision
    every = plan("molmo2_4b/stage2.yaml", "h100", 1, 8, *common, "train.precision=fp8", "fp8.recipe=delayed",
                 "fp8.first_layers_bf16=0", "fp8.last_layers_bf16=0")  # fmt: skip
    assert before.language - every.time.stages[0].language == pytest.approx(
        36 * (saved + cast / (3350e9 * 0.75)), rel=1e-6
    )
    with pytest.raises(ValueError, match="a100-80 has no FP8"):
        plan("molmo2_4b/stage2.yaml", "a100-80", 1, 8, *common, "train.precision=fp8")


def test_balanced_stages_are_faster():
    found = plan("molmo2_8b/stage2.yaml", "h100", 4, 8, "parallel.pipeline=2")
    counts = sweep.pipeline_layers(found)
    assert counts is not None and sum(counts) == 36 and counts[0] < 18
    better = plan("molmo2_8b/stage2.yaml", "h100", 4, 8, "parallel.pipeline=2",
                  f"parallel.pipeline_layers={list(counts)}")  # fmt: skip
    assert better.time.total < found.time.total
    assert sweep.pipeline_layers(plan("molmo2_4b/stage1.yaml")) is None


@pytest.mark.parametrize("recipe", ["tiny/stage2.yaml", "molmo2_8b/stage3.yaml"])
def test_report(recipe):
    found = plan(recipe, "h100", 4 if "molmo2" in recipe else 1, 8 if "molmo2" in recipe else 2)
    content = json.loads(json.dumps(report.data(found)))
    assert content["peak_bytes"] == max(stage["peak_bytes"] for stage in content["stages"])
    for stage, memory in zip(content["stages"], found.memory, strict=True):
        parts = [stage[name] for name in ("parameter_bytes", "gradient_bytes", "optimizer_bytes", "working_bytes",
                                          "buffer_bytes")]  # fmt: skip
        assert sum(parts) + sum(stage["activation_bytes"].values()) == memory.peak
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    report.page(found, console)
    text = console.export_text()
    assert f"{found.peak / hardware.GIB:.2f}" in text and f"MFU {found.time.mfu:.1%}" in text
    moved = [line.split() for line in text.partition("Moved in a step")[2].splitlines()]
    for talk in found.talks(0):
        if (size := talk.count * talk.size) >= 1_000_000:
            ends = [f"{talk.count:,}", f"{size / hardware.GIB:.2f}"]
            assert any(words[-2:] == ends and talk.kind in words for words in moved), talk


def test_imbalance_is_that_of_the_fullest_rank():
    found = plan("molmo2_4b/stage3.yaml", "h100", 2, 8)
    found = dataclasses.replace(found, row=dataclasses.replace(found.row, crops=found.layout.crop_ranks + 1))
    load = workload.load(found.row, found.config, found.layout)
    mean = found.config.train.micro_batch * found.row.crops / found.layout.crop_ranks
    assert found.imbalance == pytest.approx(load.crops / mean) and found.imbalance > 1.2


#: Cluster that each recipe names in its comments.
CLUSTERS = [
    *((f"molmo2_4b/stage{n}.yaml", "h100", 2, 8) for n in (1, 2, 3)),
    *((f"molmo2_8b/stage{n}.yaml", "h100", 2, 8) for n in (1, 2, 3)),
    *((f"qwen3_0.6b/stage{n}.yaml", "a100-40", 1, 4) for n in (1, 2, 3)),
]


@pytest.mark.parametrize("recipe, gpu, nodes, per_node", CLUSTERS)
@pytest.mark.parametrize("video", [False, True])
def test_recipes_fit_where_they_say(recipe, gpu, nodes, per_node, video):
    config = load.load(ROOT / "examples" / "recipes" / recipe)
    cluster = hardware.Cluster(hardware.find(gpu), nodes, per_node)
    found = sweep.plan(config, cluster, workload.assume(config, video=video))
    assert found.fits, f"{found.peak / hardware.GIB:.1f} of {cluster.usable / hardware.GIB:.1f} GiB"
