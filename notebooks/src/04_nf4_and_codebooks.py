# %% [markdown]
# # 04 NF4 and other codebooks
# *60 minutes, and 45 more for the exercises of section 11. The computer needs about one. You need notebooks 01
# and 03.*
#
# A code can be the number of a line in a table, a **codebook** (码本). At the end of this notebook you can
#
# - build NF4, the table behind QLoRA, in five lines, and say where each of its numbers comes from;
# - count its bits, with **double quantization** (双重量化), to three decimals;
# - make a table of your own with **k-means** (K均值聚类), and say what it gains and costs;
# - show where NF4 loses, to which grid, and test the sentence "information-theoretically optimal".
# %% [markdown]
# ### Recall
# Answer before you open them.
#
# 1. A group of 64 weights has one float32 scale. How many bits does that add to each weight? And a zero point of 4
#    bits on top?
# 2. Why do smaller groups lower the error?
# 3. Two codes of 4 bits share a byte. What is in the file besides these bytes?
#
# <details><summary>Answers</summary>
# 1. 32/64 = 1/2, and 4/64 = 1/16. 2. A group's step follows its own largest weight, not the largest of all.
#    3. Scales, zero points, and whatever was not quantized.</details>
#
# ## 1. What broke
# Notebook 03 ended with equal steps and unequally used codes. Here is the symmetric grid, 4 bits, groups of
# 64.
# %% tags=["nbval-ignore-output"]
import torch

from quantlab import PerGroup, quantize_tensor
from quantlab.checks import check, found, hint, solution
from quantlab.lm import budget, layers_of_role, linear_layers, load_lm, weight_of

model, tokenizer = load_lm()
layers = linear_layers(model)
name = next(iter(layers_of_role(model, "gate")))
weight = weight_of(layers[name]).contiguous()

uniform = quantize_tensor(weight, bits=4, granularity=PerGroup(64), symmetric=True, signed=False)
used = uniform.codes.flatten().int().bincount() / weight.numel()
middle, outer = used[6:10].sum(), used[[0, 1, 14, 15]].sum()
found(middle > 4 * outer,
      f"the 4 middle codes hold {middle / outer:.1f} times what the 4 outermost do")
f"{name}: the 4 middle codes hold {middle:.0%} of the weights, the 4 outermost {outer:.0%}"
# %% [markdown]
# The grid is no finer where most weights are than elsewhere. So let us put the levels (量化级) where the weights
# are. Then a level is no longer `scale * code`; it must be looked up:
#
# $$\hat x = a \cdot \mathrm{levels}[q] \qquad\qquad q = \text{index of the level nearest to } x / a$$
#
# with a, called `absmax`, the largest magnitude of the **block** (分块), a group of the *flattened* tensor.
# Every block is stretched to −1 … 1, so one table serves all.
#
# ## 2. By hand: four numbers, four levels
# How far is each scaled value (a row) from each level (a column)? The nearest gives the code. And back:
# look up, multiply.
# %%
x = torch.tensor([0.6, -1.2, 0.1, 0.3])
levels = torch.tensor([-1.0, 0.0, 0.4, 1.0])
absmax = x.abs().max()
distance = ((x / absmax)[:, None] - levels).abs()
codes = distance.argmin(1)
x_hat = levels[codes] * absmax
print(distance.round(decimals=2), codes, x_hat, sep="\n")
# %% [markdown]
# The −1.2 came back exactly. **Predict:** does every block give back its largest magnitude? With which
# table would it not? (Section 7 has one.)
#
# To measure the distance to every level is much work. Cheaper: between two neighbouring levels the border lies
# half way, so count how many borders lie below the value. `torch.bucketize` counts.
#
# ### Exercise 4.1: look-up (about 8 minutes)
# `x` is flat, its length a multiple of `block_size`, and no block is all 0. `levels` ascend, and need not end
# at ±1. Return `codes, absmax`: for each value the index of its level, a whole number; for each block its
# largest magnitude. (Flat or in rows, as you like.)
# %% tags=["exercise"]
def my_codebook(x, levels, block_size):
    raise NotImplementedError  # return codes, absmax
# %%
check("4.1", my_codebook)

from quantlab import quantize_codebook  # the same, for any tensor and any table of 2 to 256 levels

q = quantize_codebook(x, levels, block_size=4)
assert torch.equal(q.dequantize(), x_hat)
q.codes.tolist(), round(q.absmax.item(), 3)
# %% [markdown]
# ## 3. Where should the levels lie?
# Trained weights look normal (a picture follows). So cut the **normal distribution** (正态分布) into 16 parts
# of equal probability and give each a level: then, one hopes, every code is used alike. The paper of NF4
# (QLoRA, 2023) prints, with Q(p) the **quantile** (分位数), below which a share p of all values lies:
#
# $$q_i = \tfrac12\left(Q\big(\tfrac{i}{17}\big) + Q\big(\tfrac{i+1}{17}\big)\right) \qquad i = 0 \ldots 15$$
#
# **Predict** q₀. Then look at two recipes from public threads, with some probability δ a little below 1:
#
# - *even*: 16 quantiles, evenly from 1 − δ to δ. Is 0 among them?
# - *mirrored*: 8 quantiles from ½ to δ, and their negatives. How many different levels?
# %%
from quantlab import predictions
from quantlab.predictions import predict

guess = predict("How many different levels has the mirrored recipe?", ["14", "15", "16"])
# %%
quantile = torch.distributions.Normal(0, 1).icdf
first = quantile(torch.tensor([0, 1 / 17])).mean()
delta = 0.9677
even = quantile(torch.linspace(1 - delta, delta, 16))
half = quantile(torch.linspace(0.5, delta, 8))
mirrored = torch.cat([-half, half]).unique()
assert first == -torch.inf
assert not (even == 0).any()
print(f"q₀ = {first};  even: {even.abs().min():.3f} is nearest to 0")
guess.reveal(str(len(mirrored)))
# %% [markdown]
# That formula cannot have made the table: its q₀ is −∞. The even recipe has no 0, but 0 must be a level
# (notebook 01). The mirrored one has it twice, so one code is wasted. The published table is *lopsided* on purpose:
#
# - 8 positive levels: quantiles at `linspace(δ, ½, 9)`, without the last (½ gives 0);
# - 7 negative ones: the same with `linspace(δ, ½, 8)`, and a minus;
# - an exact 0 between them; all divided by the largest.
#
# **δ** = 1 − ½(1/30 + 1/32): of 16 equal parts the outermost has its middle at 1 − 1/32, of 15 at 1 − 1/30; the
# table has 16 levels, 15 of them not 0.
#
# ### Exercise 4.2: NF4 in five lines (about 10 minutes)
# Return the levels, ascending. Target: at most 1e-6 from the published table.
# %% tags=["exercise"]
def my_nf4():
    raise NotImplementedError
# %%
check("4.2", my_nf4)
# %% [markdown]
# **Predict.** Eight levels on one side of 0, seven on the other, both sides end at ±1: on which side are they
# closer together? By what factor is the widest gap wider than the narrowest? A float has a sign bit, so with
# every number its negative can be written too: how many levels of NF4 have their negatives in the table?
# %%
from quantlab import nf4_levels

published = torch.tensor(  # by bitsandbytes
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)
nf4 = nf4_levels()
assert (nf4 - published).abs().max() < 2e-7
print(*[f"{v:.3f}" for v in nf4], sep="  ")

gaps, both = nf4.diff(), nf4[torch.isin(-nf4, nf4)].tolist()
assert both == [-1.0, 0.0, 1.0]
print(f"narrowest gap {gaps.min():.3f} (0 to {nf4[8]:.3f}), widest {gaps.max():.3f} (-1 to "
      f"{nf4[1]:.3f})")
f"{gaps.max() / gaps.min():.1f} times; the negative is there for {both}"
# %% [markdown]
# They are closer together on the side of the eight. So NF4 is neither "evenly spaced" nor "a 4-bit float": a code
# is a line number, and its bits say nothing by themselves. Here are the levels over the weights of the layer, each
# divided by the absmax of its block.
# %%
import matplotlib.pyplot as plt

from quantlab import normalize_blocks
from quantlab.plots import ERROR, FLOAT, QUANTIZED, plot_bars, plot_curves

values, absmax = normalize_blocks(weight, block_size=64)
plt.figure(figsize=(7, 2.4), layout="constrained")
plt.hist(values.numpy(), bins=101, color=FLOAT)
plt.vlines(nf4, 0, plt.ylim()[1], color=QUANTIZED)
plt.plot((torch.arange(16) - 8) / 7.5, [0] * 16, "^", color=ERROR, clip_on=False)
plt.title("lines: NF4, triangles: symmetric INT4", fontsize="medium")
plt.ylabel("weights")
plt.xlabel("weight / largest magnitude of its block of 64")
plt.show()
# %% [markdown]
# The weights look normal, as promised; the bars at ±1 are the largest weight of each block.
#
# ## 4. Why blocks of 64?
# Some texts divide by the largest magnitude of the whole matrix. **Predict** what that costs, in dB.
# (Signal to noise, as in notebook 01; 6 dB is a bit.)
# %% tags=["nbval-ignore-output"]
from quantlab import sqnr_db

def decibels(levels, block_size=64):
    return sqnr_db(weight, quantize_codebook(weight, levels, block_size=block_size).dequantize())

db = {size: decibels(nf4, size) for size in (16, 64, 256, weight.numel())}
found(list(db.values()) == sorted(db.values(), reverse=True), "larger blocks have fewer dB")
found(db[256] > db[weight.numel()] + 1, "the whole matrix has fewest by far")
{
    ("the matrix" if size == weight.numel() else size): f"{value:.2f} dB"
    for size, value in db.items()
}
# %% [markdown]
# From 20.71 dB in blocks of 64 down to 17.80. The largest of all weights is far out: divided by it the others
# crowd near 0, and the outer levels wait for few. Small blocks are better and cost more: that is the next count.
#
# ## 5. The bits, counted
# 4 bits a code, one float32 for 64 of them: 4 + 32/64 = 4.5. QLoRA quantizes the absmax as well: subtract
# their mean, store 8 bits each, and one float32 (their own scale) for every 256 of *them*. This is called double
# quantization. **Predict** what it costs in dB on the layer.
#
# ### Exercise 4.3: bits of double quantization (about 5 minutes)
# Return the bits of a weight, for blocks of `block_size` weights and one float32 for each `outer` blocks. The
# codes count, the one mean of a tensor does not. (Three decimals are enough.)
# %% tags=["exercise"]
def my_bits(block_size, outer):
    raise NotImplementedError
# %%
check("4.3", my_bits)
# %% tags=["nbval-ignore-output"]
double = quantize_codebook(weight, nf4, double_quant=True)
bits, cost = double.bits_per_element, db[64] - sqnr_db(weight, double.dequantize())
blocks = -(-weight.numel() // 64)
beside = 8 * blocks + 32 * -(-blocks // 256) + 32  # absmax, their scales, one mean
assert round(weight.numel() * (bits - 4)) == beside
found(abs(cost) < 0.05, f"double quantization costs {cost:.2f} dB")
(f"4.5 → {bits:.3f} bits: {1 - bits / 4.5:.0%} less for {cost:.4f} dB; absmax vary "
 f"{absmax.std() / absmax.mean():.0%}")
# %% [markdown]
# Next to nothing: 0.0038 dB. The absmax resemble each other (they vary by 18 %), so what is left after their mean
# is small, and 8 bits are plenty.
#
# ## 6. Myth: "every code is used alike, so NF4 is information-theoretically optimal"
# The **entropy** (熵) of the codes says how many of their 4 bits carry information: 4 if all 16 are used
# alike, and less otherwise. **Predict** for normal values in blocks of 64: is it 4? And is it larger or smaller
# for blocks of 1024?
#
# ### Exercise 4.4: entropy (about 8 minutes)
# Return $H = -\sum_k p_k \log_2 p_k$, a number, with $p_k$ the share of code k among the codes. `codes` is a
# tensor of whole numbers from 0 to 255, of any shape and integer type. What does not occur counts as 0.
# %% tags=["exercise"]
def my_entropy(codes):
    raise NotImplementedError
# %%
check("4.4", my_entropy)
# %%
import math

def shares(q):
    return q.codes.flatten().int().bincount(minlength=16) / q.codes.numel()

def entropy(shares):  # entr(p) is −p ln p, and 0 for p = 0; divided by ln 2 it is in bits
    return torch.special.entr(shares).sum().item() / math.log(2)

normal = torch.randn(4096 * 72, generator=torch.Generator().manual_seed(0))
used = {size: shares(quantize_codebook(normal, nf4, block_size=size)) for size in (16, 64, 1024)}
bits = {size: round(entropy(p), 2) for size, p in used.items()}
assert 4 > bits[16] > bits[64] > bits[1024]  # the larger the blocks, the less entropy
plt.figure(figsize=(7, 2.4), layout="constrained")
bars = {f"blocks of {size}": dict(enumerate(100 * p)) for size, p in used.items()}
plot_bars(bars, ylabel="used by, %")
plt.axhline(100 / 16, color="0.4", linestyle="--")
plt.xlabel("code (dashed: all used alike)")
plt.show()
p = used[64]
f"entropy {bits} bits; in blocks of 64, {p.min():.1%} to {p.max():.1%} of the values use a code"
# %% [markdown]
# In blocks of 16 the codes are used nearly alike, in larger ones they are not. The table cuts a normal
# distribution of *fixed* width. After the division by absmax the width depends on the block: the more values it
# has, the further out is its largest, and the narrower the rest. NF4 does not know the block size.
#
# And would equal use be best? Put the levels at 16 quantiles of the layer's own block values: that table uses
# every code alike.
# %%
guess = predict("Has that table more decibels than NF4, or fewer?", ["more", "as many", "fewer"])
# %% tags=["nbval-ignore-output"]
equal = values[:2**24].quantile((torch.arange(16) + 0.5) / 16)
full = entropy(shares(quantize_codebook(weight, equal)))
found(full > 3.99, f"the table uses its codes alike: {full:.2f} bits")
less = db[64] - decibels(equal)
found(less > 1, f"using every code alike costs {less:.1f} dB, more than one")
print(f"levels {equal[0]:.2f} … {equal[-1]:.2f}: {full:.2f} bits, {less:.2f} dB below NF4's "
      f"{db[64]:.2f}")
guess.reveal("fewer" if less > 0 else "more")
# %% [markdown]
# Full entropy, and 3.00 dB less. Entropy does not ask how far off a value is. With equal use the levels end at
# ±0.75: none is left for the few values far out, and each error there is large.
#
# ## 7. A table of one's own: k-means
# Lloyd's two steps, again and again: each value joins its nearest level; each level moves to the mean of
# its values. Neither can raise the squared error. `kmeans_levels` does it until no value changes its level
# (you write it in exercise 4.5).
#
# **Predict:** the first layers and plain normal numbers, each with a table of its own: how different are the
# tables? Do they end at ±1?
# %% tags=["nbval-ignore-output"]
from quantlab import kmeans_levels

def own_table(x):
    return kmeans_levels(normalize_blocks(x, block_size=64)[0])

some = [weight_of(layer) for layer in list(layers.values())[:7]]
tables = torch.stack([own_table(w) for w in some] + [own_table(normal)])
colors = [FLOAT] * len(some) + [ERROR, QUANTIZED]
plt.figure(figsize=(7, 2.4), layout="constrained")
plt.eventplot([*tables.numpy(), nf4.numpy()], linelengths=0.7, colors=colors)
plt.yticks([len(some) // 2, len(some), len(some) + 1], [f"{len(some)} layers", "normal", "NF4"])
plt.xlabel("level (all but NF4's by k-means)")
plt.show()
own = own_table(weight)
gain, apart = decibels(own) - db[64], (tables.amax(0) - tables.amin(0)).max()
cost = quantize_codebook(weight, own).bits_per_element - 4.5  # 16 float32 for the table
found(0.2 < gain < 1, f"the layer's own table gains {gain:.2f} dB, less than one")
found(apart < 0.05, f"the tables lie at most {apart:.3f} apart")
found(tables.abs().max() < 0.98, "they end before ±1")
f"{apart:.3f} apart at most; the layer gains {gain:.2f} dB and pays {cost:.4f} bits"
# %% [markdown]
# One table but for 0.022, in the bundled model: what the layers share is *normal values in blocks of 64*. Its
# levels are more even than NF4's, and end before ±1, so the largest of a block comes back changed (section 2).
#
# ## 8. Attack
# Many texts compare NF4 with *symmetric* INT4, whose scale here is absmax / 7.5. A fair attack gives INT4 its
# best form too, at **equal true bits**. So we add **asymmetric** INT4. It stores a zero point as well, 32 + 4
# bits a block where NF4 stores 32, and so gets blocks 9/8 as long: 72 for 64.
#
# We also try values with **heavy tails** (厚尾): Student's t looks normal in the middle and has more values
# far out, the more of them the smaller its parameter ν is.
#
# **Predict** for each rival: who wins at blocks of 32? At 1024? What do heavy tails change?
# %%
from types import SimpleNamespace

def int4(x, size, symmetric):  # in blocks over the flattened x, as the tables have them
    q = quantize_tensor(x.flatten(), bits=4, granularity=PerGroup(size), symmetric=symmetric)
    back = q.dequantize().view(x.shape)
    sizes = {"bits_per_element": q.bits_per_element, "nbytes": q.nbytes}
    return SimpleNamespace(**sizes, dequantize=lambda: back)

def lead(x, size, rival):  # how many dB NF4 is above INT4 of the same true bits
    table = quantize_codebook(x, nf4, block_size=size)
    grid = int4(x, size, True) if rival == "symmetric" else int4(x, size * 9 // 8, False)
    apart = abs(table.bits_per_element - grid.bits_per_element)
    assert apart < 40 / x.numel()  # the last block may be short
    return sqnr_db(x, table.dequantize()) - sqnr_db(x, grid.dequantize())
# %% tags=["nbval-ignore-output"]
from quantlab.exercises.material import student_t

data = {"normal": normal, "t, ν = 5": student_t(5, 4096 * 72, seed=0), "the layer": weight}
sizes = [2**k for k in range(4, 13)]
fig, axes = plt.subplots(1, 2, figsize=(7.5, 3), sharey=True, layout="constrained")
leads = {}
for ax, rival in zip(axes, ("symmetric", "asymmetric"), strict=True):
    leads[rival] = {key: [lead(x, size, rival) for size in sizes] for key, x in data.items()}
    curves = {key: (sizes, curve) for key, curve in leads[rival].items()}
    plot_curves(curves, xlabel="block size", ylabel=f"dB of NF4 above {rival}", log="x", ax=ax)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xticks(sizes[::2], sizes[::2])
axes[1].get_legend().remove()  # the left one says it
plt.show()
# %% tags=["nbval-ignore-output"]
at = {key: dict(zip(sizes, curve, strict=True)) for key, curve in leads["asymmetric"].items()}
for key in ("normal", "the layer"):  # NF4 loses in small blocks and wins in large ones
    found(at[key][32] < 0, f"{key}, blocks of 32: NF4 is {-at[key][32]:.2f} dB behind")
    found(at[key][1024] > 1, f"{key}, blocks of 1024: NF4 is {at[key][1024]:.2f} dB ahead")
assert abs(at["normal"][64]) < 0.3  # a tie
assert at["t, ν = 5"][64] > 0.3  # heavy tails: no tie any more
least = min(min(curve) for curve in leads["symmetric"].values())
found(least > 0, f"NF4 is ahead of absmax / 7.5 everywhere, by {least:.2f} dB at least")
{
    key: "  ".join(f"{size}: {curve[size]:+.2f} dB" for size in (16, 32, 64, 1024))
    for key, curve in at.items()
}
# %% [markdown]
# Against absmax / 7.5 NF4 wins at every block size. Against the asymmetric grid, at the same bits, it *loses* in
# small blocks, ties at 64, and wins in large ones; heavy tails move the crossing to smaller blocks. The layer does
# what normal values do.
#
# The symmetric grid has a better form as well. llama.cpp's Q4_0 divides by the block's extreme *with its
# sign*: scale = extreme / −8, so that the extreme itself is a code. It costs no bit more.
# %% tags=["nbval-ignore-output"]
def signed_extreme(x, size):
    blocks = x.flatten()[: x.numel() // size * size].view(-1, size)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    return sqnr_db(blocks, (blocks / scale).round().clamp(-8, 7) * scale)

def lead_of_nf4(x, size):
    table = quantize_codebook(x, nf4, block_size=size)
    return sqnr_db(x, table.dequantize()) - signed_extreme(x, size)

signed = {key: {size: lead_of_nf4(x, size) for size in (16, 32, 64)} for key, x in data.items()}
found(signed["the layer"][32] < 0,
      "with the signed extreme INT4 beats NF4 in blocks of 32 of the layer")
assert max(signed["normal"][16], signed["normal"][32]) < 0
{key: {size: f"{value:+.2f} dB" for size, value in row.items()} for key, row in signed.items()}
# %% [markdown]
# In blocks of 16 and 32 that plain grid beats NF4 on normal values. A sentence such as "NF4 beats INT4" must
# say which INT4, and in which blocks.
#
# Why? **Predict**: in a block of 16, how far does the nearer of its two ends reach, compared with the
# farther one? And in a block of 1024?
# %%
reach = {}
for size in (16, 64, 1024):
    ends = torch.stack([-normal.view(-1, size).amin(1), normal.view(-1, size).amax(1)])
    reach[size] = round((ends.amin(0) / ends.amax(0)).mean().item(), 2)
assert list(reach.values()) == sorted(reach.values())  # larger blocks have their ends more alike
reach
# %% [markdown]
# A block of 16 is lopsided: the nearer end reaches 0.72 times as far as the farther one. The asymmetric grid fits
# both ends; NF4 fits one. A block of 1024 has its ends more alike (0.89), and most values in the middle, where
# NF4's levels lie close.
#
# ### Drag it
# Left: scaled values and the levels of a table; below, who uses which code. Right: every table beside NF4,
# at equal true bits. FP4 is the 4-bit float of notebook 05. **Predict first**, then drag:
#
# 1. `block` from 64 to 16: k-means led; who leads now?
# 2. `block` to 4096, table NF4: which codes fall idle?
# 3. Blocks of 1024, `values` from normal to t, ν = 3: does FP4 catch up with NF4?
# 4. ν = 3, blocks of 16: is k-means ahead here too?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_codebook
from quantlab.lm import capture_inputs, load_text, token_stream

tokens = token_stream(tokenizer, load_text("calibration"))[:2048]
explore_codebook(weight, capture_inputs(model, tokens, [name])[name])
# %% [markdown]
# **What you saw.** 1: the asymmetric grid. 2: those at both ends. 3: yes; FP4, with wide gaps outside, catches up
# when tails are heavy. 4: no, k-means *lost* there: it counts every scaled value alike, but each error is
# multiplied by the absmax of its block afterwards, and with heavy tails and small blocks those differ much.
# %% tags=["nbval-ignore-output"]
from quantlab.explorers.codebook import compare_tables

tailed, small = student_t(3, 4096 * 9, seed=0), compare_tables(weight, 16)
near, far, odd = [
    compare_tables(x, size) for x, size in ((normal, 1024), (tailed, 1024), (tailed, 16))
]
behind = [near["NF4"] - near["FP4"], far["NF4"] - far["FP4"]]
idle = shares(quantize_codebook(weight, nf4, block_size=4096))[[0, 1, 14, 15]].max()
found(max(small, key=small.get) == "INT4 asymmetric", "in blocks of 16 the asymmetric grid leads")
found(idle < 0.01, f"in blocks of 4096 the outer codes serve at most {idle:.1%}")
assert behind[1] < behind[0] - 0.5
assert odd["k-means"] < odd["NF4"]
print(f"blocks of 1024, NF4 above FP4: normal {behind[0]:.2f} dB, ν = 3 {behind[1]:.2f} dB")
f"ν = 3, blocks of 16: k-means {odd['k-means']:.2f} dB, NF4 {odd['NF4']:.2f} dB"
# %% [markdown]
# ## 9. The whole model
# Five ways to spend 4 bits; all keep the embedding in 16. **Predict** their order by KL. (The weights are
# run as floats here, which takes a float's time: prefill and decode stay empty.)
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

from quantlab import ledger
from quantlab.lm import quantize_weights

makers = {
    ("nf4", "64"): lambda w: quantize_codebook(w, nf4),
    ("nf4 double", "64"): lambda w: quantize_codebook(w, nf4, double_quant=True),
    ("int4 sym", "64"): lambda w: int4(w, 64, True),
    ("int4 asym", "72"): lambda w: int4(w, 72, False),
    ("k-means", "64"): lambda w: quantize_codebook(w, own_table(w)),
}
stories, rows = token_stream(tokenizer, load_text("eval")), {}
tokens = stories[: budget(model, 4096)]  # fewer on a larger model
for (method, group), maker in tqdm(makers.items(), leave=False):
    new, packed = quantize_weights(model, maker)
    named = {"method": method, "bits": 4, "group": group}
    rows[method] = ledger.measure(model, new, tokens, **named, qtensors=packed)
    ledger.append(rows[method])
ledger.Table(list(rows.values()))
# %% tags=["nbval-ignore-output"]
kl, margin = {key: row.kl for key, row in rows.items()}, 4 * rows["nf4"].kl_error
found(kl["k-means"] < kl["nf4"], "the layers' own tables beat NF4")
found(kl["nf4"] < kl["int4 sym"] - margin, "NF4 beats the symmetric grid")
for key in ("nf4 double", "int4 asym"):
    found(abs(kl["nf4"] - kl[key]) < margin, f"{key} is like NF4")
low, *_, high = sorted(row.perplexity for row in rows.values())
found(low > high - rows["nf4"].perplexity_error,
      "the perplexities differ by less than an error bar")
# %% [markdown]
# Read the KL column. On the bundled model NF4 beats the symmetric grid by far more than the error bar;
# against the asymmetric one at the same bits there is no winner at this block size; the layers' own tables
# beat both. Double quantization costs nothing that could be seen. The perplexities differ by less than their
# error bars, and do not order the ways as KL does: notebook 06 says why.
#
# **The control that must fail.** The right codes and the right absmax, dealt to the wrong blocks. **Predict**
# its bytes and its KL.
# %% tags=["nbval-ignore-output"]
from dataclasses import replace

def shuffled(weight):
    q = quantize_codebook(weight, nf4)
    order = torch.randperm(len(q.absmax), generator=torch.Generator().manual_seed(0))
    return replace(q, absmax=q.absmax[order])

broken, packed = quantize_weights(model, shuffled)
bad = ledger.measure(model, broken, tokens, method="shuffled", bits=4, group="64", qtensors=packed)
assert bad.bytes == rows["nf4"].bytes
found(bad.kl > 5 * kl["nf4"],
      f"scales dealt to the wrong blocks cost {bad.kl / kl['nf4']:.1f} times the KL")
f"KL {bad.kl:.2f} instead of {kl['nf4']:.3f}, with the same bytes, codes and scales"
# %% [markdown]
# ## 10. Myth: "NF4 is a quantization method"
# It is a *data type*: it says which 16 numbers a block can hold. How to choose among them is a method. To divide
# by absmax and round is only the first method that comes to mind. Another is to try several scales for each
# block and to keep the best. Table and bytes stay the same. **Predict:** is that worth more than a table of one's
# own, or less?
# %% tags=["nbval-ignore-output"]
from quantlab import nearest_level

blocks, tries = weight.flatten()[:weight.numel() // 64 * 64].view(-1, 64), []
for factor in torch.linspace(0.75, 1.1, 11):
    scale = factor * blocks.abs().amax(1, keepdim=True)
    tries.append(nf4[nearest_level(blocks / scale, nf4).int()] * scale)
errors = torch.stack(
    [(back - blocks).square().sum(1) for back in tries]
)  # of each try, for each block
more = 10 * math.log10(blocks.square().sum() / errors.amin(0).sum()) - db[64]
found(more > gain, "searched scales are worth more than a table of one's own")
f"scales searched: {more:.2f} dB more than NF4 by absmax;  own table: {gain:.2f} dB more"
# %% [markdown]
# It is worth more: 0.67 dB against 0.47. (In QLoRA the type holds frozen weights, beside trained ones in 16 bits.)
# Is NF4 slower than floats? Nothing here has measured that: it depends on the kernel that looks up, and on how
# many tokens go through at a time. Notebook [15](15_qlora.ipynb) measures it.
#
# ## 11. Exercises
# ### Exercise 4.5: one step of k-means (about 15 minutes)
# `values` and `levels` are flat, the levels ascend. Do one step: each value goes to its nearest level, then
# each level to the mean of its values. Return the new levels, in the same order. A level that no value is
# nearest to stays where it is.
# %% tags=["exercise"]
def my_step(values, levels):
    raise NotImplementedError  # nearest_level(values, levels) is the library's look-up
# %%
check("4.5", my_step)
# %% [markdown]
# ### Exercise 4.6: a table for heavy tails (about 30 minutes)
# Values like `student_t(3, 128_000, seed=1)`, ν = 3, in blocks of 32. Return 16 levels that reach at least
# **0.6 dB more** than NF4 on such values (the check draws its own). They must ascend. You may use everything
# in `quantlab`, and your answer to 4.5; section 8 says why `kmeans_levels` alone will not do.
# %% tags=["exercise"]
def my_table():
    raise NotImplementedError
# %%
check("4.6", my_table)
# %% [markdown]
# ### Open
# 1. Put the searched scales of section 10 into the table of section 9. How far down goes the KL?
# 2. Divide by the *signed* extreme of the block, as Q4_0 does in section 8: +1 is in each block, −1 in few. Which
#    table fits that, and how much does it gain on NF4?
# 3. bitsandbytes' "fp4" is `fp4_levels(smallest=1 / 192)`. What does its odd pair of levels cost in KL?
#
# ## 12. What breaks next
# INT4 codes are numbers: a product can use them as they are and multiply by the scale at the end. Now try that
# with NF4's line numbers, counted from the line of the 0.
# %%
row, y = normal[:64], normal[64:128]
grid = quantize_tensor(row, bits=4, granularity=PerGroup(64), symmetric=True)
table = quantize_codebook(row, nf4)
right, late = grid.dequantize() @ y, grid.qparams.scale.item() * (grid.codes.float() @ y)
true, wrong = table.dequantize() @ y, table.absmax.item() * ((table.codes.float() - 7) / 8 @ y)
assert abs(late - right) < 1e-4  # INT4: the scale can wait
assert abs(wrong - true) > 0.1  # NF4: line numbers are no numbers
f"INT4 {late:.3f}, right {right:.3f};  NF4 {wrong:.3f}, right {true:.3f}"
# %% [markdown]
# It fails: NF4 needs a look-up for every weight, before every product. Hardware would rather have bits that *mean*
# something: a sign, an exponent, a fraction.
#
# ### Recap
# - A codebook stores line numbers; each block has its absmax, one table serves all.
# - NF4: normal quantiles, 7 negative, 0, 8 positive, δ = 1 − ½(1/30 + 1/32); 4½ bits, little more than 4⅛ with
#   double quantization.
# - Its codes are not used alike, nor would equal use be best.
# - It beats plain symmetric INT4. At equal bits INT4 wins in small blocks, asymmetric or with the signed
#   extreme; NF4 wins in large blocks, and with heavy tails.
# - It is a data type: a better scale, or a table of one's own, lowers the error at (nearly) the same size.
#
# The last cell says how often you were right. Go on with [05 Floating-point
# formats](05_floating_point_formats.ipynb).
# %%
predictions.score()
