# %% [markdown]
# # 05 Floating-point formats
# *60 minutes, of which the computer needs about one and a half. You need notebooks 01, 03 and 04.*
#
# 浮点格式. The bits of a float say what it is worth, without a table. At the end of this notebook you can
#
# - read and write an FP8 number by hand, and round any tensor to any such format, as the hardware does;
# - say when 8 bits should be a float and when an integer, before you measure it;
# - build the block formats MXFP4, MXFP8 and NVFP4 from their bits, and count what they really cost;
# - say why training in FP16 needs a loss scale, and find a good one for a real model.
# %% [markdown]
# ### Recall
# Answer before you open them.
#
# 1. NF4 has 16 codes. How many of its levels are negative, and how many positive?
# 2. What does one float32 scale for each block of 64 weights cost, in bits per weight?
# 3. A weight has a code of 4 bits. What else must be at hand to turn it into a number, in INT4 and in NF4?
#
# <details><summary>Answers</summary>
# 1. Seven and eight, and an exact 0. 2. Half a bit: 32/64. 3. The scale of its block; in NF4 also the table
#    of levels.</details>
# %% [markdown]
# ## 1. What broke
# A codebook is an *arbitrary* list. To multiply two weights, every multiplier on the chip would have to
# look both of them up.
# %%
import torch

from quantlab.codebook import nf4_levels

table = nf4_levels()
codes = [3, 4, 12]
[round(v, 3) for v in table[codes].tolist()], round((table[3] * table[12]).item(), 3)
# %% [markdown]
# Nothing in the codes 3 and 12 says what the product is. Integers are the other extreme: their bits mean
# something, and multipliers for them are cheap. But here is what a layer of the model *reads*, in 8-bit
# integers with one scale, beside what a layer holds:
# %% tags=["nbval-ignore-output"]
from quantlab import PerTensor, quantize_tensor, sqnr_db
from quantlab.lm import capture_inputs, linear_layers, load_lm, load_text, token_stream, weight_of

model, tokenizer = load_lm()
layers = linear_layers(model)
text = token_stream(tokenizer, load_text("calibration"))
wide = [name for name in layers if name.endswith("down_proj")][1]
inputs = capture_inputs(model, text[:1024], [wide])[wide]
weight = weight_of(layers[wide])

def int8(x):
    return quantize_tensor(x, bits=8, granularity=PerTensor()).dequantize()

assert sqnr_db(weight, int8(weight)) > 12 + sqnr_db(inputs, int8(inputs))
for name, x in (("weight", weight), ("inputs", inputs)):
    print(f"{name}: largest {x.abs().max() / x.abs().median():.0f} × median, {sqnr_db(x, int8(x)):.1f} dB, "
          f"{((int8(x) == 0) & (x != 0)).float().mean():.0%} became 0")
# %% [markdown]
# The weight is fine. The inputs have a few huge values; the step must reach them and is too coarse for all
# others. We want bits that a multiplier understands *and* steps that are fine where numbers are small.
#
# ## 2. By hand: eight bits
# **FP8 E4M3**: one sign bit, 4 bits of **exponent** (指数), 3 bits of **mantissa** (尾数). The exponent says
# which power of two the number lies at, the mantissa how far it is on the way to the next one:
#
# $$(-1)^{sign} \cdot \Big(1 + \frac{M}{8}\Big) \cdot 2^{E - 7}$$
#
# The 7 is the **bias** (偏置): it lets E be unsigned. The 1 is not stored, since it is always there.
# %%
sign, exponent, mantissa = (int(field, 2) for field in "0 1001 101".split())
(-1) ** sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
# %% [markdown]
# E = 9 is the power 2² = 4, and M = 5 is five eighths of the way from 4 to 8. All eight numbers with this
# exponent, and the eight with the next:
# %%
[[(1 + m / 8) * 2.0 ** (e - 7) for m in range(8)] for e in (9, 10)]
# %% [markdown]
# The steps have doubled. **Predict.** By this formula, what is the smallest positive number (E = 0, M = 0)?
# And where is 0?
#
# <details><summary>Answer</summary>
# 2⁻⁷, and there would be no 0 at all.</details>
#
# So E = 0 is an exception: no leading 1, and the exponent of E = 1, which is −6. These are the
# **subnormals** (次正规数), evenly spaced down to 0:
# %%
[m / 8 * 2.0**-6 for m in range(8)], 2.0**-6
# %% [markdown]
# The last of them is one step below 2⁻⁶, the smallest normal number, so there is no hole. One exception
# more: in E4M3 the code with *all* bits of E and M set is NaN (非数). All others are numbers; there is no
# infinity.
#
# ### Exercise 5.1: decode an FP8 number (about 10 minutes)
# From the three fields, as integers. `float("nan")` is NaN.
# %% tags=["exercise"]
def my_decode(sign, exponent, mantissa):
    raise NotImplementedError
# %%
from quantlab.checks import check, hint, solution

check("5.1", my_decode)
# %% [markdown]
# The library has `decode` and `encode`, for any format. On all 256 codes it must agree with torch, which
# has E4M3 as a dtype:
# %%
from quantlab import FP8_E4M3
from quantlab.floats import decode, encode

codes = torch.arange(256, dtype=torch.uint8)
mine, torchs = decode(codes, FP8_E4M3), codes.view(torch.float8_e4m3fn).float()
assert torch.equal(mine.nan_to_num(-1), torchs.nan_to_num(-1))
f"{encode(torch.tensor([6.5]), FP8_E4M3).item():08b}", mine.isnan().sum().item()
# %% [markdown]
# ## 3. A family of formats
# Exponent bits buy range, mantissa bits buy precision. **Predict.** E5M2 moves one bit from the mantissa to
# the exponent. How much more range is that, and how many numbers are left between 1 and 2?
# %%
from quantlab import BF16, FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E5M2, FP16

family = [FP16, BF16, FP8_E4M3, FP8_E5M2, FP6_E2M3, FP6_E3M2, FP4_E2M1]
print(f"{'':9}bits     largest   smallest normal   subnormal   numbers from 1 to below 2")
for f in family:
    print(f"{f.name:9}{f.bits:4}{f.largest:12.5g}{f.smallest_normal:18.3g}{f.smallest_subnormal:12.3g}"
          f"{2**f.mantissa_bits:14}")
# %% [markdown]
# In powers of two: E4M3 goes from 2⁻⁹ to below 2⁹, E5M2 from 2⁻¹⁶ to below 2¹⁶, FP16 from 2⁻²⁴ to below
# 2¹⁶. BF16 has the range of float32 and fewer bits of mantissa than FP16. (FP16, BF16 and E5M2 keep their
# largest exponent for infinity and NaN; the formats of 6 and 4 bits have neither.)
#
# All numbers of some of them, scaled to the same largest. **Predict**: where are they dense?
# %%
import matplotlib.pyplot as plt

from quantlab.floats import values
from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED

fig, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
rows = {"INT4": torch.arange(-8.0, 8), **{f.name: values(f) for f in (FP4_E2M1, FP6_E2M3, FP6_E3M2, FP8_E4M3)}}
for i, points in enumerate(rows.values()):
    ax.vlines(points / points.abs().max(), i - 0.35, i + 0.35, color=QUANTIZED if i else FLOAT, linewidth=0.8)
ax.set(yticks=range(5), yticklabels=rows, xlabel="number / largest number of the format")
ax.invert_yaxis()
plt.show()
# %% [markdown]
# An integer grid has equal steps. A float's steps double with each power of two, so that near 0 it is
# dense. More exponent bits put more of the numbers near 0: compare the two rows of FP6.
#
# ### Myth: "FP16 has 11 bits of fraction", "n unsigned bits reach 2ⁿ⁻¹"
# Both stand in print. Count:
# %%
half = values(FP16)
stored = ((half >= 1) & (half < 2)).sum().item()
assert stored == 2**10
whole = torch.tensor([2047.0, 2048.0, 2049.0, 2050.0]).half().tolist()
assert torch.iinfo(torch.uint8).max == 2**8 - 1
stored, whole
# %% [markdown]
# 1024 = 2¹⁰ numbers from 1 to below 2: ten bits are *stored*. With the leading 1 eleven are *significant*:
# whole numbers are exact up to 2¹¹ = 2048, and 2049 has no code. And n unsigned bits count from 0 to 2ⁿ −
# 1.
#
# ## 4. Rounding to a format
# Between 2ᵉ and 2ᵉ⁺¹ the step is 2^(e − mantissa bits): a grid whose step depends on x.
#
# $$step = 2^{\max(\lfloor\log_2|x|\rfloor,\ e_{min}) - mantissa\ bits}$$
# $$\hat x = step \cdot \mathrm{round}(x / step)$$
#
# with $e_{min}$ = 1 − bias. Above the largest number it **saturates** (饱和).
#
# ### Exercise 5.2: round to a format (about 15 minutes)
# Write it for a tensor. Ties go to the even mantissa, which `torch.round` does by itself.
# %% tags=["exercise"]
def my_round(x, mantissa_bits, emin, largest):
    raise NotImplementedError
# %%
check("5.2", my_round)
# %% [markdown]
# The library calls it `round_to`. It must agree with torch's casts on every number of 16 bits up to 448
# (what happens above, we shall see):
# %%
from quantlab import round_to

every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
every = every[every.isfinite() & (every.abs() <= 448)]
casts = {FP16: torch.float16, BF16: torch.bfloat16, FP8_E4M3: torch.float8_e4m3fn, FP8_E5M2: torch.float8_e5m2}
for fmt, dtype in casts.items():
    assert torch.equal(round_to(every, fmt), every.to(dtype).float())
len(every)
# %% [markdown]
# ### Three details that implementations get wrong
# **Ties.** 1.0625 lies half-way between 1 and 1.125, and 1.1875 half-way between 1.125 and 1.25.
#
# **Too large.** OCP, who wrote the standard, allow two answers: the largest number, or (without saturation)
# infinity, and NaN in E4M3, which has no infinity. Libraries differ; torch itself changed E4M3 from NaN to
# saturation (pytorch #178817), and its E5M2 still becomes infinite. **Predict** each output below.
# %%
x = torch.tensor([1.0625, 1.1875, 464.0, 465.0, 1e6])
for fmt in (FP8_E4M3, FP8_E5M2):
    print(fmt.name, *(round_to(x, fmt, saturate=saturate).tolist() for saturate in (True, False)))
# %% [markdown]
# **Rounding twice.** A float64 just above a tie. torch takes it to float32 first, where the hair is lost; what
# is left is a tie, and goes down. Ours rounds once.
# %%
x = torch.tensor([1.0625 + 2**-40], dtype=torch.float64)
once, twice = round_to(x, FP8_E4M3).item(), round_to(x.float(), FP8_E4M3).item()
assert x.to(torch.float8_e4m3fn).double().item() == twice
once, twice
# %% [markdown]
# ### Why keep −0?
# FP4 has 16 codes and 15 numbers: +0 and −0 are equal. Readers ask why so small a format keeps both. With a
# table one could spend the code on one more number. **Predict**: is that worth much? We try +5, in blocks
# of 32 with a power of two as their scale (section 8).
# %% tags=["nbval-ignore-output"]
from quantlab import mx_quantize
from quantlab.codebook import nearest_level

scale = mx_quantize(weight, FP4_E2M1).real_scales().repeat_interleave(32, dim=-1).float()
gains = {}
for extra in (5.0, 0.25):
    levels = torch.cat([values(FP4_E2M1), torch.tensor([extra])]).sort().values
    richer = levels[nearest_level(weight / scale, levels).long()] * scale
    gains[extra] = sqnr_db(weight, richer) - sqnr_db(weight, mx_quantize(weight, FP4_E2M1).dequantize())
assert gains[5.0] > 0.2
assert gains[0.25] > 0
{f"−0 spent on +{extra}": f"{gain:+.2f} dB" for extra, gain in gains.items()}
# %% [markdown]
# So −0 has a price, about half a decibel here. What it buys is a bit that *is* the sign: the sign of a
# product is the XOR of two bits and −x flips one, with no exception to test for. NF4, a table anyway,
# spends the code on a number: that is its eighth positive level.
#
# ## 5. Relative against absolute error
# **Predict.** How does the *relative* error |x̂ − x|/|x| depend on |x|, for a float and for an integer grid?
# %%
x = torch.exp2(torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 20 - 11)  # to below 2⁹
x = x[x <= 448]
octave = x.log2().floor().int() + 11
def by_octave(back):
    relative = ((back - x) / x).square()
    return torch.stack([relative[octave == i].mean().sqrt() for i in range(20)])

rounded = {"E4M3": round_to(x, FP8_E4M3), "E5M2": round_to(x, FP8_E5M2), "INT8": int8(x)}
curves = {label: by_octave(back) for label, back in rounded.items()}
middle = {label: curve[6:] for label, curve in curves.items()}  # from 2⁻⁵ up, where E4M3 is normal
assert middle["E4M3"].max() / middle["E4M3"].min() < 1.2 < 100 < curves["INT8"].max() / curves["INT8"].min()
{label: f"{curve.min():.1%} to {curve.max():.1%}" for label, curve in middle.items()}
# %%
fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
for (label, curve), color in zip(curves.items(), (QUANTIZED, OTHER, ERROR), strict=True):
    ax.plot(range(-11, 9), curve, "o-", markersize=3, color=color, label=label)
ax.set(yscale="log", xlabel="octave of x: from 2ᵏ to 2ᵏ⁺¹", ylabel="relative error (rms)", xticks=range(-10, 9, 2))
ax.legend()
plt.show()
# %% [markdown]
# A float keeps one relative error over all of its normal range (E4M3 about 2.6 %, twice that with a
# mantissa bit less). The integer grid keeps one *absolute* error, so its relative error doubles with each
# octave downwards, until nothing is left. At the top it is the better one. So which 8 bits win depends on
# how widely the data are spread. **Predict** the picture: decibels against spread.
# %%
random = torch.Generator().manual_seed(0)
normal, size = torch.randn(2, 100_000, generator=random)
def scaled(x, fmt):
    """x in the format, after scaling its largest value to the format's largest."""
    scale = x.abs().max() / fmt.largest
    return round_to(x / scale, fmt) * scale

spreads = [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3]
data = [normal * torch.exp2(s * size) for s in spreads]
decibels = {"INT8": [sqnr_db(x, int8(x)) for x in data],
            "FP8 E4M3": [sqnr_db(x, scaled(x, FP8_E4M3)) for x in data],
            "FP8 E5M2": [sqnr_db(x, scaled(x, FP8_E5M2)) for x in data]}
ratios = [(x.abs().max() / x.abs().median()).item() for x in data]
ahead = torch.tensor(decibels["INT8"]) - torch.tensor(decibels["FP8 E4M3"])
assert ahead[0] > 6 > -6 > ahead.min()
f"INT8 over E4M3: {ahead[0]:+.0f} dB without spread, {ahead.min():+.0f} dB at worst"
# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
for (label, line), color in zip(decibels.items(), (ERROR, QUANTIZED, OTHER), strict=True):
    ax.plot(ratios, line, "o-", color=color, label=label)
for label, x in (("a weight", weight), ("inputs", inputs)):
    at = (x.abs().max() / x.abs().median()).item()
    ax.plot([at] * 2, [sqnr_db(x, int8(x)), sqnr_db(x, scaled(x, FP8_E4M3))], "*", color="black", markersize=9)
    ax.annotate(label, (at, sqnr_db(x, int8(x))), (8, -3), textcoords="offset points")
ax.set(xscale="log", xlabel="spread: largest / median magnitude", ylabel="signal to noise, dB")
ax.legend()
plt.show()
assert sqnr_db(inputs, scaled(inputs, FP8_E4M3)) > 5 + sqnr_db(inputs, int8(inputs))
assert sqnr_db(weight, scaled(weight, FP8_E4M3)) < sqnr_db(weight, int8(weight)) - 4
# %% [markdown]
# E4M3 gives the same decibels whatever the data; INT8 falls from 8 dB above it to 12 dB below. The stars
# are the model's two tensors from section 1, in INT8 and in E4M3: the weight wants the integer, the inputs
# want the float. "FP8 is more accurate than INT8" and its opposite are both half true.
#
# ### Myth: "casting to FP16 is quantization to FP16"
# Some texts use one word for both. Multiply x by 1000 and look at what each needs to know.
# %% tags=["nbval-ignore-output"]
def relative(x, back):
    return ((back - x).square().mean() / x.square().mean()).sqrt().item()

for factor in (1, 1000):
    x = inputs * factor
    cast, codes = x.half().float(), x.round().clamp(-128, 127)
    print(f"× {factor}: FP16 cast {relative(x, cast):.5f}, INT8 cast {relative(x, codes):.3f}, "
          f"INT8 quantized {relative(x, int8(x)):.3f}")
once, again = (relative(x, x.half().float()) for x in (inputs, inputs * 1000))
assert abs(once / again - 1) < 0.1
# %% [markdown]
# A **cast** needs no scale and no zero point: the exponent of each number is its own scale. Quantizing to
# integers must choose both, from data. FP8 and FP4 stand between: their range is so short that they usually
# get a scale too. Say *cast* for FP16 and BF16.
#
# ## 6. Subnormals: switch them off
# Some hardware flushes subnormals to zero, because they need extra circuits. What dies? **Predict** for the
# weight in E4M3, without a scale.
# %% tags=["nbval-ignore-output"]
def flushed(x, fmt):
    back = round_to(x, fmt)
    return torch.where(back.abs() < fmt.smallest_normal, 0.0, back)

x = torch.linspace(-0.03, 0.03, 2001)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4), layout="constrained", sharey=True)
found = {"with subnormals": round_to, "flushed to zero": flushed}
for ax, (title, rounder) in zip(axes, found.items(), strict=True):
    ax.plot(x, rounder(x, FP8_E4M3), color=QUANTIZED)
    ax.set(title=f"{title}: {sqnr_db(weight, rounder(weight, FP8_E4M3)):.1f} dB", xlabel="x", ylabel="x̂ in E4M3")
plt.show()
share = (weight.abs() < FP8_E4M3.smallest_normal).float().mean()
assert sqnr_db(weight, round_to(weight, FP8_E4M3)) > 1 + sqnr_db(weight, flushed(weight, FP8_E4M3))
f"{share:.0%} of the weights lie below the smallest normal number"
# %% [markdown]
# Without subnormals there is a hole around 0, eight times as wide as the steps beside it.
#
# ## 7. Drag it
# Above: the numbers of the format on a linear axis; middle: on a logarithmic one, over the magnitudes of
# the weights; below: the worst relative error at each magnitude, and that of 8-bit integers (dashed).
#
# **Predict first**, then drag:
# 1. One mantissa bit more: what happens to the decibels, and to the output error?
# 2. From E4M3, one exponent bit less, without a scale. And with *scale to the largest*?
# 3. One exponent bit only: what grid is that?
# 4. Of all formats of 8 bits (exponent + mantissa = 7), scaled: which is best for *this* weight?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_float_format

explorer = explore_float_format(weight, inputs=inputs)
explorer
# %% [markdown]
# **What you saw.** A mantissa bit is worth 6 dB while nothing dies. With fewer exponent bits the numbers end
# sooner below, and the weights become subnormal and then 0, unless the scale pulls them up. One exponent
# bit is an evenly spaced grid: signed integers. All ways to split 7 bits, in figures:
# %% tags=["nbval-ignore-output"]
from quantlab.explorers.floats import custom_format

splits = {f"E{e}M{7 - e}": custom_format(e, 7 - e) for e in range(1, 7)}
best = {}
for label, x in (("weight", weight), ("inputs", inputs)):
    row = {name: sqnr_db(x, scaled(x, fmt)) for name, fmt in splits.items()}
    best[label] = max(row, key=row.get)
    print(f"{label}: " + "  ".join(f"{name} {d:.1f} dB" for name, d in row.items()))
assert int(best["weight"][1]) < int(best["inputs"][1])
# %% [markdown]
# The narrow weight wants few exponent bits, the wide inputs more. E4M3 and E5M2 are best for neither:
# hardware must serve every tensor, gradients included.
#
# ## 8. Blocks that share a scale
# With 4 bits there is no room for range: FP4 E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. So
# blocks of neighbours share a scale (notebook 03).
#
# - **MXFP4, MXFP8** (OCP Microscaling): 32 elements, and 8 bits of scale that are an *exponent only* (E8M0),
#   so that scaling is exact and needs no multiplier.
# - **NVFP4**: 16 elements of E2M1, with a scale in E4M3; one float32 for the whole tensor keeps these scales
#   in E4M3's range.
#
# **Predict** the bits per value of each.
# %%
{"MXFP4": (32 * 4 + 8) / 32, "MXFP8": (32 * 8 + 8) / 32, "NVFP4": (16 * 4 + 8) / 16}
# %% [markdown]
# How is the exponent chosen? By OCP: $\lfloor\log_2 \max|x|\rfloor - 2$, where 2 is the exponent of 4, the
# largest power of two in FP4. By hand, for a block of four:
# %%
x = torch.tensor([0.1, -0.2, 0.3, 0.75])
exponent = torch.floor(torch.log2(x.abs().max())) - 2
small = round_to(x / 2**exponent, FP4_E2M1)
exponent.item(), [round(v, 2) for v in (x / 2**exponent).tolist()], small.tolist(), (small * 2**exponent).tolist()
# %% [markdown]
# ### Exercise 5.3: an MXFP4 block (about 10 minutes)
# Return the exponent of the scale, and the values that come back. Mind two blocks: all zeros, and one whose
# largest value lies a hair below a power of two.
# %% tags=["exercise"]
def my_mxfp4(block):
    raise NotImplementedError  # return exponent, values
# %%
check("5.3", my_mxfp4)
# %%
from quantlab import nvfp4_quantize

q = mx_quantize(x, FP4_E2M1)
assert q.real_scales().item() == 2**exponent
assert torch.equal(q.dequantize(), small * 2**exponent)
assert mx_quantize(weight, FP4_E2M1).bits_per_element == 4.25
f"{nvfp4_quantize(weight).bits_per_element:.4f} bits: 4.5, and 32 bits for {weight.numel():,} weights"
# %% [markdown]
# After scaling, the largest element lies between 4 and 8, but FP4 ends at 6: **what lies above saturates**,
# and loses up to a quarter. NVFP4's scale is not a power of two, so it takes the largest element to 6, or
# nearly.
#
# **Predict** the order in decibels, on the weight and on the inputs, *at equal bits*: MXFP4, NVFP4, and from
# notebook 04 NF4 and asymmetric INT4.
# %%
from quantlab import PerGroup
from quantlab.codebook import quantize_codebook

def int4(x, size):
    return quantize_tensor(x, bits=4, granularity=PerGroup(size), symmetric=False)

def nf4(x, size):
    return quantize_codebook(x, nf4_levels(), block_size=size)

schemes = {"MXFP4, 32": lambda x: mx_quantize(x, FP4_E2M1), "INT4, 128": lambda x: int4(x, 128),
           "NVFP4, 16": nvfp4_quantize, "NF4, 64": lambda x: nf4(x, 64), "INT4, 72": lambda x: int4(x, 72),
           "NF4, 32": lambda x: nf4(x, 32), "INT4, 32": lambda x: int4(x, 32),
           "MXFP8, 32": lambda x: mx_quantize(x, FP8_E4M3)}
# %% tags=["nbval-ignore-output"]
print("scheme, block   bits per value   weight dB   inputs dB")
bits, db = {}, {}
for name, quantizer in schemes.items():
    pair = [(x, quantizer(x)) for x in (weight, inputs)]
    bits[name], db[name] = pair[0][1].bits_per_element, [sqnr_db(x, q.dequantize()) for x, q in pair]
    print(f"{name:14}{bits[name]:14.3f}{db[name][0]:14.1f}{db[name][1]:12.1f}")
assert db["INT4, 128"][0] > db["MXFP4, 32"][0] + 0.5
assert db["INT4, 128"][1] < db["MXFP4, 32"][1] - 0.5
assert max(db[name][0] for name in ("NVFP4, 16", "NF4, 64", "INT4, 72")) < db["NVFP4, 16"][0] + 1
assert db["NVFP4, 16"][1] > 2 + max(db["NF4, 64"][1], db["INT4, 72"][1])
assert db["MXFP4, 32"][0] < db["NF4, 32"][0] < db["INT4, 32"][0]
# %% [markdown]
# At about 4.25 bits, plain INT4 beats MXFP4 on the weight and loses on the inputs. At 4.5, three are within
# a decibel on the weight; on the inputs NVFP4 wins by far, since small blocks keep an outlier to
# themselves. At equal *block* (32) MXFP4 is the worst of three, and the cheapest: its scale takes 8 bits,
# the others' 32 and more. "Four bits" is not one thing.
#
# ## 9. The whole model
# One row for each format. The weights in the file are BF16 already; **predict** the KL of the first row.
# %%
class Rounded:  # what quantize_weights asks for: the values, and the bytes that they take
    def __init__(self, values, nbytes):
        self.values, self.nbytes = values, nbytes

    def dequantize(self):
        return self.values

recipes = {("bf16", 16, "-"): lambda w: Rounded(round_to(w, BF16), 2 * w.numel()),
           ("fp8 e4m3", 8, "tensor"): lambda w: Rounded(scaled(w, FP8_E4M3), w.numel() + 4),
           ("mxfp8", 8, "32"): lambda w: mx_quantize(w, FP8_E4M3),
           ("mxfp4", 4, "32"): lambda w: mx_quantize(w, FP4_E2M1),
           ("nvfp4", 4, "16"): nvfp4_quantize}
tokens = token_stream(tokenizer, load_text("eval"))[:4096]
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

from quantlab import ledger
from quantlab.lm import divergence, quantize_weights

rows = {}
for (method, b, group), recipe in tqdm(recipes.items(), leave=False):
    new, packed = quantize_weights(model, recipe)
    rows[method] = ledger.measure(model, new, tokens, method=method, bits=b, group=group, qtensors=packed)
    ledger.append(rows[method])
kl = {method: row.kl for method, row in rows.items()}
assert 0 == kl["bf16"] < kl["fp8 e4m3"] < 0.02 < kl["nvfp4"] < kl["mxfp4"] < 0.5
assert 0.5 < kl["nvfp4"] / kl["mxfp4"] < 0.8
ledger.Table(list(rows.values()))
# %% [markdown]
# BF16 costs nothing, since nothing was rounded. At 4 bits NVFP4's finer scales, for a quarter of a bit,
# take a third off the KL. But at 8 bits, why does a scale for each block *lose* against one for the whole
# matrix?
# **Predict**, then look at where the largest element of a block lands: anywhere from 256 to 512.
# %% tags=["nbval-ignore-output"]
groups_of_32 = weight.reshape(-1, 32)
rule = mx_quantize(groups_of_32, FP8_E4M3).real_scales()
for up in (0, 1):
    at = groups_of_32 / (rule * 2**up)
    back = round_to(at, FP8_E4M3) * rule * 2**up
    print(f"exponent + {up}: {(at.abs() > 448).double().mean():.1%} above 448, {sqnr_db(groups_of_32, back):.1f} dB")
assert kl["mxfp8"] > kl["fp8 e4m3"]
# %% [markdown]
# One element in a hundred lies between 448 and 512 and saturates, and costs more than a decibel: OCP's rule
# does not know that E4M3 gave its last code to NaN. One exponent higher, and the loss is gone. (Why is
# nothing lost by moving everything one power of two nearer to 0?)
#
# **The control that must fail.** Two candidates. E4M3 *without* any scale, the slip that made int8 worthless in
# notebook 00; and codes written with bias 7 but read with bias 8. **Predict** for each.
# %% tags=["nbval-ignore-output"]
from quantlab import FloatFormat

other_bias = FloatFormat("E4M3 with bias 8", 4, 3, 8, "nan")
suspects = {"no scale": lambda w: Rounded(round_to(w, FP8_E4M3), w.numel()),
            "bias off by one": lambda w: Rounded(decode(encode(w, FP8_E4M3), other_bias), w.numel())}
bad = {name: divergence(model, quantize_weights(model, f)[0], tokens).kl for name, f in suspects.items()}
assert bad["bias off by one"] > 100 * kl["fp8 e4m3"]
assert abs(bad["no scale"] / kl["fp8 e4m3"] - 1) < 0.3
dead = {factor: (round_to(weight * factor, FP8_E4M3) == 0).float().mean().item() for factor in (1, 2**-4, 2**-8)}
assert dead[1] < 0.05 < 0.9 < dead[2**-8]
print({name: f"KL {value:.4f}" for name, value in bad.items()})
print("become 0:", {f"weight × {factor:.3g}": f"{share:.1%}" for factor, share in dead.items()})
# %% [markdown]
# The wrong bias halves every weight, and the model is wrecked, as it must be. The missing scale does *no*
# harm: these weights lie inside E4M3's range by luck of their size. That is the convenience of a float, and
# its trap: the same code on numbers 2⁸ times smaller loses nearly all of them, and raises no error.
#
# ## 10. Numbers that small exist: gradients
# That is **underflow** (下溢): too small for the format, so 0. Training in FP16 meets it, in its *gradients*.
# We take one batch of real text, 1024 tokens, run it forward and backward in float32, and look at every
# gradient on its way.
# %%
import torch.nn.functional as F

def loss_of(model, ids):
    logits = model(ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

def watch(model, act):
    """Call act(name, gradient) for each gradient that flows into a layer's output; what it returns flows on."""
    def hook(name):
        def forward(_module, _inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: act(name, gradient))
        return forward
    modules = {**linear_layers(model), "logits": model.get_output_embeddings()}
    return [module.register_forward_hook(hook(name)) for name, module in modules.items()]
# %% tags=["nbval-ignore-output"]
ids, flowing = text[:1024].view(2, 512), {}
hooks = watch(model, flowing.__setitem__)
loss_of(model, ids).backward()
for h in hooks:
    h.remove()
of_weights = torch.cat([p.grad.flatten() for p in model.parameters()])

def cast(x, fmt):
    """round_to(x, fmt) by torch's casts, which section 4 has compared with it: they are quicker."""
    return x.to(casts[fmt]).float()

def lost(gradient, fmt=FP16):
    """The share of the gradients other than 0 that the format makes 0."""
    gradient = gradient[gradient != 0]
    return (cast(gradient, fmt) == 0).float().mean().item()
# %% tags=["nbval-ignore-output"]

between = torch.cat([g.flatten() for name, g in flowing.items() if name != "logits"])
groups = {"of the logits": flowing["logits"].flatten(), "between layers": between, "of the weights": of_weights}
assert lost(groups["of the logits"]) > 0.8 > 0.1 > lost(between) > 0.01
assert all(lost(g, BF16) == 0 for g in groups.values())
fig, ax = plt.subplots(figsize=(7, 3), layout="constrained")
for (name, g), color in zip(groups.items(), (ERROR, QUANTIZED, OTHER), strict=True):
    sizes = g[g != 0].abs().log2()
    ax.hist(sizes[::7].numpy(), bins=110, range=(-55, 0), density=True, histtype="step", color=color,
            label=f"{name}: {lost(g):.1%} lost")
ax.axvspan(-55, -25, color=CLIPPED, alpha=0.3, label="0 in FP16")
ax.axvspan(-25, -14, color=CLIPPED, alpha=0.12, label="subnormal in FP16")
ax.set(xlabel="log₂ |gradient|   (BF16 ends at −133, far to the left)", ylabel="density", xlim=(-55, 0))
ax.legend(fontsize="small")
plt.show()
# %% [markdown]
# Nine in ten gradients of the logits die in FP16, and some percent of the others; in BF16, none. To the
# right, everything from 2⁻⁴ to 2¹⁶ is empty: FP16 *has* the range, in the wrong place.
#
# After the last attention nothing mixes tokens any more: the gradient at a token comes from that token's
# loss alone, and where the model is sure and right there is hardly any. **Predict**: which layers lose
# most?
# %% tags=["nbval-ignore-output"]
fig, ax = plt.subplots(figsize=(7, 2.4), layout="constrained")
names = [name for name in flowing if name != "logits"][::-1]  # they came from the last layer to the first
kinds = sorted({name.split(".")[-1] for name in names})
for kind, marker in zip(kinds, "osD^vP*", strict=False):
    at = [i for i, name in enumerate(names) if name.endswith(kind)]
    ax.plot(at, [lost(flowing[names[i]]) for i in at], marker, linestyle=":", label=kind, markersize=5)
ax.set(xlabel="layer, in the order of the model", ylabel="share lost in FP16")
ax.legend(fontsize="x-small", ncols=2, loc="upper left")
plt.show()
with torch.no_grad():
    chance = model(ids).logits[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
sure, unsure = (lost(flowing[names[-1]][:, :-1][part]) for part in (chance > 0.9, chance < 0.1))
assert sum(lost(flowing[n]) for n in names[-7:]) > 2 * sum(lost(flowing[n]) for n in names[:7])
assert sure > 3 * unsure
f"lost in the last layer where the model is sure {sure:.1%}, where it is not {unsure:.1%}"
# %% [markdown]
# The last block, at the tokens that the model already knows. Does that *matter*? Those that died were the
# smallest. So we let FP16 rounding act on every gradient as it flows, and compare the gradients of the
# weights, which are what the optimizer sees.
# %%
def backward(model, ids, *, k=0, fmt=None):
    """The loss, and the weights' gradients of 2^k × loss, rounded to fmt on the way, divided by 2^k at the end."""
    hooks = watch(model, lambda _name, g: cast(g, fmt)) if fmt else []
    model.zero_grad()
    loss = loss_of(model, ids)
    (loss * 2.0**k).backward()
    for h in hooks:
        h.remove()
    return loss.item(), [(p.grad if fmt is None else cast(p.grad, fmt)) / 2.0**k for p in model.parameters()]

def gradient(**how):
    return torch.cat([g.flatten() for g in backward(model, ids, **how)[1]])
# %% tags=["nbval-ignore-output"]
exact = gradient()

def harm(grads):
    """(share of the gradients that became 0, relative error of all of them)"""
    share = ((grads == 0) & (exact != 0)).float().mean().item()
    return share, ((grads - exact).norm() / exact.norm()).item()

plain, bf16 = harm(gradient(fmt=FP16)), harm(gradient(fmt=BF16))
assert 0.001 < plain[1] < 0.02
f"FP16: {plain[0]:.1%} lost, relative error {plain[1]:.2%}; BF16: {bf16[0]:.1%} lost, {bf16[1]:.2%}"
# %% [markdown]
# Half a percent. **On this batch, FP16 without any help would do.** But the loss is a *mean over the tokens
# of the batch*. Large models are trained on batches of millions. Our 1024 tokens, as a part of a batch of
# 2²¹ (two million), have gradients 2¹¹ times smaller.
#
# The cure is to multiply the loss by 2ᵏ, and to divide the gradients by it once they are back in float32:
# the
# **loss scale** (损失缩放). Batch size and loss scale shift the same thing, so one sweep over k shows both: k = −11
# is the large batch.
#
# **Predict** the curve: error against k, from −11 upwards. Does it ever get worse again?
# %% tags=["nbval-ignore-output"]
import math

ks = [-13, -11, -9, -6, -3, 0, 3, 6, 10, 14, 18, 20, 22, 24]
sweep = {k: harm(gradient(k=k, fmt=FP16)) for k in tqdm(ks, leave=False)}
harms = {k: h for k, h in sweep.items() if math.isfinite(h[1])}
wall, floor = min(sweep.keys() - harms), min(error for _, error in harms.values())
assert 14 < wall
assert harms[-11][1] > 50 * floor
assert harms[-11][0] > harms[0][0] > harms[14][0]
assert bf16[1] > 3 * floor
# %% tags=["nbval-ignore-output"]
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for ax, i, label in ((left, 0, "share of the gradients that became 0"), (right, 1, "relative error of all gradients")):
    ax.plot(list(harms), [h[i] for h in harms.values()], "o-", color=QUANTIZED, markersize=4, label="FP16")
    ax.axhline(bf16[i], color=OTHER, linestyle="--", label="BF16, any k")
    ax.axvspan(wall - 1, 25, color=CLIPPED, alpha=0.4, label="infinity")
    for k, name in ((0, "1024 tokens"), (-11, "2²¹ tokens")):
        ax.axvline(k, color="0.6", linewidth=0.8)
        ax.text(k, 1.02, name, transform=ax.get_xaxis_transform(), fontsize="small", ha="center")
    ax.set(xlabel="k: loss × 2ᵏ", title=label + "\n")
right.set(yscale="log")
right.legend(fontsize="small", loc="upper center")
plt.show()
f"large batch: {harms[-11][0]:.0%} lost, error {harms[-11][1]:.0%}; best {floor:.3%}; infinity from k = {wall}"
# %% [markdown]
# A U with one steep wall. On the left gradients fall off the bottom of FP16; those of the weights are sums
# over many tokens, so few are exactly 0, but what is left is wrong. In the middle only rounding is left: 11
# significant bits. On the right the largest gradient becomes infinite, and the step is worthless. **BF16
# needs no k at all**, since it has float32's range; but with 8 significant bits its error is several times
# that of a well-scaled FP16. That is the trade: range or precision.
#
# ### Exercise 5.4: the largest loss scale (about 10 minutes)
# From a tensor of gradients, return the largest whole k such that nothing overflows FP16 in `2**k * grads`.
# %% tags=["exercise"]
def my_loss_scale(grads):
    raise NotImplementedError
# %%
check("5.4", my_loss_scale)
# %% [markdown]
# On the real gradients, weights' and flowing ones together, that k must be the edge of the right wall:
# %% tags=["nbval-ignore-output"]
largest = max(g.abs().max().item() for g in (*flowing.values(), of_weights))
edge = math.floor(math.log2(FP16.largest / largest))
assert gradient(k=edge, fmt=FP16).isfinite().all()
assert not gradient(k=edge + 1, fmt=FP16).isfinite().all()
f"largest gradient 2^{math.log2(largest):.1f}, so k = {edge} is the last"
# %% [markdown]
# Nobody knows that edge before the step, and it moves. So trainers use a *dynamic* loss scale: start high;
# when a gradient comes out infinite, skip the step and halve; after some hundreds of good steps, double.
#
# ### Does it train?
# Twelve steps of Adam on calibration text, 512 tokens each, as pieces of a batch of 2²¹ tokens: k = −12.
# Four runs: float32; FP16 as it is; FP16 with a loss scale of 2¹⁶, so k = 4; and BF16. **Predict** the
# order.
# %% tags=["nbval-ignore-output"]
import copy

from quantlab.lm import perplexity

def train(fmt, k, steps=12):
    new = copy.deepcopy(model)
    optimizer, losses = torch.optim.Adam(new.parameters(), lr=3e-4), []
    for piece in tqdm(text[: 512 * steps].view(steps, 1, 512), leave=False):
        loss, grads = backward(new, piece, k=k, fmt=fmt)
        for p, g in zip(new.parameters(), grads, strict=True):
            p.grad = g
        optimizer.step()
        losses.append(loss)
    return losses, perplexity(new, tokens[:2048]).value
# %% tags=["nbval-ignore-output"]
settings = {"float32": (None, 0), "FP16": (FP16, -12), "FP16, loss × 2¹⁶": (FP16, 4), "BF16": (BF16, -12)}
runs = {name: train(*setting) for name, setting in settings.items()}
before = perplexity(model, tokens[:2048]).value
after = {name: value for name, (_, value) in runs.items()}
gain = before - after["float32"]
assert gain > 2
assert before - after["FP16"] < 0.3 * gain
assert all(abs(after[name] - after["float32"]) < 0.05 * gain for name in ("FP16, loss × 2¹⁶", "BF16"))
fig, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
reference = torch.tensor(runs["float32"][0])
looks = (("black", 0), (ERROR, 5), (QUANTIZED, 8), (OTHER, 3))
for (name, (losses, end)), (color, size) in zip(runs.items(), looks, strict=True):
    ax.plot(torch.tensor(losses) - reference, "o-", color=color, markersize=size,
            label=f"{name}: {before:.1f} → {end:.1f}")
ax.set(xlabel="step", ylabel="training loss above\nthat of float32, nats")
ax.legend(fontsize="small", title="perplexity on test text")
plt.show()
# %% [markdown]
# One multiplication is the difference between training and not. Without it Adam gains nothing here: the
# gradients it is given are nearly all error (the left end of the U). With the loss scale FP16 follows
# float32 so closely that the lines coincide, and so does BF16 without one. That is why BF16, where the
# hardware has it, is the usual choice for training.
#
# ## 11. Exercises
# ### Exercise 5.5: better exponents (about 30 minutes)
# OCP's rule for the scale is not the best one. `blocks` is (blocks, 32); return an exponent for each block,
# whole numbers, so that MXFP4 has at most **0.95 times** the squared error of the rule's exponents.
# %% tags=["exercise"]
def my_exponents(blocks):
    raise NotImplementedError
# %%
check("5.5", my_exponents)
# %% [markdown]
# ### Open
# With your exponents from 5.5 in all layers, what becomes of the KL of MXFP4? Does it reach NVFP4's? Then
# give NVFP4 the same treatment: try, for each block, the neighbours of its E4M3 scale. And MXFP8, as in
# section 9.
#
# ## 12. What breaks next
# We now have several ways to store a weight in about 4.5 bits, and have judged them by decibels. What does
# the model say?
# %% tags=["nbval-ignore-output"]
verdicts = {"NVFP4, 16": (rows["nvfp4"].kl, rows["nvfp4"].kl_error),
            "MXFP4, 32": (rows["mxfp4"].kl, rows["mxfp4"].kl_error)}
for name in ("NF4, 64", "INT4, 72", "INT4, 128"):
    d = divergence(model, quantize_weights(model, schemes[name])[0], tokens)
    verdicts[name] = (d.kl, d.stderr)
for name in sorted(verdicts, key=lambda name: -db[name][0]):
    print(f"{name:10} {bits[name]:.2f} bits   weight {db[name][0]:.1f} dB   "
          f"KL {verdicts[name][0]:.4f} ± {verdicts[name][1]:.4f}")
at_45 = [verdicts[name][0] for name in ("NF4, 64", "INT4, 72", "NVFP4, 16")]
assert max(at_45) < 1.2 * min(at_45) < verdicts["MXFP4, 32"][0]
# %% [markdown]
# Do they agree on the first three? Is a difference of a few thousandths in KL real, or the luck of this
# text?
#
# ### Recap
# - A float is sign, exponent, mantissa; its step doubles with each octave, so its *relative* error is constant.
# - Integers win on narrow data, floats on wide data; E4M3 gives the same decibels for both.
# - Subnormals close the hole at 0; too large means saturation or infinity, and libraries differ.
# - MXFP4 is 4.25 bits, MXFP8 8.25, NVFP4 4.5; small blocks help most where there are outliers.
# - FP16 gradients underflow in large batches; a loss scale moves them into range. BF16 needs none.
#
# Next: [06 Measuring a language model](06_measuring_a_language_model.ipynb).
