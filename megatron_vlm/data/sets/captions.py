"""Families of captions: one image with its caption and transcripts, one video with captions of several kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_vlm.data.example import Branch, Turn
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.sets.draft import Draft
from megatron_vlm.data.sets.row import LeftOut, Row, words


def captions(row: Row, *, style: str = "long_caption", transcripts: bool = False, path: str = "") -> Iterator[Draft]:
    """`caption` of an image, a video or a clip of one.

    transcripts: add one of `transcripts` (what people said who described the image) as a branch. Molmo2 draws one anew
    at each visit; here it is drawn once for each image.
    """
    branches = [Branch(style, (Turn("", row.text("caption")),))]
    media = row.media(path)
    spoken = [text for text in map(words, row.items("transcripts")) if text]  # some recordings are empty
    if transcripts and spoken:
        chosen = generator("transcript", media[0].identity).choice(spoken)
        branches.append(Branch("transcript", (Turn("", chosen),)))
    yield Draft(tuple(branches), media, clip=row.clip())


def video_captions(row: Row, *, styles: Mapping[str, str], min_score: float = 0.0, path: str = "") -> Iterator[Draft]:
    """Captions of one video (or clip), one branch for each column of `styles` (column -> style) that holds a text.

    Raises LeftOut for rows whose `annotation_score` is below min_score.
    """
    if row.get("annotation_score") is not None and row.number("annotation_score") < min_score:
        raise LeftOut(f"its annotation_score is below {min_score:g}.")
    found = [Branch(style, (Turn("", row.text(name)),)) for name, style in styles.items() if row.get(name)]
    if not found:
        raise ValueError(f"the row has none of the captions {', '.join(styles)}.")
    yield Draft(tuple(found), row.media(path), clip=row.clip())


def object_captions(row: Row, *, style: str = "video_object_caption", path: str = "") -> Iterator[Draft]:
    """Captions of a video, each about one who acts in it: `captions` and `actors`, side by side. A branch each."""
    told = zip(row.texts("captions"), row.texts("actors"), strict=True)
    branches = tuple(
        Branch(style, (Turn(f"What does {actor.lower()} do in the video?", text),)) for text, actor in told
    )
    if not branches:
        raise row.bad("captions", row.get("captions"), "at least one caption")
    yield Draft(branches, row.media(path))


def moments(row: Row, *, style: str = "video_short_answer", path: str = "") -> Iterator[Draft]:
    """What happens from when to when: `caption` with a `span`. Asked in both directions, two branches; the answer's
    times are seconds with one decimal. The span is no clip: the sample is the whole video."""
    span, text = row.span(), row.text("caption").rstrip(".")
    if span is None:
        raise ValueError(f"the row has neither span nor start and end. Columns: {', '.join(row.values)}.")
    start, end = span
    when = Turn(f"When does this happen in the video: {text}? Give the start and the end in seconds.",
                f"{start:.1f} - {end:.1f}")  # fmt: skip
    what = Turn(f"What happens from {start:.1f} to {end:.1f} seconds?", f"{text}.")
    yield Draft((Branch(style, (when,)), Branch(style, (what,))), row.media(path))
