# %% [markdown]
# # 15 QLoRA
# *60 minutes with exercises 15.1 to 15.3, of which the computer needs one or two; exercises 15.4 and 15.5 take
# 45 more. You need notebooks 04, 06 and 13.*
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
# 2. Three values hold $1.58$ bits. Where does that number come from?
# 3. Which weights get no gradient through the straight-through estimator?
#
# <details><summary>Answers</summary>
# 1. √(N · qmax): the gradients of all N weights add up in one scale. 2. log₂ 3. 3. Those that were clamped.</details>
#
# ## 1. What broke
# Our model has read children's stories. Here is what we would like it to write: a ship's log. 86 days of one
# were written for this workbook; every fourth day is held out (留出), to measure with.
# %% tags=["nbval-ignore-output"]
import torch

from quantlab.checks import check, found, hint, solution
from quantlab.lm import (budget, divergence, layers_of_role, load_lm, load_text, perplexity,
                         perplexity_and_divergence, token_stream)
from quantlab.predictions import predict, score
from quantlab.train.lora import style_tokens
from quantlab.train.memory import training_memory

model, tokenizer = load_lm()
days, (log, held) = load_text("style"), style_tokens(tokenizer)
stories = token_stream(tokenizer, load_text("eval"))[:budget(model, 4096)]
held = held[:budget(model, len(held))]  # a large model reads fewer tokens of both
assert (len(days), len(days[3::4])) == (86, 21)
print(days[9])
guess = predict("The bundled model's perplexity on such days?", ["45", "90", "400"])
# %% [markdown]
# In windows of 128 tokens, the bundled model's perplexity on stories is about 45. For comparison the next cell
# also measures a mere table, which says how often each token occurs in the days that are not held out.
# %% tags=["nbval-ignore-output"]
texts = {"stories": stories, "log": held}
before = {name: perplexity(model, text, window=128) for name, text in texts.items()}
counts = torch.bincount(log, minlength=model.config.get_text_config().vocab_size) + 1.0
table = (counts / counts.sum()).log()[held].mean().neg().exp().item()
found(before["log"].value > max(5 * before["stories"].value, 0.8 * table),
      f"the log's perplexity is {before['log'].value:.0f}, the table's is {table:.0f}")
print({name: f"{p.value:.0f} ± {p.stderr:.0f}" for name, p in before.items()})
print(f"table of counts: {table:.0f}")
guess.reveal(min(("45", "90", "400"), key=lambda choice: abs(float(choice) - before["log"].value)))
# %% [markdown]
# As it stands, the bundled model predicts the log no better than a table of counts does. (Does it know no
# more, or is it only too sure of what it knows? Section 10 asks.) So train it: notebook 13 trained all
# weights, in float32, with AdamW. We count what that keeps in memory for a model of 7 billion weights, which exists
# here as shapes only.
#
# **Predict:** its weights take 27 GB. What else is kept for each weight, and how much is it all together?
# %%
from transformers import LlamaConfig, LlamaForCausalLM

with torch.device("meta"):  # shapes without numbers
    big = LlamaForCausalLM(LlamaConfig())  # the shape of Llama-2-7B
memory = training_memory(big)
{part: f"{size / 1e9:.1f} GB" for part, size in [*vars(memory).items(), ("total", memory.total)]}
# %% [markdown]
# Four numbers for each weight: itself, its gradient, and AdamW's two running averages. Besides, the weights
# of notebooks 03 to 12 are codes: a small step, added to a code, is lost. (Notebook 13 kept float weights for
# that reason.) Two ideas together solve both problems: *freeze* the codes; train a *small* correction beside them.
# %% [markdown]
# ## 2. By hand: an adapter of rank 1
# Beside a frozen layer y = x Wᵀ goes **LoRA** (Hu et al. 2021): x goes down to r numbers, the **rank** (秩),
# through A (r × in), and up again through B (out × r). The number α sets how strong it is:
#
# $$y = xW^\top + \frac{\alpha}{r}\,(xA^\top)\,B^\top \qquad (1)$$
#
# The weight W + (α/r)·BA would do the same, but then W could not stay codes. A starts random, **B at
# zero**. Below, r = α = 1, and the loss is half the squared distance from `wanted`.
#
# **Predict:** after the first backward pass, which has a gradient that is not zero: A, B, or both?
# %%
x, W, wanted = torch.tensor([1.0, 2.0]), torch.eye(2), torch.tensor([2.0, 2.0])
A, B = torch.tensor([[3.0, -1.0]], requires_grad=True), torch.zeros(2, 1, requires_grad=True)
for _ in range(3):
    loss = ((W + B @ A) @ x - wanted).square().sum() / 2
    of_A, of_B = torch.autograd.grad(loss, (A, B))
    shown = [gradient.flatten().numpy().round(2) for gradient in (of_A, of_B)]
    print("loss {:.3f}   gradient of A {}   of B {}".format(loss, *shown))
    A.data, B.data = A - of_A / 2, B - of_B / 2
# %% [markdown]
# With B = 0 nothing comes back to A. B moves first, and from the second step on A has a direction. Were A
# zero too, neither would ever move. And at the start the output is exactly that of the frozen layer:
# training begins where the model was.
#
# ### Exercise 15.1: an adapter (about 5 minutes)
# Write (1). x is (tokens, in), W (out, in), A (rank, in), B (out, rank), alpha a number; the rank is that of A,
# and alpha / rank need not be whole. Return y, (tokens, out), and change none of the arguments.
# %% tags=["exercise"]
def my_lora(x, W, A, B, alpha):
    raise NotImplementedError
# %%
check("15.1", my_lora)
# %% [markdown]
# ### Exercise 15.2: its gradients (about 10 minutes)
# `upstream`, (tokens, out), is the gradient of the loss with respect to y. Return those of A and of B,
# without autograd, as a tuple: first that of A, (rank, in), then that of B, (out, rank). (For y = x Mᵀ, the gradient
# of M is upstreamᵀ x, and that of x is upstream M.)
# %% tags=["exercise"]
def my_gradients(x, upstream, A, B, alpha):
    raise NotImplementedError
# %%
check("15.2", my_gradients)
# %% [markdown]
# W needs no gradient. But what lies *below* the layer does: it gets upstream · W, plus what comes through
# the adapter. So each step of training reads a frozen weight forward and again backward.
#
# ## 3. The same with a library
# `nf4_model` replaces each linear layer by one that keeps the packed NF4 codes of notebook 04 and decodes
# them when they are needed. `add_lora` puts adapters beside them, those of the library
# [peft](https://huggingface.co/docs/peft), with α = 2r.
# %% tags=["nbval-ignore-output"]
from quantlab.train.lora import add_lora, lora_layers, nf4_model

base = nf4_model(model)
learner = add_lora(base, rank=8)
layer = lora_layers(learner)[next(iter(layers_of_role(model, "up")))]
print(layer.base_layer, layer.lora_A, layer.lora_B)

x = torch.randn(5, layer.base_layer.in_features, generator=torch.Generator().manual_seed(0))
W, A, B = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
B.data.normal_(generator=torch.Generator().manual_seed(1))  # as if it had been trained
bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias
assert torch.allclose(layer(x), x @ W.T + bias + 16 / 8 * (x @ A.T) @ B.T, atol=1e-3)
B.data.zero_()
with torch.no_grad():
    assert torch.equal(learner(held[None, :128]).logits, base(held[None, :128]).logits)
def count(m):
    return sum(p.numel() for p in m.parameters() if p.requires_grad)

count(learner), count(model), round(count(model) / count(learner))
# %% [markdown]
# It computes formula (1), and with B = 0 it gives the very logits of the NF4 model. For each number that is
# trained, full training of the bundled model has about 24.
#
# ### What waits for the backward pass
# Autograd keeps what it needs for the way back. A layer that decodes its weight and multiplies would leave
# the *decoded* float weight waiting. Ours decodes again instead, as QLoRA does.
#
# **Predict:** training with 8 windows of 128 tokens, what is more: the weights, or the activations (激活值)
# that wait? Does QLoRA make those fewer?
# %% tags=["nbval-ignore-output"]
from quantlab.train.memory import saved_bytes

ids = log[:1024].view(8, 128)
ways = {"all weights": model, "LoRA, float base": add_lora(model, rank=8),
        "LoRA, NF4 base": learner}
waiting = {name: saved_bytes(one, ids) for name, one in ways.items()}
kept = {name: training_memory(one) for name, one in ways.items()}
of_all, of_float, of_nf4 = waiting.values()
found(of_nf4 == of_float, "NF4 or not, as much waits")
found(of_nf4 > 0.8 * of_all, f"what waits is {of_nf4 / of_all:.2f} of full training's")
more = all(waiting[name] > kept[name].total for name in ways)
found(more, "what waits is more than all that is kept")
for name, size in waiting.items():
    print(f"{name}: {size / 1e6:.1f} MB waiting, {kept[name].total / 1e6:.1f} MB kept")
# %% [markdown]
# QLoRA saves weights, gradients and optimizer state. What waits for the backward pass falls only from 91.5 to
# 80.8 MB, and that with a float base too: NF4 saves nothing of it. For a model as small as ours, with this
# batch, it is most of the memory. Fewer or shorter windows make it less, or 16-bit activations, or recomputing
# them (gradient checkpointing, 梯度检查点).
#
# ## 4. Count it
# ### Exercise 15.3: bytes of a training (about 10 minutes)
# `packed` weights are frozen in NF4 (blocks of 64, double quantization, as in notebook 04: an absmax takes 8 bits,
# and 256 of them share a number of 32); `floats` are frozen in float32; `trained` numbers are float32 and learn with
# AdamW. `packed` is a multiple of 64 · 256. Return the bytes that are kept, one number. (AdamW also counts its
# steps, 4 bytes for each *tensor*: leave that out.)
# %% tags=["exercise"]
def my_bytes(packed, floats, trained):
    raise NotImplementedError
# %%
check("15.3", my_bytes)
# %% [markdown]
# Counting is one thing. What does torch really hold after a step of AdamW? To the byte what
# `training_memory` counts (with the step counters); the last line asserts it:
# %%
from quantlab.train.loop import loss_on

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
sizes = {name: {part: size / 1e6 for part, size in vars(m).items()} for name, m in kept.items()}
plot_bars(sizes, ylabel="MB")
plt.show()
times = kept["all weights"].total / kept["LoRA, NF4 base"].total
found(times > 9, f"training all weights keeps {times:.1f} times as much, over nine")
share = 4 * model.get_input_embeddings().weight.numel() / kept["LoRA, NF4 base"].weights
found(0.4 < share < 0.6, f"the embedding is {share:.0%} of the weights that are left, about half")
{name: round(m.total / 1e6, 2) for name, m in kept.items()}
# %% [markdown]
# The adapters make gradients and optimizer state small, NF4 the weights. (About half of the weights that are
# left is the bundled model's embedding, in float32.) Now the large model, its embedding and head in 16
# bits, at rank 8. **Predict:** 108 GB become ...?
# %%
from quantlab.lm import linear_layers

shapes = [one.weight.shape for one in linear_layers(big).values()]
packed = sum(rows * columns for rows, columns in shapes)
trained = sum(8 * (rows + columns) for rows, columns in shapes)
rest = sum(p.numel() for p in big.parameters()) - packed
frozen = packed * layer.base_layer.nbytes / W.numel() + 2 * rest  # bytes a weight: our layer's
whole = frozen + 16 * trained
found(whole < 2 * (packed + rest) / 3, "QLoRA keeps less than a third of the 16-bit weights")
parts = {"all weights": memory.total, "QLoRA": whole, "of that frozen": frozen,
         "trained": 16 * trained}
{part: f"{size / 1e9:.2f} GB" for part, size in parts.items()}
# %% [markdown]
# QLoRA keeps less than a third of what the weights alone would take in 16 bits. (Activations come on top. QLoRA
# as published also computes in bfloat16, where ours computes in float32, and its **paged optimizers** move the
# optimizer's state to the CPU's memory while a peak lasts.)
#
# ## 5. Teach it
# Forty steps (on a large model ten), each on 8 windows of 128 tokens: that is a few times through the days that
# it may read. The perplexity on the held-out ones is about 400 now.
# %%
guess = predict("The perplexity of the held-out days after forty steps?", ["300", "150", "50"])
# %% tags=["nbval-ignore-output"]
from quantlab.train.loop import finetune
from quantlab.train.lora import RECIPE

frozen = {name: b.clone() for name, b in learner.named_buffers()} | {
    name: p.clone() for name, p in learner.named_parameters() if not p.requires_grad}
recipe = RECIPE | {"steps": budget(model, RECIPE["steps"], least=10)}
history = finetune(learner, log, **recipe, held_out=held, check_every=8)
from quantlab.plots import plot_curves

plot_curves({"training batch": (range(len(history.losses)), history.losses),
             "held-out days": (history.checked_at, history.held_out)},
            xlabel="step", ylabel="loss, nats per token")
plt.show()
start, after = (perplexity(one, held, window=128) for one in (base, learner))
times = after.value / start.value
found(times < 0.8, f"the perplexity falls to {times:.2f} of what it was")
passes = recipe["steps"] * 8 * 128 / len(log)
print(f"NF4 {start.value:.0f}, taught {after.value:.1f} ± {after.stderr:.1f}: {passes:.1f} passes")
guess.reveal(min(("300", "150", "50"), key=lambda choice: abs(float(choice) - after.value)))
# %% [markdown]
# How sure is that? And has it learnt more than the words with which a day begins and ends ("Wind", "Glass",
# "Run", "All hands well")? Measure each held-out day alone, and only the paragraph in its middle, before and
# after.
# %% tags=["nbval-ignore-output"]
def nll_of_middles(one):
    middles = [day.split("\n\n")[1] for day in days[3::4]]
    return torch.tensor([perplexity(one, token_stream(tokenizer, [text])).nll for text in middles])

gain = nll_of_middles(base) - nll_of_middles(learner)
mean, stderr = gain.mean().item(), gain.std().item() / len(gain) ** 0.5
found(mean > 10 * stderr, f"the gain is {mean / stderr:.0f} times its error bar, over ten")
found(gain.min() > 0, "every day gains")
f"{mean:.2f} ± {stderr:.2f} nats a token less; of {len(gain)} days the least gains {gain.min():.2f}"
# %% [markdown]
# So the gain is more than that of the fixed words. (A part of it may come from names: the held-out days have the
# same crew.) And the base?
# %% tags=["nbval-ignore-output"]
now = {**dict(learner.named_buffers()), **dict(learner.named_parameters())}
assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
with torch.no_grad(), learner.disable_adapter():
    assert torch.equal(learner(held[None, :128]).logits, base(held[None, :128]).logits)
print(f"{len(frozen)} frozen tensors, codes and absmax among them: bit for bit what they were")

from quantlab.lm import generate

for name, one in {"before": base, "after": learner}.items():
    print(f"{name}: {generate(one, tokenizer, 'Day 12.', tokens=70, temperature=0.6, seed=1)}\n")
# %% [markdown]
# It is laid out as a log. What it says is nonsense: the model is a toy, and has read 65 days.
#
# ## 6. Beside it
# Does NF4 hold it back? Do the adapters? Has it learnt more than which words are frequent? `python -m recipes.lora`
# has trained the same 40 steps on the float base; with all weights (at a tenth of the rate); on the same days,
# their tokens shuffled; and with other ranks, for section 8. Its results for the bundled model are in
# `data/checkpoints/lora/log.json`.
#
# **Predict** the order of the four. How much will shuffled tokens teach?
# %%
import json

from quantlab.lm import DATA

run = json.loads((DATA / "checkpoints/lora/log.json").read_text())
runs = run["runs"]
print(run["command"], run["on"])
nll = {name: r["style"]["nll"] for name, r in runs.items()}
assert run["recipe"]["full_rate"] == run["recipe"]["learning_rate"] / 10  # of all weights
for name in ("rank 0", "rank 8", "float base, rank 8", "all weights", "shuffled tokens, rank 8"):
    style, trained = runs[name]["style"], runs[name]["trained"]
    print(f"{name:24} {trained:>9,} trained   perplexity {style['perplexity']:5.1f}")
behind = nll["rank 8"] - nll["float base, rank 8"]
assert abs(behind) < 0.03 * (nll["rank 0"] - nll["rank 8"])
assert nll["all weights"] < nll["rank 8"]
assert nll["shuffled tokens, rank 8"] > nll["rank 0"] + 0.1
found(abs(nll["rank 8"] - after.nll) < 0.2, "the run's rank 8 is what we have just trained")
f"NF4 is {behind:.3f} nats behind the float base, of {nll['rank 0'] - nll['rank 8']:.2f} learnt"
# %% [markdown]
# (Rank 0: the NF4 model as it was.) If NF4 holds the adapters back, then by little: the float base is ahead by
# 0.014 of the 2.23 nats that were learnt. (A comparison day by day would be surer, as notebook 11 showed, but the
# log kept no days.) All weights, at their own rate, learn more. Shuffled tokens leave the model worse than
# *untouched*, and worse than the table of counts: to know the frequent words does not bring the gain, it takes
# their order.
#
# ## 7. What it forgot
# Learning a log, a model may forget its stories: *catastrophic forgetting* (灾难性遗忘). On the workbook's usual
# stories, KL from the float model says how far the predictions have moved, perplexity how well they still
# fit. (Now in windows of 512 tokens: more context than in section 1, and so a lower perplexity.)
# %%
kl, stderr, fit = ({name: r["stories"][what] for name, r in runs.items()}
                   for what in ("kl", "stderr", "perplexity"))
print(f"stories: float {fit['float']:.1f}, NF4 {fit['rank 0']:.1f}")
guess = predict("The stories' perplexity, 42 for NF4, after the log?", ["42", "55", "400"])
# %% tags=["nbval-ignore-output"]
shown = {"float": "float", "rank 0": "NF4", "rank 8": "NF4,\nrank 8",
         "float base, rank 8": "float,\nrank 8", "all weights": "all\nweights"}
_, axes = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
for ax, values, label in zip(axes, (kl, fit), ("KL, nats", "perplexity"), strict=True):
    bars = {short: values[name] for name, short in shown.items()}
    plot_bars({"stories": bars}, ylabel=f"{label}, on stories", ax=ax)
    ax.tick_params("x", labelsize="small")
axes[0].errorbar(range(len(shown)), [kl[name] for name in shown], [stderr[name] for name in shown],
                 fmt="none", color="black", capsize=4)
axes[0].set_title("± standard error", fontsize="medium")
plt.show()
assert kl["rank 8"] > kl["all weights"]
assert kl["all weights"] > 10 * kl["rank 0"]
print({name: f"KL {kl[name]:.2f}, perplexity {fit[name]:.1f}" for name in shown})
assert fit["rank 8"] / fit["rank 0"] > 1.15  # it rises,
assert fit["rank 8"] / fit["rank 0"] < 1.5  # by less than a half
assert fit["float"] < fit["all weights"]
assert fit["all weights"] < fit["rank 8"]
guess.reveal(min(("42", "55", "400"), key=lambda choice: abs(float(choice) - fit["rank 8"])))
# %% [markdown]
# Teaching has made the KL more than ten times that of NF4, but perplexity has risen by less than a half. For
# quantization KL is the measure, since the aim is the *same* model. A model that is taught is meant to become
# another one: look at what it can no longer do.
#
# LoRA is said to learn less and forget less than training all weights (Biderman et al. 2024, on large
# models). Here all weights, at a tenth of the rate, learnt more *and* forgot less. That is one run each, with
# no rate tuned, and so no verdict (exercise 15.5 goes on). What only adapters have is `disable_adapter()`:
# it brings the unchanged base back, stories and all.
# %% [markdown]
# ## 8. Drag it
# The adapters of five ranks, from the same run. **Predict** three things first:
#
# 1. How much of rank 16's gain does rank 1 have? Does each doubling add as much as the one before?
# 2. Does a higher rank move further away on the stories?
# 3. An update BA of rank 16 has 16 singular values (奇异值), the sizes of its 16 directions. Are they alike? And
#    which layer of block 1 has the largest update?
# %% tags=["nbval-ignore-output"]
from quantlab.train.lora import RANKS, load_adapters

its_model, its_tokenizer = load_lm(str(DATA / "model"))  # to which the adapters belong
its_base = nf4_model(its_model)

def result(rank):
    one, r = add_lora(its_base, rank=max(rank, 1)), runs[f"rank {rank}"]
    if rank:
        load_adapters(DATA / f"checkpoints/lora/rank_{rank}.safetensors", one)
    text = generate(one, its_tokenizer, "Day 12.", tokens=30, temperature=0.6, seed=1)
    updates = {name.removeprefix("model.layers."): (a.lora_A["default"].weight,
                                                    2 * a.lora_B["default"].weight)
               for name, a in lora_layers(one).items() if "layers.1." in name}
    return {"rank": rank, "trained": r["trained"], "text": text, "updates": updates,
            "kl": r["stories"]["kl"], "perplexity": r["style"]["perplexity"],
            "stderr": r["style"]["stderr"]}
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

from quantlab.explorers import explore_rank

results = [result(rank) for rank in tqdm((0, *RANKS), leave=False)]
explore_rank(results, rank=8)
# %% tags=["nbval-ignore-output"]
gains = [nll[f"rank {rank}"] - nll[f"rank {2 * rank}"] for rank in (1, 2, 4, 8)]
assert gains == sorted(gains, reverse=True)
share = (nll["rank 0"] - nll["rank 1"]) / (nll["rank 0"] - nll["rank 16"])
assert share > 0.7  # rank 1 has most of the gain,
assert share < 0.9  # not all of it
assert kl["rank 1"] > 0.8 * kl["rank 16"]
size = {name: (B @ A).norm() for name, (A, B) in results[-1]["updates"].items()}
assert ".mlp." in max(size, key=size.get)
for A, B in results[-1]["updates"].values():
    square = torch.linalg.svdvals(B @ A).square() / (B @ A).square().sum()
    assert square[0] > 1 / 4
    assert square[:8].sum() > 0.9
print(f"rank 1 has {share:.0%} of rank 16's gain, in nats")
print("each doubling adds", [round(gain, 2) for gain in gains])
# %% [markdown]
# **What you saw.** (1) Rank 1 has most of the gain; each doubling adds less than the one before. (2) A little:
# rank 1 moves nearly as far. (3) In each layer of block 1 the first of 16 directions holds more than a quarter of
# the update's square, and half of the directions hold more than nine tenths. In block 1 the MLP has the largest
# update. LoRA bets on few directions.
#
# ## 9. Merging, and its cost
# An adapter costs two more products a layer. Merging adds (α/r)·BA to the weight; the sum is on no NF4
# grid.
# **Predict** for each way its distance from the trained model, and its bytes: merge in 16-bit floats; merge and
# round to NF4 again; add BA to the *original* float weights, beside which it was not trained.
# %% tags=["nbval-ignore-output"]
import copy

from quantlab.lm import model_bytes
from quantlab.train.lora import merge, nf4_linear

graft = add_lora(model, rank=8)
adapters = {name: t for name, t in learner.state_dict().items() if "lora_" in name}
graft.load_state_dict(adapters, strict=False)
merged = merge(learner)
half, grafted = (copy.deepcopy(one).bfloat16().float() for one in (merged, merge(graft)))
kinds = {"adapters beside NF4": learner, "merged, 16 bits": half,
         "merged, NF4 again": nf4_model(merged), "on the original, 16 bits": grafted}
cost = {}
for name, one in kinds.items():
    fit, apart = perplexity_and_divergence(learner, one, held, window=128)
    size = model_bytes(one)
    cost[name] = apart, fit, size
    print(f"{name:24} {size / 1e6:.2f} MB   KL {apart.kl:.5f}   perplexity {fit.value:.1f}")
# %% tags=["nbval-ignore-output"]
(_, _, small), (close, _, large), (rounded, _, least), (elsewhere, _, _) = cost.values()
assert divergence(learner, merged, held, window=128).kl < 1e-4  # in float32
found(close.kl < 1e-3, "16 bits cost next to nothing")
found(elsewhere.kl > 1e-3, "the original weights cost more")
found(rounded.kl > elsewhere.kl, "and NF4 again costs most")
assert least < small
assert small < large
apart = nll_of_middles(grafted) - nll_of_middles(learner)  # day by day
sure = apart.std().item() / len(apart) ** 0.5
found(apart.mean().abs() < 0.1, f"on the original weights it fits worse by {apart.mean():.3f} nats")
print(f"on the original weights: {apart.mean():.3f} ± {sure:.3f} nats a token more than beside NF4")
first = divergence(model, base, held, window=128)  # what rounding the float model cost
times = rounded.kl / first.kl
found(0.5 < times < 2, f"rounding again costs {times:.2f} of what the first time did")
f"rounded once more: KL {rounded.kl:.3f}; the first rounding: {first.kl:.3f}"
# %% [markdown]
# Merged in floats it is all but the same model, and as large as a float one (counted in 16 bits). Rounded once
# more, it loses about as much as the first rounding cost. On the original weights it fits the log nearly as well,
# measured day by day, but nobody has trained that model. Keep adapters beside their base, or merge in floats;
# measure what you ship.
#
# ## 10. Controls
# Three, of which each asks what the gain is made of:
#
# (a) One that must fail: B stays at zero and only A is trained.
#
# (b) As many steps, of 4 windows each, on the workbook's calibration *stories*. How much of the gain is the log's?
#
# (c) No training at all: the *untouched* model, its logits divided by a temperature T that is fitted to the days
# (notebook 13's last myth). How much of the gain is only being less sure?
# %% tags=["nbval-ignore-output"]
stuck, untouched = add_lora(base, rank=8), lora_layers(add_lora(base, rank=8))  # of the same seed
for layer in lora_layers(stuck).values():
    layer.lora_B["default"].requires_grad_(False)
finetune(stuck, log, **recipe | {"steps": 3, "batch": 1})
for name, layer in lora_layers(stuck).items():
    assert torch.equal(layer.lora_A["default"].weight, untouched[name].lora_A["default"].weight)
assert divergence(stuck, base, held[:128], window=128).kl == 0

other = add_lora(base, rank=8)
finetune(other, token_stream(tokenizer, load_text("calibration")), **recipe | {"batch": 4})
control = perplexity(other, held, window=128)
of_stories = (start.nll - control.nll) / (start.nll - after.nll)
own, moved = perplexity(other, stories, window=128), divergence(model, other, stories).kl
of_nf4 = divergence(model, base, stories).kl
found(0.1 < of_stories < 0.5, f"stories bring {of_stories:.0%} of the log's gain")
found(own.value < 0.8 * before["stories"].value, "they lower other stories' by over a fifth")
found(moved > 5 * of_nf4, f"they move the model {moved / of_nf4:.1f} times as far as NF4 did")
print(f"after stories: log {control.value:.0f}, {of_stories:.0%} of the gain")
print(f"stories {before['stories'].value:.0f} → {own.value:.0f}")
shares = {"none": 0, "a tenth": 0.1, "two fifths": 0.4, "four fifths": 0.8}
guess = predict("T alone: which part of the gain?", list(shares))
# %% tags=["nbval-ignore-output"]
import torch.nn.functional as F

def at_temperatures(one, text):  # nats a token, for each temperature
    windows = text[:len(text) // 128 * 128].view(-1, 128)
    with torch.no_grad():
        logits = one(windows).logits[:, :-1].flatten(0, 1)
    said = windows[:, 1:].flatten()
    return {t / 10: F.cross_entropy(logits / (t / 10), said).item() for t in range(8, 25, 2)}

losses = {"untouched": at_temperatures(base, held), "stories": at_temperatures(other, held),
          "log": at_temperatures(learner, held)}
best = {name: min(loss, key=loss.get) for name, loss in losses.items()}
least = {name: losses[name][best[name]] for name in losses}
for name in losses:
    as_it_is, fitted = (torch.tensor(n).exp() for n in (losses[name][1.0], least[name]))
    print(f"{name:10} perplexity {as_it_is:5.0f}; {fitted:5.0f} at its best T, {best[name]}")
# %% tags=["nbval-ignore-output"]
as_it_is, best_T = losses["untouched"][1.0], least["untouched"]
of_sureness = (as_it_is - best_T) / (as_it_is - losses["log"][1.0])
at_best = (best_T - least["stories"]) / (best_T - least["log"])
found(0.25 < of_sureness < 0.55, f"a temperature alone brings {of_sureness:.0%} of the gain")
found(at_best < 0.5 * of_stories, f"at the best T each, stories bring {at_best:.0%}")
found(torch.tensor(best_T).exp() < 0.6 * table, "less sure, it is far ahead of the counts")
print(f"T alone: {of_sureness:.0%} of the gain; stories, each at its best T: {at_best:.0%}")
print(guess.reveal(min(shares, key=lambda words: abs(shares[words] - of_sureness))))
score()
# %% [markdown]
# (a) Nothing comes through B = 0: A does not move, and the output stays the same to the last bit.
#
# (c) A single number, without any training, brings about two fifths of the gain: the untouched model is far too
# sure of itself on the log. Less sure, it is far ahead of the table of counts of section 1: it does know something.
#
# (b) Stories lower the log's perplexity too, and that of other stories of this workbook. One might say that the
# model got used to how the workbook writes. But fit T for each model, and over half of that share is gone: what
# the stories taught was mostly to be less sure. What the *log* taught remains: at the best T each, the learner is
# still far ahead.
#
# (T is fitted on the very days on which it is measured. That flatters each of the three models a little.)
# %% [markdown]
# ## 11. The ledger
# The workbook's usual row, on the usual stories: it says how far teaching has moved the model, not what the
# model has learnt. (The last columns are the seconds and the tokens of training.)
# %% tags=["nbval-ignore-output"]
from quantlab import ledger

row = ledger.measure(model, learner, stories, method="qlora", bits=4, group="64",
                     seconds=history.seconds, calibration_tokens=recipe["steps"] * 8 * 128)
ledger.append(row)
found(row.kl > 5 * of_nf4, f"teaching moved it {row.kl / of_nf4:.1f} times as far as NF4 did")
ledger.Table([row])
# %% [markdown]
# ### Myth: "NF4 is a quantization method that only saves memory and is always slower"
# Three claims. *A method?* NF4 is a data type: a table of levels and a layout of bytes. Which model is rounded to
# it, and how, is another question. *Only memory?* The memory that it saves makes training fit (section 4).
#
# Is it *always slower*? **Predict:** how many times a float layer's time does ours take for 1 token, and
# for 1024?
# %% tags=["nbval-ignore-output"]
from timeit import repeat

def fastest(f, x):
    return min(repeat(lambda: f(x), number=1, repeat=7))

dense = torch.nn.Linear(1024, 1024, bias=False).requires_grad_(False)
coded, sizes = nf4_linear(dense), [1, 4, 16, 64, 256, 1024]
ratios = [fastest(coded, x) / fastest(dense, x) for x in (torch.ones(size, 1024) for size in sizes)]
plot_curves({"NF4 layer": (sizes, ratios)}, xlabel="tokens at once",
            ylabel="time, float layer = 1", log="x")
plt.axhline(1, color="0.6")
plt.show()
found(ratios[0] > 2 * ratios[-1], "decoding costs far more for 1 token than for 1024", of="machine")
found(ratios[0] > 2, "for 1 token the NF4 layer takes over twice the time", of="machine")
found(ratios[-1] < 2, "for 1024 tokens it takes less than twice the time", of="machine")
each = 8 * coded.nbytes / dense.weight.numel()
assert each < 32 / 7
print(f"{each:.3f} bits a weight: {each / 16:.2f} of 16 bits")
f"{ratios[0]:.1f} times the float layer's time for 1 token, {ratios[-1]:.2f} times for 1024"
# %% [markdown]
# Decoding costs the same for any number of tokens. For a thousand, as in training, it is the smaller part of the
# time. For one it is most of it, *in this layer*, which writes the decoded weight to memory and reads it again. A
# kernel that decodes in registers reads less than a seventh of float32's bytes (about a quarter of 16
# bits'). With one token there is little to compute for each byte read: there 4 bits can win, which we have
# not measured. Speed is a matter of kernel and shape (notebook 07).
#
# ## 12. Exercises
# ### Exercise 15.4: an adapter on a budget (about 15 minutes)
# Full fine-tuning has added `update` to a layer. Find A and B with at most `numbers` numbers together so
# that B A is as near to it as can be: its squared error at most `1.01` times the least. Return A, (rank, in), and B,
# (out, rank); `update` is (out, in), of any shape.
# %% tags=["exercise"]
def my_factors(update, numbers):
    raise NotImplementedError  # return A, B
# %%
check("15.4", my_factors)
# %% [markdown]
# ### Exercise 15.5: remember the stories (about 30 minutes, no check)
# Mix stories from `load_text("calibration")` into the training text, a quarter, a half. How much perplexity
# on the stories does that save, at what price on the log? Is a lower rate, or fewer steps, a better
# bargain?
#
# ### Open
# 1. Put adapters beside the attention layers only, or the MLP only, with as many trained numbers. Which serves the
#    log better? (`peft.LoraConfig(target_modules=...)`.)
# 2. Start from 2 bits instead of NF4: can rank 16 repair the damage *and* learn the log? LoftQ and PiSSA start A and B
#    from the singular vectors of the quantization error, or of W. Try it.
# %% [markdown]
# ### Recap
# - AdamW in float32 keeps 16 bytes for each weight; QLoRA 4.127 bits for a frozen one, 16 bytes for a trained one.
# - Beside W goes (α/r)·BA, with B = 0 at the start: the outputs are the frozen model's, and B moves first.
# - The gradient passes *through* the frozen weight, decoded again; the base stays the same bit for bit.
# - It learns the new and forgets some of the old; without the adapter the old is back. Measure both.
# - A part of a gain in perplexity may be mere sureness: fit the untouched model's temperature before you call it
#   learning.
# - Merged in floats it predicts the same, in more bytes; rounded again it is another model.
#
# Next: [16 A real language model](16_a_real_model.ipynb) asks which of all these sentences hold for a larger one.
