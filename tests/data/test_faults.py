"""Samples that cannot be loaded: named and stopped at, or counted, named and silenced while all others stay."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.data.faults import Fault
from megatron_vlm.data.loader import Loader, Share, Step
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.unpacked import UnpackedLoader
from tests.data.damage import blank_media, spoil_record
from tests.data.test_loader import FIELDS, ledger
from tests.data.world import ARCH, build, config

STEPS = 5


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def damaged(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The same world where some samples of the first steps lost an image, two of them the first or the last of two;
    key -> file."""
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("damaged") / "world")
    drawn = {sample.key: sample for step in steps(config(sound)) for planned in step.planned
             for row in planned.rows for sample in row.samples if sample.media}  # fmt: skip
    first, last = [sample for sample in drawn.values() if len(sample.media) == 2][:2]
    others = [sample for sample in list(drawn.values())[:28:7] if sample is not first]
    chosen = {sample.key: sample for sample in [last, *others]}
    assert len(chosen) >= 3
    bad = {key: blank_media(folder / "shards", sample.media[-1]) for key, sample in chosen.items()}
    return folder, bad | {first.key: blank_media(folder / "shards", first.media[0])}


def skipping(folder: Path, **data: object) -> Config:
    return config(folder, **{"bad_samples": "skip"} | data)


def steps(settings: Config, share: Share | None = None, count: int = STEPS, kind: type[Loader] = Loader) -> list[Step]:
    loader = kind(settings, ARCH, share or Share())
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def agreed(ranks: list[list[Step]]) -> list[list[Step]]:
    """What the ranks train on, as train/faults.py makes it of their steps."""
    return [[step.without(fault for other in same for fault in other.skipped) for step in same]
            for same in zip(*ranks, strict=True)]  # fmt: skip


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_only_the_bad_samples_change(sound: Path, damaged: tuple[Path, dict[str, str]], workers: int) -> None:
    folder, bad = damaged
    found, wanted = steps(skipping(folder, workers=workers)), steps(config(sound))
    seen = set()
    for step, whole in zip(found, wanted, strict=True):
        assert (step.rows, step.keys, step.keys_hash, step.tokens, step.crops, step.samples) == (
            whole.rows, whole.keys, whole.keys_hash, whole.tokens, whole.crops, whole.samples
        )  # fmt: skip
        assert [fault.sample for fault in step.skipped] == [key for key in step.keys if key in bad]
        seen |= {fault.sample for fault in step.skipped}
        for fault in step.skipped:
            assert fault.file == bad[fault.sample] and "has no readable header" in fault.reason
        lost = sum(weight for key, weight in zip(step.keys, step.weights, strict=True) if key in bad)
        assert step.global_loss_weight == pytest.approx(whole.global_loss_weight - lost)
        for batch, before, planned in zip(step.micro_batches, whole.micro_batches, step.planned, strict=True):
            silent, first = torch.zeros(batch.tokens.shape, dtype=torch.bool), 0
            for place, row in enumerate(planned.rows):
                for number, sample in enumerate(row.samples):
                    mine = batch.crops[first : first + sample.content.crops]
                    if sample.key in bad:
                        silent[place] |= batch.examples[place] == number
                        assert not mine.any()
                    else:
                        assert torch.equal(mine, before.crops[first : first + sample.content.crops])
                    first += sample.content.crops
            for name in (*FIELDS, "windows", "rows"):
                now, then = getattr(batch, name), getattr(before, name)
                if name in ("loss_weights", "targets"):
                    assert not now[silent].any() and torch.equal(now[~silent], then[~silent])
                else:
                    assert torch.equal(now, then)
        assert step.loss_weight == pytest.approx(sum(float(b.loss_weights.sum()) for b in step.micro_batches))
    assert seen == set(bad), "every damaged sample was drawn"
    assert not any(step.skipped for step in steps(skipping(sound)))


@pytest.mark.parametrize(("data_ranks", "crop_ranks"), [(1, 3), (4, 1), (2, 2)])
def test_ranks_agree(damaged: tuple[Path, dict[str, str]], data_ranks: int, crop_ranks: int) -> None:
    """Each rank reads other crops, so each knows of other failures."""
    folder = damaged[0]
    alone = steps(skipping(folder))
    shares = [Share(data, data_ranks, crop, crop_ranks) for data in range(data_ranks) for crop in range(crop_ranks)]
    parts = [steps(skipping(folder), share) for share in shares]
    assert any(len({step.skipped for step in same}) > 1 for same in zip(*parts, strict=True))
    for step, ranks in zip(alone, agreed(parts), strict=True):
        assert {rank.skipped for rank in ranks} == {step.skipped}
        assert {rank.global_loss_weight for rank in ranks} == {step.global_loss_weight}
        assert sum(rank.loss_weight for rank in ranks[::crop_ranks]) == pytest.approx(step.global_loss_weight)
        rows = {int(number): (batch.loss_weights[place], batch.targets[place])
                for batch in step.micro_batches for place, number in enumerate(batch.rows)}  # fmt: skip
        for start in range(0, len(ranks), crop_ranks):
            replica = ranks[start : start + crop_ranks]
            for batches in zip(*(rank.micro_batches for rank in replica), strict=True):
                for batch in batches:
                    for place, number in enumerate(batch.rows):
                        assert torch.equal(batch.loss_weights[place], rows[int(number)][0])
                        assert torch.equal(batch.targets[place], rows[int(number)][1])
                crops, first = torch.cat([batch.crops for batch in batches]), 0
                planned = next(p for p in replica[0].planned if [r.number for r in p.rows] == batches[0].rows.tolist())
                for sample in (sample for row in planned.rows for sample in row.samples):
                    if sample.key in damaged[1]:
                        assert not crops[first : first + sample.content.crops].any()
                    first += sample.content.crops


def test_a_rank_without_crops_is_told(damaged: tuple[Path, dict[str, str]]) -> None:
    folder = damaged[0]
    first, later = steps(skipping(folder)), steps(skipping(folder), Share(crops=False))
    assert not any(step.skipped for step in later) and any(step.skipped for step in first)
    for step, (same, told) in zip(first, agreed([first, later]), strict=True):
        assert told.skipped == same.skipped == step.skipped
        for batch, other in zip(step.micro_batches, told.micro_batches, strict=True):
            assert torch.equal(batch.loss_weights, other.loss_weights) and other.crops.shape[0] == 0


def test_a_damaged_record_leaves_a_hole(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "world")
    bad: dict[str, str] = {}
    for key in (key for step in steps(config(sound)) for key in step.keys):
        dataset, _, name = key.partition("/")
        if dataset != "pointing" and not any(one.startswith(dataset) for one in bad):
            bad[key] = spoil_record(folder / "shards", dataset, "train", name)
    assert len(bad) == 2
    found = steps(skipping(folder), count=8)
    skipped = {fault.sample: fault for step in found for fault in step.skipped}
    assert {key: fault.file for key, fault in skipped.items()} == bad
    for fault in skipped.values():
        assert fault.place == f"sample {fault.sample.rpartition('-')[2]}"
        assert "does not fit its checksum" in fault.reason
    for step in found:
        held = sum(int((batch.examples >= 0).sum()) for batch in step.micro_batches)
        assert step.useful_tokens == held and set(bad) & set(step.keys) == {fault.sample for fault in step.skipped}

    # The same draws as without the damage, window by window.
    def keys(settings: Config) -> dict[int, list[str]]:
        windows: dict[int, list[str]] = {}
        for step in steps(settings, count=8):
            for planned in step.planned:
                for row in planned.rows:
                    windows.setdefault(row.number >> 24, []).extend(sample.key for sample in row.samples)
        return {window: sorted(drawn) for window, drawn in windows.items()}

    before, after = keys(config(sound)), keys(skipping(folder))
    assert before[0] == after[0] and set(bad) <= set(after[0])
    assert ledger(found) == ledger(steps(skipping(folder), Share(1, 2), count=8))


@pytest.mark.parametrize("kind", [Loader, UnpackedLoader])
def test_a_stream_goes_on_with_the_same_gaps(damaged: tuple[Path, dict[str, str]], kind: type[Loader]) -> None:
    settings = skipping(damaged[0])
    whole = steps(settings, count=8, kind=kind)
    loader = kind(settings, ARCH, Share())
    for _ in itertools.islice(loader, 3):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    again = kind(settings, ARCH, Share(), state=state)
    found = list(itertools.islice(again, 5))
    again.close()
    assert ledger(found) == ledger(whole[3:])
    assert [step.skipped for step in found] == [step.skipped for step in whole[3:]] and any(s.skipped for s in found)
    for step, same in zip(found, whole[3:], strict=True):
        for batch, other in zip(step.micro_batches, same.micro_batches, strict=True):
            assert torch.equal(batch.loss_weights, other.loss_weights) and torch.equal(batch.crops, other.crops)


def test_a_fault_does_not_depend_on_which_rank_saw_which(damaged: tuple[Path, dict[str, str]]) -> None:
    step = next(step for step in steps(skipping(damaged[0])) if step.skipped)
    fault = step.skipped[0]
    others = [Fault(fault.sample, f"media/{number:06d}.tar", "somewhere", "x") for number in range(100, 0, -1)]
    assert step.without(others).skipped == step.without(others[::-1]).skipped
    assert step.without(others).skipped[0] == min(fault, *others)


def cut_after_opening(folder: Path) -> str:
    for tar in (folder / "media").glob("*.tar"):
        os.truncate(tar, 600)
    return "it was cut or changed after opening"


def blank(folder: Path) -> str:
    shards = Shards(folder)
    for index in range(shards.count("captions", "train")):
        for media in shards.example("captions", "train", index).media:
            blank_media(folder, media.key)
    return "has no readable header"


@pytest.mark.parametrize(
    ("damage", "workers"), [(cut_after_opening, 0), (blank, 0), pytest.param(blank, 1, marks=pytest.mark.slow)]
)
def test_stop_names_data_set_key_shard_and_offset(
    sound: Path, tmp_path: Path, damage: Callable[[Path], str], workers: int
) -> None:
    folder = shutil.copytree(sound, tmp_path / "world")
    loader = Loader(config(folder, workers=workers), ARCH, Share())
    words = damage(folder / "shards")
    with pytest.raises(
        ValueError,
        match=rf"sample (captions|pointing)/\w+-\d+ \(media/\d+.tar, \d+ bytes at offset \d+\): .*{words}"
        ".*data.bad_samples=skip",
    ):
        next(iter(loader))
    loader.close()


@pytest.mark.slow
def test_a_worker_that_ends_is_told(sound: Path, tmp_path: Path) -> None:
    """Here it cannot open the shards; it could also be killed by a decoder, or for its memory."""
    folder = shutil.copytree(sound, tmp_path / "world")
    loader = Loader(skipping(folder, workers=1), ARCH, Share())
    cut_after_opening(folder / "shards")
    with pytest.raises(ValueError, match=r"a decoding process ended while it made rows \d+, \d+ or the next ones"):
        next(iter(loader))
    loader.close()


def test_stop_names_a_damaged_record(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "world")
    for number in range(20):
        spoil_record(folder / "shards", "text", "train", f"text-{number}")
    words = r"sample text/text-(\d+) \(samples/text.train.arrow, sample \1\): .*does not fit its checksum"
    with pytest.raises(ValueError, match=words):
        steps(config(folder), count=1)


def test_what_has_no_place_in_a_row_is_counted_and_named(sound: Path) -> None:
    """Text longer than the row is cut, branches beyond it and images beyond data.max_images are left out."""
    whole = steps(config(sound))
    assert not any(step.cut_tokens or step.dropped_branches or step.dropped_images or step.cut for step in whole)
    short = steps(skipping(sound, sequence_length=64, image_crops=0, max_images=1), count=12)
    assert any(step.cut_tokens for step in short) and any(step.dropped_images for step in short)
    for step in short:
        contents = {sample.key: sample.content for p in step.planned for row in p.rows for sample in row.samples}
        cut = {key for key, one in contents.items() if one.cut_tokens or one.dropped_branches or one.dropped_images}
        assert set(step.cut) == cut
        assert step.useful_tokens == sum(len(s.content.tokens) for p in step.planned for r in p.rows for s in r.samples)
        assert step.cut_tokens == sum(s.content.cut_tokens for p in step.planned for r in p.rows for s in r.samples)
