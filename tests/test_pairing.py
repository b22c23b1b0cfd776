"""Which output of a suspect is which class is which carrier."""

from types import SimpleNamespace

import torch

from radiotag.keys import new_key
from radiotag.pairing import pair
from radiotag.suspect import Suspect


def answering(outputs, classes, names=None):
    """A suspect that answers each image with the output given."""
    sure = torch.nn.functional.one_hot(torch.tensor(outputs), classes).double() * 0.9 + 0.1 / classes
    network = SimpleNamespace(spec=SimpleNamespace(classes=classes, class_names=names))
    return Suspect(network, (sure / sure.sum(1, keepdim=True)).log())


def test_images_of_other_classes_are_labelled_as_such():
    key = new_key({}, {}, 4, ["cat", "dog"])
    pairing = pair(key, answering([1, 0, 2, 0], 3), ("dog", "cat", "emu", "cat"), None)
    assert pairing.names == ("cat", "dog") and pairing.outputs == (0, 1) and pairing.rows == (0, 1)
    assert pairing.labels == (1, 0, -1, 0)
    compared = pairing.compared(("emu", "dog", "cat"), others=True)
    assert (compared.marker_outputs, compared.marker_besides) == ((2, 1), (0,))
