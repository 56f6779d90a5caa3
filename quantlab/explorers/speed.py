"""Sliders on the shape of a linear layer: how long each way to compute it takes, and what that should be made of."""

from collections.abc import Callable
from itertools import cycle

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes

from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.drawing import draw_ring
from quantlab.plots import FLOAT, QUANTIZED

_MARKERS, _EDGE = "osD^v", 0.8


def explore_speed(
    seconds: dict[tuple, float],
    nbytes: dict[tuple, int],
    parts: Callable[[str, int, int, int], dict[str, float]],
    *,
    shape: tuple[int, int, int] | None = None,
    way: str | None = None,
) -> Explorer:
    """Choose M, K and N of a linear layer: its measured time in each way, and what the time should be made of.

    seconds: measured, {(way, M, K, N): seconds of one call} for every combination of its ways, M, K and N; the first
    way is the one the others are compared with. nbytes: {(way, K, N): bytes of the stored weight}.
    parts(way, M, K, N) estimates what a call has to do, {"moving bytes": seconds, ...}, the same names for every way.

    Raises: ValueError if a combination is missing.
    """
    times = _Times(seconds, nbytes, parts)
    shape, way = shape or tuple(axis[-1] for axis in times.axes), way or times.ways[-1]
    picture = _Picture(times, list(parts(way, *shape)))
    controls = {
        name: widgets.SelectionSlider(options=axis, value=value, description=text)
        for name, axis, value, text in zip(
            "MKN", times.axes, shape, ("M, tokens", "K, inputs", "N, outputs"), strict=True
        )
    }
    controls["way"] = widgets.Dropdown(options=times.ways, value=way, description="way")

    def update(M, K, N, way) -> str:
        picture.show(M, K, N, way)
        return times.describe(M, K, N, way)

    return bind(controls, picture.left, picture.moving, update)


class _Times:
    """The measured times and the estimated ones, in microseconds."""

    def __init__(self, seconds: dict, nbytes: dict, parts: Callable):
        self.seconds, self.nbytes, self.parts = seconds, nbytes, parts
        self.ways, *axes = (list(dict.fromkeys(key[i] for key in seconds)) for i in range(4))
        self.axes = [sorted(axis) for axis in axes]
        if len(seconds) != len(self.ways) * np.prod([len(axis) for axis in axes]):
            raise ValueError("seconds must have every combination of its ways, M, K and N")
        self.bounds = 0.5e6 * min(seconds.values()), 1.7e6 * max(seconds.values())

    def measured(self, way: str, M: int, K: int, N: int) -> float:
        return 1e6 * self.seconds[way, M, K, N]

    def made_of(self, way: str, M: int, K: int, N: int) -> dict[str, float]:
        """What a call should spend on each of its parts."""
        return {name: 1e6 * value for name, value in self.parts(way, M, K, N).items()}

    def describe(self, M: int, K: int, N: int, way: str) -> str:
        now, first = (self.measured(name, M, K, N) for name in (way, self.ways[0]))
        size, made_of = self.nbytes[way, K, N], self.made_of(way, M, K, N)
        each = ", ".join(f"{name} {value:,.0f}" for name, value in made_of.items())
        return (
            f"M {M}, K {K}, N {N}: {way} {now:,.0f} µs, {self.ways[0]} {first:,.0f} µs: "
            f"{first / now:.2f} × as fast on this CPU\n"
            f"weight {size:,} bytes, {8 * size / (K * N):.2f} true bits each; "
            f"{2 * M * K * N / (size + 4 * M * (K + N)):.1f} operations for each byte of weight, input and output\n"
            f"made of (µs): {each}; the largest: {max(made_of, key=made_of.get)}"
        )


class _Picture:
    """Left, a line over M for each way; right, what the time of each way should be made of."""

    def __init__(self, times: _Times, names: list[str]):
        fig, (self.left, right) = figure(columns=2, height=3.9, gridspec_kw={"width_ratios": [5, 5]})
        self.times, self.tokens = times, times.axes[0]
        self.lines, self.chosen, self.estimate, self.here = _draw_times(self.left, times)
        self.names = [_draw_name(self.left, way) for way in times.ways]
        self.band, self.marks, self.measured = _draw_parts(right, times, names)
        fig.subplots_adjust(left=0.085, right=0.98, top=0.84, bottom=0.14, wspace=0.9)
        named = [artist for pair in self.names for artist in pair]
        self.moving = [*self.lines, self.estimate, self.chosen, self.here, *named]
        self.moving += [self.band, *self.marks.values(), self.measured]

    def show(self, M: int, K: int, N: int, way: str) -> None:
        times, place = self.times, self.times.ways.index(way)
        rows = [[times.measured(name, m, K, N) for m in self.tokens] for name in times.ways]
        for row, line in zip(rows, self.lines, strict=True):
            line.set_ydata(row)
        self.chosen.set(ydata=rows[place], color=_color(place), marker=self.lines[place].get_marker())
        self.estimate.set_ydata([max(times.made_of(way, m, K, N).values()) for m in self.tokens])
        self.here.set_data([M], [times.measured(way, M, K, N)])
        self._name([row[-1] for row in rows], place)
        self.band.set_y(place - 0.5)
        made_of = [times.made_of(name, M, K, N) for name in times.ways]
        for part, mark in self.marks.items():
            mark.set_xdata([one[part] for one in made_of])
        self.measured.set_xdata([times.measured(name, M, K, N) for name in times.ways])

    def _name(self, ends: list[float], chosen: int) -> None:
        """The names stand beside the ends of their lines, pushed apart where these meet."""
        low, high = np.log(self.times.bounds)
        ends = (np.log(ends) - low) / (high - low)
        for i, ((text, leader), end, y) in enumerate(zip(self.names, ends, _apart(ends, 0.075), strict=True)):
            text.set(y=y, fontweight="bold" if i == chosen else "normal", color=_color(i) if i else "0.35")
            leader.set(ydata=[end, y], color=_color(i))


def _color(place: int) -> str:
    """The first way is float, the others are quantized."""
    return QUANTIZED if place else FLOAT


def _apart(places, gap: float) -> np.ndarray:
    """The places, moved as little as it takes to lie a gap apart, in the same order.

    >>> _apart([0.5, 0.9, 0.5], 0.2).round(2).tolist()
    [0.4, 0.9, 0.6]
    """
    order, groups = np.argsort(places, kind="stable"), []
    for rank, place in enumerate(np.sort(places)):
        groups.append([place - gap * rank])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    found = np.empty(len(order))
    found[order] = np.concatenate([[np.mean(group)] * len(group) for group in groups]) + gap * np.arange(len(order))
    return found


def _draw_times(ax: Axes, times: _Times) -> tuple:
    """A thin line for each way, a bold one over the chosen, the estimate of that one, and a ring around its place."""
    tokens = times.axes[0]
    blank, styles = [1] * len(tokens), zip(range(len(times.ways)), cycle(_MARKERS), strict=False)
    lines = [
        ax.plot(tokens, blank, f"{marker}-", color=_color(i), markersize=4, linewidth=0.8 if i else 1.6)[0]
        for i, marker in styles
    ]
    (chosen,) = ax.plot(tokens, blank, "-", markersize=5, linewidth=2.4, zorder=3)
    (estimate,) = ax.plot(tokens, blank, ":", color="black", linewidth=1.4)
    here = draw_ring(ax, color="black", markersize=12, markeredgewidth=1.8, clip_on=False)
    ax.set(xscale="log", yscale="log", ylim=times.bounds, xlabel="M, tokens", ylabel="one call, µs", xticks=tokens)
    ax.set_xlim(tokens[0] * _EDGE, tokens[-1] / _EDGE)
    ax.set_xticklabels(tokens)
    ax.minorticks_off()
    ax.set_title("measured (bold: the chosen way)\ndotted: its largest part, estimated", fontsize="medium")
    return lines, chosen, estimate, here


def _draw_name(ax: Axes, way: str) -> tuple:
    """A name to the right of the axes, and the line that leads to it from the end of its curve."""
    beside = {"transform": ax.transAxes, "clip_on": False}
    text = ax.text(1.09, 0.5, way, va="center", fontsize="small", **beside)
    (leader,) = ax.plot([1.01, 1.08], [0.5, 0.5], linewidth=0.8, **beside)
    return text, leader


def _draw_parts(ax: Axes, times: _Times, names: list[str]) -> tuple:
    """The band behind the chosen way, the marks by the name of their part, and those of the measured times."""
    rows, style = np.arange(len(times.ways)), {"linestyle": "none", "markersize": 7}
    band = ax.axhspan(-0.5, 0.5, color="0.9")
    heights = np.linspace(-0.24, 0.24, len(names))  # one below the other, since they often are alike
    hollow = style | {"markerfacecolor": "white", "markeredgecolor": "black"}
    marks = {
        name: ax.plot(rows + 1, rows + height, marker, label=name, **hollow)[0]
        for name, height, marker in zip(names, heights, "v<>", strict=False)
    }
    bar = style | {"markersize": 22, "markeredgewidth": 3}
    (measured,) = ax.plot(rows + 1, rows, "|", color="black", label="measured", **bar)
    low, high = times.bounds
    ax.set(xscale="log", xlim=(0.05 * low, high), ylim=(len(rows) - 0.5, -0.5), xlabel="one call, µs")
    ax.set_yticks(rows, times.ways, fontsize="small")
    place = {"loc": "lower center", "bbox_to_anchor": (0.4, 1.0)}
    ax.legend(**place, ncols=2, fontsize="small", frameon=False, markerscale=0.6)
    return band, marks, measured
