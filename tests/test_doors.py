"""Every public function, each argument in turn replaced by each kind of bad input: a right result, or an error of ours.

The table is made from signatures. A public function that has no good call here fails the first test, so that a new one
cannot be forgotten; a parameter that is new is tried without anybody's doing.
"""

import copy
import importlib
import inspect
import math
import os
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_lm import random_model
from torch import Tensor, nn

import quantlab as ql
from quantlab import (
    awq,
    capstone,
    floats,
    gptq,
    kv,
    kv_measuring,
    ledger,
    linear,
    lm,
    methods,
    mixed,
    outliers,
    qat,
    rotations,
    storage,
)
from quantlab import hunt as hunted
from quantlab.clipping import quantize_clipped
from quantlab.export import (
    bitsandbytes,
    checkpoint_words,
    checkpoints,
    gguf,
    gguf_models,
    litert,
    onnx,
    onnx_models,
    openvino,
    tensorrt,
    torchao,
)
from quantlab.export import table as engine_table
from quantlab.export.engines import engine_here
from quantlab.granularity import code_range
from quantlab.observers import MinMax
from quantlab.superblocks import round_in_superblocks

ROOT = Path(ql.__file__).resolve().parent
ROOMS = ("", "floats", "metrics", "clipping", "gptq", "awq", "linear", "outliers", "methods", "mixed", "qat", "storage")
ROOMS += ("lm", "ledger", "levels", "rotations", "kv", "kv_measuring", "superblocks", "export.gguf")
ROOMS += ("export.gguf_models", "capstone", "hunt", "export.checkpoints", "export.checkpoint_words", "export.table")
ENGINES = {
    "export.torchao": ("torchao",), "export.litert": ("ai_edge_litert",), "export.bitsandbytes": ("bitsandbytes",),
    "export.onnx": ("onnx", "onnxruntime"), "export.onnx_models": ("onnx", "onnxscript"), "export.tensorrt": ("onnx",),
    "export.openvino": ("onnx", "openvino"),
}  # fmt: skip
ROOMS += tuple(room for room, engines in ENGINES.items() if all(map(engine_here, engines)))
# Public names that are no doors, and why.
RECORDS = {"Sensitivity", "Allocation", "Search", "Factor", "SplitError", "Divergence", "LayerReport", "Perplexity"}
RECORDS |= {"QuantizeReport", "Row", "Latency", "Table", "PerTensor", "Rounded"}  # results, or nothing to ask
RECORDS |= {"Budget", "Score", "Board", "Plans", "Refused", "BlockType", "GGUFFile", "GGUFTensor", "Layout"}
PARTS = {
    "Chunks",
    "KVLayer",
    "QTensor",
    "CodebookTensor",
    "ScaledQTensor",
    "MixedQTensor",
    "BlockFloatTensor",
}  # made by functions, or files
BASES = {"Method", "WeightMethod", "IntegerMethod", "Int8Linear", "Rounding"}
BEHIND = {"check_weight", "check_levels", "midpoints", "kernel_status", "plain", "kl_per_position"}
BEHIND |= {
    "chosen_model",
    "real_lm",
    "longest_context",
    "read_parts",
    "read_names",
    "read_metadata",
    "dynamic_levels",
    "Stored",
    "nf4_levels",
    "computes_otherwise",
    "check_same_outputs",
    "OnlineHadamard",
    "row_of",
    "write_hidden",  # would write over the hidden text
    "qat",  # of one checkpoint
    "run_tensorrt",  # needs a GPU
    *([] if engine_here("nncf") else ["save_nncf"]),
}  # called by doors, with what they checked


@cache
def model():
    return random_model("llama")


@cache
def int8_model():
    return lm.quantize_lm(model(), method="llm_int8", progress=False)[0]


def x(*shape, seed=0):
    return torch.randn(*(shape or (6, 8)), generator=torch.Generator().manual_seed(seed))


def tokens():
    return torch.arange(40) % 50


def bad_values() -> dict:
    """The kinds of bad (and odd) input by name. Each is made anew: what one call does to it the next does not see."""
    real, nan = x(), x()
    nan[1, 2] = math.nan
    return {
        "None": None, "str": "abc", "list": [1.0, 2.0], "dict": {"a": 1}, "object": object(), "numpy": real.numpy(),
        "empty": torch.empty(0, 8), "0-d": torch.tensor(1.5), "vector": real[0], "3-d": real[None],
        "mismatched": x(5, 7), "zeros": real * 0, "NaN": nan, "inf": torch.where(nan.isnan(), math.inf, nan),
        "3e38": real.sign() * 3e38, "1e300": real.double() * 1e300, "denormal": real * 1e-42,
        "float64": real.double(), "bfloat16": real.bfloat16(), "float8": real.to(torch.float8_e4m3fn),
        "sparse": real.to_sparse(), "meta": real.to("meta"), "integers": torch.arange(48).view(6, 8), "bools": real > 0,
        "complex": real * 1j, "True": True, "zero": 0, "minus one": -1, "nine": 9, "the word 4": "4", "4.0": 4.0,
        "nan": math.nan, "infinity": math.inf, "1e300 as a number": 1e300, "2**40": 2**40, "np.int64": np.int64(4),
        "tensor(4)": torch.tensor(4), "nn.Linear": nn.Linear(3, 3), "a tuple": (model(), None),
        "int8 model": int8_model(),
    }  # fmt: skip


def rows(weight: Tensor):
    return ql.quantize_tensor(weight, bits=4, granularity=ql.PerAxis(0))


def eight_bits(model, tokens):
    """A recipe for the capstone."""
    return capstone.nearest(model, tokens, bits=8, embedding_bits=8, group_size=8)


def good_calls(folder: Path) -> dict:
    """A call that works for each door, by name: (function, its arguments)."""
    real, row, group, edge = x(), x()[0], ql.PerGroup(4), torch.tensor(1.0)
    qp = ql.choose_qparams(torch.tensor(-2.0), torch.tensor(2.0), qmin=-8, qmax=7)
    codes, hessian = ql.quantize(real, qp), ql.Hessian(8).add(x(50, 8, seed=1))
    pair, lin = {"p_logits": real, "q_logits": real + 0.1}, nn.Linear(8, 6)
    grid = {"bits": 4, "group_size": 4, "symmetric": False}
    affine = {"bits": 4, "granularity": group, "symmetric": False, "signed": True}
    reads = {"tokens": tokens(), "window": 16}
    on_model, on_blocks = {"model": model(), **reads}, {"x": real, "granularity": group}
    scales, layer = lm.activation_scales(model(), **reads), "model.layers.0.mlp.gate_proj"
    new, report = lm.quantize_lm(model(), method="rtn", group_size=8, progress=False)
    costs = {"costs": {"a": {2: 5.0, 4: 1.0}}, "sizes": {"a": {2: 10, 4: 20}}}
    entry = ledger.measure(model(), model(), tokens(), method="float", window=16)
    storage.save_tensors(folder / "x", {"x": real})
    lm.save_quantized(folder / "m", new, report.qtensors)
    wide, (small, words) = x(4, 32), lm.load_lm(str(lm.DATA / "model"))
    gguf.save_gguf(small, words, folder / "s.gguf", mix="F16")
    trained = qat.prepare_qat(model(), bits=4, group_size=8)
    past = model()(tokens()[None]).past_key_values
    given = {"model": model(), "tokens": tokens()}
    tiny, scored = random_model("llama", vocab_size=small.config.vocab_size), capstone.read()[:2]
    capstone.append(scored[0], folder / "board.jsonl")
    fewer = {"bits": (4,), "groups": (8,), "methods": ("nearest",), "progress": False}
    return {
        "QParams": (ql.QParams, {"scale": qp.scale, "zero_point": qp.zero_point, "qmin": -8, "qmax": 7}),
        "choose_qparams": (ql.choose_qparams, {"min_val": -edge, "max_val": edge, "qmin": 0, "qmax": 15}),
        "quantize": (ql.quantize, {"x": real, "qp": qp}),
        "dequantize": (ql.dequantize, {"codes": codes, "qp": qp}),
        "fake_quantize": (ql.fake_quantize, {"x": real, "qp": qp}),
        "PerAxis": (ql.PerAxis, {"axis": 0}),
        "PerGroup": (ql.PerGroup, {"group_size": 4}),
        "quantize_tensor": (ql.quantize_tensor, {"x": real, **affine}),
        "quantize_clipped": (quantize_clipped, {"x": real, **affine, "steps": 3}),
        "pack": (ql.pack, {"codes": codes + 8, "bits": 4}),
        "unpack": (ql.unpack, {"packed": torch.tensor([57, 1], dtype=torch.uint8), "bits": 2, "count": 4}),
        "fp4_levels": (ql.fp4_levels, {"smallest": 1 / 12}),
        "kmeans_levels": (ql.kmeans_levels, {"x": real, "count": 4, "max_steps": 5}),
        "nearest_level": (ql.nearest_level, {"x": real, "levels": ql.nf4_levels()}),
        "normalize_blocks": (ql.normalize_blocks, {"x": real, "block_size": 4}),
        "quantize_codebook": (ql.quantize_codebook, {"x": real, "levels": ql.nf4_levels(), "block_size": 4}),
        "FloatFormat": (ql.FloatFormat, {"name": "F", "exponent_bits": 4, "mantissa_bits": 3, "bias": 7}),
        "round_to": (ql.round_to, {"x": real, "fmt": ql.FP8_E4M3}),
        "encode": (floats.encode, {"x": real, "fmt": ql.FP8_E4M3}),
        "decode": (floats.decode, {"codes": codes + 8, "fmt": ql.FP8_E4M3}),
        "values": (floats.values, {"fmt": ql.FP4_E2M1}),
        "mx_quantize": (ql.mx_quantize, {"x": real, "fmt": ql.FP4_E2M1, "block_size": 4}),
        "nvfp4_quantize": (ql.nvfp4_quantize, {"x": real}),
        "MinMax": (lambda x: ql.MinMax().update(x).min_max(), {"x": real}),
        "MovingAverage": (ql.MovingAverage, {"momentum": 0.1}),
        "Percentile": (ql.Percentile, {"percentile": 99.0}),
        "MSE": (ql.MSE, {"bits": 4}),
        "Entropy": (ql.Entropy, {"bits": 4}),
        "mse": (ql.mse, {"x": real, "x_hat": real + 1}),
        "sqnr_db": (ql.sqnr_db, {"x": real, "x_hat": real + 1}),
        "split_error": (ql.split_error, {"x": real, "qp": qp}),
        "kl_divergence": (ql.kl_divergence, pair),
        "top1_agreement": (ql.top1_agreement, pair),
        "code_range": (code_range, {"bits": 4}),
        "Hessian": (ql.Hessian, {"in_features": 8}),
        "Hessian.add": (lambda x: ql.Hessian(8).add(x).matrix, {"x": real}),
        "factorize": (gptq.factorize, {"H": hessian.matrix}),
        "gptq_quantize": (ql.gptq_quantize, {"weight": real, "hessian": hessian, **grid}),
        "gptq_steps": (gptq.gptq_steps, {"weight": real, "hessian": hessian, "bits": 4}),
        "obq_steps": (gptq.obq_steps, {"row": row, "hessian": hessian, "bits": 4}),
        "keep_columns": (awq.keep_columns, {"weight": real, "columns": [1], **grid}),
        "awq_search": (awq.awq_search, {"weight": real, "x": x(20, 8), **grid, "steps": 2}),
        "search_scales": (awq.search_scales, {"weights": [real], "hessian": hessian, **grid, "steps": 2}),
        "scales_of": (awq.scales_of, {"strength": row.abs(), "alpha": 0.5}),
        "scale_and_round": (awq.scale_and_round, {"weight": real, "input_scale": row.abs(), **grid}),
        "DynamicInt8Linear": (linear.DynamicInt8Linear, {"linear": lin}),
        "StaticInt8Linear": (linear.StaticInt8Linear, {"linear": lin, "observer": ql.MinMax().update(real)}),
        "LLMInt8Linear": (outliers.LLMInt8Linear, {"linear": lin}),
        "int8 forward": (lambda x: linear.DynamicInt8Linear(lin)(x), {"x": real}),
        "PackedLinear": (linear.PackedLinear, {"q": ql.quantize_tensor(real, bits=4, granularity=group)}),
        "WeightOnlyLinear": (linear.WeightOnlyLinear.from_linear, {"linear": lin, "bits": 4, "granularity": group}),
        "packed forward": (lambda x: linear.PackedLinear.from_linear(lin)(x), {"x": real}),
        "packed_layers": (linear.packed_layers, {"model": model()}),
        "int_linear": (linear.int_linear, {"x_codes": codes, "x_zero": 0, "w_codes": codes, "w_zero": 0}),
        "plant_outliers": (outliers.plant_outliers, {"model": model(), "channels": [1], "factor": 4.0}),
        "smooth": (outliers.smooth, {"model": model(), "activation_scales": scales, "alpha": 0.5}),
        "smoothing_scales": (outliers.smoothing_scales, {"largest_x": row.abs(), "layers": [lin], "alpha": 0.5}),
        "norm_readers": (outliers.norm_readers, {"model": model()}),
        **{one.__name__: (one, {}) for one in (methods.RTN, methods.NF4, methods.GPTQ, methods.AWQ)},
        **{one.__name__: (one, {}) for one in (methods.W8A8, methods.SmoothQuant, methods.W4A4, methods.LLMInt8)},
        "hadamard": (rotations.hadamard, {"n": 12}),
        "hadamard_transform": (rotations.hadamard_transform, {"x": real}),
        "random_hadamard": (rotations.random_hadamard, {"n": 12}),
        "random_orthogonal": (rotations.random_orthogonal, {"n": 12}),
        "fold_norms": (rotations.fold_norms, {"model": model()}),
        "rotate": (rotations.rotate, {"model": model(), "residual": torch.eye(24), "heads": False}),
        "cayley": (rotations.cayley, {"free": x(8, 8)}),
        "rounding_error": (rotations.rounding_error, {"x": real, "bits": 4}),
        "learn_rotation": (rotations.learn_rotation, {"rows": [real], "start": torch.eye(8), "steps": 2}),
        "method_of": (methods.method_of, {"name": "rtn"}),
        "settings_of": (methods.settings_of, {"name": "rtn"}),
        "sensitivity": (mixed.sensitivity, on_model | {"bits": (4,), "group_size": 8, "progress": False}),
        "greedy": (mixed.greedy, costs | {"budget": 20}),
        "knapsack": (mixed.knapsack, costs | {"budget": 20}),
        "frontier": (mixed.frontier, costs),
        "LSQ": (lambda x, **options: qat.LSQ(x, **options)(x), on_blocks | {"bits": 4, "mask": "value", "start": 1.0}),
        "MinMaxRounding": (qat.MinMaxRounding, {"bits": 4, "granularity": group}),
        "FakeQuantLinear": (qat.FakeQuantLinear.from_linear, {"linear": lin, "bits": 4, "group_size": 4}),
        "prepare_qat": (qat.prepare_qat, {"model": model(), "bits": 4, "group_size": 8, "layers": [layer]}),
        "fake_quant_layers": (qat.fake_quant_layers, {"model": trained}),
        "convert": (qat.convert, {"model": trained}),
        **{one.__name__: (one, on_blocks) for one in (qat.ternary, qat.quantize_ternary)},
        **{one.__name__: (one, on_blocks) for one in (qat.binary, qat.quantize_binary)},
        "pack_ternary": (qat.pack_ternary, {"codes": codes.clamp(-1, 1)}),
        "unpack_ternary": (qat.unpack_ternary, {"packed": torch.tensor([156], dtype=torch.uint8), "count": 4}),
        "save_tensors": (storage.save_tensors, {"path": folder / "y", "tensors": {"x": real}}),
        "load_tensors": (storage.load_tensors, {"path": folder / "x"}),
        "activation_scales": (lm.activation_scales, {"model": model(), **reads}),
        "blocks_of": (lm.blocks_of, {"model": model()}),
        "linear_layers": (lm.linear_layers, {"model": model()}),
        "embedding_layers": (lm.embedding_layers, {"model": model()}),
        "layers_of_role": (lm.layers_of_role, {"model": model(), "role": "query"}),
        "budget": (lm.budget, {"model": model(), "tokens": 40, "least": 20}),
        "begin_token": (lm.begin_token, {"tokenizer": lm.load_lm()[1]}),
        "weight_of": (lm.weight_of, {"layer": lin}),
        "capture_inputs": (lm.capture_inputs, {"model": model(), **reads, "layers": [layer]}),
        "perplexity": (lm.perplexity, {"model": model(), **reads, "stride": 8}),
        "divergence": (lm.divergence, {"reference": model(), "model": new, **reads, "stride": 8}),
        "perplexity_and_divergence": (
            lm.perplexity_and_divergence, {"reference": model(), "model": new, **reads, "stride": 8}
        ),
        "quantize_lm": (
            lm.quantize_lm,
            {"model": model(), **reads, "method": "rtn", "held_out": reads["tokens"], "progress": False},
        ),
        "quantize_weights": (lm.quantize_weights, {"model": model(), "quantizer": rows}),
        "model_bytes": (lm.model_bytes, {"model": new, "qtensors": report.qtensors}),
        "save_quantized": (lm.save_quantized, {"folder": folder / "n", "model": new, "qtensors": report.qtensors}),
        "load_quantized": (lm.load_quantized, {"folder": folder / "m", "packed": False}),
        "generate": (lm.generate, {"model": lm.load_lm()[0], "tokenizer": lm.load_lm()[1], "prompt": "a", "tokens": 2}),
        "answer": (lm.answer, {"model": lm.load_lm()[0], "tokenizer": lm.load_lm()[1], "question": "a", "tokens": 2}),
        "load_lm": (lm.load_lm, {"name_or_path": str(lm.DATA / "model")}),
        "load_text": (lm.load_text, {"name": "style"}),
        "read_documents": (lm.read_documents, {"paths": [lm.DATA / "text/style.txt"]}),
        "token_stream": (lm.token_stream, {"tokenizer": lm.load_lm()[1], "documents": ["a"]}),
        "measure": (ledger.measure, {"reference": model(), "model": new, **reads, "method": "rtn"}),
        "latency": (ledger.latency, {"reference": model(), "model": new, "tokens": tokens(), "rounds": 2}),
        "append": (ledger.append, {"row": entry, "path": folder / "ledger.csv"}),
        "read": (ledger.read, {"path": folder / "ledger.csv"}),
        "quantize_kv": (kv.quantize_kv, {"x": x(1, 2, 16, 8), "bits": 4, "per": "channel", "group_size": 8}),
        "KVCache": (kv.KVCache, {"group_size": 8, "recent": 0, "sinks": 4}),
        "KVModel": (lambda model, **options: kv.KVModel(model, **options)(tokens()[None]).logits,
                    {"model": model(), "chunk": 16, "key_bits": 2, "group_size": 8}),
        "filled": (kv.KVCache.filled, {"past": past, "tokens": 8, "key_bits": 2}),
        "update": (lambda keys, values: kv.KVCache().update(keys, values, 0),
                   {"keys": x(1, 2, 40, 8), "values": x(1, 2, 40, 8)}),
        "kv_divergences": (kv_measuring.kv_divergences, {"model": model(), "past": past, "following": tokens()[:20],
                                                         "settings": {"a": {"key_bits": 2}}, "tokens": 36, "chunk": 8}),
        "attention_queries": (kv_measuring.attention_queries, {"model": model(), "tokens": tokens()}),
        "attention_on_first": (kv_measuring.attention_on_first,
                               {"model": model(), "tokens": tokens(), "past": past, "start": 10, "stop": 30}),
        "value_lengths": (kv_measuring.value_lengths, {"past": past}),
        "rounding_errors": (kv_measuring.rounding_errors, {"past": past, "bits": 3}),
        "keys_before_rope": (kv_measuring.keys_before_rope, {"model": model(), "tokens": tokens(), "past": past}),
        "round_in_superblocks": (round_in_superblocks, {"x": x(4, 32), "super_size": 32, "block_size": 8}),
        "quantize_gguf": (gguf.quantize_gguf, {"weight": wide, "kind": "Q4_0", "importance": wide[0].abs()}),
        "dequantize_gguf": (gguf.dequantize_gguf, {"packed": gguf.quantize_gguf(wide, "Q4_0"), "kind": "Q4_0"}),
        "codes_to_gguf": (gguf.codes_to_gguf, {"q": ql.quantize_tensor(wide, bits=4, granularity=ql.PerGroup(32))}),
        "save_gguf": (gguf.save_gguf, {"model": small, "tokenizer": words, "path": folder / "z.gguf", "mix": "F16"}),
        "read_gguf": (gguf.read_gguf, {"path": folder / "s.gguf"}),
        "tensor_types": (gguf.tensor_types, {"shapes": {"blk.0.attn_v.weight": (8, 32)}, "mix": "Q4_0", "blocks": 1}),
        "types_of": (gguf.types_of, {"model": model(), "mix": "Q4_K_M"}),
        "gguf_name": (gguf.gguf_name, {"name": "model.norm.weight"}),
        "measure_importance": (gguf_models.measure_importance, on_model),
        "with_values_of": (gguf_models.with_values_of, {"model": small, "path": folder / "s.gguf"}),
        "capstone's score": (capstone.score, {"recipe": eight_bits, "name": "x", "who": "me", "on": (tiny, words)}),
        "score": (hunted.score, {}),
        "practice": (capstone.practice, {"recipe": eight_bits, "on": (tiny, words)}),
        "capstone's append": (capstone.append, {"score": scored[0], "path": folder / "board.jsonl"}),
        "capstone's read": (capstone.read, {"path": folder / "board.jsonl"}),
        "merge": (capstone.merge, {"paths": [folder / "board.jsonl"], "out": folder / "merged.jsonl"}),
        "best": (capstone.best, {"rows": scored, "budget": "2.2 MB", "model": "bundled"}),
        "plans": (capstone.plans, {"calibration": tokens(), **given, **fewer}),
        "seal": (capstone.seal, {"text": "a"}),
        "unseal": (capstone.unseal, {"sealed": capstone.seal("a")}),
        "hidden_text": (capstone.hidden_text, {"name": "stories"}),
        "in_groups": (capstone.in_groups, {"weight": real, "bits": 4, "group_size": 4}),
        "quantize_embeddings": (capstone.quantize_embeddings, {"model": model(), "quantizer": rows}),
        "beside": (capstone.beside, {"model": model()}),
        "by_method": (capstone.by_method, given | {"method": methods.RTN(group_size=8), "embedding_bits": 4}),
        "by_part": (capstone.by_part, given | {"method": "rtn", "group_size": 8, "mlp": 3}),
        "nearest": (capstone.nearest, given | {"bits": 4, "embedding_bits": 4, "group_size": 8}),
        "gptq": (capstone.gptq, given | {"bits": 4, "embedding_bits": 4, "group_size": 8}),
        "mixed_gptq": (capstone.mixed_gptq, given | {"nbytes": 30_000, "choices": (4,), "group_size": 8}),
        "nf4": (capstone.nf4, given),
        "show": (hunted.show, {"name": "ranges.1"}),
        "program": (hunted.program, {"name": "ranges.1"}),
        "verdict": (hunted.verdict, {"name": "ranges.1", "opinion": "fine"}),
        "hint": (hunted.hint, {"name": "ranges.1"}),
        "reveal": (hunted.reveal, {"name": "ranges.1"}),
        "save": (hunted.save, {"path": folder / "hunt.json"}),
        "resume": (hunted.resume, {"path": folder / "hunt.json"}),
        "atlas": (hunted.atlas, {}),
        "restart": (hunted.restart, {}),
        **checkpoint_calls(folder),
        **engine_calls(folder),
        **onnx_calls(folder),
        **table_calls(folder),
        "compare": (ledger.compare, {"row": entry, "other": ledger.measure(model(), new, method="rtn", **reads)}),
    }  # fmt: skip


def checkpoint_calls(folder: Path) -> dict:
    sized = random_model("llama", vocab_size=64)
    report = lm.quantize_lm(sized, method="rtn", bits=8, group_size=None, symmetric=True, progress=False)[1]
    q = ql.quantize_tensor(x(8, 16), bits=4, granularity=ql.PerGroup(8))
    words = {"bits": 4, "awq": True}
    checkpoints.save_checkpoint(sized, folder / "c", report.qtensors, layout="W8A8")
    to_save = {"model": sized, "folder": folder / "d", "qtensors": report.qtensors, "layout": "W8A8"}
    known = {"layout": "W4A16", "symmetric": True}
    calls = {
        "save_checkpoint": (checkpoints.save_checkpoint, to_save),
        "checkpoint_codes": (checkpoints.checkpoint_codes, {"folder": folder / "c"}),
        "layer_parts": (checkpoints.layer_parts, {"q": q, "layout": "W4A16"}),
        "layer_codes": (checkpoints.layer_codes, {"parts": checkpoints.layer_parts(q, "W4A16"), **known}),
        "to_words": (checkpoint_words.to_words, {"codes": torch.arange(16).view(2, 8), **words}),
        "from_words": (checkpoint_words.from_words, {"words": torch.arange(4, dtype=torch.int32), **words}),
    }
    if engine_here("compressed_tensors"):
        calls |= {"load_checkpoint": (checkpoints.load_checkpoint, {"folder": folder / "c"})}
    return calls


def engine_calls(folder: Path) -> dict:
    """Of the engines that are here."""
    q, calls, inputs = ql.quantize_tensor(x(6, 32), bits=4, granularity=ql.PerAxis(0)), {}, x(1, 32)
    if engine_here("torchao"):
        calls |= {
            "to_torchao": (torchao.to_torchao, {"q": q}),
            "from_torchao": (torchao.from_torchao, {"weight": torchao.to_torchao(q)}),
            "quantized_by_torchao": (torchao.quantized_by_torchao, {"layer": nn.Linear(8, 6), "group_size": 4}),
            "torchao_model": (torchao.torchao_model, {"model": model(), "qtensors": {}}),
        }
    if engine_here("ai_edge_litert"):
        qp = ql.choose_qparams(torch.tensor(-2.0), torch.tensor(2.0), qmin=0, qmax=255)
        layer, path = int8_layer(), folder / "w.tflite"
        litert.save_litert_weights(q, path)
        calls |= {
            "save_litert_int8": (litert.save_litert_int8, {"layer": layer, "output": qp, "path": folder / "i"}),
            "save_litert_weights": (litert.save_litert_weights, {"q": q, "path": folder / "j"}),
            "expected_litert": (litert.expected_litert, {"q": q, "x": inputs}),
            "litert_session": (litert.litert_session, {"path": path}),
            "weight_codes": (litert.weight_codes, {"path": path}),
        }
    if engine_here("bitsandbytes"):
        nf4 = ql.quantize_codebook(x(6, 32), ql.nf4_levels(), block_size=32)
        calls |= {
            "to_bitsandbytes": (bitsandbytes.to_bitsandbytes, {"q": nf4}),
            "from_bitsandbytes": (bitsandbytes.from_bitsandbytes, {"layer": bitsandbytes.to_bitsandbytes(nf4)}),
        }
    return calls


def onnx_calls(folder: Path) -> dict:
    """Of the engines that are here and read ONNX files."""
    q, calls, path = ql.quantize_tensor(x(6, 32), bits=4, granularity=ql.PerGroup(16)), {}, folder / "layer.onnx"
    if engine_here("onnx") and engine_here("onnxruntime"):
        onnx.save_onnx_int8(int8_layer(), path)
        calls |= {
            "save_onnx_float": (onnx.save_onnx_float, {"linear": nn.Linear(8, 6), "path": folder / "f.onnx"}),
            "save_onnx_int8": (onnx.save_onnx_int8, {"layer": int8_layer(), "path": folder / "i.onnx"}),
            "save_onnx_weights": (onnx.save_onnx_weights, {"q": q, "path": folder / "w.onnx"}),
            "expected_int8": (onnx.expected_int8, {"layer": int8_layer(), "x": x()}),
            "onnx_session": (onnx.onnx_session, {"path": path}),
            "fused": (onnx.fused, {"path": path}),
            "codes_in": (onnx.codes_in, {"path": path}),
            "tensorrt_refusals": (tensorrt.tensorrt_refusals, {"path": path}),
        }
        if engine_here("onnxscript"):
            calls |= {"save_onnx": (onnx_models.save_onnx, {"model": model(), "path": folder / "m.onnx"})}
        if engine_here("openvino") and os.environ.get("ONEDNN_MAX_CPU_ISA") != "SSE41":  # which it cannot do with
            calls |= {
                name: (getattr(openvino, name), {"path": path}) for name in ("openvino_session", "openvino_graph")
            }
        if engine_here("openvino") and engine_here("nncf"):
            calls |= {"save_nncf": (openvino.save_nncf, {"path": path, "out": folder / "n.xml"})}
    return calls


def table_calls(folder: Path) -> dict:
    row, file = engine_table.Row("an engine", "a form", 1, 0.0), folder / "file of an engine"
    file.write_bytes(b"a")
    runs = {"run": lambda array: array / 2, "in_float": lambda array: array / 4}
    of_layer = {"engine": "an engine", "form": "a form", "path": file, "x": x(), "y": x(), **runs}
    return {
        "table's measure": (engine_table.measure, of_layer),
        "table's show": (engine_table.show, {"rows": [row]}),
        "relative": (engine_table.relative, {"got": x(), "wanted": x()}),
        "cpu_seconds": (lambda call, **options: engine_table.cpu_seconds(call, **options), {"call": list, "rounds": 2}),
        "stored_rows": (engine_table.stored_rows, {"engine": "LiteRT"}),
    }


def int8_layer():
    """A static int8 layer of eight inputs."""
    observer = MinMax()
    observer.update(x())
    return linear.StaticInt8Linear.from_linear(nn.Linear(8, 6), observer)


def public() -> set[str]:
    """What the rooms offer: __all__, or what is defined there and has no underscore."""
    found = set()
    for room in ROOMS:
        module = importlib.import_module(f"quantlab.{room}".rstrip("."))
        own = [
            n
            for n, o in vars(module).items()
            if not n.startswith("_") and getattr(o, "__module__", "") == module.__name__
        ]
        names = getattr(module, "__all__", own)
        found |= {n for n in names if callable(getattr(module, n)) and not isinstance(getattr(module, n), Mapping)}
    return found


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    exported = cache(onnx_models._exported)  # of one model; seconds each time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_models, "_exported", lambda model: copy.deepcopy(exported(model)))
        yield good_calls(tmp_path_factory.mktemp("doors"))


def test_every_public_function_has_a_good_call(calls):
    assert public() - calls.keys() - RECORDS - PARTS - BASES - BEHIND == set(), "give it a good call in good_calls"
    for name, (function, arguments) in calls.items():
        assert sound(function(**arguments)), name


def sound(result, depth: int = 0) -> bool:
    """Whether no float in a result is NaN, and every tensor has values, finite ones. (A ratio may be infinite.)"""
    if hasattr(result, "qdata"):  # a tensor of torchao
        result = result.dequantize()
    if isinstance(result, Tensor):
        return not result.is_meta and (not result.is_floating_point() or bool(result.float().isfinite().all()))
    if isinstance(result, nn.Module):
        return all(sound(t) for t in [*result.parameters(), *result.buffers()])
    if depth < 4 and isinstance(result, tuple | list | dict):
        return all(sound(one, depth + 1) for one in (result.values() if isinstance(result, dict) else result))
    if depth < 4 and hasattr(result, "__dataclass_fields__"):
        return sound(vars(result), depth + 1)
    return not isinstance(result, float) or not math.isnan(result)


# What is right though it is not finite, and why.
RIGHT = {("round_to", "x", "NaN"): "NaN stays NaN, says its docstring"}
RIGHT |= {
    (door, "window", "2**40"): "one window has no spread"
    for door in ("perplexity", "divergence", "perplexity_and_divergence", "measure", "sensitivity")
}
RIGHT |= {("packed forward", "x", kind): "as nn.Linear" for kind in ("NaN", "inf", "3e38", "1e300")}
RIGHT |= {("hadamard_transform", "x", "3e38"): "sums beyond float32, as in the product with the matrix"}
RIGHT |= {("int8 forward", "x", "3e38"): "sums beyond float32, as in nn.Linear"}
# TypeError: only of Python itself, at the call: an argument that is missing, or one that does not exist.
OURS = (ValueError, FileNotFoundError, TypeError)


def bits(value) -> bytes | None:
    """What a dense tensor holds, to see that it is not changed."""
    value = getattr(value, "qdata", value)  # of a tensor of torchao, its codes
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.numel() == 0:
        return None
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def outcome(function, arguments: dict) -> str:
    """ "" for a right result or an error of ours that says something; else what is wrong."""
    before = {name: bits(value) for name, value in arguments.items()}
    try:
        result = function(**arguments)
    except OURS as error:
        frames = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
        mine = frames[-1].is_relative_to(ROOT) or len(frames) == 2  # raised by us, or by Python at the call itself
        return "" if mine and len(str(error)) > 10 else f"{type(error).__name__} of {frames[-1].name}: {error}"
    except Exception as error:  # noqa: BLE001  whatever else comes out is what this test looks for
        return f"{type(error).__name__}: {error}"
    changed = [name for name, value in arguments.items() if bits(value) != before[name]]
    if changed:
        return f"changed {changed}"
    return "" if sound(result) else f"not finite: {str(result)[:80]}"


def parameters(function, arguments: dict) -> list[str]:
    named = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return list(dict.fromkeys([*named, *arguments]))


def table(calls: dict) -> list[str]:
    wrong = []
    for name, (function, arguments) in calls.items():
        for parameter in parameters(function, arguments):
            for kind, value in bad_values().items():
                found = outcome(function, {**arguments, parameter: value})
                if found and (name, parameter, kind) not in RIGHT:
                    wrong.append(f"{name}({parameter}={kind}): {found[:150]}")
    return wrong


def test_no_door_lets_bad_input_through(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path that is a word of the table is written here
    wrong = table(calls)
    assert not wrong, f"{len(wrong)} calls:\n" + "\n".join(wrong)
