"""A slider on AWQ's exponent: what scaling the loud channels does to their steps, to the others', and to the output."""

from functools import cache
from itertools import product
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm.auto import tqdm

from quantlab.awq import ScaledQTensor, scale_and_round, scales_of
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import evenly, relative_error, times
from quantlab.hessian import Hessian, check_weight
from quantlab.plots import ERROR, FLOAT, OTHER, QUANTIZED

ALPHAS = tuple(i / 20 for i in range(21))
BITS, GROUPS = (2, 3, 4, 8), {"whole row": 0, "128": 128, "32": 32}
_ROWS = 96  # of a layer that are rounded
_SHARE = 0.025  # of the channels, the loudest of which are called loud


class _Errors(NamedTuple):
    """One layer at every alpha, all alike in bits and group."""

    weight: np.ndarray  # ‖W - Ŵ‖² / ‖W‖²
    output: np.ndarray  # (3, alphas): relative, of all channels, of the loud ones alone, of the others alone
    parts: np.ndarray  # (alphas, in): relative output error of each channel alone
    steps: np.ndarray  # (alphas, in): the mean step of each channel over that at alpha 0
    bits: float  # true bits per weight


def explore_scaling(
    layers: dict[str, tuple[Tensor, Hessian]], *, bits: int = 4, group_size: int | None = 128, alpha: float = 0.0
) -> Explorer:
    """Drag AWQ's alpha: the step and the error of every input channel, and the output error of the layer.

    layers: {name: (weight (out, in), Hessian of its input)}; at most 96 rows of each are used. Left, a dot for
    each channel over its mean |x|: its step against that at alpha = 0, and what it alone adds to the output error.
    Right, the output error at every alpha, of all channels and as if only the loudest 2.5 %, or only the others, had
    been rounded. Errors are over round-to-nearest's, alpha = 0. All is computed before the slider moves. A group that
    is no narrower than the narrowest layer is its whole row: only smaller ones are on the slider.

    Raises: ValueError if there is no layer, a weight does not fit its Hessian, or alpha, bits or group_size is not on
    its slider.
    """
    _check_settings(layers, bits, group_size or 0, alpha)
    layers = {name: _Layer(weight, hessian) for name, (weight, hessian) in layers.items()}
    groups = _groups_within(min(len(layer.strength) for layer in layers.values()))
    for layer, b, g in tqdm(list(product(layers.values(), BITS, groups.values())), leave=False):
        layer.errors(b, g)
    picture = _Picture(list(layers.values()))

    def update(alpha, layer, bits, group=0) -> str:
        found, at = layers[layer].errors(bits, group), ALPHAS.index(alpha)
        picture.show(layers[layer], found, at)
        return _describe(layers[layer], found, at)

    controls = {
        "alpha": widgets.SelectionSlider(options=[(f"{a:.2f}", a) for a in ALPHAS], value=alpha, description="alpha"),
        "layer": widgets.Dropdown(options=list(layers), description="layer"),
        "bits": widgets.SelectionSlider(options=list(BITS), value=bits, description="bits"),
    }
    if len(groups) > 1:
        start = group_size if group_size in groups.values() else 0
        controls["group"] = widgets.SelectionSlider(options=list(groups.items()), value=start, description="group")
    return bind(controls, picture.right, picture.moving, update)


def _check_settings(layers: dict, bits: int, group: int, alpha: float) -> None:
    if not layers:
        raise ValueError("no layers to look at")
    for value, name, choices in (
        (bits, "bits", BITS), (group, "group_size", tuple(GROUPS.values())), (alpha, "alpha", ALPHAS)
    ):  # fmt: skip
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value}")


def _groups_within(width: int) -> dict[str, int]:
    """The groups that cut a row of this width into pieces, and the whole row."""
    return {name: size for name, size in GROUPS.items() if size < width}


# --- numbers ----------------------------------------------------------------------------------------------------


class _Layer:
    """At most _ROWS rows of a weight, how loud its channels are, and its errors, each computed once."""

    def __init__(self, weight: Tensor, hessian: Hessian):
        check_weight(weight, hessian)
        self.weight, self.hessian = evenly(weight.detach().float().cpu(), _ROWS), hessian
        self.strength = hessian.mean_abs.cpu()
        self.loud = torch.zeros(len(self.strength), dtype=torch.bool)
        self.loud[self.strength.topk(max(1, round(_SHARE * len(self.loud)))).indices] = True
        self.kinds = self.loud.numpy(), ~self.loud.numpy()  # loud channels, and the others
        self.energy = max(hessian.energy(self.weight).item(), 1e-30)
        self.diagonal = hessian.matrix.diagonal().cpu()
        self.errors = cache(self._errors)

    def _errors(self, bits: int, group: int) -> _Errors:
        scaled = [
            scale_and_round(self.weight, scales_of(self.strength, alpha), bits=bits, group_size=group or None)
            for alpha in ALPHAS
        ]
        weight, output, parts = zip(*map(self._measure, scaled), strict=True)
        steps = np.array([_mean_steps(one) for one in scaled])
        steps /= np.maximum(steps[0], 1e-30)
        return _Errors(np.array(weight), np.array(output).T, np.array(parts), steps, scaled[0].q.bits_per_element)

    def _measure(self, scaled: ScaledQTensor) -> tuple[float, list[float], np.ndarray]:
        """Errors of the weight; of the output from all channels, loud or other ones alone, and each channel alone."""
        back = scaled.dequantize()
        lost = back - self.weight
        of_some = [lost, lost.masked_fill(~self.loud, 0.0), lost.masked_fill(self.loud, 0.0)]
        output = [self.hessian.energy(some).item() / self.energy for some in of_some]
        alone = self.diagonal * lost.square().sum(0) / self.energy  # a single column's energy: H_jj ‖column j‖²
        return max(relative_error(self.weight, back), 1e-12), output, alone.clamp(min=1e-12).numpy()


def _mean_steps(scaled: ScaledQTensor) -> np.ndarray:
    """The step of each channel's grid as the layer acts with it, mean over the rows."""
    steps = scaled.q.element_qparams().scale.expand(scaled.shape) / scaled.input_scale
    return steps.mean(0).numpy()


def _describe(layer: _Layer, found: _Errors, at: int) -> str:
    s, output = scales_of(layer.strength, ALPHAS[at]), np.maximum(found.output[0], 1e-12)
    best = int(output.argmin())
    steps = [found.steps[at][chosen] for chosen in layer.kinds]
    loud, others = (step.mean() if len(step) else 1.0 for step in steps)
    return (
        f"alpha {ALPHAS[at]:.2f}: s {s.min():.2f} to {s.max():.2f}   step: loud {loud:.2f} ×, others {others:.2f} ×   "
        f"true bits per weight {found.bits:.3f}, s folded away\n"
        f"weight error {found.weight[at]:.2e} ({times(found.weight[at], found.weight[0])})   "
        f"output error {output[at]:.2e} ({times(output[at], output[0])})   "
        f"best {output[best]:.2e} at alpha {ALPHAS[best]:.2f}"
    )


# --- picture ----------------------------------------------------------------------------------------------------


class _Picture:
    """Left, step and part of the error of each channel; right, the errors at every alpha."""

    def __init__(self, layers: list[_Layer]):
        top, bottom, self.right = _axes(torch.cat([layer.strength for layer in layers]).numpy())
        self.steps = _draw_dots(top)
        (self.before,) = bottom.plot([], [], ".", color=FLOAT, markersize=4, label="alpha 0")
        self.parts = _draw_dots(bottom)
        self.lines, self.markers = _draw_curves(self.right)
        self.moving = [*self.steps, self.before, *self.parts, *self.lines, *self.markers]

    def show(self, layer: _Layer, found: _Errors, at: int) -> None:
        strength, plain = layer.strength.numpy(), max(found.output[0][0], 1e-12)
        for chosen, step, part in zip(layer.kinds, self.steps, self.parts, strict=True):
            step.set_data(strength[chosen], found.steps[at][chosen])
            part.set_data(strength[chosen], found.parts[at][chosen] / plain)
        self.before.set_data(strength, found.parts[0] / plain)
        for line, marker, errors in zip(self.lines, self.markers, found.output, strict=True):
            heights = np.maximum(errors / plain, 1e-9)
            line.set_ydata(heights)
            marker.set_data([ALPHAS[at]], [heights[at]])


def _axes(strengths: np.ndarray) -> tuple:
    fig, axes = figure(columns=2, rows=2, height=4.2)
    grid = axes[0, 0].get_gridspec()
    for ax in axes[:, 1]:
        ax.remove()
    top, bottom, right = axes[0, 0], axes[1, 0], fig.add_subplot(grid[:, 1])
    active = strengths[strengths > 0] if (strengths > 0).any() else np.ones(1)
    across = {"xscale": "log", "xlim": (active.min() / 1.3, active.max() * 1.3), "yscale": "log"}
    top.set(**across, ylim=(0.1, 200), ylabel="× step at alpha 0", title="a dot for each input channel")
    top.axhline(1, color=FLOAT, linewidth=0.8)
    top.tick_params(labelbottom=False)
    bottom.set(**across, ylim=(1e-6, 9), xlabel="mean |x| of the channel", ylabel="part of the error")
    right.set(yscale="log", ylim=(0.008, 12), title="output error ÷ round-to-nearest's")
    right.set(xlim=(-0.03, 1.03), xlabel="alpha")
    fig.subplots_adjust(left=0.09, right=0.98, top=0.92, bottom=0.12, wspace=0.2, hspace=0.12)
    return top, bottom, right


def _draw_dots(ax: Axes) -> list:
    kinds = ("loud", ERROR), ("others", QUANTIZED)
    dots = [ax.plot([], [], ".", color=color, markersize=4, label=label)[0] for label, color in kinds]
    ax.legend(loc="upper left", ncols=3, fontsize="x-small", markerscale=2, columnspacing=1.0)
    return dots


def _draw_curves(ax: Axes) -> tuple[list, list]:
    """Three lines over alpha, and a marker on each."""
    lines = [
        ax.plot(ALPHAS, [1] * len(ALPHAS), color=color, linewidth=width, label=label)[0]
        for label, color, width in (("all", OTHER, 2.5), ("loud alone", ERROR, 1.2), ("others alone", QUANTIZED, 1.2))
    ]
    ax.axhline(1, color=FLOAT, linestyle="--", label="round to nearest")
    markers = [ax.plot([0], [1], "o", color=line.get_color(), markersize=7)[0] for line in lines]
    ax.legend(loc="upper center", ncols=2, fontsize="x-small")
    return lines, markers
