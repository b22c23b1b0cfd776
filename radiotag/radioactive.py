"""Radioactive data: carriers, the marking loss and its steps, exact p-values. To be read next to the paper.

    Sablayrolles, Douze, Schmid, Jégou, "Radioactive data: tracing through training", ICML 2020, arXiv:2002.00937.

How it works. φ is the marking network up to its penultimate layer. Each class c has two secret carriers. u_c is uniform
on the unit sphere of R^d, the feature space of φ. v_c is uniform on the unit sphere of R^m and describes a *pattern*: a
sum of low-frequency cosines over the image (`cosines`).

1. Marking moves an image x of class c to x̃, within ±ε per pixel and above a minimum PSNR, so that
   ⟨φ(F(x̃)) − φ(F(x)), u_c⟩ grows over random crops and flips F. At most a quarter of a class's images also carry the
   pattern v_c, which then gets three quarters of the change's energy (in photographs up to 95 %). If all images carried
   it, networks would learn the pattern and not the pictures. The pattern's lowest frequencies, which most networks
   learn and crops leave, are the strongest. In photographs the change goes where texture hides it. For lossy formats
   the loss is computed on the image as decoded from the file.
2. A model trained on such images learns to respond along u_c and v_c. Networks learn what all images of a class share
   far more readily than a shift of each image's features. Models trained from scratch therefore mostly learn the
   pattern.
3. Verification computes two vectors per class from the suspect alone (`suspect`, which knows no carrier). Under the
   null hypothesis a carrier is independent of its vector. Their cosine is then distributed like one coordinate of a
   uniform unit vector, whatever the suspect is, so its p-value is exact. Stouffer's method combines the classes. The
   result is the smaller of two p-values, that of the patterns and Fisher's combination of patterns and features,
   corrected exactly for this choice. Each key declares this statistic before a suspect is seen. The paper's statistic
   (least squares, Fisher) is information only.

Probabilities are natural logarithms unless their name says log10. They are computed in float64.
"""

import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import optimize, special
from torch import Tensor

from radiotag.cosines import pattern_images, tilt
from radiotag.errors import RadiotagError
from radiotag.networks import Network, mixed_precision, resized
from radiotag.suspect import ClassVectors

NULL = "the suspect was computed without any data marked under this key (its carriers are independent of the suspect)"
Floats = NDArray[np.float64]
Crop = tuple[int, int, int, int, bool]  # top, left, height, width, flip


# ---------------------------------------------------------------- carriers


def uniform_carriers(classes: int, dimension: int, entropy: Callable[[int], bytes] = os.urandom) -> Tensor:
    """(C, d) float32 carriers, uniform on the unit sphere (section 4.1): normalised Gaussian vectors.

    Every number comes from 64 fresh bits of `entropy`, by default the operating system's. There is no seed that could
    be guessed or leaked.
    """
    bits = np.frombuffer(entropy(8 * classes * dimension), dtype=np.uint64) >> np.uint64(12)
    gaussian = special.ndtri((bits + 0.5) * 2.0**-52).reshape(classes, dimension)
    return torch.from_numpy(gaussian / np.linalg.norm(gaussian, axis=1, keepdims=True)).float()


# ---------------------------------------------------------------- marking (section 4.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Marking:
    """How to mark. Pixels in units of 1/255."""

    epsilon: float = 10.0  # L∞ radius R, the paper's
    min_psnr: float | None = None  # dB; None: `default_psnr` of each image
    steps: int = 20  # along the normalised gradient; 15–20 steps of decaying length reach what 80 do
    reach: float = 6.0  # length of the whole path, in radii of the L2 ball: steps of different crops partly cancel
    pattern_share: float | None = None  # the pattern's part of the squared amplitude; None: `default_share`
    crop_scale: tuple[float, float] = (0.4, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def psnr(self, height: int, width: int) -> float:
        """Minimum PSNR in dB for an image of this size (pixels)."""
        return default_psnr(height, width) if self.min_psnr is None else self.min_psnr


def resolution_weight(height: int, width: int) -> float:
    """0 up to 64 pixels on the short side, 1 from 224; linear in the logarithm in between."""
    share = math.log2(max(min(height, width), 1) / 64) / math.log2(224 / 64)
    return min(1.0, max(0.0, share))


def default_psnr(height: int, width: int) -> float:
    """34 dB up to 64 pixels, 40 dB from 224: small images need more amplitude, and hide more of it."""
    return 34.0 + 6.0 * resolution_weight(height, width)


def default_share(height: int, width: int) -> float:
    """The pattern's share of a mark's energy: 0.75 up to 64 pixels, 0.95 from 224.

    Networks trained from scratch learn the pattern best, from photographs little else.
    """
    return 0.75 + 0.2 * resolution_weight(height, width)


def default_tilt(height: int, width: int) -> float:
    """The power of its frequency by which a cosine is weaker in a mark: 0.5 up to 64 pixels, 1.2 from 224.

    A ResNet on small images learns all frequencies of a pattern alike, a VGG the lower half alone. Of photographs,
    random crops leave the lowest most.
    """
    return 0.5 + 0.7 * resolution_weight(height, width)


def visibility_mask(image: Tensor) -> Tensor:
    """(3, H, W) in [0, 255] → (1, H, W) in (0, 1]: high where the eye overlooks a change; all ones for small images."""
    share = resolution_weight(*image.shape[1:])
    return texture_mask(image) ** share if share else torch.ones_like(image[:1])


def texture_mask(image: Tensor) -> Tensor:
    """(3, H, W) in [0, 255] → (1, H, W) in [0.15, 1]: the mask of a photograph.

    Texture hides a change and flat areas show it. The mask is σ/(σ + 6), where σ is the standard deviation of the mean
    colour in windows of 5 pixels; the minimum is 0.15. Each pixel takes the smallest σ of the windows around it, so
    that a flat area beside an edge counts as flat.
    """
    grey = F.pad(image.mean(0)[None, None], (2,) * 4, mode="reflect")
    spread = (F.avg_pool2d(grey.square(), 5, 1) - F.avg_pool2d(grey, 5, 1).square()).clamp_min(0).sqrt()
    least = _least_of_nine(_least_of_nine(spread[0], 1), 2)  # (1, H, W)
    return (least / (least + 6)).clamp_min(0.15)


def _least_of_nine(values: Tensor, axis: int) -> Tensor:
    """The smallest of each value and the four before and behind it; ten times as fast as pooling."""
    padding = [0] * (2 * (values.dim() - 1 - axis)) + [4, 4]
    eight = nine = F.pad(values, padding, value=math.inf)
    for shift in (1, 2, 4):
        kept = eight.shape[axis] - shift
        eight = torch.minimum(eight.narrow(axis, 0, kept), eight.narrow(axis, shift, kept))
    return torch.minimum(eight.narrow(axis, 0, values.shape[axis]), nine.narrow(axis, 8, values.shape[axis]))


def marking_loss(features: Tensor, carriers: Tensor) -> Tensor:
    """−⟨φ(F(x̃)), u⟩ of each image: (B, d) features, (B, d) carriers → (B,). Equation 6 within a ball.

    φ(F(x)) is left out because it does not depend on x̃. The paper's two penalties are left out, too. λ1‖x̃ − x‖ is not
    needed: the change is projected onto a ball of known PSNR instead. λ2‖φ(F(x̃)) − φ(F(x))‖, at the paper's weight,
    turns the gradient by less than a degree but costs a forward pass of φ at every step.
    """
    return -(features * carriers).sum(1)


def random_crop(height: int, width: int, draw: random.Random, marking: Marking) -> Crop:
    """Draw (top, left, height, width, flip) of a random resized crop as torchvision's RandomResizedCrop does."""
    for _ in range(10):
        area = height * width * draw.uniform(*marking.crop_scale)
        ratio = math.exp(draw.uniform(*map(math.log, marking.crop_ratio)))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            break
    else:
        h = w = min(height, width)
    top, left = int(draw.random() * (height - h + 1)), int(draw.random() * (width - w + 1))
    return top, left, h, w, draw.random() < 0.5


def augment(image: Tensor, crop: Crop, size: int) -> Tensor:
    """F: crop, flip and resize an image to the network's input, (3, H, W) → (3, S, S)."""
    top, left, height, width, flip = crop
    out = resized(image[None, :, top : top + height, left : left + width], size)[0]
    return out.flip(2) if flip else out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageToMark:
    """One image and everything that determines its mark."""

    image: Tensor  # (3, H, W) in [0, 255]
    carrier: Tensor  # (d,): u of its class
    pattern: Tensor  # (m,): v of its class; zeros for no pattern
    draw: random.Random  # generator of its crops
    grey: bool = False  # the file holds no colour, so all three channels change alike
    mask: Tensor | None = None  # (1, H, W), of a reduced copy; None: `visibility_mask` of the image


def mark_images(
    network: Network,
    images: Sequence[ImageToMark],
    marking: Marking,
    read_back: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
) -> list[Tensor]:
    """Mark images of any sizes together; returns (3, H, W) float in [0, 255] for each, within ε and the PSNR.

    `read_back(images)` returns the images as decoded from the written files. The loss is computed on its result, and
    the gradient is passed straight through. Its arguments are changed in place afterwards.
    """
    device = network.device
    carriers = torch.stack([image.carrier for image in images]).to(device)  # (B, d)
    clean = [image.image.to(device) for image in images]
    masks = [
        visibility_mask(x) if image.mask is None else image.mask.to(device)
        for x, image in zip(clean, images, strict=True)
    ]
    starts = [_start(x, image, mask, marking) for x, image, mask in zip(clean, images, masks, strict=True)]
    moved = [(x + pattern).clamp_(0, 255) for x, (pattern, _) in zip(clean, starts, strict=True)]
    masks = [mask.square() for mask in masks]  # the gradient in δ/mask, as a step in δ
    for step in range(marking.steps):
        length = marking.reach * 2 * (1 - step / marking.steps) / (marking.steps + 1)  # decays, sums to `reach`
        written = moved if read_back is None else [w.to(device) for w in read_back(moved)]
        crops = [
            random_crop(y.shape[1], y.shape[2], image.draw, marking) for y, image in zip(moved, images, strict=True)
        ]
        gradients = _gradients(network, written, carriers, crops)
        for i, (pattern, radius) in enumerate(starts):
            change = moved[i].sub_(clean[i]).sub_(pattern)  # in place: copies of photographs cost more than the sums
            top, left, height, width, _ = crops[i]
            seen = slice(top, top + height), slice(left, left + width)
            g = gradients[i].mul_(masks[i][:, *seen])
            g = g.mean(0, keepdim=True).expand_as(g) if images[i].grey else g
            change[:, *seen].sub_(g, alpha=length * radius / max(float(g.norm()), 1e-20))
            project(change, radius, marking.epsilon).add_(pattern).clamp_(-marking.epsilon, marking.epsilon)
            change.add_(clean[i]).clamp_(0, 255)
    return [y.cpu() for y in moved]


def _gradients(network: Network, images: Sequence[Tensor], carriers: Tensor, crops: Sequence[Crop]) -> list[Tensor]:
    """The gradients of `marking_loss` with respect to the pixels (3, h, w) of each image's crop."""
    leaves, views = [], []
    for image, (top, left, height, width, flip) in zip(images, crops, strict=True):
        leaves.append(image[:, top : top + height, left : left + width].detach().requires_grad_())
        views.append(augment(leaves[-1], (0, 0, height, width, flip), network.spec.image_size) / 255)
    with mixed_precision(carriers.device.type):
        features = network.features(padded(torch.stack(views)))[: len(images)].float()  # (B, d)
    return list(torch.autograd.grad(marking_loss(features, carriers).sum(), leaves))


def _start(clean: Tensor, image: ImageToMark, mask: Tensor, marking: Marking) -> tuple[Tensor, float]:
    """The class's pattern laid over one image (zeros if none), and the L2 radius left for the mark in the features."""
    radius = l2_radius(clean, marking) * min(1.0, 2 * float(mask.square().mean().sqrt()))  # smaller if much is flat
    if not image.pattern.any():
        return torch.zeros_like(clean), radius
    tilted = tilt(image.pattern[None], default_tilt(*clean.shape[1:]))
    scaled = pattern_images(tilted, *clean.shape[1:])[0].float().to(clean.device)
    scaled = scaled * mask * 1e9  # large, so that `project` puts it on the ball's surface
    scaled = scaled.mean(0, keepdim=True).repeat(3, 1, 1) if image.grey else scaled
    share = default_share(*clean.shape[1:]) if marking.pattern_share is None else marking.pattern_share
    return project(scaled, radius * math.sqrt(share), marking.epsilon), radius * math.sqrt(1 - share)


def padded(inputs: Tensor) -> Tensor:
    """Pad a batch (B, …) with zeros to a multiple of 16, so that rounding does not depend on the batch.

    Otherwise the bytes of a marked file would depend on the batch size and on where an earlier run was interrupted.
    """
    missing = -len(inputs) % 16
    return torch.cat([inputs, inputs.new_zeros(missing, *inputs.shape[1:])]) if missing else inputs


def l2_radius(image: Tensor, marking: Marking) -> float:
    """Radius of the L2 ball, in units of 1/255, on whose surface an image has exactly the minimum PSNR."""
    return 255 * 10 ** (-marking.psnr(*image.shape[1:]) / 20) * math.sqrt(image.numel())


def project(delta: Tensor, radius: float, epsilon: float) -> Tensor:
    """Project in place onto the L2 ball, then the L∞ ball; clamping only shortens, so both limits hold."""
    return delta.mul_(min(1.0, radius / max(float(delta.norm()), 1e-20))).clamp_(-epsilon, epsilon)


# ---------------------------------------------------------------- exact p-values, in log space


def cosine_log_sf(cosine: Floats | float, dimension: int) -> Floats:
    """log P(cos ≥ t) between a fixed and a uniform direction of R^d: ½·I_{1−t²}((d−1)/2, ½) for t ≥ 0 (section 4.3).

    It is accurate far below the smallest float: where the incomplete beta function underflows, its series is summed in
    logarithms. A cosine of exactly ±1 is replaced by a value just inside. ValueError for a dimension below 2 or NaN.
    """
    t = np.atleast_1d(np.asarray(cosine, dtype=np.float64))
    if dimension < 2 or np.isnan(t).any():
        raise ValueError("cosine_log_sf needs a dimension of at least 2 and cosines that are numbers")
    x = np.maximum((1 - np.abs(t)) * (1 + np.abs(t)), 2.0**-52)  # 1 − t², no cancellation
    a = (dimension - 1) / 2
    tail = special.betainc(a, 0.5, x) / 2
    upper, far = np.log(np.maximum(tail, 1e-300)), tail <= 1e-290
    upper[far] = [_log_tail(a, v) for v in x[far]]  # only here: elsewhere the series converges slowly
    result: Floats = np.where(t >= 0, upper, np.log1p(-tail))
    return result


def _log_tail(a: float, x: float) -> float:
    """log of ½·I_x(a, ½) = ½ x^a (1−x)^½ / (a B(a, ½)) · Σ_n x^n Π_{k<n} (a + ½ + k)/(a + 1 + k)."""
    total, term, n = 0.0, 1.0, 0
    while total + term > total:  # ends where a term is lost in rounding: each is less than x of the one before
        total, term, n = total + term, term * x * (a + 0.5 + n) / (a + 1 + n), n + 1
    front = a * math.log(x) + 0.5 * math.log1p(-x)
    return float(front - math.log(2 * a) - special.betaln(a, 0.5) + math.log(total))


def fisher(log_p: Floats) -> float:
    """log p of Fisher's combination of (C,) log p: −2Σ log p is χ² with 2C degrees of freedom.

    The tail of this χ² is a finite sum, which is exact at any size.
    """
    half = -float(np.sum(log_p))  # half the χ²
    if half <= 0:
        return 0.0
    k = np.arange(len(log_p))
    return min(0.0, float(-half + special.logsumexp(k * math.log(half) - special.gammaln(k + 1))))


def pattern_or_both(pattern: Floats, features: Floats) -> Floats:
    """log p of the smaller of two p-values: the pattern's, and Fisher's of pattern and features. Elementwise.

    Networks trained from scratch learn the pattern and little of the mark in the features, so that Fisher's combination
    loses much there. In fine-tuned networks the features say more. The correction is exact for independent p and q:
    Fisher's p is at most t where pq ≤ k, with k (1 − log k) = t. Hence
    P(p ≤ t or pq ≤ k) = t + ∫_t^1 k/p dp = t + k·(−log t), which is at most 2t.
    """
    both = pattern + features
    smaller = np.minimum(pattern, both + np.log1p(-both))  # log t; Fisher's of two, in closed form
    # Solve y − log y = 1 − log t for y = 1 − log k, in logarithms because t may underflow. There are two solutions, the
    # real branches of Lambert's W function. Which one scipy returns on which side of the branch cut depends on t.
    log_k = 1 + np.minimum(*(special.wrightomega(smaller - 1 + side * 1j * np.pi).real for side in (1, -1)))
    with np.errstate(divide="ignore"):
        chosen: Floats = np.logaddexp(smaller, log_k + np.log(-smaller))
    return np.minimum(chosen, 0.0)


def stouffer(log_p: Floats) -> float:
    """log p of Stouffer's combination of (C,) log p: the mean of the normal scores times √C is standard normal."""
    scores = -special.ndtri_exp(np.minimum(log_p, -1e-300))
    return float(special.log_ndtr(-scores.sum() / math.sqrt(len(scores))))


def bonferroni(log_p: Floats) -> float:
    """log p of the smallest of several p-values, corrected for the choice; the p-values may be dependent."""
    return min(0.0, float(log_p.min()) + math.log(len(log_p)))


def holm(log_p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of natural-log p-values, for several suspects tested with one key."""
    corrected, running = list(log_p), -math.inf
    for rank, i in enumerate(sorted(range(len(log_p)), key=lambda i: log_p[i])):
        running = max(running, log_p[i] + math.log(len(log_p) - rank))
        corrected[i] = min(0.0, running)
    return corrected


def resampled_log_p(values: Floats) -> float:
    """log p of the true key among its decoys: (K + 1, C) values, row 0 the true key's, higher means more suspicious.

    Under the null hypothesis the K + 1 values of a class are exchangeable. All (K + 1)^C ways to choose one key per
    class are then equally likely. p is the share of them whose sum of scores reaches the true key's, counted exactly. A
    score is the value in standard deviations of its class, rounded to a grid. So the sums are integers and p is a
    convolution.
    """
    spread = values.std(0)
    kept = values[:, spread > 1e-12 * np.abs(values).max(0)]  # a class with equal values for all keys says nothing
    if not kept.size:
        return 0.0
    grid = max(8, min(1000, 20_000 // kept.shape[1]))  # bounds the length of the convolution
    scores = np.rint((kept - kept.mean(0)) / kept.std(0) * grid).astype(np.int64)  # (K + 1, C)
    observed = int(scores[0].sum())
    tilt = _tilt(scores, observed)
    weights = np.exp(tilt * (scores - scores.max(0)))  # (K + 1, C): keeps far tails within float64
    log_scale = float(np.log(weights.mean(0)).sum() + tilt * scores.max(0).sum())
    weights /= weights.sum(0)
    density, low = np.ones(1), 0
    for c in range(scores.shape[1]):
        first = int(scores[:, c].min())
        counts = np.bincount(scores[:, c] - first, weights=weights[:, c])
        convolved = np.zeros(len(density) + len(counts) - 1)
        for step in np.flatnonzero(counts):
            convolved[step : step + len(density)] += counts[step] * density
        density, low = convolved, low + first
    sums = np.arange(low, low + len(density))
    with np.errstate(divide="ignore"):
        tail = (np.log(density) - tilt * sums)[sums >= observed]
    return min(0.0, float(log_scale + special.logsumexp(tail)))


def _tilt(scores: NDArray[np.int64], observed: int) -> float:
    """The exponential tilt under which the mean sum of the scores is the observed one, within the range of float64.

    0 if the observed sum is not above the mean.
    """

    def excess(tilt: float) -> float:
        weights = np.exp(tilt * (scores - scores.max(0)))  # (K + 1, C)
        return float((scores * weights).sum(0) @ (1 / weights.sum(0))) - observed

    largest = 30.0 / float(np.ptp(scores, axis=0).max())
    if excess(0.0) >= 0:
        return 0.0
    return largest if excess(largest) <= 0 else float(optimize.brentq(excess, 0.0, largest))


# ---------------------------------------------------------------- a key's verdict on a suspect


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The result of testing a suspect with a key."""

    log_p: float  # natural log, of the declared statistic
    paper_log_p: float | None  # of the paper's statistic; None without a linear head
    mean_cosine: float  # between class vectors and feature carriers
    pattern_cosine: float | None  # between class vectors and patterns
    sets: int  # of classes that were tested, nested in one another; 1: all classes together, and nothing else
    first_classes: int  # how many classes the strongest set holds
    per_class: tuple[float, ...]  # natural-log p of each class whose vector is not zero
    compared: tuple[int, ...]  # positions of these classes among the vectors


def output_unknown(rows: Sequence[int]) -> bool:
    """Whether several vectors are all compared with one carrier: it is not known which output the class became."""
    return len(rows) > 1 and len(set(rows)) == 1


def nested_sizes(count: int) -> list[int]:
    """The sizes of the sets of first classes that are tested: 1, 2, 5, 10, 20, 50, … below a number, and the number.

    >>> nested_sizes(30), nested_sizes(1)
    ([1, 2, 5, 10, 20, 30], [1])
    """
    steps = (digit * 10**power for power in range(len(str(count))) for digit in (1, 2, 5))
    return [*(size for size in steps if size < count), count]


def evidence(
    vectors: ClassVectors,
    rows: Sequence[int],
    carriers: Tensor,
    patterns: Tensor | None = None,
    order: Sequence[int] | None = None,
) -> Evidence:
    """Test class vectors against carriers (C', d) and patterns (C', m); `rows` holds the carrier row of each vector.

    `order` are all carrier rows in the key's secret order. Few marks go into its first classes. So its first 1, 2, 5, …
    classes are tested, and all; the smallest p-value counts, times the number of these sets (Bonferroni). Without an
    order all classes are tested together.
    If every vector has the same carrier, a single class was marked and it is not known which output of the suspect it
    became. Then the smallest p-value counts, times the number of outputs (Bonferroni).
    RadiotagError if all vectors are zero.
    """
    index, best_only = list(rows), output_unknown(rows)
    parts = [_compare(vectors.features, carriers[index])]
    if vectors.pattern is not None and patterns is not None:
        parts.append(_compare(vectors.pattern, patterns[index]))
    alive = np.stack([part.alive for part in parts])  # (1 or 2, C)
    says = np.logical_or.reduce(alive)  # (C,)
    if not says.any():
        told = "the suspect's outputs do not depend on its input, or their gradients are not finite"
        raise RadiotagError(told, "test it by its answers: --black-box --data DIR")
    log_p = np.where(alive, [part.log_p for part in parts], 0.0)  # (1 or 2, C)
    chosen = pattern_or_both(log_p[-1], log_p[0])
    per_class = np.where(alive.sum(0) == 2, chosen, log_p.sum(0))[says]
    sets = _sets(index, None if best_only else order)
    nested = np.array([_combined(parts, members) for members in sets])
    means = [float(part.cosine[part.alive].mean()) if part.alive.any() else 0.0 for part in parts]
    return Evidence(
        log_p=bonferroni(per_class) if best_only else bonferroni(nested),
        sets=len(sets),
        first_classes=int(says[sets[int(nested.argmin())]].sum()),
        paper_log_p=None if vectors.paper is None else _paper_log_p(vectors.paper, carriers[index], best_only),
        mean_cosine=means[0], pattern_cosine=means[1] if len(means) > 1 else None,
        per_class=tuple(per_class.tolist()), compared=tuple(np.flatnonzero(says).tolist()),
    )  # fmt: skip


def _sets(rows: Sequence[int], order: Sequence[int] | None) -> list[list[int]]:
    """Positions of the vectors that are tested together."""
    if order is None:
        return [list(range(len(rows)))]
    place = {row: number for number, row in enumerate(order)}
    first = sorted(range(len(rows)), key=lambda i: place[rows[i]])
    return [first[:size] for size in nested_sizes(len(rows))]


def _combined(parts: Sequence["_Comparison"], members: Sequence[int]) -> float:
    """log p of some classes together; 0 if none of their vectors says anything."""
    found = [part.log_p[members][part.alive[members]] for part in parts]
    per_part = np.array([stouffer(log_p) for log_p in found if len(log_p)])  # (0 to 2,)
    if not len(per_part):
        return 0.0
    return float(pattern_or_both(per_part[1], per_part[0]) if len(per_part) > 1 else per_part[0])


def _paper_log_p(vectors: Tensor, carriers: Tensor, best_only: bool) -> float:
    """log p of the paper's statistic: Fisher over the classes whose vectors are not zero."""
    comparison = _compare(vectors, carriers)
    log_p = comparison.log_p[comparison.alive]
    if not len(log_p):
        return 0.0
    return bonferroni(log_p) if best_only else fisher(log_p)


class _Comparison(NamedTuple):
    """For each class (C,): the cosine, the natural log of its exact p-value, and whether its vector is not zero.

    A zero vector (of a dead output) has no direction and says nothing. The choice to leave it out depends on the
    suspect alone, so the remaining p-values stay exact.
    """

    cosine: Floats
    log_p: Floats
    alive: NDArray[np.bool_]


def _compare(vectors: Tensor, carriers: Tensor) -> _Comparison:
    """Compare vectors (C, d) with carriers (C, d), row by row."""
    alive = (vectors.norm(dim=1) > 0).numpy()
    cosine: Floats = F.cosine_similarity(vectors, carriers.double(), dim=1, eps=1e-300).numpy()
    return _Comparison(cosine=cosine, log_p=cosine_log_sf(cosine, carriers.shape[1]), alive=alive)
