"""The numbers of examples/README.md are those that the recipes come to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vlm.config import load

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (EXAMPLES / "README.md").read_text().splitlines()
    if re.match(r"\| `[\w.]+` \d \|", line)
]


@pytest.mark.parametrize("cells", LINES, ids=[cells[0] for cells in LINES])
def test_a_line_of_the_table_is_its_recipe(cells: list[str]) -> None:
    name, stage = re.fullmatch(r"`([\w.]+)` (\d)", cells[0]).groups()
    config = load.load(EXAMPLES / "recipes" / name / f"stage{stage}.yaml")
    found = (config.train.steps, config.train.global_batch, config.data.sequence_length, config.data.max_crops)
    assert found == tuple(int(cell) for cell in cells[1:5])
    for component, cell in zip(("vision", "connector", "language"), cells[5:], strict=True):
        assert (cell == "frozen") == (component in config.model.freeze)
        assert cell == "frozen" or float(cell) == getattr(config.optim, component).lr


def test_every_recipe_with_three_stages_has_its_lines_and_the_8b_those_of_the_4b() -> None:
    told = {tuple(re.findall(r"[\w.]+", cells[0])) for cells in LINES}
    wanted = {(path.parent.name, path.stem[-1]) for path in EXAMPLES.glob("recipes/*/stage?.yaml")}
    assert {each for each in wanted if each[0] not in ("tiny_film", "molmo2_8b")} == told
    for stage in (1, 2, 3):
        small, large = (load.load(EXAMPLES / "recipes" / f"molmo2_{n}b" / f"stage{stage}.yaml") for n in (4, 8))
        assert (small.optim, small.train.steps, small.data.sequence_length, small.train.global_batch) == (
            large.optim,
            large.train.steps,
            large.data.sequence_length,
            large.train.global_batch,
        )


def test_the_two_recipes_differ_as_the_table_says() -> None:
    small, large = (
        [load.load(EXAMPLES / "recipes" / name / f"stage{stage}.yaml") for stage in (1, 2, 3)]
        for name in ("qwen3_0.6b", "molmo2_4b")
    )
    for config in small:
        assert ("vision" in config.model.freeze, config.model.connector, config.model.image_pool) == (True, "mlp", 1)
        assert (config.data.image_crops, config.optim.weight_decay) == (0, 0.01)
        assert (config.train.response_dropout, config.train.residual_dropout) == (0, 0)
    for config in large:
        assert ("vision" in config.model.freeze, config.data.image_crops, config.optim.weight_decay) == (False, 8, 0)
    assert [(c.train.response_dropout, c.train.residual_dropout) for c in large] == [(0.1, 0), (0, 0.1), (0, 0.1)]
    assert [c.data.loss_weighting for c in large] == ["uniform", "root_tokens", "root_tokens"]
