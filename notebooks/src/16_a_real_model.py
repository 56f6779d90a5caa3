# %% [markdown]
# # 16 A real language model
# *60 minutes, of which the computer needs about four. You need notebooks 01 to 12.*
#
# All that you have measured so far, you measured on a model of 3.7 million parameters. Here is one that people use:
# **SmolLM2-135M-Instruct**, 37 times as large, trained by Hugging Face on two trillion tokens. At the end you can
#
# - say of any downloaded weights whether they were quantized before, and what that does to your numbers;
# - find a model's outliers, and tell loud *channels* (通道) from loud *tokens* (词元), which need other remedies;
# - explain with two numbers why SmoothQuant helps one model and not another;
# - name, with a measurement for each, what a small model tells you about a larger one, and what it does not.
# %% [markdown]
# ### Recall
# 1. SmoothQuant moves the size of outliers from the activations into the weights. What must lie *before* the
#    layer for that to cost nothing (notebook 09)?
# 2. Why is KL to the float model a finer measure than perplexity (notebook 06)?
# 3. GPTQ lowers the error of a layer's *output*. On which tokens (notebook 10b)?
#
# <details><summary>Answers</summary>
# 1. A norm, or another layer that takes the inverse factor. 2. Both models read the same text, so what is hard
#    about the text cancels. 3. On those it was calibrated on; elsewhere only if they are like them.</details>
# %% [markdown]
# ## 1. What broke
# Nothing, yet. But a sentence like "8-bit activations are nearly free" was measured on a model that tells stories
# to children. Would you bet on it for a larger one? Near the end stand **ten sentences**, all true of the small
# model, each tried on both. Before you have seen anything:
# %%
from quantlab.predictions import predict, score

bet = predict("How many of the ten hold for the larger model as well?", (0, 10), near=1)
# %% [markdown]
# ## 2. Meet it
# If SmolLM2 cannot be had here, the notebook runs on the model of the other notebooks, and says so.
# %% tags=["nbval-ignore-output"]
from functools import partial

from quantlab.checks import check, hint, solution
from quantlab.checks import found as found_on
from quantlab.lm import DATA, answer, linear_layers, load_lm, load_text, real_lm, token_stream

model, tokenizer, which = real_lm()
found = partial(found_on, on=which, home="smollm2")  # what follows was found on SmolLM2
small, small_tokenizer = load_lm(str(DATA / "model"))
sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (small, model)]
times = sizes[1] / sizes[0]
print(f"{which}: {sizes[1]:.0f} million parameters, {times:.0f} times {sizes[0]:.1f} million")
answer(model, tokenizer, "What is the capital of France?", tokens=12)
# %% [markdown]
# A model of the "Instruct" kind expects its **chat template** (对话模板): marks around your words that say who is
# speaking. `answer` puts them there.
#
# Where are its parameters? **Predict** which has the larger share than in the small model: the embedding, or the
# linear layers of the blocks?
# %% tags=["nbval-ignore-output"]
def parts_of(model):
    total = sum(p.numel() for p in model.parameters())
    linear = sum(layer.weight.numel() for layer in linear_layers(model).values())
    embedding = model.get_input_embeddings().weight.numel()
    return {"parameters": total, "linear layers": linear / total, "embedding": embedding / total}

parts = {"small": parts_of(small), which: parts_of(model)}
for name, part in parts.items():
    print(f"{name}: {part['parameters']:,} parameters,",
          f"{part['linear layers']:.0%} in linear layers, {part['embedding']:.0%} in the embedding")
# %% [markdown]
# A vocabulary of 49,152 tokens needs a large table, and the methods of this workbook do not touch it. So this
# model "in 4 bits" takes more than 4 bits a parameter on disk. True bits are counted in the ledger.
#
# ## 3. These floats have been integers before
# The file that this model came in holds 4-bit codes (format Q4_1 of llama.cpp, notebook 19), and `load_lm` turned
# them into floats. Can you tell that from the floats alone?
#
# ### Exercise 16.1: was it quantized before? (about 10 minutes)
# `weight` (rows, columns) is a float tensor whose columns are a multiple of `group_size`. Neighbours in a row share
# a scale, `group_size` at a time. Return how many *different* values the group with the most of them has, an int.
# %% tags=["exercise"]
def my_levels(weight, group_size):
    raise NotImplementedError
# %%
check("16.1", my_levels)
# %% tags=["nbval-ignore-output"]
from quantlab.exercises.real_model import levels_solution
from quantlab.lm import layers_of_role, weight_of

def some_weight(model, role="down", block=2):
    layer = list(layers_of_role(model, role).values())[block]
    return weight_of(layer).detach()

{name: [levels_solution(some_weight(m), group) for group in (16, 32, 64)] for name, m in
 (("small", small), (which, model))}
# %% [markdown]
# In groups of 32 the small model's weights are all different; in this layer of SmolLM2 never more than 16 values
# occur: 4 bits. In groups of 64 there are more, so 32 is the size that shares a scale.
#
# **A model that was quantized before flatters the grid it lies on.** Round it to 4 bits in groups of 32 once more,
# with three kinds of grid. Which of them gives the weights back?
# %%
grids = predict("Which grid of 4 bits for groups of 32 has next to no error on SmolLM2?",
                ["symmetric", "integer zero point", "real offset", "none of them"])
# %% tags=["nbval-ignore-output"]
import torch

from quantlab import PerGroup, quantize_tensor

def relative(error, y):
    return (error.square().sum() / y.square().sum()).item()

def with_offset(w, group=32):  # q = round((w - low) / s), as Q4_1 does: 0 need not be on the grid
    groups = w.reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    s = (high - low).clamp(min=1e-12) / 15
    return (low + s * torch.round((groups - low) / s)).view_as(w)

# %% tags=["nbval-ignore-output"]
w = some_weight(model)
def grid_error(w, symmetric):
    q = quantize_tensor(w, bits=4, granularity=PerGroup(32), symmetric=symmetric)
    return relative(q.dequantize() - w, w)

errors = {"symmetric": grid_error(w, True), "integer zero point": grid_error(w, False),
          "real offset": relative(with_offset(w) - w, w)}
found(errors["real offset"] < 1e-5, "a real offset gives the weights back")
found(errors["integer zero point"] > 1e-3, "an integer zero point does not")
print({name: f"{error:.1e}" for name, error in errors.items()})
grids.reveal("real offset" if errors["real offset"] < 1e-5 else "none of them")
# %% [markdown]
# Only the grid with a real offset, the one that was used before. Ours has an *integer* zero point (notebook 01),
# and that is enough to miss it. So are our numbers on this model honest? A test: shake each weight evenly within
# its old cell, ± half a step, which gives a weight that was never quantized but is just as large. If the old grid
# flattered ours, ours would now do much worse.
# %% tags=["nbval-ignore-output"]
from quantlab import PerAxis, quantize_codebook, nf4_levels

groups = w.reshape(-1, 32)
step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15
shake = torch.rand(groups.shape, generator=torch.Generator().manual_seed(0)) - 0.5
shaken = (groups + shake * step).view_as(w)
ways = {"4 bits, 32": PerGroup(32), "4 bits, 128": PerGroup(128), "4 bits, row": PerAxis(0)}
def flattery(quantizer):  # below 1: less error on the old weights than on shaken ones
    before, after = (relative(quantizer(v).dequantize() - v, v) for v in (w, shaken))
    return before / after

ratios = {name: flattery(lambda v, g=granularity: quantize_tensor(v, bits=4, granularity=g))
          for name, granularity in ways.items()}
ratios["NF4"] = flattery(lambda v: quantize_codebook(v, nf4_levels()))
found(0.9 < min(ratios.values()), "none of our grids is flattered by more than a tenth")
{name: f"{ratio:.2f}" for name, ratio in ratios.items()}
# %% [markdown]
# Ratios near 1: the grids of this workbook gain nothing from the model's past.
#
# ## 4. Outliers that nobody planted
# In notebook 09 six loud channels were planted, since the small model has none. Does this one? We let it read, and
# keep what every linear layer reads.
# %%
loud = predict("Where are this model's largest activations?",
               ["in a few channels, for all tokens", "in a few tokens, in all channels",
                "in single values"])
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_activations, loudness
from quantlab.lm import capture_inputs

text = token_stream(tokenizer, load_text("general"))
read = capture_inputs(model, text[:256], linear_layers(model))
loudest = sorted(read, key=lambda name: -read[name].abs().max())[:6]
for name in loudest:
    it = loudness(read[name])
    print(f"{name:<34} |x| up to {it.largest:7.1f}, token {it.token:>3}, channel {it.channel:>4};",
          f"{(read[name].abs() > it.largest / 10).sum():>3} values reach a tenth of that")
its = [loudness(read[name]) for name in loudest]
few = [(read[name].abs() > it.largest / 10).sum().item()
       for name, it in zip(loudest[:2], its[:2], strict=True)]
found(all(it.token == 0 for it in its), "the loudest values belong to the first token")
found(max(few) < 10, f"in the two loudest layers a handful of values is loud: {few}")
channels = its[0].of_channels > its[0].of_tokens
lines = "in a few channels, for all tokens" if channels else "in a few tokens, in all channels"
loud.reveal("in single values" if max(few) < 10 else lines)
# %% [markdown]
# **Massive activations** (Sun et al. 2024): in the two loudest layers one or two values stand alone, far above all
# others, and they belong to *one token*, the first. All six layers are `down_proj`.
# Attention weights sum to 1, so a head that has nothing to say must look somewhere. It has learnt to look at the
# first token: an **attention sink** (注意力汇聚点).
#
# Is it the first *word*, or the first *place*? The control: let the text begin one word later.
# %% tags=["nbval-ignore-output"]
name = loudest[0]
moved = loudness(capture_inputs(model, text[1:257], [name])[name])
words = [tokenizer.decode(text[i : i + 1]) for i in (0, 1)]
found(moved.token == 0, f"the first place is loud, whatever word stands there ({moved})")
{words[0]: f"{read[name].abs().max():.0f}", words[1]: f"{moved.largest:.0f} at token {moved.token}"}
# %% [markdown]
# It is the place. For comparison, the planted model of notebook 09: six channels, each made 100 times as loud, for
# every token.
# %% tags=["nbval-ignore-output"]
from quantlab.outliers import norm_readers, plant_outliers

width = small.config.hidden_size
channels = list(range(0, width - width // 16, width * 5 // 32))[:6]
planted = plant_outliers(small, channels=channels, factor=100)
query = next(iter(layers_of_role(planted, "query")))
stories = token_stream(small_tokenizer, load_text("eval"))
planted_x = capture_inputs(planted, stories[:256], [query])[query]
for title, x in (("planted", planted_x), (which, read[loudest[0]])):
    it = loudness(x)
    print(f"{title}: loudest over median: tokens {it.of_tokens:.3g}, channels {it.of_channels:.3g}")
# %% [markdown]
# ### Exercise 16.2: who shares a scale? (about 15 minutes)
# `x` (tokens, channels) holds activations, no row and no column of it all zeros. Round it to symmetric codes of
# `bits` bits, −(2ᵇ⁻¹ − 1) … 2ᵇ⁻¹ − 1, three times: with one scale for the tensor, one for each token, one for each
# channel, each from the largest magnitude. Return the three relative errors, Σ(x̂ − x)² / Σx², as a dict with the
# keys `"tensor"`, `"token"` and `"channel"`.
# %% tags=["exercise"]
def my_sharing(x, bits):
    raise NotImplementedError
# %%
check("16.2", my_sharing)
# %% tags=["nbval-ignore-output"]
from quantlab.exercises.real_model import sharing_solution

for title, x in (("planted", planted_x), (which, read[loudest[0]])):
    print(title, {key: f"{error:.1e}" for key, error in sharing_solution(x, 8).items()})
    print(f"    the first token has {x[0].square().sum() / x.square().sum():.2%} of Σx²")
# %% [markdown]
# Such an error is measured against the size of x, and in SmolLM2 the first token *is* nearly all of it. What
# happens to the others? **Predict** how much of the other 255 tokens is lost when the first one sets the scale.
# %% tags=["nbval-ignore-output"]
lost = {}
for title, x in (("planted", planted_x), (which, read[loudest[0]])):
    step, others = x.abs().max() / 127, x[1:]
    shared = relative(torch.round(others / step) * step - others, others)
    lost[title] = shared, sharing_solution(others, 8)["tensor"]
found(lost[which][0] > 0.9, "with the first token's scale nearly all of the others is lost")
found(lost["planted"][0] < 2 * lost["planted"][1], "planted: the first token is one of many")
{title: "with its scale {:.1e}, without it {:.1e}".format(*both) for title, both in lost.items()}
# %% [markdown]
# One value of one token, and nothing is left of the other 255 tokens of this layer: the error is as large as they
# are. With a scale from themselves alone it is 0.019. In the planted model the first token makes no difference:
# every token has the loud channels.
#
# **Drag** through the layers. On the left the map, on the right how the largest magnitude falls from the loudest
# token, and from the loudest channel, to the quietest.
#
# 1. In which layers do both curves begin with a cliff, and in which only the channels'?
# 2. In which layers is the error of "one scale" furthest above that of "a scale a token"?
# 3. Where is a single token loud, and where several?
# %% tags=["nbval-ignore-output"]
layers = linear_layers(model)
shown = {"planted, " + query.split(".")[-1]: (some_weight(planted, "query", 0), planted_x)}
for name in [next(iter(layers_of_role(model, "query"))), *sorted(loudest)]:
    shown[f"{which}, {name.split('.', 2)[-1]}"] = weight_of(layers[name]).detach(), read[name]
explorer = explore_activations(shown)
explorer
# %% tags=["nbval-ignore-output"]
from quantlab import PerTensor

def times(weight, x):  # error of the output with one scale, over that with a scale a token
    rounded = [quantize_tensor(x, bits=8, granularity=of, symmetric=False).dequantize()
               for of in (PerTensor(), PerAxis(0))]
    one, each = (relative((x_hat - x) @ weight.T, x @ weight.T) for x_hat in rounded)
    return one / each

gains = {name: times(*layer) for name, layer in shown.items()}
planted_gain = next(iter(gains.values()))
found(max(gains.values()) > 3 * planted_gain, "a scale a token gives the real model more")
reach = {name: int((x.abs().amax(1) > x.abs().max() / 10).sum()) for name, (_, x) in shown.items()}
{name: f"{gain:.0f} times; tokens that reach a tenth of the maximum: {reach[name]}"
 for name, gain in gains.items()}
# %% [markdown]
# **What you saw.** The planted layer has six bright columns from top to bottom, and only its channels fall off a
# cliff: tokens are alike, and a scale for each of them divides the error by 9. SmolLM2's `down_proj` layers have
# a bright dot in the first row, and the tokens' curve falls as well: there a scale for each token divides the
# error by up to 110. In blocks 11 and 28 one token alone is loud; in block 2 eleven of the 256 reach a tenth of
# the maximum, in block 29 eighty-one, and there the error is divided by 29.
#
# ## 5. Which remedy helps whom?
# The whole models now, 8 bits for weights and activations, in five ways. KL to the float model, on 512 tokens of
# general English or of stories; the ways that calibrate read 128 others. A `Yardstick` reads the float model
# once, and then every quantized one.
# %%
from quantlab.exercises.material import Yardstick

general = token_stream(tokenizer, load_text("general_calibration"))[:128]
told = token_stream(small_tokenizer, load_text("calibration"))[:128]
real = Yardstick(model, text[:512], general)
tale, loud_tale = (Yardstick(m, stories[:512], told) for m in (small, planted))
# %% tags=["nbval-ignore-output"]
from quantlab.methods import W8A8, LLMInt8, SmoothQuant

WAYS = {"one scale": W8A8(), "a scale a token": W8A8(per="token"), "static": W8A8(per="static"),
        "SmoothQuant": SmoothQuant(), "LLM.int8()": LLMInt8()}
def kl_by(yardstick, method):
    try:
        return yardstick.kl(method)
    except ValueError as why:  # SmoothQuant needs norms that linear layers alone read
        print(why)
        return float("nan")

table = {way: [kl_by(y, method) for y in (tale, loud_tale, real)] for way, method in WAYS.items()}
print(f"{'KL':<18}{'small':>9}{'planted':>9}{which:>12}")
for way, (a, b, c) in table.items():
    print(f"{way:<18}{a:>9.4f}{b:>9.4f}{c:>12.4f}")
# %% tags=["nbval-ignore-output"]
tensor, token, _, smooth, split = table.values()
found(tensor[2] > 5 * token[2], "on the real model a scale a token helps at least five times")
found(smooth[1] < 0.1 * tensor[1], "on the planted model SmoothQuant takes away nine tenths")
found(smooth[2] > 0.3 * tensor[2], "on the real model SmoothQuant leaves most of it")
found(split[2] < 0.2 * tensor[2], "LLM.int8() helps the real model as well")
{name: f"SmoothQuant leaves {smooth[i] / tensor[i]:.3f} of KL"
 for i, name in ((1, "planted"), (2, which))}
# %% [markdown]
# Two models with outliers, and the remedy that heals the one leaves 0.86 of the other's KL. SmoothQuant divides a
# *channel* by a factor, and needs a norm before the layer to take it. Here the loud values belong to a token, and
# they are read by `down_proj`, which no norm feeds. A scale for each token helps; so does LLM.int8(), which takes
# the loud column out of the sum.
#
# If so few layers are guilty, leave *them* in float. **Predict** what three of 210 layers are worth.
# %% tags=["nbval-ignore-output"]
guilty = predict("With the three loudest layers in float, KL with one scale falls to …",
                 ["nearly as before", "about a half", "less than a quarter"])
# %% tags=["nbval-ignore-output"]
spared = real.kl(W8A8(), keep=loudest[:3])
share = spared / tensor[2]
found(share < 0.5, f"three layers in float take away more than half of KL (left: {share:.2f})")
print(f"three of {len(layers)} layers in float: KL {spared:.4f}, {share:.2f} of {tensor[2]:.4f}")
much, little = share < 0.25, share < 0.75
guilty.reveal("less than a quarter" if much else "about a half" if little else "nearly as before")
# %% [markdown]
# ## 6. Ask it at 16, 8, 4 and 3 bits
# Weights only, nearest rounding in groups of 64. `load_lm` keeps SmolLM2's weights as float16 numbers, so 16 bits
# lose nothing: the cell checks that. **Predict** at how many bits the answer goes wrong, then **drag**.
# %% tags=["nbval-ignore-output"]
from quantlab.lm import perplexity
from quantlab.methods import NF4, RTN

question = "What is the opposite of hot?"
def row(label, bits, m, kl):
    p = perplexity(m, text[:512], window=128)
    return {"label": label, "bits": bits, "perplexity": p.value, "stderr": p.stderr, "kl": kl,
            "text": answer(m, tokenizer, question, tokens=25)}

half = all(torch.equal(p, p.half().float()) for p in model.parameters())
found(half, "every weight is a float16 number")
results = [row("16 bits" if half else "float", 16 if half else 32, model, 0.0)]
for bits in (8, 4, 3):
    method = RTN(bits=bits, group_size=64)
    rounded = real.quantized(method)
    results.append(row(f"{bits} bits", bits, rounded, real.kl(method, rounded)))
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_bits

explore_bits(results)
# %% tags=["nbval-ignore-output"]
for result in results:
    print(f"{result['label']:>8}, KL {result['kl']:.4f}: {result['text'][:80]!r}")
# %% [markdown]
# At 4 bits the answer is still right, at a KL of 0.33: an answer that reads well is no proof. And one that goes
# wrong at 3 bits says something about *nearest rounding*, not about 3 bits.
#
# ## 7. When GPTQ has read too little
# How many tokens must GPTQ read? Take one layer, whose inputs are 1,536 wide, and let it read 256, 1,024 or 4,096
# tokens. We measure the error of the output twice: on the tokens that GPTQ has read, and on 512 others. **Predict**:
# with how many of them is it better than nearest rounding on the others?
# %% tags=["nbval-ignore-output"]
from quantlab import Hessian, gptq_quantize

down = list(layers_of_role(model, "down"))[:2][-1]
weight = some_weight(model, "down", 1)
many = token_stream(tokenizer, load_text("general_calibration"))
x = capture_inputs(model, torch.cat([many[:4096], text[:512]]), [down])[down]
unseen, lost = x[4096:], {}
nearest = quantize_tensor(weight, bits=4, granularity=PerGroup(64), symmetric=False).dequantize()

def output_error(w_hat, x):
    return relative(x @ (w_hat - weight).T, x @ weight.T)

for count in (256, 1024, 4096):
    hessian = Hessian(weight.shape[1]).add(x[:count])
    w_hat = gptq_quantize(weight, hessian, bits=4, group_size=64).dequantize()
    lost[count] = output_error(w_hat, x[:count]), output_error(w_hat, unseen)
plain = output_error(nearest, unseen)
print(f"{weight.shape[1]} inputs; nearest rounding on the others: {plain:.2e}")
for count, (on_read, on_others) in lost.items():
    print(f"GPTQ, {count:>5} tokens: {on_read:.2e} on those, {on_others:.2e} on the others: "
          f"{on_others / on_read:.1f} times")
gaps = [on_others / on_read for on_read, on_others in lost.values()]
found(gaps[0] > 2 * gaps[-1], "with few tokens GPTQ learns them by heart")
found(lost[1024][1] > plain, "with 1,024 tokens it is worse on other text than nearest rounding")
found(lost[4096][1] < plain, "with 4,096 tokens it is better")
# %% [markdown]
# With fewer tokens than the layer is wide, XᵀX leaves directions in which nothing was read. GPTQ may put its
# errors there at no cost, but other text does go there. With 256 and 1,024 tokens the layer is *worse* on other
# text than nearest rounding, while its error on the tokens that were read looks splendid. With 4,096, more than
# twice as many as the layer is wide, it is better. `quantize_lm` warns when it gets fewer than two tokens for
# each input of the widest layer, and with `held_out=tokens` its report has each layer's error on tokens that GPTQ has
# not read.
#
# ### Does the model notice?
# `benchmarks/calibration_tokens.py` has let GPTQ walk through all 210 layers of SmolLM2 with 1,024 to 16,384 tokens
# (4 bits, groups of 128). 180 layers have 576 inputs, 30 have 1,536. **Predict**: with 1,024 tokens, is the whole model
# better off than by nearest rounding? And if GPTQ rounds only the layers with 576 inputs, or only those with 1,536?
# %%
import csv

import matplotlib.pyplot as plt

from quantlab import ledger
from quantlab.plots import plot_curves

walks = list(csv.DictReader((DATA / "calibration-smollm2.csv").open()))
whole = {int(walk["tokens"]): float(walk["kl"]) for walk in walks if walk["layers"] == "all"}
spread = {int(walk["tokens"]): float(walk["kl_error"]) for walk in walks if walk["layers"] == "all"}
missed = {  # output error on other text, over that of nearest rounding (0 tokens)
    width: {int(walk["tokens"]): float(walk["held_out"]) for walk in walks
            if walk["layers"] == "all" and walk["inputs"] == width} for width in ("576", "1536")}
curves = {f"{width} inputs": (list(lost)[1:], [e / lost[0] for e in list(lost.values())[1:]])
          for width, lost in missed.items()}
_, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
plot_curves(curves, xlabel="tokens", ylabel="error on other text,\nnearest = 1", log="x", ax=left)
plot_curves({"KL": (list(whole)[1:], list(whole.values())[1:])}, xlabel="tokens",
            ylabel="KL, nats", log="x", ax=right)
right.errorbar(list(whole)[1:], list(whole.values())[1:], list(spread.values())[1:], fmt="none",
               color="0.4", capsize=3)
for ax, height in ((left, 1), (right, whole[0])):
    ax.axhline(height, color="0.6")  # nearest rounding
plt.show()
alone = {walk["layers"]: float(walk["kl"]) for walk in walks if walk["layers"] != "all"}
assert curves["1536 inputs"][1][0] > 1.4  # with the fewest tokens
assert curves["576 inputs"][1][0] < 0.7
assert whole[16384] < whole[1024] < whole[0]
for count in (0, 1024, 16384):
    print(f"{f'GPTQ, {count:,} tokens' if count else 'nearest rounding':20}"
          f"KL {whole[count]:.3f} ± {spread[count]:.3f}")
same = {(row.method, row.bits, row.group): row.kl
        for row in ledger.read(DATA / "ledger-smollm2.csv")}["gptq", 4, "128"]
print(f"the walk with 16,384 tokens on another processor: KL {same:.3f}")
print("1,024 tokens, error on other text, nearest = 1:",
      {name: round(errors[0], 2) for name, (_, errors) in curves.items()})
print("1,024 tokens, GPTQ only in layers with", {k: round(kl, 3) for k, kl in alone.items()})
# %% [markdown]
# With 1,024 tokens the layers with 1,536 inputs have read less than one token an input, and are 1.5 times as wrong on
# other text as nearest rounding leaves them; those with 576 inputs have read nearly two, and gain. The model gains
# little, and nothing by the wide layers: GPTQ in them alone leaves KL where nearest rounding has it. With 16,384 tokens
# the wide layers gain as well. So what counts seems to be tokens for each input. (All wide layers are `down_proj`s,
# and width was not told apart from role.)
#
# The bump of KL at 2,048 tokens is smaller than its error bars. A gap of 5 % between two walks says nothing, either:
# the longest one, on a processor that adds in another order (AVX2 in place of AVX-512), ends at 0.308. The last digit
# of a sum can decide a code that lies near a tie, and each code moves the weights after it.
#
# ## 8. Ten sentences, two models
# Each is true of the small model; the number says which notebook it is about. Each is measured on both.
# %% tags=["nbval-ignore-output"]
claims = []
def claim(number, sentence, small_value, real_value, holds):
    values = small_value, real_value
    claims.append((number, sentence, *values, *(holds(value) for value in values)))

def both(method):
    return [yardstick.kl(method) for yardstick in (tale, real)]

def ratio(first, second):
    return [a / b for a, b in zip(first, second, strict=True)]

eights, fours, threes = (both(RTN(bits=bits, group_size=64)) for bits in (8, 4, 3))
rows, evens = both(RTN(group_size=None)), both(RTN(group_size=64, symmetric=True))
tables = both(NF4())
claim("06", "8-bit weights are free: KL below 0.005", *eights, lambda kl: kl < 0.005)
claim("06", "one bit less, 3 for 4, is 3 to 6 times the KL",
      *ratio(threes, fours), lambda r: 3 < r < 6)
claim("03", "4 bits: groups of 64 save a third of the KL of rows",
      *ratio(fours, rows), lambda r: r < 0.67)
claim("01", "4 bits: asymmetric is better than symmetric", *ratio(fours, evens), lambda r: r < 1)
claim("04", "NF4 is better than symmetric int4, blocks of 64",
      *ratio(tables, evens), lambda r: r < 1)
claim("08", "8-bit activations, one scale: KL below 0.05", *tensor[::2], lambda kl: kl < 0.05)
claim("08", "a scale a token is better than one", *ratio(token[::2], tensor[::2]), lambda r: r < 1)
# %% tags=["nbval-ignore-output"]
from quantlab.lm import activation_scales

def behind_norms(model, tokens):
    names = {layer: name for name, layer in linear_layers(model).items()}
    try:
        readers = norm_readers(model)
    except ValueError as why:  # a model whose linear layers read no norm
        print(why)
        return float("nan")
    fed = [names[layer] for _, layers in readers for layer in layers if layer in names]
    peaks = activation_scales(model, tokens)
    return max((peaks[name].max() / peaks[name].median()).item() for name in fed)

norms = behind_norms(small, stories[:512]), behind_norms(model, text[:512])
claim("09", "behind norms no channel is 5 times the median", *norms, lambda r: r < 5)
small_read = capture_inputs(small, stories[:256], linear_layers(small))
peaks = [max(x.abs().max().item() for x in inputs.values()) for inputs in (small_read, read)]
claim("09", "no activation is above 100", *peaks, lambda size: size < 100)
shares = [part["linear layers"] for part in parts.values()]
claim("00", "four fifths of the parameters are in linear layers", *shares, lambda part: part > 0.8)
# %% tags=["nbval-ignore-output"]
print(f"{'from':>4}  {'sentence':<62}{'small':>11}{which:>17}")
for number, sentence, a, b, holds_a, holds_b in claims:
    print(f"{number:>4}  {sentence:<62}{a:>8.3g} {'yes' if holds_a else 'no':<3}{b:>13.3g}",
          "yes" if holds_b else "no")
hold = sum(holds_b for *_, holds_b in claims)
found(all(holds_a for *_, holds_a, _ in claims), "all ten are true of the small model")
found(3 <= hold <= 8, f"some hold for the real model as well, and some do not ({hold} of 10)")
bet.reveal(hold)
# %% [markdown]
# What is about *grids for weights* holds: bits, groups, zero points, codebooks. What is about the *size* of
# activations does not, while a scale for each token is the better one in both. The share of linear layers depends
# on the vocabulary.
#
# ### Myth: "a tiny model tells you nothing" and its twin, "what held for the tiny model holds for all"
# The table takes both apart. A small model is a wind tunnel: it tells which *mechanisms* there are, and how to
# measure them; which of them is at work in another model, only a measurement on that model tells.
#
# ## 9. The ledger of a real model
# `python -m quantlab.sweep --model smollm2` measures 36 ways on 2,048 tokens of general
# English; those that calibrate read 16,384 others. So its numbers differ from those of sections 5 and 6, which read
# 512 tokens and calibrated on 128. What it found once, two rows at a time in half an hour, lies in `data`. Three
# predictions first; the last of them is about two rows of nearly the same size, embedding and all.
# %%
higher = predict("Which has the higher KL?",
                 ["8 bits for all, one scale for all tokens", "4 bits for weights, one scale a row"])
nearer = predict("4 bits, groups of 128: which is nearer to the float model?", ["GPTQ, left to right", "AWQ"])
finer = predict("Which has the lower KL?", ["3 bits, groups of 32", "4 bits, one scale a row"])
# %%
ledgers = {"small": ledger.read(DATA / "ledger.csv"), "smollm2": ledger.read(DATA / "ledger-smollm2.csv")}
stored = ledgers["smollm2"]
def find(*of, rows=stored):
    return next(r for r in rows if (r.method, r.bits, r.group) == of)

chosen = [r for r in stored if r.bits in (4, 32) or r.method.startswith(("w8", "smooth", "llm"))]
print(f"{len(chosen)} of {len(stored)} rows, the float model among them:")
ledger.Table(sorted(chosen, key=lambda r: -r.kl))
# %%
four = {"rtn": "nearest rounding", "gptq": "GPTQ, left to right", "gptq act-order": "GPTQ, act-order", "awq": "AWQ"}
one_scale, of_rows = find("w8a8_dynamic", 8, "tensor"), find("rtn", 4, "row")
print(higher.reveal("8 bits for all, one scale for all tokens" if one_scale.kl > of_rows.kl else
                    "4 bits for weights, one scale a row"))
left = {name: {way: find(way, 4, "128", rows=kept).kl / find("rtn", 4, "128", rows=kept).kl for way in four}
        for name, kept in ledgers.items()}
for way, words in four.items():
    print(f"{words:<20} leaves {left['small'][way]:.2f} of nearest rounding's KL on the small model,",
          f"{left['smollm2'][way]:.2f} on smollm2")
assert left["small"]["gptq"] < 0.5 < 0.9 < left["small"]["awq"]  # stored numbers: the same everywhere
assert max(left["smollm2"]["gptq act-order"], left["smollm2"]["awq"]) < 0.55 < 0.8 < left["smollm2"]["gptq"]
nearer.reveal("AWQ" if left["smollm2"]["awq"] < left["smollm2"]["gptq"] else "GPTQ, left to right")
# %% [markdown]
# On the small model GPTQ leaves 0.41 of nearest rounding's KL, 0.39 with act-order, and AWQ 0.96. On SmolLM2 GPTQ
# from left to right leaves 0.85, while act-order and AWQ leave a half, within each other's error bars. Both treat
# *loud inputs* apart: act-order rounds their columns first, while all others can still make up for the error
# (notebook 10b), AWQ makes their steps finer (notebook 11). Whether that is the reason was not tested; the open
# exercises say how. "The order hardly matters" is an eleventh sentence that holds for the small model only.
# %%
from quantlab.plots import pareto_front

by_method = {}
for r in stored:
    if r.method in (*four, "rtn symmetric", "nf4"):
        by_method.setdefault(r.method, []).append((r.bits_per_weight, r.kl))
fig, ax = plt.subplots(figsize=(8.4, 3.8))
plot_curves({method: tuple(zip(*points, strict=True)) for method, points in by_method.items()}, log="y", ax=ax,
            xlabel="bits/w, all bytes over all parameters", ylabel="KL to the float model, nats")
plt.setp(ax.lines, linestyle="none", markersize=6)
front = pareto_front([point for points in by_method.values() for point in points])
ax.step(*zip(*front, strict=True), where="post", color="0.7", zorder=0, label="Pareto front")
ax.legend(fontsize="small")
plt.show()
pair = find("rtn", 3, "32"), find("rtn", 4, "row")
for r in pair:
    print(f"{r.bits} bits, {r.group:>3}: {r.bits_per_weight:.2f} bits/w, KL {r.kl:.3f} ± {r.kl_error:.3f}")
finer.reveal("3 bits, groups of 32" if pair[0].kl < pair[1].kl else "4 bits, one scale a row")
# %% [markdown]
# Scales of small groups take bytes as well, and here those are better spent on a fourth bit. (For weights alone at 8
# bits only nearest rounding was measured.) Before "which method?" ask "at which size?"
#
# ## 10. Exercises
# ### Open
# - Section 5 kept three layers in float. Which *two* would you keep, and how near do they come? Try
#   `real.kl(W8A8(), keep=[…])`.
# - The sink is the first token. What if a static range is calibrated without it, and the first token alone is read
#   in float? `real.calibration` and `capture_inputs` are all you need.
# - Why is act-order worth so much more here than on the small model? Take the layer of section 7 and GPTQ in both
#   orders, first as it is, then with its loudest inputs, and the weights that read them, scaled by a tenth and by ten.
# - Put your own question to the four models of section 6. At how many bits does the first *fact* go wrong?
# %% [markdown]
# ## Recap
# 1. Weights tell what was done to them: count the different values of a group.
# 2. Loud channels and loud tokens are two diseases. A scale a token heals the second, SmoothQuant the first.
# 3. This model's loudest values are a handful, in `down_proj`, at its first token: an attention sink.
# 4. GPTQ needs a few times as many tokens as its layer is wide, or its own error report flatters it.
# 5. Lessons about grids for weights carried over; those about the size of activations did not, nor how much GPTQ
#    and AWQ gain. Measure on the model you ship.
#
# Next: if an outlier is a matter of basis, why not turn the basis? [17 Rotations](17_rotations.ipynb)
# %%
score()
