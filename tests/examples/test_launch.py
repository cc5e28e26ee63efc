"""The stage scripts: what they start and refuse. Nothing is trained: PYTHON=echo shows the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vlm.config import load

ROOT = Path(__file__).parents[2]
SCRIPTS = {"stage1": "pretrain_stage1.sh", "stage2": "sft_stage2.sh", "stage3": "longcontext_stage3.sh"}
LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RECIPE"}


def start(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the launcher's variables and without GPUs, but for `env`."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def shown(*command: object, cwd: Path = ROOT, **env: str) -> str:
    """The command that a script would start."""
    done = start(*command, cwd=cwd, PYTHON="echo", **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("stage", SCRIPTS)
@pytest.mark.parametrize("program", ["bash", sys.executable], ids=["bash", "python"])
def test_a_stage_script_is_both_bash_and_python(stage, program, tmp_path):
    done = start(program, f"examples/{SCRIPTS[stage]}", "train.steps=7", "--print-config", "log.every=3")
    assert done.returncode == 0, done.stderr
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(done.stdout)
    recipe = ROOT / "examples" / "recipes" / "tiny" / f"{stage}.yaml"
    assert load.load(resolved) == load.load(recipe, ["train.steps=7", "log.every=3"])


def test_the_line_of_the_readme_works_with_several_processes():
    done = start("torchrun", "--nproc-per-node", "2", "examples/pretrain_stage1.sh", "--print-config")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("name: tiny-stage1") == 1  # one process answers


def test_help_lists_the_settings():
    done = start("bash", "examples/pretrain_stage1.sh", "--help")
    assert done.returncode == 0 and "train.steps=" in done.stdout and "Optimizer steps." in done.stdout


def test_one_process_is_started_directly():
    recipe = ROOT / "examples" / "recipes" / "tiny" / "stage1.yaml"
    assert shown("bash", "examples/pretrain_stage1.sh", "a.b=c d") == f"-m megatron_vlm.train {recipe} a.b=c d"


def test_the_chain_of_stages_goes_on_where_it_was(tmp_path):
    """The trainer is a script that notes its stage and ends as it is told."""
    trainer = tmp_path / "trainer"
    trainer.write_text(
        """#!/bin/bash
        stage="$(echo "$*" | grep -o 'stage[123]' | head -n 1)"
        mkdir -p "runs/tiny-$stage/checkpoints"
        echo "$stage" >> started
        outcome=finished
        if [ "$stage" = "$STOP_AT" ]; then outcome=requeue; fi
        echo "{\\"outcome\\": \\"$outcome\\"}" > "runs/tiny-$stage/exit.json"
        exit $([ "$stage" = "$STOP_AT" ] && echo "$CODE" || echo 0)
        """
    )
    trainer.chmod(0o755)
    chain = ROOT / "examples" / "all_stages.sh"

    def go(**env: str) -> tuple[int, list[str]]:
        (tmp_path / "started").write_text("")
        done = start("bash", chain, cwd=tmp_path, PYTHON=str(trainer), **env)
        return done.returncode, (tmp_path / "started").read_text().split()

    assert go(STOP_AT="stage2", CODE="85") == (85, ["stage1", "stage2"])
    assert go(STOP_AT="stage2", CODE="0") == (85, ["stage2"])  # a launcher that hides the code
    assert go(STOP_AT="stage3", CODE="1") == (1, ["stage2", "stage3"])
    assert go(STOP_AT="") == (0, ["stage3"])
    assert go(STOP_AT="") == (0, [])


def test_a_script_works_from_any_folder(tmp_path):
    assert str(ROOT / "examples" / "recipes" / "tiny" / "stage1.yaml") in shown(
        "bash", ROOT / "examples" / "pretrain_stage1.sh", cwd=tmp_path
    )


def test_a_rank_of_a_launcher_becomes_the_trainer():
    command = shown("bash", "examples/pretrain_stage1.sh", "x.y=z", RANK="1", WORLD_SIZE="2", NPROC="5")
    assert command.startswith("-m megatron_vlm.train ") and command.endswith("/tiny/stage1.yaml x.y=z")


def test_launch_settings_come_from_the_environment():
    command = shown("bash", "examples/pretrain_stage1.sh", NPROC="3")
    assert command.startswith("-m torch.distributed.run --standalone --nproc-per-node 3 -m megatron_vlm.train ")
    command = shown(
        "bash", "examples/pretrain_stage1.sh", NPROC="8", NNODES="2", NODE_RANK="1", MASTER_ADDR="a", MASTER_PORT="9"
    )
    assert "--nnodes 2 --node-rank 1 --master-addr a --master-port 9 --nproc-per-node 8 -m" in command


@pytest.mark.slow
@pytest.mark.processes
def test_the_processes_reach_the_trainer():
    """Three data-parallel ranks cannot share 8 rows: the trainer's own check, so it saw all three."""
    done = start("bash", "examples/pretrain_stage1.sh", "train.global_batch=8", "train.micro_batch=1", NPROC="3")
    assert done.returncode != 0
    assert done.stderr.count("train.global_batch=8 rows cannot be dealt to 3 data-parallel ranks") == 1


def test_visible_gpus_decide_the_processes_and_the_real_recipe_is_named():
    done = start("bash", "examples/pretrain_stage1.sh", PYTHON="echo", CUDA_VISIBLE_DEVICES="0,3")
    assert "RECIPE=molmo2_4b bash examples/pretrain_stage1.sh data.manifest=" in done.stdout
    assert "--nproc-per-node 2 " in done.stdout
    quiet = start("bash", "examples/pretrain_stage1.sh", "train.steps=5", PYTHON="echo", CUDA_VISIBLE_DEVICES="0,3")
    assert "RECIPE" not in quiet.stdout


def test_gpus_are_counted_by_the_driver_tool(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: one"; done\n')
    tool.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name not in {*LAUNCHER, "CUDA_VISIBLE_DEVICES"}}
    done = subprocess.run(
        ["bash", "examples/pretrain_stage1.sh"],
        cwd=ROOT,
        env=inherited | {"PYTHON": "echo", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "--nproc-per-node 4 " in done.stdout


def test_the_size_comes_from_recipe():
    assert "/molmo2_8b/stage1.yaml" in shown("bash", "examples/pretrain_stage1.sh", RECIPE="molmo2_8b")
    done = start("bash", "examples/pretrain_stage1.sh", RECIPE="gigantic")
    assert done.returncode == 2 and "RECIPE=gigantic has no stage1" in done.stderr and " tiny " in done.stderr
    assert "mixtures" not in done.stderr and "tiny_video" not in done.stderr  # which is a third stage alone
    done = start("bash", "examples/longcontext_stage3.sh", RECIPE="gigantic")
    assert "RECIPE=gigantic has no stage3" in done.stderr and " tiny_video " in done.stderr


@pytest.mark.parametrize(("stage", "before"), [("stage2", "stage1"), ("stage3", "stage2")])
def test_a_later_stage_needs_the_weights_of_the_one_before(stage, before, tmp_path):
    script = ROOT / "examples" / SCRIPTS[stage]
    done = start("bash", script, cwd=tmp_path)
    assert done.returncode == 2
    assert f"runs/tiny-{before}/checkpoints is not there" in done.stderr and "init.checkpoint=" in done.stderr
    assert "init.checkpoint=elsewhere" in shown("bash", script, "init.checkpoint=elsewhere", cwd=tmp_path)
    (tmp_path / "runs" / f"tiny-{before}" / "checkpoints").mkdir(parents=True)
    assert f"/tiny/{stage}.yaml" in shown("bash", script, cwd=tmp_path)


def test_a_clone_that_is_not_installed_runs(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "megatron_vlm", tmp_path / "megatron_vlm")
    done = start("bash", "examples/pretrain_stage1.sh", "--print-config", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0 and "name: tiny-stage1" in done.stdout, done.stderr
