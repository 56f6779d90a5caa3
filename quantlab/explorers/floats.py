"""Sliders on the bits of a floating-point format: its numbers, over the values of a real tensor."""

from functools import cache

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from quantlab.explorers.base import Explorer, figure, sample, tie
from quantlab.floats import BF16, FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3, FP8_E5M2, FP16, FloatFormat, round_to, values
from quantlab.metrics import sqnr_db
from quantlab.plots import CLIPPED, ERROR, FLOAT, QUANTIZED

PRESETS = {f.name: f for f in (FP16, BF16, FP8_E4M3, FP8_E5M2, FP6_E3M2, FP6_E2M3, FP4_E2M1)}
CUSTOM = "custom"
_TOKENS = 128  # rows of the inputs that the layer's output error is measured on
_PIXELS = 760  # lines nearer to each other than a pixel are drawn as one


def custom_format(exponent_bits: int, mantissa_bits: int) -> FloatFormat:
    """What the sliders stand for: IEEE's bias; infinity and NaN from 5 exponent bits on, else numbers only."""
    specials = "ieee" if exponent_bits >= 5 else "none"
    bias = 2 ** (exponent_bits - 1) - 1
    return FloatFormat(f"E{exponent_bits}M{mantissa_bits}", exponent_bits, mantissa_bits, bias, specials)


def explore_float_format(
    x: Tensor, *, inputs: Tensor | None = None, preset: str = "FP8 E4M3", scaled: bool = False
) -> Explorer:
    """Choose exponent and mantissa bits: the format's numbers over the values of x, and the relative error they suffer.

    scaled: x is divided by max|x| / largest first, so that its largest value is the format's. inputs (tokens, in) are
    what the layer reads whose weight (out, in) x is; the error of its output is then shown as well.
    """
    whole, x, fmt = x.detach().float(), sample(x), PRESETS[preset]
    controls = {
        "preset": widgets.Dropdown(options=[*PRESETS, CUSTOM], value=preset, description="format"),
        "exponent": widgets.IntSlider(fmt.exponent_bits, min=1, max=8, description="exponent bits"),
        "mantissa": widgets.IntSlider(fmt.mantissa_bits, min=0, max=10, description="mantissa bits"),
        "scaled": widgets.Checkbox(scaled, description="scale to the largest"),
    }
    for name in ("exponent", "mantissa"):
        controls[name].style.description_width = "initial"
    _keep_in_step(controls)
    outputs = None if inputs is None else _outputs(inputs, whole)
    reach = x.abs().max().item() or 1.0
    low, high = _octaves(x)
    fig, (line, top, bottom) = figure(rows=3, height=5.8, gridspec_kw={"height_ratios": [1.1, 2, 2]})
    counts, edges = np.histogram(x.numpy(), bins=160, range=(-1.05 * reach, 1.05 * reach))
    line.stairs(counts, edges, fill=True, color=FLOAT)
    line.set(xlim=(-1.05 * reach, 1.05 * reach), ylim=(0, 1.1 * counts.max()), yticks=[], ylabel="values")
    line.set_title("linear axis: every number of the format is a line", fontsize="medium")
    counts, edges = np.histogram(x[x != 0].abs().log2().numpy(), bins=(high - low) * 4, range=(low, high))
    top.stairs(counts, edges, fill=True, color=FLOAT)
    top.set(xlim=(low, high), ylim=(0, 1.25 * counts.max()), yticks=[], ylabel="values")
    top.set_title("magnitudes, logarithmic axis (shaded: becomes 0, or saturates)", fontsize="medium")
    sweep, step = np.exp2(np.linspace(low, high, 1400)), reach / 127
    bottom.plot(np.log2(sweep), _worst(sweep, step * np.arange(1, 128)), color="black", linestyle="--", linewidth=1)
    bottom.text(np.log2(reach) + 0.5, 0.006, "8-bit integers up to the largest value", fontsize="small")
    bottom.set(xlim=(low, high), ylim=(2.0**-12, 2), yscale="log", xlabel="log₂ |x|")
    bottom.set_ylabel("worst |error| / |x|")
    (error,) = bottom.plot(np.log2(sweep), np.ones(len(sweep)), color=ERROR, linewidth=1.3)
    rugs = [
        ax.plot([], [], color=QUANTIZED, linewidth=0.7, transform=ax.get_xaxis_transform())[0] for ax in (line, top)
    ]
    dead = [top.axvspan(at, at, color=CLIPPED, alpha=0.35, linewidth=0) for at in (low, high)]
    fig.subplots_adjust(left=0.08, right=0.98, top=0.95, bottom=0.09, hspace=0.42)

    @cache
    def setting(preset, exponent, mantissa, scaled) -> tuple:
        fmt = custom_format(exponent, mantissa) if preset == CUSTOM else PRESETS[preset]
        scale = reach / fmt.largest if scaled else 1.0

        def rounded(t: Tensor) -> Tensor:
            return round_to(t.double() / scale, fmt, saturate=True) * scale

        numbers = values(fmt).numpy()
        positive = numbers[len(numbers) // 2 + 1 :].astype(np.float64) * scale
        near = positive[positive < 1.05 * reach]
        lines = [_lines(np.concatenate([-near, [0.0], near]), line, 0.0), _lines(np.log2(positive), top, 0.88)]
        curve = _worst(sweep, positive)
        ends = np.log2([fmt.smallest_subnormal / 2, fmt.largest]) + np.log2(scale)
        return lines, curve, ends, _numbers(fmt, scale, x, rounded, whole, outputs)

    def update(preset, exponent, mantissa, scaled) -> str:
        exponent, mantissa = (exponent, mantissa) if preset == CUSTOM else (0, 0)
        lines, curve, ends, text = setting(preset, exponent, mantissa, scaled)
        for rug, points in zip(rugs, lines, strict=True):
            rug.set_data(points)
        error.set_ydata(curve)
        for span, (start, end) in zip(dead, ((low, ends[0]), (ends[1], high)), strict=True):
            start, end = np.clip([start, end], low, high)
            span.set_x(start)
            span.set_width(max(end - start, 0))
        return text

    return tie(controls, top, [*dead, *rugs, error], update)


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


def _octaves(x: Tensor) -> tuple[int, int]:
    """Where the logarithmic axis begins and ends: 2**-26 to 2**17 hold all of FP16; further where x lies further."""
    sizes = x[x != 0].abs()
    if sizes.numel() == 0:
        return -26, 17
    low, high = sizes.quantile(0.001).log2().floor(), sizes.max().log2().ceil()
    return min(-26, int(low)), max(17, int(high) + 1)


def _outputs(inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the inputs, and what the layer makes of them."""
    if weight.ndim != 2 or inputs.ndim != 2 or inputs.shape[1] != weight.shape[1]:
        raise ValueError(f"inputs {tuple(inputs.shape)} are not what a layer with weight {tuple(weight.shape)} reads")
    rows = torch.linspace(0, len(inputs) - 1, min(_TOKENS, len(inputs))).long()
    some = inputs.detach().float()[rows]
    return some, some @ weight.T


def _worst(at: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """The largest relative error near each magnitude: half the gap it lies in; all of it below the least number."""
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


def _numbers(fmt: FloatFormat, scale: float, x: Tensor, rounded, whole: Tensor, outputs) -> str:
    back = rounded(x)
    lost = ((back == 0) & (x != 0)).double().mean().item()
    cut = (x.double().abs() > fmt.largest * scale).double().mean().item()
    bits = fmt.bits + (32 / whole.numel() if scale != 1 else 0)  # the scale is stored in float32
    ratio = f"{sqnr_db(x, back):.1f} dB" if x.any() else "no signal"
    said = (
        f"{fmt.name}: {bits:.3g} bits a value   largest {fmt.largest * scale:.3g}   smallest normal "
        f"{fmt.smallest_normal * scale:.3g}   smallest subnormal {fmt.smallest_subnormal * scale:.3g}\n"
        f"become 0: {lost:.2%}   saturate: {cut:.2%}   signal to noise {ratio}"
    )
    if outputs is not None:
        some, right = outputs
        wrong = some @ rounded(whole).float().T - right
        said += f"   output error of the layer {(wrong.square().sum() / right.square().sum()).item():.2e}"
    return said
