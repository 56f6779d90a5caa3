"""Sliders on GPTQ: one layer beside round-to-nearest, and column by column."""

from functools import cache

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from quantlab.explorers.base import Explorer, figure, tie
from quantlab.gptq import Hessian, gptq_quantize, gptq_steps
from quantlab.granularity import PerAxis, PerGroup, QTensor, quantize_tensor
from quantlab.plots import ERROR, QUANTIZED


def explore_gptq(weight: Tensor, hessian: Hessian, *, bits: int = 4, group_size: int | None = None) -> Explorer:
    """GPTQ beside round-to-nearest on one layer: two errors of each, every row's output error, the true bits."""
    weight = weight.detach()
    groups = [("whole row", 0), *((str(size), size) for size in (128, 64, 32, 16))]
    controls = {
        "bits": widgets.IntSlider(bits, min=2, max=8, description="bits"),
        "group": widgets.SelectionSlider(options=groups, value=group_size or 0, description="group"),
        "damping": widgets.SelectionSlider(
            options=[0.0001, 0.001, 0.01, 0.1, 1.0, 10.0], value=0.01, description="damping"
        ),
        "act_order": widgets.Checkbox(False, description="act-order"),
    }
    H, energy = hessian.matrix, _row_energy(weight, hessian.matrix)

    @cache
    def errors(bits, group, damping, act_order) -> tuple:
        granularity = PerGroup(group) if group else PerAxis(0)
        nearest = quantize_tensor(weight, bits=bits, granularity=granularity, symmetric=False)
        gptq = gptq_quantize(weight, hessian, bits=bits, group_size=group or None, damping=damping, act_order=act_order)
        found = (_two_errors(weight, q, H, energy) for q in (nearest, gptq))
        return *found, nearest.bits_per_element, gptq.bits_per_element

    fig, (left, right) = figure(columns=2)
    bars = left.bar([0, 1, 3, 4], [1] * 4, color=[ERROR, QUANTIZED] * 2, bottom=1e-9)
    left.set(yscale="log", ylim=(1e-6, 1), xticks=[0.5, 3.5], ylabel="relative error")
    left.set_xticklabels(["of the weight", "of the output"])
    left.legend(bars[:2], ["round to nearest", "GPTQ"], loc="upper center", ncols=2, fontsize="small")
    right.plot([1e-9, 10], [1e-9, 10], color="0.5", linewidth=0.8)
    (rows,) = right.plot([], [], ".", color=QUANTIZED, markersize=4)
    right.set(
        xscale="log",
        yscale="log",
        xlim=(1e-6, 3),
        ylim=(1e-6, 3),
        xlabel="round to nearest",
        ylabel="GPTQ",
        title="output error, a dot for each row",
    )
    fig.subplots_adjust(left=0.09, right=0.98, top=0.9, bottom=0.16, wspace=0.28)

    def update(bits, group, damping, act_order) -> str:
        (w0, o0, r0), (w1, o1, r1), bits0, bits1 = errors(bits, group, damping, act_order)
        for bar, value in zip(bars, (w0, w1, o0, o1), strict=True):
            bar.set_height(value)
        rows.set_data(r0, r1)
        return (
            f"weight error {w0:.2e} → {w1:.2e} ({w1 / w0:.2f} ×)   output error {o0:.2e} → {o1:.2e} "
            f"({o1 / o0:.2f} ×)\nrows that GPTQ improves: {np.mean(r1 < r0):.0%}   true bits per weight "
            f"{bits0:.2f} → {bits1:.2f}{' (the order must be stored)' if bits1 > bits0 else ''}"
        )

    return tie(controls, left, [*bars, rows], update)


def explore_columns(
    weight: Tensor, hessian: Hessian, *, bits: int = 3, rows: int = 24, column: int = 0, row: int = 0
) -> Explorer:
    """GPTQ column by column: how far each weight has moved, one row on its grid, and the output error so far."""
    weight = weight.detach().double()[:rows]
    rows, columns = weight.shape
    states, nearest = gptq_steps(weight, hessian, bits=bits), _nearest(weight, bits)
    moved, qp = (states - weight).numpy(), nearest.qparams
    # In steps of each row's grid, whose points are then whole numbers.
    steps = (states / qp.scale + qp.zero_point).numpy()
    ways = _one_by_one(weight, nearest), states
    curves = [_errors_on_the_way(way, weight, hessian.matrix) for way in ways]
    wide = {"style": {"description_width": "initial"}, "layout": {"width": "400px"}}
    controls = {
        "column": widgets.IntSlider(column, min=0, max=columns, description="columns done", **wide),
        "row": widgets.IntSlider(row, min=0, max=rows - 1, description="row", **wide),
    }
    heights = {"height_ratios": [4, 4, 3]}
    fig, (top, middle, bottom) = figure(rows=3, height=6.2, gridspec_kw=heights, sharex=True)
    fig.subplots_adjust(left=0.09, right=0.98, top=0.95, bottom=0.08, hspace=0.1)
    picture, front, chosen = _map_of_moves(top, moved)
    before, now = _row_on_its_grid(middle, steps, qp.qmin, qp.qmax)
    here = _two_curves(bottom, *curves)

    def update(column, row) -> str:
        picture.set_data(moved[column])
        front.set_xdata([column, column])
        chosen.set_data([0, columns, columns, 0, 0], [row, row, row + 1, row + 1, row])
        before.set_ydata(steps[0, row])
        now.set_ydata(steps[column, row])
        here.set_data([column], [curves[1][column]])
        drift = abs(steps[column, row, column:] - steps[0, row, column:]).mean() if column < columns else 0.0
        return (
            f"{column} of {columns} columns rounded   output error so far: round to nearest "
            f"{curves[0][column]:.2e}, GPTQ {curves[1][column]:.2e}\n"
            f"row {row}: {columns - column} weights still free, moved by {drift:.3f} steps of the grid on average"
        )

    return tie(controls, top, [picture, front, chosen, before, now, here], update, few_colours=False)


def _map_of_moves(ax, moved: np.ndarray) -> tuple:
    """Every weight as a coloured cell: the picture, the line at the column in turn, the frame of a row."""
    _, rows, columns = moved.shape
    most = np.quantile(abs(moved), 0.995)
    picture = ax.imshow(moved[0], cmap="PuOr", vmin=-most, vmax=most, extent=(0, columns, rows, 0), aspect="auto")
    picture.set_interpolation("nearest")
    (front,) = ax.plot([0, 0], [0, rows], color="black", linewidth=1.2)
    (chosen,) = ax.plot([], [], color="black", linewidth=0.8)
    ax.set(ylabel="row of W", ylim=(rows, 0), title="how far each weight has moved (violet up, orange down)")
    return picture, front, chosen


def _row_on_its_grid(ax, steps: np.ndarray, qmin: int, qmax: int) -> tuple:
    """The weights of a row, in steps of its grid: where they were, and where they are."""
    places = np.arange(steps.shape[2]) + 0.5
    ax.hlines(range(qmin, qmax + 1), 0, steps.shape[2], color="0.8", linewidth=0.8)
    (before,) = ax.plot(places, steps[0, 0], "o", color="0.5", fillstyle="none", markersize=5, label="original")
    (now,) = ax.plot(places, steps[0, 0], ".", color=QUANTIZED, markersize=7, label="now")
    ax.set(ylabel="one row, in steps", ylim=(min(steps.min(), qmin) - 0.5, max(steps.max(), qmax) + 2))
    ax.legend(loc="upper right", ncols=2, fontsize="small")
    return before, now


def _two_curves(ax, nearest: list[float], gptq: list[float]):
    """The output error after 0, 1, 2 ... columns; returns the dot that moves along GPTQ's."""
    ax.plot(nearest, color=ERROR, label="round to nearest")
    ax.plot(gptq, color=QUANTIZED, label="GPTQ")
    (here,) = ax.plot([0], [0], "o", color=QUANTIZED, markersize=9)
    ax.set(xlabel="columns rounded so far", ylabel="output error", xlim=(0, len(gptq) - 1), ylim=(0, None))
    ax.legend(loc="upper left", fontsize="small")
    return here


def _nearest(weight: Tensor, bits: int) -> QTensor:
    return quantize_tensor(weight, bits=bits, granularity=PerAxis(0), symmetric=False)


def _one_by_one(weight: Tensor, nearest: QTensor) -> list[Tensor]:
    """The weight with 0, 1, 2 ... columns rounded to nearest."""
    rounded = nearest.dequantize()
    return [torch.cat([rounded[:, :k], weight[:, k:]], dim=1) for k in range(weight.shape[1] + 1)]


def _errors_on_the_way(states, weight: Tensor, H: Tensor) -> list[float]:
    energy = _row_energy(weight, H).sum()
    return [(_row_energy(weight - state, H).sum() / energy).item() for state in states]


def _row_energy(w: Tensor, H: Tensor) -> Tensor:
    return ((w.double() @ H) * w.double()).sum(1)


def _two_errors(weight: Tensor, q: QTensor, H: Tensor, energy: Tensor) -> tuple:
    """Relative error of the weight, of the output, and of each row's output."""
    difference = weight - q.dequantize()
    rows = _row_energy(difference, H)
    of_weight = (difference.square().sum() / weight.square().sum()).item()
    return of_weight, (rows.sum() / energy.sum()).item(), (rows / energy).numpy()
