# %% [markdown]
# # 10 GPTQ
# *60 minutes, of which the computer needs about one. You need notebooks 03, 06 and 09.*
#
# GPTQ (Frantar et al. 2022) rounds the weights of a layer one column at a time, and lets the columns still
# to come absorb each error. At the end of this notebook you can
#
# - say what GPTQ minimises, and what it gives up for it;
# - derive it in three steps, from one weight to a whole matrix, and write the loop;
# - say why its weights lie further from the originals than rounding's, and its outputs nearer.
#
# Notebook 10b then turns its knobs, and runs it on the whole model.
# %% [markdown]
# ### Recall
# 1. What does SmoothQuant do with a loud input channel, and why may it?
# 2. Why does KL to the float model show damage before perplexity does?
# 3. How would you notice that somebody calibrated on the test text?
#
# <details><summary>Answers</summary>
# 1. It divides the channel and multiplies the weight's column: their product is the same. 2. In perplexity a gain
#    at one token can hide a loss at another; KL counts both as damage. 3. On fresh text the gain
#    shrinks.</details>
#
# ## 1. What broke
# At 3 bits round-to-nearest hurt the model of notebook 06, although no weight could have gone nearer. But what counts
# is the output, the sum Σ wᵢxᵢ of a row. Could the errors of several weights cancel in it? If the inputs xᵢ were
# independent and of mean 0, they could not. Are they independent, in a language model? (A model larger than the
# bundled one reads fewer tokens here than the text says: `budget`.)
# %%
import torch

from quantlab.checks import check, found, hint, solution
from quantlab.lm import (budget, capture_inputs, layers_of_role, linear_layers, load_lm, load_text,
    token_stream, weight_of)

model, tokenizer = load_lm()
calibration = token_stream(tokenizer, load_text("calibration"))
layers = {name: weight_of(layer) for name, layer in linear_layers(model).items()}
name = list(layers_of_role(model, "query"))[:2][-1]  # of the second block
count = budget(model, 8192, least=4096)
weight, x = layers[name], capture_inputs(model, calibration[:count], [name])[name]
# %% [markdown]
# How much of one input can be predicted from another one, and from all the others together? (The part of its variance
# that all the others predict is 1 − 1/[C⁻¹]ᵢᵢ, with C the correlations. Section 4 shows on two numbers where that
# comes from.)
# %% tags=["nbval-ignore-output"]
from quantlab.predictions import predict, score

parts = ["less than a tenth", "up to a half", "more than a half"]
from_others = predict("How much of the median input's variance do all the others predict?", parts)
# %% tags=["nbval-ignore-output"]
import matplotlib.pyplot as plt

from quantlab.plots import ERROR, OTHER

C = torch.corrcoef(x.double().T).nan_to_num()  # not a number: of an input that never changes
together = 1 - 1 / torch.linalg.inv(C + 1e-9 * torch.eye(len(C))).diagonal()
from_one = C[0, 1:].square()  # the first input, from each other alone
plt.rcParams["figure.figsize"] = 7, 2.6
plt.hist(
    [from_one, together], bins=40, color=[OTHER, ERROR],
    label=["the first input, from one other", "each input, from all the others together"])
plt.gca().set(xlabel="part of the variance that is predicted", ylabel="inputs")
plt.legend()
plt.show()
found(together.median() > 0.5, f"all the others predict {together.median():.0%} of the median")
found(from_one.median() < 0.1, f"one other predicts {from_one.median():.1%} of the first")
from_others.reveal(parts[sum(together.median().item() > limit for limit in (0.1, 0.5))])
# %% [markdown]
# One other input predicts little of the first; all the others together predict most of each input. That is the room
# GPTQ works in: what one weight does wrong, the others can put right.
#
# ## 2. By hand: four weights
# Four weights, the whole numbers 0 to 3 as the grid, and a layer that has read four tokens (the rows of X).
# The largest weight is the end of the grid and stays where it is; round-to-nearest makes 1, 0, 0 of the
# others.
# %%
w = torch.tensor([1.4, 0.4, 0.1, 3.0])
X = torch.tensor([[2.0, 2, 2, 1], [1, 2, 0, 2], [2, 1, 1, 0], [0, 0, 2, 0]])
# Rounded; outputs before, after.
[[round(v, 1) for v in y.tolist()] for y in (w.round(), X @ w, X @ w.round())]
# %% [markdown]
# All three errors point the same way, and so they add up in the output. **Predict:** is 1, 0, 0, 3 still
# the row with the best *output*? If not, how many times smaller can the squared error be? Only 256 rows of
# whole numbers exist; we try them all.
# %%
from itertools import product

def error(v):
    return (X @ (w - torch.as_tensor(v).float())).square().sum().item()

best = min(product(range(4), repeat=4), key=error)
f"output error: rounded {error(w.round()):.2f}, best of 256 {error(best):.2f}, which is {best}"
# %% [markdown]
# The best row lies far from the weights; its output error is thirty times smaller. But a row of 256 weights of 4 bits
# can be rounded in 16²⁵⁶ ways: we need a way to a *good* one.
#
# ## 3. What exactly is minimised
# For W (outputs × inputs) and X (tokens × inputs) we look for Q on the grid with the least
#
# $$\lVert XW^\top - XQ^\top\rVert^2 = \sum_{rows} (w-q)\,H\,(w-q)^\top, \qquad H = X^\top X \qquad (1)$$
#
# since ‖Xvᵀ‖² = vXᵀXvᵀ. H is all we need of the data; scaling it changes nothing (the library has 2/tokens
# · XᵀX). Each row is a problem of its own, and all rows share one H.
#
# ### Exercise 10.1: output error (about 3 minutes)
# Write the relative output error ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖², one number; `weight` and `weight_hat` are (out, in), `x` is
# (tokens, in).
# %% tags=["exercise"]
def my_output_error(weight, weight_hat, x):
    raise NotImplementedError
# %%
check("10.1", my_output_error)
# %% [markdown]
# ## 4. Four tools, on two numbers
# The derivation needs four things from linear algebra. If you know them, read the numbers only. Take a row of two
# weights and this H. Moving them by v costs v H vᵀ = 4v₁² + 4v₁v₂ + 2v₂².
# %%
H2 = torch.tensor([[4.0, 2.0], [2.0, 2.0]])
inverse2 = torch.linalg.inv(H2)

def cost(v):
    return (torch.tensor(v) @ H2 @ torch.tensor(v)).item()

assert torch.allclose(inverse2 @ H2, torch.eye(2))
inverse2.tolist(), cost([1.0, 0.0])
# %% [markdown]
# **The inverse** H⁻¹ undoes H: their product is 1 on the diagonal and 0 elsewhere. Moving the first weight alone by 1
# costs 4, H's entry (1, 1). **Predict**: the second weight may now move as it likes. How little can it cost?
# %%
by_second = {v2: cost([1.0, v2]) for v2 in (0.0, -0.5, -1.0, -1.5)}
assert min(by_second.values()) == by_second[-1.0]
assert abs(by_second[-1.0] - 1 / inverse2[0, 0]) < 1e-5
by_second
# %% [markdown]
# It costs 2, which is 1 over entry (1, 1) of the *inverse*. So H's diagonal tells what a move costs when nobody
# helps; 1 over the inverse's diagonal tells what it costs when everybody does.
#
# **A Lagrange multiplier** finds such a least value under a condition. At the best place the slope of the cost can
# only point along what the condition forbids: along any other direction one could still move, and would do better.
# The multiplier is the size of that slope. The slope of v H vᵀ is 2Hv; at v = (1, −1) it must be 0 for the free
# second weight:
# %%
v = torch.tensor([1.0, -1.0])
slope = 2 * H2 @ v
assert abs(slope[1]) < 1e-6
assert torch.allclose(v, inverse2[:, 0] / inverse2[0, 0])  # column 1 of the inverse, scaled
slope.tolist()
# %% [markdown]
# **Elimination** takes a weight out of an inverse: what is left for the second weight, once the first may no longer
# move, is 1 − (−½)·(−½)/½ = ½, that is 1 over H's entry (2, 2).
#
# **The Cholesky factor** is a square root of a matrix: upper triangular, UᵀU = H⁻¹. A product of a column with a row
# is a whole matrix, their *outer product*; UᵀU is the sum of one for each row of U.
# %%
U2 = torch.linalg.cholesky(inverse2, upper=True)
first, second = (torch.outer(row, row) for row in U2)
assert torch.allclose(first + second, inverse2, atol=1e-6)
[[[round(value, 2) + 0.0 for value in row] for row in matrix.tolist()]
    for matrix in (U2, first, second)]
# %% [markdown]
# The second outer product is 0 but for its last entry, ½: just what elimination left. That is how GPTQ will use it.
#
# (An **eigenvalue**, met in notebook 10b, says how much H stretches along one of its own directions. It is 0 where no
# token ever went: a move along that direction costs nothing, and H has no inverse.)
# %% [markdown]
# ## 5. Step one: move one weight, let the others help (OBS)
# Force weight i of a row w onto the grid point q. How should the *other* weights move so that (1) grows least?
#
# The move δ has δᵢ = q − wᵢ, and no slope along any other weight. So Hδᵀ is 0 but at place i: Hδᵀ = −λeᵢ, where eᵢ is
# 1 at place i and 0 elsewhere, and λ, the multiplier, is not known yet. Multiply by H⁻¹: δᵀ is −λ times column i of
# H⁻¹. Its entry i must be q − wᵢ, hence λ = (wᵢ − q)/[H⁻¹]ᵢᵢ. The cost δHδᵀ is then λ²[H⁻¹]ᵢᵢ. This is the Optimal
# Brain Surgeon (Hassibi & Stork 1993):
#
# $$\delta^\top = -\,\frac{w_i - q}{[H^{-1}]_{ii}}\; (H^{-1})_{:,i} \qquad
# \text{cost } \frac{(w_i-q)^2}{[H^{-1}]_{ii}} \qquad (2)$$
# %% [markdown]
# Two checks of (2): δᵢ is q − wᵢ, as it must be. And if H is diagonal (independent inputs of mean 0), all other
# entries of column i are 0: nobody can help.
#
# ### Exercise 10.2: compensate (about 5 minutes)
# `w` is a row (n,), `H` is (n, n) and has an inverse, `i` an index, `q` a number (some grid point, not always the
# nearest). Return a new row: weight i is q, and the others have moved by (2).
# %% tags=["exercise"]
def my_compensate(w, H, i, q):
    raise NotImplementedError
# %%
check("10.2", my_compensate)
# %% [markdown]
# Is (2) really the best that the others can do? Set the first weight to 1, and ask a least-squares solver
# for the other three. **Predict:** three output numbers fell by 0.8, 0.4, 0.8. Does the second weight go up
# or down? The third?
# %%
H = X.T.double() @ X.double()
inverse = torch.linalg.inv(H)
delta = -(w[0] - 1) / inverse[0, 0] * inverse[:, 0]
print([round(v, 2) for v in (w + delta).tolist()])

missing = X @ w - X[:, 0]  # what the other three must make up for
solved = torch.linalg.lstsq(X[:, 1:], missing).solution
assert torch.allclose(solved.double(), (w + delta)[1:], atol=1e-4)
assert torch.isclose(delta @ H @ delta, (w[0] - 1).double() ** 2 / inverse[0, 0])
f"output error {error(w + delta):.3f}; the first weight alone: {error([1, 0.4, 0.1, 3]):.2f}"
# %% [markdown]
# The solver agrees. A hundredth of the error is left. The second weight goes up and makes good the loss; it gives the
# first two outputs too much, which the fourth weight takes back. The third goes down, from 0.1 to 0.08 only: it alone
# feeds the fourth output, which was right.
# %% [markdown]
# ## 6. Step two: one after the other (OBQ)
# Round all four, each time the cheapest by (2) (Optimal Brain Quantization, Frantar & Alistarh 2022). Why may (2) be
# used again? A further move δ makes the error
#
# $$E(w + \delta) = E(w) + 2\,g\,\delta^\top + \delta H \delta^\top, \qquad g = \text{half the slope at } w$$
#
# and gδᵀ is 0: g is 0 at the free weights, which stand at their best, and δ is 0 at the done ones. So the next move
# costs δHδᵀ on top, as the first did, and costs add up. A done weight must not move: H loses row and column i. In
# the inverse that is a step of elimination:
#
# $$H^{-1} \leftarrow H^{-1} - (H^{-1})_{:,i}(H^{-1})_{i,:}/[H^{-1}]_{ii} \quad (3)$$
#
# **Predict:** which of 1.4, 0.4, 0.1, 3.0 goes first? Last?
# %%
from quantlab.gptq import Hessian, obq_steps

row, left, free, paid = w.double(), inverse.clone(), [0, 1, 2, 3], 0
while free:
    cost = {i: (row[i] - row[i].round()).item() ** 2 / left[i, i].item() for i in free}
    i = min(cost, key=cost.get)
    paid += cost[i]
    row = row - (row[i] - row[i].round()) / left[i, i] * left[:, i]
    left = left - left[:, [i]] @ left[[i]] / left[i, i]  # (3): row and column i are 0 from now on
    free.remove(i)
    assert torch.allclose(left[free][:, free], torch.linalg.inv(H[free][:, free]))
    print(f"weight {i}, cost {cost[i]:.4f}:", [round(v, 2) + 0.0 for v in row.tolist()])

states, order = obq_steps(w, Hessian(4).add(X), bits=2, damping=0.0)
assert torch.allclose(states[-1], row, atol=1e-5)
assert abs(paid - error(row)) < 1e-4
f"order {order}, output error {error(row):.2f}"
# %% [markdown]
# The library takes the same steps, and the error is the sum of the costs. It is ten times smaller than
# round-to-nearest's, but not the least of all 256: to take one weight at a time is greedy. For the best row no fast
# way is known (it is the closest point of a lattice, a hard problem: notebook 10b).
#
# But every row has an order of its own, hence an inverse of its own to shrink: for rows of 10,000 weights that is a
# trillion operations, *each*. Hence the first insight of the GPTQ paper: on large layers the order hardly matters. So
# go left to right, all rows at once, with one inverse for all.
# %% tags=["nbval-ignore-output"]
growths = {"nothing": 1.0, "a tenth": 1.1, "a half": 1.5, "twice": 2.0}
by_order = predict("16 real rows, left to right, not the cheapest first: the output error grows by",
                   list(growths))
# %% [markdown]
# (The answer shows a fourth way as well, *act-order*: one order for all rows, the loudest inputs first.)
# %% tags=["nbval-ignore-output"]
from quantlab import PerAxis, gptq_quantize, quantize_tensor
from quantlab.plots import plot_bars, plot_curves

hessian = Hessian(weight.shape[1]).add(x)
nearest = quantize_tensor(weight, bits=3, granularity=PerAxis(0), symmetric=False).dequantize()
rows = weight[:16].double()
rounded = {"round to nearest": nearest[:16].double(),
           "OBQ, greedy": torch.stack([obq_steps(row, hessian, bits=3)[0][-1] for row in rows]),
           "GPTQ, left to right": gptq_quantize(rows, hessian, bits=3).dequantize(),
           "GPTQ, act-order": gptq_quantize(rows, hessian, bits=3, act_order=True).dequantize()}
# %% tags=["nbval-ignore-output"]
of_rows = {way: hessian.output_error(rows, q) for way, q in rounded.items()}
plot_bars({"3 bits, 16 rows": of_rows}, ylabel="output error")
plt.show()
plain, greedy, in_order, act_order = of_rows.values()
grown = in_order / greedy
found(grown > 1, "left to right is worse than OBQ")
found(grown < 1.3, f"but a little only: {grown:.2f} times its error (the bundled model: 1.1)")
found(in_order < 0.5 * plain, "and has less than half of rounding's error")
found(act_order < in_order, f"act-order is better: {act_order / greedy:.2f} times OBQ's error")
print(f"times OBQ's error: left to right {grown:.2f}, act-order {act_order / greedy:.2f}")
by_order.reveal(min(growths, key=lambda choice: abs(growths[choice] - grown)))
# %% [markdown]
# On these 16 rows one order for all adds about a tenth to the error; a wisely chosen order (*act-order*, notebook
# 10b) takes most of that off again.
# %% [markdown]
# ## 7. Step three: all rows at once (GPTQ)
# Left to right, (2) needs the first row of what (3) has left of the inverse. GPTQ's second insight: one
# **Cholesky factor** has them all. Let U be upper triangular with UᵀU = H⁻¹; then, row by row of U,
#
# $$H^{-1} = U_0^\top U_0 + U_1^\top U_1 + U_2^\top U_2 + \dots$$
#
# where U₀ᵀU₀, a column times a row, is an outer product, as on the two weights of section 4. Only U₀ has anything in
# column 0, so the first row of H⁻¹ is U₀₀U₀, and what (3) takes away is U₀ᵀU₀. The rest begins with U₁₁U₁, and so on:
# **the row that step i needs is UᵢᵢUᵢ.**
#
# Is it only a shorter way? No. In floating point, (3) subtracts nearly equal numbers at each of thousands of steps,
# until a diagonal entry, by which (2) divides, falls to 0 or below. The factorization is done once, and is stable.
# %%
U = torch.linalg.cholesky(inverse, upper=True)
for i in range(4):
    shrunk = torch.linalg.inv(H[i:, i:])  # columns 0 to i - 1 are done and gone
    assert torch.allclose(U[i, i] * U[i, i:], shrunk[0])
[[round(v, 2) for v in line] for line in U.tolist()]
# %% [markdown]
# Entry i of that row is Uᵢᵢ², and (2) divides by it. So weight j moves by −(wᵢ − q) UᵢᵢUᵢⱼ/Uᵢᵢ², or, with
# e = (wᵢ − q)/Uᵢᵢ:
#
# $$w_j \leftarrow w_j - e\,U_{ij} \quad\text{for } j > i \qquad (4)$$
#
# One factorization, then n steps of two lines each, for all rows. That is GPTQ.
#
# ### Exercise 10.3: the loop (about 12 minutes)
# `W` is (rows, n), `U` (n, n) upper triangular, `scale` a number. Round column after column to the nearest multiple
# of `scale` (no ends: nothing is clamped) and pass the errors on by (4). Return Q, (rows, n), on the grid; leave W as
# it is.
# %% tags=["exercise"]
def my_gptq(W, U, scale):
    raise NotImplementedError
# %%
check("10.3", my_gptq)
# %% [markdown]
# Our four weights, step by step. The first step you have seen in section 5. **Predict:** which whole numbers
# come out, and is their error above or below the greedy one's?
# %%
from quantlab.gptq import gptq_steps

row = w.double()
for i in range(4):
    e = (row[i] - row[i].round().clamp(0, 3)) / U[i, i]
    row[i:] -= e * U[i, i:]  # the column itself lands on the grid
    print([round(v, 2) + 0.0 for v in row.tolist()])
library = gptq_steps(w[None], Hessian(4).add(X), bits=2, damping=0.0)[-1, 0]
assert torch.allclose(library, row, atol=1e-5)
f"rounding {error(w.round()):.2f}, left to right {error(row):.2f}, greedy {error(states[-1]):.2f}"
# %% [markdown]
# The first column loses 0.4, so the second wants to be 1.14 and becomes 1. Another order, another row; on these
# four weights the greedy one is better.
#
# Now a real layer: a scale and a zero point for each row. The library works in blocks of 128 columns: the columns
# behind a block hear of its errors once, all together, as one product of matrices instead of 128 passes over memory
# (the paper's *lazy* updates: the same sums in another order). It also needs one Cholesky factor where the cell below
# needs an inverse and a Cholesky factor. It must find the same codes, except where the last digits of float64 decide
# a tie.
# %% tags=["nbval-ignore-output"]
from quantlab import choose_qparams, dequantize, quantize

# a hundredth of the mean diagonal is added, lest H have no inverse: damping, see 10b
H = hessian.matrix + 0.01 * hessian.matrix.diagonal().mean() * torch.eye(len(hessian.matrix))
U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
W, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int8)
grid = choose_qparams(weight.amin(1), weight.amax(1), qmin=-4, qmax=3)
for i in range(W.shape[1]):
    codes[:, i] = quantize(W[:, i], grid)
    e = (W[:, i] - dequantize(codes[:, i], grid)) / U[i, i]
    W[:, i + 1:] -= e[:, None] * U[i, i + 1:]
gptq = gptq_quantize(weight.double(), hessian, bits=3)
same = (gptq.codes == codes).double().mean().item()
assert same > 0.999
assert torch.equal(gptq.qparams.scale[:, 0], grid.scale)  # the grid is rounding's
f"the same codes: {same:.2%}"
# %% [markdown]
# ## 8. Drag it
# The first 48 columns of our layer. Above, how far each weight has moved; in the middle, one row on its grid; below,
# the output error.
#
# **Predict:** right of the black line, do the colours stay white? In the row, do all dots end on the line
# nearest to their circle? Does GPTQ's output error grow evenly, or most at the end?
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_columns

some, seen = weight[:, :48], Hessian(48).add(x[:, :48])
first, second, third = (
    seen.output_error(some, q) for q in gptq_steps(some, seen, bits=3)[[16, 32, 48]])
added = [first, second - first, third - second]
found(added == sorted(added), "each third of the columns adds more error than the one before: "
    + ", ".join(f"{error:.1e}" for error in added))
explore_columns(some, seen, column=16, row=3)
# %% [markdown]
# **What you saw.** Left of the line, rounding noise. Right of it, faint colours before any rounding has
# happened there: errors that these columns are asked to take over. Each column ends on the line nearest to
# its *moved* dot, not always the one nearest to its circle. Each third of the columns adds more to the error
# than the third before: fewer are left to pass errors to.
#
# ## 9. The paradox
# Two errors of GPTQ's Q, of the weights and of the outputs, both in units of round-to-nearest's on the same
# grid, for every linear layer (of a large model: of seven blocks at most) at 3 bits: calibrated on 4096 tokens,
# measured on 4096 others. **Predict** both for the median layer. Does any layer fall below 1 in the weights,
# or rise above 1 in the outputs? Which kind of layer gains least?
# %% tags=["nbval-ignore-output"]
from tqdm.auto import tqdm

roles = {role: list(layers_of_role(model, role))
    for role in ("query", "key", "value", "attention output", "gate", "up", "down")}
some = slice(None, None, -(-len(roles["down"]) // 7))
kinds = {key: role for role, keys in reversed(roles.items()) for key in keys[some]}
half = budget(model, 8192, least=4096) // 2
inputs = capture_inputs(model, calibration[: 2 * half], list(kinds))
paradox = {}
for key in tqdm(kinds, leave=False):
    W, (seen, fresh) = (layers[key],
        (Hessian(inputs[key].shape[1]).add(x) for x in inputs[key].split(half)))
    plain = quantize_tensor(W, bits=3, granularity=PerAxis(0), symmetric=False).dequantize()
    q = gptq_quantize(W, seen, bits=3).dequantize()
    of_weight = (W - q).square().sum() / (W - plain).square().sum()
    paradox[key] = of_weight.item(), fresh.output_error(W, q) / fresh.output_error(W, plain)
# %% tags=["nbval-ignore-output"]
points = {kind: [p for key, p in paradox.items() if kinds[key] == kind] for kind in roles}
plot_curves({kind: tuple(zip(*some, strict=True)) for kind, some in points.items() if some},
    xlabel="weight error, times rounding's", ylabel="output error,\ntimes rounding's")
plt.setp(plt.gca().lines, linestyle="none", markersize=6)
plt.plot(1, 1, "k*", markersize=14, label="round to nearest")
plt.ylim(0, 1.1)
plt.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
least = max(paradox, key=lambda key: paradox[key][1])
of_weight, of_output = zip(*paradox.values(), strict=True)
found(min(of_weight) > 1.1 and max(of_output) < 1,
    f"every weight error rises (at least {min(of_weight):.2f} times), every output error falls "
    f"(the least to {max(of_output):.2f})")
found(kinds[least] == "down", f"a layer that leads down from the MLP gains least; here {least}")
middle = torch.tensor(list(paradox.values())).median(0).values
"medians: weight error {:.2f} times, output error {:.2f} times".format(*middle)
# %% [markdown]
# Every layer is further from W, and nearer to what W *does*. Round-to-nearest is the nearest point of the grid;
# GPTQ leaves it on purpose. Judging it by the weights' error is measuring the wrong thing. (In the bundled model a
# `down_proj` gains least. Why? The second open question is about that.)
# %% tags=["nbval-ignore-output"]
score()
# %% [markdown]
# ### Open
# 1. Whose order? Permute the columns of `weight` and of `x`, quantize, and compare output errors: ten random orders,
#    rising diag H, the norm of the columns of W. How much does the order matter at 4 bits, and at 2?
# 2. Compute `together` of section 1 for what each layer reads, and plot it against the layer's gain in section 9.
#    Does GPTQ gain most where inputs predict each other best?
#
# ### Recap
# - What counts is the output, ‖X(W − Q)ᵀ‖²; of the data it needs H = XᵀX only.
# - OBS: the best help the others can give is a multiple of a column of H⁻¹. OBQ: the cheapest weight first.
# - GPTQ: one order for all rows and one Cholesky factor turn that into a loop of two lines.
# - The weight error rises, the output error falls.
#
# Next: [10b GPTQ on a model](10b_gptq_on_a_model.ipynb) measures the knobs, and the whole model.
