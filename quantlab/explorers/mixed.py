"""A slider on the bytes of a whole model: which layer gets how many bits, and what that is predicted to cost."""

import random
import re
from bisect import bisect_right
from functools import cache

import ipywidgets as widgets
import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch

from quantlab.explorers.base import Explorer, figure, tie
from quantlab.mixed import Allocation, Sensitivity, frontier, greedy
from quantlab.plots import ERROR, OTHER, QUANTIZED

_MOST_DIGITS = 12  # blocks side by side whose bits can still be read as digits


def explore_budget(sensitivity: Sensitivity, *, steps: int = 60, budget: int | None = None) -> Explorer:
    """Drag the bytes of the linear layers: the bits of every layer, and the predicted KL beside uniform bits.

    "exact" is the knapsack, "greedy" the greedy rule; "by chance" hands the exact bits out anew among layers of the
    same size, so that the bytes stay. Every allocation is computed before the slider moves. budget: the bytes it starts
    at; the bytes of each uniform bit width are among the slider's stops.
    """
    costs, sizes, count = sensitivity.costs, sensitivity.sizes, sum(sensitivity.weights.values())
    best = frontier(costs, sizes)
    reached = [found.nbytes for found in best]
    uniform = _uniform(costs, sizes)
    stops = {round(1000 * kb) for kb, _ in uniform.values()} | ({budget} if budget else set())
    stops |= set(np.linspace(reached[0], reached[-1], steps).astype(int).tolist())
    stops = sorted(stop for stop in stops if reached[0] <= stop <= reached[-1])
    rules = {
        "exact": [best[bisect_right(reached, stop) - 1] for stop in stops],
        "greedy": [greedy(costs, sizes, stop) for stop in stops],
    }
    rules["by chance"] = [_dealt(found, costs, sizes) for found in rules["exact"]]
    start = len(stops) // 3 if budget is None else max(0, bisect_right(stops, budget) - 1)
    controls = {
        "budget": widgets.SelectionSlider(
            options=[(f"{stop / 1000:.0f} kB", i) for i, stop in enumerate(stops)], value=start, description="budget"
        ),
        "rule": widgets.Dropdown(options=list(rules), value="exact", description="rule"),
    }
    fig, (left, right) = figure(columns=2, height=3.6, gridspec_kw={"width_ratios": [4, 5]})
    picture, digits = _draw_table(left, costs)
    right.plot([a.nbytes / 1000 for a in best], [a.kl for a in best], color=QUANTIZED, label="exact")
    right.plot(*zip(*uniform.values(), strict=True), "s", color=ERROR, label="the same bits everywhere")
    (here,) = right.plot([1], [1], "o", color=OTHER, markersize=11, fillstyle="none", markeredgewidth=2.5)
    room = 0.05 * (stops[-1] - stops[0]) / 1000 + 1e-3
    right.set(xlabel="kB of the linear layers", ylabel="predicted KL, nats", yscale="log")
    right.set(xlim=(stops[0] / 1000 - room, stops[-1] / 1000 + room))
    right.legend(loc="upper right", fontsize="small")
    fig.subplots_adjust(left=0.17, right=0.98, top=0.92, bottom=0.15, wspace=0.26)

    @cache
    def said(budget, rule) -> str:
        found, same = rules[rule][budget], _uniform_at(uniform, rules[rule][budget].nbytes / 1000)
        exact = rules["exact"][budget].kl
        beside = "" if same is None else f"   with the same bits everywhere about {same:.3g} ({found.kl / same:.2f} ×)"
        compared = "" if rule == "exact" else f"   {found.kl / exact:.3f} × the exact one"
        return (
            f"budget {stops[budget]:,} bytes, used {found.nbytes:,}: {8 * found.nbytes / count:.2f} bits a weight   "
            f"predicted KL {found.kl:.3g}{compared}{beside}"
        )

    def update(budget, rule) -> str:
        found = rules[rule][budget]
        picture.set_data(_table({name: found.bits[name] for name in costs}))
        for name, digit in digits.items():
            digit.set_text(str(found.bits[name]))
        here.set_data([found.nbytes / 1000], [found.kl])
        return said(budget, rule)

    return tie(controls, left, [picture, *digits.values(), here], update)


def _uniform(costs: dict, sizes: dict) -> dict[int, tuple[float, float]]:
    """(kB, predicted KL) of every bit width that all layers have."""
    shared = set.intersection(*(set(row) for row in sizes.values()))
    return {
        b: (sum(row[b] for row in sizes.values()) / 1000, sum(row[b] for row in costs.values())) for b in sorted(shared)
    }


def _uniform_at(uniform: dict, kb: float) -> float | None:
    """The predicted KL of uniform bits at this size, between two widths on the straight line of its logarithm."""
    points = sorted(uniform.values())
    if not points or not points[0][0] <= kb <= points[-1][0] or min(kl for _, kl in points) <= 0:
        return None
    return float(np.exp(np.interp(kb, [p[0] for p in points], np.log([p[1] for p in points]))))


def _dealt(found: Allocation, costs: dict, sizes: dict) -> Allocation:
    """The same bits, handed out anew among the layers of one size: the same bytes."""
    alike, pick, bits = {}, random.Random(0), {}
    for name, row in sizes.items():
        alike.setdefault(tuple(row.items()), []).append(name)
    for names in alike.values():
        hand = [found.bits[name] for name in names]
        pick.shuffle(hand)
        bits |= dict(zip(names, hand, strict=True))
    return Allocation(bits, sum(costs[name][b] for name, b in bits.items()), found.nbytes)


def _place(name: str) -> tuple[int, str]:
    """(block, name in the block) of a layer: "model.layers.3.mlp.up_proj" is up_proj of block 3."""
    block = re.search(r"\.(\d+)\.", name)
    return (int(block[1]) if block else 0), name.rpartition(".")[2] if block else name


def _table(values: dict) -> np.ndarray:
    """A row for each kind of layer, a column for each block; nan where a block has none of the kind."""
    places = {name: _place(name) for name in values}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    blocks = sorted({block for block, _ in places.values()})
    table = np.full((len(kinds), len(blocks)), np.nan)
    for name, (block, kind) in places.items():
        table[kinds.index(kind), blocks.index(block)] = values[name]
    return table


def _draw_table(ax, costs: dict) -> tuple:
    """The picture of bits and, where they can be read, a digit for each layer."""
    widths = sorted({b for row in costs.values() for b in row})
    shades = _blues(len(widths))
    edges = [widths[0] - 0.5, *((a + b) / 2 for a, b in zip(widths, widths[1:], strict=False)), widths[-1] + 0.5]
    table = _table({name: widths[0] for name in costs})
    picture = ax.imshow(
        table,
        aspect="auto",
        cmap=ListedColormap(shades),
        norm=BoundaryNorm(edges, len(widths)),
        interpolation="nearest",
    )
    kinds = list(dict.fromkeys(_place(name)[1] for name in costs))
    blocks = sorted({_place(name)[0] for name in costs})
    ax.set(title="bits of each layer, by block", yticks=range(len(kinds)), xticks=[])
    keys = [Patch(color=shade, label=str(b)) for shade, b in zip(shades, widths, strict=True)]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.07), "ncols": len(keys)}
    ax.legend(handles=keys, fontsize="small", frameon=False, columnspacing=1, handlelength=1, **place)
    ax.set_yticklabels(kinds, fontsize="small")
    if len(blocks) > _MOST_DIGITS:
        return picture, {}
    ax.set(xticks=range(len(blocks)))
    ax.set_xticklabels([str(block) for block in blocks])
    digits = {}
    for name in costs:
        block, kind = _place(name)
        place = blocks.index(block), kinds.index(kind)
        digits[name] = ax.text(*place, "", ha="center", va="center", fontsize="small", color="black")
    return picture, digits


def _blues(count: int) -> list:
    """From nearly white to a blue on which black digits can still be read."""
    light, dark = np.array([0.95, 0.97, 1.0]), np.array([0.34, 0.62, 0.85])
    return [light + (dark - light) * i / max(count - 1, 1) for i in range(count)]
