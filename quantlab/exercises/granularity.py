"""Exercises of chapter 3: granularity, packing, true bits."""

import math

import torch

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.exercises.material import layer_in_runs, off_ties, uniform
from quantlab.granularity import PerAxis, PerGroup, PerTensor, quantize_tensor  # noqa: F401  PerTensor: in a slip
from quantlab.judging import Exercise, Wrong, as_number, expect
from quantlab.packing import pack

# --- 3.1 --------------------------------------------------------------------------------------------------------


def groups_solution(weight, bits, group_size):
    """Cut the columns into runs of group_size; each run of each row gets its own grid."""
    parts = []
    for part in weight.split(group_size, dim=1):  # the last part is as wide as what is left
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        parts.append(fake_quantize(part, choose_qparams(low, high, qmin=0, qmax=2**bits - 1)))
    return torch.cat(parts, dim=1)


def _group(random, count, bits):
    """count weights of one group, on either side of 0 or on one; none is half-way between two grid points."""
    steps, side = 2**bits - 1, int(torch.randint(0, 4, (1,), generator=random))
    low = 0 if side == 0 else -steps if side == 1 else -int(torch.randint(1, steps, (1,), generator=random))
    near = 1 if side else max(1, steps - 2)  # of the codes of a group above 0, only the last few are used
    inside = low + off_ties(random, count, near, steps - 1)
    ends = torch.tensor([float(low + steps)] if side == 0 else [float(low)] if side == 1 else [low, low + steps])
    values = torch.cat([ends, inside])[:count] if count > len(ends) else ends[:count]
    return values[torch.randperm(count, generator=random)] * math.exp(uniform(random, -3.0, 3.0))


def _weight_in_groups(random, rows, cols, bits, group_size):
    widths = [min(group_size, cols - start) for start in range(0, cols, group_size)]
    return torch.stack([torch.cat([_group(random, width, bits) for width in widths]) for _ in range(rows)])


def _groups_cases(random):
    for rows, cols, bits, group_size in ((6, 22, 2, 8), (3, 16, 4, 4), (2, 13, 3, 5), (4, 6, 4, 9), (1, 12, 2, 6)):
        yield _weight_in_groups(random, rows, cols, bits, group_size), bits, group_size


def _groups_edges():
    yield torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0, 11.0, 29.0, 30.0]]), 2, 4
    yield torch.tensor([[0.0, 0.1, 0.18, 0.3, 10.0, 4.0]]), 2, 4
    yield torch.tensor([[10.0, 10.3, 10.9, 11.0]]), 3, 4
    yield torch.tensor([[-11.0, -10.0, -10.6, -10.3]]), 3, 2


# --- 3.2 --------------------------------------------------------------------------------------------------------


def per_output_solution(weight, bits):
    """Outputs are the columns of a [in, out] weight, so axis 1 is the one that is kept."""
    return quantize_tensor(weight, bits=bits, granularity=PerAxis(1), symmetric=False).dequantize()


def _dequantized(answer, *arguments):
    """A QTensor will do as well as its values."""
    found = answer(*arguments)
    return found.dequantize() if hasattr(found, "dequantize") and not torch.is_tensor(found) else found


def _per_output_cases(random):
    """Inputs and outputs of very unequal size; square, tall and wide."""
    for inputs, outputs, bits in ((5, 3, 4), (3, 7, 3), (6, 6, 4), (20, 10, 8), (4, 2, 2)):
        yield torch.stack([_group(random, inputs, bits) for _ in range(outputs)], dim=1), bits


# --- 3.3 and 3.5 ------------------------------------------------------------------------------------------------


def pack4_solution(codes):
    """Even places go to the low four bits, odd places to the high four."""
    codes = torch.cat([codes, codes.new_zeros(len(codes) % 2)])
    return codes[0::2] | (codes[1::2] << 4)


def _as_bytes(answer, codes):
    """The result, unless it is a tensor of something wider than a byte."""
    packed = answer(codes)
    size = packed.dtype.itemsize if hasattr(packed, "dtype") else 1
    if size > 1:
        raise Wrong(f"{packed.dtype} takes {size} bytes a number: return uint8, or nothing is gained.")
    return packed


def _pack4_cases(random):
    for count in (1, 2, 7, 16, 33):
        yield (torch.randint(0, 16, (count,), generator=random, dtype=torch.uint8),)


def _pack4_edges():
    for codes in ([1, 2, 3, 4], [5, 6, 7], [2, 7], [8, 15, 9, 12], [15]):
        yield (torch.tensor(codes, dtype=torch.uint8),)


def unpack3_solution(packed, count):
    """Code i begins at bit 3 i of the stream. Two bytes from there on always hold it whole."""
    stream = packed.tolist() + [0]
    codes = []
    for i in range(count):
        byte, bit = divmod(3 * i, 8)
        codes.append((stream[byte] | stream[byte + 1] << 8) >> bit & 7)
    return torch.tensor(codes, dtype=torch.uint8)


def _unpack3_cases(random):
    for codes, count in ((1, 1), (3, 3), (8, 8), (16, 11), (61, 61)):
        yield pack(torch.randint(0, 8, (codes,), generator=random), bits=3), count


def _unpack3_edges():
    for codes in ([5, 3], [1, 2, 7], [1, 2, 4, 7, 6], [0, 0, 7]):
        yield pack(torch.tensor(codes), bits=3), len(codes)


# --- 3.4 --------------------------------------------------------------------------------------------------------


def true_bits_solution(rows, cols, bits, group_size, scale_bits, zero_bits):
    """All the bits that are stored, over the number of weights. A short group's scale is as long as any."""
    groups = rows * math.ceil(cols / group_size)
    return bits + groups * (scale_bits + zero_bits) / (rows * cols)


def _true_bits_cases(random):
    def whole(low, high):
        return int(torch.randint(low, high, (1,), generator=random))

    for _ in range(4):
        yield whole(2, 300), whole(20, 900), whole(2, 9), whole(8, 300), (8, 16, 32)[whole(0, 3)], whole(1, 9)


def _true_bits_edges():
    yield 256, 768, 4, 128, 16, 0
    yield 256, 768, 4, 128, 16, 4
    yield 10, 100, 4, 64, 32, 0
    yield 10, 100, 3, 512, 32, 3


# --- 3.6 --------------------------------------------------------------------------------------------------------


def budget_solution():
    """The fifth bit divides the error by four. With float32 scales, small groups cost as much and do less."""
    return {"bits": 5, "group_size": 192, "symmetric": False}


def _budget_rule(settings):
    expect(
        isinstance(settings, dict) and settings.keys() == {"bits", "group_size", "symmetric"},
        f'Return {{"bits": ..., "group_size": ... or None for a whole row, "symmetric": ...}}; got {settings!r}.',
    )
    bits, size = as_number(settings["bits"]), as_number(settings["group_size"])
    expect(bits is not None and bits in range(2, 9), f"bits are a whole number from 2 to 8; got {settings['bits']!r}.")
    expect(
        settings["group_size"] is None or (size is not None and size >= 1 and float(size).is_integer()),
        f"group_size is a whole number from 1 on, or None for a whole row; got {settings['group_size']!r}.",
    )
    q = _practice(int(bits), None if size is None else int(size), bool(settings["symmetric"]))
    weight, x = layer_in_runs()
    error = ((x @ (weight - q.dequantize()).T).square().sum() / (x @ weight.T).square().sum()).item()
    reached = f"{q.bits_per_element:.3f} true bits per weight, output error {error:.5f}"
    expect(q.bits_per_element <= 5.2, f"{reached}: too many bits, 5.2 are allowed. What do the scales take?")
    expect(
        error <= 0.0055,
        f"{reached}: {error / 0.0055:.2f} times the 0.0055 asked for. Compare two ways to spend a bit: on the codes, "
        "or on smaller groups.",
    )
    return f"{reached}."


def _practice(bits, size, symmetric):
    granularity = PerAxis(0) if size is None else PerGroup(size)
    return quantize_tensor(layer_in_runs()[0], bits=bits, granularity=granularity, symmetric=symmetric)


_EXTREMES = "low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)"
_LOOP = "weight.split(group_size, dim=1)"
_ROUNDED = "parts.append(fake_quantize(part, choose_qparams(low, high, qmin=0, qmax=2**bits - 1)))"

EXERCISES = {
    "3.1": Exercise(
        "groups",
        hints=(
            "Do it for one run of columns first: its minimum and maximum for each row, then a grid for each row.",
            "amin(1, keepdim=True) has the shape (rows, 1), and choose_qparams takes bounds of that shape.",
            "weight.split(group_size, dim=1) gives the runs, the short one last; torch.cat(…, dim=1) puts them back.",
        ),
        solution=groups_solution,
        cases=_groups_cases,
        edges=_groups_edges,
        rounds=2,
        slips={
            "Each group has its own minimum and maximum; this is one grid for the whole matrix.": (
                _EXTREMES, "low, high = weight.amin(), weight.amax()"
            ),
            "Each group has its own minimum and maximum; this is one grid for each row.": (
                _EXTREMES, "low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)"
            ),
            "A group lies in one row: this is one grid for a run of columns, all rows together.": (
                _EXTREMES, "low, high = part.amin(), part.amax()"
            ),
            "A group is a run of neighbours in a row, not in a column.": (
                _LOOP, "weight.T.split(group_size, dim=1)", "torch.cat(parts, dim=1)", "torch.cat(parts, dim=1).T"
            ),
            "A group must not run on into the next row.": (
                _LOOP, "weight.reshape(1, -1).split(group_size, dim=1)",
                "torch.cat(parts, dim=1)", "torch.cat(parts, dim=1).view(weight.shape)",
            ),
            "What becomes of the last columns, where group_size does not divide?": (
                _LOOP, "weight[:, : max(weight.shape[1] // group_size, 1) * group_size].split(group_size, dim=1)"
            ),
            "The short last group is rounded too.": (
                _ROUNDED,
                "parts.append(part if part.shape[1] < group_size else "
                "fake_quantize(part, choose_qparams(low, high, qmin=0, qmax=2**bits - 1)))",
            ),
            "The short last group has a grid of its own, not that of the group before.": (
                _EXTREMES,
                "low, high = (part.amin(1, keepdim=True), part.amax(1, keepdim=True)) "
                "if part.shape[1] == group_size or not parts else (low, high)",
            ),
            "Widen the range of each group to hold 0 first (choose_qparams does).": (
                _ROUNDED,
                "scale = ((high - low) / (2**bits - 1)).clamp(min=1e-30); "
                "parts.append(torch.round((part - low) / scale) * scale + low)",
            ),
            "2**bits codes have 2**bits - 1 steps between them: qmax is 2**bits - 1.": ("2**bits - 1", "2**bits"),
            "bits says how many codes: 2**bits.": ("2**bits - 1", "15"),
            "The grid is asymmetric: from the group's minimum to its maximum.": (
                "qmax=2**bits - 1)", "qmax=2**bits - 1, symmetric=True)"
            ),
            "These groups are half as long as group_size.": (_LOOP, "weight.split(max(group_size // 2, 1), dim=1)"),
            "Nothing was rounded.": (_ROUNDED, "parts.append(part.clone())"),
        },
    ),
    "3.2": Exercise(
        "the right axis",
        hints=(
            "PerAxis(axis) names the dimension that is kept: one scale for each index of it.",
            "In [in, out], which dimension counts the outputs?",
            "quantize_tensor(weight, bits=bits, granularity=PerAxis(?)); look at .qparams.scale.shape.",
        ),
        solution=per_output_solution,
        use=_dequantized,
        cases=_per_output_cases,
        slips={
            "This is one scale for each input. In [in, out], outputs are the columns.": ("PerAxis(1)", "PerAxis(0)"),
            "This is one scale for all. How many outputs are there?": ("PerAxis(1)", "PerTensor()"),
            "The result should be [in, out], as weight is.": (".dequantize()", ".dequantize().T"),
            "Asymmetric was asked for: quantize_tensor(…, symmetric=False).": (", symmetric=False", ""),
            "The bits that are asked for vary.": ("bits=bits", "bits=4"),
            "Nothing was rounded.": (
                "quantize_tensor(weight, bits=bits, granularity=PerAxis(1), symmetric=False).dequantize()",
                "weight.clone()",
            ),
            "Return the reals that the codes stand for, not the codes.": (".dequantize()", ".codes"),
        },
    ),
    "3.3": Exercise(
        "two codes in a byte",
        hints=(
            "A byte is 16 · high + low, each from 0 to 15.",
            "codes[0::2] are the first of each pair, codes[1::2] the second; << 4 moves up by four bits.",
            "With an odd number there is one second too few: put a 0 at the end first.",
        ),
        solution=pack4_solution,
        use=_as_bytes,
        cases=_pack4_cases,
        edges=_pack4_edges,
        slips={
            "You put the first code of each pair into the high four bits. Many formats do; here the first goes low.": (
                "codes[0::2] | (codes[1::2] << 4)", "codes[0::2] << 4 | codes[1::2]"
            ),
            "You paired the first half with the second half (as some GGUF formats do). Here neighbours share a byte.": (
                "codes[0::2] | (codes[1::2] << 4)", "codes[: len(codes) // 2] | codes[len(codes) // 2 :] << 4"
            ),
            "If their number is odd, the last code has a byte for itself, filled with 0.": (
                "codes[0::2] | (codes[1::2] << 4)", "codes[0::2][:count] | (codes[1::2] << 4)[:count]",
                "codes = torch.cat(", "count = len(codes) // 2; codes = torch.cat(",
            ),
            "An even number of codes fills its bytes: add a 0 only where it is odd.": (
                "len(codes) % 2", "2 - len(codes) % 2"
            ),
            "Two codes share one byte: half as many bytes as codes.": ("codes[0::2] | (codes[1::2] << 4)", "codes"),
            "A byte is 16 · high + low.": ("| (codes[1::2] << 4)", "+ codes[1::2] * 15"),
            "Each code has four bits: move the second up by four.": ("<< 4", "<< 3"),
            "Codes above 7 came out wrong: mind the highest bit.": ("(codes[1::2] << 4)", "(codes[1::2] << 4 & 127)"),
        },
    ),
    "3.4": Exercise(
        "true bits per weight",
        hints=(
            "Count all bits that are stored, then divide by rows · cols.",
            "How many groups has one row? The short one counts.",
            "math.ceil(cols / group_size) groups in a row, each with scale_bits + zero_bits.",
        ),
        solution=true_bits_solution,
        cases=_true_bits_cases,
        edges=_true_bits_edges,
        tolerance=1e-6,
        slips={
            "That is what the codes take. The scales are stored too.": (
                " + groups * (scale_bits + zero_bits) / (rows * cols)", ""
            ),
            "A scale's bits are shared by its group.": (
                "groups * (scale_bits + zero_bits) / (rows * cols)", "scale_bits + zero_bits"
            ),
            "The zero points are stored too.": ("(scale_bits + zero_bits)", "scale_bits"),
            "The codes are stored too.": ("return bits + ", "return "),
            "A short group's scale is as long as any: count the groups of a row, rounded up.": (
                "math.ceil(cols / group_size)", "(cols / group_size)"
            ),
            "The short last group has a scale as well: round the number of groups up, not down.": (
                "math.ceil(cols / group_size)", "max(cols // group_size, 1)"
            ),
            "Each row has its own groups: none runs on into the next row.": (
                "rows * math.ceil(cols / group_size)", "math.ceil(rows * cols / group_size)"
            ),
            "Every row has groups of its own: their number is that of one row times rows.": (
                "rows * math.ceil", "math.ceil"
            ),
            "Bits per weight were asked for: divide by rows · cols.": (
                "bits + groups * (scale_bits + zero_bits) / (rows * cols)",
                "bits * rows * cols + groups * (scale_bits + zero_bits)",
            ),
        },
    ),
    "3.5": Exercise(
        "three bits",
        hints=(
            "Code i begins at bit 3·i of the stream: which byte is that, and which bit of it?",
            "Two bytes in a row, low | next << 8, hold every code that begins in the first of them.",
            "Shift right by the bit, and keep three bits with & 7. Mind the byte after the last.",
        ),
        solution=unpack3_solution,
        cases=_unpack3_cases,
        edges=_unpack3_edges,
        slips={
            "Where a code lies astride two bytes, part of it is in the next byte.": (
                "(stream[byte] | stream[byte + 1] << 8)", "stream[byte]"
            ),
            "No bit is left over: the third code begins in the first byte, and part of it is in the next.": (
                "divmod(3 * i, 8)", "divmod(i, 2)", ">> bit & 7", ">> 3 * bit & 7"
            ),
            "The next byte holds the *higher* bits of the code: it comes 8 bits further up.": (
                "stream[byte] | stream[byte + 1] << 8", "stream[byte] << 8 | stream[byte + 1]"
            ),
            "You read each byte from its high end. Bit 0 is the low one: the first code is byte & 7.": (
                "codes.append((stream[byte] | stream[byte + 1] << 8) >> bit & 7)",
                "codes.append((stream[byte] << 8 | stream[byte + 1]) >> 13 - bit & 7)",
            ),
            "count codes were asked for: the zeros that fill the last byte are no codes.": (
                "range(count)", "range(8 * len(packed) // 3)"
            ),
            "A code has three bits: keep them with & 7.": ("& 7", "& 3"),
            "A code has three bits, and no more: keep them with & 7.": (" & 7", ""),
        },
    ),
    "3.6": Exercise(
        "fit the budget",
        hints=(
            "First list what the budget allows: for 4 bits, how small can the groups get? For 5 bits?",
            "With float32 scales a group of 32 costs one bit per weight, as much as a fifth bit does.",
            "Loop over bits, group sizes (any number, not only powers of two) and symmetry; keep the best within 5.2.",
        ),
        solution=budget_solution,
        edges=lambda: [()],
        rule=_budget_rule,
    ),
}  # fmt: skip
