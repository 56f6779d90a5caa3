"""Sliders on the bits of a floating-point format: its numbers, over the values of a real tensor."""

from functools import cache
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import check_layer, evenly, relative_error, sample, states
from quantlab.floats import BF16, FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, FP8_E5M2, FP16, FloatFormat, round_to, values
from quantlab.metrics import sqnr_db
from quantlab.plots import CLIPPED, ERROR, FLOAT, QUANTIZED

PRESETS = {f.name: f for f in (FP16, BF16, FP8_E4M3, FP8_E5M2, FP6_E3M2, FP6_E2M3, FP4_E2M1)}
CUSTOM = "custom"
_TOKENS = 128  # of the inputs, on which the error of the layer's output is measured
_PIXELS = 760  # lines nearer to each other than a pixel are drawn as one


class _Shown(NamedTuple):
    """One format over the values."""

    positive: np.ndarray  # its numbers above 0, scaled
    ends: np.ndarray  # log₂ of where values become 0 and where they saturate
    text: str  # the numbers under the picture


def custom_format(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    """What the sliders stand for: IEEE's bias; infinity and NaN from 5 exponent bits on, else numbers only."""
    specials = "ieee" if exponent_bits >= 5 else "none"
    bias = 2 ** (exponent_bits - 1) - 1
    return FloatFormat(f"E{exponent_bits}M{mantissa_bits}", exponent_bits, mantissa_bits, bias, specials)


def explore_float_format(
    x: Tensor, *, inputs: Tensor | None = None, preset: str = "FP8 E4M3", scaled: bool = False
) -> Explorer:
    """Choose exponent and mantissa bits: the format's numbers over the values of x, and the relative error they suffer.

    scaled: x is divided by max|x| / largest first, so that its largest value is the format's. With inputs (tokens, in),
    the input of the layer whose weight (out, in) x is, the error of the layer's output is shown as well.
    """
    data = _Values(x, inputs)
    picture = _Picture(data.some, data.reach)

    @cache
    def setting(fmt: FloatFormat, scaled: bool) -> tuple:
        shown = data.measure(fmt, scaled)
        return shown, picture.lines_of(shown.positive)

    def update(preset, exponent, mantissa, scaled) -> str:
        fmt = custom_format(exponent, mantissa) if preset == CUSTOM else PRESETS[preset]
        shown, lines = setting(fmt, scaled)
        picture.show(lines, shown.ends)
        return shown.text

    controls = _controls(preset, scaled)
    filmed = states(exponent=range(1, 9), mantissa=range(11), scaled=(False, True))  # the preset follows
    return bind(controls, picture.top, picture.moving, update, filmed=filmed)


def _controls(preset: str, scaled: bool) -> dict:
    fmt, wide = PRESETS[preset], {"style": {"description_width": "initial"}}
    controls = {
        "preset": widgets.Dropdown(options=[*PRESETS, CUSTOM], value=preset, description="format"),
        "exponent": widgets.IntSlider(fmt.exponent_bits, min=1, max=8, description="exponent bits", **wide),
        "mantissa": widgets.IntSlider(fmt.mantissa_bits, min=0, max=10, description="mantissa bits", **wide),
        "scaled": widgets.Checkbox(scaled, description="scale to the largest"),
    }
    _keep_in_step(controls)
    return controls


def _keep_in_step(controls: dict) -> None:
    """A preset moves the two sliders; a slider moved by hand turns the preset to the one it fits, or to custom."""
    fields = {(f.exponent_bits, f.mantissa_bits): name for name, f in PRESETS.items()}
    busy = []

    def follow_preset(change):
        if change.new != CUSTOM and not busy:
            busy.append(True)
            fmt = PRESETS[change.new]
            controls["exponent"].value, controls["mantissa"].value = fmt.exponent_bits, fmt.mantissa_bits
            busy.clear()

    def follow_sliders(_change):
        if not busy:
            busy.append(True)
            controls["preset"].value = fields.get((controls["exponent"].value, controls["mantissa"].value), CUSTOM)
            busy.clear()

    controls["preset"].observe(follow_preset, names="value")
    for name in ("exponent", "mantissa"):
        controls[name].observe(follow_sliders, names="value")


# --- numbers ----------------------------------------------------------------------------------------------------


class _Values:
    """x in any format: a sample for the picture, and all of it for the error of the layer's output."""

    def __init__(self, x: Tensor, inputs: Tensor | None):
        self.some, self.weight, self.inputs = sample(x), x.detach().float(), None
        self.reach = self.some.abs().max().item() or 1.0
        if inputs is not None:
            self.weight, inputs = check_layer(x, inputs)
            self.inputs = evenly(inputs, _TOKENS)

    def measure(self, fmt: FloatFormat, scaled: bool) -> _Shown:
        scale, numbers = self.reach / fmt.largest if scaled else 1.0, values(fmt).double().numpy()
        ends = np.log2([fmt.smallest_subnormal / 2, fmt.largest]) + np.log2(scale)
        return _Shown(numbers[len(numbers) // 2 + 1 :] * scale, ends, self._describe(fmt, scale))

    def _describe(self, fmt: FloatFormat, scale: float) -> str:
        x, back = self.some, _rounded(self.some, fmt, scale)
        lost = ((back == 0) & (x != 0)).double().mean().item()
        cut = (x.double().abs() > fmt.largest * scale).double().mean().item()
        bits = fmt.bits + (32 / self.weight.numel() if scale != 1 else 0)  # the scale is stored in float32
        ratio = f"{sqnr_db(x, back):.1f} dB" if x.any() else "no signal"
        text = (
            f"{fmt.name}: {bits:.3g} bits a value   largest {fmt.largest * scale:.3g}   smallest normal "
            f"{fmt.smallest_normal * scale:.3g}   smallest subnormal {fmt.smallest_subnormal * scale:.3g}\n"
            f"become 0: {lost:.2%}   saturate: {cut:.2%}   signal to noise {ratio}"
        )
        if self.inputs is None:
            return text
        weight = _rounded(self.weight, fmt, scale).float()
        error = relative_error(self.inputs @ self.weight.T, self.inputs @ weight.T)
        return f"{text}   output error of the layer {error:.2e}"


def _rounded(x: Tensor, fmt: FloatFormat, scale: float) -> Tensor:
    return round_to(x.double() / scale, fmt, saturate=True) * scale


def _octaves(x: Tensor) -> tuple[int, int]:
    """Where the logarithmic axis begins and ends: 2**-26 to 2**17 hold all of FP16; further where x lies further."""
    sizes = x[x != 0].abs()
    if sizes.numel() == 0:
        return -26, 17
    low, high = sizes.quantile(0.001).log2().floor(), sizes.max().log2().ceil()
    return min(-26, int(low)), max(17, int(high) + 1)


# --- picture ----------------------------------------------------------------------------------------------------


class _Picture:
    """The format's numbers over the values, on a linear and a logarithmic axis, and the worst error of every size."""

    def __init__(self, x: Tensor, reach: float):
        self.reach, (self.low, self.high) = reach, _octaves(x)
        fig, (self.line, self.top, bottom) = figure(rows=3, height=5.8, gridspec_kw={"height_ratios": [1.1, 2, 2]})
        self._draw_values(x)
        self.sizes = np.exp2(np.linspace(self.low, self.high, 1400))
        self.error = self._draw_errors(bottom)
        self.rugs = [
            ax.plot([], [], color=QUANTIZED, linewidth=0.7, transform=ax.get_xaxis_transform())[0]
            for ax in (self.line, self.top)
        ]
        self.dead = [self.top.axvspan(at, at, color=CLIPPED, alpha=0.35, linewidth=0) for at in (self.low, self.high)]
        fig.subplots_adjust(left=0.08, right=0.98, top=0.95, bottom=0.09, hspace=0.42)
        self.moving = [*self.dead, *self.rugs, self.error]

    def _draw_values(self, x: Tensor) -> None:
        edge, span = 1.05 * self.reach, (self.low, self.high)
        counts, edges = np.histogram(x.numpy(), bins=160, range=(-edge, edge))
        self.line.stairs(counts, edges, fill=True, color=FLOAT)
        self.line.set(xlim=(-edge, edge), ylim=(0, 1.1 * counts.max()), yticks=[], ylabel="values")
        self.line.set_title("linear axis: every number of the format is a line", fontsize="medium")
        counts, edges = np.histogram(x[x != 0].abs().log2().numpy(), bins=(self.high - self.low) * 4, range=span)
        self.top.stairs(counts, edges, fill=True, color=FLOAT)
        self.top.set(xlim=span, ylim=(0, 1.25 * counts.max()), yticks=[], ylabel="values")
        self.top.set_title("magnitudes, logarithmic axis (shaded: becomes 0, or saturates)", fontsize="medium")

    def _draw_errors(self, ax: Axes):
        """The curve of 8-bit integers, still; returns that of the format."""
        at, integers = np.log2(self.sizes), self.reach / 127 * np.arange(1, 128)
        ax.plot(at, _worst(self.sizes, integers), color="black", linestyle="--", linewidth=1)
        ax.set(xlim=(self.low, self.high), ylim=(2.0**-12, 2), yscale="log", xlabel="log₂ |x|")
        ax.set_ylabel("worst |error| / |x|")
        ax.set_title("worst error at each size (dashed: 8-bit integers up to the largest value)", fontsize="medium")
        return ax.plot(at, np.ones(len(at)), color=ERROR, linewidth=1.3)[0]

    def lines_of(self, positive: np.ndarray) -> tuple:
        """The numbers of a format on both axes, and its worst error at each size."""
        near = positive[positive < 1.05 * self.reach]
        linear = _lines(np.concatenate([-near, [0.0], near]), self.line, 0.0)
        return linear, _lines(np.log2(positive), self.top, 0.88), _worst(self.sizes, positive)

    def show(self, lines: tuple, ends: np.ndarray) -> None:
        *points, curve = lines
        for rug, where in zip(self.rugs, points, strict=True):
            rug.set_data(where)
        self.error.set_ydata(curve)
        for span, (start, end) in zip(self.dead, ((self.low, ends[0]), (ends[1], self.high)), strict=True):
            start, end = np.clip([start, end], self.low, self.high)
            span.set_x(start)
            span.set_width(max(end - start, 0))


def _worst(at: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The largest relative error near each magnitude: half the gap it lies in; all of it below the smallest number."""
    numbers = np.concatenate([[0.0], positive])
    above = np.searchsorted(numbers, at).clip(1, len(numbers) - 1)
    half = (numbers[above] - numbers[above - 1]) / 2
    return np.minimum(np.maximum(half, at - numbers[-1]) / at, 1.0)


def _lines(points: np.ndarray, ax, bottom: float) -> np.ndarray:
    """x and y of vertical lines at the points that the axis shows, one a pixel at most, as one line with gaps."""
    low, high = ax.get_xlim()
    pixel = ((points[(points >= low) & (points < high)] - low) * (_PIXELS / (high - low))).astype(np.int64)
    at = low + (np.flatnonzero(np.bincount(pixel, minlength=1)) + 0.5) * (high - low) / _PIXELS
    x = np.stack([at, at, np.full(len(at), np.nan)], axis=1)
    y = np.tile([bottom, 1.0, np.nan], (len(at), 1))
    return np.stack([x.ravel(), y.ravel()])
