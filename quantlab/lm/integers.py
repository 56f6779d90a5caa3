"""Replacing the linear layers of a block by layers that compute in integers."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.linear import Int8Linear
from quantlab.lm.blocks import advance, input_hessians, run
from quantlab.lm.layers import check_read
from quantlab.lm.report import LayerReport, QuantizeReport
from quantlab.modules import as_linear, hooked, linears_in, weight_of


def replace_block(prefix: str, block, hidden: list[Tensor] | None, arguments, report: QuantizeReport) -> None:
    """Put an integer layer in the place of every linear layer of a block; hidden becomes what the new block gives out.

    The layers' output errors are measured on the way.
    """
    method, layers = report.method, {name: as_linear(layer) for name, layer in linears_in(block).items()}
    observers = _observed(prefix, block, hidden, arguments, method.observer) if method.observes else {}
    rounded = _rounded(block, hidden, arguments, method) if method.rounding != "nearest" else {}
    rows, sums, hooks = [], {}, {}
    for name, linear in layers.items():
        began = time.perf_counter()
        new = method.layer(linear, observers.get(name), rounded.get(name))
        seconds = time.perf_counter() - began
        block.set_submodule(name, new)
        sums[name] = torch.zeros(2, dtype=torch.float64)
        hooks[new] = _compare(linear, sums[name])
        report.qtensors[prefix + name] = new
        rows.append(_report_row(prefix + name, linear, new, seconds))
    if hidden is not None:
        with hooked(hooks, after=True):
            advance(block, hidden, arguments)
        errors = [(lost / whole.clamp(min=torch.finfo(torch.float64).tiny)).item() for lost, whole in sums.values()]
        rows = [row._replace(output_error=error) for row, error in zip(rows, errors, strict=True)]
    report.layers += rows


def _rounded(block, hidden: list[Tensor] | None, arguments, method) -> dict:
    """The weights of the block's linear layers, rounded; on Hessians of what they read, for GPTQ."""
    with_data = method.rounding == "gptq"
    groups = input_hessians(block, hidden, arguments) if with_data else [(linears_in(block), None)]
    rounded = {}
    for layers, hessian in groups:
        weights = [weight_of(layer) for layer in layers.values()]
        rounded |= dict(zip(layers, method.round(weights, hessian), strict=True))
    return rounded


def _observed(prefix: str, block, hidden: list[Tensor], arguments, observer) -> dict:
    """An observer for each linear layer of the block, which has seen all that the layer reads."""
    layers, observers = linears_in(block), {}

    def observe(name):
        def hook(_module, inputs):
            if name not in observers:
                observers[name] = observer()
            observers[name].update(inputs[0])

        return hook

    with hooked({layer: observe(name) for name, layer in layers.items()}):
        for _ in run(block, hidden, arguments):
            pass
    check_read([prefix + name for name in layers], {prefix + name for name in observers})
    return observers


def _compare(linear: nn.Linear, sums: Tensor):
    """A hook that adds up ‖y - ŷ‖² and ‖y‖² without the bias, where y is what the float layer gives."""

    def hook(_module, inputs, output):
        y = F.linear(inputs[0], linear.weight)
        error = output - y if linear.bias is None else output - linear.bias - y
        sums[0] += error.double().square().sum().cpu()
        sums[1] += y.double().square().sum().cpu()

    return hook


def _report_row(name: str, linear: nn.Linear, new: Int8Linear, seconds: float) -> LayerReport:
    weight = linear.weight.detach()
    lost, whole = (w.float().square().sum(dtype=torch.float64) for w in (weight - new.dequantized_weight(), weight))
    error = (lost / whole.clamp(min=torch.finfo(torch.float64).tiny)).item()
    return LayerReport(name, None, error, 8 * new.nbytes / weight.numel(), seconds)
