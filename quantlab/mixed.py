"""Mixed precision: what each bit width costs in each layer, and the best choice within a number of bytes."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from quantlab.arguments import (
    FLOAT32_MAX,
    check_choice,
    check_flag,
    check_int,
    check_list,
    check_number,
    kind,
    text_config,
)  # fmt: skip
from quantlab.granularity import QTensor
from quantlab.hessian import Hessian
from quantlab.lm import blocks_of, linear_layers, weight_of
from quantlab.lm.blocks import advance, block_inputs, input_hessians
from quantlab.lm.layers import float_layers
from quantlab.lm.measuring import checked_windows, predicted, ratio
from quantlab.lm.walk import few_tokens
from quantlab.methods import GPTQ, RTN
from quantlab.metrics import kl_per_position
from quantlab.modules import check_finite, hooked, put_weight

_LOGITS = 2**23  # numbers: how many windows run at once is chosen so that their logits stay below 32 MB


@dataclass(frozen=True)
class Sensitivity:
    """What each bit width costs where one layer alone is quantized, and the bytes of that layer: {layer: {bits: x}}."""

    costs: dict[str, dict[int, float]]  # KL(float model || float model with this one layer quantized), nats per token
    errors: dict[str, dict[int, float]]  # standard error over the windows; nan where there is only one
    sizes: dict[str, dict[int, int]]  # bytes of the layer: packed codes, scales, zero points
    weights: dict[str, int]  # how many the layer has
    tokens: int  # read

    def __str__(self) -> str:
        bits = list(next(iter(self.costs.values())))
        lines = [f"{'KL with this layer alone at':44}" + "".join(f"{f'{b} bits':>10}" for b in bits)]
        lines += [f"{name:44}" + "".join(f"{row[b]:10.2e}" for b in bits) for name, row in self.costs.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Allocation:
    """Bits for each layer; quantize_lm takes them as bits=allocation.bits."""

    bits: dict[str, int]
    kl: float  # predicted: the sum of the layers' costs
    nbytes: int  # of these layers


def sensitivity(
    model,
    tokens: Tensor,
    *,
    bits: tuple[int, ...] = (2, 3, 4, 8),
    group_size: int | None = 128,
    method: str = "rtn",
    window: int = 512,
    progress: bool = True,
) -> Sensitivity:
    """KL(float || float with one layer quantized) for every linear layer and bit width, and the bytes of each choice.

    method "rtn" rounds to nearest, "gptq" runs GPTQ on what the layer reads in the float model; grids are asymmetric.
    Use calibration text: to choose bits on the text that is measured later would flatter the choice.

    For a layer of block i only blocks i and later run again. Held beyond the model: a copy of it, the codes of every
    choice (a byte a weight for each bit width), and of one batch of windows the output of every block and the logits;
    for gptq first a Hessian of every input, and what one block reads.

    Shapes: tokens (n,), cut into windows; a tail that fills none is left out, unless it is all there is; begin tokens
    are context only, as in perplexity. Warns if gptq gets fewer than two tokens for each input of the widest layer.
    Raises: ValueError for an unknown method, no or repeated bits, bits or group_size that quantize_tensor refuses,
    weights that are not finite, or tokens that the model cannot read.
    """
    window, _ = checked_windows(model, tokens, window, None)
    bits, progress = _checked_bits(bits), check_flag(progress, "progress")
    new = copy.deepcopy(model).eval()
    layers = float_layers(new)
    check_finite(new)
    if method == "gptq" and (note := few_tokens(new, len(tokens) // window * window or len(tokens))):
        warnings.warn(note, stacklevel=2)
    choices = _quantized(new, tokens, method, bits, group_size, window)
    batches = _batches(tokens, window, text_config(model).vocab_size)
    bar = tqdm(batches, desc="sensitivity", unit="batch", disable=not progress, leave=False)
    parts = [_kl_of_each(new, layers, choices, ids) for ids in bar]
    counts = torch.cat([predicted(new, ids).sum(1) for ids in batches]).tolist()
    kl = {n: {b: ratio(torch.cat([part[n][b] for part in parts]).tolist(), counts) for b in bits} for n in layers}
    return Sensitivity(
        costs={name: {b: mean for b, (mean, _) in row.items()} for name, row in kl.items()},
        errors={name: {b: error for b, (_, error) in row.items()} for name, row in kl.items()},
        sizes={name: {b: q.nbytes for b, q in row.items()} for name, row in choices.items()},
        weights={name: weight_of(layer).numel() for name, layer in layers.items()},
        tokens=sum(ids.numel() for ids in batches),
    )


@torch.no_grad()
def _kl_of_each(model, layers: dict, choices: dict, ids: Tensor) -> dict[str, dict[int, Tensor]]:
    """Each window's sum of KLs, (batch,), with each choice in the place of one layer's weight: {layer: {bits: sum}}."""
    prefix, blocks = blocks_of(model)
    ids, found = ids.to(model.device), {}
    scored = predicted(model, ids).double()
    logits, outputs = _float_pass(model, blocks, ids)
    for name, layer in layers.items():
        start, found[name] = int(name.removeprefix(f"{prefix}.").partition(".")[0]), {}
        for bits, q in choices[name].items():
            with _holding(layer, q.dequantize()), _resumed(blocks, outputs[:start]):
                changed = model(ids, use_cache=False).logits[:, :-1].float()
            kl = kl_per_position(logits, changed).double()
            found[name][bits] = (kl * scored).sum(1).cpu()
    return found


def _checked_bits(bits) -> tuple[int, ...]:
    bits = tuple(sorted(check_int(b, "bits", 1, 8) for b in check_list(bits, "bits")))
    if not bits or len(set(bits)) < len(bits):
        raise ValueError(f"bits must be different bit widths, at least one, got {bits}")
    return bits


def _batches(tokens: Tensor, window: int, vocabulary: int) -> list[Tensor]:
    """The windows, (batch, window) each."""
    count = len(tokens) // window
    rows = tokens[: count * window].view(count, window) if count else tokens[None]
    return list(rows.split(max(1, _LOGITS // (rows.shape[1] * vocabulary))))


def _quantized(model, tokens, method, bits, group_size, window) -> dict[str, dict[int, QTensor]]:
    """Every linear layer's weight at each of these bits: {layer: {bits: QTensor}}."""
    of = {"rtn": RTN, "gptq": GPTQ}[check_choice(method, "method", ("rtn", "gptq"))]
    ways = {b: of(bits=b, group_size=group_size) for b in bits}
    hessians = _hessians(model, tokens, window) if of.needs_data else {}
    return {
        name: {b: way.round([weight_of(layer)], hessians.get(name))[0] for b, way in ways.items()}
        for name, layer in linear_layers(model).items()
    }


def _hessians(model, tokens: Tensor, window: int) -> dict[str, Hessian]:
    """Of what each linear layer reads, by layer name; q, k and v have one, and the text is read once for all."""
    prefix, blocks = blocks_of(model)
    found = {}
    with torch.no_grad():
        hidden, arguments = block_inputs(model, tokens, window)
        for i, block in enumerate(blocks):
            for layers, hessian in input_hessians(block, hidden, arguments[i]):
                found |= {f"{prefix}.{i}.{name}": hessian for name in layers}
            advance(block, hidden, arguments[i])
    return found


def _float_pass(model, blocks: nn.ModuleList, ids: Tensor) -> tuple[Tensor, list]:
    """The logits that predict a token, (batch, window - 1, vocabulary), and what each block gave out."""
    outputs: list = [None] * len(blocks)

    def keep(i):
        return lambda _module, _inputs, output: outputs.__setitem__(i, output)

    with hooked({block: keep(i) for i, block in enumerate(blocks)}, after=True):
        return model(ids, use_cache=False).logits[:, :-1].float(), outputs


@contextmanager
def _holding(layer: nn.Module, weight: Tensor) -> Iterator[None]:
    """The layer with another weight (out, in) for a while."""
    old = weight_of(layer).clone()
    put_weight(layer, weight)
    try:
        yield
    finally:
        put_weight(layer, old)


@contextmanager
def _resumed(blocks: nn.ModuleList, outputs: list) -> Iterator[None]:
    """The first blocks do not compute for a while: each gives out what it gave in the float model."""
    try:
        for block, output in zip(blocks, outputs, strict=False):
            block.forward = lambda *_inputs, output=output, **_arguments: output
        yield
    finally:
        for block in blocks[: len(outputs)]:
            vars(block).pop("forward", None)  # the class's own method is seen again


def greedy(costs: dict, sizes: dict, budget: int) -> Allocation:
    """Bits by the greedy rule: all layers start at their smallest; the best fall of KL per byte that fits is taken.

    costs and sizes are {layer: {bits: ..}}, as in Sensitivity. At most layers x choices steps, each looking at all of
    them. It may end above the least possible KL (knapsack).

    Raises: ValueError if the budget is below the smallest possible number of bytes, or costs and sizes do not fit.

    >>> greedy({"a": {2: 5.0, 4: 1.0}, "b": {2: 3.0, 4: 2.0}}, {"a": {2: 10, 4: 20}, "b": {2: 10, 4: 20}}, 30)
    Allocation(bits={'a': 4, 'b': 2}, kl=4.0, nbytes=30)
    """
    _check(costs, sizes, budget)
    bits = {name: min(row, key=lambda b: (row[b], costs[name][b])) for name, row in sizes.items()}
    left = budget - sum(sizes[name][b] for name, b in bits.items())
    while True:
        steps = []
        for name, now in bits.items():
            for b, size in sizes[name].items():
                more, gain = size - sizes[name][now], costs[name][now] - costs[name][b]
                if 0 < more <= left and gain > 0:
                    steps.append((gain / more, name, b, more))
        if not steps:
            return _allocation(bits, costs, sizes)
        _, name, bits_now, more = max(steps, key=lambda step: step[0])
        bits[name], left = bits_now, left - more


def knapsack(costs: dict, sizes: dict, budget: int) -> Allocation:
    """The bits with the least sum of costs within a budget of bytes: exact, by dynamic programming.

    This is the multiple-choice knapsack problem. Layer after layer, the least cost for each number of bytes is kept,
    and of these only what no smaller number beats. Sizes share a large divisor (a bit more costs every layer a multiple
    of the same few bytes), so there are few such numbers: at most N = (largest - smallest total) / divisor + 1.
    Time O(layers x choices x N log N), memory O(layers x N).

    Raises: ValueError if the budget is below the smallest possible number of bytes, or costs and sizes do not fit.

    >>> knapsack({"a": {2: 5.0, 4: 1.0}, "b": {2: 3.0, 4: 2.0}}, {"a": {2: 10, 4: 20}, "b": {2: 10, 4: 20}}, 39)
    Allocation(bits={'a': 4, 'b': 2}, kl=4.0, nbytes=30)
    """
    _check(costs, sizes, budget)
    return _trace(_steps(costs, sizes, budget), costs, sizes, -1)


def frontier(costs: dict, sizes: dict) -> list[Allocation]:
    """What knapsack gives for every budget at once: the allocations that no smaller one beats, smallest first."""
    _check(costs, sizes, FLOAT32_MAX)
    largest = sum(max(row.values()) for row in sizes.values())
    steps = _steps(costs, sizes, largest)
    return [_trace(steps, costs, sizes, i) for i in range(len(steps[-1]))]


def _steps(costs: dict, sizes: dict, budget: int) -> list[Tensor]:
    """For each layer the surviving states, cheapest in bytes first, as index of the state before x choices + choice."""
    spent, lost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    to_come = sum(min(row.values()) for row in sizes.values())
    steps = []
    for name, row in sizes.items():
        to_come -= min(row.values())
        total = (spent[:, None] + torch.tensor(list(row.values()))).flatten()
        kl = torch.tensor([costs[name][b] for b in row], dtype=torch.float64)
        kl = (lost[:, None] + kl).flatten()
        order = kl.argsort(stable=True)
        order = order[total[order].argsort(stable=True)]  # by bytes, and among equal bytes the best first
        order = order[total[order] <= budget - to_come]
        best = kl[order].cummin(0).values
        first = torch.cat([torch.tensor([True]), best[1:] < best[:-1]])  # it beats everything smaller
        steps.append(order[first])
        spent, lost = total[order[first]], kl[order[first]]
    return steps


def _trace(steps: list[Tensor], costs: dict, sizes: dict, state: int) -> Allocation:
    """The choices that led to a state of the last layer; the last state has the most bytes and the least cost."""
    bits = {}
    for (name, row), kept in reversed(list(zip(sizes.items(), steps, strict=True))):
        state, choice = divmod(kept[state].item(), len(row))
        bits[name] = list(row)[choice]
    return _allocation({name: bits[name] for name in sizes}, costs, sizes)


def _allocation(bits: dict[str, int], costs: dict, sizes: dict) -> Allocation:
    return Allocation(
        dict(bits),
        math.fsum(costs[name][b] for name, b in bits.items()),
        sum(sizes[name][b] for name, b in bits.items()),
    )


def _check(costs: dict, sizes: dict, budget: int) -> None:
    for name, table in (("costs", costs), ("sizes", sizes)):
        if not isinstance(table, Mapping) or not all(isinstance(row, Mapping) for row in table.values()):
            raise ValueError(f"{name} must be {{layer: {{bits: ..}}}}, got {kind(table)}")
    if not sizes or any(not row for row in sizes.values()):
        raise ValueError("there is no layer, or a layer without a choice of bits")
    if costs.keys() != sizes.keys() or any(costs[name].keys() != sizes[name].keys() for name in sizes):
        raise ValueError("costs and sizes must name the same layers, and for each the same bits")
    if not all(
        isinstance(cost, int | float) and math.isfinite(cost) for row in costs.values() for cost in row.values()
    ):
        raise ValueError("costs must be finite; is a layer's weight or the model broken?")
    least = sum(min(check_int(size, "sizes", 1) for size in row.values()) for row in sizes.values())
    if check_number(budget, "budget") < least:
        raise ValueError(f"the smallest possible budget is {least:,} bytes, got {budget:,}")
