"""Sliders on integer arithmetic: how wide the sums of a layer are, and how long it takes in each way."""

from collections.abc import Callable

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from quantlab.affine import quantize
from quantlab.explorers.base import Explorer, figure, tie
from quantlab.linear import Int8Linear, int_linear
from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED

_TOKENS = 64  # looked at while dragging; more would not change the picture
_STYLES = ((FLOAT, "o"), (QUANTIZED, "s"), (OTHER, "D"), (ERROR, "^"), (CLIPPED, "v"))


def explore_accumulator(layer: Int8Linear, x: Tensor, *, bits: int = 32, at_the_end: str = "wraps") -> Explorer:
    """Give the sums of an integer layer an accumulator of so many bits: which still fit, and what the others become.

    x (tokens, in), of which at most 64 evenly picked are used; one zero point for all of x.
    """
    x = x[torch.linspace(0, len(x) - 1, min(_TOKENS, len(x))).long()]
    qp = layer.input_qparams(x)
    codes, zero = quantize(x, qp), int(qp.zero_point.flatten()[0])
    sums = int_linear(codes, zero, layer.codes).long()
    few = torch.linspace(0, sums.numel() - 1, min(4000, sums.numel()), dtype=torch.float64).long()
    reach = max(sums.abs().max().item(), 1)
    most = max(int((codes - zero).abs().max()) * int(layer.codes.int().abs().max()), 1)
    ends = widgets.Dropdown(options=["wraps", "saturates"], value=at_the_end, description="at the end")
    controls = {"bits": widgets.IntSlider(bits, min=8, max=32, description="bits"), "at_the_end": ends}
    left, edges, stored, limits, dots = _draw_accumulator(sums.flatten().numpy(), 1.05 * reach)

    def update(bits, at_the_end) -> str:
        half = 2 ** (bits - 1)
        kept = sums.clamp(-half, half - 1) if at_the_end == "saturates" else (sums + half) % (2 * half) - half
        stored.set_data(np.maximum(np.histogram(kept.numpy(), bins=edges)[0], 0.1))
        dots.set_data(sums.flatten()[few], kept.flatten()[few])
        limits.set_segments([[(end, 0), (end, 1)] for end in (-half, half - 1)] if half < edges[-1] else [])
        wrong = ((kept - sums) * layer.weight_scale).norm() / (sums * layer.weight_scale).norm().clamp(1e-30)
        return (
            f"{bits} bits hold {-half:,} … {half - 1:,}   lost: {(kept != sums).double().mean().item():.3%} of the "
            f"sums   relative error of the layer's output from that: {wrong.item():.2e}\n"
            f"room for {(half - 1) // most:,} products of any size (the largest here: {most:,}); this layer adds "
            f"{layer.in_features:,}, and its largest sum is {reach:,}"
        )

    return tie(controls, left, [stored, limits, dots], update)


def _draw_accumulator(sums: np.ndarray, reach: float) -> tuple:
    fig, (left, right) = figure(columns=2)
    edges = np.linspace(-reach, reach, 161)
    left.hist(sums, bins=edges, color=FLOAT, log=True, label="exact sums")
    stored = left.stairs(np.ones(160), edges, color=QUANTIZED, linewidth=1.2, label="as stored")
    limits = left.vlines([], 0, 1, colors=ERROR, linestyles="--", transform=left.get_xaxis_transform())
    left.set(xlabel="sum of K products", ylabel="count (log)", xlim=(-reach, reach))
    left.set_ylim(0.6, 30 * left.get_ylim()[1])
    left.legend(loc="upper right", fontsize="small", ncols=2)
    right.plot([-reach, reach], [-reach, reach], color="0.5", linewidth=0.8)
    (dots,) = right.plot([], [], ".", color=QUANTIZED, markersize=2)
    right.set(xlabel="exact sum", ylabel="as stored", xlim=(-reach, reach), ylim=(-reach, reach))
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_formatter(lambda value, _place: f"{value / 1000:g}k" if value else "0")
    fig.subplots_adjust(left=0.08, right=0.98, top=0.96, bottom=0.16, wspace=0.26)
    return left, edges, stored, limits, dots


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
    ways, *axes = (list(dict.fromkeys(key[i] for key in seconds)) for i in range(4))
    axes = [sorted(axis) for axis in axes]
    if len(seconds) != len(ways) * np.prod([len(axis) for axis in axes]):
        raise ValueError("seconds must have every combination of its ways, M, K and N")
    shape, way = shape or tuple(axis[-1] for axis in axes), way or ways[-1]
    controls = {
        name: widgets.SelectionSlider(options=axis, value=value, description=text)
        for name, axis, value, text in zip("MKN", axes, shape, ("M, tokens", "K, inputs", "N, outputs"), strict=True)
    }
    controls["way"] = widgets.Dropdown(options=ways, value=way, description="way")
    bounds = 0.4e6 * min(seconds.values()), 3e6 * max(seconds.values())
    left, lines, estimate, here = _draw_times(ways, axes[0], bounds)
    band, marks = _draw_parts(left.figure.axes[1], ways, list(parts(way, *shape)), bounds)

    def update(M, K, N, way) -> str:
        measured = [1e6 * seconds[name, M, K, N] for name in ways]
        made_of = [parts(name, M, K, N) for name in ways]
        for name, line in zip(ways, lines, strict=True):
            line.set_ydata([1e6 * seconds[name, m, K, N] for m in axes[0]])
        estimate.set_ydata([1e6 * max(parts(way, m, K, N).values()) for m in axes[0]])
        place = ways.index(way)
        here.set_data([M], [measured[place]])
        band.set_y(place - 0.5)
        for name, mark in marks.items():
            mark.set_xdata(measured if name is None else [1e6 * part[name] for part in made_of])
        size, largest = nbytes[way, K, N], max(made_of[place], key=made_of[place].get)
        told = ", ".join(f"{name} {1e6 * value:,.0f}" for name, value in made_of[place].items())
        return (
            f"M {M}, K {K}, N {N}: {way} {measured[place]:,.0f} µs, {ways[0]} {measured[0]:,.0f} µs: "
            f"{measured[0] / measured[place]:.2f} × as fast on this CPU\n"
            f"weight {size:,} bytes, {8 * size / (K * N):.2f} true bits each; "
            f"{2 * M * K * N / (size + 4 * M * (K + N)):.1f} operations for each byte of weight, input and output\n"
            f"made of (µs): {told}; the largest: {largest}"
        )

    return tie(controls, left, [band, *lines, estimate, here, *marks.values()], update)


def _draw_times(ways: list, tokens: list, bounds: tuple) -> tuple:
    fig, (ax, _) = figure(columns=2, height=3.6, gridspec_kw={"width_ratios": [5, 6]})
    blank, styles = [1] * len(tokens), dict(zip(ways, _STYLES, strict=False))
    lines = [
        ax.plot(tokens, blank, f"{marker}-", color=color, markersize=4, label=name)[0]
        for name, (color, marker) in styles.items()
    ]
    (estimate,) = ax.plot(tokens, blank, ":", color="black", linewidth=1.2, label="largest part")
    (here,) = ax.plot([1], [1], "o", color="black", markersize=12, fillstyle="none", markeredgewidth=1.8, clip_on=False)
    ax.set(xscale="log", yscale="log", ylim=bounds, xlabel="M, tokens", ylabel="one call, µs", xticks=tokens)
    ax.set_xticklabels(tokens)
    ax.minorticks_off()
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="x-small", frameon=False)
    fig.subplots_adjust(left=0.085, right=0.98, top=0.8, bottom=0.15, wspace=0.45)
    return ax, lines, estimate, here


def _draw_parts(ax, ways: list, names: list, bounds: tuple) -> tuple:
    """The band behind the chosen way, and the marks by the name of their part; None: measured."""
    rows, style = np.arange(len(ways)), {"linestyle": "none", "markersize": 8}
    band = ax.axhspan(-0.5, 0.5, color="0.9")
    marks = {
        name: ax.plot(rows + 1, rows, marker, color=color, label=name, **style)[0]
        for name, color, marker in zip(names, (CLIPPED, QUANTIZED, ERROR), "v<>", strict=False)
    }
    bar = style | {"markersize": 20, "markeredgewidth": 3}
    (marks[None],) = ax.plot(rows + 1, rows, "|", color="black", label="measured", **bar)
    ax.set(xscale="log", xlim=(0.02 * bounds[0], bounds[1]), ylim=(len(ways) - 0.5, -0.5), xlabel="µs")
    ax.set_yticks(rows, ways, fontsize="small")
    where = {"loc": "lower center", "bbox_to_anchor": (0.4, 1.0)}
    ax.legend(**where, ncols=2, fontsize="small", frameon=False, markerscale=0.6)
    return band, marks
