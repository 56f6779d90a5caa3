"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import math

import torch
import torch.nn.functional as F

from quantlab import PerAxis, PerGroup, kl_divergence, quantize_tensor
from quantlab.mixed import greedy, knapsack


def _cost(layer, bits, logits, *, granularity=None, symmetric=False, swapped=False, back=True, alias=False, late=False):
    """Exercise 12.1 with one slip."""
    before = None if late else logits()
    weight = layer.weight.data if alias else layer.weight.data.clone()
    q = quantize_tensor(weight, bits=bits, granularity=granularity or PerGroup(128), symmetric=symmetric)
    layer.weight.data.copy_(q.dequantize())
    before, after = logits() if late else before, logits()
    if back:
        layer.weight.data.copy_(weight)
    return kl_divergence(after, before) if swapped else kl_divergence(before, after)


def _batchmean(layer, bits, logits):
    before, weight = logits(), layer.weight.data.clone()
    layer.weight.data.copy_(quantize_tensor(weight, bits=bits, granularity=PerGroup(128), symmetric=False).dequantize())
    after = logits()
    layer.weight.data.copy_(weight)
    return F.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean").item()


def _changes_bias(layer, bits, logits):
    found = _cost(layer, bits, logits)
    layer.bias.data.zero_()
    return found


def _one_bit_up(costs, sizes, budget):
    """Steps to the next width only."""
    bits = {name: min(row) for name, row in sizes.items()}
    while True:
        left = budget - sum(sizes[n][b] for n, b in bits.items())
        steps = []
        for n, b in bits.items():
            wider = [w for w in sizes[n] if w > b]
            if wider and 0 < sizes[n][min(wider)] - sizes[n][b] <= left and costs[n][min(wider)] < costs[n][b]:
                gain = costs[n][b] - costs[n][min(wider)]
                steps.append((gain / (sizes[n][min(wider)] - sizes[n][b]), n, min(wider)))
        if not steps:
            return bits
        _, n, b = max(steps)
        bits[n] = b


def _greedy(costs, sizes, budget, *, start=min, worth=lambda fall, more: fall / more, give_up=False, fits=True):
    """Exercise 12.2 with one slip."""

    def fall(name, b):
        return costs[name][bits[name]] - costs[name][b]

    def more(name, b):
        return sizes[name][b] - sizes[name][bits[name]]

    bits = {name: start(row, key=row.get) for name, row in sizes.items()}
    while True:
        left = budget - sum(sizes[name][b] for name, b in bits.items())
        limit = left if fits and not give_up else math.inf
        steps = [(name, b) for name in sizes for b in sizes[name] if 0 < more(name, b) <= limit and fall(name, b) > 0]
        if not steps or left < 0:
            return bits
        name, b = max(steps, key=lambda step: worth(fall(*step), more(*step)))
        if give_up and more(name, b) > left:
            return bits
        bits[name] = b


def _uniform(costs, sizes, budget):
    """The most bits that all layers can have."""
    fitting = [b for b in (2, 3, 4, 5, 8) if sum(row.get(b, row[2]) for row in sizes.values()) <= budget]
    return {name: max(fitting) if max(fitting) in row else 2 for name, row in sizes.items()}


def _best_each(costs, sizes, budget):
    """Each layer on its own: the least cost."""
    return {name: min(row, key=row.get) for name, row in costs.items()}


def _in_place(costs, sizes, budget):
    found = knapsack(costs, sizes, budget).bits
    costs.popitem()
    return found


def _fused_by_largest(costs, sizes, fused, budget):
    found = knapsack(costs, sizes, budget).bits
    return {name: max(found[n] for n in names) for names in fused for name in names}


def _fused_by_smallest(costs, sizes, fused, budget):
    found = knapsack(costs, sizes, budget).bits
    return {name: min(found[n] for n in names) for names in fused for name in names}


WRONG = {
    "12.1": [
        (lambda *a: _cost(*a, back=False), "still has another weight"),
        (lambda *a: _cost(*a, alias=True), "still has another weight"),
        (_changes_bias, "first.bias"),
        (lambda *a: _cost(*a, late=True), "The KL is 0"),
        (lambda *a: _cost(*a, swapped=True), "come first"),
        (lambda *a: _cost(*a, symmetric=True), "symmetric grid"),
        (lambda *a: _cost(*a, granularity=PerAxis(0)), "one scale a row"),
        (_batchmean, "number of windows"),
        (lambda layer, bits, logits: _cost(layer, 2, logits), "not always 2"),
        (lambda *a: 2 * _cost(*a), "was expected"),
        (lambda *a: torch.ones(3), "A number was expected"),
    ],
    "12.2": [
        (lambda *a: _greedy(*a, worth=lambda fall, more: fall), "divided by its bytes"),
        (lambda *a: _greedy(*a, worth=lambda fall, more: -more), "cheapest step"),
        (lambda *a: _greedy(*a, give_up=True), "look at the others"),
        (_one_bit_up, "not to the next one only"),
        (lambda *a: _greedy(*a, start=max), "the budget is"),
        (lambda *a: _greedy(*a, fits=False), "the budget is"),
        (knapsack, "was expected"),
        (_uniform, "was expected"),
        (_in_place, "costs was changed in place"),
        (lambda costs, sizes, budget: 3, "bits of every layer"),
    ],
    "12.3": [
        (greedy, "greedy rule"),
        (_best_each, "the budget is"),
        (_uniform, "predicted KL"),
        (lambda costs, sizes, budget: knapsack(costs, sizes, budget - 1), "to the last byte"),
        (lambda costs, sizes, budget: dict.fromkeys(costs, 7), "on offer"),
        (_in_place, "costs was changed in place"),
    ],
    "12.4": [
        (lambda costs, sizes, fused, budget: knapsack(costs, sizes, budget), "different bits"),
        (_fused_by_largest, "the budget is"),
        (_fused_by_smallest, "evened out afterwards"),
        (lambda costs, sizes, fused, budget: dict.fromkeys(costs, 2), "predicted KL"),
        (lambda costs, sizes, fused, budget: costs.popitem() and dict.fromkeys(sizes, 2), "changed in place"),
    ],
}
