"""Sliders on the step of a symmetric grid, from 8 bits down to two values: its errors, and where LSQ pulls it."""

from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.collections import LineCollection
from torch import Tensor

from quantlab.arguments import check_real
from quantlab.blocks import from_blocks, to_blocks
from quantlab.explorers.base import Explorer, figure, tie
from quantlab.granularity import PerGroup, code_range
from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED
from quantlab.train.few_levels import quantize_binary, quantize_ternary
from quantlab.train.lsq import LSQ

GRIDS = {"8": 8, "6": 6, "5": 5, "4": 4, "3": 3, "2": 2, "1.58": "ternary", "1": "binary"}
_FACTORS = np.geomspace(0.02, 6, 49)  # steps looked at, in units of mean |w|


@dataclass(frozen=True)
class _Curves:
    """One grid at every step of _FACTORS."""

    errors: dict[str, np.ndarray]  # relative error of the weight and of the output
    pulls: dict[str, np.ndarray]  # d(error) / d(ln step) by the straight-through gradient of the step
    stems: list  # at each step: (values / mean |w|, share of the weights / width of a cell)
    clipped: np.ndarray
    zeros: np.ndarray
    start: float  # LSQ's first step; mean |w| for three and two values
    bits: float


def explore_step(weight: Tensor, inputs: Tensor, *, bits: str = "2", group_size: int = 128) -> Explorer:
    """The step of a layer's symmetric grid: what it does to weight and output, and where LSQ's gradient pulls it.

    Steps are counted in mean |w| of each group, which scales all groups alike. The arrows are the sign of LSQ's
    gradient of the chosen error, the thick line (the paper's mask), at that step: to the left, the step shall
    shrink. bits: a key of GRIDS; "1.58" has the codes -1, 0, 1, "1" the signs.

    Shapes: weight (out, in), inputs (tokens, in). Raises: ValueError if they do not belong together, or group_size
    does not divide in.
    """
    weight, hessian = _checked(weight, inputs, group_size)
    curves = {name: _curves(weight, hessian, grid, group_size) for name, grid in GRIDS.items()}
    middle = int(np.argmin(abs(_FACTORS - curves[bits].start)))
    controls = {
        "bits": widgets.SelectionSlider(options=list(GRIDS), value=bits, description="bits"),
        "step": widgets.SelectionSlider(
            options=[(f"{f:.2g}", i) for i, f in enumerate(_FACTORS)], value=middle, description="step / mean |w|"
        ),
        "loss": widgets.Dropdown(options=["output", "weight"], value="output", description="error of"),
    }
    for control in controls.values():
        control.style.description_width = "initial"
    fig, (left, right) = figure(columns=2, height=3.6)
    fig.subplots_adjust(left=0.07, right=0.98, top=0.9, bottom=0.14, wspace=0.22)
    stems = _draw_weights(left, to_blocks(weight, PerGroup(group_size)))
    lines, dots, arrows, marks = _draw_errors(right)

    def update(bits, step, loss) -> str:
        of, here = curves[bits], _FACTORS[step]
        places, heights = of.stems[step]
        stems.set_segments([[(x, 0), (x, y)] for x, y in zip(places, heights, strict=True)])
        stems.set_linewidths(1.2 if len(places) > 32 else 3)
        for kind, line in lines.items():
            line.set_data(_FACTORS, of.errors[kind])
            line.set_linewidth(2.5 if kind == loss else 1)
            dots[kind].set_data([here], [of.errors[kind][step]])
        down = of.pulls[loss] > 0
        for arrow, chosen in zip(arrows, (down, ~down), strict=True):
            arrow.set_data(_FACTORS[chosen], np.full(chosen.sum(), 0.04))
        marks["start"].set_xdata([of.start] * 2)
        marks["still"].set_xdata([_FACTORS[_still(of.pulls[loss])]] * 2)
        best = int(np.argmin(of.errors[loss]))
        marks["best"].set_data([_FACTORS[best]], [of.errors[loss][best]])
        return _numbers(of, step, loss)

    moving = [stems, *lines.values(), *dots.values(), *arrows, *marks.values()]
    return tie(controls, right, moving, update)


def _checked(weight: Tensor, inputs: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """The weight and XᵀX / tokens, in float32."""
    check_real(weight, "weight")
    check_real(inputs, "inputs")
    if weight.ndim != 2 or inputs.ndim != 2 or weight.shape[1] != inputs.shape[1]:
        raise ValueError(
            f"need weight (out, in) and inputs (tokens, in), got {tuple(weight.shape)} and {tuple(inputs.shape)}"
        )
    if weight.shape[1] % PerGroup(group_size).group_size:
        raise ValueError(f"group_size must divide the {weight.shape[1]} inputs, got {group_size}")
    inputs = inputs.detach().float()
    return weight.detach().float(), inputs.T @ inputs / len(inputs)


def _curves(weight: Tensor, hessian: Tensor, grid, group_size: int) -> _Curves:
    granularity = PerGroup(group_size)
    blocks = to_blocks(weight, granularity)
    unit = LSQ(weight, bits=2, granularity=granularity).step.detach() / 2  # at 2 bits it starts at 2 mean |w|
    energy = {"weight": weight.square().sum(), "output": ((weight @ hessian) * weight).sum()}
    columns: dict = {key: [] for key in ("weight", "output", "clipped", "zeros", "stems")}
    pulls: dict = {"weight": [], "output": []}
    for factor in _FACTORS.tolist():
        codes, of_step, clipped = _round(blocks / (factor * unit), grid)
        error = from_blocks(factor * unit * codes, granularity, weight.shape) - weight
        slope = from_blocks(factor * unit * of_step, granularity, weight.shape)  # of each weight, by ln step
        for kind, into in (("weight", error), ("output", error @ hessian)):
            columns[kind].append(((into * error).sum() / energy[kind]).item())
            pulls[kind].append((2 * (into * slope).sum() / energy[kind]).item())
        columns["clipped"].append(clipped.float().mean().item())
        columns["zeros"].append((codes == 0).float().mean().item())
        columns["stems"].append(_stems(codes, factor, grid))
    ready = {key: np.array(values) for key, values in columns.items() if key != "stems"}
    errors = {kind: ready[kind] for kind in ("weight", "output")}
    start, bits = _start_and_bits(weight, grid, granularity)
    return _Curves(
        errors,
        {kind: np.array(values) for kind, values in pulls.items()},
        columns["stems"],
        ready["clipped"],
        ready["zeros"],
        start,
        bits,
    )


def _round(ratio: Tensor, grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, LSQ's gradient of the step (eq. 3) for each weight, and which weights are clipped."""
    if grid == "binary":
        codes = torch.where(ratio < 0, -1.0, 1.0)
        return codes, codes, ratio.abs() > 1
    low, high = (-1, 1) if grid == "ternary" else code_range(grid, symmetric=True)
    codes, clipped = torch.round(ratio).clamp(low, high), (ratio <= low) | (ratio >= high)
    return codes, torch.where(clipped, codes, codes - ratio), clipped


def _stems(codes: Tensor, factor: float, grid) -> tuple[np.ndarray, np.ndarray]:
    """Where the grid points in use lie, and the share of the weights there over the width of a cell."""
    lowest = int(codes.min())
    counts = torch.bincount((codes - lowest).flatten().int()).numpy()
    used, width = np.flatnonzero(counts), 2 * factor if grid == "binary" else factor
    return factor * (used + lowest), counts[used] / codes.numel() / width


def _start_and_bits(weight: Tensor, grid, granularity) -> tuple[float, float]:
    """The first step, in mean |w|, and the true bits a weight; ternary codes go five to a byte."""
    if grid == "binary":
        return 1.0, quantize_binary(weight, granularity).bits_per_element
    if grid == "ternary":
        return 1.0, quantize_ternary(weight, granularity).bits_per_element - 2 + 8 / 5
    q = LSQ(weight, bits=grid, granularity=granularity).quantized(weight)
    return 2 / code_range(grid, symmetric=True)[1] ** 0.5, q.bits_per_element


def _numbers(of: _Curves, step: int, loss: str) -> str:
    pulls, errors = of.pulls[loss], of.errors[loss]
    still, best = _still(pulls), int(np.argmin(errors))
    return (
        f"step {_FACTORS[step]:.2g} × mean |w|: weight error {of.errors['weight'][step]:.2e}, output error "
        f"{of.errors['output'][step]:.2e}   clipped {of.clipped[step]:.1%}, rounded to 0 {of.zeros[step]:.1%}\n"
        f"{of.bits:.2f} true bits; LSQ's gradient of the {loss} error pulls the step "
        f"{'down' if pulls[step] > 0 else 'up'}, until {_FACTORS[still]:.2g} (error {errors[still]:.2e})\n"
        f"least error {errors[best]:.2e} at {_FACTORS[best]:.2g}, at the start ({of.start:.2g}) "
        f"{np.interp(of.start, _FACTORS, errors):.2e}"
    )


def _still(pulls: np.ndarray) -> int:
    """The step at which the pull turns from up to down: the index beside the first such change."""
    turns = np.flatnonzero((pulls[:-1] < 0) & (pulls[1:] >= 0))
    if not len(turns):
        return int(np.argmin(abs(pulls)))
    first = turns[0]
    return int(first + (abs(pulls[first + 1]) < abs(pulls[first])))


def _draw_weights(ax, blocks: Tensor) -> LineCollection:
    """The density of w / mean |w|, still; returns the stems of the grid points."""
    places = (blocks / blocks.abs().mean(1, keepdim=True)).flatten().numpy()
    ax.hist(places, bins=np.linspace(-6, 6, 121), density=True, color=FLOAT)
    stems = ax.add_collection(LineCollection([], colors=QUANTIZED))
    ax.set(xlim=(-6, 6), ylim=(0, 0.6), xlabel="weight / mean |w|", yticks=[])
    ax.set_title("the weights, and the grid points that stand for them", fontsize="medium")
    return stems


def _draw_errors(ax) -> tuple:
    """Two curves and a dot on each, the arrows of the pull, and the two marked steps."""
    colors = {"weight": ERROR, "output": QUANTIZED}
    lines = {kind: ax.plot([], [], color=c, label=f"{kind} error")[0] for kind, c in colors.items()}
    dots = {kind: ax.plot([], [], "o", color=c, markersize=8)[0] for kind, c in colors.items()}
    foot = {"linestyle": "", "markersize": 5, "transform": ax.get_xaxis_transform()}
    arrows = [ax.plot([], [], marker, color=c, **foot)[0] for marker, c in (("<", CLIPPED), (">", OTHER))]
    marks = {
        "start": ax.axvline(1, 0, 0.79, color="0.4", linewidth=1, linestyle=":", label="first step"),
        "still": ax.axvline(1, 0, 0.79, color=OTHER, linewidth=1, linestyle="--", label="LSQ's pull is 0"),
    }
    ring = {"color": "black", "markersize": 11, "fillstyle": "none", "label": "least"}
    marks["best"] = ax.plot([], [], "o", **ring)[0]
    ax.set(xscale="log", yscale="log", xlim=(0.018, 6.7), ylim=(3e-6, 100), xlabel="step / mean |w|")
    ax.set_title("errors; arrows: where LSQ pulls the step", fontsize="medium")
    ax.legend(loc="upper left", fontsize="small", ncols=2)
    return lines, dots, arrows, marks
