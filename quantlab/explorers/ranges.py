"""Sliders on the range of a grid: where it lies, and where it clips."""

from functools import cache

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams, fake_quantize
from quantlab.explorers.base import Explorer, figure, sample, tie
from quantlab.metrics import split_error, sqnr_db
from quantlab.plots import CLIPPED, ERROR, FLOAT, QUANTIZED


def explore_affine(x: Tensor, *, bits: int = 4, symmetric: bool = False) -> Explorer:
    """Lay a grid over the values of a layer: choose bits and range, see the grid points and each value's error."""
    x = sample(x)
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    reach = max(-low, high) or 1.0
    slider = {"min": -1.5, "max": 1.5, "step": 0.01, "readout_format": ".2f"}
    controls = {
        "bits": widgets.IntSlider(bits, min=1, max=8, description="bits"),
        "low": widgets.FloatSlider(low / reach, **slider | {"max": 0.0}, description="min (× largest)"),
        "high": widgets.FloatSlider(high / reach, **slider | {"min": 0.0}, description="max (× largest)"),
        "symmetric": widgets.Checkbox(symmetric, description="symmetric"),
    }
    for name in ("low", "high"):
        controls[name].style.description_width = "initial"
    fig, (top, bottom) = figure(rows=2, height=4.2, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    counts, edges = np.histogram(x.numpy(), bins=160)
    top.stairs(counts, edges, fill=True, color=FLOAT)
    top.set(ylabel="weights", xlim=(-1.6 * reach, 1.6 * reach), ylim=(0, 1.15 * counts.max()))
    line = torch.linspace(-1.6 * reach, 1.6 * reach, 1500)
    grid = top.vlines([], 0, 1, colors=QUANTIZED, linewidth=1.0, transform=top.get_xaxis_transform())
    (zero,) = top.plot([0], [0], "^", color=QUANTIZED, markersize=9, clip_on=False)
    (error,) = bottom.plot(line, torch.zeros_like(line), color=ERROR, linewidth=1.2)
    band = bottom.hlines([], -1.6 * reach, 1.6 * reach, colors="0.4", linestyles="dashed", linewidth=0.8)
    bottom.set(xlabel="real value", ylabel="error x̂ − x", ylim=(-0.6 * reach, 0.6 * reach))
    fig.subplots_adjust(left=0.09, right=0.98, top=0.97, bottom=0.12, hspace=0.08)

    def update(bits, low, high, symmetric) -> str:
        qp = choose_qparams(
            torch.tensor(low * reach), torch.tensor(high * reach), qmin=0, qmax=2**bits - 1, symmetric=symmetric
        )
        points = qp.scale * (torch.arange(qp.qmin, qp.qmax + 1) - qp.zero_point)
        grid.set_segments([[(p, 0), (p, 1)] for p in points.tolist()])
        error.set_ydata((fake_quantize(line, qp) - line).numpy())
        half = qp.scale.item() / 2
        band.set_segments([[(-1.6 * reach, y), (1.6 * reach, y)] for y in (-half, half)])
        split, back = split_error(x, qp), fake_quantize(x, qp)
        return (
            f"scale {qp.scale.item():.4g}   zero point {qp.zero_point.item()}   codes 0..{qp.qmax}   "
            f"mean squared error {sum(split):.2e} = rounding {split.rounding:.2e} + clipping {split.clipping:.2e}   "
            f"signal to noise {sqnr_db(x, back):.1f} dB"
        )

    return tie(controls, top, [grid, zero, error, band], update)


def clipping_curves(x: Tensor, bits: int, clips) -> list:
    """(rounding, clipping) error of x at each clipping point, a fraction of max|x|, on a symmetric grid."""
    return [split_error(x, _clipped_grid(x, bits, clip)) for clip in clips]


def _clipped_grid(x: Tensor, bits: int, clip: float) -> QParams:
    edge, half = clip * x.abs().max(), 2 ** (bits - 1)
    return choose_qparams(-edge, edge, qmin=-half, qmax=half - 1, symmetric=True)


def explore_clipping(x: Tensor, *, bits: int = 4, clip: float = 1.0) -> Explorer:
    """Move the clipping point (a fraction of max|x|) and watch rounding error trade against clipping error."""
    x = sample(x)
    clips = np.round(np.arange(0.05, 1.001, 0.05), 2)
    curves = cache(lambda bits: np.array(clipping_curves(x, bits, clips)))  # once for each number of bits
    controls = {
        "bits": widgets.IntSlider(bits, min=2, max=8, description="bits"),
        "clip": widgets.FloatSlider(clip, min=0.05, max=1.0, step=0.05, description="clip"),
    }
    fig, (left, right) = figure(columns=2)
    largest = x.abs().max().item()
    left.hist(x.numpy(), bins=160, color=FLOAT, log=True)
    left.set(xlabel="value", ylabel="count (log)", title="grid over the values")
    grid = left.vlines([], 0, 1, colors=QUANTIZED, linewidth=0.7, transform=left.get_xaxis_transform())
    cut = [left.axvspan(sign * largest, sign * largest, color=CLIPPED, alpha=0.35) for sign in (-1, 1)]
    (rounding,) = right.plot(clips, clips, color=ERROR, label="rounding")
    (clipping,) = right.plot(clips, clips, color=CLIPPED, linestyle="--", label="clipping")
    (total,) = right.plot(clips, clips, color="black", linewidth=2, label="sum")
    (here,) = right.plot([clip], [1], "o", color=QUANTIZED, markersize=9)
    sizes = [e for b in (2, 8) for e in curves(b).sum(1)]
    right.set(
        xlabel="clip (fraction of the largest)",
        ylabel="mean squared error",
        yscale="log",
        ylim=(min(sizes) / 3, max(sizes) * 3),
        title="error",
    )
    right.legend(loc="upper center", ncols=3, fontsize="small")
    fig.subplots_adjust(left=0.09, right=0.98, top=0.9, bottom=0.16, wspace=0.28)

    def update(bits, clip) -> str:
        qp, errors = _clipped_grid(x, bits, clip), curves(bits)
        points = qp.scale * torch.arange(qp.qmin, qp.qmax + 1)
        grid.set_segments([[(p, 0), (p, 1)] for p in points.tolist()])
        for sign, span in zip((-1, 1), cut, strict=True):
            span.set_x(min(sign * clip, sign) * largest)
            span.set_width((1 - clip) * largest)
        for artist, values in ((rounding, errors[:, 0]), (clipping, errors[:, 1]), (total, errors.sum(1))):
            artist.set_ydata(np.maximum(values, 1e-30))
        split = split_error(x, qp)
        here.set_data([clip], [sum(split)])
        return (
            f"grid ±{clip * largest:.4g}   scale {qp.scale.item():.4g}   rounding {split.rounding:.2e}   "
            f"clipping {split.clipping:.2e}   sum {sum(split):.2e}   best clip {clips[errors.sum(1).argmin()]:.2f}"
        )

    return tie(controls, left, [*cut, grid, rounding, clipping, total, here], update)
