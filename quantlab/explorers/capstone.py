"""Sliders on the bits of each part of a model: where the bytes of its file go, and what the parts cost together."""

from collections.abc import Mapping

import ipywidgets as widgets
from matplotlib.axes import Axes

from quantlab.capstone.planning import PARTS, Plans
from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.drawing import draw_ring, plain_ticks
from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED, pareto_front

_COLOURS = {"embedding": "#E69F00", "attention": QUANTIZED, "MLP": OTHER}
_MARKERS = "osD^vP"


def explore_capstone(
    plans: Plans, limit: int, *, references: Mapping[str, tuple[int, float]] | None = None, bits: int = 4
) -> Explorer:
    """Drag the bits of each part, group size and method: every byte of the file, and the predicted KL.

    limit: the budget in bytes. references: {name: (bytes, KL)} of entries to compare with. bits: where all parts start.
    Raises: ValueError if bits is none of those that the plans hold.
    """
    if bits not in plans.bits:
        raise ValueError(f"bits must be one of {', '.join(map(str, plans.bits))}, got {bits!r}")
    picture = _Picture(plans, limit, references or {})
    each = {"options": plans.bits, "value": bits}
    controls = {
        "method": widgets.Dropdown(options=plans.methods, value=plans.methods[0], description="method"),
        "group": widgets.Dropdown(options=plans.groups, value=plans.groups[0], description="group"),
        **{part: widgets.SelectionSlider(description=part, **each) for part in PARTS},
    }

    def update(method, group, **bits) -> str:
        picture.show(method, group, bits)
        return _describe(plans, limit, method, group, bits)

    return bind(controls, picture.left, picture.moving, update)


def _describe(plans: Plans, limit: int, method: str, group: int, bits: dict[str, int]) -> str:
    size, left = plans.nbytes(group, bits), limit - plans.nbytes(group, bits)
    verdict = f"{left:,} left" if left >= 0 else f"{-left:,} OVER"
    parts = ", ".join(f"{part} {plans.costs[method, group, part, b]:.4f}" for part, b in bits.items())
    shares = "  ".join(f"{name} {count:,}" for name, count in _bytes(plans, group, bits).items())
    return (
        f"{size:,} bytes of {limit:,}: {verdict}   {8 * size / plans.parameters:.2f} bits a parameter\n"
        f"predicted KL {plans.kl(method, group, bits):.4f} ({parts})\n{shares}"
    )


def _bytes(plans: Plans, group: int, bits: dict[str, int]) -> dict[str, int]:
    """The bytes of the file by what they are for."""
    own = {part: plans.codes[part, b] for part, b in bits.items()}
    sides = sum(plans.sides[group, part, b] for part, b in bits.items())
    return own | {"scales": sides, "16 bits": plans.others, "header": plans.header}


class _Picture:
    """Left, what the file consists of, beside the budget; right, KL against bytes: references and the chosen place."""

    def __init__(self, plans: Plans, limit: int, references: Mapping):
        fig, (self.left, right) = figure(columns=2, height=3.5, gridspec_kw={"width_ratios": [3, 5]})
        self.plans = plans
        uniform = [(m, g, dict.fromkeys(PARTS, b)) for m in plans.methods for g in plans.groups for b in plans.bits]
        sizes = [plans.nbytes(group, bits) / 1e6 for _, group, bits in uniform] + [limit / 1e6]
        sizes += [size / 1e6 for size, _ in references.values()]
        costs = [plans.kl(*setting) for setting in uniform] + [kl for _, kl in references.values()]
        self.bars = _draw_bars(self.left, list(_bytes(plans, plans.groups[0], dict.fromkeys(PARTS, plans.bits[0]))))
        self.left.axhline(limit / 1e6, color="black", linestyle=":")
        self.left.set(ylim=(0, 1.05 * max(sizes)))
        _draw_references(right, references, limit)
        self.here = draw_ring(right, color=ERROR, markersize=12)
        right.set(yscale="log", ylim=(max(min(costs), 1e-6) / 2, max(costs) * 2), ylabel="KL, nats")
        room = 0.04 * (max(sizes) - min(sizes))
        right.set(xlim=(min(sizes) - room, max(sizes) + room), xlabel="MB of the file")
        plain_ticks(right.yaxis)
        fig.subplots_adjust(left=0.07, right=0.985, top=0.95, bottom=0.16, wspace=0.32)
        self.moving = [*self.bars, self.here]

    def show(self, method: str, group: int, bits: dict[str, int]) -> None:
        bottom = 0.0
        for bar, count in zip(self.bars, _bytes(self.plans, group, bits).values(), strict=True):
            bar.set(y=bottom, height=count / 1e6)
            bottom += count / 1e6
        self.here.set_data([self.plans.nbytes(group, bits) / 1e6], [max(self.plans.kl(method, group, bits), 1e-6)])


def _draw_bars(ax: Axes, names: list[str]) -> list:
    """One bar of a piece for each part, all at height 1 until they are moved."""
    colours = _COLOURS | {"scales": CLIPPED, "16 bits": FLOAT, "header": "black"}
    bars = [ax.bar([0], [1], 0.7, color=colours[name], label=name)[0] for name in names]
    ax.set(xticks=[], xlim=(-0.5, 2.1), ylabel="MB of the file")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="center right", fontsize="small", frameon=False, handlelength=1)
    return bars


def _draw_references(ax: Axes, references: Mapping, limit: int) -> None:
    points = {name: (size / 1e6, kl) for name, (size, kl) in references.items()}
    front = pareto_front(points.values())
    if front:
        ax.step(*zip(*front, strict=True), where="post", color=FLOAT, zorder=0)
    for i, (name, (size, kl)) in enumerate(points.items()):
        ax.plot([size], [kl], _MARKERS[i % len(_MARKERS)], color=QUANTIZED, markersize=6, label=name)
    ax.axvline(limit / 1e6, color="black", linestyle=":", label="budget")
    ax.legend(loc="upper right", fontsize="small")
