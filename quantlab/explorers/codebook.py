"""Sliders on a codebook: its levels over the values they stand for, who uses which, and what other tables do."""

from functools import cache
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from quantlab.arguments import check_real
from quantlab.codebook import fp4_levels, kmeans_levels, nf4_levels, normalize_blocks, quantize_codebook
from quantlab.explorers.base import Explorer, tie
from quantlab.granularity import PerGroup, quantize_tensor
from quantlab.metrics import sqnr_db
from quantlab.plots import FLOAT, QUANTIZED

TABLES = ("NF4", "FP4", "INT4 symmetric", "INT4 asymmetric", "k-means")
LAYER, NORMAL = "the layer", "normal"
_TAILS = (LAYER, NORMAL, "t, ν = 30", "t, ν = 10", "t, ν = 5", "t, ν = 3")
_BLOCKS = tuple(2**k for k in range(4, 13))
_MOST = 2**17  # weights of the layer looked at, in whole rows
_DRAWN = 36_864  # random values: whole blocks of 4096 and of 4608


class _Measured(NamedTuple):
    """One table on one kind of values in blocks of one size."""

    decibels: float
    bits: float  # true bits per value
    usage: np.ndarray  # the share of each of 16 codes
    levels: np.ndarray  # over the largest magnitude of the block
    output_error: float | None  # ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖²


def explore_codebook(weight: Tensor, x: Tensor | None = None, *, block_size: int = 64, table: str = "NF4") -> Explorer:
    """Drag block size and tail weight: five tables of 16 levels on the same values, at the same true bits.

    weight (out, in); of a large one, the first rows. With x (tokens, in), what the layer reads, the error of its
    output is shown too. All tables store one float32 for 64 values at block_size 64; the asymmetric grid also a
    zero point of 4 bits, so its blocks are 9/8 as long; k-means stores its 16 levels on top.

    Raises: ValueError if weight is no matrix of finite reals, or x has another number of columns.
    """
    check_real(weight, "weight")
    if weight.ndim != 2 or (x is not None and x.shape[-1] != weight.shape[1]):
        raise ValueError(
            f"need weight (out, in) and x (tokens, in), got {tuple(weight.shape)} and "
            f"{None if x is None else tuple(x.shape)}"
        )
    weight = weight.detach().float()[: max(1, _MOST // weight.shape[1])]
    x = None if x is None else x.detach().float()
    H = None if x is None else x.T @ x  # all that the output error needs of x
    controls = {
        "block": widgets.SelectionSlider(options=_BLOCKS, value=block_size, description="block"),
        "values": widgets.SelectionSlider(options=_TAILS, value=LAYER, description="values"),
        "table": widgets.Dropdown(options=TABLES, value=table, description="table"),
    }

    @cache
    def drawn(tail: str) -> Tensor:
        return weight if tail == LAYER else _student(tail)

    @cache
    def measured(tail: str, block: int) -> dict[str, _Measured]:
        return {name: _measure(name, drawn(tail), block, H if tail == LAYER else None) for name in TABLES}

    @cache
    def density(tail: str, block: int) -> np.ndarray:
        counts, _ = np.histogram(normalize_blocks(drawn(tail), block_size=block)[0].numpy(), _EDGES)
        inside = counts[1:-1].max()  # the first and last bin hold the largest of each block
        return np.minimum(counts / inside, 1.2)

    fig, moving, move = _draw()

    def update(block, values, table) -> str:
        all_tables = measured(values, block)
        move(density(values, block), all_tables, table)
        return _describe(all_tables, table, block, values)

    for block in _BLOCKS:  # k-means takes longer than a step of a slider may: for the layer it is done before
        measured(LAYER, block)
        density(LAYER, block)
    return tie(controls, fig.axes[0], moving, update)


def compare_tables(x: Tensor, block_size: int) -> dict[str, float]:
    """Signal to noise, in dB, of the explorer's five tables on the values x, at the same true bits."""
    return {name: _measure(name, x.detach().float(), block_size, None).decibels for name in TABLES}


# --- numbers ----------------------------------------------------------------------------------------------------


def _student(tail: str) -> Tensor:
    """Values of Student's t with ν degrees of freedom (the normal for ν = ∞), always the same."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(_DRAWN, generator=random)
    if tail == NORMAL:
        return z
    freedom = int(tail.split()[-1])
    return z / torch.randn(freedom, _DRAWN, generator=random).square().mean(0).sqrt()


def _measure(name: str, x: Tensor, block: int, H: Tensor | None) -> _Measured:
    """Quantize x by the table of this name and measure; H = XᵀX of what the layer reads, if x is one."""
    if name.startswith("INT4"):
        symmetric = name.endswith(" symmetric")
        size = block if symmetric else block * 9 // 8
        q = quantize_tensor(x.flatten(), bits=4, granularity=PerGroup(size), symmetric=symmetric, signed=False)
        zero = q.qparams.zero_point.float().median()  # asymmetric: the grid of a typical block
        steps = torch.arange(16) - zero
        levels = steps / steps.abs().max() if not symmetric else steps / 7.5
    else:
        levels = {"NF4": nf4_levels, "FP4": fp4_levels}.get(
            name, lambda: kmeans_levels(normalize_blocks(x, block_size=block)[0], 16, max_steps=100)
        )()
        q = quantize_codebook(x, levels, block_size=block)
    back = q.dequantize().view(x.shape)
    usage = q.codes.flatten().int().bincount(minlength=16) / x.numel()
    output = None
    if H is not None:
        error = x - back
        output = (((error @ H) * error).sum() / ((x @ H) * x).sum().clamp(min=1e-30)).item()
    return _Measured(sqnr_db(x, back), q.bits_per_element, usage.numpy(), levels.numpy(), output)


def _entropy(usage: np.ndarray) -> float:
    """Bits that a code carries: 4 if all 16 are used alike."""
    return float(-(usage * np.log2(np.maximum(usage, 1e-12))).sum())


def _describe(all_tables: dict[str, _Measured], table: str, block: int, tail: str) -> str:
    now = all_tables[table]
    output = "" if now.output_error is None else f"   output error {now.output_error:.2e}"
    used = f"codes used by {now.usage.min():.1%} to {now.usage.max():.1%} of the values"
    return (
        f"{table} on {tail}, blocks of {block if 'asym' not in table else block * 9 // 8}: {now.decibels:.2f} dB at "
        f"{now.bits:.3f} true bits{output}   {used}, entropy {_entropy(now.usage):.2f} bits\n"
        + "   ".join(f"{name} {m.decibels:.2f} dB ({m.bits:.2f} bits)" for name, m in all_tables.items())
    )


# --- picture ----------------------------------------------------------------------------------------------------

_EDGES = np.linspace(-1, 1, 82)


def _draw() -> tuple:
    """(figure, moving artists, move): density and levels, usage of the codes, and the tables beside NF4."""
    fig = Figure(figsize=(8.4, 4.0), dpi=100)
    axes = fig.subplot_mosaic([["density", "gain"], ["usage", "gain"]], width_ratios=[3, 2], height_ratios=[3, 2])
    density, usage, gain = axes["density"], axes["usage"], axes["gain"]
    area = density.stairs(np.zeros(81), _EDGES, fill=True, color=FLOAT)
    lines = density.vlines([], 0, 1, colors=QUANTIZED, linewidth=1.2, transform=density.get_xaxis_transform())
    density.set(xlim=(-1.15, 1.15), ylim=(0, 1.2), yticks=[], ylabel="density", title="levels over the values")
    density.set_xlabel("value / largest magnitude of its block", labelpad=1)
    bars = usage.bar(range(16), [0.0] * 16, color=QUANTIZED)
    usage.axhline(6.25, color="0.4", linestyle="--", linewidth=0.8)
    usage.set(xlabel="code (dashed: all used alike)", ylabel="used by, %", ylim=(0, 32), xticks=range(0, 16, 3))
    others = gain.barh(range(len(TABLES)), [0.5] * len(TABLES), color=FLOAT)
    gain.axvline(0, color="0.4", linewidth=0.8)
    gain.set(xlim=(-4.2, 4.7), xlabel="dB above NF4", title="to the right: NF4 loses")
    gain.set_yticks(range(len(TABLES)), [name.replace(" ", "\n") for name in TABLES])
    gain.invert_yaxis()
    fig.subplots_adjust(left=0.07, right=0.98, top=0.92, bottom=0.12, wspace=0.32, hspace=0.5)

    def move(heights: np.ndarray, all_tables: dict[str, _Measured], table: str) -> None:
        area.set_data(heights)
        lines.set_segments([[(v, 0), (v, 1)] for v in all_tables[table].levels.tolist()])
        for bar, share in zip(bars, all_tables[table].usage, strict=True):
            bar.set_height(100 * share)
        for bar, (name, one) in zip(others, all_tables.items(), strict=True):
            bar.set_width(one.decibels - all_tables["NF4"].decibels)
            bar.set_color(QUANTIZED if name == table else FLOAT)

    return fig, [area, lines, *bars, *others], move
