"""Drafts about the same media become one sample, a tree of conversations. Does not read media."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from megatron_vlm.data.example import Branch, Points
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.sets.draft import Draft
from megatron_vlm.data.sets.places import MAX_POINTS


def trees(drafts: Iterable[Draft], *, chat_share: float = 0.0) -> Iterator[tuple[str, Draft]]:
    """(key, sample) with all branches of the drafts of one identity, in their order; each branch once.

    A tree whose places would be more than MAX_POINTS is split; the further parts' keys end in `-2`, `-3`.
    chat_share: share of the trees that become one conversation of all their turns.
    """
    groups: dict[str, list[Draft]] = {}
    for draft in drafts:
        groups.setdefault(draft.identity, []).append(draft)
    for identity, members in groups.items():
        branches = list(dict.fromkeys(branch for member in members for branch in member.branches))
        info = _merged(members)
        for number, part in enumerate(_split(branches), 1):
            key = identity if number == 1 else f"{identity}-{number}"
            if len(part) > 1 and generator("chat", key).random() < chat_share:
                part = [Branch(part[0].style, tuple(turn for branch in part for turn in branch.turns))]
            yield key, replace(members[0], branches=tuple(part), info=info)


def _merged(members: Iterable[Draft]) -> dict[str, Any]:
    """The info of all; tables in it (answers by question, masks by label) are put together."""
    info: dict[str, Any] = {}
    for member in members:
        for name, value in member.info.items():
            info[name] = {**info.get(name, {}), **value} if isinstance(value, dict) else value
    return info


def _split(branches: list[Branch]) -> Iterator[list[Branch]]:
    part: list[Branch] = []
    used = 0
    for branch in branches:
        count = sum(len(turn.answer.points) for turn in branch.turns if isinstance(turn.answer, Points))
        if part and used + count > MAX_POINTS:
            yield part
            part, used = [], 0
        part.append(branch)
        used += count
    if part:
        yield part
