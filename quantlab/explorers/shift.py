"""Sliders on the live input of an int8 layer: a static grid stays where calibration left it, a dynamic one follows."""

import copy
from functools import cache

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from quantlab.affine import choose_qparams, fake_quantize, unclamped_codes
from quantlab.arguments import check_int
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import check_layer, evenly, grid_points, linear_of, nearest
from quantlab.linear import DynamicInt8Linear, StaticInt8Linear
from quantlab.observers import MinMax
from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED

SCALES = [2.0 ** (j / 2) for j in range(-8, 9)]  # 1/16 .. 16
SHIFTS = [round(0.1 * j, 1) for j in range(-10, 11)]  # of the calibrated range
LOUD = [1, 4, 16, 64]
WAYS = ("static", "dynamic, tensor", "dynamic, token")
_TOKENS, _OUTPUTS = 32, 64  # each step multiplies this many tokens and outputs, 17 scales for a curve


def explore_shift(
    x: Tensor, weight: Tensor, *, observer=None, bits: int = 8, scale: float = 1.0, shift: float = 0.0, loud: int = 1
) -> Explorer:
    """Calibrate on x, then scale and shift the layer's input: static clips or coarsens, dynamic follows.

    The layer has an int8 weight (a scale a row) and activations of `bits` bits. Its live input is scale · x + shift,
    with shift counted in widths of the calibrated range; `loud` then multiplies the first token. The error is
    ‖Ŷ - Y‖² / ‖Y‖² of the layer's output, float layer against integer layer on the same live input.

    Shapes: x (tokens, in), weight (out, in): 32 tokens and 64 outputs of them, evenly picked, are computed with; a
    copy of the observer (default MinMax) sees all of x. The nearest position of a slider is taken.
    Raises: ValueError if x is not the input of a layer of this weight, or bits is not 2..8.
    """
    data = _Layers(x, weight, observer or MinMax(), bits)
    picture = _Picture(data)

    def update(scale, shift, loud) -> str:
        live, errors = data.live(scale, shift, loud), data.curves(shift, loud)
        here = errors[:, SCALES.index(scale)]
        picture.show(live, errors, scale)
        return data.describe(live, here.tolist())

    explorer = bind(_controls(scale, shift, loud), picture.left, picture.moving, update)
    for s in SHIFTS:  # now, so that no step of a slider has to wait for a curve
        for f in LOUD:
            data.curves(s, f)
    return explorer


def _controls(scale: float, shift: float, loud: int) -> dict:
    return {
        "scale": widgets.SelectionSlider(
            options=[(f"× {s:.3g}", s) for s in SCALES], value=nearest(SCALES, scale), description="scale"
        ),
        "shift": widgets.SelectionSlider(
            options=[(f"{s:+.1f} widths", s) for s in SHIFTS], value=nearest(SHIFTS, shift), description="shift"
        ),
        "loud": widgets.SelectionSlider(
            options=[(f"× {f}", f) for f in LOUD], value=nearest(LOUD, loud), description="one token"
        ),
    }


# --- numbers ----------------------------------------------------------------------------------------------------


class _Layers:
    """A float layer and its integer versions, and their outputs for a live input; each curve is computed once."""

    def __init__(self, x: Tensor, weight: Tensor, observer, bits: int):
        check_int(bits, "bits", 2, 8)
        weight, self.seen = check_layer(weight, x)
        self.x, self.weight = evenly(self.seen, _TOKENS), evenly(weight, _OUTPUTS)
        linear, observer = linear_of(self.weight), copy.deepcopy(observer).update(self.seen)
        self.static = StaticInt8Linear.from_linear(linear, observer, activation_bits=bits)
        self.token = DynamicInt8Linear.from_linear(linear, per="token", activation_bits=bits)
        self.qp = self.static.input_qparams(self.x)
        points = grid_points(self.qp)
        self.low, self.high = points[0], points[-1]
        self.curves = cache(self._curves)

    def live(self, scale: float, shift: float, loud: int) -> Tensor:
        x = scale * self.x + shift * (self.high - self.low)
        x[0] *= loud
        return x

    def _curves(self, shift: float, loud: int) -> np.ndarray:
        """The output's error in each of WAYS at each of SCALES, (3, scales)."""
        lives = torch.stack([self.live(scale, shift, loud) for scale in SCALES])
        y = lives @ self.weight.T
        # DynamicInt8Linear's one map of each input, for all inputs in one call.
        qp = choose_qparams(lives.amin((1, 2), True), lives.amax((1, 2), True), qmin=self.qp.qmin, qmax=self.qp.qmax)
        tensor = fake_quantize(lives, qp) @ self.static.dequantized_weight().T
        ways = torch.stack([self.static.simulate(lives), tensor, self.token.simulate(lives)])
        return ((ways - y).square().sum((2, 3)) / y.square().sum((1, 2)).clamp(min=1e-30)).numpy()

    def describe(self, live: Tensor, errors: list[float]) -> str:
        codes = unclamped_codes(live, self.qp)
        clipped = ((codes < self.qp.qmin) | (codes > self.qp.qmax)).float().mean().item()
        used = (max(live.max().item(), 0.0) - min(live.min().item(), 0.0)) / (self.high - self.low)
        each = "   ".join(f"{way} {error:.2e}" for way, error in zip(WAYS, errors, strict=True))
        return (
            f"static grid {self.low:.3g} .. {self.high:.3g}, scale {self.qp.scale.item():.3g}   "
            f"live {live.min():.3g} .. {live.max():.3g}   clipped {clipped:.2%}   live range over grid {used:.3g}\n"
            f"error of the OUTPUT: {each}   static / tensor {errors[0] / max(errors[1], 1e-30):,.1f}"
        )


# --- picture ----------------------------------------------------------------------------------------------------


class _Picture:
    """Left, the live input over the static grid; right, the errors at every scale."""

    def __init__(self, data: _Layers):
        fig, (self.left, right) = figure(columns=2, height=3.7)
        centre, reach = (data.low + data.high) / 2, 1.25 * (data.high - data.low)
        self.edges = np.linspace(centre - reach, centre + reach, 161)
        self.bars, self.range = self._draw_values(data)
        self.lines, self.points = _draw_errors(right)
        fig.subplots_adjust(left=0.08, right=0.98, top=0.91, bottom=0.14, wspace=0.24)
        self.moving = [self.bars, self.range, *self.lines, *self.points]

    def _draw_values(self, data: _Layers) -> tuple:
        """The static grid and what it was calibrated on, still; the bars of the live input, and its range."""
        ax, edges, highest = self.left, self.edges, 0.3 * data.x.numel()
        ax.axvspan(data.low, data.high, color=QUANTIZED, alpha=0.16)
        calibrated = np.histogram(data.seen.numpy(), edges)[0] * (data.x.numel() / data.seen.numel())
        ax.stairs(np.maximum(calibrated, 0.5), edges, color="0.25", linewidth=0.8, baseline=0.5, label="calibrated on")
        for start, end in ((edges[0], data.low), (data.high, edges[-1])):
            ax.axvspan(start, end, color=CLIPPED, alpha=0.25)
        bars = ax.stairs(np.full(160, highest), edges, fill=True, color=FLOAT, baseline=0.5, label="live input")
        ends = data.low, data.high
        (span,) = ax.plot(ends, [0.7, 0.7], "|-", color=ERROR, markersize=9, label="dynamic range")
        ax.set(xlabel="live input", ylabel="values (log)", yscale="log", xlim=(edges[0], edges[-1]))
        ax.set(ylim=(0.5, 20 * highest), title="blue: the static grid, pink: clipped")
        ax.legend(loc="upper center", fontsize="x-small", ncols=3, handlelength=1.5, columnspacing=1.0)
        return bars, span

    def show(self, live: Tensor, errors: np.ndarray, scale: float) -> None:
        values, at = live.numpy(), SCALES.index(scale)
        inside = np.clip(values, self.edges[0], self.edges[-1])
        self.bars.set_data(np.maximum(np.histogram(inside, self.edges)[0], 0.5))
        self.range.set_xdata([min(values.min(), 0.0), max(values.max(), 0.0)])
        for line, point, heights in zip(self.lines, self.points, np.maximum(errors, 1e-12), strict=True):
            line.set_ydata(heights)
            point.set_data([scale], [heights[at]])


def _draw_errors(ax: Axes) -> tuple[list, list]:
    """A line for each way, and a point on it."""
    lines = [
        ax.plot(SCALES, SCALES, style, color=color, linewidth=2, label=way)[0]
        for way, style, color in zip(WAYS, ("-", "--", ":"), (QUANTIZED, ERROR, OTHER), strict=True)
    ]
    points = [
        ax.plot([1], [1], "o", color=line.get_color(), markersize=8, markeredgecolor="black")[0] for line in lines
    ]
    ax.set(xscale="log", xlim=(1 / 20, 20), xlabel="scale of the live input")
    ax.set(yscale="log", ylim=(1e-6, 3), ylabel="error of the OUTPUT", title="error of the layer")
    ax.set_xticks([1 / 16, 1 / 4, 1, 4, 16], ["1/16", "1/4", "1", "4", "16"], minor=False)
    ax.minorticks_off()
    ax.legend(loc="lower left", fontsize="small")
    return lines, points
