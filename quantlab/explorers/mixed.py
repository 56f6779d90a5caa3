"""A slider on the bytes of a whole model: which layer gets how many bits, and what that is predicted to cost."""

import random
import re
from bisect import bisect_right

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch

from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.drawing import draw_ring
from quantlab.mixed import Allocation, Sensitivity, frontier, greedy
from quantlab.plots import ERROR, QUANTIZED

_DIGITS = 12  # blocks side by side whose bits can still be read as digits


def explore_budget(sensitivity: Sensitivity, *, steps: int = 60, budget: int | None = None) -> Explorer:
    """Drag the bytes of the linear layers: the bits of every layer, and the predicted KL beside uniform bits.

    "exact" is the knapsack, "greedy" the greedy rule; "by chance" hands the exact bits out anew among layers of the
    same size, so that the bytes stay. Every allocation is computed before the slider moves. budget: the bytes it starts
    at; the bytes of each uniform bit width are among the slider's stops.
    """
    plans = _Plans(sensitivity, steps, budget)
    picture = _Picture(plans)
    controls = {
        "budget": widgets.SelectionSlider(
            options=[(f"{stop / 1000:.0f} kB", i) for i, stop in enumerate(plans.stops)],
            value=len(plans.stops) // 3 if budget is None else max(0, bisect_right(plans.stops, budget) - 1),
            description="budget",
        ),
        "rule": widgets.Dropdown(options=list(plans.rules), value="exact", description="rule"),
    }

    def update(budget, rule) -> str:
        picture.show(plans.rules[rule][budget])
        return plans.describe(budget, rule)

    return bind(controls, picture.left, picture.moving, update)


# --- numbers ----------------------------------------------------------------------------------------------------


class _Plans:
    """The allocation of every rule at every stop of the slider, and the uniform ones."""

    def __init__(self, sensitivity: Sensitivity, steps: int, budget: int | None):
        self.costs, self.sizes = sensitivity.costs, sensitivity.sizes
        self.weights = sum(sensitivity.weights.values())
        self.best, self.uniform = frontier(self.costs, self.sizes), _uniform(self.costs, self.sizes)
        reached = [found.nbytes for found in self.best]
        stops = {round(1000 * kb) for kb, _ in self.uniform.values()} | ({budget} if budget else set())
        stops |= set(np.linspace(reached[0], reached[-1], steps).astype(int).tolist())
        self.stops = sorted(stop for stop in stops if reached[0] <= stop <= reached[-1])
        exact = [self.best[bisect_right(reached, stop) - 1] for stop in self.stops]
        self.rules = {
            "exact": exact,
            "greedy": [greedy(self.costs, self.sizes, stop) for stop in self.stops],
            "by chance": [_dealt(found, self.costs, self.sizes) for found in exact],
        }

    def describe(self, budget: int, rule: str) -> str:
        found, exact = self.rules[rule][budget], self.rules["exact"][budget].kl
        same = _uniform_at(self.uniform, found.nbytes / 1000)
        beside = "" if same is None else f"   with the same bits everywhere about {same:.3g} ({found.kl / same:.2f} ×)"
        compared = "" if rule == "exact" else f"   {found.kl / exact:.3f} × the exact one"
        return (
            f"budget {self.stops[budget]:,} bytes, used {found.nbytes:,}: {8 * found.nbytes / self.weights:.2f} bits "
            f"a weight   predicted KL {found.kl:.3g}{compared}{beside}"
        )


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


# --- picture ----------------------------------------------------------------------------------------------------


class _Picture:
    """Left, the bits of each layer; right, the best KL for each size, that of uniform bits, and the chosen place."""

    def __init__(self, plans: _Plans):
        fig, (self.left, right) = figure(columns=2, height=3.6, gridspec_kw={"width_ratios": [4, 5]})
        self.names, self.bits = list(plans.costs), _draw_table(self.left, plans.costs)
        self.digits = _draw_digits(self.left, plans.costs)
        right.plot([a.nbytes / 1000 for a in plans.best], [a.kl for a in plans.best], color=QUANTIZED, label="exact")
        right.plot(*zip(*plans.uniform.values(), strict=True), "s", color=ERROR, label="the same bits everywhere")
        self.here = draw_ring(right, markersize=11)
        first, last = plans.stops[0] / 1000, plans.stops[-1] / 1000
        room = 0.05 * (last - first) + 1e-3
        right.set(xlim=(first - room, last + room), xlabel="kB of the linear layers")
        right.set(yscale="log", ylabel="predicted KL, nats")
        right.legend(loc="upper right", fontsize="small")
        fig.subplots_adjust(left=0.17, right=0.98, top=0.92, bottom=0.22, wspace=0.26)
        self.moving = [self.bits, *self.digits.values(), self.here]

    def show(self, found: Allocation) -> None:
        self.bits.set_data(layer_table({name: found.bits[name] for name in self.names})[1])
        for name, digit in self.digits.items():
            digit.set_text(str(found.bits[name]))
        self.here.set_data([found.nbytes / 1000], [found.kl])


def _places(names) -> dict[str, tuple[int, str]]:
    """Block and name in the block: "model.layers.3.mlp.up_proj" is up_proj of block 3.

    The name is as short as tells the layers apart: GPT-2 has an attn.c_proj and an mlp.c_proj in each block.
    """
    for parts in (1, 2, 3):
        places = {name: _place(name, parts) for name in names}
        if len(set(places.values())) == len(places):
            break
    return places


def _place(name: str, parts: int) -> tuple[int, str]:
    block = re.search(r"\.(\d+)\.", name)
    return (int(block[1]), ".".join(name[block.end() :].split(".")[-parts:])) if block else (0, name)


def _rows_and_columns(places: dict) -> tuple[list[str], list[int]]:
    """The kinds of layers, as they come, and the numbers of the blocks."""
    return list(dict.fromkeys(kind for _, kind in places.values())), sorted({block for block, _ in places.values()})


def layer_table(values: dict) -> tuple[list[str], np.ndarray]:
    """The kinds of layers, and a table: a row for each kind, a column for each block, nan where it has none of it."""
    places = _places(values)
    kinds, blocks = _rows_and_columns(places)
    table = np.full((len(kinds), len(blocks)), np.nan)
    for name, value in values.items():
        block, kind = places[name]
        table[kinds.index(kind), blocks.index(block)] = value
    return kinds, table


def _draw_table(ax: Axes, costs: dict):
    """The picture of bits: a row for each kind of layer, a column for each block."""
    widths = sorted({b for row in costs.values() for b in row})
    shades = _blues(len(widths))
    edges = [widths[0] - 0.5, *((a + b) / 2 for a, b in zip(widths, widths[1:], strict=False)), widths[-1] + 0.5]
    colours = {"cmap": ListedColormap(shades), "norm": BoundaryNorm(edges, len(widths))}
    kinds, table = layer_table({name: widths[0] for name in costs})
    picture = ax.imshow(table, aspect="auto", interpolation="nearest", **colours)
    ax.set(title="bits of each layer", xlabel="block", yticks=range(len(kinds)), xticks=[])
    ax.set_yticklabels(kinds, fontsize="small")
    keys = [Patch(facecolor=shade, edgecolor="0.6", label=f"{b} bits") for shade, b in zip(shades, widths, strict=True)]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": len(keys)}
    ax.legend(handles=keys, fontsize="small", frameon=False, columnspacing=1, handlelength=1, **place)
    return picture


def _draw_digits(ax: Axes, costs: dict) -> dict:
    """A digit for each layer, and the numbers of the blocks; nothing where there are too many to be read."""
    places = _places(costs)
    kinds, blocks = _rows_and_columns(places)
    if len(blocks) > _DIGITS:
        return {}
    ax.set(xticks=range(len(blocks)))
    ax.set_xticklabels([str(block) for block in blocks])
    digits = {}
    for name, (block, kind) in places.items():
        place = blocks.index(block), kinds.index(kind)
        digits[name] = ax.text(*place, "", ha="center", va="center", fontsize="small", color="black")
    return digits


def _blues(count: int) -> list:
    """From nearly white to a blue on which black digits can still be read."""
    light, dark = np.array([0.95, 0.97, 1.0]), np.array([0.34, 0.62, 0.85])
    return [light + (dark - light) * i / max(count - 1, 1) for i in range(count)]
