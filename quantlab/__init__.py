"""quantlab: the small library behind the workbook, one file a concept.

In reading order; each imports only from the lines above its own (tests/test_imports.py reads this table):

    foundation   arguments files selftest                        what the others ask of arguments and files
    torch        modules                                         linear layers, hooks, modes
    the map      affine packing                                  reals to integer codes, codes to bytes
    blocks       blocks levels quantized metrics kv_codes        who shares a scale; tables of levels; the protocol
    tensors      granularity floats codebook_fast superblocks    rounding to nearest; small floats; scales as codes
    choosing     codebook clipping observers                     NF4; which range, from data or without
    inputs       hessian                                         what a layer's output loses, without its inputs
    error        gptq                                            column by column
    scaling      awq
    layers       storage linear                                  quantized tensors in files and in layers
    outliers     outliers hadamard
    bases        rotations
    methods      methods                                         one object for each way to quantize a model
    models       lm                                              load, measure, walk, save
    beyond       mixed ledger train kv                           bits by layer; the table; training; the cache of keys
    doors        qat sweep kv_measuring                          public names of training; many ways side by side
    engines      export                                          files for other programs, one file an engine
    the end      capstone                                        fit the budget: recipes, scores, a leaderboard

Beside the lines: plain (slow definitions of what is fast elsewhere), plots, explorers (what is dragged), exercises,
judging and checks (what is answered), predictions (what is guessed first), hunt (what is wrong on purpose), progress
(what is passed).
A new method is a file in methods, a new quantized tensor a subclass of quantized.Quantized, a new chapter a file in
notebooks/src with its exercises in exercises, a new engine a file in export.
"""

from quantlab.affine import QParams, choose_qparams, dequantize, fake_quantize, quantize
from quantlab.codebook import (
    CodebookTensor,
    fp4_levels,
    kmeans_levels,
    nearest_level,
    nf4_levels,
    normalize_blocks,
    quantize_codebook,
)
from quantlab.floats import (
    BF16,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    FloatFormat,
    mx_quantize,
    nvfp4_quantize,
    round_to,
)
from quantlab.gptq import Hessian, gptq_quantize
from quantlab.granularity import PerAxis, PerGroup, PerTensor, QTensor, quantize_tensor
from quantlab.metrics import kl_divergence, mse, split_error, sqnr_db, top1_agreement
from quantlab.observers import MSE, Entropy, MinMax, MovingAverage, Percentile
from quantlab.packing import pack, unpack

__all__ = [
    "BF16",
    "FP16",
    "FP4_E2M1",
    "FP6_E2M3",
    "FP6_E3M2",
    "FP8_E4M3",
    "FP8_E5M2",
    "MSE",
    "CodebookTensor",
    "Entropy",
    "FloatFormat",
    "Hessian",
    "MinMax",
    "MovingAverage",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "Percentile",
    "QParams",
    "QTensor",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "fp4_levels",
    "gptq_quantize",
    "kl_divergence",
    "kmeans_levels",
    "mse",
    "mx_quantize",
    "nearest_level",
    "nf4_levels",
    "normalize_blocks",
    "nvfp4_quantize",
    "pack",
    "quantize",
    "quantize_codebook",
    "quantize_tensor",
    "round_to",
    "split_error",
    "sqnr_db",
    "top1_agreement",
    "unpack",
]
