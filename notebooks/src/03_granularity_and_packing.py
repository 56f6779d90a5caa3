# %% [markdown]
# # 03 Granularity, packing, honest bits
# *60 minutes, and 65 more for the exercises of section 10. The computer needs about one. You need notebooks
# 01 and 02.*
#
# 粒度、打包、真实位数. One scale for a million weights is cheap and bad. Here are more of them; we count what they
# cost, and weigh the result as a file. At the end you can
#
# - quantize per tensor, per channel (逐通道) and per group (分组), short last group included;
# - pack (打包) codes of 1 to 8 bits into bytes and read them back;
# - say how many bits a "4-bit" weight, layer and model really take, before you save them;
# - notice a scale that lies along the wrong axis.
# %% [markdown]
# ### Recall
# Answer before you open them.
#
# 1. A range is cut short. Which error falls, which one rises?
# 2. What does one huge value do to a min-max range?
# 3. Why must calibration not read the test text?
#
# <details><summary>Answers</summary>
# 1. Rounding error falls, since the step shrinks; clipping error rises. 2. The grid reaches out for it, so
#    the step grows for all other values. 3. The test would then flatter what was fitted to it, and say
#    nothing about new text.</details>
# %% [markdown]
# ## 1. What broke
# A clipping point is a compromise *for all weights that share it*. Here is the layer with which notebook 02
# ended. (A row holds the weights of one output.) First, one grid for the whole layer gets the best clip, from
# the MSE observer. Then each row gets a grid of its own, not clipped at all.
#
# **Predict:** by what factor does the error of the quietest row fall? And that of a typical row?
# %%
import torch

from quantlab import PerAxis, PerGroup, PerTensor, quantize_tensor
from quantlab.checks import check, found, hint, solution
from quantlab.lm import budget, layers_of_role, linear_layers, load_lm, weight_of
from quantlab.observers import MSE

def clipped(w):
    ends = MSE(bits=4, symmetric=False).update(w).min_max()
    return quantize_tensor(w.clamp(*ends), bits=4, granularity=PerTensor(), symmetric=False)

model, tokenizer = load_lm()
layers = linear_layers(model)
weight = weight_of(list(layers_of_role(model, "gate").values())[-1])
f"{weight.shape[0]} rows (outputs) of {weight.shape[1]} columns (inputs)"
# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

from quantlab.plots import ERROR, FLOAT, QUANTIZED, plot_bars, plot_curves

by_row = quantize_tensor(weight, bits=4, granularity=PerAxis(0), symmetric=False)
common, own = ((q.dequantize() - weight).square().sum(1) for q in (clipped(weight), by_row))
size, factor = weight.square().mean(1).sqrt(), common / own
plt.figure(figsize=(7, 2.6), layout="constrained")
plt.semilogy(size, factor, "o", markersize=3, color=ERROR)
plt.axhline(1, color=FLOAT)
plt.xlabel("typical weight of the row")
plt.ylabel("common error / own")
plt.show()
quietest, typical = factor[size.argmin()].item(), factor.median().item()
found(quietest > 4,
      f"the quietest row's error falls by a factor of {quietest:.1f} (the bundled model: 13.8)")
found(0.8 < typical < 1.25,
      f"a typical row's error falls by a factor of {typical:.2f} (the bundled model: 0.99)")
f"error divided by {quietest:.1f} in the quietest row, by {typical:.2f} in the median one"
# %% [markdown]
# Here the common grid suits the typical row. A row that is much quieter gets a step made for others. Which
# weights share a scale is called **granularity** (粒度).
#
# ## 2. By hand: eight weights
# Two rows: 0, 0.1, 0.2, 0.3 and 0, 0.1, 2, 3. Two bits, so codes 0 to 3, and no weight is negative, so the
# zero point is 0. One scale for all must reach 3.0 in three steps: it is 1.0. We also try a scale for each
# row, and one for each *two neighbours* in a row. Which weights become 0 that were not 0 before?
# %%
from quantlab import predictions
from quantlab.predictions import predict

guess = predict("One scale for all eight: how many of the six weights that are not 0 become 0?",
                ["none", "one", "three", "four"])
# %%
w = torch.tensor([[0.0, 0.1, 0.2, 0.3],
                  [0.0, 0.1, 2.0, 3.0]])
per_row = torch.tensor([[0.1], [1.0]])
per_two = torch.tensor([[0.1 / 3, 0.1 / 3, 0.1, 0.1],
                        [0.1 / 3, 0.1 / 3, 1.0, 1.0]])

for granularity, scale in ((PerTensor(), 1.0), (PerAxis(0), per_row), (PerGroup(2), per_two)):
    by_hand = scale * torch.round(w / scale).clamp(0, 3)
    q = quantize_tensor(w, bits=2, granularity=granularity, symmetric=False, signed=False)
    assert torch.allclose(q.dequantize(), by_hand)
    print(granularity, f"{q.bits_per_element:.2f} bits per weight", by_hand, sep="\n")
lost = int(((w / 1.0).round() == 0).sum() - (w == 0).sum())
guess.reveal(["none", "one", "two", "three", "four"][lost])
# %% [markdown]
# Per tensor, the first row is gone, and the 0.1 of the second. Per row, that 0.1 is still lost to its
# neighbours 2 and 3. Per group of two, nothing is lost. (The group 0.2, 0.3 has the scale 0.1: its range is
# widened to hold 0.) And the price: a scale is a float32, 32 bits, and a zero point takes 2 bits more. (Bytes
# come whole; the last may hold filling.)
#
# ### Exercise 3.1: groups (about 10 minutes)
# Round a matrix `weight` with a grid for each run of `group_size` neighbours in each row: asymmetric, codes 0
# to 2ᵇ − 1, the range of each run widened to hold 0. **The last run of a row may be shorter.** Return the
# rounded weights, as reals, in the shape of `weight`, which must not change. You may use notebook 01's
# `choose_qparams` and `fake_quantize`.
# %% tags=["exercise"]
def my_groups(weight, bits, group_size):
    raise NotImplementedError
# %%
check("3.1", my_groups)
# %% [markdown]
# ## 3. What more scales buy
# Another layer, the last of the first MLP, has longer rows; in the bundled model one row holds a weight 10
# standard deviations out. We measure two errors: of the **weights**, ‖W − Ŵ‖²/‖W‖², and of the layer's
# **output**, ‖X(W − Ŵ)ᵀ‖²/‖XWᵀ‖², where X is what the layer reads when the model reads stories. We use 4 bits. A
# scale is shared by the whole tensor (once with the grid out to the extremes, once clipped), by a row, or by
# 128, 32 or 8 neighbours in a row.
#
# **Predict:** which step lowers the error most? From where on does it cost more than a bit per weight?
# %% tags=["nbval-ignore-output"]
from quantlab.lm import capture_inputs, load_text, token_stream

name = next(iter(layers_of_role(model, "down")))
weight = weight_of(layers[name])
stories = token_stream(tokenizer, load_text("calibration"))
stories = stories[: budget(model, 2048)]  # fewer on a larger model
x = capture_inputs(model, stories, [name])[name]

def relative(a, exact):
    return ((a - exact).square().sum() / exact.square().sum()).item()

def errors(q):
    return relative(q.dequantize(), weight), relative(x @ q.dequantize().T, x @ weight.T)

kinds = {"tensor": PerTensor(), "row": PerAxis(0), "128": PerGroup(128), "32": PerGroup(32),
         "8": PerGroup(8)}
four = {kind: quantize_tensor(weight, bits=4, granularity=g, symmetric=False)
        for kind, g in kinds.items()}
far = weight.abs().max() / weight.std()
f"{name} {tuple(weight.shape)}: largest weight {far:.0f} standard deviations"
# %% tags=["nbval-ignore-output"]
both = {kind: errors(q) for kind, q in {"clipped": clipped(weight), **four}.items()}
for kind, (of_weight, of_output) in both.items():
    bits = "" if kind == "clipped" else f", {four[kind].bits_per_element:.3f} bits per weight"
    print(f"{kind:>7}: error of weights {of_weight:.4f}, of output {of_output:.4f}{bits}")
of_weight = [both[kind][0] for kind in kinds]
found(of_weight == sorted(of_weight, reverse=True),
      "each finer grain has less error of the weights")
for kind, bundled in (("clipped", 6.1), ("row", 5.0)):
    less = both["tensor"][0] / both[kind][0]
    found(less > 4,
          f"{kind}: the error falls by a factor of {less:.1f} (the bundled model: {bundled})")
assert all(
    q.bits_per_element >= 4 + 36 / kinds[kind].group_size
    for kind, q in four.items()
    if kind.isdigit()
)
# %% [markdown]
# Here a scale a row is nearly free (4.047 bits), and frees the other rows from the step of the one with the far
# weight. *A good clip* does so about as well. From here on grids are not clipped, unless we say so. Groups of 32
# take 5.125 bits, more than one bit for scales and zero points; in groups of 8 these cost more than the codes, 8.5
# bits in all (and a last group that is shorter costs as much as any).
#
# Is a finer grain better than *one more bit* for each code? Compare error at equal **true** bits. A point is on
# the **Pareto front** (帕累托前沿) if no other has less error at no more bits. **Predict:** are groups of 32 on it
# when scales are float32? Float16? And groups of 8?
# %% tags=["nbval-ignore-output"]
from dataclasses import replace
from itertools import product

def measure(scale_type):
    points = {}
    for bits, kind in product(range(2, 7), kinds):
        q = quantize_tensor(weight, bits=bits, granularity=kinds[kind], symmetric=False)
        scale = q.qparams.scale.to(scale_type)
        saved = 8 * (q.qparams.scale.nbytes - scale.nbytes) / weight.numel()
        q = replace(q, qparams=replace(q.qparams, scale=scale.float()))
        points[bits, kind] = q.bits_per_element - saved, errors(q)[1]
    return points

points = {"float32": measure(torch.float32), "float16": measure(torch.float16)}
fig, axes = plt.subplots(1, 2, figsize=(7.5, 3.4), sharex=True, sharey=True, layout="constrained")
for ax, (word, its) in zip(axes, points.items(), strict=True):
    curves = {kind: zip(*(its[bits, kind] for bits in range(2, 7)), strict=True) for kind in kinds}
    label = f"true bits per weight, {word} scales"
    plot_curves(curves, xlabel=label, ylabel="output error", log="y", ax=ax)
plt.show()
# %% tags=["nbval-ignore-output"]
def front(its):
    return {kind for (_, kind), (bits, error) in its.items()
            if bits < 7 and not any(b <= bits and e < error for b, e in its.values())}

fine, half = front(points["float32"]), front(points["float16"])
found("32" in half - fine, "groups of 32 are on the front with float16 scales only")
found("8" not in half | fine, "groups of 8 are not on the front")
(bits5, error5), (bits4, error4) = points["float32"][5, "row"], points["float32"][4, "32"]
found(bits5 < bits4,
      f"5 bits a row ({bits5:.2f} true bits) take less than 4 in groups of 32 ({bits4:.2f})")
found(error5 < 0.8 * error4,
      f"5 bits a row have less error ({error5:.4f}) than 4 in groups of 32 ({error4:.4f})")
same = points["float16"][4, "32"][1] / error4
found(same < 1.05,
      f"float16 scales have {same:.3f} times the error of float32 ones (the bundled model: 1.000)")
print(f"4 bits, groups of 32: {same:.3f} times the error with float16 scales")
{word: sorted(front(its)) for word, its in points.items()}
# %% [markdown]
# One scale a tensor is on the front because nothing is cheaper. In this layer, **with float32 scales**,
# groups of 32 are a bad buy: 5 bits a row take fewer bits, and have less error, than 4 bits in groups of 32.
# **With float16 scales** groups of 32 are on the front: their error is 1.000 times that with float32 scales, and
# a scale costs 16 bits instead of 32. So formats with small groups store *small scales*, and a claim about groups
# must name the scale's width.
#
# ## 4. Which way do the groups lie?
# `nn.Linear` stores [out, in], **GPT-2's `Conv1D`** [in, out]. There, code that says "per output channel,
# axis 0" quantizes per *input*. We make the same mistake in a square layer (or the square part of one that is
# not): axis 1 instead of 0. **Predict:** will the error of the weights give it away? That of the output?
# %% tags=["nbval-ignore-output"]
square = next(iter(layers_of_role(model, "attention output")))
side = min(weight_of(layers[square]).shape)
read, w = (
    capture_inputs(model, stories, [square])[square][:, :side],
    weight_of(layers[square])[:side, :side],
)
off = {}
for axis in (0, 1):
    q = quantize_tensor(w, bits=4, granularity=PerAxis(axis))  # symmetric: no zero points
    y = (read @ q.codes.float().T) * q.qparams.scale.flatten()  # scales after the sum
    off[axis] = relative(q.dequantize(), w), relative(y, read @ w.T)
    print(f"axis {axis}: error of the weights {off[axis][0]:.3f}, of the output {off[axis][1]:.3f}")
more = [off[1][i] / off[0][i] for i in range(2)]
found(more[0] < 1.5, f"the error of the weights grows {more[0]:.1f} times (the bundled model: 1.0)")
found(more[1] > 3, f"the error of the output grows {more[1]:.1f} times (the bundled model: 9)")
# %% [markdown]
# The error of the weights does not give it away here, 0.015 both times: a scale for each input is a fine grid too.
# What breaks is the *arithmetic*. A scale for each output can wait until the sum is done, as in the formula below.
# A scale for each input would have to stand inside the sum, and the integer product cannot do that:
#
# $$y_j = \sum_i x_i\, s_j\, q_{ji} = s_j \sum_i x_i\, q_{ji}$$
#
# No message came, and an output error of 0.036 could pass for the noise of 4 bits. So **check the axis with a
# layer that is not square**: there the number of scales does not fit. (`quantlab.lm.weight_of(layer)` gives
# [out, in] for either kind.)
#
# ### Exercise 3.2: the right axis (about 3 minutes)
# `weight` is a Conv1D's, [in, out]. Round it with one asymmetric grid for each **output**
# (`quantize_tensor(…, symmetric=False)`), and return the rounded weights, as reals, [in, out].
# %% tags=["exercise"]
def my_per_output(weight, bits):
    raise NotImplementedError
# %%
check("3.2", my_per_output)
# %% [markdown]
# ## 5. Packing
# **Predict:** how many bytes does the tensor `codes` of 4 bits take for each weight? How many does
# `packed()`?
# %%
from quantlab import pack

q, byte = four["128"], pack(torch.tensor([2, 7]), bits=4).item()
print(
    q.codes.nbytes / weight.numel(),
    "byte a weight as a tensor,",
    q.packed().nbytes / weight.numel(),
    "packed",
)
f"2 is {2:04b}, 7 is {7:04b}; together {byte:08b} = {byte}"
# %% [markdown]
# One byte: torch calculates with nothing narrower, so four bits of each byte are air. Packed, **two codes lie in
# one byte**, the first in the low four bits: 2 and 7 become 2 + 16·7. That is why "4-bit" tensors in a
# debugger say uint8, with one element for two weights.
#
# ### Exercise 3.3: two codes in a byte (about 5 minutes)
# `codes` is a row of uint8, values 0 to 15, one or more. Two neighbours share a byte, the first in its low
# four bits; if their number is odd, the last has a byte to itself, filled with 0. Return the bytes as uint8,
# and leave `codes` as they are.
# %% tags=["exercise"]
def my_pack4(codes):
    raise NotImplementedError
# %%
check("3.3", my_pack4)
# %% [markdown]
# Three bits do not divide a byte. So let the codes run on as one stream of bits, low bits first; some then
# lie astride two bytes. Eight codes of 3 bits are exactly 3 bytes:
# %%
packed = pack(torch.tensor([5, 2, 6, 1, 0, 3, 7, 4]), bits=3)
stream = [byte >> place & 1 for byte in packed.tolist() for place in range(8)]
plt.figure(figsize=(7, 1.2), layout="constrained")
boxes = plt.bar(
    range(24), 1, width=1, color=([QUANTIZED] * 3 + [FLOAT] * 3) * 4, alpha=0.6, edgecolor="white"
)
plt.bar_label(boxes, stream, label_type="center")
plt.vlines([7.5, 15.5], 0, 1, color=ERROR, linewidth=3)
plt.yticks([])
plt.xlabel("bit of the stream; three of a colour are a code, a red line ends a byte")
plt.show()
# %% [markdown]
# Low bits stand on the left. The third code, 6, has two bits in the first byte and one in the second.
# (GGUF, GPTQ and AWQ files each order their bits in another way; what counts is that writer and reader
# agree.) You read such a stream in exercise 3.5.
#
# ## 6. Honest bits
# ### Exercise 3.4: true bits (about 5 minutes)
# How many bits per weight does a matrix of `rows` × `cols` take, with a scale of `scale_bits` and a zero
# point of `zero_bits` for each group? Mind the short last group of a row. (Forget the filling of bytes.)
# %% tags=["exercise"]
def my_bits(rows, cols, bits, group_size, scale_bits, zero_bits):
    raise NotImplementedError
# %%
check("3.4", my_bits)
# %% [markdown]
# ### Myth: "a 4-bit format takes 4 bits"
# Every format stores codes and something beside them. How many bits that takes, and how many weights share
# it, is all we need to know. **Predict** the factors: float32 to 8 bits a row, float16 to 8 bits a row,
# float32 to 4 bits in groups of 128. And which of the formats below takes exactly 4 bits?
# %%
formats = {  # bits of a code, [(bits, shared by how many weights)]
    "8 bits, rows of 768, float32 scale + zero point": (8, [(32 + 8, 768)]),
    "ours: groups of 128, float32 scale + zero point": (4, [(32 + 4, 128)]),
    "GPTQ, AWQ: groups of 128, 16-bit scale + zero point": (4, [(16 + 4, 128)]),
    "NF4, blocks of 64, float32 scale": (4, [(32, 64)]),
    "NF4, double-quantized scales": (4, [(8, 64), (32, 64 * 256)]),
    "GGUF Q4_0, blocks of 32, 16-bit scale": (4, [(16, 32)]),
    "GGUF Q4_K, 8 × (6 + 6) + 2 × 16 bits for 256": (4, [(8 * 12 + 32, 256)]),
    "MXFP4, blocks of 32, 8-bit scale": (4, [(8, 32)]),
    "NVFP4, blocks of 16, 8-bit scale": (4, [(8, 16)]),
}

true_bits = {name: code + sum(bits / among for bits, among in beside)
             for name, (code, beside) in formats.items()}
for name, bits in true_bits.items():
    print(f"{bits:.4f} bits = float32 / {32 / bits:.2f} = float16 / {16 / bits:.2f}   {name}")
eight, ours, *others = true_bits.values()
assert 3.9 < 32 / eight < 4
assert ours <= four["128"].bits_per_element  # equal, if 128 divides the row
assert all(4.1 < bits <= 4.5 for bits in others)
# %% [markdown]
# The first factor is 32/8 = 4, a little less with the scales (3.97); from float16 it is 1.99. The third is 7.47.
# None of these "4-bit" formats takes 4 bits. (One scale for a whole tensor comes close: section 3 printed 4.000.
# Its price is the error.) So compare at equal **true** bits, or the smallest groups win by paying more. (NVFP4 has
# one float32 more for each tensor. Notebooks 04 and 05 explain NF4 and FP4.)
#
# ## 7. Drag it
# Left: the squared error of each block of weights; 0 dB is the mean of all blocks. Right: output error
# against true bits (float32 scales), a line for each group size. **Predict first:**
#
# 1. Group from *tensor* to *row*: does the error stay even, or gather in stripes? Which?
# 2. From 128 to 32 to 8: which way does the blue point move?
# 3. One bit more: by how much does the error fall? (01 said 6 dB.)
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_groups

explorer = explore_groups(weight, x, bits=4, group=128)
explorer
# %% [markdown]
# **What you saw.** One scale: the same step, so about the same error, everywhere. A scale a row: stripes. There is
# less error in rows of small weights; what is left sits in rows with a large one. Groups cut the stripes into
# dashes: a large weight now spoils its own group only. On the right the lines run side by side, about 6 dB (a
# factor of 4) down from bit to bit. And small groups lie to the right of the others: the price of their float32
# scales.
# %% tags=["nbval-ignore-output"]
of_row = {kind: (weight - four[kind].dequantize()).square().mean(1) for kind in ("tensor", "row")}
uneven = {kind: round((e.max() / e.min()).item(), 1) for kind, e in of_row.items()}
claims = ("tensor", uneven["tensor"] < 1.5, 1.2), ("row", uneven["row"] > 4, 8.2)
for kind, fits, bundled in claims:
    found(fits,
          f"a scale a {kind}: the worst row has {uneven[kind]} times the error of the best "
          f"(bundled: {bundled})")
less = points["float32"][4, "128"][1] / points["float32"][5, "128"][1]
found(3.5 < less < 5,
      f"one more bit divides the error of the output by {less:.1f} (the bundled model: 4.2)")
f"error of the worst row over the best: {uneven}; one more bit divides it by {less:.1f}"
# %% [markdown]
# ## 8. The whole model, weighed
# Linear layers get 4 bits in groups of 128. Everything else (embedding (嵌入), norms) stays in 16 bits. We
# count the bytes by part, then round the model, save it, and weigh the file. It begins with a header of
# plain text: names, shapes, settings. The rest should be what we counted.
#
# **Predict:** by what factor will it be smaller than the 16-bit model? Four? And where do its bytes sit?
# %%
import math
from collections import Counter

def count_bytes(bits, group_size):
    parts = Counter()
    for layer in layers.values():
        rows, columns = weight_of(layer).shape
        groups = rows * math.ceil(columns / group_size)
        parts["linear weights"] += math.ceil(rows * columns * bits / 8)
        parts["scales"] += 4 * groups
        parts["zero points"] += math.ceil(groups * bits / 8)
    return parts
# %%
rest = Counter()
for name, p in model.named_parameters():
    if name.removesuffix(".weight") not in layers:
        kind = {1: "norms", 2: "embedding"}.get(p.ndim, "experts")  # biases count with the norms
        rest[kind] += 2 * p.numel()
parts, weights = count_bytes(4, 128) + rest, sum(p.numel() for p in model.parameters())
predicted = parts.total()
assert predicted > weights / 2
print(*(f"{part:14}{size:>10,} bytes" for part, size in parts.items()), sep="\n")
f"{predicted:,} bytes for {weights:,} weights: {8 * predicted / weights:.2f} bits each"
# %%
import tempfile
from pathlib import Path

from quantlab.lm import load_quantized, quantize_weights, save_quantized

def nearest(bits, granularity):
    return quantize_weights(
        model, lambda w: quantize_tensor(w, bits=bits, granularity=granularity, symmetric=False))

new, qtensors = nearest(4, PerGroup(128))
# %%
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
save_quantized(folder / "four", new, qtensors, tokenizer)
on_disk = (folder / "four" / "quantized.safetensors").read_bytes()
header = 8 + int.from_bytes(on_disk[:8], "little")  # the first 8 bytes say how long the header is
stored = len(on_disk) - header
assert stored >= predicted
found(stored == predicted,
      f"the file's {stored:,} bytes beside the header are the {predicted:,} that we counted")
loaded, _ = load_quantized(folder / "four")
assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), new.parameters(), strict=True))
(f"{len(on_disk):,} bytes, {header:,} of them header: {2 * weights / len(on_disk):.2f} times "
 "smaller than in 16 bits")
# %%
linear = sum(weight_of(layer).numel() for layer in layers.values())
models = {
    "16 bits": Counter({"linear weights": 2 * linear}),
    **{f"{bits} bits": count_bytes(bits, 128) for bits in (8, 4, 3)},
}
places = ("linear weights", "scales", "zero points", "embedding", "norms")
bars = {
    word: {place: (its + rest)[place] / 1e6 for place in places} for word, its in models.items()
}
plt.figure(figsize=(7, 2.6), layout="constrained")
plot_bars(bars, ylabel="megabytes")
plt.show()
shares = [parts["embedding"] / size for size in (2 * weights, predicted)]
assert shares[0] < shares[1]
f"the embedding is {shares[0]:.0%} of the 16-bit model and {shares[1]:.0%} of the 4-bit one"
# %% [markdown]
# The file is as counted, to the byte (unless 16 bits cannot hold what is not quantized: then it is saved in 32
# bits); and loaded from these bytes alone, every weight is equal. But the factor is 2.67, not 4: the embedding
# does not shrink, so its share grows. (In a large model it is small from the start: see "Open" in section 10.)
#
# ### Myth: "I rounded the weights, so the model is smaller"
# `new` holds rounded weights, as floats: it is *fake-quantized* (伪量化). How large is its file, saved without
# the codes?
# %%
guess = predict(
    "The fake-quantized model's file, beside that in 16 bits, is ...",
    ["smaller", "as large", "larger"],
)
# %%
in_memory = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in (model, new)]
assert in_memory[0] == in_memory[1]
fake = save_quantized(folder / "fake", new, {}, tokenizer)
temporary.cleanup()
larger = fake / 2 / weights
found(larger > 1.5,
      f"the file is {larger:.2f} times as large as in 16 bits (the bundled model: 1.86)")
print(f"in memory {in_memory[1] / in_memory[0]:.2f} of the float model, as a file {larger:.2f} of "
      "16 bits")
guess.reveal("larger" if larger > 1.05 else "as large")
# %% [markdown]
# Larger: scale × code does not fit into 16 bits without loss, so 32 are kept. (Cut to 16 bits it would be
# as large as before.) Nothing was packed. Fake-quantized models are for measuring *error*, and say nothing
# about size or speed.
#
# ## 9. The ledger
# KL says how far the model's answers are from the float model's (0: not at all; notebook 06). **Predict**
# its order: 4 bits in groups of 32, of 128, per row, per tensor, per tensor and clipped; 3 bits in groups
# of 128; and 5 bits a row, which takes about as many *true* bits as 4 bits in groups of 32.
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

from quantlab import ledger

tokens = token_stream(tokenizer, load_text("eval"))[: budget(model, 4096)]
table = [ledger.measure(model, model, tokens, method="float")]

def enter(rounded, qtensors, bits, group, method="rtn"):
    table.append(
        ledger.measure(
            model, rounded, tokens, method=method, bits=bits, group=group, qtensors=qtensors
        )
    )
    ledger.append(table[-1])

jobs = (4, "32"), (4, "128"), (4, "row"), (4, "tensor"), (3, "128"), (5, "row")
for bits, kind in tqdm(jobs, leave=False):
    enter(*nearest(bits, kinds[kind]), bits, kind)
enter(*quantize_weights(model, clipped), 4, "tensor", "rtn clipped")
ledger.Table(table)
# %% tags=["nbval-ignore-output"]
row = {(r.method, r.bits, r.group): r for r in table}
kinds_in_order = (4, "32"), (4, "128"), (4, "row"), (4, "tensor"), (3, "128")
order = [row["rtn", *key].kl for key in kinds_in_order]
found(order == sorted(order), "KL grows from groups of 32 to 128, row, tensor and 3 bits")
clip = row["rtn clipped", 4, "tensor"].kl / row["rtn", 4, "tensor"].kl
found(clip < 0.5, f"the clip leaves {clip:.2f} of a tensor's KL (the bundled model: 0.35)")
five, small = row["rtn", 5, "row"], row["rtn", 4, "32"]
fifth = five.kl / small.kl
found(fifth < 0.6,
      f"5 bits a row leave {fifth:.2f} of the KL of 4 bits in groups of 32 (the bundled model: "
      "0.44)")
found(five.bytes < small.bytes,
      f"5 bits a row ({five.bytes:,} bytes) take no more than those ({small.bytes:,})")
halved = small.bytes - 2 * linear // 32  # two bytes less for each scale
found(halved < 0.97 * five.bytes,
      "with 16-bit scales groups of 32 would take fewer bytes than 5 bits a row")
print(f"5 bits a row: {fifth:.2f} of the KL of 4 bits in groups of 32")
(f"with 16-bit scales, 4 bits in groups of 32 would be {1 - halved / five.bytes:.0%} smaller than "
 "5 bits a row")
# %% [markdown]
# The picture of section 3 for the whole model. **With float32 scales**, 5 bits a row take no more bytes
# than 4 bits in groups of 32, and leave 0.44 of the KL here; with 16-bit scales the small groups would be
# cheaper, and you choose between bytes and KL. One scale a tensor is worst of all the 4-bit rows by far, unless
# it is clipped. (Perplexity blurs some of this: look at its error bars.)
#
# **The control that must fail.** Somebody writes the scales of each layer row by row and reads them group by
# group: the same codes, the same scales, *the same bytes*. **Predict:** where in the table does it land?
# %% tags=["nbval-ignore-output"]
def mixed_up(w):
    q = quantize_tensor(w, bits=4, granularity=PerGroup(128), symmetric=False)
    scale, zero_point = (t.T.reshape(t.shape) for t in (q.qparams.scale, q.qparams.zero_point))
    return replace(q, qparams=replace(q.qparams, scale=scale, zero_point=zero_point))

wrong, its_qtensors = quantize_weights(model, mixed_up)
bad = ledger.measure(
    model, wrong, tokens, method="mixed up", bits=4, group="128", qtensors=its_qtensors
)
assert bad.bytes == row["rtn", 4, "128"].bytes
found(bad.kl > 5 * row["rtn", 4, "tensor"].kl,
      f"KL ({bad.kl:.2f}) is more than 5 times that of a scale a tensor")
f"KL {bad.kl:.2f} instead of {row['rtn', 4, '128'].kl:.3f}"
# %% [markdown]
# It is far worse than the worst of them, with the same bytes. So size and bits per weight are not enough: load
# what you saved, and measure.
#
# ## 10. Exercises
# ### Exercise 3.5: three bits (about 15 minutes)
# The way back from the stream of section 5. `packed` is a row of uint8, low bits first; return the first
# `count` codes of 3 bits in it, whole numbers from 0 to 7. (`packed` may hold more bits than that.) A loop
# will do; the library's way without one is in `quantlab/packing.py`.
# %% tags=["exercise"]
def my_unpack3(packed, count):
    raise NotImplementedError
# %%
check("3.5", my_unpack3)
# %% [markdown]
# ### Exercise 3.6: fit the budget (about 20 minutes)
# For the practice layer below: an **output error of at most 0.0055 at no more than 5.2 true bits** per
# weight (float32 scales, as `quantize_tensor` counts them; min-max grids). Return the settings, a dict:
# `bits` from 2 to 8, `group_size` (a number, or None for a whole row), `symmetric` (True or False).
# %% tags=["exercise"]
from quantlab.exercises.material import layer_in_runs

practice_weight, practice_x = layer_in_runs()

def my_settings():
    raise NotImplementedError  # return {"bits": ..., "group_size": ..., "symmetric": ...}
# %%
check("3.6", my_settings)
# %% [markdown]
# ### Gain (about 30 minutes, no check)
# The **gain** of a layer, ‖XWᵀ‖² / (‖X‖²‖W‖² / inputs), says how strongly it answers what it reads. At 4
# bits, in groups of 128, plot for all layers the error of the output against (error of the weights / gain).
# What does that say about rounding errors?
#
# ### Open
# Quantize the embedding too, per row. What happens to KL? And count a Llama of 32 blocks, width 4096, MLP
# 11008, 32,000 tokens: why is its "4 bits" nearer to 4?
#
# ## 11. What breaks next
# Within a group, the grid points are spread evenly from the least weight to the largest. **Predict:** are the
# weights spread evenly, too?
# %% tags=["nbval-ignore-output"]
codes = four["128"].codes.int() - four["128"].qparams.qmin
used = torch.bincount(codes.flatten(), minlength=16) / codes.numel()
plt.figure(figsize=(7, 2.2), layout="constrained")
plot_bars({"used": dict(enumerate(used.tolist()))}, ylabel="share of the weights", color=QUANTIZED)
plt.axhline(1 / 16, color=FLOAT, linestyle="--")
plt.xlabel("code; dashed: if all were used alike")
plt.show()
outer, inner = used[[0, 1, 2, 13, 14, 15]].sum().item(), used[5:11].sum().item()
found(2 * outer < inner,
      f"the outer codes ({outer:.0%}) have less than half of those in the middle ({inner:.0%})")
f"the six outer codes: {outer:.0%} of the weights; the six in the middle: {inner:.0%}"
# %% [markdown]
# The six codes in the middle hold 68 % of the weights, the six outer ones 10 %. Why should the steps be equal?
#
# ### Recap
# - Granularity says which weights share a scale. A scale a row is nearly free; groups lower the error further
#   and cost (scale + zero point) / group size.
# - Groups of 32, or one more bit? With float32 scales the bit; with 16-bit scales both are on the front.
# - Codes are packed as one stream of bits. Rounded floats are no smaller.
# - The "4-bit" formats in use take up to 4½ bits per weight; a model takes more, since embeddings stay. Count,
#   then weigh.
# - Errors of weights need not show a wrong axis: try a layer that is not square.
#
# The last cell says how often you were right.
#
# [04 NF4 and other codebooks](04_nf4_and_codebooks.ipynb) lets go of equal steps.
# %%
predictions.score()
