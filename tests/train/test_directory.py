import dataclasses
import json

from megatron_vlm.config import load
from megatron_vlm.config.schema import Config, RunConfig
from megatron_vlm.train import directory


def _change(config, **settings):
    for name, value in settings.items():
        section, key = name.split("__")
        changed = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: changed})
    return config


def test_cut_moves_later_lines_and_an_unfinished_one_aside(tmp_path):
    log = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 6)]
    log.write_text("".join(lines) + '{"step": 6, "lo')
    directory.cut(log, 3)
    assert log.read_text() == "".join(lines[:3])
    assert (tmp_path / "metrics.jsonl.cut").read_text() == "".join(lines[3:]) + '{"step": 6, "lo\n'
    directory.cut(log, 2)  # a second resume keeps what the first set aside
    assert (tmp_path / "metrics.jsonl.cut").read_text().endswith('"lo\n' + lines[2])


def test_cut_leaves_a_log_that_ends_at_the_checkpoint(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n')
    directory.cut(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n' and not (tmp_path / "metrics.jsonl.cut").exists()


def test_cut_trusts_no_line_without_an_end(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}')  # the next line would be written behind it
    directory.cut(log, 2)
    assert log.read_text() == '{"step": 1}\n'


def test_differences_names_what_changes_learning_and_ignores_layout_and_logging():
    saved = load.to_dict(Config())
    assert directory.differences(saved, Config()) == {}
    free = _change(Config(), parallel__tensor=2, log__every=1, run__dir="x", data__workers=3, train__micro_batch=4)
    assert directory.differences(saved, free) == {}
    changed = _change(Config(), train__steps=7, data__seed=1)
    assert directory.differences(saved, changed) == {"data.seed": "was 0, is 1", "train.steps": "was 100, is 7"}


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default():
    saved = load.to_dict(Config())
    del saved["data"]["bad_samples"], saved["data"]["seed"]
    assert directory.differences(saved, Config()) == {}
    assert directory.differences(saved, _change(Config(), data__seed=1)) == {"data.seed": "was 0, is 1"}


def test_more_steps_are_allowed_only_where_the_schedule_is_constant():
    constant = _change(Config(), optim__schedule="constant")
    assert directory.differences(load.to_dict(constant), _change(constant, train__steps=7)) == {}


def test_prepare_writes_a_config_that_loads_back_equal(tmp_path):
    config = Config(run=RunConfig(dir=str(tmp_path / "run")))
    folder = directory.prepare(config, 0, {"layout": {"world": 1}})
    assert load.load(folder / "config.yaml") == config
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["layout"] == {"world": 1} and facts["packages"]["megatron-core"] and facts["megatron_vlm"]


def test_environment_holds_no_environment_variables(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_value")
    assert "hf_secret_value" not in json.dumps(directory.environment())
