"""Exercises of chapter 12: sensitivity and mixed precision."""

import copy
import itertools
import math

import torch
from torch import nn

from quantlab.checks import Exercise, Wrong, expect
from quantlab.granularity import PerAxis, PerGroup, quantize_tensor
from quantlab.metrics import kl_divergence
from quantlab.mixed import greedy, knapsack


def cost_solution(layer, bits, logits):
    """What the model loses when this one layer is quantized: KL(float || changed), nats per position."""
    before, weight = logits(), layer.weight.data.clone()
    q = quantize_tensor(weight, bits=bits, granularity=PerGroup(128), symmetric=False)
    layer.weight.data.copy_(q.dequantize())
    after = logits()
    layer.weight.data.copy_(weight)
    return kl_divergence(before, after)


def _practice_model():
    random = torch.Generator().manual_seed(3)
    first, last = nn.Linear(160, 48), nn.Linear(48, 20)
    for layer in (first, last):
        layer.requires_grad_(False)
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * 0.4)
        layer.bias.zero_()
    x = torch.randn(64, 160, generator=random) * torch.linspace(0.2, 1, 160)
    return nn.Sequential(first, nn.ReLU(), last), x


def _test_cost(f):
    model, x = _practice_model()
    layer, weight = model[0], model[0].weight.clone()

    def logits():
        return model(x)

    for bits in (2, 3):
        right, mine = cost_solution(layer, bits, logits), f(layer, bits, logits)
        changed = not torch.equal(layer.weight, weight)
        layer.weight.copy_(weight)
        expect(
            not changed,
            "After your function the layer still has another weight, so the next layer would be measured on top of it. "
            "Put the old one back; layer.weight.data alone is no copy, .clone() is.",
        )
        expect(mine is not None, "Return the KL, one number.")
        mine = float(mine)
        expect(
            abs(mine) > 1e-9,
            "The KL is 0: both logits come from the same weights. Call logits() once before the weight changes, and "
            "again while the layer holds the quantized one.",
        )
        for wrong, message in _cost_causes(layer, bits, logits):
            expect(abs(mine - wrong) > 1e-4 * wrong or abs(mine - right) <= 1e-4 * right, message)
        expect(
            abs(mine - right) <= 1e-3 * right,
            f"Expected {right:.5g} at {bits} bits, got {mine:.5g}. It is the mean KL over the positions, with an "
            "asymmetric grid in groups of 128.",
        )


def _cost_causes(layer, bits, logits) -> tuple:
    """What slips give, and what to say of each."""

    def rounded(granularity, *, symmetric):
        weight = layer.weight.clone()
        q = quantize_tensor(weight, bits=bits, granularity=granularity, symmetric=symmetric)
        layer.weight.copy_(q.dequantize())
        changed = logits()
        layer.weight.copy_(weight)
        return changed

    before = logits()
    return (
        (kl_divergence(rounded(PerGroup(128), symmetric=False), before),
         "KL is not symmetric: the float model's logits come first."),
        (kl_divergence(before, rounded(PerGroup(128), symmetric=True)),
         "That is a symmetric grid; the notebook's costs are of asymmetric ones: symmetric=False."),
        (kl_divergence(before, rounded(PerAxis(0), symmetric=False)),
         "That is one scale a row. Use groups of 128: granularity=PerGroup(128)."),
    )  # fmt: skip


def _problem(layers: int = 8, seed: int = 0) -> tuple[dict, dict]:
    """(costs, sizes) of made-up layers: costs fall by about 4 for each bit, sizes grow evenly."""
    random = torch.Generator().manual_seed(seed)
    costs, sizes = {}, {}
    for i in range(layers):
        scale, fall = (1.5 ** (6 * torch.rand(1, generator=random).item()) for _ in range(2))
        large = int(torch.randint(1, 7, (1,), generator=random))
        costs[f"layer {i}"] = {b: round(scale * (3.5 + fall / 12) ** -b, 6) for b in (2, 3, 4, 5)}
        sizes[f"layer {i}"] = {b: 4 * large * b for b in (2, 3, 4, 5)}
    return costs, sizes


def _uneven_problem() -> tuple[dict, dict]:
    """Small enough to try everything, and one where the greedy rule misses."""
    costs = {"a": {2: 2.0, 4: 0.1}, "b": {2: 10.0, 4: 1.0}, "c": {2: 3.0, 3: 2.0, 4: 0.5}}
    return costs, {"a": {2: 10, 4: 11}, "b": {2: 10, 4: 20}, "c": {2: 6, 3: 9, 4: 12}}


def _smallest(sizes) -> int:
    """The bytes that the layers need at least."""
    return sum(min(row.values()) for row in sizes.values())


def _checked(bits, costs, sizes, budget) -> tuple[float, int]:
    """(predicted KL, bytes) of an answer, which must name a bit width on offer for every layer and fit."""
    bits = getattr(bits, "bits", bits)  # an Allocation will do
    expect(
        isinstance(bits, dict) and bits.keys() == costs.keys(),
        "Return a dict with the bits of every layer, {'layer 0': 3, ...}.",
    )
    for name, b in bits.items():
        expect(b in sizes[name], f"{name} got {b!r}; on offer are {list(sizes[name])}.")
    spent = sum(sizes[name][b] for name, b in bits.items())
    expect(spent <= budget, f"{spent} bytes are spent, and the budget is {budget}. Take only steps that still fit.")
    return math.fsum(costs[name][b] for name, b in bits.items()), spent


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


def _test_greedy(f):
    for seed in range(6):
        costs, sizes = _problem(seed=seed)
        kept = copy.deepcopy((costs, sizes))
        for part in (1.0, 1.15, 1.4, 1.7, 3.0):
            budget = int(part * _smallest(sizes))
            mine = f(costs, sizes, budget)
            expect((costs, sizes) == kept, "costs or sizes were changed. Work on your own dict of bits.")
            kl, spent = _checked(mine, costs, sizes, budget)
            right = greedy(costs, sizes, budget)
            if kl <= right.kl + 1e-9:
                continue
            room = _room(mine, sizes, budget - spent)
            expect(
                room is None,
                f"Of {budget} bytes {spent} are spent, and more bits for {room} would still fit. When the best "
                "step does not fit, look at the others.",
            )
            raise Wrong(
                f"With {budget} bytes the rule gives a predicted KL of {right.kl:.4g}, yours {kl:.4g}. Start with all "
                "layers at their smallest; a step's worth is its fall of KL divided by its bytes."
            )


def _room(bits, sizes, left: int) -> str | None:
    """A layer that could have had more for the bytes that are left."""
    bits = getattr(bits, "bits", bits)
    fitting = (name for name, b in bits.items() for size in sizes[name].values() if 0 < size - sizes[name][b] <= left)
    return next(fitting, None)


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


def _test_knapsack(f):
    problems = [(*_uneven_problem(), range(26, 47, 2))]
    problems += [(*_problem(layers=6, seed=seed), range(200, 401, 40)) for seed in range(4)]
    for costs, sizes, budgets in problems:
        kept = copy.deepcopy((costs, sizes))
        for budget in [b for b in budgets if b >= _smallest(sizes)]:
            mine = f(costs, sizes, budget)
            expect((costs, sizes) == kept, "costs or sizes were changed. Work on your own dict of bits.")
            kl, _ = _checked(mine, costs, sizes, budget)
            right = _best_of_all(costs, sizes, budget)
            same = abs(kl - greedy(costs, sizes, budget).kl) < 1e-9
            expect(
                kl <= right + 1e-9,
                f"With {budget} bytes your bits have a predicted KL of {kl:.4g}; {right:.4g} can be reached. "
                + ("That is what the greedy rule gives. " if same else "")
                + "Keep a best for every number of bytes, not one for each layer.",
            )


def _best_of_all(costs, sizes, budget) -> float:
    """The definition: try everything."""
    rows = [[(size, costs[name][b]) for b, size in row.items()] for name, row in sizes.items()]
    return min(
        math.fsum(cost for _, cost in choice)
        for choice in itertools.product(*rows)
        if sum(size for size, _ in choice) <= budget
    )


def fused_solution(costs, sizes, fused, budget):
    """Layers that must have the same bits are one layer: their costs and sizes add up."""

    def merged(table):
        return [{b: sum(table[name][b] for name in names) for b in table[names[0]]} for names in fused]

    found = knapsack(dict(enumerate(merged(costs))), dict(enumerate(merged(sizes))), budget)
    return {name: found.bits[i] for i, names in enumerate(fused) for name in names}


def _test_fused(f):
    for seed in range(4):
        costs, sizes = _problem(seed=seed, layers=9)
        names = list(costs)
        fused = [names[0:3], names[3:4], names[4:6], names[6:9]]
        for part in (1.1, 1.3, 1.6, 2.1):
            budget = int(part * _smallest(sizes))
            bits = f(costs, sizes, fused, budget)
            kl, _ = _checked(bits, costs, sizes, budget)
            bits = getattr(bits, "bits", bits)
            mixed = [group for group in fused if len({bits[name] for name in group}) > 1]
            expect(
                not mixed,
                f"{', '.join(mixed[0]) if mixed else ''} are one matrix and got different bits: "
                f"{[bits[name] for name in (mixed[0] if mixed else [])]}.",
            )
            best = fused_solution(costs, sizes, fused, budget)
            right = math.fsum(costs[name][b] for name, b in best.items())
            expect(
                kl <= right + 1e-9,
                f"With {budget} bytes the predicted KL is {kl:.4g}, {kl / right:.2f} times the least ({right:.4g}). "
                "Is each group one item, with the sums of its layers' costs and sizes, before anything is chosen?",
            )


EXERCISES = {
    "12.1": Exercise(
        "one layer at a time",
        _test_cost,
        (
            "Four steps: logits of the float model, another weight, logits again, the old weight back.",
            "layer.weight.data.copy_(...) changes the weight; a .clone() taken first lets you put it back.",
            "quantize_tensor(weight, bits=bits, granularity=PerGroup(128), symmetric=False).dequantize(), and "
            "kl_divergence(before, after).",
        ),
        cost_solution,
    ),
    "12.2": Exercise(
        "greedy",
        _test_greedy,
        (
            "Keep a dict of bits and the bytes that are left. In each round list all steps that fit.",
            "A step is (layer, larger bits): it costs sizes[layer][new] - sizes[layer][old] bytes and gains "
            "costs[layer][old] - costs[layer][new].",
            "Take the step with the largest gain / bytes, and stop when the list of steps that fit is empty.",
        ),
        greedy_solution,
    ),
    "12.3": Exercise(
        "exact",
        _test_knapsack,
        (
            "Forget how the bytes were spent; remember only, for each number of bytes spent so far, the best way.",
            "best = {0: (0.0, {})}: bytes -> (cost, bits). Each layer makes a new dict out of the old one.",
            "For each (spent, (cost, bits)) and each choice b: keep it under spent + size if it fits the budget and "
            "costs less than what is there. At the end take the least cost of all.",
        ),
        knapsack_solution,
    ),
    "12.4": Exercise(
        "fused layers",
        _test_fused,
        (
            "What does a knapsack choose for? Here it is no longer the layer.",
            "Make new costs and sizes with one entry a group: for each bit width the sum over its layers.",
            "Call knapsack on these, then give each layer the bits of its group.",
        ),
        fused_solution,
    ),
}
