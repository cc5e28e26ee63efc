"""The README says what is there: every file has its line in the tree, every path and command that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> set[str]:
    """Paths of the tree in the README; folders end with a slash."""
    block = re.search(r"## The tree\n\n```\n(.*?)\n```", README, re.S)
    assert block is not None
    paths, folders = set(), []
    for line in block.group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:depth]
        paths.add("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_every_file_has_a_line_in_the_tree_and_every_line_a_file():
    files = [path for folder in ("megatron_vlm", "tools") for path in (ROOT / folder).rglob("*.py")]
    files += (ROOT / "examples").glob("*.sh")
    there = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    there = {re.sub(r"(data/(?:bundled|sets)/).*", r"\1", path) for path in there}  # one line for each folder
    named = tree()
    assert there - named == set(), "files without a line"
    assert {path for path in named - there if not (ROOT / path).exists()} == set(), "lines without a file"


def test_scripts_modules_and_files_that_the_text_names_exist():
    names = set(re.findall(r"\b(?:tools|examples|tests)/[\w./]+\w", README))
    assert "examples/quickstart.sh" in names and "tools/build_shards.py" in names
    assert {name for name in names if not (ROOT / name).exists()} == set()
    modules = set(re.findall(r"python -m (megatron_vlm[\w.]*)", README))
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").exists() or path.with_suffix(".py").exists(), module


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_recipes_that_the_table_names_are_there():
    rows = set(re.findall(r"^\| `(\w[\w.]*)` \|", README, re.M))
    sizes = {path.parent.name for path in (ROOT / "examples" / "recipes").glob("*/stage1.yaml")}
    assert sizes <= rows
