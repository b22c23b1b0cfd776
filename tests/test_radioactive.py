"""The science against independent oracles: mpmath, closed forms, brute force, finite differences and simulation."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import stat
import time
import warnings
from contextlib import nullcontext
from statistics import NormalDist

import mpmath
import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import entropy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import fft, integrate, linalg, optimize, stats
from torch import nn

from radiotag import keys as keys_module
from radiotag import radioactive
from radiotag.errors import RadiotagError
from radiotag.keys import choose, fingerprint, image_random, load_key, new_key, patterned, public_half, save_key
from radiotag.networks import Network, Spec, build, find_head, pack, save_checkpoint, to_metadata
from radiotag.radioactive import (
    PATTERN_DIMENSION,
    Marking,
    Rows,
    aligned_rows,
    contrasted,
    cosine_log_sf,
    default_psnr,
    default_share,
    evidence,
    features,
    fisher,
    holm,
    images_a_class,
    l2_radius,
    likeliest,
    log_answers,
    mark_images,
    marking_loss,
    ordinary_network,
    ordinary_rows,
    pattern_coefficients,
    pattern_images,
    pattern_or_both,
    project,
    project_own,
    random_crop,
    resampled_log_p,
    responses,
    stouffer,
    suspect_rows,
    uniform_carriers,
    visibility_mask,
    whitening,
)

LN10 = math.log(10)
SPEC = Spec(
    architecture="resnet10", classes=3, small_stem=True, image_size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)
)
INSIDE = math.nextafter(1.0, 0.0)  # the largest cosine below 1

unhurried = settings(deadline=None)  # the machine may be busy


def gaussian(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def unit(rows):
    rows = np.asarray(rows)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def binomial_limits(count, probability):
    """What a right test passes but once in a million runs; the seeds are fixed, so it passes always or never."""
    return stats.binom.ppf([5e-7, 1 - 5e-7], count, probability)


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
    """Of p ≤ t or pq ≤ k: Lambert's function at sixty digits, and the width min(1, k/p) by quadrature (in log p)."""
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


# ---------------------------------------------------------------- keys


def small_weights():
    generator = torch.Generator().manual_seed(1)
    return {
        "conv.weight": torch.randn(2, 3, 2, 2, generator=generator),
        "bn.bias": torch.randn(2, generator=generator),
        "bn.num_batches_tracked": torch.tensor(7),
        "fc.weight": torch.randint(-127, 128, (3, 4), dtype=torch.int8, generator=generator),
        "fc.weight.scale": torch.rand(3, 1, generator=generator),
    }


@pytest.fixture
def key():
    return new_key(small_weights(), to_metadata(SPEC), 4, ["cat", "dog", "emu"])


@pytest.fixture
def key_file(key, tmp_path):
    save_key(tmp_path / "my.key", key)
    return tmp_path / "my.key"


def print_of(key):
    return fingerprint(key.carriers, key.patterns, key.secret, key.weights, key.metadata)


def test_key_returns_from_its_file_as_it_was(key, key_file):
    loaded = load_key(key_file)
    assert torch.equal(loaded.carriers, key.carriers) and loaded.carriers.dtype == torch.float32
    assert loaded.secret == key.secret and len(key.secret) == 32
    assert loaded.weights.keys() == key.weights.keys()
    for name, tensor in key.weights.items():
        assert loaded.weights[name].dtype == tensor.dtype
        assert torch.equal(loaded.weights[name], tensor)
    assert loaded.fingerprint == key.fingerprint == print_of(loaded)
    assert loaded.class_names == key.class_names == ["cat", "dog", "emu"]
    assert loaded.statistic == key.statistic == keys_module.STATISTIC
    assert loaded.metadata == key.metadata


def test_key_may_only_count_its_classes(tmp_path):
    key = new_key(small_weights(), {}, 6, 5)
    save_key(tmp_path / "k", key)
    assert tuple(key.carriers.shape) == (5, 6) and load_key(tmp_path / "k").class_names is None
    for none in (0, []):
        with pytest.raises(RadiotagError, match="at least one class"):
            new_key(small_weights(), {}, 6, none)


def test_two_keys_share_nothing():
    first, second = (new_key(small_weights(), {}, 64, 3) for _ in range(2))
    assert first.secret != second.secret and first.fingerprint != second.fingerprint
    assert not (first.carriers == second.carriers).any()


def test_key_file_is_for_its_owner_alone(key, tmp_path):
    before = os.umask(0)
    try:
        save_key(tmp_path / "k", key)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_key_is_not_written_over_another(key, key_file):
    before, other = key_file.read_bytes(), new_key(small_weights(), {}, 4, 3)
    with pytest.raises(RadiotagError, match=r"my\.key") as caught:
        save_key(key_file, other)
    assert caught.value.hint and key_file.read_bytes() == before
    save_key(key_file, other, exclusive=False)
    assert load_key(key_file).fingerprint == other.fingerprint
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600


def test_key_that_cannot_be_written_leaves_nothing(key, tmp_path, monkeypatch):
    with pytest.raises(RadiotagError, match="absent"):
        save_key(tmp_path / "absent" / "k", key)

    def full(*_, **__):
        raise RadiotagError("disk full")

    monkeypatch.setattr(keys_module, "write_atomically", full)
    with pytest.raises(RadiotagError, match="disk full"):
        save_key(tmp_path / "k", key)
    assert list(tmp_path.iterdir()) == []


def test_public_half_commits_and_tells_no_secret(key):
    text = public_half(key)
    lines = dict(line.split(": ", 1) for line in text.splitlines()[1:])
    assert lines.pop("fingerprint") == f"sha256:{key.fingerprint}"
    assert lines == {"classes": "3", "dimension": "4", "network": "resnet10, 32 px", "statistic": key.statistic}
    assert text == public_half(dataclasses.replace(key, carriers=-key.carriers, secret=bytes(32)))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_key_open_to_others_is_refused(key_file, mode):
    key_file.chmod(mode)
    with pytest.raises(RadiotagError) as caught:
        load_key(key_file)
    assert str(key_file) in str(caught.value)
    assert f"chmod 600 {key_file}" in caught.value.hint
    key_file.chmod(0o400)
    load_key(key_file)


def refused(path, data):
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(RadiotagError) as caught:
        load_key(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


def test_damaged_key_is_refused(key_file):
    data = key_file.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        refused(key_file, data[:length])
    refused(key_file, entropy("garbage")(4096))
    refused(key_file, b"not a key\n")


def test_missing_key_is_named(tmp_path):
    with pytest.raises(RadiotagError, match="nowhere") as caught:
        load_key(tmp_path / "nowhere.key")
    assert "keygen" in caught.value.hint
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(RadiotagError, match="folder"):
        load_key(tmp_path / "folder")


def test_other_safetensors_file_is_no_key(key, tmp_path):
    path = tmp_path / "other.safetensors"
    refused(path, safetensors.torch.save({"carriers": key.carriers}))
    refused(path, safetensors.torch.save(small_weights(), {"format": "pt"}))
    save_checkpoint(path, nn.Linear(4, 3), SPEC)
    refused(path, path.read_bytes())


def key_bytes(key, metadata, **tensors):
    secret = torch.tensor(list(key.secret), dtype=torch.uint8)
    content = {"carriers": key.carriers, "patterns": key.patterns, "secret": secret, **tensors}
    return safetensors.torch.save(content, {"radiotag": json.dumps(metadata)})


def test_later_format_is_refused(key, tmp_path):
    path = tmp_path / "k"
    refused(path, key_bytes(key, {**key.metadata, "format": keys_module.FORMAT + 1}))
    for declared in ("response+ridge+pattern", "contrasted response+ridge+pattern"):
        error = refused(path, key_bytes(key, {**key.metadata, "statistic": declared}))
        assert f"'{declared}'" in str(error)  # what a key declared is not replaced by something else
    path.write_bytes(key_bytes(key, key.metadata))
    assert load_key(path).carriers.shape == (3, 4)  # the helper's other files differ in one thing each


@pytest.mark.parametrize(
    "metadata", [[1], "key", 3, None, {"format": keys_module.FORMAT, "statistic": keys_module.STATISTIC}]
)
def test_key_whose_metadata_are_not_a_keys_is_refused(key, tmp_path, metadata):
    refused(tmp_path / "k", key_bytes(key, metadata))


@pytest.mark.parametrize(
    "tensors",
    [
        {"secret": torch.rand(32)},
        {"secret": torch.tensor(5, dtype=torch.uint8)},
        {"secret": torch.arange(31, dtype=torch.uint8)},
        {"carriers": torch.rand(12)},
        {"carriers": torch.full((3, 4), math.nan)},
        {"carriers": torch.eye(4)},  # four carriers, three names
    ],
    ids=["float secret", "scalar secret", "short secret", "flat carriers", "nan carriers", "too many carriers"],
)
def test_key_whose_tensors_are_not_a_keys_is_refused(key, tmp_path, tensors):
    refused(tmp_path / "k", key_bytes(key, key.metadata, **tensors))


def nudged(tensor, index):
    changed = tensor.clone()
    flat = changed.view(-1)
    flat[index] = torch.nextafter(flat[index], flat[index] + 1) if flat.is_floating_point() else flat[index] ^ 1
    return changed


def test_fingerprint_commits_to_every_single_value(key):
    prints = [key.fingerprint]
    prints += [print_of(dataclasses.replace(key, carriers=nudged(key.carriers, i))) for i in range(12)]
    for i in range(32):
        secret = bytes(b ^ (1 if i == j else 0) for j, b in enumerate(key.secret))
        prints.append(print_of(dataclasses.replace(key, secret=secret)))
    for name, tensor in key.weights.items():
        for i in range(tensor.numel()):
            prints.append(print_of(dataclasses.replace(key, weights={**key.weights, name: nudged(tensor, i)})))
    for name, tensor in key.weights.items():
        rest = {k: v for k, v in key.weights.items() if k != name}
        changes = [rest, {**rest, "x" + name: tensor}, {**rest, name: tensor.reshape(1, *tensor.shape)}]
        prints += [print_of(dataclasses.replace(key, weights=weights)) for weights in changes]
    network = key.metadata["network"]
    changes = [{"format": 2}, {"statistic": "x"}, {"class_names": None}, {"class_names": ["cat", "emu", "dog"]}]
    changes += [{"network": {**network, name: "changed"}} for name in network]
    prints += [print_of(dataclasses.replace(key, metadata={**key.metadata, **change})) for change in changes]
    assert len(set(prints)) == len(prints) > 12 + 32 + 24 + 2 + 1 + 12 + 3
    assert all(len(p) == 64 and int(p, 16) >= 0 for p in prints)


def test_fingerprint_takes_bytes_not_numbers(key):
    weights = {**key.weights, "fc.weight": key.weights["fc.weight"].view(torch.uint8)}
    assert print_of(dataclasses.replace(key, weights=weights)) != key.fingerprint


def test_fingerprint_does_not_depend_on_order_or_memory_layout(key):
    def backwards(mapping):
        return {k: backwards(v) if isinstance(v, dict) else v for k, v in reversed(mapping.items())}

    weights = backwards(key.weights)
    weights["conv.weight"] = weights["conv.weight"].to(memory_format=torch.channels_last)
    carriers = key.carriers.T.contiguous().T
    other = dataclasses.replace(key, weights=weights, metadata=backwards(key.metadata), carriers=carriers)
    assert list(other.metadata) != list(key.metadata) and not carriers.is_contiguous()
    assert print_of(other) == key.fingerprint


@pytest.fixture(scope="module")
def network():
    """An untrained marking network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network(build(SPEC), SPEC)
    network.head, _ = find_head(network)
    return network


def test_int8_weights_survive_and_run(network, tmp_path):
    key = new_key(pack(network.module.state_dict()), to_metadata(SPEC), 512, 3)
    save_key(tmp_path / "k", key)
    assert (tmp_path / "k").stat().st_size < 1.1 * sum(p.numel() for p in network.parameters()) + 100_000
    before, after = key.network(), load_key(tmp_path / "k").network()
    assert after.dimension == 512 and after.spec == SPEC
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(before.features(x), after.features(x))
        exact = network.features(x)
        assert (after.features(x) - exact).norm() < 0.05 * exact.norm()


# ---------------------------------------------------------------- choosing, and the images' generators


PATHS = [f"class/{i:04}.png" for i in range(200)]
names = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), unique=True, max_size=40)


@pytest.fixture(scope="module")
def keys():
    return [new_key({}, {}, 4, 2) for _ in range(2)]


@unhurried
@given(paths=names, a=st.floats(0, 1), b=st.floats(0, 1), shuffle=st.randoms(use_true_random=False))
def test_choice_is_nested_and_of_the_asked_size(keys, paths, a, b, shuffle):
    small, large = (choose(keys[0], paths, f) for f in sorted((a, b)))
    for fraction, chosen in zip(sorted((a, b)), (small, large), strict=True):
        wanted = round(fraction * len(paths)) if fraction > 0 else 0
        assert len(chosen) == (wanted or int(fraction > 0 and len(paths) > 0))
        assert chosen <= set(paths)
    assert small <= large
    mixed = list(paths)
    shuffle.shuffle(mixed)
    assert choose(keys[0], mixed, a) == choose(keys[0], paths, a)
    assert choose(keys[0], paths, 1) == set(paths)


def test_choice_is_the_keys_alone(keys):
    first, second = (choose(key, PATHS, 0.5) for key in keys)
    low, high = stats.hypergeom.ppf([1e-9, 1 - 1e-9], 200, 100, 100)
    assert low <= len(first & second) <= high  # as two independent halves overlap
    assert choose(dataclasses.replace(keys[0], carriers=keys[1].carriers), PATHS, 0.5) == first
    assert choose(keys[0], PATHS, 1e-9) <= choose(keys[0], PATHS, 0.01) and len(choose(keys[0], PATHS, 1e-9)) == 1


def test_choice_depends_on_nothing_but_each_path():
    """Over keys, every path is chosen equally often, wherever it stands in the listing."""
    counts = dict.fromkeys(PATHS[:10], 0)
    for i in range(2000):
        key = dataclasses.replace(new_key({}, {}, 2, 1), secret=hashlib.sha256(bytes([i % 256, i // 256])).digest())
        for path in choose(key, PATHS[:10], 0.3):
            counts[path] += 1
    assert sum(counts.values()) == 6000
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_undecodable_names_are_chosen_and_drawn(keys):
    paths = [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"\xff\xfe"), "café.png"]
    assert any("\udce9" in path for path in paths)
    assert choose(keys[0], paths, 1) == set(paths)
    draws = {image_random(keys[0], path, 0).random() for path in paths}
    assert len(draws) == 3


def test_image_generator_depends_on_key_path_and_seed(keys):
    cases = [(k, path, seed) for k in keys for path in ("a", "b", "2/a", "/a") for seed in (0, 1, 12)]
    draws = [tuple(image_random(*case).random() for _ in range(3)) for case in cases]
    assert len({d[0] for d in draws}) == len(cases)
    random.seed(5)
    other = dataclasses.replace(keys[0], carriers=keys[1].carriers, weights=small_weights(), metadata={"x": 1})
    again = [image_random(other, "a", 12), image_random(keys[0], "a", 12)]
    expected = draws[cases.index((keys[0], "a", 12))]
    for _ in range(3):  # in turns: they share no state
        random.random()
        assert len({g.random() for g in again}) == 1
    assert tuple(g.random() for g in [image_random(keys[0], "a", 12)]) == expected[:1]


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


def marked_by(network, images, marking, read_back=None, first=0):
    draws = [random.Random(f"{first + i}") for i in range(len(images))]
    carriers = carriers_for(50)[first : first + len(images)]
    return mark_images(network, images, carriers, draws, marking, read_back)


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


class Toy(nn.Module):
    """What the functions under test take of a Network, around any features and a linear head."""

    def __init__(self, body, weight, size=4):
        super().__init__()
        self.body = body
        self.head = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
        self.head.weight.data, self.head.bias.data = (
            weight.clone(),
            torch.linspace(-1, 1, len(weight), dtype=weight.dtype),
        )
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.5]).view(1, 3, 1, 1))
        self.spec = dataclasses.replace(SPEC, classes=len(weight), image_size=size)
        self.dimension, self.device = weight.shape[1], torch.device("cpu")
        self.eval().requires_grad_(False)

    def features(self, x):
        return self.body(x).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


def linear(matrix):
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False).to(matrix.dtype)
    layer.weight.data = matrix
    return nn.Sequential(nn.Flatten(), layer)


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
    up, down = mark_images(toy, images, torch.tensor([[1.0], [-1.0]]), [random.Random(0), random.Random(1)], marking)
    move = 0.6 * 255 * 10 ** (-34 / 20)
    assert up.numpy() == pytest.approx(np.full((3, 4, 4), 128 + move), rel=1e-5)
    assert down.numpy() == pytest.approx(np.full((3, 4, 4), 60 - move), rel=1e-5)


def test_features_that_see_nothing_leave_an_image_alone():
    toy, x = Toy(linear(torch.zeros(1, 48)), torch.ones(2, 1)), torch.full((3, 4, 4), 128.0)
    (same,) = mark_images(toy, [x], torch.ones(1, 1), [random.Random(0)], Marking(steps=3, **WHOLE))
    assert torch.equal(same, x)  # no gradient, no step, and no division by zero


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


# ---------------------------------------------------------------- patterns


def test_the_pattern_goes_to_a_quarter_that_is_chosen_first(key):
    paths = [f"cat/{i}.png" for i in range(4000)]
    carrying = {path for path in paths if patterned(key, path)}
    low, high = binomial_limits(4000, 0.25)
    assert low <= len(carrying) <= high
    assert choose(key, paths, 0.2) < carrying < choose(key, paths, 0.3)
    other = new_key(small_weights(), {}, 4, 3)
    assert abs(sum(patterned(other, path) for path in carrying) / len(carrying) - 0.25) < 0.08


def by_cosines(image):
    """The patterns' coefficients of (3, H, W) by scipy's DCT: the lowest frequencies, even ones across, no constant."""
    grid = fft.dctn(image, axes=(1, 2), norm="ortho")[:, :6, :6:2]
    short = [(0, wanted - have) for wanted, have in zip((3, 6, 3), grid.shape, strict=True)]
    return np.pad(grid, short).reshape(3, -1)[:, 1:].ravel()


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


def test_small_images_give_more_of_their_mark_to_the_pattern(network):
    assert [default_share(*size) for size in ((32, 32), (64, 500), (224, 224), (3000, 240))] == [0.75, 0.75, 0.5, 0.5]
    shares = [default_share(side, side) for side in range(64, 225, 4)]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == len(shares)
    patterns = uniform_carriers(1, PATTERN_DIMENSION, entropy("patterns"))
    image = torch.full((1, 3, 32, 32), 128.0)

    def marked(share):
        marking = Marking(steps=2, pattern_share=share)
        return mark_images(network, image, carriers_for(1), [random.Random("0")], marking, patterns=patterns)[0]

    assert torch.equal(marked(None), marked(0.75)) and not torch.equal(marked(None), marked(0.5))


def test_a_mark_is_the_pattern_and_the_images_own(network):
    images, carriers = photos(4), carriers_for(4)
    patterns = uniform_carriers(4, PATTERN_DIMENSION, entropy("patterns"))

    def marked(share, **more):
        draws = [random.Random(f"{i}") for i in range(4)]
        return mark_images(network, images, carriers, draws, Marking(pattern_share=share, **more), patterns=patterns)

    alone, shared, none = marked(1.0, steps=1), marked(0.5, steps=8, reach=3.0, **WHOLE), marked(0.0, steps=2)
    for i, x in enumerate(images):
        pattern = pattern_images(patterns[i : i + 1], *x.shape[1:])[0].float()
        room = 255 * 10 ** (-34 / 20) * math.sqrt(x.numel())
        expected = (x + (room * pattern).clamp(-10, 10)).clamp(0, 255)
        assert alone[i].numpy() == pytest.approx(expected.numpy(), abs=1e-3)
        assert float((shared[i] - x).abs().max()) <= 10 + 1e-4 and psnr(x, shared[i]) > 33.9
        found = float(pattern_coefficients((shared[i] - x)[None])[0] @ patterns[i].double())
        assert 0.5 * room < found < 0.85 * room  # √½ of the radius, less what is clamped
    assert gains(network, images, shared).mean() > gains(network, images, alone).mean() + 0.01
    assert torch.equal(none[0], mark_images(network, images, carriers, [random.Random(f"{i}") for i in range(4)],
                                            Marking(steps=2))[0])  # fmt: skip


# ---------------------------------------------------------------- the true key among its decoys


def enumerated(values, grid=1000):
    """p by going through every assignment."""
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


# ---------------------------------------------------------------- responses


def images_in_unit_range(count, size=4, seed=9):
    return torch.from_numpy(np.random.default_rng(seed).random((count, 3, size, size)))


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
    rows = suspect_rows(marker, marker, images_in_unit_range(40), [(2, 0), (0, 7)])
    assert rows.paper.numpy() == pytest.approx(w.numpy()[[2, 0]], rel=1e-8)
    assert rows.r2 == pytest.approx(1, abs=1e-10) and rows.classes == (0, 7)


def test_paper_rows_do_not_depend_on_the_suspects_basis():
    marker = Toy(linear(gaussian(16, 48, seed=1)), gaussian(2, 16, seed=2))
    body, w = gaussian(5, 48, seed=3), gaussian(4, 5, seed=4)
    mixed = gaussian(5, 5, seed=5)
    suspects = Toy(linear(body), w), Toy(linear(mixed @ body), w @ torch.linalg.inv(mixed))
    pixels, pairs = images_in_unit_range(60), [(3, 1), (0, 0), (2, 5)]
    first, second = (suspect_rows(marker, s, pixels, pairs, 16) for s in suspects)
    assert first.paper.numpy() == pytest.approx(second.paper.numpy(), rel=1e-7)
    backwards = suspect_rows(marker, suspects[0], pixels, pairs[::-1], 7)
    for name in ("declared", "paper", "pattern"):
        assert getattr(backwards, name).flip(0).numpy() == pytest.approx(getattr(first, name).numpy(), rel=1e-7)
    assert backwards.classes == (5, 0, 1)


@pytest.mark.parametrize(("labelled", "share"), [(True, 1), (False, 0.5)])
def test_declared_rows_sum_two_unit_vectors(labelled, share):
    marker = Toy(linear(gaussian(16, 48, seed=1)), gaussian(2, 16, seed=2))
    suspect = Toy(linear(gaussian(5, 48, seed=3)), gaussian(4, 5, seed=4))
    pixels, outputs = images_in_unit_range(60), [3, 0, 2]
    labels = torch.arange(60) % 3 if labelled else None
    whole = suspect_rows(marker, suspect, pixels, [(o, o) for o in outputs], labels=labels)
    suspect.head = None
    weight, bias = gaussian(4, 5, seed=4), torch.linspace(-1, 1, 4)
    suspect.forward = lambda x: suspect.features(x) @ weight.T + bias
    bare = suspect_rows(marker, suspect, pixels, [(o, o) for o in outputs], labels=labels)
    assert bare.paper is None and bare.r2 is None and whole.paper is not None
    assert bare.declared.norm(dim=1).tolist() == pytest.approx([1] * 3)
    added = (whole.declared - bare.declared).numpy()
    assert np.linalg.norm(added, axis=1) == pytest.approx(share, abs=1e-6)
    phi, psi = marker.features(pixels).double(), suspect.features(pixels).double()
    expected, _ = aligned_rows(phi, psi, weight[outputs].double(), 0.1 if labelled else 0.5)
    expected = expected - expected.mean(0) / 3  # of three classes: less a third of what they share
    if labelled:  # less what a linear classifier of the same images answers; without labels the row is left whole
        expected = project_own(expected, ordinary_rows(phi, (labels[:, None] == torch.arange(3)).double()))
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
    answers = log_answers(suspect, pixels, 7)
    ordinary, known, rows = ordinary_network(marker, phi, answers, outputs, labels, own, others)
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
    found = suspect_rows(marker, suspect, pixels, [(2, 0)], 7, labels=labels, own=[1], others=[2])
    answers = log_answers(suspect, pixels, 7)
    phi, psi = features(marker, pixels, 7), features(suspect, pixels, 7)
    _, _, rows = ordinary_network(marker, phi, answers, [2], labels, [1], [2])
    assert found.declared.shape == (1, 6)
    penalty, share = (0.1, 1.0) if labelled else (0.5, 0.5)
    ridge = project_own(aligned_rows(phi, psi, suspect.head.weight[[2]].double(), penalty)[0], rows)
    suspect.head, weight, bias = None, suspect.head.weight, suspect.head.bias
    suspect.forward = lambda x: suspect.features(x) @ weight.T + bias
    alone = suspect_rows(marker, suspect, pixels, [(2, 0)], 7, labels=labels, own=[1], others=[2])
    added = share * nn.functional.normalize(ridge, dim=1)
    assert (found.declared - alone.declared).numpy() == pytest.approx(added.numpy(), abs=1e-5)
    without = suspect_rows(marker, suspect, pixels, [(2, 0)], 7, labels=labels, own=[1])
    if labelled:  # images of the class are asked with all of φ
        assert torch.equal(without.pattern, alone.pattern)
    else:
        assert float(nn.functional.cosine_similarity(without.pattern, alone.pattern)) < 0.999


def test_of_one_class_not_every_image_is_asked_without_labels(monkeypatch):
    marker, suspect, asked = toys(seed=1), toys(seed=2), []
    original = radioactive.responses

    def counted(*arguments):
        asked.append(len(arguments[-1]))
        return original(*arguments)

    monkeypatch.setattr(radioactive, "responses", counted)
    suspect_rows(marker, suspect, images_in_unit_range(500), [(0, 0)], 250)
    suspect_rows(marker, suspect, images_in_unit_range(500), [(c, c) for c in range(2)] * 2, 250)
    assert asked == [400, 400, 1200, 1200]


@pytest.mark.parametrize("labelled", [True, False])
def test_responses_have_nothing_of_the_ordinary_networks(labelled):
    marker, suspect = toys(seed=1), toys(seed=2)
    suspect.head = None
    weight = gaussian(3, 6, seed=12)
    suspect.forward = lambda x: suspect.features(x) @ weight.T
    pixels, pairs = images_in_unit_range(50), [(2, 0), (0, 1)]
    labels = torch.arange(50) % 2 if labelled else None
    found = suspect_rows(marker, suspect, pixels, pairs, 7, labels=labels)
    args = marker, features(marker, pixels, 7), log_answers(suspect, pixels, 7), [2, 0], labels, None
    places = None
    if labels is None:
        chosen = likeliest(log_answers(suspect, pixels, 7), [2, 0], 600)
        places, labels = chosen.flatten(), torch.arange(2).repeat_interleave(chosen.shape[1])
    theirs = responses(marker, ordinary_network(*args)[0], pixels, [0, 1], 7, labels, places)
    white = whitening(responses(marker, suspect, pixels, [2, 0], 7, labels, places).scatter)
    for mine, its in ((found.declared, theirs.response), (found.pattern, theirs.pattern @ white)):
        assert nn.functional.cosine_similarity(mine, its).abs().max() < 1e-5
        assert mine.norm(dim=1).min() > 1e-3


def test_a_suspect_with_the_marking_networks_features_keeps_its_evidence_without_labels():
    """Its outputs are a linear classifier on φ: what is taken off is all its response, and its row is left."""
    carriers = nn.functional.normalize(gaussian(3, 6, seed=5), dim=1)
    marker = Toy(linear(gaussian(6, 48, seed=1)), gaussian(2, 6, seed=2))
    suspect = Toy(linear(gaussian(6, 48, seed=1)), 10 * carriers)
    rows = suspect_rows(marker, suspect, images_in_unit_range(60), [(c, c) for c in range(3)])
    assert nn.functional.cosine_similarity(rows.declared, carriers.double(), dim=1).mean() > 0.4


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_log_odds_are_those_of_the_probability(classes):
    logits, outputs = gaussian(7, classes, seed=1) * 4, torch.arange(7) % classes
    p = torch.sigmoid(logits) if classes == 1 else logits.softmax(1)
    p = p[torch.arange(7), outputs]
    assert radioactive.log_odds(logits, outputs).numpy() == pytest.approx((p / (1 - p)).log().numpy(), rel=1e-9)
    with pytest.raises(FloatingPointError):
        radioactive.log_odds(logits * math.inf, outputs)


def test_a_last_layer_times_a_constant_answers_the_same():
    """Which changes no decision; the gradient of log p would vanish wherever p rounds to 1."""
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
    """It answers as the two outputs (s, 0) do, of which it is the first."""
    marker = toys(seed=1)
    weight = gaussian(1, 6, seed=3)
    alone = Toy(linear(gaussian(6, 48, seed=2)), weight)
    both = Toy(linear(gaussian(6, 48, seed=2)), torch.cat([weight, torch.zeros_like(weight)]))
    for network, bias in ((alone, [0.3]), (both, [0.3, 0.0])):
        network.head.bias.data = torch.tensor(bias, dtype=weight.dtype)
    pixels = images_in_unit_range(50)
    assert log_answers(alone, pixels, 7).numpy() == pytest.approx(log_answers(both, pixels, 7)[:, :1].numpy())
    one, two = (suspect_rows(marker, network, pixels, [(0, 0)], 7) for network in (alone, both))
    for mine, its in ((one.declared, two.declared), (one.pattern, two.pattern)):
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
        suspect_rows(marker, suspect, images_in_unit_range(50), [(0, 0)], 7)


def test_a_gradient_that_overflows_tells_nothing():
    marker, suspect = toys(seed=1), toys(seed=2)
    suspect.head = None
    suspect.forward = lambda x: torch.stack([(x.flatten(1)[:, 0] * 1e-38).sqrt() * 1e30, x.flatten(1)[:, 1]], 1)
    pixels = images_in_unit_range(50)
    pixels[:, 0, 0, 0] = 0  # where the square root has an infinite slope
    rows = suspect_rows(marker, suspect, pixels, [(0, 0), (1, 1)], 7)
    assert bool(torch.isfinite(rows.declared).all()) and bool(torch.isfinite(rows.pattern).all())


@pytest.mark.parametrize("own", [None, [2, 0]])
def test_what_does_not_depend_on_the_suspect_is_computed_once(monkeypatch, own):
    marker, calls = toys(seed=1), []
    pixels, labels = images_in_unit_range(50), torch.arange(50) % 2
    inner = type(marker).features

    def counted(self, x):
        calls.extend([len(x)] if self is marker else [])
        return inner(self, x)

    monkeypatch.setattr(type(marker), "features", counted)
    counts = []
    for seed in (2, 3):
        suspect_rows(marker, toys(seed=seed), pixels, [(0, 0), (1, 1)], 50, labels=labels, own=own)
        counts.append(len(calls))
    assert counts == [4, 5]  # the second suspect costs one pass of φ, along its own gradient


def test_images_of_other_classes_serve_the_alignment_alone():
    marker, suspect = (Toy(linear(gaussian(6, 48, seed=s)), gaussian(3, 6, seed=s + 10)) for s in (1, 2))
    pixels, pairs = images_in_unit_range(50), [(2, 0), (0, 1)]
    labels = torch.arange(50) % 3 - 1
    some = labels >= 0
    rows = suspect_rows(marker, suspect, pixels, pairs, 7, labels=labels)
    few = suspect_rows(marker, suspect, pixels[some], pairs, 7, labels=labels[some])
    every = suspect_rows(marker, suspect, pixels, pairs, 7)
    assert rows.paper.numpy() == pytest.approx(every.paper.numpy(), rel=1e-7) and rows.r2 == every.r2
    own = suspect_rows(marker, suspect, pixels, pairs, 7, labels=labels, own=[2, 0])
    alone = suspect_rows(marker, suspect, pixels[some], pairs, 7, labels=labels[some], own=[2, 0])
    assert own.pattern.numpy() == pytest.approx(alone.pattern.numpy(), rel=1e-7)
    assert not np.allclose(rows.paper.numpy(), few.paper.numpy())


@pytest.mark.parametrize(
    ("classes", "small", "large"),
    [(1, 400, 400), (2, 400, 400), (10, 120, 120), (30, 50, 40), (100, 50, 12), (500, 10, 8), (1000, 8, 8)],
)
def test_of_many_classes_fewer_images_each_are_asked(classes, small, large):
    assert [images_a_class(classes, size) for size in (32, 64, 65, 224)] == [small, small, large, large]


def test_without_labels_each_class_asks_the_images_that_the_suspect_takes_for_it():
    marker, suspect = (Toy(linear(gaussian(6, 48, seed=s)), gaussian(3, 6, seed=s + 10)) for s in (1, 2))
    pixels, outputs = images_in_unit_range(50), [2, 0]
    scores = suspect(pixels).log_softmax(1).numpy()
    best = [np.argsort(-scores[:, output])[:9] for output in outputs]
    chosen = likeliest(log_answers(suspect, pixels, 7), outputs, 9)
    assert [sorted(row) for row in chosen.tolist()] == [sorted(row.tolist()) for row in best]
    places, labels = chosen.flatten(), torch.tensor([0] * 9 + [1] * 9)
    found, pattern, _ = responses(marker, suspect, pixels, outputs, 4, labels, places)
    for position, output in enumerate(outputs):
        alone = responses_of_all(marker, suspect, pixels[best[position].copy()], [output], 50)
        assert found[position].numpy() == pytest.approx(alone[0][0].numpy(), rel=1e-5)
        assert pattern[position].numpy() == pytest.approx(alone[1][0].numpy(), rel=1e-5)


# ---------------------------------------------------------------- evidence


def toys(seed):
    return Toy(linear(gaussian(6, 48, seed=seed)), gaussian(3, 6, seed=seed + 10))


def test_labelled_responses_average_each_class_over_its_own_images():
    marker, suspect, pixels = toys(seed=1), toys(seed=2), images_in_unit_range(7)
    labels = torch.tensor([1, 0, 1, 1, 0, 1, 1])
    found, pattern, _ = responses(marker, suspect, pixels, [2, 0], 3, labels)
    for position, output in enumerate((2, 0)):  # oracle: the unlabelled answer on the class's images alone
        expected = responses_of_all(marker, suspect, pixels[labels == position], [output], 2)
        torch.testing.assert_close(found[position], expected[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pattern[position], expected[1][0], rtol=1e-4, atol=1e-5)


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
    assert contrasted(rows).numpy() == pytest.approx(expected, abs=1e-12)
    dead = torch.cat([torch.zeros(2, 12), rows])  # outputs that answer nothing go on doing so
    found = contrasted(dead)
    assert not found[:2].any() and found[2:].numpy() == pytest.approx(expected, abs=1e-12)
    assert not contrasted(torch.zeros_like(rows)).any()


def test_whitening_is_the_inverse_root_of_the_covariance_and_the_identity():
    parts = gaussian(200, 9, seed=1).numpy() * np.geomspace(0.1, 10, 9) @ gaussian(9, 9, seed=2).numpy()
    scatter = np.cov(parts.T)
    wanted = linalg.inv(linalg.sqrtm(scatter / np.diag(scatter).mean() + np.eye(9)))
    for scale in (1, 1e-8):
        assert whitening(torch.from_numpy(scale * scatter)).numpy() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    for nothing in (torch.zeros(9, 9), -1e-11 * torch.eye(9)):  # one image a class; what rounding may leave
        assert whitening(nothing.double()).numpy() == pytest.approx(np.eye(9))


def test_the_rows_are_contrasted_whitened_and_rid_of_the_ordinary():
    marker, suspect, pixels, pairs = toys(seed=1), toys(seed=2), images_in_unit_range(60), [(2, 0), (0, 1), (1, 2)]
    labels, weight = torch.arange(60) % 3, suspect.head.weight
    suspect.head = None  # the response alone
    suspect.forward = lambda x: suspect.features(x) @ weight.T
    found = suspect_rows(marker, suspect, pixels, pairs, 7, labels=labels, own=[1, 0, 2])
    theirs = responses(marker, suspect, pixels, [2, 0, 1], 7, labels)
    ours = responses(marker, marker, pixels, [1, 0, 2], 7, labels)
    scatter = theirs.scatter.numpy()
    white = linalg.inv(linalg.sqrtm(scatter / np.trace(scatter) * len(scatter) + np.eye(len(scatter)))).real
    for name, turned, mine in (("pattern", white, found.pattern), ("response", np.eye(6), found.declared)):
        rows, off = (getattr(part, name).numpy() for part in (theirs, ours))
        rows, off = ((part - part.mean(0) / 3) @ turned for part in (rows, off))
        expected = unit(np.array([a - b * (a @ b) / (b @ b) for a, b in zip(rows, off, strict=True)]))
        assert unit(mine.numpy()) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_ridge_row_and_the_ordinary_ones_are_contrasted_alike():
    """Images of other classes keep the ordinary rows from adding up to zero."""
    marker, suspect, pixels, pairs = toys(seed=1), toys(seed=2), images_in_unit_range(60), [(2, 0), (0, 1), (1, 2)]
    labels = torch.arange(60) % 4 - 1
    whole = suspect_rows(marker, suspect, pixels, pairs, 7, labels=labels)
    weight, bias = suspect.head.weight, suspect.head.bias
    suspect.head = None
    suspect.forward = lambda x: suspect.features(x) @ weight.T + bias
    added = whole.declared - suspect_rows(marker, suspect, pixels, pairs, 7, labels=labels).declared
    phi, psi = (features(network, pixels, 60) for network in (marker, suspect))
    ridge = aligned_rows(phi, psi, weight[[2, 0, 1]].double(), 0.1)[0].numpy()
    plain = ordinary_rows(phi, (labels[:, None] == torch.arange(3)).double()).numpy()
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
    found = project_own(rows, own)
    for row, direction, left in zip(rows.numpy(), own.numpy(), found.numpy(), strict=True):
        expected = row - direction * (row @ direction) / (direction @ direction)
        np.testing.assert_allclose(left, expected, atol=1e-12)
    assert torch.equal(project_own(rows, torch.zeros_like(own)), rows)  # a silent network takes nothing away


def rows_of(declared, paper=None, classes=None, pattern=None):
    classes = tuple(range(len(declared))) if classes is None else classes
    return Rows(declared=torch.as_tensor(declared), pattern=pattern, paper=paper, r2=None, classes=classes)


def correlated(seed):
    """Five vectors of R^32, nearly equal and far from isotropic: what real suspects answer, and worse."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(32) ** 3
    return torch.from_numpy(common + 0.1 * rng.standard_normal((5, 32)) * np.geomspace(0.1, 10, 32))


def fresh_carriers(keys, classes, dimension, seed):
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
    carriers = fresh_carriers(keys, 5, 32, seed=1).view(-1, 32)
    found = evidence(rows_of(correlated(1).repeat(keys, 1)), carriers).per_class
    log_p = np.array(found).reshape(keys, 5)
    for c in range(5):
        assert_uniform(np.exp(log_p[:, c]), f"class {c}")
    assert np.abs(np.corrcoef(np.exp(log_p).T) - np.eye(5)).max() < 5 / math.sqrt(keys)
    assert_uniform(np.exp([stouffer(v) for v in log_p]), "stouffer")
    assert_uniform(np.exp([fisher(v) for v in log_p]), "fisher")


def test_p_values_are_exact_under_the_null():
    rows = rows_of(correlated(1), correlated(2))
    found = [evidence(rows, carriers) for carriers in fresh_carriers(4000, 5, 32, seed=8)]
    assert_uniform(np.exp([e.log_p for e in found]), "declared")
    assert_uniform(np.exp([e.paper_log_p for e in found]), "paper")


def test_p_values_stay_exact_without_dead_rows():
    declared, paper = correlated(3), correlated(4)
    declared[1], paper[[0, 4]] = 0, 0
    found = [evidence(rows_of(declared, paper), carriers) for carriers in fresh_carriers(2000, 5, 32, seed=2)]
    assert_uniform(np.exp([e.log_p for e in found]), "declared")
    assert_uniform(np.exp([e.paper_log_p for e in found]), "paper")
    carriers = fresh_carriers(1, 5, 32, seed=3)[0]
    alive = [0, 2, 3, 4]
    without = evidence(rows_of(declared[alive], paper[[1, 2, 3, 0]], tuple(alive)), carriers)
    assert evidence(rows_of(declared, paper), carriers).log_p == without.log_p
    with pytest.raises(RadiotagError, match="do not depend"):
        evidence(rows_of(declared * 0), carriers)
    assert evidence(rows_of(declared, paper * 0), carriers).paper_log_p == 0


def test_the_pattern_adds_its_own_exact_p_value():
    """A fixed suspect, 4,000 keys with two carriers a class; dead rows of either kind are left out, class by class."""
    declared, pattern = correlated(1), correlated(2)
    declared[1], pattern[[0, 1]] = 0, 0
    rows = rows_of(declared, pattern=pattern)
    keys = zip(fresh_carriers(4000, 5, 32, seed=8), fresh_carriers(4000, 5, 32, seed=9), strict=True)
    found = [evidence(rows, carriers, patterns) for carriers, patterns in keys]
    assert {len(e.per_class) for e in found} == {4}
    assert_uniform(np.exp([e.log_p for e in found]), "both")
    assert_uniform(np.exp([e.per_class[0] for e in found]), "features alone")
    assert_uniform(np.exp([e.per_class[1] for e in found]), "both of one class")
    low, high = binomial_limits(4000, 1e-2)
    assert low <= sum(e.log_p <= -2 * LN10 for e in found) <= high


def test_the_two_carriers_of_a_class_are_combined_by_hand():
    carriers, patterns = (fresh_carriers(1, 5, 32, seed=s)[0] for s in (4, 5))
    rows = rows_of(correlated(5), pattern=correlated(6))
    found = evidence(rows, carriers, patterns)
    p = []
    for vectors, known in ((rows.declared, carriers), (rows.pattern, patterns)):
        cosines = (unit(vectors.numpy()) * unit(known.double().numpy())).sum(1)
        p.append([float(mpmath.exp(exact_log_sf(t, 32))) for t in cosines])

    def by_hand(features, pattern):
        """The smaller of the pattern's and both's p is t; p is the share of pairs that leave no more."""
        t = min(pattern, stats.combine_pvalues((features, pattern), "fisher").pvalue)
        k = optimize.brentq(lambda k: stats.chi2.sf(-2 * math.log(k), 4) - t, 1e-300, 1)
        return t + integrate.quad(lambda p: k / p, t, 1)[0]

    each = [by_hand(*pair) for pair in zip(*p, strict=True)]
    assert np.exp(found.per_class) == pytest.approx(np.array(each), rel=1e-6)
    both = by_hand(*(stats.combine_pvalues(part, "stouffer").pvalue for part in p))
    assert math.exp(found.log_p) == pytest.approx(both, rel=1e-5)
    assert evidence(rows, carriers).pattern_cosine is None  # a key's patterns left aside


def test_one_carrier_for_every_output_is_corrected_for_the_choice():
    """A single marked class, and no knowing which output it became: valid under the null, and near the best output."""
    rows = rows_of(correlated(1), correlated(2), classes=(0,) * 5)
    found = [evidence(rows, carriers) for carriers in fresh_carriers(4000, 1, 32, seed=3)]
    for name in ("log_p", "paper_log_p"):
        p = np.exp([getattr(e, name) for e in found])
        for a in (0.5, 1e-1, 1e-2):
            assert (p <= a).sum() <= binomial_limits(len(p), a)[1]
    spread = rows_of(gaussian(5, 32, seed=1), classes=(0,) * 5)  # nearly orthogonal rows: the correction is tight
    p = np.exp([evidence(spread, carriers).log_p for carriers in fresh_carriers(4000, 1, 32, seed=4)])
    assert (p <= 0.1).mean() > 0.08
    learnt = fresh_carriers(1, 1, 32, seed=5)[0]
    one = rows_of(torch.cat([gaussian(4, 32, seed=2), learnt.double()]), classes=(0,) * 5)
    alone = evidence(rows_of(learnt.double(), classes=(0,)), learnt)
    assert evidence(one, learnt).log_p == pytest.approx(alone.log_p + math.log(5))


def test_evidence_by_hand():
    rows, carriers = correlated(5), fresh_carriers(1, 9, 32, seed=4)[0]
    classes = (8, 0, 3, 4, 2)
    found = evidence(rows_of(rows, rows.flip(0), classes), carriers)
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
    assert evidence(rows_of(rows * 1e3, None, classes), carriers).log_p == pytest.approx(found.log_p, rel=1e-9)
    assert evidence(rows_of(rows), carriers).paper_log_p is None


def test_evidence_of_carriers_learnt():
    carriers = fresh_carriers(1, 10, 512, seed=5)[0]
    learnt = carriers.double() * 7
    own = evidence(rows_of(learnt, learnt), carriers)
    assert own.mean_cosine == pytest.approx(1) and own.log_p < -10_000 * LN10 and own.paper_log_p < -10_000 * LN10
    assert math.isfinite(own.log_p) and math.isfinite(own.paper_log_p)
    order = (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)
    assert evidence(rows_of(learnt[list(order)], None, order), carriers).log_p == own.log_p
    assert evidence(rows_of(learnt.roll(1, 0)), carriers).log_p > -12  # the right vectors at the wrong classes
    assert evidence(rows_of(-learnt), carriers).log_p == pytest.approx(0, abs=1e-12)
    # log10 p ≈ −C·d·m²/4.6 for a weak mark of cosine m
    aside = gaussian(10, 512, seed=6)
    aside -= (aside * carriers.double()).sum(1, keepdim=True) * carriers.double()
    weak = 0.2 * carriers.double() + math.sqrt(1 - 0.04) * torch.from_numpy(unit(aside.numpy()))
    assert evidence(rows_of(weak), carriers).log_p / LN10 == pytest.approx(-10 * 512 * 0.04 / 4.6, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(-30, 30))
def test_evidence_has_no_scale(scale):
    carriers = fresh_carriers(1, 5, 32, seed=7)[0]
    expected = evidence(rows_of(correlated(6)), carriers)
    found = evidence(rows_of(correlated(6) * 10**scale), carriers)
    assert found.log_p == pytest.approx(expected.log_p, rel=1e-9)
