"""The loader: the same rows for every layout and number of workers, exact resume, finite evaluation."""

import dataclasses
import itertools
import json
import time
from types import SimpleNamespace

import pytest
import torch

from megatron_vlm.config import geometry, rules
from megatron_vlm.data import identity
from megatron_vlm.data.loader import Loader, Share, Step
from megatron_vlm.data.unpacked import UnpackedLoader
from tests.data.world import ARCH, build, config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder


def steps(config, count: int | None, share: Share | None = None, **options) -> list[Step]:
    loader = Loader(config, ARCH, share or Share(), **options)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


FIELDS = ("tokens", "targets", "loss_weights", "positions", "examples", "branches", "is_vision", "sources")


def rows_of(step: Step) -> dict[int, tuple]:
    """Every row of a step with all it holds, its own crops and windows among them."""
    found = {}
    for batch in step.micro_batches:
        patches = batch.crops.shape[1]
        first_crop = first_window = 0
        for place, number in enumerate(batch.rows.tolist()):
            count = int((batch.tokens[place] == 2050).sum())
            table = batch.windows[first_window : first_window + count]
            crops = (int(table.max()) // patches + 1 - first_crop) if count else 0
            table = torch.where(table >= 0, table - first_crop * patches, table)
            pixels = batch.crops[first_crop : first_crop + crops]
            arrays = [getattr(batch, name)[place] for name in FIELDS]
            found[number] = tuple(tensor.numpy().tobytes() for tensor in (*arrays, table, pixels))
            first_crop, first_window = first_crop + crops, first_window + count
    return found


def ledger(found: list[Step]) -> list[tuple]:
    return [(s.window, s.offset, s.next_window, s.next_offset, s.rows, s.keys, s.keys_hash, s.crops, s.useful_tokens,
             s.image_tokens, s.samples, s.global_loss_weight) for s in found]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [
        (2, 0),
        (4, 0),
        (1, 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 1), (4, 1), (8, 0), (1, 3))),
    ],
)
def test_rows_do_not_depend_on_layout_or_workers(folder, ranks, workers):
    one = {"micro_batch": 1}
    reference = steps(config(folder, train=one), 7)
    assert len({step.window for step in reference}) > 1, "the steps must cross windows"
    expected = [rows_of(step) for step in reference]
    found = [steps(config(folder, train=one, workers=workers), 7, Share(rank, ranks)) for rank in range(ranks)]
    for rank in found:
        assert ledger(rank) == ledger(reference)
    for number, wanted in enumerate(expected):
        parts = [rows_of(rank[number]) for rank in found]
        assert {row: content for part in parts for row, content in part.items()} == wanted
        assert sum(len(part) for part in parts) == len(wanted) == 8
        assert sum(rank[number].loss_weight for rank in found) == pytest.approx(reference[number].global_loss_weight)


def test_any_window_is_planned_without_the_earlier_ones(folder):
    loader = Loader(config(folder), ARCH, Share())
    began = time.process_time()
    rows = loader._planner.plan(1_000_000)
    assert time.process_time() - began < 2
    loader.close()
    far = loader.state_dict() | {"window": 1_000_000, "offset": 0}
    assert [s.key for row in rows[:8] for s in row.samples] == list(steps(config(folder), 1, state=far)[0].keys)


def test_counts_are_true(folder):
    for step in steps(config(folder), 3):
        batches = step.micro_batches
        assert [batch.tokens.shape for batch in batches] == [(2, 512)] * 4 and step.tokens == 8 * 512
        assert step.useful_tokens == sum(int((batch.examples >= 0).sum()) for batch in batches)
        assert step.crops == sum(len(batch.crops) for batch in batches)
        assert step.image_tokens == sum(len(batch.windows) for batch in batches)
        assert step.samples == len(step.keys) == sum(int(row.max()) + 1 for b in batches for row in b.examples)
        assert step.loss_weight == pytest.approx(sum(float(batch.loss_weights.sum()) for batch in batches))


def test_resume_gives_the_same_stream(folder):
    reference = steps(config(folder), 9)
    for stop in (1, 4, 5):
        loader = Loader(config(folder), ARCH, Share())
        for _ in itertools.islice(loader, stop):
            pass
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        again = steps(config(folder), 9 - stop, state=state)
        assert ledger(again) == ledger(reference[stop:])
        assert ledger(steps(config(folder), 9 - stop, Share(1, 2), state=state)) == ledger(again), "another DP size"
        assert [rows_of(step) for step in again] == [rows_of(step) for step in reference[stop:]]


def test_unpacked_steps_hold_the_samples_of_the_packed_ones_a_row_each(folder):
    loader = UnpackedLoader(config(folder), ARCH, Share())
    for step, packed in zip(loader, steps(config(folder), 3), strict=False):
        assert step.keys == packed.keys and step.global_loss_weight == packed.global_loss_weight
        held = [[sample.key for sample in row.samples] for micro in step.planned for row in micro.rows]
        assert sorted(key for row in held for key in row) == sorted(step.keys) and max(map(len, held)) == 1
        assert len(held) % 2 == 0 and len(held) - len(step.keys) < 2
    loader.close()


def test_a_stream_goes_on_in_the_same_loader(folder):
    loader = Loader(config(folder), ARCH, Share())
    first = list(itertools.islice(loader, 2)) + list(itertools.islice(loader, 2))
    loader.close()
    assert ledger(first) == ledger(steps(config(folder), 4))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"sequence_length": 640}, "sequence_length was 512 and is now 640"),
        ({"prompts": "style"}, "prompts was 'style_and_length' and is now 'style'"),
        ({"window": 32}, "window was 64 and is now 32"),
        ({"max_crops": 16}, "max_crops was 12 and is now 16"),
        ({"image_crops": 3}, "image_crops was 4 and is now 3"),
        ({"max_images": 2}, "max_images was 5 and is now 2"),
        ({"multi_image_crops": 1}, "multi_image_crops was 0 and is now 1"),
        ({"loss_weighting": "root_tokens"}, "loss_weighting was 'uniform' and is now 'root_tokens'"),
    ],
)
def test_other_settings_do_not_resume(folder, change, complaint):
    loader = Loader(config(folder), ARCH, Share())
    state = loader.state_dict()
    loader.close()
    with pytest.raises(ValueError, match=complaint):
        Loader(config(folder, **change), ARCH, Share(), state=state)


def test_other_files_do_not_resume(folder, tmp_path):
    loader = Loader(config(folder), ARCH, Share())
    state = loader.state_dict()
    loader.close()
    build(tmp_path, seed=1)
    with pytest.raises(ValueError, match="manifest was '.*' and is now '"):
        Loader(config(folder, manifest=str(tmp_path / "shards")), ARCH, Share(), state=state)
    text = (folder / "mixture.yaml").read_text()
    (tmp_path / "mixture.yaml").write_text(text.replace("0.6", "0.5"))
    with pytest.raises(ValueError, match="mixture was '.*' and is now '"):
        Loader(config(folder, mixture=str(tmp_path / "mixture.yaml")), ARCH, Share(), state=state)
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(ValueError, match="tokenizer was '.*' and is now '"):
        Loader(config(folder, tokenizer=str(tmp_path)), ARCH, Share(), state=state)


def test_other_files_and_settings_are_accepted_by_name_from_the_next_window_on(folder, tmp_path):
    loader = Loader(config(folder), ARCH, Share())
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    assert (state["window"], state["offset"] > 0) == (0, True)
    text = (folder / "mixture.yaml").read_text()
    (tmp_path / "mixture.yaml").write_text(text.replace("0.6", "0.5"))
    other = config(folder, mixture=str(tmp_path / "mixture.yaml"), seed=1)

    def accepting(*names):
        return dataclasses.replace(other, run=dataclasses.replace(other.run, accept=names))

    # Naming the path, or one of two, is not enough.
    with pytest.raises(ValueError, match=r"mixture was .*run.accept=\[mixture,data.seed\]\.$") as refused:
        Loader(accepting("data.mixture", "data.seed"), ARCH, Share(), state=state)
    assert "seed was" not in str(refused.value)
    again = Loader(accepting("mixture", "data.seed"), ARCH, Share(), state=state)
    step = next(iter(again))
    again.close()
    assert set(again.accepted) == {"mixture", "seed"} and (step.window, step.offset) == (1, 0)


def test_run_accept_knows_all_that_a_stream_depends_on(folder):
    mixture = SimpleNamespace(hash="", members=[SimpleNamespace(high_resolution=0.5)])
    shards, tokenizer = SimpleNamespace(hash="", has_videos=True), SimpleNamespace(hash="")
    settings = config(folder, balance_batches=2)
    found = identity.of(settings, shards, mixture, tokenizer, geometry.image_geometry(ARCH, 4), "train", False)
    assert set(found) == {*rules.DATA_NAMES, *identity.SETTINGS, "one_pass"}


def test_one_pass_holds_every_sample_once(folder):
    found = steps(config(folder), None, split="validation", one_pass=True)
    keys = [key for step in found for key in step.keys]
    assert len(keys) == len(set(keys)) == 12 + 6 + 4
    assert all(len(step.micro_batches) == 4 for step in found)
    assert ledger(found) == ledger(steps(config(folder), None, split="validation", one_pass=True))
    last = found[-1]
    assert last.useful_tokens < last.tokens and len(last.rows) == len(set(last.rows)) == 8
    # Small windows and many ranks see the same samples, and every rank as many steps.
    ranks = [
        steps(config(folder, window=5), None, Share(rank, 4), split="validation", one_pass=True) for rank in range(4)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(key for step in ranks[0] for key in step.keys) == sorted(keys)
    numbers = [row for step in ranks[0] for row in step.rows]
    assert len(set(numbers)) == len(numbers)
    loader = Loader(config(folder, train={"micro_batch": 1}), ARCH, Share(), split="validation", one_pass=True)
    with pytest.raises(ValueError, match="the stream ends before window 99, row 0"):
        loader.row(99, 0)
    loader.close()


def test_crop_ranks_read_their_part(folder):
    whole = steps(config(folder), 2)
    parts = [steps(config(folder), 2, Share(crop_rank=rank, crop_ranks=3)) for rank in range(3)]
    for number, step in enumerate(whole):
        for place, batch in enumerate(step.micro_batches):
            mine = [part[number].micro_batches[place] for part in parts]
            assert torch.equal(torch.cat([one.crops for one in mine]), batch.crops)
    none = steps(config(folder), 1, Share(crops=False))[0]
    assert all(batch.crops.shape[0] == 0 for batch in none.micro_batches) and none.crops == whole[0].crops


def test_errors_reach_the_caller(folder, tmp_path):
    with pytest.raises(ValueError, match="global_batch=8 does not divide by 3 data-parallel ranks"):
        Loader(config(folder), ARCH, Share(0, 3))
    with pytest.raises(
        ValueError, match=r"split 'test': none of the mixture's data sets \(captions, pointing, text\) has a sample"
    ):
        Loader(config(folder), ARCH, Share(), split="test")
    with pytest.raises(ValueError, match="holds no manifest.json"):
        Loader(config(folder, manifest=str(tmp_path)), ARCH, Share())
    with pytest.raises(ValueError, match="Raise data.sequence_length"):
        steps(config(folder, sequence_length=64), 1)
    with pytest.raises(ValueError, match="workers=-1"):
        Loader(config(folder, workers=-1), ARCH, Share())


def test_visits_of_high_resolution_are_part_of_the_stream(folder, tmp_path):
    text = (folder / "mixture.yaml").read_text().replace("[pointing]", "[{name: pointing, high_resolution: 0.5}]")
    (tmp_path / "mixture.yaml").write_text(text)
    options = {"mixture": str(tmp_path / "mixture.yaml"), "image_crops": 1, "high_resolution_crops": 4}
    more, usual = steps(config(folder, **options), 4), steps(config(folder, image_crops=1), 4)
    assert sum(step.crops for step in more) > sum(step.crops for step in usual)
    loader = Loader(config(folder, **options), ARCH, Share())
    state = loader.state_dict()
    loader.close()
    with pytest.raises(ValueError, match="high_resolution_crops was 4 and is now 5"):
        Loader(config(folder, **options | {"high_resolution_crops": 5}), ARCH, Share(), state=state)
    with pytest.raises(ValueError, match=r"max_crops=12 is less than an image of data.high_resolution_crops=24"):
        Loader(config(folder, **options | {"high_resolution_crops": 24}), ARCH, Share())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_run_by_name(tmp_path, workers):
    build(tmp_path)
    tar = next((tmp_path / "shards" / "media").glob("*.tar"))
    data = tar.read_bytes()
    tar.write_bytes(bytes(len(data)))
    with pytest.raises(ValueError, match="image [0-9a-f]{64} of sample (captions|pointing)/"):
        steps(config(tmp_path, workers=workers), 30)


def test_a_step_says_where_the_next_one_begins(folder):
    found = steps(config(folder), 6)
    for step, following in itertools.pairwise(found):
        assert (step.next_window, step.next_offset) == (following.window, following.offset)
    assert dataclasses.fields(Step)[-1].name == "skipped" and not any(step.skipped for step in found)
