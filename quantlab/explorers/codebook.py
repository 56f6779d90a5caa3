"""Sliders on a codebook: its levels over the values they stand for, how often each is used, and other tables."""

from functools import cache
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from quantlab.codebook import fp4_levels, kmeans_levels, nf4_levels, normalize_blocks, quantize_codebook
from quantlab.explorers.base import Explorer, bind
from quantlab.explorers.data import check_layer
from quantlab.explorers.drawing import draw_uprights, upright
from quantlab.granularity import PerGroup, quantize_tensor
from quantlab.hessian import Hessian
from quantlab.metrics import sqnr_db
from quantlab.plots import FLOAT, QUANTIZED

TABLES = ("NF4", "FP4", "INT4 symmetric", "INT4 asymmetric", "k-means")
LAYER, NORMAL = "the layer", "normal"
_TAILS = (LAYER, NORMAL, "t, ν = 30", "t, ν = 10", "t, ν = 5", "t, ν = 3")
_BLOCKS = tuple(2**k for k in range(4, 13))
_WEIGHTS = 2**17  # of the layer, in whole rows
_DRAWN = 36_864  # random values: whole blocks of 4096 and of 4608
_EDGES = np.linspace(-1, 1, 82)


class _Measured(NamedTuple):
    """One table on one kind of values in blocks of one size."""

    decibels: float
    bits: float  # true bits per value
    usage: Tensor  # the share of each of 16 codes
    levels: np.ndarray  # over the largest magnitude of the block
    output_error: float | None  # ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖²


def explore_codebook(weight: Tensor, x: Tensor | None = None, *, block_size: int = 64, table: str = "NF4") -> Explorer:
    """Drag block size and tail weight: five tables of 16 levels on the same values, at the same true bits.

    weight (out, in); of a large one, the first rows. With x (tokens, in), the layer's input, the error of its
    output is shown too. All tables store one float32 for 64 values at block_size 64; the asymmetric grid also a
    zero point of 4 bits, so its blocks are 9/8 as long; k-means stores its 16 levels on top.

    Raises: ValueError if weight is no matrix of finite reals, or x has another number of columns.
    """
    data, picture = _Values(*check_layer(weight, x)), _Picture()
    controls = {
        "block": widgets.SelectionSlider(options=_BLOCKS, value=block_size, description="block"),
        "values": widgets.SelectionSlider(options=_TAILS, value=LAYER, description="values"),
        "table": widgets.Dropdown(options=TABLES, value=table, description="table"),
    }
    for block in _BLOCKS:  # k-means takes longer than a step of a slider may: for the layer it is done before
        data.measured(LAYER, block), data.density(LAYER, block)

    def update(block, values, table) -> str:
        measured = data.measured(values, block)
        picture.show(data.density(values, block), measured, table)
        return _describe(measured, table, block, values)

    return bind(controls, picture.ax, picture.moving, update)


def compare_tables(x: Tensor, block_size: int) -> dict[str, float]:
    """Signal to noise, in dB, of the explorer's five tables on the values x, at the same true bits."""
    return {name: _measure(name, x.detach().float(), block_size, None).decibels for name in TABLES}


# --- numbers ----------------------------------------------------------------------------------------------------


class _Values:
    """The layer's weights and random values of each tail, quantized by every table; each is computed once."""

    def __init__(self, weight: Tensor, x: Tensor | None):
        self.weight = weight[: max(1, _WEIGHTS // weight.shape[1])]
        self.hessian = None if x is None else Hessian(weight.shape[1]).add(x)
        self.drawn, self.measured, self.density = cache(self._drawn), cache(self._measured), cache(self._density)

    def _drawn(self, tail: str) -> Tensor:
        return self.weight if tail == LAYER else _student(tail)

    def _measured(self, tail: str, block: int) -> dict[str, _Measured]:
        hessian = self.hessian if tail == LAYER else None
        return {name: _measure(name, self.drawn(tail), block, hessian) for name in TABLES}

    def _density(self, tail: str, block: int) -> np.ndarray:
        counts, _ = np.histogram(normalize_blocks(self.drawn(tail), block_size=block)[0].numpy(), _EDGES)
        inside = counts[1:-1].max()  # the first and last bin hold the largest of each block
        return np.minimum(counts / inside, 1.2)


def _student(tail: str) -> Tensor:
    """Values of Student's t with ν degrees of freedom (the normal for ν = ∞), always the same."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(_DRAWN, generator=random)
    if tail == NORMAL:
        return z
    freedom = int(tail.split()[-1])
    return z / torch.randn(freedom, _DRAWN, generator=random).square().mean(0).sqrt()


def _measure(name: str, x: Tensor, block: int, hessian: Hessian | None) -> _Measured:
    """Quantize x by the table of this name and measure; the Hessian is that of the layer's input, if x is one."""
    if name.startswith("INT4"):
        symmetric, size = name.endswith(" symmetric"), _block_of(name, block)
        q = quantize_tensor(x.flatten(), bits=4, granularity=PerGroup(size), symmetric=symmetric, signed=False)
        levels = _grid_levels(q.qparams.zero_point, symmetric)
    else:
        levels = _levels(name, x, block)
        q = quantize_codebook(x, levels, block_size=block)
    back = q.dequantize().view(x.shape)
    usage = q.codes.flatten().int().bincount(minlength=16) / x.numel()
    output = None if hessian is None else hessian.output_error(x, back)
    return _Measured(sqnr_db(x, back), q.bits_per_element, usage, levels.numpy(), output)


def _block_of(name: str, block: int) -> int:
    """How many values share a scale: 9/8 of a block, where a zero point of 4 bits is stored with it."""
    return block * 9 // 8 if name == "INT4 asymmetric" else block


def _grid_levels(zero_points: Tensor, symmetric: bool) -> Tensor:
    """Where the 16 codes of a typical block lie, over its largest magnitude."""
    steps = torch.arange(16) - zero_points.float().median()
    return steps / 7.5 if symmetric else steps / steps.abs().max()


def _levels(name: str, x: Tensor, block: int) -> Tensor:
    if name == "k-means":
        return kmeans_levels(normalize_blocks(x, block_size=block)[0], 16, max_steps=100)
    return nf4_levels() if name == "NF4" else fp4_levels()


def _describe(measured: dict[str, _Measured], table: str, block: int, tail: str) -> str:
    now = measured[table]
    output = "" if now.output_error is None else f"   output error {now.output_error:.2e}"
    used = f"codes used by {now.usage.min():.1%} to {now.usage.max():.1%} of the values"
    entropy = torch.special.entr(now.usage).sum().item() / np.log(2)  # 4 bits if all are used alike
    return (
        f"{table} on {tail}, blocks of {_block_of(table, block)}: {now.decibels:.2f} dB at "
        f"{now.bits:.3f} true bits{output}   {used}, entropy {entropy:.2f} bits\n"
        + "   ".join(f"{name} {m.decibels:.2f} dB ({m.bits:.2f} bits)" for name, m in measured.items())
    )


# --- picture ----------------------------------------------------------------------------------------------------


class _Picture:
    """Density and levels, the usage of the codes, and the tables beside NF4."""

    def __init__(self):
        fig = Figure(figsize=(8.4, 4.0), dpi=100)
        axes = fig.subplot_mosaic([["density", "gain"], ["usage", "gain"]], width_ratios=[3, 2], height_ratios=[3, 2])
        self.ax = axes["density"]
        self.area, self.levels = _draw_density(self.ax)
        self.bars = _draw_usage(axes["usage"])
        self.others = _draw_gain(axes["gain"])
        fig.subplots_adjust(left=0.07, right=0.98, top=0.92, bottom=0.12, wspace=0.32, hspace=0.5)
        self.moving = [self.area, self.levels, *self.bars, *self.others]

    def show(self, heights: np.ndarray, measured: dict[str, _Measured], table: str) -> None:
        self.area.set_data(heights)
        self.levels.set_segments(upright(measured[table].levels.tolist()))
        for bar, share in zip(self.bars, measured[table].usage.tolist(), strict=True):
            bar.set_height(100 * share)
        for bar, (name, one) in zip(self.others, measured.items(), strict=True):
            bar.set_width(one.decibels - measured["NF4"].decibels)
            bar.set_color(QUANTIZED if name == table else FLOAT)


def _draw_density(ax: Axes) -> tuple:
    area = ax.stairs(np.zeros(81), _EDGES, fill=True, color=FLOAT)
    levels = draw_uprights(ax, colors=QUANTIZED, linewidth=1.2)
    ax.set(xlim=(-1.15, 1.15), ylim=(0, 1.2), yticks=[], ylabel="density", title="levels over the values")
    ax.set_xlabel("value / largest magnitude of its block", labelpad=1)
    return area, levels


def _draw_usage(ax: Axes):
    bars = ax.bar(range(16), [0.0] * 16, color=QUANTIZED)
    ax.axhline(6.25, color="0.4", linestyle="--", linewidth=0.8)
    ax.set(xlabel="code (dashed: all used alike)", ylabel="used by, %", ylim=(0, 32), xticks=range(0, 16, 3))
    return bars


def _draw_gain(ax: Axes):
    bars = ax.barh(range(len(TABLES)), [0.5] * len(TABLES), color=FLOAT)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.set(xlim=(-4.2, 4.7), xlabel="dB above NF4", title="to the right: NF4 loses")
    ax.set_yticks(range(len(TABLES)), [name.replace(" ", "\n") for name in TABLES])
    ax.invert_yaxis()
    return bars
