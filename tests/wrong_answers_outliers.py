"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch


def _plant(gain, weights, channels, factor, *, power=-1, rows=False, first_only=False, everywhere=False):
    stretch = torch.ones_like(gain)
    stretch[channels] = factor
    new = []
    for number, weight in enumerate(weights):
        how = stretch[: len(weight), None] if rows else stretch
        how = torch.ones_like(how) if first_only and number else how
        new.append(weight * how**power)
    return gain * (factor if everywhere else stretch), new


def _plant_in_place(gain, weights, channels, factor):
    gain[channels] *= factor
    for weight in weights:
        weight[:, channels] /= factor
    return gain, weights


def _split(
    x, weight, threshold, *, signed=False, twice=False, loud=False, safe=True, tensor=False, values=False, fixed=False
):
    """Exercise 9.2 with one slip."""
    threshold = 6.0 if fixed else threshold
    outliers = ((x if signed else x.abs()) >= threshold).any(0)
    if values:  # single values go to float instead of columns
        mask = x.abs() >= threshold
        ordinary, floats = x.masked_fill(mask, 0.0), x * mask
    else:
        ordinary = x if twice else x.masked_fill(outliers, 0.0)
        floats = x * outliers
    x_scale = (x if loud else ordinary).abs().amax(1, keepdim=True) / 127
    x_scale = x_scale.max() if tensor else x_scale
    x_scale = x_scale.clamp(min=1e-30) if safe else x_scale
    w_scale = weight.abs().amax(1, keepdim=True) / 127
    sums = torch.round(ordinary / x_scale) @ torch.round(weight / w_scale).T
    return sums * x_scale * w_scale.T + floats @ weight.T


def _split_in_place(x, weight, threshold):
    outliers = (x.abs() >= threshold).any(0)
    floats = x * outliers
    x[:, outliers] = 0
    return floats @ weight.T + _split(x, weight, 1e9)


def _split_float_weight(x, weight, threshold):
    ordinary = x.masked_fill((x.abs() >= threshold).any(0), 0.0)
    scale = (ordinary.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return (torch.round(ordinary / scale) * scale + x - ordinary) @ weight.T


def _split_one_weight_scale(x, weight, threshold):
    step = weight.abs().max() / 127
    floats = x * (x.abs() >= threshold).any(0)
    scale = ((x - floats).abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    return torch.round((x - floats) / scale) * scale @ (torch.round(weight / step) * step).T + floats @ weight.T


def _scales(largest_x, largest_w, alpha):
    return largest_x**alpha / largest_w ** (1 - alpha)


def _only_inputs(weight, x, weight_bits, activation_bits):
    """The alpha that makes the inputs easiest, as if the weights cost nothing."""
    return 1.0


WRONG = {
    "9.1": [
        (lambda g, w, c, f: _plant(g, w, c, f, power=1), "divide by the factor"),
        (lambda g, w, c, f: _plant(g, w, c, f, power=0), "yours are as they were"),
        (lambda g, w, c, f: _plant(g, w[1:2], c, f), "results were expected"),
        (lambda g, w, c, f: _plant(g, w, c, f, first_only=True), "not the first alone"),
        (lambda g, w, c, f: _plant(g, w, c, f, everywhere=True), "multiplied all of them"),
        (lambda g, w, c, f: _plant(g, w, c, 1 / f), "The gain is to grow, and the weights to shrink"),
        (_plant_in_place, "changed in place"),
        (lambda g, w, c, f: _plant(g, w, c, 50.0), "was expected"),
        (lambda g, w, c, f: _plant(g, w, c[:1], f), "was expected"),
    ],
    "9.2": [
        (lambda x, w, t: x @ w.T, "That is the float product"),
        (lambda x, w, t: _split(x, w, 1e9), "Everything goes through 8-bit codes"),
        (lambda x, w, t: _split(x, w, t, signed=True), "may be negative"),
        (lambda x, w, t: _split(x, w, t, values=True), "as a whole"),
        (lambda x, w, t: _split(x, w, t, twice=True), "was expected"),
        (lambda x, w, t: _split(x, w, t, twice=True, loud=True), "was expected"),
        (lambda x, w, t: _split(x, w, t, loud=True), "for nothing"),
        (lambda x, w, t: _split(x, w, t, tensor=True), "one for all"),
        (lambda x, w, t: _split(x, w, t, safe=False), "0/0 is NaN"),
        (lambda x, w, t: _split(x, w, t, fixed=True), "is 6.0 written in"),
        (_split_in_place, "changed in place"),
        (_split_float_weight, "The weight must be rounded"),
        (_split_one_weight_scale, "Each row of the weight"),
    ],
    "9.3": [
        (lambda x, w, a: 1 / _scales(x, w, a), "That is 1/s"),
        (lambda x, w, a: _scales(x, w, 1 - a), "was expected"),  # the same at 0.5, then 0 and 1 exchanged
        (lambda x, w, a: x**a * w ** (1 - a), "divide by its power"),
        (lambda x, w, a: x**a, "The weights have a say"),
        (lambda x, w, a: _scales(x, w, 0.5), "is 0.5 written in"),
        (_scales, "A silent channel"),
        (lambda x, w, a: torch.nan_to_num(_scales(x, w, a), posinf=1.0), "was expected"),
        (lambda x, w, a: _scales(x.max(), w.max(), a), "A tensor of shape (3,)"),
    ],
    "9.4": [
        (lambda: 6.0, "of the columns go to float"),
        (lambda: 100.0, "still in the integers"),
        (lambda: 60.0, "still in the integers"),
        (lambda: float("inf"), "still in the integers"),
        (lambda: -1, "a positive number"),
        (lambda: "6", "a positive number"),
    ],
    "9.5": [
        (lambda w, x, wb, ab: 0.5, "times the least output error"),
        (_only_inputs, "times the least output error"),
        (lambda w, x, wb, ab: 0.6, "W4A8"),
        (lambda w, x, wb, ab: 0.3, "W8A8"),
        (lambda w, x, wb, ab: wb / (wb + ab), "times the least output error"),
        (lambda w, x, wb, ab: -0.2, "in 0..1"),
    ],
}
