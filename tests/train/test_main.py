"""The command as a person types it: what it prints, what it leaves behind, how it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from megatron_vlm.config import load
from megatron_vlm.train import __main__ as command
from megatron_vlm.train import ending
from tests.data import world as data
from tests.train.kills import CLOCKS
from tools import ckpt

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("world")
    data.build(path)
    return path


@pytest.fixture
def recipe(folder, tmp_path):
    """A recipe of six steps with checkpoints after 2, 4 and 6, and a held-out loss after 3 and 6."""
    settings = load.to_dict(data.config(folder, sequence_length=192, max_crops=8, image_crops=2, window=32))
    settings = {name: settings[name] for name in ("data", "train")}
    settings["data"].pop("manifest")
    settings["train"] |= {"steps": 6, "global_batch": 4}
    settings |= {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
        "checkpoint": {"every": 2},
        "eval": {"every": 3, "rows": 4},
        "log": {"every": 1, "tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings | {"data": settings["data"] | {"manifest": str(folder / "shards")}}))
    return path


def _lines(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def _metrics(run):
    return [
        {name: value for name, value in line.items() if name not in CLOCKS} for line in _lines(run / "metrics.jsonl")
    ]


def _fails(capsys, *argv):
    """The command's error: one paragraph on stderr, no traceback."""
    assert command.main([str(word) for word in argv]) == 1
    out = capsys.readouterr()
    assert out.err.startswith("error: ") and "Traceback" not in out.err
    return out.err


def test_a_run_writes_what_the_design_promises(recipe, tmp_path, capsys, monkeypatch):
    for number, name in enumerate(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")):
        monkeypatch.setenv(name, f"a-secret-word-{number}")
    saved: list[float] = []
    monkeypatch.setattr(ending.Watch, "saved", lambda self, took_s: saved.append(took_s))
    logs = ("log.profile=[2]", "log.norms_every=3")
    assert command.main([str(recipe), *logs]) == 0
    said = capsys.readouterr().out
    run = tmp_path / "run"
    written = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert len(written) > 8 and not any(b"a-secret-word" in data for data in [*written, said.encode()])
    assert said.startswith(f"New run in {run}, from random weights.\n") and "step 6/6" in said
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    promised = (
        "step loss grad_norm lr_vision lr_connector lr_language tokens useful_tokens image_tokens crops fill "
        "loss_weight step_time_s data_wait_s mfu skipped_samples loss/captions"
    ).split()
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(set(promised) <= set(line) for line in metrics)
    assert [line["step"] for line in metrics if "eval_loss" in line] == [3, 6]
    assert metrics[-1]["loss"] < metrics[0]["loss"] and metrics[0]["mfu"] is None
    assert all(0 < line["fill"] == line["useful_tokens"] / line["tokens"] < 1 for line in metrics)
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in ledger] == [1, 2, 3, 4, 5, 6]
    assert all({"window", "offset", "keys_hash", "skipped"} <= set(line) for line in ledger)
    assert load.load(run / "config.yaml") == load.load(recipe, logs)
    assert [path.name for path in (run / "profile").iterdir()] == ["step-0000002-rank-00000.json"]
    norms = [json.loads(line) for line in (run / "norms.jsonl").read_text().splitlines()]
    assert [line["step"] for line in norms] == [3, 6]
    assert all(norms[0][kind]["language.decoder.layers.0.mlp.linear_fc1"] > 0 for kind in ("gradients", "parameters"))
    assert json.loads((run / "exit.json").read_text()) == {
        "outcome": "finished", "reason": "all steps done", "step": 6,
    }  # fmt: skip
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["frozen", "iter_0000004", "iter_0000006", "latest"]
    assert len(saved) == 3 and min(saved) > 0  # time that a time limit has to leave
    # A second start has nothing to do, and says so.
    assert command.main([str(recipe)]) == 0
    assert capsys.readouterr().out.startswith(f"Resuming {run} from step 6")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
    # A damaged checkpoint is passed over; from the one before, the run comes to the same end.
    before, ledger = _metrics(run), (run / "ledger.jsonl").read_text()
    damaged = next((run / "checkpoints" / "iter_0000006").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert command.main([str(recipe)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Passed over: ") and f"is damaged: {damaged.name} has " in said.splitlines()[0]
    assert f"Resuming {run} from step 4 (" in said.splitlines()[1]
    assert _metrics(run) == before and (run / "ledger.jsonl").read_text() == ledger
    assert [line["step"] for line in _lines(run / "metrics.jsonl.cut")] == [5, 6]


def test_print_config_loads_back_equal(recipe, tmp_path, capsys):
    assert command.main([str(recipe), "--print-config", "train.steps=7"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load.load(tmp_path / "printed.yaml") == load.load(recipe, ["train.steps=7"])


def test_help_lists_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "train.global_batch=8" in out and "optim.connector.warmup_steps" in out


def test_errors_name_the_thing_and_the_next_move(recipe, tmp_path, capsys):
    assert "did you mean train.steps?" in _fails(capsys, recipe, "train.stepps=3")
    assert "tensor" in _fails(capsys, recipe, "parallel.tensor=2")  # one process
    assert "holds no manifest.json" in _fails(capsys, recipe, f"data.manifest={tmp_path}")
    assert "init.checkpoint=nowhere" in _fails(capsys, recipe, "init.checkpoint=nowhere")
    assert "run.resume=must" in _fails(capsys, recipe, "run.resume=must")
    assert "held-out loss: " in _fails(capsys, recipe, "eval.split=test")  # at the start, not at step eval.every
    assert not (tmp_path / "run").exists()  # nothing half-written


def test_a_run_directory_in_use_is_not_overwritten(recipe, tmp_path, capsys):
    assert command.main([str(recipe), "train.steps=2"]) == 0
    assert "run.resume=never" in _fails(capsys, recipe, "train.steps=2", "run.resume=never")
    error = _fails(capsys, recipe, "train.steps=2", "optim.clip_norm=2", "data.seed=1")
    assert "optim.clip_norm: was 1.0, is 2.0" in error and "data.seed: was 0, is 1" in error
    accept = "run.accept=[data.seed,optim.clip_norm]"
    assert f"To go on all the same: {accept}." in error
    more = ("optim.clip_norm=2", "data.seed=1")
    assert "train.steps: was 2, is 3" in _fails(capsys, recipe, "train.steps=3", *more, accept)
    assert command.main([str(recipe), "train.steps=2", *more, accept]) == 0
    said = capsys.readouterr().out
    assert "Accepted: data.seed was 0, is 1.\n" in said and "Accepted: seed was 0 and is now 1.\n" in said
    assert "holds another model" in _fails(
        capsys, recipe, f"run.dir={tmp_path / 'other'}", f"init.checkpoint={tmp_path / 'run'}", "model.connector=mlp"
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_next_stage_starts_from_the_weights_of_the_last(recipe, tmp_path, capsys):
    assert command.main([str(recipe)]) == 0
    last = _metrics(tmp_path / "run")[-1]
    stage2 = [f"run.dir={tmp_path / 'stage2'}", f"init.checkpoint={tmp_path / 'run'}", "data.seed=5", "train.steps=2"]
    # In bf16 the optimizer has weights of its own, which must be the checkpoint's too: they make those of step 2.
    stage2 += ["checkpoint.every=1", "train.precision=bf16"]
    assert command.main([str(recipe), *stage2]) == 0
    assert f"from the weights of {tmp_path / 'run' / 'checkpoints' / 'iter_0000006'}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "stage2" / "checkpoints" / "iter_0000002")
    assert command.main([str(recipe), *stage2]) == 0  # what a resumed run saves knows it too
    assert f"Resuming {tmp_path / 'stage2'} from step 1 (" in capsys.readouterr().out
    assert ckpt.main(["info", str(tmp_path / "stage2")]) == 0
    said = capsys.readouterr().out
    assert f"weights    of run run, step 6 ({tmp_path / 'run' / 'checkpoints' / 'iter_0000006'})" in said
    assert f"torch {torch.__version__}" in said
    steps = _metrics(tmp_path / "stage2")
    assert [step["step"] for step in steps] == [1, 2]
    # Random weights: 0.4 above; random ones in the optimizer put step 2 there.
    assert abs(steps[0]["loss"] - last["loss"]) < 0.2 and steps[1]["loss"] < steps[0]["loss"]


def test_a_stop_file_ends_the_run_with_a_checkpoint_and_a_failed_start_says_so(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    assert command.main([str(recipe)]) == 85
    assert json.loads((run / "exit.json").read_text()) == {"outcome": "requeue", "reason": "stop file", "step": 0}
    assert not (run / "stop").exists()
    assert command.main([str(recipe), "train.steps=2"]) == 0
    assert "data.seed: was 0, is 1" in _fails(capsys, recipe, "train.steps=2", "data.seed=1")
    told = json.loads((run / "exit.json").read_text())
    assert told["outcome"] == "failed" and told["reason"].startswith("ValueError: ") and not (run / "lock").exists()


def _start(recipe, *overrides):
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_vlm.train", str(recipe), *overrides],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, to be signalled as a job's launcher does
    )


def _wait_for_lines(process, log, lines):
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n") >= lines):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_told_to_end_saves_asks_for_a_requeue_and_keeps_others_out_until_then(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    overrides = ("train.steps=1000", "checkpoint.every=0", "data.workers=1", "eval.every=0")
    process = _start(recipe, *overrides)
    _wait_for_lines(process, run / "metrics.jsonl", 2)
    assert f"is in use by process {process.pid}" in _fails(capsys, recipe, *overrides)
    os.killpg(process.pid, signal.SIGTERM)  # workers too
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 85, said
    told = json.loads((run / "exit.json").read_text())
    step = len((run / "metrics.jsonl").read_text().splitlines())
    assert told == {"outcome": "requeue", "reason": "SIGTERM", "step": step}
    assert f"Stopped after step {step} (SIGTERM)" in said
    assert [path.name for path in (run / "checkpoints").glob("iter_*")] == [f"iter_{step:07d}"]
    assert not (run / "lock").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(recipe, tmp_path):
    overrides = ("train.steps=9", "train.residual_dropout=0.1", "data.workers=1")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "exit.json").write_text('{"outcome": "requeue"}')  # of an earlier job
    whole = _start(recipe, f"run.dir={tmp_path / 'whole'}", *overrides)
    killed = _start(recipe, f"run.dir={tmp_path / 'killed'}", *overrides)
    # Killed between the checkpoints of steps 4 and 6, when step 5 has been logged.
    _wait_for_lines(killed, tmp_path / "killed" / "metrics.jsonl", 5)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=100)  # ends when its decoding workers have ended too: they hold the same output
    assert not (tmp_path / "killed" / "exit.json").exists()  # how this one ended is not known
    assert whole.wait(timeout=200) == 0, whole.communicate()[0]
    again = _start(recipe, f"run.dir={tmp_path / 'killed'}", *overrides)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert said.startswith(f"Resuming {tmp_path / 'killed'} from step ")
    assert _metrics(tmp_path / "killed") == _metrics(tmp_path / "whole")
    ledgers = [(tmp_path / run / "ledger.jsonl").read_text() for run in ("killed", "whole")]
    assert ledgers[0] == ledgers[1]
    for name in ("iter_0000008", "iter_0000009"):
        first, second = (
            {path.name: path.read_bytes() for path in (tmp_path / run / "checkpoints" / name).glob("*.distcp")}
            for run in ("killed", "whole")
        )
        assert first == second and first  # weights and optimizer, bit for bit
