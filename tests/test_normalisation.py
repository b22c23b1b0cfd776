"""A suspect's stated normalisation, checked against how well it knows labelled images."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import binom
from torch import nn

from radiotag import normalisation, verification
from radiotag.networks import Network, Spec
from radiotag.normalisation import better_normalisation
from radiotag.suspect import Batching, Reference
from radiotag.verification import VerifyOptions, settle_normalisation

MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)
SIZE = 8


def pictures(each=40, classes=6, seed=0, noise=0.15):
    """(N, 3, 8, 8) in [0, 1] around a prototype of each class, their class names, and the prototypes."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(99)) - 0.5
    prototypes = 0.5 + drawn * torch.linspace(-1, 1, classes).view(-1, 1, 1, 1)  # told apart by contrast
    labels = torch.arange(classes).repeat_interleave(each)
    drawn = torch.randn(len(labels), 3, SIZE, SIZE, generator=generator)
    return (prototypes[labels] + noise * drawn).clamp(0, 1), [f"c{label}" for label in labels.tolist()], prototypes


def knowing(prototypes, stated_mean=MEAN, stated_std=STD):
    """A network that knows the nearest prototype, normalised by MEAN and STD; its file may state others.

    It saturates, as networks do: otherwise a linear network would only need its bias moved.
    """
    flat = ((prototypes - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)).flatten(1)
    body = nn.Linear(flat.shape[1], len(flat))
    body.weight.data, body.bias.data = flat / 20, -flat.square().sum(1) / 40
    module = nn.Sequential(nn.Hardtanh(-2, 2), nn.Flatten(), body)
    spec = Spec(
        architecture="toy", classes=len(flat), small_stem=False, image_size=SIZE, mean=tuple(stated_mean),
        std=tuple(stated_std),
    )  # fmt: skip
    return Network(module, spec, own_layout=True)


def known(network, pixels, labels):
    return sum(
        f"c{answer}" == label for answer, label in zip(network(pixels).argmax(1).tolist(), labels, strict=True)
    ) / len(labels)


FALSE = {
    "three times the deviation": (MEAN, tuple(3 * s for s in STD)),
    "a tenth of the deviation": (MEAN, tuple(s / 10 for s in STD)),
    "another mean": ((1.2, 0.9, -0.1), STD),
    "one colour": (MEAN, (STD[0], STD[1], 4.0)),
    "for 0 to 255": (tuple(255 * m for m in MEAN), tuple(255 * s for s in STD)),
}


@pytest.mark.parametrize("kind", FALSE)
def test_a_false_normalisation_is_found_and_mended(kind):
    pixels, labels, prototypes = pictures()
    true, false = knowing(prototypes), knowing(prototypes, *FALSE[kind])
    assert known(false, pixels, labels) < known(true, pixels, labels) - 0.15  # or there is nothing to mend
    found = better_normalisation(false, pixels, labels, Batching())
    assert found.known > found.known_as_stated + 0.1
    false.normalise_by(found.mean, found.std)
    fresh, names, _ = pictures(seed=1)
    assert known(false, fresh, names) > known(true, fresh, names) - 0.05
    assert false.spec.std == pytest.approx(tuple(false.std.flatten().tolist()))


def test_the_true_normalisation_is_left_alone():
    pixels, labels, prototypes = pictures()
    labels = [name if i % 4 else "c0" for i, name in enumerate(labels)]  # a quarter is labelled wrongly
    network = knowing(prototypes)
    assert 0.7 < known(network, pixels, labels) < 0.9
    assert better_normalisation(network, pixels, labels, Batching()) is None


def test_noise_hardly_ever_finds_another():
    """Where labels mean nothing, every normalisation knows as little."""
    pixels, labels, prototypes = pictures()
    alarms = 0
    for seed in range(20):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = [labels[i] for i in order]
        network = knowing(prototypes, *FALSE["three times the deviation"])
        alarms += better_normalisation(network, pixels, shuffled, Batching()) is not None
    assert alarms <= binom.isf(1e-6, 20, normalisation.DOUBT)


@pytest.mark.parametrize("labels", [[], ["c0"] * 240, ["c0", "c1"] * 10 + [""] * 220])
def test_without_labelled_images_nothing_is_said(labels):
    pixels, _, prototypes = pictures()
    network = knowing(prototypes, *FALSE["three times the deviation"])
    assert better_normalisation(network, pixels, labels, Batching()) is None


def test_what_is_not_finite_does_not_stop_the_search():
    pixels, labels, prototypes = pictures()
    network = knowing(prototypes, *FALSE["three times the deviation"])
    layers = network.module
    overflow = nn.Linear(3 * SIZE * SIZE, 6)
    overflow.weight.data, overflow.bias.data = layers[2].weight.data, layers[2].bias.data

    class Overflows(nn.Module):
        def forward(self, x):
            logits = overflow(x.clamp(-2, 2).flatten(1))
            return torch.where(x.flatten(1)[:, :1] > 1.7, float("inf"), logits)

    network.module = Overflows()
    assert better_normalisation(network, pixels, labels, Batching(size=7)).known > 0.5


def test_a_callers_normalisation_is_kept_and_doubted():
    pixels, labels, prototypes = pictures()
    network = knowing(prototypes, *FALSE["three times the deviation"])
    reference = Reference(network, pixels, labels)
    stated = VerifyOptions(mean=network.spec.mean, std=network.spec.std)
    (text,) = settle_normalisation(network, reference, stated, Batching())
    assert "--mean and --std may be wrong" in text and network.spec.std == FALSE["three times the deviation"][1]
    (text,) = settle_normalisation(network, reference, VerifyOptions(), Batching())
    assert "which was used" in text and network.spec.std != FALSE["three times the deviation"][1]
    assert settle_normalisation(network, reference, VerifyOptions(), Batching()) == []


def test_verification_mends_it_before_it_tests(monkeypatch, network):
    """The suspect that is examined has the normalisation that was found."""
    found = normalisation.Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.9, 0.4)
    monkeypatch.setattr(verification, "better_normalisation", lambda *_: found)
    seen = []

    def examine(suspect, *_):
        seen.append(suspect.spec)
        raise FloatingPointError("far enough")

    monkeypatch.setattr(verification, "examine", examine)
    monkeypatch.setattr(verification, "load_suspect", lambda *_: network)
    monkeypatch.setattr(verification, "check_suspects", lambda *_: None)
    spec, key = network.spec, type("Key", (), {"network": lambda *_: network, "against_all": True})()
    with pytest.raises(Exception, match="far enough"):
        verification.verify([nn.Identity()], key, VerifyOptions())
    assert seen == [replace(spec, mean=found.mean, std=found.std)]
    network.normalise_by(spec.mean, spec.std)
