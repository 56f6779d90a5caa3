"""A slider through a model's layers: what each one reads, and whether it is tokens or channels that are loud."""

from collections.abc import Mapping
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from torch import Tensor

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.arguments import check_kind, check_real
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.data import check_layer, relative_error
from quantlab.plots import OTHER, QUANTIZED

ROWS, COLUMNS = 64, 96  # of the map; each field shows the largest of the values that fall into it
SHARES = {"one scale": (0, 1), "a scale a token": 1, "a scale a channel": 0}  # over which dimensions 8 bits share


class Loudness(NamedTuple):
    """Where the largest values of a layer's input are."""

    largest: float
    token: int
    channel: int
    of_tokens: float  # the loudest token's largest |x|, over the median token's
    of_channels: float  # likewise for channels


def loudness(x: Tensor) -> Loudness:
    """Is it tokens or channels that are loud? x (tokens, channels), of which at least one value is not 0.

    The largest |x| of every token, and of every channel: how far does the loudest stand above the median one? Where
    of_tokens is the larger, a scale a token helps; where of_channels is, it does not.

    >>> import torch
    >>> x = torch.ones(8, 4); x[3, 2] = 100
    >>> loudness(x)
    Loudness(largest=100.0, token=3, channel=2, of_tokens=100.0, of_channels=100.0)
    >>> x[:, 2] = 100    # loud in every token
    >>> loudness(x).of_tokens, loudness(x).of_channels
    (1.0, 100.0)
    """
    size = check_real(x, "x").abs()
    token, channel = divmod(int(size.flatten().argmax()), size.shape[1])
    tokens, channels = size.amax(1), size.amax(0)
    medians = [max(peaks.median().item(), 1e-30) for peaks in (tokens, channels)]
    return Loudness(size.max().item(), token, channel, size.max().item() / medians[0], size.max().item() / medians[1])


def explore_activations(layers: Mapping[str, tuple[Tensor, Tensor]]) -> Explorer:
    """Drag through layers: a map of |x| over tokens and channels, and the largest of each token and each channel.

    layers: {name: (weight, x)}, (out, in) and (tokens, in). The numbers say who is loud, and what 8 bits for x do to
    the layer's output if they share one scale, a scale a token, or (which no integer product can have) a channel.
    Everything is computed once, before the slider moves. Raises: ValueError if layers is empty.
    """
    if not check_kind(dict(layers), "layers", dict):
        raise ValueError("layers is empty")
    known = {name: _measure(weight, x) for name, (weight, x) in layers.items()}
    slider = widgets.SelectionSlider(options=list(known), description="layer", readout=False)  # the numbers name it
    picture = _Picture(list(known.values()))

    def update(layer) -> str:
        found = known[layer]
        picture.show(found)
        return _describe(layer, found)

    return bind({"layer": slider}, picture.map_axes, picture.moving, update)


class _Layer(NamedTuple):
    loud: Loudness
    map: np.ndarray
    tokens: np.ndarray  # the largest |x| of each
    channels: np.ndarray
    errors: dict[str, float]


def _measure(weight: Tensor, x: Tensor) -> _Layer:
    weight, x = check_layer(weight, x)
    y, size = x @ weight.T, x.abs()
    errors = {}
    for name, dims in SHARES.items():
        qp = choose_qparams(x.amin(dims, keepdim=True), x.amax(dims, keepdim=True), qmin=0, qmax=255)
        errors[name] = relative_error(y, fake_quantize(x, qp) @ weight.T)
    fields = F.adaptive_max_pool2d(size[None], (min(ROWS, len(x)), min(COLUMNS, x.shape[1])))[0]
    return _Layer(loudness(x), fields.numpy(), size.amax(1).numpy(), size.amax(0).numpy(), errors)


def _describe(name: str, found: _Layer) -> str:
    loud, errors = found.loud, found.errors
    return (
        f"{name}: largest |x| {loud.largest:.4g}, at token {loud.token}, channel {loud.channel}\n"
        f"loudest over median: tokens {loud.of_tokens:.3g}, channels {loud.of_channels:.3g}\n"
        "error at 8 bits: " + "   ".join(f"{key} {error:.1e}" for key, error in errors.items())
    )


class _Picture:
    """Left the map; right the largest |x| of each token, and of each channel, sorted by size."""

    def __init__(self, known: list[_Layer]):
        fig, (self.map_axes, ax) = figure(columns=2, height=3.2, gridspec_kw={"width_ratios": [3, 2]})
        high = max(k.map.max() for k in known) or 1.0
        low = min(k.map[k.map > 0].min(initial=high / 2) for k in known)
        norm = LogNorm(min(max(low, high / 1e5), high / 2), high)
        self.map = self.map_axes.imshow(known[0].map, aspect="auto", cmap="viridis", norm=norm, extent=(0, 1, 1, 0))
        self.map_axes.set(xticks=[], yticks=[], xlabel="channels", ylabel="tokens, the first on top", title="|x|")
        fig.colorbar(self.map, ax=self.map_axes, fraction=0.05, pad=0.02)
        (self.tokens,) = ax.plot([0, 1], [1, 1], color=QUANTIZED, label="of each token")
        (self.channels,) = ax.plot([0, 1], [1, 1], color=OTHER, linestyle="--", label="of each channel")
        ax.set(yscale="log", ylim=(max(low, high / 1e6) / 2, high * 2), xlim=(-0.01, 1), xlabel="rank, loudest first")
        ax.set_title("largest |x|")
        ax.set_xticks([0, 0.5, 1], ["first", "median", "last"])
        ax.legend(loc="upper right", fontsize="small")
        fig.subplots_adjust(left=0.05, right=0.98, top=0.9, bottom=0.15, wspace=0.22)
        self.moving = [self.map, self.tokens, self.channels]

    def show(self, found: _Layer) -> None:
        self.map.set_data(np.maximum(found.map, self.map.norm.vmin))
        for line, peaks in ((self.tokens, found.tokens), (self.channels, found.channels)):
            line.set_data(np.linspace(0, 1, len(peaks)), np.sort(peaks)[::-1])
