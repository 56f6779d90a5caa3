"""Five reference recipes, each a function of (model, calibration tokens) and of its settings. Read them, beat them.

All of them quantize the embedding, which in these models is the head too: in 16 bits it alone would fill most of a
budget. The embedding comes first, so that a method that looks at data sees what the quantized one gives out.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from quantlab.arguments import check_function, check_int, check_kind, check_model
from quantlab.codebook import nf4_levels, quantize_codebook
from quantlab.granularity import PerGroup, QTensor, quantize_tensor
from quantlab.lm import DATA, divergence, embedding_layers, layers_of_role, linear_layers, quantize_lm
from quantlab.lm import budget as tokens_for
from quantlab.lm.measuring import checked_windows
from quantlab.lm.walk import with_codes
from quantlab.methods import GPTQ, NF4, RTN, Method
from quantlab.methods.base import WeightMethod
from quantlab.mixed import knapsack, sensitivity
from quantlab.quantized import Quantized
from quantlab.storage import load_tensors

ATTENTION = ("query", "key", "value", "attention output")  # roles
Made = tuple[torch.nn.Module, dict[str, Quantized]]  # what a recipe returns


def quantize_embeddings(model, quantizer: Callable[..., Quantized], by_name: dict[str, dict] | None = None) -> Made:
    """A new model whose embedding (and head, if that is a matrix of its own) is quantized; and the codes by name.

    quantizer is called with a weight (vocabulary, width), and with what by_name has for that layer.
    """
    check_function(quantizer, "quantizer", "a weight")
    by_name = {} if by_name is None else check_kind(by_name, "by_name", Mapping)
    new, codes = copy.deepcopy(check_model(model)), {}
    for name, layer in embedding_layers(new).items():
        codes[name] = quantizer(layer.weight.detach(), **by_name.get(name, {}))
        layer.weight.data.copy_(codes[name].dequantize())
    return new, codes


def in_groups(weight: Tensor, *, bits: int, group_size: int = 128) -> QTensor:
    """Round to nearest, a scale and a zero point for each group of a row."""
    return quantize_tensor(weight, bits=bits, granularity=PerGroup(group_size), symmetric=False)


def by_method(model, tokens, *, method: Method, embedding_bits: int) -> Made:
    """The embedding rounded to nearest in the method's groups, then every linear layer by the method."""
    check_kind(method, "method", WeightMethod, "GPTQ(bits=4)")
    embedding = partial(in_groups, bits=embedding_bits, group_size=method.group_size)
    new, embeddings = quantize_embeddings(model, embedding)
    new, report = quantize_lm(new, tokens, method, in_place=True, progress=False)
    return new, embeddings | dict(report.qtensors)


def nearest(model, tokens, *, bits: int, embedding_bits: int, group_size: int = 128) -> Made:
    """Every weight to the nearest point of its group's grid: no data, no time."""
    method = RTN(bits=bits, group_size=group_size)
    return by_method(model, tokens, method=method, embedding_bits=embedding_bits)


def nf4(model, tokens) -> Made:
    """Every weight, those of the embedding too, to the nearest of the 16 levels of NF4; scales in 8 bits."""
    levels = partial(quantize_codebook, levels=nf4_levels(), double_quant=True)
    new, embeddings = quantize_embeddings(model, levels)
    new, report = quantize_lm(new, tokens, NF4(double_quant=True), in_place=True, progress=False)
    return new, embeddings | dict(report.qtensors)


def gptq(model, tokens, *, bits: int, embedding_bits: int, group_size: int = 128) -> Made:
    """GPTQ: the columns still to come absorb each column's error."""
    method = GPTQ(bits=bits, group_size=group_size)
    return by_method(model, tokens, method=method, embedding_bits=embedding_bits)


def mixed_gptq(model, tokens, *, nbytes: int, choices=(2, 3, 4, 5, 6, 8), group_size: int = 128) -> Made:
    """GPTQ with bits by layer, those of the embedding too: an exact knapsack over what each choice costs alone."""
    checked_windows(model, tokens, 512, None)
    nbytes = check_int(nbytes, "nbytes", 1)
    text = tokens[: tokens_for(model, 1024, least=128)]
    table = sensitivity(model, text, bits=choices, group_size=group_size, progress=False)
    costs, sizes = embedding_costs(model, text, choices, group_size)
    chosen = knapsack(table.costs | costs, table.sizes | sizes, nbytes - beside(model)).bits
    own = {name: {"bits": chosen[name]} for name in sizes}
    new, embeddings = quantize_embeddings(model, partial(in_groups, group_size=group_size), own)
    bits = {name: chosen[name] for name in linear_layers(model)}
    new, report = quantize_lm(new, tokens, GPTQ(bits=bits, group_size=group_size), in_place=True, progress=False)
    return new, embeddings | dict(report.qtensors)


def embedding_costs(model, text, choices, group_size: int) -> tuple[dict, dict]:
    """What sensitivity() finds for linear layers, for the embedding: its KL alone, and its bytes, by bits."""
    costs, sizes = {}, {}
    for bits in choices:
        new, codes = quantize_embeddings(model, partial(in_groups, bits=bits, group_size=group_size))
        for name, q in codes.items():  # a head of its own shares the cost, since both were quantized
            costs.setdefault(name, {})[bits] = divergence(model, new, text).kl / len(codes)
            sizes.setdefault(name, {})[bits] = q.nbytes
    return costs, sizes


def by_part(model, tokens, *, method="gptq", embedding=4, attention=4, mlp=4, group_size: int = 128) -> Made:
    """Bits for the embedding, the attention layers and the MLPs each: what explore_capstone shows, as a recipe."""
    new, embeddings = quantize_embeddings(model, partial(in_groups, bits=embedding, group_size=group_size))
    inside = {name for role in ATTENTION for name in layers_of_role(model, role)}
    bits = {name: attention if name in inside else mlp for name in linear_layers(model)}
    settings = {"bits": bits, "group_size": group_size, "progress": False}
    new, report = quantize_lm(new, tokens, method, in_place=True, **settings)
    return new, embeddings | dict(report.qtensors)


def beside(model) -> int:
    """Bytes of a saved model beside linear layers and embedding: all else in 16 bits, and room for the header."""
    layers = linear_layers(model) | embedding_layers(model)
    others = sum(p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers)
    return 2 * others + 800 * (len(layers) + 1)


def qat(model, tokens, *, checkpoint: str, embedding_bits: int) -> Made:
    """The weights of notebook 13, trained while they were rounded (data/checkpoints/minmax; minutes of training)."""
    trained = load_tensors(DATA / f"checkpoints/minmax/{checkpoint}.safetensors")
    _, embeddings = quantize_embeddings(model, partial(in_groups, bits=embedding_bits))
    return with_codes(model, embeddings | trained)


# What the leaderboard's reference rows were made with: data/capstone.jsonl, by python -m recipes.capstone.
REFERENCE: dict[str, dict[str, Callable]] = {
    "2.2 MB": {
        "nearest": partial(nearest, bits=4, embedding_bits=6),
        "nf4": nf4,
        "gptq": partial(gptq, bits=4, embedding_bits=6),
        "mixed gptq": partial(mixed_gptq, nbytes=2_200_000),
        "qat": partial(qat, checkpoint="w4", embedding_bits=6),
    },
    "1.5 MB": {
        "nearest": partial(nearest, bits=3, embedding_bits=3, group_size=256),
        "nf4": nf4,
        "gptq": partial(gptq, bits=3, embedding_bits=3, group_size=256),
        "mixed gptq": partial(mixed_gptq, nbytes=1_500_000, choices=(2, 3, 4, 5), group_size=256),
        "qat": partial(qat, checkpoint="w2", embedding_bits=8),
    },
    "70 MB": {
        "nearest": partial(nearest, bits=4, embedding_bits=4, group_size=576),
        "nf4": nf4,
        "gptq": partial(gptq, bits=4, embedding_bits=4, group_size=576),
    },
}
