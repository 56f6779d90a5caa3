"""A language model: load it, measure it, look at its layers' inputs, quantize it, save it."""

from quantlab.lm.layers import activation_scales, blocks_of, capture_inputs, linear_layers
from quantlab.lm.loading import DATA, SEPARATOR, load_lm, load_text, read_documents, token_stream
from quantlab.lm.measuring import Divergence, Perplexity, divergence, generate, perplexity
from quantlab.lm.report import LayerReport, QuantizeReport, model_bytes
from quantlab.lm.saving import load_quantized, save_quantized
from quantlab.lm.walk import quantize_lm, quantize_weights
from quantlab.modules import weight_of

__all__ = [
    "DATA",
    "SEPARATOR",
    "Divergence",
    "LayerReport",
    "Perplexity",
    "QuantizeReport",
    "activation_scales",
    "blocks_of",
    "capture_inputs",
    "divergence",
    "generate",
    "linear_layers",
    "load_lm",
    "load_quantized",
    "load_text",
    "model_bytes",
    "perplexity",
    "quantize_lm",
    "quantize_weights",
    "read_documents",
    "save_quantized",
    "token_stream",
    "weight_of",
]
