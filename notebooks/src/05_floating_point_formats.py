# %% [markdown]
# # 05 Floating-point formats
# *60 minutes without sections 9 and 10 on training (30 more) and the last exercise. The computer needs about
# one. You need notebooks 01, 03 and 04.*
#
# 浮点格式. The bits of a float say what it is worth, without a table. At the end of this notebook you can
#
# - read an FP8 number by hand, and round any tensor to any such format, as hardware does;
# - say from the spread of the data when 8 bits should be a float and when an integer;
# - build an MXFP4 block from its bits, and count what MXFP4, MXFP8 and NVFP4 really cost;
# - say what loss, gradient, backward and step are, why training in FP16 needs a loss scale, and find one.
# %% [markdown]
# ### Recall
# Answer before you open them.
#
# 1. NF4 has 16 codes. How many of its levels are negative, and how many positive?
# 2. What does one float32 scale for each block of 64 weights cost, in bits per weight?
# 3. A weight has a code of 4 bits. What else turns it into a number, in INT4 and in NF4?
#
# <details><summary>Answers</summary>
# 1. Seven and eight, and an exact 0. 2. Half a bit: 32/64. 3. The scale of its block, and the zero point if
#    there is one; in NF4 the scale and the table of levels.</details>
#
# ## 1. What broke
# A codebook is an *arbitrary* list: two codes do not say what the product of their numbers is, so a multiplier
# must look both up. The bits of integers mean something, and multipliers for them are cheap. So take 8-bit
# integers, for what a layer *holds* (its weight) and for what it *reads* (its inputs):
# %% tags=["nbval-ignore-output"]
import torch

from quantlab import PerTensor, quantize_tensor, sqnr_db
from quantlab.checks import check, found, hint, solution
from quantlab.lm import (budget, capture_inputs, layers_of_role, linear_layers, load_lm, load_text,
                         longest_context, token_stream, weight_of)

model, tokenizer = load_lm()
text = token_stream(tokenizer, load_text("calibration"))
name, layer = list(layers_of_role(model, "down").items())[:2][-1]  # of the second block, if any
weight = weight_of(layer).contiguous()
inputs = capture_inputs(model, text[:1024], [name])[name]

def int8(x):
    return quantize_tensor(x, bits=8, granularity=PerTensor()).dequantize()

for what, x in (("weight", weight), ("inputs", inputs)):
    spread, dead = x.abs().max() / x.abs().median(), ((int8(x) == 0) & (x != 0)).float().mean()
    print(f"{what} {tuple(x.shape)}: largest {spread:.0f} × median, {sqnr_db(x, int8(x)):.1f} dB, "
          f"{dead:.0%} became 0")
ahead = sqnr_db(weight, int8(weight)) - sqnr_db(inputs, int8(inputs))
found(ahead > 12, f"the weight is {ahead:.0f} dB ahead of the inputs, over twelve")
# %% [markdown]
# The weight is fine. The inputs have a few huge values that the grid must reach, so its step is too coarse for the
# rest: 43 % of them became 0. We want bits that a multiplier understands *and* steps that are fine where numbers are
# small.
#
# ## 2. By hand: eight bits
# **FP8 E4M3**: one sign bit, 4 bits of **exponent** (指数), 3 bits of **mantissa** (尾数). The exponent says
# which power of two the number lies at, the mantissa how far it is on the way to the next one:
#
# $$(-1)^{sign} \cdot \Big(1 + \frac{M}{8}\Big) \cdot 2^{E - 7}$$
#
# The 7 is the **bias** (偏置): it lets E be unsigned. The 1 is not stored, since it is the same for all.
# %%
sign, E, M = 0, 0b1001, 0b101  # the byte 0 1001 101
print((-1) ** sign * (1 + M / 8) * 2.0 ** (E - 7))
for E in (9, 10):
    print([(1 + M / 8) * 2.0 ** (E - 7) for M in range(8)])
# %% [markdown]
# E = 9 is the power 2² = 4, and M = 5 is five eighths of the way from 4 to 8. With the next exponent, E = 10,
# the steps have doubled. **Predict.** By this formula, what is the smallest positive number (E = 0, M = 0)? And
# where is 0?
#
# <details><summary>Answer</summary>
# 2⁻⁷, and there would be no 0 at all.</details>
#
# So E = 0 is an exception: no leading 1, and the exponent of E = 1, which is −6. These are the
# **subnormals** (次正规数), evenly spaced above 0. Here are 0, the seven subnormals, and the smallest normal number:
# %%
print(*(f"{M / 8 * 2**-6:.4f}" for M in range(8)), "then", f"{2**-6:.4f}")
# %% [markdown]
# The largest subnormal is one step below the smallest normal number: the gap between 0 and the normal numbers is
# filled. One exception more: in E4M3 *all* bits of E and M set, with either sign, is NaN (非数, not a number). All
# other codes are numbers; there is no infinity.
#
# ### Exercise 5.1: decode an FP8 number (about 5 minutes)
# From the three fields, as integers: `sign` 0 or 1, `exponent` 0 to 15, `mantissa` 0 to 7. Return the number
# that they stand for; `float("nan")` is NaN, and 0.0 will do for −0.0. (Below the check, the same cell compares the
# library's `decode` with torch, which has E4M3 as a dtype, on all 256 codes, and encodes 6.5.)
# %% tags=["exercise"]
def my_decode(sign, exponent, mantissa):
    raise NotImplementedError
# %%
check("5.1", my_decode)

from quantlab.floats import FP8_E4M3, decode, encode

codes = torch.arange(256, dtype=torch.uint8)
torchs = codes.view(torch.float8_e4m3fn).float()
torch.testing.assert_close(decode(codes, FP8_E4M3), torchs, rtol=0, atol=0, equal_nan=True)
f"{encode(torch.tensor(6.5), FP8_E4M3).item():08b}"
# %% [markdown]
# ## 3. A family of formats
# Exponent bits buy range (from the smallest number to the largest), mantissa bits precision (numbers in between).
# With e exponent bits the bias is 2ᵉ⁻¹ − 1: 7 in E4M3, 15 in FP16 and E5M2, 127 in BF16, 3 in E3M2, 1 in E2M3 and
# E2M1. **Predict:**
#
# 1. E5M2 moves one bit from the mantissa to the exponent. How much more range is that, and how many numbers are left
#    from 1 to below 2?
# 2. The picture below draws all numbers of a format, scaled to the same largest. Where are they dense?
# %%
from quantlab import BF16, FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E5M2, FP16

print("         bits     largest   smallest normal   subnormal   numbers from 1 to below 2")
for f in (FP16, BF16, FP8_E4M3, FP8_E5M2, FP6_E2M3, FP6_E3M2, FP4_E2M1):
    sizes = f"{f.largest:12.5g}{f.smallest_normal:18.3g}{f.smallest_subnormal:12.3g}"
    print(f"{f.name:9}{f.bits:4}{sizes}{2**f.mantissa_bits:14}")

import matplotlib.pyplot as plt

from quantlab.floats import values

formats = {"FP8 E4M3": FP8_E4M3, "FP6 E3M2": FP6_E3M2, "FP6 E2M3": FP6_E2M3, "FP4 E2M1": FP4_E2M1}
lines = {
    **{name: values(f) / f.largest for name, f in formats.items()},
    "INT4": torch.arange(-8, 8) / 8,
}
fig, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
ax.eventplot(list(lines.values()), linelengths=0.7, linewidths=0.8)
ax.set(yticks=range(5), yticklabels=lines, xlabel="number / largest magnitude of the format")
plt.show()
# %% [markdown]
# Above the subnormals a float's steps double with each power of two, so it is dense near 0; the more so, the more
# exponent bits it has (compare the two rows of FP6; where lines run together they are nearer than a pixel). E4M3
# goes from 2⁻⁹ to below 2⁹: 18 powers of two, or **octaves**. E5M2 goes from 2⁻¹⁶ to below 2¹⁶: 32 octaves, with 4
# numbers in each for E4M3's 8 (above the subnormals). FP16 goes from 2⁻²⁴ to below 2¹⁶: 40. BF16 has the range of
# float32, and fewer bits of mantissa than FP16. (FP16, BF16 and E5M2 keep their largest exponent for infinity and
# NaN; FP6 and FP4 have neither.)
#
# ### Myth: "FP16 has 11 bits of fraction", "n unsigned bits reach 2ⁿ⁻¹"
# Both stand in print. Count:
# %%
stored = ((values(FP16) >= 1) & (values(FP16) < 2)).sum().item()
assert stored == 2**10
stored, torch.tensor([2047.0, 2048.0, 2049.0]).half().tolist(), torch.iinfo(torch.uint8).max
# %% [markdown]
# 1024 = 2¹⁰ numbers from 1 to below 2: ten bits are *stored*. With the leading 1 eleven are *significant*:
# whole numbers are exact up to 2¹¹ = 2048, and 2049 has no code. And n unsigned bits count from 0 to 2ⁿ − 1: with
# eight, to 255.
#
# ## 4. Rounding to a format
# A float format is a grid whose step depends on x:
#
# $$step = 2^{\max(\lfloor\log_2|x|\rfloor,\ e_{min}) - mantissa\ bits}$$
# $$\hat x = step \cdot \mathrm{round}(x / step)$$
#
# $e_{min}$ = 1 − bias is the exponent of the subnormals. Above the largest number x̂ **saturates** (饱和).
#
# ### Exercise 5.2: round to a format (about 15 minutes)
# Write it for a tensor `x` of any shape. Ties go to the even mantissa, which `torch.round` does by itself;
# 0 stays 0, and what lies beyond ±`largest` becomes ±`largest`. x is finite. The check tries formats of all
# kinds.
# %% tags=["exercise"]
def my_round(x, mantissa_bits, emin, largest):
    raise NotImplementedError
# %%
check("5.2", my_round)
# %% [markdown]
# Two details that implementations get wrong.
#
# **Ties.** 1.0625 lies half-way between 1 and 1.125, and 1.1875 half-way between 1.125 and 1.25. 464 lies
# half-way between 448 and what would be 480, if that code were not NaN.
#
# **Too large.** The Open Compute Project (OCP), whose standard FP8 is, allows two answers: the largest number;
# or infinity, and NaN in E4M3, which has no infinity. Libraries differ; torch changed its E4M3 from NaN to
# saturation (pytorch #178817). **Predict** what the library's `round_to` prints: first with saturation,
# then without. (Up to 448 `round_to` must agree with torch's own casts. The cell checks that too, on a million
# float32 of random bits, less those beyond 448.)
# %%
from quantlab import round_to

x = torch.tensor([1.0625, 1.1875, 464.0, 465.0, 1e6])
for fmt in (FP8_E4M3, FP8_E5M2):
    print(fmt.name, *(round_to(x, fmt, saturate=saturate).tolist() for saturate in (True, False)))
bits = torch.randint(-(2**31), 2**31, (10**6,), generator=torch.Generator().manual_seed(0))
every = bits.to(torch.int32).view(torch.float32)
every = every[every.isfinite() & (every.abs() <= 448)]
casts = {
    FP16: torch.float16,
    BF16: torch.bfloat16,
    FP8_E4M3: torch.float8_e4m3fn,
    FP8_E5M2: torch.float8_e5m2,
}
assert all(
    torch.equal(round_to(every, fmt), every.to(dtype).float()) for fmt, dtype in casts.items()
)
# %% [markdown]
# Without saturation 464 still gives 448: a tie goes to the even mantissa, and 448 has M = 6. 465 is nearer to 480,
# which E4M3 does not have: NaN. In E5M2 the neighbours are 448 and 512, so 465 goes down to 448; only 10⁶ lies beyond
# its largest, 57344.
#
# ## 5. Relative against absolute error
# How does the *relative* error |x̂ − x|/|x| depend on |x|, for a float and for an integer grid? And how does
# it change from E4M3 to E5M2, which has one mantissa bit less?
# %%
from quantlab import predictions
from quantlab.predictions import predict

guess = predict("One mantissa bit less: a float's relative error grows ...",
                ["by half", "twofold", "fourfold"])
# %%
from quantlab.plots import CLIPPED, plot_curves

k = torch.arange(-11, 8)
uniform = torch.rand(len(k), 10_000, generator=torch.Generator().manual_seed(0))
x = torch.exp2(k[:, None] + uniform)  # a row for each octave, from 2ᵏ to 2ᵏ⁺¹
back = {"FP8 E4M3": round_to(x, FP8_E4M3), "FP8 E5M2": round_to(x, FP8_E5M2), "INT8": int8(x)}
error = {name: ((x_hat - x) / x).square().mean(1).sqrt() for name, x_hat in back.items()}
curves = {name: (k, e) for name, e in error.items()}
plt.figure(figsize=(7, 2.8), layout="constrained")
ax = plot_curves(curves, log="y", xlabel="k: x from 2ᵏ to 2ᵏ⁺¹",
                 ylabel="relative error\n(root of mean square)")
ax.set_xticks(range(-10, 8, 2))
plt.show()
normal, coarser = error["FP8 E4M3"][k >= FP8_E4M3.emin], error["FP8 E5M2"].mean()
assert normal.max() < 1.05 * normal.min()
octaves = error["INT8"][k >= 3]
growth = octaves[:-1] / octaves[1:]  # from one octave to the next below
assert (growth / 2 - 1).abs().max() < 0.1
print(f"E4M3 {normal.mean():.1%} where it is normal, E5M2 {coarser:.1%}; "
      f"INT8 grows {growth.mean():.2f} times with each octave downwards")
ratio = coarser / normal.mean()
guess.reveal("by half" if ratio < 1.75 else "twofold" if ratio < 3 else "fourfold")
# %% [markdown]
# A float keeps one relative error over all of its normal range; a mantissa bit less doubles it. The integer
# grid keeps one *absolute* error, so its relative error doubles with each octave downwards, until all becomes 0.
# At the top it is the better one. So which 8 bits win depends on how widely the data are spread.
#
# We make data: normal random values, each times 2 to a random power, which varies more from set to set. The
# **spread** of data is their largest magnitude over their median one, as in section 1. **Predict** the picture:
# decibels against spread, each format scaled to the largest value.
# %%
def scaled(x, fmt):
    """x in the format, after scaling its largest value to the format's largest."""
    scale = x.abs().max() / fmt.largest
    return round_to(x / scale, fmt) * scale

e4m3, e5m2 = (lambda x, f=f: scaled(x, f) for f in (FP8_E4M3, FP8_E5M2))
rounders = {"FP8 E4M3": e4m3, "FP8 E5M2": e5m2, "INT8": int8}
gauss, size = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
data = [gauss * torch.exp2(s * size) for s in (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3)]  # ever wider
spread = [(x.abs().max() / x.abs().median()).item() for x in data]
db = {name: [sqnr_db(x, f(x)) for x in data] for name, f in rounders.items()}
ahead = [a - b for a, b in zip(db["INT8"], db["FP8 E4M3"], strict=True)]
assert ahead[0] > 6  # INT8 leads on narrow data
assert ahead[-1] < -6  # and is far behind on wide data
meet = next(i for i, lead in enumerate(ahead) if lead < 0)
print(f"INT8 leads by {ahead[0]:.0f} dB at the left, is {-ahead[-1]:.0f} dB behind at the right;",
      f"the lines cross between a spread of {spread[meet - 1]:.0f} and {spread[meet]:.0f}")
curves = {name: (spread, decibels) for name, decibels in db.items()}
plt.figure(figsize=(7, 2.8), layout="constrained")
plot_curves(curves, log="x", xlabel="spread: largest / median magnitude",
            ylabel="signal to noise, dB")
plt.show()
# %% [markdown]
# On all of these data E4M3 gives about the same decibels; INT8 starts above it and ends below. Left of the crossing
# take INT8, right of it E4M3. So "FP8 is more accurate than INT8" and its opposite are both half true. (Section
# 1 printed the spread of the weight and of the inputs. Which format for which? The table at the end of section 6
# answers.)
#
# ### Myth: "casting to FP16 is quantization to FP16"
# Some texts use one word for both. Three ways: a cast to FP16, a cast to INT8, and INT8 with a scale. **Predict:**
# multiply x by 1000; in which of them do the decibels change?
# %% tags=["nbval-ignore-output"]
ways = {"FP16 cast": lambda x: x.half().float(), "INT8 cast": lambda x: x.round().clamp(-128, 127),
        "INT8 with a scale": int8}
noise = {name: [sqnr_db(x, f(x)) for x in (inputs, 1000 * inputs)] for name, f in ways.items()}
found(abs(noise["FP16 cast"][0] - noise["FP16 cast"][1]) < 1, "FP16 does not notice")
{name: f"{once:.0f} dB, × 1000: {again:.0f} dB" for name, (once, again) in noise.items()}
# %% [markdown]
# Only the decibels of the INT8 cast changed. Integers need a scale taken from the data, and to take it is to
# *quantize*. In a float each number's exponent is its own scale, as long as the number stays below the format's
# largest: so say *cast* for FP16 and BF16. FP8 and FP4 have so short a range that they usually get a scale too.
#
# ## 6. Drag it
# At the bottom: the worst relative error at each magnitude; dashed, that of 8-bit integers. **Predict
# first**, then drag:
#
# 1. One mantissa bit more: what becomes of the decibels, and of the output error?
# 2. From E4M3 take one exponent bit away: what share becomes 0? Then tick *scale to the largest*: what changes?
# 3. One exponent bit only: what grid is that?
# 4. Exponent and mantissa bits together 7, scaled: which split is best for *this* weight?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_float_format

explorer = explore_float_format(weight, inputs=inputs)
explorer
# %% [markdown]
# **What you saw.** With fewer exponent bits the smallest numbers of the format are larger, so small weights become
# subnormal and then 0, unless the scale makes the weights larger first. One exponent bit gives an evenly spaced grid:
# signed integers. And a mantissa bit more makes the error smaller, as long as next to nothing becomes 0. By how much?
# Here are six ways to split 7 bits, each with the decibels of the weight and of the inputs:
# %% tags=["nbval-ignore-output"]
from quantlab.explorers.floats import custom_format

splits = {f"E{e}M{7 - e}": custom_format(e, 7 - e) for e in range(1, 7)}
db = {name: [round(sqnr_db(x, scaled(x, f)), 1) for x in (weight, inputs)]
      for name, f in splits.items()}
best = [max(db, key=lambda name: db[name][i]) for i in (0, 1)]
found(best == ["E2M5", "E3M4"], f"{best[0]} is best for the weight, {best[1]} for the inputs")
fewer, more = ((inputs @ (scaled(weight, splits[name]) - weight).T).square().mean()
               for name in ("E4M3", "E3M4"))
found(3.5 < fewer / more < 4.5, f"E4M3 has {fewer / more:.1f} times E3M4's output error")
print(db, f"E4M3 has {fewer / more:.1f} times the output error of E3M4", sep="\n")
# %% [markdown]
# From E6M1 up to E3M4 a mantissa bit is worth 5 to 6 dB, on both; the last one leaves a quarter of the output error.
# Integers (E1M6) beat E4M3 on the narrow weight and lose to it on the wide inputs. E3M4 beats E4M3 on *both*:
# they do not need its range.
#
# ## 7. Blocks that share a scale
# FP4 E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. So blocks share a scale.
#
# - **MXFP4, MXFP8** (OCP Microscaling): 32 elements; the scale has 8 bits, *exponent only* (E8M0). For MXFP4 it is
#   the exponent of max|x|, less 2, since FP4's largest power of two is 2²; for MXFP8 with E4M3 less 8, since 448 lies
#   above 2⁸.
# - **NVFP4**: 16 elements of E2M1; their scale is max|block| / 6, rounded to E4M3. First a float32,
#   max|x| / (6 · 448), is divided out of the tensor, so that the scales fit E4M3.
#
# By hand:
# %%
block = torch.tensor([0.1, -0.2, 0.3, 0.75])
exponent = torch.floor(torch.log2(block.abs().max())) - 2
small = round_to(block / 2**exponent, FP4_E2M1)
print(exponent.item(), block / 2**exponent, small, small * 2**exponent, sep="\n")
# %% [markdown]
# 0.75 lies between 2⁻¹ and 2⁰, so the exponent is −1 − 2 = −3, and the block times 8 fits FP4.
#
# ### Exercise 5.3: an MXFP4 block (about 10 minutes)
# `block` is a row of numbers. Return `exponent, values`: the exponent of the scale, a whole number, and the values
# that come back, in the shape of the block. (`round_to` may be used.) Mind two blocks: all zeros, where any exponent
# will do, and one whose largest magnitude lies a hair below a power of two: there float32's `log2` rounds up, so the
# line in the cell above gives an exponent that is 1 too large.
#
# **Predict before you run the check**: its cell also prints the bits per value of MXFP4, MXFP8 and NVFP4.
# %% tags=["exercise"]
def my_mxfp4(block):
    raise NotImplementedError  # return exponent, values
# %%
check("5.3", my_mxfp4)

from quantlab import mx_quantize, nvfp4_quantize

q = mx_quantize(block, FP4_E2M1)
assert q.real_scales().item() == 2**exponent
assert torch.equal(q.dequantize(), small * 2**exponent)
quantized = mx_quantize(weight, FP4_E2M1), mx_quantize(weight, FP8_E4M3), nvfp4_quantize(weight)
[round(q.bits_per_element, 3) for q in quantized]
# %% [markdown]
# The bits are 4 + 8/32, 8 + 8/32, and 4 + 8/16 (the 32 bits for the whole tensor are too few to show).
#
# After scaling, the largest element of an MXFP4 block lies between 4 and 8, but FP4 ends at 6: **what lies
# above saturates**, and loses up to a quarter. NVFP4's scale is not a power of two, so it takes the largest
# element to about 6.
#
# **Predict** the order in decibels, on the weight and on the inputs, *at equal bits*. MXFP4 takes 4.25 bits; so do,
# nearly, two schemes of notebook 04: NF4 with double quantization in blocks of 32, and asymmetric INT4 in blocks of
# 128. NVFP4 takes 4.5; so do NF4 in blocks of 64 and, nearly, asymmetric INT4 in blocks of 72.
# %% tags=["nbval-ignore-output"]
from quantlab import PerGroup
from quantlab.codebook import nf4_levels, quantize_codebook

def int4(size):
    return lambda x: quantize_tensor(x, bits=4, granularity=PerGroup(size), symmetric=False)

def nf4(size, double):
    return lambda x: quantize_codebook(x, nf4_levels(), block_size=size, double_quant=double)

schemes = {"MXFP4": lambda x: mx_quantize(x, FP4_E2M1), "NF4 dq, 32": nf4(32, True),
           "INT4, 128": int4(128), "NVFP4": nvfp4_quantize, "NF4, 64": nf4(64, False),
           "INT4, 72": int4(72)}
bits = {name: f(weight).bits_per_element for name, f in schemes.items()}
db = {name: [sqnr_db(x, f(x).dequantize()) for x in (weight, inputs)]
      for name, f in schemes.items()}
for name, (of_weight, of_inputs) in db.items():
    print(f"{name:11}{bits[name]:.2f} bits  weight {of_weight:.1f} dB  inputs {of_inputs:.1f} dB")
on_weight, on_inputs = (sorted(db, key=lambda name: -db[name][i]) for i in (0, 1))
found(on_weight[0] == "NF4 dq, 32" and on_weight[4:] == ["INT4, 128", "MXFP4"],
      "the order of the weight")
found(db[on_weight[1]][0] - db[on_weight[3]][0] < 1, "the three at 4.5 bits are within a decibel")
found(on_inputs == ["NVFP4", "NF4 dq, 32", "NF4, 64", "INT4, 72", "MXFP4", "INT4, 128"],
      "the order of the inputs")
# %% [markdown]
# On the bundled model, at about 4.25 bits, asymmetric INT4 beats MXFP4 on the weight and loses to it on the inputs.
# NF4 beats both when its scales are quantized too, which pays for blocks of 32: on the weight it beats even the three
# at 4.5 bits, which are within a decibel of each other.
#
# On the inputs NVFP4, with the smallest blocks, leads, and NF4 in blocks of 32 is second: a small block keeps an
# outlier to itself. But MXFP4, with blocks of 32 too, is behind NF4 in blocks of 64 and INT4 in blocks of 72: its
# levels and its scale count as well.
#
# ## 8. The whole model
# One row for each format. The weights in the file are BF16 already. **Predict** the KL of the first row, and which
# loses less at 8 bits: one scale for each matrix (fp8 e4m3), or one for each block (mxfp8).
# %% tags=["nbval-ignore-output"]
from types import SimpleNamespace
from tqdm.auto import tqdm
from quantlab import ledger
from quantlab.lm import quantize_weights

def stored(values, nbytes):  # what quantize_weights asks for: the values, and the bytes they take
    return SimpleNamespace(dequantize=lambda: values, nbytes=nbytes)

recipes = {("bf16", 16, "-"): lambda w: stored(round_to(w, BF16), 2 * w.numel()),
           ("fp8 e4m3", 8, "tensor"): lambda w: stored(scaled(w, FP8_E4M3), w.numel() + 4),
           ("mxfp8", 8, "32"): lambda w: mx_quantize(w, FP8_E4M3),
           ("mxfp4", 4, "32"): schemes["MXFP4"], ("nvfp4", 4, "16"): nvfp4_quantize}
tokens, rows = token_stream(tokenizer, load_text("eval"))[: budget(model, 4096)], {}
for (method, b, group), recipe in tqdm(recipes.items(), leave=False):
    new, parts = quantize_weights(model, recipe)
    rows[method] = ledger.measure(
        model, new, tokens, method=method, bits=b, group=group, qtensors=parts)
    ledger.append(rows[method])
found(0 == rows["bf16"].kl < rows["fp8 e4m3"].kl < rows["mxfp8"].kl,
      "BF16 costs nothing; at 8 bits one scale for the matrix beats many")
part = rows["nvfp4"].kl / rows["mxfp4"].kl
print(f"NVFP4 has {part:.2f} of MXFP4's KL")
ledger.Table(list(rows.values()))
# %% [markdown]
# BF16 costs nothing, since nothing was rounded. At 4 bits NVFP4 has 0.64 of MXFP4's KL, for a quarter of a bit more:
# its blocks are half as long and its scales are finer. At 8 bits a scale for each block *loses* to one for the whole
# matrix. Could it be because E4M3 ends at 448, while the largest element of an MXFP8 block lies between 256 and 512
# after scaling, so that it can saturate too? That is an open question at the end.
#
# **The control that must fail.** Two candidates: E4M3 *without* any scale, the slip that made int8 worthless in
# notebook 00; and codes written with bias 7 but read with bias 8. **Predict**: which of them fails?
# %% tags=["nbval-ignore-output"]
from quantlab import FloatFormat
from quantlab.lm import divergence

bias_8 = FloatFormat("E4M3 with bias 8", exponent_bits=4, mantissa_bits=3, bias=8, specials="nan")
suspects = {"no scale": lambda w: stored(round_to(w, FP8_E4M3), w.numel()),
            "bias off by one": lambda w: stored(decode(encode(w, FP8_E4M3), bias_8), w.numel())}
kl = {name: divergence(model, quantize_weights(model, f)[0], tokens).kl
      for name, f in suspects.items()}
right, wrong = (f(weight).dequantize() for f in suspects.values())
assert torch.equal(2 * wrong, right)
zeros = (round_to(weight / 2**8, FP8_E4M3) == 0).float().mean()
found(kl["no scale"] < 1.3 * rows["fp8 e4m3"].kl, "leaving out the scale does no harm")
found(kl["bias off by one"] > 20 * rows["fp8 e4m3"].kl, "the wrong bias wrecks the model")
found(zeros > 0.9, "nearly all of the weight / 2⁸ becomes 0")
print({name: round(value, 4) for name, value in kl.items()},
      f"weight / 2⁸, no scale: {zeros:.1%} became 0")
# %% [markdown]
# The wrong bias halves every weight and wrecks the model. The missing scale does *no* harm: these weights happen to
# lie inside E4M3's range. That is a float's trap: of the same weight, 2⁸ times smaller, 98.7 % became 0, and no error
# was raised.
#
# ## 9. What training is, on two numbers
# Gradients come from training. Here it is, as small as it can be: a model says y = w₀ + w₁·x. It starts with
# w = (0, 0) and should learn three points.
#
# - The **loss** says in one number how wrong the model is: here the mean squared error.
# - The **gradient** says, for each weight, how fast the loss grows when that weight grows.
# - **backward** computes it, from the loss backwards.
# - A **step** moves each weight *against* its gradient, by the *learning rate* times it.
#
# **Predict.** The gradient of w₀ is −2, the learning rate 0.3. Where does a step take w₀?
# %%
px, py = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])  # three points: y = 1 + x

def loss_at(w):
    return (w[0] + w[1] * px - py).square().mean()

w = torch.zeros(2, requires_grad=True)  # torch notes all that is computed from it
loss = loss_at(w)
loss.backward()  # puts the gradient into w.grad
nudged = loss_at(torch.tensor([0.001, 0.0])) - loss  # the same by hand: w₀ a thousandth larger
assert abs(nudged / 0.001 - w.grad[0]) < 0.01
w_new = w.detach() - 0.3 * w.grad  # one step
gradient, then = ([round(v, 2) for v in pair.tolist()] for pair in (w.grad, w_new))
print(f"loss {loss:.3f}, gradient {gradient}; w₀ + 0.001 changes the loss by {nudged:.4f}; "
      f"after the step w = {then}")
# %% [markdown]
# Enlarge w₀ by a thousandth, and the loss falls by two thousandths: that is what a gradient of −2 says. So the step
# enlarges w₀, to 0.6. Now take eight such steps. An *optimizer* does them for us; `zero_grad` empties `w.grad`, to
# which `backward` would add.
# %%
w = torch.zeros(2, requires_grad=True)
optimizer, path = torch.optim.SGD([w], lr=0.3), [w.tolist()]
for _ in range(8):
    optimizer.zero_grad()
    loss_at(w).backward()
    optimizer.step()
    path.append(w.tolist())

from quantlab.plots import ERROR, QUANTIZED

a, b = torch.meshgrid(torch.linspace(-0.3, 1.7, 60), torch.linspace(-0.3, 1.7, 60), indexing="xy")
height = torch.stack([(a + b * x - y).square() for x, y in zip(px, py, strict=True)]).mean(0)
fig, ax = plt.subplots(figsize=(4, 3.2), layout="constrained")
ax.contour(a, b, height, levels=[0.02, 0.1, 0.3, 0.7, 1.2, 2], colors="0.65")
w0s, w1s = zip(*path, strict=True)  # all first numbers, all second numbers
ax.plot(w0s, w1s, "o-", color=QUANTIZED, markersize=4)
ax.plot(1, 1, "*", color=ERROR, markersize=12)
ax.set(xlabel="w₀", ylabel="w₁", title="rings: equal loss; star: the least", aspect="equal")
plt.show()
assert loss_at(w) < 0.01 * loss_at(torch.zeros(2))
f"after eight steps w = ({w[0]:.3f}, {w[1]:.3f}), loss {loss_at(w):.4f}"
# %% [markdown]
# Each step goes down the slope, and the steps shorten as it gets level. A language model is trained by the
# same lines of code. Its loss is the mean *surprise*: −log of the probability that it gave to the token that came.
# `SGD` is the plain step above; **Adam**, the usual optimizer, also divides each gradient by its own recent size.
#
# Backward goes through the model from the end: first to the gradient of the logits, then to that of each layer's
# output. From what arrives each layer computes the gradient of its weights. What becomes 0 on the way teaches
# nothing to the layers nearer to the input.
#
# ## 10. Numbers that small exist: gradients
# A number that is too small for a format becomes 0: **underflow** (下溢). Training in FP16 meets it in its *gradients*.
# We take 1024 tokens of real text. A hook rounds each gradient that flows backward into a layer's output.
# %%
def backward(model, ids, dtype=torch.float32, k=0):
    """Gradients of 2^k × loss, rounded: of the layers' outputs, and (over 2^k) of the weights."""
    flowing = []
    def on_its_way(_module, gradients):  # called in backward, when the output's gradient arrives
        flowing.append(gradients[0].to(dtype).float())
        return (flowing[-1],)  # what a backward hook returns takes the gradient's place
    modules = [*linear_layers(model).values(), model.get_output_embeddings()]
    hooks = [module.register_full_backward_pre_hook(on_its_way) for module in modules]
    model.zero_grad()
    # with labels the model also returns its loss, the mean surprise at each next token
    (2.0**k * model(ids, labels=ids, use_cache=False).loss).backward()
    for hook in hooks:
        hook.remove()
    return flowing, [p.grad.to(dtype).float() / 2.0**k for p in model.parameters()]

def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])
# %% tags=["nbval-ignore-output"]
length = min(512, longest_context(model), budget(model, 512, least=128))
ids = text[:2 * length].view(2, length)
flowing, of_weights = backward(model, ids)  # the first to flow are those of the logits
curves = {}
groups = {"logits": flowing[:1], "between layers": flowing[1:], "weights": of_weights}
for name, some in groups.items():
    g = flat(some)[flat(some) != 0]
    lost = (g.half() == 0).float().mean()
    found(lost > (0.8 if name == "logits" else 0.01),
          f"of the gradients of {name} {lost:.1%} become 0 in FP16")
    kept = g.bfloat16().count_nonzero() / len(g)
    found(kept > 0.9999, f"BF16 keeps {kept:.2%} of them")
    counts = torch.histc(g.abs().log2(), 55, -55, 0)
    curves[f"{name}: {lost:.1%} become 0 (BF16 {1 - kept:.3%})"] = range(-55, 0), counts / len(g)
plt.figure(figsize=(7, 2.8), layout="constrained")
shaded = "log₂ |gradient|   (shaded: below half of 2⁻²⁴, 0 in FP16)"
ax = plot_curves(curves, xlabel=shaded, ylabel="share")
ax.axvspan(-55, -25, color=CLIPPED, alpha=0.3)
plt.show()
# %% [markdown]
# In FP16 nine in ten gradients of the logits become 0, and one or two percent of the others; in BF16, fewer than one
# in ten thousand. Above all of them FP16 lies empty, up to 2¹⁶: it *has* the range, in the wrong place.
#
# Those were the smallest. But the loss is a *mean* over tokens. In a batch 2¹² times larger (four million tokens)
# each token counts 2¹² times less, every gradient that flows between layers is as much smaller, and more become 0.
#
# The cure is the **loss scale** (损失缩放): multiply the loss by 2ᵏ, so that all gradients grow, and divide the
# weights' by 2ᵏ at the end, in float32. A larger batch acts like a negative k: k = 0 is our batch as it is, and
# k = −12 our tokens as a piece of the large one.
#
# **Predict** the error of the weights' gradients against k. Does it get worse again? In BF16?
# %% tags=["nbval-ignore-output"]
import math

exact = flat(of_weights)

def harm(dtype, k):
    """The relative error of all the weights' gradients together."""
    return ((flat(backward(model, ids, dtype, k)[1]) - exact).norm() / exact.norm()).item()

fp16 = {k: harm(torch.float16, k) for k in tqdm(range(-12, 24, 3), leave=False)}
bf16 = {k: harm(torch.bfloat16, k) for k in (-12, 21)}
best = fp16[12]
found(fp16[-12] > 0.9 and 0.02 > fp16[0] > 5 * best, "a larger batch needs a larger k")
found(max(fp16[k] for k in (6, 9, 15, 18)) < 1.5 * best, "from k = 6 to 18 the error is level")
found(not math.isfinite(fp16[21]), "at k = 21 the largest gradient is infinite")
assert math.isclose(bf16[-12], bf16[21], rel_tol=0.01)  # powers of two shift nothing in BF16
curves = {"FP16": (list(fp16), list(fp16.values())), "BF16": (list(bf16), list(bf16.values()))}
plt.figure(figsize=(7, 2.8), layout="constrained")
ax = plot_curves(curves, log="y", xlabel="k: loss × 2ᵏ", ylabel="relative error of the gradients")
ax.axvspan(20.5, 22, color=CLIPPED, alpha=0.3)
ax.text(20, 0.6, "FP16: infinity", ha="right")
print(f"FP16 at k = −12: {fp16[-12]:.0%}, k = 0: {fp16[0]:.1%}, k = 12: {best:.3%}; "
      f"BF16 {bf16[-12]:.2%}, {bf16[-12] / best:.1f} times FP16's at k = 12")
# %% [markdown]
# On *this* batch FP16 needs no help: 0.5 % error, although nine in ten gradients of the logits became 0; they were
# the smallest. As a piece of the large batch (k = −12) the error is 97 % of the gradients: next to nothing of them is
# left. From k = 6 to 18 only rounding is left, to 11 significant bits. At k = 21 the largest gradient is infinite,
# and the step worthless. **BF16 needs no k**: it has float32's range; but with 8 significant bits its error is 8.5
# times that of a well-scaled FP16.
#
# ### Exercise 5.4: the largest loss scale (about 5 minutes)
# From a tensor of gradients, of any shape and not all 0, return the largest whole k (it may be negative) such
# that no number of `2**k * grads` is larger than 65504, in magnitude.
# (The cell of the check then does so for the real gradients: the edge of infinity.)
# %% tags=["exercise"]
def my_loss_scale(grads):
    raise NotImplementedError
# %% tags=["nbval-ignore-output"]
check("5.4", my_loss_scale)

largest = flat([*flowing, *of_weights]).abs().max().item()
edge = math.floor(math.log2(FP16.largest / largest))
# one short of it, since rounding on the way may add a little
assert math.isfinite(harm(torch.float16, edge - 1))
assert not math.isfinite(harm(torch.float16, edge + 2))
f"largest gradient 2^{math.log2(largest):.1f}, so k = {edge} is the last, or its neighbour"
# %% [markdown]
# Nobody knows that edge before the step, and it moves. So trainers use a *dynamic* loss scale: start high;
# when a gradient comes out infinite, skip the step and halve; after a long run of good steps (2,000 is torch's
# default), double.
#
# ### Does it train?
# Twelve steps of Adam on calibration text, a window each, each as a piece of a batch 2¹² times larger: k = −12.
# Four runs: float32; FP16 as it is; FP16 with a loss scale of 2¹⁶, so k = 4; and BF16. We round the gradients
# only. Weights, activations and Adam's own numbers stay in float32, where real mixed-precision training rounds
# the activations too.
# %%
import copy

from quantlab.lm import perplexity

def train(dtype, k):
    steps = budget(model, 12, least=4)
    new = copy.deepcopy(model)
    optimizer = torch.optim.Adam(new.parameters(), lr=3e-4)
    for piece in text[: length * steps].view(steps, 1, length):
        _, gradients = backward(new, piece, dtype, k)
        for p, gradient in zip(new.parameters(), gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    return perplexity(new, tokens[:budget(model, 2048)]).value

guess = predict("FP16 without a loss scale: how good is the model after twelve steps?",
                ["like float32", "as before training", "worse than before"])
# %% tags=["nbval-ignore-output"]
settings = {"float32": (torch.float32, 0), "FP16": (torch.float16, -12),
            "FP16, loss × 2¹⁶": (torch.float16, 4), "BF16": (torch.bfloat16, -12)}
after = {name: train(*setting) for name, setting in tqdm(settings.items(), leave=False)}
before = perplexity(model, tokens[:budget(model, 2048)]).value
gain = {name: before - value for name, value in after.items()}
found(gain["FP16"] < 0.3 * gain["float32"],
      "without a loss scale FP16 gains next to nothing, or loses")
close = [gain[name] / gain["float32"] for name in ("FP16, loss × 2¹⁶", "BF16")]
found(all(abs(ratio - 1) < 0.1 for ratio in close),
      "with it FP16 ends where float32 does, and BF16 without")
print(f"before {before:.1f}; after", {name: round(value, 1) for name, value in after.items()})
change = after["FP16"] / before
guess.reveal("worse than before" if change > 1.03 else "as before training" if change > 0.97
             else "like float32")
# %% [markdown]
# Without the loss scale the model ends worse than it began, 43.5 against 38.4. (A likely reason: Adam divides each
# gradient by its own recent size, so wrong gradients make steps as long as right ones.) With it FP16 ends where
# float32 does, and so does BF16 without one. That speaks for BF16 in training, where the hardware has it.
#
# ## 11. Exercises
# ### Exercise 5.5: better exponents (about 30 minutes)
# OCP's rule for the scale (section 7) is not the best one: sometimes the next exponent gives a block less error.
# `blocks` is (blocks, 32), none all 0; return an exponent for each block, whole numbers, shape (blocks,). Target: the
# total squared error of MXFP4 when each block has the better of two exponents, the rule's and the next; yours may be
# larger by 1/200. (The check prints your error over the rule's.)
# %% tags=["exercise"]
def my_exponents(blocks):
    raise NotImplementedError
# %%
check("5.5", my_exponents)
# %% [markdown]
# ### Open
# 1. With your exponents from 5.5 in all layers, does the KL of MXFP4 reach NVFP4's?
# 2. MXFP8: which share of the scaled elements lies above 448? What do all exponents + 1 give, and why is nothing
#    lost at the other end?
# 3. FP4 has 16 codes and 15 numbers, since −0 = 0. Were that code +5 instead: how many decibels, in blocks of 32? And
#    what does hardware gain from a bit that *is* the sign?
#
# ## 12. What breaks next
# We now have six ways to store a weight in about 4.25 or 4.5 bits, and have judged them by the decibels of one
# matrix. What does the whole model say, with all its linear layers in each format? (The last line says how often you
# were right in this notebook.)
# %% tags=["nbval-ignore-output"]
measured = {"MXFP4": rows["mxfp4"], "NVFP4": rows["nvfp4"]}  # in section 8
verdicts = {name: (row.kl, row.kl_error) for name, row in measured.items()}
for name in schemes.keys() - measured.keys():
    d = divergence(model, quantize_weights(model, schemes[name])[0], tokens)
    verdicts[name] = d.kl, d.stderr
for name in sorted(verdicts, key=lambda name: -db[name][0]):
    kl, error = verdicts[name]
    print(f"{name:11}{bits[name]:.2f} bits  weight {db[name][0]:.1f} dB  KL {kl:.4f} ± {error:.4f}")
near = [verdicts[name][0] for name in ("NF4, 64", "INT4, 72", "NVFP4")]
found(max(near) < 1.2 * min(near), "the three at 4.5 bits are within a fifth of each other in KL")
found(max(near) < verdicts["MXFP4"][0], "MXFP4 is further away than any of them")
predictions.score()
# %% [markdown]
# Do decibels and KL put the formats in the same order? Is a difference of a few thousandths in KL real, or the
# luck of this text?
#
# ### Recap
# - A float is sign, exponent, mantissa; its step grows with the number, so above the subnormals its *relative* error
#   is about constant.
# - Integers win on narrow data, floats on wide data; E4M3 gives about the same decibels for both.
# - Subnormals close the hole at 0; too large means saturation or infinity, and libraries differ.
# - MXFP4 is 4.25 bits, NVFP4 4.5; small blocks help most where there are outliers.
# - FP16 gradients underflow in large batches; a loss scale moves them into range. BF16 needs none.
# - To train: loss, backward, step. A step goes against the gradient.
#
# Next: [06 Measuring a language model](06_measuring_a_language_model.ipynb).
