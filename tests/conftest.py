"""Two processes share the tests (pytest-xdist), so that each of them, and whatever they start, computes alone."""

import os
from functools import lru_cache

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
import torch
from helpers import SPEC, Forks, entropy

from radiotag import keys, networks, probes, suspect, synthetic
from radiotag.networks import Network, build, find_head


def drawn_from(name):
    """Make all random numbers of this process depend on a name: no test may fail by chance, even of 1e-4."""
    keys.new_key.__defaults__ = (entropy(name), None)
    torch.manual_seed(int.from_bytes(entropy(name)(4), "little"))


def pytest_fixture_setup(fixturedef):
    drawn_from(f"{fixturedef.baseid} {fixturedef.argname}")


def pytest_runtest_call(item):
    drawn_from(item.nodeid)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.parent.stdin.close()
    made.parent.wait()
    made.parent.stdout.close()


@pytest.fixture(scope="session", autouse=True)
def drawn_once():
    """Dead leaves are the same for every suspect; the tests of a process draw them once."""
    probes.dead_leaves = lru_cache(maxsize=8)(synthetic.dead_leaves)
    networks._stock_shapes = lru_cache(maxsize=None)(networks._stock_shapes)  # of all architectures, built once


@pytest.fixture(scope="module")
def network():
    """An untrained marking network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(build(SPEC), SPEC)
    network.head, _ = find_head(network)
    return network


@pytest.fixture
def few_synthetic(monkeypatch):
    """Make verification without data fast: twenty synthetic images, with which a marked head still has p = 1e-20."""
    monkeypatch.setattr(probes, "ALIGNMENT_IMAGES", 20)
    monkeypatch.setattr(suspect, "GRADIENTS", 24)
