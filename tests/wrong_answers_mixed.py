"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import math

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
    fitting = [b for b in (2, 3, 4, 5) if sum(row.get(b, row[2]) for row in sizes.values()) <= budget]
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
        (lambda *a: _cost(*a, late=True), "The KL is 0"),
        (lambda *a: _cost(*a, swapped=True), "come first"),
        (lambda *a: _cost(*a, symmetric=True), "symmetric grid"),
        (lambda *a: _cost(*a, granularity=PerAxis(0)), "one scale a row"),
        (lambda *a: 2 * _cost(*a), "mean KL over the positions"),
    ],
    "12.2": [
        (lambda *a: _greedy(*a, worth=lambda fall, more: fall), "divided by its bytes"),
        (lambda *a: _greedy(*a, worth=lambda fall, more: -more), "divided by its bytes"),
        (lambda *a: _greedy(*a, give_up=True), "look at the others"),
        (lambda *a: _greedy(*a, start=max), "the budget is"),
        (lambda *a: _greedy(*a, fits=False), "the budget is"),
        (_uniform, "would still fit"),
        (_in_place, "were changed"),
        (lambda costs, sizes, budget: 3, "bits of every layer"),
    ],
    "12.3": [
        (greedy, "greedy rule"),
        (_best_each, "the budget is"),
        (_uniform, "can be reached"),
        (lambda costs, sizes, budget: dict.fromkeys(costs, 7), "on offer"),
        (_in_place, "were changed"),
    ],
    "12.4": [
        (lambda costs, sizes, fused, budget: knapsack(costs, sizes, budget), "different bits"),
        (_fused_by_largest, "the budget is"),
        (_fused_by_smallest, "times the least"),
        (lambda costs, sizes, fused, budget: dict.fromkeys(costs, 2), "times the least"),
    ],
}
