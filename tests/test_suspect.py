"""What is computed of a suspect, against closed forms, finite differences and other oracles."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Toy, by_cosines, gaussian, images_in_unit_range, linear, toys, unit
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from torch import nn

from radiotag import suspect as suspect_module
from radiotag.cosines import PATTERN_DIMENSION
from radiotag.suspect import (
    Batching,
    ComparedClasses,
    Probes,
    Reference,
    aligned_rows,
    ask,
    center_over_classes,
    choose_probes,
    class_vectors,
    gradient_responses,
    images_per_class,
    photographs_per_class,
    reference_classifier,
    regression_rows,
    remove_projection,
    top_images_per_class,
    whitening,
)


def vectors_of(marker, network, pixels, outputs, batch_size=64, *, labels=None, known=None, besides=(), reference=None):
    """Class vectors of a suspect that is asked with these images."""
    reference, batching = reference or Reference(marker, pixels), Batching(size=batch_size)
    classes = compared(outputs, labels, known, besides)
    asked, reference = ask(network, reference, batching)
    return class_vectors(reference, asked, classes, batching)


def compared(outputs, labels=None, known=None, besides=(), others=False):
    return ComparedClasses(
        outputs=tuple(outputs), labels=None if labels is None else tuple(labels.tolist()),
        marker_outputs=None if known is None else tuple(known), marker_besides=tuple(besides), others=others,
    )  # fmt: skip


def reference_of(marker, suspect, pixels, outputs, labels=None, known=None, besides=()):
    reference, batching = Reference(marker, pixels), Batching(size=7)
    return reference_classifier(
        reference, ask(suspect, reference, batching)[0], compared(outputs, labels, known, besides), batching
    )


def responses(marker, network, pixels, outputs, batch_size, labels, places=None):
    places = torch.arange(len(pixels)) if places is None else places
    return gradient_responses(
        marker,
        network,
        outputs,
        Probes(pixels, places, labels[:, None]),
        Batching(size=batch_size),
    )


def features(network, pixels, batch_size):
    return suspect_module.features(network, pixels, Batching(size=batch_size))


def log_answers(network, pixels, batch_size):
    return suspect_module.log_answers(network, pixels, Batching(size=batch_size))


# ---------------------------------------------------------------- alignment


def test_alignment_recovers_an_exact_map():
    phi, matrix, weight = gaussian(60, 9, seed=1), gaussian(9, 5, seed=2), gaussian(3, 5, seed=3)
    rows, r2 = aligned_rows(phi, phi @ matrix, weight, 0.0)
    assert rows.numpy() == pytest.approx(weight.numpy() @ matrix.numpy().T, rel=1e-9)
    assert r2 == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("images", [40, 6], ids=["two columns alike", "fewer images than dimensions"])
def test_rank_deficient_alignment_has_minimum_norm(images):
    phi, psi, weight = gaussian(images, 9, seed=1), gaussian(images, 5, seed=2), gaussian(3, 5, seed=3)
    phi[:, 4], phi[:, 7] = phi[:, 3], 0
    for ridge in (0.0, 0.1):
        rows, _ = aligned_rows(phi, psi, weight, ridge)
        assert rows.isfinite().all()
    matrix = np.linalg.pinv(phi.numpy(), rcond=1e-10) @ psi.numpy()
    rows, r2 = aligned_rows(phi, psi, weight, 0.0)
    assert rows.numpy() == pytest.approx(weight.numpy() @ matrix.T, rel=1e-8, abs=1e-12)
    residual, spread = psi.numpy() - phi.numpy() @ matrix, psi.numpy() - psi.numpy().mean(0)
    assert r2 == pytest.approx(1 - (residual**2).sum() / (spread**2).sum(), abs=1e-10)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 3.0])
def test_ridge_solves_the_penalised_normal_equations(ridge):
    phi, psi, weight = gaussian(50, 8, seed=1) * 3 + 1, gaussian(50, 5, seed=2), gaussian(3, 5, seed=3)
    p, q = phi.numpy(), psi.numpy()
    penalty = ridge * (p**2).sum() / 8
    stacked, target = np.vstack([p, math.sqrt(penalty) * np.eye(8)]), np.vstack([q, np.zeros((8, 5))])
    matrix = np.linalg.lstsq(stacked, target)[0]
    rows, r2 = aligned_rows(phi, psi, weight, ridge)
    assert rows.numpy() == pytest.approx(weight.numpy() @ matrix.T, rel=1e-8)
    assert r2 == pytest.approx(1 - ((q - p @ matrix) ** 2).sum() / ((q - q.mean(0)) ** 2).sum(), abs=1e-10)


def test_alignment_of_constant_features_says_nothing():
    rows, r2 = aligned_rows(torch.zeros(9, 4).double(), torch.ones(9, 5).double(), gaussian(3, 5), 0.0)
    assert r2 == 0 and not rows.any()
    rows, _ = aligned_rows(torch.zeros(9, 4).double(), torch.ones(9, 5).double(), gaussian(3, 5), 0.1)
    assert not rows.any()


# ---------------------------------------------------------------- responses


def responses_of_all(marker, suspect, pixels, outputs, batch_size):
    """Every image serves every class."""
    labels = torch.arange(len(outputs)).repeat_interleave(len(pixels))
    places = torch.arange(len(pixels)).repeat(len(outputs))
    return responses(marker, suspect, pixels, outputs, batch_size, labels, places)


def test_response_of_linear_networks_is_closed_form():
    a, w = gaussian(6, 48, seed=1), gaussian(4, 48, seed=2)
    marker, suspect = Toy(linear(a), gaussian(2, 6)), Toy(linear(w), torch.eye(4).double())
    pixels, outputs = images_in_unit_range(11), [2, 0]
    x, expected, seen = pixels.flatten(1).numpy(), np.zeros((2, 6)), np.zeros((2, 11, PATTERN_DIMENSION))
    bias = np.linspace(-1, 1, 4)
    for number, image in enumerate(x):
        p = np.exp(w.numpy() @ image + bias)
        p /= p.sum()
        for row, c in enumerate(outputs):
            gradient = w.numpy()[c] - p @ w.numpy()
            expected[row] += unit(a.numpy() @ gradient) / len(x)
            seen[row, number] = by_cosines(unit(gradient).reshape(3, 4, 4))
    for batch_size in (1, 4, 11, 64):
        found, pattern, scatter = responses_of_all(marker, suspect, pixels, outputs, batch_size)
        assert found.dtype == torch.float64 and found.numpy() == pytest.approx(expected, rel=1e-8)
        assert pattern.numpy() == pytest.approx(np.mean(seen, 1), rel=1e-8)
        spread = sum(np.cov(one.T, bias=True) for one in seen) / 2  # as many images of either class
        assert scatter.numpy() == pytest.approx(spread, rel=1e-8, abs=1e-15)
    for layer in (marker, suspect):
        assert all(p.grad is None for p in layer.parameters())


def test_response_of_a_dead_output_is_zero():
    marker, suspect = (
        Toy(linear(gaussian(6, 48)), gaussian(2, 6)),
        Toy(linear(torch.zeros(4, 48).double()), torch.eye(4).double()),
    )
    assert not any(part.any() for part in responses_of_all(marker, suspect, images_in_unit_range(3), [0, 3], 2))


class Attention(nn.Module):
    """One transformer layer over the rows of an image; inference takes fused kernels where it may."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, activation="gelu", batch_first=True)

    def forward(self, x):
        return self.layer(x.permute(0, 2, 1, 3).flatten(2)).mean(1)  # (B, 3, 4, 4) → (B, 4, 12) → (B, 12)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.Softplus(), nn.Conv2d(5, 12, 3, stride=2), nn.Tanh(), nn.Flatten()
    )


@pytest.mark.parametrize("body", [convolutional, Attention])
def test_response_is_the_finite_difference(body):
    """Both derivatives by central differences: the suspect's gradient pixel by pixel, then φ along it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        marker, suspect = (Toy(body().double(), torch.randn(3, 12).double()) for _ in range(2))
    pixels, step, expected = images_in_unit_range(3), 1e-5, np.zeros((3, 12))
    with torch.no_grad():
        for image in pixels:
            moves = step * torch.eye(48).double().view(48, 3, 4, 4)
            scores = [suspect(image + sign * moves).log_softmax(1) for sign in (1, -1)]
            for c in range(3):
                g = ((scores[0] - scores[1])[:, c] / (2 * step)).view(3, 4, 4)
                move = step * (g / g.norm())[None]
                pushed = (marker.features(image + move) - marker.features(image - move))[0]
                expected[c] += unit(pushed.numpy()) / 3
    before = torch.backends.mha.get_fastpath_enabled()
    found = responses_of_all(marker, suspect, pixels, [0, 1, 2], 2).response
    assert torch.backends.mha.get_fastpath_enabled() is before is True
    assert found.numpy() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- a suspect's vectors


def test_marking_network_as_its_own_suspect_aligns_with_its_own_rows():
    w = gaussian(3, 6, seed=1)
    marker = Toy(linear(gaussian(6, 48, seed=2)), w)
    rows = vectors_of(marker, marker, images_in_unit_range(40), [2, 0])
    assert rows.paper.numpy() == pytest.approx(w.numpy()[[2, 0]], rel=1e-8)
    assert rows.r2 == pytest.approx(1, abs=1e-10)


def test_paper_rows_do_not_depend_on_the_suspects_basis():
    marker = Toy(linear(gaussian(16, 48, seed=1)), gaussian(2, 16, seed=2))
    body, w = gaussian(5, 48, seed=3), gaussian(4, 5, seed=4)
    mixed = gaussian(5, 5, seed=5)
    suspects = Toy(linear(body), w), Toy(linear(mixed @ body), w @ torch.linalg.inv(mixed))
    pixels, pairs = images_in_unit_range(60), [3, 0, 2]
    first, second = (vectors_of(marker, s, pixels, pairs, 16) for s in suspects)
    assert first.paper.numpy() == pytest.approx(second.paper.numpy(), rel=1e-7)
    backwards = vectors_of(marker, suspects[0], pixels, pairs[::-1], 7)
    for name in ("features", "paper", "pattern"):
        assert getattr(backwards, name).flip(0).numpy() == pytest.approx(getattr(first, name).numpy(), rel=1e-7)


@pytest.mark.parametrize(("labelled", "share"), [(True, 1), (False, 0.5)])
def test_declared_rows_sum_two_unit_vectors(labelled, share):
    marker = Toy(linear(gaussian(16, 48, seed=1)), gaussian(2, 16, seed=2))
    suspect = Toy(linear(gaussian(5, 48, seed=3)), gaussian(4, 5, seed=4))
    pixels, outputs = images_in_unit_range(60), [3, 0, 2]
    labels = torch.arange(60) % 3 if labelled else None
    whole = vectors_of(marker, suspect, pixels, outputs, labels=labels)
    suspect.head = None
    weight, bias = gaussian(4, 5, seed=4), torch.linspace(-1, 1, 4)
    suspect.forward = lambda x: suspect.features(x) @ weight.T + bias
    bare = vectors_of(marker, suspect, pixels, outputs, labels=labels)
    assert bare.paper is None and bare.r2 is None and whole.paper is not None
    assert bare.features.norm(dim=1).tolist() == pytest.approx([1] * 3)
    added = (whole.features - bare.features).numpy()
    assert np.linalg.norm(added, axis=1) == pytest.approx(share, abs=1e-6)
    phi, psi = marker.features(pixels).double(), suspect.features(pixels).double()
    expected, _ = aligned_rows(phi, psi, weight[outputs].double(), 0.1 if labelled else 0.5)
    expected = expected - expected.mean(0) / 3  # of three classes: less a third of what they share
    if labelled:  # less what a linear classifier of the same images answers; without labels the row is left whole
        expected = remove_projection(expected, regression_rows(phi, (labels[:, None] == torch.arange(3)).double()))
    assert added == pytest.approx(share * unit(expected.numpy()), abs=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        "known", "known, labelled", "one known", "one compared", "one compared, labelled", "labelled", "some labelled",
        "of one class", "bare",
    ],
)  # fmt: skip
def test_what_an_ordinary_network_answers_is_taken_off(case):
    marker, suspect = toys(seed=1), toys(seed=2)
    pixels, outputs = images_in_unit_range(50), [2] if "compared" in case else [2, 0]
    labels = {
        "labelled": torch.arange(50) % 2,
        "known, labelled": torch.arange(50) % 2,
        "some labelled": torch.arange(50) % 3 - 1,
        "one compared, labelled": torch.arange(50) % 2 - 1,
    }.get(case)
    labels = torch.zeros(50, dtype=torch.long) if case == "of one class" else labels
    own = {"known": [1, 2], "known, labelled": [1, 2], "one known": [2]}.get(case, [1] if "compared" in case else None)
    others, phi = [2] if "compared" in case else [], features(marker, pixels, 7)
    ordinary, known, rows = reference_of(marker, suspect, pixels, outputs, labels, own, others)
    if "compared" in case:  # φ as if it knew besides it what the suspect does, and not its third class
        first, second = marker.head.weight[[1, 2]].double()
        assert rows.numpy() == pytest.approx((first - second)[None].numpy() / 2)
        if labels is not None:
            assert ordinary is marker and known == (1,)
            return
        assert known == (0,)
        expected = marker(pixels)[:, [1, 2]].log_softmax(1)
        assert ordinary(pixels).log_softmax(1).numpy() == pytest.approx(expected.numpy(), rel=1e-6)
        return
    if case in ("known", "known, labelled"):  # φ as if it knew these two classes alone
        (first, second), answered = marker.head.weight[[1, 2]].double(), ordinary(pixels)
        assert rows.numpy() == pytest.approx(torch.stack([first - second, second - first]).numpy() / 2)
        if labels is not None:  # but images of these classes are asked with all of it
            assert ordinary is marker and known == (1, 2)
            return
        assert known == (0, 1)
        expected = marker(pixels)[:, [1, 2]].log_softmax(1)
        assert answered.log_softmax(1).numpy() == pytest.approx(expected.numpy(), rel=1e-6)
        return
    if case == "one known":
        assert ordinary is marker and known == (2,)
        assert torch.equal(rows, marker.head.weight[[2]].double())
        return
    if case in ("bare", "of one class"):  # one class gives nothing to tell apart
        assert rows is None
        targets = suspect(pixels).double().softmax(1)[:, outputs].numpy()
    else:
        targets = np.stack([labels.numpy() == c for c in range(2)], 1).astype(float)
    x, y = (v - v.mean(0) for v in (phi.numpy(), targets))
    penalty = math.sqrt(0.1 * np.trace(x.T @ x) / 6)  # oracle: ridge as least squares with six more equations
    wanted = np.linalg.lstsq(np.vstack([x, penalty * np.eye(6)]), np.vstack([y, np.zeros((6, 2))]), rcond=None)[0].T
    assert ordinary.rows[:2].numpy() == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert known == (0, 1) and (rows is None or torch.equal(rows, ordinary.rows[:2]))
    scores = ordinary(pixels)
    assert scores.shape == (50, 3) and not scores[:, 2].any()
    assert scores[:, :2].double().numpy() == pytest.approx(phi.numpy() @ wanted.T, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("labelled", [True, False])
def test_classes_that_are_not_compared_count_for_what_is_taken_off(labelled):
    marker, suspect = (Toy(linear(gaussian(6, 48, seed=s)), gaussian(3, 6, seed=s + 10)) for s in (1, 2))
    pixels, labels = images_in_unit_range(50), torch.arange(50) % 2 - 1 if labelled else None
    found = vectors_of(marker, suspect, pixels, [2], 7, labels=labels, known=[1], besides=[2])
    phi, psi = features(marker, pixels, 7), features(suspect, pixels, 7)
    _, _, rows = reference_of(marker, suspect, pixels, [2], labels, [1], [2])
    assert found.features.shape == (1, 6)
    penalty, share = (0.1, 1.0) if labelled else (0.5, 0.5)
    ridge = remove_projection(aligned_rows(phi, psi, suspect.head.weight[[2]].double(), penalty)[0], rows)
    suspect.head, weight, bias = None, suspect.head.weight, suspect.head.bias
    suspect.forward = lambda x: suspect.features(x) @ weight.T + bias
    alone = vectors_of(marker, suspect, pixels, [2], 7, labels=labels, known=[1], besides=[2])
    added = share * nn.functional.normalize(ridge, dim=1)
    assert (found.features - alone.features).numpy() == pytest.approx(added.numpy(), abs=1e-5)
    without = vectors_of(marker, suspect, pixels, [2], 7, labels=labels, known=[1])
    if labelled:  # images of the class are asked with all of φ
        assert torch.equal(without.pattern, alone.pattern)
    else:
        assert float(nn.functional.cosine_similarity(without.pattern, alone.pattern)) < 0.999


def test_of_one_class_not_every_image_is_asked_without_labels(monkeypatch):
    marker, suspect, asked = toys(seed=1), toys(seed=2), []
    original = suspect_module.gradient_responses

    def counted(*arguments):
        asked.append(len(arguments[3].asked))
        return original(*arguments)

    monkeypatch.setattr(suspect_module, "gradient_responses", counted)
    vectors_of(marker, suspect, images_in_unit_range(500), [0], 250)
    vectors_of(marker, suspect, images_in_unit_range(500), [0, 1, 0, 1], 250)
    assert asked == [400, 400, 1200, 1200]


@pytest.mark.parametrize("labelled", [True, False])
def test_responses_have_nothing_of_the_ordinary_networks(labelled):
    marker, suspect = toys(seed=1), toys(seed=2)
    suspect.head = None
    weight = gaussian(3, 6, seed=12)
    suspect.forward = lambda x: suspect.features(x) @ weight.T
    pixels, pairs = images_in_unit_range(50), [2, 0]
    labels = torch.arange(50) % 2 if labelled else None
    found = vectors_of(marker, suspect, pixels, pairs, 7, labels=labels)
    reference = reference_of(marker, suspect, pixels, [2, 0], labels).network
    places = None
    if labels is None:
        chosen = top_images_per_class(log_answers(suspect, pixels, 7), [2, 0], 600)
        places, labels = chosen.flatten(), torch.arange(2).repeat_interleave(chosen.shape[1])
    theirs = responses(marker, reference, pixels, [0, 1], 7, labels, places)
    white = whitening(responses(marker, suspect, pixels, [2, 0], 7, labels, places).scatter)
    for mine, its in ((found.features, theirs.response), (found.pattern, theirs.pattern @ white)):
        assert nn.functional.cosine_similarity(mine, its).abs().max() < 1e-5
        assert mine.norm(dim=1).min() > 1e-3


def test_a_suspect_with_the_marking_networks_features_keeps_its_evidence_without_labels():
    """Its outputs are a linear classifier on φ: all of its response is removed, and its row stays."""
    carriers = nn.functional.normalize(gaussian(3, 6, seed=5), dim=1)
    marker = Toy(linear(gaussian(6, 48, seed=1)), gaussian(2, 6, seed=2))
    suspect = Toy(linear(gaussian(6, 48, seed=1)), 10 * carriers)
    rows = vectors_of(marker, suspect, images_in_unit_range(60), range(3))
    assert nn.functional.cosine_similarity(rows.features, carriers.double(), dim=1).mean() > 0.4


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_log_odds_are_those_of_the_probability(classes):
    logits, outputs = gaussian(7, classes, seed=1) * 4, torch.arange(7) % classes
    p = torch.sigmoid(logits) if classes == 1 else logits.softmax(1)
    p = p[torch.arange(7), outputs]
    assert suspect_module.log_odds(logits, outputs).numpy() == pytest.approx((p / (1 - p)).log().numpy(), rel=1e-9)
    with pytest.raises(FloatingPointError):
        suspect_module.log_odds(logits * math.inf, outputs)


def test_a_last_layer_times_a_constant_answers_the_same():
    """This changes no decision, but the gradient of log p would vanish wherever p rounds to 1."""
    body, weight, labels = linear(gaussian(6, 48).float()), gaussian(2, 6, seed=5).float(), torch.arange(12) % 2
    marker, pixels = Toy(body, gaussian(2, 6, seed=2).float()), gaussian(12, 48, seed=3).float().view(12, 3, 4, 4)
    found = []
    for factor in (1.0, 1e4):
        suspect = Toy(body, factor * weight)
        suspect.head.bias.data *= factor
        found.append(responses(marker, suspect, pixels, [0, 1], 5, labels))
    for one, other in zip(*found, strict=True):
        assert other.numpy() == pytest.approx(one.numpy(), rel=1e-3, abs=1e-5)


def test_a_single_output_is_a_sigmoids():
    """It equals the first of the two outputs (s, 0)."""
    marker = toys(seed=1)
    weight = gaussian(1, 6, seed=3)
    alone = Toy(linear(gaussian(6, 48, seed=2)), weight)
    both = Toy(linear(gaussian(6, 48, seed=2)), torch.cat([weight, torch.zeros_like(weight)]))
    for network, bias in ((alone, [0.3]), (both, [0.3, 0.0])):
        network.head.bias.data = torch.tensor(bias, dtype=weight.dtype)
    pixels = images_in_unit_range(50)
    assert log_answers(alone, pixels, 7).numpy() == pytest.approx(log_answers(both, pixels, 7)[:, :1].numpy())
    one, two = (vectors_of(marker, network, pixels, [0], 7) for network in (alone, both))
    for mine, its in ((one.features, two.features), (one.pattern, two.pattern)):
        assert mine.norm() > 0.1
        assert mine.numpy() == pytest.approx(its.numpy(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("part", ["outputs", "features"])
def test_what_is_not_finite_is_said_to_be(part):
    marker, suspect = toys(seed=1), toys(seed=2)
    if part == "outputs":
        suspect.forward = lambda x: 1e308 * x.flatten(1)[:, :3] / x.flatten(1)[:, 3:6].clamp_max(0.1)
    else:
        suspect.features = lambda x: torch.full((len(x), 6), float("inf"))
        suspect.forward = lambda x: x.flatten(1)[:, :3]
    with pytest.raises(FloatingPointError, match=part):
        vectors_of(marker, suspect, images_in_unit_range(50), [0], 7)


@pytest.mark.parametrize("part", ["outputs", "features"])
def test_images_for_which_a_suspect_is_not_finite_are_left_out(part):
    """Else one output that overflows on one public image would end the test."""
    marker, suspect, pixels = toys(seed=1), toys(seed=2), images_in_unit_range(50)
    labels = torch.arange(50) % 2
    broken = torch.zeros(50, dtype=torch.bool)
    broken[[3, 10, 11, 40]] = True
    usable = vectors_of(marker, suspect, pixels[~broken], [0, 1], 7, labels=labels[~broken])
    pixels[broken, 0, 0, 0] = 1.0  # no other image has this
    plain = suspect.forward if part == "outputs" else suspect.features

    def overflows(x):
        return plain(x).masked_fill((x[:, 0, 0, 0] == 1)[:, None], math.inf)

    setattr(suspect, "forward" if part == "outputs" else "features", overflows)
    asked, reference = ask(suspect, Reference(marker, pixels, ["a", "b"] * 25), Batching(size=7))
    assert len(asked.log_probabilities) == len(asked.features) == len(reference.pixels) == 46
    assert asked.log_probabilities.isfinite().all() and asked.features.isfinite().all()
    assert reference.labels == tuple("ab"[i % 2] for i in range(50) if not broken[i])
    found = class_vectors(reference, asked, compared([0, 1], labels[~broken]), Batching(size=7))
    assert found.features.numpy() == pytest.approx(usable.features.numpy(), abs=1e-12)
    assert found.pattern.numpy() == pytest.approx(usable.pattern.numpy(), abs=1e-12)


def test_a_gradient_that_overflows_tells_nothing():
    marker, suspect = toys(seed=1), toys(seed=2)
    suspect.head = None
    suspect.forward = lambda x: torch.stack([(x.flatten(1)[:, 0] * 1e-38).sqrt() * 1e30, x.flatten(1)[:, 1]], 1)
    pixels = images_in_unit_range(50)
    pixels[:, 0, 0, 0] = 0  # where the square root has an infinite slope
    rows = vectors_of(marker, suspect, pixels, [0, 1], 7)
    assert bool(torch.isfinite(rows.features).all()) and bool(torch.isfinite(rows.pattern).all())


@pytest.mark.parametrize("own", [None, [2, 0]])
def test_what_does_not_depend_on_the_suspect_is_computed_once(monkeypatch, own):
    marker, calls = toys(seed=1), []
    pixels, labels = images_in_unit_range(50), torch.arange(50) % 2
    inner = type(marker).features

    def counted(self, x):
        calls.extend([len(x)] if self is marker else [])
        return inner(self, x)

    monkeypatch.setattr(type(marker), "features", counted)
    counts, reference = [], Reference(marker, pixels)
    for seed in (2, 3):
        vectors_of(marker, toys(seed=seed), pixels, [0, 1], 50, labels=labels, known=own, reference=reference)
        counts.append(len(calls))
    assert counts == [4, 5]  # the second suspect costs one pass of φ, along its own gradient


def test_images_of_other_classes_serve_the_alignment_alone():
    marker, suspect = (Toy(linear(gaussian(6, 48, seed=s)), gaussian(3, 6, seed=s + 10)) for s in (1, 2))
    pixels, pairs = images_in_unit_range(50), [2, 0]
    labels = torch.arange(50) % 3 - 1
    some = labels >= 0
    rows = vectors_of(marker, suspect, pixels, pairs, 7, labels=labels)
    few = vectors_of(marker, suspect, pixels[some], pairs, 7, labels=labels[some])
    every = vectors_of(marker, suspect, pixels, pairs, 7)
    assert rows.paper.numpy() == pytest.approx(every.paper.numpy(), rel=1e-7) and rows.r2 == every.r2
    own = vectors_of(marker, suspect, pixels, pairs, 7, labels=labels, known=[2, 0])
    alone = vectors_of(marker, suspect, pixels[some], pairs, 7, labels=labels[some], known=[2, 0])
    assert own.pattern.numpy() == pytest.approx(alone.pattern.numpy(), rel=1e-7)
    assert not np.allclose(rows.paper.numpy(), few.paper.numpy())


@pytest.mark.parametrize(
    ("classes", "small", "large"),
    [(1, 400, 400), (2, 400, 400), (10, 120, 120), (30, 50, 40), (100, 50, 12), (500, 10, 8), (1000, 8, 8)],
)
def test_of_many_classes_fewer_images_each_are_asked(classes, small, large):
    assert [images_per_class(classes, size) for size in (32, 64, 65, 224)] == [small, small, large, large]


def test_without_labels_each_class_asks_the_images_that_the_suspect_takes_for_it():
    marker, suspect = (Toy(linear(gaussian(6, 48, seed=s)), gaussian(3, 6, seed=s + 10)) for s in (1, 2))
    pixels, outputs = images_in_unit_range(50), [2, 0]
    scores = suspect(pixels).log_softmax(1).numpy()
    best = [np.argsort(-scores[:, output])[:9] for output in outputs]
    chosen = top_images_per_class(log_answers(suspect, pixels, 7), outputs, 9)
    assert [sorted(row) for row in chosen.tolist()] == [sorted(row.tolist()) for row in best]
    places, labels = chosen.flatten(), torch.tensor([0] * 9 + [1] * 9)
    found, pattern, _ = responses(marker, suspect, pixels, outputs, 4, labels, places)
    for position, output in enumerate(outputs):
        alone = responses_of_all(marker, suspect, pixels[best[position].copy()], [output], 50)
        assert found[position].numpy() == pytest.approx(alone[0][0].numpy(), rel=1e-5)
        assert pattern[position].numpy() == pytest.approx(alone[1][0].numpy(), rel=1e-5)


# ---------------------------------------------------------------- evidence


def test_labelled_responses_average_each_class_over_its_own_images():
    marker, suspect, pixels = toys(seed=1), toys(seed=2), images_in_unit_range(7)
    labels = torch.tensor([1, 0, 1, 1, 0, 1, 1])
    found, pattern, _ = responses(marker, suspect, pixels, [2, 0], 3, labels)
    for position, output in enumerate((2, 0)):  # oracle: the unlabelled answer on the class's images alone
        expected = responses_of_all(marker, suspect, pixels[labels == position], [output], 2)
        torch.testing.assert_close(found[position], expected[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pattern[position], expected[1][0], rtol=1e-4, atol=1e-5)


def asked_of(labels, classes=3, *, labelled=True, others=True):
    """The probes of some images: (place, class, whether it is the image's own) of each, in order."""
    marker, suspect = (Toy(linear(gaussian(6, 48, seed=s)), gaussian(3, 6, seed=s + 10)) for s in (1, 2))
    reference = Reference(marker, images_in_unit_range(len(labels)))
    asked, reference = ask(suspect, reference, Batching())
    which = compared(range(classes), labels if labelled else None, others=others)
    probes = choose_probes(reference, asked, which)
    columns = enumerate(probes.asked.T.tolist())
    return [(place, c, not n) for n, asked in columns for place, c in zip(probes.places.tolist(), asked, strict=True)]


@pytest.mark.parametrize("classes", [2, 3])
def test_each_image_is_asked_for_its_class_and_for_one_other_the_others_in_turn(classes):
    labels = torch.randint(-1, classes, (60,), generator=torch.Generator().manual_seed(3))
    asked = asked_of(labels, classes)
    own = [(i, label) for i, label in enumerate(labels.tolist()) if label >= 0]
    assert [(place, c) for place, c, of_class in asked if of_class] == own
    others = [(place, c) for place, c, of_class in asked if not of_class]
    assert [place for place, _ in others] == [place for place, _ in own]
    assert all(c != labels[place] and 0 <= c < classes for place, c in others)
    for label in range(classes):
        counts = [sum(labels[place] == label and c == other for place, c in others) for other in range(classes)]
        assert max(counts) - min(counts[:label] + counts[label + 1 :]) <= 1  # in turn
    assert asked_of(labels, classes, others=False) == [(*row, True) for row in own]


def test_images_without_labels_are_asked_for_another_class_than_they_are_taken_for():
    asked = asked_of(torch.zeros(50, dtype=torch.int64), labelled=False)
    half = len(asked) // 2
    assert asked[:half] == asked_of(torch.zeros(50, dtype=torch.int64), labelled=False, others=False)
    for (place, c, _), (same, other, own) in zip(asked[:half], asked[half:], strict=True):
        assert place == same and c != other and not own


def test_of_a_single_class_no_other_is_asked():
    assert all(own for _, _, own in asked_of(torch.zeros(5, dtype=torch.int64), 1))


def test_a_classs_images_and_the_others_count_the_same():
    """However many there are of each, and however long their means: the sum of two unit vectors."""
    marker, suspect, pixels = toys(seed=1), toys(seed=2), images_in_unit_range(9)
    asked = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]])
    probes = Probes(pixels, torch.tensor([0, 1, 2, 3, 7, 8, 0]), asked)
    found = gradient_responses(marker, suspect, [2, 0], probes, Batching(size=4))
    places, labels = probes.places.repeat_interleave(2), asked.flatten()
    own = torch.tensor([True, False] * len(asked))
    terms = []
    for position, output in enumerate((2, 0)):
        expected = [np.zeros(6), np.zeros(PATTERN_DIMENSION)]
        for kind in (own, ~own):
            chosen = places[(labels == position) & kind]
            alone = responses_of_all(marker, suspect, pixels[chosen], [output], 50)
            for i in range(2):
                expected[i] = expected[i] + unit(alone[i][0].numpy())
            each = [responses_of_all(marker, suspect, pixels[i][None], [output], 50)[1][0].numpy() for i in chosen]
            terms += [term - alone[1][0].numpy() for term in each]
        assert found.response[position].numpy() == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
        assert found.pattern[position].numpy() == pytest.approx(expected[1], rel=1e-4, abs=1e-6)
    covariance = np.mean([np.outer(term, term) for term in terms], axis=0)
    assert found.scatter.numpy() == pytest.approx(covariance, rel=1e-3, abs=1e-9)


def few_of(labels, classes, size=66, *, labelled=True, few=True):
    """The probes of large images, as `choose_probes` takes them for keys that declare few."""
    marker, suspect = (Toy(linear(gaussian(6, 3 * size**2, seed=s)), gaussian(classes, 6, seed=s + 10)) for s in (1, 2))
    reference = Reference(marker, images_in_unit_range(len(labels), size))
    asked, reference = ask(suspect, reference, Batching())
    which = replace(compared(range(classes), labels if labelled else None, others=True), few=few)
    return choose_probes(reference, asked, which)


@pytest.mark.parametrize("classes", [2, 5])
def test_without_labels_few_photographs_are_asked(monkeypatch, classes):
    monkeypatch.setattr(suspect_module, "FEW_PHOTOGRAPHS", 20)
    monkeypatch.setattr(suspect_module, "OF_EACH", 2)
    labels = torch.randint(-1, classes, (90,), generator=torch.Generator().manual_seed(3))
    probes, each = few_of(labels, classes, labelled=False), 20 // classes
    assert photographs_per_class(classes) == each and probes.asked.shape == (20, 2)
    assert torch.bincount(probes.asked[:, 0]).tolist() == [each] * classes
    assert (probes.asked[:, 0] != probes.asked[:, 1]).all()
    for size, few in ((64, True), (66, False)):  # small images, and keys that declare an earlier statistic
        assert len(few_of(labels, classes, size, labelled=False, few=few).asked) == 90 * classes
    assert len(few_of(labels, classes).asked) == int((labels >= 0).sum())  # with labels all are asked


@given(st.integers(1, 3000))
def test_photographs_of_any_number_of_classes_are_asked_few_times(classes):
    each = photographs_per_class(classes)
    assert each * classes <= max(800, classes) and each * classes > min(300, 800) - classes and each >= 1


def test_a_class_without_images_answers_nothing():
    marker, suspect = toys(seed=1), toys(seed=2)
    for found in responses(marker, suspect, images_in_unit_range(2), [0, 1], 2, torch.tensor([0, 0]))[:2]:
        assert found[0].any()
        assert not found[1].any()


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_contrast_takes_off_what_the_classes_share(classes):
    rows = gaussian(classes, 12, seed=1)
    share = max(0, 1 - 2 / classes)
    expected = rows.numpy() - share * rows.numpy().mean(0)
    assert center_over_classes(rows).numpy() == pytest.approx(expected, abs=1e-12)
    dead = torch.cat([torch.zeros(2, 12), rows])  # outputs that answer nothing go on doing so
    found = center_over_classes(dead)
    assert not found[:2].any() and found[2:].numpy() == pytest.approx(expected, abs=1e-12)
    assert not center_over_classes(torch.zeros_like(rows)).any()


def test_whitening_is_the_inverse_root_of_the_covariance_and_the_identity():
    parts = gaussian(200, 9, seed=1).numpy() * np.geomspace(0.1, 10, 9) @ gaussian(9, 9, seed=2).numpy()
    scatter = np.cov(parts.T)
    wanted = linalg.inv(linalg.sqrtm(scatter / np.diag(scatter).mean() + np.eye(9)))
    for scale in (1, 1e-8):
        assert whitening(torch.from_numpy(scale * scatter)).numpy() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    for nothing in (torch.zeros(9, 9), -1e-11 * torch.eye(9)):  # one image a class; what rounding may leave
        assert whitening(nothing.double()).numpy() == pytest.approx(np.eye(9))


def test_the_rows_are_contrasted_whitened_and_rid_of_the_ordinary():
    marker, suspect, pixels, pairs = toys(seed=1), toys(seed=2), images_in_unit_range(60), [2, 0, 1]
    labels, weight = torch.arange(60) % 3, suspect.head.weight
    suspect.head = None  # the response alone
    suspect.forward = lambda x: suspect.features(x) @ weight.T
    found = vectors_of(marker, suspect, pixels, pairs, 7, labels=labels, known=[1, 0, 2])
    theirs = responses(marker, suspect, pixels, [2, 0, 1], 7, labels)
    ours = responses(marker, marker, pixels, [1, 0, 2], 7, labels)
    scatter = theirs.scatter.numpy()
    white = linalg.inv(linalg.sqrtm(scatter / np.trace(scatter) * len(scatter) + np.eye(len(scatter)))).real
    for name, turned, mine in (("pattern", white, found.pattern), ("response", np.eye(6), found.features)):
        rows, off = (getattr(part, name).numpy() for part in (theirs, ours))
        rows, off = ((part - part.mean(0) / 3) @ turned for part in (rows, off))
        expected = unit(np.array([a - b * (a @ b) / (b @ b) for a, b in zip(rows, off, strict=True)]))
        assert unit(mine.numpy()) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_ridge_row_and_the_ordinary_ones_are_contrasted_alike():
    """Because of images of other classes, the reference classifier's rows do not add up to zero."""
    marker, suspect, pixels, pairs = toys(seed=1), toys(seed=2), images_in_unit_range(60), [2, 0, 1]
    labels = torch.arange(60) % 4 - 1
    whole = vectors_of(marker, suspect, pixels, pairs, 7, labels=labels)
    weight, bias = suspect.head.weight, suspect.head.bias
    suspect.head = None
    suspect.forward = lambda x: suspect.features(x) @ weight.T + bias
    added = whole.features - vectors_of(marker, suspect, pixels, pairs, 7, labels=labels).features
    phi, psi = (features(network, pixels, 60) for network in (marker, suspect))
    ridge = aligned_rows(phi, psi, weight[[2, 0, 1]].double(), 0.1)[0].numpy()
    plain = regression_rows(phi, (labels[:, None] == torch.arange(3)).double()).numpy()
    assert np.linalg.norm(plain.mean(0)) > 0.05 * np.linalg.norm(plain)
    ridge, plain = (rows - rows.mean(0) / 3 for rows in (ridge, plain))
    expected = unit(np.array([a - b * (a @ b) / (b @ b) for a, b in zip(ridge, plain, strict=True)]))
    assert added.numpy() == pytest.approx(expected, abs=1e-4)


def test_a_gradient_too_small_to_square_counts_as_any_other():
    marker = Toy(linear(gaussian(6, 48, seed=1).float()), gaussian(2, 6).float())
    found = []
    for scale in (1.0, 1e-24):  # a network whose logits are scaled has gradients as small; their squares are zero
        suspect = Toy(linear(gaussian(6, 48, seed=2).float()), gaussian(3, 6, seed=3).float())
        suspect.forward = lambda x, s=suspect, scale=scale: s.features(x) @ s.head.weight.T * scale
        found.append(responses_of_all(marker, suspect, 1e-3 * images_in_unit_range(9).float(), [0, 1], 4))
    for name in ("response", "pattern", "scatter"):
        usual, tiny = (getattr(each, name).numpy() for each in found)
        assert tiny == pytest.approx(usual, abs=1e-2), name  # the probabilities differ a little


def test_project_own_removes_each_rows_own_direction_only():
    rows, own = gaussian(5, 12, seed=1), gaussian(5, 12, seed=2)
    found = remove_projection(rows, own)
    for row, direction, left in zip(rows.numpy(), own.numpy(), found.numpy(), strict=True):
        expected = row - direction * (row @ direction) / (direction @ direction)
        np.testing.assert_allclose(left, expected, atol=1e-12)
    assert torch.equal(remove_projection(rows, torch.zeros_like(own)), rows)  # a silent network takes nothing away
