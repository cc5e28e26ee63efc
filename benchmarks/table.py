"""The README's table of benchmarks, made of the `summary` that stands in every results/*.json.

python benchmarks/table.py            # write it into README.md
python benchmarks/table.py --check    # exit 1 where README.md says something else
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- made by benchmarks/table.py -->\n", "<!-- end -->\n"


def table(results: Path = ROOT / "benchmarks" / "results") -> str:
    """A Markdown table with a line for each thing that a benchmark compares."""
    lines = ["| `benchmarks/` | compared | measured |", "|---|---|---|"]
    for file in sorted(results.glob("*.json")):
        for what, figure in json.loads(file.read_text(encoding="utf-8")).get("summary", []):
            lines.append(f"| [{file.stem}](benchmarks/results/{file.stem}.md) | {what} | {figure} |")
    return "\n".join(lines) + "\n"


def inserted(readme: str, made: str) -> str:
    """The README with `made` between its two marks. Raises ValueError where it has not both."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md has no place for the table: a line {BEGIN.strip()!r} and one {END.strip()!r}.")
    return head + begin + made + end + tail


def main() -> int:
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    wanted = inserted(readme, table())
    if "--check" in sys.argv:
        return int(wanted != readme)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
