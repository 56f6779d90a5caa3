"""A language model: load it, measure it, look at its layers' inputs, quantize it, save it."""

from quantlab.arguments import longest_context
from quantlab.lm.layers import (
    activation_scales,
    blocks_of,
    capture_inputs,
    embedding_layers,
    layers_of_role,
    linear_layers,
)
from quantlab.lm.loading import chosen_model, load_lm, real_lm
from quantlab.lm.measuring import (
    Divergence,
    Perplexity,
    answer,
    budget,
    divergence,
    generate,
    perplexity,
    perplexity_and_divergence,
)
from quantlab.lm.report import LayerReport, QuantizeReport, model_bytes
from quantlab.lm.saving import load_quantized, save_quantized
from quantlab.lm.texts import DATA, SEPARATOR, begin_token, load_text, read_documents, token_stream
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
    "answer",
    "begin_token",
    "blocks_of",
    "budget",
    "capture_inputs",
    "chosen_model",
    "divergence",
    "embedding_layers",
    "generate",
    "layers_of_role",
    "linear_layers",
    "load_lm",
    "load_quantized",
    "load_text",
    "longest_context",
    "model_bytes",
    "perplexity",
    "perplexity_and_divergence",
    "quantize_lm",
    "quantize_weights",
    "read_documents",
    "real_lm",
    "save_quantized",
    "token_stream",
    "weight_of",
]
