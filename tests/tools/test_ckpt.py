"""Checkpoints of a real run: described, verified, compared; the replay of a step that a guard dumped."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest

from megatron_vlm.config.schema import GuardConfig
from tests.data import world as data
from tests.train import world
from tests.train.test_guard import _poisoned
from tools import ckpt, replay


@pytest.fixture(scope="module")
def run(tmp_path_factory, pool):
    """A run with checkpoints after steps 2 and 4; a guard has left step 4 out."""
    folder = tmp_path_factory.mktemp("ckpt")
    data.build(folder / "data")
    config = world.config(folder / "data")
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(folder / "run"), device="cpu"),
        train=dataclasses.replace(config.train, steps=4),
        checkpoint=dataclasses.replace(config.checkpoint, every=2),
        guard=GuardConfig(not_finite="skip"),
        log=dataclasses.replace(config.log, tensorboard=False),
    )
    pool(2).run(_poisoned, config, {4}, timeout_s=200)
    return folder / "run"


def test_info_names_step_data_and_parts(run, capsys):
    assert ckpt.main(["info", str(run)]) == 0
    out = capsys.readouterr().out
    assert "iter_0000004: after step 4" in out and "skipped_steps 1" in out and "manifest " in out
    parts = {name: int(count.replace(",", "")) for count, name in re.findall(r"^ +([\d,]+)  (\S+)$", out, re.M)}
    assert parts["language.decoder"] > 1000 and parts["optimizer"] > 2 * parts["language.decoder"]


def test_verify_finds_the_damaged_one(run, tmp_path, capsys):
    assert ckpt.main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("sound ") == 2
    copy = shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    file = next((copy / "iter_0000002").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert ckpt.main(["verify", str(copy)]) == 1
    out = capsys.readouterr().out
    assert out.count("sound ") == 1 and re.search(rf"DAMAGED  .*contents of {file.name} are not what was written", out)
    assert ckpt.main(["diff", str(copy / "iter_0000002"), str(run)]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_diff_tells_equal_weights_from_others(run, tmp_path, capsys):
    assert ckpt.main(["diff", str(run), str(run / "checkpoints" / "iter_0000004")]) == 0
    assert re.search(r"(\d+) of \1 tensors are equal bit for bit", capsys.readouterr().out)
    both = [str(run / "checkpoints" / f"iter_000000{step}") for step in (2, 4)]
    assert ckpt.main(["diff", *both]) == 1
    out = capsys.readouterr().out
    assert "state.counters.skipped_steps: 0 | 1" in out and "relative difference" in out
    assert ckpt.main(["diff", *both, "--tolerance", "10"]) == 0


def test_what_is_no_checkpoint_is_named(tmp_path, capsys):
    for words in (["info", str(tmp_path)], ["verify", str(tmp_path / "gone")], ["diff", str(tmp_path), str(tmp_path)]):
        assert ckpt.main(words) == 1
        assert "there is no checkpoint at" in capsys.readouterr().err


def _replayed(words):
    """The command's table on a rank of a pool, which has its process group already."""
    import contextlib
    import io

    from megatron_vlm.parallel import process

    leave, process.leave = process.leave, lambda: None
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = replay.main(words)
    finally:
        process.leave = leave
    return code, out.getvalue(), err.getvalue()


def test_replay_runs_the_rows_of_the_dump_again(run, pool):
    ((code, out, err),) = pool(1).run(
        _replayed, [str(run / "guards" / "step-0000004.json"), "--advance"], timeout_s=200
    )
    assert code == 0, err
    assert "Step 4 again, with the weights of step 3" in out
    # Two ranks made the dump, one the replay; the poison was in memory only, so the replay's numbers are finite.
    assert re.search(r"^loss +nan +\d", out, re.M)
    assert "language.decoder.layers.0" in out and "Rows with the largest mean loss" in out
    ((code, out, err),) = pool(1).run(_replayed, [str(run / "guards" / "step-0000004.json")], timeout_s=200)
    assert code == 0 and "with OLDER weights, those of step 2" in out, err
