"""Texts about a composed scene, true by construction: captions, places, counts, questions.

Labels are plural (`red stars`), whatever the count. At most MOST_BRANCHES conversations per sample.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_vlm.data.bundled import objects
from megatron_vlm.data.bundled.draw import Draw
from megatron_vlm.data.bundled.scenes import SIDE, Placed, Scene
from megatron_vlm.data.example import Branch, Point, Points, Turn

MOST_BRANCHES = 4
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_PLACES = (
    ("at the upper left", "at the top", "at the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("at the lower left", "at the bottom", "at the lower right"),
)


def captions(scene: Scene) -> tuple[Branch, ...]:
    """A long caption with every object and its place, and a short one with counts only."""
    groups = _by_pair(scene.objects)
    placed = [
        f"{_amount(pair, len(items))} {_joined(_place(item) for item in items)}" for pair, items in groups.items()
    ]
    counted = [_amount(pair, len(items)) for pair, items in groups.items()]
    total = len(scene.objects)
    opening = "There is one object" if total == 1 else f"There are {NUMBERS[total]} objects"
    long = f"{opening} on a piece of a photograph of {scene.topic}: {'; '.join(placed)}."
    relations = [f"The {_name(first)} is {word} the {_name(second)}." for first, second, word in _relations(groups)[:2]]
    short = _joined(counted)
    return (
        Branch("long_caption", (Turn("", " ".join([long, *relations])),)),
        Branch("short_caption", (Turn("", f"{short[0].upper()}{short[1:]}."),)),
    )


def labels(scene: Scene) -> list[tuple[str, tuple[Placed, ...]]]:
    """What can be pointed at, in drawn order: pairs (`red stars`), kinds (`stars`), colours (`red objects`), and
    sometimes a pair that is not there."""
    draw = Draw(f"labels/{scene.key}")
    groups = _by_pair(scene.objects)
    found = [(_plural(pair), items) for pair, items in groups.items()]
    if draw.chance(0.4):
        kind = draw.pick(sorted({kind for _, kind in groups}))
        found.append((objects.plural(kind), tuple(item for item in scene.objects if item.kind == kind)))
    if draw.chance(0.4):
        color = draw.pick(sorted({color for color, _ in groups}))
        found.append((f"{color} objects", tuple(item for item in scene.objects if item.color == color)))
    if draw.chance(0.2):
        pair = (draw.pick(tuple(objects.COLORS)), draw.pick(objects.TRAIN_KINDS))
        if pair not in groups and pair not in objects.HELD_OUT_PAIRS:
            found.append((_plural(pair), ()))
    return draw.shuffled(found)[:MOST_BRANCHES]


def held_out_labels(scene: Scene) -> list[tuple[str, tuple[Placed, ...]]]:
    """Only the pairs that training never shows."""
    groups = _by_pair(scene.objects)
    return [(_plural(pair), items) for pair, items in groups.items() if pair in objects.HELD_OUT_PAIRS]


def new_kind_labels(scene: Scene) -> list[tuple[str, tuple[Placed, ...]]]:
    """Objects of a kind that training never shows, asked for by their colour: no other object has it."""
    groups = _by_pair(scene.objects)
    return [(f"{color} objects", items) for (color, kind), items in groups.items() if kind in objects.HELD_OUT_KINDS]


def places(style: str, asked: Iterable[tuple[str, tuple[Placed, ...]]]) -> tuple[Branch, ...]:
    """One branch per label, in `style` (pointing or point_count)."""
    return tuple(
        Branch(style, (Turn(label, Points(label, tuple(Point(1, *item.point) for item in items))),))
        for label, items in asked
    )


def positions(scene: Scene) -> tuple[Branch, ...]:
    """Words and places in the other direction, so that coordinates are learned from many sides: all objects with their
    places (thousandths, as in points), what is at a place, where an object is in words."""
    draw = Draw(f"positions/{scene.key}")
    items = sorted(scene.objects, key=_thousandths)
    listed = "; ".join(f"{_thousandths(item)} {_name((item.color, item.kind))}" for item in items)
    asked = [("List every object with its place.", f"{listed}.")]
    for item in draw.shuffled(items)[:3]:
        asked.append((f"What is at {_thousandths(item)}?", f"{_amount((item.color, item.kind), 1).capitalize()}."))
    for pair, members in _by_pair(items).items():
        if len(members) == 1:
            asked.append((f"Where is the {_name(pair)}?", f"{_place(members[0]).capitalize()}."))
    return tuple(Branch("user_qa", (Turn(question, answer),)) for question, answer in asked)


def questions(scene: Scene) -> tuple[Branch, ...]:
    """Up to MOST_BRANCHES short questions: presence (as often yes as no), colour, number, relation."""
    draw = Draw(f"questions/{scene.key}")
    groups = _by_pair(scene.objects)
    asked = [_presence(draw, groups)]
    alone = [kind for kind in sorted({kind for _, kind in groups}) if sum(k == kind for _, k in groups) == 1]
    for kind in alone:
        color, members = next((c, items) for (c, k), items in groups.items() if k == kind)
        noun, verb = (kind, "is") if len(members) == 1 else (objects.plural(kind), "are")
        asked.append((f"What color {verb} the {noun}?", f"{color.capitalize()}."))
    pair = draw.pick(sorted(groups))
    asked.append((f"How many {_plural(pair)} are there?", f"{NUMBERS[len(groups[pair])].capitalize()}."))
    for first, second, word in _relations(groups)[:1]:
        true = draw.chance(0.5)
        said = word if true else _OPPOSITE[word]
        asked.append(
            (f"Is the {_name(first)} {said} the {_name(second)}?", "Yes." if true else f"No, it is {word} it.")
        )
    chosen = draw.shuffled(asked)[:MOST_BRANCHES]
    return tuple(Branch("user_qa", (Turn(question, answer),)) for question, answer in chosen)


_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _presence(draw: Draw, groups: dict[tuple[str, str], tuple[Placed, ...]]) -> tuple[str, str]:
    if draw.chance(0.5):
        return f"Is there a {_name(draw.pick(sorted(groups)))}?".replace(" a orange", " an orange"), "Yes."
    while True:
        pair = (draw.pick(tuple(objects.COLORS)), draw.pick(objects.TRAIN_KINDS))
        if pair not in groups and pair not in objects.HELD_OUT_PAIRS:
            return f"Is there a {_name(pair)}?".replace(" a orange", " an orange"), "No."


def _by_pair(items: Iterable[Placed]) -> dict[tuple[str, str], tuple[Placed, ...]]:
    groups: dict[tuple[str, str], tuple[Placed, ...]] = {}
    for item in items:
        groups[item.color, item.kind] = (*groups.get((item.color, item.kind), ()), item)
    return groups


def _relations(
    groups: dict[tuple[str, str], tuple[Placed, ...]],
) -> list[tuple[tuple[str, str], tuple[str, str], str]]:
    """(first, second, word) for pairs that stand alone and are clearly apart in one direction."""
    alone = [(pair, items[0]) for pair, items in groups.items() if len(items) == 1]
    found = []
    for (first, one), (second, other) in zip(alone, alone[1:], strict=False):
        (x, y), (other_x, other_y) = one.center, other.center
        apart = (one.diameter + other.diameter) / 2
        if abs(x - other_x) >= apart:
            found.append((first, second, "left of" if x < other_x else "right of"))
        elif abs(y - other_y) >= apart:
            found.append((first, second, "above" if y < other_y else "below"))
    return found


def _thousandths(item: Placed) -> str:
    x, y = item.point
    return f"{round(1000 * x):03d} {round(1000 * y):03d}"


def _place(item: Placed) -> str:
    x, y = item.center
    return _PLACES[min(2, int(3 * y / SIDE))][min(2, int(3 * x / SIDE))]


def _plural(pair: tuple[str, str]) -> str:
    return f"{pair[0]} {objects.plural(pair[1])}"


def _amount(pair: tuple[str, str], count: int) -> str:
    if count > 1:
        return f"{NUMBERS[count]} {_plural(pair)}"
    return f"{'an' if _name(pair)[0] in 'aeiou' else 'a'} {_name(pair)}"


def _name(pair: tuple[str, str]) -> str:
    """`red star`; a cut-out has no colour."""
    return " ".join(part for part in pair if part)


def _joined(parts: Iterable[str]) -> str:
    words = list(parts)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
