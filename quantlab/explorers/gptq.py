"""Sliders on GPTQ: one layer beside round-to-nearest, and column by column."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import relative_error, states, thinned, times
from quantlab.gptq import gptq_quantize, gptq_steps
from quantlab.granularity import QTensor, quantize_tensor, rows_or_groups
from quantlab.hessian import Hessian
from quantlab.plots import ERROR, QUANTIZED

_SIZES = (128, 64, 32, 16)
_DAMPINGS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)


class _Errors(NamedTuple):
    """One way of rounding a layer: relative errors, and the true bits per weight."""

    weight: float
    output: float
    rows: np.ndarray  # of each row's output
    bits: float


def explore_gptq(weight: Tensor, hessian: Hessian, *, bits: int = 4, group_size: int | None = None) -> Explorer:
    """GPTQ beside round-to-nearest on one layer: two errors of each, every row's output error, the true bits."""
    weight, picture = weight.detach(), _Picture()
    row_energy = torch.vmap(hessian.energy)
    energy = row_energy(weight)

    @cache
    def errors(bits, group, damping, act_order) -> tuple[_Errors, _Errors]:
        size = group or None
        nearest = quantize_tensor(weight, bits=bits, granularity=rows_or_groups(size), symmetric=False)
        gptq = gptq_quantize(weight, hessian, bits=bits, group_size=size, damping=damping, act_order=act_order)
        return tuple(_measure(weight, q, row_energy, energy) for q in (nearest, gptq))

    def update(bits, group, damping, act_order) -> str:
        pair = errors(bits, group, damping, act_order)
        picture.show(*pair)
        return _describe(*pair)

    return bind(_controls(bits, group_size or 0), picture.left, picture.moving, update)


def _controls(bits: int, group: int) -> dict:
    groups = [("whole row", 0), *((str(size), size) for size in _SIZES)]
    return {
        "bits": widgets.IntSlider(bits, min=2, max=8, description="bits"),
        "group": widgets.SelectionSlider(options=groups, value=group, description="group"),
        "damping": widgets.SelectionSlider(options=_DAMPINGS, value=0.01, description="damping"),
        "act_order": widgets.Checkbox(False, description="act-order"),
    }


def _measure(weight: Tensor, q: QTensor, row_energy: Callable, energy: Tensor) -> _Errors:
    """energy: row_energy(weight), the same for every q."""
    back = q.dequantize()
    lost = row_energy(weight - back)
    output = (lost.sum() / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)).item()  # as Hessian.output_error
    return _Errors(relative_error(weight, back), output, (lost / energy.clamp(min=1e-30)).numpy(), q.bits_per_element)


def _describe(nearest: _Errors, gptq: _Errors) -> str:
    return (
        f"weight error {nearest.weight:.2e} → {gptq.weight:.2e} ({times(gptq.weight, nearest.weight)})   "
        f"output error {nearest.output:.2e} → {gptq.output:.2e} ({times(gptq.output, nearest.output)})\n"
        f"rows that GPTQ improves: {np.mean(gptq.rows < nearest.rows):.0%}   true bits per weight {nearest.bits:.2f} → "
        f"{gptq.bits:.2f}{' (the order must be stored)' if gptq.bits > nearest.bits else ''}"
    )


class _Picture:
    """Left, the errors of weight and output; right, each row's output error in both ways."""

    def __init__(self):
        fig, (self.left, right) = figure(columns=2)
        self.dots = [
            self.left.plot([side, 1 + side], [1, 1], marker, color=color, markersize=9, label=name)[0]
            for side, marker, color, name in ((-0.1, "o", ERROR, "round to nearest"), (0.1, "s", QUANTIZED, "GPTQ"))
        ]
        self.left.set(yscale="log", ylim=(1e-6, 3), xlim=(-0.5, 1.5), xticks=[0, 1], title="relative error")
        self.left.set_xticklabels(["of the weight", "of the output"])
        self.left.legend(loc="lower center", ncols=2, fontsize="small")
        right.plot([1e-9, 10], [1e-9, 10], color="0.5", linewidth=0.8)
        (self.rows,) = right.plot([], [], ".", color=QUANTIZED, markersize=4)
        right.set(xscale="log", xlim=(1e-6, 3), xlabel="round to nearest")
        right.set(yscale="log", ylim=(1e-6, 3), ylabel="GPTQ", title="output error, a dot for each row")
        fig.subplots_adjust(left=0.09, right=0.98, top=0.9, bottom=0.16, wspace=0.28)
        self.moving = [*self.dots, self.rows]

    def show(self, nearest: _Errors, gptq: _Errors) -> None:
        for dots, one in zip(self.dots, (nearest, gptq), strict=True):
            dots.set_ydata([one.weight, one.output])
        self.rows.set_data(nearest.rows, gptq.rows)


def explore_columns(
    weight: Tensor, hessian: Hessian, *, bits: int = 3, rows: int = 24, column: int = 0, row: int = 0
) -> Explorer:
    """GPTQ column by column: how far each weight has moved, one row on its grid, and the output error so far."""
    weight = weight.detach().double()[:rows]
    rows, columns = weight.shape
    walk = _Walk(weight, hessian, bits)
    picture = _WalkPicture(walk)
    wide = {"style": {"description_width": "initial"}, "layout": {"width": "400px"}}
    controls = {
        "column": widgets.IntSlider(column, min=0, max=columns, description="columns done", **wide),
        "row": widgets.IntSlider(row, min=0, max=rows - 1, description="row", **wide),
    }

    def update(column, row) -> str:
        picture.show(column, row)
        drift = abs(walk.steps[column, row, column:] - walk.steps[0, row, column:])
        return (
            f"{column} of {columns} columns rounded   output error so far: round to nearest "
            f"{walk.nearest_errors[column]:.2e}, GPTQ {walk.errors[column]:.2e}\n"
            f"row {row}: {columns - column} weights still free, moved by "
            f"{drift.mean() if column < columns else 0.0:.3f} steps of the grid on average"
        )

    some = thinned(list(range(rows)), 4, row)  # each picture has some 5 kB
    many = thinned(list(range(columns + 1)), 49, column)
    filmed = states(row=some, column=many)
    return bind(controls, picture.top, picture.moving, update, filmed=filmed)


class _Walk:
    """GPTQ and round-to-nearest with 0, 1, 2 ... columns done."""

    def __init__(self, weight: Tensor, hessian: Hessian, bits: int):
        states = gptq_steps(weight, hessian, bits=bits)
        nearest = quantize_tensor(weight, bits=bits, granularity=rows_or_groups(None), symmetric=False)
        self.qp, rounded = nearest.qparams, nearest.dequantize()
        self.moved = (states - weight).numpy()
        # In steps of each row's grid, whose points are then whole numbers.
        self.steps = (states / self.qp.scale + self.qp.zero_point).numpy()
        one_by_one = [torch.cat([rounded[:, :k], weight[:, k:]], dim=1) for k in range(weight.shape[1] + 1)]
        self.nearest_errors = [hessian.output_error(weight, state) for state in one_by_one]
        self.errors = [hessian.output_error(weight, state) for state in states]


class _WalkPicture:
    """A map of all weights, one row on its grid, and the two curves of the output error."""

    def __init__(self, walk: _Walk):
        heights = {"height_ratios": [4, 4, 3]}
        fig, (self.top, middle, bottom) = figure(rows=3, height=6.2, gridspec_kw=heights, sharex=True)
        fig.subplots_adjust(left=0.09, right=0.98, top=0.95, bottom=0.08, hspace=0.1)
        self.walk = walk
        self.map, self.front, self.frame = _draw_map(self.top, walk.moved)
        self.before, self.now = _draw_row(middle, walk.steps, walk.qp.qmin, walk.qp.qmax)
        self.here = _draw_curves(bottom, walk.nearest_errors, walk.errors)
        self.moving = [self.map, self.front, self.frame, self.before, self.now, self.here]

    def show(self, column: int, row: int) -> None:
        width = self.walk.moved.shape[2]
        self.map.set_data(self.walk.moved[column])
        self.front.set_xdata([column, column])
        self.frame.set_data([0, width, width, 0, 0], [row, row, row + 1, row + 1, row])
        self.before.set_ydata(self.walk.steps[0, row])
        self.now.set_ydata(self.walk.steps[column, row])
        self.here.set_data([column], [self.walk.errors[column]])


def _draw_map(ax: Axes, moved: np.ndarray) -> tuple:
    """Every weight as a coloured cell: the picture, the line at the column in turn, the frame of a row."""
    _, rows, columns = moved.shape
    reach = np.quantile(abs(moved), 0.995)
    picture = ax.imshow(moved[0], cmap="PuOr", vmin=-reach, vmax=reach, extent=(0, columns, rows, 0), aspect="auto")
    picture.set_interpolation("nearest")
    (front,) = ax.plot([0, 0], [0, rows], color="black", linewidth=1.2)
    (frame,) = ax.plot([], [], color="black", linewidth=0.8)
    ax.set(ylabel="row of W", ylim=(rows, 0), title="how far each weight has moved (violet up, orange down)")
    return picture, front, frame


def _draw_row(ax: Axes, steps: np.ndarray, qmin: int, qmax: int) -> tuple:
    """The weights of a row, in steps of its grid: where they were, and where they are."""
    places = np.arange(steps.shape[2]) + 0.5
    ax.hlines(range(qmin, qmax + 1), 0, steps.shape[2], color="0.8", linewidth=0.8)
    (before,) = ax.plot(places, steps[0, 0], "o", color="0.5", fillstyle="none", markersize=5, label="original")
    (now,) = ax.plot(places, steps[0, 0], ".", color=QUANTIZED, markersize=7, label="now")
    ax.set(ylabel="one row, in steps", ylim=(min(steps.min(), qmin) - 0.5, max(steps.max(), qmax) + 2))
    ax.legend(loc="upper right", ncols=2, fontsize="small")
    return before, now


def _draw_curves(ax: Axes, nearest: list[float], gptq: list[float]):
    """The output error after 0, 1, 2 ... columns; returns the dot that moves along GPTQ's."""
    ax.plot(nearest, color=ERROR, label="round to nearest")
    ax.plot(gptq, color=QUANTIZED, label="GPTQ")
    (here,) = ax.plot([0], [0], "o", color=QUANTIZED, markersize=9)
    ax.set(xlabel="columns rounded so far", ylabel="output error", xlim=(0, len(gptq) - 1), ylim=(0, None))
    ax.legend(loc="upper left", fontsize="small")
    return here
