"""Exercises of chapter 3: granularity, packing, true bits."""

import math

import torch

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.checks import Exercise, expect
from quantlab.exercises.material import layer_in_runs
from quantlab.granularity import PerAxis, PerGroup, QTensor, quantize_tensor
from quantlab.packing import pack

# --- 3.1 --------------------------------------------------------------------------------------------------------


def groups_solution(weight, bits, group_size):
    """Cut the columns into runs of group_size; each run of each row gets its own grid."""
    parts = []
    for part in weight.split(group_size, dim=1):  # the last part is as wide as what is left
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        parts.append(fake_quantize(part, choose_qparams(low, high, qmin=0, qmax=2**bits - 1)))
    return torch.cat(parts, dim=1)


def _test_groups(f):
    weight = _uneven()
    before = weight.clone()
    back = f(weight, 2, 8)
    expect(torch.is_tensor(back), f"Return a tensor; got {type(back).__name__}.")
    expect(
        back.shape == weight.shape,
        f"The result should have the shape of weight, (6, 22); got {tuple(back.shape)}. "
        "22 columns in groups of 8: what becomes of the last 6?",
    )
    expect(torch.equal(weight, before), "weight itself has changed: leave what you are given as it is.")
    for start in range(0, 22, 8):
        for row in range(6):
            _expect_own_grid(weight[row, start : start + 8], back[row, start : start + 8], row, start, 2)
    far = f(torch.linspace(10, 11, 16).view(2, 8), 4, 4)
    right = groups_solution(torch.linspace(10, 11, 16).view(2, 8), 4, 4)
    expect(
        torch.allclose(far, right, atol=1e-3),
        f"A group of values from 10 to 11 came back as {[round(v, 2) for v in far[0].tolist()]}. Widen the range of "
        "each group to hold 0 first (choose_qparams does).",
    )
    right = groups_solution(weight, 2, 8)
    expect(
        (back - right).abs().max() < 1e-4 * weight.abs().max(),
        f"Close, but some weights are not on the nearest grid point (off by {(back - right).abs().max():.2g}). "
        "Does each group have 2**bits codes, with 2**bits - 1 steps between them?",
    )


def _expect_own_grid(group, back, row, start, bits):
    """At most 2**bits values, none further away than half a step of this group's own grid."""
    where = f"row {row}, columns {start} to {start + len(group) - 1}"
    last = " It is the short last group: it has a scale of its own too." if len(group) < 8 else ""
    step = ((group.max().clamp(min=0) - group.min().clamp(max=0)) / (2**bits - 1)).item()
    moved = (back - group).abs().max().item()
    expect(
        moved <= 0.5001 * step,
        f"In {where} a weight moved by {moved / step:.2f} steps of that group's own grid; half a step is the most. "
        f"Which weights went into its minimum and maximum?{last}",
    )
    expect(
        moved > 0 and len(back.unique()) <= 2**bits,
        f"{where}: {len(back.unique())} different values, where {bits} bits have {2**bits} codes. "
        f"Was it rounded, and as one group?{last}",
    )


def _uneven():
    """6 x 22 weights whose size changes from row to row and from run to run, always the same."""
    random = torch.Generator().manual_seed(0)
    size = torch.tensor([[1.0, 0.1, 5.0]]) * torch.tensor([[1.0], [30.0], [0.2], [4.0], [0.05], [9.0]])
    return torch.randn(6, 22, generator=random) * size.repeat_interleave(8, dim=1)[:, :22]


# --- 3.2 --------------------------------------------------------------------------------------------------------


def per_output_solution(weight, bits):
    """Outputs are the columns of a [in, out] weight, so axis 1 is the one that is kept."""
    return quantize_tensor(weight, bits=bits, granularity=PerAxis(1)).dequantize()


def _test_per_output(f):
    random = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 1, 30)
    weight = torch.randn(50, 30, generator=random) * sizes * torch.logspace(-1, 1, 50)[:, None]
    back = f(weight.clone(), 4)
    back = back.dequantize() if isinstance(back, QTensor) else back
    expect(
        back.shape == weight.shape,
        f"weight is {tuple(weight.shape)}, [in, out], and should come back as that; got {tuple(back.shape)}.",
    )
    moved = (back - weight).abs().amax(0) / (weight.abs().amax(0) / 14)  # 14: a narrow grid, -7 to 7
    expect(
        (moved < 1.001).all(),
        f"Output 0 (column 0) reaches {weight[:, 0].abs().max():.2g}, and a weight of it moved by "
        f"{(back - weight)[:, 0].abs().max():.2g}: more than half a step of a grid of its own. How many scales did "
        "you get? There are 30 outputs and 50 inputs.",
    )
    values = max(len(column.unique()) for column in back.T)
    expect(
        1 < values <= 16,
        f"A column has {values} different values, and 4 bits have 16 codes: one scale for each output, no more.",
    )


# --- 3.3 and 3.5 ------------------------------------------------------------------------------------------------


def pack4_solution(codes):
    """Even places go to the low four bits, odd places to the high four."""
    codes = torch.cat([codes, codes.new_zeros(len(codes) % 2)])
    return codes[0::2] | (codes[1::2] << 4)


def _test_pack4(f):
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    packed = f(codes.clone())
    expect(torch.is_tensor(packed), f"Return a tensor; got {type(packed).__name__}.")
    expect(
        len(packed) == 2,
        f"Four codes of 4 bits fit into 2 bytes; you returned {len(packed)}. Two codes share one byte.",
    )
    expect(
        packed.dtype == torch.uint8,
        f"{packed.dtype} takes {packed.element_size()} bytes a number: return uint8, or nothing is gained.",
    )
    expect(
        packed.tolist() != [1 << 4 | 2, 3 << 4 | 4],
        "You put the first code of each pair into the high four bits. Many formats do; here the first goes low.",
    )
    expect(
        packed.tolist() != [1 | 3 << 4, 2 | 4 << 4],
        "You paired the first half with the second half (as some GGUF formats do). Here neighbours share a byte.",
    )
    expect(
        packed.tolist() == [1 | 2 << 4, 3 | 4 << 4],
        f"[1, 2, 3, 4] should give [33, 67]; got {packed.tolist()}. 33 is 1 + 2 · 16.",
    )
    odd = f(torch.tensor([5, 6, 7], dtype=torch.uint8))
    expect(
        odd.tolist() == [5 | 6 << 4, 7],
        f"[5, 6, 7] should give [101, 7]; got {odd.tolist()}. The last code has a byte for itself, filled with 0.",
    )
    every = torch.arange(16, dtype=torch.uint8).repeat(3)
    before = every.clone()
    expect(torch.equal(f(every), pack(every, bits=4)), "Codes above 7 came out wrong: mind the high bits.")
    expect(torch.equal(every, before), "codes itself has changed: leave what you are given as it is.")


def unpack3_solution(packed, count):
    """Code i begins at bit 3 i of the stream. Two bytes from there on always hold it whole."""
    stream = packed.tolist() + [0]
    codes = []
    for i in range(count):
        byte, bit = divmod(3 * i, 8)
        codes.append((stream[byte] | stream[byte + 1] << 8) >> bit & 7)
    return torch.tensor(codes, dtype=torch.uint8)


def _test_unpack3(f):
    def unpacked(codes):
        found = f(pack(torch.tensor(codes), bits=3), len(codes))
        return [int(code) for code in torch.as_tensor(found).flatten()]

    two = unpacked([5, 3])
    expect(len(two) == 2, f"count was 2, and you returned {len(two)} codes: the zeros that fill up are no codes.")
    expect(two != [0, 7], "You read each byte from its high end. Bit 0 is the low one: the first code is byte & 7.")
    expect(two == [5, 3], f"One byte with the codes [5, 3] was read as {two}. The first code is its low three bits.")
    three = unpacked([1, 2, 7])
    expect(
        three == [1, 2, 7],
        f"[1, 2, 7] came back as {three}. The third code lies in bits 6, 7 and 8: part of it is in the next byte.",
    )
    many = [(3 * i * i + i) % 8 for i in range(61)]
    back = unpacked(many)
    wrong = next((i for i, (a, b) in enumerate(zip(many, back, strict=False)) if a != b), None)
    expect(
        back == many,
        f"Of 61 codes the first wrong one is number {wrong}, at bit {3 * (wrong or 0)}. "
        "The pattern repeats every 8 codes.",
    )


# --- 3.4 --------------------------------------------------------------------------------------------------------


def true_bits_solution(rows, cols, bits, group_size, scale_bits, zero_bits):
    """All the bits that are stored, over the number of weights. A short group's scale is as long as any."""
    groups = rows * math.ceil(cols / group_size)
    return bits + groups * (scale_bits + zero_bits) / (rows * cols)


def _test_true_bits(f):
    def ask(*shape):
        value = f(*shape)
        expect(isinstance(value, int | float), f"Return a number of bits; got {value!r}.")
        return value

    plain = ask(256, 768, 4, 128, 16, 0)
    expect(plain != 4, "4 is what the codes take. The scales are stored too.")
    expect(
        abs(plain - 4.125) < 1e-6,
        f"4 bits and a 16-bit scale for 128 weights make 4.125 bits per weight; got {plain:.4f}. "
        "A scale's bits are shared by its group.",
    )
    zeros = ask(256, 768, 4, 128, 16, 4)
    expect(abs(zeros - 4.15625) < 1e-6, f"With a 4-bit zero point for each group 4.15625; got {zeros:.5f}.")
    short = ask(10, 100, 4, 64, 32, 0)
    expect(
        abs(short - 4.64) < 1e-6,
        f"Rows of 100 in groups of 64 have two groups each, 64 and 36: 4.64 bits per weight with 32-bit scales; "
        f"got {short:.4f}. A short group's scale is as long as any, and no group runs on into the next row.",
    )
    long = ask(10, 100, 3, 512, 32, 3)
    expect(abs(long - 3.35) < 1e-6, f"A group longer than the row is the row: 3.35 bits; got {long:.4f}.")


# --- 3.6 --------------------------------------------------------------------------------------------------------


def budget_solution():
    """The fifth bit divides the error by four. With float32 scales, small groups cost as much and do less."""
    return {"bits": 5, "group_size": 192, "symmetric": False}


def _test_budget(f):
    settings = f()
    expect(
        isinstance(settings, dict) and settings.keys() == {"bits", "group_size", "symmetric"},
        f'Return {{"bits": ..., "group_size": ... or None for a whole row, "symmetric": ...}}; got {settings!r}.',
    )
    weight, x = layer_in_runs()
    size = settings["group_size"]
    q = quantize_tensor(
        weight,
        bits=settings["bits"],
        granularity=PerAxis(0) if size is None else PerGroup(size),
        symmetric=settings["symmetric"],
    )
    error = ((x @ (weight - q.dequantize()).T).square().sum() / (x @ weight.T).square().sum()).item()
    reached = f"{q.bits_per_element:.3f} true bits per weight, output error {error:.4f}"
    expect(q.bits_per_element <= 5.2, f"{reached}: too many bits, 5.2 are allowed. What do the scales take?")
    expect(
        error <= 0.0055,
        f"{reached}: {error / 0.0055:.1f} times the 0.0055 asked for. Compare two ways to spend a bit: on the codes, "
        "or on smaller groups.",
    )
    return f"{reached}."


EXERCISES = {
    "3.1": Exercise(
        "groups",
        _test_groups,
        (
            "Do it for one run of columns first: its minimum and maximum for each row, then a grid for each row.",
            "amin(1, keepdim=True) has the shape (rows, 1), and choose_qparams takes bounds of that shape.",
            "weight.split(group_size, dim=1) gives the runs, the short one last; torch.cat(…, dim=1) puts them back.",
        ),
        groups_solution,
    ),
    "3.2": Exercise(
        "the right axis",
        _test_per_output,
        (
            "PerAxis(axis) names the dimension that is kept: one scale for each index of it.",
            "In [in, out], which dimension counts the outputs?",
            "quantize_tensor(weight, bits=bits, granularity=PerAxis(?)); look at .qparams.scale.shape.",
        ),
        per_output_solution,
    ),
    "3.3": Exercise(
        "two codes in a byte",
        _test_pack4,
        (
            "A byte is 16 · high + low, each from 0 to 15.",
            "codes[0::2] are the first of each pair, codes[1::2] the second; << 4 moves up by four bits.",
            "With an odd number there is one second too few: put a 0 at the end first.",
        ),
        pack4_solution,
    ),
    "3.4": Exercise(
        "true bits per weight",
        _test_true_bits,
        (
            "Count all bits that are stored, then divide by rows · cols.",
            "How many groups has one row? The short one counts.",
            "math.ceil(cols / group_size) groups in a row, each with scale_bits + zero_bits.",
        ),
        true_bits_solution,
    ),
    "3.5": Exercise(
        "three bits",
        _test_unpack3,
        (
            "Code i begins at bit 3·i of the stream: which byte is that, and which bit of it?",
            "Two bytes in a row, low | next << 8, hold every code that begins in the first of them.",
            "Shift right by the bit, and keep three bits with & 7. Mind the byte after the last.",
        ),
        unpack3_solution,
    ),
    "3.6": Exercise(
        "fit the budget",
        _test_budget,
        (
            "First list what the budget allows: for 4 bits, how small can the groups get? For 5 bits?",
            "With float32 scales a group of 32 costs one bit per weight, as much as a fifth bit does.",
            "Loop over bits, group sizes (any number, not only powers of two) and symmetry; keep the best within 5.2.",
        ),
        budget_solution,
    ),
}
