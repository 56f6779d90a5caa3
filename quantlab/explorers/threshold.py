"""A slider on LLM.int8()'s threshold: which columns it keeps in float, and what that does to the layer's output."""

from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import linear_of, relative_error
from quantlab.explorers.outliers import factor_controls, measured, positive_range, stretched_layers
from quantlab.linear import DynamicInt8Linear
from quantlab.outliers import LLMInt8Linear
from quantlab.plots import ERROR, FLOAT, OTHER, QUANTIZED

THRESHOLDS = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, float("inf"))
_NEVER = 3000.0  # where the curve puts the threshold that no value reaches
_PLACES = [min(threshold, _NEVER) for threshold in THRESHOLDS]
_FLOOR = 1e-6  # of the stairs, below all that the axis shows


class _Errors(NamedTuple):
    """One layer at every threshold."""

    peaks: np.ndarray  # the largest |x| of each column
    split: list[float]  # the output's error, at each threshold
    weights_only: float  # with the int8 weight and float inputs
    one_scale: float  # W8A8 with one scale for the tensor
    bits: float  # true bits per weight

    @property
    def shares(self) -> list[float]:
        """The percentage of columns in float, at each threshold."""
        return [100 * (self.peaks >= threshold).mean() for threshold in THRESHOLDS]


def explore_threshold(weight: Tensor, x: Tensor, *, channels=(), factor: int = 100, threshold: float = 6.0) -> Explorer:
    """Drag LLM.int8()'s threshold: which columns go to float, how many, and the error of the layer's output.

    weight (out, in) and x (tokens, in), the layer's input; at most 512 rows and 256 tokens of them are used.
    The columns `channels` of x are multiplied by the factor of a slider; "planted" divides those of the weight, so
    that the layer computes what it did. Everything is computed once, before the slider moves.

    Raises: ValueError if weight and x do not fit together, or a channel does not exist.
    """
    known = measured(_measure, stretched_layers(weight, x, channels))
    labels = [("none in float", t) if t == float("inf") else (f"{t:g}", t) for t in THRESHOLDS]
    slider = widgets.SelectionSlider(options=labels, value=threshold, description="threshold")
    controls = dict(zip(("threshold", "factor", "planted"), (slider, *factor_controls(factor, True)), strict=True))
    picture = _Picture(list(known.values()), threshold)

    def update(threshold, factor, planted) -> str:
        picture.show(known[factor, planted], threshold)
        return _describe(known[factor, planted], threshold)

    return bind(controls, picture.left, picture.moving, update)


def _measure(weight: Tensor, x: Tensor) -> _Errors:
    linear, y = linear_of(weight), x @ weight.T
    split, errors, before = LLMInt8Linear.from_linear(linear), [], None
    for threshold in THRESHOLDS:
        split.threshold = threshold
        columns = split.outlier_columns(x)
        if before is None or not torch.equal(columns, before):  # else the same split as before
            error, before = relative_error(y, split.simulate(x)), columns
        errors.append(error)
    alone = relative_error(y, F.linear(x, split.dequantized_weight()))
    whole = relative_error(y, DynamicInt8Linear.from_linear(linear).simulate(x))
    errors = [max(error, 1e-12) for error in (*errors, alone, whole)]
    return _Errors(x.abs().amax(0).numpy(), errors[:-2], *errors[-2:], 8 * split.nbytes / split.codes.numel())


def _describe(found: _Errors, threshold: float) -> str:
    count, columns = (found.peaks >= threshold).sum(), len(found.peaks)
    share = count / columns
    return (
        f"threshold {threshold:g}: {count} of {columns} columns in float ({share:.1%}), the other {1 - share:.1%} of "
        f"the multiplications in 8-bit integers   bits moved: {8 * (1 - share) + 16 * share + 32 / columns:.2f} an "
        f"input value (outliers 16), {found.bits:.3f} a weight\n"
        f"output error {found.split[THRESHOLDS.index(threshold)]:.2e}   int8 weights only {found.weights_only:.2e}   "
        f"W8A8 with one scale {found.one_scale:.2e}"
    )


class _Picture:
    """Left, the columns and the threshold; right, the output's error and the share of columns in float."""

    def __init__(self, known: list[_Errors], threshold: float):
        self.left, top, bottom = _axes()
        self._draw_columns(np.stack([found.peaks for found in known]), threshold)
        self._draw_errors(top, known)
        (self.share,) = bottom.plot(_PLACES, _PLACES, ".-", color=OTHER)
        (self.there,) = bottom.plot([1], [1], "o", color=OTHER, markersize=9)
        columns = [self.ordinary, self.stems, self.outliers, self.line]
        errors = [self.split, self.weights_only, self.one_scale, self.here]
        self.moving = [*columns, *errors, self.share, self.there]

    def _draw_columns(self, peaks: np.ndarray, threshold: float) -> None:
        ax, columns = self.left, np.arange(peaks.shape[1] + 1)
        steps = {"baseline": _FLOOR, "fill": True, "color": QUANTIZED, "label": "int8"}
        self.ordinary = ax.stairs(columns[:-1] * 0.0, columns, **steps)
        self.stems = ax.vlines([], 0, 1, colors=OTHER, linewidth=1.2)
        (self.outliers,) = ax.plot([1], [1], "o", color=OTHER, markersize=5, label="float")
        low, high = positive_range(peaks)
        ax.set(xlim=(-0.02 * peaks.shape[1], 1.02 * peaks.shape[1]), ylim=(low / 3, high * 3), yscale="log")
        ax.legend(loc="upper right", ncols=2, fontsize="small")
        self.line = ax.axhline(threshold, color="black", linewidth=1.2)

    def _draw_errors(self, ax: Axes, known: list[_Errors]) -> None:
        (self.split,) = ax.plot(_PLACES, _PLACES, ".-", color=QUANTIZED, label="LLM.int8()")
        self.weights_only = ax.axhline(1, color=FLOAT, linestyle="--", label="int8 weights only")
        self.one_scale = ax.axhline(1, color=ERROR, linestyle=":", label="W8A8, one scale")
        (self.here,) = ax.plot([1], [1], "o", color=QUANTIZED, markersize=9)
        every = [error for found in known for error in (*found.split, found.weights_only, found.one_scale)]
        ax.set(ylim=(min(every) / 3, max(every) * 10))
        ax.legend(loc="upper center", fontsize="x-small", ncols=3, columnspacing=1.0)

    def show(self, found: _Errors, threshold: float) -> None:
        chosen, at, shares = found.peaks >= threshold, THRESHOLDS.index(threshold), found.shares
        self.ordinary.set_data(np.where(chosen, _FLOOR, found.peaks))
        tips = [(column + 0.5, found.peaks[column]) for column in chosen.nonzero()[0]]
        self.stems.set_segments([[(column, _FLOOR), (column, height)] for column, height in tips])
        self.outliers.set_data(*zip(*tips, strict=True) if tips else ([], []))
        self.line.set_ydata([_PLACES[at]] * 2)
        self.split.set_ydata(found.split)
        self.weights_only.set_ydata([found.weights_only] * 2)
        self.one_scale.set_ydata([found.one_scale] * 2)
        self.here.set_data([_PLACES[at]], [found.split[at]])
        self.share.set_ydata(shares)
        self.there.set_data([_PLACES[at]], [shares[at]])


def _axes() -> tuple:
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
    return left, top, bottom
