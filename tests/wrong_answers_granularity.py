"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import math

import numpy as np
import torch

from quantlab import PerAxis, PerGroup, PerTensor, choose_qparams, fake_quantize, quantize_tensor


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


WRONG = {
    "3.1": [
        (lambda w, b, g: rounded(w, PerTensor(), b), "own grid; half a step is the most"),
        (lambda w, b, g: rounded(w, PerAxis(0), b), "own grid; half a step is the most"),
        (lambda w, b, g: rounded(w.T, PerGroup(g), b).T, "own grid; half a step is the most"),
        (over_the_row_ends, "as one group"),
        (without_the_tail, "what becomes of the last 6"),
        (tail_as_it_is, "short last group"),
        (tail_with_the_last_scale, "short last group"),
        (not_widened, "hold 0 first"),
        (lambda w, b, g: rounded(w, PerGroup(g // 2), b), "as one group"),
        (lambda w, b, g: w.clone(), "Was it rounded"),
        (in_place, "has changed"),
        (lambda w, b, g: rounded(w, PerGroup(g), b).tolist(), "Return a tensor"),
    ],
    "3.2": [
        (lambda w, b: quantize_tensor(w, bits=b, granularity=PerAxis(0)), "30 outputs and 50 inputs"),
        (lambda w, b: quantize_tensor(w, bits=b, granularity=PerTensor()), "How many scales"),
        (lambda w, b: quantize_tensor(w, bits=b, granularity=PerGroup(8)), "How many scales"),
        (lambda w, b: quantize_tensor(w.T, bits=b, granularity=PerAxis(0)), "come back as that"),
        (lambda w, b: rounded(w.T, PerGroup(5), b).T, "no more"),
        (lambda w, b: w, "different values"),
    ],
    "3.3": [
        (lambda c: padded(c)[0::2] << 4 | padded(c)[1::2], "the first goes low"),
        (lambda c: padded(c)[: -(-len(c) // 2)] | padded(c)[-(-len(c) // 2) :] << 4, "neighbours share a byte"),
        (lambda c: c[: len(c) // 2 * 2 : 2] | c[1::2] << 4, "a byte for itself"),
        (lambda c: padded(c).int()[0::2] | padded(c).int()[1::2] << 4, "return uint8"),
        (lambda c: c, "Two codes share one byte"),
        (lambda c: padded(c)[0::2] + padded(c)[1::2] * 15, "33 is 1 + 2"),
        (lambda c: padded(c)[0::2] | padded(c)[1::2] << 4 & 127, "mind the high bits"),
        (lambda c: (padded(c)[0::2] | padded(c)[1::2] << 4).tolist(), "Return a tensor"),
    ],
    "3.4": [
        (lambda r, c, b, g, s, z: b, "The scales are stored too"),
        (lambda r, c, b, g, s, z: b + s + z, "shared by its group"),
        (lambda r, c, b, g, s, z: b + s / g, "zero point for each group"),
        (lambda r, c, b, g, s, z: b + (s + z) / g, "A short group's scale"),
        (lambda r, c, b, g, s, z: b + math.ceil(r * c / g) * (s + z) / (r * c), "runs on into the next row"),
        (lambda r, c, b, g, s, z: b + max(c // g, 1) * (s + z) / c, "A short group's scale"),
        (lambda r, c, b, g, s, z: (r * c * b + math.ceil(c / g) * (s + z)) / (r * c), "shared by its group"),
        (lambda r, c, b, g, s, z: f"{b + s / g} bits", "Return a number"),
    ],
    "3.5": [
        (two_in_a_byte, "part of it is in the next byte"),
        (from_the_high_end, "from its high end"),
        (all_that_is_there, "count was 2"),
        (lambda p, n: [int(p[3 * i // 8]) >> 3 * i % 8 & 7 for i in range(n)], "part of it is in the next byte"),
        (lambda p, n: [int(p[3 * i // 8]) >> 3 * i % 8 & 3 for i in range(n)], "low three bits"),
        (lambda p, n: [int(p[0]) & 7, *[int(p.numpy().tobytes()[-1])] * (n - 1)], "low three bits"),
    ],
    "3.6": [
        (lambda: {"bits": 4, "group_size": 128, "symmetric": False}, "times the 0.0055"),
        (lambda: {"bits": 4, "group_size": 32, "symmetric": False}, "Compare two ways"),
        (lambda: {"bits": 5, "group_size": None, "symmetric": False}, "times the 0.0055"),
        (lambda: {"bits": 5, "group_size": 64, "symmetric": True}, "too many bits"),
        (lambda: {"bits": 5}, "Return {"),
        (lambda: (5, 192, False), "Return {"),
        (lambda: {"bits": 5, "group_size": 0, "symmetric": False}, "ValueError"),
    ],
}
