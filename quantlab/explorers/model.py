"""Sliders on a whole model: the temperature it samples with, and the bits of its weights."""

from collections.abc import Callable

import ipywidgets as widgets
import torch
from tqdm.auto import tqdm

from quantlab.explorers.base import Explorer, figure, tie
from quantlab.plots import ERROR, OTHER, QUANTIZED


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
    fig, ax = figure(height=2.6)
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

    return tie(controls, ax, list(bars), update)


def explore_bits(results: list[dict]) -> Explorer:
    """Drag the bits of a whole model: what it writes, its perplexity and its KL to the float model.

    results: one dict for each setting with label, bits, perplexity, stderr, kl and text, the float model first.
    """
    labels = [r["label"] for r in results]
    controls = {"model": widgets.SelectionSlider(options=labels, value=labels[0], description="model")}
    fig, (left, right) = figure(columns=2, height=2.8)
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

    return tie(controls, left, [here, there], update)
