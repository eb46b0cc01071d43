"""Fewer points for a curve that looks the same: the smallest and the largest value of each stretch are kept."""

from dataclasses import dataclass

import numpy as np

from megatron.report.metrics_file import Numbers, Series


@dataclass(frozen=True)
class Thinned:
    """What is drawn of a series. kept: its points. means: of each stretch, for smoothing; None if all are kept."""

    kept: Series
    means: Series | None = None


def thinned(series: Series, stretches: int) -> Thinned:
    """Keep at most 3 points for each of `stretches` stretches with the same number of points, and both ends.

    Kept are the smallest and the largest value of a stretch, and one that is no number if there is one, so that neither
    a spike nor a gap is lost. A stretch has its mean over the numbers in it.
    """
    total = len(series.steps)
    if total <= 4 * stretches:  # as many as would be kept, with the means
        return Thinned(series)
    size = -(-total // stretches)
    values = np.full((-(-total // size), size), np.nan)
    values.reshape(-1)[:total] = series.values
    gaps = np.isnan(values)
    gaps.reshape(-1)[total:] = False  # padding
    rows = np.arange(len(values)) * size
    has_number, has_gap = ~np.isnan(values).all(axis=1), gaps.any(axis=1)
    lowest = rows + np.where(np.isnan(values), np.inf, values).argmin(axis=1)
    highest = rows + np.where(np.isnan(values), -np.inf, values).argmax(axis=1)
    first_gap = rows + gaps.argmax(axis=1)
    ends = np.array([0, total - 1])
    kept = np.unique(np.concatenate([lowest[has_number], highest[has_number], first_gap[has_gap], ends]))
    middle = np.minimum(rows + size // 2, total - 1)[has_number]
    means = Series(series.steps[middle], _row_means(values[has_number]))
    return Thinned(Series(series.steps[kept], series.values[kept]), means)


def _row_means(values: Numbers) -> Numbers:
    """Means over the numbers of each row, which has at least one; sums that overflow do not warn."""
    with np.errstate(over="ignore"):
        means: Numbers = np.nanmean(values, axis=1)
    return means
