# %% [markdown]
# # 18 The cache of keys and values
# *60 minutes, of which the computer needs about two. You need notebooks 03, 06 and 16.*
#
# A model that writes keeps the keys and values of all tokens it has read: the **KV cache** (键值缓存). Weights
# stay as they are; the cache grows with every token and every reader. At the end of this notebook you can
#
# - say how many bytes a cache takes, by a formula and by a meter;
# - quantize keys and values, and say from their pictures which of them wants its ranges along which axis;
# - write the quantizer for a stream of tokens, and give `generate` a cache of few bits;
# - choose bits for keys and values by measured KL, and say what the first tokens have to do with it.
# %% [markdown]
# ### Recall
# 1. Why does a group of 32 weights with its own scale lose less than a row with one?
# 2. The convention of notebook 01 widens every range to hold 0. What does that buy, what does it cost?
# 3. Two models read the same text. Why is their KL a finer measure than the difference of perplexities?
#
# <details><summary>Answers</summary>
# 1. Its range is that of 32 weights, not of all: a smaller step. 2. 0 stays exact; numbers far from 0 get
#    a longer step. 3. Tokens' gains and losses cannot cancel in it.</details>
#
# ## 1. What broke: the memory
# A token is read once. Its key and its value are then asked for by all tokens that follow, in every layer; so
# they are kept. We let the model read a text, and look.
# %%
import matplotlib.pyplot as plt
import torch
from transformers import DynamicCache

from quantlab.checks import check, found, hint, solution
from quantlab.lm import (budget, chosen_model, generate, load_lm, load_text, longest_context,
                         token_stream)

plt.rcParams["figure.figsize"] = 7, 2.8
torch.set_grad_enabled(False)
model, tokenizer = load_lm()
context = min(longest_context(model), 512)
text = token_stream(tokenizer, load_text("eval"))[:context]
# %%
def bytes_of(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

def read_by_parts(model, tokens, **options):  # the float cache, and the meter while it grows
    past, meter = DynamicCache(), {}
    for part in tokens.split(128):
        model(part[None], past_key_values=past, **options)
        meter[past.get_seq_length()] = bytes_of(past)
    return past, meter

past, meter = read_by_parts(model, text)
layers, (_, heads, _, channels) = len(past.layers), past.layers[0].keys.shape
f"{layers} layers; keys and values of {heads} heads × {context} tokens × {channels} channels each"
# %% [markdown]
# (Keys and values often have fewer heads than queries: groups of query heads share them, which is one way to a
# smaller cache.)
#
# ### Exercise 18.1: bytes of a cache (about 3 minutes)
# How many bytes do the keys and values of so many tokens take, at so many bits a number?
# %% tags=["exercise"]
def my_cache_bytes(layers, heads, channels, tokens, bits):
    raise NotImplementedError
# %%
check("18.1", my_cache_bytes)
# %% [markdown]
# By formula and by meter. Our model computes in float32; engines keep 16 bits, and so we count 16 from here on.
# %%
def cache_bytes(layers, heads, channels, tokens, bits=16):
    return 2 * layers * heads * channels * tokens * bits / 8

assert all(held == cache_bytes(layers, heads, channels, n, bits=32) for n, held in meter.items())
a_token = cache_bytes(layers, heads, channels, 1)
print("by the meter, in float32:", {n: f"{held:,} bytes" for n, held in meter.items()})
f"by the formula, in 16 bits: {a_token:,.0f} bytes for each token"
# %% [markdown]
# ### Myth: "the cache is small beside the weights"
# **Predict:** a model of 70 billion weights with the shape of Llama 3 has 80 layers with 8 heads of 128
# channels. Its weights in 4 bits take 35 GB. How many tokens of cache, in 16 bits, take as much? And how many
# do 8 readers have then, each?
# %%
from quantlab.plots import plot_curves

shapes = {"bundled": (4, 4, 32, 3.7e6), "SmolLM2-135M": (30, 3, 64, 134.5e6),
          "70 billion": (80, 8, 128, 70e9)}
lengths = [2**k for k in range(7, 18)]
curves = {name: (lengths, [cache_bytes(*shape, n) / (weights / 2) for n in lengths])
          for name, (*shape, weights) in shapes.items()}
plot_curves(curves, xlabel="tokens in the cache", log="xy",
            ylabel="cache in 16 bits,\ntimes the weights in 4")
plt.axhline(1, color="black", linewidth=0.8)
plt.show()
equal = {name: round(weights / 2 / cache_bytes(*shape, 1))
         for name, (*shape, weights) in shapes.items()}
assert 100_000 < equal["70 billion"] < 110_000
assert equal["SmolLM2-135M"] == 2919
equal | {"70 billion, each of 8 readers": equal["70 billion"] // 8}
# %% [markdown]
# About a hundred thousand tokens weigh as much as the 70 billion weights: one long document, or eight readers with
# 13,000 each. SmolLM2 is there at 2,919 tokens, well within the 8,192 that it can read. And for each token that is
# written *all* of the cache is read again, so it costs time as well. It is small only while texts are short and
# readers few.
#
# ## 2. By hand: four tokens, three channels
# Keys of four tokens. The first channel lies far from 0, the others near it. Two bits: four codes, laid
# from the minimum to the maximum, with the minimum as a real offset (the third spelling of notebook 01).
#
# **Predict:** a range for each *token* (row), or one for each *channel* (column): what becomes of the two quiet
# channels?
# %%
keys = torch.tensor([[10.0, 0.3, -0.2], [9.4, -0.3, 0.4], [9.7, 0.1, 0.0], [9.2, -0.1, 0.2]])

def rounded(x, dim, bits=2):
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return low + step * torch.round((x - low) / step)

print("per token  ", [[round(v, 2) for v in row] for row in rounded(keys, dim=1).tolist()])
print("per channel", [[round(v, 2) for v in row] for row in rounded(keys, dim=0).tolist()])
errors = [(rounded(keys, dim) - keys).square().sum().item() for dim in (1, 0)]
assert errors[1] < errors[0] / 4
f"squared error: per token {errors[0]:.3f}, per channel {errors[1]:.3f}"
# %% [markdown]
# The loud channel is in every row, sets every row's step, and the quiet channels fall on one code. By columns
# it has a range of its own. If loud *tokens* were the trouble, rows would be right.
#
# ### Exercise 18.2: a range for each channel (about 8 minutes)
# `keys` is (tokens, channels). Round each channel to 2ᵇ levels, from its minimum to its maximum, and return the
# numbers that the codes stand for. A channel that never changes must come back as it is.
# %% tags=["exercise"]
def my_round_channels(keys, bits):
    raise NotImplementedError
# %%
check("18.2", my_round_channels)
# %% [markdown]
# The library does this for chunks of tokens, in packed codes, with a step and a minimum in float16 for each group.
# **Predict** the true bits of 2-bit codes in groups of 32.
# %%
from quantlab.kv import quantize_kv

chunk = past.layers[-1].keys[:, :1, :32]  # (batch, heads, tokens, channels)
q = quantize_kv(chunk, bits=2, per="channel", group_size=32)
largest_step = q.scale.float().max()
assert (q.dequantize() - chunk).abs().max() <= 0.501 * largest_step + 0.001 * chunk.abs().max()
f"{8 * q.nbytes / chunk.numel()} bits a number, {8 * q.scale.nbytes / chunk.numel()} of them steps"
# %% [markdown]
# Two float16 for 32 numbers are one bit more for each: 3 true bits, 0.19 of float16.
#
# ## 3. What keys and values look like
# One head of the model; each row is a token. **Predict:** in which of the two, keys or values, do you see upright
# stripes? Then choose *values*; then the other range. Which picture of errors has stripes, which is noise?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_kv

middle = past.layers[layers // 2]
explore_kv(middle.keys[0, 0], middle.values[0, 0])
# %% [markdown]
# **What you saw.** Keys have stripes: a few channels are loud in long runs of tokens, and a range per token makes
# errors in all the others. Values show no stripes. In numbers, over all layers and heads:
# %% tags=["nbval-ignore-output"]
from quantlab.kv_measuring import rounding_errors
from quantlab.plots import plot_bars

errors = rounding_errors(past, bits=2)
plot_bars(errors, ylabel="squared error at 2 bits,\npart of the squares")
plt.show()
of_keys, of_values = (errors["per channel"][kind] / errors["per token"][kind]
                      for kind in ("keys", "values"))
found(of_keys < 0.5, f"keys: per channel has {of_keys:.2f} times the squared error of per token")
found(0.8 < of_values < 1.2, f"values: the two are alike, {of_values:.2f}")
f"squared error, per channel over per token: keys {of_keys:.2f}, values {of_values:.2f}"
# %% [markdown]
# For keys the axis decides. For values the errors are nearly alike; so does the axis not matter? The error of a
# tensor is not what the model sees (notebook 10). We need a model that reads with such a cache.
#
# ## 4. A cache that generate takes
# `KVCache` is one of transformers' caches: `forward` and `generate` take it as `past_key_values`. The *most recent*
# tokens stay in float: attention asks for them most, and a group of 32 must be full before it can be
# rounded. Everything before is packed codes. (Liu et al. 2024 call this recipe KIVI.)
#
# **Predict:** at 16 bits, are the logits those of the float cache? And at 2 bits, those of the prompt itself, which
# is read in one go?
# %% tags=["nbval-ignore-output"]
from quantlab.kv import KVCache

def read(cache, ids=text[None, :96]):
    parts = ids.split([64, 1, 31], dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)

none, whole = model(text[None, :96]).logits, read(KVCache(key_bits=16, value_bits=16))
few = read(KVCache(key_bits=2, value_bits=2))
assert torch.allclose(whole, none, atol=1e-3 * none.abs().max())
assert torch.equal(few[:, :64], whole[:, :64])  # the prompt reads itself in float
furthest = [(logits - none).abs().max() for logits in (whole, few)]
"largest difference of a logit: 16 bits {:.1e}, 2 bits {:.2f}".format(*furthest)
# %% [markdown]
# Only the *past* is rounded: the logits of the first 64 tokens, read in one go, are exact.
#
# ### Exercise 18.3: a group that is not yet full (about 12 minutes)
# Tokens come one at a time, or a prompt of many at once. `rounded` and `waiting` are (tokens, channels): what
# went through the quantizer, and what waits in float for its group to fill. Take in `new`: return the new
# `rounded` and `waiting`. `quantize` rounds one full group (as exercise 18.2 does).
# %% tags=["exercise"]
def my_stream(rounded, waiting, new, group, quantize):
    raise NotImplementedError  # return rounded, waiting
# %%
check("18.3", my_stream)
# %% [markdown]
# A long story, written with caches of 2 bits. **Predict:** which one still tells a story, the one that has its keys
# per channel or the one per token?
# %% tags=["nbval-ignore-output"]
from quantlab.kv import KVModel

start, count = "Once upon a time", min(budget(model, 300, least=48), context - 20)
ways = {"float32": {"key_bits": 16, "value_bits": 16},
        "keys per channel": {"key_bits": 2, "value_bits": 2},
        "keys per token": {"key_bits": 2, "value_bits": 2, "keys": "token"}}
stories = {}
for way, setting in ways.items():
    writer = KVModel(model, **setting)
    stories[way] = generate(writer, tokenizer, start, tokens=count)
    print(f"{way}, {writer.cache_bytes:,} bytes:\n{stories[way]}\n")
# %% [markdown]
# (Each line counts the bytes of its own story. The float cache is kept in float32 here, twice what 16 bits take.)
# One word that falls otherwise makes another story, which may be as good: reading is no measure. KL is.
#
# ## 5. Measured: KL of each part
# One reading of the text serves all settings: the float cache of the first tokens is rounded in each way, and
# the model reads on with it, 32 tokens at a time, so that no token sees more than 32 unrounded neighbours beyond
# the recent ones.
#
# For keys the errors have told us what to expect. For values they were nearly alike, so:
# %%
from quantlab.predictions import predict

guess = predict("2-bit values in this model: which range has the smaller KL?",
                ["per token", "per channel"])
# %% tags=["nbval-ignore-output"]
from quantlab.kv_measuring import kv_divergences

following = text[context - budget(model, 128, least=32):]
before = context - len(following)
one_part = {"keys per channel": {"key_bits": 2, "value_bits": 16},
            "keys per token": {"key_bits": 2, "value_bits": 16, "keys": "token"},
            "values per token": {"key_bits": 16, "value_bits": 2},
            "values per channel": {"key_bits": 16, "value_bits": 2, "values": "channel"}}
parts = kv_divergences(model, past, following, one_part, tokens=before)
for way, row in parts.items():
    print(f"2 bits, {way:20} KL {row.kl:.4f} ± {row.stderr:.4f}")
# %% tags=["nbval-ignore-output"]
keys_ratio = parts["keys per channel"].kl / parts["keys per token"].kl
values_ratio = parts["values per token"].kl / parts["values per channel"].kl
found(keys_ratio < 0.5, f"keys: per channel has {keys_ratio:.2f} times the KL of per token")
found(1 < values_ratio < 2.5,
      f"values: per token has {values_ratio:.2f} times the KL of per channel")
print(guess.reveal("per channel" if values_ratio > 1 else "per token"))
f"KL of per channel over per token: keys {keys_ratio:.2f}, values {1 / values_ratio:.2f}"
# %% [markdown]
# The keys are as their errors promised: per channel has 0.28 times the KL. The values are *not* as KIVI advises: in
# the bundled model its axis, per token, is the worse one. Is the advice wrong? We ask a model that people use.
# %% tags=["nbval-ignore-output"]
try:
    larger = load_lm("smollm2") if chosen_model() == "bundled" else None
except FileNotFoundError:
    larger = None
if larger is None:
    print("SmolLM2 is skipped: not installed, or another model was chosen.")
else:
    words = token_stream(larger[1], load_text("general"))[:2048]
    larger_past, larger_meter = read_by_parts(larger[0], words, logits_to_keep=1)
    assert larger_meter[2048] == cache_bytes(30, 3, 64, 2048, bits=32)
    print(f"SmolLM2's cache by the meter, in float32: {larger_meter[128]:,} bytes at 128 tokens,",
          f"{larger_meter[2048]:,} at 2,048")
    settings = one_part | {"both of 4 bits": {}}
    larger_parts = kv_divergences(larger[0], larger_past, words[1984:], settings, tokens=1984)
    for way, row in larger_parts.items():
        print(f"{'' if 'both' in way else '2 bits, '}{way:20} KL {row.kl:.4f} ± {row.stderr:.4f}")
# %% tags=["nbval-ignore-output"]
if larger:
    kls = [row.kl for row in larger_parts.values()]
    share = KVCache.filled(larger_past).nbytes / cache_bytes(30, 3, 64, 2048)
    of_keys, of_values = kls[0] / kls[1], kls[2] / kls[3]
    found(of_keys < 0.4, f"keys: per channel {of_keys:.2f} times per token, at most 0.4")
    found(of_values < 0.1, f"values: per token {of_values:.2f} times per channel, at most 0.1")
    found(kls[4] < 0.005, f"4 bits for both: KL {kls[4]:.4f}, at most 0.005")
    found(share < 0.33, f"4 bits take {share:.2f} of float16's bytes, at most 0.33")
    print(f"the advised axis has, of the other's KL: keys {of_keys:.2f}, values {of_values:.3f};",
          f"4 bits take {share:.2f} of float16's bytes")
# %% [markdown]
# On SmolLM2 the advice holds: values per token have 0.068 times the KL of values per channel. On the small model it
# did not. What is different?
#
# ## 6. The first token
# Attention is a softmax: its weights sum to 1, also for a head that has found nothing. Where does it put them
# then? We add up, for each layer, the attention that the first token gets from tokens 64 to 255.
# %%
guess = predict("How much of a layer's attention can the first token get in SmolLM2?",
                ["a hundredth", "a tenth", "half or more"])
# %% tags=["nbval-ignore-output"]
from quantlab.kv_measuring import attention_on_first

models = {"this model": (model, text, past)}
if larger:
    models["SmolLM2"] = larger[0], words, larger_past
shares = {name: attention_on_first(*one) for name, one in models.items()}
depth = {name: [i / (len(share) - 1) for i in range(len(share))] for name, share in shares.items()}
plot_curves({name: (depth[name], share) for name, share in shares.items()},
            xlabel="depth: first layer 0, last layer 1", ylabel="attention on\nthe first token")
plt.ylim(-0.05, 1)
plt.show()
# %% tags=["nbval-ignore-output"]
here = max(shares["this model"])
found(here < 0.1, f"the first token gets little attention, at most {here:.1%} in a layer")
if larger:
    there = max(shares["SmolLM2"])
    found(there > 0.5, f"in SmolLM2 it gets up to {there:.0%} in a layer")
    print(guess.reveal("half or more" if there > 0.5 else "a tenth"))
{name: f"{sum(share) / len(share):.1%} on average, {max(share):.1%} at most"
 for name, share in shares.items()}
# %% [markdown]
# In SmolLM2 30.5 % of the attention goes to the first token on average, and in some of the later layers more than
# half, whatever it is (notebook 16): a **sink** (Xiao et al. 2023), where a head puts what it has no use for. For
# that to do no harm, what would the sink's *value* have to be?
#
# **Predict:** is its value longer than that of other tokens, as long, or shorter?
# %% tags=["nbval-ignore-output"]
from quantlab.kv_measuring import value_lengths

lengths = {name: value_lengths(cache)[:48] for name, (_, _, cache) in models.items()}
plot_curves({name: (range(48), length) for name, length in lengths.items()},
            xlabel="token", ylabel="length of its value,\n1 is the mean token's")
plt.ylim(0, 1.5)
plt.show()
if larger:
    found(lengths["SmolLM2"][0] < 0.5, f"the sink's value is short: {lengths['SmolLM2'][0]:.2f}")
{name: round(length[0], 2) for name, length in lengths.items()}
# %% [markdown]
# Short: 0.37 of the mean token's in SmolLM2. Now round the values per *channel*: the sink shares its ranges with 31
# ordinary tokens and gets an error as large as theirs, which so large a part of the attention then adds to every
# output. Per *token* the short vector has a short range of its own. That is what the advice is worth; a model
# without a sink does not need it.
#
# So keep the first four tokens in float (`sinks=4`). **Predict:** what part of the KL is left?
# %% tags=["nbval-ignore-output"]
pairs = {f"{way}, {sinks} first in float": one_part[way] | {"sinks": sinks}
         for way in one_part for sinks in (0, 4)}
kept = {"this model": kv_divergences(model, past, following[:32], pairs, tokens=before)}
if larger:
    kept["SmolLM2"] = kv_divergences(larger[0], larger_past, words[1984:2016], pairs, tokens=1984)
for way in pairs:
    print(f"{way:36}", "   ".join(f"{name} {rows[way].kl:.4f}" for name, rows in kept.items()))
for way in one_part if larger else ():
    none, four = (kept["SmolLM2"][f"{way}, {sinks} first in float"].kl for sinks in (0, 4))
    found(four < 0.8 * none, f"SmolLM2, {way}: four in float leave {four / none:.2f} of the KL")
# %% [markdown]
# It helps the bundled model as well, where the first token is no sink. Why it does, these measurements do not say.
#
# ### The control
# Four tokens in float: is it that they are the *first*, or would four others do? With values per token no two
# tokens share a range, so we can put back whichever we like. **Predict** the KL with tokens 100 to 103 in float.
# %% tags=["nbval-ignore-output"]
from quantlab import kl_divergence

def put_back(past, start, keep):  # values of 2 bits, but for the tokens to keep
    pairs = []
    for layer in past.layers:
        values = quantize_kv(layer.values[:, :, :start], bits=2, per="token").dequantize()
        values[:, :, keep] = layer.values[:, :, keep]
        pairs.append((layer.keys[:, :, :start], values))
    return DynamicCache(pairs)

net, ids, cache = models.get("SmolLM2", models["this model"])
start = (len(ids) - 64) // 32 * 32
reads = {"all": slice(start), "none": slice(0), "0 to 3": slice(4), "100 to 103": slice(100, 104)}
new = ids[None, start:start + 32]
logits = {name: net(new, past_key_values=put_back(cache, start, keep)).logits
          for name, keep in reads.items()}
control = {name: kl_divergence(logits["all"], logits[name]) for name in list(reads)[1:]}
found(control["100 to 103"] > 0.8 * control["none"], "four others give nothing back: "
      f"{control['100 to 103'] / control['none']:.2f} of the KL is left")
{f"tokens {name} in float": round(kl, 4) for name, kl in control.items()}
# %% [markdown]
# Four others, tokens 100 to 103, give nothing back. In SmolLM2 the first are special since its attention makes them
# so; in the bundled model there must be another reason.
#
# ## 7. Before or after RoPE?
# The cache holds keys *after* their rotation by position (RoPE), which turns pairs of channels, the fast pairs
# by a radian a token. A loud channel is smeared over its pair, and its stripe begins to wave. One could store the
# keys before, and rotate at every reading (KVQuant, Hooper et al. 2024). A rotation keeps lengths, so errors can
# be compared.
#
# **Predict:** how much smaller is the error of 2-bit keys before the rotation, in groups of 32 tokens?
# %% tags=["nbval-ignore-output"]
from quantlab.kv_measuring import keys_before_rope

try:
    raw = keys_before_rope(model, text, past)
    ratio = rounding_errors(raw)["per channel"]["keys"] / errors["per channel"]["keys"]
    found(ratio < 0.9, "a rotation that makes 2-bit keys worse")
    print(f"before the rotation, 2-bit keys have {ratio:.2f} times the squared error")
except ValueError as reason:
    print(f"Not to be seen on this model: {reason}")
# %% [markdown]
# Before the rotation the stripes are straight. What is gained is paid for at every reading: all keys have to be
# rotated again. Most engines store the keys after the rotation.
#
# ## 8. How many bits, at which length?
# **Predict:** does the KL of a 3-bit cache grow with the context, or does it stay? And at equal bits, which costs
# more, keys or values?
# %% tags=["nbval-ignore-output"]
float_cache = {"key_bits": 16, "value_bits": 16}
bits_of = {f"{kind} {bits}": float_cache | {option: bits} for bits in (8, 4, 3, 2)
           for kind, option in (("keys", "key_bits"), ("values", "value_bits"))}

def over_context(model, tokens, past, contexts, count):
    rows = {n: kv_divergences(model, past, tokens[n:n + count], bits_of, tokens=n)
            for n in contexts}
    for way in bits_of:
        print(f"{way:9} bits:",
              "  ".join(f"{n} tokens {rows[n][way].kl:.5f}" for n in contexts))
    return rows

lengths = [n for n in (128, 256, 448) if n + 32 <= len(text)]
small = over_context(model, text, past, lengths, min(64, budget(model, 64, least=32)))
# %% tags=["nbval-ignore-output"]
if larger:
    large = over_context(larger[0], words, larger_past, (128, 512, 2016), 32)
keys_2, values_2, keys_8 = (sum(row[way].kl for row in small.values()) / len(small)
                            for way in ("keys 2", "values 2", "keys 8"))
found(keys_2 > 1.2 * values_2, f"2-bit keys cost more, {keys_2:.4f}, than values, {values_2:.4f}")
found(keys_8 < 0.01 * keys_2, "8 bits cost next to nothing")
# %% [markdown]
# 8 bits cost next to nothing, 4 little; at 2 keys cost more than values, since an error of a key moves attention
# itself. KL does not grow steadily with the context. But each number rests on few tokens, and next to the others
# of its row it says little more than its order of magnitude.
#
# ## 9. Drag it
# Blue: the attention of the last token, with keys in few bits; grey: with keys in float. **Predict:** at how many
# key bits does blue leave grey? Do value bits move it at all? Which column of the table is cheap?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_cache
from quantlab.kv_measuring import attention_queries

grid = {(k, v, sinks): {"key_bits": k, "value_bits": v, "sinks": sinks}
        for k in (8, 4, 3, 2) for v in (8, 4, 3, 2) for sinks in (0, 4)}
measured = kv_divergences(model, past, following, grid, tokens=before)
query = attention_queries(model, text[:before])[layers // 2][0, -1]
explore_cache(query, middle.keys[0, 0, :before], {way: row.kl for way, row in measured.items()})
# %% [markdown]
# **What you saw.** Value bits leave the blue curve alone: attention is made of queries and keys only. With 8 and 4
# key bits it stays on the grey one; at 2, attention moves to other tokens. In the table, rows (keys) differ more than
# columns (values).
#
# ### Exercise 18.4: the cheapest within a budget (about 10 minutes)
# `table` is {(key bits, value bits): (bytes, KL)}. Return the bits with the fewest bytes whose KL is at most the
# budget, or None if no setting fits.
# %% tags=["exercise"]
def my_cheapest(table, budget):
    raise NotImplementedError
# %%
check("18.4", my_cheapest)
# %% [markdown]
# **Predict:** within a KL of 0.01, which of 16 settings is the cheapest on this model?
# %% tags=["nbval-ignore-output"]
def held(k, v):
    return KVCache.filled(past, tokens=before, key_bits=k, value_bits=v).nbytes

table = {(k, v): (held(k, v), row.kl) for (k, v, sinks), row in measured.items() if not sinks}
within = [bits for bits, (size, kl) in table.items() if kl <= 0.01]
best = min(within, key=lambda bits: table[bits][0], default=(16, 16))
found(best[0] >= best[1], f"keys are worth more bits than values: {best}")
share = table[best][0] / cache_bytes(layers, heads, channels, before)
f"keys {best[0]} bits, values {best[1]} bits: {share:.2f} of float16's bytes"
# %% [markdown]
# ## 10. The ledger
# `KVModel` is the model with a cache of few bits, read 32 tokens at a time: the ledger measures it as any other.
# Its weights are untouched, so their bytes are the float model's; the cache's stand in a line of their own.
#
# **Predict:** does it write faster than the float model on *this* machine?
# %% tags=["nbval-ignore-output"]
from quantlab import ledger

stream = token_stream(tokenizer, load_text("eval"))[:budget(model, 4096, least=256)]
rows = [ledger.measure(model, KVModel(model, key_bits=bits, value_bits=bits), stream,
                       method="KV cache", bits=bits, group="32", window=context) for bits in (4, 2)]
for row in rows:
    ledger.append(row)
found(rows[0].kl < rows[1].kl, "4 bits are nearer to the float cache than 2")
found(rows[1].decode > 1, f"writing takes {rows[1].decode:.1f} times as long", of="machine")
ledger.Table(rows)
# %% [markdown]
# Slower: our cache is unpacked whole for every token, which costs more than reading floats does on a model as
# small as this. Engines unpack inside the attention kernel, and where memory is the bottleneck they gain speed as
# well. What is gained here is *bytes*.
#
# ## 11. Exercises
# ### Exercise 18.5 (about 15 minutes, no check)
# transformers' own `QuantizedCache` rounds all tokens again whenever its window is full. Write that cache in five
# lines over `quantize_kv` (round what is already rounded, with ranges that start elsewhere), and measure the KL
# that it adds after ten rounds.
#
# ### Open
# - Give the keys of some layers more bits (notebook 12): which layers need them?
# - Rotate keys and queries by a Hadamard matrix (notebook 17) before rounding per token: who wins?
# - `group_size=64`, `recent=128`: what do they cost, what do they give?
# %% [markdown]
# ### Recap
# - A cache takes 2 · layers · heads · channels · tokens numbers, for each reader; long texts outweigh the weights.
# - Keys have loud channels: ranges per channel. Values are rounded per token, for the sake of the sink.
# - A stream is rounded in full groups; the recent tokens wait in float, and nothing is rounded twice.
# - In SmolLM2 the first token is where unused attention goes; the first four in float buy much, four others nothing.
# - 4 bits are nearly free, and take about a third of the bytes of 16 bits; 2 bits ask for sinks. Bytes are gained,
#   speed needs a kernel.
#
# Next: [19 llama.cpp's files](19_llama_cpp_files.ipynb) takes a real file apart.
