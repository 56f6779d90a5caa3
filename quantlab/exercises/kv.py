"""Exercises of chapter 18: the cache of keys and values."""

import torch

from quantlab.exercises.material import uniform
from quantlab.judging import Exercise


def bytes_solution(layers, heads, channels, tokens, bits):
    """Keys and values: two numbers for each layer, head, channel and token."""
    return 2 * layers * heads * channels * tokens * bits / 8


def _bytes_cases(random):
    for bits in (16, 8, 4, 2):
        sizes = torch.randint(2, 90, (4,), generator=random).tolist()
        yield *sizes, bits


def _bytes_edges():
    yield 4, 4, 32, 512, 16
    yield 80, 8, 128, 1, 16


def channels_solution(keys, bits):
    """Each column from its own minimum to its own maximum; the offset is a real number, so 0 needs no code."""
    low, high = keys.amin(0), keys.amax(0)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    return low + step * torch.round((keys - low) / step)


def _channels_cases(random):
    """Channels far from 0, on both sides, of different sizes; no number near a tie."""
    for bits, tokens in ((2, 6), (3, 11), (4, 40)):
        codes = torch.randint(0, 2**bits, (tokens, 5), generator=random)
        codes[:2] = torch.tensor([[0], [2**bits - 1]])  # both ends are there, so the step is the one meant
        noise = 0.8 * torch.rand(tokens, 5, generator=random) - 0.4
        noise[:2] = 0
        noise = torch.where((codes == 0) | (codes == 2**bits - 1), noise.abs() * (codes == 0) - noise.abs()
                            * (codes > 0), noise)  # fmt: skip
        step = torch.rand(5, generator=random) + 0.1
        yield (codes + noise) * step + torch.tensor([-40.0, -3.0, 0.0, 2.0, 50.0]) * uniform(random, 0.5, 1.5), bits


def _channels_edges():
    yield torch.tensor([[10.0, 0.3], [9.4, -0.3], [9.7, 0.1], [9.2, -0.1]]), 2
    yield torch.tensor([[3.0, 1.0], [3.0, 2.0], [3.0, 4.0]]), 2  # a channel that never changes


def stream_solution(rounded, waiting, new, group, quantize):
    """Full groups go through the quantizer, each by itself and once; what is left over waits in float."""
    waiting = torch.cat([waiting, new])
    while len(waiting) >= group:
        rounded = torch.cat([rounded, quantize(waiting[:group])])
        waiting = waiting[group:]
    return rounded, waiting


def _use_stream(answer, rounded, waiting, new, group, quantize):
    """(all tokens, how many of them are rounded): an empty tensor may come back as an empty list, too."""
    result = answer(rounded, waiting, new, group, quantize)
    if not isinstance(result, tuple | list) or len(result) != 2:
        return result
    parts = [torch.as_tensor(part, dtype=torch.float32).reshape(-1, new.shape[1]) for part in result]
    return torch.cat(parts), len(parts[0])


def _two_bits(keys):
    """A quantizer for the check: 2 bits, a range for each channel."""
    return channels_solution(keys, 2)


def _stream_cases(random):
    for group, done, left, more in ((4, 8, 3, 1), (4, 0, 0, 3), (8, 8, 5, 20), (4, 4, 2, 2), (6, 0, 4, 15)):
        rounded, waiting, new = (3 * torch.randn(n, 3, generator=random) for n in (done, left, more))
        yield rounded, waiting, new, group, _two_bits


def cheapest_solution(table, budget):
    """Of the settings within the budget of KL, the one with the fewest bytes; None if there is none."""
    fits = [bits for bits, (size, kl) in table.items() if kl <= budget]
    return min(fits, key=lambda bits: table[bits][0], default=None)


def _cheapest_cases(random):
    for part in (0.1, 0.5, 0.9):
        settings = [(k, v) for k in (8, 4, 3, 2) for v in (8, 4, 3, 2)]
        numbers = torch.rand(len(settings), 2, generator=random, dtype=torch.float64).tolist()
        table = {bits: (1000 * size, kl) for bits, (size, kl) in zip(settings, numbers, strict=True)}
        yield table, sorted(kl for _, kl in table.values())[int(part * 15)]  # one stands exactly on the budget
        yield table, uniform(random, 0.2, 0.9)


def _cheapest_edges():
    yield {(4, 4): (300.0, 0.002), (2, 4): (250.0, 0.03), (4, 2): (240.0, 0.009), (2, 2): (200.0, 0.05)}, 0.01
    yield {(4, 4): (300.0, 0.002), (2, 2): (200.0, 0.05)}, 0.001


EXERCISES = {
    "18.1": Exercise(
        "bytes of a cache",
        hints=(
            "For each token, each layer stores a key and a value.",
            "A key has heads · channels numbers, and so has a value.",
            "numbers · bits / 8 bytes; and do not forget that there are keys *and* values.",
        ),
        solution=bytes_solution,
        cases=_bytes_cases,
        edges=_bytes_edges,
        slips={
            "Keys and values: two numbers, not one.": ("2 * layers", "layers"),
            "This is in bits; a byte has eight.": (" / 8", ""),
            "Every layer has a cache of its own.": ("layers * ", ""),
            "A key has `channels` numbers.": ("channels * ", ""),
            "Each of the heads has a key of its own.": ("heads * ", ""),
            "A cache grows with the tokens.": ("tokens * ", ""),
            "16 bits are not always given: use bits.": ("bits / 8", "2"),
        },
    ),
    "18.2": Exercise(
        "a range for each channel",
        hints=(
            "keys is (tokens, channels): amin(0) goes over the tokens.",
            "2**bits codes have 2**bits - 1 steps between them, from the minimum to the maximum.",
            "low + step * torch.round((keys - low) / step), and no step may be 0.",
        ),
        solution=channels_solution,
        cases=_channels_cases,
        edges=_channels_edges,
        slips={
            "These ranges are of tokens; a channel is a column: amin(0).": (
                "keys.amin(0), keys.amax(0)", "keys.amin(1, keepdim=True), keys.amax(1, keepdim=True)"
            ),
            "One range for all channels: where one lies far away, the others have no steps left.": (
                "keys.amin(0), keys.amax(0)", "keys.min(), keys.max()"
            ),
            "2**bits codes have 2**bits - 1 steps between them.": ("(2**bits - 1)", "2**bits"),
            "A channel that never changes has a step of 0: clamp it.": (".clamp(min=1e-8)", ""),
            "The range need not hold 0: a channel far from it would lose its steps.": (
                "keys.amin(0), keys.amax(0)", "keys.amin(0).clamp(max=0), keys.amax(0).clamp(min=0)"
            ),
            "Add the minimum again: codes count from it.": ("low + step", "step"),
            "To the nearest code: floor is not round.": ("torch.round", "torch.floor"),
            "These are the codes; give the numbers that they stand for.": ("low + step * ", ""),
        },
    ),
    "18.3": Exercise(
        "a group that is not yet full",
        hints=(
            "Put what waits and what is new together; then look whether there is a full group.",
            "More than one group may be full: a loop, each group through quantize by itself.",
            "while len(waiting) >= group: append quantize(waiting[:group]) to rounded, go on with waiting[group:].",
        ),
        solution=stream_solution,
        cases=_stream_cases,
        use=_use_stream,
        slips={
            "Old tokens come first: what waits stands before what is new.": ("[waiting, new]", "[new, waiting]"),
            "A long prompt fills several groups at once: go on until none is full.": ("while len", "if len"),
            "A group of exactly `group` tokens is full.": (">= group", "> group"),
            "What was rounded stays: add to it.": ("torch.cat([rounded, quantize(waiting[:group])])",
                                                  "quantize(waiting[:group])"),
            "Round each group by itself, not what is already rounded once more.": (
                "torch.cat([rounded, quantize(waiting[:group])])", "quantize(torch.cat([rounded, waiting[:group]]))"
            ),
            "What has been rounded no longer waits.": ("waiting = waiting[group:]", "waiting, group = waiting, 10**9"),
            "A group that is not full waits in float, unrounded.": (
                "return rounded, waiting", "return rounded, quantize(waiting) if len(waiting) else waiting"
            ),
            "The order is rounded, waiting.": ("return rounded, waiting", "return waiting, rounded"),
        },
    ),
    "18.4": Exercise(
        "the cheapest within a budget",
        hints=(
            "First keep the settings whose KL is at most the budget.",
            "Of those, min(…, key=…) by bytes.",
            "fits = [bits for bits, (size, kl) in table.items() if kl <= budget]; and min(fits, key=…, default=None).",
        ),
        solution=cheapest_solution,
        cases=_cheapest_cases,
        edges=_cheapest_edges,
        slips={
            "This is the one with the least KL; the fewest bytes were asked for.": (
                "key=lambda bits: table[bits][0]", "key=lambda bits: table[bits][1]"
            ),
            "This is the dearest of those within the budget.": ("min(fits", "max(fits"),
            "Its KL is over the budget.": ("if kl <= budget", ""),
            "A KL that equals the budget is within it.": ("kl <= budget", "kl < budget"),
            "The fewest bits in all are not the fewest bytes: the table says what each setting takes.": (
                "key=lambda bits: table[bits][0]", "key=sum"
            ),
            "Give the bits, not the bytes.": ("return min(fits", "return min((table[b][0] for b in fits), default=None"
                                              ") if fits else min(fits"),
        },
    ),
}  # fmt: skip
