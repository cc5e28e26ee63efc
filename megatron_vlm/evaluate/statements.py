"""Captions as statements: which of one caption's another one makes too. Who decides is a judge.

Overlap is the judge without a model: it compares words and knows nothing of what they mean. Its scores are good for
captions in the words of the truth, as those of the sample data, and not to be compared with a language model's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from megatron_vlm.evaluate.score import Scores

#: Share of a statement's content words that one statement of the other caption must hold.
ENOUGH_WORDS = 0.75
#: Most statements of a caption that are looked at.
MOST_STATEMENTS = 200
_STOPS = frozenset(
    "a an the of in on at to is are was were it its there and or with by for as that this these those from into has "
    "have be been which who one".split()
)
_ENDS = re.compile(r"[.;:!?\n]+(?=\s|$)")
_WORD = re.compile(r"[^\W_]+")


class Judge(Protocol):
    """Decides about statements. Raises JudgeError where it cannot."""

    name: str
    """For the report."""

    def statements(self, caption: str) -> list[str]:
        """What a caption says, one thing each."""

    def stated(self, statements: Sequence[str], caption: str) -> list[bool]:
        """Which of them the caption makes."""


class JudgeError(RuntimeError):
    """A judge gave no verdict on one answer."""


class JudgeRefused(ValueError):
    """A judge will never answer: a wrong key, address or model. It ends the evaluation."""


class Overlap:
    """By the words that two captions share."""

    name = "statement overlap (words only, no model)"

    def statements(self, caption: str) -> list[str]:
        parts = (part.strip() for part in _ENDS.split(caption))
        return [part for part in parts if _content(part)][:MOST_STATEMENTS]

    def stated(self, statements: Sequence[str], caption: str) -> list[bool]:
        made = [_content(part) for part in self.statements(caption)]
        return [_enough(_content(statement), made) for statement in statements]


def _content(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower())) - _STOPS


def _enough(wanted: frozenset[str], made: Sequence[frozenset[str]]) -> bool:
    return any(len(wanted & words) >= ENOUGH_WORDS * len(wanted) for words in made) if wanted else True


def caption(said: str, truth: str, judge: Judge, known: Sequence[str] = ()) -> Scores:
    """Recall: the truth's statements that the caption makes. Consistency: the caption's that the truth makes.

    known: the truth's statements, where the data set gives them; else the judge makes them.
    F1 of a question is the harmonic mean; over many, all three are means over questions.
    """
    wanted = list(known) or judge.statements(truth)
    made = judge.statements(said)
    recall = _share(judge.stated(wanted, said)) if said.strip() else 0.0
    consistency = _share(judge.stated(made, truth)) if made else 0.0
    f1 = 2 * recall * consistency / (recall + consistency) if recall + consistency else 0.0
    return {"statement F1": (f1, 1), "recall": (recall, 1), "consistency": (consistency, 1)}


def _share(found: Sequence[bool]) -> float:
    return sum(found) / len(found) if found else 0.0
