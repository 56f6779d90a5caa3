# %% [markdown]
# # 15 QLoRA
# *60 minutes, of which the computer needs about one. You need notebooks 04, 06 and 13.*
#
# A model whose weights are frozen in four bits learns something new (QLoRA, Dettmers et al. 2023). At the
# end of this notebook you can
#
# - count what training keeps in memory (显存), and say what QLoRA saves and what it does not;
# - write a **LoRA** adapter (低秩适配器) and its gradients, and put it beside a layer in NF4;
# - teach a model a style, and show what it learnt, what it forgot, and that its base did not change;
# - merge (合并) an adapter into the weights, in floats and in NF4, and say what each costs.
# %% [markdown]
# ### Recall
# 1. LSQ makes the scale a parameter. What is its gradient divided by, and why?
# 2. Three values take 1.58 bits. Where does that number come from?
# 3. Which weights get no gradient through the straight-through estimator?
#
# <details><summary>Answers</summary>
# 1. √(N · qmax): the gradients of all N weights add up in one scale. 2. log₂ 3. 3. Those that were clamped.</details>
#
# ## 1. What broke
# Our model has read children's stories. Here is what we would like it to write: a ship's log, 86 days of
# it, written for this workbook. Every fourth day is held out (留出), to measure with.
# %% tags=["nbval-ignore-output"]
import torch

from quantlab.lm import load_lm, load_text, perplexity, token_stream
from quantlab.qlora import style_tokens, training_memory

model, tokenizer = load_lm()
days, (log, held) = load_text("style"), style_tokens(tokenizer)
stories = token_stream(tokenizer, load_text("eval"))[:4096]
assert len(days) == 86
print(days[9])
# %% [markdown]
# **Predict:** perplexity on stories is about 45. On the log it is: 45, 90, 400?
# %% tags=["nbval-ignore-output"]
before = {name: perplexity(model, text, window=128) for name, text in {"stories": stories, "log": held}.items()}
assert before["log"].value > 5 * before["stories"].value
{name: f"{p.value:.0f} ± {p.stderr:.0f}" for name, p in before.items()}
# %% [markdown]
# It has no idea. So train it: notebook 13 trained all weights. What does that keep in memory? Each weight
# has a gradient, and AdamW keeps two running averages for each; all four in float32. We count it for a
# model of 7 billion weights, which exists here as shapes only.
#
# **Predict:** its weights take 27 GB. All of it takes ... GB?
# %%
from transformers import LlamaConfig, LlamaForCausalLM

with torch.device("meta"):  # shapes without numbers
    big = LlamaForCausalLM(LlamaConfig())  # the shape of Llama-2-7B
memory = training_memory(big)
{part: f"{size / 1e9:.1f} GB" for part, size in [*vars(memory).items(), ("total", memory.total)]}
# %% [markdown]
# Four times the weights. And the weights of notebooks 03 to 12 are codes: a small step, added to a code, is
# lost. Two ideas together get around both: *freeze* the codes; train a *small* correction beside them.
#
# ## 2. By hand: an adapter of rank 1
# Beside a frozen layer y = x Wᵀ goes **LoRA** (Hu et al. 2021): x goes down to r numbers through A (r ×
# in), and up again through B (out × r):
#
# $$y = xW^\top + \frac{\alpha}{r}\,(xA^\top)\,B^\top \qquad (1)$$
#
# W + (α/r)·BA would do the same. A starts random, **B at zero**.
#
# **Predict:** after the first backward pass, who has a gradient: A, B, or both?
# %%
x, W, wanted = torch.tensor([1.0, 2.0]), torch.eye(2), torch.tensor([2.0, 2.0])
A, B = torch.tensor([[3.0, -1.0]], requires_grad=True), torch.zeros(2, 1, requires_grad=True)
for _ in range(3):
    loss = ((W + B @ A) @ x - wanted).square().sum() / 2
    of_A, of_B = torch.autograd.grad(loss, (A, B))
    print(f"loss {loss:.3f}   gradient of A {of_A.flatten().numpy().round(2)}   of B {of_B.flatten().numpy().round(2)}")
    A.data, B.data = A - of_A / 2, B - of_B / 2
# %% [markdown]
# With B = 0 nothing comes back to A. B moves first, and from the second step on A has a direction. Were A
# zero too, neither would ever move. And at the start the output is exactly that of the frozen layer:
# training begins where the model was.
#
# ### Exercise 15.1: an adapter (about 5 minutes)
# Write (1). x is (tokens, in), W (out, in), A (rank, in), B (out, rank).
# %% tags=["exercise"]
def my_lora(x, W, A, B, alpha):
    raise NotImplementedError
# %%
from quantlab.checks import check, hint, solution

check("15.1", my_lora)
# %% [markdown]
# ### Exercise 15.2: its gradients (about 10 minutes)
# `upstream`, (tokens, out), is the gradient of the loss with respect to y. Return those of A and of B,
# without autograd.
# %% tags=["exercise"]
def my_gradients(x, upstream, A, B, alpha):
    raise NotImplementedError
# %%
check("15.2", my_gradients)
# %% [markdown]
# W needs no gradient. But what lies *below* the layer does: it gets upstream · W, plus what comes through
# the adapter. So a frozen weight is read twice in each step, forward and backward.
#
# ## 3. The same with a library
# `nf4_model` puts a layer in the place of each linear layer that keeps the packed codes of notebook 04 and
# decodes them when they are needed. `add_lora` puts adapters beside them; those are
# [peft](https://huggingface.co/docs/peft)'s, the library that most people use.
# %% tags=["nbval-ignore-output"]
from quantlab.qlora import add_lora, lora_layers, nf4_model

base = nf4_model(model)
learner = add_lora(base, rank=8)
layer = lora_layers(learner)["model.layers.0.mlp.up_proj"]
layer.base_layer, layer.lora_A, layer.lora_B
# %%
x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
B.data.normal_(generator=torch.Generator().manual_seed(1))  # as if it had been trained
assert torch.allclose(layer(x), x @ W.T + 16 / 8 * (x @ A.T) @ B.T, atol=1e-4)  # alpha is 2 * rank
B.data.zero_()
with torch.no_grad():
    assert torch.equal(learner(held[None, :128]).logits, base(held[None, :128]).logits)
trained, whole = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (learner, model))
trained, whole, round(whole / trained)
# %% [markdown]
# Formula (1), and with B = 0 the very logits of the NF4 model. One number is trained where full training
# has 24.
#
# ### What waits for the backward pass
# Autograd keeps what it needs for the way back. A layer that decodes its weight and multiplies would leave
# the *decoded* float weight waiting. Ours decodes again instead, as QLoRA does.
#
# **Predict:** training with 8 windows of 128 tokens, what is more: the weights, or the activations (激活值)
# that wait? Does QLoRA make those fewer?
# %% tags=["nbval-ignore-output"]
from quantlab.qlora import saved_bytes

ids = log[:1024].view(8, 128)
ways = {"all weights": model, "LoRA, float base": add_lora(model, rank=8), "LoRA, NF4 base": learner}
waiting = {name: saved_bytes(one, ids) for name, one in ways.items()}
kept = {name: training_memory(one) for name, one in ways.items()}
assert waiting["LoRA, NF4 base"] == waiting["LoRA, float base"] > 0.8 * waiting["all weights"]
assert all(waiting[name] > kept[name].total for name in ways)
{name: f"{size / 1e6:.1f} MB waiting, {kept[name].total / 1e6:.1f} MB kept" for name, size in waiting.items()}
# %% [markdown]
# QLoRA saves weights, gradients and optimizer state. What waits for the backward pass it hardly touches;
# for a model as small as ours that is most of the memory, and only smaller batches, or recomputing, make it
# less.
#
# ## 4. Count it
# ### Exercise 15.3: bytes of a training (about 10 minutes)
# `packed` weights are frozen in NF4 (blocks of 64, double quantization), `floats` are frozen in float32,
# `trained` numbers are float32 and learn with AdamW. How many bytes are kept?
# %% tags=["exercise"]
def my_bytes(packed, floats, trained):
    raise NotImplementedError
# %%
check("15.3", my_bytes)
# %% [markdown]
# Counting is one thing. What does torch really hold after a step of AdamW?
# %%
from quantlab.finetune import loss_on

def held_by_torch(one):
    trained = [p for p in one.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # a step that moves nothing
    loss_on(one, ids).backward()
    optimizer.step()
    tensors = [*one.parameters(), *one.buffers(), *(p.grad for p in trained)]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    one.zero_grad()
    return sum(t.numel() * t.element_size() for t in tensors)

assert all(held_by_torch(one) == kept[name].total for name, one in ways.items())
# %%
import matplotlib.pyplot as plt

from quantlab.plots import plot_bars

plt.rcParams["figure.figsize"] = 7, 2.6
plot_bars({name: {part: size / 1e6 for part, size in vars(m).items()} for name, m in kept.items()}, ylabel="MB")
plt.show()
assert kept["all weights"].total > 9 * kept["LoRA, NF4 base"].total
assert 0.4 < 4 * model.get_input_embeddings().weight.numel() / kept["LoRA, NF4 base"].weights < 0.6
{name: round(m.total / 1e6, 2) for name, m in kept.items()}
# %% [markdown]
# The adapters make gradients and optimizer state small, NF4 the weights. (Half of what is left of the
# weights is our embedding, in float32.) Now the large model, its embedding and head in 16 bits.
# **Predict:** 108 GB become ...?
# %%
from quantlab.lm import linear_layers

layers = linear_layers(big)
packed = sum(layer.weight.numel() for layer in layers.values())
trained = 8 * sum(sum(layer.weight.shape) for layer in layers.values())
rest = sum(p.numel() for p in big.parameters()) - packed
frozen = packed * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * rest
whole = frozen + 16 * trained
assert whole < 2 * (packed + rest) / 3
parts = {"all weights": memory.total, "QLoRA, frozen": frozen, "and rank 8": 16 * trained}
{part: f"{size / 1e9:.2f} GB" for part, size in parts.items()}
# %% [markdown]
# Less than a third of what the weights alone would take in 16 bits. (Activations come on top.)
#
# ## 5. Teach it
# Forty steps, each on 8 windows of 128 tokens: a few times through the days that it may see. **Predict**
# the perplexity on the held-out ones: 300, 150, 50?
# %% tags=["nbval-ignore-output"]
from quantlab.finetune import finetune
from quantlab.qlora import RECIPE

frozen = {name: b.clone() for name, b in learner.named_buffers()} | {
    name: p.clone() for name, p in learner.named_parameters() if not p.requires_grad}
history = finetune(learner, log, **RECIPE, held_out=held, check_every=8)
# %% tags=["nbval-ignore-output"]
from quantlab.plots import plot_curves

plot_curves({"training batch": (range(40), history.losses), "held-out days": (history.checked_at, history.held_out)},
            xlabel="step", ylabel="loss, nats per token")
plt.show()
after = perplexity(learner, held, window=128)
assert after.value < 0.8 * perplexity(base, held, window=128).value
f"held-out days: {before['log'].value:.0f}, now {after.value:.1f} ± {after.stderr:.1f} after {history.seconds:.0f} s"
# %% [markdown]
# How sure is that, and is it more than the words every day begins and ends with ("Wind", "Glass", "Run",
# "All hands well")? Measure each held-out day alone, and only the paragraph in its middle, before and
# after.
# %% tags=["nbval-ignore-output"]
def nll_of_middles(one):
    middles = [day.split("\n\n")[1] for day in days[3::4]]
    return torch.tensor([perplexity(one, token_stream(tokenizer, [text])).nll for text in middles])

gain = nll_of_middles(base) - nll_of_middles(learner)
mean, stderr = gain.mean().item(), gain.std().item() / len(gain) ** 0.5
assert mean > 10 * stderr
assert gain.min() > 0
f"{mean:.2f} ± {stderr:.2f} nats a token less (perplexity -{1 - 2.718 ** -mean:.0%}), on each of {len(gain)} days"
# %% [markdown]
# Formulas are the easier part, but the gain is not only theirs. And the base?
# %%
now = {**dict(learner.named_buffers()), **dict(learner.named_parameters())}
assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
with torch.no_grad(), learner.disable_adapter():
    assert torch.equal(learner(held[None, :128]).logits, base(held[None, :128]).logits)
f"{len(frozen)} frozen tensors, codes and absmax among them: bit for bit what they were"
# %% tags=["nbval-ignore-output"]
from quantlab.lm import generate

for name, one in {"before": base, "after": learner}.items():
    print(f"{name}: {generate(one, tokenizer, 'Day 12.', tokens=70, temperature=0.6, seed=1)}\n")
# %% [markdown]
# It has caught how a log is laid out and how clipped its sentences are. What it says is nonsense: it is a
# toy that has read a few pages of log.
#
# ## 6. Beside it
# Is it NF4 that holds it back? Or the rank? The repository's script has trained the same 40 steps on the
# float base, with other ranks, with all weights (at a tenth of the rate), and on the days with their
# *tokens shuffled*. `data/qlora/log.json` is the log of that run.
#
# **Predict:** the order. How much will shuffled tokens teach?
# %%
import json

from quantlab.lm import DATA

run = json.loads((DATA / "qlora/log.json").read_text())
runs = run["runs"]
run["command"], run["on"]
# %% tags=["nbval-ignore-output"]
for name, r in runs.items():
    print(f"{name:24} {r['trained']:>9,} trained   log {r['style']['perplexity']:6.1f} ± {r['style']['stderr']:4.1f}"
          f"   stories: KL {r['stories']['kl']:.2f}, perplexity {r['stories']['perplexity']:.0f}")
nll = {name: r["style"]["nll"] for name, r in runs.items()}
gains = [nll[f"rank {rank}"] - nll[f"rank {2 * rank}"] for rank in (1, 2, 4, 8)]
assert gains == sorted(gains, reverse=True)
assert nll["all weights"] < nll["rank 16"] < nll["rank 8"]
assert abs(nll["rank 8"] - after.nll) < 0.1  # what we have just trained
assert abs(nll["rank 8"] - nll["float base, rank 8"]) < 0.05
assert nll["shuffled tokens, rank 8"] > nll["rank 0"] + 0.1
# %% [markdown]
# The NF4 base holds nothing back: beside the float base the difference is far smaller than the error bar.
# The rank does: each doubling helps, a little less each time, and all weights together learn most. And
# shuffled tokens leave the model worse on the log *than it was untouched*: it has learnt which tokens are
# frequent, and to stop looking at what came before. What the adapters learn from the log is the order of
# its words.
#
# ## 7. What it forgot
# The KL on stories is measured from the float model, on the workbook's usual text. NF4 alone costs little
# of it; the rest is forgetting (灾难性遗忘): weights that served stories now serve the log.
# %% tags=["nbval-ignore-output"]
shown = ["rank 0", "rank 1", "rank 8", "float base, rank 8", "all weights"]
plot_bars({"KL on stories": {name.replace(", ", ",\n"): runs[name]["stories"]["kl"] for name in shown}}, ylabel="nats")
plt.show()
kl = {name: r["stories"]["kl"] for name, r in runs.items()}
assert kl["rank 8"] > kl["float base, rank 8"] > kl["all weights"] > 10 * kl["rank 0"]
# %% [markdown]
# LoRA is often said to forget less than training all weights (Biderman et al. 2024 measured so on large
# models). Here all weights, at a tenth of the rate, learnt more *and* forgot less: rate and steps count at
# least as much as rank. (With adapters it can be taken back, by `disable_adapter()`.)
#
# ## 8. Drag it
# The adapters of five ranks, from the same run. **Predict** three things first:
#
# 1. Does perplexity on the log fall in equal steps from 1 to 2 to 4 to 8 to 16?
# 2. Does a higher rank forget more?
# 3. An update of rank 16 has 16 singular values (奇异值). Are they alike, or do a few of them hold nearly all?
# %% tags=["nbval-ignore-output"]
from quantlab.qlora import RANKS, load_adapters

def result(rank):
    one, r = add_lora(base, rank=max(rank, 1)), runs[f"rank {rank}"]
    if rank:
        load_adapters(DATA / f"qlora/rank_{rank}.safetensors", one)
    found = lora_layers(one).items()
    text = generate(one, tokenizer, "Day 12.", tokens=45, temperature=0.6, seed=1)
    updates = {name.removeprefix("model.layers."): (a.lora_A["default"].weight, 2 * a.lora_B["default"].weight)
               for name, a in found if "layers.1." in name}
    return {"rank": rank, "trained": r["trained"], "text": text, "updates": updates, "kl": r["stories"]["kl"],
            "perplexity": r["style"]["perplexity"], "stderr": r["style"]["stderr"]}
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

from quantlab.explorers import explore_rank

results = [result(rank) for rank in tqdm((0, *RANKS), leave=False)]
for A, B in results[-1]["updates"].values():
    square = torch.linalg.svdvals(B @ A)[:16].square() / (B @ A).square().sum()
    assert square[0] > 1 / 4
    assert square[:8].sum() > 0.9
assert kl["rank 1"] > 0.8 * kl["rank 16"]
explore_rank(results, rank=8)
# %% [markdown]
# **What you saw.** Rank 1 brings most of the gain and most of the forgetting; each doubling adds less. And of
# the 16 directions of rank 16, half hold more than nine tenths of each update's square, the first alone more
# than a quarter. That few directions are enough is what LoRA bets on.
#
# ## 9. Merging, and its cost
# An adapter costs two more products a layer. Merging adds BA to the weight, but their sum with Ŵ is on no
# grid. **Predict** for each way how far it is from the trained model, and its bytes: merge in floats; merge
# and round to NF4 again; add BA to the *original* float weights, which it has never seen.
# %% tags=["nbval-ignore-output"]
from quantlab.lm import divergence, model_bytes
from quantlab.qlora import NF4Linear, merge

graft = add_lora(model, rank=8)
graft.load_state_dict({name: t for name, t in learner.state_dict().items() if "lora_" in name}, strict=False)
merged = merge(learner)
kinds = {"adapters beside NF4": learner, "merged, floats": merged, "merged, NF4 again": nf4_model(merged),
         "on the original floats": merge(graft)}
# %% tags=["nbval-ignore-output"]
cost = {}
for name, one in kinds.items():
    size = model_bytes(one, {n: m for n, m in one.named_modules() if isinstance(m, NF4Linear)})
    cost[name] = divergence(learner, one, held, window=128), perplexity(one, held, window=128), size
    print(f"{name:24} {size / 1e6:.2f} MB   KL {cost[name][0].kl:.6f}   perplexity {cost[name][1].value:.1f}")
# %%
(_, _, small), (exact, _, large), (rounded, _, least), (grafted, _, _) = cost.values()
assert exact.kl < 1e-5 < 1e-3 < rounded.kl  # floats differ by rounding of the 7th digit
assert least < small < large
first = divergence(model, base, held, window=128)  # what rounding the float model cost, on the same text
assert rounded.kl > 0.5 * first.kl
assert exact.kl < grafted.kl < rounded.kl
f"rounded once more: KL {rounded.kl:.3f}; the first rounding: {first.kl:.3f}"
# %% [markdown]
# Merged in floats it is the same model, and as large as one. Rounded once more, it loses about what the first
# rounding cost: the adapters had learnt beside the errors of *this* Ŵ, and new rounding makes new ones. On
# the original weights they work nearly as well, but that model nobody has trained. Keep adapters beside
# their base, or merge in floats; and measure what you ship.
#
# ## 10. Controls
# (a) One that must fail: B stays at zero and only A is trained. (b) One that asks how much of the gain is
# the log's: the same steps on as many tokens of the workbook's calibration *stories*. **Predict** the log's
# perplexity after each.
# %% tags=["nbval-ignore-output"]
stuck = add_lora(base, rank=8)
for layer in lora_layers(stuck).values():
    layer.lora_B["default"].requires_grad_(False)
finetune(stuck, log, **RECIPE | {"steps": 3})
with torch.no_grad():
    assert torch.equal(stuck(held[None, :128]).logits, base(held[None, :128]).logits)
other = add_lora(base, rank=8)
finetune(other, token_stream(tokenizer, load_text("calibration"))[:len(log)], **RECIPE)
control = perplexity(other, held, window=128)
share = (before["log"].nll - control.nll) / (before["log"].nll - after.nll)
assert 0.1 < share < 0.5
f"after the log {after.value:.0f}, after stories {control.value:.0f} ± {control.stderr:.0f}: {share:.0%} of the gain"
# %% [markdown]
# (a) Nothing comes through B = 0, so A never moves and not a bit of the output changes.
#
# (b) Stories lower the log's perplexity too, by more than a quarter of the gain in nats. They, like the log,
# were written for this workbook, in an English richer than the one the model grew up on; part of what
# looked like learning the *style* seems to be getting used to it. (The share is measured, the reason is our
# guess.) Without this control the whole gain would have been called style.
#
# ## 11. The ledger
# The workbook's usual row, on the usual stories: here it says what teaching *cost*, not what it gave.
# %% tags=["nbval-ignore-output"]
from dataclasses import replace

from quantlab import ledger

packed_layers = {n: m for n, m in learner.named_modules() if isinstance(m, NF4Linear)}
row = ledger.measure(model, learner, stories, method="qlora", bits=4, group="64", qtensors=packed_layers)
row = replace(row, seconds=history.seconds, calibration_tokens=40 * 8 * 128)  # of training
ledger.append(row)
assert row.kl > 5 * kl["rank 0"]
ledger.Table([row])
# %% [markdown]
# ### Myth: "NF4 is a quantization method that only saves memory and is always slower"
# Three claims. *A method?* NF4 is a table of levels and a layout of bytes, a data type. In this notebook
# three ways of choosing the numbers have filled it: rounding a trained model, freezing it under adapters,
# rounding a merged one. And *only memory?* A model kept in those four bits has just been taught.
#
# Is it *always slower*? **Predict:** how many times a float layer's time does ours take for 1 token, and
# for 1024?
# %% tags=["nbval-ignore-output"]
import time

def fastest(f, x, repeats=7):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f(x)
        times.append(time.perf_counter() - start)
    return min(times)

dense = torch.nn.Linear(1024, 1024, bias=False).requires_grad_(False)
coded, sizes = NF4Linear.from_linear(dense), [1, 4, 16, 64, 256, 1024]
ratios = [fastest(coded, x) / fastest(dense, x) for x in (torch.randn(size, 1024) for size in sizes)]
# %% tags=["nbval-ignore-output"]
plot_curves({"NF4 layer": (sizes, ratios)}, xlabel="tokens at once", ylabel="time, float layer = 1", log="x")
plt.axhline(1, color="0.6")
plt.show()
assert ratios[0] > 2 * ratios[-1]
f"{ratios[0]:.1f} times the float layer's time for 1 token, {ratios[-1]:.2f} times for 1024"
# %% [markdown]
# Decoding costs the same for any number of tokens. For a thousand, as in training, that is little. For one it
# is nearly everything, *in this layer*, which writes the decoded weight to memory and reads it again. A
# kernel that decodes in registers reads less than a seventh of the bytes, and for one token reading is what
# takes the time: there 4 bits can win. Speed is a matter of kernel and shape (notebook 07).
#
# ## 12. Exercises
# ### Exercise 15.4: an adapter on a budget (about 15 minutes)
# Full fine-tuning has added `update` to a layer. Find A and B with at most `numbers` numbers together so
# that B A is as near to it as can be (least squared error).
# %% tags=["exercise"]
def my_factors(update, numbers):
    raise NotImplementedError  # return A, B
# %%
check("15.4", my_factors)
# %% [markdown]
# ### Exercise 15.5: remember the stories (about 30 minutes, no check)
# Mix stories from `load_text("calibration")` into the training text, a quarter, a half. How much KL on the
# stories does that save, at what price on the log? Is a lower rate, or fewer steps, a better bargain?
#
# ### Open
# 1. Put adapters beside the attention layers only, or the MLP only, with as many trained numbers. Which serves the
#    log better? (`peft.LoraConfig(target_modules=...)`.)
# 2. Start from 2 bits instead of NF4: can rank 16 repair the damage *and* learn the log? LoftQ and PiSSA start A and B
#    from the singular vectors of the quantization error, or of W. Try it.
# %% [markdown]
# ### Recap
# - Training keeps 16 bytes for each weight; QLoRA 4.127 bits for a frozen one, 16 bytes for the few it trains.
# - Beside W goes (α/r)·BA, with B = 0 at the start: the outputs are the frozen model's, and B moves first.
# - The gradient passes *through* the frozen weight, decoded a second time; the base stays the same bit for bit.
# - It learns the new and forgets the old, unless you take the adapter off. Measure both.
# - Merged in floats nothing changes but the bytes; rounded to NF4 again it is another model.
#
# The weights are done. What else grows in memory while a model writes is its cache of keys and values.
