"""A slider over the steps of a training with quantization: float weights on their grid, step by step, and the loss."""

import ipywidgets as widgets
import numpy as np
from matplotlib.collections import LineCollection
from torch import Tensor

from quantlab.arguments import check_real
from quantlab.explorers.base import Explorer, figure, tie
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
    weights, losses = _checked(weights, losses)
    q = quantize_tensor(weights, bits=bits, granularity=PerGroup(group_size), symmetric=symmetric)
    qp, true_bits = q.element_qparams(), 8 * q.nbytes / q.codes.numel()
    places, points = (weights / qp.scale).numpy(), (q.codes - qp.zero_point).numpy()
    changed = points != points[0]
    away = places - points  # beyond ±0.5 only where a symmetric grid clamps
    last, rows = len(places) - 1, places.shape[1]
    picked = np.stack([_picked(places[:, k], changed[-1, k]) for k in range(rows)])
    wide = {"style": {"description_width": "initial"}, "layout": {"width": "400px"}}
    controls = {
        "step": widgets.IntSlider(step, min=0, max=last, description="training step", **wide),
        "row": widgets.IntSlider(row, min=0, max=rows - 1, description="row", **wide),
    }
    paths, loss, cells, counts = _axes()
    before, past, stay, moved, front = _draw_paths(paths, places, points, last)
    here = _draw_curve(loss, losses, "loss", "training step")
    shares = 100 * changed.mean((1, 2))
    share = _draw_curve(counts, shares, "elsewhere, %", "training step")
    bars = _draw_cells(cells, away)

    def update(step, row) -> str:
        ways, new = places[:, row, picked[row]], changed[step, row, picked[row]]
        before.set_segments([np.column_stack([np.arange(last + 1), way]) for way in ways.T])
        past.set_segments([np.column_stack([np.arange(step + 1), way]) for way in ways[: step + 1].T])
        past.set_color(np.where(new, ERROR, QUANTIZED))
        at = np.full(len(new), step)
        stay.set_data(at[~new], ways[step][~new])
        moved.set_data(at[new], ways[step][new])
        front.set_xdata([step, step])
        known = min(step, len(losses) - 1)
        here.set_data([known], [losses[known]])
        share.set_data([step], [shares[step]])
        bars.set_data(_shares(away[step]))
        return (
            f"step {step} of {last}: loss {losses[known]:.3f} (at first {losses[0]:.3f})   "
            f"{true_bits:.2f} true bits per weight\n"
            f"rounded elsewhere than at first: {shares[step]:.1f} % of the weights, "
            f"{changed[step, row].mean():.0%} of row {row}\n"
            f"mean distance from the grid: {abs(away[step]).mean():.3f} steps "
            f"(at first {abs(away[0]).mean():.3f}, evenly spread 0.250)"
        )

    return tie(controls, paths, [before, past, stay, moved, front, here, share, bars], update, few_colours=False)


def _checked(weights: Tensor, losses) -> tuple[Tensor, np.ndarray]:
    check_real(weights, "weights")
    losses = np.asarray(losses, dtype=float)
    if weights.ndim != 3 or losses.ndim != 1 or len(weights) != len(losses) + 1 or not len(losses):
        raise ValueError(
            f"need weights (steps + 1, rows, in) and losses (steps,), got {tuple(weights.shape)} and {losses.shape}"
        )
    return weights.detach().float().cpu(), losses


def _picked(places: np.ndarray, elsewhere: np.ndarray) -> np.ndarray:
    """Which weights of a row (steps, in) to draw: half of them, if there are so many, end elsewhere."""
    restless = np.argsort(-np.ptp(places, axis=0))
    ended = restless[elsewhere[restless]][: _SHOWN // 2]
    others = restless[~np.isin(restless, ended)]
    return np.concatenate([ended, others])[:_SHOWN]


def _axes() -> list:
    """Paths above the loss on the left, sharing the steps; cells above the count of changes on the right."""
    sizes = {"width_ratios": [2.4, 1], "height_ratios": [2.2, 1]}
    fig, axes = figure(columns=2, rows=2, height=5.4, gridspec_kw=sizes)
    axes[1, 0].sharex(axes[0, 0])
    fig.subplots_adjust(left=0.08, right=0.98, top=0.94, bottom=0.1, hspace=0.32, wspace=0.26)
    return [axes[0, 0], axes[1, 0], axes[0, 1], axes[1, 1]]


def _draw_paths(ax, places: np.ndarray, points: np.ndarray, last: int) -> tuple:
    """Grid lines and thresholds, still; the whole paths, what lies behind of them, a dot for each, and the front."""
    low, high = points.min(), points.max()
    ax.hlines(range(low, high + 1), 0, last, color="0.55", linewidth=1.2)
    ax.hlines([c + 0.5 for c in range(low, high)], 0, last, color="0.6", linewidth=0.9, linestyle=":")
    before = ax.add_collection(LineCollection([], colors="0.85", linewidths=0.8))
    past = ax.add_collection(LineCollection([], linewidths=1.3))
    (stay,) = ax.plot([], [], "o", color=QUANTIZED, markersize=4, label="rounded as at first")
    (moved,) = ax.plot([], [], "s", color=ERROR, markersize=4, label="rounded elsewhere")
    (front,) = ax.plot([0, 0], [low - 1, high + 1], color="black", linewidth=0.8)
    ax.set(xlim=(-0.02 * last, 1.02 * last), ylim=(min(places.min(), low) - 0.2, max(places.max(), high) + 0.9))
    ax.set(ylabel="weight, in steps of its grid", yticks=range(low, high + 1))
    ax.set_title("16 restless weights of the row (solid: grid points, dotted: thresholds)", fontsize="medium")
    ax.legend(loc="upper center", ncols=2, fontsize="small", frameon=False)
    return before, past, stay, moved, front


def _draw_curve(ax, values, ylabel: str, xlabel: str):
    """A still curve; returns the dot that moves along it."""
    ax.plot(values, color="0.35", linewidth=1.2)
    (dot,) = ax.plot([0], [values[0]], "o", color=ERROR, markersize=7)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.12 * max(values) + 1e-9))
    return dot


def _shares(away: np.ndarray) -> np.ndarray:
    """Percent of the weights in each tenth of a cell; clamped ones count at its ends."""
    return 100 * np.histogram(away.clip(-0.5, 0.5), _BINS)[0] / away.size


def _draw_cells(ax, away: np.ndarray):
    """Where weights stand between two thresholds: at first, still, and now."""
    bars = ax.stairs(_shares(away[0]), _BINS, fill=True, color=FLOAT, label="now")
    ax.stairs(_shares(away[0]), _BINS, color="black", linewidth=1.2, label="at first")
    ax.axvline(0, color="0.3", linewidth=0.8, linestyle="--")
    most = max(_shares(step).max() for step in away)
    ax.set(xlabel="from the grid point, in steps", ylabel="weights, %", ylim=(0, 1.45 * most))
    ax.legend(loc="upper right", fontsize="small", ncols=2, handlelength=1.2)
    return bars
