"""Pictures: a result in, Axes out. One colour has one meaning throughout the workbook."""

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

# Okabe and Ito's palette, told apart with any colour vision.
FLOAT, QUANTIZED, ERROR, CLIPPED, OTHER = "0.65", "#0072B2", "#D55E00", "#CC79A7", "#009E73"
_LINES = tuple(zip((ERROR, QUANTIZED, OTHER, CLIPPED, "0.4", "#E69F00", "#56B4E9"), "osD^v*P", strict=True))


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().flatten().numpy()


def plot_histogram(
    x: Tensor, *, bins: int = 120, ax: Axes | None = None, label: str | None = None, color: str = FLOAT
) -> Axes:
    """How many elements of x lie where, on a logarithmic count, so that a single outlier can be seen."""
    ax = ax if ax is not None else plt.gca()
    ax.hist(to_numpy(x), bins=bins, color=color, label=label, log=True)
    ax.set(xlabel="value", ylabel="count (log)")
    if label is not None:
        ax.legend(loc="best")
    return ax


def plot_number_line(x: Tensor, x_hat: Tensor, *, ax: Axes | None = None) -> Axes:
    """A few reals on one line, the grid points they are rounded to on another, an arrow for each."""
    ax = ax if ax is not None else plt.gca()
    for start, end in zip(to_numpy(x), to_numpy(x_hat), strict=True):
        ax.annotate("", (end, 0.05), (start, 0.95), arrowprops={"arrowstyle": "->", "color": ERROR})
    ax.plot(to_numpy(x), np.ones(x.numel()), "o", color=FLOAT, label="x")
    ax.plot(to_numpy(x_hat), np.zeros(x.numel()), "s", color=QUANTIZED, label="x̂, on the grid")
    ax.set(yticks=[], ylim=(-0.3, 1.3), xlabel="real value")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return ax


def plot_against_bits(rows: dict[str, dict[int, tuple[float, float]]], *, ylabel: str, ax: Axes | None = None) -> Axes:
    """One line a method: {method: {bits: (value, standard error)}}, on a logarithmic scale with error bars."""
    ax = ax if ax is not None else plt.gca()
    for (method, points), (color, marker) in zip(rows.items(), cycle(_LINES), strict=False):
        bits = sorted(points)
        values, errors = zip(*(points[b] for b in bits), strict=True)
        ax.errorbar(bits, values, yerr=errors, marker=marker, color=color, capsize=3, label=method)
    ax.set(xlabel="bits", ylabel=ylabel, yscale="log", xticks=bits)
    _fill_ticks(ax)
    ax.legend(loc="best")
    return ax


def _fill_ticks(ax: Axes) -> None:
    """On a logarithmic axis that is too short for powers of ten: 50, 100, 200 instead."""
    low, high = ax.get_ylim()
    if high < 100 * low:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())


def plot_curves(curves: dict[str, tuple], *, xlabel: str, ylabel: str, log: str = "", ax: Axes | None = None) -> Axes:
    """One line for each name: {name: (x, y)}. log names the logarithmic axes: "", "x", "y" or "xy"."""
    ax = ax if ax is not None else plt.gca()
    for (name, (x, y)), (color, marker) in zip(curves.items(), cycle(_LINES), strict=False):
        ax.plot(x, y, marker=marker, markersize=4, color=color, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set(**{f"{axis}scale": "log" for axis in log})
    if len(curves) > 1:
        ax.legend(loc="best", fontsize="small")
    return ax


def plot_bars(
    bars: dict[str, dict], *, ylabel: str, log: bool = False, color: str | None = None, ax: Axes | None = None
) -> Axes:
    """Bars side by side: {name: {place: height}}, one colour a name, one cluster a place.

    log: dots, since a logarithmic axis has no 0 for bars to stand on. color: of a single name that is no error.
    """
    ax = ax if ax is not None else plt.gca()
    places, width = list(next(iter(bars.values()))), 0.8 / len(bars)
    for i, ((name, heights), (hue, marker)) in enumerate(zip(bars.items(), cycle(_LINES), strict=False)):
        middles = [place - 0.4 + (i + 0.5) * width for place in range(len(places))]
        drawn = middles, [heights[place] for place in places]
        if log:
            ax.plot(*drawn, marker, color=color or hue, label=name)
        else:
            ax.bar(*drawn, width, color=color or hue, label=name)
    ax.set(ylabel=ylabel, xticks=range(len(places)), yscale="log" if log else "linear")
    ax.set_xticklabels([str(place) for place in places])
    if len(bars) > 1:
        ax.legend(loc="best", fontsize="small")
    return ax


def plot_pareto(
    points: dict[str, tuple[float, float]], *, xlabel: str, ylabel: str, limit: float | None = None,
    mine: str | None = None, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Sizes and losses, {name: (size, loss)}, and the line below which none of them lies; mine is drawn as a star.

    The line is the Pareto front: at each size the least loss of whatever is no larger. limit: a size not to exceed.
    """
    ax = ax if ax is not None else plt.gca()
    front = pareto_front(points.values())
    if front:
        ax.step(*zip(*front, strict=True), where="post", color="0.7", zorder=0, label="the best so far")
    others, styles = [name for name in points if name != mine], [s for s in _LINES[1:] if s[1] != "*"]
    for name, (color, marker) in zip(others, cycle(styles), strict=False):
        ax.plot(*points[name], marker, color=color, markersize=8, linestyle="", label=name)
    if mine is not None:
        ax.plot(*points[mine], "*", color=ERROR, markersize=16, markeredgecolor="black", linestyle="", label=mine)
    if limit is not None:
        ax.axvline(limit, color="black", linestyle=":", label="the budget")
    ax.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
    _fill_ticks(ax)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    return ax


def pareto_front(points) -> list[tuple[float, float]]:
    """Those of the points (size, loss) that no other beats in one number without losing in the other, smallest first.

    >>> pareto_front([(3, 1.0), (1, 5.0), (2, 6.0), (2, 2.0), (3, 2.0)])
    [(1, 5.0), (2, 2.0), (3, 1.0)]
    """
    front = []
    for size, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((size, loss))
    return front
