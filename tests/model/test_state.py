"""Checkpoint names: the same for every layout, readable, every tensor written once."""

from __future__ import annotations

import pytest

from megatron_vlm.parallel.layout import Layout
from tests.model import tiny


def names(arch, layout, parallel) -> dict[str, str]:
    """Runs on every rank: kind of each entry by its checkpoint name, once Megatron has checked who writes what."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from megatron.core.dist_checkpointing.validation import (
        determine_global_metadata,
        validate_sharding_integrity,
    )

    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups

    groups.initialize(layout, timeout_s=50)
    models = build(tiny.config(arch, parallel=parallel), layout)
    state = {f"model{index}": model.sharded_state_dict() for index, model in enumerate(models)}
    apply_factories(state)
    validate_sharding_integrity(determine_global_metadata(state)[1])
    return {value.key: f"{type(value).__name__} {tuple(value.global_shape)}" for value in nested_values(state)}


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2, "sequence": True}, {}, {"context": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}],
    ids=["tp2_sp", "dp2", "cp2", "pp2", "pp2_vpp2"],
)
def test_names_do_not_depend_on_the_layout(pool, parallel):
    (alone,) = pool(1).run(names, tiny.TIED, Layout(1), {})
    layout = Layout(2, *(parallel.get(key, 1) for key in ("tensor", "context", "pipeline", "virtual_pipeline")))
    ranks = pool(2).run(names, tiny.TIED, layout, parallel)
    assert ranks[0] | ranks[1] == alone
    for name in ("vision.layers.2.mlp.linear_fc1.weight", "language.decoder.layers.3.mlp.linear_fc1.weight"):
        assert name in alone
    # A tied head has no entry of its own, and empty extra states are left out.
    assert not any("head" in name or "extra_state" in name for name in alone)
