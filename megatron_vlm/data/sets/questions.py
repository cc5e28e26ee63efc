"""Families of questions and answers about images or a video: open, multiple choice, with an explanation.

Questions with options are written with markers of several kinds (one in ten as a plain `A. option`), drawn once for
each question; the answer repeats marker and option, as in Molmo2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

from megatron_vlm.data.example import Branch, Turn
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.sets.draft import Draft
from megatron_vlm.data.sets.row import LeftOut, Row, words

#: Markers before options: from the number of the option, from 0.
MARKERS: tuple[Callable[[int], str], ...] = (
    lambda number: f"{chr(65 + number)}.",
    lambda number: f"{chr(65 + number)})",
    lambda number: f"({chr(65 + number)})",
    lambda number: f"{chr(97 + number)}.",
    lambda number: f"{number + 1}.",
    lambda number: f"({number + 1})",
)
#: Share of the questions in the layout that benchmarks use, and what closes it.
PLAIN_SHARE = 0.1
PLAIN_CLOSE = "Answer with the right option only."
CLOSES = ("", "Which option is right?", "Choose one of the options.", "Give the option that fits.", PLAIN_CLOSE)
UNPOINTED = ("Answer without pointing.", "Do not point.", "No points, only the answer:", "Without points:")
_HOW_MANY = re.compile(r"\bhow many\b|\bcount\b|\bnumber of\b", re.IGNORECASE)
_MARKED = re.compile(r"[(\[]?([A-Za-z])[)\].:]\s*(\S.*)", re.DOTALL)
STEPS = (
    "Explain your reasoning before you answer.",
    "Work it out step by step, then answer.",
    "Give the reasons first and the answer last.",
)


def questions(
    row: Row,
    *,
    style: str,
    choice_style: str = "",
    options: tuple[str, ...] = (),
    wrong: tuple[str, ...] = (),
    hint: str = "",
    answers: Mapping[Any, str] | None = None,
    clip: bool = True,
    unpointed: bool = False,
    weights: Mapping[Any, float] | None = None,
    path: str = "",
) -> Iterator[Draft]:
    """One `question`. Its options, if any: the list `options` (texts, or objects with `text`), or the columns named by
    the parameter options. Its answer: `answer`, a text, or a list of what several people said (the most frequent is
    taken), or `answer_index`, or the right option's number, letter or text. `negatives`, or the columns named by the
    parameter wrong: wrong options, among which the right one is put at a drawn place.

    choice_style: style of the questions that have options (default: style).
    hint:         column of a text that goes before the question.
    answers:      what stands for an answer: {0: "No", 1: "Yes"}.
    clip:         whether `span` cuts the video.
    unpointed:    ask for no places before questions of how many, which are answered without.
    weights:      weight of the question's loss by the value of `kind`.
    """
    question, media = row.text("question"), row.media(path)
    if hint and row.get(hint):
        question = f"{row.text(hint)}\n{question}"
    rng = generator("question", media[0].identity, question)
    texts = [_option(row, option) for option in row.items("options")]
    texts = texts or [row.text(name) for name in options if row.get(name) not in (None, "")]
    given = [*row.items("negatives"), *(row.get(name) for name in wrong)]
    negatives = Row({"negatives": [one for one in given if one not in (None, "")]}).texts("negatives")
    if negatives:
        texts, index = _among(row.text("answer"), negatives, rng)
    elif texts:
        index = _index(row, texts)
    if texts:
        turn = _choice(question, texts, index, rng)
    else:
        turn = Turn(without_places(question) if unpointed else question, _best(row, answers or {}, rng))
    used = choice_style if texts and choice_style else style
    info = {} if texts else _accepted(row, turn.prompt)
    yield Draft((Branch(used, (turn,), _weight(row, weights)),), media, clip=row.clip(cut=clip), info=info)


def question_pairs(
    row: Row,
    *,
    style: str,
    explained: bool = False,
    max_images: int = 0,
    min_images: int = 1,
    names: Mapping[str, str] | None = None,
    path: str = "",
) -> Iterator[Draft]:
    """All of `qa_pairs`: a list of {question, answer, explanation}, or an object of three lists. A branch each.

    names:      our name -> theirs, in each pair.
    explained:  the answer is the explanation, then `Answer: ...`; a request to explain follows the question.
    max_images: rows with more images are left out, as are those with fewer than min_images. 0 = any number.
    """
    media = row.media(path)
    check_images(len(media), min_images, max_images)
    branches = []
    for pair in _pairs(row, names or {}):
        question, answer = pair.text("question"), pair.text("answer")
        if explained and pair.get("explanation"):
            rng = generator("explain", media[0].identity, question)
            question, answer = f"{question} {rng.choice(STEPS)}", f"{pair.text('explanation')} Answer: {answer}"
        branches.append(Branch(style, (Turn(question, answer),)))
    yield Draft(tuple(branches), media)


def judged_choices(row: Row, *, style: str, choice_style: str, path: str = "") -> Iterator[Draft]:
    """CLEVRER's form: `question` with `choices` [{choice, answer: correct | wrong}]; several may be correct, then the
    right options are listed. Without choices it is an open question."""
    choices = [Row(choice) for choice in row.items("choices")]
    if not choices:
        yield from questions(row, style=style, path=path)
        return
    media = row.media(path)
    rng = generator("question", media[0].identity, row.text("question"))
    texts = [choice.text("choice") for choice in choices]
    for choice in choices:
        if choice.get("answer") not in ("correct", "wrong"):
            raise choice.bad("answer", choice.get("answer"), "correct or wrong")
    right = [number for number, choice in enumerate(choices) if choice.get("answer") == "correct"]
    turn = _choice(row.text("question"), texts, right[0] if right else 0, rng, right)
    yield Draft((Branch(choice_style, (turn,)),), media)


def listed_choices(
    row: Row, *, style: str, min_images: int = 1, max_images: int = 0, path: str = ""
) -> Iterator[Draft]:
    """Several questions about the same images, in lists side by side: `questions`, `options` (a list of lists) and
    `answer_indices`; or `questions` and `answers` where the row has no options. A branch each."""
    media = row.media(path)
    check_images(len(media), min_images, max_images)
    asked, options = row.texts("questions"), row.items("options")
    right = row.items("answer_indices") if options else row.texts("answers")
    branches = []
    if options and len(options) != len(asked):
        raise row.bad("options", options, f"options for each of {len(asked)} questions")
    for number, (question, answer) in enumerate(zip(asked, right, strict=True)):
        question = without_images(question)
        if options:
            choices = Row({"options": options[number], "answer_index": answer})
            texts = [_option(choices, option) for option in choices.items("options")]
            rng = generator("question", media[0].identity, question)
            branches.append(Branch(style, (_choice(question, texts, _index(choices, texts), rng),)))
        else:
            branches.append(Branch(style, (Turn(question, answer),)))
    if not branches:
        raise row.bad("questions", asked, "at least one question")
    yield Draft(tuple(branches), media)


def antonyms(row: Row, *, style: str = "video_multiple_choice") -> Iterator[Draft]:
    """Paxion's form: the action (`label`) among its opposite (`opposite`) and `Not sure`, about a video or a clip."""
    media = row.media()
    rng = generator("antonyms", media[0].identity, row.text("label"))
    texts, index = _among(_tidy(row.text("label")), [_tidy(row.text("opposite")), "Not sure"], rng)
    turn = _choice("Which action does the video show?", texts, index, rng)
    yield Draft((Branch(style, (turn,)),), media, clip=row.clip())


def labels(row: Row, *, question: str, style: str = "video_short_answer", path: str = "") -> Iterator[Draft]:
    """A `label` of a video, asked for by one fixed question: action recognition, counts of repetitions."""
    answer = row.text("label").replace("_", " ")
    yield Draft((Branch(style, (Turn(question, answer),)),), row.media(path), clip=row.clip())


def _weight(row: Row, weights: Mapping[Any, float] | None) -> float:
    if weights is None:
        return 1.0
    kind = row.get("kind")
    if not isinstance(kind, (str, int)) or kind not in weights:
        raise row.bad("kind", kind, f"one of {', '.join(map(str, weights))}")
    return weights[kind]


def check_images(count: int, least: int, most: int) -> None:
    """Raise LeftOut for a row with fewer or more images than are trained on. most: 0 = any number."""
    if count < least or (most and count > most):
        raise LeftOut(f"it has {count} images; trained on are {least} to {most or 'any number'}.")


def without_places(question: str) -> str:
    """The question; where it asks how many, after a request not to point, drawn once for each question."""
    if not _HOW_MANY.search(question):
        return question
    return f"{generator('unpointed', question).choice(UNPOINTED)} {question}"


def without_images(text: str) -> str:
    """The text without placeholders of images, which come first."""
    return re.sub(r"[ \t]*<image>[ \t]*", " ", text).strip()


def _among(right: str, wrong: list[str], rng: Random) -> tuple[list[str], int]:
    """The right option at a drawn place among the wrong ones, and that place."""
    place = rng.randrange(len(wrong) + 1)
    return [*wrong[:place], right, *wrong[place:]], place


def _tidy(text: str) -> str:
    """Ego4D's narrations begin with `#C C opens ...`: the tag goes, a capital comes."""
    text = re.sub(r"^#\S*\s*", "", text)
    return text[:1].upper() + text[1:]


def _option(row: Row, option: Any) -> str:
    if isinstance(option, Mapping):
        return Row(option).text(next((name for name in ("text", "choice", "option") if name in option), "text"))
    if not (text := words(option)):
        raise row.bad("options", option, "a text for each option")
    return text


def _pairs(row: Row, names: Mapping[str, str]) -> list[Row]:
    value = row.get("qa_pairs")
    if isinstance(value, Mapping):
        parts = [names.get(name, name) for name in ("question", "answer", "explanation")]
        columns = {name: Row(value).items(name) for name in parts if value.get(name) is not None}
        value = [dict(zip(columns, pair, strict=True)) for pair in zip(*columns.values(), strict=True)]
    if not isinstance(value, list) or not value:
        raise row.bad("qa_pairs", value, "a list of questions and answers")
    return [Row(pair, names) for pair in value]


def _index(row: Row, texts: list[str]) -> int:
    """Which option is right. A number that is not called an index is the text of an option first: `4` of 2, 3, 4."""
    index = row.get("answer_index")
    given = row.get("answer") if index is None else index
    word = words(given)
    is_number = word.isdecimal() and int(word) < len(texts)
    if is_number and (index is not None or isinstance(given, int)):
        return int(word)
    if word in texts:
        return texts.index(word)
    if is_number:
        return int(word)
    letter = word.strip("().").upper()
    if len(letter) == 1 and 0 <= ord(letter) - 65 < len(texts):
        return ord(letter) - 65
    raise row.bad("answer", given, f"the number, letter or text of one of the {len(texts)} options")


def _choice(question: str, texts: list[str], index: int, rng: Random, several: list[int] | None = None) -> Turn:
    plain = rng.random() < PLAIN_SHARE
    marker = MARKERS[0] if plain else rng.choice(MARKERS)
    close = PLAIN_CLOSE if plain else rng.choice(CLOSES)
    marked = [f"{marker(number)} {text}" for number, text in enumerate(texts)]
    right = [index] if several is None else several
    answer = "; ".join(marked[number] for number in right) or "None of the options."
    return Turn("\n".join(part for part in (question, *marked, close) if part), answer)


def plain_choice(question: str, texts: list[str], row: Row) -> Turn:
    """A question with options as benchmarks write it: `A. option`, a line each. The row's `answer_index`, or `answer`
    by number, letter (also in brackets) or text, tells the right one."""
    marked = [_MARKED.match(text) for text in texts]
    if all(match and match[1].upper() == chr(65 + number) for number, match in enumerate(marked)):
        texts = [match[2].strip() for match in marked if match]
    index = _index(row, texts)
    lines = [f"{chr(65 + number)}. {text.strip()}" for number, text in enumerate(texts)]
    return Turn("\n".join([question, *lines, PLAIN_CLOSE]), lines[index])


def _accepted(row: Row, prompt: str) -> dict[str, Any]:
    """For the sample's info: what all people said to a question, where the row tells more than one answer."""
    given = row.get("answer") if row.get("answer") is not None else row.get("answers")
    said = _said(row, given) if isinstance(given, list) else []
    return {"answers": {prompt: said}} if len(said) > 1 else {}


def _said(row: Row, given: list[Any]) -> list[str]:
    """What each of several people said; an empty answer is none."""
    found = []
    for one in given:
        said = one.get("answer", one.get("raw_answer")) if isinstance(one, Mapping) else one
        if not words(said) and said != "":
            raise row.bad("answer", given, "texts")
        found.append(words(said))
    return list(filter(None, found))


def _best(row: Row, meanings: Mapping[Any, str], rng: Random) -> str:
    """The answer given most often; one of them by chance where several are."""
    given = row.get("answer") if row.get("answer") is not None else row.get("answers")
    if isinstance(given, list):
        counts = Counter(_said(row, given))
        if not counts:
            raise row.bad("answer", given, "at least one answer")
        best = max(counts.values())
        return rng.choice(sorted(text for text, count in counts.items() if count == best))
    if isinstance(given, (str, int)) and given in meanings:
        return meanings[given]
    return row.text("answer" if row.get("answer") is not None else "answers")
