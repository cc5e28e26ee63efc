"""Rows of every kind of file, addresses of media ids, and values that are not what they should be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_vlm.data.example import Branch, Clip, Example, Media, Point, Points, Subtitle, Turn, to_json
from megatron_vlm.data.masks import packed, unpacked
from megatron_vlm.data.sets import source
from megatron_vlm.data.sets.draft import Draft, Reference, from_line, to_line
from megatron_vlm.data.sets.entry import Entry
from megatron_vlm.data.sets.group import trees
from megatron_vlm.data.sets.questions import questions
from megatron_vlm.data.sets.resolve import Finder, Missing, _json, resolve
from megatron_vlm.data.sets.row import Row
from megatron_vlm.data.sets.source import Context, Piece
from megatron_vlm.data.sets.table import TABLE, find
from tests.data.sets.published import rows
from tests.data.sets.test_table import add, with_pictures

ROWS = [{"video": f"v{number}", "question": "What?", "answer": "A cat."} for number in range(3)]


def read(path: Path, **entry: str) -> list[object]:
    return list(source.rows(Piece(str(path), -1, 0), Entry(questions, **entry)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_of_both_kinds(tmp_path: Path, kind: str) -> None:
    table, path = pa.Table.from_pylist(ROWS), tmp_path / "rows.arrow"
    with pa.OSFile(str(path), "wb") as sink:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert read(path) == ROWS


def test_json_in_its_forms(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": {"inner": ROWS}}))
    assert read(path, within="data.inner") == ROWS
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read(path) == ROWS
    path.write_text(json.dumps({"a": {"subset": "x", "parts": [{"q": 1}, {"q": 2}]}}))
    assert read(path, explode="parts") == [{"key": "a", "subset": "x", "q": number} for number in (1, 2)]


@pytest.mark.parametrize(("name", "content"), [("rows.parquet", b"PAR1xxxx"), ("rows.json", b"{"),
                                               ("rows.json", b"3"), ("rows.jsonl", b"[" * 100_000),
                                               ("rows.csv", b"a,b\n\xff,1\n"), ("rows.arrow", b"ARROW1"),
                                               ("charades.txt", b"no such line"),
                                               ("rows.pickle", b"x")])  # fmt: skip
def test_files_that_are_none_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read(tmp_path / name)


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    """Cut, so that it does not open; and with bytes of its pages changed, so that it does not decode."""
    entry = find("pixmo_cap")
    path = tmp_path / entry.folder("pixmo_cap") / "train-0.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist([{"image_url": f"https://x/{n}", "caption": "x" * n} for n in range(500)]), path
    )
    ((piece,),) = source.splits(entry, "pixmo_cap", tmp_path).values()
    data = path.read_bytes()
    path.write_bytes(data[:10] + bytes(400) + data[410:])
    with pytest.raises(ValueError, match="train-0.parquet cannot be read as rows"):
        list(source.drafts(entry, piece, Context()))
    path.write_bytes(data[:-50])
    with pytest.raises(ValueError, match="train-0.parquet is not a whole Parquet file"):
        source.splits(entry, "pixmo_cap", tmp_path)


def test_ids_get_their_addresses(tmp_path: Path) -> None:
    """The first address that gives a file; a player's page gives none."""
    entry = find("molmo2_human_qa")
    folder = tmp_path / entry.folder("molmo2_human_qa")
    folder.mkdir(parents=True)
    table = {"v0": {"youtube": "https://www.youtube.com/watch?v=v0", "gcs": "https://files.example/v0.mp4"},
             "v1": ["https://youtu.be/v1"], "v2": "https://files.example/v2.mp4"}  # fmt: skip
    (folder / entry.addresses).write_text(json.dumps(table))
    context = source.context(entry, "molmo2_human_qa", tmp_path, find)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"video_id": f"v{n}", "question": "What?", "answer": "x"}) + "\n" for n in range(3))
    )
    found = [draft for _, draft in source.drafts(entry, Piece(str(rows), -1, 3), context)]
    assert [draft.media[0].url for draft in found if isinstance(draft, Draft)] == [
        "https://files.example/v0.mp4", "", "https://files.example/v2.mp4",
    ]  # fmt: skip
    (folder / entry.addresses).write_text("[]")
    with pytest.raises(ValueError, match="is no table of addresses"):
        source.context(entry, "molmo2_human_qa", tmp_path, find)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"video": "v", "question": "", "answer": "x"},
            r"column 'question' is ''; needed a text. Columns of the row: ",
        ),
        ({"video": "v", "question": "x", "answer": None}, "column 'answers' is None"),
        ({"question": "x", "answer": "x"}, "names no image and no video"),
        ({"video": "v", "question": "x", "options": ["a", "b"], "answer": 2}, "one of the 2 options"),
        ({"video": "v", "question": "x", "options": "ab", "answer": 0}, "needed a list"),
        ({"video": "v", "question": "x", "answer": "y", "span": [9, 3]}, "a later end"),
        ({"video": "v", "question": "x", "answer": "y", "start": "nan", "end": 3}, "a finite number"),
        ({"video": "v", "question": "x", "answer": "y", "subtitles": [{"start": 0, "text": "a"}]}, "column 'end'"),
        ({"image": 3, "question": "x", "answer": "y"}, "bytes, a file name or an address"),
        ({"video": "v", "question": "x", "answer": ["cat", None]}, r"\['cat', None\]; needed texts"),
        ({"video": "v", "question": "x", "options": ["a", float("nan")], "answer": 0}, "a text for each option"),
        ({"video": "v", "question": "half \ud800", "answer": "y"}, "needed a text"),
        ({"video": "v", "question": "x", "answer": "y", "span": [0, 10**400]}, "not as large"),
        ({"video": {"a": 1}, "question": "x", "answer": "y"}, "needed a file name"),
        (["question", "answer"], "needed an object"),
        ("question", "needed an object"),
    ],
)
def test_bad_rows_are_told(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    entry = Entry(questions, options={"style": "x"})
    ((place, error),) = source.drafts(entry, Piece(str(path), -1, 1), Context())
    assert place == "rows.json:0:0" and isinstance(error, ValueError)
    with pytest.raises(ValueError, match=message):
        raise error


@pytest.mark.parametrize(
    ("values", "span"),
    [({"span": "76.01-84.2"}, (76.01, 84.2)), ({"span": "[3:12]"}, (3.0, 12.0)), ({"span": [1, 2.5]}, (1.0, 2.5)),
     ({"start": "00:01:02.5", "end": "1:00:00"}, (62.5, 3600.0)), ({"start": None, "end": None}, None)],
)  # fmt: skip
def test_spans_in_their_forms(values: dict[str, object], span: tuple[float, float] | None) -> None:
    assert Row(values).span() == span


def test_subtitles_count_from_the_clip() -> None:
    lines = [{"start": s, "end": s + 2, "text": f"at {s}"} for s in (0.0, 9.0, 15.0, 40.0)]
    clip = Row({"start": 10.0, "end": 30.0, "subtitles": lines}).clip()
    assert clip is not None and [(line.start, line.end, line.text) for line in clip.subtitles] == [
        (0.0, 1.0, "at 9.0"), (5.0, 7.0, "at 15.0"),
    ]  # fmt: skip


def test_a_draft_goes_through_a_file_unchanged() -> None:
    turns = (Turn("Ä?", Points("cups", (Point(1, 20.0, 30.0),))),)
    draft = Draft((Branch("pointing", turns),), (Reference(data=b"\0\xff", path="a"), Reference("video", "u", id="i")),
                  in_pixels=True, clip=Clip(1.0, 2.5, 2), part="pointing", info={"n": 1})  # fmt: skip
    assert from_line(to_line(draft)) == draft and "\n" not in to_line(draft)


def test_trees_are_split_at_sixty_places() -> None:
    def draft(number: int, count: int) -> Draft:
        points = Points(f"cup {number}", tuple(Point(1, 0.1, n / 100) for n in range(count)))
        return Draft((Branch("pointing", (Turn("", points),)),), (Reference(url="https://x/1.jpg"),))

    found = list(trees([draft(number, 25) for number in range(5)]))
    assert [len(tree.branches) for _, tree in found] == [2, 2, 1]
    assert [key.removeprefix(found[0][0]) for key, _ in found] == ["", "-2", "-3"]
    full = trees([draft(0, 35), draft(1, 25), draft(2, 1)])
    assert [len(tree.branches) for _, tree in full] == [2, 1], "sixty are not too many"
    one = list(trees([draft(0, 3), draft(0, 3), draft(1, 3)], chat_share=1.0))
    assert len(one) == 1 and [turn.answer.label for turn in one[0][1].branches[0].turns] == ["cup 0", "cup 1"]  # type: ignore[union-attr]


def places(value: object, before: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """Where in a row something stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, one in inner:
        yield (*before, step)
        yield from places(one, (*before, step))


def changed(value: Any, place: tuple[Any, ...], new: object) -> Any:
    """A copy with something else at a place; `...` removes what is there."""
    if not place:
        return new
    copy = value.copy()
    if new is ... and len(place) == 1:
        del copy[place[0]]
    else:
        copy[place[0]] = changed(value[place[0]], place[1:], new)
    return copy


#: Written for each of them by carelessness: what no text that is trained on may be.
NO_TEXT = ("None", "nan", "inf", "True", "{", "[", "b'")
WRONG = st.sampled_from([
    ..., None, True, -1, 10**400, float("nan"), float("inf"), "", " ", "word", "half \ud800", b"", b"bytes", [], {},
    [None], [[]], [{}], {"x": None}, {"x": [1], "y": [1, 2]}, [float("nan")], datetime(2024, 1, 1),
])  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(sorted(TABLE)), data=st.data())
def test_a_wrong_value_anywhere_is_a_named_fault_or_harmless(name: str, data: st.DataObject) -> None:
    """Whatever stands in the place of a value of a published row: never another error, never text made of no text."""
    entry = TABLE[name]
    row = with_pictures(rows(name)[0], 1)
    if entry.explode in row:
        row = {**row, **row.pop(entry.explode)[0]}
    wrong = changed(row, data.draw(st.sampled_from(sorted(places(row), key=repr))), data.draw(WRONG))
    found = list(source.read_row(entry, wrong, Context()))
    drafts = [draft for draft in found if isinstance(draft, Draft)]
    for error in found:
        assert isinstance(error, Draft) or str(error)
    for key, draft in trees(drafts, chat_share=entry.chat_share):
        try:
            assert from_line(to_line(draft)) == draft
            sample = resolve(key, draft, add)
            to_json(sample).encode()
        except ValueError:
            continue
        for turn in (turn for branch in sample.branches for turn in branch.turns):
            said = turn.answer if isinstance(turn.answer, str) else turn.answer.label
            for word in NO_TEXT:
                assert word not in f"{turn.prompt} {said}" or word in str(row)


def masks(folder: Path, name: str, row: dict[str, object]) -> tuple[Example, Draft]:
    """The sample of one row of a set whose masks lie in files."""
    entry = find(name)
    (draft,) = entry.family(Row(row, entry.columns), **entry.options)
    assert from_line(to_line(draft)) == draft
    finder = Finder(folder, PurePosixPath("files/x"))
    media = Media("0" * 64, 6, 4, *(("video", 2.0, 6.0, 12) if draft.media[0].kind == "video" else ()))
    return resolve("a", draft, lambda _: media, finder.beside), draft


def test_masks_lie_in_files_of_every_published_kind(tmp_path: Path) -> None:
    base, frames = tmp_path / "files/x", []
    for number in range(12):  # two objects, that change places in every frame
        one = np.zeros((4, 6), np.uint8)
        one[1:3, number % 2 * 3 : number % 2 * 3 + 3], one[1:3, (1 - number % 2) * 3 :][:, :3] = 1, 2
        frames.append(one)
        for folder, picture in (
            ("valid/Annotations/v0/0", Image.fromarray((one == 1).astype(np.uint8) * 255)),
            ("ReasonVOS/Annotations/source_v_1", Image.fromarray((one == 1).astype(np.uint8) * 255).convert("RGB")),
            ("DAVIS/Annotations/480p/v0", Image.fromarray(one)),
        ):
            if folder.startswith("DAVIS"):
                picture = Image.fromarray(one, mode="P")
                picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            (base / folder).mkdir(parents=True, exist_ok=True)
            picture.save(base / folder / f"{number * 5:05d}.png")
    lengths = {name: [packed_json(frame == value) if number else None for number, frame in enumerate(frames)]
               for name, value in (("70", 1), ("71", 2))}  # fmt: skip
    (base / "valid_u").mkdir()
    (base / "valid_u/mask_dict.json").write_text(json.dumps(lengths))
    for name in ("mevis_eval", "ref_yt_vos_eval", "ref_davis17_eval", "reasonvos_eval"):
        row = rows(name)[0]
        sample, draft = masks(tmp_path, name, row)
        kept = sample.info["masks"]["the red car"]
        assert len(kept) == len(draft.masks) == len(sample.branches[0].turns[0].answer.objects)
        for value, of_object in enumerate(kept, 1):
            times = [at for at, *_ in of_object]  # twice a second, as the row says; MeViS' object has none at first
            assert times == [0.0, 0.5, 1.0, 1.5][name == "mevis_eval" :]
            for at, *mask in of_object:
                assert np.array_equal(unpacked(*mask), frames[int(at * 6)] == value), (name, at)
        with pytest.raises(ValueError, match="needed the id 0"):
            masks(tmp_path, name, row | {"mask_id": ["9"]})
        with pytest.raises(Missing, match="are not at|holds no masks of"):
            masks(tmp_path, name, row | {"video": "v9", "qid": "9", "anno_id": ["99"] * len(row["mask_id"])})
    with pytest.raises(ValueError, match="needed an object that is seen"):
        masks(tmp_path, "mevis_eval", rows("mevis_eval")[0] | {"frame_trajectories": []})
    with pytest.raises(ValueError, match="is refused"):
        masks(tmp_path, "ref_yt_vos_eval", rows("ref_yt_vos_eval")[0] | {"video": ".."})


def packed_json(mask: np.ndarray) -> dict[str, object]:
    height, width, counts = packed(mask)
    return {"size": [height, width], "counts": counts}


def test_places_that_only_a_mask_knows_lie_in_it(tmp_path: Path) -> None:
    row = rows("point_bench")[1]
    path = tmp_path / "files/x/selected_masks/counting/1_mask.png"
    path.parent.mkdir(parents=True)
    mask = np.zeros((4, 6, 3), np.uint8)
    mask[1, 2:4, 0] = mask[3, 5, 2] = 255
    Image.fromarray(mask).save(path)
    sample, _ = masks(tmp_path, "point_bench", row)
    places = [(int(at.x * 6), int(at.y * 4)) for at in sample.branches[0].turns[0].answer.points]
    assert places == [(2, 1), (3, 1), (5, 3)]
    with pytest.raises(ValueError, match="the mask has 3 pixels; needed 4 or more"):
        masks(tmp_path, "point_bench", row | {"count": 4})
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1_mask.png has no readable header"):
        masks(tmp_path, "point_bench", row)


def test_subtitles_in_their_published_forms(tmp_path: Path) -> None:
    folder = tmp_path / "files/x"
    (folder / "subtitles").mkdir(parents=True)
    (folder / "subtitles.json").write_text(json.dumps({"v0": {
        "0": {"start": 1.5, "end": 2, "text": "One."},
        "1": {"start": 0.5, "end": 1, "text": " Two\nlines "}}}))  # fmt: skip
    sample, _ = masks(tmp_path, "video_mme_subtitles", rows("video_mme_subtitles")[0])
    assert sample.clip == Clip(subtitles=(Subtitle(1.5, 2.0, "One."), Subtitle(0.5, 1.0, "Two lines")))
    sample, _ = masks(tmp_path, "video_mme_subtitles", rows("video_mme_subtitles")[1])
    assert sample.clip is None, "not every video has subtitles"
    # The video begins at 20 s of the subtitles' clock and takes 9 s.
    path = folder / "subtitles/s.json"
    path.write_text(json.dumps([
        {"start": "00:00:10.000", "end": "00:00:19.900", "line": "before"},
        {"start": "0:00:18", "end": "0:00:22", "line": "a"},
        {"timestamp": [25.0, None], "text": "b"}, {"timestamp": [29.5, 31.0], "text": "after"}]))  # fmt: skip
    row = rows("long_video_bench_subtitles")[0]
    sample, _ = masks(tmp_path, "long_video_bench_subtitles", row)
    assert sample.clip == Clip(subtitles=(Subtitle(0.0, 2.0, "a"), Subtitle(5.0, 9.0, "b")))
    for content, message in (("[", "is no JSON"), ("7", "holds no subtitles"), ('["a"]', "holds no subtitles"),
                             ('[{"line": "a"}]', "needed a finite number")):  # fmt: skip
        path.write_text(content)
        _json.cache_clear()
        with pytest.raises(ValueError, match=message):
            masks(tmp_path, "long_video_bench_subtitles", row)
    path.unlink()
    with pytest.raises(Missing, match="subtitles 'subtitles/s.json' are not at"):
        masks(tmp_path, "long_video_bench_subtitles", row)
