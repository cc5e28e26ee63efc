"""The job files of examples/slurm on a real SLURM of two nodes with one process each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster, cluster, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=f"no SLURM here (Debian: slurm-wlm, munge); missing: {missing()}"),
]
ROOT = Path(__file__).parents[2]
#: More steps than a test waits for.
ENDLESS = "train.steps=100000"
SMALL = ("train.global_batch=2", "train.micro_batch=1")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder that looks like the repository, so that runs/ is not the developer's own."""
    for name in ("examples", "megatron_vlm"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def send(slurm: Cluster, folder: Path, file: str, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **slurm.environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*file.split(), *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert not done.returncode, done.stderr
    return done


def train(slurm: Cluster, folder: Path, *words: str, options: tuple[str, ...] = ("--time=20",)) -> str:
    """Send train.sbatch; its job number."""
    file = "examples/slurm/train.sbatch"
    return send(slurm, folder, "sbatch --parsable", *TWO_NODES, *options, file, *SMALL, *words).stdout.strip()


def wait(condition: Callable[[], object], what: Callable[[], str], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(0.3)


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def output(folder: Path, job: str) -> str:
    ranks = "".join(f"\n{path}:\n{path.read_text()[-2000:]}" for path in folder.glob(f"runs/*/logs/{job}/rank-*.log"))
    job_file = folder / f"slurm-{job}.out"
    return (job_file.read_text() if job_file.exists() else "") + ranks


def ended(slurm: Cluster, folder: Path, job: str, seconds: float = 150) -> str:
    states = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
    wait(lambda: slurm.state(job) not in states, lambda: output(folder, job), seconds)
    return slurm.state(job)


def start(slurm: Cluster, job: str) -> None:
    """A requeued job now, not in two minutes as SLURM would. Not at once: the attempt before is still cleaned up."""
    time.sleep(4)

    def running() -> bool:
        if slurm.state(job) == "PENDING":
            slurm.command("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=20")
            time.sleep(1)
        return slurm.state(job) == "RUNNING"

    wait(running, lambda: slurm.command("scontrol", "show", "job", job), 60)


def test_three_requeues_give_the_weights_of_the_run_that_was_never_stopped(slurm, clone):
    run = clone / "runs" / "tiny-stage1"
    never = clone / "runs" / "never"
    # A real limit of one minute; SLURM sends the first signal 57 s before its end, at most 60 s earlier or later.
    # A save after every step: fewer steps until then, which the other run has to repeat.
    job = train(slurm, clone, ENDLESS, "checkpoint.every=1", options=("--time=1", "--signal=B:USR1@57"))
    for attempt in range(4):
        if attempt:
            start(slurm, job)
            before = steps(run)
            wait(lambda: steps(run) >= before + 2, lambda: output(clone, job))  # noqa: B023
            slurm.command("scancel", "--batch", "--signal=USR1", job)
        wait(lambda: output(clone, job).count("back to the queue") == attempt + 1, lambda: output(clone, job))  # noqa: B023
        wait(lambda: slurm.state(job) == "PENDING", lambda: output(clone, job))
    slurm.command("scancel", job)
    last = json.loads((run / "exit.json").read_text())["step"]
    assert steps(run) == last

    command = ["bash", "examples/pretrain_stage1.sh", *SMALL, ENDLESS, f"run.dir={never}", f"checkpoint.every={last}"]
    environment = {**os.environ, "NPROC": "2", "OMP_NUM_THREADS": "1"}
    checkpoint = f"checkpoints/iter_{last:07d}"
    with subprocess.Popen(command, cwd=clone, env=environment, stdout=subprocess.DEVNULL) as reference:
        try:
            wait(
                lambda: reference.poll() or (never / checkpoint).exists(),
                lambda: f"{steps(never)} of {last} steps",
                300,
            )
            (never / "stop").touch()
            reference.wait(60)
        finally:
            reference.terminate()
    ledgers = [(folder / "ledger.jsonl").read_text().splitlines()[:last] for folder in (run, never)]
    assert len(ledgers[0]) == last and ledgers[0] == ledgers[1]
    same = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "ckpt.py"), "diff", str(run / checkpoint), str(never / checkpoint)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert same.returncode == 0, same.stdout + same.stderr


def test_scancel_leaves_no_process_and_does_not_come_back(slurm, clone):
    job = train(slurm, clone, ENDLESS)
    wait(lambda: steps(clone / "runs" / "tiny-stage1") >= 3, lambda: output(clone, job))
    slurm.command("scancel", job)
    assert ended(slurm, clone, job) == "CANCELLED"
    wait(lambda: not _trainers(clone), lambda: str(_trainers(clone)), 30)


def test_a_dead_node_ends_the_job_and_is_named(slurm, clone):
    job = train(slurm, clone, ENDLESS)
    wait(lambda: steps(clone / "runs" / "tiny-stage1") >= 3, lambda: output(clone, job))
    slurm.kill_node("node2")
    try:
        assert ended(slurm, clone, job) == "FAILED", output(clone, job)
        told = output(clone, job)
        assert "First to end: node2: task 1: Killed" in told and "go on from the latest checkpoint" in told, told
        wait(lambda: not _trainers(clone), lambda: str(_trainers(clone)), 30)
    finally:
        slurm.command("slurmd", "-N", "node2")
        wait(lambda: "idle 2" in slurm.command("sinfo", "--noheader", "--format", "%T %D"), lambda: "node2 is not back")


def test_a_wrong_setting_fails_with_the_trainers_words(slurm, clone):
    job = train(slurm, clone, "train.global_batchh=2")
    assert ended(slurm, clone, job) == "FAILED"
    assert "global_batchh" in (clone / f"slurm-{job}.out").read_text()


def test_the_chain_runs_three_stages(slurm, clone):
    settings = (*SMALL, "train.steps=2", "eval.every=0", "run.name=chain")
    sent = send(slurm, clone, "bash examples/slurm/all_stages.sbatch", *TWO_NODES, "--time=20", "--", *settings)
    jobs = [line.split()[-1] for line in sent.stdout.splitlines()]
    assert len(jobs) == 3
    for job in jobs:
        assert ended(slurm, clone, job, 200) == "COMPLETED", output(clone, job)
    for stage in (1, 2, 3):
        assert json.loads((clone / f"runs/tiny-stage{stage}/exit.json").read_text())["outcome"] == "finished"


def _trainers(folder: Path) -> list[str]:
    found = (" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"]))
    return [words for words in found if "megatron_vlm.train" in words and str(folder) in words]
