"""Which output of a suspect is which class is which carrier."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from radiotag.keys import new_key
from radiotag.pairing import Records, pair
from radiotag.suspect import Suspect


def answering(outputs, classes, names=None):
    """A suspect that answers each image with the output given."""
    sure = torch.nn.functional.one_hot(torch.tensor(outputs), classes).double() * 0.9 + 0.1 / classes
    network = SimpleNamespace(spec=SimpleNamespace(classes=classes, class_names=names))
    return Suspect(network, (sure / sure.sum(1, keepdim=True)).log())


def test_carriers_follow_from_all_images_that_were_given_not_from_those_that_were_shown():
    """A key without names counts a folder's classes: a sample, or a publication's held-out images, may lack some."""
    key = new_key({}, {}, 4, 3)
    suspect, shown = answering([1, 2, 1, 2], 3), ("bee", "cat", "bee", "cat")
    every = Records(classes=("ant", "bee", "cat"))
    published = Records(published={"ant": 0, "bee": 1, "cat": 2})
    for records, rows, assumed in ((every, (1, 2), True), (published, (1, 2), False), (Records(), (0, 1), True)):
        pairing = pair(key, suspect, shown, records)
        assert (pairing.names, pairing.outputs, pairing.rows) == (("bee", "cat"), (1, 2), rows)
        assert pairing.assumed is assumed


def test_a_publication_says_which_carriers_an_unnamed_key_gave_to_which_classes():
    key, published = new_key({}, {}, 4, 3), Records(published={"cat": 0, "bee": 1})
    named = answering([0], 3, ("ant", "bee", "cat"))
    assert pair(key, named, (), published).rows == (1, 0)
    assert pair(key, named, (), published).names == ("bee", "cat")
    assert pair(key, answering([0], 2), (), published).rows == (1, 0)  # outputs in the order of the folders
    others = pair(key, answering([0], 3, ("n1", "n2", "n3")), (), Records(published={"ant": 0, "bee": 1, "cat": 2}))
    assert others.outputs == others.rows == (0, 1, 2) and others.assumed  # by order, as without a publication
    flat = pair(key, named, (), Records(published={"": 0}))
    assert flat.outputs == (0, 1, 2) and flat.rows == (0, 0, 0)


def test_outputs_without_names_are_in_the_order_of_the_keys_names():
    """With a manifest and without one: the order that the owner gave his classes."""
    key, nameless = new_key({}, {}, 4, ["dog", "cat"]), answering([0], 2)
    rows = {"cat": 1, "dog": 0}
    for records in (Records(), Records(marked=rows, recorded=rows)):
        pairing = pair(key, nameless, (), records)
        assert dict(zip(pairing.outputs, pairing.rows, strict=True)) == {0: 0, 1: 1}


def test_images_of_other_classes_are_labelled_as_such():
    key = new_key({}, {}, 4, ["cat", "dog"])
    pairing = pair(key, answering([1, 0, 2, 0], 3), ("dog", "cat", "emu", "cat"), Records())
    assert pairing.names == ("cat", "dog") and pairing.outputs == (0, 1) and pairing.rows == (0, 1)
    assert pairing.labels == (1, 0, -1, 0)
    compared = pairing.compared(("emu", "dog", "cat"), others=True)
    assert (compared.marker_outputs, compared.marker_besides) == ((2, 1), (0,))


@pytest.mark.parametrize("labels", [(), ("ant", "bee", "cat", "dog") * 5])
def test_a_manifests_classes_without_a_mark_are_compared_and_not_tested(labels):
    """What all classes share is seen in the unmarked ones, too; keys of versions up to 0.9 left them out."""
    rows = {"ant": 2, "bee": 0, "cat": 1}
    key, names = new_key({}, {}, 4, 3), ("dog", "cat", "bee", "ant")
    suspect = answering([names.index(label) for label in labels] or [0], 4, names)
    records = Records(marked={"cat": 1}, recorded=rows, against_all=True)
    pairing = pair(key, suspect, labels, records)
    assert (pairing.names, pairing.outputs, pairing.rows) == (("ant", "bee", "cat"), (3, 2, 1), (2, 0, 1))
    tested = pairing.tested(records)
    alone = pairing.only(tested)
    assert (alone.names, alone.outputs, alone.rows) == (("cat",), (1,), (1,))
    assert set(alone.besides) == {"ant", "bee", "dog"}
    assert alone.labels == ((-1, -1, 0, -1) * 5 if labels else None)
    before = replace(records, against_all=False)
    assert pair(key, suspect, labels, before).rows == (1,)
    assert pair(key, suspect, labels, before).tested(before) == [0]
    assert pair(key, suspect, labels, Records(published=rows)).tested(Records()) == [0, 1, 2]
