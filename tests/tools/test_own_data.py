"""One's own data: JSONL -> shards -> look -> train, and what happens to bad lines. Images are made here."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.config import load, presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data import tokens
from megatron_vlm.data.example import Point, Points, Turn
from megatron_vlm.data.loader import Loader, Share
from megatron_vlm.data.shards import Shards
from tests.data.clips import clip, steady
from tools import build_shards, inspect_data

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images beside a JSONL file with one line of every form."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "blue.jpg")
    write(
        tmp_path,
        {"image_path": "red.png", "caption": "Only <b>red</b> & nothing else."},
        {"image_path": "red.png", "question": "What color?", "answer": "Red.", "key": "asked", "info": {"id": 3}},
        {"image_path": "red.png", "label": "dots", "points": [[10, 5], [30, 20]], "style": "point_count"},
        {"image_path": "blue.jpg", "label": "dots", "points": [[25, 50]], "unit": "percent"},
        {"image_paths": ["red.png", "blue.jpg"], "label": "dots", "points": [[10, 5], [15, 30, 2]]},
        {"image_path": "blue.jpg", "branches": [{"caption": "Blue."}, {"label": "cats", "points": []}]},
        {
            "image_paths": ["red.png", "blue.jpg"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhich is blue?"},
                {"from": "gpt", "value": "The second."},
            ],
        },
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
        {"prompt": "2 + 2?", "answer": "4"},
        {"text": "Just text."},
    )
    return tmp_path


def write(folder: Path, *lines: object) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "mine.jsonl").write_text(text)


def build(folder: Path, *more: str) -> Shards:
    build_shards.main(["build", str(folder / "mine.jsonl"), "--out", str(folder / "shards"), *more])
    return Shards(folder / "shards")


def test_every_form_of_a_line_arrives(folder: Path) -> None:
    shards = build(folder)
    samples = [shards.example("mine", "train", index) for index in range(shards.count("mine", "train"))]
    assert [[branch.style for branch in sample.branches] for sample in samples] == [
        ["long_caption"], ["user_qa"], ["point_count"], ["pointing"], ["pointing"], ["long_caption", "pointing"],
        ["user_qa"], ["text_sft"], ["text_sft"], ["text_sft"],
    ]  # fmt: skip
    assert samples[1].key == "asked" and samples[1].info == {"id": 3}
    assert samples[2].branches[0].turns[0].answer == Points("dots", (Point(1, 0.25, 0.25), Point(1, 0.75, 1.0)))
    assert samples[3].branches[0].turns[0].answer == Points("dots", (Point(1, 0.25, 0.5),))
    assert samples[4].branches[0].turns[0].answer == Points("dots", (Point(1, 0.25, 0.25), Point(2, 0.5, 1.0)))
    assert samples[5].branches[1].turns[0].answer == Points("cats", ())
    assert samples[6].branches[0].turns == (Turn("Which is blue?", "The second."),)
    assert [len(sample.media) for sample in samples] == [1, 1, 1, 1, 2, 1, 2, 0, 0, 0]
    assert shards.media(samples[0].media[0].key) == (folder / "red.png").read_bytes()
    build_shards.main(["verify", str(folder / "shards")])


def test_held_out_samples_stay_held_out_when_data_are_added(folder: Path) -> None:
    lines = [{"prompt": f"{n}?", "answer": str(n)} for n in range(200)]
    write(folder, *lines)
    first = build(folder, "--held-out", "0.25")
    kept = set(first.keys("mine", "validation"))
    assert 25 < len(kept) < 75
    write(folder, *lines, {"prompt": "more?", "answer": "yes"})
    again = build(folder, "--held-out", "0.25", "--overwrite")
    assert kept <= set(again.keys("mine", "validation"))


def test_a_share_that_holds_nothing_out_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, {"prompt": "a", "answer": "b"})
    build(folder, "--held-out", "0.0001")
    assert "none fell into 'validation'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "not JSON"),
        ("[1]", "must be a JSON object"),
        ({"image_path": "none.png", "caption": "x"}, "none.png"),
        ({"image_path": "torn.png", "caption": "x"}, "does not decode"),
        ({"image_path": "red.png"}, "no conversation: needed one of caption"),
        ({"image_path": "red.png", "caption": ""}, "caption must be a text"),
        ({"image_path": "red.png", "caption": "x", "captoin": "y"}, "captoin cannot stand beside caption"),
        ({"image_path": "red.png", "label": "a", "points": [[41, 3]]}, r"\[41, 3\] lies outside the image: x to 40"),
        ({"image_path": "red.png", "label": "a", "points": [[1, 2, 2]]}, "names image 2; the line has 1"),
        ({"image_path": "red.png", "label": "a", "points": [["1", 2]]}, "must be"),
        ({"image_path": "red.png", "label": "a", "points": [[1, 2]], "unit": "inches"}, "choose one of pixels"),
        ({"label": "a", "points": [[1, 2]]}, "points need an image_path"),
        ({"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}, "message 0 is from"),
        ({"messages": [{"role": "user", "content": "x"}]}, "ends with the assistant"),
        ({"prompt": "a", "answer": "b", "key": "bad key!"}, "bad key!"),
        ({"prompt": "a", "answer": "b", "key": "same"}, "used twice"),
        ({"prompt": "a", "answer": "b", "key": None}, "key must be a word, not None"),
        ({"image_path": "../red.png", "caption": "x"}, "lies outside the media folder"),
        ({"image_path": "/etc/passwd", "caption": "x"}, "lies outside the media folder"),
        ({"image_path": "pipe", "caption": "x"}, "pipe is no regular file"),
        ({"image_path": "empty.png", "caption": "x"}, "no readable header"),
        ({"video_path": "empty.png", "caption": "x"}, "no container that is read"),
        ({"image_path": "a" * 5000, "caption": "x"}, "cannot be read|is not there"),
        ({"image_path": "red.png", "label": "a", "points": [[10**400, 3]]}, "must be"),
        ({"image_path": "red.png", "label": "a", "points": [], "prompt": None}, "prompt must be a text, not None"),
        ('{"prompt": "a", "answer": "b", "answer": "c"}', "'answer' stands in it twice"),
        ('{"text": "x", "info": {"n": NaN}}', "not JSON compliant"),
        ('{"text": "half \\ud800"}', "surrogates not allowed"),
        ('{"text": ' + "[" * 100_000, "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "4300 digits"),
    ],
)
def test_bad_line_is_named_and_nothing_is_written(
    folder: Path, line: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = (folder / "red.png").read_bytes()
    (folder / "torn.png").write_bytes(torn[: len(torn) - 30])
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe")
    write(folder, {"prompt": "a", "answer": "b", "key": "same"}, line)
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit, match=message) as stop:
        build(folder)
    assert "mine.jsonl:2: " in str(stop.value) and str(stop.value).startswith("error: ")
    assert sorted(folder.iterdir()) == before


def test_a_few_bad_lines_can_be_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, {"prompt": "a", "answer": "b"}, "{", "", '{"text": "', {"prompt": "c", "answer": "d"})
    lines = (folder / "mine.jsonl").read_bytes()
    (folder / "mine.jsonl").write_bytes(lines.replace(b'{"text": "', b'{"text": "\xff"}'))
    with pytest.raises(SystemExit, match="more than --max-bad 1"):
        build(folder, "--max-bad", "1")
    shards = build(folder, "--max-bad", "2")
    assert shards.keys("mine", "train") == ["00000001", "00000005"]
    told = capsys.readouterr().err
    assert told.count("left out: ") == 2 and "mine.jsonl:4: this is not UTF-8" in told


def test_damaged_shards_fail_verification(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(folder)
    tar = folder / "shards" / "media" / "000000.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(SystemExit, match="faults"):
        build_shards.main(["verify", str(folder / "shards")])
    assert "media/000000.tar" in capsys.readouterr().err


def test_page_shows_the_samples_and_escapes_their_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(folder)
    look = folder / "look"
    inspect_data.main([str(folder / "shards"), "--num-samples", "99", "--out", str(look)])
    assert re.search(r"mine +train +10 +11 +9 +0 ", capsys.readouterr().out)
    page = (look / "index.html").read_text()
    assert "<b>red</b>" not in page and "&lt;b&gt;red&lt;/b&gt; &amp; nothing" in page
    assert page.count("<article>") == 10
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,)", page), "the page must hold everything it shows"
    images = re.findall(r"base64,([^\"]+)", page)
    assert len(images) == len(list(look.glob("*.png"))) == 9
    assert base64.b64decode(images[0]).startswith(b"\x89PNG")


def test_points_are_marked_where_they_are(folder: Path) -> None:
    shards = build(folder)
    sample = shards.example("mine", "train", 3)
    shown = np.asarray(next(inspect_data.pictures(shards, sample))).astype(int)
    height, width, _ = shown.shape
    rows, columns = np.nonzero(np.abs(shown - shown[-1, -1]).sum(2) > 60)
    assert abs(columns.mean() / width - 0.25) < 0.01 and abs(rows.mean() / height - 0.5) < 0.01


def test_a_step_of_a_run_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run directory written by hand from the loader's own steps."""
    lines = [{"image_path": "red.png", "question": f"{n}?", "answer": str(n)} for n in range(40)]
    write(folder, *lines)
    build(folder)
    config = run_config(folder)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(load.dump(config))
    steps, loader = [], Loader(config, presets.architecture(config.model), Share())
    for number, step in zip(range(1, 6), loader, strict=False):
        ledger = {"window": step.window, "offset": step.offset, "keys_hash": step.keys_hash,
                  "skipped": [{"key": step.keys[0], "reason": "broken"}]}  # fmt: skip
        steps.append(json.dumps({"step": number} | ledger))
        if number == 4:
            wanted = step.keys
    loader.close()
    (folder / "run" / "ledger.jsonl").write_text("\n".join(steps) + "\n")
    capsys.readouterr()
    asked = ["--run", str(folder / "run"), "--step", "4", "--out", str(folder / "look")]
    inspect_data.main(asked)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == list(wanted) and "skipped: broken" in told[0]
    assert (folder / "look" / "index.html").read_text().count("<article>") == min(12, len(set(wanted)))
    with pytest.raises(SystemExit, match="has no step 9; it has steps 1 to 5"):
        inspect_data.main([*asked[:3], "9"])
    write(folder, *lines[:39])
    build(folder, "--overwrite")
    with pytest.raises(SystemExit, match="made of other samples"):
        inspect_data.main(asked)


def run_config(folder: Path) -> Config:
    """Tiny, on the shards of `build`, with a tokenizer of bytes."""
    (folder / "tokenizer.json").write_text(tokens.train([], vocab_size=300))
    settings = {
        "data.manifest": folder / "shards",
        "data.mixture": folder / "shards" / "mixture.yaml",
        "data.tokenizer": folder / "tokenizer.json",
        "data.window": 16,
        "train.global_batch": 2,
        "train.micro_batch": 1,
    }
    return load.load(
        ROOT / "examples/recipes/tiny/stage1.yaml", [f"{name}={value}" for name, value in settings.items()]
    )


def test_unknown_split_is_named(folder: Path) -> None:
    build(folder)
    with pytest.raises(SystemExit, match="has no such data set or split. It has mine: train"):
        inspect_data.main([str(folder / "shards"), "--split", "test"])


def readme_blocks() -> tuple[str, list[str]]:
    """The JSONL and the four commands of the README's section."""
    section = (ROOT / "README.md").read_text().partition("## Your own data in four commands")[2].partition("\n## ")[0]
    lines, commands = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return lines, commands.splitlines()


@pytest.mark.slow
def test_four_commands_of_the_readme(tmp_path: Path) -> None:
    """Word for word, from JSONL to a trained model; only the training is shortened."""
    lines, commands = readme_blocks()
    assert len(commands) == 4
    for name in ("tools", "examples", "megatron_vlm"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "samples.jsonl").write_text(lines)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (420, 300), "red").save(tmp_path / "my" / name)
    (tmp_path / "my" / "v.mp4").write_bytes(clip(steady(30)))
    commands[-1] += (
        " train.steps=3 data.window=32 train.global_batch=2 train.micro_batch=1 log.every=1 "
        "optim.vision.warmup_steps=1 optim.connector.warmup_steps=1 optim.language.warmup_steps=1"
    )
    commands.append("python tools/inspect_data.py --run runs/mine --step 2 --num-samples 0")
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, **paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert done.stdout.count("samples/") >= 2
    losses = [json.loads(line)["loss"] for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and losses[-1] < losses[0]
