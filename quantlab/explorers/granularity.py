"""Sliders on what shares a scale: the whole layer, a row or a group; where the error sits, and what it costs."""

from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch.nn.functional as F
from matplotlib.collections import LineCollection
from torch import Tensor
from tqdm.auto import tqdm

from quantlab.arguments import check_real
from quantlab.explorers.base import Explorer, figure, tie
from quantlab.granularity import PerAxis, PerGroup, PerTensor, QTensor, quantize_tensor
from quantlab.plots import FLOAT, QUANTIZED

_BITS = range(2, 9)
_SIZES = (512, 256, 128, 64, 32, 16, 8)
_PICTURE = (128, 96)  # blocks of weights that the heat map can show, down and across


class _Measured(NamedTuple):
    """One setting: what it costs, what it loses."""

    bits: float  # true bits per weight
    nbytes: int
    weight_error: float  # ‖W - Ŵ‖² / ‖W‖²
    output_error: float | None  # ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖²
    blocks: np.ndarray  # mean squared error of each block over the mean square of all weights, dB


def explore_groups(weight: Tensor, x: Tensor | None = None, *, bits: int = 4, group: int = 128) -> Explorer:
    """Drag bits, group size and symmetry: where the error of a layer sits, and error against true bits per weight.

    weight (out, in). With x (tokens, in), what the layer reads, the error of its output is shown too. group is a
    size of the slider below the row's, else a whole row. All settings are computed once, before the slider moves.

    Raises: ValueError if weight is no matrix of finite reals, or x has another number of columns.
    """
    check_real(weight, "weight")
    if weight.ndim != 2 or (x is not None and x.shape[-1] != weight.shape[1]):
        raise ValueError(
            f"need weight (out, in) and x (tokens, in), got {tuple(weight.shape)} and "
            f"{None if x is None else tuple(x.shape)}"
        )
    sizes = [size for size in _SIZES if size < weight.shape[1]]
    groups = {"tensor": PerTensor(), "row": PerAxis(0), **{str(size): PerGroup(size) for size in sizes}}
    known = _measure_all(weight.detach().float(), x, groups)
    controls = {
        "bits": widgets.IntSlider(bits, min=min(_BITS), max=max(_BITS), description="bits"),
        "group": widgets.SelectionSlider(
            options=list(groups), value=str(group) if group in sizes else "row", description="group"
        ),
        "symmetric": widgets.Checkbox(False, description="symmetric"),
    }
    fig, (left, right) = figure(columns=2, height=3.7, gridspec_kw={"width_ratios": [6, 5]})
    heat = _draw_heat_map(left, weight.shape, known)
    lines, line, here = _draw_curves(right, known, x is not None)
    fig.subplots_adjust(left=0.07, right=0.985, top=0.91, bottom=0.14, wspace=0.2)
    curves = {(g, s): [(known[b, g, s].bits, _error(known[b, g, s])) for b in _BITS] for _, g, s in known}

    def update(bits, group, symmetric) -> str:
        now = known[bits, group, symmetric]
        heat.set_data(now.blocks)
        lines.set_segments([curves[g, symmetric] for g in groups])
        line.set_data(*zip(*curves[group, symmetric], strict=True))
        here.set_data([now.bits], [_error(now)])
        return _describe(now, bits, group, weight.numel())

    return tie(controls, left, [heat, lines, line, here], update, few_colours=False)


def _measure_all(weight: Tensor, x: Tensor | None, groups: dict) -> dict:
    """{(bits, group, symmetric): what it costs and loses} for every place of the controls."""
    x = None if x is None else x.detach().float()
    energy = weight.square().sum(), None if x is None else (x @ weight.T).square().sum()
    H = None if x is None else x.T @ x  # all that the output error needs of x
    settings = [(b, g, s) for s in (False, True) for g in groups for b in _BITS]
    return {
        (b, g, s): _measure(weight, quantize_tensor(weight, bits=b, granularity=groups[g], symmetric=s), H, energy)
        for b, g, s in tqdm(settings, desc="quantizing", leave=False)
    }


def _measure(weight: Tensor, q: QTensor, H: Tensor | None, energy: tuple) -> _Measured:
    error = weight - q.dequantize()
    of_output = None if H is None else (((error @ H) * error).sum() / energy[1].clamp(min=1e-30)).item()
    size = [min(have, most) for have, most in zip(weight.shape, _PICTURE, strict=True)]
    noise, signal = F.adaptive_avg_pool2d(error.square()[None], size)[0], energy[0] / weight.numel()
    decibels = 10 * (noise / signal.clamp(min=1e-30)).clamp(min=1e-12).log10()
    of_weight = (error.square().sum() / energy[0].clamp(min=1e-30)).item()
    return _Measured(q.bits_per_element, q.nbytes, of_weight, of_output, decibels.numpy())


def _error(measured: _Measured) -> float:
    """The error that the curves show."""
    error = measured.weight_error if measured.output_error is None else measured.output_error
    return max(error, 1e-12)


def _draw_heat_map(ax, shape, known: dict):
    """Colours tell 3 to 6 bits apart; 2 bits may run into the bright end, 7 and 8 into the dark one."""
    low, high = np.quantile([m.blocks for (bits, *_), m in known.items() if 3 <= bits <= 6], [0.01, 0.99])
    heat = ax.imshow(
        next(iter(known.values())).blocks,
        vmin=low,
        vmax=high,
        cmap="viridis",
        aspect="auto",
        interpolation="nearest",
        extent=(0, shape[1], shape[0], 0),
    )
    ax.set(xlabel="column (input)", ylabel="row (output)", title="error of each block of weights, dB")
    ax.figure.colorbar(heat, ax=ax, pad=0.02)
    return heat


def _draw_curves(ax, known: dict, of_output: bool) -> tuple:
    lines = ax.add_collection(LineCollection([], colors=FLOAT, linewidths=0.9))
    (line,) = ax.plot([1], [1], ".-", color=QUANTIZED, linewidth=1.2, markersize=5)
    (here,) = ax.plot([1], [1], "o", color=QUANTIZED, markersize=10)
    errors = [_error(m) for m in known.values()]
    ax.set(
        xlim=(1.5, 13.5),
        ylim=(min(errors) / 2, max(errors) * 2),
        yscale="log",
        xlabel="true bits per weight (float32 scales)",
        title=f"relative error of the {'output' if of_output else 'weights'}",
    )
    ax.text(0.97, 0.95, "a line: one group size, 2 to 8 bits", transform=ax.transAxes, ha="right", va="top")
    return lines, line, here


def _describe(now: _Measured, bits: int, group: str, weights: int) -> str:
    shared = {"tensor": "one scale", "row": "a scale a row"}.get(group, f"groups of {group}")
    output = "" if now.output_error is None else f"   output error {now.output_error:.2e}"
    return (
        f"{bits} bits, {shared}: {now.bits:.3f} true bits per weight "
        f"({bits} for the code, {now.bits - bits:.3f} for scales and zero points), {now.nbytes:,} bytes = float32 / "
        f"{4 * weights / now.nbytes:.2f}\nweight error {now.weight_error:.2e}{output}"
    )
