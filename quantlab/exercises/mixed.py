"""Exercises of chapter 12: sensitivity and mixed precision."""

import math

import torch
from torch import nn

from quantlab.exercises.material import uniform, whole
from quantlab.granularity import PerGroup, quantize_tensor
from quantlab.judging import Exercise, Wrong, as_number, expect, is_changed
from quantlab.metrics import kl_divergence
from quantlab.mixed import knapsack


def cost_solution(layer, bits, logits):
    """What the model loses when this one layer is quantized: KL(float || changed), nats per position."""
    before, weight = logits(), layer.weight.data.clone()
    q = quantize_tensor(weight, bits=bits, granularity=PerGroup(128), symmetric=False)
    layer.weight.data.copy_(q.dequantize())
    after = logits()
    layer.weight.data.copy_(weight)
    return kl_divergence(before, after)


class SmallNet(nn.Module):
    """Two layers, and the windows (batch, positions, inputs) that they read."""

    def __init__(self, random, inside: int, tokens: tuple[int, int]):
        super().__init__()
        with torch.random.fork_rng([]):  # layers draw their weights from the global generator
            self.first, self.last = nn.Linear(inside, 48), nn.Linear(48, 20)
        for parameter in self.requires_grad_(False).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.4)
        self.first.weight.add_(0.05)
        self.register_buffer("x", torch.randn(*tokens, inside, generator=random) * torch.linspace(0.2, 1, inside))

    def logits(self):
        return self.last(self.first(self.x).relu())


def _cost_cases(random):
    """Windows and positions that differ in number, inputs that groups of 128 do not divide."""
    for inside, tokens, bits in ((160, (3, 11), 2), (300, (4, 5), 3), (200, (2, 17), 4)):
        yield SmallNet(random, inside, tokens), bits


def _use_cost(answer, net, bits):
    """The answer's KL for the first layer, which must be as it was afterwards."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = answer(net.first, bits, net.logits)
    changed = [name for name, value in net.state_dict().items() if is_changed(before[name], value)]
    net.load_state_dict(before)
    expect(
        "first.weight" not in changed,
        "After your function the layer still has another weight, so the next layer would be measured on top of it. "
        "Put the old one back; layer.weight.data alone is no copy, .clone() is.",
    )
    expect(not changed, f"After your function {' and '.join(changed)} of the model is another: only borrow the weight.")
    return found


def _problem(random, layers: int) -> tuple[dict, dict]:
    """(costs, sizes) of made-up layers: other widths on offer, other sizes, and a cost that rises now and then."""
    costs, sizes = {}, {}
    for i in range(layers):
        size, fall = whole(random, 1, 7), uniform(random, 3.0, 6.0)
        widths = [2, 3, 4, 5, 8][: whole(random, 2, 6)] if i % 3 else [2, 4]
        cost = uniform(random, 0.2, 20.0)
        costs[f"layer {i}"] = {b: cost * fall ** (2 - b) * uniform(random, 0.4, 2.5) for b in widths}
        if i % 3 == 1:
            costs[f"layer {i}"][widths[-1]] = 1.5 * costs[f"layer {i}"][widths[-2]]
        sizes[f"layer {i}"] = {b: 4 * size * b + whole(random, 0, 4) for b in widths}
    return costs, sizes


def _budgets(random, sizes):
    """Bytes that some choice needs exactly, and more than enough."""
    rows = [sorted(row.values()) for row in sizes.values()]
    for part in (0.3, 0.6):
        yield sum(row[0] if uniform(random, 0, 1) > part else row[whole(random, 1, len(row))] for row in rows)
    yield sum(row[-1] for row in rows) + 3


def _problem_cases(random):
    for layers in (5, 7, 10):
        costs, sizes = _problem(random, layers)
        for budget in _budgets(random, sizes):
            yield costs, sizes, budget


def _problem_edges():
    """The example of section 2; two cheap steps against a dear one; a small step fills the gap; one greedy misses."""
    costs = {"small": {2: 2.0, 4: 0.0}, "large": {2: 10.0, 4: 1.0}}
    yield costs, {"small": {2: 10, 4: 11}, "large": {2: 10, 4: 20}}, 30
    costs = {"dear": {2: 5.0, 4: 1.0}, "b": {2: 3.0, 4: 0.0}, "c": {2: 3.5, 4: 0.4}}  # worth most per bit, not per byte
    yield costs, {"dear": {2: 10, 4: 50}, "b": {2: 10, 4: 29}, "c": {2: 10, 4: 30}}, 70
    yield {"c": {2: 3.0, 3: 2.0, 4: 0.5}, "d": {2: 1.2, 3: 0.09}}, {"c": {2: 6, 3: 9, 4: 12}, "d": {2: 6, 3: 9}}, 18
    costs = {"a": {2: 2.0, 4: 0.1}, "b": {2: 10.0, 4: 1.0}, "c": {2: 3.0, 3: 2.0, 4: 0.5}}
    yield costs, {"a": {2: 10, 4: 11}, "b": {2: 10, 4: 20}, "c": {2: 6, 3: 9, 4: 12}}, 38


def _checked(bits, costs, sizes, budget) -> dict:
    """An answer's {layer: bits}, which must name a width on offer for every layer, and fit."""
    bits = getattr(bits, "bits", bits)  # an Allocation will do
    expect(costs.keys() == sizes.keys(), "costs was changed in place: it belongs to the caller.")
    expect(
        isinstance(bits, dict) and bits.keys() == costs.keys(),
        "Return a dict with the bits of every layer, {'layer 0': 3, ...}.",
    )
    bits = {name: as_number(b) for name, b in bits.items()}
    for name, b in bits.items():
        expect(b in sizes[name], f"{name} got {b!r} bits; on offer are {list(sizes[name])}.")
    spent = sum(sizes[name][b] for name, b in bits.items())
    expect(spent <= budget, f"{spent} bytes are spent, and the budget is {budget}. Take only steps that still fit.")
    return {name: int(b) for name, b in bits.items()}


def _use_bits(answer, costs, sizes, budget):
    """The bits themselves: the greedy rule leaves no choice."""
    return _checked(answer(costs, sizes, budget), costs, sizes, budget)


def _use_least(answer, costs, sizes, budget):
    """The predicted KL, since several ways may share the least."""
    bits = _use_bits(answer, costs, sizes, budget)
    return {"predicted KL": math.fsum(costs[name][b] for name, b in bits.items())}


def greedy_solution(costs, sizes, budget):
    """All start at their smallest; the step with the largest fall of KL per byte that still fits is taken."""

    def fall(name, b):
        return costs[name][bits[name]] - costs[name][b]

    def more(name, b):
        return sizes[name][b] - sizes[name][bits[name]]

    bits = {name: min(row, key=row.get) for name, row in sizes.items()}
    while True:
        left = budget - sum(sizes[name][b] for name, b in bits.items())
        steps = [(name, b) for name in sizes for b in sizes[name] if 0 < more(name, b) <= left and fall(name, b) > 0]
        if not steps:
            return bits
        name, b = max(steps, key=lambda step: fall(*step) / more(*step))
        bits[name] = b


def knapsack_solution(costs, sizes, budget):
    """Layer after layer: for every number of bytes the least cost so far, and the bits that give it."""
    best = {0: (0.0, {})}
    for name, row in sizes.items():
        longer = {}
        for spent, (cost, bits) in best.items():
            for b, size in row.items():
                total, kl = spent + size, cost + costs[name][b]
                if total <= budget and kl < longer.get(total, (math.inf,))[0]:
                    longer[total] = kl, bits | {name: b}
        best = longer
    return min(best.values(), key=lambda found: found[0])[1]


def fused_solution(costs, sizes, fused, budget):
    """Layers that must have the same bits are one layer: their costs and sizes add up."""

    def merged(table):
        return [{b: sum(table[name][b] for name in names) for b in table[names[0]]} for names in fused]

    found = knapsack(dict(enumerate(merged(costs))), dict(enumerate(merged(sizes))), budget)
    return {name: found.bits[i] for i, names in enumerate(fused) for name in names}


def _fused_cases(random):
    """Groups of one to three layers, in another order than the layers; all layers of a group offer the same widths."""
    for parts in ((3, 1, 2, 3), (2, 2, 1), (1, 3)):
        count = sum(parts)
        costs, sizes = {}, {}
        widths = (2, 3, 4, 5)
        for i in range(count):
            size, cost, fall = whole(random, 1, 7), uniform(random, 0.2, 20.0), uniform(random, 3.0, 6.0)
            costs[f"layer {i}"] = {b: cost * fall ** (2 - b) for b in widths}
            sizes[f"layer {i}"] = {b: 4 * size * b for b in widths}
        names = [f"layer {i}" for i in torch.randperm(count, generator=random).tolist()]
        fused = [names[sum(parts[:i]) : sum(parts[: i + 1])] for i in range(len(parts))]
        least = sum(row[2] for row in sizes.values())
        for part in (1.1, 1.35, 1.6, 2.1):
            yield costs, sizes, fused, int(part * least) // 4 * 4


def _use_fused(answer, costs, sizes, fused, budget):
    """The predicted KL of bits that are the same within each group."""
    bits = _checked(answer(costs, sizes, fused, budget), costs, sizes, budget)
    for group in fused:
        widths = [bits[name] for name in group]
        if len(set(widths)) > 1:
            raise Wrong(f"{', '.join(group)} are one matrix and got different bits: {widths}.")
    return {"predicted KL": math.fsum(costs[name][b] for name, b in bits.items())}


def _fused_smallest(costs, sizes, fused, budget):
    bits = knapsack(costs, sizes, budget).bits
    return {name: min(bits[n] for n in group) for group in fused for name in group}


KL, LEFT = "kl_divergence(before, after)", "0 < more(name, b) <= left and fall(name, b) > 0"

EXERCISES = {
    "12.1": Exercise(
        "one layer at a time",
        hints=(
            "Four steps: logits of the float model, another weight, logits again, the old weight back.",
            "layer.weight.data.copy_(...) changes the weight; a .clone() taken first lets you put it back.",
            "quantize_tensor(weight, bits=bits, granularity=PerGroup(128), symmetric=False).dequantize(), and "
            "kl_divergence(before, after).",
        ),
        solution=cost_solution,
        cases=_cost_cases,
        use=_use_cost,
        tolerance=1e-3,
        slips={
            "KL is not symmetric: the float model's logits come first.": (KL, "kl_divergence(after, before)"),
            "The KL is 0: both logits come from the same weights. Call logits() once before the weight changes, and "
            "again while the layer holds the quantized one.": (KL, "kl_divergence(after, after)"),
            "That is a symmetric grid; the notebook's costs are of asymmetric ones: symmetric=False.": (
                "symmetric=False", "symmetric=True"
            ),
            "That is one scale a row. Use groups of 128: granularity=PerGroup(128).": (
                "PerGroup(128)", "PerGroup(weight.shape[1])"
            ),
            "Use the bits that are given, not always 2.": ("bits=bits", "bits=2"),
            'The mean over all positions was asked for. (reduction="batchmean" divides by the number of windows.)': (
                KL, f"{KL} * before.shape[1]"
            ),
            "The mean over the positions was asked for, not their sum.": (KL, f"{KL} * before[..., 0].numel()"),
            "Sum over the vocabulary, mean over the positions: this is the mean over both.": (
                KL, f"{KL} / before.shape[-1]"
            ),
            "In nats: the natural logarithm, not that to base 2.": (KL, f"{KL} / math.log(2)"),
            "Only the first window was measured: the mean over all of them was asked for.": (
                KL, "kl_divergence(before[:1], after[:1])"
            ),
            "Only the last position of each window was measured: the mean over all of them was asked for.": (
                KL, "kl_divergence(before[:, -1:], after[:, -1:])"
            ),
            "That is a squared distance of logits, not KL.": (KL, "(after - before).square().mean().item()"),
        },
    ),
    "12.2": Exercise(
        "greedy",
        hints=(
            "Keep a dict of bits and the bytes that are left. In each round list all steps that fit.",
            "A step is (layer, larger bits): it costs sizes[layer][new] - sizes[layer][old] bytes and gains "
            "costs[layer][old] - costs[layer][new].",
            "Take the step with the largest gain / bytes, and stop when the list of steps that fit is empty.",
        ),
        solution=greedy_solution,
        cases=_problem_cases,
        edges=_problem_edges,
        use=_use_bits,
        slips={
            "A step's worth is its fall of KL *divided by its bytes*.": ("fall(*step) / more(*step)", "fall(*step)"),
            "The cheapest step is not the best one: its worth is its fall of KL divided by its bytes.": (
                "fall(*step) / more(*step)", "-more(*step)"
            ),
            "A step is paid for by the bytes it adds, not by the whole size of the layer after it.": (
                "/ more(*step)", "/ sizes[step[0]][step[1]]"
            ),
            "A step gains the difference of two costs, not the new cost or the old one.": (
                "fall(*step) / more(*step)", "costs[step[0]][bits[step[0]]] / more(*step)"
            ),
            "Bits are not bytes: a step is paid for by the difference of its sizes.": (
                "/ more(*step)", "/ (step[1] - bits[step[0]])"
            ),
            "The step with the largest worth, not with the least.": ("max(steps", "min(steps"),
            "When the best step does not fit, look at the others: more bits would still fit.": (
                LEFT, "0 < more(name, b) and fall(name, b) > 0",
                "        bits[name] = b\n",
                "        if more(name, b) > left:\n            return bits\n        bits[name] = b\n",
            ),
            "A step may go to any larger number of bits, not to the next one only.": (
                LEFT, LEFT + " and b == min(w for w in sizes[name] if w > bits[name])"
            ),
            "A step that makes the KL larger is no gain, though it would fit.": (" and fall(name, b) > 0", ""),
            "A step that uses the last bytes exactly still fits.": ("<= left", "< left"),
            "One step only: repeat until none fits.": ("bits[name] = b\n", "bits[name] = b\n        return bits\n"),
            "All layers start at their smallest: no step was taken.": ("        if not steps:", "        if True:"),
            "This is the exact choice, better than the rule: the rule never takes a step back.": knapsack_solution,
        },
    ),
    "12.3": Exercise(
        "exact",
        hints=(
            "Forget how the bytes were spent; remember only, for each number of bytes spent so far, the best way.",
            "best = {0: (0.0, {})}: bytes -> (cost, bits). Each layer makes a new dict out of the old one.",
            "For each (spent, (cost, bits)) and each choice b: keep it under spent + size if it fits the budget and "
            "costs less than what is there. At the end take the least cost of all.",
        ),
        solution=knapsack_solution,
        cases=_problem_cases,
        edges=_problem_edges,
        use=_use_least,
        tolerance=1e-6,
        slips={
            "That is what the greedy rule gives. Keep a best for every number of bytes, not one for each layer.": (
                greedy_solution
            ),
            "A choice that uses the budget to the last byte fits.": ("total <= budget", "total < budget"),
            "Of several ways with the same bytes keep the one with the least cost, not the last one found.": (
                " and kl < longer.get(total, (math.inf,))[0]", ""
            ),
            "Of several ways with the same bytes keep the best, not the first one found.": (
                "kl < longer.get(total, (math.inf,))[0]", "total not in longer"
            ),
            "At the end take the least cost of all, not the way that spends most.": (
                "min(best.values(), key=lambda found: found[0])[1]", "best[max(best)][1]"
            ),
            "This is the most costly way: the least was asked for.": ("return min(", "return max("),
        },
    ),
    "12.4": Exercise(
        "fused layers",
        hints=(
            "What does a knapsack choose for? Here it is no longer the layer.",
            "Make new costs and sizes with one entry a group: for each bit width the sum over its layers.",
            "Call knapsack on these, then give each layer the bits of its group.",
        ),
        solution=fused_solution,
        cases=_fused_cases,
        use=_use_fused,
        tolerance=1e-6,
        slips={
            "That is the greedy rule on the groups; the least was asked for.": (
                "knapsack(", "greedy_solution(", "found.bits[i]", "found[i]"
            ),
            "Bits were chosen for single layers, and evened out afterwards. Each group is one item, with the sums of "
            "its layers' costs and sizes, before anything is chosen.": _fused_smallest,
            "The cost of a group is the sum of its layers' costs, not the largest or the first of them.": (
                "dict(enumerate(merged(costs)))", "{i: costs[names[0]] for i, names in enumerate(fused)}"
            ),
        },
    ),
}  # fmt: skip
