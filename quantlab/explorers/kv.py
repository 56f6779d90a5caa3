"""Sliders on the cache of keys and values: what rounding leaves of them, and what attention and the model see of it."""

from collections.abc import Mapping

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from torch import Tensor

from quantlab.arguments import check_real
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import relative_error
from quantlab.explorers.drawing import draw_ring
from quantlab.kv_codes import quantize_kv
from quantlab.plots import FLOAT, QUANTIZED

_CHUNK = 32


def explore_kv(keys: Tensor, values: Tensor, *, bits: int = 2) -> Explorer:
    """The keys and values of one head, tokens down and channels across, and how far off a few bits put each number.

    Shapes: keys and values (tokens, channels), at least 32 tokens; whole chunks of 32 are shown, six at most.
    """
    both = {"keys": _chunks(keys, "keys"), "values": _chunks(values, "values")}
    controls = {
        "what": widgets.ToggleButtons(options=list(both), value="keys", description="show"),
        "per": widgets.ToggleButtons(options=["channel", "token"], value="token", description="a range per"),
        "bits": widgets.IntSlider(bits, 2, 8, description="bits"),
    }
    fig, (left, right) = figure(columns=2, height=3.6)
    fig.subplots_adjust(left=0.07, right=0.94, top=0.9, bottom=0.14, wspace=0.34)
    images = []
    for ax, cmap, most in ((left, "RdBu_r", 1.0), (right, "PuOr", 0.3)):
        blank = np.zeros(both["keys"].shape)
        images.append(ax.imshow(blank, aspect="auto", interpolation="nearest", cmap=cmap, vmin=-most, vmax=most))
        fig.colorbar(images[-1], ax=ax, fraction=0.05, pad=0.03, ticks=[-most, 0, most])
        ax.set(xlabel="channel", ylabel="token")
    left.set(title="each number ÷ the largest")
    right.set(title="rounding error ÷ the largest")

    def update(what, per, bits) -> str:
        x = both[what]
        rounded = quantize_kv(x[None, None], bits=bits, per=per)
        error, largest = rounded.dequantize()[0, 0] - x, x.abs().max()
        for image, part in zip(images, (x, error), strict=True):
            image.set_data((part / largest).numpy())
        lost, stored = relative_error(x, x + error), 8 * rounded.nbytes / x.numel()
        return (
            f"{what}, {bits} bits, a range per {per} for each 32: squared error {lost:.2%} of their squares,  "
            f"largest error {error.abs().max() / largest:.1%} of the largest number,  {stored:.2f} true bits a number"
        )

    numbers, errors = images
    return bind(controls, left, [errors], update, seldom=[numbers], of="what")


def explore_cache(query: Tensor, keys: Tensor, kl: Mapping, *, recent: int = 32) -> Explorer:
    """Drag the bits of the cache: one head's attention over the tokens, before and after, and the KL of the model.

    query (channels,), keys (tokens, channels) of one head; kl {(key bits, value bits, sinks): KL}, measured before.
    """
    query, keys = check_real(query, "query").detach().float(), check_real(keys, "keys").detach().float()
    options = [sorted({setting[i] for setting in kl}, reverse=i < 2) for i in range(3)]
    starts = (("key bits", -1), ("value bits", 0), ("first in float", 0))
    controls = {
        name: widgets.SelectionSlider(options=choices, value=choices[start], description=name)
        for (name, start), choices in zip(starts, options, strict=True)
    }
    for control in controls.values():
        control.style.description_width = "initial"
    before = _attention(query, keys)
    picture = _CachePicture(before, kl, options)

    def update(**values) -> str:
        key_bits, value_bits, sinks = values.values()
        after = _attention(query, _stored(keys, key_bits, recent, sinks))
        picture.show(after, key_bits, value_bits, sinks)
        moved = (after - before).abs().sum().item() / 2
        return (
            f"keys {key_bits} bits, values {value_bits} bits, {sinks} first tokens in float: {moved:.1%} of this row's "
            f"attention goes elsewhere,  KL {kl[key_bits, value_bits, sinks]:.4f} (measured on the whole model)"
        )

    return bind(controls, picture.ax, picture.moving, update, seldom=picture.seldom, of="first in float")


class _CachePicture:
    """Left, the attention of one token before and after; right, the KL of every pair of bits."""

    def __init__(self, before: Tensor, kl: Mapping, options: list):
        fig, (self.ax, right) = figure(columns=2, height=3.4, gridspec_kw={"width_ratios": [5, 3]})
        fig.subplots_adjust(left=0.08, right=0.98, top=0.9, bottom=0.15, wspace=0.22)
        self.kl, self.options = kl, options
        self.sinks = None  # of the table that is shown: its fifty numbers take longer than all else
        self.line = _draw_attention(self.ax, before)
        self.table, self.digits = _draw_kl(right, kl, options)
        self.ring = draw_ring(right, markersize=26)
        self.moving, self.seldom = [self.ring, self.line], [self.table, *self.digits.values()]

    def show(self, after: Tensor, key_bits: int, value_bits: int, sinks: int) -> None:
        self.line.set_ydata(after.numpy())
        if sinks != self.sinks:
            self._show_table(_table(self.kl, self.options, sinks))
            self.sinks = sinks
        self.ring.set_data([self.options[1].index(value_bits)], [self.options[0].index(key_bits)])

    def _show_table(self, cells: np.ndarray) -> None:
        self.table.set_data(cells)
        for (r, c), digit in self.digits.items():
            digit.set_text(f"{cells[r, c]:.2g}" if np.isfinite(cells[r, c]) else "")
            digit.set_color("white" if self.table.norm(max(cells[r, c], self.table.norm.vmin)) > 0.6 else "black")


def _draw_attention(ax: Axes, before: Tensor):
    """The row in float, and the line that moves over it."""
    (line,) = ax.plot(before.numpy(), color=QUANTIZED, linewidth=1.2, label="keys in few bits", zorder=3)
    ax.plot(before.numpy(), color=FLOAT, linewidth=3, label="in float")
    ax.set(yscale="log", ylim=(1e-5, 1.5), xlabel="token looked at", ylabel="attention of the last token")
    ax.legend(fontsize="small", loc="upper center", ncols=2)
    return line


def _draw_kl(ax: Axes, kl: Mapping, options: list) -> tuple:
    """The heat map over key bits and value bits, and a text for each cell."""
    cells, (rows, columns, _) = _table(kl, options, options[2][0]), options
    table = ax.imshow(cells, cmap="Blues", aspect="auto", norm=_norm(kl), interpolation="nearest")
    ax.set(xlabel="value bits", ylabel="key bits", title="KL to the float cache")
    ax.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=rows)
    style = {"ha": "center", "va": "center", "fontsize": "x-small"}
    return table, {(r, c): ax.text(c, r, "", **style) for r in range(len(rows)) for c in range(len(columns))}


def _chunks(x: Tensor, name: str) -> Tensor:
    """Whole chunks of a head's tokens, at most six."""
    x = check_real(x, name).detach().float()
    if x.ndim != 2 or len(x) < _CHUNK:
        raise ValueError(f"{name} must be (tokens, channels) with at least {_CHUNK} tokens, got {tuple(x.shape)}")
    return x[: min(len(x) // _CHUNK, 6) * _CHUNK]


def _attention(query: Tensor, keys: Tensor) -> Tensor:
    return torch.softmax(keys @ query / len(query) ** 0.5, 0)


def _stored(keys: Tensor, bits: int, recent: int, sinks: int) -> Tensor:
    """The keys as a KVCache gives them back."""
    stop = sinks + max(0, len(keys) - sinks - recent) // _CHUNK * _CHUNK
    if bits == 16 or stop == sinks:
        return keys
    middle = quantize_kv(keys[None, None, sinks:stop], bits=bits, per="channel").dequantize()[0, 0]
    return torch.cat([keys[:sinks], middle, keys[stop:]])


def _table(kl: Mapping, options: list, sinks: int) -> np.ndarray:
    return np.array([[kl.get((k, v, sinks), np.nan) for v in options[1]] for k in options[0]])


def _norm(kl: Mapping) -> LogNorm:
    """From the smallest KL above 0 that is worth a colour to the largest."""
    high = max(max(kl.values()), 1e-9)
    return LogNorm(max(min([v for v in kl.values() if v > 0], default=high), high / 1e4) * 0.999, high, clip=True)
