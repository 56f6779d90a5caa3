"""Sliders on a whole model: the temperature it samples with, and the bits of its weights."""

from collections.abc import Callable

import ipywidgets as widgets
import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm.auto import tqdm

from quantlab.explorers.base import Explorer, bind, figure
from quantlab.explorers.drawing import draw_ring, plain_ticks
from quantlab.lm import token_stream
from quantlab.plots import ERROR, FLOAT, QUANTIZED

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def explore_temperature(
    model, tokenizer, generate: Callable, *, prompt: str, tokens: int = 60, words: int = 11
) -> Explorer:
    """The likeliest next tokens after the prompt at each temperature, and the story that sampling then gives.

    generate is quantlab.lm.generate; the stories are generated once, before the slider moves.
    """
    stories = {
        t: generate(model, tokenizer, prompt, tokens=tokens, temperature=t, seed=1)
        for t in tqdm(TEMPERATURES, desc="generating stories", leave=False)
    }
    logits = _next_logits(model, tokenizer, prompt)
    best = logits.topk(words).indices
    wide = {"style": {"description_width": "initial"}}
    slider = widgets.SelectionSlider(options=TEMPERATURES, value=1.0, description="temperature", **wide)
    fig, ax = figure(height=2.6)
    bars = ax.bar(range(words), [0.5] * words, color=QUANTIZED)
    ax.set(ylim=(0, 1), ylabel="probability", xticks=range(words), title=f"next token after “{prompt}”")
    ax.set_xticklabels([repr(tokenizer.decode([i]))[1:-1] for i in best.tolist()], fontsize="small")
    fig.subplots_adjust(left=0.09, right=0.98, top=0.88, bottom=0.13)

    def update(temperature) -> str:
        for bar, value in zip(bars, _probabilities(logits, temperature)[best].tolist(), strict=True):
            bar.set_height(value)
        return f"temperature {temperature}: {stories[temperature]}"

    return bind({"temperature": slider}, ax, list(bars), update)


def _next_logits(model, tokenizer, prompt: str) -> Tensor:
    """The logits of the token after the prompt, (vocabulary,)."""
    ids = token_stream(tokenizer, prompt)  # with the begin token where generate() has it
    with torch.no_grad():
        return model(ids[None].to(model.device)).logits[0, -1].float().cpu()


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    """How generate() picks a token: all on the likeliest at temperature 0."""
    return (logits == logits.max()).float() if temperature == 0 else torch.softmax(logits / temperature, 0)


def explore_bits(results: list[dict]) -> Explorer:
    """Drag the bits of a whole model: what it writes, its perplexity and its KL to the float model.

    results: one dict for each setting with label, bits, perplexity, stderr, kl and text, the float model first; with
    top1 too, if it was measured.
    """
    labels = [row["label"] for row in results]
    controls = {"model": widgets.SelectionSlider(options=labels, value=labels[0], description="model")}
    picture = _BitsPicture(results)

    def update(model) -> str:
        i = labels.index(model)
        row = results[i]
        picture.show(i)
        agreed = f", same top token {row['top1']:.1%}" if "top1" in row else ""
        alike = f"; {_shared_words(row['text'], results[0]['text'])} words as {labels[0]}" if i else ""
        numbers = f"perplexity {row['perplexity']:.2f} ± {row['stderr']:.2f}, KL {row['kl']:.4f}"
        return f"{model}: {numbers}{agreed}{alike}\n{row['text']}"

    return bind(controls, picture.left, picture.moving, update)


class _BitsPicture:
    """Perplexity and KL over the bits, and a ring around the chosen model in both."""

    def __init__(self, results: list[dict]):
        fig, (self.left, right) = figure(columns=2, height=2.8)
        fig.subplots_adjust(left=0.08, right=0.99, top=0.96, bottom=0.18, wspace=0.24)
        self.places = _places([row["bits"] for row in results])
        self.perplexities = _draw_perplexity(self.left, self.places, results)
        self.kl = _draw_kl(right, self.places, [row["kl"] for row in results])
        for ax, name in ((self.left, "perplexity"), (right, "KL to the float model, nats")):
            ax.set(yscale="log", ylabel=name, xticks=self.places, xlabel="bits of each weight")
            ax.set_xticklabels([row["label"].removesuffix(" bits") for row in results], fontsize="small")
        plain_ticks(self.left.yaxis)
        self.moving = [draw_ring(ax, markersize=11) for ax in (self.left, right)]

    def show(self, i: int) -> None:
        for ring, heights in zip(self.moving, (self.perplexities, self.kl), strict=True):
            ring.set_data([self.places[i]], [heights[i]])


def _draw_perplexity(ax: Axes, places: list[int], results: list[dict]) -> list[float]:
    """Perplexities with their standard errors, that of the float model as a band; returns the heights."""
    whole, heights = results[0], [row["perplexity"] for row in results]
    band = whole["perplexity"] - whole["stderr"], whole["perplexity"] + whole["stderr"]
    ax.axhspan(*band, color=FLOAT, alpha=0.4, linewidth=0, label=f"{whole['label']} ± standard error")
    ax.errorbar(places, heights, [row["stderr"] for row in results], color=ERROR, capsize=3, marker="o", markersize=4)
    ax.legend(fontsize="small", loc="upper right")
    return heights


def _draw_kl(ax: Axes, places: list[int], kl: list[float]) -> list[float]:
    """KL on a logarithmic axis, a KL of 0 as a point of its own below all others; returns the heights."""
    floor = min([value for value in kl if value > 0], default=1.0) / 4
    points = [(place, value) for place, value in zip(places, kl, strict=True) if value > 0]
    ax.plot([x for x, _ in points], [y for _, y in points], "s-", color=QUANTIZED, markersize=4)
    for place, value in zip(places, kl, strict=True):
        if value <= 0:
            ax.plot(place, floor, "s", color=QUANTIZED, markersize=4)
            ax.annotate("0", (place, floor), (0, 7), textcoords="offset points", ha="center")
    return [max(value, floor) for value in kl]


def _places(bits: list[int]) -> list[int]:
    """Bits on a straight scale; a float model's stand two steps beyond the others."""
    others = [b for b in bits if b <= 16]
    return [b if b <= 16 else max(others, default=0) + 2 for b in bits]


def _shared_words(text: str, other: str) -> int:
    """How many words two texts begin with in common."""
    pairs = list(zip(text.split(), other.split(), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
