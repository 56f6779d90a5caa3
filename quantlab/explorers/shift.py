"""Sliders on the live input of an int8 layer: a static grid stays where calibration left it, a dynamic one follows."""

from functools import cache

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams, fake_quantize
from quantlab.arguments import check_int, check_real
from quantlab.explorers.base import Explorer, figure, tie
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
    """Calibrate on x, then scale and shift what the layer reads: static clips or coarsens, dynamic follows.

    The layer has an int8 weight (a scale a row) and activations of `bits` bits. Its live input is scale · x + shift,
    with shift counted in widths of the calibrated range; `loud` then multiplies the first token. The error is
    ‖Ŷ - Y‖² / ‖Y‖² of the layer's output, float layer against integer layer on the same live input.

    Shapes: x (tokens, in), weight (out, in): 32 tokens and 64 outputs of them, evenly picked, are computed with; the
    observer (default MinMax) has seen all of x. The nearest position of a slider is taken.
    Raises: ValueError if x is not what a layer of this weight reads, or bits is not 2..8.
    """
    seen, x, weight, static = _checked(x, weight, observer or MinMax(), check_int(bits, "bits", 2, 8))
    rounded = fake_quantize(weight, _rows(weight))
    low, high = _ends(static)
    width = high - low
    controls = {
        "scale": widgets.SelectionSlider(
            options=[(f"× {s:.3g}", s) for s in SCALES], value=_nearest(SCALES, scale), description="scale"
        ),
        "shift": widgets.SelectionSlider(
            options=[(f"{s:+.1f} widths", s) for s in SHIFTS], value=_nearest(SHIFTS, shift), description="shift"
        ),
        "loud": widgets.SelectionSlider(
            options=[(f"× {f}", f) for f in LOUD], value=_nearest(LOUD, loud), description="one token"
        ),
    }

    @cache
    def curves(shift, loud) -> np.ndarray:
        lives = torch.stack([_live(x, scale, shift * width, loud) for scale in SCALES])
        return _errors(lives, weight, rounded, static).numpy()

    def calibrated(edges) -> np.ndarray:
        return np.maximum(np.histogram(seen.numpy(), edges)[0] * (x.numel() / seen.numel()), 0.5)

    fig, (left, right) = figure(columns=2, height=3.7)
    centre, reach = (low + high) / 2, 1.25 * width
    edges = np.linspace(centre - reach, centre + reach, 161)
    most = 0.3 * x.numel()
    left.axvspan(low, high, color=QUANTIZED, alpha=0.16)
    left.stairs(calibrated(edges), edges, color="0.25", linewidth=0.8, baseline=0.5, label="calibrated on")
    for start, end in ((edges[0], low), (high, edges[-1])):
        left.axvspan(start, end, color=CLIPPED, alpha=0.25)
    bars = left.stairs(np.full(160, most), edges, fill=True, color=FLOAT, baseline=0.5, label="live input")
    (mine,) = left.plot([low, high], [0.7, 0.7], "|-", color=ERROR, markersize=9, label="dynamic range")
    left.set(xlabel="live input", ylabel="values (log)", yscale="log", xlim=(edges[0], edges[-1]))
    left.set(ylim=(0.5, 20 * most), title="blue: the static grid, pink: clipped")
    left.legend(loc="upper center", fontsize="x-small", ncols=3, handlelength=1.5, columnspacing=1.0)
    lines = [
        right.plot(SCALES, SCALES, style, color=color, linewidth=2, label=way)[0]
        for way, style, color in zip(WAYS, ("-", "--", ":"), (QUANTIZED, ERROR, OTHER), strict=True)
    ]
    points = [
        right.plot([1], [1], "o", color=line.get_color(), markersize=8, markeredgecolor="black")[0] for line in lines
    ]
    right.set(xlabel="scale of the live input", ylabel="error of the OUTPUT", title="error of the layer")
    right.set(xscale="log", yscale="log", xlim=(1 / 20, 20), ylim=(1e-6, 3))
    right.set_xticks([1 / 16, 1 / 4, 1, 4, 16], ["1/16", "1/4", "1", "4", "16"], minor=False)
    right.minorticks_off()
    right.legend(loc="lower left", fontsize="small")
    fig.subplots_adjust(left=0.08, right=0.98, top=0.91, bottom=0.14, wspace=0.24)

    def update(scale, shift, loud) -> str:
        now, errors = _live(x, scale, shift * width, loud), curves(shift, loud)
        here, values = errors[:, SCALES.index(scale)], now.numpy()
        bars.set_data(np.maximum(np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0], 0.5))
        mine.set_xdata([min(values.min(), 0.0), max(values.max(), 0.0)])
        for line, point, error, there in zip(lines, points, errors, here, strict=True):
            line.set_ydata(np.maximum(error, 1e-12))
            point.set_data([scale], [max(there, 1e-12)])
        return _said(now, static, here.tolist())

    explorer = tie(controls, left, [bars, mine, *lines, *points], update)
    for s in SHIFTS:  # now, so that no step of a slider has to wait for a curve
        for f in LOUD:
            curves(s, f)
    return explorer


def _checked(x: Tensor, weight: Tensor, observer, bits: int) -> tuple[Tensor, Tensor, Tensor, QParams]:
    """All of x, a few whole tokens of it, a few rows of weight, and the static grid of all of x."""
    check_real(x)
    check_real(weight, "weight")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}, not what a layer of weight {tuple(weight.shape)} reads")
    x, weight = x.detach().float().cpu(), weight.detach().float().cpu()
    static = choose_qparams(*observer.update(x).min_max(), qmin=0, qmax=2**bits - 1)
    return x, _evenly(x, _TOKENS), _evenly(weight, _OUTPUTS), static


def _evenly(rows: Tensor, most: int) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), most), dtype=torch.float64).round().long()]


def _nearest(choices: list, value: float):
    return min(choices, key=lambda c: abs(c - value))


def _ends(qp: QParams) -> tuple[float, float]:
    """The reals of the first and the last code."""
    return tuple((qp.scale * (code - qp.zero_point)).item() for code in (qp.qmin, qp.qmax))


def _rows(weight: Tensor) -> QParams:
    """The weight's map in the int8 layers: symmetric, one scale a row."""
    return choose_qparams(*torch.aminmax(weight, dim=1, keepdim=True), qmin=-128, qmax=127, symmetric=True)


def _live(x: Tensor, scale: float, shift: float, loud: int) -> Tensor:
    x = scale * x + shift
    x[0] *= loud
    return x


def _errors(lives: Tensor, weight: Tensor, rounded: Tensor, static: QParams) -> Tensor:
    """The output's error in each of WAYS, for each live input: lives (inputs, tokens, in) gives (3, inputs).

    The maps are those of StaticInt8Linear and DynamicInt8Linear, for many inputs at once.
    """
    codes = {"qmin": static.qmin, "qmax": static.qmax}
    low, high = lives.amin((1, 2), keepdim=True), lives.amax((1, 2), keepdim=True)
    tensor = choose_qparams(low, high, **codes)
    token = choose_qparams(*torch.aminmax(lives, dim=2, keepdim=True), **codes, symmetric=True)
    y = lives @ weight.T
    size = y.square().sum((1, 2)).clamp(min=1e-30)
    wrong = [fake_quantize(lives, qp) @ rounded.T - y for qp in (static, tensor, token)]
    return torch.stack([w.square().sum((1, 2)) / size for w in wrong])


def _said(now: Tensor, static: QParams, errors: list[float]) -> str:
    (low, high), half = _ends(static), static.scale.item() / 2
    clipped = ((now < low - half) | (now > high + half)).float().mean().item()
    used = (max(now.max().item(), 0.0) - min(now.min().item(), 0.0)) / (high - low)
    each = "   ".join(f"{way} {error:.2e}" for way, error in zip(WAYS, errors, strict=True))
    return (
        f"static grid {low:.3g} .. {high:.3g}, scale {static.scale.item():.3g}   "
        f"live {now.min():.3g} .. {now.max():.3g}   clipped {clipped:.2%}   live range over grid {used:.3g}\n"
        f"error of the OUTPUT: {each}   static / tensor {errors[0] / max(errors[1], 1e-30):,.1f}"
    )
