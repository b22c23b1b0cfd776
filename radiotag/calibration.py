"""The check of a null: the same suspect under null keys, which nobody marked with. Their p-values must be uniform."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from radiotag.keys import Key, null_carriers
from radiotag.radioactive import evidence, output_unknown
from radiotag.suspect import ClassVectors

TAIL = (0.1, 0.01, 0.001, 0.0001)  # p-values of null keys are counted up to each


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The same suspect under null keys: their p-values must be uniform, whatever the suspect."""

    n: int
    ks_p: float  # Kolmogorov–Smirnov, against the uniform law; of Bonferroni's p, against any below it
    rank: int  # of the true key among the n + 1, from 1: the smallest p-value
    histogram: tuple[int, ...]  # counts of p in ten equal bins
    tail: tuple[int, ...]  # how many p are at most each of TAIL
    tail_p: float  # of so many or more there, the least of the binomial p-values, corrected (Bonferroni)


def calibrate(
    vectors: ClassVectors,
    rows: Sequence[int],
    key: Key,
    log_p: float,
    count: int,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> Calibration:
    """The suspect's p-values under `count` null keys, beside the true key's, `log_p`.

    Null keys follow from the secret key by a hash (SHAKE-256), so that nobody draws others until they suit.
    Kolmogorov and Smirnov's test hardly sees the few smallest, by which suspects are accused: these are counted. Where
    the best of many outputs counts, corrected for the choice, p is larger than it need be, and small ones must not be
    too many.
    """
    vectors = replace(vectors, paper=None)  # nobody asks for the paper's statistic under null keys
    nulls, seed = [], key.secret + b"calibrate"
    for number in range(count):
        carriers, patterns = null_carriers(key, hashlib.shake_256(seed + number.to_bytes(8, "big")).digest)
        nulls.append(evidence(vectors, rows, carriers, patterns).log_p)
        if number % 10 == 9:
            tell("null keys", number + 1, count)
    p = np.exp(nulls)
    tail = [int((p <= level).sum()) for level in TAIL]
    return Calibration(
        n=count,
        ks_p=float(stats.kstest(p, "uniform", alternative="greater" if output_unknown(rows) else "two-sided").pvalue),
        rank=1 + sum(value <= log_p for value in nulls),
        histogram=tuple(np.histogram(p, bins=10, range=(0, 1))[0].tolist()),
        tail=tuple(tail),
        tail_p=min(1.0, len(TAIL) * float(stats.binom.sf(np.array(tail) - 1, count, TAIL).min())),
    )
