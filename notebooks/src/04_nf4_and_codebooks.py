# %% [markdown]
# # 04 NF4 and other codebooks
# *55 minutes, of which the computer needs about one. You need notebooks 01 and 03.*
#
# A code need not be a multiple of anything: it can be the number of a line in a table, a **codebook** (码本).
# At the end of this notebook you can
#
# - build NF4, the table behind QLoRA, in five lines, and say where each of its numbers comes from;
# - count its bits, with **double quantization** (双重量化), to three decimals;
# - make a table of your own with k-means (K均值聚类), and say when it is worth its bytes;
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
# 1. 32/64 = 0.5, and 4/64 = 0.0625. 2. A group's step follows its own largest weight, not the largest of all.
#    3. Scales, zero points, and whatever was not quantized.</details>
# %% [markdown]
# ## 1. What broke
# Notebook 03 ended with equal steps and unequally used codes. Here is the symmetric grid, 4 bits, groups of 64.
# %%
import torch

from quantlab import PerGroup, quantize_tensor
from quantlab.lm import linear_layers, load_lm

model, tokenizer = load_lm()
layers = linear_layers(model)
name = list(layers)[4]
weight = layers[name].weight.detach()
uniform = quantize_tensor(weight, bits=4, granularity=PerGroup(64), symmetric=True, signed=False)
# %% tags=["nbval-ignore-output"]
used = uniform.codes.flatten().int().bincount() / weight.numel()
middle, outer = used[6:10].sum(), used[[0, 1, 14, 15]].sum()
assert middle > 4 * outer
f"{name}: the 4 middle codes hold {middle:.0%} of the weights, the 4 outermost {outer:.0%}"
# %% [markdown]
# A quarter of the codes is nearly idle, and where most weights are the grid is as coarse as where none are.
# So let us put the levels (量化级) where the weights are. Then a level is no longer `scale * code`; it must be
# looked up:
#
# $$\hat x = a \cdot \mathrm{levels}[q] \qquad\qquad q = \text{index of the level nearest to } x / a$$
#
# with a, called `absmax`, the largest magnitude of the block (分块): every block is stretched to −1 … 1, so one
# table serves all.
# %% [markdown]
# ## 2. By hand: four numbers, four levels
# One block and a table of 2 bits: how far is each value from each level? The nearest gives the code. And
# back: look up, multiply.
# %%
x = torch.tensor([0.6, -1.2, 0.1, 0.3])
levels = torch.tensor([-1.0, 0.0, 0.4, 1.0])
absmax = x.abs().max()
distance = ((x / absmax)[:, None] - levels).abs()
codes = distance.argmin(1)
x_hat = levels[codes] * absmax
print(f"{'x':>5}{'scaled':>8}   {'distance to each level':26}{'code':>4}{'back':>7}")
for i in range(4):
    row = "  ".join(f"{d:.2f}" for d in distance[i])
    print(f"{x[i]:5.1f}{x[i] / absmax:8.2f}   {row:26}{codes[i]:4}{x_hat[i]:7.2f}")
# %% [markdown]
# The −1.2 came back exactly. **Predict:** does every block give back its largest magnitude? In which table
# would it not?
#
# A distance to every level is much work. Cheaper: between two neighbouring levels the border lies half way,
# so count how many borders lie below the value. `torch.bucketize` counts.
#
# ### Exercise 4.1: look-up (about 8 minutes)
# `x` is flat and its length a multiple of `block_size`. Return `codes, absmax`: one code for each value,
# one absmax for each block.
# %% tags=["exercise"]
def my_codebook(x, levels, block_size):
    raise NotImplementedError  # return codes, absmax
# %%
from quantlab.checks import check, hint, solution

check("4.1", my_codebook)
# %% [markdown]
# The library's version takes any tensor and any table of 2 to 256 levels; blocks run over the flattened
# tensor (read `quantlab/codebook.py`: `nearest_level` is the definition, the rest makes it fast).
# %%
from quantlab import quantize_codebook

q = quantize_codebook(x, levels, block_size=4)
assert q.codes.tolist() == codes.tolist()
assert torch.equal(q.dequantize(), x_hat)
q.codes.tolist(), round(q.absmax.item(), 3)
# %% [markdown]
# ## 3. Where should the levels lie?
# Trained weights look normal. So cut the **normal distribution** (正态分布) into 16 parts of equal probability
# and put a level into each: then every code is used alike. The paper of NF4 (QLoRA, 2023) gives, for 4 bits
# and Q the **quantile** (分位数),
#
# $$q_i = \tfrac12\left(Q\big(\tfrac{i}{17}\big) + Q\big(\tfrac{i+1}{17}\big)\right)$$
#
# **Predict** the first of them, i = 0. Then a second answer from public threads: quantiles evenly from 1 − δ
# to δ for some δ < 1, or one side of them mirrored. In those, look for the zero, and count.
# %%
quantile = torch.distributions.Normal(0, 1).icdf
equation = [(quantile(torch.tensor([i / 17, (i + 1) / 17]))).mean().item() for i in (0, 1, 8, 15)]
delta = 1 - (1 / 30 + 1 / 32) / 2
even = quantile(torch.linspace(1 - delta, delta, 16)) / quantile(torch.tensor(delta))
half = quantile(torch.linspace(delta, 0.5, 8))
mirrored = torch.cat([-half, half.flip(0)]).unique()
assert (equation[0], (even == 0).sum(), len(mirrored)) == (-torch.inf, 0, 15)
print("by the formula, i = 0, 1, 8, 15:", [round(v, 2) for v in equation])
f"evenly: nearest to 0 is {even.abs().min():.3f};  mirrored: {len(mirrored)} levels"
# %% [markdown]
# The quantile of probability 0 is −∞: the formula cannot have made the table. The even one has no 0; but
# padding and switched-off weights are exact zeros, so 0 must be a level (notebook 01). The mirrored one has
# it, and is odd in number: one of the 16 codes would stay unused. The published table is *lopsided* on
# purpose:
#
# - 8 positive levels: quantiles at `linspace(δ, ½, 9)`, without the last (½ gives 0);
# - 7 negative ones: the same with `linspace(δ, ½, 8)`, and a minus;
# - an exact 0 between them; all divided by the largest.
# %% [markdown]
# **δ** was once said to be "found empirically". It is 1 − ½(1/30 + 1/32): of 16 equal parts the outermost has
# its middle at 1 − 1/32, of 15 at 1 − 1/30. There are 16 codes, 15 of them not 0; δ is half way.
#
# ### Exercise 4.2: NF4 in five lines (about 10 minutes)
# The 16 levels, ascending. Target: no further than 1e-6 from the published table.
# %% tags=["exercise"]
def my_nf4():
    raise NotImplementedError
# %%
check("4.2", my_nf4)
# %% [markdown]
# The library's table, beside the numbers that bitsandbytes publishes:
# %%
from quantlab import nf4_levels

published = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
)
nf4 = nf4_levels()
assert (nf4 - published).abs().max() < 2e-7
print(*[f"{v:.3f}" for v in nf4], sep="  ")
# %% [markdown]
# **Predict.** On which side of 0 are the levels closer together? How many times wider is the widest gap than the
# narrowest? And: a float's sign is a bit, so one fixed pattern of bits turns each number into its negative.
# Is there such a pattern here?
# %%
gaps, c = nf4.diff(), torch.arange(16)
flips = [mask for mask in range(1, 16) if torch.equal(nf4[c ^ mask], -nf4)]
assert (gaps.argmin(), gaps.argmax(), flips) == (7, 0, [])
print(f"narrowest {gaps.min():.3f} (0 to {nf4[8]:.3f}), widest {gaps.max():.3f} (-1 to {nf4[1]:.3f})")
f"bit patterns that negate every level: {flips}"
# %% [markdown]
# So NF4 is neither "evenly spaced" nor "a 4-bit float": a code is a line number in a table, and says
# nothing by itself.
# %%
import matplotlib.pyplot as plt

from quantlab import normalize_blocks
from quantlab.plots import ERROR, FLOAT, QUANTIZED

values, _ = normalize_blocks(weight, block_size=64)
fig, ax = plt.subplots(figsize=(7, 2.4))
ax.hist(values.numpy(), bins=101, color=FLOAT)
ax.vlines(nf4, 0, 1, color=QUANTIZED, linewidth=1.3, transform=ax.get_xaxis_transform(), label="NF4")
ax.plot((c - 8) / 7.5, [0] * 16, "^", color=ERROR, clip_on=False, label="symmetric INT4")
ax.set(xlabel="weight / largest magnitude of its block of 64", ylabel="weights")
ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()
# %% [markdown]
# ## 4. Why blocks of 64?
# Some texts divide by the largest magnitude of the whole matrix. **Predict** what that costs, in dB.
# (Signal to noise, as in notebook 01; 6 dB is a bit.)
# %% tags=["nbval-ignore-output"]
from quantlab import sqnr_db

def decibels(levels, block_size):
    return sqnr_db(weight, quantize_codebook(weight, levels, block_size=block_size).dequantize())

found = {size: decibels(nf4, size) for size in (16, 64, 256, weight.numel())}
assert found[16] > found[64] > found[256] > found[weight.numel()] + 1
{("the matrix" if size == weight.numel() else size): f"{db:.2f} dB" for size, db in found.items()}
# %% [markdown]
# The largest of all weights is far out, so after the division the others crowd near 0, and the outer levels
# wait for nobody. Small blocks are better and cost more: that is the next count.
#
# ## 5. The bits, counted
# 4 bits a code, one float32 for 64 of them: 4 + 32/64. QLoRA quantizes the absmax as well: subtract their
# mean, store 8 bits each, and one float32 for every 256 of *them*.
#
# ### Exercise 4.3: bits of double quantization (about 5 minutes)
# Bits a weight for blocks of `block_size`, with a float32 for each `outer` blocks. (The one mean of a
# tensor does not count.)
# %% tags=["exercise"]
def my_bits(block_size, outer):
    raise NotImplementedError
# %%
check("4.3", my_bits)
# %% [markdown]
# **Predict** what double quantization costs in dB on the layer.
# %% tags=["nbval-ignore-output"]
plain = quantize_codebook(weight, nf4, block_size=64)
double = quantize_codebook(weight, nf4, block_size=64, double_quant=True)
before, after = plain.bits_per_element, double.bits_per_element
cost = sqnr_db(weight, plain.dequantize()) - sqnr_db(weight, double.dequantize())
spread = plain.absmax.std() / plain.absmax.mean()
assert before == 4.5
assert round(after, 3) == 4.127
assert abs(cost) < 0.05
f"{before} → {after:.3f} bits: {1 - after / before:.0%} less, for {cost:.4f} dB; the absmax vary by {spread:.0%}"
# %% [markdown]
# Next to nothing. The absmax resemble each other, so what is left after their mean is small, and 8 bits are
# plenty.
#
# ## 6. Myth: "every code is used alike, so NF4 is information-theoretically optimal"
# The **entropy** (熵) of the codes says how many of their 4 bits carry information: 4 if all 16 are used
# alike.
#
# ### Exercise 4.4: entropy (about 8 minutes)
# $H = -\sum_k p_k \log_2 p_k$, with $p_k$ the share of code k.
# %% tags=["exercise"]
def my_entropy(codes):
    raise NotImplementedError
# %%
check("4.4", my_entropy)
# %% [markdown]
# **Predict** for normal values in blocks of 64: is the entropy 4? Larger or smaller for blocks of 1024?
# %%
def shares(codes):
    return codes.flatten().int().bincount(minlength=16) / codes.numel()

def entropy(codes):
    used = shares(codes)
    return -(used * used.clamp(min=1e-12).log2()).sum().item()

normal = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
sizes = (16, 64, 1024)
tried = {size: quantize_codebook(normal, nf4, block_size=size).codes for size in sizes}
bits = {size: round(entropy(codes), 2) for size, codes in tried.items()}
assert 4 > bits[16] > bits[64] > bits[1024]
least, most = shares(tried[64]).min(), shares(tried[64]).max()
f"entropy {bits} bits; in blocks of 64 a code is used by {least:.1%} to {most:.1%} of the values"
# %%
fig, axes = plt.subplots(1, 3, figsize=(7, 2), sharey=True)
for ax, size in zip(axes, sizes, strict=True):
    ax.bar(range(16), 100 * shares(tried[size]), color=QUANTIZED)
    ax.axhline(100 / 16, color="0.4", linestyle="--", linewidth=0.8)
    ax.set(title=f"blocks of {size}", xlabel="code")
axes[0].set_ylabel("used by, %")
plt.show()
# %% [markdown]
# Not alike at all (dashed: alike). The table cuts a normal distribution of *fixed* width. After division by
# absmax the width depends on the block: the more values, the further out the largest, the narrower the
# rest. NF4 does not know the block size.
#
# And would equal use be best? Take the 16 quantiles of the layer's own block values: that table uses every
# code alike.
# **Predict:** more dB than NF4, or fewer?
# %% tags=["nbval-ignore-output"]
equal = values.quantile((torch.arange(16) + 0.5) / 16)
codes = quantize_codebook(weight, equal).codes
assert entropy(codes) > 3.99
assert decibels(equal, 64) < found[64] - 1
f"{entropy(codes):.3f} bits: {decibels(equal, 64):.2f} dB;  NF4 {entropy(plain.codes):.3f} bits: {found[64]:.2f} dB"
# %% [markdown]
# Full entropy, and a much larger error. With equal use the outer levels lie far apart, and each mistake there is
# large. Equal use would be optimal if the codes themselves were the message; for a small squared error the
# levels must lie elsewhere.
#
# ## 7. A table of one's own: k-means
# Lloyd's two steps, again and again: each value joins its nearest level; each level moves to the mean of
# its values. Neither step can raise the squared error.
#
# ### Exercise 4.5: one step (about 15 minutes)
# Return the new levels. A level that nobody is nearest to stays where it is. (`nearest_level` is the
# library's look-up.)
# %% tags=["exercise"]
from quantlab import nearest_level

def my_step(values, levels):
    raise NotImplementedError
# %%
check("4.5", my_step)
# %% [markdown]
# On the real layers, one table each. `kmeans_levels` starts from quantiles and stops when no value changes
# its level.
# %% tags=["nbval-ignore-output"]
from quantlab import kmeans_levels

scaled = {key: normalize_blocks(layers[key].weight, block_size=64)[0] for key in list(layers)[:7]}
tables = {key: kmeans_levels(some) for key, some in scaled.items()}
own = quantize_codebook(weight, tables[name])
gain = sqnr_db(weight, own.dequantize()) - found[64]
assert 0.2 < gain < 1
fig, ax = plt.subplots(figsize=(7, 2.2))
for row, table in enumerate(tables.values()):
    ax.plot(table, [row] * 16, ".", color=FLOAT if row else "0.4")
ax.plot(nf4, [-1.5] * 16, "|", color=QUANTIZED, markersize=14, markeredgewidth=2)
ax.set(yticks=[-1.5, 3], yticklabels=["NF4", "k-means,\n7 layers"], xlabel="level")
plt.show()
f"{gain:.2f} dB more than NF4 at {own.bits_per_element:.4f} bits: the table itself, 16 float32, must be stored too"
# %% [markdown]
# Seven layers, seven tables, and nearly the same one: what they have in common is not their weights but
# *normal values in blocks of 64*. (Exercise 4.6 uses that.) All are more even than NF4: they pay attention
# to the outside.
#
# ## 8. Attack
# NF4 is compared with *symmetric* INT4 in most texts. We add **asymmetric** INT4, at **equal true bits**:
# it stores 32 + 4 bits for each block where NF4 stores 32, so its blocks must be 9/8 as long: 72 instead of
# 64.
#
# **Predict**, for normal values: who wins at blocks of 32? At 1024? What do heavy tails (厚尾) change?
# %%
def heavy(freedom):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(freedom + 1, 4096 * 72, generator=random)
    return z[0] / z[1:].square().mean(0).sqrt()  # Student's t

def compare(x, size):
    uneven = quantize_tensor(x, bits=4, granularity=PerGroup(size * 9 // 8), symmetric=False)
    even = quantize_tensor(x, bits=4, granularity=PerGroup(size), symmetric=True)
    table = quantize_codebook(x, nf4, block_size=size)
    assert abs(uneven.bits_per_element - table.bits_per_element) < 0.001
    return [sqnr_db(x, q.dequantize()) for q in (table, uneven, even)]
# %%
normal = torch.randn(4096 * 72, generator=torch.Generator().manual_seed(0))
data = {"normal": normal, "Student t, ν = 5": heavy(5)}
sizes = [2**k for k in range(4, 13)]
curves = {key: torch.tensor([compare(x, size) for size in sizes]) for key, x in data.items()}
fig, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True)
styles = {"NF4": QUANTIZED, "INT4 asymmetric": ERROR, "INT4 symmetric": "0.4"}
for ax, (key, curve) in zip(axes, curves.items(), strict=True):
    for column, (label, color) in zip(curve.T, styles.items(), strict=True):
        ax.plot(sizes, column, ".-", color=color, label=label)
    ax.set(xscale="log", title=key, xlabel="block size of NF4", xticks=[16, 64, 256, 1024, 4096])
    ax.set_xticklabels(ax.get_xticks())
axes[0].set_ylabel("signal to noise, dB")
axes[0].legend(fontsize="small")
plt.show()
# %%
at = {size: [round(v, 1) for v in curves["normal"][sizes.index(size)].tolist()] for size in (32, 64, 1024)}
lead = {key: (curve[:, 0] - curve[:, 1]) for key, curve in curves.items()}
crossing = {key: sizes[int((value > 0).int().argmax())] for key, value in lead.items()}
assert lead["normal"][1] < -0.3 < lead["normal"][2] < 0.3 < 1.5 < lead["normal"][6]
assert crossing["Student t, ν = 5"] < crossing["normal"]
assert all((curve[:, 0] > curve[:, 2]).all() for curve in curves.values())
print("dB in normal blocks, NF4, asymmetric, symmetric:", at)
f"NF4 ahead of asymmetric INT4 from blocks of: {crossing}"
# %% [markdown]
# Against the symmetric grid NF4 wins throughout. Against the asymmetric one, at the same bits, it *loses*
# in small blocks, ties at 64, and wins in large ones; heavy tails move the crossing to smaller blocks.
#
# Why? **Predict**: in a block of 16, how far does the nearer of its two ends reach, compared with the
# farther one? And in a block of 1024?
# %%
reach = {}
for size in (16, 64, 1024):
    ends = torch.stack([-normal.view(-1, size).amin(1), normal.view(-1, size).amax(1)])
    reach[size] = round((ends.amin(0) / ends.amax(0)).mean().item(), 2)
assert reach[16] < reach[64] < reach[1024]
reach
# %% [markdown]
# A small block is lopsided. The asymmetric grid fits both of its ends; NF4 fits one, and the levels beyond
# the other wait for nobody. A large block has its ends alike and most values in the middle, where NF4 is
# fine.
# %% [markdown]
# ### Drag it
# Left: the values of a block over its largest, with the levels of a table; below, who uses which code.
# Right: every table beside NF4, at equal true bits (k-means stores its table on top).
#
# **Predict first**, then drag:
# 1. `block` to 16: which bars cross to the right?
# 2. `block` to 4096, table NF4: which codes does nobody use any more?
# 3. `values` from normal to t, ν = 3, blocks of 1024: does NF4 gain or lose against FP4, a table of powers of two?
# 4. Is k-means always the best? Try ν = 3 in small blocks.
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_codebook
from quantlab.lm import capture_inputs, load_text, token_stream

tokens = token_stream(tokenizer, load_text("calibration"))[:2048]
explorer = explore_codebook(weight, capture_inputs(model, tokens, [name])[name])
explorer
# %% [markdown]
# **What you saw.** In blocks of 16 the asymmetric grid leads everybody. In blocks of 4096 the outer codes of NF4 are
# idle. FP4 is made for heavy tails: the longer they are, the closer it comes. And k-means lost where tails
# are heavy and blocks small: it gives every *scaled* value the same weight, but the error that counts is
# scaled back by absmax. The next cell checks three of these.
# %% tags=["nbval-ignore-output"]
def bars(block, values):
    explorer.controls["block"].value, explorer.controls["values"].value = block, values
    line = explorer.numbers().splitlines()[1].split(" dB")
    names = ("NF4", "FP4", "symmetric", "asymmetric", "k-means")
    return dict(zip(names, [float(part.split()[-1]) for part in line[:5]], strict=True))

small, long, odd = bars(16, "normal"), bars(1024, "t, ν = 3"), bars(16, "t, ν = 3")
assert max(small, key=small.get) == "asymmetric"
assert long["FP4"] - long["NF4"] > small["FP4"] - small["NF4"] + 0.5
assert odd["k-means"] < odd["NF4"]
for where, found_there in (("blocks of 16", small), ("t, blocks of 1024", long), ("t, blocks of 16", odd)):
    print(f"{where:18}", found_there)
# %% [markdown]
# ## 9. The real layers
# Who wins on which of the model's layers? **Predict** the counts for blocks of 32, 64 and 256.
# %% tags=["nbval-ignore-output"]
wins = {}
for size in (32, 64, 256):
    pairs = [compare(layer.weight.detach().flatten(), size) for layer in layers.values()]
    wins[size] = f"NF4 wins on {sum(a > b for a, b, _ in pairs)} of {len(pairs)} layers"
    assert all(a > c for a, _, c in pairs), "symmetric INT4 won somewhere"
assert wins[32].startswith("NF4 wins on 0 of")
assert wins[256].startswith(f"NF4 wins on {len(pairs)} of")
wins
# %% [markdown]
# The layers do what normal values do. Now the predictions of the whole model. All rows keep the embedding
# in 16 bits; `bits` below counts the quantized layers alone.
# %%
class Flat:
    """INT4 in blocks over the flattened weight, as the tables have them."""

    def __init__(self, weight, size, symmetric):
        self.shape = weight.shape
        self.q = quantize_tensor(weight.flatten(), bits=4, granularity=PerGroup(size), symmetric=symmetric)
        self.nbytes = self.q.nbytes

    def dequantize(self):
        return self.q.dequantize().view(self.shape)
# %%
def own_table(weight):
    return quantize_codebook(weight, kmeans_levels(normalize_blocks(weight, block_size=64)[0]))

makers = {
    ("nf4", "64"): lambda w: quantize_codebook(w, nf4),
    ("nf4 double", "64"): lambda w: quantize_codebook(w, nf4, double_quant=True),
    ("nf4", "tensor"): lambda w: quantize_codebook(w, nf4, block_size=w.numel()),
    ("int4 sym", "64"): lambda w: Flat(w, 64, True),
    ("int4 asym", "72"): lambda w: Flat(w, 72, False),
    ("k-means", "64"): own_table,
}
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

from quantlab import ledger
from quantlab.lm import quantize_weights

tokens = token_stream(tokenizer, load_text("eval"))[:4096]
count = sum(layer.weight.numel() for layer in layers.values())
rows, true_bits = {}, {}
for key, maker in tqdm(makers.items(), leave=False):
    new, packed = quantize_weights(model, maker)
    rows[key] = ledger.measure(model, new, tokens, method=key[0], bits=4, group=key[1], qtensors=packed)
    true_bits[key] = 8 * sum(q.nbytes for q in packed.values()) / count
# %% tags=["nbval-ignore-output"]
for row in rows.values():
    ledger.append(row)
kl = {key: row.kl for key, row in rows.items()}
base, margin = kl["nf4", "64"], 4 * rows["nf4", "64"].kl_error
assert kl["k-means", "64"] < base < kl["int4 sym", "64"] - margin
assert max(abs(base - kl[key]) for key in (("nf4 double", "64"), ("int4 asym", "72"))) < margin
assert kl["nf4", "tensor"] > 2 * base
print(ledger.Table(list(rows.values())))
{" ".join(key): round(value, 4) for key, value in true_bits.items()}
# %% [markdown]
# Read the KL column. NF4 beats the symmetric grid by far more than the error bar; against the asymmetric
# one at the same bits there is no winner at this block size; the layers' own tables beat both. Double
# quantization costs nothing that could be seen, and dividing by the largest of the matrix costs more than
# the table gained. The perplexities differ by less than their error bars, and would mislead you: notebook
# 06 says why.
#
# **The control that must fail.** The right codes and the right absmax, dealt to the wrong blocks.
# %% tags=["nbval-ignore-output"]
from dataclasses import replace

def shuffled(weight):
    q = quantize_codebook(weight, nf4)
    order = torch.randperm(len(q.absmax), generator=torch.Generator().manual_seed(0))
    return replace(q, absmax=q.absmax[order])

broken, packed = quantize_weights(model, shuffled)
bad = ledger.measure(model, broken, tokens, method="shuffled", bits=4, group="64", qtensors=packed)
assert bad.bytes == rows["nf4", "64"].bytes
assert bad.kl > 5 * base
f"KL {bad.kl:.2f} instead of {base:.3f}, with the same bytes, codes and scales"
# %% [markdown]
# ## 10. Myth: "NF4 is a quantization method"
# It is a *data type*: it says which 16 numbers a block can hold. Which of them to take is a method, and
# rounding after dividing by absmax is only the first that comes to mind. Another: try several scales for
# each block and keep the best. Same table, same bytes. **Predict:** worth more or less than a table of
# one's own?
# %%
def searched(weight):
    q = quantize_codebook(weight, nf4)
    blocks = weight.reshape(len(q.absmax), -1)
    least = torch.full((len(blocks), 1), torch.inf)
    codes, absmax = q.codes.view(blocks.shape).clone(), q.absmax[:, None].clone()
    for factor in torch.linspace(0.75, 1.1, 11):
        scale = factor * q.absmax[:, None]
        tried = nearest_level(blocks / scale, nf4)
        error = (nf4[tried.int()] * scale - blocks).square().sum(1, keepdim=True)
        codes, absmax = (torch.where(error < least, a, b) for a, b in ((tried, codes), (scale, absmax)))
        least = torch.minimum(error, least)
    return replace(q, codes=codes.view(weight.shape), absmax=absmax.flatten())
# %% tags=["nbval-ignore-output"]
new, packed = quantize_weights(model, searched)
row = ledger.measure(model, new, tokens, method="nf4 search", bits=4, group="64", qtensors=packed)
ledger.append(row)
assert row.bytes == rows["nf4", "64"].bytes
assert row.kl < kl["k-means", "64"] < base
f"KL {row.kl:.4f} ± {row.kl_error:.4f}; scale = absmax {base:.4f}; own tables {kl['k-means', '64']:.4f}"
# %% [markdown]
# More. In QLoRA the type is used for frozen weights beside trained ones in 16 bits (notebook 15, being
# written). Whether a look-up is slower or faster than float weights depends on the kernel and on how many
# tokens go through at a time.
#
# ## 11. Exercises
# ### Exercise 4.6: a table that beats NF4 (about 30 minutes)
# Return 16 levels that reach at least **0.5 dB more** than NF4 on normal values in blocks of 32. You may
# use everything in `quantlab`.
# %% tags=["exercise"]
def my_table():
    raise NotImplementedError
# %%
check("4.6", my_table)
# %% [markdown]
# ### Open
# 1. Divide by the *signed* extreme of the block instead of the magnitude, so that +1 always occurs and −1 hardly ever.
#    Which table fits that? (llama.cpp's Q4_0 does something like it.)
# 2. Cost one bit a block: choose between NF4 and its mirror image, whichever fits. What is it worth, in dB and
#    in bits?
# 3. bitsandbytes' "fp4" is `fp4_levels(smallest=1 / 192)`: one pair of levels differs from the FP4 of notebook
#    05. Add both to the table of section 9. What does the pair cost?
# %% [markdown]
# ## 12. What breaks next
# INT4 codes are numbers, so a matrix product can use them as they are and multiply by the scale at the end.
# Try that with codes that are line numbers.
# %%
random = torch.Generator().manual_seed(0)
row, y = torch.randn(64, generator=random), torch.randn(64, generator=random)
grid = quantize_tensor(row, bits=4, granularity=PerGroup(64), symmetric=True)
table = quantize_codebook(row, nf4)
late = grid.qparams.scale.item() * (grid.codes.float() @ y)
wrong = table.absmax.item() * ((table.codes.float() - 7) / 8 @ y)
assert abs(late - grid.dequantize() @ y) < 1e-4 < 0.1 < abs(wrong - table.dequantize() @ y)
f"INT4 {late:.3f}, right {grid.dequantize() @ y:.3f};  NF4 {wrong:.3f}, right {table.dequantize() @ y:.3f}"
# %% [markdown]
# A table needs a look-up for every weight, before every product. Hardware would rather have formats whose
# bits *mean* something, a sign, an exponent, a fraction, so that it can multiply them as they are.
# %% [markdown]
# ### Recap
# - A codebook stores line numbers; blocks share one absmax, and one table serves all blocks.
# - NF4: normal quantiles, 7 negative, 0, 8 positive, δ = 1 − ½(1/30 + 1/32); 4.5 bits, 4.127 with double quantization.
# - Its codes are not used alike, and equal use would not be best either.
# - It beats symmetric INT4; asymmetric INT4 at equal bits wins in small blocks, NF4 in large ones and with heavy tails.
# - It is a data type: a better scale or a table of one's own lowers the error at the same size.
#
# Go on with [05 Floating-point formats](05_floating_point_formats.ipynb).
