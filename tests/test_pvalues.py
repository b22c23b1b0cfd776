"""Every comparison and constant of the p-value code, against enumeration, closed forms and hashes made here.

`benchmarks/mutants.py` changes them one by one; what `test_radioactive.py` does not notice is noticed here.
"""

import hashlib
import itertools
import math
from fractions import Fraction
from statistics import NormalDist
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from helpers import unit
from scipy import stats

from radiotag import blackbox, calibration
from radiotag.blackbox import Queries, decoys_needed, pattern_effects
from radiotag.calibration import calibrate
from radiotag.errors import RadiotagError
from radiotag.keys import new_key, null_carriers
from radiotag.pairing import match_outputs
from radiotag.radioactive import (
    _tilt,
    bonferroni,
    cosine_log_sf,
    evidence,
    fisher,
    output_unknown,
    pattern_or_both,
    resampled_log_p,
    stouffer,
)
from radiotag.suspect import ClassVectors
from radiotag.verification import Finding, VerifyOptions, _black_box_finding, corrected

NORMAL = NormalDist()
TOGETHER = SimpleNamespace(nested=False, black_box_as_one=True)  # a key whose statistic tests all classes together


# ---------------------------------------------------------------- combining


def test_a_cosine_that_rounding_took_beyond_one_is_one():
    for dimension in (2, 3, 512):
        beyond = math.nextafter(1.0, 2.0)
        assert cosine_log_sf(beyond, dimension) == cosine_log_sf(1.0, dimension)
        assert cosine_log_sf(-beyond, dimension) == cosine_log_sf(-1.0, dimension)


def test_fisher_of_near_certainties_is_no_more_than_certain():
    """Where p is nearly 1, its logarithm is a rounding error, and must not become positive."""
    rng = np.random.default_rng(0)
    found = [
        fisher(-rng.random(classes) * size / classes)
        for classes in (1, 2, 10, 100, 1000) for size in (1e-3, 1e-2, 0.1, 0.5, 1)
    ]  # fmt: skip
    assert max(found) <= 0


def test_a_single_p_value_of_one_cannot_outweigh_all_others():
    """It counts as 1 − 1e-300: a normal score of −37, where 1 itself would be one without end."""
    with mpmath.workdps(40):
        lowest = mpmath.findroot(lambda z: mpmath.log(mpmath.erfc(-z / mpmath.sqrt(2)) / 2) + 300 * mpmath.log(10), -37)
        tail = mpmath.erfc((40 * 9 + lowest) / mpmath.sqrt(10) / mpmath.sqrt(2)) / 2
        forty = float(mpmath.log(mpmath.erfc(40 / mpmath.sqrt(2)) / 2))
        expected = float(mpmath.log(tail))
    assert stouffer(np.array([forty] * 9 + [0.0])) == pytest.approx(expected, rel=1e-12)


def test_bonferroni_by_hand():
    assert bonferroni(np.log([0.2, 0.01, 0.5])) == pytest.approx(math.log(0.03), rel=1e-12)
    assert bonferroni(np.log([0.9, 0.5, 0.6])) == 0
    assert bonferroni(np.log([0.25])) == pytest.approx(math.log(0.25), rel=1e-12)


def test_an_output_is_unknown_where_several_face_one_carrier():
    known = [(), (0,), (3,), (0, 1), (0, 0, 1), (1, 2, 2)]
    assert [output_unknown(rows) for rows in known] == [False] * 6
    assert [output_unknown(rows) for rows in ((0, 0), (2, 2), (1, 1, 1))] == [True] * 3


# ---------------------------------------------------------------- the true key among its decoys


def counted(values, grid):
    """p by the distribution of the sum of all classes' scores, whole numbers, term by term."""
    scores = np.rint((values - values.mean(0)) / values.std(0) * grid).astype(int)
    density = np.ones(1)
    for column in scores.T:
        density = np.convolve(density, np.bincount(column - column.min()) / len(column))
    return density[scores[0].sum() - scores.min(0).sum() :].sum()


def test_scores_are_rounded_to_a_grid():
    """20,000 steps for the standard deviations of all classes together, and 1,000 for each at most."""
    rng = np.random.default_rng(4)
    for classes, grid in ((2, 1000), (20, 1000), (25, 800), (59, 338)):
        values = rng.normal(size=(3, classes))
        values[0] += 0.3
        found = math.exp(resampled_log_p(values))
        assert found == pytest.approx(counted(values, grid), rel=1e-9)
        if classes > 20:
            for other in (grid - 1, grid + 1):
                assert found != pytest.approx(counted(values, other), rel=1e-6)


@pytest.mark.parametrize("other", [999, 1001, 2000])
def test_a_grid_is_never_finer_than_a_thousandth(other):
    """Of few classes, where two sums tie on one grid and not on another."""
    drawn = (np.random.default_rng(seed).normal(size=(3, 6)) for seed in range(10_000))
    told = next(values for values in drawn if abs(counted(values, other) - counted(values, 1000)) > 1e-6)
    assert math.exp(resampled_log_p(told)) == pytest.approx(counted(told, 1000), rel=1e-9)


@pytest.mark.parametrize(("classes", "grid"), [(2222, 9), (2857, 8), (5000, 8)])
def test_a_coarse_grid_has_eight_steps_at_least(classes, grid):
    """The same values in each of very many classes, so that the sum's law is a power in Fourier space."""

    def powered(column, grid):
        scores = np.rint((column - column.mean()) / column.std() * grid).astype(int)
        single = np.bincount(scores - scores.min()) / 4
        size = 2 ** math.ceil(math.log2(classes * len(single)))
        density = np.fft.irfft(np.fft.rfft(single, size) ** classes, size)
        return density[classes * (scores[0] - scores.min()) : classes * (len(single) - 1) + 1].sum()

    rng = np.random.default_rng(7)
    columns = (np.r_[0.0, rng.normal(size=3)] for _ in range(1000))
    kept = (column for column in columns if 1e-3 < powered(column, grid) < 0.999)
    told = next(
        column for column in kept
        if all(abs(powered(column, other) - powered(column, grid)) > 1e-6 for other in (grid - 1, grid + 1, 2 * grid))
    )  # fmt: skip
    found = math.exp(resampled_log_p(np.tile(told[:, None], classes)))
    assert found == pytest.approx(powered(told, grid), rel=1e-9)


@pytest.mark.parametrize("level", [0.3, -0.3])
@pytest.mark.parametrize(("spread", "counts"), [(5e-12, True), (1.5e-12, True), (7e-13, False), (3e-13, False)])
def test_what_rounding_leaves_of_equal_answers_says_nothing(level, spread, counts):
    """A standard deviation of 1e-12 of the largest value is where a class begins to count."""
    column = level * (1 + spread * np.array([[1.0], [-1.0]]))
    assert resampled_log_p(column if level > 0 else column[::-1]) == pytest.approx(math.log(0.5) if counts else 0)
    lone = np.c_[column if level > 0 else column[::-1], [[1.0], [0.0]]]
    assert resampled_log_p(lone) == pytest.approx(math.log(0.25 if counts else 0.5))


def test_a_true_key_that_is_last_has_a_p_of_one_and_no_more():
    rng = np.random.default_rng(6)
    for keys, classes, _ in itertools.product((2, 3, 5, 8), (1, 3, 12, 30), range(5)):
        values = rng.normal(size=(keys, classes))
        values[0] = values.min(0) - 0.1
        assert -1e-12 < resampled_log_p(values) <= 0


def tilted_sum(scores, tilt):
    """The mean of the sum of scores that are drawn with weights e^(tilt · score)."""
    return sum(
        float(sum(mpmath.exp(tilt * s) * s for s in column) / sum(mpmath.exp(tilt * s) for s in column))
        for column in scores.T.tolist()
    )


SCORES = np.array([[3, 900, -4], [-5, -700, 2], [1, 400, 1], [1, -600, 1]])  # sums at most 3 + 900 + 2, 0 in the mean


def test_the_tilt_brings_the_mean_to_the_observed_sum():
    for observed in (1, 40, 500, 880):
        assert tilted_sum(SCORES, _tilt(SCORES, observed)) == pytest.approx(observed, rel=1e-6)
    small = np.array([[0, 1], [1, 0], [3, 2]])  # sums of 7/3 in the mean, 5 at most
    assert _tilt(small, 2) == 0 and tilted_sum(small, _tilt(small, 3)) == pytest.approx(3, rel=1e-6)
    assert tilted_sum(small, _tilt(small, 4)) == pytest.approx(4, rel=1e-6)


def test_there_is_no_tilt_below_the_mean_and_none_beyond_what_floats_hold():
    """e^30 between the heaviest and the lightest: what is left of the mean's way to the largest sum is lost."""
    assert [_tilt(SCORES, observed) for observed in (0, -1, -1000)] == [0, 0, 0]
    assert _tilt(SCORES, 905) == pytest.approx(30 / 1600, rel=1e-12)
    assert _tilt(SCORES[:, [0, 2]], 5) == pytest.approx(30 / 8, rel=1e-12)


# ---------------------------------------------------------------- a key's verdict on a suspect

UPRIGHT = torch.eye(3)  # carriers of R^3, where p = (1 − t)/2
FEATURES = torch.tensor([[3.0, 4, 0], [0, 0, 0], [0, 0, 0], [8, 0, -6]], dtype=torch.float64)
PATTERN = torch.tensor([[5.0, 0, 12], [0, -3, 4], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
ROWS = (0, 1, 2, 2)
FEATURE_COSINES, PATTERN_COSINES = (0.6, -0.6), (5 / 13, -0.6)  # of the classes 0 and 3, and 0 and 1


def stouffer_by_hand(cosines):
    scores = [NORMAL.inv_cdf((1 + t) / 2) for t in cosines]
    return math.log(NORMAL.cdf(-sum(scores) / math.sqrt(len(scores))))


def test_evidence_where_some_classes_have_no_direction():
    found = evidence(ClassVectors(features=FEATURES, pattern=PATTERN, paper=FEATURES), ROWS, UPRIGHT, UPRIGHT)
    each = [[math.log((1 - t) / 2) for t in cosines] for cosines in (FEATURE_COSINES, PATTERN_COSINES)]
    first = float(pattern_or_both(np.array(each[1][0]), np.array(each[0][0])))
    assert found.per_class == pytest.approx((first, each[1][1], each[0][1]), rel=1e-12)
    assert found.compared == (0, 1, 3)
    assert found.mean_cosine == pytest.approx(0, abs=1e-15)
    assert found.pattern_cosine == pytest.approx((5 / 13 - 0.6) / 2, rel=1e-12)
    combined = [np.array(stouffer_by_hand(cosines)) for cosines in (FEATURE_COSINES, PATTERN_COSINES)]
    assert found.log_p == pytest.approx(float(pattern_or_both(combined[1], combined[0])), rel=1e-12)
    assert math.exp(found.paper_log_p) == pytest.approx(stats.combine_pvalues([0.2, 0.8], "fisher").pvalue, rel=1e-12)


def test_evidence_of_patterns_alone():
    found = evidence(ClassVectors(features=0 * FEATURES, pattern=PATTERN), ROWS, UPRIGHT, UPRIGHT)
    assert (found.mean_cosine, found.compared, found.paper_log_p) == (0, (0, 1), None)
    assert found.pattern_cosine == pytest.approx((5 / 13 - 0.6) / 2, rel=1e-12)
    assert found.per_class == pytest.approx([math.log((1 - t) / 2) for t in PATTERN_COSINES], rel=1e-12)
    assert found.log_p == pytest.approx(stouffer_by_hand(PATTERN_COSINES), rel=1e-12)


def test_evidence_of_features_alone():
    one = PATTERN[[0]]
    for pattern, patterns in ((None, UPRIGHT), (one, None), (None, None), (0 * one, UPRIGHT)):
        found = evidence(ClassVectors(features=FEATURES[[0]], pattern=pattern), (0,), UPRIGHT, patterns)
        assert (found.per_class, found.compared) == ((pytest.approx(math.log(0.2), rel=1e-12),), (0,))
        assert found.mean_cosine == pytest.approx(0.6, rel=1e-12) and found.log_p == pytest.approx(math.log(0.2))
        assert found.pattern_cosine == (None if pattern is None or patterns is None else 0)


def test_the_best_output_of_the_papers_statistic_is_corrected_for_the_choice():
    vectors = torch.tensor([[3.0, 4, 0], [0, 0, 0], [-1, 0, 0], [5, 0, 12]], dtype=torch.float64)
    found = evidence(ClassVectors(features=vectors, paper=vectors), (0, 0, 0, 0), UPRIGHT)
    assert found.paper_log_p == found.log_p == pytest.approx(math.log(3 * 0.2), rel=1e-12)  # of those that have one


# ---------------------------------------------------------------- null keys


def quantiles(stream, rows, columns):
    """Unit vectors from words of 64 bits, by the normal law's quantiles."""
    words = np.frombuffer(stream, np.uint64).tolist()
    return unit(np.array([NORMAL.inv_cdf((word + 0.5) / 2**64) for word in words]).reshape(rows, columns))


def test_null_keys_are_quantiles_of_one_stream():
    key, asked = new_key({}, {}, 6, 4), []

    def digest(count):
        asked.append(count)
        return hashlib.shake_256(b"stream").digest(count)

    carriers, patterns = null_carriers(key, digest)
    assert asked == [8 * 4 * (6 + 51)]
    stream = hashlib.shake_256(b"stream").digest(asked[0])
    assert carriers.numpy() == pytest.approx(quantiles(stream[: 8 * 4 * 6], 4, 6), rel=1e-5, abs=1e-7)
    assert patterns.numpy() == pytest.approx(quantiles(stream[8 * 4 * 6 :], 4, 51), rel=1e-5, abs=1e-7)


def test_calibration_is_made_of_the_keys_own_null_keys():
    """In R^3 p is (1 − t)/2. Null keys follow from SHAKE-256 of the secret, a word and their number in eight bytes."""
    key, count, told = new_key({}, {}, 3, 1), 35, []
    vector = np.array([1.0, 2, 2]) / 3
    p = []
    for number in range(count):
        seed = key.secret + b"calibrate" + bytes(7) + bytes([number])
        carrier = quantiles(hashlib.shake_256(seed).digest(8 * 3), 1, 3)[0].astype(np.float32).astype(np.float64)
        p.append((1 - carrier @ vector / np.linalg.norm(carrier)) / 2)
    vectors = ClassVectors(features=torch.from_numpy(vector[None]), paper=torch.ones(1, 3))
    true = float(np.log(sorted(p)[4])) + 1e-5  # between the fifth and the sixth
    found = calibrate(vectors, (0,), key, judged(true), count, lambda *said: told.append(said))
    assert told == [("null keys", done, 35) for done in (10, 20, 30)]
    assert (found.n, found.rank) == (35, 6)
    assert found.histogram == tuple(sum(i <= 10 * v < i + 1 for v in p) for i in range(10))
    assert found.tail == tuple(sum(v <= level for v in p) for level in (0.1, 0.01, 0.001, 0.0001))
    ordered = sorted(p)
    above = max((i + 1) / count - v for i, v in enumerate(ordered))
    below = max(v - i / count for i, v in enumerate(ordered))
    assert found.ks_p == pytest.approx(stats.kstwo.sf(max(above, below), count), rel=1e-3)  # carriers are of 32 bits


def judged(log_p, sets=1):
    """What matters here of a suspect's result."""
    return SimpleNamespace(log_p=log_p, sets=sets)


def answered(monkeypatch, log_p):
    """Let the null keys have these p-values."""
    answers = iter(log_p)
    monkeypatch.setattr(calibration, "evidence", lambda *_: SimpleNamespace(log_p=next(answers)))


def test_only_too_many_small_p_values_speak_against_the_best_of_many_outputs(monkeypatch):
    p, key, vectors = [0.3, 0.31, 0.9], new_key({}, {}, 3, 1), ClassVectors(features=torch.ones(2, 3))
    answered(monkeypatch, np.log(p))
    found = calibrate(vectors, (0, 0), key, judged(0.0), 3)
    assert found.ks_p == pytest.approx(stats.ksone.sf(2 / 3 - 0.31, 3), rel=1e-9)
    answered(monkeypatch, np.log(p))
    found = calibrate(vectors, (0, 1), key, judged(0.0, sets=2), 3)
    assert found.ks_p == pytest.approx(stats.ksone.sf(2 / 3 - 0.31, 3), rel=1e-9)
    answered(monkeypatch, np.log(p))
    found = calibrate(vectors, (0, 1), key, judged(0.0), 3)
    assert found.ks_p == pytest.approx(stats.kstwo.sf(2 / 3 - 0.31, 3), rel=1e-9)


def test_a_p_value_counts_where_it_is_reached(monkeypatch):
    key, vectors = new_key({}, {}, 3, 1), ClassVectors(features=torch.ones(1, 3))
    answered(monkeypatch, np.log([5e-5, 2e-4, 5e-3, 0.05, 0.5]))
    assert calibrate(vectors, (0,), key, judged(0.0), 5).tail == (4, 3, 2, 1)
    answered(monkeypatch, [math.log(0.7), -1.0, 0.0, -1.0])
    monkeypatch.setattr(calibration, "TAIL", (1.0, 0.5))
    found = calibrate(vectors, (0,), key, judged(-1.0), 4)
    assert (found.rank, found.tail) == (3, (4, 2))  # a tie with a null key is the suspect's gain
    some = sum(math.comb(4, k) for k in (2, 3, 4)) / 2**4  # two or more of four, at a level of a half
    assert found.tail_p == pytest.approx(min(1, 2 * some)) == 1
    answered(monkeypatch, [-9.0, -9.0, -9.0, 0.0])
    monkeypatch.setattr(calibration, "TAIL", (0.5, 0.1, 0.01))
    found = calibrate(vectors, (0,), key, judged(-9.5), 4)
    assert (found.rank, found.tail) == (1, (3, 3, 3))
    assert found.tail_p == pytest.approx(3 * (4 * 0.01**3 * 0.99 + 0.01**4))


# ---------------------------------------------------------------- verdicts


def finding(log10_p):
    return Finding(
        path="m.pt", sha256="", architecture="", log10_p=log10_p, log10_p_corrected=0.5, detected=False,
        paper_log10_p=None, mean_cosine=None, pattern_cosine=None, alignment_r2=None, classes_used=1, sets=1,
        first_classes=1,
        method="",
        warnings=(),
    )  # fmt: skip


def test_verdicts_are_holms():
    found = corrected([finding(value) for value in (-4.2, -1.0, -5.0, 0.0)], 1e-4)
    expected = [math.log10(3 * 10**-4.2), math.log10(2 * 0.1), math.log10(4 * 1e-5), 0]
    assert [one.log10_p_corrected for one in found] == pytest.approx(expected, rel=1e-12)
    assert [one.detected for one in found] == [False, False, True, False]
    assert [one.log10_p for one in found] == [-4.2, -1.0, -5.0, 0.0]
    assert [corrected([finding(value)], 1.0)[0].detected for value in (0.0, -1.0)] == [True, True]  # at most alpha
    assert [corrected([finding(value)], 0.5)[0].detected for value in (-0.3, -0.31)] == [False, True]


# ---------------------------------------------------------------- the black-box test


def logit(p):
    return math.log(p / (1 - p))


def queries_of(rows, labels, keys=0):
    names = tuple(tuple(f"{row}-{i}" for i in range(len(rows))) for row in range(2 * keys))
    return Queries(images=(), rows=rows, labels=labels, names=names)


def test_pattern_effects_by_hand():
    """Two keys, three classes of one, two and one images; the last is not answered for under the second key."""
    queries = queries_of((2, 0, 2, 1, 2), ("c", "a", "c", "b", "c"))
    answers = torch.from_numpy(np.random.default_rng(2).uniform(0.1, 0.9, (4, 5, 4)))
    answers[2, 3] = math.nan
    answers[0, 0, 3], answers[1, 0, 3] = 1.0, 0.0  # as sure as 1 − 1e-4, not without end
    found = pattern_effects(queries, answers, [(3, 2), (1, 0), (0, 1)])

    def mean(row, images, output):
        return np.mean([logit(min(max(float(answers[row, i, output]), 1e-4), 1 - 1e-4)) for i in images])

    pairs = (((0, 2, 4), 3), ((1,), 1))
    expected = [[mean(2 * k, *pair) - mean(2 * k + 1, *pair) for pair in pairs] for k in range(2)]
    assert found == pytest.approx(np.array(expected), rel=1e-12)


def usual_answers():
    """The marking network's for two keys, three images and six classes; of which it names the last for "b"."""
    usual = torch.from_numpy(np.random.default_rng(3).uniform(0.05, 0.15, (4, 3, 6)))
    usual[:, :, 5] = torch.tensor([[0.9, 0.05, 0.8], [0.1, 0.9, 0.05], [0.05, 0.95, 0.1], [0.9, 0.8, 0.9]])
    return usual


@pytest.mark.parametrize("missing", [False, True])
def test_labels_are_compared_with_labels(missing):
    queries, usual = queries_of((1, 1, 1), ("b",) * 3), usual_answers()
    labels = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]])
    answers = torch.nn.functional.one_hot(labels, 2).double()
    if missing:
        answers[:, 2] = math.nan
    images = range(2 if missing else 3)
    sure = logit(1 - 1e-4)
    own = [np.mean([sure if labels[row, i] else -sure for i in images]) for row in range(4)]
    its = [np.mean([sure if usual[row, i].argmax() == 5 else -sure for i in range(3)]) for row in range(4)]
    expected = [own[0] - own[1] - (its[0] - its[1]), own[2] - own[3] - (its[2] - its[3])]
    found = pattern_effects(queries, answers, [(1, 1)], usual, ("x",) * 5 + ("b",))
    assert found[:, 0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("near", [(0.4, 0.3), (0.6, 0.7), (0.4, math.nan)])
def test_probabilities_are_compared_with_probabilities(near):
    """Even if many of them are 0 or 1."""
    queries, usual = queries_of((1, 1, 1), ("b",) * 3), usual_answers()
    answers = torch.nn.functional.one_hot(torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]]), 2).double()
    answers[0, 1, 1], answers[2, 0, 1] = near
    found = pattern_effects(queries, answers, [(1, 1)], usual, ("x",) * 5 + ("b",))
    plain = pattern_effects(queries, answers, [(1, 1)])
    its = [np.mean([logit(float(usual[row, i, 5])) for i in range(3)]) for row in range(4)]
    assert (plain - found)[:, 0] == pytest.approx([its[0] - its[1], its[2] - its[3]], rel=1e-9)


def test_a_suspect_that_no_pattern_moves_is_given_none_of_the_marking_networks_answers():
    queries, usual = queries_of((1, 0, 1), ("b", "a", "b")), usual_answers()
    answers = torch.full((4, 3, 2), 0.3, dtype=torch.float64)
    found = pattern_effects(queries, answers, [(0, 1), (1, 0)], usual, ("a", "x", "x", "x", "x", "b"))
    assert np.abs(found).max() == 0
    named = pattern_effects(queries, answers + usual[:, :, 4:], [(1, 1)], usual, ("x",) * 6)
    assert (named == pattern_effects(queries, answers + usual[:, :, 4:], [(1, 1)])).all()  # named by neither


def test_a_class_that_nobody_was_asked_about_is_left_out():
    queries = queries_of((1, 0), ("b", "a"))
    answers = torch.from_numpy(np.random.default_rng(2).uniform(0.1, 0.9, (6, 2, 4)))
    assert pattern_effects(queries, answers, [(0, 2), (1, 1)]).shape == (3, 1)
    with pytest.raises(RadiotagError, match="under every key"):
        pattern_effects(queries, answers, [(0, 2)])


def least_decoys(classes, alpha):
    """By trial, in fractions."""
    return next(k for k in itertools.count(23) if Fraction(k + 1) ** classes >= Fraction(105, 100) / alpha)


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
def test_there_are_as_few_decoys_as_alpha_allows(classes):
    for root in (2, 23, 24, 25, 26, 30, 97, 101, 1000):
        for more in (Fraction(0), Fraction(1, 2), Fraction(5, 10**9), Fraction(-1, 10**6), Fraction(1, 10**6)):
            alpha = Fraction(105, 100) / (root + more) ** classes
            assert decoys_needed(classes, float(alpha)) == least_decoys(classes, alpha), (root, more)
    assert decoys_needed(1, 1.05e-5) == decoys_needed(1, 1.04e-5) == 99_999
    assert decoys_needed(1, 1.06e-5) == 99_056 and blackbox.MOST_DECOYS == 99_999


def test_a_black_box_finding_by_hand():
    """Ten keys, two classes: of the outputs 3 and 0, of which the images of row 1 say the first."""
    queries = queries_of((4, 1, 4, 1, 4), ("d", "b", "d", "b", "d"), keys=10)
    rng = np.random.default_rng(5)
    answers = torch.from_numpy(rng.uniform(0.01, 0.1, (20, 5, 4)))
    for image, output in enumerate((0, 3, 0, 3, 0)):
        answers[:, image, output] = torch.from_numpy(rng.uniform(0.5, 0.8, 20))
    answers[0, :, [0, 3]] += 0.15
    answers[3, 2] = math.nan
    found = _black_box_finding("http://m", queries, answers, (None, ()), TOGETHER, VerifyOptions(alpha=0.01))
    effects = np.array([
        [
            np.nanmean([logit(float(answers[2 * k, i, output])) for i in images])
            - np.nanmean([logit(float(answers[2 * k + 1, i, output])) for i in images])
            for output, images in ((3, (1, 3)), (0, (0, 2, 4)))
        ]
        for k in range(10)
    ])  # fmt: skip
    scores = np.rint((effects - effects.mean(0)) / effects.std(0) * 1000)
    p = np.mean([sum(pair) >= scores[0].sum() for pair in itertools.product(*scores.T)])
    assert found.log10_p == found.log10_p_corrected == pytest.approx(math.log10(p), rel=1e-9)
    assert (found.path, found.sha256, found.architecture, found.method) == ("http://m", "", "unknown", "black-box")
    assert (found.detected, found.classes_used, found.decoys, found.warnings) == (False, 2, 9, ())
    (said,) = _black_box_finding("m", queries, answers, (None, ()), TOGETHER, VerifyOptions(alpha=0.0099)).warnings
    assert said == "p cannot be below 1.0e-02 with 9 decoys and 2 of the classes: ask with more --decoys"


def test_a_black_box_finding_of_nested_classes_by_hand():
    """Three classes in the key's order 2, 0, 1: the first one, the first two and all are tested, times three."""
    queries = queries_of((0, 1, 2), ("a", "b", "c"), keys=20)
    rng = np.random.default_rng(5)
    answers = torch.from_numpy(rng.uniform(0.01, 0.05, (40, 3, 3)))
    for image in range(3):
        answers[:, image, image] = torch.from_numpy(rng.uniform(0.5, 0.8, 40))
    answers[0, 2, 2], answers[1, 2, 2] = 0.95, 0.2  # the class that comes first, under the true key
    key = SimpleNamespace(nested=True, black_box_as_one=True, class_order=(2, 0, 1))
    found = _black_box_finding("m", queries, answers, (None, ()), key, VerifyOptions())
    effects = np.array([
        [logit(float(answers[2 * k, i, i])) - logit(float(answers[2 * k + 1, i, i])) for i in (2, 0, 1)]
        for k in range(20)
    ])  # fmt: skip
    sets = [resampled_log_p(effects[:, :size]) for size in (1, 2, 3)]
    assert found.log10_p == pytest.approx(min(0.0, (min(sets) + math.log(3)) / math.log(10)))
    assert found.first_classes == (1, 2, 3)[int(np.argmin(sets))] and found.classes_used == 3


def test_a_black_box_suspect_may_know_some_of_the_classes_or_none():
    queries = queries_of((0, 1, 1), ("a", "b", "b"), keys=4)
    answers = torch.full((8, 3, 2), 0.05, dtype=torch.float64)
    answers[:, 1:, 0] = torch.from_numpy(np.random.default_rng(1).uniform(0.6, 0.9, (8, 2)))
    answers[:, 0] = math.nan  # no answer at all for the first class: it has no output
    found = _black_box_finding("m", queries, answers, (None, ()), TOGETHER, VerifyOptions())
    assert (found.classes_used, found.decoys) == (1, 3)
    assert round(4 * 10**found.log10_p, 9) in {1, 2, 3, 4}
    assert found.warnings == ("p cannot be below 2.5e-01 with 3 decoys and 1 of the classes: ask with more --decoys",)
    with pytest.raises(RadiotagError, match="m knows none of the classes"):
        _black_box_finding("m", queries, answers * 0 + 0.5, (None, ()), TOGETHER, VerifyOptions())


@pytest.mark.parametrize(("many", "few"), [(1, 4), (4, 1)])
def test_an_output_is_found_by_the_images_of_its_class_alone(many, few):
    queries = queries_of((many,) * 5 + (few,), ("m",) * 5 + ("f",), keys=3)
    answers = torch.from_numpy(np.random.default_rng(8).uniform(0.01, 0.05, (6, 6, 4)))
    answers[:, :5, 2] += 0.8
    answers[:, 5, 1] += 0.8
    assert _black_box_finding("m", queries, answers, (None, ()), TOGETHER, VerifyOptions()).classes_used == 2


# ---------------------------------------------------------------- which output is which class


def matched(*means, named=None):
    return match_outputs(torch.tensor(means, dtype=torch.float64), named)


def test_a_class_that_gets_no_more_than_chance_has_no_output():
    assert [matched([share]) for share in (0.49, 0.5, 0.51)] == [[-1], [-1], [0]]  # a sigmoid: present, or not
    assert [matched([share, 0.2]) for share in (0.5, 0.51)] == [[-1], [0]]
    assert [matched([share, 0.2, 0.3]) for share in (1 / 3, 0.34, 0.45)] == [[-1], [0], [0]]
    assert matched([0.2] * 4 + [0.21]) == [4]
    assert matched([0.9, 0.1], [0.8, 0.2], [0.1, 0.9]) == [0, -1, 1]  # more classes than outputs


def test_a_name_is_believed_from_half_of_the_best_on():
    best = [0.5, 0.25, 0.25]
    assert matched(best, named=[1]) == [1] and matched([0.6, 0.29, 0.11], named=[1]) == [0]
    assert matched([0.1, 0.6, 0.3], named=[2]) == [2] and matched([0.1, 0.61, 0.29], named=[2]) == [1]
    assert matched([0.25, 0.25, 0.25, 0.25], named=[3]) == [3]  # where nothing is known, the name is
    assert matched([0.9, 0.1, 0.0], [0.3, 0.3, 0.3], named=[0, 2]) == [0, 2]
    assert matched([0.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.7], named=[3, 0]) == [3, 0]


def test_no_two_classes_share_an_output():
    assert matched([0.6, 0.4, 0.0], [0.4, 0.5, 0.1], named=[0, 0]) == [0, 1]
    assert matched([0.0, 0.6, 0.4], [0.1, 0.4, 0.5], named=[1, 1]) == [1, 2]
    assert matched([0.3, 0.3, 0.3], [0.3, 0.3, 0.3], [0.0, 0.1, 0.9]) == [-1, -1, 2]
    chain = matched([0.5, 0.3, 0.2], [0.0, 0.5, 0.4], [0.1, 0.1, 0.8], named=[1, 2, 2])
    assert chain == [0, 1, 2]  # the third keeps its output, the second takes its own, and so must the first


def test_the_classes_in_question_are_those_that_share():
    assert matched([0.4, 0.4, 0.2, 0.0], [0.3, 0.6, 0.1, 0.0], [0.0, 0.1, 0.4, 0.5], named=[1, 1, 2]) == [0, 1, 2]


def test_scores_of_one_class_are_rounded_to_thousandths():
    """Two keys that differ by less tie: the tie counts for the suspect."""
    tied = np.array([[1.0004], [1.0], [-1.0], [-1.0]])
    assert math.exp(resampled_log_p(tied)) == pytest.approx(1 / 2)
    apart = np.array([[1.002], [1.0], [-1.0], [-1.0]])
    assert math.exp(resampled_log_p(apart)) == pytest.approx(1 / 4)
