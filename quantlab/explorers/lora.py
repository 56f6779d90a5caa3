"""A slider on the rank of LoRA adapters: what each rank has learnt and forgotten, and what its updates look like."""

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter

from quantlab.explorers.base import Explorer, figure, tie
from quantlab.plots import ERROR, FLOAT, OTHER, QUANTIZED


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
    controls = {
        "rank": widgets.SelectionSlider(options=ranks, value=ranks[-1] if rank is None else rank, description="rank"),
        "layer": widgets.Dropdown(options=layers, value=layers[0], description="layer"),
    }
    fig, (left, middle, right) = figure(columns=3, height=3.2, gridspec_kw={"width_ratios": [4, 3, 3]})
    stems, dots, widest = _draw_spectrum(left, ranks[-1], spectra)
    places, heights = range(len(ranks)), [row["perplexity"] for row in results]
    middle.errorbar(places, heights, yerr=[r["stderr"] for r in results], marker="o", color=QUANTIZED, capsize=3)
    right.plot(places, [r["kl"] for r in results], "s-", color=ERROR)
    middle.set(yscale="log", title="new text: perplexity", ylim=(min(heights) / 1.4, max(heights) * 1.4))
    middle.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    middle.yaxis.set_major_formatter("{x:g}")
    middle.yaxis.set_minor_formatter(NullFormatter())
    right.set(title="old text: KL, nats", ylim=(0, 1.1 * max(r["kl"] for r in results) + 1e-6))
    marks = []
    for ax in (middle, right):
        ax.set(xticks=places, xticklabels=ranks, xlabel="rank", xlim=(-0.5, len(ranks) - 0.5))
        marks += ax.plot([0], [1], "o", markersize=13, fillstyle="none", markeredgewidth=2.5, color=OTHER)
    fig.subplots_adjust(left=0.075, right=0.985, top=0.9, bottom=0.16, wspace=0.3)

    def update(rank, layer) -> str:
        row, values, at = results[ranks.index(rank)], spectra[rank, layer], ranks.index(rank)
        stems.set_segments([[(i + 1, 0), (i + 1, v)] for i, v in enumerate(values)])
        dots.set_data(range(1, len(values) + 1), values)
        widest.set_ydata(spectra[ranks[-1], layer])
        for mark, value in zip(marks, (row["perplexity"], row["kl"]), strict=True):
            mark.set_data([at], [value])
        return (
            f"rank {rank}: {row['trained']:,} trained numbers   new text: perplexity {row['perplexity']:.1f} ± "
            f"{row['stderr']:.1f}   old text: KL {row['kl']:.3f}\n"
            f"{layer}: {_said(values)}\nit writes: {' '.join(row['text'].split())}"
        )

    return tie(controls, left, [stems, dots, widest, *marks], update)


def _draw_spectrum(ax, most: int, spectra: dict) -> tuple:
    (widest,) = ax.plot(range(1, most + 1), [0] * most, "_", color=FLOAT, markersize=10, label=f"rank {most}")
    stems = ax.vlines([], 0, 1, colors=QUANTIZED, linewidth=2.5)
    (dots,) = ax.plot([], [], "o", color=QUANTIZED, markersize=5, label="this rank")
    highest = max(values.max(initial=0.0) for values in spectra.values())
    ax.set(xlim=(0.3, most + 0.7), ylim=(0, 1.15 * highest + 1e-9), xlabel="which, largest first")
    ax.set(title="singular values of the layer's update")
    ax.legend(loc="upper right", fontsize="small")
    return stems, dots, widest


def _singular_values(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Those of B A, (rank,), from two small triangles instead of the whole matrix."""
    _, left = torch.linalg.qr(b.detach().double())
    _, right = torch.linalg.qr(a.detach().double().T)
    return torch.linalg.svdvals(left @ right.T).numpy()


def _said(values: np.ndarray) -> str:
    if not len(values):
        return "no update"
    share = np.cumsum(values**2) / max((values**2).sum(), 1e-30)
    return (
        f"update of size {np.sqrt((values**2).sum()):.3g}; one direction holds {share[0]:.0%} of its square, "
        f"{int((share < 0.9 - 1e-9).sum()) + 1} of {len(values)} hold 90%"
    )
