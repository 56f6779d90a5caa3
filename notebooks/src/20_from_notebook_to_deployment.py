# %% [markdown]
# # 20 From notebook to deployment
# *60 minutes, of which the computer needs about one. You need notebooks 03, 04, 06, 07, 08, 10 and 16.*
#
# So far our codes were run by this library, and in notebook 19 by llama.cpp. Servers, phones and GPUs have other
# engines: ONNX Runtime, OpenVINO, LiteRT, TensorRT. To run a model there is its deployment (部署). At the end you can
#
# - write a quantized layer as a file, and see what an engine made of it;
# - say why a file that "is int8" can be slower than float32, and why a fast one can be wrong;
# - trace a difference between an engine's answer and yours to its cause, and say where you cannot;
# - check a file against TensorRT's rules without a GPU, and tell living tools from abandoned ones.
# %% [markdown]
# ### Recall
# 1. What is the scale of an accumulator Σ (qx − zx) qw, where qx has the scale sx and qw the scale sw?
# 2. How large can uint8 · int8 be, and does the sum of two such products fit into 16 bits?
# 3. A group of 32 weights of 4 bits: how many bytes are its codes?
#
# <details><summary>Answers</summary>
# 1. sx · sw. 2. At most 255 · 127 = 32,385; twice that is above 32,767: it does not. 3. 16.</details>
#
# ## 1. What broke
# A colleague exports our int8 layer to ONNX, a file format that many engines (推理引擎) read. She times it there, and
# does not believe the number. Yet every code in the file is ours. What went wrong? The layer has 1024 features in and
# out, int8 weights with a scale for each row, and static uint8 activations (notebook 08).
# %% tags=["nbval-ignore-output"]
import tempfile
from pathlib import Path

import torch
from torch import nn

from quantlab.checks import check, found, hint, solution
from quantlab.export.engines import PIP, engine_here

packages = ("onnx", "onnxruntime", "onnxscript", "openvino", "ai_edge_litert", "bitsandbytes")
here = {name: engine_here(name) for name in packages}
runs = here["onnx"] and here["onnxruntime"]
folder = Path(tempfile.mkdtemp())

if all(here.values()):
    print("The engines are here: in the tables below, rows without a date are measured now.")
else:
    print("You see stored figures of", *(name for name in here if not here[name]), f"({PIP})")
# %%
from quantlab.linear import StaticInt8Linear
from quantlab.observers import MinMax

random = torch.Generator().manual_seed(0)
linear, observer = nn.Linear(1024, 1024).requires_grad_(False), MinMax()
linear.weight.copy_(torch.randn(1024, 1024, generator=random) / 32)
linear.bias.copy_(torch.randn(1024, generator=random) / 10)
x = torch.randn(32, 1024, generator=random) + 0.3
observer.update(torch.randn(256, 1024, generator=random) + 0.3)
layer = StaticInt8Linear.from_linear(linear, observer)
y = layer.exact(x).detach()
layer.codes.shape, layer.input_scale.shape, layer.weight_scale.shape
# %% [markdown]
# ## 2. A graph is a request
# ONNX has no operator "int8 layer" that every engine knows. One writes *what shall be computed*, in floats:
#
# | node | from | makes |
# |---|---|---|
# | QuantizeLinear (Q) | x, its scale, its zero point | codes of x |
# | DequantizeLinear (DQ) | these codes | x on the grid, float |
# | DequantizeLinear | weight codes, scales of rows, zero points | weight on the grid, float |
# | MatMul, then Add; or Gemm, which is both | these two, and the bias | y |
#
# An engine that finds "DQ, DQ, product" in the graph *may* put an integer operator in its place. It need
# not. We write the graph by hand; a node is (operator, what it reads, what it makes, settings):
# %%
from quantlab.export.onnx import codes_in, fused, onnx_session, save_onnx_float, save_onnx_int8
from quantlab.export.onnx_graphs import layer_model, write_onnx

nodes = [("QuantizeLinear", ["x", "x_scale", "x_zero"], "x_codes", {}),
         ("DequantizeLinear", ["x_codes", "x_scale", "x_zero"], "x_grid", {}),
         ("DequantizeLinear", ["w", "w_scale", "w_zero"], "w_grid", {"axis": 1}),  # w is (in, out)
         ("MatMul", ["x_grid", "w_grid"], "xw", {}), ("Add", ["xw", "b"], "y", {})]
tensors = {"x_scale": layer.input_scale, "x_zero": layer.input_zero_point.to(torch.uint8),
           "w": layer.codes.T.contiguous(), "w_scale": layer.weight_scale,
           "w_zero": torch.zeros(1024, dtype=torch.int8), "b": linear.bias}
constants = {name: tensor.numpy() for name, tensor in tensors.items()}
if runs:
    write_onnx(folder / "by hand.onnx", layer_model(nodes, constants, (1024, 1024)))
    save_onnx_int8(layer, folder / "int8, MatMul.onnx", form="MatMul", verify=True)
    ours, theirs = (onnx_session(folder / f"{name}.onnx") for name in ("by hand", "int8, MatMul"))
    assert (ours(x.numpy()) == theirs(x.numpy())).all()  # the library's file answers the same
    save_onnx_float(linear, folder / "float.onnx")
# %% [markdown]
# **Predict:** in the same engine, is the int8 layer faster than the float layer?
# %%
from quantlab.export.table import measure, show, stored_rows
from quantlab.predictions import predict

faster = predict("Q/DQ with MatMul and Add, beside float32", ["faster", "the same", "slower"])
in_float = onnx_session(folder / "float.onnx") if runs else None
table, equal = [], {}  # what is measured here, and the share of codes that came back

def stored(engine, *begins):
    """What benchmarks/deployment.py measured once, for readers who have not this engine."""
    return [row for row in stored_rows(engine) if row.form.startswith(begins) and row.times]

def entry(form, y, codes, run=onnx_session, engine="ONNX Runtime", beside=None,
          read=codes_in, end="onnx"):
    """Measure a file beside the float layer in its engine; its codes must be ours, each one."""
    file = folder / f"{form}.{end}"
    equal[engine, form] = (read(file).int() == codes.int()).double().mean().item()
    assert equal[engine, form] == 1
    table.append(measure(engine, form, file, run(file), x, y, beside or in_float))
    return table[-1]
# %% tags=["nbval-ignore-output"]
slow = entry("int8, MatMul", y, layer.codes) if runs else stored("ONNX Runtime", "int8, MatMul")[0]
show([slow])
found(slow.times < 1, f"{slow.times:.2f} of float's speed, not below 1", of="machine")
print(faster.reveal("slower" if slow.times < 0.9 else "faster" if slow.times > 1.1 else "the same"))
if runs:
    print("asked for:", ", ".join(kind for kind, *_ in nodes))
    print("got:      ", ", ".join(fused(folder / "int8, MatMul.onnx")))
# %% [markdown]
# `apart` is the distance from our answer with the same codes, relative to its size: here from exact integers, from
# section 5 on from x times the dequantized weight. `speed` is float's time over this one's, for one token on one
# thread. (It moves from run to run: trust one digit.) The answer is right and the layer is slow. `fused` lists the
# operators that the engine runs in place of ours: a **float Gemm**, and before it a DequantizeLinear, which makes
# floats of the weight in each call.
#
# ## 3. The form that fuses
# ONNX Runtime first makes one Gemm of MatMul and Add. For Gemm it knows a pattern, in which *all three*
# inputs come from DQ. So the bias must be codes too: int32, in the step of the accumulators.
#
# ### Exercise 20.1: a bias for the accumulators (about 5 minutes)
# `bias` and `w_scale` are tensors (rows,), `x_scale` a number. Return the bias's codes, int32.
# %% tags=["exercise"]
def my_bias(bias, x_scale, w_scale):
    raise NotImplementedError
# %%
check("20.1", my_bias)
# %% [markdown]
# Four graphs of one layer: no bias; the float bias; the int32 bias; and that once more, but the weight's DQ
# names no zero points (all are 0; the standard says they may be left out). **Predict:** how many of the four
# does ONNX Runtime compute in integers? (QGemm and MatMulIntegerToFloat compute with codes, Gemm in floats.)
# %% tags=["nbval-ignore-output"]
step = layer.input_scale * layer.weight_scale
b_codes, of_bias = (linear.bias / step).round().to(torch.int32), ["b_codes", "b_scale"]
constants |= {"b_codes": b_codes.numpy(), "b_scale": step.numpy()}
from_codes = nodes[:3] + [("DequantizeLinear", of_bias, "b", {"axis": 0})] + nodes[3:]
ways = {"no bias": nodes[:3] + [("MatMul", ["x_grid", "w_grid"], "y", {})],
        "float bias": nodes, "int32 bias": from_codes,
        "int32, no zero points": [(kind, [name for name in names if name != "w_zero"], made, how)
                                  for kind, names, made, how in from_codes]}
became = {"no bias": "MatMulIntegerToFloat", "int32 bias": "QGemm"}  # as this was written
print("made of them:" if runs else f"Not run here. As this was written: {became}, else Gemm")
for name, graph in ways.items() if runs else ():
    # only the constants that this graph reads
    needed = {n for _, names, *_ in graph for n in names} - {made for _, _, made, _ in graph}
    held = {n: values for n, values in constants.items() if n in needed}
    write_onnx(folder / "way.onnx", layer_model(graph, held, (1024, 1024)))
    kinds = fused(folder / "way.onnx")
    print(f"{name:22} {', '.join(kinds)}")
    found(kinds[-1] == became.get(name, "Gemm"), f"{name} became {kinds[-1]}", of="machine")
# %% tags=["nbval-ignore-output"]
fusing = "int8, Gemm, int32 bias"
if runs:
    save_onnx_int8(layer, folder / f"{fusing}.onnx", verify=True)
    entry(fusing, y, layer.codes)
show(table or stored("ONNX Runtime", "int8"))
# %% [markdown]
# Two: without a bias, and with the int32 bias. A float bias loses the integers, and so do zero points that were left
# out. No error, no warning: all four files are valid. The same codes, the same engine, one addition written in
# another way: and now it is fast.
#
# ### Exercise 20.2: a file that fuses (about 15 minutes)
# Return the model: `layer_model(nodes, constants, (out, in))` makes it, from "x" to "y" (so does `onnx.helper`, which
# is longer). The arguments are tensors, `codes` (out, in); constants must be numpy arrays, `.numpy()`. A DQ's `axis`
# is the dimension of the weight along which its scales lie. ("Gemm", [input, weight, bias], "y", {"transB": 1}) takes
# a weight (out, in) as it is. Your file is written, rewritten by ONNX Runtime, and run.
# %% tags=["exercise"]
def my_file(x_scale, x_zero, codes, w_scale, b_codes):
    raise NotImplementedError
# %%
check("20.2", my_file)
# %% [markdown]
# ## 4. Fast, and how right?
# QGemm computes in integers, and sums of integers are exact. Its bias alone was rounded, to the accumulators' step.
# On the CPU on which this was written, the last table has an `apart` of 5.9e-03, on others of about 1e-05.
# **Predict:** what can make such a difference between two CPUs?
# %%
choices = ["the rounded bias", "the order of the sums", "sums that are too narrow"]
exact = predict("5.9e-03 on one CPU comes from", choices)
# %% [markdown]
# x86 processors without the instructions VNNI multiply bytes in pairs: two products uint8 · int8 are added
# **in 16 bits**, where the sum saturates, and only then in 32. Notebook 07 met this in oneDNN. Here we compute the
# whole layer that way, by hand, and look which answer the engine gave, the exact or the saturated one. The other is
# the control: it must *not* fit.
# %%
from quantlab import quantize

def saturated(layer, x):
    codes = quantize(x, layer.input_qparams(x)).float()
    sums = torch.zeros(len(x), layer.out_features)
    for k in range(0, layer.in_features, 2):
        pair = codes[:, k:k + 2] @ layer.codes[:, k:k + 2].T.float()  # whole, so exact
        sums += pair.clamp(-(2**15), 2**15 - 1)
    sums -= layer.input_zero_point * layer.codes.sum(1)
    return (sums * (layer.input_scale * layer.weight_scale) + layer.bias).detach()

by_pairs = saturated(layer, x)
off = ((by_pairs - y).norm() / y.norm()).item()
rounding = ((y - linear(x)).norm() / linear(x).norm()).item()
assert 1e-3 < off < rounding
f"sums in 16 bits are off by {off:.2%}; rounding to 8 bits itself by {rounding:.2%}"
# %% tags=["nbval-ignore-output"]
from quantlab.export.table import relative
from quantlab.linear import kernel_status

print(f"this CPU, asked through oneDNN: {kernel_status()}")
if runs:
    got = onnx_session(folder / f"{fusing}.onnx")(x.numpy())
    near, far = sorted(relative(got, answer) for answer in (y, by_pairs))
    found(near < 1e-3, f"the engine's answer is one of the two, {near:.1e} away", of="machine")
    found(far > 1e-3, f"and not the other, {far:.1e} away", of="machine")
    print(f"from the exact integers {relative(got, y):.1e}, "
          f"from pairs in 16 bits {relative(got, by_pairs):.1e}")
    print(f"rounding the bias alone moves y by {relative(y - linear.bias + b_codes * step, y):.1e}")
print(exact.reveal("sums that are too narrow"))
# %% [markdown]
# So the cause is found. What is left of the distance is what the rounded bias explains (the last line). The usual
# repair is **weights of 7 bits** ("reduce range"): two products are then at most 2 · 255 · 64 = 32,640, which fits.
# **Predict:** is the answer then nearer to the float layer's?
# %% tags=["nbval-ignore-output"]
seven = StaticInt8Linear.from_linear(linear, observer, weight_bits=7)
y7, form = seven.exact(x).detach(), "7 bits, Gemm, int32 bias"
assert 2 * 255 * seven.codes.abs().max() < 2**15
assert (saturated(seven, x) - y7).abs().max() < 1e-3  # no pair is clamped
if runs:
    save_onnx_int8(seven, folder / f"{form}.onnx", verify=True)
    row = entry(form, y7, seven.codes)
    found(row.apart < 1e-3, f"exact on every CPU, but for the bias: {row.apart:.1e}", of="machine")
show(table or stored("ONNX Runtime", "int8, MatMul", fusing, form))
off = {way: ((answer - linear(x)).norm() / linear(x).norm()).item()
       for way, answer in (("8 bits", y), ("8 bits, sums in 16", by_pairs), ("7 bits", y7))}
print("from the float layer:", ", ".join(f"{way} {error:.2%}" for way, error in off.items()))
# %% [markdown]
# You take a larger rounding error, which you know, in place of a saturation that nobody names. On *this* layer
# that does not even pay: 1.87 % from the float layer, beside 1.40 % with saturated sums. Section 11 has a model in
# which it does. Why did `verify=True` not object? It runs the file operator by operator, as it is written. What an
# optimizer and a CPU make of it can only be seen where it runs: **measure on the machine you deploy to.**
#
# ## 5. Four bits
# For weights of 4 bits ONNX Runtime has an operator of its own, **MatMulNBits**: codes in blocks, a scale
# and a zero point each. Its attribute `accuracy_level` says what the *activations* are computed in.
#
# ### Exercise 20.3: codes of 4 bits in bytes (about 6 minutes)
# `codes` (out, in), uint8 in 0..15. Two neighbours share a byte, the first in the low four bits. Return
# (out, groups, group // 2), uint8.
# %% tags=["exercise"]
def my_pack(codes, group):
    raise NotImplementedError
# %%
check("20.3", my_pack)
# %% [markdown]
# Standard ONNX can say the same: codes of type UINT4, a *blocked* DequantizeLinear, and a float product. Four files:
# MatMulNBits with `accuracy_level` 1 (activations stay float32) and with 4 (they may be rounded to int8); the
# standard form with MatMul, and with Gemm.
#
# **Predict:** which of the four give our answer up to float rounding?
# %% tags=["nbval-ignore-output"]
from quantlab import PerGroup, quantize_tensor
from quantlab.export.onnx import save_onnx_weights

q = quantize_tensor(linear.weight, bits=4, granularity=PerGroup(32), symmetric=False)
codes4, y4 = q.codes.int() - q.qparams.qmin, x @ q.dequantize().T + linear.bias
fours = [] if runs else stored("ONNX Runtime", "4 bits")
forms = [("MatMulNBits", 1), ("MatMulNBits", 4), ("MatMul", 1), ("Gemm", 1)]
for form, level in forms if runs else ():
    name = f"4 bits, {form}" + (f" level {level}" if form == "MatMulNBits" else "")
    file = folder / f"{name}.onnx"
    save_onnx_weights(q, file, bias=linear.bias, form=form, level=level, verify=True)
    print(f"{name}: {', '.join(fused(file))}")
    fours.append(entry(name, y4, codes4))
show(fours)
level1, level4, standard, gemm = (row.apart for row in fours)
found(max(level1, gemm) < 1e-4 < min(level4, standard), "level 1 and Gemm are exact", of="machine")
found(abs(standard / level4 - 1) < 0.01, "the standard form is as far off as level 4", of="machine")
# %% [markdown]
# The third file is the surprise. It asks for a float product; `fused` shows **MatMulNBits**, and its `apart` is that
# of level 4. So ONNX Runtime rounds activations there, unasked. The fourth stays in floats, and pays in time.
# OpenVINO reads the third file too, and can be told to leave activations alone:
# %% tags=["nbval-ignore-output"]
from quantlab.export.openvino import openvino_session

if runs and here["openvino"]:
    beside, name = openvino_session(folder / "float.onnx"), "4 bits, MatMul"
    run = openvino_session(folder / f"{name}.onnx", float_activations=True)
    try:
        entry(name, y4, codes4, openvino_session, "OpenVINO", beside)
        told = relative(run(x.numpy()), y4)
        print(f"now {table[-1].apart:.1e} off; told to leave activations float {told:.1e}")
    except RuntimeError as error:  # seen where oneDNN was told to do without AVX2
        print(error)
show([row for row in stored_rows("OpenVINO") if row.form.startswith("4 bits")])
# %% [markdown]
# One program, two processors. On a Sapphire Rapids, which has VNNI, OpenVINO rounded activations by itself: 5.3e-03
# off, and 5.0e-07 when told not to. On the EPYC, without VNNI, it left them float either way. Two CPUs are no rule:
# look at yours, the first line above.
#
# ## 6. TensorRT, without a GPU
# NVIDIA's documentation says which Q/DQ nodes TensorRT refuses, on a machine that you may not have yet;
# `tensorrt_refusals` checks a file against these rules. (TensorRT may refuse more. Nothing of this notebook was run
# on a GPU.) **Predict** which of three files breaks no rule: uint8 with an int32 bias (the fast one!), uint8 with a
# float bias, int8 with a float bias. What is wrong with the others?
# %% tags=["nbval-ignore-output"]
from quantlab.export.tensorrt import tensorrt_refusals

files = {"uint8, int32 bias": {}, "uint8, float bias": {"form": "Gemm"},
         "int8, float bias": {"form": "Gemm", "signed": True}}
print("refused for:" if runs else "Not run here. As this was written, the third passes alone.")
for name, how in files.items() if runs else ():
    save_onnx_int8(layer, folder / "trt.onnx", **how)
    said = tensorrt_refusals(folder / "trt.onnx")
    assert bool(said) == name.startswith("uint8")  # the control: two must be refused
    print(f"{name}:", *(said or ["no rule refuses it"]), sep="\n    ")
# %% [markdown]
# TensorRT's codes have a sign, and all its zero points are 0. The form that ONNX Runtime fuses is refused; the one
# that no rule refuses has a float bias, and section 7 shows what ONNX Runtime makes of "signed int8, Gemm". No file
# is best everywhere: one exports *for* an engine.
#
# ### Exercise 20.4: a file that TensorRT's rules let pass (about 15 minutes)
# The layer's map of x is `x_scale`, `x_zero` (uint8). Return a model whose x has int8 codes around 0, with a
# scale that clamps nothing of the old range and puts its farther end on 127. `bias` is float; the weight's
# `codes` and `w_scale` stay.
# %% tags=["exercise"]
def my_signed_file(x_scale, x_zero, codes, w_scale, bias):
    raise NotImplementedError
# %%
check("20.4", my_signed_file)
# %% [markdown]
# ## 7. One layer through more engines
# More formats, the same layer. **LiteRT** (once TensorFlow Lite) has files of its own; checkpoints of GPTQ (two
# versions), AWQ and compressed-tensors (W4A16: weights of 4 bits, activations of 16) keep three or four tensors for
# each layer; **bitsandbytes** has a layer of NF4 codes (notebook 04). In each, our codes must come back bit for bit.
# Values may move: where scales are kept in float16 (GPTQ, AWQ; here W4A16 keeps float32), or where an engine rounds
# activations. Two tables follow at the end: what was measured here, and stored rows, for which the benchmark compared
# the codes.
# %% tags=["nbval-ignore-output"]
import os

from quantlab.export.litert import litert_session, save_litert_weights, weight_codes
from quantlab.export.litert_graph import Graph

def by_rows(file):
    run = litert_session(file)  # for one token
    return lambda batch: torch.cat([run(torch.from_numpy(row[None])) for row in batch])

if here["ai_edge_litert"]:
    graph, size = Graph(), (1, 1024)
    ends = graph.tensor("x", size), graph.tensor("y", size)
    w = graph.tensor("w", (1024, 1024), data=linear.weight.numpy())
    b = graph.tensor("b", (1024,), data=linear.bias.numpy())
    graph.op("FULLY_CONNECTED", [ends[0], w, b], ends[1])
    graph.save(*ends, folder / "float.tflite")
    error = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # LiteRT prints a greeting to stderr: hide it
    litert_session(folder / "float.tflite")
    os.dup2(error, 2)
# %% tags=["nbval-ignore-output"]
import torch.nn.functional as F
from quantlab import PerAxis
from quantlab.export.litert import expected_litert

kinds = {"int8 rows": (8, PerAxis(0)), "4 bits, groups of 32": (4, PerGroup(32))}
for form, (bits, how) in kinds.items() if here["ai_edge_litert"] else ():
    q8, file = quantize_tensor(linear.weight, bits=bits, granularity=how), folder / f"{form}.tflite"
    save_litert_weights(q8, file, bias=linear.bias, verify=True)
    meant, float_run = F.linear(x, q8.dequantize(), linear.bias), by_rows(folder / "float.tflite")
    entry(form, meant, q8.codes, by_rows, "LiteRT", float_run, weight_codes, "tflite")
    named = relative(by_rows(file)(x.numpy()), expected_litert(q8, x, bias=linear.bias))
    print(f"LiteRT, {form}: {table[-1].apart:.1e} from ours; from ours with x rounded to int8, "
          f"token by token, {named:.1e}")
# %%
from quantlab.export.checkpoints import layer_codes, layer_parts

for layout, symmetric in (("GPTQ", True), ("GPTQ v2", False), ("AWQ", False), ("W4A16", True)):
    q4 = quantize_tensor(linear.weight, bits=4, granularity=PerGroup(32), symmetric=symmetric)
    held = layer_parts(q4, layout)
    back = layer_codes(held, layout, symmetric=symmetric)
    assert torch.equal(back.codes.int() - back.qparams.qmin, q4.codes.int() - q4.qparams.qmin)
    moved = ((back.dequantize() - q4.dequantize()).norm() / q4.dequantize().norm()).item()
    nbytes = sum(part.nbytes for part in held.values())
    names = (f"{name} {str(part.dtype).removeprefix('torch.')}" for name, part in held.items())
    print(f"{layout:8}{nbytes:,} bytes, values moved by {moved:.0e}: {', '.join(names)}")
# %% tags=["nbval-ignore-output"]
from quantlab.codebook import nf4_levels, quantize_codebook
from quantlab.export.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from quantlab.export.table import HEAD, Row, cpu_seconds

if here["bitsandbytes"]:
    nf4 = quantize_codebook(linear.weight, nf4_levels(), block_size=64)
    theirs = to_bitsandbytes(nf4, bias=linear.bias)
    meant = F.linear(x, nf4.dequantize(), linear.bias)
    same = (from_bitsandbytes(theirs).codes == nf4.codes).double().mean().item()
    fast, slow = cpu_seconds(lambda: theirs(x[:1]), lambda: linear(x[:1]))
    apart = relative(theirs(x), meant)
    table.append(Row("bitsandbytes", "NF4, blocks of 64", nf4.nbytes, apart, slow / fast))
    equal["bitsandbytes", "NF4, blocks of 64"] = same
assert all(share == 1 for share in equal.values())
print(HEAD, "  equal codes")
print(*(f"{row.line()}  {equal[row.engine, row.form]:.0%}" for row in table), sep="\n")
# %% tags=["nbval-ignore-output"]
from quantlab.export.table import OWN
from quantlab.files import read_json

known = {(row.engine, row.form) for row in table}
for engine in ("ONNX Runtime", "OpenVINO", "LiteRT", "bitsandbytes", "torchao", *OWN):
    if rest := [row for row in stored(engine, "") if (row.engine, row.form) not in known]:
        show(rest)
print("TensorRT: not run here, since it needs an NVIDIA GPU; its rules are checked (section 6)\n")
print("Neural Compressor's codes beside ours, the bundled model in 4 bits, groups of 32:")
for line in read_json(OWN["Neural Compressor"])["codes"]:
    same = f"{line['equal']:.2%} equal, in the first block {line['first block']:.2%}"
    print(f"{line['what']:60}{same}")
# %% [markdown]
# OpenVINO's uint8 forms are as far apart as pairs that saturate, and 7 bits mend it. XNNPACK, in ExecuTorch, rounds x
# to int8 by itself. `speed` is beside the *same engine's* floats, or torch's.
#
# **Neural Compressor** makes codes of its own. Rounding to nearest, only near-ties differ, once its symmetric scale,
# max/7, stands in place of ours, max/7.5. Its GPTQ, in blocks as wide as the groups, is about as far from ours as ours
# in float64 is: every last digit is carried on. By default its blocks have 2048 columns, and scales that miss the
# errors before them. Its 8 bits with zero points are broken: code minus zero point overflows int8.
#
# ## 8. The whole model
# `torch.onnx.export` writes a whole model as a graph of floats. `save_onnx` then puts MatMulNBits with **our GPTQ
# codes** in the place of each linear layer's product.
#
# **Predict:** with the same codes, how far apart are the logits of ONNX Runtime and of quantlab, at most?
# %% tags=["nbval-ignore-output"]
from quantlab.export.onnx_models import save_onnx
from quantlab.lm import DATA, load_lm, load_text, quantize_lm, token_stream
from quantlab.lm import linear_layers, weight_of

logits_apart = predict("Largest difference of logits", ["0", "about 1e-5", "about 1e-2", "about 1"])
model, tokenizer = load_lm()
fits = all(weight_of(each).shape[1] % 32 == 0 for each in linear_layers(model).values())
if model.config.model_type != "llama" or not fits or model.num_parameters() > 2e7:
    print("this needs a small Llama whose rows 32 divides: the bundled model takes over")
    model, tokenizer = load_lm(str(DATA / "model"))
read = token_stream(tokenizer, load_text("calibration"))[:2048]
how = {"bits": 4, "group_size": 32, "symmetric": False}
new, report = quantize_lm(model, read, method="gptq", progress=False, **how)
if runs and here["onnxscript"]:
    size = save_onnx(model, folder / "model.onnx", qtensors=report.qtensors, verify=True)
# %% tags=["nbval-ignore-output"]
from quantlab.export.table import STORED
from quantlab.metrics import kl_divergence

kept = read_json(STORED)  # what benchmarks/deployment.py --store measured
when = f"stored: {kept['date']}, {kept['processor']}"
ids = token_stream(tokenizer, load_text("eval"))[None, :256]
if runs and here["onnxscript"]:
    with torch.no_grad():
        ours, floats = new(ids).logits, model(ids).logits
    theirs = torch.from_numpy(onnx_session(folder / "model.onnx")(ids.numpy()))
    apart, kl = (theirs - ours).abs().max().item(), kl_divergence(floats, theirs)
    products = fused(folder / "model.onnx").count("MatMulNBits")
    print(f"{size:,} bytes, {products} MatMulNBits, KL to the float model {kl:.3f}")
else:
    apart = next(bar["value"] for bar in kept["bars"] if "logits" in bar["bar"])
    print(when)
found(apart < 1e-4, f"logits are {apart:.1e} apart, above 1e-4", of="machine")
print(f"largest difference of logits: {apart:.1e}")
print(logits_apart.reveal("about 1e-5"))
# %% [markdown]
# Equal up to float rounding, on 256 tokens: another program computes what your notebook's model computes.
#
# ## 9. Three programs from tutorials
# Programs like these three stand in many tutorials. Each ends without an error; some warn, where nobody looks. The
# first quantizes a model dynamically and then fine-tunes it. **Predict:** what has been trained?
# %%
import logging
import textwrap
import warnings

choices = ["everything", "the embedding alone", "the linear layer alone", "nothing"]
trained = predict("Trained", choices)
old = getattr(torch.ao, "quantization", None)  # in a later torch it may be gone

def train_after_quantize_dynamic():
    net = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 4))
    tuned = old.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    before = tuned[0].weight.detach().clone()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=0.1)
    tuned(torch.arange(16)).square().sum().backward()
    optimizer.step()
    return f"gradient {tuned[0].weight.grad}, moved: {bool((tuned[0].weight != before).any())}"
# %%
def convert_and_forget():
    net = nn.Sequential(old.QuantStub(), nn.Linear(8, 4), old.DeQuantStub()).train()
    net.qconfig = old.get_default_qat_qconfig("fbgemm")
    old.prepare_qat(net, inplace=True)
    net(torch.randn(64, 8))  # its observers see data
    old.convert(net.eval())  # and now it is int8?
    return f"the weight is {net[1].weight.dtype}"

def quantize_a_turned_weight():
    from onnxruntime.quantization import quantize_dynamic

    turned = [("Transpose", ["w"], "wt", {"perm": [1, 0]}), ("MatMul", ["x", "wt"], "y", {})]
    file, out = folder / "turned.onnx", folder / "quantized.onnx"
    size = write_onnx(file, layer_model(turned, {"w": linear.weight.numpy()}, (1024, 1024)))
    quantize_dynamic(file, out)
    return f"{size:,} bytes before, {out.stat().st_size:,} after; it runs {', '.join(fused(out))}"
# %% tags=["nbval-ignore-output"]
programs = [train_after_quantize_dynamic, convert_and_forget] if old else []
programs += [quantize_a_turned_weight] if runs else []
logging.disable()  # ONNX Runtime advises, at length, to prepare the file
control = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 4))  # the same in float must learn
control(torch.arange(16)).square().sum().backward()
assert control[0].weight.grad.abs().max() > 0
for program in programs:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        print(f"{program.__name__}: {program()}")
    for text in dict.fromkeys(str(warning.message).split("\n")[0] for warning in said):
        print("    warns:", textwrap.shorten(text, 100, placeholder=" …"))
logging.disable(logging.NOTSET)
print(trained.reveal("nothing"))
# %% [markdown]
# - **Train after `quantize_dynamic`.** `backward()` ran, the optimizer stepped, and the gradient is None: the
#   quantized layer has no parameters, and hands no gradient back. A warning is all that torch says.
# - **`convert(net)`** returns a new model and leaves `net` as it was, in floats.
# - **ONNX Runtime's `quantize_dynamic`** looks for products with a *constant* weight. Behind a Transpose there is
#   none. A head that shares the embedding's table is exported like this.
#
# TensorFlow's converter has more of them (seen in version 2.21, not run here): `Optimize.DEFAULT` leaves weights of
# less than 1,024 elements in float; with `TFLITE_BUILTINS_INT8` an operator without an int8 kernel stays float, and
# is not refused; with `float16` a representative dataset is read and ignored.
#
# ## 10. What replaced what
# Much of what one finds about these tools is about tools that are no more. Here are their successors, as their own
# pages and packages name them, read on the day that is printed:
# %% tags=["nbval-ignore-output"]
from quantlab.export.table import WALKED

walked = read_json(WALKED, {"date": str, "replaced": list})
print("read on", walked["date"])
for gone, living, source in walked["replaced"]:
    print(f"{gone} → {living}\n    {source}")
# %% [markdown]
# ## 11. Instead of stars
# Comparisons of tools give stars for latency, accuracy, memory and ease. Here are numbers, and their **regime**: the
# bundled model, 128 tokens read at once, one thread, beside torch in float32 in the same run; KL to the float model
# over 2,048 tokens; of memory, the bytes of the file. `same` is how often the likeliest token is the float model's.
# Instead of ease: the megabytes of the named packages (not of those they need in turn; a dash: not here), and the
# lines of this library that write and run the files. (For LiteRT and bitsandbytes it writes layers, no model.) GPTQ
# has groups of 128 here (Neural Compressor's: 32) and is judged on more text than in section 8. compressed-tensors
# is a format of files: its model is unpacked before it computes, so its speed is torch's. The last lines are limits
# that the benchmark sets.
# %% tags=["nbval-ignore-output"]
from importlib.metadata import PackageNotFoundError, distribution

import quantlab.export

sources = Path(quantlab.export.__file__).parent
onnx_files = ("onnx_models.py", "onnx_graphs.py", "onnx_run.py", "parts.py")
folders = ("checkpoints.py", "checkpoint_layouts.py", "checkpoint_words.py", "parts.py")
needs = {"ONNX Runtime": (("onnx", "onnxruntime", "onnxscript"), onnx_files),
         "OpenVINO": (("onnx", "onnxscript", "openvino"), (*onnx_files, "openvino.py")),
         "compressed-tensors": (("compressed-tensors",), folders),
         "torchao": (("torchao",), ("torchao.py",)),
         "ExecuTorch": (("executorch",), ("executorch.py", "executorch_run.py", "torchao.py")),
         "Neural Compressor": (("neural-compressor-pt",), ("neural_compressor.py",))}

def megabytes(package):
    try:
        return sum(file.size or 0 for file in distribution(package).files) / 1e6
    except PackageNotFoundError:
        return float("nan")  # not here
# %% tags=["nbval-ignore-output"]
others = {engine: read_json(file) for engine, file in OWN.items()}
print(when)
print(*(f"{engine}: {one['date']}, {one['processor']}" for engine, one in others.items()), sep="\n")
print(f"{'engine':20}{'form':51}{'bytes':>11}{'KL':>9}{'same':>7}{'speed':>7}{'MB':>6}{'lines':>7}")
for row in [*kept["model"], *(row for one in others.values() for row in one["model"])]:
    packages, written = needs[row["engine"]]
    packages += ("nncf",) * ("NNCF" in row["form"])
    size = f"{row['bytes']:,}" if row["bytes"] else ""
    lines = sum(len((sources / name).read_text().splitlines()) for name in written)
    print(f"{row['engine']:20}{row['form']:51}{size:>11}{row['kl']:9.1e}{row['top1']:7.1%}"
          f"{row['times']:7.2f}{sum(map(megabytes, packages)):6.0f}{lines:7}".replace("nan", "  -"))
for name, run in kept["SmolLM2, 128 tokens"].items():
    print(f"SmolLM2, {name}: {run['times']:.2f} times as fast, same {run['same']:.1%}")
for bar in kept["bars"]:
    value = "" if bar["value"] is None else f"{bar['value']:.3g}, "
    print(f"{bar['bar']}: {value}asked {bar['limit']:g}: {bar['verdict']}")
# %% [markdown]
# Read each engine's float32 row first: here no quantized file is faster than the *same engine's* floats. What is
# above 1 comes from the engine, not from the codes. SmolLM2 says the same: both engines read it at 1.29 times torch's
# speed in float32, and no int8 is clearly faster. The last limit is missed: OpenVINO with NNCF's codes reaches 1.15.
# On this CPU, without VNNI, int8 saves bytes and no time here; of single layers, LiteRT's and ExecuTorch's are nearly
# twice as fast as their own floats.
#
# And the answers, in 128 places of SmolLM2's text? ONNX Runtime's dynamic int8 rounds weights *and* inputs. Its
# likeliest token is torch's in 0.8 % of the places: one. Weights of 7 bits, which cannot saturate (section 4),
# bring that to 62.5 %. A suspect for the rest: one range for all tokens, which outliers stretch (notebook 16).
# NNCF, OpenVINO's partner for quantizing, rounds the weights alone: 98.4 %. That is an easier task, not a better
# int8.
# %% [markdown]
# ## 12. Drag it
# Layers of K inputs and N outputs, with M tokens at once, in ONNX Runtime (where it is missing: in this library).
# Left: measured times, grey for float32. Right: an estimate in two parts, made from float32's times. *Moving bytes*
# is its time for one token, times this form's share of its bytes. *Computing* is its time for 64 tokens, times
# M / 64. The black bar is what was measured.
#
# **Predict first**, then drag:
#
# 1. M = 1 and K = N = 1024: which form is the fastest? And with 64 tokens?
# 2. M from 1 to 64: which line comes down to float32's, and which loses its lead?
# 3. K = N = 256: what is left of the gain?
# %% tags=["nbval-ignore-output"]
from functools import partial

def files_of(K, N):
    """How each form of a layer of this size is run, {way: function}, and its bytes."""
    small = nn.Linear(K, N).requires_grad_(False)
    small.weight.copy_(linear.weight[:N, :K])
    static = StaticInt8Linear.from_linear(small, observer)
    q = quantize_tensor(small.weight, bits=4, granularity=PerGroup(32), symmetric=False)
    if not runs:
        own = {"float32": small, "int8, ours": static}
        ways = {way: lambda batch, of=of: of(torch.from_numpy(batch)) for way, of in own.items()}
        return ways, {"float32": 4 * K * N, "int8, ours": K * N}
    names = "float32", "int8, float bias", "int8, int32 bias", "4 bits, level 1", "4 bits, level 4"
    file = {way: folder / f"{way}.onnx" for way in names}
    sizes = [save_onnx_float(small, file["float32"]),
             save_onnx_int8(static, file["int8, float bias"], form="MatMul"),
             save_onnx_int8(static, file["int8, int32 bias"]),
             *(save_onnx_weights(q, file[way], level=int(way[-1])) for way in names[3:])]
    ways = {way: onnx_session(path) for way, path in file.items()}
    return ways, dict(zip(file, sizes, strict=True))
# %% tags=["nbval-ignore-output"]
from quantlab.explorers import explore_speed

seconds, nbytes = {}, {}
for K, N in ((K, N) for K in (256, 1024) for N in (256, 1024)):
    ways, sizes = files_of(K, N)
    nbytes |= {(way, K, N): size for way, size in sizes.items()}
    for M in (1, 4, 16, 64):
        batch = x.repeat(2, 1)[:M, :K].contiguous().numpy()
        times = cpu_seconds(*(partial(run, batch) for run in ways.values()))
        seconds |= {(way, M, K, N): time for way, time in zip(ways, times, strict=True)}

def parts(way, M, K, N):  # at float32's pace
    one, many = seconds["float32", 1, K, N], seconds["float32", 64, K, N]
    share = nbytes[way, K, N] / nbytes["float32", K, N]
    return {"moving bytes": one * share, "computing": many * M / 64}

explore_speed(seconds, nbytes, parts, shape=(1, 1024, 1024))
# %% tags=["nbval-ignore-output"]
for M, size in ((1, 1024), (64, 1024), (1, 256)):
    base = seconds["float32", M, size, size]
    speeds = {way: round(base / seconds[way, M, size, size], 2) for way in ways}
    print(f"K = N = {size}, {M} tokens, times as fast as float32: {speeds}")
    if runs and size == 1024:
        found(speeds["int8, float bias"] < 1, "a float bias: slower than float32", of="machine")
# %% [markdown]
# **What you saw** on a CPU like ours. "Float bias" and level 1 make floats of their weights in each call: far behind
# with one token, nearer with 64. Int32 bias and level 4 lead with one token, in the large layer. With 64, level 4's
# lead is gone; int32 bias's came and went between runs. Few bytes alone are no gain: level 1 has as few as level 4.
# With one token all four bars lie beyond both marks: the estimate is too simple. Ask of each star: on which
# processor, how many tokens, beside what, with whose codes?
#
# ### Myth: "exported is deployed"
# Of our files that load and run, one was slower than float, one fast and wrong, one rounded what it was not asked to
# round, one would be refused. Ask: *what did the engine make of it* (`fused`), *how far off is the answer, and why*,
# *how fast is it, beside the same engine's floats*.
# %% [markdown]
# **Open** (45 minutes, no check): take a layer of your own model through all forms, in a table of your own.
# Which is the best file for *your* processor?
#
# ### Recap
# - A Q/DQ graph is a request; `fused` shows what the engine made of it.
# - ONNX Runtime fuses into integers with int32 bias codes, or no bias; with a float bias it computes in floats.
# - Without VNNI two products are added in 16 bits, and may saturate; with weights of 7 bits they cannot.
# - MatMulNBits level 1 leaves activations float, level 4 rounds them, and so does the standard form, unasked.
# - TensorRT is symmetric; what passes there need not be fast elsewhere. Export *for* an engine.
#
# Next: [21 Bug hunt](21_bug_hunt.ipynb): programs that look right.
