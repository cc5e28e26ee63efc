"""The parity tool on real training steps: what agrees, what a planted error looks like, what never starts."""

from __future__ import annotations

import itertools
import json

import pytest

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.config import load, presets
from megatron_vlm.config.geometry import VideoLayout
from megatron_vlm.data.loader import Loader, Share
from megatron_vlm.train import trial
from tests.data import world
from tools import parity

#: All in float32, ten steps, tower and connector trained, gradients reduced during the backward pass. cp3: heads do not
#: go round, keys are gathered.
EVERY = (
    "tp2 tp2_sp pp2 pp2_vpp2 pp4 cp2 cp4 cp4_ring cp3 dp2 tp2_cp2 tp2_sp_pp2 pp2_cp2 pp2_cp2_gather tp2_sp_pp2_cp2"
).split()
#: Ten steps as well, against one process with the same rows.
SHARDED = "tp2_vision_tensor tp2_sp_cp2_vision_tensor".split()
#: With it, ten steps give up to 3.9e-6 of a module's gradients. That is the order of float32's sums: in the first step,
#: from the same weights, one process is 1.7e-6 from the same model in float64, the layouts as much. Then the weights
#: of two runs part: at twice this rate, to up to 1.2e-5.
LR = 5.0e-4
#: Two steps: what the others do already, beside something else.
ALSO = "recompute_full recompute_selective dp2_tp2 pp2_recompute_full dp2_unpacked packed".split()
MIXTURE = """
groups:
  captions: {rate: 0.4, members: [captions]}
  pointing: {rate: 0.2, members: [pointing]}
  text: {rate: 0.2, members: [text]}
  videos: {rate: 0.2, members: [videos]}
"""
RESUMED = ("one", "tp2_vision_tensor", "dp2", "pp2", "pp2_vpp2", "cp2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny model on short rows of synthetic data: one and several images, trees, text, video."""
    folder = tmp_path_factory.mktemp("parity")
    world.build(folder, sizes={"captions": 60, "pointing": 30, "text": 20, "videos": 12})
    (folder / "mixture.yaml").write_text(MIXTURE)
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
model: {{preset: tiny, freeze: []}}
data: {{manifest: {folder}/shards, mixture: {folder}/mixture.yaml, tokenizer: {folder}, sequence_length: 192,
       max_crops: 8, image_crops: 2, max_frames: 5, window: 32}}
train: {{global_batch: 4, micro_batch: 1, steps: 10}}
optim: {{vision: {{lr: {LR}}}, connector: {{lr: {LR}}}, language: {{lr: {LR}}}}}
"""
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.processes
def test_layouts_and_a_resumed_run_agree_with_one_process(recipe, tmp_path, capsys):
    found = tmp_path / "found.json"
    layouts = ["tp2_sp", "unpacked", *ALSO]
    asked = ["--layouts", *layouts, "--resume", "tp2_sp:1:one", "--steps", "2", "--json", str(found)]
    assert parity.main([recipe, *asked]) == 0
    said = capsys.readouterr().out
    assert "one: loss " in said and f"All {len(layouts) + 1} agree within 1e-05" in said
    assert [line.split()[0] for line in said.splitlines() if line.endswith("ok")] == [*layouts, "tp2_sp:1:one"]
    written = json.loads(found.read_text())
    tp, unpacked, *_, resumed = written["layouts"]
    # The comparison saw something: another order of additions gives other last digits, also in the same number of rows.
    assert 0 < tp["components"]["vision"] < 1e-5 and 0 < unpacked["components"]["language"] < 1e-5
    assert len(tp["modules"]) > 40 and {name.split(".")[0] for name in tp["modules"]} == {
        "vision", "connector", "language"
    }  # fmt: skip
    reference = written["reference"]["steps"]
    assert [step["keys_hash"] for step in tp["steps"]] == [step["keys_hash"] for step in reference]
    assert reference[0]["loss"] > reference[1]["loss"] > 0 and reference[0]["keys_hash"] != reference[1]["keys_hash"]
    assert [step["step"] for step in resumed["steps"]] == [2]
    assert resumed["loss"] < 1e-5


def tampered(config, plan):
    """On the ranks: tensor parallelism gets one gradient wrong by a per mille, context parallelism fails."""
    from megatron_vlm.train import observe, step

    finalize = step.Stepper._finalize

    def wrong(self, models, *args, **options):
        finalize(self, models, *args, **options)
        for model in models:
            dict(model.module.named_parameters())["language.decoder.layers.1.input_layernorm.weight"].main_grad *= 1.001

    if config.parallel.context > 1:
        raise RuntimeError("the planted failure")
    if config.parallel.tensor > 1:
        step.Stepper._finalize = wrong
    return observe.run(config, plan)


@pytest.mark.slow
@pytest.mark.processes
def test_a_wrong_gradient_is_named_and_a_failure_does_not_end_the_others(recipe, monkeypatch, capsys):
    monkeypatch.setattr(trial, "run", tampered)
    assert parity.main([recipe, "--layouts", "tp2", "cp2", "packed", "--steps", "1"]) == 1
    told = capsys.readouterr()
    tensor = "language.decoder.layers.1.input_layernorm.weight"
    assert f"tp2 diverges: step 1: the gradient of {tensor} differs by 1.0e-03, allowed 1e-05 (1 of " in told.err
    assert "cp2 diverges: did not finish: rank" in told.err and "the planted failure" in told.err
    lines = {line.split()[0]: line.split() for line in told.out.splitlines() if line}
    assert lines["tp2"][-1] == lines["cp2"][-1] == "DIVERGES"
    # The same layout again: every bit.
    assert lines["packed"][-1] == "ok" and set(lines["packed"][2:9]) == {"0.0e+00"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--layouts", "tp2", "tp3"], "- parallel.tensor=3 does not divide the 4 query heads"),
        (["--layouts", "cp3_ulysses"], "cannot deal the 4 query heads and 2 key and value heads"),
        (["--layouts", "tp2x"], "'tp2x' is no part of a name"),
        (["--resume", "tp2:one"], "needed is A:K:B"),
        (["--resume", "one:2:tp2", "--steps", "2"], "the step to stop after is 1 to 1, not 2"),
        (["--layouts", "one", "train.stepz=3"], "stepz"),
        (["--layouts", "dp4", "--device", "cuda"], "torch finds 3 GPUs here, and 4 processes need one each"),
        (["--layouts", "tp2", "data.manifest=no/shards"], "no/shards holds no manifest.json"),
        (["--layouts", "tp2", "--json", "no/such/a.json"], "no/such/a.json is not there, nor is its folder no/such."),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(recipe, asked, said, monkeypatch, capsys):
    monkeypatch.setattr(parity.Runner, "run", None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert parity.main([recipe, *asked]) == 1
    assert said in capsys.readouterr().err


def test_settings_may_stand_anywhere():
    asked = parity.arguments(["--layouts", "tp2", "cp2", "train.global_batch=4", "--steps", "5", "my.yaml", "a.b=1"])
    assert asked.recipe == "my.yaml" and asked.overrides == ["train.global_batch=4", "a.b=1"]
    assert asked.layouts == ["tp2", "cp2"] and asked.steps == 5
    assert parity.arguments(["my.yaml"]).layouts == ["tp2_sp", "pp2", "cp2", "dp2"]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("layouts", "against"), [(EVERY, "unpacked"), (SHARDED, "one")])
def test_every_layout_agrees_with_one_process(recipe, layouts, against):
    overlap = ["parallel.overlap_grad_reduce=true", "parallel.bucket_size=50000"] if layouts is EVERY else []
    assert parity.main([recipe, *overlap, "--layouts", *layouts, "--steps", "10", "--reference", against]) == 0


@pytest.mark.slow
@pytest.mark.processes
def test_a_connector_alone_trains_with_recompute_on_two_stages_and_goes_on(recipe):
    """Full recompute drops the gradients of layers whose input wants none."""
    stages = "pp2_recompute_full"
    asked = ["--layouts", stages, "--resume", f"{stages}:2:{stages}", f"{stages}:2:tp2_sp", "--steps", "3"]
    assert parity.main([recipe, "model.freeze=[vision,language,base_embeddings]", *asked]) == 0


@pytest.mark.slow
@pytest.mark.processes
def test_bf16_has_its_own_tolerance(recipe, tmp_path):
    """Measured: 0.074 of a component's gradients. A gradient summed twice is wrong by 1, averaged over two by 0.5."""
    found = tmp_path / "found.json"
    layouts = ["tp2_sp", "pp2", "cp2", "tp2_cp2_vision_tensor"]
    asked = ["--layouts", *layouts, "--steps", "3", "--json", str(found), "--tolerance", "0.2"]
    assert parity.main([recipe, "train.precision=bf16", *asked, "--weight-tolerance", "0.1"]) == 0
    written = json.loads(found.read_text())
    assert all(step["grad_norm"] > 1 for step in written["reference"]["steps"])


def test_the_rows_that_are_compared_hold_every_kind_of_sample(recipe):
    """In the first four steps of the test above: packed rows, several images, trees, video, text alone."""
    config = load.load(recipe)
    loader = Loader(config, presets.architecture(config.model), Share(crops=False))
    try:
        rows = loader._planner.plan(0)[: 4 * config.train.global_batch]
    finally:
        loader.close()
    samples = [sample for row in rows for sample in row.samples]
    layouts = [sample.content.layouts for sample in samples]
    assert sum(len(row.samples) > 1 for row in rows) > len(rows) / 2
    assert sum(len(each) > 1 for each in layouts) and sum(not each for each in layouts) > 1
    assert sum(any(isinstance(layout, VideoLayout) for layout in each) for each in layouts) > 2
    trees = [sample for sample in samples if len(set(sample.content.branches.tolist()) - {PREFIX_BRANCH}) > 1]
    assert len(trees) > 3


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_a_run_goes_on_on_every_layout_from_every_layout(recipe):
    pairs = [f"{first}:1:{second}" for first, second in itertools.product(RESUMED, RESUMED)]
    assert parity.main([recipe, "--resume", *pairs, "--steps", "2"]) == 0
