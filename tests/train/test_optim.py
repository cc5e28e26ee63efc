import dataclasses
import math

import pytest
import torch
import torch.distributed as dist

from tests.data import world as data
from tests.train import world
from tests.train.kills import CLOCKS


@pytest.fixture
def trainer(tmp_path, one_rank):
    """A stepper over real data, two steps short of anything, with weight decay 0.1."""
    from megatron_vlm.config import presets
    from megatron_vlm.data.loader import Loader
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import optim
    from megatron_vlm.train.state import share
    from megatron_vlm.train.step import Stepper

    data.build(tmp_path, sizes={"captions": 6, "pointing": 3, "text": 2})
    settings = world.config(tmp_path)
    loader = Loader(settings, presets.architecture(settings.model), share(Layout(1)))
    models = optim.wrap(build(settings, Layout(1)), settings)
    stepper = Stepper(models, optim.build(models, settings), settings, loader.sources)
    yield stepper, next(iter(loader)).micro_batches
    loader.close()


def test_groups_hold_each_parameter_once_with_its_rate_and_decay(trainer):
    from megatron_vlm.model.build import component_of
    from megatron_vlm.train import optim

    stepper, _ = trainer
    rates = optim.set_learning_rates(stepper.optimizer, stepper.config, 1)
    assert rates == {"vision": 5e-4, "connector": 5e-4, "language": 5e-4}
    identities = [(group["wd_mult"], group["lr_mult"]) for group in stepper.optimizer.param_groups]
    assert len(set(identities)) == len(identities)  # Megatron finds a group by these when it loads a checkpoint
    counted = sum(parameter.numel() for group in stepper.optimizer.param_groups for parameter in group["params"])
    (model,) = [wrapped.module for wrapped in stepper.models]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert counted == sum(parameter.numel() for parameter in trained.values())
    decayed = {name for name, parameter in trained.items() if optim.decayed(name, parameter)}
    assert not any(name.endswith((".bias", "layernorm.weight", "norm.weight")) for name in decayed)
    assert "language.embedding.new_rows" not in decayed and not any("position" in name for name in decayed)
    assert any("patch" in name for name in decayed) and "language.head.weight" in decayed
    assert {component_of(name) for name in decayed} == {"vision", "connector", "language"}
    weight_decays = {group["weight_decay"] for group in stepper.optimizer.param_groups}
    assert weight_decays == {0.0, 0.1}


def test_each_component_is_clipped_by_its_own_norm(trainer, monkeypatch):
    from megatron_vlm.train import optim

    stepper, micro_batches = trainer
    before, after, bounds = {}, {}, []
    clip = optim.clip

    def norms(optimizer):
        """Straight from the gradients, in another way than optim does."""
        found = {}
        for name, group in optim._named_groups(optimizer):
            for parameter in group["params"]:
                found[name] = found.get(name, 0.0) + parameter.grad.double().pow(2).sum().item()
        return {name: math.sqrt(square) for name, square in found.items()}

    def watched(optimizer, settings):
        before.update(norms(optimizer))
        bounds.append((min(before.values()) + max(before.values())) / 2)
        tight = dataclasses.replace(settings.optim, clip_norm=bounds[0])
        reported = clip(optimizer, dataclasses.replace(settings, optim=tight))
        after.update(norms(optimizer))
        return reported

    monkeypatch.setattr(optim, "clip", watched)
    outcome = stepper.train(micro_batches, 1)
    assert outcome.norms == pytest.approx(before, rel=1e-6)
    (bound,) = bounds
    assert min(before.values()) * 1.01 < bound  # one is clipped, one is not
    assert after == pytest.approx({name: min(norm, bound) for name, norm in before.items()}, rel=1e-5)
    assert outcome.grad_norm == pytest.approx(math.sqrt(sum(norm**2 for norm in before.values())))


def test_clipping_by_own_norms_or_by_that_of_all():
    from megatron_vlm.config.schema import ComponentOptimConfig, OptimConfig
    from megatron_vlm.train import optim

    norms = {"vision": 3.0, "connector": 0.5, "language": 4.0}
    own = OptimConfig(language=ComponentOptimConfig(clip_norm=2.0))
    assert optim.clip_scales(norms, own) == pytest.approx({"vision": 1 / 3, "connector": 1, "language": 0.5}, rel=1e-5)
    scale = 1 / math.sqrt(3.0**2 + 0.5**2 + 4.0**2)
    together = optim.clip_scales(norms, OptimConfig(clip_by="global"))
    assert together == pytest.approx(dict.fromkeys(norms, scale), rel=1e-5)
    assert set(optim.clip_scales(norms, OptimConfig(clip_norm=0)).values()) == {1.0}


def test_each_component_has_its_own_moments_rate_and_clipping(one_rank):
    from megatron_vlm.config.schema import ComponentOptimConfig, Config, EmbeddingsOptimConfig, ModelConfig, OptimConfig
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import optim

    vision = ComponentOptimConfig(betas=(0.8, 0.9), eps=1e-8, weight_decay=0.3)
    language = ComponentOptimConfig(lr=4e-4, warmup_steps=4, eps=1e-7, clip_norm=2.0)

    def built(**table):
        settings = OptimConfig(
            vision=vision, language=language, base_embeddings=EmbeddingsOptimConfig(**table), weight_decay=0.1
        )
        config = Config(model=ModelConfig(freeze=()), optim=settings)
        optimizer = optim.build(optim.wrap(build(config, Layout(1)), config), config)
        rates = optim.set_learning_rates(optimizer, config, 1)
        found = {
            (name, group["betas"], group["eps"], group["weight_decay"])
            for name, group in optim._named_groups(optimizer)
        }
        assert all(group["lr"] == rates[name] for name, group in optim._named_groups(optimizer))
        return found, rates, optim.clip_scales(dict.fromkeys(rates, 4.0), settings)

    found, rates, scales = built()
    assert found == {
        ("vision", (0.8, 0.9), 1e-8, 0.3), ("vision", (0.8, 0.9), 1e-8, 0.0),
        ("connector", (0.9, 0.95), 1e-6, 0.1), ("connector", (0.9, 0.95), 1e-6, 0.0),
        ("language", (0.9, 0.95), 1e-7, 0.1), ("language", (0.9, 0.95), 1e-7, 0.0),
        ("base_embeddings", (0.9, 0.95), 1e-7, 0.0),  # as the decoder, but for decay
    }  # fmt: skip
    assert rates["base_embeddings"] == rates["language"] == 1e-4
    assert scales == pytest.approx({"vision": 1 / 4, "connector": 1 / 4, "language": 1 / 2, "base_embeddings": 1 / 2})
    found, rates, scales = built(lr=8e-4, warmup_steps=2, betas=(0.5, 0.6), weight_decay=0.2, clip_norm=3.0)
    assert ("base_embeddings", (0.5, 0.6), 1e-7, 0.2) in found
    assert (rates["base_embeddings"], rates["language"]) == (4e-4, 1e-4)
    assert scales["base_embeddings"] == pytest.approx(3 / 4)


def test_norms_of_modules_are_those_of_their_gradients_and_weights(trainer):
    from megatron_vlm.model.build import component_of

    stepper, micro_batches = trainer
    outcome = stepper.train(micro_batches, 1)
    found = stepper.module_norms(outcome)
    (model,) = [wrapped.module for wrapped in stepper.models]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = {name.rsplit(".", 1)[0]: component_of(name) for name in names}
    assert set(found["gradients"]) == set(found["parameters"]) == set(trained)
    for name in trained:
        own = [p for p in model.get_submodule(name).parameters(recurse=False) if p.requires_grad]
        squares = sum(parameter.detach().double().square().sum().item() for parameter in own)
        assert found["parameters"][name] == pytest.approx(math.sqrt(squares), rel=1e-6)
    for component, norm in outcome.norms.items():
        parts = [found["gradients"][name] for name, clipped in trained.items() if clipped == component]
        assert math.sqrt(sum(part**2 for part in parts)) == pytest.approx(norm, rel=1e-6)


def test_a_batch_without_loss_weights_updates_nothing(trainer):
    stepper, micro_batches = trainer
    weights = {name: p.clone() for name, p in stepper.models[0].named_parameters()}
    empty = [dataclasses.replace(batch, loss_weights=torch.zeros_like(batch.loss_weights)) for batch in micro_batches]
    outcome = stepper.train(empty, 1)
    assert outcome.weight == 0 and not outcome.norms and math.isnan(outcome.loss)
    assert all(torch.equal(weights[name], p) for name, p in stepper.models[0].named_parameters())
    assert stepper.train(micro_batches, 2).norms  # and the next one trains


def test_a_loss_that_is_not_finite_stops_before_the_update(trainer):
    stepper, micro_batches = trainer
    with torch.no_grad():
        stepper.models[0].module.language.head.weight[5] = float("nan")
    weights = {name: p.clone() for name, p in stepper.models[0].named_parameters()}
    with pytest.raises(FloatingPointError, match="step 7 has no finite loss.*Nothing was updated"):
        stepper.train(micro_batches, 7)
    for name, parameter in stepper.models[0].named_parameters():
        assert torch.equal(weights[name].nan_to_num(), parameter.nan_to_num())


@pytest.mark.parametrize(("policy", "applied"), [("note", True), ("skip", False)])
def test_what_a_guard_notes_is_applied_and_what_it_refuses_is_not(trainer, policy, applied):
    from megatron_vlm.train.guard import Event

    stepper, micro_batches = trainer
    weights = [p.clone() for p in stepper.models[0].parameters()]
    event = Event(1, "spike", policy, "loss", 9.0, 1.0, 1.0)
    outcome = stepper.train(micro_batches, 1, lambda step, values: event)
    assert (outcome.event, outcome.applied) == (event, applied)
    assert applied != all(map(torch.equal, weights, stepper.models[0].parameters()))


def test_loss_is_the_weighted_mean_of_the_token_losses(trainer):
    stepper, micro_batches = trainer
    rows = [
        dataclasses.replace(
            batch, loss_weights=batch.loss_weights * torch.linspace(0.1, 2, batch.loss_weights.shape[1])
        )
        for batch in micro_batches
    ]
    model = stepper.models[0].module.eval()
    with torch.no_grad():
        losses = torch.cat([model(batch) for batch in rows]).double()
    weights = torch.cat([batch.loss_weights for batch in rows]).double()
    sources = torch.cat([batch.sources for batch in rows])
    outcome = stepper.evaluate(iter([rows]))
    assert outcome.weight == pytest.approx(weights.sum().item(), rel=1e-6)
    assert outcome.loss == pytest.approx((losses * weights).sum().item() / weights.sum().item(), rel=1e-6)
    for index, name in enumerate(stepper.sources):
        own = weights * (sources == index)
        if own.sum():
            assert outcome.losses[name] == pytest.approx((losses * own).sum().item() / own.sum().item(), rel=1e-6)
    # Two halves, evaluated one after the other, are one batch.
    assert stepper.evaluate(iter([[row] for row in rows])).loss == pytest.approx(outcome.loss, rel=1e-6)
    stepper.train(rows, 1)
    assert model.training  # dropout again


def _run(settings, steps):
    """`loop.train` on a rank of a pool, for so many steps; then as if there were a stop file. The head is tied."""
    from megatron_vlm.config import presets
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import loop

    layout = Layout.of(settings, dist.get_world_size())
    groups.initialize(layout, seed=settings.train.seed, timeout_s=30)
    tiny = presets.PRESETS["tiny"]
    tied = dataclasses.replace(tiny, language=dataclasses.replace(tiny.language, tied_head=True))
    reasons = iter([""] * steps + ["stop file"])
    agreed, loop.Watch.agreed = loop.Watch.agreed, lambda *_: next(reasons)
    presets.PRESETS["tiny"] = tied
    try:
        loop.train(settings, layout)
    finally:
        loop.Watch.agreed, presets.PRESETS["tiny"] = agreed, tiny


@pytest.mark.slow
def test_a_run_stopped_on_layout_after_layout_logs_what_the_one_that_never_stopped_does(tmp_path, pool):
    """All that depends on the step: rates that decay at the end, a batch that grows, moments per component; the base
    embeddings train, and are the head: with PP 2 two stages have a copy."""
    import json

    from megatron_vlm.config.schema import ComponentOptimConfig, EmbeddingsOptimConfig

    data.build(tmp_path)
    vision = ComponentOptimConfig(lr=5e-4, min_lr=1e-5, warmup_steps=2, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    table = EmbeddingsOptimConfig(lr=2e-3, warmup_steps=3, betas=(0.7, 0.8), weight_decay=0.2, clip_norm=0.02)

    def settings(name, **parallel):
        config = world.config(tmp_path, freeze=(), **parallel)
        return dataclasses.replace(
            config,
            run=dataclasses.replace(config.run, dir=str(tmp_path / name), device="cpu"),
            train=dataclasses.replace(
                config.train, steps=7, residual_dropout=0.1, rampup_steps=4, rampup_from=4, rampup_by=4
            ),
            optim=dataclasses.replace(
                config.optim, vision=vision, base_embeddings=table, schedule="wsd", decay_steps=4
            ),
            log=dataclasses.replace(config.log, tensorboard=False, norms_every=1),
        )

    pool(1).run(_run, settings("whole"), 7, timeout_s=120)
    pool(2).run(_run, settings("changed", tensor=2, sequence=True), 1, timeout_s=120)
    pool(4).run(_run, settings("changed", pipeline=2), 3, timeout_s=120)  # and two data-parallel ranks
    pool(2).run(_run, settings("changed"), 1, timeout_s=120)
    pool(1).run(_run, settings("changed"), 2, timeout_s=120)
    whole, changed = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "changed")
    )
    assert [line["step"] for line in changed] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["tokens"] // 192 for line in whole] == [4, 4, 8, 8, 8, 8, 8]
    assert {"lr_base_embeddings", "grad_norm_base_embeddings", "loss/captions"} <= set(whole[0])
    assert all(line["grad_norm_base_embeddings"] > 0.02 for line in whole)  # all are clipped
    assert whole[1]["lr_base_embeddings"] == pytest.approx(2e-3 * 2 / 3)
    for one, other in zip(whole, changed, strict=True):
        same = [name for name in one if name not in CLOCKS]
        assert {name: other[name] for name in same} == pytest.approx({name: one[name] for name in same}, rel=1e-5)
    whole, changed = (
        [json.loads(line) for line in (tmp_path / name / "norms.jsonl").read_text().splitlines()]
        for name in ("whole", "changed")
    )
    for one, other in zip(whole, changed, strict=True):
        assert other["step"] == one["step"]
        assert other["gradients"] == pytest.approx(one["gradients"], rel=1e-4, abs=1e-6)
        assert other["parameters"] == pytest.approx(one["parameters"], rel=1e-5)
    ledgers = [(tmp_path / name / "ledger.jsonl").read_text() for name in ("whole", "changed")]
    assert ledgers[0] == ledgers[1]  # the same rows in the same order
