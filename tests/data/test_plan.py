"""A window is planned with the texts of many samples encoded together: they are what each sample gives alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.loader import Loader, Share
from megatron_vlm.data.pack import pack
from megatron_vlm.data.plan import ROWS_PER_WINDOW, Planner
from megatron_vlm.data.tree import TokenizedExample, tokenize
from tests.data.damage import spoil_record
from tests.data.world import ARCH, build, config


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    build(tmp_path, sizes={"captions": 12, "pointing": 8, "text": 6, "videos": 2})
    mixture = (tmp_path / "mixture.yaml").read_text().replace("[text]", "[{name: text, weight: 0.2}, videos]")
    (tmp_path / "mixture.yaml").write_text(mixture)
    loader = Loader(config(tmp_path), ARCH, Share())
    loader.close()
    return loader._planner


def arrays(content: TokenizedExample) -> list[tuple[str, bytes]]:
    found = [getattr(content, field.name) for field in dataclasses.fields(content)]
    return [(str(one.dtype), one.tobytes()) if isinstance(one, np.ndarray) else (repr(one), b"") for one in found]


def test_samples_encoded_together_are_those_of_each_alone(planner: Planner) -> None:
    draws = planner.order.window(7, 300)
    for draw, sample in zip(draws, planner._samples(draws), strict=True):
        source = planner.sources[draw.source]
        example = planner.shards.example(source, "train", draw.place)
        alone = tokenize(example, source, draw.visit, planner.settings, planner.flat_weights[draw.source])
        assert sample.key == f"{source}/{example.key}" and arrays(sample.content) == arrays(alone)
    assert {planner.sources[draw.source] for draw in draws} == {"captions", "pointing", "text", "videos"}


def test_rows_come_in_a_random_order(planner: Planner) -> None:
    """Packed, the first rows hold the largest samples."""
    samples = planner._samples(planner.order.window(3, planner.length))
    packed = pack([len(sample.content.tokens) for sample in samples], [sample.content.crops for sample in samples],
                  planner.settings.max_tokens, planner.settings.max_crops)  # fmt: skip
    keys = [tuple(samples[place].key for place in row) for row in packed]
    found = [tuple(sample.key for sample in row.samples) for row in planner.plan(3)]
    assert sorted(found) == sorted(keys) and found != keys
    assert [row.number for row in planner.plan(3)] == [3 * ROWS_PER_WINDOW + place for place in range(len(keys))]


def test_a_damaged_sample_leaves_its_neighbours_alone(planner: Planner) -> None:
    draws = planner.order.window(0, 100)
    sound = planner._samples(draws)
    spoil_record(planner.shards.directory, "text", "train", "text-3")
    reopened = dataclasses.replace(planner, shards=type(planner.shards)(planner.shards.directory))
    with pytest.raises(ValueError, match="sample text/text-3 .*checksum"):
        reopened._samples(draws)
    found = dataclasses.replace(reopened, skips=True)._samples(draws)
    for before, after in zip(sound, found, strict=True):
        assert before.key == after.key
        if before.key == "text/text-3":
            assert after.fault is not None and not len(after.content.tokens)
        else:
            assert after.fault is None and arrays(after.content) == arrays(before.content)
    assert any(sample.fault for sample in found)
