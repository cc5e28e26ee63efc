"""Downloaded data sets -> shards: everything arrives or is named, whatever the processes, the buckets and the stops."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from megatron_vlm.data.example import Points, to_json
from megatron_vlm.data.sets import build as built
from megatron_vlm.data.sets import units
from megatron_vlm.data.sets.build import build
from megatron_vlm.data.sets.source import stored_name
from megatron_vlm.data.sets.table import TABLE
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.verify import verify
from tests.data.clips import clip, steady
from tests.data.sets.published import WEB, rows
from tests.data.sets.test_table import picture, write

NAMES = ["pixmo_points_train", "cosyn_chart_exp", "doc_qa", "tulu4", "molmo2_human_qa"]


def store(folder: Path, url: str, data: bytes) -> None:
    path = folder / stored_name(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    """Five data sets of several families, their media got by address, by hand and inside the rows."""
    folder = tmp_path / "downloads"
    for name in [*NAMES, "pixmo_points_eval"]:
        write(folder, name, rows(name))
    points = [
        {**rows("pixmo_points_train")[0], "image_url": f"{WEB}{n % 7}.jpg", "label": f"cup {n}"} for n in range(20)
    ]
    write(folder, "pixmo_points_train", points)
    for number in range(7):
        store(folder, f"{WEB}{number}.jpg", picture(number))
    scan = folder / "files/doc_qa/documents/x_1.png"
    scan.parent.mkdir(parents=True)
    scan.write_bytes(picture(3))
    for number in range(2):
        film = folder / f"files/youtube/v{number}.mp4"
        film.parent.mkdir(exist_ok=True)
        film.write_bytes(clip(steady(8 + number)))
    addresses = folder / "annotations/allenai--Molmo2-AskModelAnything/youtube_id_to_urls_mapping.json"
    addresses.write_text(json.dumps({"other": {"youtube": "https://youtube.com/x", "gcs": f"{WEB}x.mp4"}}))
    return folder


def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "BUCKET_ROWS", 5)


def test_all_families_arrive(downloads: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    result = build(NAMES, downloads, out)
    assert verify(out) == [] and not result.left_out
    shards = Shards(out)
    assert result.samples == {
        "pixmo_points_train": 14, "cosyn_chart_exp": 3, "doc_qa": 1, "tulu4": 1, "molmo2_human_qa": 2
    }  # fmt: skip
    assert shards.manifest["media"]["count"] == 7 + 3 + 2, "doc_qa's scan is one of the pictures: stored once"
    tree = shards.example("pixmo_points_train", "train", 0)
    assert len(tree.branches) == 3 and isinstance(tree.branches[0].turns[0].answer, Points)
    film = shards.example("molmo2_human_qa", "train", 0)
    assert film.video is not None and len(film.branches) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "shards"]


def test_processes_and_buckets_do_not_change_the_samples(
    downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows about one image in two files: still one sample.
    annotations = next((downloads / TABLE["pixmo_points_train"].folder("pixmo_points_train")).rglob("*.parquet"))
    table = pq.read_table(annotations)
    assert "0.parquet" in annotations.name
    pq.write_table(table.slice(0, 11), annotations)
    pq.write_table(table.slice(11), annotations.with_name(annotations.name.replace("0.parquet", "1.parquet")))
    build(NAMES, downloads, tmp_path / "plain")
    small_buckets(monkeypatch)
    build(NAMES, downloads, tmp_path / "one")
    build(NAMES, downloads, tmp_path / "two", workers=2)
    plain, one, two = (Shards(tmp_path / name) for name in ("plain", "one", "two"))
    assert one.hash == two.hash, "equal bytes for any number of processes"
    assert verify(tmp_path / "two") == []
    for name in NAMES:
        samples = [
            {to_json(shards.example(name, "train", index)) for index in range(shards.count(name, "train"))}
            for shards in (plain, one)
        ]
        assert samples[0] == samples[1]


def test_a_build_that_stopped_is_gone_on_with(downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_buckets(monkeypatch)
    build(NAMES, downloads, tmp_path / "whole")
    made: list[str] = []
    original = units.ShardWriter

    def counted(path: Path) -> object:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path.name)
        return original(path)

    monkeypatch.setattr(units, "ShardWriter", counted)
    with pytest.raises(KeyboardInterrupt):
        build(NAMES, downloads, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists() and (tmp_path / "stopped.work").is_dir()
    again: list[str] = []

    def noted(path: Path) -> object:
        again.append(path.name)
        return original(path)

    monkeypatch.setattr(units, "ShardWriter", noted)
    build(NAMES, downloads, tmp_path / "stopped")
    assert not set(made) & set(again) and again, "finished units are not made again"
    assert Shards(tmp_path / "stopped").hash == Shards(tmp_path / "whole").hash
    assert not (tmp_path / "stopped.work").exists()


def test_work_of_another_build_is_not_taken(downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(built, "build_unit", stop)
    with pytest.raises(KeyboardInterrupt):
        build(["tulu4"], downloads, tmp_path / "out")
    with pytest.raises(ValueError, match="holds the work of another build"):
        build(["doc_qa"], downloads, tmp_path / "out")


def test_building_again_does_nothing(downloads: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = build(["doc_qa", "tulu4"], downloads, out)
    before = Shards(out).hash
    again = build(["doc_qa", "tulu4"], downloads, out)
    assert first.is_new and not again.is_new and again.samples == first.samples
    assert Shards(out).hash == before
    with pytest.raises(ValueError, match="exists already"):
        build(["tulu4"], downloads, out)
    build(["tulu4"], downloads, out, overwrite=True)
    assert Shards(out).datasets == ("tulu4",)


def lose(downloads: Path) -> None:
    (downloads / stored_name(f"{WEB}0.jpg")).unlink()


def tear(downloads: Path) -> None:
    path = downloads / stored_name(f"{WEB}0.jpg")
    path.write_bytes(path.read_bytes()[:60])


def leave(downloads: Path) -> None:
    one = {**rows("pixmo_points_train")[0], "image_url": f"{WEB}9.jpg", "points": [{"x": 250.0, "y": 1.0}]}
    write(downloads, "pixmo_points_train", [one, *rows("pixmo_points_train")[1:]])


def nan(downloads: Path) -> None:
    one = {**rows("pixmo_points_train")[0], "points": [{"x": float("nan"), "y": 1.0}]}
    write(downloads, "pixmo_points_train", [one, *rows("pixmo_points_train")[1:]])


def crowd(downloads: Path) -> None:
    one = {**rows("pixmo_points_train")[0], "points": [{"x": 1.0, "y": 1.0}] * 61}
    write(downloads, "pixmo_points_train", [one, *rows("pixmo_points_train")[1:]])


@pytest.mark.parametrize(
    ("damage", "reason", "words"),
    [
        (crowd, "recipe", "more than 60 places"),
        (lose, "missing", "is not at"),
        (tear, "unsound", "does not decode"),
        (leave, "unsound", r"point (2.5, 0.01) lies outside the picture"),
        (nan, "unsound", "needed a finite number"),
    ],
)
def test_what_cannot_be_used_is_counted_and_named(
    downloads: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    reason: str,
    words: str,
) -> None:
    damage(downloads)
    out = tmp_path / "out"
    result = build(["pixmo_points_train"], downloads, out, max_left_out=0.0 if reason == "recipe" else 0.5)
    assert set(result.left_out["pixmo_points_train"]) == {reason}
    listed = [json.loads(line) for line in (out / units.LEFT_OUT).read_text().splitlines()]
    assert len(listed) == result.left_out["pixmo_points_train"].total()
    assert all(words in one["error"] and one["where"] for one in listed)
    assert verify(out) == []
    small_buckets(monkeypatch)  # what is left out goes through files then
    dealt = build(["pixmo_points_train"], downloads, tmp_path / "dealt", max_left_out=1.0)
    assert dealt.left_out == result.left_out


def test_too_much_left_out_writes_nothing_until_the_files_are_there(downloads: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.move(downloads / "media", kept)
    with pytest.raises(ValueError, match=r"14 of 14 rows or samples \(100%\) cannot be used"):
        build(["pixmo_points_train"], downloads, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.move(kept, downloads / "media")
    assert build(["pixmo_points_train"], downloads, tmp_path / "out").samples["pixmo_points_train"] == 14


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../../../secret.png", "it leaves the folder"),
        ("/etc/passwd", "it leaves the folder"),
        ("a/../../../secret.png", "it leaves the folder"),
        ("a" * 2000, "longer than a name can be"),
        ("a" * 250, "longer than a name can be"),
    ],
)
def test_names_that_leave_the_folder_are_refused(downloads: Path, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "secret.png").write_bytes(picture(9))
    write(downloads, "doc_qa", [{**row, "image": name} for row in rows("doc_qa")] + rows("doc_qa"))
    result = build(["doc_qa"], downloads, tmp_path / "out", max_left_out=0.9)
    assert result.left_out["doc_qa"] == {"unsound": 1}
    assert words in (tmp_path / "out" / units.LEFT_OUT).read_text()


#: Two processes that write their numbers into a folder and then work for long.
WORKING = """
import sys
from megatron_vlm.data.sets import build
from tests.data.sets import test_build
if __name__ == "__main__":
    build._run([(sys.argv[1],)] * 2, test_build.work_long, 2, "samples")
"""


def work_long(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(120)


@pytest.mark.slow
def test_processes_end_with_a_build_that_is_killed(tmp_path: Path) -> None:
    """Or they would go on with the parts that the next build makes."""
    script, marks = tmp_path / "working.py", tmp_path / "marks"
    script.write_text(WORKING)
    marks.mkdir()
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, script, marks], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    ) as one:
        deadline = time.monotonic() + 120
        while len(found := list(marks.iterdir())) < 2:
            assert one.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        one.kill()
    processes = [int(path.name) for path in found]
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def die(number: int) -> None:
    """As a decoder does, or the kernel when memory ends."""
    os._exit(1)


@pytest.mark.slow
def test_a_process_that_ends_is_told() -> None:
    with pytest.raises(ValueError, match="a process ended while it made samples: killed for its memory"):
        built._run([(1,), (2,)], die, 2, "samples")


def test_a_published_checksum_is_checked(downloads: Path, tmp_path: Path) -> None:
    points = [{**row, "image_sha256": "0" * 64} for row in rows("pixmo_points_train")]
    write(downloads, "pixmo_points_train", points)
    with pytest.raises(ValueError, match="its sha256 is not 0000"):
        build(["pixmo_points_train"], downloads, tmp_path / "out")


def test_images_of_the_evaluation_set_are_left_out(downloads: Path, tmp_path: Path) -> None:
    kept = rows("pixmo_points_train")
    write(downloads, "pixmo_points_train", [{**row, "image_url": f"{WEB}eval1.jpg"} for row in kept] + kept[:1])
    result = build(["pixmo_points_train"], downloads, tmp_path / "out")
    assert result.samples["pixmo_points_train"] == 2
    assert result.left_out["pixmo_points_train"] == {"evaluation": 6}, "a row makes two samples"
    shutil.rmtree(downloads / "annotations/allenai--pixmo-points-eval")
    with pytest.raises(ValueError, match="--datasets pixmo_points_eval"):
        build(["pixmo_points_train"], downloads, tmp_path / "other")


def test_clocks_go_to_the_test_split(downloads: Path, tmp_path: Path) -> None:
    write(downloads, "pixmo_clocks", rows("pixmo_clocks"))
    faces = downloads / TABLE["pixmo_clocks"].media_folder("pixmo_clocks")
    faces.mkdir(parents=True)
    for number in range(3):
        (faces / f"e{number}.png").write_bytes(picture(number))
    build(["pixmo_clocks"], downloads, tmp_path / "out")
    assert Shards(tmp_path / "out").splits("pixmo_clocks") == ("test",)


def test_samples_that_stand_twice_are_kept_once(downloads: Path, tmp_path: Path) -> None:
    """In two files, so that no unit sees both; and another sample about the same image keeps its place."""
    entry = TABLE["cosyn_chart_exp"]
    folder = downloads / entry.folder("cosyn_chart_exp") / "chart"
    first = next(folder.glob("train*"))
    shutil.copy(first, folder / "train-1.parquet")
    changed = [{**row, "qa_pairs": {"question": ["How?"], "explanation": ["So."], "answer": ["Thus."]}}
               for row in rows("cosyn_chart_exp")]  # fmt: skip
    kept = first.read_bytes()
    write(downloads, "cosyn_chart_exp", changed)
    first.rename(folder / "train-2.parquet")
    first.write_bytes(kept)
    result = build(["cosyn_chart_exp"], downloads, tmp_path / "out")
    assert result.samples["cosyn_chart_exp"] == 6 and result.left_out["cosyn_chart_exp"] == {"duplicate": 3}
    keys = Shards(tmp_path / "out").keys("cosyn_chart_exp", "train")
    assert sum(key.endswith("_2") for key in keys) == 3
    assert Shards(tmp_path / "out").manifest["media"]["count"] == 3


def test_missing_annotations_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tools/download_data.py --datasets st_qa.*rrc.cvc.uab.es"):
        build(["st_qa"], tmp_path, tmp_path / "out")
