# %% [markdown]
# # 09 Outliers
# *60 minutes, and 45 more for exercises 9.4 and 9.5; the computer needs about two. You need notebooks 06 to 08.*
#
# Eight bits for weights *and* activations are nearly free on a small model. On large ones the plain recipe
# fails, because a few channels of their activations are far larger than all others: **outliers** (离群值). At
# the end you can
#
# - look for outlier channels in any model, and say what they do to a step;
# - plant them without changing a model's function, and derive why nothing changes;
# - write LLM.int8()'s split and SmoothQuant's scales, and choose threshold and α;
# - say what each gives back, what it costs, and where a test with planted outliers is unfair.
# %% [markdown]
# ### Recall
# 1. What does dynamic quantization compute anew for each input?
# 2. A scale for each token and one for each row of the weight can be factored out of an integer product.
#    Why can a scale for each *input channel* not?
# 3. What broke the static scales in notebook 08?
#
# <details><summary>Answers</summary>
# 1. The activations' scale and zero point. 2. The sum runs over the channels: a factor that changes from term to term
#    stays inside it. 3. Inputs outside the calibrated range: they were clipped.</details>
#
# ## 1. What broke
# At the end of notebook 08 six planted channels ruined a model. A dynamic scale follows its input, but the *largest*
# value sets it, and all others must live with that step. Are there such channels in our model as it is? Some of its
# layers read a norm, others do not. **Predict** which have the louder channels, and how far the loudest one is beyond
# the median one.
# %%
import torch

from quantlab.checks import check, found, hint, lm_where, solution
from quantlab.lm import (activation_scales, budget, capture_inputs, linear_layers, load_text,
    token_stream)
from quantlab.outliers import norm_readers, plant_outliers

# The workbook's model, unless its norms are built so that nothing can be planted behind them
model, tokenizer = lm_where(lambda m: plant_outliers(m, channels=[0], factor=2))
names = {layer: name for name, layer in linear_layers(model).items()}
fed_by_norm = [
    names[layer] for _, layers in norm_readers(model) for layer in layers if layer in names]
calibration = token_stream(tokenizer, load_text("calibration"))
calibration = calibration[: budget(model, 4096)]  # all 4096, or fewer on a larger model
# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

from quantlab.plots import QUANTIZED, plot_bars

peaks = activation_scales(model, calibration)  # the largest |x| of each channel, by layer
loudness = {name: (peak.max() / peak.median()).item() for name, peak in peaks.items()}
behind, loudest = max(loudness[name] for name in fed_by_norm), max(loudness, key=loudness.get)
ax = plt.subplots(figsize=(7, 2.4))[1]  # of each kind of layer the loudest one, which comes last
heights = {name.split(".")[-1]: loudness[name] for name in sorted(loudness, key=loudness.get)}
plot_bars({"loudest": heights}, ylabel="largest / median", color=QUANTIZED, ax=ax)
found(behind < 5, f"behind norms no channel is 5 times as loud as the median: {behind:.1f}")
found(5 < loudness[loudest] < 10, f"elsewhere one is, but none 10 times: {loudness[loudest]:.1f}")
f"behind norms at most {behind:.1f} times the median, in {loudest} {loudness[loudest]:.1f} times"
# %% [markdown]
# In the bundled model query, key, value, gate and up read a norm, `o_proj` and `down_proj` do not. Behind the norms
# no channel stands out: **the model is too small to grow outliers by itself.** In large models they are about 100
# times as large as most activations (Xiao et al. 2023, §3). Dettmers et al. (2022, §4) count a channel as an outlier
# if |x| ≥ 6 in at least 6 % of the tokens and a quarter of the layers. At 6.7 billion parameters they found them in
# every layer, in 6 channels.
#
# ### How to look for real ones
# The next cell counts by that definition on *whatever model is loaded*: set the environment variable
# `QUANTLAB_MODEL` to a folder or a hub name (both papers studied OPT) and run up to here.
# %% tags=["nbval-ignore-output"]
def outlier_channels(model, tokens, size=6.0):
    names = {layer: name for name, layer in linear_layers(model).items()}
    first = [names[layers[0]] for _, layers in norm_readers(model) if layers[0] in names]
    read = capture_inputs(model, tokens, first)
    of_tokens = torch.stack([(x.abs() >= size).float().mean(0) for x in read.values()])
    return ((of_tokens >= 0.06).float().mean(0) >= 0.25).nonzero().flatten().tolist()

grown = outlier_channels(model, calibration)
found(grown == [], f"no outlier channels; here {len(grown)}")
grown
# %% [markdown]
# None in the bundled model. To see what outliers do, and to do something about them, we plant some.
#
# ## 2. By hand: three ordinary values and one outlier
# One token with four channels; the last one is an outlier. **Predict:** on a symmetric 8-bit grid, codes −127 to 127,
# which codes do the first three values get, with it and without it? And what becomes of the product with a row of
# weights `w4`, if the last input is divided by d = 60 and its weight multiplied by 60?
# %%
x4, w4 = torch.tensor([0.9, -0.5, 0.2, 60.0]), torch.tensor([0.4, 0.3, -0.5, 0.01])
def codes_of(values):
    return [int(v) for v in torch.round(values / (values.abs().max() / 127))]

print(f"codes with the outlier {codes_of(x4)}, without it {codes_of(x4[:3])}")
d = torch.tensor([1.0, 1.0, 1.0, 60.0])
assert torch.allclose((x4 / d) @ (w4 * d), x4 @ w4)
print(f"input over d {[round(v, 2) for v in (x4 / d).tolist()]}, weights times d "
    f"{[round(v, 2) for v in (w4 * d).tolist()]}: the same product, {x4 @ w4:.2f}")
# %% [markdown]
# The grid has 255 codes, and beside the outlier the other values live on −1, 0 and 2.
#
# The trick of this notebook: divide channel j of the input by any dⱼ > 0, multiply its weight by it, and the product
# stays. Backwards: from ordinary channels we can *make* outliers.
#
# ## 3. Planting
# The norm before a layer multiplies channels for us. An RMSNorm gives out
#
# $$y_j = g_j\, x_j / \mathrm{rms}(x), \qquad \text{and then}\quad \textstyle\sum_j y_j W_{ij}
#   = \sum_j (d_j y_j)\,(W_{ij} / d_j) \qquad (1)$$
#
# so d goes into the gain g, 1/d into the columns of **every** layer that reads the norm: query, key and value, or
# gate and up.
#
# ### Exercise 9.1: plant outliers (about 10 minutes)
# `gain` (channels,) of the norm, `weights` a list of matrices (out, channels) that read it, `channels` a list of
# indices, `factor` a number. Return the new gain and the list of new weights; change none of the old.
# %% tags=["exercise"]
def my_plant(gain, weights, channels, factor):
    raise NotImplementedError  # return new_gain, new_weights
# %%
check("9.1", my_plant)
# %% [markdown]
# The library does it to all norms of a model. We plant six channels, as many as at 6.7 billion parameters, with a
# factor of 100, and let the detector look for them. **Predict:** how far do the float outputs move?
# %%
from quantlab.exercises.material import layer_with_outliers, six_channels
from quantlab.exercises.outliers import (alpha_solution, plant_solution, smoothing_solution,
    split_solution)
from quantlab.lm import weight_of
from quantlab.outliers import LLMInt8Linear, smoothing_scales

width = model.config.get_text_config().hidden_size
channels = six_channels(width)
planted = plant_outliers(model, channels=channels, factor=100)
(norm, layers), (new_norm, new_layers) = norm_readers(model)[0], norm_readers(planted)[0]
gain, weights = plant_solution(
    norm.weight.data, [weight_of(layer) for layer in layers], channels, 100.0)
assert torch.equal(new_norm.weight, gain)
assert all(torch.equal(weight_of(new), w) for new, w in zip(new_layers, weights, strict=True))
found(set(channels) <= set(outlier_channels(planted, calibration)),
    "the detector finds all planted channels")
channels
# %% tags=["nbval-ignore-output"]
from quantlab.lm import DATA, divergence

tokens = token_stream(tokenizer, load_text("eval"))[:budget(model, 4096)]
with torch.no_grad():
    before, after = (m(tokens[None, :256]).logits for m in (model, planted))
moved = ((after - before).abs().max() / before.abs().max()).item()
assert moved < 1e-4
assert abs(divergence(model, planted, tokens[:1024]).kl) < 1e-5
f"the largest change of a logit is {moved:.0e} of the largest logit"
# %% [markdown]
# The detector finds the planted channels, and the outputs move by float rounding alone: the same function, the same
# perplexity, the same stories.
# Now eight bits for weights and activations, one scale for each input tensor, for both models.
# %% tags=["nbval-ignore-output"]
from quantlab.predictions import predict, score

growths = ["as before", "up to twice", "more than twice"]
planted_guess = predict("The planted model in eight bits: its perplexity is", growths)
# %% tags=["nbval-ignore-output"]
from quantlab.lm import perplexity, quantize_lm

ruined, whole = (quantize_lm(m, calibration[:512], method="w8a8_dynamic", progress=False)[0]
                 for m in (planted, model))
values = [perplexity(m, tokens[:2048]).value for m in (model, whole, ruined)]
plain_growth, growth = values[1] / values[0], values[2] / values[0]
found(plain_growth < 1.1, f"8 bits make perplexity {plain_growth:.2f} times as large, below 1.1")
found(growth > 3, f"with planted outliers {growth:.1f} times as large, above 3")
print("perplexity: float {:.1f}, W8A8 {:.1f}, W8A8 planted {:.1f}".format(*values))
planted_guess.reveal(growths[sum(growth > limit for limit in (1.1, 2))])
# %% [markdown]
# Two models that compute the same in floats: one survives eight bits, the other does not. So "int8 costs
# nothing" is no property of a function. It depends on how the numbers inside are scaled.
#
# ## 4. Why: count the codes
# One layer that reads a norm, and of its input the ordinary channels only. **Predict:** how many of the 256
# codes do they use, before and after planting?
# %% tags=["nbval-ignore-output"]
from quantlab import choose_qparams, fake_quantize, quantize

q = fed_by_norm[len(fed_by_norm) // 2]
models = {"plain": model, "planted": planted}
inputs = {title: capture_inputs(m, calibration[:512], [q])[q] for title, m in models.items()}
ordinary = torch.ones(width, dtype=torch.bool).index_fill(0, torch.tensor(channels), False)
used = {}
for title, values in inputs.items():
    qp = choose_qparams(values.min(), values.max(), qmin=0, qmax=255)
    used[title] = (quantize(values[:, ordinary], qp) - qp.zero_point).flatten()
before, after = (len(used[title].unique()) for title in ("plain", "planted"))
found(before > 100, f"before planting over 100 codes are in use, here {before}")
found(after < 10, f"after it fewer than 10, here {after}")
shares = {title: (v == 0).float().mean().item() for title, v in used.items()}
{title: f"{len(v.unique())} codes; values that became 0: {shares[title]:.0%}"
    for title, v in used.items()}
# %% [markdown]
# The outliers take the whole ruler, and most other values become 0.
#
# Would a scale for each *token* help? **Predict:** in how many tokens do the outlier channels stand out? And
# would a scale for each *channel*?
# %% tags=["nbval-ignore-output"]
loud, planted_weight = inputs["planted"], weight_of(linear_layers(planted)[q])

def relative(error, y):
    return (error.square().sum() / y.square().sum()).item()

def error_of(dim):  # of the output, with 8-bit inputs that share a scale along dim
    low, high = loud.amin(dim, keepdim=True), loud.amax(dim, keepdim=True)
    qp = choose_qparams(low, high, qmin=0, qmax=255)
    return relative((fake_quantize(loud, qp) - loud) @ planted_weight.T, loud @ planted_weight.T)

errors = {"one scale": error_of((0, 1)), "a scale a token": error_of(1),
    "a scale a channel": error_of(0)}
loud_tokens = (loud[:, ~ordinary].abs().amax(1) >= 6).float().mean()
found(loud_tokens > 0.95, f"nearly every token has an outlier, here {loud_tokens:.0%}")
found(errors["a scale a token"] < errors["one scale"], "a scale a token helps a little")
found(errors["a scale a channel"] < errors["a scale a token"] / 100, "a scale a channel far more")
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
# `x` (tokens, in) and `weight` (out, in) are floats; return the output (tokens, out). In the float part both x and
# the weight are floats, as above. Codes are −127 … 127, rounded to nearest, and may be held in float tensors. A token
# whose ordinary values are all 0 must not give NaN; change neither x nor weight.
# %% tags=["exercise"]
def my_split(x, weight, threshold):
    raise NotImplementedError
# %%
check("9.2", my_split)
# %% [markdown]
# The library's layer computes on real int8 codes and keeps no float copy of the weight, as bitsandbytes does by
# default: for the float part it *dequantizes* the columns it needs, so they have been rounded, too. (Section 7
# measures what that costs.) On a weight that already lies on the grid both are the same, as the first cell asserts.
# What the layer gains is memory: the cell prints its bytes as a part of those of 16-bit floats.
#
# The second cell is **the control that must fail**: as many columns in float, but *other* ones.
# %%
reader = torch.nn.Linear(*reversed(planted_weight.shape), bias=False).requires_grad_(False)
reader.weight.copy_(planted_weight)  # a bias plays no part
int8 = LLMInt8Linear.from_linear(reader)
on_grid = int8.dequantized_weight()
off = relative(int8(loud) - split_solution(loud, on_grid, 6.0), loud @ on_grid.T)
assert off < 1e-6  # a value beside a tie may get another code
int8.nbytes / (2 * int8.codes.numel())
# %% tags=["nbval-ignore-output"]
unsplit = LLMInt8Linear.from_linear(reader, threshold=float("inf"))

def split_error(columns):  # of the integer part's rounding, when these columns are in float
    rest = loud.masked_fill(columns, 0.0)
    return relative(unsplit(rest) - rest @ on_grid.T, loud @ on_grid.T)

outliers = int8.outlier_columns(loud)
by_columns = {"outlier columns": split_error(outliers),
    "as many others": split_error(outliers.roll(3)),
    "none": split_error(torch.zeros_like(outliers))}
right, wrong, none = by_columns.values()
found(right < 0.01 * none, f"the outlier columns save {1 - right / none:.1%} of the error")
found(wrong > 0.5 * none, f"as many others save {1 - wrong / none:.0%} (the bundled model: 3%)")
{title: f"{error:.1e}" for title, error in by_columns.items()}
# %% [markdown]
# ### Drag it
# Left: the largest |x| of each channel, green where the column goes to float. Right: the error of the layer's
# output, and the share of columns in float, over all thresholds. *planted* unticked multiplies the inputs
# only and leaves the weights: a layer as if it had grown outliers by itself.
#
# **Predict first:**
# 1. Is there a threshold that is too low? What does it cost?
# 2. Pull the threshold up through the outliers: does the error rise at the first of them, or the last?
# 3. At 6.0 an error is left. Whose is it, and does it change when you untick *planted*?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_threshold

plain_weight = weight_of(linear_layers(model)[q])
explorer = explore_threshold(plain_weight, inputs["plain"], channels=channels, factor=100)
explorer
# %% [markdown]
# **What you saw.** A low threshold costs no accuracy: it turns the layer into a float layer, column by
# column. Upwards, the error rises as soon as one outlier is left in the integers: one is enough to set a
# step. At 6.0 the blue curve lies on the dashed line, the error of the int8 *weights*. Untick *planted* and it
# falls far down. Section 7 measures why.
#
# ### What the threshold means elsewhere
# 6.0 is an absolute number, and a column counts as soon as *any* token reaches it. **Predict:** which share of
# the columns of the loudest layer of our model (the bundled one has no outliers) goes to float when 1, 16, 256 or
# 4096 tokens are read at once? (A second guess is asked below the answer.)
# %% tags=["nbval-ignore-output"]
layer = LLMInt8Linear.from_linear(linear_layers(model)[loudest])
many = capture_inputs(model, calibration, [loudest])[loudest]
shares = {n: layer.outlier_columns(many[:n]).float().mean().item() for n in (1, 16, 256, len(many))}
assert list(shares.values()) == sorted(shares.values())
print({f"{n} tokens": f"{share:.1%}" for n, share in shares.items()})
answers = ["no, each token has its own scale", "yes"]
beside_guess = predict(
    "Under LLM.int8(), do your logits depend on your neighbour in the batch?", answers)
# %% tags=["nbval-ignore-output"]
split_model, _ = quantize_lm(model, calibration[:512], method="llm_int8", progress=False)
me, neighbour = calibration[:64], tokens[:64]

def moved_by_neighbour(m):
    with torch.no_grad():
        alone, beside = (m(torch.stack(rows)).logits[0] for rows in ([me], [me, neighbour]))
    return (alone - beside).abs().max().item()

noise, moved, of_tensor = (moved_by_neighbour(m) for m in (model, split_model, whole))
found(moved > 10 * noise, "the neighbour moves a logit, by more than float rounding")
found(moved < of_tensor, f"but by less than with one scale a tensor: {moved / of_tensor:.2f} of it")
print(f"a logit moves by up to {moved:.3f}; float {noise:.0e}, one scale a tensor {of_tensor:.3f}")
beside_guess.reveal(answers[moved > 10 * noise])
# %% [markdown]
# In the bundled model these are no outliers in the paper's sense, only values that pass a fixed number, in a layer
# that the paper left out of its count. The more tokens one call reads, the more columns leave the integers, for all
# tokens of the call. So your logits depend on your neighbour, where one of their tokens takes a column to float that
# yours alone would have left in the integers. They move less than with one scale a tensor (notebook 08), but they
# move.
#
# ### Myth: "LLM.int8() quantizes the weights only"
# Many comparison tables list it among the weight-only methods. If it were one, replacing the inputs by their own
# 8-bit rounding would change the output. Does it?
# %% tags=["nbval-ignore-output"]
from quantlab import dequantize

rest = loud.masked_fill(outliers, 0.0)
qp = int8.input_qparams(rest)
rounded = torch.where(outliers, loud, dequantize(quantize(rest, qp), qp))
changes = {title: relative(layer(rounded) - layer(loud), layer(rest))
    for title, layer in {"LLM.int8()": int8, "int8 weights only": lambda x: x @ on_grid.T}.items()}
assert changes["LLM.int8()"] < 1e-10
found(changes["int8 weights only"] > 1e-6,
    f"rounding the inputs changes them, by {changes['int8 weights only']:.0e}")
{title: f"{value:.0e}" for title, value in changes.items()}
# %% [markdown]
# It does not. The layer had rounded them already: weights **and** activations are integers, except for the outlier
# columns. The split is a second product on top of the first; of its GPU kernels the author wrote that for
# common 7B models inference will always be slow (bitsandbytes issue 490).
#
# ## 6. SmoothQuant: move the difficulty
# By (1) we can also *remove* outliers: divide channel j of the inputs by sⱼ (into the norm's gain), multiply
# column j of the weights. Now the *weights* have loud columns. Where is a fair place to stop? If both sides
# are to be equally hard,
#
# $$\max|X_j| / s_j = \max|W_j|\, s_j \quad\Rightarrow\quad s_j = \sqrt{\max|X_j| / \max|W_j|}$$
# %% [markdown]
# Xiao et al. (2023) put a knob on it, the **migration strength** (迁移强度) α:
#
# $$s_j = \max|X_j|^{\alpha} \,/\, \max|W_j|^{1-\alpha} \qquad (2)$$
#
# **Predict** for max|X| = (4, 64) and max|W| = (1, ¼): what are both after smoothing with α = 0, ½ and 1?
# The cell after the exercise tells.
#
# ### Exercise 9.3: SmoothQuant's scales (about 10 minutes)
# Equation (2) for all channels at once: `largest_x`, `largest_w` and the result are (channels,), `alpha` is a number.
# Some entries of `largest_x` or `largest_w` may be 0: there any s that is finite and above 0 will do.
# %% tags=["exercise"]
def my_smoothing(largest_x, largest_w, alpha):
    raise NotImplementedError
# %%
check("9.3", my_smoothing)
# %%
largest_x, largest_w = torch.tensor([4.0, 64.0]), torch.tensor([1.0, 0.25])
for alpha in (0.0, 0.5, 1.0):
    s = smoothing_solution(largest_x, largest_w, alpha)
    print(f"alpha {alpha}: s {s.tolist()}, inputs {(largest_x / s).tolist()},",
          f"weights {(largest_w * s).tolist()}")
# %% [markdown]
# At ½ both sides of each channel are the same; α = 1 makes all channels of the inputs equal and the weights
# carry everything; α = 0 is the reverse. In the library the largest weight of *all* layers that share the
# norm counts.
#
# ### A test that cannot fail
# Planting multiplied max|X| by d and divided max|W| by d. Put both into (2):
# $(d X)^\alpha / (W/d)^{1-\alpha} = d \cdot s$, whatever α is. SmoothQuant divides by d·s and so **undoes
# the planting exactly**, without being told:
# %%
planted_peaks = activation_scales(planted, calibration)
readers = {m: next(group for _, group in norm_readers(m) if linear_layers(m)[q] in group)
    for m in (model, planted)}
largest_w = torch.cat([weight_of(layer) for layer in readers[model]]).abs().amax(0)
d = torch.ones(width).index_fill(0, torch.tensor(channels), 100.0)
for alpha in (0.0, 0.5, 1.0):
    s = smoothing_scales(peaks[q], readers[model], alpha)
    assert torch.allclose(s, smoothing_solution(peaks[q], largest_w, alpha))
    assert torch.allclose(
        smoothing_scales(planted_peaks[q], readers[planted], alpha), d * s, rtol=1e-3)
# %% [markdown]
# So a model with planted outliers cannot say which α is good, and flatters SmoothQuant. In large models the
# inputs are loud and the weights flat (Xiao et al. 2023, §3). So grow the inputs and leave the weights: the
# layer's function changes, but its output error can still be measured.
#
# ### Drag it
# Colours: how many bits each code needs; dark blue became 0, yellow uses the whole ruler.
#
# **Predict first:**
# 1. From α = 0 to 1, which picture lights up, which one goes dark, and where do the blue and green lines
#    meet?
# 2. W4A8 (4-bit weights, 8-bit inputs) and W8A4: to which side does the lowest error move?
# 3. Tick *planted* and drag the factor. Does the curve move?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_smoothing

surface = explore_smoothing(plain_weight, inputs["plain"], channels=channels, factor=30)
surface
# %% tags=["nbval-ignore-output"]
grown = inputs["plain"] * d.clamp(max=30)
best = {f"W{w}A{a}": alpha_solution(plain_weight, grown, w, a) for w, a in ((4, 8), (8, 8), (8, 4))}
found(best["W4A8"] < best["W8A8"], "fewer bits for weights want a smaller alpha")
found(best["W8A8"] < best["W8A4"], "fewer bits for inputs want a larger one")
{title: f"best alpha {alpha:.2f}" for title, alpha in best.items()}
# %% [markdown]
# **What you saw.** Before, the inputs are dark but for six stripes, the weights bright. With α the light moves
# from one side to the other; at ½ the two lines are one. The error is a U: too little smoothing leaves
# the inputs hard, too much makes the weights hard. Fewer bits for the weights move its bottom left, fewer for
# the inputs right. With *planted* ticked the curve stays, as derived.
#
# ## 7. The whole model
# All ways, on the plain model and on the planted one; the KL is to the same float model throughout. The table leaves
# out W8A8 with dynamic scales, which notebook 08 measured; the picture has all. **Predict** the order of the KLs in
# each half.
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

from quantlab import ledger

ways = {"w8a8 tensor": {"method": "w8a8_dynamic"},
    "w8a8 token": {"method": "w8a8_dynamic", "per": "token"},
    "w8a8 static": {"method": "w8a8_static"}, "llm_int8 split": {"method": "llm_int8"},
    "smooth tensor": {"method": "smoothquant"}}
kl, rows, text = {kind: {} for kind in models}, [], tokens[: budget(model, 4096, least=512)]
for kind, way in tqdm([(kind, way) for kind in models for way in ways], leave=False):
    new, report = quantize_lm(models[kind], calibration[:512], progress=False, **ways[way])
    if ways[way]["method"] == "w8a8_dynamic":  # the KL alone
        kl[kind][way] = divergence(model, new, text).kl
        continue
    short, per = way.split()
    title = ways[way]["method"] if kind == "plain" else f"planted {short}"
    row = ledger.measure(model, new, text, method=title, bits=8, group=per, report=report)
    ledger.append(row)
    rows, kl[kind][way] = [*rows, row], row.kl
ledger.Table(rows)
# %% tags=["nbval-ignore-output"]
bars = {kind: {way.replace(" ", "\n"): one[way] for way in ways} for kind, one in kl.items()}
plot_bars(bars, ylabel="KL, nats per token", log=True, ax=plt.subplots(figsize=(7, 2.6))[1])
plain, lost = kl["plain"], kl["planted"]
found(plain["w8a8 tensor"] < 0.05, f"plain, the KL is below 0.05: {plain['w8a8 tensor']:.4f}")
found(lost["w8a8 tensor"] > 1, f"planting takes it above 1: {lost['w8a8 tensor']:.2f}")
saved = {way: 1 - value / lost["w8a8 tensor"] for way, value in lost.items()}
found(saved["w8a8 static"] < 0.5 * saved["w8a8 token"], "a fixed scale saves little")
found(saved["w8a8 token"] < 0.9, "a scale a token more")
found(min(saved["llm_int8 split"], saved["smooth tensor"]) > 0.95, "split, smoothing nearly all")
gain = 1 - plain["smooth tensor"] / plain["w8a8 tensor"]
found(abs(gain) < 0.3, f"not planted, smoothing changes little, here {gain:.0%}")
{way: f"{share:.1%} of the loss given back" for way, share in saved.items()}
# %% [markdown]
# On the plain model smoothing changes little: the bundled one has nothing to smooth. On the planted one a fixed scale
# saves little, a scale a token more, the split and smoothing nearly all of the loss. (Do not read
# LLM.int8()'s plain dot as a victory of integers: the text was read in one batch of 4096 tokens, and section 5
# showed how many columns of a `down_proj` then are in float.)
#
# ### Where the rest of LLM.int8() sits
# Its KL on the planted model is still far above that on the plain one. How much of it do the int8 *weights* make?
# Two models tell: one with int8 weights and float inputs; and LLM.int8() as the paper's equation 8 has it, where
# the outlier columns of the *weight* are floats as well (exercise 9.2's formula in every layer). **Predict** which of
# them is near LLM.int8() as coded here, and which is near the plain model.
# %% tags=["nbval-ignore-output"]
from quantlab import PerAxis, quantize_tensor
from quantlab.lm import quantize_weights

def rows_in(bits):
    return lambda weight: quantize_tensor(weight, bits=bits, granularity=PerAxis(0))

weights_only, qtensors = quantize_weights(planted, rows_in(8))
rest = divergence(model, weights_only, text).kl
zeros = (qtensors[q].codes[:, channels] == 0).float().mean().item()
ratio = lost["llm_int8 split"] / rest
found(abs(ratio - 1) < 0.2, f"LLM.int8() has {ratio:.2f} times the KL of int8 weights alone")
found(zeros > 0.5, f"most codes in the planted columns are 0, here {zeros:.0%}")
f"int8 weights alone: KL {rest:.4f}; codes of one layer's planted columns that are 0: {zeros:.0%}"
# %% tags=["nbval-ignore-output"]
import copy

def by_the_paper(linear, read, y):  # exercise 9.2's formula: the weight's columns in float, too
    y = split_solution(read[0].flatten(0, -2), weight_of(linear), 6.0).view_as(y)
    return y if linear.bias is None else y + linear.bias

in_paper = copy.deepcopy(planted)
for linear in linear_layers(in_paper).values():
    linear.register_forward_hook(by_the_paper)
paper, coded = divergence(model, in_paper, text).kl, lost["llm_int8 split"]
found(1 - paper / coded > 0.9, f"float columns take {1 - paper / coded:.1%} of that KL, above 90 %")

def weight_error(linear, x):
    w, w_hat = weight_of(linear), LLMInt8Linear.from_linear(linear).dequantized_weight()
    return relative(x @ (w_hat - w).T, x @ w.T)

both, grown = weight_error(reader, loud), weight_error(linear_layers(model)[q], loud)
found(both > 20 * grown, f"planting makes the weights' part {both / grown:.0f} times as large")
print(f"error of one layer's int8 weights: planted {both:.1e}, only inputs grown {grown:.1e}")
f"KL: coded {coded:.4f}, as in the paper {paper:.4f}; plain {plain['llm_int8 split']:.4f}"
# %% [markdown]
# The paper's split gives the loss back; ours, which keeps no float copy of the weight, is left with the error of its
# int8 weights. Why do they err so much? Planting made a column of weights a hundredth of what it was, while the rest
# of each row, and so its scale, stayed. So most of the column's codes are 0, and its inputs are a hundred times as
# large. Where only the inputs have grown (the second error in the cell's output), that does not happen. So this loss
# is the price of planting *together with* an int8 weight for the outlier columns. It is not a price of the method.
#
# ## 8. The control that must fail
# Divide six channels by 100 again, by (1): once the planted ones, once six others. In floats both leave the
# function alone. If it is *these* channels that matter, only the first can help.
#
# And where nobody planted anything? SmolLM2, a real model of 135 million parameters, has grown outliers by itself.
# Its ledger has the ways of section 7. **Predict**: do the split and smoothing give the loss back there, too?
# %% tags=["nbval-ignore-output"]
others = [c + 3 for c in channels]
helped = {}
for title, chosen in {"planted channels": channels, "six others": others}.items():
    new = plant_outliers(planted, channels=chosen, factor=0.01)
    new, _ = quantize_lm(new, calibration[:512], method="w8a8_dynamic", progress=False)
    helped[title] = divergence(model, new, tokens[:2048]).kl
found(helped["planted channels"] < 0.02 * helped["six others"],
    "undoing the planted channels saves nearly everything")
found(helped["six others"] > 0.7 * lost["w8a8 tensor"], "undoing six others saves nearly nothing")
print({title: f"KL {value:.3f}" for title, value in helped.items()})

real = {f"{row.method} {row.group}": row.kl for row in ledger.read(DATA / "ledger-smollm2.csv")}
whole = real["w8a8_dynamic tensor"]
print(f"SmolLM2, one dynamic scale: KL {whole:.2f}; of that is left:")
for way in ("w8a8_static static", "w8a8_dynamic token", "llm_int8 split", "smoothquant tensor"):
    print(f"{way:20}{real[way] / whole:6.2f}")
assert real["w8a8_static static"] > whole > real["smoothquant tensor"] > 0.8 * whole
assert max(real["w8a8_dynamic token"], real["llm_int8 split"]) < 0.1 * whole
# %% [markdown]
# Undoing the planted channels gives the loss back, and undoing six others does not.
#
# On the real model the split works, and a scale for each token nearly as well. A fixed scale is worse than a dynamic
# one, and **smoothing leaves 0.85 of the loss**. Its outliers are not planted behind norms: a few *tokens* are loud, in
# layers that no norm feeds, where SmoothQuant has nothing to divide. [Notebook 16](16_a_real_model.ipynb) finds them.
#
# ## 9. Exercises
# ### Exercise 9.4: fit the threshold (about 15 minutes)
# For the layer `practice` and its input `practice_x`, return a threshold at which **at most 5 %** of the
# columns go to float and the output error is **at most 1.05 times** that of the default, 6.0.
# `LLMInt8Linear.from_linear(practice, threshold=...)` has `outlier_columns(x)`.
# %% tags=["exercise"]
practice, practice_x = layer_with_outliers()

def my_threshold():
    raise NotImplementedError  # return a number
# %%
check("9.4", my_threshold)
# %% [markdown]
# ### Exercise 9.5: search α (about 30 minutes)
# The SmoothQuant authors tried a grid of α for each model. Do it for one layer: for `weight` (out, in), `x`
# (tokens, in) and the bits of both, return an α in 0 … 1 whose output error (squared, against `x @ weight.T`)
# is **at most 1.1 times** the least. Weights: symmetric, a scale a row, `quantize_tensor(w, bits=...,
# granularity=PerAxis(0))`; inputs: one asymmetric scale, `choose_qparams`. The check brings four layers with
# different bits.
# %% tags=["exercise"]
def my_alpha(weight, x, weight_bits, activation_bits):
    raise NotImplementedError
# %%
check("9.5", my_alpha)
# %% [markdown]
# ### Open
# - "Outliers are rare values, clip them": which share of the values of `loud` reaches 6? What does `w8a8_static`
#   give with `observer=partial(Percentile, percentile=99)`?
# - Plant with factors 1, 10, 30, 100 and 300: which KL of section 7 grows first, which stays flat, and why?
# - SmoothQuant's authors fix the inputs' scales too: `per="static"`. What does that cost, plain and planted?
# - SmoothQuant leaves `down_proj` alone, which reads silu(gate) · up. Which *rows* of which layer could take 1/s?
# - Rotate both sides at random: x Rᵀ (W Rᵀ)ᵀ = x Wᵀ. What becomes of an outlier channel?
# - Run section 1 on the largest model that you can: are its weights flat where its inputs are loud? Then W8A8
#   *without planting*.
#
# ## 10. What breaks next
# Eight bits are safe now. Fewer bits for the weights are another problem: their inputs stay in float, so smoothing
# has nothing to do. One scale a row, inputs in float:
# %% tags=["nbval-ignore-output"]
left = {}
for bits in (8, 4, 3):
    new, _ = quantize_weights(model, rows_in(bits))
    left[bits] = divergence(model, new, tokens[:2048]).kl
found(left[8] < 0.01, f"8 bits cost below 0.01 nats: {left[8]:.4f}")
found(left[4] > 0.05, f"4 bits above 0.05: {left[4]:.4f}")
found(left[3] > left[4], f"3 bits more still: {left[3]:.4f}")
print("KL:", {f"{bits} bits": round(value, 4) for bits, value in left.items()})
score()
# %% [markdown]
# Each weight went to its nearest grid point: the best for each weight, and not for their sum.
#
# ### Recap
# - One scale is set by the largest value: a few loud channels take the whole ruler from all others.
# - x·d with W/d is the same function: outliers can be planted, and moved away, in the norm before a layer.
# - LLM.int8() multiplies loud columns in float: of the rest, weights *and* activations are int8.
# - SmoothQuant moves the difficulty into the weights, by sⱼ = max|Xⱼ|^α / max|Wⱼ|^(1−α); its error is a U.
# - A test with planted outliers flatters SmoothQuant, and punishes an LLM.int8() that keeps no float columns of W.
#
# Next: [10 GPTQ](10_gptq.ipynb) rounds weights so that their errors cancel in the sum.
