"""Exercises of chapter 16: a real language model."""

import torch

from quantlab.exercises.material import uniform
from quantlab.judging import Exercise


def levels_solution(weight, group_size):
    """Count the distinct values of each group of neighbours; the fullest group tells."""
    groups = weight.reshape(-1, group_size)
    return max(len(group.unique()) for group in groups)


def _levels_cases(random):
    """Grids of several sizes, the fullest group in any place; and weights that never saw one."""
    for levels, group_size, groups in ((16, 32, 6), (4, 16, 8), (8, 64, 3)):
        scale = torch.rand(groups, 1, generator=random) + 0.1
        codes = torch.randint(levels, (groups, group_size), generator=random)
        codes[: groups // 2] %= max(2, levels // 2)  # not every group uses all of them
        order = torch.randperm(groups, generator=random)
        yield (scale * codes + uniform(random, -1, 1))[order].view(2, -1) if groups % 2 == 0 else (
            scale * codes
        ).view(1, -1), group_size
    yield torch.randn(4, 48, generator=random), 16


def _levels_edges():
    yield torch.tensor([[1.0, 1.0, 2.0, 2.0], [1.0, 3.0, 5.0, 7.0]]), 4
    yield torch.tensor([[1.0, 1.0, 2.0, 2.0], [1.0, 3.0, 5.0, 7.0]]), 2


def sharing_solution(x, bits):
    """Symmetric grids whose scale is read off the whole tensor, off each row, off each column."""
    errors = {}
    for name, dims in (("tensor", (0, 1)), ("token", (1,)), ("channel", (0,))):
        scale = x.abs().amax(dims, keepdim=True) / (2 ** (bits - 1) - 1)
        rounded = torch.round(x / scale) * scale
        errors[name] = ((rounded - x).square().sum() / x.square().sum()).item()
    return errors


def _sharing_cases(random):
    """Loud in no place, in a token, in a channel, in both; the loudest value of a row or column may be negative."""
    for loud, bits in (("nowhere", 4), ("token", 8), ("channel", 5), ("both", 3)):
        x = torch.randn(24, 16, generator=random) * uniform(random, 0.1, 5.0)
        if loud in ("token", "both"):
            x[int(torch.randint(24, (1,), generator=random))] *= -30
        if loud in ("channel", "both"):
            x[:, int(torch.randint(16, (1,), generator=random))] *= -30
        yield x, bits


def _sharing_edges():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-4.0, 3.0, -2.0, 1.0], [2.0, 2.0, -30.0, 1.0]])
    yield x, 4
    yield x, 8


EXERCISES = {
    "16.1": Exercise(
        "was it quantized before?",
        hints=(
            "Neighbours that share a scale are a row of weight.reshape(-1, group_size).",
            "group.unique() holds each value of a group once.",
            "The answer is the largest len(group.unique()) of all groups.",
        ),
        solution=levels_solution,
        cases=_levels_cases,
        edges=_levels_edges,
        slips={
            "That counts the values of the whole weight; each group has a scale of its own.": (
                "max(len(group.unique()) for group in groups)", "len(weight.unique())"
            ),
            "Take the fullest group: others need not use every level.": ("max(", "min("),
            "That is the first group alone.": (
                "max(len(group.unique()) for group in groups)", "len(groups[0].unique())"
            ),
            "Groups run along a row, not across rows.": (
                "weight.reshape(-1, group_size)", "weight.T.reshape(-1, group_size)"
            ),
        },
    ),
    "16.2": Exercise(
        "who shares a scale?",
        hints=(
            "x.abs().amax(dims, keepdim=True) over both dimensions, over 1 (each token), over 0 (each channel).",
            "scale = largest / (2**(bits − 1) − 1), and rounded = round(x / scale) · scale.",
            "The error: (rounded − x) squared and summed, over x squared and summed. Three times, into a dict.",
        ),
        solution=sharing_solution,
        cases=_sharing_cases,
        edges=_sharing_edges,
        tolerance=1e-3,
        slips={
            "Token and channel are swapped: a token is a row, and its maximum runs over dimension 1.": (
                '("token", (1,)), ("channel", (0,))', '("token", (0,)), ("channel", (1,))'
            ),
            "The largest code of b bits is 2**(b − 1) − 1.": ("(2 ** (bits - 1) - 1)", "(2**bits - 1)"),
            "The bits are an argument, not always 8.": ("(2 ** (bits - 1) - 1)", "127"),
            "Relative to the size of x: divide by the sum of x².": (" / x.square().sum()", ""),
            "A mean is not the ratio: divide by the size of x.": (
                ".square().sum() / x.square().sum()", ".square().mean()"
            ),
            "The error is a ratio of squares; you took its root.": (
                "((rounded - x).square().sum() / x.square().sum())",
                "((rounded - x).square().sum() / x.square().sum()).sqrt()",
            ),
            "Magnitude: the sign does not count for the maximum.": ("x.abs().amax", "x.amax"),
            "Round to the nearest code; floor is not round.": ("torch.round", "torch.floor"),
        },
    ),
}  # fmt: skip
