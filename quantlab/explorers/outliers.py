"""Sliders on outlier channels: which columns LLM.int8() keeps in float, and what SmoothQuant moves into the weights."""

import ipywidgets as widgets
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor, nn
from tqdm.auto import tqdm

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.arguments import check_int, check_real
from quantlab.explorers.base import Explorer, figure, tie
from quantlab.granularity import PerAxis, quantize_tensor
from quantlab.linear import DynamicInt8Linear
from quantlab.outliers import LLMInt8Linear, smoothing_scales
from quantlab.plots import ERROR, FLOAT, OTHER, QUANTIZED

FACTORS = (1, 3, 10, 30, 100, 300)
THRESHOLDS = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, float("inf"))
ALPHAS = tuple(i / 20 for i in range(21))
BITS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W8A4": (8, 4), "W4A4": (4, 4)}
_TOKENS, _ROWS = 256, 512  # looked at: the error of a layer's output needs no more, and sliders must not wait
_PICTURE = (64, 128)  # tokens or rows, and channels, that a heat map can show; neighbours show their largest
_NEVER = 3000.0  # where the curve puts the threshold that no value reaches


def explore_threshold(weight: Tensor, x: Tensor, *, channels=(), factor: int = 100, threshold: float = 6.0) -> Explorer:
    """Drag LLM.int8()'s threshold: which columns go to float, how many, and the error of the layer's output.

    weight (out, in) and x (tokens, in), what the layer reads; at most 512 rows and 256 tokens of them are looked at.
    The columns `channels` of x are multiplied by the factor of a slider; "planted" divides those of the weight, so
    that the layer computes what it did. Everything is computed once, before the slider moves.

    Raises: ValueError if weight and x do not fit together, or a channel does not exist.
    """
    weight, x, channels = _layer(weight, x, channels)
    cases = [(factor, planted) for planted in (True, False) for factor in FACTORS]
    known = {case: _split_errors(*_stretched(weight, x, channels, *case)) for case in _bar(cases)}
    peaks = {f: _stretched(weight, x, channels, f, True)[1].abs().amax(0).numpy() for f in FACTORS}
    labels = [("none in float", t) if t == float("inf") else (f"{t:g}", t) for t in THRESHOLDS]
    controls = {
        "threshold": widgets.SelectionSlider(options=labels, value=threshold, description="threshold"),
        "factor": widgets.SelectionSlider(options=FACTORS, value=factor, description="factor"),
        "planted": widgets.Checkbox(True, description="planted: weights ÷ factor", indent=False),
    }
    fig, left, top, bottom = _threshold_axes()
    columns = np.arange(weight.shape[1] + 1)
    ordinary = left.stairs(columns[:-1] * 0.0, columns, baseline=1e-6, fill=True, color=QUANTIZED, label="int8")
    stems = left.vlines([], 0, 1, colors=OTHER, linewidth=1.2)
    (outliers,) = left.plot([1], [1], "o", color=OTHER, markersize=5, label="float")
    low, high = _positive_range(np.stack(list(peaks.values())))
    left.set(xlim=(0, weight.shape[1]), ylim=(low / 3, high * 3), yscale="log")
    left.legend(loc="upper right", ncols=2, fontsize="small")
    line = left.axhline(threshold, color="black", linewidth=1.2)
    places = [min(t, _NEVER) for t in THRESHOLDS]
    (split,) = top.plot(places, places, ".-", color=QUANTIZED, label="LLM.int8()")
    weights_only = top.axhline(1, color=FLOAT, linestyle="--", label="int8 weights only")
    per_tensor = top.axhline(1, color=ERROR, linestyle=":", label="W8A8, one scale")
    (here,) = top.plot([1], [1], "o", color=QUANTIZED, markersize=9)
    every = [e for errors, *rest in known.values() for e in (*errors, *rest)]
    top.set(ylim=(min(every) / 3, max(every) * 10))
    top.legend(loc="upper center", fontsize="x-small", ncols=3, columnspacing=1.0)
    (share,) = bottom.plot(places, places, ".-", color=OTHER)
    (there,) = bottom.plot([1], [1], "o", color=OTHER, markersize=9)

    def update(threshold, factor, planted) -> str:
        (errors, floor, whole), peak = known[factor, planted], peaks[factor]
        chosen, at = peak >= threshold, THRESHOLDS.index(threshold)
        ordinary.set_data(np.where(chosen, 1e-6, peak))
        tips = [(column + 0.5, peak[column]) for column in chosen.nonzero()[0]]
        stems.set_segments([[(column, 1e-6), (column, height)] for column, height in tips])
        outliers.set_data(*zip(*tips, strict=True) if tips else ([], []))
        line.set_ydata([min(threshold, _NEVER)] * 2)
        split.set_ydata(errors)
        weights_only.set_ydata([floor] * 2)
        per_tensor.set_ydata([whole] * 2)
        here.set_data([places[at]], [errors[at]])
        shares = [100 * (peak >= t).mean() for t in THRESHOLDS]
        share.set_ydata(shares)
        there.set_data([places[at]], [shares[at]])
        moved, name = (8 * (1 - chosen.mean()) + 16 * chosen.mean() + 32 / len(peak), f"threshold {threshold:g}")
        return (
            f"{name}: {chosen.sum()} of {len(peak)} columns in float ({chosen.mean():.1%}), the other "
            f"{1 - chosen.mean():.1%} of the multiplications in 8-bit integers   "
            f"bits moved: {moved:.2f} an input value (outliers 16), {8 + 32 / len(peak):.3f} a weight\n"
            f"output error {errors[at]:.2e}   int8 weights only {floor:.2e}   W8A8 with one scale {whole:.2e}"
        )

    moving = [ordinary, stems, outliers, line, split, weights_only, per_tensor, here, share, there]
    return tie(controls, left, moving, update)


def explore_smoothing(
    weight: Tensor, x: Tensor, *, channels=(), factor: int = 30, alpha: float = 0.5, planted: bool = False
) -> Explorer:
    """Drag SmoothQuant's alpha: inputs and weights before and after, the largest of each channel, the output error.

    weight (out, in) and x (tokens, in), what the layer reads; at most 512 rows and 256 tokens of them are looked at.
    The columns `channels` of x are multiplied by the factor of a slider; "planted" divides those of the weight too.
    Colours say how many bits the code of a value needs on an 8-bit grid, one grid for all inputs, one for each row of
    the weight: 0 where it became 0, 7 where it is large. alpha goes in steps of 0.05; all is computed at the start.

    Raises: ValueError if weight and x do not fit together, or a channel does not exist.
    """
    weight, x, channels = _layer(weight, x, channels)
    cases = [(factor, planted) for planted in (True, False) for factor in FACTORS]
    layers = {case: _stretched(weight, x, channels, *case) for case in cases}
    known = {case: _smoothing_errors(*layers[case]) for case in _bar(cases)}
    controls = {
        "alpha": widgets.SelectionSlider(options=[(f"{a:.2f}", a) for a in ALPHAS], value=alpha, description="alpha"),
        "factor": widgets.SelectionSlider(options=FACTORS, value=factor, description="factor"),
        "bits": widgets.SelectionSlider(options=list(BITS), value="W8A8", description="bits"),
        "planted": widgets.Checkbox(planted, description="planted: weights ÷ factor", indent=False),
    }
    fig, axes = figure(columns=3, rows=2, height=4.8)
    images = _draw_images(axes, x.shape, weight.shape)
    lines = _draw_channels(axes[0, 2], layers)
    curve, none, here = _draw_curve(axes[1, 2], known)

    def update(alpha, factor, bits, planted) -> str:
        w, z = layers[factor, planted]
        s, (errors, plain) = _scales(w, z, alpha), known[factor, planted][bits]
        after = w * s, z / s
        for image, values in zip(images, (z, after[1], w, after[0]), strict=True):
            image.set_data(_bits_used(values, rows=values is w or values is after[0]))
        for artist, values in zip(lines, (z, after[1], w, after[0]), strict=True):
            artist.set_ydata(values.abs().amax(0).numpy())
        error, best = errors[ALPHAS.index(alpha)], min(range(len(ALPHAS)), key=errors.__getitem__)
        curve.set_ydata(errors)
        none.set_ydata([plain] * 2)
        here.set_data([alpha], [error])
        left, right = _unevenness(z / s), _unevenness(w * s)
        return (
            f"alpha {alpha:.2f}: largest channel over the median one: inputs {_unevenness(z):.1f} -> {left:.1f}, "
            f"weights {_unevenness(w):.1f} -> {right:.1f}\n"
            f"{bits}, one scale for the input tensor, {BITS[bits][0] + 32 / w.shape[1]:.2f} true bits per weight: "
            f"output error {error:.2e}   not smoothed {plain:.2e}   best {errors[best]:.2e} at alpha {ALPHAS[best]:.2f}"
        )

    return tie(controls, axes[0, 0], [*images, *lines, curve, none, here], update)


def _layer(weight: Tensor, x: Tensor, channels) -> tuple[Tensor, Tensor, list[int]]:
    """Float copies of at most _ROWS rows and _TOKENS tokens, evenly picked, and the channels as a list."""
    check_real(weight, "weight")
    check_real(x)
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"need weight (out, in) and x (tokens, in), got {tuple(weight.shape)} and {tuple(x.shape)}")
    channels = [check_int(c, "a channel", 0, weight.shape[1] - 1) for c in channels]
    x = x.detach().float().cpu().flatten(0, -2)
    return _evenly(weight.detach().float().cpu(), _ROWS), _evenly(x, _TOKENS), channels


def _evenly(rows: Tensor, most: int) -> Tensor:
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), most), dtype=torch.float64).round().long()]


def _stretched(weight: Tensor, x: Tensor, channels: list[int], factor: float, planted: bool) -> tuple:
    """(weight, x) with outlier channels: planted ones leave weight and x with the same product."""
    stretch = torch.ones(weight.shape[1])
    stretch[channels] = float(factor)
    return weight / stretch if planted else weight, x * stretch


def _bar(cases: list):
    return tqdm(cases, desc="quantizing", leave=False)


def _as_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _relative(y_hat: Tensor, y: Tensor) -> float:
    return ((y_hat - y).square().sum() / y.square().sum().clamp(min=1e-30)).item()


def _split_errors(weight: Tensor, x: Tensor) -> tuple[list[float], float, float]:
    """Output errors: LLM.int8() at each threshold, the int8 weight alone, W8A8 with one scale for the tensor."""
    linear, y = _as_linear(weight), x @ weight.T
    split, errors, last = LLMInt8Linear.from_linear(linear), [], None
    for threshold in THRESHOLDS:
        split.threshold = threshold
        columns = split.outlier_columns(x)
        if last is None or not torch.equal(columns, last):  # else the same split as before
            error, last = _relative(split.simulate(x), y), columns
        errors.append(max(error, 1e-12))
    alone = _relative(F.linear(x, split.dequantized_weight()), y)
    whole = _relative(DynamicInt8Linear.from_linear(linear).simulate(x), y)
    return errors, max(alone, 1e-12), max(whole, 1e-12)


def _scales(weight: Tensor, x: Tensor, alpha: float) -> Tensor:
    return smoothing_scales(x.abs().amax(0), [_as_linear(weight)], alpha)


def _smoothing_errors(weight: Tensor, x: Tensor) -> dict[str, tuple[list[float], float]]:
    """{bits: (output error at each alpha, and without smoothing)}; each side is rounded once for its own bits."""
    y = x @ weight.T
    pairs = [(weight, x)] + [(weight * s, x / s) for s in (_scales(weight, x, alpha) for alpha in ALPHAS)]
    found = {bits: [] for bits in BITS}
    for w, z in pairs:
        ws = {b: quantize_tensor(w, bits=b, granularity=PerAxis(0)).dequantize() for b in (8, 6, 4)}
        zs = {b: fake_quantize(z, choose_qparams(*torch.aminmax(z), qmin=0, qmax=2**b - 1)) for b in (8, 6, 4)}
        for bits, (of_w, of_x) in BITS.items():
            found[bits].append(max(_relative(zs[of_x] @ ws[of_w].T, y), 1e-12))
    return {bits: (errors[1:], errors[0]) for bits, errors in found.items()}


def _unevenness(x: Tensor) -> float:
    """The largest channel over the median one, each by its largest magnitude."""
    peaks = x.abs().amax(0)
    return (peaks.max() / peaks.median().clamp(min=1e-30)).item()


def _positive_range(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value above 0: what a logarithmic axis can show."""
    values = values[values > 0]
    return (values.min(), values.max()) if len(values) else (1.0, 1.0)


def _bits_used(x: Tensor, rows: bool) -> np.ndarray:
    """How many bits the code of each value needs on an 8-bit grid (0..7), of the whole tensor or of its row."""
    some = _evenly(x.abs(), _PICTURE[0])
    largest = x.abs().amax(1, keepdim=True) if rows else x.abs().amax()
    largest = _evenly(largest, _PICTURE[0]) if rows else largest
    bits = torch.frexp(torch.round(127 * some / largest.clamp(min=1e-30))).exponent.float()  # 2**(bits - 1) <= code
    size = [len(bits), min(bits.shape[1], _PICTURE[1])]
    return F.adaptive_max_pool2d(bits[None], size)[0].numpy()


def _draw_images(axes, of_x, of_w) -> list:
    titles = "inputs before", "inputs after", "weights before", "weights after"
    images, colours = [], colormaps["viridis"].resampled(8)
    for ax, title, shape in zip(axes[:, :2].flat, titles, (of_x, of_x, of_w, of_w), strict=True):
        blank = np.zeros((min(shape[0], _PICTURE[0]), min(shape[1], _PICTURE[1])))
        image = ax.imshow(blank, vmin=-0.5, vmax=7.5, cmap=colours, aspect="auto", interpolation="nearest",
                          extent=(0, shape[1], shape[0], 0))  # fmt: skip
        ax.set(title=title, ylabel="token" if shape is of_x else "row")
        images.append(image)
    for ax in axes[1, :2]:
        ax.set(xlabel="channel")
    fig = axes[0, 0].figure
    for column, (start, width) in enumerate(((0.075, 0.22), (0.365, 0.22), (0.735, 0.25))):
        for row, bottom in enumerate((0.58, 0.115)):
            axes[row, column].set_position((start, bottom, width, 0.35))
    fig.colorbar(
        images[0],
        cax=fig.add_axes((0.605, 0.115, 0.014, 0.815)),
        label="bits that the code needs, of 7",
        ticks=range(8),
    )
    return images


def _draw_channels(ax, layers: dict) -> list:
    styles = (
        ("|x| before", FLOAT, "-", 0.9),
        ("|x| after", QUANTIZED, "-", 2.4),
        ("|w| before", FLOAT, ":", 0.9),
        ("|w| after", OTHER, "-", 0.9),
    )
    width = next(iter(layers.values()))[0].shape[1]
    lines = [
        ax.plot(range(width), [1] * width, color=color, linestyle=style, linewidth=thick, label=label)[0]
        for label, color, style, thick in styles
    ]
    peaks = torch.cat([part.abs().amax(0) for pair in layers.values() for part in pair])
    low, high = _positive_range(peaks.numpy())
    ax.set(yscale="log", ylim=(low / 2, high * 30), title="largest of each channel")
    ax.legend(loc="upper center", ncols=2, fontsize="x-small")
    return lines


def _draw_curve(ax, known: dict) -> tuple:
    (curve,) = ax.plot(ALPHAS, ALPHAS, color=ERROR, label="smoothed")
    none = ax.axhline(1, color=FLOAT, linestyle="--", label="not smoothed")
    (here,) = ax.plot([0.5], [1], "o", color=ERROR, markersize=9)
    every = [e for case in known.values() for errors, plain in case.values() for e in (*errors, plain)]
    ax.set(yscale="log", ylim=(min(every) / 2, max(every) * 20), xlabel="alpha", title="output error")
    ax.legend(loc="upper center", ncols=2, fontsize="x-small")
    return curve, none, here


def _threshold_axes() -> tuple:
    fig, axes = figure(columns=2, rows=2, height=4.0, gridspec_kw={"height_ratios": [3, 2]})
    grid = axes[0, 0].get_gridspec()
    for ax in axes[:, 0]:
        ax.remove()
    left, top, bottom = fig.add_subplot(grid[:, 0]), axes[0, 1], axes[1, 1]
    left.set(xlabel="channel", ylabel="largest |x|", title="which columns go to float")
    for ax in (top, bottom):
        ax.set(xscale="log", xlim=(0.4, 4500))
        ax.set_xticks([1, 6, 30, 100, 300, _NEVER], ["1", "6", "30", "100", "300", "none"])
        ax.minorticks_off()
    top.set(yscale="log", title="error of the layer's output")
    bottom.set(ylim=(-4, 104), xlabel="threshold", ylabel="in float, %")
    fig.subplots_adjust(left=0.075, right=0.98, top=0.92, bottom=0.12, wspace=0.2, hspace=0.22)
    return fig, left, top, bottom
