"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch


def grid(keys, low, high, bits, rounding=torch.round):
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    return low + step * rounding((keys - low) / step)


def by_rows(keys, bits):
    return grid(keys, keys.amin(1, keepdim=True), keys.amax(1, keepdim=True), bits)


def with_zero(keys, bits):
    """Notebook 01's map: the range is widened to hold 0."""
    return grid(keys, keys.amin(0).clamp(max=0), keys.amax(0).clamp(min=0), bits)


def divided_by_nothing(keys, bits):
    low, high = keys.amin(0), keys.amax(0)
    step = (high - low) / (2**bits - 1)
    return low + step * torch.round((keys - low) / step)


def one_group(rounded, waiting, new, group, quantize):
    waiting = torch.cat([waiting, new])
    if len(waiting) >= group:
        return torch.cat([rounded, quantize(waiting[:group])]), waiting[group:]
    return rounded, waiting


def at_once(rounded, waiting, new, group, quantize):
    """All full groups in one call: one range for all of them."""
    waiting = torch.cat([waiting, new])
    full = len(waiting) // group * group
    return (torch.cat([rounded, quantize(waiting[:full])]) if full else rounded), waiting[full:]


def all_again(rounded, waiting, new, group, quantize):
    """As transformers' cache: what was rounded is rounded once more."""
    everything = torch.cat([rounded, waiting, new])
    full = len(everything) // group * group
    parts = [quantize(part) for part in everything[:full].split(group)] if full else [rounded]
    return torch.cat(parts), everything[full:]


def new_alone(rounded, waiting, new, group, quantize):
    full = len(new) // group * group
    parts = [quantize(part) for part in new[:full].split(group)] if full else []
    return torch.cat([rounded, *parts]), torch.cat([waiting, new[full:]])


def least(table, budget, by):
    return min((bits for bits in table if table[bits][1] <= budget), key=by, default=None)


WRONG = {
    "18.1": [
        (lambda layers, heads, channels, tokens, bits: layers * heads * channels * tokens * bits / 8, "two numbers"),
        (lambda layers, heads, channels, tokens, bits: 2 * layers * heads * channels * tokens * bits, "eight"),
        (lambda layers, heads, channels, tokens, bits: 2 * heads * channels * tokens * bits / 8, "Every layer"),
        (lambda layers, heads, channels, tokens, bits: 2 * layers * heads * channels * tokens * 2, "use bits"),
        (lambda layers, heads, channels, tokens, bits: 2 * layers * channels * tokens * bits / 8, "Each of the heads"),
    ],
    "18.2": [
        (by_rows, "a channel is a column"),
        (with_zero, "need not hold 0"),
        (divided_by_nothing, "clamp it"),
        (lambda keys, bits: grid(keys, keys.min(), keys.max(), bits), "One range for all channels"),
        (lambda keys, bits: grid(keys, keys.amin(0), keys.amax(0), bits, torch.floor), "floor is not round"),
        (lambda keys, bits: grid(keys, -keys.abs().amax(0), keys.abs().amax(0), bits), "was expected"),
    ],
    "18.3": [
        (one_group, "go on until none is full"),
        (at_once, "was expected"),
        (all_again, "was expected"),
        (new_alone, "was expected"),
        (lambda rounded, waiting, new, group, quantize: rounded, "expected"),
    ],
    "18.4": [
        (lambda table, budget: least(table, budget, lambda bits: table[bits][1]), "the least KL"),
        (lambda table, budget: least(table, budget, sum), "fewest bits"),
        (lambda table, budget: min(table, key=lambda bits: table[bits][0]), "over the budget"),
        (lambda table, budget: min(s for s, kl in table.values() if kl <= budget), "Give the bits"),
    ],
}
