"""Exercises of chapter 22: fit the budget."""

import math
from dataclasses import replace
from functools import partial

import torch

from quantlab.capstone import Refused, best, by_part, read, score
from quantlab.exercises.material import uniform
from quantlab.granularity import PerGroup, QTensor, quantize_tensor
from quantlab.judging import Exercise, Wrong, expect


def bytes_solution(shapes, bits, group_size):
    """Codes, a float32 scale for each group, a zero point of as many bits as a code; each in whole bytes."""
    total = 0
    for rows, columns in shapes:
        groups = rows * math.ceil(columns / group_size)
        total += math.ceil(rows * columns * bits / 8) + 4 * groups + math.ceil(groups * bits / 8)
    return total


def _bytes_cases(random):
    for bits, group_size in ((3, 128), (2, 64), (5, 100), (4, 32), (7, 48)):
        sizes = torch.randint(1, 400, (4, 2), generator=random).tolist()
        yield [tuple(size) for size in sizes], bits, group_size


def _bytes_edges():
    yield [(1, 128)], 4, 128
    yield [(3, 128)], 3, 128
    yield [(2048, 256), (768, 256)], 3, 256
    yield [(5, 130)], 4, 128
    yield [(3, 5), (3, 5)], 3, 4


def front_solution(rows):
    """From the smallest file up, whatever has less KL than all before it."""
    least, names = math.inf, []
    for name in sorted(rows, key=lambda name: rows[name]):
        if rows[name][1] < least:
            least = rows[name][1]
            names.append(name)
    return names


def _front_cases(random):
    for count in (3, 6, 10):
        sizes = torch.randint(1, 8, (count,), generator=random).tolist()  # so few that some are equal
        order = torch.randperm(count, generator=random).tolist()
        rows = {f"recipe {i}": (100_000 * sizes[i], round(uniform(random, 0.01, 0.9), 4)) for i in order}
        yield (rows,)


def _front_edges():
    yield ({"a": (2_000_000, 0.1)},)
    yield ({"large": (3, 0.1), "small": (1, 0.5), "worse": (2, 0.6), "middle": (2, 0.2)},)
    yield ({"same size, worse": (5, 0.3), "same size": (5, 0.2), "as good, larger": (6, 0.2)},)


def half_solution(q):
    """The same codes and zero points; only the scales become float16."""
    return replace(q, qparams=replace(q.qparams, scale=q.qparams.scale.half()))


def _half_cases(random):
    for bits, group_size, symmetric in ((3, 16, False), (4, 8, True), (2, 32, False)):
        weight = torch.randn(6, 64, generator=random) * uniform(random, 0.01, 1.0)
        granularity = PerGroup(group_size)
        yield (quantize_tensor(weight, bits=bits, granularity=granularity, symmetric=symmetric),)


def _use_half(answer, q):
    """What is judged of the answer: its codes, the type and values of its scales, its bytes and its weights."""
    made = answer(q)
    expect(isinstance(made, QTensor), f"Return a QTensor, made of q with dataclasses.replace; got {made!r:.60}.")
    return made.codes, str(made.qparams.scale.dtype), made.qparams.scale.float(), made.nbytes, made.dequantize()


def entry_solution(model, tokens):
    """Six bits for the embedding, which is the head too, four for the rest, rounded by GPTQ."""
    return by_part(model, tokens, method="gptq", embedding=6, attention=4, mlp=4)


def _test_entry(recipe):
    try:
        mine = score(recipe, "2.2 MB", name="my recipe")
    except Refused as cheat:
        raise Wrong(str(cheat)) from None
    expect(
        mine.fits,
        f"The file has {mine.nbytes:,} bytes, {mine.nbytes - mine.limit:,} over the budget. Which part of it could do "
        "with fewer bits?",
    )
    plain = score(partial(by_part, method="rtn", embedding=4), "2.2 MB")
    expect(
        mine.kl < plain.kl,
        f"KL {mine.kl:.4f} on the hidden text; 4 bits everywhere, rounded to nearest, have {plain.kl:.4f} in "
        f"{plain.nbytes:,} bytes. What has helped in notebooks 10 to 14?",
    )
    leader = best(read(), "2.2 MB", mine.model)
    ahead = f"The reference best, {leader.recipe}, has {leader.kl:.4f}." if leader else ""
    return f"KL {mine.kl:.4f} in {mine.nbytes:,} bytes. {ahead}".strip()


EXERCISES = {
    "22.1": Exercise(
        "bytes of a plan",
        hints=(
            "Three things lie in the file for each matrix: codes, scales, zero points.",
            "A row of 130 columns has two groups of 128: the last one is short, and has a scale all the same.",
            "ceil(rows * columns * bits / 8), and for groups = rows * ceil(columns / group_size): 4 * groups, and ...",
        ),
        solution=bytes_solution,
        cases=_bytes_cases,
        edges=_bytes_edges,
        slips={
            "The zero points are missing: one for each group, of as many bits as a code.": (
                " + math.ceil(groups * bits / 8)", ""
            ),
            "The scales are missing: a float32 for each group.": (" + 4 * groups", ""),
            "A short last group has a scale, too.": ("math.ceil(columns / group_size)", "columns // group_size"),
            "A scale is a float32: four bytes.": ("4 * groups", "2 * groups"),
            "Zero points are packed like codes, not a byte each.": ("math.ceil(groups * bits / 8)", "groups"),
            "Bytes were asked for: 8 bits each.": (
                "math.ceil(rows * columns * bits / 8)", "rows * columns * bits",
                "4 * groups", "32 * groups", "math.ceil(groups * bits / 8)", "groups * bits",
            ),
            "A file has whole bytes: the last one of codes is rounded up.": (
                "math.ceil(rows * columns * bits / 8)", "rows * columns * bits // 8"
            ),
            "These are the codes alone; scales and zero points come on top.": (
                " + 4 * groups + math.ceil(groups * bits / 8)", ""
            ),
        },
    ),
    "22.2": Exercise(
        "on the front",
        hints=(
            "Sort by size. Which rows can be on the front, once you have seen all that are smaller?",
            "Remember the least KL so far; a row belongs to the front if it is below that.",
            "sorted(rows, key=lambda name: rows[name]) sorts by bytes, and by KL where these are equal.",
        ),
        solution=front_solution,
        cases=_front_cases,
        edges=_front_edges,
        slips={
            "As good as a smaller file is not good enough: nothing speaks for the larger one.": (
                "[1] < least", "[1] <= least"
            ),
            "Of two files of one size only the better one can be on the front.": (
                "key=lambda name: rows[name])", "key=lambda name: (rows[name][0], -rows[name][1]))"
            ),
            "Go through the rows by size, whatever their order in the dict.": (
                "sorted(rows, key=lambda name: rows[name])", "rows"
            ),
            "This is every row. One that is larger and worse than another is on no front.": (
                "if rows[name][1] < least:", "if True:"
            ),
            "Smallest first.": ("return names", "return names[::-1]"),
        },
    ),
    "22.3": Exercise(
        "fit 2.2 MB",
        test=_test_entry,
        hints=(
            "by_part takes bits for the embedding, the attention layers and the MLPs; the explorer shows their costs.",
            "The embedding is a seventh of the weights, and it is the head as well: give it more bits than the rest.",
            "return by_part(model, tokens, method=\"gptq\", embedding=..., attention=..., mlp=...)",
        ),
        solution=entry_solution,
    ),
    "22.4": Exercise(
        "scales in 16 bits",
        hints=(
            "A QTensor is a frozen dataclass, and so is its qparams: dataclasses.replace makes a changed copy.",
            "q.qparams.scale.half() are the same scales in float16.",
            "replace(q, qparams=replace(q.qparams, scale=...))",
        ),
        solution=half_solution,
        cases=_half_cases,
        use=_use_half,
        slips={
            "The scales are float32 still.": (".half()", ""),
            "bfloat16 has as many bytes, and 8 bits of precision instead of 11.": (".half()", ".bfloat16()"),
        },
    ),
}  # fmt: skip
