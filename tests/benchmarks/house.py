"""The shape of the code, of one or more checkouts: sizes, longest functions, imports, branches on archives, caches.

    python tests/benchmarks/house.py before=CHECKOUT after=. --json tests/benchmarks/results/house.json
    python tests/benchmarks/house.py table

Lines are counted with comments and blank lines. Parameters leave out `self` and `cls`, and the commands of the command
line, whose parameters are options. Numbers are counted in the README's prose and tables, not in its code blocks.
"""

import argparse
import ast
import json
import re
import sys
from pathlib import Path

import tables

DOCUMENT = tables.BENCHMARKS
COMMANDS = {"keygen", "mark", "train_demo", "verify"}
ROWS = {
    "modules": "modules", "lines": "lines", "functions": "functions", "longest": "longest function, lines",
    "longest module": "longest module, lines", "science": "lines of radioactive.py", "parameters": "most parameters",
    "imports": "imports between modules", "archive": "branches on archives in marking and command line",
    "caches": "global caches", "words": "words of the README", "numbers": "numbers in the README",
}  # fmt: skip


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    """All functions and methods of a module."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def parameters_of(function: ast.FunctionDef) -> int:
    """How many parameters a function has, without `self` and `cls`."""
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in {"self", "cls"}]
    return len(names) + bool(given.vararg) + bool(given.kwarg)


def imports_of(tree: ast.Module, modules: set[str]) -> set[str]:
    """The package's modules that a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "radiotag":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("radiotag."):
            found.add(str(node.module).split(".")[1])
    return found & modules


def archive_branches(tree: ast.Module) -> int:
    """Conditions that ask whether a data set is an archive."""
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.While)]
    tests += [value for node in ast.walk(tree) if isinstance(node, ast.BoolOp) for value in node.values]
    tests += [test for node in ast.walk(tree) if isinstance(node, ast.comprehension) for test in node.ifs]
    return sum(re.search(r"\barchive\b", ast.unparse(test)) is not None for test in tests)


def caches(tree: ast.Module) -> int:
    """Uses of functools' caches."""
    names = {"cache", "lru_cache"}
    uses, places = 0, list[ast.expr]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            places = node.decorator_list
        else:
            places = [node.value] if isinstance(node, ast.Assign) else []
        uses += sum(bool(names & {n.id for n in ast.walk(p) if isinstance(n, ast.Name)}) for p in places)
    return uses


def shape(checkout: Path) -> dict[str, int | str]:
    """The figures of one checkout."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted((checkout / "radiotag").glob("*.py"))}
    trees = {name: ast.parse(text) for name, text in files.items()}
    functions = [(name, f) for name, tree in trees.items() for f in functions_of(tree)]
    plain = [f for name, f in functions if not (name == "cli" and f.name in COMMANDS)]
    lines = {name: len(text.splitlines()) for name, text in files.items()}
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|\]\([^)]*\)|https?://\S+|<!--.*?-->", " ", readme, flags=re.DOTALL)
    marking = {"marking", "plan", "marking_run", "batches", "cli"} & trees.keys()
    return {
        "modules": len(files), "lines": sum(lines.values()), "functions": len(functions),
        "longest": max(f.end_lineno - f.lineno + 1 for f in plain if f.end_lineno),
        "longest module": max(lines.values()), "science": lines["radioactive"],
        "parameters": max(map(parameters_of, plain)),
        "imports": sum(len(imports_of(tree, set(trees) - {name})) for name, tree in trees.items()),
        "archive": sum(archive_branches(trees[name]) for name in marking),
        "caches": sum(map(caches, trees.values())),
        "words": len(readme.split()), "numbers": len(re.findall(r"(?<![\w.])[−-]?\d[\d,.]*", prose)),
    }  # fmt: skip


def house(results: tables.Results) -> list[str]:
    """The rows before and after."""
    found = results["house"]
    rows = [(title, *(f"{found[name][key]:,}" for name in found)) for key, title in ROWS.items()]
    return tables.lines(("", *found), rows)


TABLES = {"house": house}


def main() -> None:
    """Measure checkouts, or write the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", metavar="NAME=CHECKOUT", help="or `table`")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.checkouts != ["table"]:
        pairs = (pair.split("=", 1) for pair in options.checkouts)
        found = {name: shape(Path(place)) for name, place in pairs}
        text = json.dumps(found, indent=1) + "\n"
        (options.json.write_text(text) if options.json else sys.stdout.write(text))
        for key, title in ROWS.items():
            print(f"{title:<50}", *(f"{figures[key]:>8}" for figures in found.values()))
        return
    tables.write(DOCUMENT, TABLES)


if __name__ == "__main__":
    main()
