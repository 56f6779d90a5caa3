"""A slider on AWQ's exponent: what scaling the loud channels does to their steps, to the others', and to the output."""

from functools import cache

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from quantlab.awq import scale_and_round, scales_of
from quantlab.explorers.base import Explorer, figure, tie
from quantlab.gptq import Hessian, check_weight
from quantlab.plots import ERROR, FLOAT, OTHER, QUANTIZED

ALPHAS = tuple(i / 20 for i in range(21))
BITS, GROUPS = (2, 3, 4, 8), {"whole row": 0, "128": 128, "32": 32}
_ROWS = 96  # of a layer that are looked at
_SHARE = 0.025  # of the channels, the loudest of which are called loud


def explore_scaling(
    layers: dict[str, tuple[Tensor, Hessian]], *, bits: int = 4, group_size: int | None = 128, alpha: float = 0.0
) -> Explorer:
    """Drag AWQ's alpha: the step and the error of every input channel, and the output error of the layer.

    layers: {name: (weight (out, in), Hessian of its input)}; at most 96 rows of each are looked at. Left, a dot for
    each channel over its mean |x|: its step against that at alpha = 0, and what it alone adds to the output error.
    Right, the output error at every alpha, of all channels and as if only the loudest 2.5 %, or only the others, had
    been rounded. Errors are over round-to-nearest's, alpha = 0. All is computed before the slider moves.

    Raises: ValueError if there is no layer, a weight does not fit its Hessian, or alpha, bits or group_size is not on
    its slider.
    """
    layers = {name: (_some_rows(weight, hessian), hessian) for name, (weight, hessian) in layers.items()}
    _check_settings(layers, bits, group_size or 0, alpha)
    known = cache(lambda name, bits, group: _at_every_alpha(*layers[name], bits, group))
    for name, b, g in tqdm([(n, b, g) for n in layers for b in BITS for g in GROUPS.values()], leave=False):
        known(name, b, g)
    controls = {
        "alpha": widgets.SelectionSlider(options=[(f"{a:.2f}", a) for a in ALPHAS], value=alpha, description="alpha"),
        "layer": widgets.Dropdown(options=list(layers), description="layer"),
        "bits": widgets.SelectionSlider(options=list(BITS), value=bits, description="bits"),
        "group": widgets.SelectionSlider(options=list(GROUPS.items()), value=group_size or 0, description="group"),
    }
    strengths = {name: hessian.mean_abs.numpy() for name, (_, hessian) in layers.items()}
    top, bottom, right = _axes(np.concatenate(list(strengths.values())))
    steps = _dots(top, ("loud", ERROR), ("others", QUANTIZED))
    was = bottom.plot([], [], ".", color=FLOAT, markersize=4, label="alpha 0")[0]
    parts = _dots(bottom, ("loud", ERROR), ("others", QUANTIZED))
    curves = _curves(right)

    def update(alpha, layer, bits, group) -> str:
        found, strength, at = known(layer, bits, group), strengths[layer], ALPHAS.index(alpha)
        loud, plain = found["loud"], found["output"][0]
        for chosen, step, part in zip((loud, ~loud), steps, parts, strict=True):
            step.set_data(strength[chosen], found["step"][at][chosen])
            part.set_data(strength[chosen], found["part"][at][chosen] / plain)
        was.set_data(strength, found["part"][0] / plain)
        _move(curves, found, at)
        return _say(found, at, scales_of(layers[layer][1].mean_abs, alpha))

    return tie(controls, right, [*steps, was, *parts, *curves], update)


def _say(found: dict, at: int, s: Tensor) -> str:
    output, of_weight = found["output"], found["weight"]
    best = min(range(len(ALPHAS)), key=output.__getitem__)
    steps = [found["step"][at][chosen] for chosen in (found["loud"], ~found["loud"])]
    loud, others = (step.mean() if len(step) else 1.0 for step in steps)
    return (
        f"alpha {ALPHAS[at]:.2f}: s {s.min():.2f} to {s.max():.2f}   step: loud {loud:.2f} ×, others {others:.2f} ×   "
        f"true bits per weight {found['bits']:.3f}, s folded away\n"
        f"weight error {of_weight[at]:.2e} ({of_weight[at] / of_weight[0]:.2f} ×)   output error {output[at]:.2e} "
        f"({output[at] / output[0]:.2f} ×)   best {output[best]:.2e} at alpha {ALPHAS[best]:.2f}"
    )


def _some_rows(weight: Tensor, hessian: Hessian) -> Tensor:
    """Float copies of at most _ROWS rows, evenly picked."""
    check_weight(weight, hessian)
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), _ROWS), dtype=torch.float64).round().long()
    return weight.detach().float().cpu()[rows]


def _check_settings(layers: dict, bits: int, group: int, alpha: float) -> None:
    if not layers:
        raise ValueError("no layers to look at")
    for value, name, choices in (
        (bits, "bits", BITS), (group, "group_size", tuple(GROUPS.values())), (alpha, "alpha", ALPHAS)
    ):  # fmt: skip
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value}")


def _at_every_alpha(weight: Tensor, hessian: Hessian, bits: int, group: int) -> dict:
    """Errors of weight and output, and steps and shares of the output error channel by channel, at each alpha."""
    H, strength = hessian.matrix.float().cpu(), hessian.mean_abs
    loud = torch.zeros(len(H), dtype=torch.bool)
    loud[strength.topk(max(1, round(_SHARE * len(H)))).indices] = True

    whole, size = max(((weight @ H) * weight).sum().item(), 1e-30), max(weight.square().sum().item(), 1e-30)
    found = {"loud": loud.numpy(), "weight": [], "output": [], "of_loud": [], "of_others": [], "step": [], "part": []}
    for alpha in ALPHAS:
        scaled = scale_and_round(weight, scales_of(strength, alpha), bits=bits, group_size=group or None)
        lost = scaled.dequantize() - weight
        step = (scaled.q.element_qparams().scale.expand_as(weight) / scaled.input_scale).mean(0)
        together, of_loud = lost @ H, lost[:, loud]
        output, mixed = (together * lost).sum(), (together[:, loud] * of_loud).sum()
        alone = ((of_loud @ H[loud][:, loud]) * of_loud).sum()
        found["weight"].append(max(lost.square().sum().item() / size, 1e-12))
        found["output"].append(max(output.item() / whole, 1e-12))
        found["of_loud"].append(alone.item() / whole)
        found["of_others"].append((output - 2 * mixed + alone).item() / whole)  # (a + b)² - 2 (a + b) a + a² = b²
        found["part"].append((H.diagonal() * lost.square().sum(0) / whole).clamp(min=1e-12).numpy())
        found["step"].append(step.numpy())
    found["step"] = [step / np.maximum(found["step"][0], 1e-30) for step in found["step"]]
    found["bits"] = scaled.q.bits_per_element
    return found


def _axes(strengths: np.ndarray) -> tuple:
    fig, axes = figure(columns=2, rows=2, height=4.2)
    grid = axes[0, 0].get_gridspec()
    for ax in axes[:, 1]:
        ax.remove()
    top, bottom, right = axes[0, 0], axes[1, 0], fig.add_subplot(grid[:, 1])
    heard = strengths[strengths > 0] if (strengths > 0).any() else np.ones(1)
    across = {"xscale": "log", "xlim": (heard.min() / 1.3, heard.max() * 1.3), "yscale": "log"}
    top.set(**across, ylim=(0.1, 200), ylabel="× step at alpha 0", title="a dot for each input channel")
    top.axhline(1, color=FLOAT, linewidth=0.8)
    top.tick_params(labelbottom=False)
    bottom.set(**across, ylim=(1e-6, 9), xlabel="mean |x| of the channel", ylabel="part of the error")
    right.set(
        xlim=(-0.03, 1.03), xlabel="alpha", yscale="log", ylim=(0.008, 12), title="output error ÷ round-to-nearest's"
    )
    fig.subplots_adjust(left=0.09, right=0.98, top=0.92, bottom=0.12, wspace=0.2, hspace=0.12)
    return top, bottom, right


def _dots(ax, *kinds) -> list:
    dots = [ax.plot([], [], ".", color=color, markersize=4, label=label)[0] for label, color in kinds]
    ax.legend(loc="upper left", ncols=3, fontsize="x-small", markerscale=2, columnspacing=1.0)
    return dots


def _curves(ax) -> list:
    """Three lines over alpha, and a marker on each."""
    lines = [
        ax.plot(ALPHAS, [1] * len(ALPHAS), color=color, linewidth=width, label=label)[0]
        for label, color, width in (("all", OTHER, 2.5), ("loud alone", ERROR, 1.2), ("others alone", QUANTIZED, 1.2))
    ]
    ax.axhline(1, color=FLOAT, linestyle="--", label="round to nearest")
    markers = [ax.plot([0], [1], "o", color=line.get_color(), markersize=7)[0] for line in lines]
    ax.legend(loc="upper center", ncols=2, fontsize="x-small")
    return [*lines, *markers]


def _move(curves: list, found: dict, at: int) -> None:
    for line, marker, key in zip(curves[:3], curves[3:], ("output", "of_loud", "of_others"), strict=True):
        errors = [max(error / found["output"][0], 1e-9) for error in found[key]]
        line.set_ydata(errors)
        marker.set_data([ALPHAS[at]], [errors[at]])
