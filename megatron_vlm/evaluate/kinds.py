"""What kinds of answers there are: how each is read and judged. Pure functions of question, truth and words.

A new kind is a Kind in KINDS: a parser (words -> something, None = nothing can be made out) and a scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_vlm.data import points
from megatron_vlm.data.example import Branch, Example, Points, Tracks
from megatron_vlm.data.masks import unpacked
from megatron_vlm.evaluate import places, statements, tracking, words
from megatron_vlm.evaluate.regions import SAME_TIME_S, Region, Spot
from megatron_vlm.evaluate.score import Scores, Verdict, judged, unknown, unreadable
from megatron_vlm.evaluate.statements import Judge, JudgeError, JudgeRefused, Overlap

#: Times a second of a video at which places are told apart where the sample says nothing.
USUAL_RATE = 2


@dataclass(frozen=True)
class Question:
    """One question with what is known of its answer."""

    prompt: str
    wanted: str | Points | Tracks
    info: Mapping[str, Any] = field(default_factory=dict)
    """The sample's. `answers` {prompt: [accepted, ...]}, `masks` {label: [[[at, height, width, run lengths], ...] of
    each object]}, `statements` [...], `objects` as in the bundled sample data."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of each image, or of the video."""
    seconds: float = 0.0
    """Of the video."""
    rate: int = USUAL_RATE
    """Times a second at which it was annotated."""
    radius: float = 0.0
    """How far from a place without a mask a hit may lie, as a share of the longer side. 0 = the sample must say."""
    judge: Judge = field(default_factory=Overlap)
    """Of captions."""

    @property
    def accepted(self) -> list[str]:
        """Every answer that counts as right. Raises ValueError where there is none in words."""
        given = self.info.get("answers", {}).get(self.prompt)
        if given:
            return [str(one) for one in given]
        if not isinstance(self.wanted, str):
            raise ValueError("the truth is no text")
        return [self.wanted]


def of(sample: Example, branch: Branch, *, radius: float = 0.0, judge: Judge | None = None) -> Question:
    """The first question of a branch."""
    turn = branch.turns[0]
    rate = sample.clip.rate if sample.clip and sample.clip.rate else USUAL_RATE
    sizes = tuple((media.width, media.height) for media in sample.media)
    return Question(
        turn.prompt, turn.answer, sample.info, sizes, sample.seconds, rate, radius, judge if judge else Overlap()
    )


@dataclass(frozen=True)
class Kind:
    """How answers of one kind are read and judged."""

    parse: Callable[[str, Question], Any]
    """None = nothing can be made out."""
    score: Callable[[Any, Question], Scores]
    """Of what was read. Raises ValueError where the truth does not do, JudgeError where the judge fails."""
    nothing: Any
    """What an answer counts as in which nothing can be made out."""
    complaint: str
    """Why such an answer is not scored."""


def verdict(kind: Kind, question: Question, said: str) -> Verdict:
    """What is said of an answer: any text gives one."""
    read = kind.parse(said, question)
    try:
        scores = kind.score(kind.nothing if read is None else read, question)
    except JudgeError as error:
        return unknown(f"judge: {error}")
    except JudgeRefused:
        raise
    except ValueError as error:
        return unknown(f"truth: {error}")
    if read is None:
        return unreadable({name: (0.0, whole) for name, (_, whole) in scores.items()}, kind.complaint)
    return judged(scores)


def regions(question: Question) -> list[Region]:
    """Where each wanted place may be hit. Raises ValueError where nothing says how far around it."""
    wanted = question.wanted
    if not isinstance(wanted, Points):
        raise ValueError("the truth has no points")
    masks = question.info.get("masks", {}).get(wanted.label)
    if masks is not None:
        if len(masks) != len(wanted.points):
            raise ValueError(f"{len(wanted.points)} points, but {len(masks)} objects with masks")
        return [Region(p.x, p.y, p.at, _spots(rows)) for p, rows in zip(wanted.points, masks, strict=True)]
    found = []
    for point in wanted.points:
        spots = _objects(question, point.at, point.x, point.y)
        spots = spots or ((Spot(point.at, point.x, point.y, question.radius),) if question.radius else ())
        if not spots:
            raise ValueError("nothing says how near a place must be")
        found.append(Region(point.x, point.y, point.at, spots))
    return found


def _spots(rows: Any) -> tuple[Spot, ...]:
    return tuple(Spot(at, 0.0, 0.0, mask=(height, width, counts)) for at, height, width, counts in rows)


def _objects(question: Question, at: float, x: float, y: float) -> tuple[Spot, ...]:
    """The circle of the drawn object at a place, or in a video its circles at all times."""
    for row in question.info.get("objects", ()):
        if len(row) == 5 and abs(row[2] - x) < 1e-6 and abs(row[3] - y) < 1e-6:
            return (Spot(at, row[2], row[3], row[4]),)
        if len(row) == 4 and any(abs(t - at) <= SAME_TIME_S and abs(u - x) + abs(v - y) < 1e-6 for t, u, v in row[3]):
            return tuple(Spot(t, u, v, row[2]) for t, u, v in row[3])
    return ()


def followed(question: Question) -> dict[int, list[Spot]]:
    """Where each wanted object is, by its number. Raises ValueError where nothing says how far around it."""
    wanted = question.wanted
    if not isinstance(wanted, Tracks):
        raise ValueError("the truth has no tracks")
    masks = question.info.get("masks", {}).get(wanted.label)
    found: dict[int, list[Spot]] = {}
    for number, track in enumerate(wanted.objects, start=1):
        known = _objects(question, *track[0])
        radius = known[0].radius if known else question.radius
        if masks is None and not radius:
            raise ValueError("nothing says how near a place must be")
        by_time = {round(row[0], 1): tuple(row[1:]) for row in masks[number - 1]} if masks is not None else {}
        found[number] = [Spot(p.at, p.x, p.y, radius, by_time.get(round(p.at, 1))) for p in track]
    return found


def _read_places(said: str, _: Question) -> list[points.Place] | None:
    found = points.parse(said)
    none = points.NONE in said or points.NO_TRACKS in said
    return found if found or none else None


def _pointing(found: list[points.Place], question: Question) -> Scores:
    return places.pointing(found, regions(question), question.sizes)


def _video_pointing(found: list[points.Place], question: Question) -> Scores:
    return places.video_pointing(found, regions(question), question.sizes[0], question.seconds)


def _tracking(found: list[points.Place], question: Question) -> Scores:
    return tracking.tracking(found, followed(question), question.sizes[0], question.rate)


def _counting(said: int | None, question: Question) -> Scores:
    wanted = question.wanted
    if isinstance(wanted, str):
        wanted_count = points.parse_count(wanted)
    else:
        wanted_count = len(wanted.points if isinstance(wanted, Points) else wanted.objects)
    if wanted_count is None:
        raise ValueError("the truth names no number")
    return _by_category(places.counting(said, wanted_count), question)


def _choice(said: int | None, question: Question) -> Scores:
    options = words.options(question.prompt)
    wanted = {words.choice(one, options) for one in question.accepted} - {None}
    if not wanted:
        raise ValueError("the truth names none of the question's options")
    return _by_category({"accuracy": (float(said in wanted), 1)}, question)


def _choice_or_words(said: str, question: Question) -> int | str | None:
    """Of sets in which some questions have options."""
    options = words.options(question.prompt)
    return words.choice(said, options) if options else said.strip() or None


def _chosen_or_same(said: int | str, question: Question) -> Scores:
    if words.options(question.prompt):
        return _choice(said if isinstance(said, int) else None, question)
    return {"accuracy": (words.exact(str(said), question.accepted), 1)}


def _number(said: str, question: Question) -> Any:
    """What MathVista's answers are compared by."""
    options = words.options(question.prompt)
    form, decimals = question.info.get("forms", {}).get(question.prompt, ("text", 0))
    return words.choice(said, options) if options else words.stated(said, form, decimals)


def _same_number(said: Any, question: Question) -> Scores:
    if words.options(question.prompt):
        return _choice(said, question)
    wanted = [_number(one, question) for one in question.accepted]
    if None in wanted:
        raise ValueError("the truth has not the form that it should have")
    return {"accuracy": (float(said in wanted), 1)}


def _in_mask(found: list[points.Place], question: Question) -> Scores:
    """Whether all places lie in the mask, and there is one (Molmo2's rule). Point-Bench asks for as many as there are
    where it is about counting, else looks at the first alone; its own figure is the mean over the categories."""
    wanted = question.wanted
    rows = question.info.get("masks", {}).get(wanted.label) if isinstance(wanted, Points) else None
    if not rows or not isinstance(wanted, Points):
        raise ValueError("the truth has no mask")
    hits = [_inside(rows[0][0][1:], place, question.sizes[0]) for place in found[: places.MOST_PLACES]]
    counts = question.info.get("category") == "counting"
    enough = len(found) == len(wanted.points) and all(hits) if counts else any(hits[:1])
    scores = _by_category({"accuracy": (float(bool(hits) and all(hits)), 1)}, question)
    return {**scores, "Point-Bench's own": (float(enough), 1)}


def _inside(mask: Any, place: points.Place, size: tuple[int, int]) -> bool:
    """The pixel of the image that holds the place; a mask may be smaller than the image."""
    pixels = unpacked(*mask)
    row, column = (min(int(at * side), side - 1) for at, side in ((place.y, size[1]), (place.x, size[0])))
    return row < pixels.shape[0] and column < pixels.shape[1] and bool(pixels[row, column])


def _by_category(scores: Scores, question: Question) -> Scores:
    """The main score a second time under the question's category."""
    category = question.info.get("category")
    name, pair = next(iter(scores.items()))
    return {**scores, f"{name}, {category}": pair} if category else scores


def _caption(said: str, question: Question) -> Scores:
    (truth,) = question.accepted[:1]
    return statements.caption(said, truth, question.judge, question.info.get("statements", ()))


def _words(name: str, score: Callable[[str, list[str]], float]) -> Kind:
    """An answer in words: all that can be unreadable is silence."""
    return Kind(
        lambda said, _: said if said.strip() else None,
        lambda said, question: {name: (score(said, question.accepted), 1)},
        "",
        "the answer is empty",
    )


NO_PLACE = "the answer names no place, nor that there is none"
KINDS: dict[str, Kind] = {
    "answer": _words("accuracy", words.exact),
    "vqa": _words("VQA score", words.vqa),
    "relaxed": _words("relaxed accuracy", words.relaxed),
    "anls": _words("ANLS", words.anls),
    "choice": Kind(
        lambda said, question: words.choice(said, words.options(question.prompt)),
        _choice,
        None,
        "the answer names none of the options, or several",
    ),
    "choice or words": Kind(_choice_or_words, _chosen_or_same, "", "the answer is empty, or names no option"),
    "number": Kind(_number, _same_number, None, "the answer has not the form that was asked for"),
    "count": Kind(lambda said, _: points.parse_count(said), _counting, None, "the answer names no number"),
    "pointing": Kind(_read_places, _pointing, [], NO_PLACE),
    "in mask": Kind(_read_places, _in_mask, [], NO_PLACE),
    "video pointing": Kind(_read_places, _video_pointing, [], NO_PLACE),
    "tracking": Kind(_read_places, _tracking, [], NO_PLACE),
    "caption": Kind(lambda said, _: said if said.strip() else None, _caption, "", "the answer is empty"),
}
