"""What is reported of a run lies in its files once for each step, also after a resume and a rollback."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config.schema import Config, LogConfig


def record(step: int, loss: float) -> dict[str, Any]:
    """A step as the loop reports it."""
    return {"step": step, "loss": loss, "loss/captions": loss, "lr_vision": 0.1, "lr_language": 0.1, "grad_norm": 1.0,
            "useful_tokens": 1, "step_time_s": 1.0, "data_wait_s": 0.0, "mfu": None}  # fmt: skip


def test_tensorboard_holds_every_step_once_and_no_value_that_is_none(tmp_path: Path, capsys: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megatron_vlm.train.reporter import Reporter

    first = Reporter(tmp_path, Config(), 0)
    for step, loss in ((1, 5.0), (2, 4.0), (3, float("nan"))):
        first.step(record(step, loss), {})
    first.close()
    second = Reporter(tmp_path, Config(), 2)  # killed after step 3, goes on from the checkpoint of step 2
    for step in (3, 4):
        second.step(record(step, 1.0), {})
    second.back_to(2)  # a guard
    second.step(record(3, 3.0), {})
    second.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss/loss")] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert [event.step for event in board.Scalars("loss/captions")] == [1, 2, 3]
    assert set(board.Tags()["scalars"]) == {
        "loss/loss", "loss/captions", "lr/lr_vision", "lr/lr_language", "train/grad_norm", "train/useful_tokens",
        "train/step_time_s", "train/data_wait_s",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    aside = [json.loads(line) for line in (tmp_path / "metrics.jsonl.cut").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in aside] == [(3, None), (3, 1.0), (4, 1.0)]


def test_weights_and_biases_gets_every_step_and_the_same_run_again(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from megatron_vlm.train import reporter as reporters

    config = Config(log=LogConfig(tensorboard=False, wandb="project"))
    with pytest.raises(ValueError, match="log.wandb='project', but the package wandb is not installed"):
        reporters.check(config)
    started: list[dict] = []
    logged: list[dict] = []

    def init(**settings):
        started.append(settings)
        return SimpleNamespace(
            id=settings["id"] or "new", define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None
        )

    errors = SimpleNamespace(Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, errors=errors))
    for start in (0, 2):
        reporter = reporters.Reporter(tmp_path, config, start)
        reporter.step(record(3, float("nan")), {})
        reporter.close()
    assert [settings["id"] for settings in started] == [None, "new"] and started[0]["project"] == "project"
    assert logged[0]["step"] == 3 and logged[0]["lr/lr_vision"] == 0.1 and logged[0]["loss/loss"] is None

    def refuse(**settings):
        raise errors.Error("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, errors=errors))
    with pytest.raises(ValueError, match="does not start: No API key configured. Log in; or set WANDB_MODE=offline"):
        reporters.Reporter(tmp_path, config, 0)


def test_the_shadow_of_fp8_is_a_line_that_a_resume_cuts(tmp_path):
    from megatron_vlm.train.reporter import Reporter

    reporter = Reporter(tmp_path, Config(), 0)
    for step in (5, 10):
        reporter.shadow(step, {"language.decoder.layers.1": 0.03})
    reporter.back_to(5)
    reporter.close()
    (line,) = (tmp_path / "fp8.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 5, "relative_error": {"language.decoder.layers.1": 0.03}}
