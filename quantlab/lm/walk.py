"""Quantizing a whole model: block by block, each calibrated on what the quantized blocks before it give out."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from quantlab.gptq import Hessian, gptq_quantize
from quantlab.granularity import PerAxis, PerGroup, QTensor, quantize_tensor
from quantlab.lm.layers import blocks_of, linear_layers, put_weight, weight_of
from quantlab.lm.measuring import checked_windows


class LayerReport(NamedTuple):
    """What quantizing did to one layer."""

    name: str
    output_error: float  # ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration tokens
    weight_error: float  # ‖W - Ŵ‖² / ‖W‖²
    bits_per_weight: float
    seconds: float


@dataclass
class QuantizeReport:
    """What quantize_lm did: the settings, a row for each layer, the codes, and the bytes of the whole model."""

    method: str
    settings: dict
    calibration_tokens: int
    layers: list[LayerReport] = field(default_factory=list)
    qtensors: dict[str, QTensor] = field(default_factory=dict, repr=False)
    seconds: float = 0.0
    nbytes: int = 0  # of the whole model: packed layers, everything else in 16 bits
    bits_per_parameter: float = 0.0  # 8 * nbytes / parameters

    def __str__(self) -> str:
        lines = [f"{'layer':44}{'output error':>13}{'weight error':>13}{'bits':>7}{'ms':>7}"]
        lines += [
            f"{r.name:44}{r.output_error:13.2e}{r.weight_error:13.2e}{r.bits_per_weight:7.2f}{r.seconds * 1e3:7.0f}"
            for r in self.layers
        ]
        lines.append(
            f"{self.method}: {self.nbytes:,} bytes, {self.bits_per_parameter:.2f} bits per parameter, "
            f"{self.seconds:.1f} s"
        )
        return "\n".join(lines)


def quantize_lm(
    model,
    tokens: Tensor,
    *,
    method: str = "rtn",
    bits: int = 4,
    group_size: int | None = 128,
    symmetric: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
    window: int = 512,
    progress: bool = True,
) -> tuple[nn.Module, QuantizeReport]:
    """A new model whose linear layers hold quantized weights (as floats on the grid), and a report.

    method "rtn" rounds to nearest, "gptq" runs GPTQ; group_size=None gives one scale a row. The walk goes block by
    block and holds one block's inputs at a time: each block is calibrated on what the quantized blocks before it
    give out. Layers that read the same input (q, k, v; gate, up) share one Hessian and one factorization.
    The given model is not changed; embeddings, norms and head stay as they are.

    Shapes: tokens (n,), cut into windows. Raises: ValueError for an unknown method, fewer tokens than one window
    can use, or settings that gptq_quantize or quantize_tensor refuse.
    """
    rounders = {"rtn": _round_to_nearest, "gptq": gptq_quantize}
    if method not in rounders:
        raise ValueError(f"method must be one of {sorted(rounders)}, got {method!r}")
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    if method == "gptq":
        settings |= {"act_order": act_order, "damping": damping}
    window, _ = checked_windows(model, tokens, window, None)
    began, new = time.perf_counter(), copy.deepcopy(model).eval()
    report = QuantizeReport(method, settings, len(tokens) // window * window or len(tokens))
    prefix, blocks = blocks_of(new)
    with torch.no_grad():
        hidden, arguments = _block_inputs(new, tokens, window)
        bar = tqdm(blocks, desc=f"{method} {bits} bits", unit="block", disable=not progress, leave=False)
        for i, block in enumerate(bar):
            for shared in _hessians(block, hidden, arguments[i]):
                _quantize_shared(f"{prefix}.{i}.", shared, rounders[method], settings, report)
            bar.set_postfix(error=f"{report.layers[-1].output_error:.1e}")
            hidden = [_first(block(h, **arguments[i])) for h in hidden]
    report.seconds = time.perf_counter() - began
    report.nbytes = model_bytes(new, report.qtensors)
    report.bits_per_parameter = 8 * report.nbytes / sum(p.numel() for p in new.parameters())
    return new, report


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


def model_bytes(model, qtensors: dict[str, QTensor] | None = None) -> int:
    """Bytes to store a model: its quantized layers packed, every other parameter in 16 bits."""
    quantized = {f"{name}.weight": q for name, q in (qtensors or {}).items()}
    return sum(
        quantized[name].nbytes if name in quantized else 2 * p.numel() for name, p in model.named_parameters()
    )


def _round_to_nearest(
    weight: Tensor, hessian: Hessian, *, bits: int, group_size: int | None, symmetric: bool
) -> QTensor:
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    return quantize_tensor(weight, bits=bits, granularity=granularity, symmetric=symmetric)


class _Stop(Exception):
    """Ends a forward pass once the first block's input is known."""


def _block_inputs(model, tokens: Tensor, window: int) -> tuple[list[Tensor], list[dict]]:
    """The input of block 0 for each batch of windows, and for each block its other arguments (masks, positions).

    All batches have one shape, and those arguments depend on the shape alone, so one full pass shows them.
    """
    _, blocks = blocks_of(model)
    hidden, arguments = [], [{} for _ in blocks]

    def remember(i):
        def hook(_block, inputs, keywords):
            arguments[i].update(keywords)
            if i == 0:
                hidden.append(inputs[0])
                if len(hidden) > 1:
                    raise _Stop

        return hook

    hooks = [b.register_forward_pre_hook(remember(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        for ids in _whole_windows(tokens, window):
            try:
                model(ids.to(model.device), use_cache=False)
            except _Stop:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, arguments


def _whole_windows(tokens: Tensor, window: int) -> Iterator[Tensor]:
    """(1, window) at a time; a tail that fills no window is left out, unless it is all there is."""
    count = len(tokens) // window
    return iter(tokens[: count * window].view(count, 1, window) if count else tokens[None, None])


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _hessians(block, hidden: list[Tensor], arguments: dict) -> list[tuple[dict[str, nn.Module], Hessian]]:
    """One (layers, Hessian) for each distinct input in the block: layers handed the same tensor share it."""
    layers = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # the tensor is kept, so that its id stays its own

    def look(name):
        return lambda _module, inputs: seen.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)

    _run_hooked(block, hidden[:1], arguments, {m: look(name) for name, m in layers.items()})
    groups = [(names, Hessian(x.shape[-1])) for x, names in seen.values()]

    def add(hessian):
        return lambda _module, inputs: hessian.add(inputs[0]) and None

    _run_hooked(block, hidden, arguments, {layers[names[0]]: add(hessian) for names, hessian in groups})
    return [({name: layers[name] for name in names}, hessian) for names, hessian in groups]


def _run_hooked(block, hidden: list[Tensor], arguments: dict, hooks: dict[nn.Module, Callable]) -> None:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        for h in hidden:
            block(h, **arguments)
    finally:
        for handle in handles:
            handle.remove()


def _quantize_shared(prefix: str, shared, rounder: Callable, settings: dict, report: QuantizeReport) -> None:
    """Quantize the layers of one Hessian in place (they belong to the new model) and write their report rows."""
    layers, hessian = shared
    for name, layer in layers.items():
        began, weight = time.perf_counter(), weight_of(layer).clone()
        q = rounder(weight, hessian, **settings)
        put_weight(layer, q.dequantize())
        seconds, new = time.perf_counter() - began, weight_of(layer)
        weight_error = ((weight - new).square().sum() / weight.square().sum().clamp(min=1e-38)).item()
        report.qtensors[prefix + name] = q
        report.layers.append(
            LayerReport(
                prefix + name, hessian.output_error(weight, new), weight_error, q.bits_per_element, seconds
            )
        )
