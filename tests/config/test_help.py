"""`--help` text: every setting, its default and its meaning."""

from __future__ import annotations

import ast
import inspect

import pytest

from megatron_vlm.config import help, schema
from megatron_vlm.config.keys import keys


def test_every_setting_stands_in_the_help_with_its_default():
    lines = help.settings().splitlines()
    for key in keys().values():
        assert sum(line.startswith(f"  {key.name}={help.default(key.default)}  (") for line in lines) == 1, key.name


def test_every_field_of_the_schema_has_a_docstring():
    undocumented = []
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and not documented:
                undocumented.append(f"{node.name}.{field.target.id}")
    assert undocumented == []


def test_the_meaning_follows_the_setting():
    text = " ".join(help.settings().split())
    assert "run.device=auto (text) auto (CUDA where there is one), cpu or cuda." in text
    assert "optim.vision: The vision tower." in text


def test_lines_fit_a_terminal():
    assert max(map(len, help.settings().splitlines())) <= 110


@pytest.mark.parametrize(
    ("value", "text"),
    [("", "''"), ((), "[]"), ((0.9, 0.95), "[0.9, 0.95]"), (None, "null"), (True, "true"), (1e-6, "1.0e-06")],
)
def test_defaults_are_written_as_one_would_type_them(value, text):
    assert help.default(value) == text
