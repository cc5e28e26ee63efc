"""Rows to batches: what stands where, and which crops a rank reads."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from megatron_vlm.batch import PAD, PREFIX_BRANCH
from megatron_vlm.config.geometry import image_geometry
from megatron_vlm.data.collate import Collator, MicroBatch
from megatron_vlm.data.crops import cut, windows
from megatron_vlm.data.image import decode
from megatron_vlm.data.mixture import load
from megatron_vlm.data.order import MixtureOrder
from megatron_vlm.data.plan import Planner, padding_row
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tree import TreeSettings
from tests.data.world import ARCH, build, tokenizer

LENGTH, CROPS = 512, 12
GEOMETRY = image_geometry(ARCH, 4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def planner(world):
    shards, mixture = Shards(world / "shards"), load(world / "mixture.yaml")
    names = tuple(member.name for member in mixture.members)
    sizes = [shards.count(name, "train") for name in names]
    order = MixtureOrder(names, sizes, (0.6, 0.3, 0.1), 0)
    settings = TreeSettings(tokenizer(), GEOMETRY, "style_and_length", "uniform", LENGTH, CROPS, 0)
    return Planner(shards, "train", names, (None, 0.5, None), order, settings, ARCH, 64)


@pytest.fixture(scope="module")
def rows(planner):
    return planner.plan(0)


@pytest.fixture(scope="module")
def collator(planner):
    return Collator(planner.shards, GEOMETRY, LENGTH)


def test_fields_stand_where_batch_says(rows, collator):
    micro = MicroBatch((rows[0], rows[3], padding_row(77)), 0, 1, True)
    batch = collator(micro)
    shapes = {name: getattr(batch, name) for name in ("tokens", "targets", "loss_weights", "positions", "examples",
                                                      "branches", "is_vision", "sources")}  # fmt: skip
    assert all(tensor.shape == (3, LENGTH) for tensor in shapes.values())
    assert {name: tensor.dtype for name, tensor in shapes.items()} == {
        "tokens": torch.int64, "targets": torch.int64, "loss_weights": torch.float32, "positions": torch.int64,
        "examples": torch.int32, "branches": torch.int32, "is_vision": torch.bool, "sources": torch.int32,
    }  # fmt: skip
    assert batch.rows.tolist() == [rows[0].number, rows[3].number, 77]
    for place, row in enumerate(micro.rows):
        used = batch.examples[place] != PAD
        assert int(used.sum()) == row.tokens and used[: row.tokens].all()
        for name in ("positions", "branches", "sources"):
            assert (getattr(batch, name)[place][~used] == PAD).all()
        for name in ("tokens", "targets", "loss_weights", "is_vision"):
            assert not getattr(batch, name)[place][~used].any()
        for number, sample in enumerate(row.samples):
            mine = batch.examples[place] == number
            assert batch.tokens[place][mine].tolist() == sample.content.tokens.tolist()
            assert set(batch.sources[place][mine].tolist()) == {sample.source}
            assert batch.positions[place][mine][0] == 0 and batch.branches[place][mine][0] == PREFIX_BRANCH
    assert not batch.targets[batch.loss_weights == 0].any()


def test_windows_point_at_the_crops_of_their_image(rows, collator, planner):
    micro = MicroBatch(tuple(rows[:4]), 0, 1, True)
    batch = collator(micro)
    placeholders = int((batch.tokens == planner.settings.tokenizer.im_patch).sum())
    assert batch.windows.shape == (placeholders, 4) and batch.crop_counts == (len(batch.crops),)
    patches, first, seen = batch.crops.reshape(-1, batch.crops.shape[-1]).numpy(), 0, 0
    for row in micro.rows:
        for sample in row.samples:
            for media, layout in zip(sample.media, sample.content.layouts, strict=True):
                alone = cut(decode(planner.shards.media(media), name=media), layout, GEOMETRY).reshape(
                    -1, ARCH.vision.patch_values
                )
                table = windows(layout, GEOMETRY)
                found = batch.windows[first : first + len(table)].numpy()
                assert np.array_equal(found == PAD, table == PAD)
                assert np.array_equal(patches[found[found >= 0]], alone[table[table >= 0]])
                first, seen = first + len(table), seen + 1
    assert first == placeholders and seen > 5


@pytest.mark.parametrize("ranks", [2, 3, 7, 60])
def test_ranks_share_the_crops(rows, collator, ranks):
    whole = collator(MicroBatch(tuple(rows[:2]), 0, 1, True))
    parts = [collator(MicroBatch(tuple(rows[:2]), rank, ranks, True)) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.crops for part in parts]), whole.crops)
    assert all(part.crop_counts == tuple(len(part.crops) for part in parts) for part in parts)
    for part in parts:
        for field in dataclasses.fields(whole):
            if field.name not in ("crops", "crop_counts"):
                assert torch.equal(getattr(part, field.name), getattr(whole, field.name))


def test_later_stages_read_no_pixel(rows, planner):
    class NoMedia:
        def media(self, key):
            raise AssertionError("a pixel was read")

    batch = Collator(NoMedia(), GEOMETRY, LENGTH)(MicroBatch(tuple(rows[:2]), 0, 1, False))
    assert (
        batch.crops.shape == (0, ARCH.vision.patches, ARCH.vision.patch_values)
        and sum(batch.crop_counts) == rows[0].crops + rows[1].crops
    )
    assert len(batch.windows)


def test_rows_without_images(collator):
    batch = collator(MicroBatch((padding_row(0),), 1, 2, True))
    assert (
        batch.crops.shape == (0, ARCH.vision.patches, ARCH.vision.patch_values)
        and batch.crop_counts == (0, 0)
        and batch.windows.shape[0] == 0
    )


def test_rows_keep_their_budgets_and_hold_every_draw(planner, rows):
    assert all(row.tokens <= LENGTH and row.crops <= CROPS for row in rows)
    draws = planner.order.window(0, 64)
    keys = [f"{planner.sources[d.source]}/{planner.shards.example(planner.sources[d.source], 'train', d.place).key}"
            for d in draws]  # fmt: skip
    assert sorted(sample.key for row in rows for sample in row.samples) == sorted(keys)
    assert [row.number for row in rows] == list(range(len(rows)))
    flat = [sample for row in rows for sample in row.samples if sample.source == 1]
    assert all(set(sample.content.loss_weights.tolist()) == {0.0, 0.5} for sample in flat)


def test_an_image_that_does_not_decode_is_named(world, rows, tmp_path):
    shards = shutil.copytree(world / "shards", tmp_path / "shards")
    row = next(row for row in rows if row.crops)
    sample = next(sample for sample in row.samples if sample.media)
    opened = Shards(shards)
    at = opened._media_row(sample.media[0])
    tar = shards / opened.manifest["media"]["shards"][opened._media_shard[at]]
    data = bytearray(tar.read_bytes())
    start = int(opened._media_offset[at])
    data[start : start + int(opened._media_size[at])] = bytes(int(opened._media_size[at]))
    tar.write_bytes(data)
    with pytest.raises(ValueError, match=f"image {sample.media[0]} of sample {sample.key} has no readable header"):
        Collator(Shards(shards), GEOMETRY, LENGTH)(MicroBatch((row,), 0, 1, True))
