"""A slider over the steps of a training with quantization: float weights on their grid, step by step, and the loss."""

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from quantlab.arguments import check_real
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import states, thinned
from quantlab.granularity import PerGroup, quantize_tensor
from quantlab.plots import ERROR, FLOAT, QUANTIZED

_SHOWN = 16  # weights of a row whose paths are drawn
_BINS = np.linspace(-0.5, 0.5, 11)


def explore_training(
    weights: Tensor, losses, *, bits: int, group_size: int = 128, symmetric: bool = False, step: int = 0, row: int = 0
) -> Explorer:
    """The float weights of a few rows, step by step, on the grid that min-max gives them at that step, and the loss.

    Positions are counted in steps of the grid from 0, w / scale, so that grid points are whole numbers and thresholds
    lie half-way between. Of the chosen row the paths of 16 weights are drawn: up to 8 that end elsewhere, and those
    that move most. The other pictures count all weights given. A weight is rounded elsewhere when another multiple of
    the scale stands for it; its code may change without that, when the zero point of its group moves.

    Shapes: weights (steps + 1, rows, in): before the first training step and after each; losses (steps,), the loss
    of a training step at the weights before it. Raises: ValueError if they do not belong together.
    """
    run = _Run(*_checked(weights, losses), bits=bits, group_size=group_size, symmetric=symmetric)
    picture = _Picture(run)
    wide = {"style": {"description_width": "initial"}, "layout": {"width": "400px"}}
    controls = {
        "step": widgets.IntSlider(step, min=0, max=run.last, description="training step", **wide),
        "row": widgets.IntSlider(row, min=0, max=run.places.shape[1] - 1, description="row", **wide),
    }

    def update(step, row) -> str:
        picture.show(step, row)
        return run.describe(step, row)

    steps, rows = list(range(run.last + 1)), list(range(run.places.shape[1]))
    filmed = states(row=thinned(rows, 2, row), step=thinned(steps, 49, step))  # each picture has some 4 kB
    return bind(controls, picture.ax, picture.moving, update, filmed=filmed)


def _checked(weights: Tensor, losses) -> tuple[Tensor, np.ndarray]:
    check_real(weights, "weights")
    losses = np.asarray(losses, dtype=float)
    if weights.ndim != 3 or losses.ndim != 1 or len(weights) != len(losses) + 1 or not len(losses):
        raise ValueError(
            f"need weights (steps + 1, rows, in) and losses (steps,), got {tuple(weights.shape)} and {losses.shape}"
        )
    return weights.detach().float().cpu(), losses


class _Run:
    """The weights at each step, in steps of their grid from 0: where they are, and the grid points they go to."""

    def __init__(self, weights: Tensor, losses: np.ndarray, *, bits: int, group_size: int, symmetric: bool):
        q = quantize_tensor(weights, bits=bits, granularity=PerGroup(group_size), symmetric=symmetric)
        qp = q.element_qparams()
        self.losses, self.bits, self.last = losses, q.bits_per_element, len(weights) - 1
        self.places, self.points = (weights / qp.scale).numpy(), (q.codes - qp.zero_point).numpy()
        self.changed = self.points != self.points[0]
        self.away = self.places - self.points  # beyond ±0.5 only where a symmetric grid clamps
        self.shares = 100 * self.changed.mean((1, 2))
        rows = range(self.places.shape[1])
        self.picked = np.stack([_picked(self.places[:, row], self.changed[-1, row]) for row in rows])

    def loss_at(self, step: int) -> tuple[int, float]:
        """The last training step whose loss is known by then, and that loss."""
        known = min(step, len(self.losses) - 1)
        return known, self.losses[known]

    def describe(self, step: int, row: int) -> str:
        away, first = abs(self.away[step]).mean(), abs(self.away[0]).mean()
        return (
            f"step {step} of {self.last}: loss {self.loss_at(step)[1]:.3f} (at first {self.losses[0]:.3f})   "
            f"{self.bits:.2f} true bits per weight\n"
            f"rounded elsewhere than at first: {self.shares[step]:.1f} % of the weights, "
            f"{self.changed[step, row].mean():.0%} of row {row}\n"
            f"mean distance from the grid: {away:.3f} steps (at first {first:.3f}, evenly spread 0.250)"
        )


def _picked(places: np.ndarray, elsewhere: np.ndarray) -> np.ndarray:
    """Which weights of a row (steps, in) to draw: half of them, if there are so many, end elsewhere."""
    restless = np.argsort(-np.ptp(places, axis=0))
    ended = restless[elsewhere[restless]][: _SHOWN // 2]
    others = restless[~np.isin(restless, ended)]
    return np.concatenate([ended, others])[:_SHOWN]


class _Picture:
    """The paths of one row above the loss; where all weights stand in their cells above how many went elsewhere."""

    def __init__(self, run: _Run):
        self.run, (self.ax, loss, cells, counts) = run, _axes()
        self._draw_paths(self.ax)
        self.here = _draw_curve(loss, run.losses, "loss")
        self.share = _draw_curve(counts, run.shares, "elsewhere, %")
        self.bars = _draw_cells(cells, run.away)
        paths = [self.before, self.past, self.stay, self.moved, self.front]
        self.moving = [*paths, self.here, self.share, self.bars]

    def _draw_paths(self, ax: Axes) -> None:
        """Grid lines and thresholds, still; the whole paths, what lies behind, a dot for each, and the front."""
        places, last, low, high = self.run.places, self.run.last, self.run.points.min(), self.run.points.max()
        ax.hlines(range(low, high + 1), 0, last, color="0.55", linewidth=1.2)
        ax.hlines([c + 0.5 for c in range(low, high)], 0, last, color="0.6", linewidth=0.9, linestyle=":")
        self.before = ax.add_collection(LineCollection([], colors="0.85", linewidths=0.8))
        self.past = ax.add_collection(LineCollection([], linewidths=1.3))
        (self.stay,) = ax.plot([], [], "o", color=QUANTIZED, markersize=4, label="rounded as at first")
        (self.moved,) = ax.plot([], [], "s", color=ERROR, markersize=4, label="rounded elsewhere")
        (self.front,) = ax.plot([0, 0], [low - 1, high + 1], color="black", linewidth=0.8)
        ax.set(xlim=(-0.02 * last, 1.02 * last), ylim=(min(places.min(), low) - 0.2, max(places.max(), high) + 0.9))
        ax.set(ylabel="weight, in steps of its grid", yticks=range(low, high + 1))
        ax.set_title("16 restless weights of the row (solid: grid points, dotted: thresholds)", fontsize="medium")
        ax.legend(loc="upper center", ncols=2, fontsize="small", frameon=False)

    def show(self, step: int, row: int) -> None:
        picked = self.run.picked[row]
        paths, new = self.run.places[:, row, picked], self.run.changed[step, row, picked]
        self.before.set_segments([np.column_stack([np.arange(len(paths)), path]) for path in paths.T])
        self.past.set_segments([np.column_stack([np.arange(step + 1), path]) for path in paths[: step + 1].T])
        self.past.set_color(np.where(new, ERROR, QUANTIZED))
        at = np.full(len(new), step)
        self.stay.set_data(at[~new], paths[step][~new])
        self.moved.set_data(at[new], paths[step][new])
        self.front.set_xdata([step, step])
        known, loss = self.run.loss_at(step)
        self.here.set_data([known], [loss])
        self.share.set_data([step], [self.run.shares[step]])
        self.bars.set_data(_shares(self.run.away[step]))


def _axes() -> list:
    """Paths above the loss on the left, sharing the steps; cells above the count of changes on the right."""
    sizes = {"width_ratios": [2.4, 1], "height_ratios": [2.2, 1]}
    fig, axes = figure(columns=2, rows=2, height=5.4, gridspec_kw=sizes)
    axes[1, 0].sharex(axes[0, 0])
    fig.subplots_adjust(left=0.08, right=0.98, top=0.94, bottom=0.1, hspace=0.32, wspace=0.26)
    return [axes[0, 0], axes[1, 0], axes[0, 1], axes[1, 1]]


def _draw_curve(ax: Axes, values: np.ndarray, ylabel: str):
    """A still curve over the training steps; returns the dot that moves along it."""
    ax.plot(values, color="0.35", linewidth=1.2)
    (dot,) = ax.plot([0], [values[0]], "o", color=ERROR, markersize=7)
    ax.set(xlabel="training step", ylabel=ylabel, ylim=(0, 1.12 * max(values) + 1e-9))
    return dot


def _shares(away: np.ndarray) -> np.ndarray:
    """Percent of the weights in each tenth of a cell; clamped ones count at its ends."""
    return 100 * np.histogram(away.clip(-0.5, 0.5), _BINS)[0] / away.size


def _draw_cells(ax: Axes, away: np.ndarray):
    """Where weights stand between two thresholds: at first, still, and now."""
    bars = ax.stairs(_shares(away[0]), _BINS, fill=True, color=FLOAT, label="now")
    ax.stairs(_shares(away[0]), _BINS, color="black", linewidth=1.2, label="at first")
    ax.axvline(0, color="0.3", linewidth=0.8, linestyle="--")
    highest = max(_shares(step).max() for step in away)
    ax.set(xlabel="from the grid point, in steps", ylabel="weights, %", ylim=(0, 1.45 * highest))
    ax.legend(loc="upper right", fontsize="small", ncols=2, handlelength=1.2)
    return bars
