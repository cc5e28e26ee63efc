"""Which data sets are drawn how often, from a YAML file.

    groups:
      pointing:
        rate: 0.3                        # share of samples; the rates of all groups are scaled to sum to 1
        members:                         # inside a group, shares follow the square root of the sizes
          - pointing
          - {name: counting, root_size_factor: 10000, sampling_rate: 1.5, weight: 0.2}

root_size_factor f: 0 = share 1 whatever the size; below 1 = the root of size x f; 1 and more = as if it had f samples.
sampling_rate: multiplies the member's share inside the group. weight: flat weight of each of its loss tokens.
high_resolution: share of visits that see a single image in up to data.high_resolution_crops crops.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.config.load import RECIPES
from megatron_vlm.data.example import NAME

#: Where mixtures are found by name.
FOLDER = RECIPES / "mixtures"


@dataclass(frozen=True)
class Member:
    """A data set in a mixture."""

    name: str
    root_size_factor: float | None = None
    sampling_rate: float = 1.0
    weight: float | None = None
    high_resolution: float = 0.0


@dataclass(frozen=True)
class Group:
    """Data sets that share a fixed part of the samples."""

    name: str
    rate: float
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Mixture:
    """Groups in the file's order."""

    groups: tuple[Group, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        """All data sets; their order is the index in Batch.sources."""
        return tuple(member for group in self.groups for member in group.members)

    @property
    def group_numbers(self) -> tuple[int, ...]:
        """Which group each member is in, in the order of `members`."""
        return tuple(number for number, group in enumerate(self.groups) for _ in group.members)

    @property
    def hash(self) -> str:
        """sha256 of what the file means; comments and layout do not count."""
        groups = [[group.name, group.rate, [_meaning(member) for member in group.members]] for group in self.groups]
        return hashlib.sha256(json.dumps(groups).encode()).hexdigest()

    def rates(self, size: Callable[[str], int]) -> tuple[float, ...]:
        """Share of each member, in the order of `members`; they sum to 1.

        size: how many samples a data set has. One without samples gets 0; a group without any is left out.
        Raises ValueError where nothing is left.
        """
        shares: list[float] = []
        for group in self.groups:
            roots = [_root(member, size(member.name)) for member in group.members]
            total = sum(roots)
            shares.extend(group.rate * root / total if total else 0.0 for root in roots)
        total = sum(shares)
        if not total:
            raise ValueError(
                f"none of the mixture's data sets ({', '.join(m.name for m in self.members)}) has a sample."
            )
        return tuple(share / total for share in shares)


def _meaning(member: Member) -> list[Any]:
    found: list[Any] = [member.name, member.root_size_factor, member.sampling_rate, member.weight]
    # Left out where it is not used, so that mixtures of older runs keep their hash.
    return [*found, member.high_resolution] if member.high_resolution else found


def _root(member: Member, size: int) -> float:
    if not size:
        return 0.0
    factor = member.root_size_factor
    if factor is None:
        root = math.sqrt(size)
    elif factor == 0:
        root = 1.0
    else:
        root = math.sqrt(size * factor if factor < 1 else factor)
    return root * member.sampling_rate


def load(setting: str | Path) -> Mixture:
    """A mixture by its file, or by its name in examples/recipes/mixtures/.

    Raises ValueError, naming file and place, for anything that is not a mixture.
    """
    path = Path(setting)
    if not path.is_file():
        path = FOLDER / f"{setting}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ValueError(f"data.mixture={str(setting)!r} is neither a file nor one of the named mixtures ({known}).")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        mixture = _parse(content)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not a mixture: {error}") from error
    return mixture


def _parse(content: Any) -> Mixture:
    groups = _mapping(content, "the file", {"groups"}).get("groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError("needed `groups:` with at least one group.")
    mixture = Mixture(tuple(_group(str(name), group) for name, group in groups.items()))
    names = [member.name for member in mixture.members]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"data set {', '.join(twice)} stands in it twice.")
    return mixture


def _group(name: str, content: Any) -> Group:
    group = _mapping(content, f"group {name!r}", {"rate", "members"})
    members = group.get("members")
    if not isinstance(members, list) or not members:
        raise ValueError(f"group {name!r} needs a list of `members`.")
    rate = _positive(group.get("rate"), f"the rate of group {name!r}")
    return Group(name, rate, tuple(_member(member, name) for member in members))


def _member(content: Any, group: str) -> Member:
    if isinstance(content, str):
        content = {"name": content}
    where = f"a member of group {group!r}"
    member = _mapping(content, where, {"name", "root_size_factor", "sampling_rate", "weight", "high_resolution"})
    name = member.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{where} is called {name!r}; needed letters, digits, `_` and `-`.")
    factor, weight = member.get("root_size_factor"), member.get("weight")
    high_resolution = _positive(member.get("high_resolution", 0.0), f"high_resolution of {name!r}", zero=True)
    if high_resolution > 1:
        raise ValueError(f"high_resolution of {name!r} is {high_resolution}; needed a share, 0 to 1.")
    return Member(
        name,
        None if factor is None else _positive(factor, f"root_size_factor of {name!r}", zero=True),
        _positive(member.get("sampling_rate", 1.0), f"sampling_rate of {name!r}"),
        None if weight is None else _positive(weight, f"weight of {name!r}", zero=True),
        high_resolution,
    )


def _mapping(content: Any, where: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where} is {content!r}; needed a mapping with {', '.join(sorted(keys))}.")
    unknown = sorted(set(map(str, content)) - keys)
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(keys))}.")
    return content


def _positive(value: Any, what: str, *, zero: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} is {value!r}; needed a number above 0.")
    if value == 0 and not zero:
        raise ValueError(f"{what} is 0; leave it out instead.")
    return float(value)
