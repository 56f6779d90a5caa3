"""Sliders on the step of a symmetric grid, from 8 bits down to two values: its errors, and where LSQ pulls it."""

from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor, nn

from quantlab.blocks import from_blocks, mean_magnitude, to_blocks
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import check_layer
from quantlab.explorers.drawing import draw_ring
from quantlab.granularity import PerGroup
from quantlab.hessian import Hessian
from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED
from quantlab.train.few_levels import pack_ternary, quantize_binary, quantize_ternary
from quantlab.train.lsq import LSQ

GRIDS = {"8": 8, "6": 6, "5": 5, "4": 4, "3": 3, "2": 2, "1.58": "ternary", "1": "binary"}
_FACTORS = np.geomspace(0.02, 6, 49)  # steps tried, in units of mean |w|


@dataclass(frozen=True)
class _Curves:
    """One grid at every step of _FACTORS."""

    errors: dict[str, np.ndarray]  # relative error of the weight and of the output
    pulls: dict[str, np.ndarray]  # d(error) / d(ln step) by the straight-through gradient, up to a constant factor
    stems: list  # at each step: (values / mean |w|, share of the weights / width of a cell)
    clipped: np.ndarray
    zeros: np.ndarray
    start: float  # LSQ's first step; mean |w| for three and two values
    bits: float

    def still(self, loss: str) -> int:
        """The step at which the pull turns from up to down: the index beside the first such change."""
        pulls = self.pulls[loss]
        turns = np.flatnonzero((pulls[:-1] < 0) & (pulls[1:] >= 0))
        if not len(turns):
            return int(np.argmin(abs(pulls)))
        return int(turns[0] + (abs(pulls[turns[0] + 1]) < abs(pulls[turns[0]])))

    def best(self, loss: str) -> int:
        """The index of the step with the smallest error."""
        return int(np.argmin(self.errors[loss]))


def explore_step(weight: Tensor, inputs: Tensor, *, bits: str = "2", group_size: int = 128) -> Explorer:
    """The step of a layer's symmetric grid: what it does to weight and output, and where LSQ's gradient pulls it.

    Steps are counted in mean |w| of each group, which scales all groups alike. The arrows are the sign of LSQ's
    gradient of the chosen error, the thick line (the paper's mask), at that step: to the left, the step shall
    shrink. bits: a key of GRIDS; "1.58" has the codes -1, 0, 1, "1" the signs.

    Shapes: weight (out, in), inputs (tokens, in). Raises: ValueError if they do not belong together, or group_size
    does not divide in.
    """
    weight, inputs = check_layer(weight, inputs)
    granularity = PerGroup(group_size)
    if weight.shape[1] % granularity.group_size:
        raise ValueError(f"group_size must divide the {weight.shape[1]} inputs, got {group_size}")
    hessian = Hessian(weight.shape[1]).add(inputs)
    curves = {}
    for name, grid in GRIDS.items():
        kind = _BinaryGrid if grid == "binary" else _LsqGrid
        curves[name] = _measure(kind(weight, granularity, grid), hessian)
    picture = _Picture(weight, granularity)

    def update(bits, step, loss) -> str:
        picture.show(curves[bits], step, loss)
        return _describe(curves[bits], step, loss)

    middle = int(np.argmin(abs(_FACTORS - curves[bits].start)))
    return bind(_controls(bits, middle), picture.right, picture.moving, update)


def _controls(bits: str, step: int) -> dict:
    wide = {"style": {"description_width": "initial"}}
    factors = [(f"{factor:.2g}", i) for i, factor in enumerate(_FACTORS)]
    return {
        "bits": widgets.SelectionSlider(options=list(GRIDS), value=bits, description="bits", **wide),
        "step": widgets.SelectionSlider(options=factors, value=step, description="step / mean |w|", **wide),
        "loss": widgets.Dropdown(options=["output", "weight"], value="output", description="error of", **wide),
    }


# --- numbers ----------------------------------------------------------------------------------------------------


class _LsqGrid:
    """A weight on LSQ's grid of so many bits; of three values, if of two bits only -1, 0 and 1 are used."""

    cell = 1  # the width of a cell, in steps

    def __init__(self, weight: Tensor, granularity: PerGroup, bits):
        self.weight, self.granularity = weight, granularity
        self.unit = mean_magnitude(weight, granularity).clamp(min=torch.finfo(torch.float32).tiny).float()
        self.lsq = LSQ(weight, bits=2 if bits == "ternary" else bits, granularity=granularity)
        self.start, self.bits = self.lsq.step.detach(), self.lsq.quantized(weight).bits_per_element
        if bits == "ternary":
            self.lsq.qmin = -1
            self.start, self.bits = _ternary_start_and_bits(weight, granularity)
        self.qmin, self.qmax = self.lsq.qmin, self.lsq.qmax

    def rounded(self, step: nn.Parameter) -> tuple[Tensor, Tensor]:
        """The weight on the grid, with LSQ's gradient for the step, and its codes."""
        self.lsq.step = step
        return self.lsq(self.weight), self.lsq.quantized(self.weight).codes


class _BinaryGrid:
    """A weight's signs times the step."""

    cell, qmin, qmax = 2, -1, 1

    def __init__(self, weight: Tensor, granularity: PerGroup, _bits):
        q = quantize_binary(weight, granularity)
        self.weight, self.granularity, self.bits = weight, granularity, q.bits_per_element
        self.signs = q.levels[q.codes.int()]
        self.start = self.unit = q.absmax[:, None]

    def rounded(self, step: nn.Parameter) -> tuple[Tensor, Tensor]:
        """The weight on the grid, with a gradient for the step, and its codes."""
        blocks = step * to_blocks(self.signs, self.granularity)
        return from_blocks(blocks, self.granularity, self.weight.shape), self.signs


def _ternary_start_and_bits(weight: Tensor, granularity: PerGroup) -> tuple[Tensor, float]:
    """The step of each group, and the true bits of a weight with five codes to a byte."""
    q = quantize_ternary(weight, granularity)
    nbytes = pack_ternary(q.codes).nbytes + sum(part.nbytes for part in q.side_parts().values())
    return q.qparams.scale.reshape(-1, 1), 8 * nbytes / q.codes.numel()


def _measure(grid: _LsqGrid | _BinaryGrid, hessian: Hessian) -> _Curves:
    H, blocks = hessian.matrix.float(), to_blocks(grid.weight, grid.granularity)
    energies = {"weight": grid.weight.square().sum(), "output": hessian.energy(grid.weight).float()}
    points = []
    for factor in _FACTORS.tolist():
        step = nn.Parameter(factor * grid.unit)
        rounded, codes = grid.rounded(step)
        error = (rounded - grid.weight).detach()
        into = {"weight": error / energies["weight"], "output": error @ H / energies["output"]}  # half the gradients
        errors = {kind: (half * error).sum().item() for kind, half in into.items()}
        pulls = {kind: _pull(rounded, step, 2 * half) for kind, half in into.items()}
        clipped = torch.count_nonzero((blocks <= grid.qmin * step) | (blocks >= grid.qmax * step)).item()
        shares = clipped / codes.numel(), 1 - torch.count_nonzero(codes).item() / codes.numel()
        points.append((errors, pulls, _stems(codes, factor, grid), *shares))
    errors, pulls, stems, clipped, zeros = zip(*points, strict=True)
    start = (grid.start / grid.unit).median().item()
    return _Curves(_by_kind(errors), _by_kind(pulls), stems, np.array(clipped), np.array(zeros), start, grid.bits)


def _pull(rounded: Tensor, step: nn.Parameter, into: Tensor) -> float:
    """d(error) / d(ln step) if all steps grow by one factor; into: the gradient of the error at the rounded weight."""
    (slope,) = torch.autograd.grad(rounded, step, into, retain_graph=True)
    return (slope * step).sum().item()


def _by_kind(rows: list[dict]) -> dict[str, np.ndarray]:
    return {kind: np.array([row[kind] for row in rows]) for kind in rows[0]}


def _stems(codes: Tensor, factor: float, grid: _LsqGrid | _BinaryGrid) -> tuple[np.ndarray, np.ndarray]:
    """Where the grid points in use lie, and the share of the weights there over the width of a cell."""
    counts = torch.bincount((codes.int() - grid.qmin).flatten()).numpy()
    used = np.flatnonzero(counts)
    return factor * (used + grid.qmin), counts[used] / codes.numel() / (factor * grid.cell)


def _describe(of: _Curves, step: int, loss: str) -> str:
    errors, still, best = of.errors[loss], of.still(loss), of.best(loss)
    return (
        f"step {_FACTORS[step]:.2g} × mean |w|: weight error {of.errors['weight'][step]:.2e}, output error "
        f"{of.errors['output'][step]:.2e}   clipped {of.clipped[step]:.1%}, rounded to 0 {of.zeros[step]:.1%}\n"
        f"{of.bits:.2f} true bits; LSQ's gradient of the {loss} error pulls the step "
        f"{'down' if of.pulls[loss][step] > 0 else 'up'}, until {_FACTORS[still]:.2g} (error {errors[still]:.2e})\n"
        f"least error {errors[best]:.2e} at {_FACTORS[best]:.2g}, at the start ({of.start:.2g}) "
        f"{np.interp(of.start, _FACTORS, errors):.2e}"
    )


# --- picture ----------------------------------------------------------------------------------------------------


class _Picture:
    """Left, the weights and the grid points; right, both errors at every step, and where LSQ pulls."""

    def __init__(self, weight: Tensor, granularity: PerGroup):
        fig, (left, self.right) = figure(columns=2, height=3.6)
        fig.subplots_adjust(left=0.07, right=0.98, top=0.9, bottom=0.14, wspace=0.22)
        self.stems = _draw_weights(left, to_blocks(weight, granularity))
        self._draw_errors(self.right)
        marks, _ = self.right.get_legend_handles_labels()
        left.legend(handles=marks, title="in the right picture", loc="upper right", fontsize="small", ncols=2)
        marks = [self.start, self.still, self.best]
        self.moving = [self.stems, *self.lines.values(), *self.dots.values(), *self.arrows, *marks]

    def _draw_errors(self, ax: Axes) -> None:
        """Two curves and a dot on each, the arrows of the pull, and the marked steps."""
        colors = {"weight": ERROR, "output": QUANTIZED}
        self.lines = {kind: ax.plot([], [], color=c, label=f"{kind} error")[0] for kind, c in colors.items()}
        self.dots = {kind: ax.plot([], [], "o", color=c, markersize=8)[0] for kind, c in colors.items()}
        foot = {"linestyle": "", "markersize": 5, "transform": ax.get_xaxis_transform()}
        self.arrows = [ax.plot([], [], marker, color=c, **foot)[0] for marker, c in (("<", CLIPPED), (">", OTHER))]
        self.start = ax.axvline(1, color="0.4", linewidth=1, linestyle=":", label="first step")
        self.still = ax.axvline(1, color=OTHER, linewidth=1, linestyle="--", label="LSQ's pull is 0")
        self.best = draw_ring(ax, color="black", markersize=11, markeredgewidth=1, label="least")
        ax.set(xscale="log", yscale="log", xlim=(0.018, 6.7), ylim=(3e-6, 2), xlabel="step / mean |w|")
        ax.set_title("errors; arrows: where LSQ pulls the step", fontsize="medium")

    def show(self, of: _Curves, step: int, loss: str) -> None:
        self._show_points(*of.stems[step])
        for kind, line in self.lines.items():
            line.set_data(_FACTORS, of.errors[kind])
            line.set_linewidth(2.5 if kind == loss else 1)
            self.dots[kind].set_data([_FACTORS[step]], [of.errors[kind][step]])
        down, best = of.pulls[loss] > 0, of.best(loss)
        for arrow, chosen in zip(self.arrows, (down, ~down), strict=True):
            arrow.set_data(_FACTORS[chosen], np.full(chosen.sum(), 0.04))
        self.start.set_xdata([of.start] * 2)
        self.still.set_xdata([_FACTORS[of.still(loss)]] * 2)
        self.best.set_data([_FACTORS[best]], [of.errors[loss][best]])

    def _show_points(self, places: np.ndarray, heights: np.ndarray) -> None:
        self.stems.set_segments([[(x, 0), (x, y)] for x, y in zip(places, heights, strict=True)])
        self.stems.set_linewidths(1.2 if len(places) > 32 else 3)


def _draw_weights(ax: Axes, blocks: Tensor) -> LineCollection:
    """The density of w / mean |w|, still; returns the stems of the grid points."""
    places = (blocks / blocks.abs().mean(1, keepdim=True)).flatten().numpy()
    ax.hist(places, bins=np.linspace(-6, 6, 121), density=True, color=FLOAT)
    stems = ax.add_collection(LineCollection([], colors=QUANTIZED))
    ax.set(xlim=(-6, 6), ylim=(0, 0.6), xlabel="weight / mean |w|", yticks=[])
    ax.set_title("the weights, and the grid points that stand for them", fontsize="medium")
    return stems
