"""Sliders on a clip point: what five observers choose for a real activation, and what it costs the layer's output."""

from functools import cache
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams, fake_quantize, unclamped_codes
from quantlab.arguments import check_int, check_real
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import evenly, grid_points, nearest, relative_error, states, thinned
from quantlab.explorers.drawing import draw_ring, draw_split, draw_uprights, show_split, upright
from quantlab.metrics import SplitError, split_error
from quantlab.observers import MSE, Entropy, MinMax, MovingAverage, Percentile
from quantlab.plots import CLIPPED, FLOAT, OTHER, QUANTIZED

BITS = range(2, 9)
CLIPS = [2.0 ** (-j / 6) for j in range(36, -1, -1)]  # fractions of the range, from 1/64 to 1
BY_HAND = "by hand"
_VALUES = 200_000  # each clip point needs a pass over them for each number of bits
_BATCHES = 16  # the moving average sees the tokens in as many batches


class _Grid(NamedTuple):
    """One grid over the values of x."""

    qp: QParams
    points: list[float]
    split: SplitError
    text: str  # the numbers under the picture


def explore_calibration(x: Tensor, *, bits: int = 4, weight: Tensor | None = None, clip: float = 1.0) -> Explorer:
    """Clip the input of a layer by hand or by an observer; see the grid, the three error curves and all choices.

    x: (tokens, in_features), of which at most 200,000 values are used, as whole tokens evenly picked. weight:
    (out_features, in_features); with it the numbers say what the rounded input does to the layer's output.
    clip is a fraction of the range, from 1/64 to 1, and the nearest position of the slider is taken.
    """
    bits, x = check_int(bits, "bits", BITS[0], BITS[-1]), _tokens(check_real(x))
    data = _Calibration(x, None if weight is None else weight.detach().float().cpu())
    picture = _Picture(data, [data.curves(every) for every in BITS])
    controls = {
        "bits": widgets.IntSlider(bits, min=BITS[0], max=BITS[-1], description="bits"),
        "clip": widgets.SelectionSlider(
            options=[(f"{c:.3f}", c) for c in CLIPS], value=nearest(CLIPS, clip), description="clip"
        ),
        "observer": widgets.Dropdown(options=[BY_HAND, *data.names], value=BY_HAND, description="range"),
    }
    for every in BITS:  # now, so that no step of the slider has to wait for it
        data.marks(every)

    def update(bits, clip, observer) -> str:
        grid = data.grid(bits, observer, clip) if observer == BY_HAND else data.grid(bits, observer)
        reach = clip if observer == BY_HAND else data.reach_of(grid.qp)
        picture.show(grid, data.curves(bits), data.marks(bits), reach)
        return grid.text

    clips = thinned(CLIPS, 21, controls["clip"].value)
    filmed = states(clip=clips, observer=[BY_HAND], bits=BITS)
    filmed += states(observer=data.names, bits=BITS)  # the clip stands where it was
    explorer = bind(controls, picture.left, picture.moving, update, filmed=filmed)
    controls["clip"].observe(lambda _: controls["observer"].set_trait("value", BY_HAND), names="value")
    return explorer


# --- numbers ----------------------------------------------------------------------------------------------------


def _tokens(x: Tensor) -> Tensor:
    """Whole rows of x, evenly picked, of at most _VALUES values; anything but a matrix counts as one column."""
    x = x.detach().float().cpu()
    x = x.flatten(0, -2) if x.ndim > 1 else x.reshape(-1, 1)
    return evenly(x, max(1, _VALUES // x.shape[1]))


def _observers(bits: int) -> dict:
    return {
        "min-max": MinMax(),
        "moving average": MovingAverage(),
        "percentile 99.9": Percentile(),
        "MSE": MSE(bits=bits),
        "entropy": Entropy(bits=bits),
    }


class _Calibration:
    """Grids for x by hand and by the observers, and their errors; each is computed once."""

    def __init__(self, x: Tensor, weight: Tensor | None):
        self.x, self.weight, self.names = x, weight, list(_observers(8))
        self.low, self.high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
        self.reach = max(-self.low, self.high) or 1.0
        self.curves, self.choices = cache(self._curves), cache(self._choices)
        self.marks, self.grid = cache(self._marks), cache(self._grid)

    def reach_of(self, qp: QParams) -> float:
        """How far a grid reaches, over how far the values do."""
        points = grid_points(qp)
        return max(-points[0], points[-1]) / self.reach

    def _clipped(self, bits: int, clip: float) -> QParams:
        return choose_qparams(torch.tensor(self.low * clip), torch.tensor(self.high * clip), qmin=0, qmax=2**bits - 1)

    def _curves(self, bits: int) -> np.ndarray:
        """(rounding, clipping) error at each of CLIPS."""
        return np.array([split_error(self.x, self._clipped(bits, clip)) for clip in CLIPS])

    def _choices(self, bits: int) -> dict[str, QParams]:
        """The grid of each observer, which sees x in batches."""
        found = _observers(bits)
        for batch in self.x.split(-(-len(self.x) // _BATCHES)):
            for observer in found.values():
                observer.update(batch)
        return {name: choose_qparams(*o.min_max(), qmin=0, qmax=2**bits - 1) for name, o in found.items()}

    def _marks(self, bits: int) -> tuple[list[float], list[float]]:
        """Where each observer's choice stands: how far its grid reaches, and its error."""
        grids = self.choices(bits).values()
        return [self.reach_of(qp) for qp in grids], [sum(split_error(self.x, qp)) for qp in grids]

    def _grid(self, bits: int, observer: str, clip: float = 1.0) -> _Grid:
        qp = self._clipped(bits, clip) if observer == BY_HAND else self.choices(bits)[observer]
        points, split = grid_points(qp), split_error(self.x, qp)
        return _Grid(qp, points, split, self._describe(qp, points, split))

    def _describe(self, qp: QParams, points: list[float], split: SplitError) -> str:
        """The numbers under the picture. Both errors are ‖error‖² / ‖what it is the error of‖²."""
        x_hat, codes = fake_quantize(self.x, qp), unclamped_codes(self.x, qp)
        outside = ((codes < qp.qmin) | (codes > qp.qmax)).float().mean().item()
        power = self.x.square().mean().item() or 1.0
        text = (
            f"grid {points[0]:.4g} .. {points[-1]:.4g}   scale {qp.scale.item():.4g}   "
            f"zero point {qp.zero_point.item()}   clipped {outside:.3%}   "
            f"became 0: {(x_hat == 0).float().mean().item():.1%}\n"
            f"error of the input {sum(split) / power:.2e} = rounding {split.rounding / power:.2e} "
            f"+ clipping {split.clipping / power:.2e}"
        )
        if self.weight is None:
            return text
        error = relative_error(self.x @ self.weight.T, x_hat @ self.weight.T)
        return f"{text}   error of the OUTPUT {error:.2e}"


# --- picture ----------------------------------------------------------------------------------------------------


class _Picture:
    """Left, the grid over the values; right, the errors at every clip point, and each observer's place there."""

    def __init__(self, data: _Calibration, curves: list[np.ndarray]):
        fig, (self.left, right) = figure(columns=2, height=4.0)
        self.ends = data.low, data.high
        self.points, self.cut = self._draw_values(data)
        self.lines = draw_split(right, CLIPS, 1.4)
        self.shapes = [
            right.plot([1], [1], marker, color=OTHER, markersize=7, markeredgecolor="black", label=name)[0]
            for name, marker in zip(data.names, "svPDo", strict=True)
        ]
        self.here = draw_ring(right, color=QUANTIZED, markersize=14)
        totals = np.concatenate([errors.sum(1) for errors in curves])
        right.set(xscale="log", xlim=(1 / 80, 1.25), xlabel="reach of the grid (1: the farthest value)", title="error")
        right.set(yscale="log", ylim=(totals.min() / 4 + 1e-30, totals.max() * 4 + 1e-29), ylabel="mean squared error")
        right.set_xticks([1 / 64, 1 / 16, 1 / 4, 1], ["1/64", "1/16", "1/4", "1"], minor=False)
        right.minorticks_off()
        handles = right.get_legend_handles_labels()
        fig.legend(*handles, loc="lower center", ncols=8, fontsize="small", columnspacing=1.0, handletextpad=0.4)
        fig.subplots_adjust(left=0.09, right=0.98, top=0.92, bottom=0.21, wspace=0.26)
        self.moving = [*self.cut, self.points, *self.lines, *self.shapes, self.here]

    def _draw_values(self, data: _Calibration) -> tuple:
        """The values, still; the grid points, and the parts that are clipped."""
        ax, (low, high), room = self.left, self.ends, 0.05 * data.reach
        ax.hist(data.x.flatten().numpy(), bins=160, color=FLOAT, log=True)
        ax.set(xlabel="value", ylabel="count (log)", title="the grid (pink: clipped)", xlim=(low - room, high + room))
        points = draw_uprights(ax, colors=QUANTIZED, linewidth=0.7, alpha=0.6)
        return points, [ax.axvspan(edge, edge, color=CLIPPED, alpha=0.35, linewidth=0) for edge in self.ends]

    def show(self, grid: _Grid, errors: np.ndarray, marks: tuple, reach: float) -> None:
        self.points.set_segments(upright(grid.points))
        (low, high), half = self.ends, grid.qp.scale.item() / 2
        inner = max(grid.points[0] - half, low), min(grid.points[-1] + half, high)
        for span, edge, end in zip(self.cut, self.ends, inner, strict=True):
            span.set_x(min(edge, end))
            span.set_width(abs(edge - end))
        show_split(self.lines, errors)
        for shape, place, error in zip(self.shapes, *marks, strict=True):
            shape.set_data([place], [error])
        self.here.set_data([reach], [sum(grid.split)])
