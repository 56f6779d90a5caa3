"""Sliders on super-blocks: what small blocks and scales of few bits buy, beside NF4 and GPTQ."""

from functools import cache
from typing import NamedTuple

import ipywidgets as widgets
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from quantlab.codebook import nf4_levels, quantize_codebook
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import check_layer, relative_error, times
from quantlab.gptq import gptq_quantize
from quantlab.granularity import PerGroup, quantize_tensor
from quantlab.hessian import Hessian
from quantlab.plots import ERROR, FLOAT, QUANTIZED
from quantlab.superblocks import round_in_superblocks

BLOCKS, SCALE_BITS, SUPER = (8, 16, 32, 64, 128, 256), (2, 3, 4, 5, 6, 7, 8, 16), 256
GROUPS = (128, 64, 32, 16)  # of GPTQ, plain rounding and NF4


class _Point(NamedTuple):
    """One way of storing the layer."""

    bits: float  # true bits per weight
    weight: float  # relative errors, squared
    output: float


def explore_super_blocks(weight: Tensor, x: Tensor, *, block_size: int = 32, scale_bits: int = 6) -> Explorer:
    """Drag the size of small blocks and the bits of their scales: errors of weight and output against true bits.

    weight (out, in), in a multiple of 256; x (tokens, in), the layer's input. Codes have 4 bits. The curves beside are
    plain rounding, NF4 and GPTQ, each with float32 scales for groups of 128, 64, 32, 16.

    Raises: ValueError if weight is no matrix of finite reals, x has another number of columns, or in is no multiple.
    """
    weight, x = check_layer(weight, x)
    hessian, picture = Hessian(weight.shape[1]).add(x), _Picture()

    @cache
    def point(block, bits, offset) -> _Point:
        rounded = round_in_superblocks(weight, block_size=block, scale_bits=bits, super_size=SUPER, offset=offset)
        return _measured(weight, rounded.values, rounded.bits_per_element, hessian)

    point(block_size, scale_bits, True)  # first, since it says what weights do not fit
    picture.curves(_references(weight, hessian))

    def update(block, scale, offset) -> str:
        now, plain = point(block, scale, offset), point(block, 16, offset)
        picture.show(now, [point(block, bits, offset) for bits in SCALE_BITS])
        return _describe(now, plain, block, scale, offset)

    return bind(_controls(block_size, scale_bits), picture.left, picture.moving, update)


def _controls(block: int, scale: int) -> dict:
    bits = [(f"{b} bits" if b < 16 else "float16", b) for b in SCALE_BITS]
    return {
        "block": widgets.SelectionSlider(options=BLOCKS, value=block, description="small block"),
        "scale": widgets.SelectionSlider(options=bits, value=scale, description="its scale"),
        "offset": widgets.Checkbox(True, description="an offset too"),
    }


def _measured(weight: Tensor, back: Tensor, bits: float, hessian: Hessian) -> _Point:
    return _Point(bits, relative_error(weight, back), hessian.output_error(weight, back))


def _references(weight: Tensor, hessian: Hessian) -> dict[str, list[_Point]]:
    """The curves that stay: one point for each size of a group."""

    def curve(quantize) -> list[_Point]:
        made = [quantize(size) for size in GROUPS if weight.shape[1] % size == 0]
        return [_measured(weight, q.dequantize(), q.bits_per_element, hessian) for q in made]

    return {
        "plain": curve(lambda n: quantize_tensor(weight, bits=4, granularity=PerGroup(n), symmetric=False)),
        "NF4": curve(lambda n: quantize_codebook(weight, nf4_levels(), block_size=n)),
        "GPTQ": curve(lambda n: gptq_quantize(weight, hessian, bits=4, group_size=n, symmetric=False)),
    }


def _describe(now: _Point, plain: _Point, block: int, scale: int, offset: bool) -> str:
    parts = "scale and offset" if offset else "scale"
    stored = "float16" if scale == 16 else f"{scale} bits, one float16 for {SUPER} weights"
    return (
        f"4 bits, blocks of {block}, {parts} of {stored}: {now.bits:.3f} true bits\n"
        f"weight error {now.weight:.2e} ({times(now.weight, plain.weight, 3)} that of float16 scales, which need "
        f"{plain.bits:.3f} bits)   output error {now.output:.2e}"
    )


class _Picture:
    """Left, the weight's error against true bits; right, the output's. The dot is where the sliders stand."""

    def __init__(self):
        fig, (self.left, self.right) = figure(columns=2, height=3.6)
        self.trails, self.dots = [], []
        for ax, title in ((self.left, "error of the weight"), (self.right, "error of the output")):
            trail, dot = _moving(ax)
            self.trails.append(trail)
            self.dots.append(dot)
            ax.set(xlabel="true bits per weight", title=title, xlim=(3.9, 6.6), yscale="log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        self.left.set_ylabel("relative squared error")
        fig.subplots_adjust(left=0.1, right=0.98, top=0.9, bottom=0.15, wspace=0.2)
        self.moving = [*self.trails, *self.dots]

    def curves(self, references: dict[str, list[_Point]]) -> None:
        styles = {"plain": (ERROR, "s"), "NF4": (FLOAT, "^"), "GPTQ": ("black", "D")}
        for name, points in references.items():
            color, marker = styles[name]
            for ax, kind in ((self.left, "weight"), (self.right, "output")):
                heights = [getattr(p, kind) for p in points]
                ax.plot([p.bits for p in points], heights, marker=marker, color=color, markersize=4, label=name)
        for ax, kind in ((self.left, "weight"), (self.right, "output")):
            every = [getattr(p, kind) for points in references.values() for p in points]
            ax.set_ylim(max(min(every) / 2, 1e-9), max(*every, 1e-8) * 3)
        self.right.legend(loc="upper right", fontsize="small")

    def show(self, now: _Point, trail: list[_Point]) -> None:
        for line, dot, kind in zip(self.trails, self.dots, ("weight", "output"), strict=True):
            line.set_data([p.bits for p in trail], [getattr(p, kind) for p in trail])
            dot.set_data([now.bits], [getattr(now, kind)])


def _moving(ax: Axes) -> tuple:
    (trail,) = ax.plot([], [], color=QUANTIZED, linewidth=1, label="super-blocks")
    (dot,) = ax.plot([], [], "o", color=QUANTIZED, markersize=10)
    return trail, dot
