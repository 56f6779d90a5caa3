# %% [markdown]
# # 01 Scale and zero point
# *50 minutes, and 45 more for the exercises of section 9. The computer needs less than one. You need notebook
# 00.*
#
# A weight is a real number, a code is a small integer, and two numbers tie them together: the **scale**
# (缩放因子) and the **zero point** (零点). At the end of this notebook you can
#
# - quantize (量化) and dequantize (反量化) a tensor by hand, and write the five lines that do it;
# - choose scale and zero point for any range of data, including the ranges on which published code fails;
# - say how large the error is before you measure it, in steps and in decibels;
# - translate between the conventions of papers and libraries without losing a sign.
# %% [markdown]
# ### Recall
# Answer before you open them.
#
# 1. How many bytes does a float32 weight take, and an int8 one?
# 2. Why did the model of notebook 00 get stuck when its weights were cast to int8?
# 3. Which part of the model holds most of the weights?
#
# <details><summary>Answers</summary>
# 1. Four and one. 2. The weights are far smaller than 1, so the cast cut nearly all of them to 0. 3. The
#    linear layers inside the blocks; the embedding comes next.</details>
#
# ## 1. What broke
# We take one layer of the real model and do what the last notebook did: cast it to integers.
# %%
import torch

from quantlab.lm import layers_of_role, linear_layers, load_lm, weight_of

model, tokenizer = load_lm()
name, layer = next(iter(layers_of_role(model, "gate").items()))
weight = weight_of(layer)
cast = weight.to(torch.int8)
f"{name} {tuple(weight.shape)}: {(cast == 0).float().mean():.1%} of the weights became 0"
# %% [markdown]
# The integers are fine. What is missing is a *unit*: how much one integer step is worth. A map of a city is
# useful because a corner of it says "1 cm is 200 m". The scale is that corner.
#
# ## 2. By hand: five numbers, four codes
# With 2 bits there are four codes, 0 to 3. We lay them over the range from −1 to 2, so that one step is
# worth 1.0, and real 0 falls on code 1. That code is the zero point.
# %%
x = torch.tensor([-1.0, -0.4, 0.0, 0.9, 2.0])
scale, zero_point = 1.0, 1
codes = torch.round(x / scale) + zero_point
codes.tolist()
# %% [markdown]
# Back again: subtract the zero point, multiply by the scale.
# %%
x_hat = scale * (codes - zero_point)
x_hat.tolist()
# %% [markdown]
# Two numbers came back changed: −0.4 moved to 0, and 0.9 to 1. Each went to the nearest grid point, and
# none moved by more than half a step.
# %%
import matplotlib.pyplot as plt

from quantlab.plots import plot_number_line

fig, ax = plt.subplots(figsize=(7, 1.6))
plot_number_line(x, x_hat, ax=ax)
plt.show()
# %% [markdown]
# **Predict before you run.** What becomes of 5.0, which lies outside the range?
# %%
torch.round(torch.tensor(5.0) / scale) + zero_point
# %% [markdown]
# There is no code 6 in two bits. So one more step is needed: **clamp** to the codes that exist. Here is the
# whole of it. x is the real number, s the scale and z the zero point; q is the code, which lies between the
# smallest, `qmin`, and the largest, `qmax`; x̂ is what comes back.
#
# $$q = \mathrm{clamp}\big(\mathrm{round}(x / s) + z,\ q_{min},\ q_{max}\big) \qquad\qquad \hat x = s\,(q - z)$$
#
# ### Exercise 1.1: quantize (about 5 minutes)
# Write it. `x` is a tensor, the others are numbers; return the codes in the shape of `x`, whole numbers of any
# type. Leave ties such as `0.5` to `torch.round`, which sends them to the even number. `hint("1.1")` gives the
# first of three hints; ask again for the next.
# %% tags=["exercise"]
def my_quantize(x, scale, zero_point, qmin, qmax):
    raise NotImplementedError
# %%
from quantlab.checks import check, found, hint, solution

check("1.1", my_quantize)
# %% [markdown]
# The library does the same, with both numbers and both bounds in one object, `QParams` (read
# `quantlab/affine.py`: it is short).
# %%
from quantlab import QParams, dequantize, quantize

qp = QParams(torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), qmin=0, qmax=3)
assert quantize(x, qp).tolist() == codes.tolist()
assert dequantize(quantize(x, qp), qp).tolist() == x_hat.tolist()
quantize(torch.tensor([5.0, -5.0]), qp).tolist()
# %% [markdown]
# ## 3. Choosing the two numbers
# Data come with a range, from `low` to `high`; b bits come with 2ᵇ codes, and so 2ᵇ − 1 steps between them.
# That gives
#
# $$s = \frac{high - low}{2^b - 1} \qquad\qquad z = q_{min} - \mathrm{round}(low / s)$$
#
# The zero point is a *code*: an integer between `qmin` and `qmax`. So real 0 comes back as exactly 0. That
# matters: padding, masks and everything a ReLU switched off are exact zeros, and there are many of them.
#
# A tensor has values between 10 and 11. What is z for 8 bits, by the formula? Is that a code?
# %%
from quantlab import predictions
from quantlab.predictions import predict

guess = predict(
    "Which z does the formula give for 10 to 11, with codes 0 to 255?", ["-2550", "0", "255"]
)
# %%
low, high = 10.0, 11.0
s = (high - low) / 255
guess.reveal(str(0 - round(low / s)))
# %% [markdown]
# −2550 is no code. Some published programs then clamp z to a code, and say nothing. We try that on 10 to 11:
# %%
x = torch.linspace(10, 11, 1001)
clipped = QParams(torch.tensor(s), torch.tensor(0, dtype=torch.int32), 0, 255)
back = dequantize(quantize(x, clipped), clipped)
f"mean error {(back - x).abs().mean():.1f}, all values became {back.max():.1f} or less"
# %% [markdown]
# Everything was lost. The right way: **widen the range to hold 0 first**, and only then compute scale and
# zero point. The step grows, but every value has a code again.
# %%
from quantlab import choose_qparams, fake_quantize

qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=255)
error = (fake_quantize(x, qp) - x).abs()
assert error.max() <= qp.scale / 2 * 1.001
f"scale {qp.scale:.4f}, zero point {qp.zero_point}, largest error {error.max():.4f}"
# %% [markdown]
# `fake_quantize` is dequantize(quantize(x)): the rounded values, still floating point. Half a step is all
# that is lost now. The price of an exact 0: the step is longer, because the range from 0 to 10 has codes
# that these data never use.
#
# ### Exercise 1.2: scale and zero point (about 10 minutes)
# For unsigned codes 0 … 2ᵇ − 1, from two numbers `low < high`: return the scale, a real number, and the zero
# point, a whole one. The check tries ranges on either side of 0.
# %% tags=["exercise"]
def my_parameters(low, high, bits):
    raise NotImplementedError  # return scale, zero_point
# %%
check("1.2", my_parameters)
# %% [markdown]
# ## 4. How large is the error?
# **Predict.** Inside the range, what is the largest possible error, in steps? And if x falls anywhere
# within a step with equal chance, what is the mean of the *squared* error, in s²?
# %%
x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=15)
error = fake_quantize(x, qp) - x
largest, variance = (
    (error.abs().max() / qp.scale).item(),
    (error.square().mean() / (qp.scale**2 / 12)).item(),
)
assert largest < 0.501
assert abs(variance - 1) < 0.02
f"largest {largest:.3f} steps, variance {variance:.3f} × s²/12"
# %% [markdown]
# A rounding error lies between −s/2 and s/2. Spread evenly, its variance is s²/12 (integrate e² over one
# step).
#
# One more bit about halves the step, and so quarters the squared error. Engineers count such ratios in
# **decibels**: 10·log₁₀ of the ratio, and 10·log₁₀ 4 = 6.02. The **signal-to-noise ratio**, the mean of x² over
# the mean squared error, should therefore grow by 6.02 dB a bit. Does it?
# %%
from quantlab import sqnr_db

decibels = []
for bits in range(2, 9):
    qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=2**bits - 1)
    decibels.append(sqnr_db(x, fake_quantize(x, qp)))
gains = torch.tensor(decibels).diff()
assert abs(gains[-3:].mean() - 6.02) < 0.1
[round(d, 1) for d in decibels], [round(g, 2) for g in gains.tolist()]
# %% [markdown]
# It does once the steps are small. With very few codes the gain is larger, because 2ᵇ − 1 more than doubles
# with each bit.
#
# ### Myth: "quantizing is W/s, rounded down"
# Some texts write ⌊W/s⌋. What does that cost?
# %%
guess = predict(
    "What is the squared error with floor, over that with round?",
    ["the same", "twice", "four times"],
)
# %%
qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=255)
floored = qp.scale * (torch.floor(x / qp.scale).clamp(-qp.zero_point, 255 - qp.zero_point))
worse = (floored - x).square().mean() / (fake_quantize(x, qp) - x).square().mean()
assert abs(worse - 4) < 0.1
print(f"{worse:.2f} times the squared error; mean error {(floored - x).mean() / qp.scale:.2f} "
      "steps")
guess.reveal("four times")
# %% [markdown]
# Four times, and the values are too small by half a step on average: a *bias*, which a matrix product adds
# up.
#
# ## 5. Symmetric or asymmetric
# If we force the range to be [−a, a], the zero point is the middle code, the same for every tensor, and
# need not be stored. Integer matrix products also become simpler (notebook 07). The price is range that
# no value uses.
#
# **Predict.** For weights, which usually lie about evenly on both sides of 0, how much does it cost? And for
# the output of a ReLU?
# %% tags=["nbval-ignore-output"]
def error_of(x, symmetric):
    qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=15, symmetric=symmetric)
    return (fake_quantize(x, qp) - x).square().mean()

def cost(x):
    return (error_of(x, True) / error_of(x, False)).item()

relu = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).relu()
of_layers = sorted(cost(weight_of(layer)) for layer in linear_layers(model).values())
worst = max(map(weight_of, linear_layers(model).values()), key=cost)
low, high = sorted((-worst.min().item(), worst.max().item()))
assert cost(relu) > 3
found(of_layers[-1] < 2.5,
      f"symmetry costs no layer more than {of_layers[-1]:.2f} times (bundled: 1.94)")
print(f"this layer: {cost(weight):.2f} times the squared error; after a ReLU {cost(relu):.2f}")
print(f"all layers: from {of_layers[0]:.2f} to {of_layers[-1]:.2f}, half of them below "
      f"{of_layers[len(of_layers) // 2]:.2f}")
f"the worst of them: one end lies {high / low:.1f} times as far out as the other"
# %% [markdown]
# Little for most layers; nearly twice the squared error for the worst, one end of which lies 2.4 times as far out
# as the other; about four times for ReLU outputs, where half of the codes wait for negative values that never
# come. Hence the usual rule: weights symmetric, activations asymmetric. (It is a rule for the many, not for the
# worst layer. And "asymmetric means z ≠ 0" is no definition: unsigned codes on ReLU data have z = 0, symmetric
# unsigned ones z = 8 here.)
# %% [markdown]
# ## 6. Drag it
# Grey: the weights of the layer (at most 20,000 of them, its extremes among them). Blue: the grid points;
# the triangle is 0. Below: the error that a value at each place suffers.
#
# **Predict first**, then drag:
# 1. From 4 to 3 bits: what happens to the height of the sawtooth?
# 2. Pull `max` inwards to half: which weights suffer, and does the error of the others fall?
# 3. Tick *symmetric*: does the grid move?
# 4. Where does the mean squared error have its minimum at 3 bits? It is not at the full range.
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_affine

explorer = explore_affine(weight, bits=4)
explorer
# %% [markdown]
# **What you saw.** Inside the grid the error is a sawtooth of height s, between −s/2 and s/2 (dashed).
# Outside, it grows without bound: that is clipping. A narrower grid has a lower sawtooth and a larger
# outside. The best range lies in between: the next cell tries some at 3 bits. *Symmetric* moves the grid
# if the extremes of the layer are not equally far out, as here; the step grows a little.
# %% tags=["nbval-ignore-output"]
def error_at(part, bits=3):
    qp = choose_qparams(weight.min() * part, weight.max() * part, qmin=0, qmax=2**bits - 1)
    return (fake_quantize(weight, qp) - weight).square().mean().item()

errors = {part: error_at(part) for part in (0.2, 0.4, 0.6, 0.8, 1.0)}
best = min(errors, key=errors.get)
found(best < 1, f"the best of these is {best:.0%} of the range (the bundled model: 40%)")
found(errors[0.2] > 1.5 * errors[best],
      f"20% has {errors[0.2] / errors[best]:.1f} times the error of the best")
{f"{part:.0%} of the range": f"{error:.2e}" for part, error in errors.items()}
# %% [markdown]
# ## 7. Rosetta: one map, three spellings
# Papers and libraries write the same map in different ways, and mixing halves of two of them is an easy bug
# to make.
#
# | spelling | to codes | back | what the third number is |
# |---|---|---|---|
# | ours, torch, ONNX, TFLite | round(x/s) + z | s·(q − z) | z, a code |
# | "plus" | round(x/s) − z′ | s·(q + z′) | z′ = −z, a code |
# | real offset | round((x − b)/s) | s·q + b | b = −s·z, a real number |
#
# Take the first line's z and the third line's way back, `q*s + z`:
# %%
x = torch.tensor([0.0, 0.1, 1.0])
qp = QParams(torch.tensor(0.02), torch.tensor(10, dtype=torch.int32), 0, 255)
codes = quantize(x, qp)
mixed = codes * qp.scale + qp.zero_point
assert torch.allclose(mixed - x, torch.tensor(10 * (1 + 0.02)), atol=1e-5)
[round(v, 2) for v in mixed.tolist()], [round(v, 2) for v in dequantize(codes, qp).tolist()]
# %% [markdown]
# Off by z·(1 + s) = 10.2 everywhere. Whoever tries such code on a symmetric signed grid does not notice,
# since z = 0 there. Another trap sits in the *real offset* line: b need not be a multiple of s, and then real
# 0 has no code.
#
# ### Exercise 1.3: Rosetta (about 5 minutes)
# Given our scale and zero point, two numbers, return `(offset, plus)`: the b of the third line and the z′ of the
# second. (`codes`, a tensor, is there to try them on; you may not need it.)
# %% tags=["exercise"]
def my_rosetta(codes, scale, zero_point):
    raise NotImplementedError  # return offset, plus
# %%
check("1.3", my_rosetta)
# %% [markdown]
# ## 8. The whole model
# One scale for each weight matrix, the simplest scheme there is. Five lines make a new model; the ledger
# measures it against the float model on stories that neither has seen. What the columns mean is the subject
# of notebook 06; for now: **KL** is how far the predictions moved, 0 is not at all.
# %%
import copy

from quantlab import PerTensor, quantize_tensor

def per_tensor(model, bits):
    new = copy.deepcopy(model)
    for layer in linear_layers(new).values():
        layer.weight.data = quantize_tensor(
            layer.weight, bits=bits, granularity=PerTensor()
        ).dequantize()
    return new
# %%
from quantlab import ledger
from quantlab.lm import budget, generate, load_text, token_stream

stories = token_stream(tokenizer, load_text("eval"))
tokens = stories[: budget(model, 4096)]  # fewer on a larger model
rows = [ledger.measure(model, model, tokens, method="float")]
for bits in (8, 4, 3):
    new = per_tensor(model, bits)
    rows.append(ledger.measure(model, new, tokens, method="nearest", bits=bits, group="tensor"))
# %% tags=["nbval-ignore-output"]
for row in rows:
    ledger.append(row)
kl = [row.kl for row in rows]
assert kl[0] < 1e-6
found(kl[1] < 0.05, f"at 8 bits KL is only {kl[1]:.3f} (the bundled model: 0.002)")
found(kl[2] > 0.05, f"at 4 bits KL is {kl[2]:.2f}, which shows (the bundled model: 0.48)")
found(kl[3] > kl[2], f"at 3 bits KL is {kl[3]:.2f}, larger again (the bundled model: 2.58)")
ledger.Table(rows)
# %% [markdown]
# Here eight bits are nearly free, four are not, and three ruin the model. (The sizes count these models as
# 16-bit floats: nothing has been packed yet, and so no times are measured. Notebooks 03 and 07 change that.)
#
# **The control that must fail.** Eight bits once more, on a grid from 0 to 255 with a zero point; and the same
# with the zero point left out on the way back. If our measure is worth anything, it must notice. (In a model
# with LayerNorm the bug may do no harm: what all channels have too much is taken off again. Llama's RMSNorm
# does not do that.)
# %%
def careful(x):
    qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=255)
    return qp.scale * (quantize(x, qp) - qp.zero_point)

def forgetful(x):
    qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=255)
    return qp.scale * quantize(x, qp)  # the bug: no zero point

right, broken = copy.deepcopy(model), copy.deepcopy(model)
for new, way in ((right, careful), (broken, forgetful)):
    for layer in linear_layers(new).values():
        layer.weight.data = way(layer.weight.data)
# %% tags=["nbval-ignore-output"]
good = ledger.measure(model, right, tokens, method="with zero point", bits=8)
bad = ledger.measure(model, broken, tokens, method="forgetful", bits=8)
found(bad.kl > 100 * good.kl,
      f"without zero points KL is {bad.kl:.4f} (the bundled model: 8.27)")
text = generate(broken, tokenizer, "Once upon a time", tokens=15)
f"KL {good.kl:.4f} with, {bad.kl:.2f} without zero points; without, it writes: {text!r}"
# %% [markdown]
# ## 9. Exercises
# ### Exercise 1.4: bits for 30 dB (about 15 minutes)
# `x = torch.rand(10_000) * 2 - 1`, on its own minimum and maximum. Return the least number of bits that
# reaches a signal-to-noise ratio of 30 dB. You can compute it, or reason it out from section 4.
# %% tags=["exercise"]
def my_bits():
    raise NotImplementedError
# %%
check("1.4", my_bits)
# %% [markdown]
# ### Exercise 1.5: a better range (about 30 minutes)
# `x` has heavy tails: many values near 0, some far out. The error is that of `choose_qparams(low, high,
# qmin=0, qmax=2**bits - 1)`. Shrink the range from `x.min()` to `x.max()` by one factor for both ends: some
# factor gives the least mean squared error. Return two numbers, `(low, high)`, whose error is at most `1.1`
# times the least. The check tries several tensors, at 2 and 3 bits.
# %% tags=["exercise"]
def my_range(x, bits):
    raise NotImplementedError
# %%
check("1.5", my_range)
# %% [markdown]
# ### Open
# The formula rounds ties to even (`0.5` to `0`, `1.5` to `2`, as IEEE 754 does). Schools teach "half away from zero".
# For which data could the difference be seen? Find a tensor on which it changes the mean of the result.
#
# ## 10. What breaks next
# One weight in ten thousand is large. The grid must reach it, so the step grows, for all.
# %%
x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
def share_of_zeros(x):
    qp = choose_qparams(x.min(), x.max(), qmin=-8, qmax=7, symmetric=True)
    return (fake_quantize(x, qp) == 0).float().mean().item()

before = share_of_zeros(x)
x[0] = 20.0
(f"values that became 0: {before:.0%} before, {share_of_zeros(x):.0%} after one of them was set to "
 "20")
# %% [markdown]
# ### Recap
# - A code is `clamp(round(x/s) + z, qmin, qmax)`; a real number is `s·(q − z)`. Never mix two spellings.
# - The zero point is a code. Widen the range to hold 0 first, then it always is one.
# - Inside the range the error is at most s/2, its variance s²/12, and each bit is worth 6 dB.
# - Symmetric grids cost little on most weights, up to nearly twice the squared error on some, and much on
#   one-sided activations.
# - Outside the range there is clipping, and one outlier can ruin the step for all.
#
# Next: [02 Clamping and calibration](02_clamping_and_calibration.ipynb) makes peace between rounding and
# clipping.
# %%
predictions.score()
