"""Sliders around pictures. A figure is drawn once; a moved slider redraws only the artists that changed (blitting).

Nothing here computes what it shows beyond calling the library; the picture is a plain image, so it also stands in a
notebook that has no kernel, and a line of text under it says the numbers.
"""

import base64
import html
import io
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from quantlab.affine import QParams, check_real, choose_qparams, fake_quantize
from quantlab.gptq import Hessian, gptq_quantize, gptq_steps
from quantlab.granularity import PerAxis, PerGroup, QTensor, quantize_tensor
from quantlab.metrics import split_error, sqnr_db
from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED

# Callbacks may come on a second thread, and matplotlib's font cache is one for the whole process.
_DRAWING = threading.RLock()
_MOST = 20_000  # elements looked at while dragging; more would not change the picture


@dataclass(frozen=True)
class Explorer:
    """What a test needs: set a control's value, then look at ax and numbers(). A cell displays it."""

    view: widgets.Widget
    controls: dict[str, widgets.Widget]
    ax: Axes
    numbers: Callable[[], str]  # the line under the picture

    def _repr_mimebundle_(self, **options):
        return self.view._repr_mimebundle_(**options)


class _View(widgets.VBox):
    """Controls, picture and numbers; without a kernel a reader gets the picture, and nbval compares the numbers."""

    def __init__(self, children, png: Callable[[], bytes], text: Callable[[], str]):
        super().__init__(children)
        self._png, self._text = png, text

    def _repr_mimebundle_(self, **options):
        bundle = super()._repr_mimebundle_(**options)
        bundle["image/png"] = base64.b64encode(with_caption(self._png(), self._text())).decode()
        bundle["text/plain"] = self._text()
        return bundle


def with_caption(png: bytes, text: str) -> bytes:
    """The picture with the text under it, for readers who have no kernel."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 105) or [""]]
    fig = Figure(figsize=(picture.width / 100, 0.19 * len(lines) + 0.1), dpi=100)
    canvas = FigureCanvasAgg(fig)
    fig.text(0.01, 0.98, "\n".join(lines), va="top", fontsize=10, parse_math=False)
    with _DRAWING:
        canvas.draw()
    caption, out = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), io.BytesIO()
    both = Image.new("RGB", (picture.width, picture.height + caption.height), "white")
    both.paste(picture, (0, 0))
    both.paste(caption, (0, picture.height))
    both.save(out, "png", optimize=True)
    return out.getvalue()


class _Canvas:
    """A private figure on Agg: everything still is drawn once, the moving artists again for each picture."""

    def __init__(self, fig: Figure, moving: list, few_colours: bool):
        self.fig, self.moving, self.canvas, self.palette = fig, moving, FigureCanvasAgg(fig), None
        for artist in moving:
            artist.set_animated(True)
        with _DRAWING:
            self.canvas.draw()
            self.still = self.canvas.copy_from_bbox(fig.bbox)
        if few_colours:  # lines and bars: 64 colours are enough, and a fifth of the time to encode
            self.palette = self.picture().quantize(64)

    def picture(self) -> Image.Image:
        with _DRAWING:
            self.canvas.restore_region(self.still)
            for artist in self.moving:
                self.fig.draw_artist(artist)
            return Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")

    def png(self) -> bytes:
        picture, out = self.picture(), io.BytesIO()
        if self.palette is not None:
            picture = picture.quantize(palette=self.palette, dither=Image.Dither.NONE)
        picture.save(out, "png", compress_level=1)
        return out.getvalue()


def _explorer(
    controls: dict, ax: Axes, moving: list, update: Callable[..., str], *, few_colours: bool = True
) -> Explorer:
    """Tie controls to a figure: update(**values) moves the artists and returns the line of numbers (or more lines)."""
    update(**{name: control.value for name, control in controls.items()})  # the colours of a first picture
    canvas = _Canvas(ax.figure, moving, few_colours)
    image = widgets.Image(format="png", layout={"max_width": "100%"})
    line, said = widgets.HTML(), [""]

    def draw(_change=None) -> None:
        said[0] = update(**{name: control.value for name, control in controls.items()})
        image.value = canvas.png()
        line.value = f'<div style="white-space: pre-wrap; line-height: 1.4">{html.escape(said[0])}</div>'

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    row = widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"})
    return Explorer(
        _View([row, image, line], lambda: image.value, lambda: said[0]), controls, ax, lambda: said[0]
    )


def _figure(columns: int = 1, rows: int = 1, height: float = 3.4, **options):
    fig = Figure(figsize=(8.4, height), dpi=100)
    return fig, fig.subplots(rows, columns, **options)


def _sample(x: Tensor) -> Tensor:
    """At most _MOST values, evenly picked, and the smallest and largest, which set the range."""
    check_real(x)
    flat = x.detach().float().flatten()
    if len(flat) <= _MOST:
        return flat
    some = torch.linspace(0, len(flat) - 1, _MOST - 2, dtype=torch.float64).long()
    return torch.cat([flat[some], flat.amin()[None], flat.amax()[None]])


def explore_affine(x: Tensor, *, bits: int = 4, symmetric: bool = False) -> Explorer:
    """Lay a grid over the values of a layer: choose bits and range, see the grid points and each value's error."""
    x = _sample(x)
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    reach = max(-low, high) or 1.0
    slider = {"min": -1.5, "max": 1.5, "step": 0.01, "readout_format": ".2f"}
    controls = {
        "bits": widgets.IntSlider(bits, min=1, max=8, description="bits"),
        "low": widgets.FloatSlider(low / reach, **slider | {"max": 0.0}, description="min (× largest)"),
        "high": widgets.FloatSlider(high / reach, **slider | {"min": 0.0}, description="max (× largest)"),
        "symmetric": widgets.Checkbox(symmetric, description="symmetric"),
    }
    for name in ("low", "high"):
        controls[name].style.description_width = "initial"
    fig, (top, bottom) = _figure(rows=2, height=4.2, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    counts, edges = np.histogram(x.numpy(), bins=160)
    top.stairs(counts, edges, fill=True, color=FLOAT)
    top.set(ylabel="weights", xlim=(-1.6 * reach, 1.6 * reach), ylim=(0, 1.15 * counts.max()))
    line = torch.linspace(-1.6 * reach, 1.6 * reach, 1500)
    grid = top.vlines([], 0, 1, colors=QUANTIZED, linewidth=1.0, transform=top.get_xaxis_transform())
    (zero,) = top.plot([0], [0], "^", color=QUANTIZED, markersize=9, clip_on=False)
    (error,) = bottom.plot(line, torch.zeros_like(line), color=ERROR, linewidth=1.2)
    band = bottom.hlines([], -1.6 * reach, 1.6 * reach, colors="0.4", linestyles="dashed", linewidth=0.8)
    bottom.set(xlabel="real value", ylabel="error x̂ − x", ylim=(-0.6 * reach, 0.6 * reach))
    fig.subplots_adjust(left=0.09, right=0.98, top=0.97, bottom=0.12, hspace=0.08)

    def update(bits, low, high, symmetric) -> str:
        qp = choose_qparams(
            torch.tensor(low * reach),
            torch.tensor(high * reach),
            qmin=0,
            qmax=2**bits - 1,
            symmetric=symmetric,
        )
        points = qp.scale * (torch.arange(qp.qmin, qp.qmax + 1) - qp.zero_point)
        grid.set_segments([[(p, 0), (p, 1)] for p in points.tolist()])
        error.set_ydata((fake_quantize(line, qp) - line).numpy())
        half = qp.scale.item() / 2
        band.set_segments([[(-1.6 * reach, y), (1.6 * reach, y)] for y in (-half, half)])
        split, back = split_error(x, qp), fake_quantize(x, qp)
        return (
            f"scale {qp.scale.item():.4g}   zero point {qp.zero_point.item()}   codes 0..{qp.qmax}   "
            f"mean squared error {sum(split):.2e} = rounding {split.rounding:.2e} + clipping {split.clipping:.2e}   "
            f"signal to noise {sqnr_db(x, back):.1f} dB"
        )

    return _explorer(controls, top, [grid, zero, error, band], update)


def clipping_curves(x: Tensor, bits: int, clips) -> list:
    """(rounding, clipping) error of x at each clipping point, a fraction of max|x|, on a symmetric grid."""
    return [split_error(x, _clipped_grid(x, bits, clip)) for clip in clips]


def _clipped_grid(x: Tensor, bits: int, clip: float) -> QParams:
    edge, half = clip * x.abs().max(), 2 ** (bits - 1)
    return choose_qparams(-edge, edge, qmin=-half, qmax=half - 1, symmetric=True)


def explore_clipping(x: Tensor, *, bits: int = 4, clip: float = 1.0) -> Explorer:
    """Move the clipping point (a fraction of max|x|) and watch rounding error trade against clipping error."""
    x = _sample(x)
    clips = np.round(np.arange(0.05, 1.001, 0.05), 2)
    curves = cache(lambda bits: np.array(clipping_curves(x, bits, clips)))  # once for each number of bits
    controls = {
        "bits": widgets.IntSlider(bits, min=2, max=8, description="bits"),
        "clip": widgets.FloatSlider(clip, min=0.05, max=1.0, step=0.05, description="clip"),
    }
    fig, (left, right) = _figure(columns=2)
    largest = x.abs().max().item()
    left.hist(x.numpy(), bins=160, color=FLOAT, log=True)
    left.set(xlabel="value", ylabel="count (log)", title="grid over the values")
    grid = left.vlines([], 0, 1, colors=QUANTIZED, linewidth=0.7, transform=left.get_xaxis_transform())
    cut = [left.axvspan(sign * largest, sign * largest, color=CLIPPED, alpha=0.35) for sign in (-1, 1)]
    (rounding,) = right.plot(clips, clips, color=ERROR, label="rounding")
    (clipping,) = right.plot(clips, clips, color=CLIPPED, linestyle="--", label="clipping")
    (total,) = right.plot(clips, clips, color="black", linewidth=2, label="sum")
    (here,) = right.plot([clip], [1], "o", color=QUANTIZED, markersize=9)
    sizes = [e for b in (2, 8) for e in curves(b).sum(1)]
    right.set(
        xlabel="clip (fraction of the largest)",
        ylabel="mean squared error",
        yscale="log",
        ylim=(min(sizes) / 3, max(sizes) * 3),
        title="error",
    )
    right.legend(loc="upper center", ncols=3, fontsize="small")
    fig.subplots_adjust(left=0.09, right=0.98, top=0.9, bottom=0.16, wspace=0.28)

    def update(bits, clip) -> str:
        qp, errors = _clipped_grid(x, bits, clip), curves(bits)
        points = qp.scale * torch.arange(qp.qmin, qp.qmax + 1)
        grid.set_segments([[(p, 0), (p, 1)] for p in points.tolist()])
        for sign, span in zip((-1, 1), cut, strict=True):
            span.set_x(min(sign * clip, sign) * largest)
            span.set_width((1 - clip) * largest)
        for artist, values in ((rounding, errors[:, 0]), (clipping, errors[:, 1]), (total, errors.sum(1))):
            artist.set_ydata(np.maximum(values, 1e-30))
        split = split_error(x, qp)
        here.set_data([clip], [sum(split)])
        return (
            f"grid ±{clip * largest:.4g}   scale {qp.scale.item():.4g}   rounding {split.rounding:.2e}   "
            f"clipping {split.clipping:.2e}   sum {sum(split):.2e}   best clip {clips[errors.sum(1).argmin()]:.2f}"
        )

    return _explorer(controls, left, [*cut, grid, rounding, clipping, total, here], update)


def explore_gptq(
    weight: Tensor, hessian: Hessian, *, bits: int = 4, group_size: int | None = None
) -> Explorer:
    """GPTQ beside round-to-nearest on one layer: the two errors of each, and the output error of every row."""
    weight = weight.detach()
    groups = [("whole row", 0), *((str(size), size) for size in (128, 64, 32, 16))]
    controls = {
        "bits": widgets.IntSlider(bits, min=2, max=8, description="bits"),
        "group": widgets.SelectionSlider(options=groups, value=group_size or 0, description="group"),
        "damping": widgets.SelectionSlider(
            options=[0.0001, 0.001, 0.01, 0.1, 1.0, 10.0], value=0.01, description="damping"
        ),
        "act_order": widgets.Checkbox(False, description="act-order"),
    }
    H, energy = hessian.matrix, _row_energy(weight, hessian.matrix)

    @cache
    def errors(bits, group, damping, act_order) -> tuple:
        granularity = PerGroup(group) if group else PerAxis(0)
        nearest = quantize_tensor(weight, bits=bits, granularity=granularity, symmetric=False)
        gptq = gptq_quantize(
            weight, hessian, bits=bits, group_size=group or None, damping=damping, act_order=act_order
        )
        return tuple(_two_errors(weight, q, H, energy) for q in (nearest, gptq))

    fig, (left, right) = _figure(columns=2)
    bars = left.bar([0, 1, 3, 4], [1] * 4, color=[ERROR, QUANTIZED] * 2, bottom=1e-9)
    left.set(yscale="log", ylim=(1e-6, 1), xticks=[0.5, 3.5], ylabel="relative error")
    left.set_xticklabels(["of the weight", "of the output"])
    left.legend(bars[:2], ["round to nearest", "GPTQ"], loc="upper center", ncols=2, fontsize="small")
    right.plot([1e-9, 10], [1e-9, 10], color="0.5", linewidth=0.8)
    (rows,) = right.plot([], [], ".", color=QUANTIZED, markersize=4)
    right.set(
        xscale="log",
        yscale="log",
        xlim=(1e-6, 3),
        ylim=(1e-6, 3),
        xlabel="round to nearest",
        ylabel="GPTQ",
        title="output error, a dot for each row",
    )
    fig.subplots_adjust(left=0.09, right=0.98, top=0.9, bottom=0.16, wspace=0.28)

    def update(bits, group, damping, act_order) -> str:
        (w0, o0, r0), (w1, o1, r1) = errors(bits, group, damping, act_order)
        for bar, value in zip(bars, (w0, w1, o0, o1), strict=True):
            bar.set_height(value)
        rows.set_data(r0, r1)
        return (
            f"weight error {w0:.2e} → {w1:.2e} ({w1 / w0:.2f} ×)   output error {o0:.2e} → {o1:.2e} "
            f"({o1 / o0:.2f} ×)   rows that GPTQ improves: {np.mean(r1 < r0):.0%}"
        )

    return _explorer(controls, left, [*bars, rows], update)


def explore_columns(
    weight: Tensor, hessian: Hessian, *, bits: int = 3, rows: int = 24, column: int = 0
) -> Explorer:
    """GPTQ column by column: how far each weight has moved, and the output error so far beside round-to-nearest's."""
    weight = weight.detach().double()[:rows]
    rows = len(weight)
    H, states = hessian.matrix, gptq_steps(weight, hessian, bits=bits)
    nearest = quantize_tensor(weight, bits=bits, granularity=PerAxis(0), symmetric=False).dequantize()
    columns = weight.shape[1]
    mixed = [torch.cat([nearest[:, :k], weight[:, k:]], dim=1) for k in range(columns + 1)]
    energy = _row_energy(weight, H).sum()
    curves = [
        [(_row_energy(weight - state, H).sum() / energy).item() for state in way] for way in (mixed, states)
    ]
    controls = {
        "column": widgets.IntSlider(
            column,
            min=0,
            max=columns,
            description="columns done",
            style={"description_width": "initial"},
            layout={"width": "500px"},
        )
    }
    fig, (top, bottom) = _figure(rows=2, height=4.6, gridspec_kw={"height_ratios": [3, 2]}, sharex=True)
    moved = (states - weight).numpy()
    picture = top.imshow(
        moved[0],
        aspect="auto",
        cmap="PuOr",
        interpolation="nearest",
        extent=(0, columns, rows, 0),
        vmin=-np.quantile(abs(moved), 0.995),
        vmax=np.quantile(abs(moved), 0.995),
    )
    front = top.axvline(0, color="black", linewidth=1.2)
    top.set(
        ylabel="row of W",
        title="how far each weight has moved from its original value (violet up, orange down)",
    )
    bottom.plot(curves[0], color=ERROR, label="round to nearest")
    bottom.plot(curves[1], color=QUANTIZED, label="GPTQ")
    (here,) = bottom.plot([0], [0], "o", color=QUANTIZED, markersize=9)
    bottom.set(xlabel="columns rounded so far", ylabel="output error", xlim=(0, columns), ylim=(0, None))
    bottom.legend(loc="upper left", fontsize="small")
    fig.subplots_adjust(left=0.09, right=0.98, top=0.93, bottom=0.11, hspace=0.1)

    def update(column) -> str:
        picture.set_data(moved[column])
        front.set_xdata([column, column])
        here.set_data([column], [curves[1][column]])
        return (
            f"{column} of {columns} columns rounded   output error so far: round to nearest "
            f"{curves[0][column]:.2e}, GPTQ {curves[1][column]:.2e}"
        )

    return _explorer(controls, top, [picture, front, here], update, few_colours=False)


def _row_energy(w: Tensor, H: Tensor) -> Tensor:
    return ((w.double() @ H) * w.double()).sum(1)


def _two_errors(weight: Tensor, q: QTensor, H: Tensor, energy: Tensor) -> tuple:
    """Relative error of the weight, of the output, and of each row's output."""
    difference = weight - q.dequantize()
    rows = _row_energy(difference, H)
    of_weight = (difference.square().sum() / weight.square().sum()).item()
    return of_weight, (rows.sum() / energy.sum()).item(), (rows / energy).numpy()


def explore_temperature(
    model, tokenizer, generate: Callable, *, prompt: str, tokens: int = 60, words: int = 11
) -> Explorer:
    """The likeliest next tokens after the prompt at each temperature, and the story that sampling then tells.

    generate is quantlab.lm.generate; the stories are told once, before the slider moves.
    """
    temperatures = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
    stories = {
        t: generate(model, tokenizer, prompt, tokens=tokens, temperature=t, seed=1)
        for t in tqdm(temperatures, desc="telling stories", leave=False)
    }
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor(
        [begin + tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=model.device
    )
    with torch.no_grad():
        everything = model(ids).logits[0, -1].float().cpu()
    scores, best = everything.topk(words)
    controls = {
        "temperature": widgets.SelectionSlider(options=temperatures, value=1.0, description="temperature")
    }
    controls["temperature"].style.description_width = "initial"
    fig, ax = _figure(height=2.6)
    bars = ax.bar(range(words), [0.5] * words, color=QUANTIZED)
    ax.set(ylim=(0, 1), ylabel="probability", xticks=range(words), title=f"next token after “{prompt}”")
    ax.set_xticklabels([repr(tokenizer.decode([i]))[1:-1] for i in best.tolist()], fontsize="small")
    fig.subplots_adjust(left=0.09, right=0.98, top=0.88, bottom=0.13)

    def update(temperature) -> str:
        chance = (
            (scores == scores.max()).float()
            if temperature == 0
            else torch.softmax(everything / temperature, 0)[best]
        )
        for bar, value in zip(bars, chance.tolist(), strict=True):
            bar.set_height(value)
        return f"temperature {temperature}: {stories[temperature]}"

    return _explorer(controls, ax, list(bars), update)


def explore_bits(results: list[dict]) -> Explorer:
    """Drag the bits of a whole model: what it writes, its perplexity and its KL to the float model.

    results: one dict for each setting with label, bits, perplexity, stderr, kl and text, the float model first.
    """
    labels = [r["label"] for r in results]
    controls = {"model": widgets.SelectionSlider(options=labels, value=labels[0], description="model")}
    fig, (left, right) = _figure(columns=2, height=2.8)
    places = range(len(results))
    left.errorbar(
        places,
        [r["perplexity"] for r in results],
        yerr=[r["stderr"] for r in results],
        color=ERROR,
        capsize=3,
        marker="o",
        markersize=4,
    )
    right.plot(places, [max(r["kl"], 1e-6) for r in results], "s-", color=QUANTIZED, markersize=4)
    for ax, name in ((left, "perplexity"), (right, "KL to the float model, nats")):
        ax.set(yscale="log", ylabel=name, xticks=places)
        ax.set_xticklabels(labels, fontsize="small", rotation=30)
    ring = {"color": OTHER, "markersize": 11, "fillstyle": "none", "markeredgewidth": 2.5}
    (here,) = left.plot([0], [results[0]["perplexity"]], "o", **ring)
    (there,) = right.plot([0], [max(results[0]["kl"], 1e-6)], "o", **ring)
    fig.subplots_adjust(left=0.09, right=0.98, top=0.96, bottom=0.24, wspace=0.28)

    def update(model) -> str:
        place = labels.index(model)
        r = results[place]
        here.set_data([place], [r["perplexity"]])
        there.set_data([place], [max(r["kl"], 1e-6)])
        return f"{model}: perplexity {r['perplexity']:.2f} ± {r['stderr']:.2f}, KL {r['kl']:.4f}\n{r['text']}"

    return _explorer(controls, left, [here, there], update)
