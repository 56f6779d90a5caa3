"""Exercises of chapter 19: llama.cpp's files."""

import torch

from quantlab.exercises.material import off_ties, uniform
from quantlab.judging import Exercise, as_number, as_tensor, expect


def decode_solution(block):
    """Two float16, then 16 bytes: low four bits are the first 16 codes, high four bits the last 16."""
    scale, least = block[:4].view(torch.float16).float()
    codes = torch.cat([block[4:] & 15, block[4:] >> 4])
    return scale * codes + least


def _decode_cases(random):
    for _ in range(3):
        numbers = torch.tensor([uniform(random, 0.01, 1.0), -uniform(random, 0.1, 2.0)]).half().view(torch.uint8)
        yield (torch.cat([numbers, torch.randint(0, 256, (16,), generator=random, dtype=torch.uint8)]),)


def _decode_edges():
    numbers = torch.tensor([0.5, -2.0]).half().view(torch.uint8)
    yield (torch.cat([numbers, torch.arange(0, 256, 16, dtype=torch.uint8) + 1]),)


def encode_solution(x):
    """The value of the largest magnitude is put on code 0: the grid has one step more on its side."""
    scale = x[x.abs().argmax()] / -8
    return scale, (torch.round(x / scale) + 8).clamp(0, 15).int()


def _encode_cases(random):
    """Steps that are no ties; the largest is 8 of them, now above 0, now below."""
    for sign in (1, -1):
        steps = off_ties(random, 32, -7, 7)
        steps[int(uniform(random, 0, 31))] = -8.0
        steps[int(uniform(random, 0, 31))] = 7.8  # would be code 16, which four bits do not have
        steps[steps.abs().argmax()] = -8.0
        yield (sign * uniform(random, 0.01, 1.0) * steps,)


def _encode_edges():
    yield (torch.tensor([8.0, -7.0, 3.2, 0.0, 1.4]),)
    yield (torch.tensor([-4.0, 3.9, 0.2, -1.3]),)


def true_bits_solution(code_bits, block_size, scale_bits, super_size, parts):
    """Each small block pays scale_bits for each of its parts, each super-block a float16."""
    return code_bits + parts * (scale_bits / block_size + 16 / super_size)


def _true_bits_cases(random):
    for parts in (1, 2):
        power = int(uniform(random, 3, 6.99))
        yield int(uniform(random, 2, 8.99)), 2**power, int(uniform(random, 4, 8.99)), 2 ** (power + 3), parts
        yield int(uniform(random, 2, 8.99)), 2**power, int(uniform(random, 4, 8.99)), 2 ** (power + 1), parts


def _true_bits_edges():
    yield 4, 32, 6, 256, 2
    yield 6, 16, 8, 256, 1


def scale_solution(x, codes, importance):
    """The derivative of Σ importance (x - s·code)² with respect to s is 0 here."""
    return (importance * x * codes).sum() / (importance * codes * codes).sum()


def _scale_cases(random):
    for _ in range(3):
        scale = uniform(random, 0.01, 1.0)
        x = scale * 3 * torch.randn(32, generator=random)
        codes = torch.round(x / scale).clamp(-8, 7)
        codes[0] = 3.0
        yield x, codes, torch.rand(32, generator=random) ** 3 * uniform(random, 0.1, 10.0)


def _scale_edges():
    yield torch.tensor([1.0, 2.1, -3.0]), torch.tensor([1.0, 2.0, -3.0]), torch.tensor([1.0, 100.0, 1.0])


def search_solution(x, importance):
    """Starts around the plain scale; for each, its codes and their best scale; the least error is kept."""
    largest, best = x[x.abs().argmax()], None
    for start in torch.linspace(7.0, 9.0, 21):
        codes = torch.round(x * (-start / largest)).clamp(-8, 7)
        scale = (importance * x * codes).sum() / (importance * codes * codes).sum()
        error = (importance * (x - scale * codes) ** 2).sum()
        if best is None or error < best[0]:
            best = error, scale, codes
    return best[1], best[2]


def _search_cases(random):
    """Blocks of other sizes and signs, a few inputs mattering far more than the others: in half, the largest's too."""
    for case in range(24):
        x = uniform(random, 0.01, 1.0) * torch.randn(32, generator=random)
        importance = 0.1 + 10 * torch.rand(32, generator=random) ** 4
        if case % 2:
            importance[x.abs().argmax()] = 100.0
        yield x, importance


def _search_rule(answer, x, importance):
    """At most 1.1 times the weighted error that the solution finds."""
    expect(isinstance(answer, tuple | list) and len(answer) == 2, "Return two things, the scale and the codes.")
    scale, codes = as_number(answer[0]), as_tensor(answer[1])
    expect(scale is not None, f"The scale is one number; got {answer[0]!r}.")
    expect(codes is not None and codes.shape == x.shape, "The codes are as many as the values of x.")
    expect(bool((codes == codes.round()).all()), "Codes are whole numbers.")
    expect(codes.min() >= -8 and codes.max() <= 7, f"Codes lie in -8..7; got {codes.min():g}..{codes.max():g}.")

    def error(scale, codes):
        return (importance.double() * (x.double() - scale * codes.double()).square()).sum().item()

    first = x[x.abs().argmax()].item() / -8
    plain = error(first, torch.round(x / first).clamp(-8, 7))
    mine, best = error(scale, codes), error(*search_solution(x, importance))
    expect(
        mine < 1.0001 * plain,
        f"Weighted error {mine / plain:.2f} times that of Q4_0's plain scale: it should be less. Is it weighted?",
    )
    expect(
        mine <= 1.1 * best,
        f"Weighted error {mine / best:.2f} times the best of 21 starts; 1.1 was asked for (Q4_0's plain scale: "
        f"{plain / best:.2f}). Try some twenty scales, round by each, and solve for the best scale of those codes.",
    )
    return f"Weighted error {mine / plain:.2f} of the plain scale's."


EXERCISES = {
    "19.1": Exercise(
        "decode a block",
        hints=(
            "The first four bytes are two float16: block[:4].view(torch.float16).",
            "A byte holds two codes: byte & 15 is the low one, byte >> 4 the high one.",
            "All low codes come first, then all high ones: torch.cat([low, high]); then scale * codes + least.",
        ),
        solution=decode_solution,
        cases=_decode_cases,
        edges=_decode_edges,
        slips={
            "The low four bits are the first 16 weights, the high four bits the last 16.": (
                "[block[4:] & 15, block[4:] >> 4]", "[block[4:] >> 4, block[4:] & 15]"
            ),
            "Weights 0 and 16 share a byte, not 0 and 1: all low codes first, then all high ones.": (
                "torch.cat([block[4:] & 15, block[4:] >> 4])",
                "torch.stack([block[4:] & 15, block[4:] >> 4], 1).flatten()",
            ),
            "The scale comes first, then the least value.": ("scale, least =", "least, scale ="),
            "The least value is added: it is negative itself.": ("+ least", "- least"),
            "Code 0 stands for the least value; nothing is taken from the codes.": (
                "scale * codes", "scale * (codes - 8.0)"
            ),
            "The least value was left out.": (" + least", ""),
            "The least value is a real number already: it is not multiplied by the scale.": (
                "scale * codes + least", "scale * (codes + least)"
            ),
            "A float16 has two bytes, the least value is in bytes 2 and 3; bfloat16 is another format.": (
                "torch.float16", "torch.bfloat16"
            ),
        },
    ),
    "19.2": Exercise(
        "Q4_0",
        hints=(
            "Which value of x has the largest magnitude? Keep its sign.",
            "Codes 0..15 stand for -8..7 steps; the largest magnitude shall be -8 steps, so scale = largest / -8.",
            "codes = (torch.round(x / scale) + 8).clamp(0, 15)",
        ),
        solution=encode_solution,
        cases=_encode_cases,
        edges=_encode_edges,
        slips={
            "-8 has one step more than 7: divide the largest by -8, and the scale may be negative.": (
                "x[x.abs().argmax()] / -8", "x.abs().max() / 7"
            ),
            "Keep the sign of the largest value: the scale may be negative.": (
                "x[x.abs().argmax()] / -8", "x.abs().max() / 8"
            ),
            "The largest value must fall on -8 steps, so divide by -8.": ("/ -8", "/ 8"),
            "quantlab's own convention has 7.5 steps; Q4_0 puts the largest on -8.": (
                "x[x.abs().argmax()] / -8", "x.abs().max() / 7.5"
            ),
            "Codes are stored counted from 0: add 8.": (" + 8).clamp(0, 15)", ").clamp(-8, 7)"),
            "Four bits end at 15: clamp.": (".clamp(0, 15)", ""),
            "The largest value in magnitude, not the largest: take abs() before argmax.": (
                "x.abs().argmax()", "x.argmax()"
            ),
            "Round to the nearest step.": ("torch.round(x / scale)", "torch.floor(x / scale)"),
            "The order is scale, codes.": (
                "return scale, (torch.round(x / scale) + 8).clamp(0, 15).int()",
                "return (torch.round(x / scale) + 8).clamp(0, 15).int(), scale",
            ),
        },
    ),
    "19.3": Exercise(
        "true bits of a super-block",
        hints=(
            "Count the bits of a whole super-block, then divide by its weights.",
            "super_size / block_size small blocks have scale_bits each, for each part; and a float16 for each part.",
            "code_bits + parts * (scale_bits / block_size + 16 / super_size)",
        ),
        solution=true_bits_solution,
        cases=_true_bits_cases,
        edges=_true_bits_edges,
        slips={
            "The super-block's own float16 numbers are bits too.": (" + 16 / super_size", ""),
            "The scales of the small blocks are bits too.": ("scale_bits / block_size + ", ""),
            "Scale and offset are both stored: parts of each.": ("parts * (", "("),
            "Each part has a float16 of its own in the super-block.": (
                "parts * (scale_bits / block_size + 16 / super_size)",
                "parts * scale_bits / block_size + 16 / super_size"
            ),
            "Each part has a code of its own in each small block.": (
                "parts * (scale_bits / block_size + 16 / super_size)",
                "scale_bits / block_size + parts * 16 / super_size"
            ),
            "A float16 has 16 bits.": ("16 / super_size", "32 / super_size"),
            "Bits were asked for; a float16 has 16 of them, and 2 bytes.": ("16 / super_size", "2 / super_size"),
            "There is one float16 for a super-block, not for each small block.": ("16 / super_size", "16 / block_size"),
            "Each small block has a scale, not each super-block alone.": (
                "scale_bits / block_size", "scale_bits / super_size"
            ),
        },
    ),
    "19.4": Exercise(
        "the best scale for given codes",
        hints=(
            "Σ importance (x − s·codes)² is a parabola in s: where is its slope 0?",
            "The slope is −2 Σ importance · codes · (x − s·codes).",
            "s = Σ importance·x·codes / Σ importance·codes²",
        ),
        solution=scale_solution,
        cases=_scale_cases,
        edges=_scale_edges,
        slips={
            "The importance was left out.": ("importance * ", ""),
            "The importance belongs below the line as well.": ("/ (importance * codes", "/ (codes"),
            "The importance belongs above the line as well.": ("(importance * x", "(x"),
            "The slope has codes in both terms: Σ importance·x·codes above, Σ importance·codes² below.": (
                "(importance * x * codes).sum() / (importance * codes * codes).sum()",
                "(importance * x).sum() / (importance * codes).sum()",
            ),
            "Upside down: x = scale · codes, so the codes squared are below.": (
                "(importance * x * codes).sum() / (importance * codes * codes).sum()",
                "(importance * codes * codes).sum() / (importance * x * codes).sum()",
            ),
            "The importance weights the squared error already: it is not squared.": ("importance *", "importance**2 *"),
            "Σ importance·x² / Σ importance·x·codes is another line; the slope in s gives the codes below.": (
                "(importance * x * codes).sum() / (importance * codes * codes).sum()",
                "(importance * x * x).sum() / (importance * x * codes).sum()",
            ),
        },
    ),
    "19.5": Exercise(
        "search with importance",
        hints=(
            "Q4_0's scale puts the largest on -8. What if it were put on -7.5, or -8.4, and clamped?",
            "For each of some twenty starts: round to codes, then solve for their best scale (exercise 19.4).",
            "Keep the scale and codes whose Σ importance (x − scale·codes)² is least.",
        ),
        solution=search_solution,
        cases=_search_cases,
        rule=_search_rule,
    ),
}  # fmt: skip
