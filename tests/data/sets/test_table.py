"""Every name in every mixture has a reader, and the reader makes sound Examples of rows in the published schema."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_vlm.data import mixture
from megatron_vlm.data.example import Branch, Example, Media, Points, Subtitle, Tracks, from_json, to_json
from megatron_vlm.data.masks import packed
from megatron_vlm.data.sets import source
from megatron_vlm.data.sets.draft import MaskFile, Reference, SubtitleFile
from megatron_vlm.data.sets.group import trees
from megatron_vlm.data.sets.resolve import resolve
from megatron_vlm.data.sets.row import LeftOut
from megatron_vlm.data.sets.row import Row as SetRow
from megatron_vlm.data.sets.table import TABLE, find
from tests.data.sets.published import HALF, IMAGE, WHOLE, Row, rows

#: Those of published sets; the others mix what megatron_vlm builds itself.
SHIPPED = [path.stem for path in sorted(mixture.FOLDER.glob("*.yaml")) if not path.stem.startswith(("sample", "film"))]


def picture(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), (number * 20 % 256, 90, 30)).save(stream, "PNG")
    return stream.getvalue()


def with_pictures(value: object, number: int) -> object:
    """Rows with real images in the place of IMAGE, each another one."""
    if value == IMAGE:
        return picture(number)
    if isinstance(value, dict):
        return {name: with_pictures(one, number * 3 + place) for place, (name, one) in enumerate(value.items())}
    if isinstance(value, list):
        return [with_pictures(one, number * 5 + place) for place, one in enumerate(value)]
    return value


def write(folder: Path, name: str, published: list[Row]) -> None:
    """The annotation file of a data set, where its entry looks for it."""
    entry = TABLE[name]
    pattern = entry.patterns(next(iter(entry.splits.values())))[0]
    path = folder / entry.folder(name) / re.sub(r"\*+", "0", pattern)
    path.parent.mkdir(parents=True, exist_ok=True)
    published = [with_pictures(row, number + 1) for number, row in enumerate(published)]  # type: ignore[misc]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(published), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(published[0]), delimiter="\t" if name == "tgif" else ",")
            if not entry.header:
                writer.writeheader()
            writer.writerows(published)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(published)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    elif path.suffix == ".txt":
        path.write_text("".join(row["line"] + "\n" for row in published))
    elif path.suffix == ".json":
        content: object = published
        if "key" in published[0]:
            content = {row["key"]: {k: v for k, v in row.items() if k != "key"} for row in published}
        for step in reversed([step for step in entry.within.split(".") if step]):
            content = {step: content}
        path.write_text(json.dumps(content))
    elif name == "sutd_trafficqa":  # a line of names, then lines of values
        lines = [list(published[0]), *(list(row.values()) for row in published)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in published))
    if entry.joined:
        other, shared, column = entry.joined
        lines = [{shared: f"v{i}", column: [{"start": 7.0, "end": 8.5, "text": "Hm."}]} for i in range(3)]
        path.with_name(other).write_text("".join(json.dumps(line) + "\n" for line in lines))


def add(reference: Reference) -> Media:
    """A store that believes in every file."""
    key = hashlib.sha256(reference.identity.encode()).hexdigest()
    if reference.kind == "video":
        return Media(key, 640, 360, "video", seconds=120.0, fps=6.0, frames=720)
    return Media(key, 40, 20)


def beside(file: MaskFile | SubtitleFile) -> Sequence[Any]:
    """Masks of every object in every frame; of an image, its right half. One line of subtitles."""
    if isinstance(file, SubtitleFile):
        return (Subtitle(1.0, 2.5, "Hm."),)
    return [packed(WHOLE)] * 12 if file.fps else [packed(HALF)]


def read(folder: Path, name: str) -> list[Example]:
    entry = TABLE[name]
    found = []
    for piece in next(iter(source.splits(entry, name, folder).values())):
        for place, draft in source.drafts(entry, piece, source.Context()):
            if isinstance(draft, ValueError):
                assert isinstance(draft, LeftOut), f"{name} {place}: {draft}"
            else:
                found.append(draft)
    return [resolve(key, draft, add, beside) for key, draft in trees(found, chat_share=entry.chat_share)]


def members() -> list[str]:
    return sorted({member.name for name in SHIPPED for member in mixture.load(name).members} | set(TABLE))


@pytest.mark.parametrize("name", members())
def test_every_member_of_every_mixture_is_read(name: str, tmp_path: Path) -> None:
    published = rows(name)
    write(tmp_path, name, published)
    samples = read(tmp_path, name)
    assert samples, "three rows gave no sample"
    assert len({sample.key for sample in samples}) == len(samples)
    text_only = name.startswith(("tulu", "molmo2_hardcodes"))
    for sample in samples:
        assert bool(sample.media) != text_only
        assert from_json(to_json(sample)) == sample
        for branch in sample.branches:
            for turn in branch.turns:
                assert not isinstance(turn.answer, str) or turn.answer == turn.answer.strip()
                assert "<image>" not in turn.prompt
    # The schema's columns are all that the reader knows: a renamed column is an error that names it, not silence.
    entry = TABLE[name]
    if not entry.where and not entry.within and not entry.header and name != "charades_sta_all_qa":
        broken = [{f"x_{column}": value for column, value in row.items()} for row in published]
        write(tmp_path, name, broken)
        for piece in next(iter(source.splits(entry, name, tmp_path).values())):
            found = [draft for _, draft in source.drafts(entry, piece, source.Context())]
            assert all(isinstance(one, ValueError) for one in found)


def of(name: str, tmp_path: Path) -> list[Example]:
    write(tmp_path, name, rows(name))
    samples = read(tmp_path, name)
    assert samples, name
    return samples


def only(sample: Example) -> Branch:
    assert len(sample.branches) == 1
    return sample.branches[0]


def test_captions_have_one_transcript_beside_them(tmp_path: Path) -> None:
    for sample in of("pixmo_cap_with_transcripts", tmp_path):
        assert [branch.style for branch in sample.branches] == ["long_caption", "transcript"]
    for sample in of("pixmo_cap", tmp_path):
        assert [branch.style for branch in sample.branches] == ["long_caption"]


def test_labels_of_one_image_are_one_tree_for_each_style(tmp_path: Path) -> None:
    samples = of("pixmo_points_train", tmp_path)  # three labels on two images
    assert sorted((len(sample.branches), sample.branches[0].style) for sample in samples) == [
        (1, "point_count"), (1, "pointing"), (2, "point_count"), (2, "pointing"),
    ]  # fmt: skip
    answer = samples[0].branches[0].turns[0].answer
    assert isinstance(answer, Points) and answer.label == "cup 0"
    assert answer.points[0][1:] == (0.25, 0.5), "percent become fractions"


def test_pixels_become_fractions_of_the_file(tmp_path: Path) -> None:
    answer = of("pixmo_count_train", tmp_path)[0].branches[0].turns[0].answer
    assert isinstance(answer, Points)
    assert [place[1:] for place in answer.points] == [(0.25, 0.5), (0.75, 1.0)]


def test_options_are_marked_and_the_answer_repeats_its_own(tmp_path: Path) -> None:
    for number, sample in enumerate(of("nextqa_mc", tmp_path)):
        turn = only(sample).turns[0]
        assert only(sample).style == "video_multiple_choice"
        assert isinstance(turn.answer, str) and turn.answer.endswith(f"option {number}")
        assert turn.answer in turn.prompt.splitlines() and turn.prompt.count("option ") >= 5


def test_wrong_options_surround_the_right_one(tmp_path: Path) -> None:
    places = set()
    for sample in of("molmo2_syn_captions_qa", tmp_path):
        lines = only(sample).turns[0].prompt.splitlines()
        assert str(only(sample).turns[0].answer).endswith("A cat.")
        places.add(lines.index(str(only(sample).turns[0].answer)))
        assert sample.clip is None
    assert len(places) > 1, "the right answer always stands at one place"


def test_subtitles_and_spans_come_along(tmp_path: Path) -> None:
    (line,) = of("molmo2_syn_captions_subtitle_qa", tmp_path)[0].clip.subtitles  # type: ignore[union-attr]
    assert (line.start, line.end, line.text) == (0.0, 2.5, "meow")
    clip = of("tvqa_with_sub", tmp_path)[0].clip
    assert clip is not None and (clip.start, clip.end) == (6.01, 14.2)
    (line,) = clip.subtitles  # of the file beside, in seconds of the clip
    assert (line.start, line.end, line.text) == (pytest.approx(0.99), pytest.approx(2.49), "Hm.")


def test_subtitles_lie_in_files_beside_the_videos(tmp_path: Path) -> None:
    for name in ("video_mme_subtitles", "long_video_bench_subtitles"):
        for sample in of(name, tmp_path):
            assert only(sample).style == "video_multiple_choice_w_subtitle"
            assert sample.clip is not None and [line.text for line in sample.clip.subtitles] == ["Hm."]


def test_the_most_frequent_answer_is_taken(tmp_path: Path) -> None:
    (tree,) = of("coco_2014_vqa_multi", tmp_path)  # three questions about one image
    assert [branch.turns[0].answer for branch in tree.branches] == ["cat"] * 3
    assert [branch.style for branch in of("figure_qa", tmp_path)[0].branches] == ["figure_qa"] * 3
    assert [branch.turns[0].answer for branch in of("figure_qa", tmp_path)[0].branches] == ["No", "Yes", "No"]


def test_places_in_several_images_are_asked_by_label(tmp_path: Path) -> None:
    """Labels and points go by image: two of the three images show dogs."""
    for sample in of("pixmo_multi_points", tmp_path):
        dogs, cats = sample.branches
        for branch, label, images in ((dogs, "dogs", {1, 3}), (cats, "cats", {2})):
            answer = branch.turns[0].answer
            assert isinstance(answer, Points) and answer.label == label
            shown = {int(place.at) for place in answer.points}
            assert shown and shown <= images
            assert branch.turns[0].prompt.endswith(f"in {', '.join(f'image_{n}' for n in sorted(shown))}.")


def test_lists_side_by_side_become_branches(tmp_path: Path) -> None:
    for sample in of("mantis_instruct_nlvr2_multi_only", tmp_path):
        assert len(sample.media) == 2 and [branch.style for branch in sample.branches] == ["mantis_instruct_mc"] * 2
        first, second = (branch.turns[0] for branch in sample.branches)
        assert str(first.answer).endswith("Yes") and str(second.answer).endswith("both")
        assert second.prompt.count("\n") >= 3


def test_opposites_stand_among_the_options(tmp_path: Path) -> None:
    turn = only(of("paxion", tmp_path)[0]).turns[0]
    assert str(turn.answer).endswith("Opening a book")
    assert "Closing a book" in turn.prompt and "Not sure" in turn.prompt


def test_what_is_marked_damaged_or_asks_for_times_is_left_out(tmp_path: Path) -> None:
    assert len(of("ego4d_all", tmp_path)) == 2, "one of three clips is corrupt"
    write(
        tmp_path, "funqa", [row | {"task": task} for row, task in zip(rows("funqa"), ("H1", "H2", "C5"), strict=True)]
    )
    assert len(read(tmp_path, "funqa")) == 1


def test_a_hint_goes_before_the_question(tmp_path: Path) -> None:
    prompts = [only(sample).turns[0].prompt for sample in of("science_qa_img", tmp_path)]
    assert [prompt.startswith("Look.\nWhich") for prompt in prompts] == [False, True, True]


def test_every_entry_says_what_it_was_compared_with() -> None:
    known = {"card", "reader", "layout", "program"}
    for name, entry in TABLE.items():
        assert set(filter(None, entry.verified.split(", "))) <= known, name
    academic = [
        entry for name, entry in TABLE.items() if not name.startswith(("pixmo", "cosyn", "tulu", "molmo2_hard"))
    ]
    assert sum(bool(entry.verified) for entry in academic) / len(academic) > 0.8


def test_explanations_come_before_the_answer(tmp_path: Path) -> None:
    sample = of("cosyn_chart_exp", tmp_path)[0]
    assert sample.branches[0].turns[0].answer == "It shows. Answer: A bar."
    assert of("cosyn_document", tmp_path)[0].branches[0].turns[0].answer == "A bar."


def test_conversations(tmp_path: Path) -> None:
    turns = only(of("pixmo_cap_qa_as_user_qa", tmp_path)[0]).turns
    assert [tuple(turn.__dict__.values()) for turn in turns] == [("What?", "A cat."), ("Where?", "On a mat.")]
    assert only(of("tulu4", tmp_path)[0]).turns[0].prompt.startswith("System: answer 0\n")
    kept = [row | {"category": "Code"} for row in rows("tulu4")]
    write(tmp_path, "tulu4", [*kept[:2], rows("tulu4")[2]])
    assert len(read(tmp_path, "tulu4")) == 1, "code is left out"


def test_counts_that_are_answered_without_places_say_so(tmp_path: Path) -> None:
    asked = [row | {"question": question} for row, question in
             zip(rows("pixmo_ask_model_anything"), ("How many cats?", "What is it?", "Name the number of dogs"),
                 strict=True)]  # fmt: skip
    write(tmp_path, "pixmo_ask_model_anything", asked)
    prompts = [branch.turns[0].prompt for sample in read(tmp_path, "pixmo_ask_model_anything")
               for branch in sample.branches]  # fmt: skip
    assert [prompt == row["question"] for prompt, row in zip(prompts, asked, strict=True)] == [False, True, False]
    assert all("oint" in prompts[place] and prompts[place].endswith(asked[place]["question"]) for place in (0, 2))


def test_video_points_count_from_the_clip_and_are_split_by_number(tmp_path: Path) -> None:
    counts = {}
    for name in ("vixmo_points_minmax_0_5", "vixmo_points_minmax_6_25", "vixmo_points_minmax_26_60"):
        (sample,) = of(name, tmp_path)
        answer = only(sample).turns[0].answer
        assert isinstance(answer, Points)
        counts[name] = len(answer.points)
        assert sample.clip is not None and (sample.clip.start, sample.clip.end) == (10.0, 30.0)
        assert {place.at for place in answer.points} == {1.0, 2.5}
    assert list(counts.values()) == [2, 8, 30]


def test_tracks_leave_out_what_is_hidden(tmp_path: Path) -> None:
    sample = of("mevis_track", tmp_path)[0]
    answer = only(sample).turns[0].answer
    assert isinstance(answer, Tracks) and answer.label == "the red car"
    assert [[place.at for place in places] for places in answer.objects] == [[0.0, 0.5, 1.0], [0.5, 1.0]]
    assert answer.objects[0][1][1:] == (0.2, 0.1)
    assert sample.clip is not None and sample.clip.rate == 2
    single = only(of("mevis_single_point_track", tmp_path)[0])
    assert '<points coords="0.0 1 100 100">the red car</points>' in single.turns[0].prompt
    odd = [row | {"fps": 5} for row in rows("mevis_track")]
    write(tmp_path, "mevis_track", odd)
    assert read(tmp_path, "mevis_track") == [], "5 frames a second are no multiple of 2"


def test_moments_are_asked_in_both_directions(tmp_path: Path) -> None:
    turns = [branch.turns[0] for branch in of("epic_kitchens_qa", tmp_path)[0].branches]
    assert turns[0].answer == "0.1 - 3.4" and "open door" in turns[0].prompt
    assert turns[1].answer == "open door." and "0.1 to 3.4" in turns[1].prompt


def test_clocks_are_for_evaluation_only() -> None:
    assert TABLE["pixmo_clocks"].evaluation_only
    assert not any(member.name == "pixmo_clocks" for name in SHIPPED for member in mixture.load(name).members)


def test_unknown_names_tell_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean pixmo_cap"):
        find("pixmo_caps")


def test_shares_of_the_released_fine_tuning() -> None:
    """Sets of 10,000 samples each: shares by hand from the released numbers."""
    found = mixture.load("molmo2_sft")
    rates = dict(zip([member.name for member in found.members], found.rates(lambda _: 10_000), strict=True))
    by_group = {group.name: sum(rates[member.name] for member in group.members) for group in found.groups}
    # Lists A to D of the reference have 32, 34, 35 and 4 members; all stand in the table.
    assert [len(group.members) for group in found.groups] == [6, 32, 34, 35, 4, 5, 1, 1]
    assert all(member.name in TABLE for member in found.members)
    # The released rates sum to 1.1 and are scaled.
    shares = [share / 1.1 for share in (0.15, 0.25, 0.20, 0.15, 0.15, 0.10, 0.0995, 0.0005)]
    assert list(by_group.values()) == pytest.approx(shares)
    demo = 4 * 100 + 100_000**0.5 + 150
    assert rates["vixmo3_top_level_captions_min_3"] == pytest.approx(shares[0] * 150 / demo)
    tracking = next(group for group in found.groups if group.name == "tracking")
    released = {0.40: 6, 0.05: 4, 0.20: 5 + 4, 0.01: 2, 0.15: 5, 0.10: 9}
    weights = [round(member.sampling_rate * 1.11, 4) for member in tracking.members]
    assert {weight: weights.count(weight) for weight in weights} == released
    assert rates["vixmo_points_minmax_6_25"] == pytest.approx(shares[4] * 0.3)
    flat = {member.name: member.weight for member in found.members if member.weight is not None}
    assert flat.pop("vixmo3_top_level_captions_min_3") == 0.1 and set(flat.values()) == {0.2}
    assert len(flat) == len(tracking.members) + 4 + 5


def test_shares_of_the_educational_recipe() -> None:
    found = mixture.load("educational_sft")
    sizes = {member.name: 100 + number**2 for number, member in enumerate(found.members)}
    total = sum(size**0.5 for size in sizes.values())
    assert found.rates(sizes.__getitem__) == pytest.approx([size**0.5 / total for size in sizes.values()])
    weights = {member.name: member.weight for member in found.members}
    assert set(weights.values()) == {1.0, 1.5, 2.0}
    assert (weights["pixmo_cap"], weights["pixmo_count_train"], weights["molmo2_video_track"]) == (1.0, 1.5, 2.0)
    stage1 = mixture.load("educational_pretrain")
    assert [group.rate for group in stage1.groups] == [0.6, 0.3, 0.1]


def test_questions_about_charts_weigh_by_who_asked():
    """So that the 7,398 of people count as much as the 20,901 of a program."""
    entry = find("chart_qa_weighted")
    row = {"image": {"bytes": picture(1)}, "query": "How many?", "label": ["14"]}

    def weight(who: object) -> float:
        (draft,) = entry.family(SetRow(row | {"human_or_machine": who}, entry.columns), **entry.options)
        return draft.branches[0].weight

    assert 7398 * weight(0) == pytest.approx(20901 * weight(1)) == pytest.approx(28299 * 2 * 7398 * 20901 / 28299**2)
    with pytest.raises(ValueError, match="'human_or_machine' is 7; needed one of 0, 1"):
        weight(7)


@pytest.mark.parametrize("name", ["ai2d_test", "perception_test_val", "nextqa_mc", "nextqa_mc_test"])
def test_an_index_is_never_taken_for_the_text_of_an_option(name: str) -> None:
    """Published as a text: `2` of the options 3, 2, 4, 1, 5 is the third, not the second."""
    entry, given = find(name), rows(name)[0]
    texts = ["3", "2", "4", "1", "5"]
    changed = given | {entry.columns["answer_index"]: "2"} | {f"a{number}": text for number, text in enumerate(texts)}
    changed = changed | ({"options": texts} if "options" in given else {})
    (draft,) = entry.family(SetRow(with_pictures(changed, 1), entry.columns), **entry.options)  # type: ignore[arg-type]
    assert str(draft.branches[0].turns[0].answer).endswith(" 4")


def test_answers_that_are_not_published_are_left_out() -> None:
    row = {"key": "v", "question": "Which?"}
    found = [one for answer in ("A", "NA")
             for one in source.read_row(find("lvbench"), row | {"answer": answer}, source.Context())]  # fmt: skip
    assert [isinstance(one, LeftOut) for one in found] == [False, True]
