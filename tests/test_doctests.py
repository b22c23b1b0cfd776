"""The examples in docstrings run, and are there."""

import doctest
import importlib
from pathlib import Path

import pytest

import radiotag

MODULES = sorted(path.stem for path in Path(radiotag.__file__).parent.glob("*.py") if path.stem != "__main__")
PROMISED = {
    "api": {"keygen", "mark", "verify"},
    "foreign": {"kind_of"},
    "images": {"psnr"},
    "report": {"frequency"},
    "synthetic": {"dead_leaves"},
}


def examples(name):
    """The doctests of a module, by the function's name."""
    module = radiotag if name == "__init__" else importlib.import_module(f"radiotag.{name}")
    return {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(module) if test.examples}


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_give_what_they_say(module, few_synthetic):
    found = examples(module)
    assert found.keys() >= PROMISED.get(module, set())
    for test in found.values():
        told = []
        result = doctest.DocTestRunner().run(test, out=told.append)
        assert result.failed == 0 and result.attempted == len(test.examples), "".join(told)


def test_an_example_that_is_wrong_would_be_seen():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner().run(test, out=lambda text: None).failed == 1
