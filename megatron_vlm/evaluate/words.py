"""Answers made of words, judged as the benchmarks do: from an answer and what is accepted to a score from 0 to 1.

Pure functions of texts. None = nothing that could be judged can be made out.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

#: A similarity of no more than this is worth nothing in ANLS.
ANLS_THRESHOLD = 0.5
#: By how much of the right number ChartQA's answers may be off.
CHART_TOLERANCE = 0.05
#: Characters of an answer in which an option is looked for.
MOST_CHARACTERS = 2000

_NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
_NUMBERS["none"] = "0"
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
#: Contractions whose apostrophe VQA restores where it is missing; two words for one that lacks either of its two.
_RESTORED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()
_RESTORED_TWICE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
""".split()
_OPTION = re.compile(r"^\W*(?:the\s+)?(?:(?:right|correct|best|final)\s+)?(?:answer|option|choice)?\s*(?:is|:)?\s*"
                     r"[(\[]?([A-Za-z0-9]{1,2})(?:[)\].:]|\s*$)", re.IGNORECASE)  # fmt: skip
_STATED = re.compile(r"(?<![0-9.])(?:(?<!\w)-)?(?:[0-9][0-9,]{0,14}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})(?![0-9])")
_MARKER = re.compile(r"^\s*[(\[]?([A-Za-z0-9]{1,2})[)\].:]\s*(\S.*)$")


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _RESTORED}
    for word in _RESTORED_TWICE:
        places = [place for place, letter in enumerate(word) if letter == "'"]
        table |= {word[:place] + word[place + 1 :]: word for place in places}
    # As published, oddities included: one is taken apart; some have three apostrophes; "I" never meets a lower-cased I.
    table |= {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
    whole = "y'all'd've"
    return table | dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), whole)


_CONTRACTIONS = _contractions()


def exact(said: str, accepted: Sequence[str]) -> float:
    """1 where it is one of them but for case, outer blanks and a last full stop."""
    return float(_plain(said) in {_plain(one) for one in accepted})


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def vqa_normalized(text: str) -> str:
    """VQA's normal form: punctuation, numbers as digits, no articles, apostrophes where they belong."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    found = text
    has_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        gone = has_number or f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if gone else " ")
    # Only the first 32 full stops, as published: there the flag re.UNICODE (32) stands in the place of the count.
    words = _PERIOD.sub("", found, count=32).lower().split()
    kept = [number for word in words if (number := _NUMBERS.get(word, word)) not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


def vqa(said: str, answers: Sequence[str]) -> float:
    """VQA accuracy: for each person, whether three others gave this answer (or a third of it for each that did); mean.

    answers: of all people asked, usually ten. With a single one: whether it is the same.
    """
    normal = vqa_normalized(said)
    people = [vqa_normalized(one) for one in answers]
    if len(people) == 1:
        return float(normal == people[0])
    same = people.count(normal)
    scores = [min(1.0, (same - (one == normal)) / 3) for one in people]
    return sum(scores) / len(scores)


def relaxed(said: str, accepted: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy: a number may be 5 % off the right one; a text must be the same but for case."""
    return max((_relaxed(said.strip(), one.strip()) for one in accepted), default=0.0)


def _relaxed(said: str, wanted: str) -> float:
    given, right = _number(said), _number(wanted)
    if given is not None and right:
        return float(abs(given - right) / abs(right) <= CHART_TOLERANCE)
    return float(said.lower() == wanted.lower() or (given is not None and given == right))


def _number(text: str) -> float | None:
    """Of `12`, `1,200`, `7.5%` (0.075)."""
    text = text.strip()
    try:
        value = float(text.rstrip("%").replace(",", "")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def anls(said: str, accepted: Sequence[str]) -> float:
    """Average normalized Levenshtein similarity of one question: the best over the accepted answers, 0 up to 0.5."""
    given = " ".join(said.lower().split())
    best = 0.0
    for wanted in (" ".join(one.lower().split()) for one in accepted):
        shortest, longest = sorted((len(given), len(wanted)))
        if shortest > ANLS_THRESHOLD * longest or not longest:  # else the lengths alone say no
            best = max(best, 1.0 - _distance(given, wanted) / longest if longest else 1.0)
    return best if best > ANLS_THRESHOLD else 0.0


def _distance(one: str, other: str) -> int:
    """Levenshtein's."""
    if len(one) < len(other):
        one, other = other, one
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, start=1):
        line = [row]
        for column, second in enumerate(other):
            line.append(min(above[column + 1] + 1, line[column] + 1, above[column] + (letter != second)))
        above = line
    return above[-1]


def numbers(said: str) -> list[float]:
    """Every number in a text, in order: `12`, `-1,200.5`, `.5`, `$3`."""
    return [float(found.replace(",", "")) for found in _STATED.findall(said[:MOST_CHARACTERS])]


def stated(said: str, form: str, decimals: int = 0) -> str | float | list[float] | None:
    """MathVista's answer of a form (integer, float, list, text) in a model's words: of several numbers the last one, of
    a list what stands in its last brackets. None where there is none. MathVista has a language model look for it."""
    if form == "text":
        return _plain(said) or None
    found = numbers(said.rpartition("[")[2] if form == "list" else said)
    if form == "list" or not found:
        return found or None
    return float(int(found[-1])) if form == "integer" else round(found[-1], decimals)


def options(question: str) -> list[tuple[str, str]]:
    """(marker, text) of the options that stand in a question, one a line: `A. a cat`, `(2) red`, `b) left`."""
    found = [match.groups() for line in question.splitlines() if (match := _MARKER.match(line))]
    return [(marker, text.strip()) for marker, text in found]


def choice(said: str, choices: Sequence[tuple[str, str]]) -> int | None:
    """Which of the options (marker, text) an answer names; None where it names none, or two.

    By its marker first (`B`, `(b) left`, `The answer is B.`), then by its text, whole, then inside the answer.
    """
    said = " ".join(said[:MOST_CHARACTERS].split())  # single blanks: the pattern of markers takes linear time then
    marker = _OPTION.match(said)
    if marker:
        named = [n for n, (mark, _) in enumerate(choices) if mark.lower() == marker[1].lower()]
        if len(named) == 1:
            return named[0]
    whole = [n for n, (_, text) in enumerate(choices) if _plain(text) == _plain(said)]
    if len(whole) == 1:
        return whole[0]
    words = f" {_letters(said)} "
    inside = [n for n, (_, text) in enumerate(choices) if (bare := _letters(text)) and f" {bare} " in words]
    # `left` stands in `left hand` too: the longest counts, if it holds the others.
    longest = [n for n in inside if all(_letters(choices[m][1]) in _letters(choices[n][1]) for m in inside)]
    return longest[0] if len(longest) == 1 else None


def _letters(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans(string.punctuation, " " * len(string.punctuation))).split())
