"""A slider on the rank of LoRA adapters: what each rank has learned and forgotten, and what its updates look like."""

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes

from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.drawing import draw_ring, plain_ticks
from quantlab.plots import ERROR, FLOAT, QUANTIZED


def explore_rank(results: list[dict], *, rank: int | None = None) -> Explorer:
    """Drag the rank: the new text's perplexity, the distance to the old model, and one layer's update.

    results has a dict for each trained model, rank 0 for the one without adapters: rank, perplexity and stderr on the
    new text, kl on the old one, trained (numbers), text (a sample), and updates {layer: (A (rank, in), B (out, rank))},
    scaled so that B A is what the adapter adds to the weight. rank: where the slider starts (the largest).

    Raises: ValueError if there are no results, two have one rank, or the largest rank has no updates.
    """
    results = sorted(results, key=lambda row: row["rank"])
    ranks = [row["rank"] for row in results]
    if not results or len(set(ranks)) < len(ranks) or not results[-1].get("updates"):
        raise ValueError(f"need one result for each rank, the largest with updates, got ranks {ranks}")
    layers = list(results[-1]["updates"])
    spectra = {
        (row["rank"], name): _singular_values(*row["updates"][name]) if row["rank"] else np.zeros(0)
        for row in results
        for name in layers
    }
    picture = _Picture(results, spectra)
    controls = {
        "rank": widgets.SelectionSlider(options=ranks, value=ranks[-1] if rank is None else rank, description="rank"),
        "layer": widgets.Dropdown(options=layers, value=layers[0], description="layer"),
    }

    def update(rank, layer) -> str:
        picture.show(rank, layer)
        row = results[ranks.index(rank)]
        return (
            f"rank {rank}: {row['trained']:,} trained numbers   new text: perplexity {row['perplexity']:.1f} ± "
            f"{row['stderr']:.1f}   old text: KL {row['kl']:.3f}\n"
            f"{layer}: {_describe(spectra[rank, layer])}\nit writes: {' '.join(row['text'].split())}"
        )

    return bind(controls, picture.left, picture.moving, update)


def _singular_values(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Those of B A, (rank,), from two small triangles instead of the whole matrix."""
    _, left = torch.linalg.qr(b.detach().double())
    _, right = torch.linalg.qr(a.detach().double().T)
    return torch.linalg.svdvals(left @ right.T).numpy()


def _describe(values: np.ndarray) -> str:
    if not len(values):
        return "no update"
    share = np.cumsum(values**2) / max((values**2).sum(), 1e-30)
    return (
        f"update of size {np.sqrt((values**2).sum()):.3g}; one direction holds {share[0]:.0%} of its square, "
        f"{int((share < 0.9 - 1e-9).sum()) + 1} of {len(values)} hold 90%"
    )


class _Picture:
    """Left, the spectrum of a layer's update; then the perplexity of the new text and the KL of the old, by rank."""

    def __init__(self, results: list[dict], spectra: dict):
        fig, (self.left, middle, right) = figure(columns=3, height=3.2, gridspec_kw={"width_ratios": [4, 3, 3]})
        self.results, self.spectra, self.ranks = results, spectra, [row["rank"] for row in results]
        self.stems, self.dots, self.widest = _draw_spectrum(self.left, self.ranks[-1], spectra)
        _draw_perplexity(middle, results)
        right.plot(range(len(results)), [row["kl"] for row in results], "s-", color=ERROR)
        right.set(title="old text: KL, nats", ylim=(0, 1.1 * max(row["kl"] for row in results) + 1e-6))
        for ax in (middle, right):
            ax.set(xticks=range(len(results)), xticklabels=self.ranks, xlabel="rank", xlim=(-0.5, len(results) - 0.5))
        self.rings = [draw_ring(ax, markersize=13) for ax in (middle, right)]
        fig.subplots_adjust(left=0.075, right=0.985, top=0.9, bottom=0.16, wspace=0.3)
        self.moving = [self.stems, self.dots, self.widest, *self.rings]

    def show(self, rank: int, layer: str) -> None:
        at, values = self.ranks.index(rank), self.spectra[rank, layer]
        self.stems.set_segments([[(i + 1, 0), (i + 1, value)] for i, value in enumerate(values)])
        self.dots.set_data(range(1, len(values) + 1), values)
        self.widest.set_ydata(self.spectra[self.ranks[-1], layer])
        for ring, name in zip(self.rings, ("perplexity", "kl"), strict=True):
            ring.set_data([at], [self.results[at][name]])


def _draw_spectrum(ax: Axes, widest_rank: int, spectra: dict) -> tuple:
    """Stems and dots of one update, and marks for that of the largest rank."""
    ranks = range(1, widest_rank + 1)
    (widest,) = ax.plot(ranks, [0] * widest_rank, "_", color=FLOAT, markersize=10, label=f"rank {widest_rank}")
    stems = ax.vlines([], 0, 1, colors=QUANTIZED, linewidth=2.5)
    (dots,) = ax.plot([], [], "o", color=QUANTIZED, markersize=5, label="this rank")
    highest = max(values.max(initial=0.0) for values in spectra.values())
    ax.set(xlim=(0.3, widest_rank + 0.7), ylim=(0, 1.15 * highest + 1e-9), xlabel="which, largest first")
    ax.set(title="singular values of the layer's update")
    ax.legend(loc="upper right", fontsize="small")
    return stems, dots, widest


def _draw_perplexity(ax: Axes, results: list[dict]) -> None:
    heights, errors = ([row[name] for row in results] for name in ("perplexity", "stderr"))
    ax.errorbar(range(len(results)), heights, yerr=errors, marker="o", color=QUANTIZED, capsize=3)
    ax.set(yscale="log", title="new text: perplexity", ylim=(min(heights) / 1.4, max(heights) * 1.4))
    plain_ticks(ax.yaxis)
