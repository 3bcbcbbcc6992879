"""Figures of repeated measurements: median with spread, ratios of pairs, a line through points."""

from collections.abc import Sequence
from statistics import linear_regression, median, quantiles

Summary = dict[str, float]


def summarize(values: Sequence[float]) -> Summary:
    """Median, quartiles and extremes.

    >>> summarize([3.0, 1.0, 2.0, 4.0, 5.0])
    {'median': 3.0, 'q1': 2.0, 'q3': 4.0, 'min': 1.0, 'max': 5.0}
    """
    first, middle, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return {"median": middle, "q1": first, "q3": third, "min": min(values), "max": max(values)}


def summarize_ratios(values: Sequence[float], baseline: Sequence[float]) -> Summary:
    """`summarize` of the ratios of one round each, in which a drift of the machine cancels.

    >>> summarize_ratios([1.0, 4.0, 9.0], [2.0, 4.0, 6.0])["median"]
    1.0
    """
    return summarize([value / base for value, base in zip(values, baseline, strict=True)])


def percentile_95(values: Sequence[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1))]


def fit_line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares: intercept, slope and r², the share of the variance of y that the line explains."""
    slope, intercept = linear_regression(x, y)
    mean = sum(y) / len(y)
    residual = sum((value - intercept - slope * at) ** 2 for at, value in zip(x, y, strict=True))
    total = sum((value - mean) ** 2 for value in y)
    return {"intercept": intercept, "slope": slope, "r2": 1 - residual / total if total else 1.0}


__all__ = ["fit_line", "median", "percentile_95", "summarize", "summarize_ratios"]
