"""Families of sets for evaluation: rows that hold what scoring needs beside an answer. It goes into the sample's info:

masks       {label: [[[at, height, width, run lengths], ...] of each object]}
forms       {question: [form of the answer, its decimals]}
statements  what a caption should say, one thing each
category    of the question, reported apart
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_vlm.data.example import Branch, Clip, Point, Points, Tracks, Turn
from megatron_vlm.data.masks import packed
from megatron_vlm.data.sets.draft import Draft, MaskFile, SubtitleFile
from megatron_vlm.data.sets.places import MAX_POINTS, inside, pairs
from megatron_vlm.data.sets.questions import plain_choice
from megatron_vlm.data.sets.row import LeftOut, Row

#: Frames a second of Molmo2-VideoPointEval's masks.
MASKS_PER_SECOND = 2
#: Forms of MathVista's answers without options, and the most decimals of one that is a number.
FORMS = ("integer", "float", "list", "text")
MOST_DECIMALS = 15
_LETTERED = re.compile(r"^\s*[A-Z]:\s*(\S.*)$", re.MULTILINE)
_PLACEHOLDER = re.compile(r"<image(?: (\d+))?>")


def masked_video_points(row: Row, *, style: str = "video_point_count", path: str = "") -> Iterator[Draft]:
    """A place of `label` for each of `timestamps`: `points` [{x, y}] in pixels; `masks`, for each of them [{frame_id,
    rle}] at MASKS_PER_SECOND. Asked for number and places."""
    label = row.text("label")
    times = [Row({"timestamps": time}).number("timestamps") for time in row.items("timestamps")]
    kept: list[list[list[Any]]] = [
        [[mask.number("frame_id") / MASKS_PER_SECOND, *packed(mask.get("rle"))] for mask in map(Row, frames or ())]
        for frames in row.items("masks")
    ]
    if not len(times) == len(kept) == len(row.items("points")):
        raise ValueError(
            f"{len(times)} times, {len(row.items('points'))} points and {len(kept)} masks: needed as many."
        )
    found = []
    for time, (x, y), frames in zip(times, pairs(row, "points"), kept, strict=True):
        if not frames:
            raise ValueError(f"the place at {time} s has no mask.")
        _, height, width, _ = frames[0]
        found.append(inside(row, Point(time, x / width, y / height)))
    question = f'How many "{label}" are there in the video?' if style.endswith("count") else label
    branch = Branch(style, (Turn(question, Points(label, tuple(found))),))
    yield Draft((branch,), row.media(path), info={"masks": {label: kept}})


def masked_tracks(row: Row, *, rate: int = 1, path: str = "") -> Iterator[Draft]:
    """Molmo2-VideoTrackEval's form: `points` [{object_id, points: [[x, y] or nothing for each frame]}] in pixels of a
    video `width` x `height` at `fps`; `masks` [{object_id, masks: [run lengths or nothing for each frame]}]. Of both,
    `rate` frames a second are kept. Raises LeftOut for rows whose fps is no multiple of it."""
    fps, width, height = row.number("fps"), row.number("width"), row.number("height")
    if min(fps, width, height) <= 0:
        raise row.bad("width", (width, height, fps), "width, height and fps above 0")
    if fps % rate:
        raise LeftOut(f"{fps:g} frames a second are no multiple of {rate}.")
    step, label = int(fps // rate), row.text("label")
    masks = {one.text("object_id"): one.items("masks") for one in map(Row, row.items("masks"))}
    objects, kept = [], []
    for one in map(Row, row.items("points")):
        frames = [(number, place) for number, place in enumerate(one.items("points")) if place and number % step == 0]
        if frames:
            seen = zip(frames, pairs(Row({"points": [place for _, place in frames]}), "points"), strict=True)
            objects.append(tuple(inside(row, Point(n / fps, x / width, y / height)) for (n, _), (x, y) in seen))
            own = masks.get(one.text("object_id"))
            if own is None:
                raise row.bad("masks", list(masks), f"those of object {one.text('object_id')}")
            kept.append([[n / fps, *packed(own[n])] for n in range(0, len(own), step) if own[n]])
    branch = Branch("video_point_track_per_frame", (Turn(label, Tracks(label, tuple(objects))),))
    yield Draft((branch,), row.media(path), clip=Clip(rate=rate), info={"masks": {label: kept}})


def stated_captions(row: Row, *, style: str, path: str = "") -> Iterator[Draft]:
    """A `caption` with its `statements`."""
    made = row.texts("statements")
    if not made:
        raise row.bad("statements", row.get("statements"), "at least one statement")
    branch = Branch(style, (Turn("", row.text("caption")),))
    yield Draft((branch,), row.media(path), clip=row.clip(), info={"statements": made})


def place_in_mask(row: Row, *, mask: str, style: str = "pointing", path: str = "") -> Iterator[Draft]:
    """Point-Bench's form: a `question` that asks for places, of which only a mask is known that holds them all, and a
    `category`; the `count` of the places where it matters. mask: form of the name of the mask's file."""
    category, question = row.text("category"), row.text("question")
    count = row.number("count") if row.get("count") is not None else 1
    if count not in range(1, MAX_POINTS + 1):
        raise row.bad("count", row.get("count"), f"a number of places up to {MAX_POINTS}")
    branch = Branch(style, (Turn(question, Points("place", (Point(1, 0.5, 0.5),) * int(count))),))
    part = hashlib.sha256(question.encode()).hexdigest()[:8]
    yield Draft((branch,), row.media(path), part=part, info={"category": category}, masks=(MaskFile(row.form(mask)),))


def numeric_answers(row: Row, *, style: str, choice_style: str) -> Iterator[Draft]:
    """MathVista's form: a `question` with `choices`, or whose `answer` has the form `answer_type` (integer, float,
    list, text), a float to `precision` decimals."""
    texts = row.texts("choices")
    question = row.text("question").split("Question:")[-1].split("Hint:")[0].strip()
    if not question:
        raise row.bad("question", row.get("question"), "a question")
    if texts:
        turn = plain_choice(question, texts, row)
        yield Draft((Branch(choice_style, (turn,)),), row.media())
        return
    form, decimals = row.text("answer_type"), row.number("precision") if row.get("precision") is not None else 0
    if form not in FORMS or decimals not in range(MOST_DECIMALS + 1):
        raise row.bad("answer_type", (form, decimals), f"{', '.join(FORMS)}, and 0 to {MOST_DECIMALS} decimals")
    info = {"forms": {question: [form, int(decimals)]}}
    yield Draft((Branch(style, (Turn(question, row.text("answer")),)),), row.media(), info=info)


def numbers(row: Row, *, style: str, question: str = "question", path: str = "") -> Iterator[Draft]:
    """How many: a `question`, the `count`, and a `category` where the row has one."""
    count = row.number("count")
    if count < 0 or count != int(count):
        raise row.bad("count", row.get("count"), "a number of things")
    info = {"category": row.text("category")} if row.get("category") else {}
    branch = Branch(style, (Turn(row.text(question), str(int(count))),))
    yield Draft((branch,), row.media(path), clip=row.clip(), info=info)


def several_images(row: Row, *, style: str, images: int = 8, path: str = "") -> Iterator[Draft]:
    """A question about `image_1`, `image_2`, ... (or `images`) with `options` (a list, one written as Python does, or
    lines `A: text`), and `answer`: letter, `(letter)` or text. `<image 2>`, and `<image>` in order, become `Image 2`.
    Without options, an open question."""
    single = [row.get(f"image_{number}") for number in range(1, images + 1)]
    media = Row({"images": [image for image in single if image] or row.items("images")}).media(path)
    options = row.get("options")
    if isinstance(options, str) and (lines := _LETTERED.findall(options)):
        options = lines
    elif isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two: nested too deeply
            raise row.bad("options", options, "a list") from None
    question, *texts = _numbered([row.text("question"), *Row({"options": options}).texts("options")])
    if not texts:
        yield Draft((Branch(style, (Turn(question, row.text("answer")),)),), media)
        return
    turn = plain_choice(question, texts, row)
    yield Draft((Branch(style, (turn,)),), media)


def _numbered(texts: list[str]) -> list[str]:
    seen = 0

    def named(match: re.Match[str]) -> str:
        nonlocal seen
        seen += 1
        return f"Image {match[1] or seen}"

    return [_PLACEHOLDER.sub(named, text).strip() for text in texts]


def choices(
    row: Row, *, style: str, options: tuple[str, ...] = (), subtitles: str = "", member: str = "", path: str = ""
) -> Iterator[Draft]:
    """A question about a video (or an image) with `options`, a list or the columns named by the parameter, in the plain
    layout of benchmarks; `answer_index`, or `answer`: number, letter or text. Subtitles come along, a span cuts.

    subtitles: form of the name of the file that has them, on whose clock the video begins at `subtitles_start` and
               takes `seconds`. member: column that names the video in a file for all of them.
    """
    texts = row.texts("options") or [row.text(name) for name in options if row.get(name)]
    if len(texts) < 2:
        raise row.bad("options", row.get("options"), "at least two options")
    turn = plain_choice(row.text("question"), texts, row)
    info: Mapping[str, Any] = {"category": row.text("category")} if row.get("category") else {}
    lines = None
    if subtitles:
        known = [row.number(name) if row.get(name) is not None else 0.0 for name in ("subtitles_start", "seconds")]
        lines = SubtitleFile(row.form(subtitles), row.text(member) if member else "", *known)
    yield Draft((Branch(style, (turn,)),), row.media(path), clip=row.clip(), info=dict(info), subtitles=lines)


def written_choices(row: Row, *, style: str, path: str = "") -> Iterator[Draft]:
    """A question whose options stand in its text, one a line; `answer`: the letter, or letter and text. Raises LeftOut
    where it is `NA`, not published."""
    if row.text("answer") == "NA":
        raise LeftOut("its answer is not published.")
    branch = Branch(style, (Turn(row.text("question"), row.text("answer")),))
    yield Draft((branch,), row.media(path), clip=row.clip())
