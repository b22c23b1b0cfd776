"""Radioactive data: carriers, keys, the marking loss and the tests. All the science of radiotag, next to the paper.

    Sablayrolles, Douze, Schmid, Jégou, "Radioactive data: tracing through training", ICML 2020, arXiv:2002.00937.

φ is the marking network up to its penultimate layer, u_c the secret carrier of class c, drawn uniformly on the unit
sphere of R^d. Marking moves φ(x) towards u_c; a model trained on marked images learns to answer along u_c. Under the
null hypothesis (the suspect does not depend on the carriers) every vector w_c computed from the suspect is independent
of u_c, so cos(w_c, u_c) is distributed like one coordinate of a uniform unit vector, whatever the suspect: the p-value
is exact. The choice of w_c is only a matter of power, and each key declares it before a suspect is seen.

Beyond the paper, each class has a second carrier v_c, uniform on the unit sphere of R^m: a faint pattern of low spatial
frequencies that all marked images of the class share beside what moves each one's features. Networks learn what is
shared far more readily; the same argument makes its test exact, with the suspect's mean input gradient (less what other
networks' have, too) as w_c.

Vectors are float64 where a p-value depends on them; probabilities are natural logarithms unless named log10.
"""

import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import fft, special
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from radiotag.errors import RadiotagError
from radiotag.networks import Network, mixed_precision, resized

NULL = "the suspect was computed without any data marked under this key (its carriers are independent of the suspect)"
ALIGNMENT_IMAGES = 2000  # at most, to align two feature spaces; of many classes more, up to MANY
SMALL, MANY = 64, 5000  # up to so many pixels on a side, so many images, or gradients, for many classes at most
# Penalty of the ridge alignment and its weight beside the response. Synthetic images align two feature spaces worse.
RIDGE_LABELLED, RIDGE_UNLABELLED = (0.1, 1.0), (0.5, 0.5)
RIDGE_ORDINARY = 0.1
GRADIENTS = 1200  # response gradients without labels, shared among the classes; up to MANY, where a class has few
FEW = 50  # images a class, where MANY allows it: the mean answer of fewer is largely chance
LIKELIEST = 400  # images at most asked about one class without labels: the more, the less like it
FREQUENCIES = 6  # of a pattern, along each axis: half-waves over the image
PATTERN_DIMENSION = 3 * (FREQUENCIES * FREQUENCIES // 2 - 1)  # m: three colours, mirror-symmetric, no constant
Floats = NDArray[np.float64]


# ---------------------------------------------------------------- carriers


def uniform_carriers(classes: int, dimension: int, entropy: Callable[[int], bytes] = os.urandom) -> Tensor:
    """(C, d) float32 carriers, uniform on the unit sphere (section 4.1): normalised Gaussian vectors.

    Every number comes from 64 fresh bits of `entropy`, by default the operating system's: no seed exists that could be
    guessed or leaked.
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
    steps: int = 20  # along the normalised gradient, 15–20 decaying steps reach what 80 do
    reach: float = 6.0  # length of the whole path, in radii of the L2 ball: crops disagree, so much of it cancels
    pattern_share: float | None = None  # of the squared amplitude, for the class's pattern; None: `default_share`
    crop_scale: tuple[float, float] = (0.4, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def psnr(self, height: int, width: int) -> float:
        """dB that an image of this size keeps."""
        return default_psnr(height, width) if self.min_psnr is None else self.min_psnr


def largeness(height: int, width: int) -> float:
    """0 up to 64 pixels on the short side, 1 from 224, in between by octaves."""
    share = math.log2(max(min(height, width), 1) / 64) / math.log2(224 / 64)
    return min(1.0, max(0.0, share))


def default_psnr(height: int, width: int) -> float:
    """34 dB up to 64 pixels, 40 dB from 224: small images need more amplitude, and hide more."""
    return 34.0 + 6.0 * largeness(height, width)


def default_share(height: int, width: int) -> float:
    """The pattern's share of a mark's energy: ¾ up to 64 pixels, ½ from 224.

    Networks trained from scratch learn the pattern best; but photographs are usually trained on in small crops, which
    spoil it and leave the features' mark.
    """
    return 0.75 - 0.25 * largeness(height, width)


def visibility_mask(image: Tensor) -> Tensor:
    """(3, H, W) in [0, 255] → (1, H, W) in (0, 1]: where the eye overlooks a change. 1 throughout in small images.

    Texture hides, flat areas show: σ/(σ + 6) of the mean colour in windows of 5 pixels, the least of all windows around
    a pixel, so that a flat area beside an edge counts as flat; at least 0.15.
    """
    height, width = image.shape[1:]
    share = largeness(height, width)
    if share == 0:
        return torch.ones_like(image[:1])
    grey = F.pad(image.mean(0)[None, None], (2,) * 4, mode="reflect")
    spread = (F.avg_pool2d(grey.square(), 5, 1) - F.avg_pool2d(grey, 5, 1).square()).clamp_min(0).sqrt()
    least = -F.max_pool2d(F.max_pool2d(-spread, (9, 1), 1, (4, 0)), (1, 9), 1, (0, 4))[0]  # (1, H, W)
    return (least / (least + 6)).clamp_min(0.15) ** share


def marking_loss(features: Tensor, carriers: Tensor) -> Tensor:
    """−⟨φ(F(x̃)), u⟩ of each image: (B, d) features, (B, d) carriers → (B,). Equation 6 within a ball.

    φ(F(x)) is left out: it does not depend on x̃. So are the two penalties, λ1‖x̃ − x‖ and λ2‖φ(F(x̃)) − φ(F(x))‖: the
    change is held to a ball of a known PSNR instead, and the second, at the paper's weight, turns the gradient by less
    than a degree but costs a forward pass of φ at every step.
    """
    return -(features * carriers).sum(1)


@lru_cache(maxsize=16)
def _waves(count: int, size: int, step: int) -> Tensor:
    """(count/step, size) float64: every `step`-th cosine of the orthonormal DCT-II over `size` pixels; zeros beyond."""
    return torch.from_numpy(fft.idct(np.eye(count, size)[::step], norm="ortho"))


def pattern_images(patterns: Tensor, height: int, width: int) -> Tensor:
    """(B, m) patterns → (B, 3, H, W) images: sums of cosines over the image, even ones across, so that a flip is none.

    A coefficient is an amplitude in an orthonormal basis: for images of 6 pixels or more norms are kept.
    """
    grid = F.pad(patterns.double().view(len(patterns), 3, -1), (1, 0))  # the constant is 0: normalisation removes it
    grid = grid.view(len(patterns), 3, FREQUENCIES, FREQUENCIES // 2)
    down, across = _waves(FREQUENCIES, height, 1), _waves(FREQUENCIES, width, 2)
    return torch.einsum("bcij,ih,jw->bchw", grid, down, across)


def pattern_coefficients(images: Tensor) -> Tensor:
    """(B, 3, H, W) → (B, m) float64: an image's part in the patterns' space, the transpose of `pattern_images`."""
    down, across = _waves(FREQUENCIES, images.shape[2], 1), _waves(FREQUENCIES, images.shape[3], 2)
    grid = torch.einsum("bchw,ih,jw->bcij", images.cpu().double(), down, across)
    return grid.flatten(2)[:, :, 1:].flatten(1)


def random_crop(height: int, width: int, draw: random.Random, marking: Marking) -> tuple[int, int, int, int, bool]:
    """(top, left, height, width, flip) of a random resized crop, as torchvision's RandomResizedCrop draws it."""
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


def augmented(image: Tensor, crop: tuple[int, int, int, int, bool], size: int) -> Tensor:
    """F: one crop and flip, resized to the network's input. (3, H, W) → (3, S, S)."""
    top, left, height, width, flip = crop
    out = resized(image[None, :, top : top + height, left : left + width], size)[0]
    return out.flip(2) if flip else out


def mark_images(
    network: Network,
    images: Sequence[Tensor],
    carriers: Tensor,
    draws: Sequence[random.Random],
    marking: Marking,
    read_back: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
    patterns: Tensor | None = None,
    grey: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Mark images of any sizes together: each (3, H, W) in [0, 255] → (3, H, W) float, within ε and the PSNR.

    carriers is (B, d), patterns (B, m), rows of zeros for none, draws one generator an image. `read_back(images)` is
    what a reader of the written files would see; the loss is taken there and its gradient passed straight through. What
    it is given changes afterwards. `grey` images, whose files hold no colour, change alike in all three.
    """
    device = carriers.device
    clean = [x.to(device) for x in images]
    rows = [None] * len(clean) if patterns is None else [row if row.any() else None for row in patterns]
    masks, grey = [visibility_mask(x) for x in clean], grey or [False] * len(clean)
    starts = [_start(*each, marking) for each in zip(clean, rows, masks, grey, strict=True)]
    moved = [(x + base).clamp_(0, 255) for x, (base, _) in zip(clean, starts, strict=True)]
    masks = [mask.square_() for mask in masks]  # the gradient in δ/mask, as a step in δ
    for step in range(marking.steps):
        size = marking.reach * 2 * (1 - step / marking.steps) / (marking.steps + 1)  # decays linearly, sums to `reach`
        written = moved if read_back is None else [w.to(device) for w in read_back(moved)]
        crops = [random_crop(y.shape[1], y.shape[2], draw, marking) for y, draw in zip(moved, draws, strict=True)]
        gradients = _gradients(network, written, carriers, crops)
        for i, (base, radius) in enumerate(starts):
            own = moved[i].sub_(clean[i]).sub_(base)  # in place: a photograph's copies cost more than the sums
            top, left, height, width, _ = crops[i]
            seen = slice(top, top + height), slice(left, left + width)
            g = gradients[i].mul_(masks[i][:, *seen])
            g = g.mean(0, keepdim=True).expand_as(g) if grey[i] else g
            own[:, *seen].sub_(g, alpha=size * radius / max(float(g.norm()), 1e-20))
            project(own, radius, marking.epsilon).add_(base).clamp_(-marking.epsilon, marking.epsilon)
            own.add_(clean[i]).clamp_(0, 255)
    return [y.cpu() for y in moved]


def _gradients(
    network: Network, images: Sequence[Tensor], carriers: Tensor, crops: Sequence[tuple[int, int, int, int, bool]]
) -> list[Tensor]:
    """Of `marking_loss` for each image's crop, by the crop's own pixels (3, h, w)."""
    leaves, views = [], []
    for image, (top, left, height, width, flip) in zip(images, crops, strict=True):
        leaves.append(image[:, top : top + height, left : left + width].detach().requires_grad_())
        views.append(augmented(leaves[-1], (0, 0, height, width, flip), network.spec.image_size) / 255)
    with mixed_precision(carriers.device.type):
        features = network.features(padded(torch.stack(views)))[: len(images)].float()  # (B, d)
    return list(torch.autograd.grad(marking_loss(features, carriers).sum(), leaves))


def _start(image: Tensor, pattern: Tensor | None, mask: Tensor, grey: bool, marking: Marking) -> tuple[Tensor, float]:
    """The class's pattern as it lies in one image (zeros if none), and the L2 radius left for the image's own mark."""
    radius = l2_radius(image, marking) * min(1.0, 2 * float(mask.square().mean().sqrt()))  # less where much is flat
    if pattern is None:
        return torch.zeros_like(image), radius
    far = pattern_images(pattern[None], *image.shape[1:])[0].float().to(image.device) * mask * 1e9  # to the surface
    far = far.mean(0, keepdim=True).repeat(3, 1, 1) if grey else far
    share = default_share(*image.shape[1:]) if marking.pattern_share is None else marking.pattern_share
    return project(far, radius * math.sqrt(share), marking.epsilon), radius * math.sqrt(1 - share)


def padded(inputs: Tensor) -> Tensor:
    """Fill the batch (B, …) up to a multiple of 16: convolutions then round alike whatever stands beside an image.

    Otherwise the bytes of a marked file would depend on the batch size, and on where an earlier run was interrupted.
    """
    missing = -len(inputs) % 16
    return torch.cat([inputs, inputs.new_zeros(missing, *inputs.shape[1:])]) if missing else inputs


def l2_radius(image: Tensor, marking: Marking) -> float:
    """Radius of the L2 ball, in units of 1/255, whose surface has the wanted PSNR."""
    return 255 * 10 ** (-marking.psnr(*image.shape[1:]) / 20) * math.sqrt(image.numel())


def project(delta: Tensor, radius: float, epsilon: float) -> Tensor:
    """Onto the L2 ball, then the L∞ ball (clamping only shortens, so both hold); in place."""
    return delta.mul_(min(1.0, radius / max(float(delta.norm()), 1e-20))).clamp_(-epsilon, epsilon)


# ---------------------------------------------------------------- exact p-values, in log space


def cosine_log_sf(cosine: Floats | float, dimension: int) -> Floats:
    """log P(cos ≥ t) between a fixed and a uniform direction of R^d: ½·I_{1−t²}((d−1)/2, ½) for t ≥ 0 (section 4.3).

    Accurate far below the smallest float: where the incomplete beta function underflows, its series is summed in logs.
    A cosine of exactly ±1 is taken as the nearest float inside.
    """
    t = np.atleast_1d(np.asarray(cosine, dtype=np.float64))
    if dimension < 2 or np.isnan(t).any():
        raise ValueError("cosine_log_sf needs a dimension of at least 2 and cosines that are numbers")
    x = np.clip((1 - np.abs(t)) * (1 + np.abs(t)), 2.0**-52, 1.0)  # 1 − t², no cancellation
    a = (dimension - 1) / 2
    tail = special.betainc(a, 0.5, x) / 2
    upper, far = np.log(np.maximum(tail, 1e-300)), tail <= 1e-290
    upper[far] = [_log_tail(a, v) for v in x[far]]  # only there: nearer zero the series converges slowly
    result: Floats = np.where(t >= 0, upper, np.log1p(-tail))
    return result


def _log_tail(a: float, x: float) -> float:
    """log of ½·I_x(a, ½) = ½ x^a (1−x)^½ / (a B(a, ½)) · Σ_n x^n Π_{k<n} (a + ½ + k)/(a + 1 + k)."""
    total, term, n = 1.0, 1.0, 0
    while term > 1e-17 * total and n < 100_000:
        term *= x * (a + 0.5 + n) / (a + 1 + n)
        total, n = total + term, n + 1
    front = a * math.log(x) + 0.5 * math.log1p(-x) if x < 1 else 0.0
    return float(front - math.log(2 * a) - special.betaln(a, 0.5) + math.log(total))


def fisher(log_p: Floats) -> float:
    """log p of Fisher's combination: −2Σ log p is χ² with 2C degrees, whose tail is a finite sum, exact at any size."""
    half = -float(np.sum(log_p))  # half the χ²
    if half <= 0:
        return 0.0
    k = np.arange(len(log_p))
    return min(0.0, float(-half + special.logsumexp(k * math.log(half) - special.gammaln(k + 1))))


def pattern_or_both(pattern: Floats, features: Floats) -> Floats:
    """log p of the smaller of two: the pattern's p-value, and Fisher's of it and the features'. Any shape, elementwise.

    Networks trained from scratch learn the pattern and little of the features' mark, which then costs Fisher's much;
    in one fine-tuned the features tell more. Exact for independent p, q: Fisher's is at most t where pq ≤ k, with
    k (1 − log k) = t, so that P(p ≤ t or pq ≤ k) = t + ∫_t^1 k/p dp = t + k·(−log t), at most 2t.
    """
    both = pattern + features
    least = np.minimum(np.minimum(pattern, both + np.log1p(-both)), 0.0)  # log t; Fisher's of two, in closed form
    # y − log y = 1 − log t, y = 1 − log k, has two solutions, real branches of Lambert's function; in logs, for t may
    # underflow. Which of them scipy gives on which side of its cut depends on t.
    log_k = 1 + np.minimum(*(special.wrightomega(least - 1 + side * 1j * np.pi).real for side in (1, -1)))
    with np.errstate(divide="ignore"):
        chosen: Floats = np.logaddexp(least, log_k + np.log(-least))
    return np.minimum(chosen, 0.0)


def stouffer(log_p: Floats) -> float:
    """log p of Stouffer's combination: the mean of the normal scores times √C is standard normal."""
    scores = -special.ndtri_exp(np.minimum(log_p, -1e-300))
    return float(special.log_ndtr(-scores.sum() / math.sqrt(len(scores))))


def bonferroni(log_p: Floats) -> float:
    """log p of the smallest of several p-values, corrected for having chosen it; they may depend on each other."""
    return min(0.0, float(log_p.min()) + math.log(len(log_p)))


def holm(log_p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of natural-log p-values for testing several suspects with one key."""
    corrected, running = [0.0] * len(log_p), -math.inf
    for rank, i in enumerate(sorted(range(len(log_p)), key=lambda i: log_p[i])):
        running = max(running, log_p[i] + math.log(len(log_p) - rank))
        corrected[i] = min(0.0, running)
    return corrected


def resampled_log_p(values: Floats) -> float:
    """log p of the true key among its decoys: (K + 1, C) values, row 0 the true key's, higher is more suspicious.

    Under the null each class's K + 1 values are exchangeable, so that (K + 1)^C assignments of a key to each class are
    equally likely; p is the share of them whose summed scores reach the true key's, counted exactly. A score is the
    value in its class's standard deviations, rounded to a grid: that makes the sums integers, and p a convolution.
    """
    spread = values.std(0)
    kept = values[:, spread > 1e-12 * np.abs(values).max(0)]  # a class in which all keys do alike says nothing
    if kept.shape[1] == 0:
        return 0.0
    grid = max(8, min(1000, 20_000 // kept.shape[1]))  # bounds the length of the convolution
    scores = np.rint((kept - kept.mean(0)) / kept.std(0) * grid).astype(np.int64)  # (K + 1, C)
    observed = int(scores[0].sum())
    tilt = _tilt(scores, observed)
    weights = np.exp(tilt * (scores - scores.max(0)))  # (K + 1, C): far tails stay within reach of float64
    log_scale = float(np.log(weights.mean(0)).sum() + tilt * scores.max(0).sum())
    weights /= weights.sum(0)
    density, low = np.ones(1), 0
    for c in range(scores.shape[1]):
        first = int(scores[:, c].min())
        single = np.bincount(scores[:, c] - first, weights=weights[:, c])
        wide = np.zeros(len(density) + len(single) - 1)
        for step in np.flatnonzero(single):
            wide[step : step + len(density)] += single[step] * density
        density, low = wide, low + first
    sums = np.arange(low, low + len(density))
    with np.errstate(divide="ignore"):
        tail = (np.log(density) - tilt * sums)[sums >= observed]
    return min(0.0, float(log_scale + special.logsumexp(tail)))


def _tilt(scores: NDArray[np.int64], observed: int) -> float:
    """The exponential tilt under which the scores' mean sum is about the observed one; 0 if that is below the mean."""
    low, high = 0.0, 30.0 / max(1, int(np.ptp(scores, axis=0).max()))
    for _ in range(40):
        middle = (low + high) / 2
        weights = np.exp(middle * (scores - scores.max(0)))
        mean = float((scores * weights).sum(0) @ (1 / weights.sum(0)))
        low, high = (middle, high) if mean < observed else (low, middle)
    return low


# ---------------------------------------------------------------- what a suspect answers


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Attention in elementary operations: the fused kernels have no forward-mode derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)  # torch's own use
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.no_grad()
def features(network: Network, pixels: Tensor, batch_size: int) -> Tensor:
    """(N, 3, H, W) in [0, 1] → (N, d) float64 on the CPU."""
    device = network.device
    parts = [network.features(batch.to(device)).cpu().double() for batch in torch.split(pixels, batch_size)]
    return _finite(torch.cat(parts), "features")


own_features = lru_cache(maxsize=1)(features)  # of the marking network, kept for the next suspect


def log_probabilities(logits: Tensor) -> Tensor:
    """(B, C') logits → log-probabilities; a single output is a sigmoid's. FloatingPointError unless all are finite."""
    single = logits.shape[1] == 1
    return F.pad(_finite(logits, "outputs"), (0, int(single))).log_softmax(1)[:, : logits.shape[1]]


def log_odds(logits: Tensor, outputs: Tensor) -> Tensor:
    """(B, C') logits, an output (B,) of each → (B,): log p/(1 − p) of it. FloatingPointError unless all are finite.

    Its gradient has the direction of log p's, and does not vanish where 1 − p is lost to rounding: otherwise whoever
    multiplies the last layer by a constant, which changes no decision, would silence it.
    """
    scores = F.pad(_finite(logits, "outputs"), (0, int(logits.shape[1] == 1)))  # (B, C') or (B, 2)
    others = scores.scatter(1, outputs[:, None], -math.inf).logsumexp(1)  # (B,)
    return scores.gather(1, outputs[:, None])[:, 0] - others


@torch.no_grad()
def log_answers(network: Network, pixels: Tensor, batch_size: int) -> Tensor:
    """(N, 3, H, W) in [0, 1] → log-probabilities (N, C') float64 on the CPU."""
    device = network.device
    parts = [log_probabilities(network(x.to(device)).cpu().double()) for x in torch.split(pixels, batch_size)]
    return torch.cat(parts)


def _finite(values: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError(f"its {what} are not finite for some images")
    return values


def _ridge(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """M (d, k) with y ≈ x·M, for x (N, d) and y (N, k) float64; penalty relative to the Gram matrix's mean diagonal."""
    gram = x.T @ x  # (d, d)
    gram.diagonal().add_(penalty * float(gram.diagonal().mean()) + 1e-12)
    solution: Tensor = torch.linalg.solve(gram, x.T @ y)
    return solution


def aligned_rows(phi: Tensor, psi: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The suspect's class rows carried into the marking space: w_c = M·W_c with ψ ≈ φ·M (section 4.4).

    phi (N, d), psi (N, k), weight (C, k) float64. ridge is relative to the Gram matrix's mean diagonal; 0 is the
    paper's least squares (minimum norm, so rank-deficient features do no harm). Returns (C, d) and R² of the fit.
    """
    matrix = _ridge(phi, psi, ridge) if ridge else torch.linalg.lstsq(phi, psi, driver="gelsd").solution  # (d, k)
    spread = float((psi - psi.mean(0)).square().sum())
    r2 = 1 - float((psi - phi @ matrix).square().sum()) / spread if spread > 0 else 0.0
    return weight @ matrix.T, r2


class Answer(NamedTuple):
    """What one network answers for its classes. All float64."""

    response: Tensor  # (C, d), in the space of φ
    pattern: Tensor  # (C, m), in the patterns' space
    scatter: Tensor  # (m, m), how single images' parts in it vary within a class: their covariance


def responses(
    marker: Network,
    suspect: nn.Module,
    pixels: Tensor,
    outputs: Sequence[int],
    batch_size: int,
    labels: Tensor,
    places: Tensor | None = None,
) -> Answer:
    """Which way φ, and the pattern, move when an image moves up the suspect's gradient for a class.

    r_c = mean over x of J_φ(x)·g / ‖J_φ(x)·g‖ with g = ∇_x `log_odds` of class c: (N, 3, H, W) in [0, 1] → (C, d)
    float64, and the mean over x of g / ‖g‖ in the patterns' space: (C, m) float64, with its terms' covariance. The mean
    is over the images of class c, by labels (N,), positions in `outputs`. With places (N',) those images are taken, and
    the labels are theirs. It asks for no alignment, no linear head and no features of the suspect.
    """
    device = marker.device
    total, seen = torch.zeros(len(outputs), marker.dimension, dtype=torch.float64), []
    column = torch.tensor(list(outputs))
    places = torch.arange(len(pixels)) if places is None else places
    with _forward_mode():
        for part, classes in zip(torch.split(places, batch_size), torch.split(labels, batch_size), strict=True):
            x = pixels[part].to(device).requires_grad_()
            surer = log_odds(suspect(x), column[classes].to(device))  # (B,)
            (g,) = torch.autograd.grad(surer.sum(), x)
            g = torch.nan_to_num(g, 0.0, 0.0, 0.0)  # an overflowing gradient has no direction to tell of
            g = g / g.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-30)  # or its square might underflow
            g = g / g.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
            pushed = torch.func.jvp(marker.features, (x.detach(),), (g,))[1]  # (B, d)
            seen.append(pattern_coefficients(g))  # (B, m)
            total.index_add_(0, classes, F.normalize(pushed.detach().cpu().double(), dim=1))
    count = torch.bincount(labels, minlength=len(outputs)).clamp_min(1)[:, None]  # (C, 1)
    parts = torch.cat(seen)  # (N', m)
    pattern = total.new_zeros(len(outputs), PATTERN_DIMENSION).index_add_(0, labels, parts) / count
    rest = parts - pattern[labels]
    return Answer(response=total / count, pattern=pattern, scatter=rest.T @ rest / len(rest))


def likeliest(answers: Tensor, outputs: Sequence[int], count: int) -> Tensor:
    """(C, count) places of the images that the suspect most takes for each class, by its log-probabilities (N, C').

    Of images without labels, they answer best. It looks at the suspect alone, never at a carrier.
    """
    return answers[:, list(outputs)].topk(min(count, len(answers)), dim=0).indices.T


def images_a_class(classes: int, size: int) -> int:
    """How many images without labels are asked about each class; of many classes fewer, and of large images."""
    few = min(FEW, MANY // classes) if size <= SMALL else 0
    return max(8, few, min(LIKELIEST, GRADIENTS // classes))


def contrasted(rows: Tensor) -> Tensor:
    """Rows (C, d) minus (1 − 2/C) times their mean: what all classes have alike is mostly what any network answers.

    Of few classes less is taken, as much of their mean is each one's own mark. Rows of zeros stay, and do not count.
    """
    alive = rows.any(dim=1, keepdim=True)  # (C, 1)
    count = max(2, int(alive.sum()))
    shared: Tensor = alive * rows.sum(0) * (1 - 2 / count) / count
    return rows - shared


def whitening(scatter: Tensor) -> Tensor:
    """(S/s + I)^(−½), (m, m), for a covariance S of mean variance s: what varies from image to image counts less.

    A network's answers are loudest where natural images vary, and that is noise here. S comes from the suspect alone.
    """
    mean = float(scatter.diagonal().mean())  # of parts of unit vectors: below 1e-12 it is what rounding leaves
    values, vectors = torch.linalg.eigh(scatter / max(mean, 1e-12))
    found: Tensor = (vectors * (values.clamp_min(0) + 1).rsqrt()) @ vectors.T
    return found


def project_own(rows: Tensor, own: Tensor) -> Tensor:
    """Rows (C, d) less their part along the same class's row of `own` (C, d)."""
    directions = F.normalize(own, dim=1)
    remainder: Tensor = rows - (rows * directions).sum(1, keepdim=True) * directions
    return remainder


own_responses = lru_cache(maxsize=4)(responses)  # of the marking network, kept for the next suspect


class OnFeatures(nn.Module):
    """A linear classifier on φ's features, rows (K, d): what an ordinary network would answer for the classes."""

    def __init__(self, marker: Network, rows: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.marker, self.rows, self.bias = marker, rows, bias

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] → logits (B, K)."""
        seen = self.marker.features(pixels)  # (B, d)
        return F.linear(seen, self.rows.to(seen), None if self.bias is None else self.bias.to(seen))


@lru_cache(maxsize=4)
@torch.no_grad()
def known_network(marker: Network, known: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    """φ as a classifier of some of its outputs alone, and its rows (K, d) of them; kept for the next suspect.

    What tells these from φ's other classes is mostly nothing that the suspect has learnt.
    """
    head = marker.head
    assert head is not None
    rows = head.weight[list(known)]
    rows = rows - rows.mean(0)  # which its softmax does not see
    bias = None if head.bias is None else head.bias[list(known)]
    return OnFeatures(marker, rows, bias), rows.cpu().double()


@torch.no_grad()
def ordinary_rows(phi: Tensor, targets: Tensor) -> Tensor:
    """Ridge regression of targets (N, C) on features phi (N, d), both float64 and centred here: rows (C, d)."""
    return _ridge(phi - phi.mean(0), targets - targets.mean(0), RIDGE_ORDINARY).T


@lru_cache(maxsize=4)
def labelled_network(marker: Network, phi: Tensor, labels: Tensor, classes: int) -> tuple[nn.Module, Tensor]:
    """A linear classifier of labelled images on φ's features (N, d), and its rows (C, d); kept for the next suspect."""
    rows = ordinary_rows(phi, (labels[:, None] == torch.arange(classes)).double())
    return OnFeatures(marker, _or_none(rows)), rows


def _or_none(rows: Tensor) -> Tensor:
    """(C, d) → (C + 1, d): the last output is zero, for none of the classes."""
    return F.pad(rows, (0, 0, 0, 1))


def ordinary_network(
    marker: Network,
    phi: Tensor,
    answers: Tensor,
    outputs: Sequence[int],
    labels: Tensor | None,
    own: Sequence[int] | None,
    others: Sequence[int] = (),
) -> tuple[nn.Module, tuple[int, ...], Tensor | None]:
    """Who answers for a network that has never seen a mark, its outputs for the classes, and its rows (C, d).

    The marking network itself, where it knows the classes (`own`). Its rows are as if it knew only these and `others`,
    which the suspect knows but which are not compared. Without labels its answers are so, too: those to images of no
    class would mostly tell these classes from φ's others, which the suspect has never seen.
    Elsewhere a linear classifier on its features phi (N, d), of labelled images (unless all are of one class) or of the
    suspect's log-probabilities, answers (N, C'). The latter's rows are None: they are all that there is to a suspect
    whose features are φ's.
    """
    every = tuple(range(len(outputs)))
    if own is not None and marker.head is not None:
        if len(own) + len(others) == 1:
            return marker, tuple(own), marker.head.weight.cpu().double()[list(own)]
        network, rows = known_network(marker, (*own, *others))
        return (network, every, rows[: len(own)]) if labels is None else (marker, tuple(own), rows[: len(own)])
    if labels is not None and bool((labels != labels[0]).any()):
        network, rows = labelled_network(marker, phi, labels, len(outputs))
        return network, every, rows
    return OnFeatures(marker, _or_none(ordinary_rows(phi, answers[:, list(outputs)].exp()))), every, None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What was computed from one suspect without the carriers: class vectors in the marking space."""

    declared: Tensor  # (C, d) float64, to be compared with u
    paper: Tensor | None  # (C, d) float64; None without a linear head
    r2: float | None  # of the least-squares alignment
    classes: tuple[int, ...]  # carrier row of each vector
    pattern: Tensor | None = None  # (C, m) float64, to be compared with v


def suspect_rows(
    marker: Network,
    suspect: Network,
    pixels: Tensor,
    pairs: Sequence[tuple[int, int]],
    batch_size: int = 64,
    *,
    labels: Tensor | None = None,
    own: Sequence[int] | None = None,
    others: Sequence[int] = (),
    answers: Tensor | None = None,
) -> Rows:
    """The declared statistic's vectors and the paper's, for (suspect output, carrier row) pairs. Carriers play no part.

    pixels: (N, 3, H, W) in [0, 1], unmarked, with labels (N,), positions in `pairs` or −1 for other classes, or none:
    then the images that the suspect itself takes for a class serve its response. All serve the alignment. `own`: the
    marking network's outputs for the same classes, `others`: for those that the suspect knows besides and that are not
    compared. `answers`: `log_answers` of the suspect, if they are known. What the classes share is taken off
    (`contrasted`), the pattern whitened, and what an ordinary network answers removed, class by class
    (`ordinary_network`). FloatingPointError where the suspect's outputs or features are not finite.
    """
    outputs, phi = [output for output, _ in pairs], own_features(marker, pixels, batch_size)  # (N, d)
    places, (penalty, share) = None, RIDGE_UNLABELLED if labels is None else RIDGE_LABELLED
    answers = log_answers(suspect, pixels, batch_size) if answers is None else answers  # (N, C')
    ordinary, their_outputs, their_rows = ordinary_network(marker, phi, answers, outputs, labels, own, others)
    if labels is None:
        chosen = likeliest(answers, outputs, images_a_class(len(outputs), pixels.shape[3]))  # (C, n)
        places, labels = chosen.flatten(), torch.arange(len(outputs)).repeat_interleave(chosen.shape[1])
    elif bool((labels < 0).any()):
        places = torch.nonzero(labels >= 0)[:, 0]
        labels = labels[places]
    answer = responses(marker, suspect, pixels, outputs, batch_size, labels, places)
    ours = (responses if places is not None else own_responses)(
        marker, ordinary, pixels, their_outputs, batch_size, labels, places
    )
    white = whitening(answer.scatter)
    pattern = project_own(contrasted(answer.pattern) @ white, contrasted(ours.pattern) @ white)  # (C, m)
    declared = F.normalize(project_own(contrasted(answer.response), contrasted(ours.response)), dim=1)  # (C, d)
    paper, r2 = None, None
    if suspect.head is not None:
        psi, weight = features(suspect, pixels, batch_size), suspect.head.weight.cpu().double()[outputs]
        paper, r2 = aligned_rows(phi, psi, weight, 0.0)
        ridge = contrasted(aligned_rows(phi, psi, weight, penalty)[0])
        ridge = ridge if their_rows is None else project_own(ridge, contrasted(their_rows))
        declared = declared + share * F.normalize(ridge, dim=1)
    return Rows(declared=declared, pattern=pattern, paper=paper, r2=r2, classes=tuple(row for _, row in pairs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a key says of a suspect."""

    log_p: float  # natural log, of the declared statistic
    paper_log_p: float | None
    mean_cosine: float  # of the declared vectors with the feature carriers
    pattern_cosine: float | None  # of the pattern vectors with the patterns
    per_class: tuple[float, ...]  # natural-log p of each class that has a direction, in the rows' order


def output_unknown(rows: Rows) -> bool:
    """Whether all of several vectors face the same one carrier: which output the class became is not known."""
    return len(rows.classes) > 1 and len(set(rows.classes)) == 1


def evidence(rows: Rows, carriers: Tensor, patterns: Tensor | None = None) -> Evidence:
    """Test the vectors against carriers (C', d) and patterns (C', m): exact per-class p-values, combined.

    Where every vector is paired with the same one carrier, a single class was marked and which of the suspect's outputs
    it became is not known: the smallest p-value then counts, times the number of outputs (Bonferroni).
    """
    places = list(rows.classes)
    parts = [_class_log_p(rows.declared, carriers[places])]
    if rows.pattern is not None and patterns is not None:
        parts.append(_class_log_p(rows.pattern, patterns[places]))
    alive = np.stack([part.alive for part in parts])  # (1 or 2, C)
    if not alive.any():
        raise RadiotagError("the suspect's outputs do not depend on its input")
    log_p = np.where(alive, [part.log_p for part in parts], 0.0)  # (1 or 2, C)
    chosen = pattern_or_both(log_p[-1], log_p[0])
    per_class = np.where(alive.sum(0) == 2, chosen, log_p.sum(0))[alive.any(0)]
    one = output_unknown(rows)
    paper = None
    if rows.paper is not None:
        found = _class_log_p(rows.paper, carriers[places])
        known = found.log_p[found.alive]
        paper = 0.0 if not len(known) else bonferroni(known) if one else fisher(known)
    combined = np.array([stouffer(part.log_p[part.alive]) for part in parts if part.alive.any()])  # (1 or 2,)
    whole = float(pattern_or_both(combined[1], combined[0]) if len(combined) > 1 else combined[0])
    means = [float(part.cosine[part.alive].mean()) if part.alive.any() else 0.0 for part in parts]
    return Evidence(
        log_p=bonferroni(per_class) if one else whole,
        paper_log_p=paper, mean_cosine=means[0], pattern_cosine=means[1] if len(means) > 1 else None,
        per_class=tuple(per_class.tolist()),
    )  # fmt: skip


class _Classes(NamedTuple):
    """Of each class (C,): cosine, natural log of its exact p-value, and whether there is a direction at all.

    Rows of zeros (a dead output has no direction) say nothing. Leaving them out looks at the suspect alone, so that
    the remaining p-values stay exact.
    """

    cosine: Floats
    log_p: Floats
    alive: NDArray[np.bool_]


def _class_log_p(rows: Tensor, carriers: Tensor) -> _Classes:
    """Compare (C, d) with (C, d)."""
    alive = (rows.norm(dim=1) > 0).numpy()
    cosine: Floats = F.cosine_similarity(rows, carriers.double(), dim=1, eps=1e-300).clamp(-1, 1).numpy()
    return _Classes(cosine=cosine, log_p=cosine_log_sf(cosine, carriers.shape[1]), alive=alive)
