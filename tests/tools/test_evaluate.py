"""The evaluation command: shares, going on after a stop, faults that are named, provenance, the page."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_vlm.evaluate import asking, endpoint
from tests.data.server import Server, send
from tests.evaluate import world
from tests.evaluate.test_endpoint import PATH, sensible
from tools import evaluate

ROOT = Path(__file__).parents[2]


def trained(folder: Path) -> None:
    """A run of one step, in a process of its own groups."""
    from megatron_vlm.config import load
    from megatron_vlm.train import __main__ as command

    settings = load.to_dict(world.config(folder))
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    assert command.main([str(folder / "recipe.yaml")]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    world.shards(path, broken=True)
    trained(path)
    return path


def command(folder: Path, out: Path, *words: str) -> list[str]:
    return [str(folder / "run"), "--out", str(out), "--device", "cpu", "--tasks", "vqa", "pointing", *words]


def lines(out: Path, name: str) -> list[dict]:
    found = [json.loads(line) for path in sorted(out.glob(f"evaluation/{name}.*.jsonl")) for line in path.open()]
    return sorted(found, key=lambda one: one["key"])


@pytest.mark.slow
def test_the_report_says_what_was_asked_of_whom_and_what_could_not_be_scored(folder, tmp_path, capsys):
    assert evaluate.main(command(folder, tmp_path, "--untrained-limit", "4")) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["step"] == 1 and len(result["checkpoint_sha256"]) == len(result["manifest"]) == 64
    assert result["versions"]["torch"] and result["settings"]["limit"] == 0 and "overlap" in result["judge"]
    vqa, pointing = result["tasks"]
    assert (vqa["images"], vqa["scores"]["questions"], pointing["scores"]["questions"]) == (12, 24, 12)
    # Two samples could not be asked: four questions leave the count, and are named.
    assert vqa["scores"]["scores"]["accuracy"]["wholes"] == 20
    reasons = vqa["scores"]["not_scored"]
    assert sum(count for reason, count in reasons.items() if reason.startswith("media or prompt: ")) == 4
    assert any("has no readable header" in one and "sample test-3" in one for one in reasons)
    assert any("need more positions than the model's" in one for one in reasons)
    assert vqa["shuffled"]["questions"] == 24 and vqa["untrained"]["questions"] == 8
    # Two thirds cats, always red: 8 + 12 of 24 without looking.
    assert vqa["blind"]["scores"]["accuracy"]["parts"] == 19  # sample 5 asks something else: `cat` there is right too
    assert "| vqa (accuracy) | 24 |" in said and "vqa: 2 not scored: media or prompt: image " in said
    assert (
        (tmp_path / "evaluation.md").read_text().endswith(said[said.index("| task") : said.index("\n\nWritten")] + "\n")
    )
    page = (tmp_path / "evaluation.html").read_text()
    assert "<script" not in page and "http" not in page.replace("data:image", "") and page.count("<img") >= 10
    assert "Best" in page and "Worst" in page and result["manifest"] in page


@pytest.mark.slow
def test_a_second_call_goes_on_and_asks_only_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    asked: list[int] = []
    decode = asking.decode

    def counted(model, prompts, *words, **more):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return decode(model, prompts, *words, **more)

    monkeypatch.setattr(asking, "AT_ONCE", 4)
    monkeypatch.setattr(asking, "decode", counted)
    words = command(folder, tmp_path, "--shuffled-limit", "-1")
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(words)
    before = lines(tmp_path, "vqa.scored")
    assert len(before) == 8 and len(lines(tmp_path, "pointing.scored")) == 0
    # The process was killed while it wrote: half a line.
    (path,) = tmp_path.glob("evaluation/vqa.scored.*.jsonl")
    with path.open("a") as file:
        file.write('{"key": "test-11", "sa')
    asked.clear()
    asked += [0] * 10  # never interrupted again
    assert evaluate.main(words) == 0
    # vqa: four were left, and two of the eight had faults: asked again, in vain. Then pointing, all but the broken one.
    assert sum(asked) == 4 + 11
    after = lines(tmp_path, "vqa.scored")
    assert all(one in after for one in before) and {one["key"] for one in after} == {f"test-{n}" for n in range(12)}
    report = (tmp_path / "evaluation.json").read_bytes()
    assert evaluate.main(words) == 0 and sum(asked) == 15
    assert (tmp_path / "evaluation.json").read_bytes() == report
    capsys.readouterr()


def in_shares(words: list[str]) -> None:
    """On a rank of a pool."""
    evaluate._evaluate(evaluate.arguments(words))


@pytest.mark.slow
def test_copies_of_the_model_answer_a_share_each_and_every_layout_comes_to_the_same_report(
    folder, tmp_path, pool, capsys
):
    alone = tmp_path / "alone"
    assert evaluate.main(command(folder, alone)) == 0
    wanted = json.loads((alone / "evaluation.json").read_text())
    for ranks, copies, words in (
        (2, 2, []),
        (2, 1, ["--tensor", "2"]),
        (2, 1, ["--pipeline", "2"]),
        (4, 2, ["--tensor", "2"]),
    ):
        shared = tmp_path / "".join([str(ranks), *words])
        pool(ranks).run(in_shares, command(folder, shared, *words))
        writers = sorted(path.name.split(".")[-2] for path in shared.glob("evaluation/vqa.scored.*"))
        assert writers == [f"{copy:04d}" for copy in range(copies)]
        for name in ("vqa.scored", "vqa.shuffled", "pointing.scored"):
            assert lines(shared, name) == lines(alone, name), words
        assert json.loads((shared / "evaluation.json").read_text()) == wanted
    capsys.readouterr()


def in_vain(words: list[str]) -> tuple[list[dict], int]:
    """On a rank of a pool, the second of which cannot read a sample: what was kept, how often a prompt was made."""
    import torch.distributed as dist

    made: list[str] = []
    prompt = asking.tasks.prompt

    def failing(sample, *others):
        made.append(sample.key)
        if dist.get_rank() == 1 and sample.key == "test-7":
            raise OSError(5, "Input/output error")
        return prompt(sample, *others)

    asking.tasks.prompt = failing
    try:
        evaluate._evaluate(evaluate.arguments(words))
    finally:
        asking.tasks.prompt = prompt
    return lines(Path(words[words.index("--out") + 1]), "vqa.scored"), len(made)


@pytest.mark.slow
def test_a_file_that_one_rank_of_a_model_cannot_read_is_a_fault_of_all(folder, tmp_path, pool):
    words = command(folder, tmp_path, "--tensor", "2", "--shuffled-limit", "-1")
    for kept, made in pool(2).run(in_vain, words):
        by_key = {one["key"]: one for one in kept}
        assert "Input/output error" in by_key["test-7"]["fault"] and "said" in by_key["test-6"]
        assert made == 24
    # What has a fault is asked again, by both: three questions of the one task, two of the other.
    assert [made for _, made in pool(2).run(in_vain, words)] == [5, 5]


@pytest.mark.slow
def test_a_killed_process_loses_nothing_that_was_finished(folder, tmp_path, capsys):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    code = "import sys; from megatron_vlm.evaluate import asking; asking.AT_ONCE = 1; from tools import evaluate; "
    start = [sys.executable, "-c", code + "sys.exit(evaluate.main(sys.argv[1:]))", *command(folder, tmp_path)]
    process = subprocess.Popen(start, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(lines(tmp_path, "vqa.scored")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = [line for path in tmp_path.glob("evaluation/vqa.scored.*") for line in path.read_text().splitlines(True)]
    kept = [line for line in kept if line.endswith("\n")]
    assert evaluate.main(command(folder, tmp_path)) == 0
    capsys.readouterr()
    after = [line for path in tmp_path.glob("evaluation/vqa.scored.*") for line in path.read_text().splitlines(True)]
    assert after[: len(kept)] == kept
    assert len({json.loads(line)["key"] for line in after}) == 12


@pytest.mark.slow
def test_a_judge_that_is_down_or_refuses_costs_no_answer(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(endpoint, "Endpoint", partial(endpoint.Endpoint, tries=1, timeout_s=20.0))
    with socket.create_server(("127.0.0.1", 0)) as free:
        down = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    words = [str(folder / "run"), "--out", str(tmp_path), "--device", "cpu", "--tasks", "captions", "--limit", "2"]
    words += ["--shuffled-limit", "-1", "--judge"]
    assert evaluate.main([*words, down]) == 0
    (task,) = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]
    assert task["scores"]["not_scored"] == {"judge: no connection (NewConnectionError)": 2}
    answers = lines(tmp_path, "captions.scored")
    assert len(answers) == 2 and all("said" in one for one in answers)
    monkeypatch.setattr(asking, "decode", None)  # nothing is asked of the model again
    server = Server()
    try:
        server.answers[PATH] = lambda handler, _: send(handler, 401, b"bad key")
        assert evaluate.main([*words, f"{server.address}/v1"]) == 1
        assert "refuses (status 401)" in capsys.readouterr().err
        server.answers[PATH] = lambda handler, _: sensible(server, handler)
        assert evaluate.main([*words, f"{server.address}/v1"]) == 0
    finally:
        server.stop()
    (task,) = json.loads((tmp_path / "evaluation.json").read_text())["tasks"]
    assert task["scores"]["scores"]["statement F1"]["wholes"] == 2 and lines(tmp_path, "captions.scored") == answers
    capsys.readouterr()


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert evaluate.main([*words, "--device", "cpu"]) == 1
    return capsys.readouterr().err


def test_a_task_that_there_is_not_is_named_before_anything_is_loaded(tmp_path, capsys):
    assert "there is no task 'vqq'; did you mean vqa" in fails(capsys, str(tmp_path), "--tasks", "vqq")
    assert "no checkpoint" in fails(capsys, str(tmp_path))
    assert "Start a multiple of 6 processes" in fails(capsys, str(tmp_path), "--tensor", "2", "--pipeline", "3")
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path), "--limit", "-3"])
    assert "--limit -3: needed 0 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_errors_name_the_thing_and_the_next_move(folder, tmp_path, capsys):
    run = str(folder / "run")
    assert "has no data set 'counting'" in fails(capsys, run, "--tasks", "counting")
    assert "holds no manifest.json" in fails(capsys, run, "--tasks", "vqa", "--manifest", str(tmp_path))
    # A checkpoint whose settings describe another model than its tensors are.
    other = tmp_path / "other"
    shutil.copytree(folder / "run" / "checkpoints" / "iter_0000001", other)
    settings = json.loads((other / "config.json").read_text())
    settings["model"]["connector"] = "mlp"
    (other / "config.json").write_text(json.dumps(settings))
    assert "holds another model" in fails(capsys, str(other), "--tasks", "vqa")
