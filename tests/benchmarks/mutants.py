"""Mutants of the p-value code: one comparison, constant or operator of it is changed, and a test must fail.

    OMP_NUM_THREADS=1 python tests/benchmarks/mutants.py

makes every mutant, runs the tests that reach its function, cheapest first, until one fails, prints a table, and writes
results/mutants.json and the table in the README beside it. With `--only FUNCTION` it tests that function's mutants,
lists the survivors and writes nothing. A mutant that changes no result is listed in `EQUIVALENT` with the reason. The
exit status is 1 if another mutant survives, or if one of the list is killed or no longer exists. A mutant that hangs or
crashes the process is killed.

mutmut and cosmic-ray were considered: the first changes a number, or a comparison, in one way only; the second starts
Python, and so torch, anew for each mutant; neither keeps the reasons of equivalent ones. Here the standard library's
ast finds what to change. Torch is imported and the tests are collected once. Each mutant is a fork of that process
(which needs Linux), in which the function's code object is another one; no file of the package is written. Nothing is
drawn at random: hypothesis is derandomised, other tests fix their seeds.
"""

import argparse
import ast
import gc
import importlib
import itertools
import json
import math
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import hypothesis
import mpmath
import numpy as np
import pytest
import scipy
import torch
from tables import BENCHMARKS, FOLDER, Makers, Results, lines, number, write

import radiotag

DOCUMENT = BENCHMARKS
TESTS = Path(radiotag.__file__).parents[1] / "tests"
SUITE = ("test_pvalues.py", "test_radioactive.py", "test_keys.py", "test_pairing.py", "test_verification.py")
TARGETS = {
    "radioactive": (
        "uniform_carriers", "cosine_log_sf", "_log_tail", "fisher", "pattern_or_both", "stouffer", "bonferroni", "holm",
        "resampled_log_p", "_tilt", "output_unknown", "evidence", "_paper_log_p", "_compare",
    ),
    "calibration": ("TAIL", "calibrate"),
    "verification": ("LOG10", "corrected", "_black_box_finding"),
    "blackbox": ("DECOYS", "SURE", "decoys_needed", "pattern_effects", "_difference"),
    "keys": ("null_carriers",),
    "pairing": ("match_outputs",),
}  # fmt: skip
LEFT_OUT = {"place", "network", "key_file"}  # fixtures of tests that ask networks, or write files: they take minutes
SECONDS = 20.0  # of tests, measured without mutants, that a mutant has to survive
LIMIT = 10  # seconds more than ten times as long as without mutants, after which a test hangs
PYTEST = (
    "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-s", "--tb=native",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",  # hypothesis is imported before, and asserts nothing
)  # fmt: skip
MEMORY = 8 << 30  # bytes more than the parent's that a mutant may take

Edit = tuple[int, int, bytes]  # bytes from, to, and what replaces them

# ---------------------------------------------------------------- what is changed

OPERATORS = {
    "<": ("<=", ">="), "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<"), "==": ("!=", "<=", ">="), "!=": ("==",),
    "in": ("not in",), "not in": ("in",), "is": ("is not",), "is not": ("is",), "and": ("or",), "or": ("and",),
    "+": ("-",), "-": ("+",), "*": ("/",), "/": ("*",), "//": ("/", "*"), "**": ("*",), "%": ("*", "//"),
    "<<": (">>",), ">>": ("<<",), "@": ("*",), "&": ("|",), "|": ("&",),
    "+=": ("-=",), "-=": ("+=",), "*=": ("/=",), "/=": ("*=",),
}  # fmt: skip
FUNCTIONS = {
    "min": "max", "minimum": "maximum", "any": "all", "sum": "mean", "log": "log1p", "argmin": "argmax",
    "nanmean": "nansum", "exp": "expm1", "sqrt": "cbrt", "ceil": "floor", "rint": "floor", "std": "var",
    "abs": "positive", "isnan": "isinf",
}  # fmt: skip
FUNCTIONS |= {new: old for old, new in FUNCTIONS.items() if new not in {"floor", "cbrt", "positive", "isinf"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change of one function, or of a constant of a module."""

    file: str
    line: int
    function: str
    original: str  # the source's lines, joined
    mutated: str
    edit: Edit


class Source:
    """A module's text, and where the nodes of its tree stand in it."""

    def __init__(self, module: ModuleType) -> None:
        self.path = Path(str(module.__file__))
        self.text = self.path.read_bytes()
        self.starts = [0, *itertools.accumulate(map(len, self.text.splitlines(keepends=True)))]

    def span(self, node: Any) -> tuple[int, int]:
        """First byte and the byte after the last."""
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def edited(self, edit: Edit) -> bytes:
        start, end, text = edit
        return self.text[:start] + text + self.text[end:]

    def shown(self, edit: Edit) -> tuple[int, str, str]:
        """The number of the first changed line, and the lines before and after."""
        start, end, text = edit
        first = self.text.rfind(b"\n", 0, start) + 1
        last = self.text.find(b"\n", end)
        before, after = self.text[first:last], self.text[first:start] + text + self.text[end:last]
        return self.text.count(b"\n", 0, first) + 1, uncommented(before.decode()), uncommented(after.decode())


def uncommented(text: str) -> str:
    """Lines of code as one, without comments."""
    return " ".join(re.sub(r"\s# .*", "", text).split())


def definition(tree: ast.Module, name: str) -> ast.stmt:
    """The statement of a module that defines a function, or a constant."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
        names = ast.walk(node.targets[0]) if isinstance(node, ast.Assign) else ()
        if name in {each.id for each in names if isinstance(each, ast.Name)}:
            return node
    raise SystemExit(f"nothing is called {name}")


def changeable(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes within, but annotations, documentation and what a message says."""
    if isinstance(node, ast.Raise | ast.JoinedStr):
        return
    yield node
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            said = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not said and field not in {"annotation", "returns", "ctx"}:
                yield from changeable(child)


def other_values(value: Any) -> list[Any]:
    """What a constant may be instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return list(dict.fromkeys(v for v in (value + 1, value - 1, 0, 2 * value) if v != value))
    if isinstance(value, float) and 0 < value < 0.01:
        return [10 * value, value / 10, 0.0, value + 1]
    if isinstance(value, float):
        return list(dict.fromkeys(v for v in (value + 1, 2 * value, 0.0) if v != value))
    if isinstance(value, complex):
        return [2 * value, 0 * value]
    return [value + "~"] if isinstance(value, str) else [value + b"~"] if isinstance(value, bytes) else []


def neighbours(node: Any) -> list[tuple[Any, Any]]:
    """Pairs of expressions with an operator between."""
    if isinstance(node, ast.Compare):
        return list(itertools.pairwise([node.left, *node.comparators]))
    if isinstance(node, ast.BoolOp):
        return list(itertools.pairwise(node.values))
    if isinstance(node, ast.BinOp):
        return [(node.left, node.right)]
    return [(node.target, node.value)] if isinstance(node, ast.AugAssign) else []


def operators(source: Source, node: Any) -> Iterator[Edit]:
    """Another operator; a sign or a `not` left out."""
    for left, right in neighbours(node):
        start, end = source.span(left)[1], source.span(right)[0]
        gap = source.text[start:end].decode()
        old = " ".join(gap.strip(" ()\n").split())
        for new in OPERATORS[old]:
            yield start, end, gap.replace(old, new, 1).encode()
    if isinstance(node, ast.UnaryOp):
        start, end = source.span(node)
        yield start, end, source.text[source.span(node.operand)[0] : end]


def values(source: Source, node: Any) -> Iterator[Edit]:
    """Another constant, another bound of a slice, another function."""
    if isinstance(node, ast.Constant):
        for value in other_values(node.value):
            yield *source.span(node), repr(value).encode()
    if isinstance(node, ast.Slice):
        for bound in (node.lower, node.upper):
            if bound and not isinstance(bound, ast.Constant):
                for more in (b" + 1", b" - 1"):
                    yield source.span(bound)[1], source.span(bound)[1], more
    called = node.func if isinstance(node, ast.Call) else None
    name = getattr(called, "attr", None) or getattr(called, "id", None)
    if name in FUNCTIONS:
        end = source.span(called)[1]
        yield end - len(name), end, FUNCTIONS[name].encode()


def conditions(source: Source, node: Any) -> Iterator[Edit]:
    """A condition turned round, where no comparison of it is."""
    tests = list(node.ifs) if isinstance(node, ast.comprehension) else [node.test] if hasattr(node, "test") else []
    for test in tests:
        alone = isinstance(test, ast.Compare) and len(test.ops) == 1
        if not alone and not isinstance(test, ast.UnaryOp):
            start, end = source.span(test)
            yield start, end, b"not (" + source.text[start:end] + b")"


def mutants(module: ModuleType, name: str) -> list[Mutant]:
    """All mutants of a function, or of a constant, of a module."""
    source, found = Source(module), {}
    for node in changeable(definition(ast.parse(source.text), name)):
        for edit in itertools.chain(*(change(source, node) for change in (operators, values, conditions))):
            line, original, mutated = source.shown(edit)
            found[line, mutated] = Mutant(
                file=source.path.name, line=line, function=name, original=original, mutated=mutated, edit=edit
            )
    return [found[place] for place in sorted(found)]


# ---------------------------------------------------------------- a changed module, in this process


def code_of(code: CodeType, name: str) -> CodeType:
    """The code of a function of a module's code."""
    return next(part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name)


def install(module: ModuleType, name: str, text: bytes) -> None:
    """Let a function of a module, or a constant, be that of another text: for all who have imported it."""
    function = getattr(module, name)
    if isinstance(function, FunctionType):
        function.__code__ = code_of(compile(text, str(module.__file__), "exec"), name)
        return
    namespace = dict(vars(module))
    exec(compile(ast.Module([definition(ast.parse(text), name)], []), "constants", "exec"), namespace)
    changed = {each: old for each, old in vars(module).items() if namespace[each] is not old}
    for other, (each, old) in itertools.product(list(sys.modules.values()), changed.items()):
        if vars(other).get(each) is old:
            setattr(other, each, namespace[each])


def report_calls(module: ModuleType, name: str, called: set[str]) -> None:
    """Let a function say that it was called."""
    source = Source(module)
    node = definition(ast.parse(source.text), name)
    if isinstance(node, ast.FunctionDef):
        first = next(s for s in node.body if not isinstance(s, ast.Expr) or not isinstance(s.value, ast.Constant))
        start = source.span(first)[0]
        vars(module)["_called"] = called
        install(module, name, source.edited((start, start, f"_called.add({name!r})\n    ".encode())))


# ---------------------------------------------------------------- the tests, in forks


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One test without mutants: how long it took, and what of the p-value code it called."""

    item: pytest.Item
    seconds: float
    called: frozenset[str]


def in_fork(task: Callable[[], Any]) -> Any:
    """What a task gives in a fork; None where it hangs or crashes."""
    gc.freeze()  # a collection in the fork would copy all memory
    read, written = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        pid = os.fork()
        if pid == 0:
            _child(task, written, folder)
        os.close(written)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(pid, 0)
    return json.loads(answer) if answer else None


def _child(task: Callable[[], Any], written: int, folder: str) -> None:
    """Write what a task gives, as JSON, and end; leave nothing, and say nothing."""
    try:
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        os.environ["PYTEST_DEBUG_TEMPROOT"] = folder
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.write(written, json.dumps(task()).encode())
    finally:
        os._exit(0)


class Collected:
    """The tests that pytest has collected: instead of running them it calls `then`."""

    def __init__(self, then: Callable[["Collected"], None]) -> None:
        self.then, self.items, self.failed = then, list[pytest.Item](), False

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = [item for item in session.items if not LEFT_OUT & set(item.fixturenames)]
        self.then(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def run(self, item: pytest.Item, after: pytest.Item | None) -> bool:
        """Whether a test fails."""
        self.failed = False
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return self.failed

    def unchanged(self) -> list[tuple[float, list[str], bool]]:
        """Of all tests without mutants: seconds, what they called, and whether they failed."""
        called, runs = set[str](), []
        for module, name in targets():
            report_calls(module, name, called)
        for item, after in itertools.zip_longest(self.items, self.items[1:]):
            called.clear()
            start = time.monotonic()
            failed = self.run(item, after)
            runs.append((time.monotonic() - start, sorted(called), failed))
        return runs

    def killer(self, module: ModuleType, mutant: Mutant, tests: Sequence[Test]) -> str:
        """The first test that fails with a mutant; "" if none does. The process ends where a test hangs."""
        install(module, mutant.function, Source(module).edited(mutant.edit))
        for test, after in itertools.zip_longest(tests, tests[1:]):
            signal.alarm(LIMIT + math.ceil(10 * test.seconds))
            if self.run(test.item, after and after.item):
                return test.item.nodeid
        return ""


def targets() -> Iterator[tuple[ModuleType, str]]:
    """Modules, and the names of their functions and constants."""
    for module, names in TARGETS.items():
        for name in names:
            yield importlib.import_module(f"radiotag.{module}"), name


def users(module: ModuleType, name: str) -> set[str]:
    """A function; or the functions that use a constant."""
    if isinstance(getattr(module, name), FunctionType):
        return {name}
    return {
        f for other, f in targets()
        if other is module and isinstance(code := getattr(getattr(other, f), "__code__", None), CodeType)
        and name in code.co_names
    }  # fmt: skip


def chosen(tests: Sequence[Test], names: set[str]) -> list[Test]:
    """Tests that call one of these functions, the quickest first."""
    those = sorted((test for test in tests if names & test.called), key=lambda test: test.seconds)
    total = itertools.accumulate(test.seconds for test in those)
    return [test for test, sum_ in zip(those, total, strict=True) if sum_ <= SECONDS]


# ---------------------------------------------------------------- equivalent mutants

LOGS = "upper, far = np.log(np.maximum(tail, {})), tail {}"
STRICT = {
    "corrected": ("for finding, value in zip(findings, log_p, strict=False)",),
    "_black_box_finding": (
        "pairs = [(output, row) for output, row in zip(match_outputs(means), rows, strict=False) if output >= 0]",
    ),
    "match_outputs": ("for row, column in zip(classes, columns, strict=False):",),
}
OMEGA = "log_k = 1 + np.minimum(*(special.wrightomega(smaller - 1 {} np.pi).real for side in (1, -1)))"
EQUIVALENT: dict[str, dict[str, tuple[str, ...]]] = {
    "what stands there is written over, as every tail below the bound is": {
        "cosine_log_sf": (LOGS.format("1e-299", "<= 1e-290"), LOGS.format("1e-301", "<= 1e-290")),
    },
    "on both sides of the bound the series and scipy agree to 1e-12": {
        "cosine_log_sf": (
            LOGS.format("1e-300", "< 1e-290"), LOGS.format("1e-300", "<= 1e-289"),
            LOGS.format("1e-300", "<= 1.0000000000000001e-291"),
        ),
    },
    "for a cosine of 0 both sides are log ½": {
        "cosine_log_sf": ("result: Floats = np.where(t > 0, upper, np.log1p(-tail))",),
    },
    "the same two branches in the other order, of which the smaller counts": {
        "pattern_or_both": (OMEGA.format("+ side / 1j *"), OMEGA.format("- side * 1j *")),
    },
    "values that differ by 1e-12 of the largest have a smallest that is no other to 1e-11": {
        "resampled_log_p": (
            "kept = values[:, spread > 1e-12 * np.abs(values).min(0)]",
        ),
    },
    "sums that cannot be reached follow the largest, with a probability of 0": {
        "resampled_log_p": (
            "convolved = np.zeros(len(density) + len(counts) + 1)",
            "convolved = np.zeros(len(density) + len(counts) - 0)",
        ),
    },
    "a factor of all weights of a class, which their sum cancels": {
        "_tilt": (
            "weights = np.exp(tilt * (scores + scores.max(0)))",
            "weights = np.exp(tilt * (scores - scores.min(0)))",
        ),
    },
    "at a root the search for it gives the same": {
        "_tilt": (
            "if excess(0.0) > 0:",
            "return largest if excess(largest) < 0 else float(optimize.brentq(excess, 0.0, largest))",
        ),
    },
    "there are no fewer than one": {"output_unknown": ("return len(rows) > 1 and len(set(rows)) <= 1",)},
    "there are no more than two": {
        "evidence": ("per_class = np.where(alive.sum(0) >= 2, chosen, log_p.sum(0))[says]",),
    },
    "the first of one is the last": {
        "evidence": (
            "combined = float(pattern_or_both(per_part[1], per_part[0]) if len(per_part) > 1 else per_part[-1])",
        ),
    },
    "a norm is 0 or above 1e-162, as squares below 1e-324 are 0": {
        "_compare": tuple(
            f"cosine: Floats = F.cosine_similarity(vectors, carriers.double(), dim=1, eps={eps}).numpy()"
            for eps in ("1e-299", "1e-301")
        ),
    },
    "a remainder of 10 is no more than 9": {"calibrate": ("if number % 10 >= 9:",)},
    "the lengths are equal; the argument only says so": STRICT,
    "both are more than rounding does to the root, and less than a step of alpha that anybody gives": {
        "decoys_needed": (
            "return max(DECOYS, min(MOST_DECOYS, math.ceil(math.pow(1.05 / alpha, 1 / classes) - 1e-10) - 1))",
        ),
    },
}  # fmt: skip


def reasons() -> dict[tuple[str, str], str]:
    """Why a mutant is equivalent, by its function and its changed line."""
    return {
        (function, mutated): reason
        for reason, functions in EQUIVALENT.items()
        for function, changed in functions.items()
        for mutated in changed
    }


# ---------------------------------------------------------------- the results


def timed(collected: Collected) -> list[Test]:
    """All tests, run without mutants: they must pass."""
    runs = in_fork(collected.unchanged)
    if runs is None:
        raise SystemExit("without mutants the tests do not end")
    failed = [item.nodeid for item, run in zip(collected.items, runs, strict=True) if run[2]]
    if failed:
        raise SystemExit(f"without mutants these fail: {failed}")
    return [
        Test(item=item, seconds=seconds, called=frozenset(called))
        for item, (seconds, called, _) in zip(collected.items, runs, strict=True)
    ]


def tested(collected: Collected, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each mutant and what became of it."""
    every, known = timed(collected), reasons()
    for module, name in targets():
        tests = chosen(every, users(module, name))
        for mutant in mutants(module, name) if not only or name in only else ():
            start = time.monotonic()
            by = in_fork(partial(collected.killer, module, mutant, tests))
            by = "it hangs or crashes" if by is None else by
            yield outcome(mutant, by, known.get((name, mutant.mutated))) | {"seconds": time.monotonic() - start}


def outcome(mutant: Mutant, by: str, reason: str | None) -> dict[str, Any]:
    """A mutant as the results hold it."""
    plain = {name: value for name, value in asdict(mutant).items() if name != "edit"}
    became = "killed" if by else "equivalent" if reason else "survived"
    return plain | {"outcome": became} | ({"by": by} if by else {}) | ({"reason": reason} if reason else {})


def versions() -> dict[str, str]:
    modules = radiotag, torch, np, scipy, pytest, hypothesis, mpmath
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}


def complaints(found: Sequence[dict[str, Any]]) -> list[str]:
    """What is not as it must be, a line each."""
    wrong = [m for m in found if m["outcome"] == "survived" or (m["outcome"] == "killed" and "reason" in m)]
    said = ["{outcome}: {file}:{line} {function}\n  {original}\n  {mutated}".format(**m) for m in wrong]
    there = {(m["function"], m["mutated"]) for m in found}
    functions = {m["function"] for m in found}
    gone = [place for place in reasons() if place[0] in functions and place not in there]
    return said + [f"no such mutant: {function}\n  {mutated}" for function, mutated in gone]


def counted(results: Results) -> list[str]:
    """Mutants of each function, and what became of them."""
    rows, found = [], results["mutants"]["mutants"]
    for name in dict.fromkeys(m["function"] for m in found):
        of_it = [m for m in found if m["function"] == name]
        became = [sum(m["outcome"] == kind for m in of_it) for kind in ("killed", "equivalent", "survived")]
        seconds = number(sum(m["seconds"] for m in of_it), 0)
        rows.append([f"`{name}` in {of_it[0]['file']}", *map(str, (len(of_it), *became)), seconds])
    totals = [f"{sum(int(row[column]) for row in rows):,}" for column in range(1, 5)]
    rows.append(["all", *totals, number(sum(m["seconds"] for m in found), 0)])
    return lines(("function or constant", "mutants", "killed", "equivalent", "survived", "seconds"), rows)


TABLES: Makers = {"mutants": counted}


def settle() -> None:
    """Hypothesis tries the same examples each time, and does not look for smaller ones."""
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    unhurried = hypothesis.HealthCheck.too_slow
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, deadline=None, phases=phases, suppress_health_check=[unhurried]
    )
    hypothesis.settings.load_profile("mutants")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="FUNCTION")
    parser.add_argument("--json", type=Path, default=FOLDER / "mutants.json", help="another: no table is written")
    options, found = parser.parse_args(), list[dict[str, Any]]()
    settle()

    def then(collected: Collected) -> None:
        for mutant in tested(collected, options.only):
            found.append(mutant)
            print(mutant["outcome"][0], end="", flush=True)

    pytest.main([*(str(TESTS / name) for name in SUITE), *PYTEST], plugins=[Collected(then)])
    results = {"versions": versions(), "seed": "none: no test draws at random", "mutants": found}
    print("", *counted({"mutants": results}), *complaints(found), sep="\n")
    if not options.only:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        if options.json == FOLDER / "mutants.json":
            write(DOCUMENT, TABLES)
    sys.exit(bool(complaints(found)))


if __name__ == "__main__":
    main()
