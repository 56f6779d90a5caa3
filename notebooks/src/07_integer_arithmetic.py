# %% [markdown]
# # 07 Integer arithmetic for real
# *60 minutes, and 45 more for section 13; the computer needs about one. You need notebooks 01, 03 and 06.*
#
# 真正的整数运算. *Does it compute in int8, or dequantize first? Why is my quantized model slower?* Learners ask
# nothing more often. At the end you can
#
# - write a product of integer codes, with its four terms, and say what each costs;
# - say which scales factor out of a product, and which do not;
# - count how many terms an **accumulator** (累加器) holds, and show on two numbers why int8 differs between CPUs;
# - run one layer in three ways that give the same numbers, time them, and find where int8 pays on *your* CPU.
# %% [markdown]
# ### Recall
# Answer before you open them.
#
# 1. Why is KL a sharper tool than two perplexities?
# 2. Which five things must be alike before two perplexities may be compared?
# 3. How do you catch a model that was calibrated on the test text?
#
# <details><summary>Answers</summary>
# 1. It looks at every token that could come, on the same text, so gains and losses cannot cancel. 2. Text,
#    tokenizer, window, stride, begin token. 3. Compare its KL on that text with its KL on others, each beside a model
#    that has read nothing.</details>
#
# ## 1. What broke
# Nothing, and that is the trouble. The 8-bit model of notebook 06 was nearly perfect. Was it smaller? Was
# it faster? Look at one of its layers:
# %% tags=["nbval-ignore-output"]
import torch

from quantlab import ledger
from quantlab.checks import check, found, hint, solution
from quantlab.lm import (budget, layers_of_role, linear_layers, load_lm, load_text, quantize_lm,
    token_stream, weight_of)

model, tokenizer = load_lm()
tokens = token_stream(tokenizer, load_text("eval"))
tokens = tokens[: budget(model, 4096)]  # all 4096, or fewer on a larger model
eight, report = quantize_lm(model, method="rtn", bits=8, progress=False)
name, original = list(layers_of_role(model, "up").items())[0]  # a layer of the first block
rounded = weight_of(linear_layers(eight)[name])
took = ledger.latency(model, eight, tokens)
assert rounded.dtype == weight_of(original).dtype
print(f"{name}: {rounded.dtype}, {rounded.nbytes:,} bytes, as before")
f"time to decode {took.decode:.2f} × the float's"
# %% [markdown]
# It holds float32 numbers that happen to lie on a grid, and multiplies them like any others. That is **fake
# quantization** (伪量化): right for measuring damage, useless for a small or fast model. Two ways are real:
#
# - **weight-only** (仅权重量化): store packed codes; in every call make floats of them and multiply those;
# - **integer** (整数运算): quantize the input too, multiply codes by codes, scale once at the end.
#
# We do both by hand, and then measure.
#
# ## 2. By hand: two tokens, two rows of weights
# The first matrix holds codes of two tokens with two features, the second those of two rows of weights.
# **Predict** the real numbers that they stand for, s·(q − z), and the sums of products of the q − z alone.
# %%
qx, zx, sx = torch.tensor([[3, 1], [0, 2]]), 1, 0.5
qw, zw, sw = torch.tensor([[2, -4], [1, 3]]), 1, 0.25
x, w = sx * (qx - zx), sw * (qw - zw)
sums = (qx - zx) @ (qw - zw).T
assert torch.equal(sx * sw * sums, x @ w.T)
print(f"x {x.tolist()}, w {w.tolist()}, x @ w.T {(x @ w.T).tolist()}")
f"sums without scales {sums.tolist()}, times {sx * sw}: the same"
# %% [markdown]
# The scales are the same for all numbers of a matrix, so they can wait until the sums are done:
#
# $$\sum_k s_x (q_x - z_x)\; s_w (q_w - z_w) \;=\; s_x s_w \sum_k (q_x - z_x)(q_w - z_w)$$
#
# One float multiplication for a whole sum. But q − z of an 8-bit code lies between −255 and 255, and the fast
# instructions of a CPU want 8-bit numbers. So multiply out:
#
# $$\sum_k (q_x - z_x)(q_w - z_w) = \underbrace{\sum q_x q_w}_{1} - \underbrace{z_x \sum q_w}_{2} -
# \underbrace{z_w \sum q_x}_{3} + \underbrace{K z_x z_w}_{4}$$
#
# Term 1 multiplies plain codes. The others are the **cross terms** (交叉项) of the zero points
# (Jacob et al. 2018, eq. 7).
#
# ### Exercise 7.1: the integer product (about 10 minutes)
# `x_codes` are uint8 (tokens, K), `w_codes` int8 (rows, K), `x_zero` and `w_zero` are whole numbers. Return all sums
# (tokens, rows), exact, for any codes, zero points and K; in a type that holds them.
# %% tags=["exercise"]
def my_int_product(x_codes, x_zero, w_codes, w_zero):
    raise NotImplementedError
# %%
check("7.1", my_int_product)
# %% [markdown]
# The library's is `int_linear` (`quantlab/linear/int8.py`); it is the *definition* that everything faster is compared
# with. Here are the four terms of the example, the first one for each token and row, the second for each row, the
# third for each token (`[:, None]` makes a column of it), the last for all:
# %%
from quantlab.linear import int_linear

one, two = qx @ qw.T, zx * qw.sum(1)
three, four = zw * qx.sum(1), 2 * zx * zw
assert torch.equal(one - two - three[:, None] + four, sums)
assert int_linear(qx, zx, qw, zw).tolist() == sums.tolist()
one.tolist(), two.tolist(), three.tolist(), four
# %% [markdown]
# **Predict.** The weights stay; the input is new in each call. Which terms are known before it comes? Which vanish
# with symmetric weights, zw = 0?
#
# <details><summary>Answer</summary>
# Σ qw is known, so terms 2 and 4 wait for zx alone, and for nothing if zx was fixed beforehand
# (<i>static</i>, notebook 08). Term 3 sums each token's codes, in every call. With zw = 0 terms 3 and 4 vanish, and
# term 3 was the one that had to wait. So weights are symmetric; activations need not be.</details>
#
# And a **bias** (偏置)? Rounded to whole units of sx·sw, in which the sums count, it is what the accumulator starts
# with instead of 0. (Our layers add the float bias after scaling, which suits dynamic scales too.)
#
# ## 3. What is equal, and what is not
# Some texts write W·X **=** s·s·(Wq·Xq). Of the three products below two are equal, up to float rounding.
# %% tags=["nbval-ignore-output"]
from quantlab import fake_quantize, quantize
from quantlab.linear import DynamicInt8Linear
from quantlab.lm import capture_inputs
from quantlab.predictions import predict, score

three_products = ["the float product", "that of the rounded floats", "the scaled integer sums"]
odd_guess = predict("Which one is the odd one out?", three_products)

def relative(a, b):
    return ((a - b).norm() / b.norm()).item()

x = capture_inputs(model, tokens[:256], [name])[name]  # what it reads, (tokens, K)
layer = torch.nn.Linear(x.shape[1], len(weight_of(original)), bias=False).requires_grad_(False)
layer.weight.copy_(weight_of(original))
int8 = DynamicInt8Linear.from_linear(layer)
qp = int8.input_qparams(x)
codes, w_hat = quantize(x, qp), int8.dequantized_weight()
sums = int_linear(codes, qp.zero_point, int8.codes)
unit = qp.scale * int8.weight_scale  # of the sums, one for each row
integers, rounded, exact = unit * sums, fake_quantize(x, qp) @ w_hat.T, layer(x)
# %% tags=["nbval-ignore-output"]
moved, of_outputs = relative(integers, exact), (unit.max() / exact.abs().max()).item()
assert relative(integers, rounded) < 1e-5
found(1e-3 < moved < 0.1, f"8 bits move the outputs by {moved:.1%}, below 10 %")
print(f"integers and rounded floats: {relative(integers, rounded):.0e}, and floats: {moved:.1%}")
print(f"the unit of the sums is at most {of_outputs:.0e} of the largest output")
odd_guess.reveal("the float product")
# %% [markdown]
# Rounding makes the error; the integers add nothing to it. So W·X **≈** s·s·(Wq·Xq), and only the product of the
# *dequantized* numbers is equal to it.
#
# That layer has one scale for the input and **one for each row** of the weight, and both factored out.
# Do all scales? Try one for each *input channel*, s₁ = 1 and s₂ = 10, that is, one inside the sum:
# %%
s, weights = torch.tensor([1.0, 10.0]), torch.tensor([2.0, 2.0])
inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # codes of two inputs
same, real = inputs @ weights, (inputs * s) @ weights
assert len(same.unique()) < len(real.unique())
same.tolist(), real.tolist()
# %% [markdown]
# One integer sum, and two right answers, 2 and 20: it has forgotten which channel it came from. Scales that are the
# same *along the sum* factor out, others do not:
#
# - one for each tensor, token (row of X) or output row of W: yes;
# - one for each group of g inputs: only by g, as K/g short sums, each scaled and added in float;
# - one for each input channel: no.
#
# ## 4. How wide must a sum be?
# A product of two 8-bit codes fits in 16 bits. A sum of K of them may not.
#
# ### Exercise 7.2: how many terms fit (about 5 minutes)
# Unsigned codes of `x_bits`, signed ones of `w_bits` (2 bits or more each, all codes in use, the most negative one
# too), an accumulator with a sign of `accumulator_bits`. Return the largest K for which no sum of K products can
# overflow; 0 if not even one product fits.
# %% tags=["exercise"]
def my_largest_k(x_bits, w_bits, accumulator_bits):
    raise NotImplementedError
# %%
check("7.2", my_largest_k)
# %% [markdown]
# And a float32 accumulator? It goes to 10³⁸; but what is 2²⁴ + 1 in float32? So after how many terms *may* a sum of
# codes go wrong there? (The cell after the picture tells.)
#
# Sums of real data may be much smaller than the largest ones. Here are those of our layer, each of K terms (256 in
# the bundled model).
#
# **Predict first**, then drag:
#
# 1. K products of any size: how many bits must their sum have? How many do the *real* sums need?
# 2. One bit less than that: how bad is the output, if the sum **wraps** (回绕, as `.to(int16)` does)?
# 3. At 16 bits: is it better to wrap or to **saturate** (饱和, stop at the end)?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_accumulator

explorer = explore_accumulator(int8, x, bits=17)
explorer
# %% tags=["nbval-ignore-output"]
largest = 255 * 128  # of a product u8 · s8, in size
terms = {f"int{bits}": (2 ** (bits - 1) - 1) // largest for bits in (8, 16, 32)} | {
    "float32": 2**24 // largest}
assert torch.tensor(2.0**24) + 1 == 2**24

def with_accumulator(bits, wrap):
    half = 2 ** (bits - 1)
    kept = (sums + half) % (2 * half) - half if wrap else sums.clamp(-half, half - 1)
    return relative(kept * int8.weight_scale, sums * int8.weight_scale)

needed = sums.abs().max().item().bit_length() + 1
wrapped, saturated = (with_accumulator(16, wrap) for wrap in (True, False))
assert with_accumulator(needed, True) == 0
found(saturated > 0, f"16 bits are too few here: saturating costs {saturated:.0%}")
found(saturated < wrapped, "and wrapping more")
print(f"terms of any size that fit: {terms}; 256 need {(256 * largest).bit_length() + 1} bits")
f"needed here {needed} bits; error with 16 bits: wrapped {wrapped:.0%}, saturated {saturated:.0%}"
# %% [markdown]
# **What you saw.** int32 holds 65,793 terms of any size, int16 one, int8 none. float32 has no odd numbers beyond 2²⁴:
# from 515 terms on a sum *may* lose its last digits. 256 products of any size need 24 bits (more products, more
# bits); the real sums need fewer, since products of both signs cancel. A sum that wraps lands on the *other side*:
# few wrapped sums ruin a layer. Saturation is milder, and both are wrong. 32 bits are not a luxury.
#
# ## 5. Two numbers on which CPUs disagree
# x86 CPUs before **VNNI** (a set of instructions) multiply u8 by s8 and add each two *neighbours* in 16 bits,
# which saturate; only these pairs go into 32 bits. **Predict**: 255·127 + 255·127 = ?
# %%
pair = torch.tensor([255 * 127, 255 * 127])
right, got = pair.sum().item(), pair.sum().clamp(-(2**15), 2**15 - 1).item()
assert (right, got) == (64770, 32767)
f"right {right}, got {got}: {got / right:.3f} of it"
# %% [markdown]
# ### Exercise 7.3: a dot product that saturates (about 10 minutes)
# Emulate it for one row: `x_codes` uint8 (n,) and `w_codes` int8 (n,), n even. Neighbours 0 and 1, 2 and 3, … make
# pairs, each of which stops at the ends of an int16; the pairs are added exactly. Return one whole number.
# %% tags=["exercise"]
def my_saturating_dot(x_codes, w_codes):
    raise NotImplementedError  # return a number
# %%
check("7.3", my_saturating_dot)
# %% [markdown]
# Now the whole layer. Pairs as large as that are rare in real data. **Predict**: if one pair in a few
# thousand saturates, is the error smaller than that of quantizing, or larger?
# %% tags=["nbval-ignore-output"]
def saturating_linear(x_codes, w_codes):
    sums, lost = [], 0
    for token in x_codes:
        pairs = (token * w_codes.int()).unflatten(1, (-1, 2)).sum(2)
        kept = pairs.clamp(-(2**15), 2**15 - 1)
        sums.append(kept.sum(1).int())
        lost += (kept != pairs).float().mean().item() / len(x_codes)
    return torch.stack(sums), lost

saturated, lost = saturating_linear(codes, int8.codes)
correct = int_linear(codes, 0, int8.codes)
shift = qp.zero_point * int8.codes.sum(1)
damage = relative((saturated - shift) * int8.weight_scale, (correct - shift) * int8.weight_scale)
found(0 < lost < 0.01, f"few pairs saturate: {lost:.3%}")
found(damage > 0.01, f"and cost more than 1 %: {damage:.1%}")
f"error from that {damage:.1%}, from quantizing {relative(integers, exact):.1%}"
# %% [markdown]
# Believe no emulation that was not held against the real thing. torch ships several int8 kernels; our layers call
# oneDNN's. On a CPU with VNNI it is exact; told to do without (by an environment variable, in a process of its own),
# it takes the old instructions. `kernel_sums` hands it our codes in such a process.
#
# There is a remedy: inputs of **7 bits**, codes 0 … 127. A pair is then at most 2·127·128 = 32,512, which fits.
#
# **Predict**: how many of the layer's sums are those of our emulation? And by which factor does the lost bit raise
# the error of quantizing?
# %% tags=["nbval-ignore-output"]
from quantlab.exercises.material import kernel_sums
from quantlab.linear import kernel_status

if kernel_status() == "missing":
    print("this torch has no such kernel: nothing was compared")
else:
    status, old = kernel_sums(codes, int8.codes, ONEDNN_MAX_CPU_ISA="AVX2")
    equal = (old == (saturated if status == "saturates" else correct)).double().mean().item()
    found(equal == 1, f"a kernel said to be {status!r} gives the expected sums", of="machine")
    print(f"kernel_status(): {status}; sums that are as expected of that: {equal:.0%}")
    if status == "exact":
        print("(The setting means nothing to this CPU: it is no x86.)")
seven = DynamicInt8Linear.from_linear(layer, activation_bits=7)
few = quantize(x, seven.input_qparams(x))  # of these codes no pair saturates:
assert torch.equal(saturating_linear(few, int8.codes)[0], int_linear(few, 0, int8.codes))
errors = [relative(made(x), exact) for made in (int8, seven)]
times = errors[1] / errors[0]
found(1.2 < times < 2.5, f"7 bits make {times:.1f} times the error, 1.2 to 2.5 times")
f"error with 8 bits {errors[0]:.1%}, with 7 bits {errors[1]:.1%}: {times:.1f} times; none saturates"
# %% [markdown]
# **Myth: "int8 gives the same result on any CPU."** Integers are exact, so it seems safe to say. One
# model, one input, two CPUs, and the outputs can differ by more than quantization costs. Remedies, all in use:
#
# - 7 bits for one side: `reduce_range` in PyTorch and ONNX Runtime does that;
# - other instructions that widen to 16 bits first: slower, exact;
# - VNNI, AMX, ARM's dot products: they add in 32 bits.
#
# Our layers ask the kernel first (`kernel_status()` multiplies 255 by 127) and use it only where it is exact;
# `int8.kernel` says which way they go here.
#
# ## 6. Three ways, the same numbers
# Now the three ways of section 1, on the real layer with one set of codes. **Predict** for each pair: equal
# to the last bit, or up to float rounding?
# %% tags=["nbval-ignore-output"]
import torch.nn.functional as F

from quantlab import PerAxis
from quantlab.linear import WeightOnlyLinear

packed = WeightOnlyLinear.from_linear(layer, bits=8, granularity=PerAxis(0), symmetric=True)
x_hat = fake_quantize(x, qp)
fake = F.linear(x_hat, w_hat)
assert torch.equal(packed.weight, w_hat)  # packed bytes: to the last bit
assert relative(packed(x_hat), fake) < 1e-6
from_kernel = torch.round(int8(x) / (qp.scale * int8.weight_scale)).int()
# The kernel's sums, read back from its float outputs, which have 21 safe bits.
assert (from_kernel - sums).abs().max() <= sums.abs().max() / 2**21
assert relative(int8(x), int8.exact(x)) < 1e-6  # floats: rounding
assert relative(fake, int8(x)) < 1e-5
apart = relative(fake, int8(x))
f"kernel: {int8.kernel} ({kernel_status()}); fake and integer outputs differ by {apart:.0e}"
# %% [markdown]
# Packed bytes give back the very weight, so the products are the same. The kernel's sums are *equal
# integers*. Fake quantization adds the same products in float, and differs by its rounding. So everything
# that earlier notebooks measured with fake quantization holds for the real thing.
#
# ## 7. Time all three
# Same numbers; not the same time. A layer of 2048 × 2048 reads **one** token (as when a model writes) and 256 (as
# when it reads a prompt). **Predict**: how do the four ways rank? We take the least of several calls, three in a row
# each time: a weight that fits into the CPU's **cache** (高速缓存) is there when the second call comes.
# %% tags=["nbval-ignore-output"]
import os
import time

speeds = ["faster than float32", "slower than float32"]
unpack_guess = predict("Weight-only that unpacks in every call, with one token, is", speeds)
torch.set_num_threads(1)  # one core; try more at the end
# The time that our thread holds the core, so that other programs do not count.
# On Windows that clock ticks too slowly.
clock = time.perf_counter if os.name == "nt" else time.thread_time

def best(calls, rounds=3):
    """Seconds of one call of each: the least of 3 in a row, taken in turns, some rounds."""
    least = dict.fromkeys(calls, float("inf"))
    for way, call in list(calls.items()) * rounds:
        for _ in range(3):
            start = clock()
            call()
            least[way] = min(least[way], clock() - start)
    return least
# %% tags=["nbval-ignore-output"]
from functools import partial

from quantlab import MinMax
from quantlab.linear import StaticInt8Linear

bits = 8 if kernel_status() == "exact" else 7  # where 8 would saturate

def ways_of(K, N, x):
    linear = torch.nn.Linear(K, N, bias=False).requires_grad_(False)
    dynamic = DynamicInt8Linear.from_linear(linear, activation_bits=bits)
    static = StaticInt8Linear.from_linear(linear, MinMax().update(x), activation_bits=bits)
    small = WeightOnlyLinear.from_linear(linear, bits=8, granularity=PerAxis(0), symmetric=True)
    return {"float32": linear, "int8 dynamic": dynamic, "int8 static": static, "weight-only": small}
# %% tags=["nbval-ignore-output"]
x_many = torch.randn(256, 2048, generator=torch.Generator().manual_seed(0))
ways = ways_of(2048, 2048, x_many)
int8_large, rounded = ways["int8 dynamic"], ways["int8 dynamic"].dequantized_weight()

def times_with(x):  # of the four, and of fake quantization
    calls = {way: partial(layer, x) for way, layer in ways.items()}
    return best(
        calls | {"fake": lambda: F.linear(fake_quantize(x, int8_large.input_qparams(x)), rounded)})

taken = {M: times_with(x_many[:M].contiguous()) for M in (1, 256)}
stored = {way: getattr(layer, "nbytes", rounded.nbytes) for way, layer in ways.items()} | {
    "fake": rounded.nbytes}
for way, size in stored.items():
    told = "".join(f"  M = {M}: {t[way] * 1e6:8,.0f} µs" for M, t in taken.items())
    print(f"{way:13}{size / 1e6:6.2f} MB{told}")
assert int8_large.nbytes < 0.26 * rounded.nbytes
slower = taken[1]["weight-only"] > taken[1]["float32"]
found(slower, "unpacking in every call is slower than float32", of="machine")
unpack_guess.reveal(speeds[slower])
# %% [markdown]
# Fake quantization cannot be faster: it is the float product and more. Weight-only is as small as int8 and, done
# like this, *far slower* than float32: each call unpacks, shifts and scales the whole weight, in several passes
# over memory, to use it once.
#
# Is dequantizing the trouble, or where it is done? torch has a **fused** (融合) kernel that makes floats *on the
# way*, a few weights at a time, and does not write them to memory (it takes float32 as well, but is made for
# bfloat16, hence coarser):
# %% tags=["nbval-ignore-output"]
scale = int8_large.weight_scale.bfloat16()
fused = partial(torch._weight_int8pack_mm, x_many[:1].bfloat16(), int8_large.codes, scale)
assert relative(fused().float(), x_many[:1] @ rounded.T) < 0.02
times = best({"float32": partial(ways["float32"], x_many[:1]), "fused weight-only": fused})
{way: f"{1e6 * t:,.0f} µs" for way, t in times.items()}
# %% [markdown]
# *Does it dequantize first?* Weight-only as we have it does; what matters is whether the floats go through memory.
# With one token and a fused kernel made for your CPU it can win. (There are other ways: llama.cpp's kernels round the
# input as well and multiply integers, and some look products up in tables.)
#
# ## 8. Find the crossover on your CPU
# Four ways, five numbers of tokens M, five sizes of K and of N: all measured now, on one core. It takes a
# moment.
#
# **Predict**: for which M and K is int8 slower than float32?
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

Ms, sizes = (1, 4, 16, 64, 256), (256, 512, 768, 1024, 2048)
seconds, nbytes = {}, {}
for K, N in tqdm([(K, N) for K in sizes for N in sizes], desc="measuring", leave=False):
    x_all = torch.randn(256, K, generator=torch.Generator().manual_seed(0))
    ways = ways_of(K, N, x_all)
    nbytes |= {(way, K, N): getattr(layer, "nbytes", 4 * K * N) for way, layer in ways.items()}
    for M in Ms:
        few = x_all[:M].contiguous()
        taken = best({way: partial(layer, few) for way, layer in ways.items()})
        seconds |= {(way, M, K, N): t for way, t in taken.items()}
# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

def speed_up(way, M, K):
    return seconds["float32", M, K, K] / seconds[way, M, K, K]

fig, axes = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained", sharey=True)
for ax, way in zip(axes, ("int8 dynamic", "weight-only"), strict=True):
    table = torch.tensor([[speed_up(way, M, K) for K in sizes] for M in Ms])
    image = ax.imshow(table.log2(), cmap="PuOr_r", vmin=-3, vmax=3, origin="lower", aspect="auto")
    for m, k in [(m, k) for m in range(5) for k in range(5)]:
        value, color = table[m, k].item(), "white" if abs(table[m, k].log2()) > 1.8 else "black"
        ax.text(k, m, f"{value:.2g}", ha="center", va="center", color=color,
            weight="bold" if value > 1 else None)
    ax.set(title=f"{way} over float32", xticks=range(5), xticklabels=sizes, yticks=range(5),
        yticklabels=Ms, xlabel="K = N", ylabel="M, tokens" if ax is axes[0] else None)
bar = fig.colorbar(image, ax=axes, ticks=[-3, -2, -1, 0, 1, 2, 3])
bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
plt.show()
# %% tags=["nbval-ignore-output"]
def pays_from(way, K):  # the least M from which on `way` is the faster one
    return next((M for M in Ms if all(speed_up(way, m, K) > 1 for m in Ms if m >= M)), None)

found(all(speed_up("weight-only", 1, K) < 1 for K in sizes), "weight-only loses with one token",
    of="machine")
for way in ("int8 dynamic", "int8 static", "weight-only"):
    told = ", ".join(f"{K}: M = {pays_from(way, K) or 'never'}" for K in sizes)
    print(f"On this CPU {way} beats float32 from, by K = N:  {told}")
# %% [markdown]
# **Myth: "INT8 is faster."** Numbers above 1 (bold) are gains; a CPU without VNNI or the like may show none for int8.
# Whether int8 gains depends on the kernel *and* on the shape: in small layers the fixed cost of each call eats the
# gain, and dequantizing first loses most with few tokens. Why do gains and losses lie where they lie?
#
# ## 9. Bytes and operations
# Each call has to *move* bytes and to *compute*. The slower of the two sets the time: the **roofline** (屋顶线)
# model.
#
# ### Exercise 7.4: bytes and operations (about 10 minutes)
# A layer with M tokens, K inputs, N outputs. Inputs and outputs are float32, a weight has `weight_bytes`; each
# number is moved once. Count 2·M·K·N operations, a multiplication and an addition for each weight and token.
# `bandwidth` is in bytes a second, `rate` in operations a second. Return two numbers: seconds to move, seconds to
# compute.
# %% tags=["exercise"]
def my_roofline(M, K, N, weight_bytes, bandwidth, rate):
    raise NotImplementedError  # return seconds to move, seconds to compute
# %%
check("7.4", my_roofline)
# %% [markdown]
# **Predict**: how many operations for each byte, with one token and with 256? We measure this CPU's rates:
# reading, computing, and the fixed cost of a call, on a layer of 16 × 16.
# %% tags=["nbval-ignore-output"]
from functools import cache

@cache
def read_rate(nbytes):  # bytes a second: a weight that fits into a cache is read faster
    buffer = torch.ones(nbytes // 4)
    return nbytes / best({"read": buffer.sum})["read"]

def times_of(M, K):
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0))
    return best({way: partial(layer, x) for way, layer in ways_of(K, K, x).items()})

fixed = times_of(1, 16)
rate = {way: 2 * 256 * 1536**2 / t for way, t in times_of(256, 1536).items()}
rate["weight-only"] = rate["float32"]  # the same product, once it has floats
print("reads",
    ", ".join(f"{size} MB at {read_rate(size * 2**20) / 1e9:.0f} GB/s" for size in (1, 16, 256)))
{way: f"{fixed[way] * 1e6:.0f} µs a call, {rate[way] / 1e9:,.0f} billion operations a second"
    for way in rate}
# %% tags=["nbval-ignore-output"]
# Bytes a weight: weight-only is read, written as floats, and read again.
per_weight = {"float32": 4, "int8 dynamic": 1, "int8 static": 1, "weight-only": 1 + 4 + 4}

def parts(way, M, K, N):
    weight, others = K * N * per_weight[way], 4 * M * (K + N)
    return {"fixed cost": fixed[way], "moving bytes": (weight + others) / read_rate(weight),
        "computing": 2 * M * K * N / rate[way]}

def intensity(M, K):  # operations a byte, float32
    return 2 * M * K * K / (4 * K * K + 8 * M * K)

assert all(min(parts(*key).values()) > 0 for key in seconds)  # measures the read rates it lacks
assert intensity(1, 2048) < 0.5
assert intensity(256, 2048) > 64
for way, M in [(way, M) for way in ("float32", "int8 dynamic") for M in (1, 256)]:
    told = ", ".join(f"{part} {1e6 * t:,.0f}" for part, t in parts(way, M, 2048, 2048).items())
    print(f"{way:13} M = {M:3}: {told}, measured {1e6 * seconds[way, M, 2048, 2048]:,.0f} µs")
# %% [markdown]
# With one token a weight is read for a single multiplication and addition: half an operation a byte. The CPU
# waits for memory: **memory-bound** (访存受限). int8 moves a quarter of the bytes, and can win up to four times
# there; more if only the small weight fits into the cache. With 256 tokens it is **compute-bound** (计算受限):
# int8 wins by how many more products its instructions make, with VNNI; without it they may make fewer, and
# then int8 loses. And in front of all stands the fixed cost.
#
# How good is such a model? **Predict** within which factor the largest of the three parts meets the measured time.
# %% tags=["nbval-ignore-output"]
beyond = torch.tensor([seconds[key] / max(parts(*key).values()) for key in seconds])
found(beyond.median() > 1, "most calls take longer than their largest part", of="machine")
least, middle, most = (f(beyond).item() for f in (torch.amin, torch.median, torch.amax))
print(f"measured over largest part: {least:.1f} to {most:.0f}, median {middle:.1f};",
    f"below 1 in {(beyond < 1).float().mean():.0%} of the calls, below 0.8 in "
    f"{(beyond < 0.8).float().mean():.0%}")
# %% [markdown]
# So the roofline is a floor, not a forecast, and only as sharp as our three rates, which were measured once: a few
# calls may come out a little below it. It says which part bounds a call, and how much room there is at most.
#
# ## 10. Drag it
# Left: measured times; dotted, the largest part of the chosen way. Right: the parts. The time should lie at the
# one farthest right, or beyond.
#
# **Predict first**, then drag:
#
# 1. M = 1: K and N from 256 to 2048. Which part of int8 is the largest, first and last? Does it overtake, and when?
# 2. K = N = 2048: M from 1 to 256. Where does *computing* overtake *moving bytes*, for float32, for int8?
# 3. K = 256, N = 768 is a layer of the bundled model. Does int8 pay there, writing (M = 1), reading (M = 256)?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_speed

explorer = explore_speed(seconds, nbytes, parts, shape=(1, 2048, 2048), way="int8 dynamic")
explorer
# %% [markdown]
# **What you saw.** Small layers cost what a call costs, whatever they compute. Larger ones cost their bytes, then,
# with more tokens, their operations. For int8 the mark of the bytes lies further left, and with VNNI that of
# computing too (without it perhaps further right). But its fixed cost lies further right, and that decides in layers
# as small as the bundled model's when it writes. Where the measured bar lies far beyond all marks, the model is too
# simple: passes over the input, page faults, caches.
#
# ## 11. The whole model
# The first rows that really compute in integers: every linear layer a `DynamicInt8Linear`, with one scale for
# the input, and then one for each token. **Predict** two columns: KL, beside 8-bit weights alone (notebook 06);
# and decode, for layers as small as these.
# %% tags=["nbval-ignore-output"]
rows = [ledger.measure(model, model, tokens, method="float")]
rows.append(ledger.measure(model, eight, tokens, method="rtn", bits=8, group="128", report=report))
for per in ("tensor", "token"):
    new, made = quantize_lm(
        model, method="w8a8_dynamic", per=per, activation_bits=bits, progress=False)
    way = f"w8a{bits}_dynamic"
    rows.append(ledger.measure(model, new, tokens, method=way, bits=8, group=per, report=made))
for row in rows:
    ledger.append(row)
kl = [row.kl for row in rows]
assert abs(kl[0]) < 1e-6
found(kl[1] < kl[3], f"weights alone cost least, {kl[1]:.4f}; a scale a token more, {kl[3]:.4f}")
found(2 * kl[3] < kl[2] < 0.1, f"one scale costs {kl[2] / kl[3]:.1f} times that, above 2")
ledger.Table(rows)
# %% [markdown]
# Here the activations cost more than the weights: with one scale for all, the largest token sets the step for
# everyone. A scale for each token mends most of it, and asks nothing of the kernel (exercise 7.5). The bundled model
# is stored in 4,240 kB instead of 7,345. *Prefill* and *decode* are times over the float model's, so more
# than 1 is slower: compare them with the rows M = 256 and M = 1 of the picture in section 8, at K = 256
# (or your model's width).
#
# ## 12. The control that must fail
# Two mistakes. The zero point is left out (terms 2 to 4). And the weight gets one scale for each *input
# channel*, which we factor out all the same, as their mean; the last number is the honest way to use those
# scales, inside the sum.
# %% tags=["nbval-ignore-output"]
from quantlab import quantize_tensor

step = qp.scale * int8.weight_scale
columns = quantize_tensor(layer.weight, bits=8, granularity=PerAxis(1))
outside = qp.scale * columns.qparams.scale.mean() * int_linear(codes, qp.zero_point, columns.codes)
no_zero = step * int_linear(codes, 0, int8.codes)
errors = {"right": relative(int8(x), exact), "no zero point": relative(no_zero, exact),
    "channel scales outside": relative(outside, exact),
    "inside": relative(x_hat @ columns.dequantize().T, exact)}
good = max(errors["right"], errors["inside"])
bad = min(errors["no zero point"], errors["channel scales outside"])
found(good < 0.05, f"the right ways are off by at most {good:.1%}, below 5 %")
found(bad > 5 * good, f"and the wrong ones five times as far, here {bad:.1%}")
{way: f"{error:.1%}" for way, error in errors.items()}
# %% [markdown]
# ## 13. Exercises
# ### Exercise 7.5: a scale for each token (about 15 minutes)
# A kernel takes 8-bit codes `x_codes` (tokens, K), *one* zero point `x_zero`, int8 `w_codes` (rows, K), and knows
# nothing of scales: it returns the whole sums (tokens, rows). Give every token of `x` its own scale all the same,
# with one call; `w_scale` is (rows,). Target: each token's outputs within 0.0075 of the float product's size.
# %% tags=["exercise"]
def my_per_token(x, w_codes, w_scale, kernel):
    raise NotImplementedError  # kernel(x_codes, x_zero, w_codes) -> sums; return (tokens, rows)
# %%
check("7.5", my_per_token)
# %% [markdown]
# **30 minutes.** Weight-only need not be that slow. Its row scales factor out, so the codes need not be multiplied
# before the product: write `x @ int8.codes.float().T * int8.weight_scale`, assert that it equals `packed(x)` to 10⁻⁵,
# and time both with `best`. Which passes over memory are saved?
#
# **Open.** (a) Use all your cores (in section 7 `torch.set_num_threads`, and `time.perf_counter`: the other
# clock sees one thread): which way gains most, and what does the roofline say? (b) Set
# `ONEDNN_MAX_CPU_ISA=AVX2` before you start JupyterLab: which way do the layers go then, and where does the crossover
# move? (c) ONNX Runtime does not ask its kernels. Import `onnx_sums` from `quantlab.exercises.material`: are
# `onnx_sums(codes, int8.codes, 0)` the exact sums, and those of u8 weights, codes + 128 with zero point 128?
#
# ## 14. What breaks next
# "Dynamic" int8 passes over its input in every call, for the smallest and the largest value. Why every time? Fix
# the range once, on the first eight tokens:
# %% tags=["nbval-ignore-output"]
low, high = MinMax().update(x[:8]).min_max()
beyond = ((x < low) | (x > high)).float().mean(1)
assert beyond[:8].max() == 0
found(beyond[8:].max() > 0, "later tokens leave the range of the first eight")
print(f"later tokens with values outside the range: {(beyond[8:] > 0).float().mean():.0%}")
score()
# %% [markdown]
# One pass less, and wrong as soon as an input comes that the range was not made for.
#
# ### Recap
# - Fake quantization measures damage, weight-only saves bytes, integers save time: same numbers, three prices.
# - Scales that are constant along the sum factor out (tensor, token, row). Of the zero points' three cross terms,
#   symmetric weights leave one, its sum known beforehand.
# - Sums of u8 · s8 need 32 bits; float32 is exact to 2²⁴; without VNNI pairs saturate in 16 bits.
# - One token: memory-bound, bytes count. Many: compute-bound, instructions count. Small layers: the call counts.
# - "INT8 is faster", "the same on any CPU": questions to a kernel, not facts. Measure.
#
# Next: [08 Dynamic or static?](08_dynamic_or_static.ipynb)
