"""Loading settings: sources, order, types, and what the errors say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.config import load
from megatron_vlm.config.schema import ComponentOptimConfig, Config, ModelConfig, OptimConfig, RunConfig, TrainConfig


def recipe(directory: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_empty_recipe_gives_the_defaults(tmp_path):
    assert load.load(recipe(tmp_path, "")) == Config()


def test_overrides_win_over_the_recipe_and_the_recipe_over_its_bases(tmp_path):
    recipe(tmp_path, "train: {steps: 1, global_batch: 2, seed: 3}\nlog: {every: 4}", "base.yaml")
    recipe(tmp_path, "base: ../base.yaml\ntrain: {steps: 10, global_batch: 20}", "size/base.yaml")
    stage = recipe(tmp_path, "base: base.yaml\ntrain: {steps: 100}", "size/stage.yaml")
    config = load.load(stage, ["train.steps=1000", "train.steps=1001"])
    assert (config.train.steps, config.train.global_batch, config.train.seed, config.log.every) == (1001, 20, 3, 4)


def test_lists_become_tuples_and_whole_numbers_floats(tmp_path):
    path = recipe(tmp_path, "model: {freeze: [vision, language], vision_layers: []}\noptim: {betas: [0, 0.5], eps: 1}")
    config = load.load(path)
    assert config.model.freeze == ("vision", "language") and config.model.vision_layers == ()
    assert config.optim.betas == (0.0, 0.5) and isinstance(config.optim.eps, float)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_every_spelling_of_a_float_works_although_yaml_reads_1e_4_as_text(tmp_path, text):
    assert load.load(recipe(tmp_path, f"optim: {{vision: {{lr: {text}}}}}")).optim.vision.lr == 1e-4
    assert load.load(recipe(tmp_path, ""), [f"optim.vision.lr={text}"]).optim.vision.lr == 1e-4


def test_text_settings_take_what_yaml_would_read_as_something_else(tmp_path):
    config = load.load(recipe(tmp_path, ""), ["run.name=20251122", "run.dir=", "data.split=no", "init.checkpoint=a=b"])
    assert (config.run.name, config.run.dir, config.data.split) == ("20251122", "", "no")
    assert config.init.checkpoint == "a=b"


def test_a_whole_section_can_be_overridden_without_losing_its_other_settings(tmp_path):
    config = load.load(recipe(tmp_path, "optim: {vision: {warmup_steps: 7}}"), ["optim.vision={lr: 0.5}"])
    assert config.optim.vision == ComponentOptimConfig(lr=0.5, warmup_steps=7)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {step: 3}", [], r"train\.step in .*recipe\.yaml is not a setting; did you mean train\.steps\?"),
        ("trian: {steps: 3}", [], r"trian in .*recipe\.yaml is not a setting; did you mean train\?"),
        ("optim: {vision: {warmup: 3}}", [], r"optim\.vision\.warmup in .* mean optim\.vision\.warmup_steps\?"),
        ("", ["train.warmup=3"], r"train\.warmup on the command line is not a setting"),
        ("", ["optim.lr=3"], r"optim\.lr on the command line is not a setting; did you mean optim\.\w+\.lr\?"),
        ("", ["steps=3"], r"steps on the command line is not a setting; did you mean train\.steps\?"),
        ("", ["qqqqq=3"], r"qqqqq on the command line is not a setting; `--help` lists them all"),
        ("", ["train.steps.more=3"], r"train\.steps on the command line must be a whole number, but holds"),
        ("", ["train.steps"], r"'train\.steps' on the command line is no setting; write section\.key=value"),
        ("", ["train=5"], r"train on the command line is a section with the settings steps, .*found a whole number"),
        ("", ["train.steps=1.5"], r"train\.steps=1\.5 on the command line must be a whole number, but is a number"),
        ("train: {steps: true}", [], r"train\.steps=True in .* must be a whole number, but is true or false"),
        ("train: {z_loss: true}", [], r"train\.z_loss=True in .* must be a number, but is true or false"),
        ("train: {z_loss: lots}", [], r"train\.z_loss='lots' in .* must be a number, but is text"),
        ("log: {tensorboard: 1}", [], r"log\.tensorboard=1 in .* must be true or false, but is a whole number"),
        ("run: {name: 3}", [], r"run\.name=3 in .* must be text, but is a whole number"),
        ("run: {name: }", [], r"run\.name=None in .* must be text, but is nothing"),
        ("model: {freeze: vision}", [], r"model\.freeze='vision' in .* must be a list of texts, but is text"),
        ("model: {vision_layers: 3}", [], r"model\.vision_layers=3 in .* whole numbers or null, but is a whole"),
        ("model: {vision_layers: [a]}", [], r"model\.vision_layers=\['a'\] in .* must be a list of whole numbers"),
        ("optim: {betas: [0.9]}", [], r"optim\.betas=\[0\.9\] in .* must be a list of 2 numbers"),
        ("optim: {betas: [0.9, 0.9, 0.9]}", [], r"optim\.betas=\[.*\] in .* must be a list of 2 numbers"),
        ("train: 3", [], r"train in .* is a section with the settings .*; found a whole number"),
        ("[1, 2]", [], r"A recipe holds sections .*, but .*recipe\.yaml holds a list"),
        ("train: {steps: 1, steps: 2}", [], r"recipe\.yaml is not valid YAML: 'steps' stands there twice"),
        ("train: [", [], r"What stands in .*recipe\.yaml is not valid YAML"),
        ("train: !!python/object/apply:os.getcwd []", [], r"not valid YAML"),
        ("base: 3", [], r"base in .*recipe\.yaml must be the path of another recipe, found 3"),
        ("base: gone.yaml", [], r"gone\.yaml, which .*recipe\.yaml names as its base, cannot be read"),
        ("base: recipe.yaml", [], r"run in a circle: .*recipe\.yaml -> .*recipe\.yaml"),
    ],
)  # fmt: skip
def test_an_error_names_the_key_where_it_stood_and_what_was_wanted(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load.load(recipe(tmp_path, text), overrides)


def test_an_error_in_a_base_names_the_base(tmp_path):
    recipe(tmp_path, "train: {steps: x}", "base.yaml")
    with pytest.raises(ValueError, match=r"train\.steps='x' in .*base\.yaml must be"):
        load.load(recipe(tmp_path, "base: base.yaml\nlog: {every: 3}"))


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"The recipe .*gone\.yaml cannot be read: .*gone\.yaml is not there"):
        load.load(tmp_path / "gone.yaml")


@pytest.mark.parametrize("name", ["tiny", "examples/recipes/qwen3_0.6b", "recipes/molmo-8b/stage2.yaml"])
def test_for_a_recipe_that_is_not_there_those_with_names_like_it_are_told(name):
    like = {"tiny": "tiny/stage1", "examples/recipes/qwen3_0.6b": "qwen3_0.6b/stage1"}.get(name, "molmo2_8b/stage2")
    with pytest.raises(ValueError, match=rf"Recipes with names like it: .*{like}\.yaml"):
        load.load(name)


TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)
CONFIGS = st.builds(
    Config,
    run=st.builds(RunConfig, dir=TEXT, name=TEXT),
    model=st.builds(
        ModelConfig,
        preset=TEXT,
        vision_layers=st.none() | st.lists(st.integers(0, 50), max_size=3).map(tuple),
        freeze=st.lists(TEXT, max_size=3).map(tuple),
    ),
    train=st.builds(TrainConfig, z_loss=st.floats(0, 1), residual_dropout=st.floats(0, 1), steps=st.integers(0, 2**40)),
    optim=st.builds(
        OptimConfig,
        vision=st.builds(ComponentOptimConfig, lr=st.floats(0, 1), min_lr=st.floats(0, 1e-30)),
        betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    ),
)


@given(config=CONFIGS)
def test_a_dump_loads_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "dump.yaml"
    path.write_text(load.dump(config), encoding="utf-8")
    assert load.load(path) == config


def test_to_dict_holds_every_setting_as_plain_values():
    plain = load.to_dict(dataclasses.replace(Config(), model=ModelConfig(freeze=("vision",))))
    assert plain["model"]["freeze"] == ["vision"] and plain["optim"]["betas"] == [0.9, 0.95]
    assert list(plain) == [field.name for field in dataclasses.fields(Config)]
