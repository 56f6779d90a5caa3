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


def explore_gptq(
    weight: Tensor, hessian: Hessian, *, bits: int = 4, group_size: int | None = None
) -> Explorer:
    """GPTQ beside round-to-nearest on one layer: the two errors of each, and the output error of every row."""
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
        gptq = gptq_quantize(
            weight, hessian, bits=bits, group_size=group or None, damping=damping, act_order=act_order
        )
        return tuple(_two_errors(weight, q, H, energy) for q in (nearest, gptq))

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
        (w0, o0, r0), (w1, o1, r1) = errors(bits, group, damping, act_order)
        for bar, value in zip(bars, (w0, w1, o0, o1), strict=True):
            bar.set_height(value)
        rows.set_data(r0, r1)
        return (
            f"weight error {w0:.2e} → {w1:.2e} ({w1 / w0:.2f} ×)   output error {o0:.2e} → {o1:.2e} "
            f"({o1 / o0:.2f} ×)   rows that GPTQ improves: {np.mean(r1 < r0):.0%}"
        )

    return tie(controls, left, [*bars, rows], update)


def explore_columns(
    weight: Tensor, hessian: Hessian, *, bits: int = 3, rows: int = 24, column: int = 0
) -> Explorer:
    """GPTQ column by column: how far each weight has moved, and the output error so far beside round-to-nearest's."""
    weight = weight.detach().double()[:rows]
    rows = len(weight)
    H, states = hessian.matrix, gptq_steps(weight, hessian, bits=bits)
    nearest = quantize_tensor(weight, bits=bits, granularity=PerAxis(0), symmetric=False).dequantize()
    columns = weight.shape[1]
    mixed = [torch.cat([nearest[:, :k], weight[:, k:]], dim=1) for k in range(columns + 1)]
    energy = _row_energy(weight, H).sum()
    curves = [
        [(_row_energy(weight - state, H).sum() / energy).item() for state in way] for way in (mixed, states)
    ]
    controls = {
        "column": widgets.IntSlider(
            column,
            min=0,
            max=columns,
            description="columns done",
            style={"description_width": "initial"},
            layout={"width": "500px"},
        )
    }
    fig, (top, bottom) = figure(rows=2, height=4.6, gridspec_kw={"height_ratios": [3, 2]}, sharex=True)
    moved = (states - weight).numpy()
    picture = top.imshow(
        moved[0],
        aspect="auto",
        cmap="PuOr",
        interpolation="nearest",
        extent=(0, columns, rows, 0),
        vmin=-np.quantile(abs(moved), 0.995),
        vmax=np.quantile(abs(moved), 0.995),
    )
    front = top.axvline(0, color="black", linewidth=1.2)
    top.set(
        ylabel="row of W",
        title="how far each weight has moved from its original value (violet up, orange down)",
    )
    bottom.plot(curves[0], color=ERROR, label="round to nearest")
    bottom.plot(curves[1], color=QUANTIZED, label="GPTQ")
    (here,) = bottom.plot([0], [0], "o", color=QUANTIZED, markersize=9)
    bottom.set(xlabel="columns rounded so far", ylabel="output error", xlim=(0, columns), ylim=(0, None))
    bottom.legend(loc="upper left", fontsize="small")
    fig.subplots_adjust(left=0.09, right=0.98, top=0.93, bottom=0.11, hspace=0.1)

    def update(column) -> str:
        picture.set_data(moved[column])
        front.set_xdata([column, column])
        here.set_data([column], [curves[1][column]])
        return (
            f"{column} of {columns} columns rounded   output error so far: round to nearest "
            f"{curves[0][column]:.2e}, GPTQ {curves[1][column]:.2e}"
        )

    return tie(controls, top, [picture, front, here], update, few_colours=False)


def _row_energy(w: Tensor, H: Tensor) -> Tensor:
    return ((w.double() @ H) * w.double()).sum(1)


def _two_errors(weight: Tensor, q: QTensor, H: Tensor, energy: Tensor) -> tuple:
    """Relative error of the weight, of the output, and of each row's output."""
    difference = weight - q.dequantize()
    rows = _row_energy(difference, H)
    of_weight = (difference.square().sum() / weight.square().sum()).item()
    return of_weight, (rows.sum() / energy.sum()).item(), (rows / energy).numpy()
