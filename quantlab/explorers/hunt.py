"""One slider for each room of the bug hunt: what a program does, beside what it promises."""

from collections.abc import Callable
from dataclasses import dataclass, field

import ipywidgets as widgets
import torch
from torch import Tensor

from quantlab.arguments import check_choice
from quantlab.codebook import nf4_levels, quantize_codebook
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.hunt.playing import CASES
from quantlab.plots import FLOAT, QUANTIZED

Curve = tuple[Tensor, Tensor, Tensor]  # places, what the program gives, what it promises


@dataclass(frozen=True)
class View:
    """What a room's explorer draws: a program's curve at a value of its slider."""

    name: str  # of the program
    slider: tuple[str, float, float, float, float]  # what it changes; from, to, step, at first
    curve: Callable[[Callable, float], Curve]
    axes: dict = field(default_factory=dict)  # labels, limits and scales


def explore_hunt(room: str) -> Explorer:
    """Drag the input of one program of a room, and see where it leaves what it promises (the grey line).

    Raises: ValueError if there is no such room.
    """
    view = VIEWS[check_choice(room, "room", VIEWS)]
    case, (title, low, high, step, start) = CASES[view.name], view.slider
    fig, ax = figure(height=3.2)
    (promised,) = ax.plot([], [], color=FLOAT, linewidth=5, label="promised")
    (given,) = ax.plot([], [], color=QUANTIZED, linewidth=1.6, label=f"program {view.name}")
    ax.set(**view.axes)
    ax.legend(loc="upper left", fontsize="small")
    fig.subplots_adjust(left=0.12, right=0.97, top=0.96, bottom=0.16)
    slider = widgets.FloatSlider(start, min=low, max=high, step=step, description=title)
    slider.style.description_width = "initial"

    def update(value) -> str:
        x, y, wanted = view.curve(case.program, value)
        promised.set_data(x, wanted)
        given.set_data(x, y)
        off = (y - wanted).abs().max().item()
        return f"{title} {value:g}: the program is off by up to {off:,.{0 if off > 99 else 2}f}"

    return bind({"value": slider}, ax, [promised, given], update)


def _ranges(program: Callable, low: float) -> Curve:
    """Reals of low..low + 10, to their codes and back."""
    x = torch.linspace(low, low + 10, 301)
    scale, zero_point = program(low, low + 10)
    codes = (torch.round(x / scale) + zero_point).clamp(0, 255)
    return x, (codes - zero_point) * scale, x


def _codebooks(program: Callable, outlier: float) -> Curve:
    """Weights of one block, rounded, while a weight of *another* block grows."""
    x = torch.linspace(-1, 1, 64)
    other = torch.zeros(64)
    other[0] = outlier
    return x, program(torch.stack([x, other]))[0], quantize_codebook(x, nf4_levels()).dequantize()


def _integers(program: Callable, code: float) -> Curve:
    """Two products of the same weight code and activation code, added."""
    w = torch.arange(-128, 128)
    sums = [program(torch.full((2,), int(code)), torch.full((2,), int(value))) for value in w]
    return w, torch.tensor(sums), 2 * int(code) * w


def _measuring(program: Callable, bandwidth: float) -> Curve:
    """How many times faster, by the number of tokens, where the layer takes the longer of two times."""
    tokens = 2 ** torch.arange(13)
    size, peak = 4096, 1e12
    moved = torch.stack([4 * tokens * size + weights * size * size for weights in (2.0, 0.5)]) / (bandwidth * 1e9)
    seconds = torch.maximum(moved, 2 * tokens * size * size / peak)
    given = torch.tensor([program(int(count), size, size, bandwidth * 1e9, peak) for count in tokens])
    return tokens, given, seconds[0] / seconds[1]


def _training(program: Callable, scale: float) -> Curve:
    """The gradient of each value."""
    x = torch.linspace(-2, 2, 401, requires_grad=True)
    (gradient,) = torch.autograd.grad(program(x, scale).sum(), x)
    return x.detach(), gradient, (x.detach().abs() <= 7.5 * scale).float()


def _tools(program: Callable, largest: float) -> Curve:
    """Values of 0..largest, to their codes and back."""
    x = torch.linspace(0, largest, 256)
    scale, zero_point = program(x.view(16, 16))
    codes = (torch.round(x / scale) + zero_point).clamp(0, 255)
    return x, (codes - zero_point) * scale, x


VIEWS = {
    "ranges": View(
        "ranges.4", ("low", -8.0, 10.0, 0.5, 4.0), _ranges,
        {"xlabel": "real, low to low + 10", "ylabel": "back from its code", "xlim": (-9, 21), "ylim": (-9, 26)},
    ),
    "codebooks": View(
        "codebooks.2", ("outlier of another block", 0.5, 20.0, 0.5, 6.0), _codebooks,
        {"xlabel": "weight", "ylabel": "rounded to NF4", "xlim": (-1.1, 1.1), "ylim": (-2, 2)},
    ),
    "integers": View(
        "integers.3", ("activation code", 0, 255, 1, 200), _integers,
        {"xlabel": "weight code", "ylabel": "sum of two products", "xlim": (-135, 135), "ylim": (-70_000, 70_000)},
    ),
    "measuring": View(
        "measuring.8", ("GB/s", 5, 100, 5, 20), _measuring,
        {"xlabel": "tokens at once", "ylabel": "times faster", "xlim": (0.9, 5000), "ylim": (0, 6), "xscale": "log"},
    ),
    "training": View(
        "training.2", ("scale", 0.05, 0.3, 0.01, 0.15), _training,
        {"xlabel": "x", "ylabel": "gradient", "xlim": (-2.1, 2.1), "ylim": (-0.2, 1.7)},
    ),
    "tools": View(
        "tools.1", ("largest value", 0.5, 255.0, 0.5, 200.0), _tools,
        {"xlabel": "value of an image", "ylabel": "back from its code", "xlim": (0, 260), "ylim": (-10, 270)},
    ),
}  # fmt: skip
