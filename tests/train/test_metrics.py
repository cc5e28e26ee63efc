"""What a step is said to hold and to cost, counted once more: token by token, pair by pair, operator by operator."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlm import cost
from megatron_vlm.batch import PAD
from megatron_vlm.config.presets import architecture
from megatron_vlm.model.mask import Places, marks, places, visible
from megatron_vlm.parallel.layout import Layout
from tests.data import world as data
from tests.model import tiny


def _attention(query: Any, key: Any, *others: Any, **options: Any) -> int:
    """Two products for each pair of query and key that is not masked, as torch's own formulas for other kernels."""
    heads, queries, size = query.shape[-3:]
    pairs = queries * key.shape[-2]
    mask = options.get("attn_mask")
    if heads == tiny.LANGUAGE.heads and mask is not None:
        pairs = int((mask == 0).sum())
    elif len(others) > 2 and others[2]:  # value, dropout, is_causal
        pairs = queries * (queries + 1) // 2
    return 4 * query.shape[0] * heads * size * pairs


_attention._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes


@pytest.mark.parametrize("connector", ["attention_pooling", "linear", "mlp"])  # whose windows `tiny` makes
def test_operations_are_those_that_torch_counts(one_rank, connector):
    from megatron_vlm.model.build import build
    from megatron_vlm.train.work import work_of

    config = tiny.config(tiny.ARCH)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, connector=connector))
    (model,) = build(config, Layout(1))
    arch = architecture(config.model)
    batch = tiny.batch(arch, [1, 2, 3])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={flash: _attention}) as counter:
        model.eval()(batch)
    flops = cost.forward(arch, work_of(batch))
    assert counter.get_total_flops() == flops.vision + flops.connector + flops.language


def test_pairs_are_those_that_the_mask_allows():
    from megatron_vlm.train.work import work_of

    for numbers in ([1], [2, 3], [4, 5, 6]):
        batch = tiny.batch(tiny.ARCH, numbers)
        counted = 0
        for row in marks(batch).unbind(1):
            found = places(row)
            counted += int(visible(Places(*(x[:, None] for x in found)), Places(*(x[None] for x in found))).sum())
        assert work_of(batch).pairs == counted > 0


def test_a_straggler_is_named_with_what_it_does():
    from megatron_vlm.train import stragglers
    from megatron_vlm.train.pulse import PHASES

    usual = dict.fromkeys(PHASES, 0.0) | {"forward": 2.0, "data": 0.1, "collective": 1.0, "memory_gb": 1.5}
    late = usual | {"data": 3.0, "collective": 0.0}
    assert stragglers.words([usual, usual, late, usual]) == "slowest: rank 2, data 3.0 s (median 0.1 s)"
    assert stragglers.words([usual, usual | {"collective": 9.0}]) == ""  # it waits
    told = stragglers.summary([usual | {"memory_gb": 2.5}, late])
    assert told["most_memory_gb"] == 2.5
    assert told["slowest"][0] == {"rank": 1, **late} and told["median_s"]["data"] == pytest.approx(1.55)


def test_memory_of_a_run_on_the_cpu_of_a_gpu_machine_is_that_of_the_process(one_rank, monkeypatch):
    from megatron_vlm.train import stragglers
    from megatron_vlm.train.pulse import Pulse

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    (mine,) = stragglers.gather(Pulse())
    assert mine["memory_gb"] > 0.1


def test_chosen_steps_are_traced(tmp_path, one_rank):
    from megatron_vlm.train.trace import traced

    for step in (1, 2):
        with traced(tmp_path, step, (2,)):
            torch.ones(2) + 1
    (file,) = (tmp_path / "profile").iterdir()
    events = json.loads(file.read_text())["traceEvents"]
    assert file.name == "step-0000002-rank-00000.json" and any(event.get("name") == "aten::add" for event in events)


def test_counters_of_a_step_are_those_of_its_batches(tmp_path):
    from megatron_vlm.data.loader import Loader, Share

    data.build(tmp_path, sizes={"captions": 12, "pointing": 6, "text": 4})
    config = data.config(tmp_path, sequence_length=192, max_crops=8, image_crops=2, window=32)
    placeholder = data.ARCH.token_id("<im_patch>")
    loader = Loader(config, data.ARCH, Share())
    try:
        batches = iter(loader)
        for _ in range(3):
            step = next(batches)
            places_, tokens, images, crops, samples = 0, 0, 0, 0, 0
            weight = 0.0
            for batch in step.micro_batches:
                places_ += batch.tokens.numel()
                tokens += int((batch.examples != PAD).sum())
                images += int((batch.tokens == placeholder).sum())
                crops += len(batch.crops)
                weight += float(batch.loss_weights.double().sum())
                samples += sum(len(row[row != PAD].unique()) for row in batch.examples)
            assert (step.tokens, step.useful_tokens, step.image_tokens) == (places_, tokens, images)
            assert (step.crops, step.samples) == (crops, samples) and images > 0
            assert step.global_loss_weight == pytest.approx(weight, rel=1e-6)
    finally:
        loader.close()


def test_speed_counts_what_is_computed_and_not_what_is_frozen(one_rank):
    from megatron_vlm.config.schema import Config, ModelConfig
    from megatron_vlm.train import metrics
    from megatron_vlm.train.step import Outcome

    work = cost.Work(100, 5000, 50, 2, 10, 40)
    config = Config(model=ModelConfig(freeze=("vision", "base_embeddings")))
    flops = cost.training(architecture(config.model), work, ("vision",))
    told = metrics.speed(config, Outcome(1.0, {}, 1.0, work), 2.0, 0.5)
    assert told == {"step_time_s": 2.0, "data_wait_s": 0.5, "model_flops_per_s": flops / 2, "mfu": None}
