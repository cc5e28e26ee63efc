"""What a guard calls insane, and what the run does about it, on real processes."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vlm.config.schema import GuardConfig, ParallelConfig
from megatron_vlm.train import dump
from megatron_vlm.train.guard import LEAST_HISTORY, Guard, robust
from tests.data import world as data
from tests.train import world


def _seen(guard, steps=LEAST_HISTORY):
    for step in range(1, steps + 1):
        assert guard.judge(step, {"loss": 2 + 0.1 * math.sin(step), "vision": 0.0, "language": 1.0}) is None
    return guard


def test_robust_is_not_moved_by_an_outlier():
    middle, spread = robust([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert middle == 3 and spread == pytest.approx(1.4826)


def test_what_is_not_finite_is_refused_from_the_first_step():
    event = Guard(GuardConfig(not_finite="skip")).judge(1, {"loss": 2.0, "vision": float("inf")})
    assert (event.kind, event.policy, event.name, event.value) == ("not_finite", "skip", "vision", float("inf"))


def test_a_spike_is_told_by_the_last_steps_and_not_before_there_are_enough():
    assert _seen(Guard(GuardConfig(spike="stop")), LEAST_HISTORY - 1).judge(20, {"loss": 50.0}) is None
    guard = _seen(Guard(GuardConfig(spike="stop")))
    assert guard.judge(21, {"loss": 2.4, "language": 1.1}) is None
    event = guard.judge(22, {"loss": 4.0, "language": 1.0})
    assert (event.kind, event.name) == ("spike", "loss") and "deviations above its median of 2" in event.words
    assert guard.judge(23, {"loss": 2.0, "language": 1.7}).name == "language"
    assert guard.judge(24, {"loss": 2.0, "language": 1.0, "vision": 9.0}) is None  # it has not trained so far
    assert _seen(Guard(GuardConfig(spike="off"))).judge(21, {"loss": 1e9}) is None


def test_refused_steps_are_counted_and_leave_the_estimate_alone():
    guard = _seen(Guard(GuardConfig(spike="skip")))
    history = guard.state()["history"]
    for count in (1, 2, 3):
        assert guard.judge(20 + count, {"loss": 90.0}).policy == "skip" and guard.refused == count
        assert guard.state()["history"] == history
    assert guard.judge(24, {"loss": 2.0}) is None and guard.refused == 0


def test_only_the_last_steps_are_remembered():
    history = _seen(Guard(GuardConfig(history=LEAST_HISTORY)), LEAST_HISTORY + 5).state()["history"]
    steps = range(6, LEAST_HISTORY + 6)
    assert history == {"loss": [2 + 0.1 * math.sin(step) for step in steps], "language": [1.0] * LEAST_HISTORY}


def test_state_goes_through_json_and_gives_the_same_verdicts():
    guard = _seen(Guard(GuardConfig(spike="skip")))
    again = Guard(guard.config, json.loads(json.dumps(guard.state())))
    assert again.judge(21, {"loss": 4.0}) == guard.judge(21, {"loss": 4.0}) is not None


def _poisoned(settings, steps):
    """`loop.train` where the loss weights of data rank 1's (or the only rank's) batches of `steps` are not numbers."""
    from megatron_vlm.data.loader import Loader
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import loop

    layout = Layout.of(settings, dist.get_world_size())
    groups.initialize(layout, seed=settings.train.seed, timeout_s=30)
    iterate = Loader.__iter__

    def poison(self):
        for number, fetched in enumerate(iterate(self), 1):
            if number in steps and dist.get_rank() == dist.get_world_size() - 1:
                batches = [
                    dataclasses.replace(batch, loss_weights=torch.where(batch.loss_weights != 0, torch.nan, 0.0))
                    for batch in fetched.micro_batches
                ]
                fetched = dataclasses.replace(fetched, micro_batches=tuple(batches))
            yield fetched

    Loader.__iter__ = poison
    try:
        return dataclasses.asdict(loop.train(settings, layout))
    finally:
        Loader.__iter__ = iterate


@pytest.fixture
def settings(tmp_path):
    data.build(tmp_path / "data")

    def make(policy, **guard):
        config = world.config(tmp_path / "data")
        return dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, dir=str(tmp_path / "run"), device="cpu"),
            train=dataclasses.replace(config.train, steps=4),
            checkpoint=dataclasses.replace(config.checkpoint, every=2),
            guard=GuardConfig(not_finite=policy, **guard),
            log=dataclasses.replace(config.log, tensorboard=False),
        )

    return make


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_skip_leaves_a_poisoned_step_out_on_all_ranks(settings, tmp_path, pool):
    endings = pool(2).run(_poisoned, settings("skip"), {3}, timeout_s=120)
    assert endings == [{"outcome": "finished", "reason": "all steps done", "step": 4}] * 2
    assert list((tmp_path / "run" / "plans").iterdir())  # rows that one rank has packed for both
    metrics = _lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped_steps"] for line in metrics] == [0, 0, 1, 1] and metrics[2]["loss"] is None
    assert math.isfinite(metrics[3]["loss"])
    kept = dump.read(tmp_path / "run" / "guards" / "step-0000003.json")
    ledger = _lines(tmp_path / "run" / "ledger.jsonl")
    assert kept.facts["keys_hash"] == ledger[2]["keys_hash"] and kept.losses.shape == (len(kept.rows), 192)
    # Rows of rank 1 are the culprits; the losses themselves are sound.
    assert np.isnan(kept.weights).any(axis=1).sum() == len(kept.rows) / 2
    assert "language.decoder.layers.3.mlp.linear_fc2" in kept.facts["modules"]
    (event,) = _lines(tmp_path / "run" / "guards" / "events.jsonl")
    assert event["dump"] == "step-0000003.json" and event["kind"] == "not_finite"


@pytest.mark.slow
def test_a_dump_holds_rows_whole_where_ranks_share_them(settings, tmp_path, pool):
    config = dataclasses.replace(settings("skip"), parallel=ParallelConfig(context=2))
    pool(2).run(_poisoned, config, {3}, timeout_s=120)
    weights = dump.read(tmp_path / "run" / "guards" / "step-0000003.json").weights
    half = weights.shape[1] // 2
    assert not np.isnan(weights[:, :half]).any() and np.isnan(weights[:, half:]).any()  # the last rank's half


def _spiking(settings, spike):
    """`loop.train` where the last rank's token losses of step `spike` are ten times what they are."""
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import loop
    from megatron_vlm.train.step import Stepper

    layout = Layout.of(settings, dist.get_world_size())
    groups.initialize(layout, seed=settings.train.seed, timeout_s=30)
    original = Stepper._loss

    def planted(self, batch, token_losses):
        last = dist.get_rank() == dist.get_world_size() - 1
        return original(self, batch, token_losses * 10 if last and self.pulse.step == spike else token_losses)

    Stepper._loss = planted
    try:
        return loop.train(settings, layout).outcome
    finally:
        Stepper._loss = original


@pytest.mark.slow
def test_a_planted_spike_is_skipped_on_all_ranks_and_the_dump_shows_whose_rows_it_was(settings, tmp_path, pool):
    config = settings("stop", spike="skip")
    train = dataclasses.replace(config.train, steps=LEAST_HISTORY + 3, global_batch=2, micro_batch=1)
    spike = LEAST_HISTORY + 2
    assert pool(2).run(_spiking, dataclasses.replace(config, train=train), spike, timeout_s=120) == ["finished"] * 2
    metrics = _lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics if line["spikes"]] == [spike, spike + 1]  # counted from then on
    assert metrics[-1]["skipped_steps"] == 1
    (event,) = _lines(tmp_path / "run" / "guards" / "events.jsonl")
    assert (event["step"], event["kind"], event["policy"]) == (spike, "spike", "skip")
    kept = dump.read(tmp_path / "run" / "guards" / event["dump"])
    means = [losses[weights > 0].mean() for losses, weights in zip(kept.losses, kept.weights, strict=True)]
    assert max(means) > 5 * min(means)


@pytest.mark.slow
def test_rollback_goes_to_the_checkpoint_and_passes_the_rows_over(settings, tmp_path, pool):
    config = settings("rollback")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, schedule="constant"))
    pool(1).run(_poisoned, config, {4}, timeout_s=120)
    metrics, ledger = (_lines(tmp_path / "run" / f"{name}.jsonl") for name in ("metrics", "ledger"))
    assert [line["step"] for line in metrics] == [1, 2, 3, 4] and metrics[3]["rollbacks"] == 1
    places = [(line["window"], line["offset"]) for line in ledger]
    assert len(set(places)) == 4 and places == sorted(places)
    (cut,) = _lines(tmp_path / "run" / "metrics.jsonl.cut")
    assert cut["step"] == 3 and cut["loss"] != metrics[2]["loss"]
    # Weights and moments went back too: it is the run that did nothing with these rows.
    skipping = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(tmp_path / "skipping")),
        train=dataclasses.replace(config.train, steps=6),
        guard=GuardConfig(not_finite="skip"),
    )
    pool(1).run(_poisoned, skipping, {3, 4}, timeout_s=120)
    expected = _lines(tmp_path / "skipping" / "metrics.jsonl")[4:]
    assert [(line["loss"], line["grad_norm"]) for line in metrics[2:]] == [
        (line["loss"], line["grad_norm"]) for line in expected
    ]


def test_stop_leaves_the_last_checkpoint_and_says_why(settings, tmp_path, pool):
    with pytest.raises(RuntimeError, match="step 3 has no sane loss: loss is nan. Nothing was updated"):
        pool(1).run(_poisoned, settings("stop"), {3}, timeout_s=120)
    told = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert told["outcome"] == "failed" and told["step"] == 2 and "loss is nan" in told["reason"]


def test_skipping_without_end_stops(settings, tmp_path, pool):
    with pytest.raises(RuntimeError, match="2 steps in a row were refused"):
        pool(1).run(_poisoned, settings("skip", most_in_a_row=1, dumps=1), {2, 3, 4}, timeout_s=120)
    guards = tmp_path / "run" / "guards"
    assert [event["dump"] for event in _lines(guards / "events.jsonl")] == ["step-0000002.json", None]
    assert [path.name for path in guards.glob("step-*.json")] == ["step-0000002.json"]


@pytest.mark.slow
def test_rollbacks_without_end_stop_and_a_new_checkpoint_starts_their_count_anew(settings, tmp_path, pool):
    config = settings("rollback", most_in_a_row=1)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=6))
    # From step 4 to 2, and, with a checkpoint at 4, from 5 to that one.
    pool(1).run(_poisoned, config, {4, 7}, timeout_s=120)
    last = _lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["step"], last["rollbacks"]) == (6, 2)
    again = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path / "again")))
    with pytest.raises(RuntimeError, match="1 rollbacks to one checkpoint did not help"):
        pool(1).run(_poisoned, again, {3, 4}, timeout_s=120)


def test_a_rollback_needs_a_checkpoint(settings, pool):
    with pytest.raises(RuntimeError, match="there is no checkpoint to roll back to yet"):
        pool(1).run(_poisoned, settings("rollback"), {1}, timeout_s=120)


def test_a_dump_that_is_none_is_refused(tmp_path):
    path = tmp_path / "step-0000001.json"
    for text in ("", "[1]", '{"format": 1}', '{"format": 2}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="step-0000001.json cannot be read"):
            dump.read(path)
    with pytest.raises(ValueError, match="cannot be read"):
        dump.read(tmp_path / "nowhere.json")
