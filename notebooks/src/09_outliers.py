# %% [markdown]
# # 09 Outliers
# *60 minutes, of which the computer needs about two. You need notebooks 06 to 08.*
#
# Eight bits for weights *and* activations are nearly free on a small model. On large ones the plain recipe
# fails, because a few channels of their activations are far larger than all others: **outliers** (离群值). At
# the end you can
#
# - look for outlier channels in any model, and say what they do to a step and to a story;
# - plant them without changing a model's function, and derive why nothing changes;
# - write LLM.int8()'s split and SmoothQuant's scales, and choose threshold and α;
# - say what each gives back, what it costs, and where a test with planted outliers is unfair.
# %% [markdown]
# ### Recall
# 1. What does dynamic quantization compute anew for each input, and what never?
# 2. A scale for each token and one for each row of the weight can be factored out of an integer product.
#    Why can a scale for each *input channel* not?
# 3. What broke the static scales in notebook 08?
#
# <details><summary>Answers</summary>
# 1. The activations' scale and zero point; the codes of the weights stay. 2. The sum runs over the channels:
#    a factor that changes from term to term stays inside it. 3. Inputs outside the calibrated range: they
#    were clipped.</details>
# %% [markdown]
# ## 1. What broke
# Notebook 08 ended with a model that a scale for each tensor ruined, and a scale for each token too. A
# dynamic scale follows its input, but the *largest* value sets it, and all others must live with that step.
# First: how loud is the loudest channel of the model as it is? Some layers read a norm, others do not.
# **Predict** which have the louder channels.
# %%
import os

import torch

from quantlab.lm import activation_scales, capture_inputs, linear_layers, load_lm, load_text, token_stream
from quantlab.outliers import norm_readers

bundled = not os.environ.get("QUANTLAB_MODEL")
model, tokenizer = load_lm()
names = {layer: name for name, layer in linear_layers(model).items()}
fed_by_norm = [names[layer] for _, layers in norm_readers(model) for layer in layers]
calibration = token_stream(tokenizer, load_text("calibration"))[:4096]
peaks = activation_scales(model, calibration)  # the largest |x| of each channel, by layer
loudness = {name: (peak.max() / peak.median()).item() for name, peak in peaks.items()}
# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm

from quantlab.plots import ERROR, FLOAT, QUANTIZED

q, loudest = fed_by_norm[len(fed_by_norm) // 2], max(loudness, key=loudness.get)
x = capture_inputs(model, calibration[:512], [q, loudest])
fig, axes = plt.subplots(1, 3, figsize=(7, 2.6), layout="constrained")
for ax, name in zip(axes, x, strict=False):
    fig.colorbar(ax.imshow(x[name][:128].abs(), aspect="auto", norm=PowerNorm(0.4)), ax=ax)
    ax.set(title=f"|x|, {name.split('.', 2)[-1]}", xlabel="channel", ylabel="token")
axes[2].bar(range(len(peaks)), loudness.values(), color=[QUANTIZED if n in fed_by_norm else ERROR for n in peaks])
axes[2].set(title="largest / median", xlabel="layer (blue: behind a norm)")
plt.show()
# %% [markdown]
# Left, what a layer behind a norm reads: stripes, for some channels are larger than others in *every*
# token. Middle, the loudest layer, which no norm feeds: values that are large in some tokens only. Right,
# all layers.
# %% tags=["nbval-ignore-output"]
behind = max(loudness[name] for name in fed_by_norm)
assert not bundled or behind < 5 < loudness[loudest] < 20
f"largest over median channel: behind norms at most {behind:.1f}, in {loudest} {loudness[loudest]:.1f}"
# %% [markdown]
# So, plainly: **the bundled model is too small to grow outliers by itself.** In large models they are about
# 100 times as large as most activations (Xiao et al. 2023, §3). Dettmers et al. (2022, §4) count a channel
# as an outlier if |x| ≥ 6 in at least 6 % of the tokens and in at least a quarter of the layers. At 6.7
# billion parameters they found such outliers in every layer, all in only 6 channels.
# %% [markdown]
# ### How to look for real ones
# The next cell counts by that definition on *whatever model is loaded*. Start Jupyter with the environment
# variable `QUANTLAB_MODEL` set to a folder or a hub name, and run this notebook up to here. Both papers
# studied models of the OPT kind: take several sizes of it. (Each parameter needs four bytes of memory.)
# %% tags=["nbval-ignore-output"]
def outlier_channels(model, tokens, size=6.0):
    names = {layer: name for name, layer in linear_layers(model).items()}
    read = capture_inputs(model, tokens, [names[layers[0]] for _, layers in norm_readers(model)])
    of_tokens = torch.stack([(x.abs() >= size).float().mean(0) for x in read.values()])  # layers, channels
    return ((of_tokens >= 0.06).float().mean(0) >= 0.25).nonzero().flatten().tolist()

assert not bundled or outlier_channels(model, calibration) == []
outlier_channels(model, calibration)
# %% [markdown]
# None. To see what outliers do, and to do something about them, we plant some.
#
# ## 2. By hand: three ordinary values and one outlier
# One token with four channels, and one row of weights. The last channel is an outlier. **Predict:** on a
# symmetric 8-bit grid, codes −127 to 127, which codes do the first three values get?
# %%
x4, w4 = torch.tensor([0.9, -0.5, 0.2, 60.0]), torch.tensor([0.4, 0.3, -0.5, 0.01])
scale = x4.abs().max() / 127
codes = torch.round(x4 / scale)
[int(v) for v in codes], [round(v, 2) for v in (codes * scale).tolist()]
# %% [markdown]
# The grid has 255 codes, and three of four values live on −1, 0 and 2. Without the last channel:
# %%
scale3 = x4[:3].abs().max() / 127
[int(v) for v in torch.round(x4[:3] / scale3)]
# %% [markdown]
# Now the trick on which this notebook rests. The layer only uses the products xⱼwⱼ. Divide channel j of the
# input by any dⱼ > 0, multiply the weight by it, and nothing changes. Here d = 60:
# %%
d = torch.tensor([1.0, 1.0, 1.0, 60.0])
assert torch.allclose((x4 / d) @ (w4 * d), x4 @ w4)
[round(v, 2) for v in (x4 / d).tolist()], [round(v, 2) for v in (w4 * d).tolist()]
# %% [markdown]
# Read it backwards: from a layer with ordinary channels we can *make* one with outliers. We turn the same
# screw the other way, and the function stays.
#
# ## 3. Planting
# Who multiplies a channel for us at no cost? The norm before the layer. An RMSNorm gives out
#
# $$y_j = g_j\, x_j / \mathrm{rms}(x), \qquad \text{and then}\quad \textstyle\sum_j y_j W_{ij}
#   = \sum_j (d_j y_j)\,(W_{ij} / d_j) \qquad (1)$$
#
# so d goes into the gain g, and 1/d into the columns of **every** layer that reads this norm: query, key
# and value, or gate and up. (A LayerNorm's bias is multiplied as well.)
# %% [markdown]
# ### Exercise 9.1: plant outliers (about 10 minutes)
# `gain` (channels,) is the norm's, `weights` a list of matrices (out, channels) that read it. Return the
# new gain and the list of new weights.
# %% tags=["exercise"]
def my_plant(gain, weights, channels, factor):
    raise NotImplementedError  # return new_gain, new_weights
# %%
from quantlab.checks import check, hint, solution

check("9.1", my_plant)
# %% [markdown]
# The library does it to all norms of a model. Six channels, as at 6.7 billion parameters, and a factor of
# 100:
# %%
from quantlab.exercises.n09 import plant_solution
from quantlab.lm import weight_of
from quantlab.outliers import plant_outliers

width = model.config.hidden_size
channels = list(range(0, width - width // 16, width * 5 // 32))[:6]
planted = plant_outliers(model, channels=channels, factor=100)
for (norm, layers), (new_norm, new_layers) in zip(norm_readers(model), norm_readers(planted), strict=True):
    gain, weights = plant_solution(norm.weight.data, [weight_of(layer) for layer in layers], channels, 100.0)
    assert torch.equal(new_norm.weight, gain)
    assert all(torch.equal(weight_of(new), w) for new, w in zip(new_layers, weights, strict=True))
assert set(channels) <= set(outlier_channels(planted, calibration))
channels
# %% [markdown]
# The detector finds the planted channels. **Predict:** how far do the float outputs move?
# %% tags=["nbval-ignore-output"]
from quantlab.lm import divergence

tokens = token_stream(tokenizer, load_text("eval"))[:4096]
with torch.no_grad():
    before, after = (m(tokens[None, :256]).logits for m in (model, planted))
moved = ((after - before).abs().max() / before.abs().max()).item()
assert moved < 1e-4
assert abs(divergence(model, planted, tokens[:1024]).kl) < 1e-5
f"the largest change of a logit is {moved:.0e} of the largest logit"
# %% [markdown]
# By float rounding, and nothing else: the same function, so the same perplexity and the same stories. Now
# eight bits for weights and activations, one scale for each input tensor, for both models. **Predict** the
# perplexities. Then let both tell a story.
# %% tags=["nbval-ignore-output"]
from quantlab.lm import perplexity, quantize_lm

ruined, whole = (quantize_lm(m, calibration[:512], method="w8a8_dynamic", progress=False)[0]
                 for m in (planted, model))
values = [perplexity(m, tokens[:2048]).value for m in (model, whole, ruined)]
assert values[1] < 1.1 * values[0] < 3 * values[0] < values[2]
"perplexity: float {:.1f}, W8A8 {:.1f}, W8A8 with planted outliers {:.1f}".format(*values)
# %% tags=["nbval-ignore-output"]
from quantlab.lm import generate

static, _ = quantize_lm(planted, calibration, method="w8a8_static", progress=False)
for title, m in {"float": planted, "W8A8, static": static, "W8A8, dynamic": ruined}.items():
    print(f"planted, {title}: {generate(m, tokenizer, 'Once upon a time', tokens=35)!r}\n")
print(f"not planted, W8A8, dynamic: {generate(whole, tokenizer, 'Once upon a time', tokens=35)!r}")
# %% [markdown]
# Static scales wreck the story. **Why is the dynamic one still fluent,** with that perplexity? While it
# writes, the model reads one token at a time, and then a scale for the tensor *is* a scale for the token.
# Perplexity was measured on whole windows. (Dynamic per tensor depends on what is read together: notebook
# 08, section 9.)
#
# Two models that compute the same in floats: one survives eight bits, the other does not. So "int8 costs
# nothing" is no property of a function. It depends on how the numbers inside are scaled.
# %% [markdown]
# ## 4. Why: count the codes
# We look at one layer that reads a norm, and at its ordinary channels only. **Predict:** how many of the 256
# codes do they use, before and after planting?
# %% tags=["nbval-ignore-output"]
from quantlab import choose_qparams, quantize

inputs = {"plain": x[q], "planted": capture_inputs(planted, calibration[:512], [q])[q]}
ordinary = torch.ones(width, dtype=torch.bool).index_fill(0, torch.tensor(channels), False)
used = {}
for title, values in inputs.items():
    qp = choose_qparams(values.min(), values.max(), qmin=0, qmax=255)
    used[title] = (quantize(values[:, ordinary], qp) - qp.zero_point).flatten()
{title: f"{len(codes.unique())} codes, {(codes == 0).float().mean():.0%} of the values became 0"
 for title, codes in used.items()}
# %% tags=["nbval-ignore-output"]
assert len(used["plain"].unique()) > 100 > 10 > len(used["planted"].unique())
fig, axes = plt.subplots(1, 2, figsize=(7, 2.2), layout="constrained")
for ax, (title, codes) in zip(axes, used.items(), strict=True):
    ax.hist(codes.numpy(), bins=torch.arange(-130, 131).numpy() - 0.5, color=QUANTIZED, log=True)
    ax.set(title=f"{title}: ordinary channels", xlabel="code − zero point", ylabel="count (log)")
plt.show()
# %% [markdown]
# The outliers take the whole ruler, and nearly everything else becomes 0.
#
# Would a scale for each *token* help? **Predict:** in how many tokens do the outlier channels stand out?
# And a scale for each *channel*?
# %% tags=["nbval-ignore-output"]
from quantlab import fake_quantize

loud, planted_weight = inputs["planted"], weight_of(linear_layers(planted)[q])
def relative(error, y):
    return (error.square().sum() / y.square().sum()).item()

def error_of(dim):
    """Output error with 8-bit inputs that share a scale along dim, and a float weight."""
    qp = choose_qparams(loud.amin(dim, keepdim=True), loud.amax(dim, keepdim=True), qmin=0, qmax=255)
    return relative((fake_quantize(loud, qp) - loud) @ planted_weight.T, loud @ planted_weight.T)

errors = {"one scale": error_of((0, 1)), "a scale a token": error_of(1), "a scale a channel": error_of(0)}
loud_tokens = (loud[:, ~ordinary].abs().amax(1) >= 6).float().mean()
assert loud_tokens > 0.95
assert errors["one scale"] > errors["a scale a token"] > 100 * errors["a scale a channel"]
f"{loud_tokens:.0%} of the tokens have an outlier", {k: f"{v:.1e}" for k, v in errors.items()}
# %% [markdown]
# The same channels are loud in every token, so each token's scale is ruined too. A scale for each channel
# would be the cure, and the integer product cannot have it: in
#
# $$\textstyle\sum_j s_j\, q^x_j\, q^w_{ij}$$
#
# sⱼ stands inside the sum (notebook 07). Two ways out. **Take the loud columns out of the sum** and
# multiply them in floating point: LLM.int8(). Or **move sⱼ elsewhere before anything is rounded**:
# SmoothQuant.
# %% [markdown]
# ## 5. LLM.int8(): split the sum
# Dettmers et al. (2022) cut the product in two. A column of X goes to the float part if any |x| in it
# reaches a **threshold** (阈值), 6.0 by default. The rest is quantized "vector-wise": a symmetric scale for
# each token and one for each row of the weight, largest magnitude / 127.
#
# $$XW^\top \approx X_{O} W_{O}^\top + s_x s_w \cdot Q(X_{rest})\,Q(W_{rest})^\top$$
#
# ### Exercise 9.2: the split (about 15 minutes)
# `x` (tokens, in) and `weight` (out, in) are floats; return the output (tokens, out). Computing with codes
# held in float tensors is fine.
# %% tags=["exercise"]
def my_split(x, weight, threshold):
    raise NotImplementedError
# %%
check("9.2", my_split)
# %% [markdown]
# The library's layer computes on real int8 codes and keeps no float copy of the weight: for the float part
# it dequantizes the columns it needs. With a weight that already lies on the grid both are the same.
# %%
from torch import nn

from quantlab.exercises.n09 import split_solution
from quantlab.linear import DynamicInt8Linear
from quantlab.outliers import LLMInt8Linear

def linear(weight):
    layer = nn.Linear(weight.shape[1], len(weight), bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer

int8 = LLMInt8Linear.from_linear(linear(planted_weight))
on_grid = int8.dequantized_weight()
torch.testing.assert_close(int8(loud), split_solution(loud, on_grid, 6.0), atol=1e-4, rtol=1e-4)
# %% [markdown]
# **The control that must fail.** As many columns in float, but *other* ones:
# %% tags=["nbval-ignore-output"]
def split_error(columns):
    """Error of the integer part's rounding when these columns are in float."""
    rest = loud.masked_fill(columns, 0.0)
    rounded = DynamicInt8Linear.from_linear(linear(on_grid), per="token")(rest)
    return relative(rounded - rest @ on_grid.T, loud @ on_grid.T)

outliers = int8.outlier_columns(loud)
found = {"outlier columns": split_error(outliers), "as many others": split_error(outliers.roll(3)),
         "none": split_error(torch.zeros_like(outliers))}
assert found["as many others"] > 0.5 * found["none"] > 50 * found["outlier columns"]
{title: f"{error:.1e}" for title, error in found.items()}
# %% [markdown]
# ### Drag it
# Left: the largest |x| of each channel, green where the column goes to float. Right: the error of the
# layer's output, and the share of columns in float, over all thresholds. *planted* unticked multiplies the
# inputs only and leaves the weights: a layer as if it had grown outliers by itself.
#
# **Predict first:**
# 1. Is there a threshold that is too low? What does it cost?
# 2. Pull the threshold up through the outliers: does the error rise at the first of them, or the last?
# 3. At 6.0 the blue curve lies on the dashed line. What error is left there?
# 4. Untick *planted*: which of the lines moves?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_threshold

plain_weight = weight_of(linear_layers(model)[q])
explorer = explore_threshold(plain_weight, inputs["plain"], channels=channels, factor=100)
explorer
# %% [markdown]
# **What you saw.** A low threshold costs no accuracy: it turns the layer into a float layer, column by
# column. Upwards, the error rises as soon as one outlier is left in the integers, since one is enough to
# set a step. What is left at 6.0 is the error of the int8 *weights*, and that is large only because we
# planted: the planted columns are a hundredth of their neighbours, in rows that have one scale. Untick
# *planted* and the dashed line falls far down. We come back to this.
# %% [markdown]
# ### What the threshold means elsewhere
# 6.0 is an absolute number, and a column counts as soon as *any* token reaches it. **Predict** for the
# bundled model, which has no outliers: which share of the columns of the loudest layer goes to float when
# 1, 16, 256 or 4096 tokens are read at once?
# %% tags=["nbval-ignore-output"]
layer = LLMInt8Linear.from_linear(linear(weight_of(linear_layers(model)[loudest])))
many = capture_inputs(model, calibration, [loudest])[loudest]
shares = {n: layer.outlier_columns(many[:n]).float().mean().item() for n in (1, 16, 256, 4096)}
assert list(shares.values()) == sorted(shares.values())
{f"{n} tokens": f"{share:.1%}" for n, share in shares.items()}
# %% [markdown]
# These are no outliers in the paper's sense, only values that pass a fixed number, in a layer that the
# paper left out of its count. The more tokens one call reads, the more columns leave the integers.
#
# ### Myth: "LLM.int8() quantizes the weights only"
# It stands in tables beside weight-only methods. If it were so, replacing the inputs by their own 8-bit
# rounding would change the output. It does not:
# %%
from quantlab import dequantize

rest = loud.masked_fill(outliers, 0.0)
qp = int8.input_qparams(rest)
rounded = torch.where(outliers, loud, dequantize(quantize(rest, qp), qp))
def change(layer):
    return ((layer(rounded) - layer(loud)).norm() / layer(rest).norm()).item()

assert change(int8) < 1e-5 < 1e-3 < change(linear(on_grid))
# %% [markdown]
# The layer had rounded them already: weights **and** activations are integers, except for the outlier
# columns. And is it fast? The split costs a copy of the columns' weights and a second product. **Predict**
# an order for float32, LLM.int8(), and the same layer with a threshold that nothing reaches.
# %% tags=["nbval-ignore-output"]
import time

random = torch.Generator().manual_seed(0)
big, x_big = linear(torch.randn(2048, 2048, generator=random)), torch.randn(16, 2048, generator=random)
x_big[:, :6] *= 30
rivals = {"float32": big, "int8, no split": LLMInt8Linear.from_linear(big, threshold=float("inf")),
          "LLM.int8()": LLMInt8Linear.from_linear(big)}
times = {title: [] for title in rivals}
for _ in range(30):  # in turns, so that a busy moment hits all three
    for title, layer in rivals.items():
        start = time.perf_counter()
        layer(x_big)
        times[title].append(time.perf_counter() - start)
best = {title: min(t) for title, t in times.items()}
{title: f"{1e3 * t:.2f} ms, {best['float32'] / t:.1f} times as fast as float32" for title, t in best.items()}
# %% [markdown]
# The split does all that the layer without it does, and more (on a busy machine the difference may drown in
# noise). Against float it depends on size and machine; of its GPU kernels the author wrote that for common
# 7B models inference will always be slow (bitsandbytes issue 490). Its gain is memory: 8 bits a weight and
# a scale a row. As a part of 16-bit floats:
# %%
int8.nbytes / (2 * int8.codes.numel())  # bytes over those of 16-bit floats
# %% [markdown]
# ## 6. SmoothQuant: move the difficulty
# Nothing forces us to plant outliers. By (1) we can also remove them: divide channel j of the inputs by
# sⱼ (into the norm's gain), multiply column j of the weights. Now the *weights* have loud columns. Where is
# a fair place to stop? If both sides shall be equally hard,
#
# $$\max|X_j| / s_j = \max|W_j|\, s_j \quad\Rightarrow\quad s_j = \sqrt{\max|X_j| / \max|W_j|}$$
#
# Xiao et al. (2023) put a knob on it, the **migration strength** (迁移强度) α:
#
# $$s_j = \max|X_j|^{\alpha} \,/\, \max|W_j|^{1-\alpha} \qquad (2)$$
#
# By hand, two channels. **Predict** the four numbers for α = 0 and α = 1.
# %%
largest_x, largest_w = torch.tensor([4.0, 64.0]), torch.tensor([1.0, 0.25])
for alpha in (0.0, 0.5, 1.0):
    s = largest_x**alpha / largest_w ** (1 - alpha)
    print(f"alpha {alpha}: s {s.tolist()}, inputs {(largest_x / s).tolist()}, weights {(largest_w * s).tolist()}")
# %% [markdown]
# α = 1 makes all input channels equal, and the weights carry everything; α = 0 is the reverse; at a half
# both sides are the same.
#
# ### Exercise 9.3: SmoothQuant's scales (about 10 minutes)
# Equation (2) for all channels, (channels,). Some channels of `largest_x` or columns of `largest_w` may be
# 0: choose an s for them that does no harm.
# %% tags=["exercise"]
def my_smoothing(largest_x, largest_w, alpha):
    raise NotImplementedError
# %%
check("9.3", my_smoothing)
# %% [markdown]
# The same from the library, for layers that share one norm (then the largest weight of them all counts):
# %%
from quantlab.exercises.n09 import smoothing_solution
from quantlab.outliers import smoothing_scales

planted_peaks = activation_scales(planted, calibration)
readers = {m: next(group for _, group in norm_readers(m) if linear_layers(m)[q] in group) for m in (model, planted)}
largest_w = torch.cat([weight_of(layer) for layer in readers[planted]]).abs().amax(0)
by_library = smoothing_scales(planted_peaks[q], readers[planted], 0.5)
assert torch.allclose(by_library, smoothing_solution(planted_peaks[q], largest_w, 0.5))
# %% [markdown]
# ### A test that cannot fail
# Planting multiplied max|X| by d and divided max|W| by d. Put both into (2):
# $(d X)^\alpha / (W/d)^{1-\alpha} = d \cdot s$, whatever α is. SmoothQuant divides by d·s and so **undoes
# the planting exactly**, without being told:
# %%
d = torch.ones(width).index_fill(0, torch.tensor(channels), 100.0)
for alpha in (0.0, 0.5, 1.0):
    plain_s = smoothing_scales(peaks[q], readers[model], alpha)
    assert torch.allclose(smoothing_scales(planted_peaks[q], readers[planted], alpha), d * plain_s, rtol=1e-3)
# %% [markdown]
# So a model with planted outliers cannot say which α is good, and flatters SmoothQuant; for LLM.int8() it
# is the opposite, because planting also made tiny columns in the weights. In large models the inputs are
# loud and the weights flat (Xiao et al. 2023, §3). To choose α we need that: loud inputs, weights *as they
# are*. This changes the layer's function, but one layer's output error can be measured all the same.
# %% tags=["nbval-ignore-output"]
from quantlab import PerAxis, quantize_tensor

grown = inputs["plain"] * torch.ones(width).index_fill(0, torch.tensor(channels), 30.0)
def output_error(alpha, weight_bits, bits):
    s = smoothing_scales(grown.abs().amax(0), [linear(plain_weight)], alpha)
    w = quantize_tensor(plain_weight * s, bits=weight_bits, granularity=PerAxis(0)).dequantize()
    x = fake_quantize(grown / s, choose_qparams(*torch.aminmax(grown / s), qmin=0, qmax=2**bits - 1))
    return relative(x @ w.T - grown @ plain_weight.T, grown @ plain_weight.T)

alphas = [i / 20 for i in range(21)]
curves = {f"W{w}A{a}": [output_error(alpha, w, a) for alpha in alphas] for w, a in ((8, 8), (6, 6), (4, 8))}
lowest = {title: alphas[curve.index(min(curve))] for title, curve in curves.items()}
assert 0 < lowest["W4A8"] < lowest["W8A8"] < 1
assert curves["W8A8"][0] > 4 * min(curves["W8A8"]) < curves["W8A8"][-1]
lowest
# %% tags=["nbval-ignore-output"]
from quantlab.plots import CLIPPED, OTHER

fig, ax = plt.subplots(figsize=(5.5, 2.9))
for (title, curve), color, marker in zip(curves.items(), (QUANTIZED, OTHER, ERROR), "os^", strict=True):
    ax.plot(alphas, curve, marker=marker, markersize=4, color=color, label=title)
ax.set(yscale="log", xlabel="alpha", ylabel="output error")
ax.legend(ncols=3, loc="upper center", fontsize="small")
ax.set_ylim(top=3 * max(max(c) for c in curves.values()))
plt.show()
# %% [markdown]
# A U with its bottom near a half at W8A8: too little smoothing leaves the inputs hard, too much makes the
# weights hard. When the weights get fewer bits than the inputs, they can take less: the best α moves down.
#
# ### Drag it
# Colours: how many bits the code of each value needs; dark blue became 0, yellow uses the whole ruler.
#
# **Predict first:**
# 1. From α = 0 to 1, which picture lights up, which one goes dark, and where do the blue and green lines
#    of the largest channels meet?
# 2. W4A8 and W8A4: to which side does the bottom of the U move?
# 3. Tick *planted* and drag the factor. Does the curve move?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_smoothing

surface = explore_smoothing(plain_weight, inputs["plain"], channels=channels, factor=30)
surface
# %% [markdown]
# **What you saw.** Before, the inputs are dark but for six stripes, the weights bright. With α the light
# moves from one side to the other; at a half the two lines are one. With fewer bits for the weights the
# bottom moves left, with fewer for the inputs right. And with *planted* ticked, the factor moves only the
# pictures of before: the curve stays, as the derivation says.
#
# ## 7. The whole model
# All ways, on the plain model and on the planted one, in one ledger. Names with `o:` are those with planted
# outliers; the KL is always to the same float model. **Predict** the order of the KLs in each half.
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

from quantlab import ledger

short = {"w8a8_dynamic": "w8a8", "llm_int8": "llm_int8", "smoothquant": "smooth"}
ways = [("w8a8_dynamic", "tensor"), ("w8a8_dynamic", "token"), ("llm_int8", "split"),
        ("smoothquant", "tensor"), ("smoothquant", "static")]
rows = {}
for source, method, per in tqdm([(m, *way) for m in (model, planted) for way in ways], leave=False):
    options = {} if method == "llm_int8" else {"per": per}
    new, report = quantize_lm(source, calibration[:2048], method=method, progress=False, **options)
    title = method if source is model else "o:" + short[method]
    rows[title, per] = ledger.measure(model, new, tokens, method=title, bits=8, group=per, report=report)
# %% tags=["nbval-ignore-output"]
for row in rows.values():
    ledger.append(row)
ledger.Table(list(rows.values()))
# %%
kl = {key: row.kl for key, row in rows.items()}
lost = kl["o:w8a8", "tensor"]
assert lost > 1 > kl["w8a8_dynamic", "tensor"] * 20
assert lost > kl["o:w8a8", "token"] > 5 * kl["o:llm_int8", "split"] > 5 * kl["o:smooth", "tensor"]
assert abs(kl["smoothquant", "tensor"] / kl["w8a8_dynamic", "tensor"] - 1) < 0.3  # nothing to smooth there
# %% tags=["nbval-ignore-output"]
{f"{title} {per}": f"{1 - value / lost:.1%} of the loss given back"
 for (title, per), value in kl.items() if title.startswith("o:")}
# %% [markdown]
# On the plain model smoothing gains nothing: there is nothing to smooth. On the planted one a scale a token
# saves a part, the split and smoothing nearly everything. (Do not read the first LLM.int8() row as a victory
# of integers: the text was read in one batch of 4096 tokens, and section 5 showed how many columns of a
# `down_proj` then are in float. The bytes do not tell.)
# %% [markdown]
# ### Where the rest of LLM.int8() sits
# Its KL is still far above that of the plain model. Section 5 suggested the int8 *weights*. Two models
# without any rounded input: all weights int8; and the same with the planted columns left in float.
# %% tags=["nbval-ignore-output"]
from quantlab.lm import quantize_weights

def rows_in(bits):
    return lambda weight: quantize_tensor(weight, bits=bits, granularity=PerAxis(0))

weights_only, qtensors = quantize_weights(planted, rows_in(8))
spared, _ = quantize_weights(planted, rows_in(8))
layers = {of: linear_layers(of) for of in (planted, spared)}
for name in fed_by_norm:
    weight_of(layers[spared][name])[:, channels] = weight_of(layers[planted][name])[:, channels]
rest = {title: divergence(model, m, tokens).kl for title, m in
        {"int8 weights": weights_only, "but planted columns float": spared}.items()}
rest["LLM.int8()"] = kl["o:llm_int8", "split"]
{title: f"{value:.4f}" for title, value in rest.items()}
# %% tags=["nbval-ignore-output"]
assert abs(rest["LLM.int8()"] / rest["int8 weights"] - 1) < 0.2
assert rest["but planted columns float"] < 0.1 * rest["int8 weights"]
codes = qtensors[q].codes[:, channels].int()
f"codes of the planted columns: {codes.min()} to {codes.max()}; {(codes == 0).float().mean():.0%} are 0"
# %% [markdown]
# The split did all it can: the KL is that of the int8 weights. Most codes of the planted columns are 0, and
# their inputs are a hundred times as large. Keeping *their weights* in float would repair it. Where the
# inputs have grown and the weights are as they were, nothing of the kind happens:
# %% tags=["nbval-ignore-output"]
def split_loss(weight, x):
    y = LLMInt8Linear.from_linear(linear(weight))(x)
    return relative(y - x @ weight.T, x @ weight.T)

losses = {"planted": split_loss(planted_weight, loud),
          "grown": split_loss(plain_weight, inputs["plain"] * d), "plain": split_loss(plain_weight, inputs["plain"])}
assert losses["planted"] > 20 * losses["grown"]
{title: f"{loss:.1e}" for title, loss in losses.items()}
# %% [markdown]
# So this loss is a price of planting, not of LLM.int8().
#
# ### Where the rest of SmoothQuant sits
# The layers that no norm feeds (`o_proj`, `down_proj`) were not smoothed. We put them back in float:
# %% tags=["nbval-ignore-output"]
smoothed, _ = quantize_lm(planted, calibration[:2048], method="smoothquant", per="tensor", progress=False)
before = divergence(model, smoothed, tokens[:2048]).kl
for name, layer in layers[planted].items():
    if name not in fed_by_norm:
        smoothed.set_submodule(name, layer)
after = divergence(model, smoothed, tokens[:2048]).kl
assert after < 0.5 * before
f"KL {before:.4f} with all layers in integers, {after:.4f} with the unsmoothed ones in float"
# %% [markdown]
# ### How the damage grows
# **Predict** the shape of five lines over the factor: which one is flat, and why exactly?
# %% tags=["nbval-ignore-output"]
factors, lines = (1, 10, 30, 100, 300), {}
few = tokens[:1024]
for factor in tqdm(factors, leave=False):
    loud_model = plant_outliers(model, channels=channels, factor=factor)
    for method, per in ways[:4]:
        options = {} if method == "llm_int8" else {"per": per}
        new, _ = quantize_lm(loud_model, calibration[:512], method=method, progress=False, **options)
        lines.setdefault(f"{method} {per}", []).append(divergence(model, new, few).kl)
    new, _ = quantize_weights(loud_model, rows_in(8))
    lines.setdefault("int8 weights only", []).append(divergence(model, new, few).kl)
# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(7, 3.1), layout="constrained")
styles = zip((ERROR, CLIPPED, QUANTIZED, OTHER, FLOAT), "o^sDx", ("-", "-", "-", "-", "--"), strict=True)
for (title, line), (color, marker, dash) in zip(lines.items(), styles, strict=True):
    ax.plot(factors, line, marker=marker, linestyle=dash, color=color, label=title)
ax.set(xscale="log", yscale="log", xlabel="factor of the six planted channels", ylabel="KL, nats per token")
ax.set_xticks(factors, factors)
ax.minorticks_off()
ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
plt.show()
# %%
naive, token, split, flat, alone = lines.values()
assert all(a < b for line in (naive, token, split) for a, b in zip(line[1:], line[2:], strict=False))
assert max(flat) < 1.3 * min(flat)
assert all(abs(s / w - 1) < 0.5 for s, w in zip(split[2:], alone[2:], strict=True))
# %% [markdown]
# One scale breaks first, a scale a token follows. LLM.int8() rises with the weights and no faster.
# SmoothQuant is flat because it undoes the factor; that is algebra, not evidence for large models.
#
# ## 8. The controls that must fail
# ### Smoothing the wrong channels
# Divide six channels by 100 again, by (1): once the planted ones, once six others. In floats both leave the
# function alone. If it is *these* channels that matter, only the first can help.
# %% tags=["nbval-ignore-output"]
others = [c + 3 for c in channels]
helped = {}
for title, chosen in tqdm({"planted channels": channels, "six others": others}.items(), leave=False):
    new = plant_outliers(planted, channels=chosen, factor=0.01)
    new, _ = quantize_lm(new, calibration[:512], method="w8a8_dynamic", progress=False)
    helped[title] = divergence(model, new, tokens[:2048]).kl
assert helped["planted channels"] < 0.02 * lost < 0.7 * lost < helped["six others"]
{title: f"KL {value:.3f}" for title, value in helped.items()}
# %% [markdown]
# ### Myth: "outliers are rare values, clip them"
# Notebook 02 had good luck with clipping. **Predict** how many of the values are outliers here, and what a
# percentile observer does: it leaves out a share of the values at the ends and saves the step for the
# rest.
# %% tags=["nbval-ignore-output"]
from functools import partial

from quantlab.observers import Percentile

rare = (loud.abs() >= 6).float()
clipped = {}
for percentile in tqdm((99.9, 99, 98, 96, 90), leave=False):
    new, _ = quantize_lm(planted, calibration[:2048], method="w8a8_static", progress=False,
                         observer=partial(Percentile, percentile=percentile))
    clipped[percentile] = divergence(model, new, tokens[:1024]).kl
print(f"{rare.mean():.1%} of the values, in {rare.any(0).sum():.0f} of {width} columns")
print("KL by percentile:", {p: round(value, 2) for p, value in clipped.items()})
# %% [markdown]
# They are not rare: two values of a hundred, in the same columns of nearly every token. A mild percentile
# keeps the step long, a strong one cuts the channels off. The best one in between still loses far more than
# a smoothed model. What is in these channels? Set them to 0 in float, without any quantization, and six
# others as well:
# %% tags=["nbval-ignore-output"]
import copy

def silenced(chosen):
    new = copy.deepcopy(model)
    for norm, _ in norm_readers(new):
        norm.weight.data[chosen] = 0.0
    return divergence(model, new, tokens[:2048]).kl

silent = {"planted channels": silenced(channels), "six others": silenced(others)}
assert min(clipped.values()) > 10 * kl["o:smooth", "tensor"]
assert min(silent.values()) > 3 * kl["o:smooth", "tensor"]
{title: f"KL {value:.3f}" for title, value in silent.items()}
# %% [markdown]
# Each channel carries something that the next layers need; how large its numbers are is a matter of
# scaling. Clipping is an answer about rare *values*. Here whole *channels* are loud.
#
# Ours matter as much as others, since we planted them in ordinary channels. In large models real outlier
# channels matter more: without them (7 at most) the perplexity rose by 600 to 1000 %, without as many
# random channels by 0.1 % (Dettmers et al. 2022, §4).
# %% [markdown]
# ## 9. Exercises
# ### Exercise 9.4: fit the threshold (about 15 minutes)
# For the practice layer below, return a threshold at which **at most 5 %** of the columns go to float and
# the output error is **at most 1.05 times** that of the default, 6.0.
# %% tags=["exercise"]
from quantlab.exercises.n09 import practice_layer

practice, practice_x = practice_layer()

def my_threshold():
    raise NotImplementedError  # return a number
# %%
check("9.4", my_threshold)
# %% [markdown]
# ### Exercise 9.5: search α (about 30 minutes)
# The SmoothQuant authors tried a grid of α for each model. Do it for one layer: for `weight` (out, in), `x`
# (tokens, in) and the bits of both (weights: symmetric, a scale a row; inputs: asymmetric, one scale),
# return an α in 0 … 1 whose output error is **at most 1.1 times** the least. The check brings four layers
# with different bits.
# %% tags=["exercise"]
def my_alpha(weight, x, weight_bits, activation_bits):
    raise NotImplementedError
# %%
check("9.5", my_alpha)
# %% [markdown]
# ### Open
# - `down_proj` reads silu(gate) · up. Which *rows* of which layer could take 1/s, so that it can be smoothed
#   too? How far does the KL of section 7 fall?
# - Multiply x by a random rotation R and the weight by R as well: x Rᵀ (W Rᵀ)ᵀ = x Wᵀ. What becomes of
#   an outlier channel, and of the U?
# - Run section 1 on the largest model that fits your memory. Are its weights flat where its inputs are
#   loud? Then W8A8 of section 3 *without planting* is the experiment to do.
# %% [markdown]
# ## 10. What breaks next
# Eight bits are safe now. Smoothing does nothing for weights at four bits or three, for they have no
# outliers to move. One scale a row, inputs in float:
# %% tags=["nbval-ignore-output"]
left = {}
for bits in (8, 4, 3):
    new, _ = quantize_weights(model, rows_in(bits))
    left[bits] = divergence(model, new, tokens[:2048]).kl
assert left[8] < 0.01 < 0.05 < left[4] < left[3]
{f"{bits} bits": round(value, 4) for bits, value in left.items()}
# %% [markdown]
# Each weight was rounded to its nearest grid point, by itself. That is the best for each weight, and not
# for their sum.
# %% [markdown]
# ### Recap
# - One scale is set by the largest value: a few loud channels take the whole ruler from all others.
# - x·d with W/d is the same function: outliers can be planted, and moved away, in the norm before a layer.
# - LLM.int8() multiplies loud columns in float: weights *and* activations are int8, and the split takes
#   time.
# - SmoothQuant moves the difficulty into the weights, by sⱼ = max|Xⱼ|^α / max|Wⱼ|^(1−α); α has a U.
# - Planted outliers flatter SmoothQuant and punish LLM.int8(); clipping destroys what the channels carry.
#
# Next: [10 GPTQ](10_gptq.ipynb) rounds weights so that their errors cancel in the sum.
