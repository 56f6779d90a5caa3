"""Quantizing a whole model: block by block, each calibrated on what the quantized blocks before it give out."""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from quantlab.awq import ScaledQTensor, scale_and_round, search_scales
from quantlab.codebook import CodebookTensor, nf4_levels, quantize_codebook
from quantlab.gptq import Hessian, gptq_quantize
from quantlab.granularity import PerAxis, PerGroup, QTensor, quantize_tensor
from quantlab.lm.blocks import block_inputs, hooked, linears, run
from quantlab.lm.integers import replace_block
from quantlab.lm.layers import activation_scales, blocks_of, linear_layers, put_weight, weight_of
from quantlab.lm.measuring import checked_windows
from quantlab.lm.report import LayerReport, QuantizeReport, model_bytes
from quantlab.observers import MinMax
from quantlab.outliers import smooth

# What each method accepts, and what it takes if nothing is said.
_WEIGHTS = {"bits": 4, "group_size": 128, "symmetric": False}
OPTIONS = {
    "rtn": _WEIGHTS,
    "nf4": {"group_size": 64, "double_quant": False},
    "gptq": _WEIGHTS | {"act_order": False, "damping": 0.01},
    "awq": _WEIGHTS | {"steps": 20},
    "w8a8_dynamic": {"per": "tensor", "activation_bits": 8},
    "w8a8_static": {"observer": MinMax, "activation_bits": 8},
    "smoothquant": {"alpha": 0.5, "per": "tensor", "observer": MinMax, "activation_bits": 8},
    "llm_int8": {"threshold": 6.0},
}


def quantize_lm(
    model, tokens: Tensor, *, method: str = "rtn", window: int = 512, progress: bool = True, **options
) -> tuple[nn.Module, QuantizeReport]:
    """A new model with its linear layers quantized, and a report. OPTIONS lists the methods and what each accepts.

    Weights only, as floats on the grid: "rtn" rounds to nearest, "nf4" to the nearest level, "gptq" runs GPTQ, "awq"
    searches scales; bits, group_size (None: one scale a row), symmetric.
    Weights and activations, as layers that compute in integers: "w8a8_dynamic" (per "tensor" or "token"),
    "w8a8_static" (observer, called for each layer: MinMax, or lambda: MSE(bits=8)), "smoothquant" (alpha, and per
    "static" too), "llm_int8" (threshold).

    The walk goes block by block and holds one block's inputs at a time: each block is calibrated on what the quantized
    blocks before it give out. Layers that read the same input (q, k, v; gate, up) share one Hessian and one
    factorization. The given model is not changed; embeddings, norms and head stay as they are.

    Shapes: tokens (n,), cut into windows. Raises: ValueError for an unknown method or option, fewer tokens than one
    window can use, or settings that a method refuses.
    """
    settings = _settings(method, options)
    window, _ = checked_windows(model, tokens, window, None)
    if not linear_layers(model):
        raise ValueError(
            f"{type(model).__name__} has no float linear layers in its blocks; is it quantized already?"
        )
    began = time.perf_counter()
    if method == "smoothquant":
        new = smooth(model, activation_scales(model, tokens, window=window), alpha=settings["alpha"])
    else:
        new = copy.deepcopy(model).eval()
    report = QuantizeReport(method, settings, len(tokens) // window * window or len(tokens))
    quantize_block = _round_block if method in ROUNDERS else replace_block
    prefix, blocks = blocks_of(new)
    with torch.no_grad():
        hidden, arguments = block_inputs(new, tokens, window)
        bar = tqdm(blocks, desc=method, unit="block", disable=not progress, leave=False)
        for i, block in enumerate(bar):
            hidden = quantize_block(f"{prefix}.{i}.", block, hidden, arguments[i], report)
            bar.set_postfix(error=f"{report.layers[-1].output_error:.1e}")
    report.seconds = time.perf_counter() - began
    report.nbytes = model_bytes(new, report.qtensors)
    report.bits_per_parameter = 8 * report.nbytes / sum(p.numel() for p in model.parameters())
    return new, report


def _settings(method: str, options: dict) -> dict:
    if method not in OPTIONS:
        raise ValueError(f"method must be one of {', '.join(OPTIONS)}, got {method!r}")
    unknown = sorted(options.keys() - OPTIONS[method].keys())
    if unknown:
        raise ValueError(f"{method} takes {', '.join(OPTIONS[method])}; got {', '.join(unknown)}")
    settings = OPTIONS[method] | options
    ways = ("tensor", "token", "static") if method == "smoothquant" else ("tensor", "token")
    if settings.get("per", "tensor") not in ways:
        raise ValueError(f"per must be one of {', '.join(ways)} for {method}, got {settings['per']!r}")
    if not callable(settings.get("observer", MinMax)):
        raise ValueError(
            f"observer is called for each layer: pass MinMax, not MinMax(); got {settings['observer']!r}"
        )
    return settings


def quantize_weights(model, quantizer: Callable[[Tensor], QTensor]) -> tuple[nn.Module, dict[str, QTensor]]:
    """A new model whose linear layers hold quantizer(weight).dequantize(), and the quantized weights by layer name.

    quantizer gets a weight (out, in) and returns anything with dequantize() and nbytes: a QTensor, a CodebookTensor ...
    Nothing is calibrated; the given model is not changed; embeddings, norms and head stay as they are.
    """
    new, qtensors = copy.deepcopy(model).eval(), {}
    for name, layer in linear_layers(new).items():
        qtensors[name] = quantizer(weight_of(layer).clone())
        put_weight(layer, qtensors[name].dequantize())
    return new, qtensors


def _rtn(weights: list[Tensor], hessian: Hessian, *, group_size: int | None, **settings) -> list[QTensor]:
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    return [quantize_tensor(w, granularity=granularity, **settings) for w in weights]


def _nf4(
    weights: list[Tensor], hessian: Hessian, *, group_size: int, double_quant: bool
) -> list[CodebookTensor]:
    return [
        quantize_codebook(w, nf4_levels(), block_size=group_size, double_quant=double_quant) for w in weights
    ]


def _gptq(weights: list[Tensor], hessian: Hessian, **settings) -> list[QTensor]:
    return [gptq_quantize(w, hessian, **settings) for w in weights]


def _awq(weights: list[Tensor], hessian: Hessian, *, steps: int, **settings) -> list[ScaledQTensor]:
    scale = search_scales(weights, hessian, steps=steps, **settings).input_scale
    return [scale_and_round(w, scale, **settings) for w in weights]


# Each rounds the weights that read one input, whose statistics the Hessian holds.
ROUNDERS = {"rtn": _rtn, "nf4": _nf4, "gptq": _gptq, "awq": _awq}


def _round_block(
    prefix: str, block, hidden: list[Tensor], arguments: dict, report: QuantizeReport
) -> list[Tensor]:
    """Round the weights of one block in place (it belongs to the new model); returns what the block gives out then."""
    for shared in _hessians(block, hidden, arguments):
        _quantize_shared(prefix, shared, ROUNDERS[report.method], report.settings, report)
    return list(run(block, hidden, arguments))


def _hessians(block, hidden: list[Tensor], arguments: dict) -> list[tuple[dict[str, nn.Module], Hessian]]:
    """One (layers, Hessian) for each distinct input in the block: layers handed the same tensor share it."""
    layers = linears(block)
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # the tensor is kept, so that its id stays its own

    def look(name):
        return lambda _module, inputs: seen.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)

    with hooked({m: look(name) for name, m in layers.items()}):
        list(run(block, hidden[:1], arguments))
    groups = [(names, Hessian(x.shape[-1])) for x, names in seen.values()]

    def add(hessian):
        return lambda _module, inputs: hessian.add(inputs[0]) and None

    with hooked({layers[names[0]]: add(hessian) for names, hessian in groups}):
        for _ in run(block, hidden, arguments):
            pass
    return [({name: layers[name] for name in names}, hessian) for names, hessian in groups]


def _quantize_shared(prefix: str, shared, rounder: Callable, settings: dict, report: QuantizeReport) -> None:
    """Quantize the layers of one Hessian in place (they belong to the new model) and write their report rows."""
    layers, hessian = shared
    began, weights = time.perf_counter(), [weight_of(layer).clone() for layer in layers.values()]
    rounded = rounder(weights, hessian, **settings)
    seconds = (time.perf_counter() - began) / len(layers)
    for (name, layer), weight, q in zip(layers.items(), weights, rounded, strict=True):
        put_weight(layer, q.dequantize())
        new = weight_of(layer)
        error = (
            (weight.double() - new).square().sum() / weight.double().square().sum().clamp(min=1e-38)
        ).item()
        report.qtensors[prefix + name] = q
        output_error = hessian.output_error(weight, new)
        report.layers.append(LayerReport(prefix + name, output_error, error, q.bits_per_element, seconds))
