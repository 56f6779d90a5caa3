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


def plot_error(x: Tensor, x_hat: Tensor, *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """Scatter the quantization error x_hat - x against x.

    Inside the grid the points lie on a sawtooth of height one scale; clipped values leave it along a line
    of slope -1.
    """
    ax = ax if ax is not None else plt.gca()
    ax.plot(to_numpy(x), to_numpy(x_hat - x), ".", markersize=3, color=ERROR, label=label)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="x", ylabel="error, x̂ − x")
    if label is not None:
        ax.legend(loc="best")
    return ax


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
    low, high = ax.get_ylim()
    if high < 100 * low:  # too short for powers of ten: 50, 100, 200 instead
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="best")
    return ax


def plot_layer_errors(reports: dict, *, ax: Axes | None = None) -> Axes:
    """The output error of every layer, in the order of the model: {method: QuantizeReport}."""
    ax = ax if ax is not None else plt.gca()
    for (method, report), (color, marker) in zip(reports.items(), cycle(_LINES), strict=False):
        ax.plot([row.output_error for row in report.layers], marker, color=color, markersize=4, label=method)
    ax.set(xlabel="layer, in the order of the model", ylabel="relative output error", yscale="log")
    ax.legend(loc="best")
    return ax


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


def plot_bars(bars: dict[str, dict], *, ylabel: str, log: bool = False, ax: Axes | None = None) -> Axes:
    """Bars side by side: {name: {place: height}}, one colour a name, one cluster a place."""
    ax = ax if ax is not None else plt.gca()
    places, width = list(next(iter(bars.values()))), 0.8 / len(bars)
    for i, ((name, heights), (color, _)) in enumerate(zip(bars.items(), cycle(_LINES), strict=False)):
        left = [place - 0.4 + (i + 0.5) * width for place in range(len(places))]
        ax.bar(left, [heights[place] for place in places], width, color=color, label=name)
    ax.set(ylabel=ylabel, xticks=range(len(places)), yscale="log" if log else "linear")
    ax.set_xticklabels([str(place) for place in places])
    if len(bars) > 1:
        ax.legend(loc="best", fontsize="small")
    return ax


def plot_pareto(rows: list, *, ax: Axes | None = None) -> Axes:
    """Bits per weight of the whole model against KL, a point for each ledger row; below the stairs is nothing.

    A row with a KL of 0 (the float model) has no place on a logarithmic axis and is left out.
    """
    ax = ax if ax is not None else plt.gca()
    rows = [row for row in rows if row.kl > 0]
    methods = dict.fromkeys(row.method for row in rows)
    for method, (color, marker) in zip(methods, cycle(_LINES), strict=False):
        own = [row for row in rows if row.method == method]
        x, y, error = zip(*((r.bits_per_weight, r.kl, r.kl_error) for r in own), strict=True)
        ax.errorbar(x, y, yerr=error, fmt=marker, markersize=5, color=color, label=method)
    rows = sorted(rows, key=lambda row: (row.bits_per_weight, row.kl))
    least = np.minimum.accumulate([row.kl for row in rows])  # the least KL for at most so many bits
    ax.step([row.bits_per_weight for row in rows], least, where="post", color="0.6", zorder=0)
    ax.set(xlabel="bits per weight of the whole model", ylabel="KL to the float model", yscale="log")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
    return ax
