"""Training on damaged shards: all ranks leave out the same samples, the loss is that of the others; it can stop."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.config import presets
from megatron_vlm.data.loader import Loader, Share
from megatron_vlm.data.shards import Shards
from tests.data import world as data
from tests.data.damage import blank_media, spoil_record
from tests.train import world


def _trained(settings):
    """`loop.train` on this rank."""
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import loop

    layout = Layout.of(settings, dist.get_world_size())
    groups.initialize(layout, seed=settings.train.seed, timeout_s=30)
    return dataclasses.asdict(loop.train(settings, layout))


def _settings(folder, run, parallel=None, **data_settings):
    config = world.config(folder, **(parallel or {}))
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(run), device="cpu"),
        data=dataclasses.replace(config.data, **{"bad_samples": "skip"} | data_settings),
        train=dataclasses.replace(config.train, steps=4),
        checkpoint=dataclasses.replace(config.checkpoint, every=2),
        eval=dataclasses.replace(config.eval, every=4, rows=16),
        log=dataclasses.replace(config.log, tensorboard=False),
    )


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A world where two images of step 1, three of step 4, a held-out one and a record are damaged; (folder, keys)."""
    folder = tmp_path_factory.mktemp("damaged")
    data.build(folder)
    config = _settings(folder, folder / "run")
    loader = Loader(config, presets.architecture(config.model), Share())
    steps = list(itertools.islice(loader, 4))
    loader.close()
    shards, bad = Shards(folder / "shards"), []
    earlier = {key for step in steps[:3] for key in step.keys}
    for keys, count in ((steps[0].keys, 2), ([key for key in steps[3].keys if key not in earlier], 3)):
        chosen = [key for key in keys if not key.startswith("text/")][:count]
        assert len(chosen) == count
        for key in chosen:
            dataset, _, name = key.partition("/")
            place = shards.keys(dataset, "train").index(name)
            blank_media(folder / "shards", shards.example(dataset, "train", place).media[0].key)
        bad += chosen
    name = next(key for key in steps[1].keys if key.startswith("text/"))
    spoil_record(folder / "shards", "text", "train", name.partition("/")[2])
    held_out = shards.example("captions", "validation", 0)
    blank_media(folder / "shards", held_out.media[0].key)
    return folder, {*bad, name}, f"captions/{held_out.key}"


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _told(run):
    """What a run reported, times left out."""
    clocks = ("step_time_s", "data_wait_s", "save_wait_s", "model_flops_per_s", "mfu", "eval_time_s")
    metrics = [{k: v for k, v in line.items() if k not in clocks} for line in _lines(run / "metrics.jsonl")]
    return metrics, _lines(run / "ledger.jsonl")


@pytest.fixture(scope="module")
def alone(damaged, tmp_path_factory, pool):
    run = tmp_path_factory.mktemp("alone") / "run"
    (ending,) = pool(1).run(_trained, _settings(damaged[0], run, bad_ceiling=0.5), timeout_s=120)
    assert ending["outcome"] == "finished"
    return run


@pytest.mark.slow
def test_bad_samples_are_counted_and_named(damaged, alone):
    _, bad, held_out = damaged
    metrics, ledger = _told(alone)
    named = [[entry["key"] for entry in line["skipped"]] for line in ledger]
    assert {key for keys in named for key in keys} == bad
    assert [line["skipped_samples"] for line in metrics] == list(itertools.accumulate(map(len, named)))
    assert [line["drawn_samples"] for line in metrics] == list(
        itertools.accumulate(line["samples"] for line in metrics)
    )
    assert {"key", "file", "place", "reason"} == set(ledger[0]["skipped"][0])
    assert metrics[3]["eval_skipped_samples"] == 1
    assert [entry["key"] for entry in ledger[3]["eval_skipped"]] == [held_out]
    assert all(line["loss"] is not None and line["grad_norm"] > 0 for line in metrics)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {}, {"pipeline": 2}, {"context": 2}])
def test_every_layout_leaves_out_the_same(damaged, alone, tmp_path, pool, parallel):
    pool(2).run(_trained, _settings(damaged[0], tmp_path / "run", parallel, bad_ceiling=0.5), timeout_s=120)
    metrics, ledger = _told(tmp_path / "run")
    wanted, same_ledger = _told(alone)
    assert ledger == same_ledger
    for line, one in zip(metrics, wanted, strict=True):
        assert line["skipped_samples"] == one["skipped_samples"]
        for name in ("loss", "grad_norm", "loss_weight"):
            assert line[name] == pytest.approx(one[name], rel=1e-5)
    assert metrics[3]["eval_loss"] == pytest.approx(wanted[3]["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_the_loss_is_that_of_the_other_samples(damaged, alone):
    """Against the weights of the first step as planned: the sum without the damaged ones."""
    folder, bad, _ = damaged
    settings = _settings(folder, folder / "run")
    loader = Loader(settings, presets.architecture(settings.model), Share())
    step = next(iter(loader))
    loader.close()
    kept = sum(weight for key, weight in zip(step.keys, step.weights, strict=True) if key not in bad)
    line = _lines(alone / "metrics.jsonl")[0]
    assert line["loss_weight"] == pytest.approx(kept) and kept < sum(step.weights)


@pytest.mark.slow
def test_above_the_ceiling_it_stops_and_goes_on_the_same_later(damaged, alone, tmp_path, pool):
    folder, bad, _ = damaged
    run = tmp_path / "run"
    with pytest.raises(Exception, match="could not be loaded; data.bad_ceiling=0.003 allows 3") as stop:
        pool(1).run(_trained, _settings(folder, run, bad_ceiling=0.003), timeout_s=120)
    words = str(stop.value)
    assert "Most of them come from:" in words and "has no readable header" in words and "media/" in words
    assert sum(key in words for key in bad) >= 1 and "ledger.jsonl names the others" in words
    assert [line["step"] for line in _lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((run / "exit.json").read_text())["outcome"] == "failed"
    # With a higher ceiling it goes on from the checkpoint of step 2, as if it had not stopped.
    pool(1).run(_trained, _settings(folder, run, bad_ceiling=0.5), timeout_s=120)
    assert _told(run) == _told(alone)
    for file in (alone / "checkpoints/iter_0000004").glob("*.distcp"):
        assert file.read_bytes() == (run / "checkpoints/iter_0000004" / file.name).read_bytes()


def test_stop_is_the_default(damaged, tmp_path, pool):
    with pytest.raises(Exception, match=r"sample \w+/[\w-]+ \((media|samples)/.*data.bad_samples=skip"):
        pool(1).run(_trained, _settings(damaged[0], tmp_path / "run", bad_samples="stop"), timeout_s=120)


def _settled(settings, folders):
    """The first step, settled, where every rank reads its own copy of the data."""
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import faults
    from megatron_vlm.train.state import share

    layout = Layout.of(settings, dist.get_world_size())
    groups.initialize(layout, seed=0, timeout_s=30)
    own = dataclasses.replace(settings.data, manifest=str(folders[dist.get_rank()] / "shards"))
    config = dataclasses.replace(settings, data=own)
    loader = Loader(config, presets.architecture(config.model), share(layout))
    try:
        step = faults.settle(next(iter(loader)), "skip")
        return [fault.sample for fault in step.skipped], float(step.global_loss_weight)
    finally:
        loader.close()


def test_a_file_that_is_bad_on_one_machine_is_left_out_everywhere(tmp_path, pool):
    data.build(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    settings = _settings(tmp_path / "a", tmp_path / "run")
    shards = Shards(tmp_path / "b" / "shards")
    for number in range(60):
        for media in shards.example("captions", "train", number).media:
            blank_media(tmp_path / "b" / "shards", media.key)
    first, second = pool(2).run(_settled, settings, [tmp_path / "a", tmp_path / "b"], timeout_s=120)
    assert first == second and first[0] and all(key.startswith("captions/") for key in first[0])


def test_a_record_that_is_bad_on_one_machine_is_told(tmp_path, pool):
    data.build(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for number in range(20):
        spoil_record(tmp_path / "b" / "shards", "text", "train", f"text-{number}")
    settings = _settings(tmp_path / "a", tmp_path / "run")
    with pytest.raises(Exception, match="ranks planned different rows at window 0, row 0"):
        pool(2).run(_settled, settings, [tmp_path / "a", tmp_path / "b"], timeout_s=120)


def test_without_a_failure_the_batches_are_the_loader_s_own(tmp_path, one_rank):
    """Three integers a step are all that it costs."""
    from megatron_vlm.train import faults

    data.build(tmp_path)
    settings = _settings(tmp_path, tmp_path / "run")
    loader = Loader(settings, presets.architecture(settings.model), Share())
    step = next(iter(loader))
    loader.close()
    assert faults.settle(step, "skip") is step and faults.settle(step, "stop") is step
    assert step.without([]) is step and isinstance(step.micro_batches[0].crops, torch.Tensor)
