"""Whether a suspect's normalisation is the true one: with a false one it knows labelled images less well.

A file that states a false mean or standard deviation hides what the network has learnt. The check reads the suspect and
labelled images alone, no key, so that a normalisation which it finds leaves the p-value exact.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, special
from torch import Tensor

from radiotag.networks import IMAGENET_MEAN, IMAGENET_STD, SMALL_IMAGE, Network, resized
from radiotag.suspect import Batching, finite_rows, log_probabilities

IMAGES, LARGE_IMAGES = 400, 100  # shown at most, small and large ones
FEWEST = 40  # with fewer images nothing is said
STEPS = 12  # of the search
UNKNOWN = 20.0  # −log p of an image, at most, and of one whose answer is not finite, where normalisations are compared
GAIN, DOUBT = 0.05, 1e-3  # another normalisation counts if it knows this share more, and not by such a chance
CONVENTIONS = (
    (IMAGENET_MEAN, IMAGENET_STD),
    ((0.5,) * 3, (0.5,) * 3),
    ((0.0,) * 3, (1.0,) * 3),
    ((0.0,) * 3, (1 / 255,) * 3),
)
Floats = NDArray[np.float64]


class Normalisation(NamedTuple):
    """A normalisation for pixels in [0, 1], better than the stated one, and what share of images each knows."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    known: float
    known_as_stated: float

    def __str__(self) -> str:
        mean, std = (",".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean} and std {std}"


class _Shown(NamedTuple):
    """Labelled images: one half to find a normalisation with, the other half to judge it."""

    pixels: Tensor  # (N, 3, S, S) in [0, 1]; even places are to find with
    classes: Tensor  # (N,)


def better_normalisation(
    network: Network, pixels: Tensor, labels: Sequence[str], batching: Batching
) -> Normalisation | None:
    """A normalisation with which the suspect knows labelled images clearly better than with its own; None without one.

    pixels: (N, 3, H, W) in [0, 1]; labels: (N,) class names, "" for none. Usual conventions are tried, and the best is
    improved by gradient on half of the images. It counts if it knows GAIN more of the other half, and the exact sign
    test of the images on which the two differ gives at most DOUBT.
    """
    shown = _choose(pixels, labels, network.spec.image_size)
    if shown is None:
        return None
    stated = _vector(network.spec.mean, network.spec.std)
    outputs, likelihood, right = _knowledge(network, shown, stated, batching)
    if float(right.mean()) > 1 - GAIN:
        return None
    best, best_likelihood, best_outputs = stated, likelihood, outputs
    for convention in (*CONVENTIONS, *((network.spec.mean, tuple(s * k for s in network.spec.std)) for k in (0.25, 4))):
        vector = _vector(*convention)
        outputs, likelihood, _ = _knowledge(network, shown, vector, batching)
        if likelihood > best_likelihood:
            best, best_likelihood, best_outputs = vector, likelihood, outputs
    best = _improve(network, shown, best, best_outputs, batching)
    _, _, now = _knowledge(network, shown, best, batching)
    gained, lost = int((now & ~right).sum()), int((right & ~now).sum())
    by_chance = float(special.bdtrc(gained - 1, gained + lost, 0.5)) if gained else 1.0
    if gained - lost < GAIN * len(right) or by_chance > DOUBT:
        return None
    mean, std = best[:3], np.exp(best[3:])
    return Normalisation(tuple(mean.tolist()), tuple(std.tolist()), float(now.mean()), float(right.mean()))


def _vector(mean: Sequence[float], std: Sequence[float]) -> Floats:
    return np.array([*mean, *map(math.log, std)])


def _choose(pixels: Tensor, labels: Sequence[str], size: int) -> _Shown | None:
    """Some images of each class in turn; None for too few, or for one class alone."""
    limit = IMAGES if size <= SMALL_IMAGE else LARGE_IMAGES
    by_class = {name: [i for i, label in enumerate(labels) if label == name] for name in sorted({*labels} - {""})}
    each = max(2, limit // max(1, len(by_class)))
    places = [i for members in by_class.values() for i in members[: each - each % 2]][:limit]
    if len(by_class) < 2 or len(places) < FEWEST:
        return None
    names = sorted(by_class)
    return _Shown(resized(pixels[places], size), torch.tensor([names.index(labels[i]) for i in places]))


def _answers(network: Network, pixels: Tensor, vector: Tensor) -> Tensor:
    """Log-probabilities (B, C') with a normalisation (6,): mean and logarithm of the standard deviation."""
    mean, std = vector[:3].view(1, 3, 1, 1), vector[3:].exp().view(1, 3, 1, 1)
    x = ((pixels.to(vector) - mean) / std).contiguous(memory_format=network.layout)
    found: Tensor = network.module(x)
    return log_probabilities(found)


@torch.no_grad()
def _log_p(network: Network, pixels: Tensor, normalisation: Floats, batching: Batching) -> Tensor:
    vector = torch.tensor(normalisation, dtype=torch.float32, device=network.device)
    parts = [_answers(network, batch, vector).cpu().double() for batch in batching.split(pixels, "normalisation")]
    return torch.cat(parts)


@torch.no_grad()
def _knowledge(
    network: Network, shown: _Shown, normalisation: Floats, batching: Batching
) -> tuple[Tensor, float, NDArray[np.bool_]]:
    """The output of each class by the first half; their mean log-probability there; which of the other half are right.

    A suspect's outputs are matched to classes anew for each normalisation.
    """
    log_p = _log_p(network, shown.pixels, normalisation, batching).nan_to_num(-UNKNOWN)  # (N, C')
    fitting, classes = log_p[::2], shown.classes[::2]
    count = int(shown.classes.max()) + 1
    sums = torch.zeros(count, log_p.shape[1], dtype=torch.float64).index_add_(0, classes, fitting.exp())
    rows, columns = optimize.linear_sum_assignment(-sums.numpy())
    outputs = torch.full((count,), -1)
    outputs[torch.from_numpy(rows)] = torch.from_numpy(columns)
    right = (log_p[1::2].argmax(1) == outputs[shown.classes[1::2]]).numpy()
    own = outputs[classes]
    likelihood = fitting[own >= 0].gather(1, own[own >= 0, None]).clamp_min(-UNKNOWN).mean()
    return outputs, float(likelihood), right


def _improve(network: Network, shown: _Shown, start: Floats, outputs: Tensor, batching: Batching) -> Floats:
    """Raise the mean log-probability of the first half's classes, from a start, by L-BFGS."""
    own = outputs[shown.classes[::2]]
    usable = (own >= 0) & finite_rows(_log_p(network, shown.pixels[::2], start, batching))
    pixels, own = shown.pixels[::2][usable], own[usable]
    if not len(own):
        return start

    with torch.enable_grad():
        vector = torch.tensor(start, dtype=torch.float32, device=network.device, requires_grad=True)
        if not _answers(network, pixels[:2], vector).requires_grad:  # a module that rounds its answers, for one
            return start

    def loss(values: Floats) -> tuple[float, Floats]:
        vector = torch.tensor(values, dtype=torch.float32, device=network.device, requires_grad=True)
        total, done = 0.0, 0
        with torch.enable_grad():
            for batch in batching.split(pixels, "normalisation"):
                log_p = _answers(network, batch, vector).cpu().double()
                part = -log_p.gather(1, own[done : done + len(batch), None]).nan_to_num(-1e4).sum() / len(own)
                part.backward()  # type: ignore[no-untyped-call]
                total, done = total + float(part.detach()), done + len(batch)
        assert vector.grad is not None
        return total, vector.grad.cpu().double().nan_to_num(0).numpy()

    bounds = [(-4.0, 4.0)] * 3 + [(-10.0, 5.0)] * 3
    found: Floats = optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxfun": STEPS}
    ).x
    return found
