"""Sliders on what shares a scale: the whole layer, a row or a group; where the error sits, and what it costs."""

from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor
from tqdm.auto import tqdm

from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import check_layer, relative_error, states, thinned
from quantlab.granularity import PerAxis, PerGroup, PerTensor, quantize_tensor
from quantlab.hessian import Hessian
from quantlab.plots import FLOAT, QUANTIZED

_BITS = range(2, 9)
_SIZES = (512, 256, 128, 64, 32, 16, 8)
_PICTURE = (128, 96)  # blocks of weights that the heat map can show, down and across
_REACH = 6  # dB of its colours, one for about each dB: four times the mean error, and a quarter of it


class _Measured(NamedTuple):
    """One setting: what it costs, what it loses."""

    bits: float  # true bits per weight
    nbytes: int
    weight_error: float  # ‖W - Ŵ‖² / ‖W‖²
    output_error: float | None  # ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖²
    blocks: np.ndarray  # mean squared error of each block over the mean of all blocks, dB


def explore_groups(weight: Tensor, x: Tensor | None = None, *, bits: int = 4, group: int = 128) -> Explorer:
    """Drag bits, group size and symmetry: where the error of a layer sits, and error against true bits per weight.

    weight (out, in). With x (tokens, in), the layer's input, the error of its output is shown too. group is a
    size of the slider below the row's, else a whole row. All settings are computed once, before the slider moves.

    Raises: ValueError if weight is no matrix of finite reals, or x has another number of columns.
    """
    weight, x = check_layer(weight, x)
    sizes = [size for size in _SIZES if size < weight.shape[1]]
    groups = {"tensor": PerTensor(), "row": PerAxis(0), **{str(size): PerGroup(size) for size in sizes}}
    known = _measure_all(weight, None if x is None else Hessian(x.shape[1]).add(x), groups)
    start = str(group) if group in sizes else "row"
    controls = {
        "bits": widgets.IntSlider(bits, min=min(_BITS), max=max(_BITS), description="bits"),
        "group": widgets.SelectionSlider(options=list(groups), value=start, description="group"),
        "symmetric": widgets.Checkbox(False, description="symmetric"),
    }
    fig, (left, right) = figure(columns=2, height=3.7, gridspec_kw={"width_ratios": [6, 5]})
    heat, curves = _draw_heat_map(left, weight.shape, known), _Curves(right, known, x is not None)
    fig.subplots_adjust(left=0.07, right=0.985, top=0.91, bottom=0.14, wspace=0.2)

    def update(bits, group, symmetric) -> str:
        now = known[bits, group, symmetric]
        heat.set_data(now.blocks)
        curves.show(bits, group, symmetric)
        return _describe(now, bits, group, weight.numel())

    some = thinned(list(_BITS), 5, bits)  # each picture has some 15 kB
    filmed = states(bits=some, group=groups, symmetric=(False, True))
    return bind(controls, left, [heat, *curves.moving], update, filmed=filmed)


def _measure_all(weight: Tensor, hessian: Hessian | None, groups: dict) -> dict:
    """{(bits, group, symmetric): what it costs and loses} for every place of the controls."""
    settings = [(b, g, s) for s in (False, True) for g in groups for b in _BITS]
    energy = None if hessian is None else max(hessian.energy(weight).item(), 1e-30)
    known = {}
    for b, g, s in tqdm(settings, desc="quantizing", leave=False):
        q = quantize_tensor(weight, bits=b, granularity=groups[g], symmetric=s)
        back = q.dequantize()
        of_output = None if hessian is None else hessian.energy(weight - back).item() / energy
        errors = relative_error(weight, back), of_output, _error_map(weight, back)
        known[b, g, s] = _Measured(q.bits_per_element, q.nbytes, *errors)
    return known


def _error_map(weight: Tensor, back: Tensor) -> np.ndarray:
    """The mean squared error of each block of the picture over that of all weights, in dB."""
    size = [min(have, room) for have, room in zip(weight.shape, _PICTURE, strict=True)]
    noise = F.adaptive_avg_pool2d((weight - back).square()[None], size)[0]
    ratio = noise / noise.mean().clamp(min=1e-30)
    return (10 * ratio.clamp(min=1e-12).log10()).numpy()


def _error(measured: _Measured) -> float:
    """The error that the curves show."""
    error = measured.weight_error if measured.output_error is None else measured.output_error
    return max(error, 1e-12)


def _draw_heat_map(ax: Axes, shape, known: dict):
    """Colours say where the error sits, whatever the bits: violet more than the mean, orange less."""
    colours = colormaps["PuOr"].resampled(2 * _REACH + 1)
    style = {"cmap": colours, "aspect": "auto", "interpolation": "nearest", "extent": (0, shape[1], shape[0], 0)}
    heat = ax.imshow(next(iter(known.values())).blocks, vmin=-_REACH, vmax=_REACH, **style)
    ax.set(xlabel="column (input)", ylabel="row (output)", title="error of a block ÷ the mean, dB")
    ax.figure.colorbar(heat, ax=ax, pad=0.02)
    return heat


class _Curves:
    """Error against true bits: a line for each group size, that of the chosen one, and the chosen place on it."""

    def __init__(self, ax: Axes, known: dict, of_output: bool):
        self.points = {setting: (measured.bits, _error(measured)) for setting, measured in known.items()}
        self.groups = list(dict.fromkeys(group for _, group, _ in known))
        self.lines = ax.add_collection(LineCollection([], colors=FLOAT, linewidths=0.9))
        (self.line,) = ax.plot([1], [1], ".-", color=QUANTIZED, linewidth=1.2, markersize=5)
        (self.here,) = ax.plot([1], [1], "o", color=QUANTIZED, markersize=10)
        errors = [error for _, error in self.points.values()]
        ax.set(xlim=(1.5, 13.5), xlabel="true bits per weight (float32 scales)")
        ax.set(yscale="log", ylim=(min(errors) / 2, max(errors) * 2))
        ax.set_title(f"relative error of the {'output' if of_output else 'weights'}")
        ax.text(0.97, 0.95, "a line: one group size, 2 to 8 bits", transform=ax.transAxes, ha="right", va="top")
        self.moving = [self.lines, self.line, self.here]

    def show(self, bits: int, group: str, symmetric: bool) -> None:
        curves = {g: [self.points[b, g, symmetric] for b in _BITS] for g in self.groups}
        self.lines.set_segments(list(curves.values()))
        self.line.set_data(*zip(*curves[group], strict=True))
        bits, error = self.points[bits, group, symmetric]
        self.here.set_data([bits], [error])


def _describe(now: _Measured, bits: int, group: str, weights: int) -> str:
    shared = {"tensor": "one scale", "row": "a scale a row"}.get(group, f"groups of {group}")
    output = "" if now.output_error is None else f"   output error {now.output_error:.2e}"
    return (
        f"{bits} bits, {shared}: {now.bits:.3f} true bits per weight "
        f"({bits} for the code, {now.bits - bits:.3f} for scales and zero points), {now.nbytes:,} bytes = float32 / "
        f"{4 * weights / now.nbytes:.2f}\nweight error {now.weight_error:.2e}{output}"
    )
