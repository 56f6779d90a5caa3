"""Artists that several explorers draw, and how they move."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from quantlab.plots import CLIPPED, ERROR, OTHER


def upright(places) -> list:
    """The segments of lines from bottom to top of an axis, one at each place."""
    return [[(x, 0), (x, 1)] for x in places]


def draw_uprights(ax: Axes, **style):
    """Lines from bottom to top of an axis, whose segments upright() gives."""
    return ax.vlines([], 0, 1, transform=ax.get_xaxis_transform(), **style)


def draw_ring(ax: Axes, **style):
    """A ring around the place where the controls stand."""
    return ax.plot([], [], "o", **{"color": OTHER, "fillstyle": "none", "markeredgewidth": 2.5} | style)[0]


def draw_split(ax: Axes, places, width: float | None = None) -> list:
    """Lines over these places for rounding error, clipping error and their sum, which show_split() moves."""
    styles = ("rounding", ERROR, "-", width), ("clipping", CLIPPED, "--", width), ("sum", "black", "-", 2)
    return [
        ax.plot(places, places, color=color, linestyle=style, linewidth=thick, label=label)[0]
        for label, color, style, thick in styles
    ]


def show_split(lines: list, errors: np.ndarray) -> None:
    """Move the lines to these errors, (places, 2)."""
    for line, values in zip(lines, (*errors.T, errors.sum(1)), strict=True):
        line.set_ydata(np.maximum(values, 1e-30))


def plain_ticks(axis) -> None:
    """1, 2 and 5 times a power of ten on a logarithmic axis, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
