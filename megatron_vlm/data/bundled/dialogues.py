"""Short conversations without a picture, for the text share of a mixture: from rules and small tables, all true."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vlm.data.bundled.draw import Draw
from megatron_vlm.data.bundled.questions import NUMBERS
from megatron_vlm.data.example import Branch, Example, Turn

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "Sweden": "Stockholm", "Norway": "Oslo",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Ireland": "Dublin", "Hungary": "Budapest", "Japan": "Tokyo",
    "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa",
    "Mexico": "Mexico City", "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana", "Australia": "Canberra",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "light": "dark", "open": "closed", "early": "late", "wet": "dry",
    "full": "empty", "hard": "soft", "high": "low", "long": "short", "near": "far", "new": "old", "rich": "poor",
    "left": "right", "strong": "weak", "thick": "thin", "young": "old", "loud": "quiet", "wide": "narrow",
}  # fmt: skip
CLASSES = {
    "animal": ("cat", "dog", "horse", "fish", "bird", "cow", "mouse", "frog"),
    "fruit": ("apple", "pear", "plum", "banana", "cherry", "grape"),
    "vehicle": ("car", "bus", "train", "boat", "truck", "bicycle"),
    "tool": ("hammer", "saw", "drill", "spade", "axe"),
    "color": ("red", "green", "blue", "yellow", "white", "black"),
}
LEGS = {"cat": 4, "dog": 4, "horse": 4, "cow": 4, "mouse": 4, "frog": 4, "bird": 2, "ant": 6, "bee": 6, "spider": 8}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas")
THINGS = ("apples", "books", "coins", "cups", "pens", "stones", "stamps", "shells")

Exchange = tuple[str, str]


def _sum(draw: Draw) -> Exchange:
    a, b = draw.below(50), draw.below(50)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def _difference(draw: Draw) -> Exchange:
    a, b = sorted((draw.below(60), draw.below(60)), reverse=True)
    return f"What is {a} minus {b}?", f"{a} minus {b} is {a - b}."


def _product(draw: Draw) -> Exchange:
    a, b = 2 + draw.below(9), 2 + draw.below(9)
    return f"What is {a} times {b}?", f"{a} times {b} is {a * b}."


def _larger(draw: Draw) -> Exchange:
    a = draw.below(200)
    b = a + 1 + draw.below(80)
    first, second = draw.shuffled((a, b))
    return f"Which number is larger, {first} or {second}?", f"{b} is larger than {a}."


def _capital(draw: Draw) -> Exchange:
    country = draw.pick(tuple(CAPITALS))
    return f"What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}."


def _country(draw: Draw) -> Exchange:
    country = draw.pick(tuple(CAPITALS))
    return f"Which country has {CAPITALS[country]} as its capital?", f"{CAPITALS[country]} is the capital of {country}."


def _opposite(draw: Draw) -> Exchange:
    word = draw.pick(tuple(OPPOSITES))
    return f"What is the opposite of {word}?", f"The opposite of {word} is {OPPOSITES[word]}."


def _class(draw: Draw) -> Exchange:
    kind = draw.pick(tuple(CLASSES))
    word = draw.pick(CLASSES[kind])
    article = "an" if kind[0] in "aeiou" else "a"
    return f"What kind of thing is this: {word}?", f"{word.capitalize()} is {article} {kind}."


def _odd_one_out(draw: Draw) -> Exchange:
    kind, other = draw.shuffled(tuple(CLASSES))[:2]
    words = draw.shuffled(CLASSES[kind])[:3]
    stranger = draw.pick(CLASSES[other])
    listed = ", ".join(draw.shuffled([*words, stranger]))
    article = "an" if other[0] in "aeiou" else "a"
    return f"Which word does not fit: {listed}?", f"{stranger.capitalize()} does not fit: it is {article} {other}."


def _legs(draw: Draw) -> Exchange:
    animal = draw.pick(tuple(LEGS))
    article = "An" if animal[0] in "aeiou" else "A"
    return (
        f"How many legs does {article.lower()} {animal} have?",
        f"{article} {animal} has {NUMBERS[LEGS[animal]]} legs.",
    )


def _next_day(draw: Draw) -> Exchange:
    day = draw.below(7)
    return f"Which day comes after {DAYS[day]}?", f"{DAYS[(day + 1) % 7]} comes after {DAYS[day]}."


def _next_month(draw: Draw) -> Exchange:
    month = draw.below(12)
    return f"Which month comes after {MONTHS[month]}?", f"{MONTHS[(month + 1) % 12]} comes after {MONTHS[month]}."


def _letters(draw: Draw) -> Exchange:
    kind = draw.pick(tuple(CLASSES))
    word = draw.pick(CLASSES[kind])
    return f"Spell the word {word}.", f"{'-'.join(word)}."


def _alphabet(draw: Draw) -> Exchange:
    words = draw.shuffled(CLASSES[draw.pick(tuple(CLASSES))])[:4]
    return f"Put these words in alphabetical order: {', '.join(words)}.", f"{', '.join(sorted(words))}."


def _story(draw: Draw) -> Exchange:
    first, second = draw.shuffled(NAMES)[:2]
    things = draw.pick(THINGS)
    a = 3 + draw.below(20)
    b = 1 + draw.below(a - 2)  # at least two are left: the plural is right
    return (
        f"{first} has {a} {things} and gives {b} of them to {second}. How many {things} does {first} have left?",
        f"{first} has {a} - {b} = {a - b} {things} left.",
    )


def _rephrase(draw: Draw) -> Exchange:
    first, second = draw.shuffled(NAMES)[:2]
    word = draw.pick(("taller", "older", "faster", "stronger"))
    reverse = {"taller": "shorter", "older": "younger", "faster": "slower", "stronger": "weaker"}[word]
    return f"Say it the other way round: {first} is {word} than {second}.", f"{second} is {reverse} than {first}."


KINDS: tuple[Callable[[Draw], Exchange], ...] = (
    _sum, _difference, _product, _larger, _capital, _country, _opposite, _class, _odd_one_out, _legs, _next_day,
    _next_month, _letters, _alphabet, _story, _rephrase,
)  # fmt: skip


def dialogue(key: str) -> Example:
    """One conversation of 1 to 3 exchanges, drawn from its key alone."""
    draw = Draw(f"dialogue/{key}")
    turns = [Turn(*draw.pick(KINDS)(draw)) for _ in range(1 + draw.weighted((5, 3, 2)))]
    return Example(key, (Branch("text_sft", tuple(turns)),))
