"""The layout does not change the result: loss and per-module gradients of one step, against one process."""

from __future__ import annotations

from functools import cache

import pytest

from megatron_vlm.parallel.layout import Layout
from tests.model import layouts, tiny

FROZEN_VISION = {"freeze": ("vision", "base_embeddings")}
DROPOUT = {"residual_dropout": 0.2, "response_dropout": 0.5}
CASES = {
    "tp2_sp": (tiny.ARCH, {"tensor": 2, "sequence": True}, {}, 2),
    "tp2_sp_tied": (tiny.TIED, {"tensor": 2, "sequence": True}, {}, 2),
    "tp2_sp_qwen2_5": (tiny.QWEN2_5, {"tensor": 2, "sequence": True}, {}, 2),
    "tp2_sp_full_recompute_dropout": (
        tiny.TIED,
        {"tensor": 2, "sequence": True},
        {"recompute": "full", **FROZEN_VISION, **DROPOUT},
        2,
    ),
    # More ranks than key-value heads.
    "tp4_sp": (tiny.ARCH, {"tensor": 4, "sequence": True}, {}, 4),
    # Nothing to encode on any rank, no loss in the chunks of the later context rank.
    "tp2_cp2_sp_quiet": (tiny.ARCH, {"tensor": 2, "context": 2, "sequence": True}, {"quiet": "all"}, 4),
    "dp2": (tiny.ARCH, {}, {}, 2),
    "dp2_frozen_vision_dropout": (tiny.ARCH, {}, {**FROZEN_VISION, **DROPOUT}, 2),
    "dp2_images_on_one_rank": (tiny.ARCH, {}, {"quiet": "odd"}, 2),
    "cp2": (tiny.ARCH, {"context": 2}, {}, 2),
    "cp2_dropout": (tiny.ARCH, {"context": 2}, DROPOUT, 2),
    # More context ranks than heads, or than go round: keys and values gathered, alone and beside dealt heads.
    "cp3_dropout": (tiny.ARCH, {"context": 3}, DROPOUT, 3),
    "cp4_gather": (tiny.ARCH, {"context": 4, "context_method": "gather"}, {"recompute": "selective"}, 4),
    "cp3_ring_dropout": (tiny.ARCH, {"context": 3, "context_method": "ring"}, DROPOUT, 3),
    "tp2_cp2_sp_ring": (
        tiny.ARCH,
        {"tensor": 2, "context": 2, "sequence": True, "context_method": "ring"},
        {"recompute": "selective"},
        4,
    ),
    "cp8": (tiny.ARCH, {"context": 8}, {}, 8),
    "tp2_cp4_sp": (tiny.ARCH, {"tensor": 2, "context": 4, "sequence": True}, {}, 8),
    "tp4_cp2": (tiny.ARCH, {"tensor": 4, "context": 2}, {"recompute": "full"}, 8),
    "pp2": (tiny.ARCH, {"pipeline": 2}, {}, 2),
    "pp2_tied_uneven": (tiny.TIED, {"pipeline": 2, "pipeline_layers": (1, 3)}, {}, 2),
    "pp2_tied_frozen": (tiny.TIED, {"pipeline": 2}, FROZEN_VISION, 2),
    "pp2_vpp2_dropout": (
        tiny.TIED,
        {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": (1, 2, 0, 1)},
        DROPOUT,
        2,
    ),
    "tp2_vision": (tiny.ARCH, {"tensor": 2, "vision": "tensor"}, {}, 2),
    "tp2_cp2_sp_vision": (
        tiny.ARCH,
        {"tensor": 2, "context": 2, "sequence": True, "vision": "tensor"},
        {"recompute": "full"},
        4,
    ),
    "tp2_cp2_sp_selective": (
        tiny.TIED,
        {"tensor": 2, "context": 2, "sequence": True},
        {"recompute": "selective", **DROPOUT},
        4,
    ),
}
#: Where tower and connector have most to do with the layout, by what is trained and by connector.
ENCODER_LAYOUTS = {
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "cp2": {"context": 2},
    "tp2_cp2": {"tensor": 2, "context": 2},
    "tp2_vision": {"tensor": 2, "vision": "tensor"},
}
ENCODERS = {
    "frozen_tower": (tiny.ARCH, FROZEN_VISION),
    "connector_only": (tiny.ARCH, {"freeze": ("vision", "language", "base_embeddings")}),
    "linear": (tiny.connector("linear"), {}),
    "mlp": (tiny.connector("mlp"), {}),
    "resampler": (tiny.connector("resampler"), {}),
}
ENCODER_CASES = {
    f"{layout}_{name}": (arch, parallel, options, 4 if "cp2" in layout and "tp2" in layout else 2)
    for layout, parallel in ENCODER_LAYOUTS.items()
    for name, (arch, options) in ENCODERS.items()
}
CASES |= ENCODER_CASES

#: What the others cover between them.
SLOW = (
    *ENCODER_CASES,
    *("tp2_sp_tied", "tp2_sp_qwen2_5", "tp2_cp2_sp_quiet", "tp4_sp"),
    *("dp2_frozen_vision_dropout", "cp2", "pp2_tied_frozen", "cp4_gather", "cp8", "tp2_cp4_sp", "tp4_cp2"),
    *("cp3_ring_dropout", "tp2_cp2_sp_ring", "tp2_cp2_sp_vision"),
)


@pytest.mark.parametrize("case", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in CASES])
def test_one_step_equals_one_process(pool, case):
    arch, parallel, options, world = CASES[case]
    layout = Layout.of(tiny.config(arch, parallel=parallel), world)
    compare(pool, case, pool(world).run(layouts.step, arch, layout, parallel, options))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cp4_gather", "pp2_vpp2_dropout"])
def test_one_step_with_flex_attention_equals_one_process_without(pool, case):
    """A row's queries dealt to ranks, attention recomputed; several micro-batches in flight."""
    arch, parallel, options, world = CASES[case]
    layout = Layout.of(tiny.config(arch, parallel=parallel), world)
    compare(pool, case, pool(world).run(layouts.step_with_flex, arch, layout, parallel, options))


def compare(pool, case, ranks):
    """What the ranks of a case did against one process."""
    arch, _, options, _ = CASES[case]
    # The reference neither recomputes nor shards.
    alone = reference(pool, arch, tuple(sorted((k, v) for k, v in options.items() if k != "recompute")))
    weights = layouts.assemble(ranks, "weights")
    expected = layouts.assemble([alone], "weights")
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in weights)
    loss = sum(rank["loss"] for rank in ranks)
    assert loss == pytest.approx(alone["loss"], rel=1e-5)
    found, expected = (layouts.assemble(x, "gradients") for x in (ranks, [alone]))
    difference, module = layouts.worst(found, expected)
    print(f"{case}: loss {abs(loss / alone['loss'] - 1):.1e}, gradients {difference:.1e} ({module})")
    assert difference < 1e-5, module


def logits(arch, layout, parallel):
    """Logits at some places of two packed rows, on every rank."""
    import torch
    import torch.distributed as dist

    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups

    groups.initialize(layout, timeout_s=50)
    (model,) = build(tiny.config(arch, parallel=parallel), layout)
    batch = tiny.batch(arch, [0, 1], layout.crop_rank(dist.get_rank()), layout.crop_ranks)
    with torch.no_grad():
        return model.eval()(batch, logits_at=torch.tensor([150, 3, 60, 100, 95]))


def test_logits_at_chosen_places(pool):
    (expected,) = pool(1).run(logits, tiny.TIED, Layout(1), {})
    assert expected.shape == (5, tiny.LANGUAGE.vocab_size)
    assert expected.dtype.is_floating_point and expected.abs().max() > 0.01
    parallel = {"tensor": 2, "context": 2, "sequence": True}
    for found in pool(4).run(logits, tiny.TIED, Layout(4, tensor=2, context=2), parallel):
        assert (found - expected).abs().max() < 1e-6


@cache
def reference(pool, arch, options):
    (alone,) = pool(1).run(layouts.step, arch, Layout(1), {}, dict(options))
    return alone
