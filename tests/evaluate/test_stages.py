"""A model on several ranks says what one process says: tensor parallel, pipeline stages, from one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vlm.evaluate.sampling import Sampling
from megatron_vlm.parallel.layout import Layout
from tests.evaluate.test_decode import ARCH, TOKENIZER, prompts
from tests.model import tiny

#: A tied table is the head of another stage in a pipeline.
ARCHS = {"own head": ARCH, "tied head": tiny.TIED}


def answers(name: str, tensor: int, pipeline: int, folder: Path, save: bool = False) -> list[Any]:
    """Runs on every rank: greedy answers, drawn ones, and what was told. save: with new weights, which are kept."""
    from megatron_vlm.checkpoint import load
    from megatron_vlm.checkpoint import save as saving
    from megatron_vlm.evaluate.decode import decode
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups
    from tests.model.reference import randomize

    layout = Layout(dist.get_world_size(), tensor=tensor, pipeline=pipeline)
    groups.initialize(layout, seed=0, timeout_s=50)
    config = tiny.config(ARCHS[name], parallel={"tensor": tensor, "pipeline": pipeline})
    (model,) = build(config, layout)
    if save:
        randomize(model, 5)
        saving.save(folder, models=[model], optimizer=None, step=1, config=config, state={})
    else:
        load.load(folder, models=[model], config=config)
    told: list[tuple[int, int, int]] = []
    greedy = decode(model, prompts(), TOKENIZER, max_new_tokens=64, said=lambda *each: told.append(each))
    drawn = decode(model, prompts(), TOKENIZER, max_new_tokens=8, sampling=Sampling(1.0, 50, 0.9, 1.1, 3))
    return [greedy, drawn, told]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_tensor_parallel_ranks_and_stages_say_what_one_process_says(name, pool, tmp_path):
    found = pool(2).run(answers, name, 2, 1, tmp_path, True)
    found += pool(2).run(answers, name, 1, 2, tmp_path)
    if name == "tied head":
        found += pool(4).run(answers, name, 2, 2, tmp_path)
    (alone,) = pool(1).run(answers, name, 1, 1, tmp_path)
    assert all(each == alone for each in found)
    said = [token for prompt in alone[0] for answer in prompt for token in answer]
    assert len(said) > 200 and len(set(said)) > 20
