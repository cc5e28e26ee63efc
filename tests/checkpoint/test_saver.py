"""Saving while training goes on: what is written is what was, and a save that fails is heard of."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vlm.checkpoint import verify
from megatron_vlm.config.schema import CheckpointConfig
from megatron_vlm.parallel.layout import Layout
from tests.checkpoint import toy

LAYOUTS = {"dp2": Layout(2), "tp2": Layout(2, tensor=2)}


def train_while_writing(directory: Path, name: str, frozen: tuple[str, ...]) -> tuple[bool, bool]:
    """Save after step 2 as one waits for it, and once more in the background while steps 3 and 4 are trained; then the
    next one, which is asked for before that has ended.

    Gives whether the second save was still open after these steps, and whether the weights had changed by then.
    """
    from megatron_vlm.checkpoint import save
    from megatron_vlm.checkpoint.saver import Saver

    layout = LAYOUTS[name]
    models, optimizer = toy.build(layout, frozen=frozen)
    config = toy.config(checkpoint=CheckpointConfig(keep=0))
    state: dict[str, Any] = {"models": models, "optimizer": optimizer}
    saver, trained = Saver(directory / "beside", config), threading.Event()
    toy.step(models, optimizer, 1, layout)
    saver.save(**state, step=1, state={})
    assert (directory / "beside" / "latest").read_text() == "iter_0000001\n"
    toy.step(models, optimizer, 2, layout)
    save.save(directory / "waited", **state, step=2, config=config, state={})
    contents = saver._snapshot.contents
    saver._snapshot.contents = lambda: trained.wait(20) and contents()  # type: ignore[method-assign, return-value]
    saver.save(**state, step=2, state={})
    before = [parameter.clone() for parameter in models[0].parameters()]
    toy.step(models, optimizer, 3, layout)
    toy.step(models, optimizer, 4, layout)
    changed = any((a != b).any().item() for a, b in zip(before, models[0].parameters(), strict=True))
    waiting = not (directory / "beside" / "iter_0000002").exists()
    threading.Timer(0.2, trained.set).start()
    saver.save(**state, step=4, state={})
    saver.finish()
    dist.barrier()
    return waiting, changed


@pytest.mark.parametrize(("name", "frozen"), [("dp2", ()), ("tp2", ()), ("dp2", ("embedding",))])
def test_training_during_the_write_changes_nothing_that_is_written(pool, tmp_path, name, frozen):
    assert pool(2).run(train_while_writing, tmp_path, name, frozen) == [(True, True)] * 2
    waited, beside = (tmp_path / kind / "iter_0000002" for kind in ("waited", "beside"))
    verify.verify(beside)
    verify.verify(tmp_path / "beside" / "iter_0000004")
    assert (tmp_path / "beside" / "latest").read_text() == "iter_0000004\n"
    files = verify.files(waited)
    assert verify.files(beside) == files and any(name.endswith(".distcp") for name in files)
    for file in files:
        if file != ".metadata":  # holds an id of the save
            assert (waited / file).read_bytes() == (beside / file).read_bytes(), file


def fail_beside(directory: Path, rank: int) -> tuple[bool, str]:
    """A save in the background whose writer fails on one rank; whether that is seen, and what `finish` raises."""
    from megatron_vlm.checkpoint import save
    from megatron_vlm.checkpoint.saver import Saver

    models, optimizer = toy.build(Layout(2))
    saver = Saver(directory, toy.config())
    saver.save(models=models, optimizer=optimizer, step=1, state={})
    original = save.torch_checkpoint.FileSystemWriter.write_data

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == rank:
        save.torch_checkpoint.FileSystemWriter.write_data = full
    try:
        saver.save(models=models, optimizer=optimizer, step=2, state={})
        assert saver._thread is not None
        saver._thread.join()
        failed = saver.failed
        saver.finish()
    except save.SaveError as error:
        return failed, str(error)
    finally:
        save.torch_checkpoint.FileSystemWriter.write_data = original
    return failed, "nothing"


def test_a_save_that_fails_in_the_background_fails_on_every_rank_and_leaves_nothing(pool, tmp_path):
    for failed, raised in pool(2).run(fail_beside, tmp_path, 0):
        assert failed and "there is no checkpoint of step 2" in raised and "No space left" in raised
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "latest"]
