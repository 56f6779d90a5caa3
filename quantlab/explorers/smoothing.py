"""A slider on SmoothQuant's alpha: what it moves from the inputs of a layer into its weights, and what that gains."""

from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from torch import Tensor

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import evenly, linear_of, relative_error, states, thinned
from quantlab.explorers.outliers import FACTORS, factor_controls, measured, positive_range, stretched_layers
from quantlab.granularity import PerAxis, quantize_tensor
from quantlab.outliers import smoothing_scales
from quantlab.plots import ERROR, FLOAT, QUANTIZED

ALPHAS = tuple(i / 20 for i in range(21))
BITS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W8A4": (8, 4), "W4A4": (4, 4)}
_WIDTHS = (8, 6, 4)
_PICTURE = (64, 128)  # tokens or rows, and channels, that a heat map can show; neighbours show their largest


class _Errors(NamedTuple):
    """One layer in one pair of bit widths: relative errors of its output."""

    smoothed: list[float]  # at each alpha
    plain: float
    bits: float  # true bits per weight


def explore_smoothing(
    weight: Tensor, x: Tensor, *, channels=(), factor: int = 30, alpha: float = 0.5, planted: bool = False
) -> Explorer:
    """Drag SmoothQuant's alpha: inputs and weights before and after, the largest of each channel, the output error.

    weight (out, in) and x (tokens, in), the layer's input; at most 512 rows and 256 tokens of them are used.
    The columns `channels` of x are multiplied by the factor of a slider; "planted" divides those of the weight too.
    Colours say how many bits the code of a value needs on an 8-bit grid, one grid for all inputs, one for each row of
    the weight: 0 where it became 0, 7 where it is large. alpha goes in steps of 0.05; all is computed at the start.

    Raises: ValueError if weight and x do not fit together, or a channel does not exist.
    """
    layers = stretched_layers(weight, x, channels)
    known = measured(_measure, layers)
    picture = _Picture(layers, known)
    factors, plant = factor_controls(factor, planted)
    controls = {
        "alpha": widgets.SelectionSlider(options=[(f"{a:.2f}", a) for a in ALPHAS], value=alpha, description="alpha"),
        "factor": factors,
        "bits": widgets.SelectionSlider(options=list(BITS), value="W8A8", description="bits"),
        "planted": plant,
    }

    def update(alpha, factor, bits, planted) -> str:
        before, found = layers[factor, planted], known[factor, planted][bits]
        after = _smoothed(*before, alpha)
        picture.show(before, after, found, alpha)
        return _describe(before, after, found, alpha, bits)

    filmed = states(  # each picture has some 13 kB
        alpha=thinned(list(ALPHAS), 11, alpha),
        factor=thinned(list(FACTORS), 3, factor),
        bits=("W8A8", "W4A4"),
        planted=(False, True),
    )
    return bind(controls, picture.ax, picture.moving, update, filmed=filmed)


def _smoothed(weight: Tensor, x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    s = smoothing_scales(x.abs().amax(0), [linear_of(weight)], alpha)
    return weight * s, x / s


def _measure(weight: Tensor, x: Tensor) -> dict[str, _Errors]:
    """{bits: errors}; each side is rounded once for its own bits."""
    y, found = x @ weight.T, {bits: [] for bits in BITS}
    for w, z in [(weight, x), *(_smoothed(weight, x, alpha) for alpha in ALPHAS)]:
        weights = {b: quantize_tensor(w, bits=b, granularity=PerAxis(0)) for b in _WIDTHS}
        w_hat = {b: q.dequantize() for b, q in weights.items()}
        x_hat = {b: fake_quantize(z, choose_qparams(*torch.aminmax(z), qmin=0, qmax=2**b - 1)) for b in _WIDTHS}
        for bits, (of_w, of_x) in BITS.items():
            found[bits].append(max(relative_error(y, x_hat[of_x] @ w_hat[of_w].T), 1e-12))
    return {
        bits: _Errors(errors[1:], errors[0], weights[BITS[bits][0]].bits_per_element) for bits, errors in found.items()
    }


def _describe(before: tuple, after: tuple, found: _Errors, alpha: float, bits: str) -> str:
    (of_weights, of_inputs), (weights, inputs) = map(_unevenness, before), map(_unevenness, after)
    error, best = found.smoothed[ALPHAS.index(alpha)], int(np.argmin(found.smoothed))
    return (
        f"alpha {alpha:.2f}: largest channel over the median one: inputs {of_inputs:.1f} -> {inputs:.1f}, "
        f"weights {of_weights:.1f} -> {weights:.1f}\n"
        f"{bits}, one scale for the input tensor, {found.bits:.2f} true bits per weight: output error {error:.2e}   "
        f"not smoothed {found.plain:.2e}   best {found.smoothed[best]:.2e} at alpha {ALPHAS[best]:.2f}"
    )


def _unevenness(x: Tensor) -> float:
    """The largest channel over the median one, each by its largest magnitude."""
    peaks = x.abs().amax(0)
    return (peaks.max() / peaks.median().clamp(min=1e-30)).item()


def _bits_used(x: Tensor, rows: bool) -> np.ndarray:
    """How many bits the code of each value needs on an 8-bit grid (0..7), of the whole tensor or of its row."""
    some = evenly(x.abs(), _PICTURE[0])
    largest = x.abs().amax(1, keepdim=True) if rows else x.abs().amax()
    largest = evenly(largest, _PICTURE[0]) if rows else largest
    bits = torch.frexp(torch.round(127 * some / largest.clamp(min=1e-30))).exponent.float()  # 2**(bits - 1) <= code
    size = [len(bits), min(bits.shape[1], _PICTURE[1])]
    return F.adaptive_max_pool2d(bits[None], size)[0].numpy()


class _Picture:
    """Four heat maps, the largest value of each channel, and the output's error at every alpha."""

    def __init__(self, layers: dict, known: dict):
        fig, axes = figure(columns=3, rows=2, height=4.8)
        weight, x = next(iter(layers.values()))
        self.ax = axes[0, 0]
        self.images = _draw_images(axes, x.shape, weight.shape)
        self.lines = _draw_channels(axes[0, 2], layers)
        self.curve, self.plain, self.here = _draw_curve(axes[1, 2], known)
        self.moving = [*self.images, *self.lines, self.curve, self.plain, self.here]

    def show(self, before: tuple, after: tuple, found: _Errors, alpha: float) -> None:
        (weight, x), (smooth_weight, smooth_x) = before, after
        values = x, smooth_x, weight, smooth_weight
        for image, part, rows in zip(self.images, values, (False, False, True, True), strict=True):
            image.set_data(_bits_used(part, rows))
        for line, part in zip(self.lines, values, strict=True):
            line.set_ydata(part.abs().amax(0).numpy())
        self.curve.set_ydata(found.smoothed)
        self.plain.set_ydata([found.plain] * 2)
        self.here.set_data([alpha], [found.smoothed[ALPHAS.index(alpha)]])


def _draw_images(axes: np.ndarray, of_x, of_w) -> list:
    titles = "inputs before", "inputs after", "weights before", "weights after"
    style = {"vmin": -0.5, "vmax": 7.5, "cmap": colormaps["viridis"].resampled(8)}
    style |= {"aspect": "auto", "interpolation": "nearest"}
    images = []
    for ax, title, shape in zip(axes[:, :2].flat, titles, (of_x, of_x, of_w, of_w), strict=True):
        blank = np.zeros((min(shape[0], _PICTURE[0]), min(shape[1], _PICTURE[1])))
        images.append(ax.imshow(blank, extent=(0, shape[1], shape[0], 0), **style))
        ax.set(title=title)
    axes[0, 0].set(ylabel="token")
    axes[1, 0].set(ylabel="row")
    for ax in axes[1, :2]:
        ax.set(xlabel="channel")
    for column, (start, width) in enumerate(((0.075, 0.22), (0.365, 0.22), (0.735, 0.25))):
        for row, bottom in enumerate((0.58, 0.115)):
            axes[row, column].set_position((start, bottom, width, 0.35))
    fig = axes[0, 0].figure
    bar = fig.add_axes((0.605, 0.115, 0.014, 0.815))
    fig.colorbar(images[0], cax=bar, label="bits that the code needs, of 7", ticks=range(8))
    return images


def _draw_channels(ax: Axes, layers: dict) -> list:
    styles = (
        ("|x| before", FLOAT, "-", 0.9),
        ("|x| after", QUANTIZED, "-", 2.4),
        ("|w| before", FLOAT, ":", 0.9),
        ("|w| after", "black", "-", 0.9),
    )
    width = next(iter(layers.values()))[0].shape[1]
    lines = [
        ax.plot(range(width), [1] * width, color=color, linestyle=style, linewidth=thick, label=label)[0]
        for label, color, style, thick in styles
    ]
    peaks = torch.cat([part.abs().amax(0) for layer in layers.values() for part in layer])
    low, high = positive_range(peaks.numpy())
    ax.set(yscale="log", ylim=(low / 2, high * 30), title="largest of each channel")
    ax.legend(loc="upper center", ncols=2, fontsize="x-small")
    return lines


def _draw_curve(ax: Axes, known: dict) -> tuple:
    (curve,) = ax.plot(ALPHAS, ALPHAS, color=ERROR, label="smoothed")
    plain = ax.axhline(1, color=FLOAT, linestyle="--", label="not smoothed")
    (here,) = ax.plot([0.5], [1], "o", color=ERROR, markersize=9)
    every = [e for case in known.values() for found in case.values() for e in (*found.smoothed, found.plain)]
    ax.set(yscale="log", ylim=(min(every) / 2, max(every) * 20), xlabel="alpha", title="output error")
    ax.legend(loc="upper center", ncols=2, fontsize="x-small")
    return curve, plain, here
