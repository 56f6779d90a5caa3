"""Quantizing a whole model: block by block, each calibrated on what the quantized blocks before it give out."""

import copy
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from quantlab.awq import ScaledQTensor, scale_and_round, search_scales
from quantlab.clipping import quantize_clipped
from quantlab.codebook import CodebookTensor, nf4_levels, quantize_codebook
from quantlab.gptq import Hessian, gptq_quantize
from quantlab.granularity import QTensor, quantize_tensor, rows_or_groups, split_rows
from quantlab.lm.blocks import advance, block_inputs, input_hessians
from quantlab.lm.checkpoint import open_checkpoint
from quantlab.lm.integers import replace_block
from quantlab.lm.layers import activation_scales, blocks_of, linear_layers
from quantlab.lm.measuring import checked_windows
from quantlab.lm.report import LayerReport, QuantizeReport, model_bytes
from quantlab.modules import linears_in, put_weight, weight_of
from quantlab.observers import MinMax
from quantlab.outliers import smooth

# What each method accepts, and what it takes if nothing is said.
_WEIGHTS = {"bits": 4, "group_size": 128, "symmetric": False}
OPTIONS = {
    "rtn": _WEIGHTS | {"clip_search": False},
    "nf4": {"group_size": 64, "double_quant": False},
    "gptq": _WEIGHTS | {"act_order": False, "damping": 0.01},
    "awq": _WEIGHTS | {"steps": 20},
    "w8a8_dynamic": {"per": "tensor", "activation_bits": 8},
    "w8a8_static": {"observer": MinMax, "activation_bits": 8},
    "smoothquant": {"alpha": 0.5, "per": "tensor", "observer": MinMax, "activation_bits": 8},
    "llm_int8": {"threshold": 6.0},
}


def quantize_lm(
    model, tokens: Tensor, *, method: str = "rtn", window: int = 512, progress: bool = True,
    checkpoint=None, in_place: bool = False, **options,
) -> tuple[nn.Module, QuantizeReport]:  # fmt: skip
    """A new model with its linear layers quantized, and a report. OPTIONS lists the methods and what each accepts.

    Weights only, as floats on the grid: "rtn" rounds to nearest (clip_search: each group's range cut where that lowers
    its error), "nf4" to the nearest level, "gptq" runs GPTQ, "awq" searches scales; bits (one number, or
    {layer: bits} for mixed precision), group_size (None: one scale a row), symmetric.
    Weights and activations, as layers that compute in integers: "w8a8_dynamic" (per "tensor" or "token"),
    "w8a8_static" (observer, called for each layer: MinMax, or lambda: MSE(bits=8)), "smoothquant" (alpha, and per
    "static" too), "llm_int8" (threshold).

    The walk goes block by block and holds one block's inputs at a time: each block is calibrated on what the quantized
    blocks before it give out. Layers that read the same input (q, k, v; gate, up) share one Hessian and one
    factorization. The given model is not changed; embeddings, norms and head stay as they are.

    checkpoint (a folder; weights only): each finished block is written there. A walk that was interrupted goes on from
    the last of them when it is called again, and the codes in the report are read from there.
    in_place (weights only): the given model becomes the quantized one, and no second model is held. With a checkpoint,
    the walk then needs little more than one block and its inputs.

    Shapes: tokens (n,), cut into windows. Raises: ValueError for an unknown method or option, fewer tokens than one
    window can use, settings that a method refuses, or a checkpoint of another walk.
    """
    settings = _settings(method, options)
    window, _ = checked_windows(model, tokens, window, None)
    _check_walk(model, method, settings, checkpoint, in_place)
    began = time.perf_counter()
    report = QuantizeReport(method, settings, len(tokens) // window * window or len(tokens))
    if checkpoint is not None:
        what = {"method": method, "settings": settings, "window": window}
        report.qtensors = checkpoint = open_checkpoint(checkpoint, model, tokens, what)
    new = _start(model, tokens, window, report, in_place)
    prefix, blocks = blocks_of(new)
    with torch.no_grad():
        hidden, arguments = block_inputs(new, tokens, window)
        bar = tqdm(blocks, desc=method, unit="block", disable=not progress, leave=False)
        for i, block in enumerate(bar):
            _quantize_block(f"{prefix}.{i}.", i, block, hidden, arguments[i], report, checkpoint)
            bar.set_postfix(error=f"{report.layers[-1].output_error:.1e}")
    report.seconds = time.perf_counter() - began
    report.nbytes = model_bytes(new, report.qtensors)
    report.bits_per_parameter = 8 * report.nbytes / sum(p.numel() for p in model.parameters())
    return new, report


def _check_walk(model, method: str, settings: dict, checkpoint, in_place: bool) -> None:
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no float linear layers in its blocks; is it quantized already?")
    if (checkpoint is not None or in_place) and method not in ROUNDERS:
        raise ValueError(f"checkpoint and in_place are for {', '.join(ROUNDERS)}, got method {method!r}")
    bits = settings.get("bits")
    if isinstance(bits, Mapping) and bits.keys() != layers.keys():
        odd = sorted(bits.keys() ^ layers.keys())
        raise ValueError(f"bits must name every linear layer and no other; missing or unknown: {odd[0]}, ...")


def _start(model, tokens: Tensor, window: int, report: QuantizeReport, in_place: bool) -> nn.Module:
    """The model that the walk changes: a copy, or the given one."""
    if report.method == "smoothquant":
        scales = activation_scales(model, tokens, window=window)
        return smooth(model, scales, alpha=report.settings["alpha"])
    return (model if in_place else copy.deepcopy(model)).eval()


def _quantize_block(
    prefix: str, i: int, block, hidden: list[Tensor], arguments: dict, report: QuantizeReport, checkpoint
) -> None:
    """Quantize one block of the new model, or take it from the checkpoint; hidden becomes what it gives out then."""
    if report.method not in ROUNDERS:
        hidden[:] = replace_block(prefix, block, hidden, arguments, report)
        return
    done = checkpoint.load(i) if checkpoint is not None else None
    if done is None:
        qtensors, done = _round_block(prefix, block, hidden, arguments, report)
        if checkpoint is not None:
            checkpoint.save(i, qtensors, done)
        else:
            report.qtensors |= qtensors
    else:
        layers = linears_in(block)
        for row in done:
            put_weight(layers[row.name.removeprefix(prefix)], checkpoint[row.name].dequantize())
    report.layers += done
    advance(block, hidden, arguments)


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
        raise ValueError(f"observer is called for each layer: pass MinMax, not MinMax(); got {settings['observer']!r}")
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


def _rtn(weights: list[Tensor], hessian: Hessian, *, group_size, clip_search, **settings) -> list[QTensor]:
    granularity = rows_or_groups(group_size)
    quantizer = quantize_clipped if clip_search else quantize_tensor
    return [quantizer(w, granularity=granularity, **settings) for w in weights]


def _nf4(weights: list[Tensor], hessian: Hessian, *, group_size: int, double_quant: bool) -> list[CodebookTensor]:
    return [quantize_codebook(w, nf4_levels(), block_size=group_size, double_quant=double_quant) for w in weights]


def _gptq(weights: list[Tensor], hessian: Hessian, **settings) -> list[QTensor]:
    """Rows never speak to each other, so q, k and v are rounded as one tall matrix: fewer and larger steps."""
    return split_rows(gptq_quantize(torch.cat(weights), hessian, **settings), [len(w) for w in weights])


def _awq(weights: list[Tensor], hessian: Hessian, *, steps: int, **settings) -> list[ScaledQTensor]:
    scale = search_scales(weights, hessian, steps=steps, **settings).input_scale
    return [scale_and_round(w, scale, **settings) for w in weights]


# Each rounds the weights that read one input, whose statistics the Hessian holds.
ROUNDERS = {"rtn": _rtn, "nf4": _nf4, "gptq": _gptq, "awq": _awq}


def _round_block(
    prefix: str, block, hidden: list[Tensor], arguments: dict, report: QuantizeReport
) -> tuple[dict, list[LayerReport]]:
    """Round the weights of one block in place (it belongs to the new model): the codes, and a row for each layer."""
    qtensors, rows, groups = {}, [], input_hessians(block, hidden, arguments)
    while groups:
        layers, hessian = groups.pop(0)  # and forgotten when done: a Hessian is larger than the weights
        named = {prefix + name: layer for name, layer in layers.items()}
        for bits, some in _by_bits(named, report.settings.get("bits")).items():
            settings = report.settings | ({"bits": bits} if bits else {})
            for q, row in _quantize_shared(some, hessian, ROUNDERS[report.method], settings):
                qtensors[row.name] = q
                rows.append(row)
    return qtensors, rows


def _by_bits(layers: dict, bits) -> dict[int | None, dict]:
    """The layers by the bits that each gets; one group if all get the same."""
    groups = {}
    for name, layer in layers.items():
        groups.setdefault(bits[name] if isinstance(bits, Mapping) else bits, {})[name] = layer
    return groups


def _quantize_shared(layers: dict, hessian: Hessian, rounder: Callable, settings: dict):
    """Quantize layers of one Hessian in place (they belong to the new model): (codes, report row) of each."""
    began, weights = time.perf_counter(), [weight_of(layer).clone() for layer in layers.values()]
    rounded = rounder(weights, hessian, **settings)
    seconds = (time.perf_counter() - began) / len(layers)
    for (name, layer), weight, q in zip(layers.items(), weights, rounded, strict=True):
        put_weight(layer, q.dequantize())
        new = weight_of(layer)
        lost, whole = ((w.float() ** 2).sum(dtype=torch.float64) for w in (weight - new, weight))
        error = (lost / whole.clamp(min=1e-38)).item()
        output_error = hessian.output_error(weight, new)
        yield q, LayerReport(name, output_error, error, q.bits_per_element, seconds)
