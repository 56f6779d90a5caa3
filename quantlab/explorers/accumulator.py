"""A slider on the accumulator of an integer layer: which of its sums still fit, and what the others become."""

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from quantlab.affine import quantize
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.drawing import draw_uprights, upright
from quantlab.linear import Int8Linear, int_linear
from quantlab.plots import ERROR, FLOAT, QUANTIZED

_TOKENS = 64  # multiplied while dragging; more would not change the picture
_DOTS = 4000  # sums that the right picture shows


def explore_accumulator(layer: Int8Linear, x: Tensor, *, bits: int = 32, at_the_end: str = "wraps") -> Explorer:
    """Give the sums of an integer layer an accumulator of so many bits: which still fit, and what the others become.

    x (tokens, in), of which at most 64 evenly picked are used; one zero point for all of x.
    """
    x = x[torch.linspace(0, len(x) - 1, min(_TOKENS, len(x))).long()]
    qp = layer.input_qparams(x)
    codes, zero = quantize(x, qp), int(qp.zero_point.flatten()[0])
    sums = int_linear(codes, zero, layer.codes).long()
    largest = max(int((codes - zero).abs().max()) * int(layer.codes.int().abs().max()), 1)
    picture = _Picture(sums)
    controls = {
        "bits": widgets.IntSlider(bits, min=8, max=32, description="bits"),
        "at_the_end": widgets.Dropdown(options=["wraps", "saturates"], value=at_the_end, description="at the end"),
    }

    def update(bits, at_the_end) -> str:
        stored = _stored(sums, bits, at_the_end)
        picture.show(stored, bits)
        return _describe(sums, stored, bits, largest, layer)

    return bind(controls, picture.left, picture.moving, update)


def _stored(sums: Tensor, bits: int, at_the_end: str) -> Tensor:
    """The sums as an accumulator of so many bits keeps them."""
    half = 2 ** (bits - 1)
    return sums.clamp(-half, half - 1) if at_the_end == "saturates" else (sums + half) % (2 * half) - half


def _describe(sums: Tensor, stored: Tensor, bits: int, largest: int, layer: Int8Linear) -> str:
    half = 2 ** (bits - 1)
    wrong = ((stored - sums) * layer.weight_scale).norm() / (sums * layer.weight_scale).norm().clamp(1e-30)
    return (
        f"{bits} bits hold {-half:,} … {half - 1:,}   lost: {(stored != sums).double().mean().item():.3%} of the "
        f"sums   relative error of the layer's output from that: {wrong.item():.2e}\n"
        f"room for {(half - 1) // largest:,} products of any size (the largest here: {largest:,}); this layer adds "
        f"{layer.in_features:,}, and its largest sum is {max(sums.abs().max().item(), 1):,}"
    )


class _Picture:
    """Left, how many sums lie where, exactly and as stored; right, what becomes of each."""

    def __init__(self, sums: Tensor):
        fig, (self.left, right) = figure(columns=2)
        reach = 1.05 * max(sums.abs().max().item(), 1)
        self.edges = np.linspace(-reach, reach, 161)
        self._draw_counts(sums)
        some = torch.linspace(0, sums.numel() - 1, min(_DOTS, sums.numel()), dtype=torch.float64).long()
        self.some, self.exact = some, sums.flatten()[some].numpy()
        right.plot([-reach, reach], [-reach, reach], color="0.5", linewidth=0.8)
        (self.dots,) = right.plot([], [], ".", color=QUANTIZED, markersize=2)
        right.set(xlabel="exact sum", ylabel="as stored", xlim=(-reach, reach), ylim=(-reach, reach))
        for axis in (self.left.xaxis, right.xaxis, right.yaxis):
            axis.set_major_formatter(lambda value, _place: f"{value / 1000:g}k" if value else "0")
        fig.subplots_adjust(left=0.08, right=0.98, top=0.96, bottom=0.16, wspace=0.26)
        self.moving = [self.counts, self.limits, self.dots]

    def _draw_counts(self, sums: Tensor) -> None:
        ax, edges = self.left, self.edges
        ax.hist(sums.flatten().numpy(), bins=edges, color=FLOAT, log=True, label="exact sums")
        self.counts = ax.stairs(np.ones(160), edges, color=QUANTIZED, linewidth=1.2, label="as stored")
        self.limits = draw_uprights(ax, colors=ERROR, linestyles="--")
        ax.set(xlabel="sum of K products", ylabel="count (log)", xlim=(edges[0], edges[-1]))
        ax.set_ylim(0.6, 30 * ax.get_ylim()[1])
        ax.legend(loc="upper right", fontsize="small", ncols=2)

    def show(self, stored: Tensor, bits: int) -> None:
        half = 2 ** (bits - 1)
        self.counts.set_data(np.maximum(np.histogram(stored.numpy(), bins=self.edges)[0], 0.1))
        self.limits.set_segments(upright((-half, half - 1)) if half < self.edges[-1] else [])
        self.dots.set_data(self.exact, stored.flatten()[self.some].numpy())
