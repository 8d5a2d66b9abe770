"""The study's statistics: paired differences with their sign test and interval, and correlations over groups of runs."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Paired:
    """Differences `after - before` of paired seeds."""

    before: float  # means
    after: float
    difference: float
    low: float  # 95 % interval of the mean difference, by Student's t
    high: float
    below: int  # seeds with a negative difference
    ties: int
    seeds: int
    p: float  # two-sided sign test, without the ties


def paired(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Compare two lists whose entries belong together."""
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"expected two lists of the same length, 2 at least, got {len(before)} and {len(after)}")
    differences = np.subtract(after, before)
    below, ties, n = int((differences < 0).sum()), int((differences == 0).sum()), len(differences)
    half = stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5
    mean = differences.mean()
    p = stats.binomtest(below, n - ties).pvalue if n > ties else 1.0
    return Paired(np.mean(before), np.mean(after), mean, mean - half, mean + half, below, ties, n, p)


@dataclass(frozen=True)
class Correlation:
    """Of two measures over a number of points."""

    pearson: float
    r_squared: float
    low: float  # 95 % interval of R^2, by drawing whole groups anew
    high: float
    spearman: float
    points: int


def correlation(x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable], draws: int = 2000) -> Correlation:
    """How well a line through `x` explains `y`. Points of one group, such as the checkpoints of a seed, are not independent.

    All numbers are NaN where one of the two does not vary.
    """
    a, b = np.asarray(x, float), np.asarray(y, float)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(*[math.nan] * 5, len(a))
    members = [np.flatnonzero([g == group for g in groups]) for group in dict.fromkeys(groups)]
    generator = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        drawn = np.concatenate([members[k] for k in generator.integers(len(members), size=len(members))])
        if np.ptp(a[drawn]) > 0 and np.ptp(b[drawn]) > 0:
            found.append(np.corrcoef(a[drawn], b[drawn])[0, 1] ** 2)
    r = np.corrcoef(a, b)[0, 1]
    low, high = np.quantile(found, [0.025, 0.975])
    return Correlation(r, r**2, low, high, stats.spearmanr(a, b).statistic, len(a))
