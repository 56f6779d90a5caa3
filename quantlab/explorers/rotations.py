"""Sliders on rotations: two numbers turned by an angle, and a layer's inputs turned in blocks of channels."""

import math

import ipywidgets as widgets
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from quantlab.arguments import check_number, check_real
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import evenly
from quantlab.hadamard import hadamard_transform, transform
from quantlab.plots import FLOAT, QUANTIZED
from quantlab.rotations import rounding_error

_ANGLES = range(-90, 91)
_BITS = (3, 4, 6, 8)
_PICTURE = (64, 192)  # tokens and channels that a heat map can show; neighbours show their largest


def explore_angle(x: float = 10.0, y: float = 0.6, *, bits: int = 4, angle: int = 0) -> Explorer:
    """Turn two numbers: where they lie, the grid that their largest sets, and the error of rounding at every angle.

    Raises: ValueError if x and y are not finite numbers, or both are 0.
    """
    point = torch.tensor([check_number(x, "x"), check_number(y, "y")], dtype=torch.float64)
    if not point.any():
        raise ValueError("x and y must not both be 0: there is nothing to turn")
    turned = torch.stack([_turn(point, a) for a in _ANGLES])
    errors = {b: np.array([_error(row, b) for row in turned]) for b in _BITS}
    picture = _AnglePicture(point, errors)
    controls = {
        "angle": widgets.IntSlider(angle, min=-90, max=90, description="angle"),
        "bits": widgets.SelectionSlider(options=_BITS, value=bits, description="bits"),
    }

    def update(angle, bits) -> str:
        now, error = turned[_ANGLES.index(angle)], errors[bits]
        rounded, scale = _rounded(now, bits)
        picture.show(now, rounded, scale, error, angle, bits)
        numbers = ", ".join(f"{v:.2f}" for v in now.tolist()), ", ".join(f"{v:.2f}" for v in rounded.tolist())
        return (
            f"turned by {angle} degrees: ({numbers[0]}), rounded to ({numbers[1]}), a step is {scale:.3f}\n"
            f"largest over length {now.abs().max() / now.norm():.3f}   "
            f"relative error {error[_ANGLES.index(angle)]:.2e}, "
            f"mean over all angles {error.mean():.2e}"
        )

    return bind(controls, picture.left, picture.moving, update)


def _turn(point: Tensor, degrees: int) -> Tensor:
    """The row vector point R."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return point @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64)


def _rounded(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """x on the symmetric grid that its largest value sets, and the step."""
    most = 2 ** (bits - 1)
    scale = x.abs().max() / (most - 0.5)
    return scale * torch.round(x / scale).clamp(-most, most - 1), scale.item()


def _error(x: Tensor, bits: int) -> float:
    return max(rounding_error(x[None], bits=bits).item(), 1e-9)


class _AnglePicture:
    """Left the plane with the grid; right the error over the angle."""

    def __init__(self, point: Tensor, errors: dict):
        fig, (self.left, self.right) = figure(columns=2)
        fig.subplots_adjust(left=0.08, right=0.98, top=0.9, bottom=0.16, wspace=0.25)
        reach = 1.15 * point.norm().item()
        circle = np.linspace(0, 2 * np.pi, 181)
        radius = point.norm().item()
        self.left.plot(radius * np.cos(circle), radius * np.sin(circle), color="0.8", linewidth=0.8)
        self.grid = self.left.plot([], [], ".", color="0.75", markersize=3)[0]
        self.arrow = self.left.plot([], [], "-", color=FLOAT, linewidth=2)[0]
        self.here = self.left.plot([], [], "o", color="black", markersize=6, label="the two numbers")[0]
        self.there = self.left.plot([], [], "s", color=QUANTIZED, markersize=6, label="rounded")[0]
        self.left.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="first", ylabel="second")
        self.left.set_title("dot: the two numbers, square: rounded", fontsize="small")
        _draw_still(self.right, _ANGLES, errors)
        self.curve = self.right.plot(_ANGLES, [1e-3] * len(_ANGLES), color=QUANTIZED, linewidth=1.5)[0]
        self.ring = self.right.plot([], [], "o", color="black", markersize=6)[0]
        every = np.concatenate(list(errors.values()))
        low = max(np.quantile(every, 0.02), 1e-7) / 2
        self.right.set(yscale="log", ylim=(low, every.max() * 3), xlabel="angle, degrees", xticks=range(-90, 91, 45))
        self.right.set(ylabel="relative error")
        self.moving = [self.grid, self.arrow, self.there, self.here, self.curve, self.ring]

    def show(self, now: Tensor, rounded: Tensor, scale: float, error: np.ndarray, angle: int, bits: int) -> None:
        steps = scale * np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) if bits <= 6 else np.array([])
        self.grid.set_data(np.repeat(steps, len(steps)), np.tile(steps, len(steps)))
        self.arrow.set_data([0, now[0]], [0, now[1]])
        self.here.set_data([now[0]], [now[1]])
        self.there.set_data([rounded[0]], [rounded[1]])
        self.curve.set_ydata(error)
        self.ring.set_data([angle], [error[_ANGLES.index(angle)]])


def explore_blocks(x: Tensor, *, block: int = 1, bits: int = 4) -> Explorer:
    """Turn a layer's inputs by Hadamard matrices over blocks of 1, 2, 4 ... channels: before, after, and the errors.

    x (tokens, channels); at most 256 tokens are used. Each token is rounded on a grid of its own.
    Raises: ValueError if x is no matrix of finite numbers.
    """
    x = check_real(x)
    if x.ndim != 2:
        raise ValueError(f"x must be (tokens, channels), got {tuple(x.shape)}")
    x = evenly(x.detach().float().cpu(), 256)
    turned = {size: _in_blocks(x, size) for size in block_sizes(x.shape[1])}
    errors = {b: [max(rounding_error(y, bits=b).item(), 1e-9) for y in turned.values()] for b in _BITS}
    picture = _BlockPicture(x, list(turned), errors)
    controls = {
        "block": widgets.SelectionSlider(options=list(turned), value=block, description="block"),
        "bits": widgets.SelectionSlider(options=_BITS, value=bits, description="bits"),
    }

    def update(block, bits) -> str:
        number, after = list(turned).index(block), turned[block]
        picture.show(after, errors[bits], number)
        unevenness = [(y.abs().amax(1) / y.square().mean(1).sqrt().clamp(min=1e-30)).mean().item() for y in (x, after)]
        return (
            f"blocks of {block}: a token's largest value over its root mean square, on average {unevenness[0]:.1f} -> "
            f"{unevenness[1]:.1f}\n{bits} bits, a scale for each token: relative error {errors[bits][0]:.2e} -> "
            f"{errors[bits][number]:.2e}"
        )

    return bind(controls, picture.ax, picture.moving, update, seldom=picture.seldom, of="block")


def block_sizes(width: int) -> list[int]:
    """The divisors of width for which there is a Hadamard matrix."""
    sizes = []
    for size in range(1, width + 1):
        if width % size == 0 and (size in (1, 2) or size % 4 == 0):
            try:
                transform(torch.zeros(size))
            except ValueError:
                continue
            sizes.append(size)
    return sizes


def _in_blocks(x: Tensor, size: int) -> Tensor:
    return hadamard_transform(x.unflatten(1, (-1, size))).flatten(1)


class _BlockPicture:
    """Heat maps of |x| before and after, the largest of each channel, and the error over the size of a block."""

    def __init__(self, x: Tensor, sizes: list[int], errors: dict):
        fig, axes = figure(columns=2, rows=2, height=4.8)
        fig.subplots_adjust(left=0.08, right=0.98, top=0.93, bottom=0.11, wspace=0.22, hspace=0.42)
        self.ax = axes[0, 0]
        self.images = [_draw_map(ax, x, title) for ax, title in zip(axes[0], ("before", "after"), strict=True)]
        self.peaks = _draw_peaks(axes[1, 0], x)
        self.curve, self.here = _draw_errors(axes[1, 1], sizes, errors)
        self.moving, self.seldom = [self.curve, self.here], [self.images[1], self.peaks]

    def show(self, after: Tensor, errors: list[float], number: int) -> None:
        self.images[1].set_data(_levels(after))
        self.peaks.set_ydata(after.abs().amax(0).numpy())
        self.curve.set_ydata(errors)
        self.here.set_data([number], [errors[number]])


def _levels(x: Tensor) -> np.ndarray:
    """log10 |x|, neighbours by their largest."""
    size = [min(side, most) for side, most in zip(x.shape, _PICTURE, strict=True)]
    return F.adaptive_max_pool2d(x.abs()[None], size)[0].clamp(min=1e-6).log10().numpy()


def _draw_map(ax: Axes, x: Tensor, title: str):
    top = _levels(x).max()
    image = ax.imshow(_levels(x), aspect="auto", cmap="viridis", interpolation="nearest", vmin=top - 3, vmax=top,
                      extent=(0, x.shape[1], x.shape[0], 0))  # fmt: skip
    ax.set(title=f"|x| {title}", xlabel="channel", ylabel="token")
    ax.figure.colorbar(image, ax=ax, label="log10 |x|", pad=0.02)
    return image


def _draw_peaks(ax: Axes, x: Tensor):
    peaks = x.abs().amax(0).clamp(min=1e-6).numpy()
    ax.plot(peaks, color=FLOAT, linewidth=0.9, label="before")
    line = ax.plot(peaks, color=QUANTIZED, linewidth=1.2, label="after")[0]
    ax.set(yscale="log", ylim=(peaks.min() / 3, peaks.max() * 8), xlabel="channel", ylabel="largest |x|")
    ax.legend(loc="upper right", ncols=2, fontsize="x-small")
    return line


def _draw_errors(ax: Axes, sizes: list[int], errors: dict):
    _draw_still(ax, range(len(sizes)), errors)
    curve = ax.plot(range(len(sizes)), [1e-3] * len(sizes), "s-", color=QUANTIZED, markersize=4)[0]
    here = ax.plot([], [], "o", color="black", markersize=9, fillstyle="none", markeredgewidth=2)[0]
    every = [e for row in errors.values() for e in row]
    ax.set(yscale="log", ylim=(min(every) / 3, max(every) * 3), xlabel="channels in a block", ylabel="relative error")
    ax.set(xticks=range(len(sizes)))
    ax.set_xticklabels([str(size) for size in sizes], fontsize="x-small", rotation=90 if len(sizes) > 12 else 0)
    return curve, here


def _draw_still(ax: Axes, places, errors: dict) -> None:
    """The errors at every number of bits, in grey, named at their right ends."""
    for bits, row in errors.items():
        ax.plot(places, row, color="0.75", linewidth=1)
        ax.annotate(f"{bits} bits", (places[-1], row[-1]), (7, 0), textcoords="offset points", va="center",
                    fontsize="x-small")  # fmt: skip
    span = places[-1] - places[0]
    ax.set_xlim(places[0] - 0.04 * span - 0.1, places[-1] + 0.17 * span + 0.1)  # room for the names
