"""Settings from recipes and the command line, and back to YAML. Checks names and types; `rules.py` checks meaning.

Later sources win: defaults of `schema.py`, the recipe's `base`, the recipe, `section.key=value` overrides in order.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dacite
import yaml

from megatron_vlm.config import errors
from megatron_vlm.config.keys import field_types, keys, words
from megatron_vlm.config.schema import Config

#: The recipes that come with the program, where it runs from its clone.
RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
_BASE = "base"
_COMMAND_LINE = "on the command line"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a recipe with its chain of bases and the overrides applied.

    path:      a YAML file of sections; `base: OTHER.yaml` in it is read first, relative to the file.
    overrides: `section.key=value`, the value as YAML.
    Raises ValueError, naming the key and where it stood, for a file that is not there or is not YAML, an unknown key
    and a value of the wrong type.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for settings, origin in [*_recipe(Path(path), ()), *(_override(text) for text in overrides)]:
        _check_names(settings, Config, "", origin)
        _merge(merged, settings, "", origin, origins)
    return _build(merged, origins)


def from_dict(settings: Mapping[str, Any], origin: str) -> Config:
    """The settings of a nested dict, as `to_dict` gives it.

    origin: where the dict stands, for errors: `in the checkpoint runs/x`. Raises ValueError as `load` does.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    _check_names(settings, Config, "", origin)
    _merge(merged, settings, "", origin, origins)
    return _build(merged, origins)


def dump(config: Config) -> str:
    """YAML of every setting; `load` of a file with this text gives an equal Config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dict of plain values; tuples become lists, so that YAML and JSON can hold it."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class _Yaml(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice; plain YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value!r} stands there twice", key_node.start_mark
                )
            if isinstance(key_node.value, str):
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _parse(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, Loader=_Yaml)
    except yaml.YAMLError as error:
        raise ValueError(f"What stands {origin} is not valid YAML: {error}") from error


def _recipe(path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[dict[str, Any], str]]:
    """The settings of a file's bases, farthest first, then its own; each with the words that say where it stood."""
    origin = f"in {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        asked = f", which {seen[-1]} names as its base," if seen else ""
        near = _near(path) if isinstance(error, FileNotFoundError | IsADirectoryError) else ""
        raise ValueError(f"The recipe {path}{asked} cannot be read: {errors.words(error)}{near}") from error
    settings = _parse(text, origin)
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ValueError(f"A recipe holds sections (`train:`, `data:`, ...), but {path} holds {_kind(settings)}.")
    here = path.resolve()
    if here in seen:
        raise ValueError(f"The bases of {path} run in a circle: {' -> '.join(str(step) for step in (*seen, here))}.")
    base = settings.pop(_BASE, None)
    if base is not None:
        if not isinstance(base, str):
            raise ValueError(f"base {origin} must be the path of another recipe, found {base!r}.")
        yield from _recipe(path.parent / base, (*seen, here))
    yield settings, origin


def _near(path: Path) -> str:
    """The recipes of this program whose names are most like that of a path which is no recipe."""
    known = {"/".join(file.parts[-2:]): file for file in sorted(RECIPES.glob("*/stage?.yaml"))}
    wanted = "/".join(path.parts[-2:] if path.suffix else [path.name, "stage1.yaml"])
    found = sorted(os.path.relpath(known[name]) for name in difflib.get_close_matches(wanted, known, cutoff=0.3))
    return f" Recipes with names like it: {', '.join(found)}." if found else ""


def _override(text: str) -> tuple[dict[str, Any], str]:
    """`train.steps=5` as `{"train": {"steps": 5}}`."""
    name, separator, raw = text.partition("=")
    if not separator or not name:
        raise ValueError(
            f"{text!r} {_COMMAND_LINE} is no setting; write section.key=value, for instance train.steps=100."
        )
    value = _parse(raw, f"in {text!r} {_COMMAND_LINE}")
    key = keys().get(name)
    if key is not None and key.type is str:
        # A name such as 1e3, on or 2024-01-01 is text here, whatever YAML makes of it; quotes still work.
        value = value if isinstance(value, str) else raw
    nested: Any = value
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return nested, _COMMAND_LINE


def _check_names(settings: Mapping[Any, Any], section: type, prefix: str, origin: str) -> None:
    """Raises ValueError for a name that the section does not have, and for a section that holds a plain value."""
    types = field_types(section)
    for name, value in settings.items():
        dotted = f"{prefix}{name}"
        if name not in types:
            raise ValueError(f"{dotted} {origin} is not a setting{_nearest(dotted)}")
        wanted = types[name]
        if not dataclasses.is_dataclass(wanted):
            if isinstance(value, Mapping):
                raise ValueError(f"{dotted} {origin} must be {words(wanted)}, but holds settings of its own: {value}.")
            continue
        assert isinstance(wanted, type)
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{dotted} {origin} is a section with the settings {', '.join(field_types(wanted))}; "
                f"found {_kind(value)} in its place."
            )
        _check_names(value, wanted, f"{dotted}.", origin)


def _nearest(dotted: str) -> str:
    """`; did you mean ...?`: by the whole name, or by its last part where the section is the mistake."""
    sections = {name.rsplit(".", depth)[0] for name in keys() for depth in range(1, name.count(".") + 1)}
    names = [*keys(), *sorted(sections)]
    last = dotted.rsplit(".", 1)[-1]
    same_key = [name for name in names if name.rsplit(".", 1)[-1] == last]
    found = difflib.get_close_matches(dotted, same_key, n=1, cutoff=0.0)
    found = found or difflib.get_close_matches(dotted, names, n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else "; `--help` lists them all."


def _merge(
    merged: dict[str, Any], settings: Mapping[str, Any], prefix: str, origin: str, origins: dict[str, str]
) -> None:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _merge(merged.setdefault(name, {}), value, f"{prefix}{name}.", origin, origins)
        else:
            merged[name] = value
            origins[f"{prefix}{name}"] = origin


def _number(value: Any) -> Any:
    """A float from what YAML reads as a whole number, or as text: `1e-4` without a dot is text in YAML 1.1."""
    if isinstance(value, bool):
        return str(value)  # dacite counts true as a number; text it refuses
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _whole(value: Any) -> Any:
    """Refuses true and false, which Python counts as whole numbers."""
    return str(value) if isinstance(value, bool) else value


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _build(merged: dict[str, Any], origins: dict[str, str]) -> Config:
    rules = dacite.Config(strict=True, type_hooks={float: _number, int: _whole})
    try:
        return dacite.from_dict(Config, _tuples(merged), rules)
    except dacite.DaciteFieldError as error:
        name = error.field_path or ""
        value: Any = merged
        for part in name.split("."):
            value = value[part]
        raise ValueError(
            f"{name}={value!r} {origins.get(name, '')} must be {words(keys()[name].type)}, but is {_kind(value)}."
        ) from error


def _kind(value: Any) -> str:
    """What a YAML value is, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, Mapping):
        return "a section"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(
        type(value), type(value).__name__
    )
