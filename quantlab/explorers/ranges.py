"""Sliders on the range of a grid: where it lies, and where it clips."""

from functools import cache

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams, fake_quantize
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import grid_points, sample
from quantlab.explorers.drawing import draw_split, draw_uprights, show_split, upright
from quantlab.metrics import SplitError, split_error, sqnr_db
from quantlab.plots import CLIPPED, ERROR, FLOAT, QUANTIZED

CLIPS = np.round(np.arange(0.05, 1.001, 0.05), 2)  # fractions of max|x| at which the curves are drawn


def explore_affine(x: Tensor, *, bits: int = 4, symmetric: bool = False) -> Explorer:
    """Lay a grid over the values of a layer: choose bits and range, see the grid points and each value's error."""
    x = sample(x)
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    reach = max(-low, high) or 1.0
    picture = _GridPicture(x, reach)

    def update(bits, low, high, symmetric) -> str:
        ends = torch.tensor(low * reach), torch.tensor(high * reach)
        qp = choose_qparams(*ends, qmin=0, qmax=2**bits - 1, symmetric=symmetric)
        picture.show(qp)
        split, back = split_error(x, qp), fake_quantize(x, qp)
        return (
            f"scale {qp.scale.item():.4g}   zero point {qp.zero_point.item()}   codes 0..{qp.qmax}   "
            f"mean squared error {sum(split):.2e} = rounding {split.rounding:.2e} + clipping {split.clipping:.2e}   "
            f"signal to noise {sqnr_db(x, back):.1f} dB"
        )

    return bind(_range_controls(bits, low / reach, high / reach, symmetric), picture.top, picture.moving, update)


def _range_controls(bits: int, low: float, high: float, symmetric: bool) -> dict:
    slider = {"min": -1.5, "max": 1.5, "step": 0.01, "readout_format": ".2f"}
    slider["style"] = {"description_width": "initial"}
    return {
        "bits": widgets.IntSlider(bits, min=1, max=8, description="bits"),
        "low": widgets.FloatSlider(low, **slider | {"max": 0.0}, description="min (× largest)"),
        "high": widgets.FloatSlider(high, **slider | {"min": 0.0}, description="max (× largest)"),
        "symmetric": widgets.Checkbox(symmetric, description="symmetric"),
    }


class _GridPicture:
    """The grid points over the values, and below them the error of every real."""

    def __init__(self, x: Tensor, reach: float):
        fig, (self.top, bottom) = figure(rows=2, height=4.2, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
        self.edge, self.reals = 1.6 * reach, torch.linspace(-1.6 * reach, 1.6 * reach, 1500)
        counts, edges = np.histogram(x.numpy(), bins=160)
        self.top.stairs(counts, edges, fill=True, color=FLOAT)
        self.top.set(ylabel="weights", xlim=(-self.edge, self.edge), ylim=(0, 1.15 * counts.max()))
        self.points = draw_uprights(self.top, colors=QUANTIZED, linewidth=1.0)
        (zero,) = self.top.plot([0], [0], "^", color=QUANTIZED, markersize=9, clip_on=False)
        (self.error,) = bottom.plot(self.reals, torch.zeros_like(self.reals), color=ERROR, linewidth=1.2)
        self.half_steps = bottom.hlines([], -1, 1, colors="0.4", linestyles="dashed", linewidth=0.8)
        bottom.set(xlabel="real value", ylabel="error x̂ − x", ylim=(-0.6 * reach, 0.6 * reach))
        fig.subplots_adjust(left=0.09, right=0.98, top=0.97, bottom=0.12, hspace=0.08)
        self.moving = [self.points, zero, self.error, self.half_steps]

    def show(self, qp: QParams) -> None:
        self.points.set_segments(upright(grid_points(qp)))
        self.error.set_ydata((fake_quantize(self.reals, qp) - self.reals).numpy())
        half = qp.scale.item() / 2
        self.half_steps.set_segments([[(-self.edge, y), (self.edge, y)] for y in (-half, half)])


def explore_clipping(x: Tensor, *, bits: int = 4, clip: float = 1.0) -> Explorer:
    """Move the clipping point (a fraction of max|x|) and watch rounding error trade against clipping error."""
    x = sample(x)
    largest = x.abs().max().item()
    curves = cache(lambda bits: np.array(clipping_curves(x, bits, CLIPS)))  # once for each number of bits
    controls = {
        "bits": widgets.IntSlider(bits, min=2, max=8, description="bits"),
        "clip": widgets.FloatSlider(clip, min=0.05, max=1.0, step=0.05, description="clip"),
    }
    picture = _ClippingPicture(x, largest, np.concatenate([curves(bits).sum(1) for bits in (2, 8)]))

    def update(bits, clip) -> str:
        qp, errors = _clipped_grid(x, bits, clip), curves(bits)
        split = split_error(x, qp)
        picture.show(qp, clip, errors, split)
        return (
            f"grid ±{clip * largest:.4g}   scale {qp.scale.item():.4g}   rounding {split.rounding:.2e}   "
            f"clipping {split.clipping:.2e}   sum {sum(split):.2e}   best clip {CLIPS[errors.sum(1).argmin()]:.2f}"
        )

    return bind(controls, picture.left, picture.moving, update)


def clipping_curves(x: Tensor, bits: int, clips) -> list[SplitError]:
    """(rounding, clipping) error of x at each clipping point, a fraction of max|x|, on a symmetric grid."""
    return [split_error(x, _clipped_grid(x, bits, clip)) for clip in clips]


def _clipped_grid(x: Tensor, bits: int, clip: float) -> QParams:
    edge, half = clip * x.abs().max(), 2 ** (bits - 1)
    return choose_qparams(-edge, edge, qmin=-half, qmax=half - 1, symmetric=True)


class _ClippingPicture:
    """The clipped grid over the values, and the two errors at every clipping point."""

    def __init__(self, x: Tensor, largest: float, totals: np.ndarray):
        fig, (self.left, right) = figure(columns=2)
        self.largest = largest
        self.left.hist(x.numpy(), bins=160, color=FLOAT, log=True)
        self.left.set(xlabel="value", ylabel="count (log)", title="grid over the values")
        self.points = draw_uprights(self.left, colors=QUANTIZED, linewidth=0.7)
        self.cut = [self.left.axvspan(end, end, color=CLIPPED, alpha=0.35) for end in (-largest, largest)]
        self.lines = draw_split(right, CLIPS)
        (self.here,) = right.plot([1], [1], "o", color=QUANTIZED, markersize=9)
        right.set(yscale="log", ylim=(totals.min() / 3, totals.max() * 3), title="error")
        right.set(xlabel="clip (fraction of the largest)", ylabel="mean squared error")
        right.legend(loc="upper center", ncols=3, fontsize="small")
        fig.subplots_adjust(left=0.09, right=0.98, top=0.9, bottom=0.16, wspace=0.28)
        self.moving = [*self.cut, self.points, *self.lines, self.here]

    def show(self, qp: QParams, clip: float, errors: np.ndarray, split: SplitError) -> None:
        self.points.set_segments(upright(grid_points(qp)))
        for sign, span in zip((-1, 1), self.cut, strict=True):
            span.set_x(min(sign * clip, sign) * self.largest)
            span.set_width((1 - clip) * self.largest)
        show_split(self.lines, errors)
        self.here.set_data([clip], [sum(split)])
