"""tools/preview.py: the row of training, drawn with the model's own mask rule."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.config import load, presets
from megatron_vlm.data.loader import Loader, Share
from tests.data import world
from tools import preview


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    world.build(folder)
    path = folder / "recipe.yaml"
    path.write_text(
        f"data: {{manifest: {folder}/shards, mixture: {folder}/mixture.yaml, tokenizer: {folder}, image_crops: 4,"
        " max_crops: 12, sequence_length: 512, window: 64}\n"
    )
    return path


def test_the_page_shows_the_row_of_training(recipe, tmp_path, capsys):
    preview.main([str(recipe), "--row", "2", "--context", "2", "--out", str(tmp_path)])
    assert "row.html" in capsys.readouterr().out
    page = (tmp_path / "row.html").read_text()
    step = preview.planned(load.load(recipe), 0, 2)
    assert all(key in page for key in step.keys) and step.samples > 1
    assert page.count('alt="crop ') == step.crops and f"{step.crops} of 12 crops" in page
    assert "256 to 511" in page and "http" not in page and "<script" not in page
    # The picture is the rule: a pixel for a place here, white where the query does not see the key.
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    examples = step.micro_batches[0].examples[0].numpy()
    seen = mask[..., 0].astype(int) + mask[..., 1] + mask[..., 2] < 3 * 245
    red = (mask == (0xD0, 0, 0)).all(-1)
    crossing = (examples[:, None] != examples[None]) & ~red
    assert not seen[crossing].any() and (seen & ~red).any()
    used = examples >= 0
    assert seen[np.arange(512), np.arange(512)][used].all()


@pytest.mark.parametrize("balance", [1, 3])
def test_rows_are_numbered_as_in_the_ledger(recipe, balance):
    config = load.load(recipe, ["data.window=64", f"data.balance_batches={balance}", "train.global_batch=8",
                                "train.micro_batch=1", "data.workers=0"])  # fmt: skip
    loader = Loader(config, presets.architecture(config.model), Share(crops=False))
    steps = [step for step, _ in zip(loader, range(9), strict=False)]
    loader.close()
    first = next(step for step in steps if step.window == 1)
    for step in (steps[0], steps[2], first, steps[-1]):
        shown = preview.planned(config, step.window, step.offset)
        assert shown.rows == step.rows[:1] and shown.keys == step.keys[: shown.samples]
    assert steps[-1].window > 0
    # Beyond a window's end comes the next one.
    length = next(step.offset + 8 - step.next_offset for step in steps if step.next_window == 1)
    assert preview.planned(config, 0, length + first.offset).rows == first.rows[:1]
    # As packed, rows stand elsewhere where they are balanced.
    numbers = [number for step in steps for number in step.rows]
    assert (numbers == sorted(numbers)) == (balance == 1)


def test_data_cannot_write_into_the_page(recipe):
    step = preview.planned(load.load(recipe), 0, 0)
    page = preview.Page(load.load(recipe), step, 1, 1)
    page._step = dataclasses.replace(step, keys=("<script>x</script>",) * step.samples)
    assert "<script>" not in page.html("x") and "&lt;script&gt;" in page.html("x")


@pytest.mark.parametrize(
    ("words", "said"), [(["--row", "-1"], "both count from 0"), (["--context", "0"], "needed 1 rank")]
)
def test_wrong_numbers_are_refused(recipe, tmp_path, words, said):
    with pytest.raises(SystemExit, match=said):
        preview.main([str(recipe), *words, "--out", str(tmp_path)])
