"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import math

import numpy as np
import torch

from quantlab import PerAxis, PerGroup, PerTensor, choose_qparams, fake_quantize, quantize_tensor
from quantlab.exercises.granularity import unpack3_solution


def rounded(x, granularity, bits):
    return quantize_tensor(x, bits=bits, granularity=granularity, symmetric=False, signed=False).dequantize()


def without_the_tail(weight, bits, size):
    whole = weight[:, : weight.shape[1] // size * size]
    return rounded(whole, PerGroup(size), bits)


def tail_as_it_is(weight, bits, size):
    whole = weight.shape[1] // size * size
    return torch.cat([rounded(weight[:, :whole], PerGroup(size), bits), weight[:, whole:]], dim=1)


def tail_with_the_last_scale(weight, bits, size):
    """The grid of the group before is used on."""
    if size >= weight.shape[1] or weight.shape[1] % size == 0:
        return rounded(weight, PerGroup(size), bits)
    whole = weight.shape[1] // size * size
    before = weight[:, whole - size : whole]
    qp = choose_qparams(before.amin(1, keepdim=True), before.amax(1, keepdim=True), qmin=0, qmax=2**bits - 1)
    head = rounded(weight[:, :whole], PerGroup(size), bits)
    return torch.cat([head, fake_quantize(weight[:, whole:], qp)], dim=1)


def over_the_row_ends(weight, bits, size):
    """reshape(-1, size) of all weights, the end of one row together with the start of the next."""
    return rounded(weight.reshape(1, -1), PerGroup(size), bits).reshape(weight.shape)


def not_widened(weight, bits, size):
    parts = []
    for part in weight.split(size, dim=1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
        parts.append(torch.round((part - low) / scale) * scale + low)
    return torch.cat(parts, dim=1)


def in_place(weight, bits, size):
    weight.copy_(rounded(weight, PerGroup(size), bits))
    return weight


def padded(codes):
    return torch.cat([codes, codes.new_zeros(len(codes) % 2)])


def two_in_a_byte(packed, count):
    return [code for byte in packed.tolist() for code in (byte & 7, byte >> 3 & 7)][:count]


def from_the_high_end(packed, count):
    bits = np.unpackbits(packed.numpy())[: 3 * count].reshape(count, 3)
    return torch.tensor(bits @ [4, 2, 1])


def all_that_is_there(packed, count):
    stream = int.from_bytes(bytes(packed.tolist()), "little")
    return [stream >> 3 * i & 7 for i in range(len(packed) * 8 // 3 + 1)]


def in_columns(weight, bits, size):
    return rounded(weight.T, PerGroup(size), bits).T


def symmetric_groups(weight, bits, size):
    return quantize_tensor(weight, bits=bits, granularity=PerGroup(size)).dequantize()


def grid_of_columns(weight, bits, size):
    """One grid for a run of columns, all rows together."""
    return torch.cat([rounded(part, PerTensor(), bits) for part in weight.split(size, dim=1)], dim=1)


WRONG = {
    "3.1": [
        (lambda w, b, g: rounded(w, PerTensor(), b), "Each group has its own minimum"),
        (lambda w, b, g: rounded(w, PerAxis(0), b), "one grid for each row"),
        (in_columns, "not in a column"),
        (over_the_row_ends, "run on into the next row"),
        (without_the_tail, "What becomes of the last columns"),
        (tail_as_it_is, "short last group is rounded too"),
        (tail_with_the_last_scale, "that of the group before"),
        (not_widened, "hold 0 first"),
        (lambda w, b, g: rounded(w, PerGroup(max(g // 2, 1)), b), "half as long"),
        (lambda w, b, g: w.clone(), "Nothing was rounded"),
        (in_place, "changed in place"),
        (grid_of_columns, "all rows together"),
        (symmetric_groups, "was expected"),
        (lambda w, b, g: rounded(w, PerGroup(g), 4), "was expected"),
        (lambda w, b, g: rounded(w, PerGroup(8), b), "was expected"),
        (lambda w, b, g: rounded(w, PerGroup(g), b).flatten(), "of shape"),
    ],
    "3.2": [
        (lambda w, b: rounded(w, PerAxis(0), b), "outputs are the columns"),
        (lambda w, b: rounded(w, PerTensor(), b), "How many outputs"),
        (lambda w, b: rounded(w, PerGroup(8), b), "was expected"),
        (lambda w, b: rounded(w.T, PerAxis(0), b), "of shape"),
        (lambda w, b: rounded(w, PerAxis(1), b).T, "as weight is"),
        (lambda w, b: rounded(w.T, PerGroup(5), b).T, "was expected"),
        (lambda w, b: quantize_tensor(w, bits=b, granularity=PerAxis(1)), "symmetric=False"),
        (lambda w, b: w, "Nothing was rounded"),
        (lambda w, b: rounded(w, PerAxis(1), 4), "bits that are asked for vary"),
        (lambda w, b: rounded(w.abs(), PerAxis(1), b), "was expected"),
    ],
    "3.3": [
        (lambda c: padded(c)[0::2] << 4 | padded(c)[1::2], "the first goes low"),
        (lambda c: padded(c)[: -(-len(c) // 2)] | padded(c)[-(-len(c) // 2) :] << 4, "neighbours share a byte"),
        (lambda c: c[: len(c) // 2 * 2 : 2] | c[1::2] << 4, "a byte for itself"),
        (lambda c: padded(c).int()[0::2] | padded(c).int()[1::2] << 4, "return uint8"),
        (lambda c: c, "Two codes share one byte"),
        (lambda c: padded(c)[0::2] + padded(c)[1::2] * 15, "16 · high + low"),
        (lambda c: padded(c)[0::2] | padded(c)[1::2] << 4 & 127, "mind the highest bit"),
        (lambda c: padded(c).flip(0)[0::2] | padded(c).flip(0)[1::2] << 4, "was expected"),
        (lambda c: padded(c)[0::2] | padded(c)[1::2], "was expected"),
        (lambda c: torch.tensor(int(c[0]) | int(c[-1]) << 4, dtype=torch.uint8), "of shape"),
    ],
    "3.4": [
        (lambda r, c, b, g, s, z: b, "The scales are stored too"),
        (lambda r, c, b, g, s, z: b + s + z, "shared by its group"),
        (lambda r, c, b, g, s, z: b + s / g, "was expected"),
        (lambda r, c, b, g, s, z: b + (s + z) / g, "A short group's scale"),
        (lambda r, c, b, g, s, z: b + math.ceil(r * c / g) * (s + z) / (r * c), "runs on into the next row"),
        (lambda r, c, b, g, s, z: b + max(c // g, 1) * (s + z) / c, "short last group has a scale"),
        (lambda r, c, b, g, s, z: (r * c * b + math.ceil(c / g) * (s + z)) / (r * c), "that of one row times rows"),
        (lambda r, c, b, g, s, z: f"{b + s / g} bits", "A number was expected"),
        (lambda r, c, b, g, s, z: b + math.ceil(c / g) * s / c, "zero points are stored too"),
        (lambda r, c, b, g, s, z: 4 + math.ceil(c / g) * (s + z) / c, "was expected"),
        (lambda r, c, b, g, s, z: b + math.ceil(c / g) * (16 + z) / c, "was expected"),
        (lambda r, c, b, g, s, z: math.ceil(b + math.ceil(c / g) * (s + z) / c), "was expected"),
    ],
    "3.5": [
        (two_in_a_byte, "part of it is in the next"),
        (from_the_high_end, "from its high end"),
        (all_that_is_there, "was expected"),
        (lambda p, n: [int(p[3 * i // 8]) >> 3 * i % 8 & 7 for i in range(n)], "part of it is in the next byte"),
        (lambda p, n: [int(p[3 * i // 8]) >> 3 * i % 8 & 3 for i in range(n)], "was expected"),
        (lambda p, n: [int(p[0]) & 7, *[int(p.numpy().tobytes()[-1])] * (n - 1)], "was expected"),
        (lambda p, n: unpack3_solution(p, n).flip(0), "was expected"),
        (lambda p, n: unpack3_solution(p, len(p) * 8 // 3), "are no codes"),
    ],
    "3.6": [
        (lambda: {"bits": 4, "group_size": 128, "symmetric": False}, "times the 0.0055"),
        (lambda: {"bits": 4, "group_size": 32, "symmetric": False}, "Compare two ways"),
        (lambda: {"bits": 5, "group_size": None, "symmetric": False}, "times the 0.0055"),
        (lambda: {"bits": 5, "group_size": 64, "symmetric": True}, "too many bits"),
        (lambda: {"bits": 5}, "Return {"),
        (lambda: (5, 192, False), "Return {"),
        (lambda: {"bits": 5, "group_size": 0, "symmetric": False}, "from 1 on"),
        (lambda: {"bits": 4.5, "group_size": 64, "symmetric": False}, "from 2 to 8"),
    ],
}
