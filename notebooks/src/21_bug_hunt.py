# %% [markdown]
# # 21 Bug hunt
# *60 minutes for twelve programs; thirty more are there for further evenings, about four minutes each. The
# computer needs seconds. You need what you have read of the notebooks before; a program says only afterwards which
# chapter it came from.*
#
# Forty-three programs run, look right and print something convincing. Thirty-three of them are wrong: each
# makes one of the errors about quantization that can be found in print. Ten are right, though they look odd. At the
# end of this notebook you can
#
# - distrust a print-out, and say what it does *not* show;
# - write a test (测试) that exposes an error, and that no correct program fails;
# - tell what is wrong from what is only unusual;
# - say which chapters you want to read again.
# %% [markdown]
# ### Recall
# 1. Why is a graph of Q and DQ nodes only a request?
# 2. What does a "4-bit" file hold besides its codes?
# 3. How do you find out whether a converted layer computes in integers?
#
# <details><summary>Answers</summary>
# 1. The engine may fuse the nodes with a layer, or compute in float between them. 2. Scales, zero points or
#    minima, and all tensors that were not quantized. 3. Look at the graph that the engine made of it, and
#    compare its numbers with those of exact integers.</details>
#
# ## 1. What broke
# The chapters before refuted claims that can be read in many places. Whoever wrote such a claim may well have run a
# program, and it printed something that looked right. What was missing was a *test*. So here is the last skill of
# the workbook: to hold a program to its promise.
# %%
import torch

from quantlab import hunt

hunt.show("ranges.1")
# %% [markdown]
# ## 2. By hand: one program, three tests
# That is all you get: a promise, a source, a print-out. Is the program right? The print-out says so: every
# weight came back. **Predict:** for which arguments would it not? (To try some, take the program itself:
# `program = hunt.program("ranges.1")`.)
#
# A verdict is `"fine"` or `"bug"`, and a bug must be **proved**: by a function that calls the program and
# asserts something that the promise says. The first idea is to assert what was printed:
# %%
def as_printed(program):
    back = program(torch.tensor([-30.0, 1.0, 18.0]), 0.02, 0)
    assert torch.allclose(back, torch.tensor([-0.6, 0.02, 0.36]))

hunt.verdict("ranges.1", "bug", test=as_printed)
# %% [markdown]
# The assertion holds, and so it accuses nobody: the print-out was chosen by somebody who believed the program. What
# does it hide? The zero point is 0. The next test has another zero point, but asks for too much:
# %%
def to_the_last_bit(program):
    back = program(torch.tensor([11.0, 33.0]), 0.1, 10)
    assert back.tolist() == [0.1, 2.3]

hunt.verdict("ranges.1", "bug", test=to_the_last_bit)
# %% [markdown]
# The judge runs a test on the program *and on two versions that keep the promise*, written in different
# ways; you see neither. No float32 number equals Python's 0.1, so they fail as well, and a test that correct
# programs fail is no proof. Reals are compared within a tolerance:
# %%
def a_zero_point_that_is_not_zero(program):
    back = program(torch.tensor([10.0, 30.0]), 0.02, 10)
    assert torch.allclose(back, torch.tensor([0.0, 0.4]), atol=1e-5)

hunt.verdict("ranges.1", "bug", test=a_zero_point_that_is_not_zero)
# %% [markdown]
# This is what a find looks like. Three more rules:
#
# - `hunt.hint(name)` asks a question that helps; `hunt.reveal(name)` tells everything, and then the program no
#   longer counts as your find.
# - Calling a bug fine, or accusing what is fine, is remembered: `hunt.score()`. Your first verdict counts.
# - `hunt.save()` writes a file, from which `hunt.resume()` goes on another day.
#
# ### The control that must fail
# Could a test win that knows nothing of quantization? Here is one that looks at the source, and one that fails every
# other time:
# %%
import inspect

turn = [0]

def reads_the_source(program):
    assert "zero_point) * scale" in inspect.getsource(program)

def every_other_time(program):
    program(torch.ones(1), 1.0)
    turn[0] += 1
    assert turn[0] % 2 == 0

hunt.verdict("ranges.3", "bug", test=reads_the_source)
hunt.verdict("ranges.3", "bug", test=every_other_time)
# %% [markdown]
# A test must call what it judges, and must say the same each time. (Nor would it help to call the program and then
# read it: the second version that keeps the promise is written in other words. A test that loops for ever is
# stopped.) With this we enter the first room.
#
# ## 3. Room 1: ranges
# Eight programs about steps, zero points and clamps; the first you have seen. Read each promise twice: a
# test may rely on it and on nothing else. **Predict** while you read: which two are fine?
# %%
hunt.show("ranges")
# %% [markdown]
# ### Exercise 21.1: two verdicts (about 8 minutes)
# Put `"bug"` or `"fine"` in the place of the dots. For a bug write its test; for a program that is fine leave
# the test as it is.
# %% tags=["exercise"]
def test_ranges_3(program):
    raise NotImplementedError

def test_ranges_4(program):
    raise NotImplementedError

hunt.verdict("ranges.3", ..., test=test_ranges_3)
hunt.verdict("ranges.4", ..., test=test_ranges_4)
# %% [markdown]
# Now look at the second, ranges.4. The grey line is what is promised: reals of a range of width 10, which begins at
# `low`, come back as themselves. **Predict:** from which `low` on does the program leave the line? Drag.
# %%
from quantlab.explorers import explore_hunt

explore_hunt("ranges")
# %% [markdown]
# As long as the range holds 0, all is well; every range in the print-out did. Beyond that the program's codes
# end before the range does. The other five programs of the room are yours: add a cell for each,
# `hunt.verdict("ranges.2", ...)`.
#
# ## 4. Room 2: codebooks and small floats
# A table of levels cannot be checked by looking at its ends. **Predict** for each print-out what it leaves
# out: the middle? the outlier? the large numbers?
# %%
hunt.show("codebooks")
# %% [markdown]
# ### Exercise 21.2: two verdicts (about 8 minutes)
# Here torch knows one of the formats itself. An independent implementation is the best witness that a test
# can call.
# %% tags=["exercise"]
def test_codebooks_2(program):
    raise NotImplementedError

def test_codebooks_6(program):
    raise NotImplementedError

hunt.verdict("codebooks.2", ..., test=test_codebooks_2)
hunt.verdict("codebooks.6", ..., test=test_codebooks_6)
# %% [markdown]
# The picture shows the first, codebooks.2: the weights of one block, rounded, while one weight of *another* block
# grows. **Predict** what the blue line should do as you drag, and what it will do.
# %%
explore_hunt("codebooks")
# %% [markdown]
# Nothing should happen: blocks are there so that an outlier spoils its own block alone. Instead the steps grow with
# it, and more and more weights of this block come back as 0. A good test therefore changes *one* thing and asks what
# must **not** change.
#
# ## 5. Room 3: integers
# Products of codes are exact, so a test may ask for equality. What hides here is the shape (square), the size
# (small) or the sign of a term. **Predict:** which two programs are fine?
# %%
hunt.show("integers")
# %% [markdown]
# ### Exercise 21.3: two verdicts (about 8 minutes)
# For each, write the slow loop that *is* the definition, and compare. With which values? With the largest
# that the promise allows.
# %% tags=["exercise"]
def test_integers_2(program):
    raise NotImplementedError

def test_integers_3(program):
    raise NotImplementedError

hunt.verdict("integers.2", ..., test=test_integers_2)
hunt.verdict("integers.3", ..., test=test_integers_3)
# %% [markdown]
# The picture shows the second, integers.3, on two equal products: their sum, for every weight code. The slider is the
# activation's code. Say first what you expect, then drag.
# %%
from quantlab.predictions import predict

guess = predict("From which activation code on does the line bend?", ["33", "65", "129", "193"])
explore_hunt("integers")
# %% [markdown]
# It bends on the left first, since −128 is farther from 0 than 127. For the exact code we ask the program:
# %%
program, edge = hunt.program("integers.3"), torch.tensor([-128, -128])
bent = next(code for code in range(256) if program(torch.tensor([code, code]), edge) != -256 * code)
guess.reveal(str(bent))
# %% [markdown]
# The print-out had weights of ±30, for which it cannot happen: 2 · 255 · 30 is 15,300, and 16 bits reach to 32,767.
# *Take values from the edge of the promise.*
#
# ## 6. Room 4: measuring
# These programs do not quantize; they count, time and compare. A wrong number here makes every other program
# look good. **Predict** while you read: what should each of them have used, and did not?
# %%
hunt.show("measuring")
# %% [markdown]
# ### Exercise 21.4: two verdicts (about 8 minutes)
# Limits are tests: what must come out for very many tokens? For two models that agree on everything but are
# given harder text?
# %% tags=["exercise"]
def test_measuring_6(program):
    raise NotImplementedError

def test_measuring_8(program):
    raise NotImplementedError

hunt.verdict("measuring.6", ..., test=test_measuring_6)
hunt.verdict("measuring.8", ..., test=test_measuring_8)
# %% [markdown]
# The picture shows measuring.8: the speed-up by 4-bit weights, over the number of tokens, on a machine of 1,000
# billion operations a second. **Predict:** with faster memory, does the promised line fall earlier or later?
# %%
explore_hunt("measuring")
# %% [markdown]
# Earlier: the faster the weights arrive, the fewer tokens it takes until the layer waits for its arithmetic instead.
# The program knows only bytes. It is right for one token, which is what it printed.
#
# ## 7. Room 5: GPTQ and training
# All of these make something better, and print it. Ask what they were *allowed* to change.
# %%
hunt.show("training")
# %% [markdown]
# ### Exercise 21.5: two verdicts (about 8 minutes)
# One hint for both: a result that is better than promised is worth a second look. Gradients come from
# `.backward()`, and codes can be counted.
# %% tags=["exercise"]
def test_training_2(program):
    raise NotImplementedError

def test_training_5(program):
    raise NotImplementedError

hunt.verdict("training.2", ..., test=test_training_2)
hunt.verdict("training.5", ..., test=test_training_5)
# %% [markdown]
# The picture shows training.2: the gradient of each value; the slider is the scale of the grid. **Predict** at which
# scale you could not see anything wrong.
# %%
explore_hunt("training")
# %% [markdown]
# Once the grid reaches beyond all values, nothing is clamped, and program and promise agree: the values in the
# print-out were that small.
#
# ## 8. Room 6: tools
# What files hold and what engines take. Some knowledge cannot be derived; ask a package that reads the
# format (`gguf` is installed), or what *comes out* at the end.
# %%
hunt.show("tools")
# %% [markdown]
# ### Exercise 21.6: two verdicts (about 8 minutes)
# Data are promised for one, a working net for the other. Use them.
# %% tags=["exercise"]
def test_tools_1(program):
    raise NotImplementedError

def test_tools_4(program):
    raise NotImplementedError

hunt.verdict("tools.1", ..., test=test_tools_1)
hunt.verdict("tools.4", ..., test=test_tools_4)
# %% [markdown]
# The picture shows tools.1: images whose values reach up to the slider's, taken to their codes and back. **Predict**
# what 200 comes back as.
# %%
explore_hunt("tools")
# %% [markdown]
# As 1, like everything above 1: the program did not look at the images. Pixels of 0 to 1 hide that, and the print-out
# had such pixels.
#
# ## 9. Two errors that no earlier cell takes apart
# Every error of the hunt is taken apart in a cell of some chapter; for two of them that cell is here. **E2**, a real
# number as zero point: the grid starts at the minimum. **Predict** what 0.0, the padding, comes back as.
# %%
from quantlab import choose_qparams, fake_quantize

x = torch.tensor([-1.0, 0.0, 2.1])
step = (x.max() - x.min()) / 255
seed_zero = x.min() + step * torch.round((0 - x.min()) / step)
whole = fake_quantize(x, choose_qparams(x.min(), x.max(), qmin=0, qmax=255))
assert seed_zero.abs() > 0.1 * step
assert whole[1] == 0
f"0.0 comes back as {seed_zero:.4f}; with an integer zero point as {whole[1]:.4f}"
# %% [markdown]
# It is off by 0.0031, a quarter of a step. That is little, but padding is everywhere, and padding that is not 0 is no
# padding.
#
# **E31**, tools as they were. TensorRT's explicit quantization is symmetric: zero point 0. **Predict** what that
# costs activations after a SiLU, which reach far above 0 and little below it.
# %%
silu = torch.nn.functional.silu(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
error = {}
for symmetric in (False, True):
    qp = choose_qparams(silu.min(), silu.max(), qmin=-128, qmax=127, symmetric=symmetric)
    error[symmetric] = (fake_quantize(silu, qp) - silu).square().mean()
more = error[True] / error[False]
assert 3 < more < 4
f"{silu.min():.2f} to {silu.max():.1f}; zero point 0 has {more:.1f} times the squared error"
# %% [markdown]
# Nearly a bit: one bit less would have four times the squared error. And names age; sometimes the old tool itself
# says so. **Predict:** where does torch send those who call `torch.ao.quantization`?
# %% tags=["nbval-ignore-output"]
import textwrap
import warnings

with warnings.catch_warnings(record=True) as raised:
    warnings.simplefilter("always")
    if hasattr(torch.ao, "quantization"):  # in a later torch it may be gone
        torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 4)))
said = [str(w.message) for w in raised if "torch.ao" in str(w.message)] or ["torchao: it is gone"]
assert "torchao" in said[0]
print(textwrap.shorten(said[0], 240, placeholder=" …"))
# %% [markdown]
# Others say nothing when they run. By their makers' own pages:
#
# | then | now |
# |---|---|
# | PyTorch Mobile | ExecuTorch |
# | torch.quantization, torch.ao.quantization | torchao |
# | TensorFlow Lite | LiteRT (the files stay .tflite) |
# | TensorRT's INT8 calibrators: deprecated in 10.1, gone in 11 | Q and DQ nodes |
# | AutoGPTQ, AutoAWQ | GPTQModel, llm-compressor |
#
# ### Myth: "all tests pass, so it is right"
# Every program here passes the test that its print-out is. **Predict:** of the 33 wrong ones, how many print
# what a correct version prints, character for character?
# %%
alike_of_33 = predict("How many of the 33 print what a correct one prints?", [0, 33], near=4)
# %%
from quantlab.hunt.playing import CASES, printed

bugs = [case for case in CASES.values() if case.buggy]
alike = sum(printed(case) == printed(case, case.mended) for case in bugs)
assert alike > 10
print(f"{alike} of {len(bugs)}.", alike_of_33.reveal(alike))
# %% [markdown]
# About half. Those print-outs are tests that *cannot fail*. The rest print a number that differs, but
# nothing beside it says what it should be.
#
# ## 10. The score, and what to read again
# The next cell shows the score. One find is ours (section 2). Run the cell again when you have given more verdicts. The
# map of [notebook 00](00_start_here.ipynb) marks exercises 21.1 to 21.6, each when both of its verdicts are
# right. If a program was too much for you: `hunt.hint`, then `hunt.reveal`, then the chapter.
#
# Below it **all 33**, and the cells that take them apart (a test of the workbook looks each of them up).
# %%
from IPython.display import display

display(hunt.score(), hunt.atlas())
# %% [markdown]
# ## 11. Exercises
# - **The rest** (about four minutes each): thirty programs have no cell yet.
# - **A test for all** (30 minutes, no check): which single *property* ("at most half a step") exposes the most
#   programs of room 1?
# - **Open**: take a page about quantization from the web. Write down what its code promises, and test it.
#
# ### Recap
# - A print-out shows what its author thought of. Ask what it leaves out.
# - A test relies on the promise, not on one way to keep it: exact for codes, a tolerance for reals.
# - Look at the edges: the largest codes, ranges without 0, one outlier, a shape that is not square.
# - Ask what must *not* change, and let an independent implementation be the witness.
# - Odd is not wrong: ten programs were right. An accusation needs a proof.
#
# Next: [22 Capstone](22_capstone.ipynb), in which you fit a model into a budget of bytes.
