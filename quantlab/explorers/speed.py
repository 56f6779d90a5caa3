"""Sliders on the shape of a linear layer: how long each way to compute it takes, and what that should be made of."""

from collections.abc import Callable

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes

from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.drawing import draw_ring
from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED

_STYLES = ((FLOAT, "o"), (QUANTIZED, "s"), (OTHER, "D"), (ERROR, "^"), (CLIPPED, "v"))


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
        self.bounds = 0.4e6 * min(seconds.values()), 3e6 * max(seconds.values())

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
        fig, (self.left, right) = figure(columns=2, height=3.6, gridspec_kw={"width_ratios": [5, 6]})
        self.times, self.tokens = times, times.axes[0]
        self.lines, self.estimate, self.here = _draw_times(self.left, times)
        self.band, self.marks, self.measured = _draw_parts(right, times, names)
        fig.subplots_adjust(left=0.085, right=0.98, top=0.8, bottom=0.15, wspace=0.45)
        self.moving = [self.band, *self.lines, self.estimate, self.here, *self.marks.values(), self.measured]

    def show(self, M: int, K: int, N: int, way: str) -> None:
        times = self.times
        for name, line in zip(times.ways, self.lines, strict=True):
            line.set_ydata([times.measured(name, m, K, N) for m in self.tokens])
        self.estimate.set_ydata([max(times.made_of(way, m, K, N).values()) for m in self.tokens])
        self.here.set_data([M], [times.measured(way, M, K, N)])
        self.band.set_y(times.ways.index(way) - 0.5)
        made_of = [times.made_of(name, M, K, N) for name in times.ways]
        for part, mark in self.marks.items():
            mark.set_xdata([one[part] for one in made_of])
        self.measured.set_xdata([times.measured(name, M, K, N) for name in times.ways])


def _draw_times(ax: Axes, times: _Times) -> tuple:
    """A line for each way, the estimate of the chosen one, and a ring around its place."""
    tokens = times.axes[0]
    blank, styles = [1] * len(tokens), dict(zip(times.ways, _STYLES, strict=False))
    lines = [
        ax.plot(tokens, blank, f"{marker}-", color=color, markersize=4, label=name)[0]
        for name, (color, marker) in styles.items()
    ]
    (estimate,) = ax.plot(tokens, blank, ":", color="black", linewidth=1.2, label="largest part")
    here = draw_ring(ax, color="black", markersize=12, markeredgewidth=1.8, clip_on=False)
    ax.set(xscale="log", yscale="log", ylim=times.bounds, xlabel="M, tokens", ylabel="one call, µs", xticks=tokens)
    ax.set_xticklabels(tokens)
    ax.minorticks_off()
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="x-small", frameon=False)
    return lines, estimate, here


def _draw_parts(ax: Axes, times: _Times, names: list[str]) -> tuple:
    """The band behind the chosen way, the marks by the name of their part, and those of the measured times."""
    rows, style = np.arange(len(times.ways)), {"linestyle": "none", "markersize": 8}
    band = ax.axhspan(-0.5, 0.5, color="0.9")
    marks = {
        name: ax.plot(rows + 1, rows, marker, color=color, label=name, **style)[0]
        for name, color, marker in zip(names, (CLIPPED, QUANTIZED, ERROR), "v<>", strict=False)
    }
    bar = style | {"markersize": 20, "markeredgewidth": 3}
    (measured,) = ax.plot(rows + 1, rows, "|", color="black", label="measured", **bar)
    low, high = times.bounds
    ax.set(xscale="log", xlim=(0.02 * low, high), ylim=(len(rows) - 0.5, -0.5), xlabel="µs")
    ax.set_yticks(rows, times.ways, fontsize="small")
    place = {"loc": "lower center", "bbox_to_anchor": (0.4, 1.0)}
    ax.legend(**place, ncols=2, fontsize="small", frameon=False, markerscale=0.6)
    return band, marks, measured
