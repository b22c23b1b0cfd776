"""Calibration: the same suspect is tested with null keys, which never marked anything. Their p must be uniform."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from radiotag.keys import Key, null_carriers
from radiotag.radioactive import Evidence, evidence, output_unknown
from radiotag.suspect import ClassVectors

TAIL = (0.1, 0.01, 0.001, 0.0001)  # levels up to which the p-values of null keys are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The p-values of null keys on one suspect, summarised: they must be uniform, whatever the suspect."""

    n: int  # number of null keys
    ks_p: float  # Kolmogorov–Smirnov test of uniformity; one-sided (too many small p) if p is Bonferroni's
    rank: int  # of the true key among all n + 1 keys; 1 is the smallest p-value
    histogram: tuple[int, ...]  # counts of p in ten equal bins
    tail: tuple[int, ...]  # how many p are at most each level of TAIL
    tail_p: float  # binomial p-value of such a tail: the smallest over the levels, corrected (Bonferroni)


def calibrate(
    vectors: ClassVectors,
    rows: Sequence[int],
    key: Key,
    result: Evidence,
    count: int,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> Calibration:
    """Test a suspect's vectors with `count` null keys, and rank the true key's `result` among them.

    Null keys follow from the secret key by a hash (SHAKE-256), so that nobody can draw others until the result suits.
    The Kolmogorov–Smirnov test is weak for the few smallest p-values, which decide about accusations; so these are
    counted, too. If the best of several tests counts (Bonferroni), p is conservative; then the test only checks that
    small p-values are not too many.
    """
    vectors = replace(vectors, paper=None)  # the paper's statistic is not needed for null keys
    order = key.class_order if result.sets > 1 else None
    nulls, seed = [], key.secret + b"calibrate"
    for number in range(count):
        carriers, patterns = null_carriers(key, hashlib.shake_256(seed + number.to_bytes(8, "big")).digest)
        nulls.append(evidence(vectors, rows, carriers, patterns, order).log_p)
        if number % 10 == 9:
            tell("null keys", number + 1, count)
    conservative = output_unknown(rows) or result.sets > 1  # corrected for a choice
    p = np.exp(nulls)
    tail = [int((p <= level).sum()) for level in TAIL]
    return Calibration(
        n=count,
        ks_p=float(stats.kstest(p, "uniform", alternative="greater" if conservative else "two-sided").pvalue),
        rank=1 + sum(value <= result.log_p for value in nulls),
        histogram=tuple(np.histogram(p, bins=10, range=(0, 1))[0].tolist()),
        tail=tuple(tail),
        tail_p=min(1.0, len(TAIL) * float(stats.binom.sf(np.array(tail) - 1, count, TAIL).min())),
    )
