"""quantlab: the small library behind the workbook, one file a concept."""

from quantlab.affine import QParams, choose_qparams, dequantize, fake_quantize, quantize
from quantlab.gptq import Hessian, gptq_quantize
from quantlab.granularity import PerAxis, PerGroup, PerTensor, QTensor, quantize_tensor
from quantlab.metrics import kl_divergence, mse, split_error, sqnr_db, top1_agreement
from quantlab.packing import pack, unpack

__all__ = [
    "Hessian",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "QParams",
    "QTensor",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "gptq_quantize",
    "kl_divergence",
    "mse",
    "pack",
    "quantize",
    "quantize_tensor",
    "split_error",
    "sqnr_db",
    "top1_agreement",
    "unpack",
]
