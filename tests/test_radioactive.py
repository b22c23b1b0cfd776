"""The science against independent oracles: mpmath, closed forms, brute force, finite differences and simulation."""

import itertools
import math
import random
import time
import warnings
from contextlib import nullcontext
from statistics import NormalDist
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from helpers import Toy, binomial_limits, by_cosines, entropy, gaussian, linear, unit
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize, stats

from radiotag import radioactive
from radiotag.cosines import PATTERN_DIMENSION, pattern_coefficients, pattern_images, tilt
from radiotag.errors import RadiotagError
from radiotag.radioactive import (
    ImageToMark,
    Marking,
    cosine_log_sf,
    default_psnr,
    default_share,
    default_tilt,
    evidence,
    fisher,
    holm,
    l2_radius,
    mark_images,
    marking_loss,
    pattern_or_both,
    project,
    random_crop,
    resampled_log_p,
    stouffer,
    uniform_carriers,
    visibility_mask,
)
from radiotag.suspect import ClassVectors

LN10 = math.log(10)
INSIDE = math.nextafter(1.0, 0.0)  # the largest cosine below 1

unhurried = settings(deadline=None)  # the machine may be busy


# ---------------------------------------------------------------- the law of a cosine


def exact_log_sf(cosine, dimension):
    with mpmath.workdps(60):
        t = mpmath.mpf(cosine)
        tail = mpmath.betainc(mpmath.mpf(dimension - 1) / 2, 0.5, 0, 1 - t * t, regularized=True) / 2
        return float(mpmath.log(tail) if t >= 0 else mpmath.log1p(-tail))


COSINES = [-0.99, -0.5, -0.1, -1e-3, 0.0, 1e-9, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999]
COSINES += [1 - 1e-6, 1 - 1e-9, 1 - 1e-12]


@pytest.mark.parametrize("dimension", [2, 3, 10, 512, 4096])
def test_cosine_law_is_the_incomplete_beta_function(dimension):
    exact = np.array([exact_log_sf(t, dimension) for t in COSINES])
    found = cosine_log_sf(np.array(COSINES), dimension)
    small = np.abs(COSINES) < 1e-4  # in 1 − t² a cosine has half of its digits: it may be off by 1e-8
    assert found[~small] == pytest.approx(exact[~small], rel=1e-11, abs=1e-300)
    assert found[small] == pytest.approx(exact[small], abs=2e-8 * math.sqrt(dimension))
    if dimension == 4096:  # the smallest double is 1e-324
        assert exact.min() / LN10 < -10_000
    one_by_one = np.concatenate([cosine_log_sf(t, dimension) for t in COSINES])
    assert np.array_equal(one_by_one, found)


@pytest.mark.parametrize("dimension", [512, 4096])
def test_cosine_law_is_seamless_where_linear_space_ends(dimension):
    """Across the change of method: p from 1e-260 to 1e-330."""
    low, high = {512: (0.951, 0.976), 4096: (0.49, 0.565)}[dimension]
    t = np.linspace(low, high, 200)
    found = cosine_log_sf(t, dimension)
    assert found[0] > -270 * LN10 and found[-1] < -324 * LN10
    assert found == pytest.approx([exact_log_sf(v, dimension) for v in t], rel=1e-11)
    assert (np.diff(found) < 0).all()


def test_cosine_law_in_the_plane_and_in_space_is_elementary():
    t = np.linspace(-0.999, 0.999, 400)  # from 0.0025 up: none where 1 − t² rounds to 1
    assert np.exp(cosine_log_sf(t, 2)) == pytest.approx(np.arccos(t) / math.pi, rel=1e-12)
    assert np.exp(cosine_log_sf(t, 3)) == pytest.approx((1 - t) / 2, rel=1e-12)
    near = np.array([0.0, -0.0, 1e-300, -1e-12, 1e-12, 1e-9])
    assert np.exp(cosine_log_sf(near, 2)) == pytest.approx(np.arccos(near) / math.pi, abs=1e-8)


@unhurried
@given(
    cosines=st.lists(st.floats(-1, 1), min_size=2, max_size=8),
    dimension=st.integers(2, 5000),
)
def test_cosine_law_decreases(cosines, dimension):
    t = np.sort(cosines)
    found = cosine_log_sf(t, dimension)
    assert np.isfinite(found).all() and (found <= 0).all()
    assert (np.diff(found) <= 1e-12 * np.abs(found[1:])).all()
    apart = (np.diff(t) > 1e-3) & (found[1:] < -1e-10)
    assert (np.diff(found)[apart] < 0).all()


@unhurried
@given(cosine=st.floats(-1, 1), dimension=st.integers(2, 5000))
@example(cosine=0.0, dimension=2)
def test_cosine_law_is_symmetric(cosine, dimension):
    both = np.exp(cosine_log_sf(np.array([cosine, -cosine]), dimension))
    assert both.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("dimension", [2, 5, 512])
def test_cosine_law_is_that_of_random_directions(dimension):
    directions = np.random.default_rng(dimension).standard_normal((20_000, dimension))
    fixed = unit(np.arange(1.0, dimension + 1))
    p = np.exp(cosine_log_sf(unit(directions) @ fixed, dimension))
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    for a in (0.3, 0.03, 0.003):
        low, high = binomial_limits(len(p), a)
        assert low <= (p <= a).sum() <= high


@pytest.mark.parametrize("dimension", [2, 3, 512, 4096])
def test_a_cosine_of_one_is_the_nearest_float_inside(dimension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cosine_log_sf(1.0, dimension) == pytest.approx(cosine_log_sf(INSIDE, dimension), rel=1e-12)
        assert cosine_log_sf(1.0, dimension) == pytest.approx(exact_log_sf(INSIDE, dimension), rel=1e-11)
        assert cosine_log_sf(-1.0, dimension) == pytest.approx(exact_log_sf(-INSIDE, dimension), abs=1e-15)


def test_cosine_law_refuses_what_has_none():
    for cosine in (math.nan, np.array([0.1, math.nan])):
        with pytest.raises(ValueError, match="numbers"):
            cosine_log_sf(cosine, 8)
    with pytest.raises(ValueError, match="dimension"):
        cosine_log_sf(0.1, 1)


def test_cosine_law_keeps_the_shape():
    t = np.linspace(-0.9, 0.9, 12)
    assert np.array_equal(cosine_log_sf(t.reshape(3, 4), 16), cosine_log_sf(t, 16).reshape(3, 4))


def test_cosine_law_of_a_thousand_classes_takes_no_time():
    """Under the null the cosines are near zero, where the series in logs (for extreme tails) converges slowly."""
    cosines = np.random.default_rng(0).normal(0, 512**-0.5, 1000)
    start = time.process_time()
    cosine_log_sf(cosines, 512)
    assert time.process_time() - start < 1


# ---------------------------------------------------------------- combining


@unhurried
@given(st.lists(st.floats(1e-12, 1), min_size=1, max_size=20))
def test_combinations_are_scipys_where_those_reach(p):
    log_p = np.log(p)
    assert math.exp(fisher(log_p)) == pytest.approx(stats.combine_pvalues(p, "fisher").pvalue, rel=1e-9)
    inner = np.minimum(p, 1 - 1e-9)
    expected = stats.combine_pvalues(inner, "stouffer").pvalue
    assert math.exp(stouffer(np.log(inner))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("log10_sum", [-0.5, -20, -300, -1000, -10_000])
def test_fisher_is_the_incomplete_gamma_function(classes, log10_sum):
    log_p = np.random.default_rng(classes).dirichlet(np.ones(classes)) * log10_sum * LN10
    with mpmath.workdps(60):
        tail = mpmath.gammainc(classes, -mpmath.fsum(map(float, log_p)), regularized=True)
        exact = float(mpmath.log(tail))
    # Where p is nearly 1 its logarithm is a rounding error.
    assert fisher(log_p) == pytest.approx(exact, rel=1e-10, abs=1e-11)
    assert fisher(log_p) <= 0


def exact_log_normal_sf(score):
    tail = mpmath.erfc(abs(score) / mpmath.sqrt(2)) / 2
    return mpmath.log(tail) if score >= 0 else mpmath.log1p(-tail)


SCORES = [[40.0], [2.0, 3.0], [38.0, 39.0, 37.5], [-3.0, 5.0], [60.0, -30.0, 1.0], [150.0] * 10, [68.0] * 1000]


@pytest.mark.parametrize("scores", SCORES, ids=lambda s: f"{len(s)} of {s[0]:g}")
def test_stouffer_is_the_normal_law_of_summed_scores(scores):
    """From exact scores to log p and back, so that the oracle inverts nothing."""
    with mpmath.workdps(60):
        log_p = np.array([float(exact_log_normal_sf(mpmath.mpf(z))) for z in scores])
        exact = float(exact_log_normal_sf(mpmath.fsum(scores) / mpmath.sqrt(len(scores))))
    assert stouffer(log_p) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("log10_p", [-1e-12, -0.01, -0.3, -1, -10, -307, -400, -1e4, -1e6])
def test_one_p_value_combines_to_itself(log10_p):
    log_p = np.array([log10_p * LN10])
    assert fisher(log_p) == pytest.approx(log_p[0], rel=1e-12)
    assert stouffer(log_p) == pytest.approx(log_p[0], rel=1e-9)


@pytest.mark.parametrize("classes", [1, 7, 1000])
def test_p_values_of_one_are_no_evidence(classes):
    assert fisher(np.zeros(classes)) == fisher(np.full(classes, -0.0)) == 0
    assert stouffer(np.zeros(classes)) == pytest.approx(0, abs=1e-290)
    assert stouffer(np.array([-9.0] + [0.0] * classes)) >= stouffer(np.array([-9.0] + [-0.1] * classes)) > -9
    mixed = np.array([-5.0] + [0.0] * classes)
    assert fisher(mixed) == pytest.approx(stats.chi2.logsf(10, 2 * classes + 2), rel=1e-9, abs=1e-12)
    assert math.isfinite(stouffer(mixed)) and stouffer(mixed) > -1e-9


@pytest.mark.parametrize("log10_q", [0, -0.3, -4, -300])
@pytest.mark.parametrize("log10_p", [0, -1e-9, -0.3, -4, -40, -300, -1e4])
def test_the_pattern_or_both_is_an_area_of_the_unit_square(log10_p, log10_q):
    """P(p ≤ t or pq ≤ k): Lambert's function with sixty digits, and the width min(1, k/p) by quadrature (in log p)."""
    p, q = log10_p * LN10, log10_q * LN10
    with mpmath.workdps(60):
        product = mpmath.exp(mpmath.mpf(p) + mpmath.mpf(q))
        t = min(mpmath.exp(p), product * (1 - mpmath.log(product)))
        k = mpmath.exp(1 + mpmath.lambertw(-t / mpmath.e, -1).real) if t < 1 else mpmath.mpf(1)
        start = mpmath.log(t)
        area = t + mpmath.quad(lambda u: mpmath.exp(u) * min(1, k / mpmath.exp(u)), [start, start / 2, 0])
        exact = float(mpmath.log(area))
    found = float(pattern_or_both(np.array(p), np.array(q)))
    assert found == pytest.approx(exact, rel=1e-9, abs=1e-7)
    assert float(mpmath.log(t)) - 1e-9 <= found <= min(0, float(mpmath.log(2 * t))) + 1e-9


def test_the_pattern_or_both_is_exact_under_the_null():
    p = -np.random.default_rng(3).exponential(size=(2, 200_000))  # logs of independent uniform p-values
    assert_uniform(np.exp(pattern_or_both(*p)), "pattern or both")


@unhurried
@given(st.floats(-1e4, 0), st.floats(-1e4, 0), st.floats(0, 10))
def test_the_pattern_or_both_grows_with_either(p, q, more):
    found = pattern_or_both(np.array([p, p - more, p]), np.array([q, q, q - more]))
    assert np.isfinite(found).all() and (found <= 0).all()
    assert (found[1:] <= found[0] + 1e-7).all()


@unhurried
@given(st.lists(st.floats(-1e4, 0), min_size=1, max_size=30))
def test_combinations_are_probabilities(log_p):
    for combine in (fisher, stouffer):
        found = combine(np.array(log_p))
        assert math.isfinite(found) and found <= 0
        assert found == pytest.approx(combine(np.array(log_p[::-1])), rel=1e-9, abs=1e-12)
        assert combine(np.array([log_p[0] - 1, *log_p[1:]])) <= found + 1e-12


def holm_by_definition(log_p):
    """The smallest level at which Holm's step-down procedure, run literally, rejects each hypothesis."""
    m = len(log_p)
    levels = sorted({0.0, *(v + math.log(k) for v in log_p for k in range(1, m + 1))})
    smallest = [0.0] * m  # at level 1 all are rejected
    for level in reversed([v for v in levels if v <= 0]):
        left = set(range(m))
        while left:
            best = min(left, key=lambda i: log_p[i])
            if log_p[best] + math.log(len(left)) > level:
                break
            left.remove(best)
            smallest[best] = level
    return smallest


@unhurried
@given(st.lists(st.floats(-50, 0) | st.sampled_from([-1.0, -3.0, 0.0]), max_size=8))
def test_holm_is_the_smallest_level_that_rejects(log_p):
    corrected = holm(log_p)
    assert corrected == holm_by_definition(log_p)
    assert all(c >= p for c, p in zip(corrected, log_p, strict=True))
    ranked = [corrected[i] for i in np.argsort(log_p, kind="stable")]
    assert ranked == sorted(ranked)


def test_holm_by_hand():
    found = np.exp(holm(np.log([0.01, 0.04, 0.03, 0.005]).tolist()))
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])


# ---------------------------------------------------------------- carriers


def test_carriers_are_normalised_gaussian_quantiles_of_the_entropy():
    asked, read = [], entropy("quantiles")

    def recorded(count):
        asked.append((count, read(count)))
        return asked[-1][1]

    carriers = uniform_carriers(7, 24, recorded)
    assert (carriers.dtype, tuple(carriers.shape)) == (torch.float32, (7, 24))
    assert [count for count, _ in asked] == [8 * 7 * 24]
    words = np.frombuffer(asked[0][1], np.uint64).tolist()
    normal = np.array([NormalDist().inv_cdf((word + 0.5) / 2**64) for word in words]).reshape(7, 24)
    assert carriers.numpy() == pytest.approx(unit(normal), rel=1e-5, abs=1e-7)
    assert carriers.double().norm(dim=1).numpy() == pytest.approx(np.ones(7), abs=1e-6)


def test_every_word_of_entropy_counts():
    data = bytearray(entropy("words")(8 * 3 * 5))
    before = uniform_carriers(3, 5, lambda _: bytes(data))
    for word in range(15):
        changed = bytearray(data)
        changed[8 * word + 4] ^= 0x80  # a bit in the middle
        moved = (uniform_carriers(3, 5, lambda _, c=changed: bytes(c)) != before).any(1)
        assert moved.tolist() == [row == word // 5 for row in range(3)]


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_carriers_are_unit_vectors_whatever_the_entropy(byte):
    carriers = uniform_carriers(2, 9, lambda count: byte * count)
    assert carriers.double().norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("dimension", [2, 3, 16])
def test_carriers_are_uniform_on_the_sphere(dimension):
    carriers = uniform_carriers(5000, dimension, entropy(f"uniform {dimension}")).double().numpy()
    marginal = stats.beta((dimension - 1) / 2, (dimension - 1) / 2, loc=-1, scale=2)
    oblique = unit(np.arange(1.0, dimension + 1))
    for coordinate in [*carriers.T, carriers @ oblique]:
        assert stats.kstest(coordinate, marginal.cdf).pvalue > 1e-4
    covariance = carriers.T @ carriers / len(carriers)
    assert np.abs(covariance - np.eye(dimension) / dimension).max() < 5 / math.sqrt(len(carriers)) / dimension


def test_carriers_are_independent_of_one_another():
    carriers = uniform_carriers(200, 512, entropy("independent")).double().numpy()
    cosines = (carriers @ carriers.T)[np.triu_indices(200, 1)]
    assert np.abs(cosines).max() < 6 / math.sqrt(512)
    assert stats.kstest(cosines, stats.beta(255.5, 255.5, loc=-1, scale=2).cdf).pvalue > 1e-3
    first, second = uniform_carriers(2, 512), uniform_carriers(2, 512)
    assert float((first @ second.T).abs().max()) < 0.5


# ---------------------------------------------------------------- loss, crops and balls


def test_loss_is_the_gain_of_equation_six():
    features, carriers = gaussian(5, 7, seed=1), gaussian(5, 7, seed=2)
    f, u = features.requires_grad_(), carriers.numpy()
    loss = marking_loss(f, carriers)
    assert loss.tolist() == pytest.approx(
        [-sum(a * b for a, b in zip(f[i].tolist(), u[i], strict=True)) for i in range(5)]
    )
    (gradient,) = torch.autograd.grad(loss.sum(), f)
    assert torch.equal(gradient, -carriers)


@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (500, 500)])
def test_crops_keep_to_their_limits(shape):
    marking, draw = Marking(), random.Random(3)
    crops = [random_crop(*shape, draw, marking) for _ in range(3000)]
    top, left, h, w, flip = np.array(crops).T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= shape[0]).all() and (left + w <= shape[1]).all()
    share, ratio = h * w / (shape[0] * shape[1]), w / h
    assert share.min() > 0.395 and share.max() < 1.005 and share.min() < 0.42
    assert ratio.min() > 0.745 and ratio.max() < 1.34 and ratio.min() < 0.78 and ratio.max() > 1.29
    low, high = binomial_limits(3000, 0.5)
    assert low <= flip.sum() <= high
    room = shape[0] - h  # the position is uniform on 0..room
    where = ((top + np.random.default_rng(1).random(len(top))) / (room + 1))[room > 0]
    assert stats.kstest(where, "uniform").pvalue > 1e-3
    assert all(type(v) is int for v in crops[0][:4]) and isinstance(crops[0][4], bool)


def test_crops_have_uniform_area_and_log_ratio():
    marking, draw = Marking(crop_scale=(0.1, 0.4), crop_ratio=(0.5, 2.0)), random.Random(4)
    crops = np.array([random_crop(2000, 2000, draw, marking) for _ in range(3000)], float)
    h, w = crops[:, 2], crops[:, 3]
    assert stats.kstest(h * w / 2000**2, stats.uniform(0.1, 0.3).cdf).pvalue > 1e-3
    assert stats.kstest(np.log2(w / h), stats.uniform(-1, 2).cdf).pvalue > 1e-3


@unhurried
@given(height=st.integers(1, 70), width=st.integers(1, 70), seed=st.integers(0, 1000))
@example(height=1, width=1, seed=0)
@example(height=1, width=70, seed=0)
def test_crops_of_any_image_lie_inside(height, width, seed):
    top, left, h, w, _ = random_crop(height, width, random.Random(seed), Marking())
    assert min(top, left) >= 0 and min(h, w) >= 1 and top + h <= height and left + w <= width


@unhurried
@given(
    values=st.lists(st.floats(-300, 300, width=32), min_size=3, max_size=60),
    radius=st.floats(0.01, 1000),
    epsilon=st.floats(0.1, 50),
)
def test_projection_meets_both_balls(values, radius, epsilon):
    delta = torch.tensor(values, dtype=torch.float32)
    found = project(delta.clone(), radius, epsilon)  # in place
    length = math.sqrt(sum(v * v for v in delta.tolist()))
    assert math.sqrt(sum(v * v for v in found.tolist())) <= radius * (1 + 1e-5)
    assert float(found.abs().max()) <= epsilon * (1 + 1e-6)
    if length < radius * (1 - 1e-5) and float(delta.abs().max()) <= epsilon:
        assert torch.equal(found, delta)
    shrink = min(1, radius / length) if length else 1
    expected = np.clip(delta.double().numpy() * shrink, -epsilon, epsilon)
    assert found.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def psnr(a, b):
    return 10 * math.log10(255**2 / float((a.double() - b.double()).square().mean()))


@pytest.mark.parametrize(
    ("shape", "wanted"), [((3, 32, 32), 34), ((3, 64, 200), 34), ((3, 224, 300), 40), ((1, 9, 7), 34)]
)
def test_radius_is_that_of_the_psnr(shape, wanted):
    image, direction = torch.full(shape, 128.0), gaussian(*shape)
    for marking, expected in ((Marking(), wanted), (Marking(min_psnr=37.5), 37.5), (Marking(min_psnr=0.0), 0.0)):
        delta = direction / direction.norm() * l2_radius(image, marking)
        assert psnr(image, image + delta) == pytest.approx(expected, abs=1e-9)


def test_default_psnr_rises_with_the_shorter_side():
    assert [default_psnr(s, 500) for s in (1, 32, 64)] == [34.0] * 3
    assert [default_psnr(500, s) for s in (224, 300, 500)] == pytest.approx([40.0] * 3)
    assert default_psnr(0, 0) == 34
    sides = [default_psnr(s, s) for s in range(1, 400)]
    assert sides == sorted(sides)
    assert default_psnr(96, 2000) == default_psnr(2000, 96) == pytest.approx(34 + 6 * math.log(1.5) / math.log(3.5))


# ---------------------------------------------------------------- marking images


WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}  # F only flips, and takes a square of an oblong


def photos(count, seed=0):
    """Images of mixed sizes, in whole numbers; some pixels at the ends of the range."""
    rng = np.random.default_rng(seed)
    sizes = [(32, 32), (40, 33), (32, 32), (28, 45)]
    pixels = [rng.normal(128, 60, (3, *sizes[i % 4])).round().clip(0, 255) for i in range(count)]
    return [torch.from_numpy(p).float() for p in pixels]


def carriers_for(count, seed=1):
    return torch.from_numpy(unit(np.random.default_rng(seed).standard_normal((count, 512)))).float()


def to_mark(images, carriers, patterns=None, first=0):
    patterns = torch.zeros(len(images), PATTERN_DIMENSION) if patterns is None else patterns
    draws = (random.Random(f"{first + i}") for i in range(len(images)))
    return [
        ImageToMark(image=x, carrier=u, pattern=v, draw=draw)
        for x, u, v, draw in zip(images, carriers, patterns, draws, strict=True)
    ]


def marked_by(network, images, marking, read_back=None, first=0):
    carriers = carriers_for(50)[first : first + len(images)]
    return mark_images(network, to_mark(images, carriers, first=first), marking, read_back)


@torch.no_grad()
def gains(network, clean, marked):
    """⟨φ(x̃) − φ(x), u⟩ of whole images."""
    shifts = [
        (network.features(y[None] / 255) - network.features(x[None] / 255))[0]
        for x, y in zip(clean, marked, strict=True)
    ]
    return np.array([float(s @ u) for s, u in zip(shifts, carriers_for(50), strict=False)])


def test_marking_moves_features_along_the_carrier_within_the_limits(network):
    images = photos(8)
    copies = [x.clone() for x in images]
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    few, many = (marked_by(network, images, Marking(steps=n, reach=r, **WHOLE)) for n, r in ((2, 0.2), (8, 3.0)))
    tight = marked_by(network, images, Marking(steps=4, epsilon=2.0, min_psnr=30.0))
    for x, copy, y, small in zip(images, copies, many, tight, strict=True):
        assert torch.equal(x, copy)
        assert (y.dtype, y.shape, y.requires_grad) == (torch.float32, x.shape, False)
        for image in (y, small):
            assert float(image.min()) >= 0 and float(image.max()) <= 255
        assert float((y - x).abs().max()) <= 10 + 1e-4
        assert 34 - 1e-4 <= psnr(x, y) < 37  # the budget is kept, and used
        assert float((small - x).abs().max()) <= 2 + 1e-4 and psnr(x, small) >= 30
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name])
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    gain, more = gains(network, images, few), gains(network, images, many)
    assert gain.mean() > 0 and (more > 0).all() and more.mean() > 2 * gain.mean()
    # A random shift of the same size moves the features hardly at all along the carrier.
    noise = [
        x + (y - x).flatten()[torch.randperm(y.numel(), generator=torch.Generator().manual_seed(1))].view_as(x)
        for x, y in zip(images, many, strict=True)
    ]
    assert more.mean() > 5 * np.abs(gains(network, images, noise)).mean()


def test_marked_bytes_do_not_depend_on_the_batch(network):
    images, marking = photos(50), Marking(steps=2)
    together = marked_by(network, images, marking)
    for first, count in ((0, 1), (0, 3), (0, 16), (5, 17), (17, 33)):
        apart = marked_by(network, images[first : first + count], marking, first=first)
        for i in range(count):
            assert torch.equal(apart[i], together[first + i]), f"image {i} of {count}"


@pytest.mark.parametrize("posterise", [False, True])
def test_one_step_is_the_projected_gradient_at_what_a_reader_sees(network, posterise, monkeypatch):
    """steps = 1, the crop whole: the step is reach·radius along the gradient, computed here by hand."""
    monkeypatch.setattr(radioactive, "mixed_precision", lambda _: nullcontext())  # as a processor without bfloat16 does
    x, u = photos(1)[0], carriers_for(1)[0]
    seen = (x / 64).round() * 64 if posterise else x  # its own gradient is zero almost everywhere
    marking = Marking(steps=1, reach=0.5, **WHOLE)
    hook = (lambda images: [(y / 64).round() * 64 for y in images]) if posterise else None
    (found,) = marked_by(network, [x], marking, hook)
    flip = random_crop(32, 32, random.Random("0"), marking)[4]
    at = seen.clone().requires_grad_()
    view = (at.flip(2) if flip else at)[None] / 255
    (gradient,) = torch.autograd.grad(-network.features(view)[0] @ u, at)
    radius = 255 * 10 ** (-34 / 20) * math.sqrt(x.numel())
    expected = (x - (0.5 * radius * gradient / gradient.norm()).clamp(-10, 10)).clamp(0, 255)
    assert float((expected - x).norm()) > 0.3 * radius
    assert found.numpy() == pytest.approx(expected.numpy(), abs=2e-3)


def test_marks_made_in_bfloat16_gain_as_much(network, monkeypatch):
    """Whether or not this processor would use it: rounding turns the gradients, and must not weaken a mark."""
    images, made = photos(16), {}
    for half in (False, True):
        monkeypatch.setattr(
            radioactive, "mixed_precision", lambda _, half=half: torch.autocast("cpu", torch.bfloat16, enabled=half)
        )
        made[half] = marked_by(network, images, Marking(steps=12, **WHOLE))
    full, half = (gains(network, images, made[kind]).mean() for kind in (False, True))
    assert half == pytest.approx(full, rel=0.03)
    assert not all(torch.equal(a, b) for a, b in zip(*made.values(), strict=True))
    assert all(y.dtype == torch.float32 and psnr(x, y) >= 34 - 1e-4 for x, y in zip(images, made[True], strict=True))


def test_read_back_is_asked_for_each_image_at_each_step(network):
    images, calls = photos(3), []

    def rounded(seen):
        assert [image.shape for image in seen] == [image.shape for image in images]
        assert not any(image.requires_grad for image in seen)
        calls.extend((i, image.clone()) for i, image in enumerate(seen))
        return [image.round() for image in seen]

    marked_by(network, images, Marking(steps=3), rounded)
    assert [i for i, _ in calls] == [0, 1, 2] * 3
    assert all(torch.equal(image, images[i]) for i, image in calls[:3])
    moves = [float((calls[3 * step + i][1] - images[i]).norm()) for i in range(3) for step in (1, 2)]
    assert min(moves) > 0.5 * l2_radius(images[0], Marking())


def by_windows(image):
    """The mask of a large image, pixel by pixel: the least σ/(σ + 6) of the 5-pixel windows within 4 pixels."""
    luma = np.pad(image.mean(0), 2, mode="reflect")
    height, width = image.shape[1:]
    spread = [[luma[i : i + 5, j : j + 5].std() for j in range(width)] for i in range(height)]
    spread = np.pad(spread, 4, constant_values=np.inf)
    least = np.array([[spread[i : i + 9, j : j + 9].min() for j in range(width)] for i in range(height)])
    return np.maximum(least / (least + 6), 0.15)


def test_the_mask_spares_flat_areas_of_large_images():
    image = (128 + 40 * gaussian(3, 64, 64, seed=4).float()).clamp(0, 255)
    assert torch.equal(visibility_mask(image), torch.ones(1, 64, 64))
    whole = torch.full((3, 230, 240), 90.0)
    whole[:, 60:124, 80:144] = image
    mask = visibility_mask(whole)
    assert mask.shape == (1, 230, 240)
    expected = by_windows(whole.double().numpy())
    assert mask[0].numpy() == pytest.approx(expected, abs=2e-3)  # float32 squares
    assert (expected == 0.15).mean() > 0.8 and expected.max() > 0.4  # the picture has both
    middle = visibility_mask(whole[:, :120, :120])  # its short side lies half-way between 64 and 224 by octaves
    assert middle.min() == pytest.approx(0.15 ** (math.log2(120 / 64) / math.log2(224 / 64)), rel=1e-5)


def test_a_photograph_is_marked_where_it_has_texture(network):
    image = torch.full((3, 240, 240), 120.0)
    image[:, :, 120:] += 40 * gaussian(3, 240, 120, seed=4).float()
    image.clamp_(0, 255)
    (flat,) = marked_by(network, [torch.full((3, 240, 240), 120.0)], Marking(steps=4))
    (marked,) = marked_by(network, [image], Marking(steps=4))
    left, right = (float((marked - image)[:, :, part].square().mean()) for part in (slice(0, 110), slice(130, 240)))
    assert right > 20 * left > 0
    error = [float((y - x).square().mean()) for y, x in ((marked, image), (flat, torch.full_like(flat, 120.0)))]
    assert 10 * math.log10(255**2 / error[0]) < 41
    assert 10 * math.log10(255**2 / error[1]) > 50  # where nothing hides it, the mark is fainter than it may be


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_the_path_has_the_length_of_reach(steps):
    """Features that sum all pixels have one gradient everywhere, so that the steps add up in a straight line."""
    toy = Toy(linear(torch.ones(1, 48)), torch.ones(2, 1))
    images = [torch.full((3, 4, 4), 128.0), torch.full((3, 4, 4), 60.0)]
    marking = Marking(steps=steps, reach=0.6, **WHOLE)
    up, down = mark_images(toy, to_mark(images, torch.tensor([[1.0], [-1.0]])), marking)
    move = 0.6 * 255 * 10 ** (-34 / 20)
    assert up.numpy() == pytest.approx(np.full((3, 4, 4), 128 + move), rel=1e-5)
    assert down.numpy() == pytest.approx(np.full((3, 4, 4), 60 - move), rel=1e-5)


def test_features_that_see_nothing_leave_an_image_alone():
    toy, x = Toy(linear(torch.zeros(1, 48)), torch.ones(2, 1)), torch.full((3, 4, 4), 128.0)
    (same,) = mark_images(toy, to_mark([x], torch.ones(1, 1)), Marking(steps=3, **WHOLE))
    assert torch.equal(same, x)  # no gradient, no step, and no division by zero


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (40, 33), (300, 200)])
def test_patterns_are_low_cosines(size):
    patterns = uniform_carriers(3, PATTERN_DIMENSION, entropy("patterns"))
    images = pattern_images(patterns, *size)
    for image, pattern in zip(images, patterns, strict=True):
        assert by_cosines(image.numpy()) == pytest.approx(pattern.double().numpy(), abs=1e-9)
    assert images.flatten(1).norm(dim=1).numpy() == pytest.approx(1, abs=1e-6)
    assert images.flip(3).numpy() == pytest.approx(images.numpy(), abs=1e-12)
    assert images.mean((2, 3)).numpy() == pytest.approx(0, abs=1e-12)
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 3, *size)))
    found = pattern_coefficients(noise)
    assert found.numpy() == pytest.approx(np.stack([by_cosines(x.numpy()) for x in noise]), abs=1e-9)
    adjoint = (noise[0] * images[1]).sum()
    assert float(found[0] @ patterns[1].double()) == pytest.approx(float(adjoint), rel=1e-9)


def test_photographs_give_more_of_their_mark_to_the_pattern(network):
    found = [default_share(*size) for size in ((32, 32), (64, 500), (224, 224), (3000, 240))]
    assert found == pytest.approx([0.75, 0.75, 0.95, 0.95])
    shares = [default_share(side, side) for side in range(64, 225, 4)]
    assert shares == sorted(shares) and len(set(shares)) == len(shares)
    patterns = uniform_carriers(1, PATTERN_DIMENSION, entropy("patterns"))
    image = torch.full((1, 3, 32, 32), 128.0)

    def marked(share):
        marking = Marking(steps=2, pattern_share=share)
        return mark_images(network, to_mark(image, carriers_for(1), patterns), marking)[0]

    assert torch.equal(marked(None), marked(0.75)) and not torch.equal(marked(None), marked(0.5))


@pytest.mark.parametrize("power", [0.0, 1.0, 1.4])
def test_a_tilt_divides_each_cosine_by_its_frequency(power):
    patterns = uniform_carriers(3, PATTERN_DIMENSION, entropy("patterns"))
    tilted, plain = (pattern_images(p, 40, 30).numpy() for p in (tilt(patterns, power), patterns))
    for image, other in zip(tilted, plain, strict=True):
        found, before = by_cosines(image).reshape(3, -1), by_cosines(other).reshape(3, -1)
        for n, (down, across) in enumerate(itertools.product(range(6), (0, 2, 4)), -1):
            frequency = max(1.0, math.hypot(down, across))
            assert n < 0 or found[:, n] == pytest.approx(before[:, n] / frequency**power, abs=1e-6)


def test_marks_hold_tilted_patterns_in_photographs_more(network):
    sizes = (32, 32), (64, 500), (224, 224), (3000, 240)
    assert [default_tilt(*size) for size in sizes] == pytest.approx([0.5, 0.5, 1.2, 1.2])
    patterns = uniform_carriers(1, PATTERN_DIMENSION, entropy("patterns"))
    for side, power, other in ((64, 0.5, 1.2), (224, 1.2, 0.5)):
        noise = np.random.default_rng(2).standard_normal((1, 3, side, side))
        image = (128 + 40 * torch.from_numpy(noise).float()).clamp(60, 200)  # texture everywhere
        (marked,) = mark_images(network, to_mark(image, carriers_for(1), patterns), Marking(pattern_share=1.0, steps=1))
        found = pattern_coefficients((marked - image[0])[None])[0]
        assert float(torch.cosine_similarity(found, tilt(patterns, power)[0], dim=0)) > 0.98
        assert float(torch.cosine_similarity(found, tilt(patterns, other)[0], dim=0)) < 0.95


def test_a_mark_is_the_pattern_and_the_images_own(network):
    images, carriers = photos(4), carriers_for(4)
    patterns = uniform_carriers(4, PATTERN_DIMENSION, entropy("patterns"))

    def marked(share, **more):
        return mark_images(network, to_mark(images, carriers, patterns), Marking(pattern_share=share, **more))

    alone, shared, none = marked(1.0, steps=1), marked(0.5, steps=8, reach=3.0, **WHOLE), marked(0.0, steps=2)
    for i, x in enumerate(images):
        tilted = tilt(patterns[i : i + 1], default_tilt(*x.shape[1:]))
        tilted /= tilted.norm()
        pattern = pattern_images(tilted, *x.shape[1:])[0].float()
        room = 255 * 10 ** (-34 / 20) * math.sqrt(x.numel())
        expected = (x + (room * pattern).clamp(-10, 10)).clamp(0, 255)
        assert alone[i].numpy() == pytest.approx(expected.numpy(), abs=1e-3)
        assert float((shared[i] - x).abs().max()) <= 10 + 1e-4 and psnr(x, shared[i]) > 33.9
        found = float(pattern_coefficients((shared[i] - x)[None])[0] @ tilted[0])
        assert 0.5 * room < found < 0.85 * room  # √½ of the radius, less what is clamped
    assert gains(network, images, shared).mean() > gains(network, images, alone).mean() + 0.01
    assert torch.equal(none[0], mark_images(network, to_mark(images, carriers), Marking(steps=2))[0])


# ---------------------------------------------------------------- the true key among its decoys


def enumerated(values, grid=1000):
    """p by enumeration of all assignments."""
    scores = np.rint((values - values.mean(0)) / values.std(0) * grid)
    sums = [sum(choice) for choice in itertools.product(*scores.T)]
    return np.mean(np.array(sums) >= scores[0].sum())


@pytest.mark.parametrize("shift", [-2, 0, 1, 4])
@pytest.mark.parametrize(("keys", "classes"), [(5, 3), (6, 4), (8, 1), (4, 6)])
def test_resampling_counts_every_assignment(keys, classes, shift):
    values = np.random.default_rng(keys).normal(size=(keys, classes))
    values[0] += shift
    assert math.exp(resampled_log_p(values)) == pytest.approx(enumerated(values), rel=1e-9)
    assert resampled_log_p(7 * values - 3) == pytest.approx(resampled_log_p(values), rel=1e-9)


def test_resampling_is_uniform_under_the_null():
    rng = np.random.default_rng(1)
    p = np.exp([resampled_log_p(rng.standard_t(3, (8, 6)) * np.arange(1, 7)) for _ in range(1000)])
    assert_uniform(p, "resampled")


def test_resampling_with_ties_errs_on_the_side_of_the_suspect():
    rng = np.random.default_rng(2)
    p = np.exp([resampled_log_p(rng.integers(0, 2, (6, 5)).astype(float)) for _ in range(1000)])
    for a in (0.5, 0.1, 0.01):
        assert (p <= a).sum() <= binomial_limits(len(p), a)[1]
    assert resampled_log_p(np.ones((4, 3))) == 0
    tied = np.c_[np.ones(4), [3.0, 1, 2, 0]]  # one class says nothing, in the other the true key is first
    assert math.exp(resampled_log_p(tied)) == pytest.approx(1 / 4)


def test_resampling_reaches_beyond_floats():
    values = np.random.default_rng(3).normal(size=(16, 900)) * 1e-3
    values[0] = 1
    assert resampled_log_p(values) == pytest.approx(-900 * math.log(16), rel=1e-9)


class Given(NamedTuple):
    """Class vectors, and the carrier row of each."""

    vectors: ClassVectors
    rows: tuple[int, ...]


def rows_of(features, paper=None, classes=None, pattern=None):
    classes = tuple(range(len(features))) if classes is None else classes
    return Given(ClassVectors(features=torch.as_tensor(features), pattern=pattern, paper=paper), classes)


def judged(given, carriers, patterns=None):
    return evidence(*given, carriers, patterns)


def correlated(seed):
    """Five vectors of R^32, nearly equal and far from isotropic, like those of real suspects or worse."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(32) ** 3
    return torch.from_numpy(common + 0.1 * rng.standard_normal((5, 32)) * np.geomspace(0.1, 10, 32))


def null_carriers(keys, classes, dimension, seed):
    carriers = uniform_carriers(keys * classes, dimension, np.random.default_rng(seed).bytes)
    return carriers.view(keys, classes, dimension)


def assert_uniform(p, where):
    assert stats.kstest(p, "uniform").pvalue > 1e-3, where
    for a in (0.5, 1e-1, 1e-2, 1e-3):
        low, high = binomial_limits(len(p), a)
        assert low <= (p <= a).sum() <= high, (where, a)


def test_class_p_values_are_exact_under_the_null():
    """A fixed suspect, 20,000 keys: all p-values are uniform, and the classes independent though the rows are not."""
    keys = 20_000
    carriers = null_carriers(keys, 5, 32, seed=1).view(-1, 32)
    found = judged(rows_of(correlated(1).repeat(keys, 1)), carriers).per_class
    log_p = np.array(found).reshape(keys, 5)
    for c in range(5):
        assert_uniform(np.exp(log_p[:, c]), f"class {c}")
    assert np.abs(np.corrcoef(np.exp(log_p).T) - np.eye(5)).max() < 5 / math.sqrt(keys)
    assert_uniform(np.exp([stouffer(v) for v in log_p]), "stouffer")
    assert_uniform(np.exp([fisher(v) for v in log_p]), "fisher")


def test_p_values_are_exact_under_the_null():
    rows = rows_of(correlated(1), correlated(2))
    found = [judged(rows, carriers) for carriers in null_carriers(4000, 5, 32, seed=8)]
    assert_uniform(np.exp([e.log_p for e in found]), "declared")
    assert_uniform(np.exp([e.paper_log_p for e in found]), "paper")


def test_p_values_stay_exact_without_dead_rows():
    declared, paper = correlated(3), correlated(4)
    declared[1], paper[[0, 4]] = 0, 0
    found = [judged(rows_of(declared, paper), carriers) for carriers in null_carriers(2000, 5, 32, seed=2)]
    assert_uniform(np.exp([e.log_p for e in found]), "declared")
    assert_uniform(np.exp([e.paper_log_p for e in found]), "paper")
    carriers = null_carriers(1, 5, 32, seed=3)[0]
    alive = [0, 2, 3, 4]
    without = judged(rows_of(declared[alive], paper[[1, 2, 3, 0]], tuple(alive)), carriers)
    assert judged(rows_of(declared, paper), carriers).log_p == without.log_p
    with pytest.raises(RadiotagError, match="do not depend"):
        judged(rows_of(declared * 0), carriers)
    assert judged(rows_of(declared, paper * 0), carriers).paper_log_p == 0


def test_the_pattern_adds_its_own_exact_p_value():
    """A fixed suspect, 4,000 keys with two carriers a class; dead rows of either kind are left out, class by class."""
    declared, pattern = correlated(1), correlated(2)
    declared[1], pattern[[0, 1]] = 0, 0
    rows = rows_of(declared, pattern=pattern)
    keys = zip(null_carriers(4000, 5, 32, seed=8), null_carriers(4000, 5, 32, seed=9), strict=True)
    found = [judged(rows, carriers, patterns) for carriers, patterns in keys]
    assert {len(e.per_class) for e in found} == {4}
    assert_uniform(np.exp([e.log_p for e in found]), "both")
    assert_uniform(np.exp([e.per_class[0] for e in found]), "features alone")
    assert_uniform(np.exp([e.per_class[1] for e in found]), "both of one class")
    low, high = binomial_limits(4000, 1e-2)
    assert low <= sum(e.log_p <= -2 * LN10 for e in found) <= high


def test_the_two_carriers_of_a_class_are_combined_by_hand():
    carriers, patterns = (null_carriers(1, 5, 32, seed=s)[0] for s in (4, 5))
    rows = rows_of(correlated(5), pattern=correlated(6))
    found = judged(rows, carriers, patterns)
    p = []
    for vectors, known in ((rows.vectors.features, carriers), (rows.vectors.pattern, patterns)):
        cosines = (unit(vectors.numpy()) * unit(known.double().numpy())).sum(1)
        p.append([float(mpmath.exp(exact_log_sf(t, 32))) for t in cosines])

    def by_hand(features, pattern):
        """The smaller of the two p-values is t; p is the share of pairs with a smaller value or an equal one."""
        t = min(pattern, stats.combine_pvalues((features, pattern), "fisher").pvalue)
        k = optimize.brentq(lambda k: stats.chi2.sf(-2 * math.log(k), 4) - t, 1e-300, 1)
        return t + integrate.quad(lambda p: k / p, t, 1)[0]

    each = [by_hand(*pair) for pair in zip(*p, strict=True)]
    assert np.exp(found.per_class) == pytest.approx(np.array(each), rel=1e-6)
    both = by_hand(*(stats.combine_pvalues(part, "stouffer").pvalue for part in p))
    assert math.exp(found.log_p) == pytest.approx(both, rel=1e-5)
    assert judged(rows, carriers).pattern_cosine is None  # a key's patterns left aside


def test_one_carrier_for_every_output_is_corrected_for_the_choice():
    """A single marked class whose output is unknown: valid under the null, and close to the best output's p."""
    rows = rows_of(correlated(1), correlated(2), classes=(0,) * 5)
    found = [judged(rows, carriers) for carriers in null_carriers(4000, 1, 32, seed=3)]
    for name in ("log_p", "paper_log_p"):
        p = np.exp([getattr(e, name) for e in found])
        for a in (0.5, 1e-1, 1e-2):
            assert (p <= a).sum() <= binomial_limits(len(p), a)[1]
    spread = rows_of(gaussian(5, 32, seed=1), classes=(0,) * 5)  # nearly orthogonal rows: the correction is tight
    p = np.exp([judged(spread, carriers).log_p for carriers in null_carriers(4000, 1, 32, seed=4)])
    assert (p <= 0.1).mean() > 0.08
    learnt = null_carriers(1, 1, 32, seed=5)[0]
    one = rows_of(torch.cat([gaussian(4, 32, seed=2), learnt.double()]), classes=(0,) * 5)
    alone = judged(rows_of(learnt.double(), classes=(0,)), learnt)
    assert judged(one, learnt).log_p == pytest.approx(alone.log_p + math.log(5))


def test_evidence_by_hand():
    rows, carriers = correlated(5), null_carriers(1, 9, 32, seed=4)[0]
    classes = (8, 0, 3, 4, 2)
    found = judged(rows_of(rows, rows.flip(0), classes), carriers)
    u = unit(carriers.double().numpy())[list(classes)]
    cosines = (unit(rows.numpy()) * u).sum(1)
    p = [mpmath.exp(exact_log_sf(t, 32)) for t in cosines]
    assert np.exp(found.per_class) == pytest.approx(np.array(p, float), rel=1e-6)
    assert found.mean_cosine == pytest.approx(cosines.mean(), rel=1e-6)
    assert math.exp(found.log_p) == pytest.approx(
        stats.combine_pvalues(np.array(p, float), "stouffer").pvalue, rel=1e-5
    )
    q = [math.exp(exact_log_sf(t, 32)) for t in (unit(rows.flip(0).numpy()) * u).sum(1)]
    assert math.exp(found.paper_log_p) == pytest.approx(stats.combine_pvalues(q, "fisher").pvalue, rel=1e-5)
    assert judged(rows_of(rows * 1e3, None, classes), carriers).log_p == pytest.approx(found.log_p, rel=1e-9)
    assert judged(rows_of(rows), carriers).paper_log_p is None


def test_evidence_of_carriers_learnt():
    carriers = null_carriers(1, 10, 512, seed=5)[0]
    learnt = carriers.double() * 7
    own = judged(rows_of(learnt, learnt), carriers)
    assert own.mean_cosine == pytest.approx(1) and own.log_p < -10_000 * LN10 and own.paper_log_p < -10_000 * LN10
    assert math.isfinite(own.log_p) and math.isfinite(own.paper_log_p)
    order = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)
    assert judged(rows_of(learnt[list(order)], None, order), carriers).log_p == own.log_p
    assert judged(rows_of(learnt.roll(1, 0)), carriers).log_p > -12  # the right vectors at the wrong classes
    assert judged(rows_of(-learnt), carriers).log_p == pytest.approx(0, abs=1e-12)
    # log10 p ≈ −C·d·m²/4.6 for a weak mark of cosine m
    aside = gaussian(10, 512, seed=6)
    aside -= (aside * carriers.double()).sum(1, keepdim=True) * carriers.double()
    weak = 0.2 * carriers.double() + math.sqrt(1 - 0.04) * torch.from_numpy(unit(aside.numpy()))
    assert judged(rows_of(weak), carriers).log_p / LN10 == pytest.approx(-10 * 512 * 0.04 / 4.6, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(-30, 30))
def test_evidence_has_no_scale(scale):
    carriers = null_carriers(1, 5, 32, seed=7)[0]
    expected = judged(rows_of(correlated(6)), carriers)
    found = judged(rows_of(correlated(6) * 10**scale), carriers)
    assert found.log_p == pytest.approx(expected.log_p, rel=1e-9)


# ---------------------------------------------------------------- nested classes


def test_the_first_classes_of_the_order_are_tested_alone_and_corrected_for():
    rng = np.random.default_rng(4)
    features, patterns = (torch.from_numpy(rng.standard_normal((6, size))) for size in (40, 12))
    carriers, mine = (torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((9, size))), dim=1).float()
                      for size in (40, 12))  # fmt: skip
    rows, order = (8, 2, 5, 0, 7, 3), (5, 1, 0, 8, 4, 2, 3, 7, 6)
    first = [2, 3, 0, 1, 5, 4]  # positions in `rows` by the order: carriers 5, 0, 8, 2, 3, 7
    patterns[2] += 6 * mine[5].double()
    vectors = ClassVectors(features=features, pattern=patterns)

    def together(places):
        chosen = ClassVectors(features=features[places], pattern=patterns[places])
        return evidence(chosen, [rows[i] for i in places], carriers, mine).log_p

    sets = [together(first[:size]) for size in (1, 2, 5, 6)]
    found = evidence(vectors, rows, carriers, mine, order)
    assert found.log_p == pytest.approx(min(0.0, min(sets) + math.log(4)))
    assert (found.sets, found.first_classes) == (4, (1, 2, 5, 6)[int(np.argmin(sets))])
    assert found.per_class == evidence(vectors, rows, carriers, mine).per_class
    alone = evidence(vectors, rows, carriers, mine)
    assert (alone.sets, alone.first_classes) == (1, 6) and alone.log_p == pytest.approx(together(range(6)))
    everywhere, dead = patterns + 6 * mine[list(rows)].double(), [2, 1]
    features[dead], everywhere[dead] = 0, 0
    all_of_them = evidence(ClassVectors(features=features, pattern=everywhere), rows, carriers, mine, order)
    assert all_of_them.first_classes == len(all_of_them.compared) == 4  # those that say something are counted


def test_nested_p_values_are_never_too_small_under_the_null():
    rng = np.random.default_rng(5)
    vectors = ClassVectors(
        features=torch.from_numpy(rng.standard_normal((10, 32)) + rng.standard_normal(32)),
        pattern=torch.from_numpy(rng.standard_normal((10, 16))),
    )
    found = []
    for _ in range(4000):
        carriers, patterns = (
            torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((10, size))), dim=1)
            for size in (32, 16)
        )  # fmt: skip
        found.append(evidence(vectors, range(10), carriers, patterns, rng.permutation(10).tolist()).log_p)
    p = np.exp(found)
    for level in (0.3, 0.1, 0.01, 0.001):
        assert (p <= level).sum() <= stats.binom.isf(1e-6, len(p), level)
    assert (p <= 0.1).mean() > 0.03  # four sets, which share classes: not much is lost


def test_dead_classes_leave_sets_that_say_nothing():
    vectors = ClassVectors(features=torch.zeros(3, 4).double(), pattern=None)
    vectors.features[2, 0] = 1
    carriers = torch.eye(4)[:3].float()
    found = evidence(vectors, range(3), carriers, None, (0, 1, 2))  # the first two are dead
    assert found.sets == 3 and found.log_p == pytest.approx(min(0.0, evidence(
        ClassVectors(features=vectors.features[2:]), (2,), carriers).log_p + math.log(3)))  # fmt: skip


def test_of_one_class_whose_output_is_unknown_no_sets_are_told():
    vectors = ClassVectors(features=torch.from_numpy(np.random.default_rng(0).standard_normal((4, 6))))
    carriers = torch.eye(6)[:1].float()
    found = evidence(vectors, (0, 0, 0, 0), carriers, None, (0,))
    assert (found.sets, found.first_classes) == (1, 4)
    assert found.log_p == pytest.approx(evidence(vectors, (0, 0, 0, 0), carriers).log_p)
