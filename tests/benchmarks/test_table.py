"""The README's figures are those of the results; the history has a line for each."""

from __future__ import annotations

import json

import pytest

from benchmarks import table


def test_the_readme_says_what_was_measured():
    readme = (table.ROOT / "README.md").read_text(encoding="utf-8")
    assert table.inserted(readme, table.table()) == readme, "run python benchmarks/table.py"


def test_a_changed_figure_is_seen(tmp_path):
    (tmp_path / "speed.json").write_text(json.dumps({"summary": [["one thing over another", "0.50"]]}))
    made = table.table(tmp_path)
    assert "| one thing over another | 0.50 |" in made and "speed.md" in made
    readme = f"before\n{table.BEGIN}old\n{table.END}after\n"
    assert table.inserted(readme, made) == f"before\n{table.BEGIN}{made}{table.END}after\n"
    with pytest.raises(ValueError, match="no place for the table"):
        table.inserted("before\n", made)


def test_every_result_has_a_page_and_a_line_in_the_history():
    results = table.ROOT / "benchmarks" / "results"
    lines = [json.loads(line) for line in (results / "history.jsonl").read_text().splitlines()]
    assert lines and all({"date", "commit", "benchmark"} < set(line) for line in lines)
    for file in results.glob("*.json"):
        content = json.loads(file.read_text())
        if "summary" in content:
            assert (results / f"{file.stem}.md").exists(), file.stem
            last = [line for line in lines if line["benchmark"] == file.stem][-1]
            assert content["key"].items() <= last.items(), f"{file.stem}: the history's last line is of another run"
