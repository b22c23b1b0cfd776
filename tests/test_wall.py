"""The wall that makes a p-value exact: nothing that computes a suspect's vectors can reach a key or a carrier."""

import ast
from pathlib import Path

import pytest

import radiotag

PACKAGE = Path(radiotag.__file__).parent
BEHIND = {"keys", "radioactive", "pairing", "verification", "calibration", "blackbox", "answers", "api", "cli"}


def imported(module):
    """The package's modules that a module imports, at its top or anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [f"radiotag.{node.module or name}" for name in names]
        elif isinstance(node, ast.ImportFrom) and node.module == "radiotag":
            names = [f"radiotag.{name}" for name in names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("radiotag.")}
    return {name for name in found if (PACKAGE / f"{name}.py").exists()}


def reached(module):
    """All modules that are imported with a module, directly or not."""
    seen, pending = set(), [module]
    while pending:
        for name in imported(pending.pop()) - seen:
            seen.add(name)
            pending.append(name)
    return seen


@pytest.mark.parametrize("module", ["suspect", "probes", "normalisation", "conventions"])
def test_what_is_computed_of_a_suspect_reaches_no_key_and_no_carrier(module):
    assert "networks" in reached(module)  # the walk goes somewhere
    assert not reached(module) & BEHIND


def test_the_walk_would_see_a_hole():
    assert {"keys", "radioactive"} <= reached("pairing")
    assert imported("radioactive") >= {"suspect", "cosines"}  # the other way round is open


def test_no_import_comes_back_to_its_module():
    modules = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in {"__init__", "__main__"})
    for module in modules:
        assert module not in reached(module), module


def test_pairing_reads_no_value_of_a_carrier():
    """It may count them."""
    tree = ast.parse((PACKAGE / "pairing.py").read_text(encoding="utf-8"))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"carriers", "patterns", "secret"}:
            counted = parents[node]
            assert isinstance(counted, ast.Call) and getattr(counted.func, "id", "") == "len", ast.unparse(counted)
