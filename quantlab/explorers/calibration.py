"""Sliders on a clip point: what five observers choose for a real activation, and what it costs the layer's output."""

from functools import cache

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams, fake_quantize
from quantlab.arguments import check_int, check_real
from quantlab.explorers.base import Explorer, figure, tie
from quantlab.metrics import mse, split_error
from quantlab.observers import MSE, Entropy, MinMax, MovingAverage, Percentile
from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED

CLIPS = [2.0 ** (-j / 6) for j in range(36, -1, -1)]  # fractions of the range, from 1/64 to 1
BY_HAND = "by hand"
_MOST = 200_000  # values looked at: each clip point needs a pass over them for each number of bits
_BATCHES = 16  # the moving average sees the tokens in as many batches


def explore_calibration(x: Tensor, *, bits: int = 4, weight: Tensor | None = None, clip: float = 1.0) -> Explorer:
    """Clip the input of a layer by hand or by an observer; see the grid, the three error curves and all choices.

    x: (tokens, in_features), at most 200,000 values of it looked at, as whole tokens evenly picked. weight:
    (out_features, in_features); with it the numbers say what the rounded input does to the layer's output.
    clip is a fraction of the range, from 1/64 to 1, and the nearest position of the slider is taken.
    """
    check_real(x)
    check_int(bits, "bits", 2, 8)
    x = _tokens(x)
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    reach = max(-low, high) or 1.0
    names = [BY_HAND, *_observers(bits)]
    nearest = min(CLIPS, key=lambda c: abs(c - clip))
    controls = {
        "bits": widgets.IntSlider(bits, min=2, max=8, description="bits"),
        "clip": widgets.SelectionSlider(options=[(f"{c:.3f}", c) for c in CLIPS], value=nearest, description="clip"),
        "observer": widgets.Dropdown(options=names, value=BY_HAND, description="range"),
    }

    @cache
    def choices(bits) -> dict:
        found = {name: _watch(observer, x) for name, observer in _observers(bits).items()}
        return {name: choose_qparams(*bounds, qmin=0, qmax=2**bits - 1) for name, bounds in found.items()}

    @cache
    def curves(bits) -> np.ndarray:
        return np.array([split_error(x, _grid(low * c, high * c, bits)) for c in CLIPS])

    @cache
    def numbers(bits, observer, clip) -> tuple:
        qp = _grid(low * clip, high * clip, bits) if observer == BY_HAND else choices(bits)[observer]
        return qp, _points(qp), split_error(x, qp), _clipped(x, qp), _said(x, qp, weight)

    @cache
    def marks(bits) -> tuple:
        """Where each observer's choice stands: how far its grid reaches, and its error."""
        grids = [choices(bits)[name] for name in names[1:]]
        return [_reach(qp) / reach for qp in grids], [sum(split_error(x, qp)) for qp in grids]

    for every in range(2, 9):  # now, so that no step of the slider has to wait for it
        curves(every), marks(every)

    fig, (left, right) = figure(columns=2, height=4.0)
    left.hist(x.flatten().numpy(), bins=160, color=FLOAT, log=True)
    left.set(xlabel="value", ylabel="count (log)", title="the grid (pink: clipped)")
    left.set(xlim=(low - 0.05 * reach, high + 0.05 * reach))
    grid = left.vlines([], 0, 1, colors=QUANTIZED, linewidth=0.7, alpha=0.6, transform=left.get_xaxis_transform())
    cut = [left.axvspan(edge, edge, color=CLIPPED, alpha=0.35, linewidth=0) for edge in (low, high)]
    lines = [
        right.plot(CLIPS, CLIPS, color=color, linestyle=style, linewidth=width, label=label)[0]
        for label, color, style, width in (
            ("rounding", ERROR, "-", 1.4), ("clipping", CLIPPED, "--", 1.4), ("sum", "black", "-", 2),
        )
    ]  # fmt: skip
    shapes = [
        right.plot([1], [1], marker, color=OTHER, markersize=7, markeredgecolor="black", label=name)[0]
        for name, marker in zip(names[1:], "svPDo", strict=True)
    ]
    (here,) = right.plot([1], [1], "o", color=QUANTIZED, markersize=14, fillstyle="none", markeredgewidth=2.5)
    totals = np.array([curves(b).sum(1) for b in range(2, 9)])
    right.set(xlabel="reach of the grid (1: the farthest value)", ylabel="mean squared error", title="error")
    right.set(
        xscale="log", yscale="log", xlim=(1 / 80, 1.25), ylim=(totals.min() / 4 + 1e-30, totals.max() * 4 + 1e-29)
    )
    right.set_xticks([1 / 64, 1 / 16, 1 / 4, 1], ["1/64", "1/16", "1/4", "1"], minor=False)
    right.minorticks_off()
    fig.legend(*right.get_legend_handles_labels(), loc="lower center", ncols=8, fontsize="small",
               columnspacing=1.0, handletextpad=0.4)  # fmt: skip
    fig.subplots_adjust(left=0.09, right=0.98, top=0.92, bottom=0.21, wspace=0.26)

    def update(bits, clip, observer) -> str:
        qp, points, split, ends, text = numbers(bits, observer, clip)
        grid.set_segments([[(p, 0), (p, 1)] for p in points])
        for span, edge, end in zip(cut, (low, high), ends, strict=True):
            span.set_x(min(edge, end))
            span.set_width(abs(edge - end))
        for line, values in zip(lines, (*curves(bits).T, curves(bits).sum(1)), strict=True):
            line.set_ydata(np.maximum(values, 1e-30))
        for shape, place, error in zip(shapes, *marks(bits), strict=True):
            shape.set_data([place], [error])
        here.set_data([clip if observer == BY_HAND else _reach(qp) / reach], [sum(split)])
        return text

    explorer = tie(controls, left, [*cut, grid, *lines, *shapes, here], update)
    controls["clip"].observe(lambda _: controls["observer"].set_trait("value", BY_HAND), names="value")
    return explorer


def _tokens(x: Tensor) -> Tensor:
    """Whole rows of x, evenly picked, of at most _MOST values; anything but a matrix counts as one column."""
    x = x.detach().float().cpu()
    x = x.flatten(0, -2) if x.ndim > 1 else x.reshape(-1, 1)
    count = min(len(x), max(1, _MOST // x.shape[1]))
    return x[torch.linspace(0, len(x) - 1, count, dtype=torch.float64).round().long()]


def _observers(bits: int) -> dict:
    return {
        "min-max": MinMax(),
        "moving average": MovingAverage(),
        "percentile 99.9": Percentile(),
        "MSE": MSE(bits=bits),
        "entropy": Entropy(bits=bits),
    }


def _watch(observer, x: Tensor) -> tuple[Tensor, Tensor]:
    for batch in x.split(-(-len(x) // _BATCHES)):
        observer.update(batch)
    return observer.min_max()


def _grid(low: float, high: float, bits: int) -> QParams:
    return choose_qparams(torch.tensor(low), torch.tensor(high), qmin=0, qmax=2**bits - 1)


def _points(qp: QParams) -> list[float]:
    return (qp.scale * (torch.arange(qp.qmin, qp.qmax + 1) - qp.zero_point)).tolist()


def _reach(qp: QParams) -> float:
    points = _points(qp)
    return max(-points[0], points[-1])


def _clipped(x: Tensor, qp: QParams) -> tuple[float, float]:
    """Half a step beyond the grid, but not farther out than the values are: where the shaded parts begin."""
    points, half = _points(qp), qp.scale.item() / 2
    return max(points[0] - half, min(x.min().item(), 0.0)), min(points[-1] + half, max(x.max().item(), 0.0))


def _said(x: Tensor, qp: QParams, weight: Tensor | None) -> str:
    """The numbers under the picture. Both errors are ‖error‖² / ‖what it is the error of‖²."""
    points, x_hat, half = _points(qp), fake_quantize(x, qp), qp.scale.item() / 2
    outside = ((x < points[0] - half) | (x > points[-1] + half)).float().mean().item()
    split, power = split_error(x, qp), x.square().mean().item() or 1.0
    text = (
        f"grid {points[0]:.4g} .. {points[-1]:.4g}   scale {qp.scale.item():.4g}   zero point {qp.zero_point.item()}   "
        f"clipped {outside:.3%}   became 0: {(x_hat == 0).float().mean().item():.1%}\n"
        f"error of the input {mse(x, x_hat) / power:.2e} = rounding {split.rounding / power:.2e} "
        f"+ clipping {split.clipping / power:.2e}"
    )
    if weight is None:
        return text
    w = weight.detach().float().cpu()
    out, error = x @ w.T, (x_hat - x) @ w.T
    return f"{text}   error of the OUTPUT {(error.square().sum() / (out.square().sum() + 1e-38)).item():.2e}"
