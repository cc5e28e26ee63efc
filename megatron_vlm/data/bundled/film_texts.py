"""Texts about a clip of drawn objects, true by construction: captions, places, tracks, questions."""

from __future__ import annotations

from megatron_vlm.data.bundled import objects
from megatron_vlm.data.bundled.clips import SECONDS, Film, Moving
from megatron_vlm.data.bundled.draw import Draw
from megatron_vlm.data.bundled.questions import NUMBERS
from megatron_vlm.data.example import Branch, Point, Points, Tracks, Turn


def captions(film: Film) -> tuple[Branch, ...]:
    """A long caption with every object and its way, and a short one."""
    told = " ".join(f"{_article(one)} {_way(one)}." for one in film.objects)
    total = len(film.objects)
    amount = "one object" if total == 1 else f"{NUMBERS[total]} objects"
    moving = sum(bool(one.direction) for one in film.objects)
    still = "" if moving == total else f", {NUMBERS[moving]} of them moving" if total > 1 else ", not moving"
    long = f"The video shows {amount}{still}, on a photograph of {film.topic}. {told}"
    short = "; ".join(f"{_article(one, capital=False)} {one.direction or 'in one place'}" for one in film.objects)
    return (
        Branch("video_long_caption", (Turn("", long),)),
        Branch("video_short_caption", (Turn("", f"{short[0].upper()}{short[1:]}."),)),
    )


def labels(film: Film, *, held_out: bool = False) -> list[tuple[str, tuple[Moving, ...]]]:
    """What can be asked for: pairs (`red stars`), and all objects where they are several.

    held_out: only the pairs that training never shows.
    """
    groups: dict[tuple[str, str], tuple[Moving, ...]] = {}
    for one in film.objects:
        pair = (one.color, one.kind)
        groups[pair] = (*groups.get(pair, ()), one)
    if held_out:
        groups = {pair: members for pair, members in groups.items() if pair in objects.HELD_OUT_PAIRS}
    found = [(f"{color} {objects.plural(kind)}", members) for (color, kind), members in groups.items()]
    if len(groups) > 1 and not held_out:
        found.append(("objects", film.objects))
    return found


def points(film: Film, *, held_out: bool = False) -> tuple[Branch, ...]:
    """Each object of a label once, where it is first seen; asked for the places, or for the number too."""
    draw = Draw(f"video points/{film.key}")
    branches = []
    for label, members in labels(film, held_out=held_out):
        style = draw.pick(("video_point", "video_point_count"))
        places = tuple(Point(*member.track()[0]) for member in members)
        branches.append(Branch(style, (Turn(label, Points(label, places)),)))
    return tuple(branches)


def tracks(film: Film, *, held_out: bool = False) -> tuple[Branch, ...]:
    """The objects of each label at every moment of clips.RATE."""
    return tuple(
        Branch(
            "video_point_track_per_frame",
            (Turn(label, Tracks(label, tuple(tuple(Point(*place) for place in one.track()) for one in members))),),
        )
        for label, members in labels(film, held_out=held_out)
    )


def questions(film: Film) -> tuple[Branch, ...]:
    """Short questions that need the time: directions, what comes or goes, the number."""
    draw = Draw(f"video questions/{film.key}")
    kinds = [(one.color, one.kind) for one in film.objects]
    alone = [one for one in film.objects if kinds.count((one.color, one.kind)) == 1]
    asked = [(f"Which way does the {_name(one)} go?", f"{_sentence(one.direction or 'it stays')}.") for one in alone]
    for one in alone:
        if one.first:
            asked.append((f"Is the {_name(one)} there from the beginning?", f"No, from {one.first:.1f} s on."))
        elif one.last < SECONDS:
            asked.append((f"Does the {_name(one)} stay until the end?", f"No, until {one.last:.1f} s."))
        else:
            asked.append((f"Is the {_name(one)} there from the beginning?", "Yes."))
    asked.append(("How many objects does the video show?", f"{_sentence(NUMBERS[len(film.objects)])}."))
    chosen = draw.shuffled(asked)[:3]
    return tuple(Branch("user_qa", (Turn(question, answer),)) for question, answer in chosen)


def _way(one: Moving) -> str:
    words = [f"moves {one.direction}" if one.direction else "stays where it is"]
    if one.first:
        words.append(f"comes at {one.first:.1f} s")
    if one.last < SECONDS:
        words.append(f"is gone from {one.last:.1f} s on")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _article(one: Moving, *, capital: bool = True) -> str:
    name = _name(one)
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article.capitalize() if capital else article} {name}"


def _name(one: Moving) -> str:
    return f"{one.color} {one.kind}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"
