"""Rules across settings: each one fires, with its numbers, and the recipes keep them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.config import load, rules

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.fixture
def settings(tmp_path):
    """Settings from overrides alone: the tiny preset with 4 query, 2 key-value heads, 4 layers and the defaults."""
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return lambda *overrides: load.load(path, ["data.image_crops=0", *overrides])


# (overrides, processes, what the message says)
BROKEN = [
    (["run.device=tpu"], 1, r"run\.device='tpu' does not exist; choose one of auto, cpu, cuda\."),
    (["guard.spike=run"], 1, r"guard\.spike='run' does not exist; choose one of off, note, stop, skip, rollback"),
    (["guard.history=5"], 1, r"guard\.history=5 must be at least 20"),
    (["run.time_limit=soon"], 1, r"run\.time_limit='soon' is no length of time; write minutes \(90\)"),
    (["run.time_limit=00:00:00"], 1, r"run\.time_limit='00:00:00' leaves no time"),
    (["run.accept=[data.seed,mixture,seed]"], 1, r"run\.accept names 'seed', which is no setting and none of manifest"),
    (["run.resume=maybe"], 1, r"run\.resume='maybe' does not exist; choose one of auto, never, must\."),
    (["parallel.vision=pipeline"], 1, r"parallel\.vision='pipeline' does not exist"),
    (["data.prompts=long"], 1, r"data\.prompts='long' does not exist"),
    (["data.loss_weighting=none"], 1, r"data\.loss_weighting='none' does not exist"),
    (["train.precision=fp16"], 1, r"train\.precision='fp16' does not exist; choose one of float32, bf16"),
    (["train.recompute=some"], 1, r"train\.recompute='some' does not exist"),
    (["optim.schedule=step"], 1, r"optim\.schedule='step' does not exist"),
    (["train.steps=0"], 1, r"train\.steps=0 must be at least 1"),
    (["optim.vision.lr=-1"], 1, r"optim\.vision\.lr=-1\.0 must be at least 0"),
    (["optim.eps=.nan"], 1, r"optim\.eps=nan must be at least 0, and finite"),
    (["parallel.pipeline_layers=[5,-1]"], 1, r"parallel\.pipeline_layers=\(5, -1\) must be at least 0"),
    (["optim.vision.betas=[0.9,1]"], 1, r"optim\.vision\.betas=\(0\.9, 1\.0\) must be less than 1"),
    (["optim.schedule=wsd"], 1, r"optim\.decay_steps=0 with optim\.schedule=wsd: only wsd has some"),
    (["optim.decay_steps=5"], 1, r"optim\.decay_steps=5 with optim\.schedule=cosine: only wsd has some"),
    (["optim.clip_by=global", "optim.vision.clip_norm=2"], 1, r"optim\.vision\.clip_norm=2\.0 has no meaning with"),
    (["optim.base_embeddings.betas=[1,0]"], 1, r"optim\.base_embeddings\.betas=\(1\.0, 0\.0\) must be less than 1"),
    (["model.freeze=[]", "optim.language.min_lr=1e-5", "optim.base_embeddings.lr=1e-6"], 1,
     r"optim\.base_embeddings\.min_lr=1e-05 is above optim\.base_embeddings\.lr=1e-06"),
    (["train.rampup_steps=9", "train.rampup_from=3", "train.rampup_by=2"], 1, r"rampup_from=3 does not grow to .*=8"),
    (["train.rampup_steps=9", "train.rampup_from=2", "train.rampup_by=3"], 2, r"rampup_by=3 must be a multiple of 2"),
    (["eval.tasks=[pointing,vqa]"], 1, r"eval\.tasks names pointing, vqa, but eval\.every=0 evaluates never"),
    (["eval.tasks=[vqa]", "eval.every=5", "parallel.tensor=2", "parallel.sequence=true"], 2,
     r"eval\.tasks names vqa, but answers are not decoded with parallel\.sequence=true\. Leave eval\.tasks empty"),
    (["train.residual_dropout=1"], 1, r"train\.residual_dropout=1\.0 must be less than 1"),
    (["optim.betas=[0.9,1]"], 1, r"optim\.betas=\(0\.9, 1\.0\) must be less than 1"),
    (["model.preset=huge"], 1, r"model\.preset='huge' is not a preset; choose one of tiny, "),
    (["model.connector=magic"], 1, r"model\.connector='magic' does not exist; choose one of attention_pooling, "),
    (["model.vision_layers=[4]"], 1, r"model\.vision_layers names layers \[4\], but .* has layers 0 to 2"),
    (["model.freeze=[head]"], 1, r"model\.freeze names head, which does not exist; choose from vision, connector"),
    (["model.freeze=[vision,connector,language]"], 1, r"leaves nothing to train"),
    (["parallel.tensor=2"], 3, r"3 processes cannot be divided into models of 2 processes .*start a multiple of 2"),
    (["train.global_batch=6"], 4, r"train\.global_batch=6 rows cannot be dealt to 4 data-parallel .*multiple of 4"),
    (["train.global_batch=8", "train.micro_batch=3"], 1, r"train\.micro_batch=3; it must be a multiple of 3"),
    (["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch=3"], 2,
     r"global_batch=3 gives 3 micro-batches a rank; .*multiple of parallel\.pipeline=2: .*multiple of 2\."),
    (["parallel.tensor=3", "train.global_batch=3"], 3, r"does not divide the 4 query heads .* that do: 1, 2, 4\."),
    (["parallel.tensor=5"], 5, r"parallel\.tensor=5 does not divide the 192 MLP width"),
    (["parallel.tensor=3"], 3, r"parallel\.tensor=3 does not divide the 2048 vocabulary rows"),
    (["parallel.tensor=3"], 3, r"parallel\.tensor=3 neither divides nor is a multiple of the 2 key and value heads"),
    (["parallel.tensor=32", "model.preset=molmo2_4b", "train.global_batch=32", "parallel.vision=tensor"], 32,
     r"parallel\.vision=tensor with parallel\.tensor=32, which does not divide the 16 heads of the vision tower of "
     r"'molmo2_4b'; degrees that do: 1, 2, 4, 8, 16\. Or set parallel\.vision=data"),
    (["parallel.tensor=5", "parallel.vision=tensor"], 5, r"does not divide the 192 MLP width of the connector"),
    (["parallel.tensor=5", "parallel.vision=tensor", "model.connector=linear"], 5,
     r"does not divide the 64 numbers in a hidden state of the decoder of 'tiny'"),
    (["parallel.sequence=true"], 1, r"parallel\.sequence=true shards over .*, but parallel\.tensor=1"),
    (["parallel.context_method=all"], 1, r"context_method='all' does not exist; choose one of auto, ulysses, gather"),
    (["parallel.tensor=2", "parallel.context=4", "parallel.context_method=ulysses"], 8,
     r"the 2 query heads and 1 key and value heads of a rank \(4 and 2 / parallel\.tensor=2\) to parallel\.context=4 "
     r"ranks, only to 2 of them\. Set parallel\.context=2, or parallel\.context_method=auto"),
    (["parallel.context=3", "data.sequence_length=513", "parallel.context_method=ulysses"], 3,
     r"the 4 query heads and 2 key and value heads .* to parallel\.context=3 ranks, only to 1 of them"),
    (["parallel.context=4", "data.sequence_length=510"], 4,
     r"data\.sequence_length=510 is not a multiple of 4 .*nearest that are: 508 and 512\."),
    (["parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=511"], 2,
     r"511 is not a multiple of 2 \(parallel\.context=1 x parallel\.tensor=2\)"),
    (["data.sequence_length=50000"], 1, r"data\.sequence_length=50000 is longer than the 40960 positions"),
    (["parallel.virtual_pipeline=2"], 1, r"virtual_pipeline=2 interleaves pipeline stages, but parallel\.pipeline=1"),
    (["parallel.pipeline=3", "train.global_batch=3"], 3,
     r"4 decoder layers cannot be divided evenly over 3 pipeline chunks .*3 numbers whose sum is 4"),
    (["parallel.pipeline=2", "parallel.pipeline_layers=[1,1,2]"], 2, r"has 3 numbers with the sum 4; needed are 2 "),
    (["parallel.pipeline=2", "parallel.pipeline_layers=[1,2]"], 2, r"has 2 numbers with the sum 3; needed .* sum 4"),
    (["data.image_crops=8", "data.max_crops=8"], 1, r"max_crops=8 is less than one image can have: .* are 9\."),
    (["data.image_crops=8", "data.sequence_length=145"], 1,
     r"data\.sequence_length=145 cannot hold the 145 tokens that one image of data\.image_crops=8 "),
    (["model.image_pool=1", "data.sequence_length=66"], 1, r"sequence_length=66 cannot hold the 66 tokens"),
    (["data.max_frames=17", "data.max_crops=16"], 1, r"max_frames=17 is more than data\.max_crops=16"),
    (["data.max_frames=16", "data.max_crops=16", "data.sequence_length=240"], 1,
     r"data\.sequence_length=240 cannot hold data\.max_frames=16 frames of at least 15 tokens"),
    (["data.frames_per_second=0"], 1, r"frames_per_second=0.* needed more than 0|frames_per_second"),
    (["optim.vision.lr=1e-5", "optim.vision.min_lr=1e-4"], 1, r"optim\.vision\.min_lr=0\.0001 is above .*lr=1e-05"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "world", "message"), BROKEN, ids=[str(case[0]) for case in BROKEN])
def test_a_broken_rule_says_its_numbers(settings, overrides, world, message):
    with pytest.raises(ValueError, match=message):
        rules.check(settings(*overrides), world)


@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        ([], 1),
        ([], 8),
        (["parallel.tensor=2", "parallel.sequence=true"], 2),
        (["parallel.tensor=4"], 4),  # more ranks than key and value heads: those are repeated
        (["parallel.context=4"], 4),
        (["parallel.context=16"], 16),  # more ranks than heads: keys and values are gathered
        (["parallel.context=3", "data.sequence_length=513"], 3),
        (["parallel.context=4", "parallel.context_method=gather"], 4),
        (["parallel.tensor=2", "parallel.context=2", "parallel.pipeline=2"], 16),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 2),
        (["parallel.pipeline=2", "parallel.pipeline_layers=[1,3]"], 2),
        (["model.freeze=[vision,language,base_embeddings]"], 1),
        (["model.freeze=[vision]", "optim.vision.lr=0"], 1),  # the rate of a frozen component does not matter
    ],
)
def test_what_fits_passes(settings, overrides, world):
    rules.check(settings(*overrides), world)


def test_all_broken_rules_are_shown_at_once(settings):
    with pytest.raises(ValueError) as caught:
        rules.check(settings("parallel.sequence=true", "data.sequence_length=50000"), 1)
    message = str(caught.value)
    assert message.startswith("2 settings do not fit:\n") and "parallel.sequence" in message and "50000" in message


RECIPE_FILES = sorted(RECIPES.glob("*/stage*.yaml"))
#: Recipes of one last stage -> the size whose earlier stages they start from.
ALONE = {"tiny_film": "tiny", "tiny_video": "tiny_long"}


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_keeps_the_rules(path):
    config = load.load(path)
    p = config.parallel
    rules.check(config, p.tensor * p.pipeline * p.context)
    if path.parent.name.startswith("tiny"):
        rules.check(config, 2)
    else:
        rules.check(config, 16)


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_starts_where_the_stage_before_it_ends(path):
    size, stage = path.parent.name, int(path.stem.removeprefix("stage"))
    config = load.load(path)
    assert config.run.name == f"{size}-stage{stage}" and config.run.dir == ""
    if stage > 1:
        before = ALONE.get(size, size)
        assert config.init.checkpoint == f"runs/{before}-stage{stage - 1}/checkpoints"


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_names_a_mixture_that_is_there(path):
    assert (RECIPES / "mixtures" / f"{load.load(path).data.mixture}.yaml").is_file()


def test_all_sizes_have_all_stages():
    whole = [path for path in RECIPE_FILES if path.parent.name != "tiny_film"]
    assert [f"{path.parent.name}/{path.stem}" for path in whole] == [
        f"{size}/stage{stage}"
        for size in ("molmo2_4b", "molmo2_8b", "qwen3_0.6b", "tiny", "tiny_long")
        for stage in (1, 2, 3)
    ] + ["tiny_video/stage3"]


def test_the_molmo2_recipes_differ_in_size_and_layout_only():
    for stage in (1, 2, 3):
        small, large = (load.to_dict(load.load(RECIPES / f"molmo2_{size}/stage{stage}.yaml")) for size in ("4b", "8b"))
        differing = {section for section in small if small[section] != large[section]}
        assert differing <= {"run", "model", "init", "parallel"}
