"""Checkpoints across layouts: what is loaded is what was saved, bit for bit; training goes on as if never stopped."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.checkpoint import verify
from megatron_vlm.config.presets import TINY_LANGUAGE
from megatron_vlm.config.schema import ModelConfig
from megatron_vlm.parallel.layout import Layout
from tests.checkpoint import toy

STATE = {"window": 3, "offset": [1, 2], "rate": 0.1 + 0.2, "name": "ünïcode"}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole. Collective."""
    from megatron.core import dist_checkpointing

    found: dict[str, torch.Tensor] = {}
    for folder in verify.folders(path):
        plain = dist_checkpointing.load_plain_tensors(str(folder))
        found |= {name: value for name, value in plain.items() if isinstance(value, torch.Tensor)}
    return found


def differing(first: Path, second: Path) -> list[str]:
    """Names of tensors that are not the same in two checkpoints, bit for bit."""
    one, two = tensors(first), tensors(second)
    assert len(one) > 10, "embedding, head, norms and layers, and the optimizer's three tensors for some"
    return sorted(
        name for name in {*one, *two} if name not in one or name not in two or not torch.equal(one[name], two[name])
    )


def train(layout: Layout, directory: Path, steps: int, save_at: int) -> list[float]:
    from megatron_vlm.checkpoint import save

    models, optimizer = toy.build(layout)
    losses = []
    for number in range(1, steps + 1):
        losses.append(toy.step(models, optimizer, number, layout))
        if number in (save_at, steps):
            save.save(directory, models=models, optimizer=optimizer, step=number, config=toy.config(), state=STATE)
    return losses


def resume(layout: Layout, source: Path, directory: Path, steps: int) -> dict[str, Any]:
    """Load into other random weights, save again at once, go on to `steps`, save."""
    from megatron_vlm.checkpoint import load, save

    models, optimizer = toy.build(layout, seed=99)
    state = load.load(source, models=models, optimizer=optimizer, config=toy.config())
    step = load.read(source).step
    again = save.save(directory, models=models, optimizer=optimizer, step=step, config=toy.config(), state=state)
    differences = differing(source, again)
    rates = {group["lr_mult"]: (group["lr"], group["max_lr"]) for group in optimizer.param_groups}
    losses = [toy.step(models, optimizer, number, layout) for number in range(step + 1, steps + 1)]
    if losses:
        save.save(directory, models=models, optimizer=optimizer, step=steps, config=toy.config(), state=state)
    return {"state": state, "differences": differences, "rates": rates, "losses": losses}


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory) -> tuple[Path, list[float]]:
    """Saved at step 3 and, never stopped, at step 6, with tensor parallelism 2; its losses."""
    directory = tmp_path_factory.mktemp("trained")
    losses = pool(2).run(train, Layout(2, tensor=2), directory, 6, 3)
    return directory, losses[0]


def check_same_everywhere(first: Path, second: Path) -> list[str]:
    return differing(first, second)


def test_resume_on_the_same_layout_is_exact(pool, trained, tmp_path):
    directory, losses = trained
    for found in pool(2).run(resume, Layout(2, tensor=2), directory / "iter_0000003", tmp_path, 6):
        assert found["state"] == STATE
        assert found["losses"] == losses[3:]
        assert found["differences"] == []
    assert pool(2).run(check_same_everywhere, directory / "iter_0000006", tmp_path / "iter_0000006") == [[], []]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1),
        Layout(2),
        *(
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in (Layout(2, pipeline=2), Layout(2, context=2), Layout(4, tensor=2))
        ),
    ],
    ids=lambda layout: f"tp{layout.tensor}cp{layout.context}pp{layout.pipeline}dp{layout.data}",
)
def test_resume_on_another_layout(pool, trained, tmp_path, layout):
    """Loading changes no bit of weights and moments; later losses differ by the order of sums only (measured 6e-8)."""
    directory, losses = trained
    steps = 4 if layout.context == 1 else 3  # the toy's attention knows no context parallelism: load and save only
    for found in pool(layout.world).run(resume, layout, directory / "iter_0000003", tmp_path, steps):
        assert found["differences"] == []
        assert found["losses"] == pytest.approx(losses[3:steps], abs=1e-6)
        assert found["rates"] == {tag: (rate, rate) for tag, rate in toy.RATES.items()}


def test_chain_of_layouts_ends_where_it_began(pool, trained, tmp_path):
    """Pipeline 2 to data parallel 2 to tensor parallel 2: the third checkpoint holds the first's bits."""
    source = trained[0] / "iter_0000003"
    for index, layout in enumerate((Layout(2, pipeline=2), Layout(2), Layout(2, tensor=2))):
        target = tmp_path / str(index)
        for found in pool(2).run(resume, layout, source, target, 3):
            assert found["differences"] == []
        source = target / "iter_0000003"
    assert pool(2).run(check_same_everywhere, trained[0] / "iter_0000003", source) == [[], []]


def newest_sound(directory: Path) -> tuple[str, list[str]]:
    from megatron_vlm.checkpoint import load

    path, faults = load.newest_sound(directory)
    return path.name if path else "", faults


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(pool, trained, tmp_path):
    directory = shutil.copytree(trained[0], tmp_path / "damaged")
    assert pool(2).run(newest_sound, directory) == [("iter_0000006", [])] * 2
    newest = directory / "iter_0000006"
    for name in ("__0_0.distcp", "__1_0.distcp"):  # the ranks share the files: each reads one of these
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        found = pool(2).run(newest_sound, directory)
        assert [path for path, _ in found] == ["iter_0000003"] * 2
        assert all(f"iter_0000006 is damaged: the contents of {name} are not" in fault for _, (fault,) in found)
        (newest / name).write_bytes(whole)
    for step in (3, 6):
        (directory / f"iter_{step:07d}" / "state.json").unlink()
    with pytest.raises(RuntimeError, match="damaged is whole:\n  - .*iter_0000006 .*\n  - .*iter_0000003 "):
        pool(2).run(newest_sound, directory)


def weights_only(source: Path, directory: Path) -> dict[str, Any]:
    from megatron_vlm.checkpoint import load, save

    layout = Layout(dist.get_world_size())
    models, _ = toy.build(layout, seed=99)
    load.load(source, models=models)
    again = save.save(directory, models=models, optimizer=None, step=0, config=toy.config(), state={})
    one, two = tensors(source), tensors(again)
    kept = {name: tensor for name, tensor in one.items() if not name.startswith("optimizer.")}
    return {"names": set(kept) == set(two), "equal": all(torch.equal(kept[name], two[name]) for name in kept)}


def test_weights_alone_start_a_new_run_and_make_a_checkpoint_without_optimizer(pool, trained, tmp_path):
    assert pool(2).run(weights_only, trained[0] / "iter_0000003", tmp_path) == [{"names": True, "equal": True}] * 2
    with pytest.raises(
        RuntimeError, match=r"does not fit: \d+ tensors are missing in it \(first: optimizer[\s\S]*init"
    ):
        pool(2).run(resume, Layout(2), tmp_path, tmp_path, 1)


def load_into(source: Path, layout: Layout, build: dict[str, Any], config: Any) -> None:
    from megatron_vlm.checkpoint import load

    models, optimizer = toy.build(layout, **build)
    load.load(source, models=models, optimizer=optimizer, config=config)


@pytest.mark.parametrize(
    ("build", "model", "message"),
    [
        (
            {},
            ModelConfig(connector="linear", image_pool=1),
            r"another model: connector.kind is 'attention_pooling' there and 'linear' here\. Set",
        ),
        # How many patches are pooled is no matter of weights: a recipe may begin with imported ones, or another's.
        (
            {"width": 32},
            ModelConfig(image_pool=1, video_pool=7),
            r"tensors have other shapes \(first: \S+, \(\S+ 16\) there, \(\S+ 32\) here\)",
        ),
        ({"frozen": ("layers",)}, ModelConfig(), r"have no place in this run \(first: optimizer.*model.freeze"),
    ],
    ids=["architecture", "shapes", "frozen"],
)
def test_another_model_is_refused_with_what_differs(pool, trained, build, model, message):
    config = toy.config(model=model)
    with pytest.raises(RuntimeError, match=f"ValueError: checkpoint .*{message}"):
        pool(2).run(load_into, trained[0] / "iter_0000003", Layout(2), build, config)


def test_missing_directory_is_named(pool, tmp_path):
    with pytest.raises(RuntimeError, match=f"ValueError: there is no checkpoint at {tmp_path}/none"):
        pool(2).run(load_into, tmp_path / "none", Layout(2), {}, None)


def round_trip(directory: Path, frozen: tuple[str, ...]) -> tuple[list[str], float, float]:
    from megatron_vlm.checkpoint import load, save

    layout = Layout(2, pipeline=2)
    models, optimizer = toy.build(layout, frozen=frozen)
    toy.step(models, optimizer, 1, layout)
    saved = save.save(directory, models=models, optimizer=optimizer, step=1, config=toy.config(), state={})
    expected = toy.step(models, optimizer, 2, layout)
    from megatron_vlm.parallel import groups

    groups.destroy()
    models, optimizer = toy.build(layout, frozen=frozen, seed=99)
    load.load(saved, models=models, optimizer=optimizer)
    again = save.save(directory, models=models, optimizer=optimizer, step=2, config=toy.config(), state={})
    return differing(saved, again), toy.step(models, optimizer, 2, layout), expected


@pytest.mark.parametrize("frozen", [("layers", "embedding"), ("layers", "final", "output")], ids=["first", "last"])
def test_stage_that_trains_nothing(pool, tmp_path, frozen):
    for differences, found, expected in pool(2).run(round_trip, tmp_path, frozen):
        assert differences == []
        assert found == expected


def before_first_step(directory: Path) -> list[float]:
    from megatron_vlm.checkpoint import load, save
    from megatron_vlm.parallel import groups

    losses = []
    layout = Layout(2)
    models, optimizer = toy.build(layout)
    saved = save.save(directory, models=models, optimizer=optimizer, step=0, config=toy.config(), state={})
    losses.append([toy.step(models, optimizer, number, layout) for number in (1, 2)])
    groups.destroy()
    models, optimizer = toy.build(layout, seed=99)
    load.load(saved, models=models, optimizer=optimizer)
    losses.append([toy.step(models, optimizer, number, layout) for number in (1, 2)])
    groups.destroy()
    models, optimizer = toy.build(layout)
    losses.append([toy.step(models, optimizer, number, layout) for number in (1, 2)])
    return losses


def test_checkpoint_before_the_first_step_changes_nothing(pool, tmp_path):
    for after_save, after_load, never_saved in pool(2).run(before_first_step, tmp_path):
        assert after_save == after_load == never_saved


def test_record_needs_no_process_group(trained):
    from megatron_vlm.checkpoint import load

    record = load.read(trained[0])
    assert record.path == trained[0] / "iter_0000006" == load.latest(trained[0])
    assert (record.step, record.state) == (6, STATE)
    assert record.config["model"]["preset"] == "tiny"
    assert record.architecture["language"]["hidden"] == TINY_LANGUAGE.hidden
    assert dataclasses.is_dataclass(record)
