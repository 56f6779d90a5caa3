"""Quantizing a whole model: block by block, each calibrated on what the quantized blocks before it give out."""

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from quantlab.arguments import check_flag, check_function, check_kind, check_model, kind
from quantlab.hessian import Hessian
from quantlab.lm.blocks import Arguments, advance, block_inputs, input_hessians
from quantlab.lm.checkpoint import Checkpoint, hash_tensors, open_checkpoint
from quantlab.lm.integers import replace_block
from quantlab.lm.layers import activation_scales, blocks_of, embedding_layers, float_layers, linear_layers
from quantlab.lm.measuring import checked_windows
from quantlab.lm.report import LayerReport, QuantizeReport, left_in_float, model_bytes
from quantlab.methods import IntegerMethod, Method, SmoothQuant, WeightMethod, method_of, plain
from quantlab.modules import check_codes_fit, check_finite, linears_in, put_weight, weight_of
from quantlab.outliers import smooth
from quantlab.quantized import Quantized


def quantize_lm(
    model, tokens: Tensor | None = None, method: str | Method = "rtn", *, window: int = 512, progress: bool = True,
    checkpoint=None, in_place: bool = False, output_errors: bool | None = None, held_out: Tensor | None = None,
    **settings,
) -> tuple[nn.Module, QuantizeReport]:  # fmt: skip
    """A new model with its linear layers quantized, and a report.

    method is an object of quantlab.methods, GPTQ(bits=3, act_order=True), or for short its name with its settings,
    method="gptq", bits=3, act_order=True. RTN, NF4, GPTQ and AWQ round weights alone, which stay floats, on a grid;
    W8A8, SmoothQuant, W4A4 and LLMInt8 put layers in their place that compute in integers. bits may be {layer: bits}.

    A method that needs no data rounds layer after layer, and no token is read. The others walk: block by block, with
    one block's inputs in memory, each calibrated on what the quantized blocks before it give out; layers that read
    the same input (q, k, v) share one Hessian and factorization. output_errors: measure what each layer's output loses
    on the tokens; None: where the method reads them anyway. held_out (weights only): other tokens, on which each
    layer's output error is measured as well (behind the quantized blocks, too): GPTQ fits the noise of too few tokens,
    and only there it shows. It holds their inputs and a Hessian for each input of a block besides.
    The given model is not changed; embeddings, norms and head stay as they are.

    checkpoint (a folder; weights only): each finished block is written there. A walk that was interrupted goes on from
    the last of them when it is called again, and the codes in the report are read from there.
    in_place (weights only): the given model becomes the quantized one, and no second model is held. With a checkpoint,
    the walk then needs little more than one block and its inputs.

    Shapes: tokens (n,), cut into windows. Warns if GPTQ gets fewer than two tokens for each input of the widest layer.
    Raises: ValueError for an unknown method or setting, a value that the method refuses, tokens that are missing or
    fewer than one window can use, a weight that is not finite, adapters, a layer that reads nothing where its range is
    asked for, held_out with a method of integer layers, or a checkpoint of another walk.
    """
    method = method_of(method, **settings)
    progress, in_place = check_flag(progress, "progress"), check_flag(in_place, "in_place")
    reads = method.needs_data or (output_errors is not None and check_flag(output_errors, "output_errors"))
    window, tokens = _checked(model, tokens, window, reads)
    apart = None if held_out is None else checked_windows(model, held_out, window, None)[0]
    _check_walk(model, method, weights_only={"checkpoint": checkpoint, "in_place": in_place, "held_out": apart})
    report = QuantizeReport(method, (len(tokens) // window * window or len(tokens)) if method.needs_data else 0)
    if checkpoint is not None:
        what = _settings_of(method, window, reads, held_out)
        report.qtensors = checkpoint = open_checkpoint(checkpoint, model, tokens, what)
    report.note = _note(model, method, report.calibration_tokens)
    if report.note:
        warnings.warn(report.note, stacklevel=2)
    began = time.perf_counter()
    new = _start(model, tokens, window, method, in_place)
    with torch.no_grad():
        walked = _walked(new, tokens if reads else None, window, moved_on=isinstance(method, IntegerMethod))
        others = repeat(None) if apart is None else _walked(new, held_out, apart, moved_on=False)
        for block, other in zip(_bar(walked, len(blocks_of(new)[1]), method, progress), others, strict=False):
            _quantize_block(*block, report, checkpoint, other)
    report.seconds = time.perf_counter() - began if method.needs_data else sum(row.seconds for row in report.layers)
    return new, _counted(report, new, sum(p.numel() for p in model.parameters()))


def quantize_weights(model, quantizer: Callable[[Tensor], Quantized]) -> tuple[nn.Module, dict[str, Quantized]]:
    """A new model whose linear layers hold quantizer(weight).dequantize(), and the quantized weights by layer name.

    quantizer gets a weight (out, in) and returns anything with dequantize() and nbytes: a QTensor, a CodebookTensor ...
    Nothing is calibrated; the given model is not changed; embeddings, norms and head stay as they are.
    Raises: ValueError for a model with adapters or weights that are not finite, or what is no quantizer.
    """
    check_function(quantizer, "quantizer", "a weight")
    new, qtensors = copy.deepcopy(check_model(model)).eval(), {}
    check_finite(new)
    for name, layer in float_layers(new).items():
        qtensors[name] = q = quantizer(weight_of(layer).clone())
        if not hasattr(q, "dequantize") or not hasattr(q, "nbytes"):
            raise ValueError(f"quantizer must return what has dequantize() and nbytes, got {kind(q)}")
        put_weight(layer, qtensors[name].dequantize())
    return new, qtensors


def with_codes(model, codes: Mapping[str, Quantized]) -> tuple[nn.Module, dict[str, Quantized]]:
    """A copy of the model that holds these quantized weights, of linear layers and embeddings by name; and they.

    Raises: ValueError if the model has no such layer, or one of another shape.
    """
    new = copy.deepcopy(check_model(model))
    embeddings, layers = embedding_layers(new), linear_layers(new)
    for name, q in check_kind(codes, "codes", Mapping, "a recipe gives").items():
        if name not in embeddings and name not in layers:
            raise ValueError(f"the model has no linear layer {name!r}, nor an embedding of that name")
        weight = embeddings[name].weight.data if name in embeddings else weight_of(layers[name])
        values = q.dequantize()
        check_codes_fit(name, values, weight)
        weight.copy_(values)
    return new, dict(codes)


def _checked(model, tokens: Tensor | None, window: int, reads: bool) -> tuple[int, Tensor]:
    """Window and tokens; where nothing is read, tokens may be missing."""
    check_model(model)
    if tokens is None and not reads:
        return window, torch.zeros(0, dtype=torch.int64)
    return checked_windows(model, tokens, window, None)[0], tokens


def _check_walk(model, method: Method, weights_only: dict) -> None:
    layers = float_layers(model)
    check_finite(model)
    asked = [name for name, value in weights_only.items() if value is not None and value is not False]
    if asked and not isinstance(method, WeightMethod):
        raise ValueError(f"{asked[0]} is for methods that round weights alone, got {method!r}")
    bits = getattr(method, "bits", None)
    if isinstance(bits, Mapping) and bits.keys() != layers.keys():
        odd = sorted(bits.keys() ^ layers.keys())
        raise ValueError(f"bits must name every linear layer and no other; missing or unknown: {odd[0]}, ...")


def _counted(report: QuantizeReport, new: nn.Module, parameters: int) -> QuantizeReport:
    """The report with the bytes of the whole model."""
    report.left_in_float = left_in_float(new, {row.name for row in report.layers})
    report.nbytes = model_bytes(new, report.qtensors)
    report.bits_per_parameter = 8 * report.nbytes / parameters
    return report


def _note(model, method: Method, tokens: int) -> str:
    """GPTQ fits the noise of too few tokens; the output errors on these tokens do not show it."""
    by_gptq = method.name == "gptq" or getattr(method, "rounding", None) == "gptq"
    return few_tokens(model, tokens) if by_gptq else ""


def few_tokens(model, tokens: int) -> str:
    """A sentence if these are too few for GPTQ on this model: fewer than two for each input of the widest layer."""
    widest = max(weight_of(layer).shape[1] for layer in float_layers(model).values())
    if tokens >= 2 * widest:
        return ""
    return f"{tokens} tokens are few for {widest} inputs: GPTQ fits their noise, and output errors on them flatter it"


def _settings_of(method: Method, window: int, reads: bool, held_out: Tensor | None) -> dict:
    settings = {name: plain(value) for name, value in method.settings.items()}
    other = None if held_out is None else hash_tensors({"held out": held_out})
    return {
        "method": method.name, "settings": settings, "window": window, "output errors": reads, "held-out tokens": other,
    }  # fmt: skip


def _start(model, tokens: Tensor, window: int, method: Method, in_place: bool) -> nn.Module:
    """The model that is changed: a copy, or the given one."""
    if isinstance(method, SmoothQuant):
        return smooth(model, activation_scales(model, tokens, window=window), alpha=method.alpha)
    return (model if in_place else copy.deepcopy(model)).eval()


def _bar(blocks: Iterator, count: int, method: Method, progress: bool):
    return tqdm(blocks, total=count, desc=method.name, unit="block", disable=not progress, leave=False)


def _walked(model, tokens: Tensor | None, window: int, *, moved_on: bool) -> Iterator[tuple]:
    """(number, prefix of the names, block, its inputs, its other arguments), one block after the other.

    The inputs are what the blocks before give out by the time they are asked for: quantized ones. None without tokens.
    moved_on: who quantizes a block makes of its inputs what the quantized block gives out.
    """
    prefix, blocks = blocks_of(model)
    hidden, arguments = block_inputs(model, tokens, window) if tokens is not None else (None, [None] * len(blocks))
    for i, block in enumerate(blocks):
        yield i, f"{prefix}.{i}.", block, hidden, arguments[i]
        if hidden is not None and not moved_on and i + 1 < len(blocks):  # nobody needs what the last one gives out
            advance(block, hidden, arguments[i])


def _quantize_block(
    i: int, prefix: str, block, hidden: list[Tensor] | None, arguments: Arguments | None, report: QuantizeReport,
    checkpoint: Checkpoint | None, other: tuple | None,
) -> None:  # fmt: skip
    """Quantize one block of the new model in place, or take it from the checkpoint. other: reading held-out tokens."""
    if isinstance(report.method, IntegerMethod):
        replace_block(prefix, block, hidden, arguments, report)
        return
    done = checkpoint.load(i) if checkpoint is not None else None
    if done is None:
        before = None if other is None else _reading(block, *other[3:])
        qtensors, done = _round_block(prefix, block, hidden, arguments, report.method)
        if before is not None:
            done = [row._replace(held_out_error=_lost(block, row.name.removeprefix(prefix), before)) for row in done]
        if checkpoint is not None:
            checkpoint.save(i, qtensors, done)
        else:
            report.qtensors |= qtensors
    else:
        for row in done:
            put_weight(block.get_submodule(row.name.removeprefix(prefix)), checkpoint[row.name].dequantize())
    report.layers += done


def _reading(block, hidden: list[Tensor], arguments: Arguments) -> dict[str, tuple[Tensor, Hessian]]:
    """Of each linear layer of a block that is still float: its weight, and the Hessian of what it reads."""
    groups = input_hessians(block, hidden, arguments)
    return {name: (weight_of(layer).clone(), h) for layers, h in groups for name, layer in layers.items()}


def _lost(block, name: str, before: dict[str, tuple[Tensor, Hessian]]) -> float | None:
    """The output error of the layer as it is now; None where it has read nothing."""
    weight, hessian = before.get(name, (None, None))
    return None if hessian is None else hessian.output_error(weight, weight_of(block.get_submodule(name)))


def _round_block(
    prefix: str, block, hidden: list[Tensor] | None, arguments: Arguments | None, method: WeightMethod
) -> tuple[dict, list[LayerReport]]:
    """Round the weights of one block in place (it belongs to the new model): the codes, and a row for each layer."""
    if hidden is None:
        groups = [({name: layer}, None) for name, layer in linears_in(block).items()]
    else:
        groups = input_hessians(block, hidden, arguments)
    qtensors, rows = {}, []
    while groups:
        layers, hessian = groups.pop(0)  # and forgotten when done: a Hessian is larger than the weights
        named = {prefix + name: layer for name, layer in layers.items()}
        for own, some in _by_settings(named, method):
            for q, row in _round_layers(some, hessian, own):
                qtensors[row.name] = q
                rows.append(row)
    return qtensors, rows


def _by_settings(layers: dict, method: WeightMethod) -> list[tuple[WeightMethod, dict]]:
    """(method, layers that get it): one entry, unless bits differ by layer."""
    groups: dict[object, tuple[WeightMethod, dict]] = {}
    for name, layer in layers.items():
        own = method.for_layer(name)
        groups.setdefault(own.bits if own is not method else None, (own, {}))[1][name] = layer
    return list(groups.values())


def _round_layers(layers: dict, hessian: Hessian | None, method: WeightMethod):
    """Round layers of one input in place (they belong to the new model): (codes, report row) of each."""
    began, weights = time.perf_counter(), [weight_of(layer).clone() for layer in layers.values()]
    rounded = method.round(weights, hessian)
    seconds = (time.perf_counter() - began) / len(layers)
    for (name, layer), weight, q in zip(layers.items(), weights, rounded, strict=True):
        put_weight(layer, q.dequantize())
        new = weight_of(layer)
        lost, whole = ((w.float() ** 2).sum(dtype=torch.float64) for w in (weight - new, weight))
        error = (lost / whole.clamp(min=torch.finfo(torch.float64).tiny)).item()
        output_error = None if hessian is None else hessian.output_error(weight, new)
        yield q, LayerReport(name, output_error, error, q.bits_per_element, seconds)
