"""Two processes share the tests (pytest-xdist), so that each of them, and whatever they start, computes alone."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
from helpers import Forks


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.parent.stdin.close()
    made.parent.wait()
    made.parent.stdout.close()
