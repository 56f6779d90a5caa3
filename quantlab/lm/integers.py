"""Replacing the linear layers of a block by layers that compute in integers."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.linear import DynamicInt8Linear, Int8Linear, StaticInt8Linear
from quantlab.lm.blocks import run
from quantlab.lm.report import LayerReport, QuantizeReport
from quantlab.modules import as_linear, hooked, linears_in
from quantlab.outliers import LLMInt8Linear


def replace_block(prefix: str, block, hidden: list[Tensor], arguments: dict, report: QuantizeReport) -> list[Tensor]:
    """Put an integer layer in the place of every linear layer of a block; returns what the block gives out then."""
    layers, settings = linears_in(block), report.settings
    static = report.method == "w8a8_static" or settings.get("per") == "static"
    observers = {name: settings["observer"]() for name in layers} if static else {}

    def observe(name):
        return lambda _module, inputs: observers[name].update(inputs[0]) and None

    if observers:
        with hooked({m: observe(name) for name, m in layers.items()}):
            for _ in run(block, hidden, arguments):
                pass
    errors, hooks = {}, {}
    for name, layer in layers.items():
        began, linear = time.perf_counter(), as_linear(layer)
        new = _integer_layer(linear, observers.get(name), settings)
        block.set_submodule(name, new)
        errors[name] = torch.zeros(2, dtype=torch.float64)
        hooks[new] = _compare(linear, errors[name])
        report.qtensors[prefix + name] = new
        report.layers.append(_report_row(prefix + name, linear, new, time.perf_counter() - began))
    with hooked(hooks, after=True):
        out = list(run(block, hidden, arguments))
    for row, (error, energy) in zip(range(-len(layers), 0), errors.values(), strict=True):
        report.layers[row] = report.layers[row]._replace(output_error=(error / energy.clamp(min=1e-38)).item())
    return out


def _integer_layer(linear: nn.Linear, observer, settings: dict) -> Int8Linear:
    if "threshold" in settings:
        return LLMInt8Linear.from_linear(linear, threshold=settings["threshold"])
    bits = settings["activation_bits"]
    if observer is not None:
        return StaticInt8Linear.from_linear(linear, observer, activation_bits=bits)
    return DynamicInt8Linear.from_linear(linear, per=settings["per"], activation_bits=bits)


def _compare(linear: nn.Linear, sums: Tensor):
    """A hook that adds up ‖y - ŷ‖² and ‖y‖² without the bias, where y is what the float layer gives."""

    def hook(_module, inputs, output):
        y = F.linear(inputs[0], linear.weight)
        error = output - y if linear.bias is None else output - linear.bias - y
        sums[0] += error.double().square().sum().cpu()
        sums[1] += y.double().square().sum().cpu()

    return hook


def _report_row(name: str, linear: nn.Linear, new: Int8Linear, seconds: float) -> LayerReport:
    difference = linear.weight.detach() - new.dequantized_weight()
    error = (difference.square().sum() / linear.weight.detach().square().sum().clamp(min=1e-38)).item()
    return LayerReport(name, 0.0, error, 8 * new.nbytes / linear.weight.numel(), seconds)
