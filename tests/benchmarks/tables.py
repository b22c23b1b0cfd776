"""The documents' tables, written from the measured results between markers.

    python tests/benchmarks/tables.py

writes all of them: in the README, in this folder's README and in the built-in network's card. Each program here that
makes results, or shows them, has `TABLES` (a name and what makes its lines) and the `DOCUMENT` in which they stand:

    <!-- table: NAME -->
    (the table)
    <!-- end of table -->

The same results give the same bytes, which a test checks. Who changes a table by hand loses the change.
"""

import importlib
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "results"
BENCHMARKS = Path(__file__).parent / "README.md"
PROGRAMS = (
    "evidence",
    "paper",
    "null",
    "marking",
    "card",
    "verdicts",
    "mutants",
    "golden",
    "house",
    "photographs",
    "large",
)
DETECTED = -4.0  # log10 p at which `verify` says so by default; from here on figures are bold

Results = dict[str, Any]
Run = dict[str, Any]
Makers = dict[str, Callable[[Results], list[str]]]


def load_results() -> Results:
    """Everything measured: the name of each results file and what it holds."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def number(value: float, digits: int = 2) -> str:
    """A figure with thousands separated and a true minus sign."""
    return f"{value:,.{digits}f}".replace("-", "−")


def percent(share: float, digits: int = 2) -> str:
    return f"{number(100 * share, digits)} %"


def log_p(value: float | None, digits: int = 2) -> str:
    """log10 p, bold where it counts as a detection; empty where nothing was measured."""
    if value is None:
        return ""
    return f"**{number(value, digits)}**" if value <= DETECTED else number(value, digits)


def slashed(shown: Iterable[str]) -> str:
    """Several figures in one cell."""
    return " / ".join(shown)


def median(runs: Iterable[Run], *path: str) -> float:
    """The median of the value that every run holds at this path."""
    found: list[float] = []
    for run in runs:
        value: Any = run
        for name in path:
            value = value[name]
        found.append(value)
    return statistics.median(found)


def lines(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    every = [list(heads), ["---"] * len(heads), *map(list, rows)]
    if any(len(row) != len(heads) for row in every):
        raise ValueError(f"a row has more or fewer cells than the head: {heads}")
    return ["|" + "|".join(row) + "|" if row[0] == "---" else f"| {' | '.join(row)} |" for row in every]


def filled(text: str, makers: Makers, results: Results) -> str:
    """A document's text with these tables made anew; each must have its place there, once."""
    for name, make in makers.items():
        block = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end of table -->)", re.DOTALL)
        made = "".join(f"{line}\n" for line in make(results))
        text, places = block.subn(lambda found, made=made: found[1] + made + found[2], text)
        if places != 1:
            raise ValueError(f"{places} places for the table {name!r}")
    return text


def write(document: Path, makers: Makers) -> None:
    """Write tables into their document from the committed results."""
    text = document.read_text(encoding="utf-8")
    document.write_text(filled(text, makers, load_results()), encoding="utf-8")
    print(f"{document.relative_to(ROOT)}: {', '.join(makers)}")


if __name__ == "__main__":
    for program in map(importlib.import_module, PROGRAMS):
        write(program.DOCUMENT, program.TABLES)
