# %% [markdown]
# # 10b GPTQ on a model
# *60 minutes with exercise 10.4, of which the computer needs about two; exercise 10.5 takes 15 more. You need
# notebook 10.*
#
# The loop of notebook 10 is short; how well it does depends on what you feed it. At the end of this notebook you can
#
# - say which old problem GPTQ solves, and predict its error from notebook 01's s²/12;
# - choose damping (阻尼), groups, act-order and calibration (校准) data, knowing what each costs;
# - run it on a whole language model, and say how sure you are of what it gave back.
# %% [markdown]
# ### Recall
# 1. What does GPTQ need to know of a layer's inputs?
# 2. A weight is rounded. By what do the others move, so that the output suffers least?
# 3. Which of the two is smaller after GPTQ than after round-to-nearest: the error of the weights, or that of the
#    outputs?
#
# <details><summary>Answers</summary>
# 1. H = XᵀX alone. 2. By a multiple of its column of H⁻¹. 3. That of the outputs; the weights lie further
#    away.</details>
#
# We go on with the layer of notebook 10, a query layer at 3 bits with one scale a row: its weight, its inputs on
# calibration text, their H, and the weight by round-to-nearest and by GPTQ. (A model larger than the bundled one
# reads fewer tokens here than the text says: `budget`.)
# %%
import matplotlib.pyplot as plt
import torch

from quantlab import Hessian, PerAxis, gptq_quantize, quantize_tensor
from quantlab.checks import check, found, hint, solution
from quantlab.lm import (budget, capture_inputs, layers_of_role, load_lm, load_text, token_stream,
    weight_of)

plt.rcParams["figure.figsize"] = 7, 2.6
model, tokenizer = load_lm()
calibration = token_stream(tokenizer, load_text("calibration"))
name, layer = list(layers_of_role(model, "query").items())[:2][-1]  # of the second block
count = budget(model, 8192, least=4096)
weight, x = weight_of(layer), capture_inputs(model, calibration[:count], [name])[name]
hessian = Hessian(weight.shape[1]).add(x)
nearest = quantize_tensor(weight, bits=3, granularity=PerAxis(0), symmetric=False).dequantize()
gptq = gptq_quantize(weight.double(), hessian, bits=3)
# %% [markdown]
# ## 1. An old problem, and the error that it predicts
# Write H = RᵀR with R upper triangular. Then the error of a row is the squared length of R·(w − q): one number for
# each line of R, and line i involves column i and those after it. All points R·q with q on the grid form a *lattice*,
# and we look for the one nearest to R·w: a hard problem with a good fast answer from the 1980s. Babai's **nearest
# plane** begins with the last line, which involves one column only, and works its way up.
#
# ### Exercise 10.4: the nearest plane (about 15 minutes)
# `R` is (n, n), upper triangular. From the last column of `W` (rows, n) to the first: let qᵢ be the multiple of
# `scale` that brings line i, Rᵢᵢ(wᵢ − qᵢ) + Σⱼ Rᵢⱼ(wⱼ − qⱼ) with j > i, nearest to 0. Return Q, (rows, n); leave W as
# it is.
# %% tags=["exercise"]
def my_nearest_plane(W, R, scale):
    raise NotImplementedError
# %%
check("10.4", my_nearest_plane)
# %% [markdown]
# No inverse of H anywhere. **Predict**: the loop of exercise 10.3 gets the same columns in reverse order, the last
# one first. In how many elements do the two results differ?
# %% tags=["nbval-ignore-output"]
from quantlab.exercises.gptq import babai_solution, column_solution

few = hessian.matrix[:64, :64]
few = few + 0.01 * hessian.matrix.diagonal().mean() * torch.eye(len(few))
# A grid of 3 bits for all rows.
some, step = weight[:, :64].double(), weight.abs().max().item() / 3.5
plane = babai_solution(some, torch.linalg.cholesky(few, upper=True), step)
U = torch.linalg.cholesky(torch.linalg.inv(few.flip(0, 1)), upper=True)
backwards = column_solution(some.flip(1), U, step).flip(1)
differ = (plane - backwards).abs() > step / 2
assert differ.double().mean() < 0.001  # none, but where last digits decide
f"{int(differ.sum())} of {differ.numel()} elements differ"
# %% [markdown]
# GPTQ, last column first, *is* Babai's algorithm (found in 2025, independently by Birnick and by Chen et al.): what
# looked like a trick has a geometry. The error can be foretold as well. A row's error is the sum of the
# squares of e = (wᵢ − qᵢ)/Uᵢᵢ. As long as nothing is clamped, wᵢ − qᵢ lies anywhere within half a step, and has the
# mean square of notebook 01, s²/12. So the mean error of a row should be
#
# $$\frac{s^2}{12}\sum_i \frac{1}{U_{ii}^2}$$
#
# **Predict**: does a formula that knows nothing of W come within 2 %, 10 % or 50 %?
# %% tags=["nbval-ignore-output"]
from quantlab.predictions import predict, score

close = predict("The measured error of GPTQ is off from (s²/12)·Σ 1/Uᵢᵢ² by at most",
                ["2 %", "10 %", "50 %"])
# %% tags=["nbval-ignore-output"]
U = torch.linalg.cholesky(torch.linalg.inv(few), upper=True)
fine = step / 8  # a finer grid: errors spread evenly over a step
lost = some - column_solution(some, U, fine)
measured, formula = (((lost @ few) * lost).sum(1).mean(),
    fine**2 / 12 * (1 / U.diagonal().square()).sum())
off = abs(measured / formula - 1).item()
found(off < 0.1, f"the formula is off by {off:.1%}, less than a tenth")
print(f"measured over the formula: {measured / formula:.3f}")
close.reveal("2 %" if off < 0.02 else "10 %" if off < 0.1 else "50 %")
# %% [markdown]
# So the step and H, through U, say how good GPTQ will be. Twice the step makes four times the error, just as for
# round-to-nearest, whose mean error has H's diagonal in the place of 1/Uᵢᵢ². (For the first of the two weights in
# section 4 of notebook 10 these were 4 and 2.)
#
# ## 2. Drag it
# The whole layer. A *group* of columns has a scale of its own; *act-order* takes the columns with the
# loudest inputs first; *damping* makes H more diagonal. **Predict:** which lowers the output error, and
# which costs bits? Fewer bits · smaller groups · act-order · more damping.
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_gptq

explorer = explore_gptq(weight, hessian, bits=4)
explorer
# %% [markdown]
# **What you saw.** GPTQ's weight error is larger than rounding's, its output error smaller; at 4 bits every row's dot
# lies below the diagonal. Groups lower both errors and cost bits. Act-order is free with one scale a row, but not
# with groups. Much damping takes the gain away.
#
# ## 3. The knobs, measured
# ### How much calibration data, how much damping?
# From t tokens comes an H of rank t at most; with fewer tokens than inputs it has no inverse. *Damping* adds to
# the diagonal, as a fraction of its mean; 0.01 is the paper's choice.
#
# **Predict:** we calibrate on 128 tokens, half as many as the layer has inputs, and on all 8192. Which looks better
# on the calibration tokens themselves, which on fresh ones? Which needs more damping?
# %%
fresh = Hessian(weight.shape[1]).add(
    capture_inputs(model, calibration[count : 2 * count], [name])[name])

def of_plain(seen, judge=fresh, **options):  # output error, times rounding's
    q = gptq_quantize(weight, seen, bits=3, **options).dequantize()
    return judge.output_error(weight, q) / judge.output_error(weight, nearest)

width = weight.shape[1]
sizes = [size for size in (width // 2 * 2**k for k in range(7)) if size <= count]
dampings = [1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 100]
calibrated = {size: Hessian(weight.shape[1]).add(x[:size]) for size in sizes}
flattered = [of_plain(seen, judge=seen) for seen in calibrated.values()]
honest = [of_plain(seen) for seen in calibrated.values()]
by_damping = {size: [of_plain(calibrated[size], damping=d) for d in dampings]
    for size in (sizes[0], sizes[len(sizes) // 3], sizes[-1])}
# %% tags=["nbval-ignore-output"]
from quantlab.plots import plot_bars, plot_curves

_, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
plot_curves({"on fresh tokens": (sizes, honest), "on the calibration tokens": (sizes, flattered)},
    xlabel="calibration tokens, damping 0.01", ylabel="output error, times rounding's", log="x",
    ax=left)
plot_curves({f"{size} tokens": (dampings, errors) for size, errors in by_damping.items()},
    xlabel="damping (fresh tokens)", ylabel="", log="x", ax=right)
left.set_ylim(0, 1.3)
plt.show()
# %% tags=["nbval-ignore-output"]
few, many = by_damping[sizes[0]], by_damping[sizes[-1]]
spectrum = torch.linalg.eigvalsh(calibrated[sizes[0]].matrix)
assert (spectrum < 1e-6 * spectrum.sum()).sum() >= width - sizes[0]
found(flattered[0] < 0.8 * flattered[-1],
    f"few tokens look better on themselves: {flattered[0]:.2f} "
    f"times rounding's error, {sizes[-1]} tokens {flattered[-1]:.2f}")
found(honest[-1] < 0.8 * honest[0], f"and serve worse: {honest[0]:.2f} against {honest[-1]:.2f}")
found(few[0] > 1, f"few tokens, hardly any damping: {few[0]:.2f} times rounding's error")
found(min(few) < 0.8 * few[2],
    f"few tokens want more than 0.01: {few[2]:.2f} falls to {min(few):.2f}")
worst = max(many[:4]) / min(many)
found(worst < 1.2, f"with {sizes[-1]} tokens damping up to 0.1 costs {worst - 1:.0%} at most")
by_eight = honest[:5][-1] / honest[-1]  # eight times as many tokens as inputs
found(by_eight < 1.1, f"more than 8 tokens an input change little: {by_eight:.2f} times the error")
print(f"few tokens, damping 0.0001, 0.01, best: {few[0]:.2f}, {few[2]:.2f}, {min(few):.2f}")
print("by tokens, damping 0.01:", {n: round(e, 2) for n, e in zip(sizes, honest, strict=True)})
# %% [markdown]
# With few tokens GPTQ fits their noise: excellent on what it saw, worse on what comes. Half as many tokens as inputs
# and next to no damping are *worse than rounding* here: half of the directions were never seen, and there GPTQ takes
# errors to be free. Damping says that no error is free; the fewer the tokens, the more of it is needed. With all 8192
# tokens, any damping up to 0.1 does about as well. And beyond 2048 tokens, eight times as many as inputs, more of
# them change little. So take at least eight tokens for each input, and leave damping at 0.01. (Below two, `quantize_lm`
# warns. On a real model, whose layers are up to 1,536 wide, 1,024 tokens make the widest layers worse than nearest
# rounding does: [notebook 16](16_a_real_model.ipynb), section 7.)
#
# ### Which text?
# **Predict** the order: 4096 tokens of stories; the same shuffled; *random* tokens; the first 256 of the stories 16
# times; and for a control, normal noise of the same shape in place of the layer's inputs.
# %% tags=["nbval-ignore-output"]
random, story = torch.Generator().manual_seed(0), calibration[: budget(model, 4096)]
vocabulary = len(model.get_input_embeddings().weight)
texts = {"stories": story, "shuffled": story[torch.randperm(len(story), generator=random)],
    "random": torch.randint(3, vocabulary, (len(story),), generator=random),
    f"{len(story) // 16} x 16": story[: len(story) // 16].repeat(16)}
seen = {kind: capture_inputs(model, text, [name])[name] for kind, text in texts.items()}
seen["noise"] = torch.randn(len(story), weight.shape[1], generator=random)
of_text = {kind: of_plain(Hessian(weight.shape[1]).add(read)) for kind, read in seen.items()}
plot_bars({"fresh stories": of_text}, ylabel="output error,\ntimes rounding's")
plt.show()
stories, shuffled, chance, repeated, noise = of_text.values()
print("times rounding's error:", {kind: round(error, 2) for kind, error in of_text.items()})
found(shuffled < 1.2 * stories, "shuffled stories serve nearly as well as stories")
found(min(chance, repeated) > 1.2 * stories, "random tokens and repeated text serve less")
found(chance < 0.7, "random tokens still take a good part away")
found(repeated < 0.95, "repeated text does so too")
found(noise > 0.95, "noise does not help")
# %% [markdown]
# For this layer of the bundled model shuffled stories serve nearly as well as stories: it is enough that the right
# tokens come. Random tokens still take away about half of the error, so a good part of H comes with the model,
# whatever it reads. Little text, however often repeated, is little text. And noise that never was this
# layer's input gains *nothing*.
#
# ### Groups and act-order
# **Predict:** which is worth more, groups of 16 with plain rounding, or GPTQ with one scale a row?
# %% tags=["nbval-ignore-output"]
from quantlab import PerGroup

curves = {"round to nearest": ([], []), "GPTQ": ([], []), "GPTQ, act-order": ([], [])}
for size in (None, 128, 64, 32, 16):
    qs = (quantize_tensor(weight, bits=3, granularity=PerGroup(size or width), symmetric=False),
          gptq_quantize(weight, hessian, bits=3, group_size=size),
          gptq_quantize(weight, hessian, bits=3, group_size=size, act_order=True))
    for q, (bits, errors) in zip(qs, curves.values(), strict=True):
        bits.append(q.bits_per_element)
        errors.append(fresh.output_error(weight, q.dequantize()))
ordered, unordered = curves["GPTQ, act-order"], curves["GPTQ"]
index = ordered[0][-1] - unordered[0][-1]  # bits, in groups of 16
assert abs(index - 32 / len(weight)) < 1e-6
# %% tags=["nbval-ignore-output"]
plot_curves(curves, xlabel="true bits per weight (row, groups of 128, 64, 32, 16)",
    ylabel="output error", log="y")
plt.show()
coarse = unordered[1][0] / curves["round to nearest"][1][-1]
found(coarse < 1,
    f"GPTQ with one scale a row beats rounding in groups of 16: {coarse:.2f} times its error")
gains = [a / b for a, b in zip(ordered[1], unordered[1], strict=True)]
found(max(gains) < 1, "act-order lowers every error")
print(f"GPTQ, a scale a row: {unordered[0][0]:.2f} bits; groups of 16: {unordered[0][-1]:.2f}")
f"act-order leaves {min(gains):.2f} to {max(gains):.2f} of the error; its index: {index:.3f} bits"
# %% [markdown]
# GPTQ with one scale a row (3.14 bits) beats rounding in groups of 16 (5.19 bits). Act-order lowers every error: the
# loudest columns are rounded while many others can take over their errors. But with groups the order must be stored,
# 32 bits a column. Over 256 rows that is an eighth of a bit per weight, so that blue and green lie nearly on one
# line; over 4096 rows it would be less than a hundredth. (Numbers of the bundled model.)
#
# ## 4. The control that must fail
# If the gain comes from the correlations of *this* layer's inputs, it must go when they go. Take an H that is
# diagonal; or the true inputs with their channels shuffled. **Predict** for each: better than rounding, exactly
# as good, or worse?
# %% tags=["nbval-ignore-output"]
alone = Hessian(width).add(torch.eye(width))
same = (
    gptq_quantize(weight, alone, bits=3).dequantize() - nearest).abs() < 1e-6 * weight.abs().max()
assert same.double().mean() > 0.999  # all but ties
wrong = of_plain(
    Hessian(width).add(x[:, torch.randperm(width, generator=torch.Generator().manual_seed(0))]))
found(wrong > 1.2, f"the wrong correlations cost {wrong:.2f} times rounding's error")
f"output error, times rounding's: right inputs {of_plain(hessian):.2f}, shuffled inputs {wrong:.2f}"
# %% [markdown]
# Without correlations GPTQ *is* round-to-nearest, code for code. With the wrong ones it is worse. A
# "simplified GPTQ" that takes no data cannot be GPTQ.
#
# ## 5. The whole model
# Block by block: collect the inputs of the block's layers, quantize them, and let the quantized block feed
# the next one. Query, key and value read the same input, so they share one H. Round-to-nearest at the same
# bits stands beside it, and act-order at 3 bits. **Predict:** at 2 bits, is the model saved? And at 4:
# %% tags=["nbval-ignore-output"]
falls = ["below 1.5", "1.5 to 4", "over 4"]
fall_guess = predict("The KL of rounding at 4 bits, over GPTQ's, is", falls)
# %% tags=["nbval-ignore-output"]
from itertools import product

from tqdm.auto import tqdm

from quantlab import ledger
from quantlab.lm import longest_context, quantize_lm

# All, or fewer on a large model.
text = token_stream(tokenizer, load_text("eval"))[: budget(model, 4096)]
read = calibration[: budget(model, 8192, least=4096)]
ways = {"rtn": {}, "gptq": {}, "gptq act-order": {"act_order": True}}
models, rows = {}, {("float", 32): ledger.measure(model, model, text, method="float")}
jobs = [*product(("rtn", "gptq"), (4, 3, 2)), ("gptq act-order", 3)]
for way, bits in tqdm(jobs, leave=False):
    models[way, bits], report = quantize_lm(
        model, read, method=way.split()[0], bits=bits, progress=False, **ways[way])
    rows[way, bits] = ledger.measure(
        model, models[way, bits], text, method=way, bits=bits, group="128", report=report)
    ledger.append(rows[way, bits])
ledger.Table(list(rows.values()))
# %% [markdown]
# (Rounding takes nothing from the text that it is given: it reads 0 tokens.)
#
# Is the gain real? At 4 bits the two *perplexities* overlap within their error bars. But all models read
# the same windows, so we subtract window by window and ask for the error bar of the difference.
# %% tags=["nbval-ignore-output"]
from quantlab.metrics import kl_per_position

length = min(512, longest_context(model))
text = text[: len(text) // length * length]

@torch.no_grad()
def windows(new):
    return torch.cat([new(ids[None]).logits[:, :-1] for ids in text.split(length)])

reference = windows(model)
for bits in (4, 3, 2):
    rtn, gptq_kl = (kl_per_position(reference, windows(models[way, bits])).mean(1)
                    for way in ("rtn", "gptq"))
    mean, stderr = (gptq_kl - rtn).mean(), (gptq_kl - rtn).std() / len(rtn) ** 0.5
    found(mean < -10 * stderr, f"{bits} bits: the gain is {-mean / stderr:.0f} of its error bars")
    print(f"{bits} bits: KL of GPTQ minus KL of rounding {mean:.4f} ± {stderr:.4f}")
gap = rows["rtn", 4].perplexity - rows["gptq", 4].perplexity
bar = rows["rtn", 4].perplexity_error
found(gap < bar, f"at 4 bits the perplexities are {gap:.2f} apart, less than a bar of {bar:.2f}")
# %% tags=["nbval-ignore-output"]
kl = {key: row.kl for key, row in rows.items()}
titles, widths = {"rtn": "round to nearest", "gptq": "GPTQ"}, (2, 3, 4)
plot_curves({title: (widths, [kl[way, b] for b in widths]) for way, title in titles.items()},
    xlabel="bits", ylabel="KL to float, nats", log="y")
plt.gca().set_xticks(widths)
plt.show()
left = {b: kl["gptq", b] / kl["rtn", b] for b in widths}
found(max(left.values()) < 0.5,
    f"GPTQ leaves less than half of the KL: at most {max(left.values()):.2f}")
# At 2 bits the model is far from saved.
found(kl["gptq", 2] > 4 * kl["gptq", 3],
    f"2 bits cost over four times what 3 bits cost: {kl['gptq', 2] / kl['gptq', 3]:.1f} times")
ordered = kl["gptq act-order", 3] / kl["gptq", 3]
found(0.85 < ordered < 1, f"act-order gains little more, {ordered:.2f} of GPTQ's KL is left")
print("KL over rounding's:", {b: round(part, 2) for b, part in left.items()})
print(f"act-order at 3 bits, over GPTQ's KL: {ordered:.2f}")
fall_guess.reveal(falls[sum(kl["rtn", 4] > times * kl["gptq", 4] for times in (1.5, 4))])
# %% [markdown]
# At all three bit widths GPTQ takes away more than half of the bundled model's KL; act-order takes a little more. But
# what is left at 2 bits, a KL above 1, is a damaged model. Notebook 13 trains the weights themselves.
#
# ### Myth: "GPTQ quantizes the important weights more carefully"
# Two things to look at: the grids; and how far each column has moved, beside round-to-nearest. **Predict:** is
# the ratio below 1 for the loudest inputs (diag H large)? What else might it depend on?
# %% tags=["nbval-ignore-output"]
from quantlab import choose_qparams

grid = choose_qparams(weight.amin(1), weight.amax(1), qmin=-4, qmax=3)
assert torch.equal(gptq.qparams.scale[:, 0], grid.scale)
assert torch.equal(gptq.qparams.zero_point[:, 0], grid.zero_point)
moved = (gptq.dequantize().float() - weight).square().sum(0) / (nearest - weight).square().sum(0)
loudness = hessian.matrix.diagonal().float()
loudest = loudness.topk(len(loudness) // 10 + 1).indices
# %% tags=["nbval-ignore-output"]
plt.plot(moved, ".", color="0.6", label="all columns")
plt.plot(loudest, moved[loudest], "o", color="#D55E00", label=f"the {len(loudest)} loudest")
plt.gca().set(xlabel="column, in the order of rounding", ylabel="weight error,\ntimes rounding's")
plt.legend(fontsize="small")
plt.show()
measured = torch.stack([moved, torch.arange(len(moved)), loudness])
of_place, of_loudness = torch.corrcoef(measured)[0, 1:]
around = torch.stack([moved[max(0, i - 12) : i + 13].median() for i in range(len(moved))])
beside = (moved / around)[loudest].mean()
found(of_place > 0.7, f"the ratio goes with place: correlation {of_place:.2f}")
found(abs(of_loudness) < 0.35, f"it does not go with loudness: correlation {of_loudness:.2f}")
found(moved[loudest].mean() > 1.2,
    f"the loud end {moved[loudest].mean():.2f} times as far as by rounding")
print(f"the loud columns, over those around them: {beside:.2f}")
# %% [markdown]
# The same scales, zero points and bits for every weight: with one scale a row, GPTQ chooses *which* grid
# point, nothing else. (Later *groups* take their grid from moved weights.) Left to right the loud columns, too, end
# further from their originals than by rounding: place matters most, and who comes late has taken over more.
#
# And with act-order, where the loud columns come *first*? **Predict**: are they nearer to their originals then?
# %% tags=["nbval-ignore-output"]
ordered = gptq_quantize(weight.double(), hessian, bits=3, act_order=True).dequantize().float()
moved = (ordered - weight).square().sum(0) / (nearest - weight).square().sum(0)
others = torch.ones(len(moved), dtype=torch.bool).index_fill(0, loudest, False)
loud, quiet = moved[loudest].mean(), moved[others].mean()
found(
    loud < 1.3, f"with act-order the loudest end {loud:.2f} times as far as by rounding, below 1.3")
found(quiet > 1.3 * loud, f"the others end {quiet:.2f} times as far")
f"times rounding's weight error: the {len(loudest)} loudest {loud:.2f}, the others {quiet:.2f}"
# %% [markdown]
# With act-order the sentence is half true: the loud columns end hardly further away than by rounding, since few
# errors have been passed on to them yet. They still get no finer grid; their place in the order is all that they get.
#
# ## 6. Exercises
# ### Exercise 10.5: fit the budget (about 15 minutes)
# For this practice layer, return the settings, a dict, for `gptq_quantize(weight, hessian, **settings)` that reach,
# on tokens which were *not* calibrated on, an output error of at most **0.14 times round-to-nearest's at 4 bits per
# row**, with at most **4.5 bits** for each weight, scales included.
# %% tags=["exercise"]
from quantlab.exercises.material import layer_with_hessian

practice_weight, practice_hessian = layer_with_hessian()

def my_settings():
    raise NotImplementedError  # return {"bits": ..., ...}
# %%
check("10.5", my_settings)
# %% [markdown]
# ### Open
# 1. Quantize the whole model with random tokens for calibration text. Does it lose as much as the one layer
#    of section 3? Is the reason the same in the last block?
# 2. Round-to-nearest with a *searched clipping range* (notebook 02) also lowers the output error, and needs
#    no inverse. How much of GPTQ's gain can it reach alone? Do the two add up?
# %% tags=["nbval-ignore-output"]
score()
# %% [markdown]
# ### Recap
# - Last column first, GPTQ is Babai's nearest plane, and its error is (s²/12)·Σ 1/Uᵢᵢ².
# - Many more tokens than inputs, little damping, text of the right kind; groups cost bits, act-order an index.
# - Without the layer's own correlations nothing is gained.
# - Ask for the error bar of the *difference*: two models that read the same windows can be told apart.
# - GPTQ chooses which grid point, not a finer grid; who comes late in the order has taken over more.
#
# Next: [11 AWQ](11_awq.ipynb) scales the channels that matter before rounding.
