"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch


def q4_0(x, scale):
    return scale, (torch.round(x / scale) + 8).clamp(0, 15)


def searched(x, importance, starts):
    """The scale and codes of the start with the least weighted error, without solving for the scale."""
    tried = [x[x.abs().argmax()] / -start for start in starts]
    codes = [torch.round(x / scale).clamp(-8, 7) for scale in tried]
    errors = [(importance * (x - s * c) ** 2).sum() for s, c in zip(tried, codes, strict=True)]
    best = int(torch.stack(errors).argmin())
    return tried[best], codes[best]


def halves(block):
    return block[:4].view(torch.float16).float()


WRONG = {
    "19.1": [
        (lambda b: halves(b)[0] * torch.cat([b[4:] >> 4, b[4:] & 15]) + halves(b)[1], "the first 16 weights"),
        (lambda b: halves(b)[0] * torch.stack([b[4:] & 15, b[4:] >> 4], 1).flatten() + halves(b)[1], "share a byte"),
        (lambda b: halves(b)[1] * torch.cat([b[4:] & 15, b[4:] >> 4]) + halves(b)[0], "The scale comes first"),
        (lambda b: halves(b)[0] * torch.cat([b[4:] & 15, b[4:] >> 4]), "was left out"),
        (lambda b: halves(b)[0] * b[4:] + halves(b)[1], "shape"),
    ],
    "19.2": [
        (lambda x: q4_0(x, x.abs().max() / 7), "one step more than 7"),
        (lambda x: q4_0(x, x.abs().max() / 8), "Keep the sign"),
        (lambda x: q4_0(x, x.abs().max() / 7.5), "own convention"),
        (lambda x: (x[x.abs().argmax()] / -8, torch.round(x / (x[x.abs().argmax()] / -8))), "was expected"),
    ],
    "19.3": [
        (lambda code, block, scale, size, parts: code + parts * scale / block, "float16 numbers are bits too"),
        (lambda code, block, scale, size, parts: code + scale / block + 16 / size, "both stored"),
        (lambda code, block, scale, size, parts: code, "was expected"),
        (lambda code, block, scale, size, parts: code + parts * 16 / block, "was expected"),
    ],
    "19.4": [
        (lambda x, q, w: (x * q).sum() / (q * q).sum(), "importance was left out"),
        (lambda x, q, w: (w * x * q).sum() / (q * q).sum(), "below the line"),
        (lambda x, q, w: (w * x).sum() / (w * q).sum(), "codes in both terms"),
        (lambda x, q, w: x.abs().max() / 8, "was expected"),
    ],
    "19.5": [
        (lambda x, w: searched(x, w, (8.0,)), "1.1 was asked for"),
        (lambda x, w: searched(x, torch.ones_like(x), (7.0, 7.5, 8.0, 8.5)), "times"),
        (lambda x, w: (x.abs().max() / 7, x / (x.abs().max() / 7)), "whole numbers"),
        (lambda x, w: (x.abs().max() / 20, torch.round(x / (x.abs().max() / 20))), "lie in -8..7"),
        (lambda x, w: x, "Return two things"),
    ],
}
