"""Sliders on a whole model: the temperature it samples with, and the bits of its weights."""

from collections.abc import Callable

import ipywidgets as widgets
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from tqdm.auto import tqdm

from quantlab.explorers.base import Explorer, figure, tie
from quantlab.plots import ERROR, FLOAT, OTHER, QUANTIZED


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
    ids = torch.tensor([begin + tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=model.device)
    with torch.no_grad():
        everything = model(ids).logits[0, -1].float().cpu()
    scores, best = everything.topk(words)
    controls = {"temperature": widgets.SelectionSlider(options=temperatures, value=1.0, description="temperature")}
    controls["temperature"].style.description_width = "initial"
    fig, ax = figure(height=2.6)
    bars = ax.bar(range(words), [0.5] * words, color=QUANTIZED)
    ax.set(ylim=(0, 1), ylabel="probability", xticks=range(words), title=f"next token after “{prompt}”")
    ax.set_xticklabels([repr(tokenizer.decode([i]))[1:-1] for i in best.tolist()], fontsize="small")
    fig.subplots_adjust(left=0.09, right=0.98, top=0.88, bottom=0.13)

    def update(temperature) -> str:
        chance = (
            (scores == scores.max()).float() if temperature == 0 else torch.softmax(everything / temperature, 0)[best]
        )
        for bar, value in zip(bars, chance.tolist(), strict=True):
            bar.set_height(value)
        return f"temperature {temperature}: {stories[temperature]}"

    return tie(controls, ax, list(bars), update)


def explore_bits(results: list[dict]) -> Explorer:
    """Drag the bits of a whole model: what it writes, its perplexity and its KL to the float model.

    results: one dict for each setting with label, bits, perplexity, stderr, kl and text, the float model first; with
    top1 too, if it was measured.
    """
    labels, places = [r["label"] for r in results], _places([r["bits"] for r in results])
    controls = {"model": widgets.SelectionSlider(options=labels, value=labels[0], description="model")}
    fig, (left, right) = figure(columns=2, height=2.8)
    fig.subplots_adjust(left=0.08, right=0.99, top=0.96, bottom=0.18, wspace=0.24)
    whole, values, stderrs = results[0], [r["perplexity"] for r in results], [r["stderr"] for r in results]
    band = whole["perplexity"] - whole["stderr"], whole["perplexity"] + whole["stderr"]
    left.axhspan(*band, color=FLOAT, alpha=0.4, linewidth=0, label=f"{labels[0]} ± standard error")
    left.errorbar(places, values, yerr=stderrs, color=ERROR, capsize=3, marker="o", markersize=4)
    left.legend(fontsize="small", loc="upper right")
    kl = _draw_kl(right, places, [r["kl"] for r in results])
    for ax, name in ((left, "perplexity"), (right, "KL to the float model, nats")):
        ax.set(yscale="log", ylabel=name, xticks=places, xlabel="bits of each weight")
        ax.set_xticklabels([label.removesuffix(" bits") for label in labels], fontsize="small")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    ring = {"color": OTHER, "markersize": 11, "fillstyle": "none", "markeredgewidth": 2.5}
    (here,), (there,) = left.plot([], [], "o", **ring), right.plot([], [], "o", **ring)

    def update(model) -> str:
        i = labels.index(model)
        r = results[i]
        here.set_data([places[i]], [values[i]])
        there.set_data([places[i]], [kl[i]])
        agreed = f", same top token {r['top1']:.1%}" if "top1" in r else ""
        alike = f"; {_shared_words(r['text'], whole['text'])} words as {labels[0]}" if i else ""
        numbers = f"perplexity {r['perplexity']:.2f} ± {r['stderr']:.2f}, KL {r['kl']:.4f}"
        return f"{model}: {numbers}{agreed}{alike}\n{r['text']}"

    return tie(controls, left, [here, there], update)


def _draw_kl(ax, places: list[int], kl: list[float]) -> list[float]:
    """KL on a logarithmic axis, a KL of 0 as a point of its own below all others; returns the heights."""
    least = min([value for value in kl if value > 0], default=1.0) / 4
    points = [(place, value) for place, value in zip(places, kl, strict=True) if value > 0]
    ax.plot([x for x, _ in points], [y for _, y in points], "s-", color=QUANTIZED, markersize=4)
    for place, value in zip(places, kl, strict=True):
        if value <= 0:
            ax.plot(place, least, "s", color=QUANTIZED, markersize=4)
            ax.annotate("0", (place, least), (0, 7), textcoords="offset points", ha="center")
    return [max(value, least) for value in kl]


def _places(bits: list[int]) -> list[int]:
    """Bits on a straight scale; a float model's stand two steps beyond the others."""
    others = [b for b in bits if b <= 16]
    return [b if b <= 16 else max(others, default=0) + 2 for b in bits]


def _shared_words(text: str, other: str) -> int:
    """How many words two texts begin with in common."""
    pairs = list(zip(text.split(), other.split(), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
