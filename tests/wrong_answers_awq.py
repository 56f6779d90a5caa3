"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab import PerAxis, PerGroup, quantize_tensor
from quantlab.exercises.awq import columns_solution, keep_solution, scaling_solution, search_solution


def _keep(weight, rounded, x, share, *, by=None, largest=True, rows=False, count=None):
    """Exercise 11.1 with one slip."""
    by = x.abs().mean(0) if by is None else by
    count = max(1, round(share * weight.shape[1])) if count is None else count
    chosen, mixed = by.topk(count, largest=largest).indices, rounded.clone()
    where = (chosen,) if rows else (slice(None), chosen)
    mixed[where] = weight[where]
    return mixed


def _keep_in_place(weight, rounded, x, share):
    loudest = x.abs().mean(0).topk(2).indices
    rounded[:, loudest] = weight[:, loudest]
    return rounded


def _keep_values(weight, rounded, x, share):
    """Single weights instead of columns."""
    product = (weight * x.abs().mean(0)).abs()
    return torch.where(product >= product.flatten().topk(48).values[-1], weight, rounded)


def _scale(weight, s, bits, group_size, *, rows=False, back=True, **settings):
    """Exercise 11.2 with one slip."""
    s = s[:, None] if rows else s
    settings = {"bits": bits, "granularity": PerGroup(group_size), "symmetric": False} | settings
    q = quantize_tensor(weight * s, **settings).dequantize()
    return q / s if back else q


def _scale_in_place(weight, s, bits, group_size):
    weight *= s
    return quantize_tensor(weight, bits=bits, granularity=PerGroup(group_size), symmetric=False).dequantize() / s


def _by_weight_error(weight, x, bits, group_size):
    strength = x.abs().mean(0).clamp(min=1e-6)
    candidates = [strength ** (i / 20) for i in range(21)]
    return min(candidates, key=lambda s: (scaling_solution(weight, s, bits, group_size) - weight).norm().item())


def _strength(x):
    return x.abs().mean(0).clamp(min=1e-6)


def _loudest(count):
    return lambda weight, x: x.abs().mean(0).topk(count).indices.tolist()


def _search_in_place(weight, x, bits, group_size):
    s = search_solution(weight, x, bits, group_size)
    weight *= s
    return s


def _one_scale_of_all(weight, s, bits, group_size):
    return _scale(weight, s.mean().expand_as(s), bits, group_size)


WRONG = {
    "11.1": [
        (lambda w, r, x, share: _keep(w, r, x, share, by=w.norm(dim=0)), "the largest *weights*"),
        (lambda w, r, x, share: _keep(w, r, x, share, by=x.mean(0).abs()), "take |x| before the mean"),
        (lambda w, r, x, share: _keep(w, r, x, share, by=x.abs().amax(0)), "One single token"),
        (lambda w, r, x, share: _keep(w, r, x, share, by=x.square().mean(0)), "not of its square"),
        (lambda w, r, x, share: _keep(w, r, x, share, by=x.abs().mean(0).round()), "was expected"),
        (lambda w, r, x, share: _keep(w, r, x, share, largest=False), "the quietest channels"),
        (lambda w, r, x, share: _keep(w, r, x, share, rows=True), "a whole column"),
        (_keep_values, "was expected"),
        (lambda w, r, x, share: _keep(w, r, x, share, count=round(share * w.shape[1])), "At least one column"),
        (lambda w, r, x, share: _keep(w, r, x, share, count=max(1, int(share * w.shape[1]))), "int() cuts off"),
        (lambda w, r, x, share: _keep(w, r, x, share, count=2), "was expected"),
        (lambda w, r, x, share: keep_solution(w, r, x, share)[:, :2], "was expected; got (24, 2)"),
        (lambda w, r, x, share: keep_solution(w, r, x, share) * 1.01, "was expected"),
        (_keep_in_place, "rounded was changed in place"),
    ],
    "11.2": [
        (lambda w, s, b, g: _scale(w, torch.ones_like(s), b, g), "s has had no effect"),
        (_one_scale_of_all, "s has had no effect"),
        (lambda w, s, b, g: _scale(w, s, b, g, back=False), "not divided back"),
        (lambda w, s, b, g: _scale(w, 1 / s, b, g), "The wrong way round"),
        (lambda w, s, b, g: _scale(w, s, b, g, rows=True), "s belongs to the columns"),
        (lambda w, s, b, g: _scale(w, s, b, g) / s, "twice"),
        (lambda w, s, b, g: _scale(w, s, b, g, granularity=PerAxis(0)), "use groups of group_size"),
        (lambda w, s, b, g: _scale(w, s, b, g, symmetric=True), "symmetric=False"),
        (lambda w, s, b, g: _scale(w, s, 4, g), "Use the bits"),
        (lambda w, s, b, g: _scale(w, s, b, 8), "Use the group_size"),
        (lambda w, s, b, g: _scale(w, s.round(decimals=1).clamp(min=0.1), b, g), "was expected"),
        (_scale_in_place, "weight was changed in place"),
    ],
    "11.3": [
        (lambda w, x, b, g: torch.ones(x.shape[1]), "times the least of 21"),
        (lambda w, x, b, g: _strength(x), "times round-to-nearest's"),
        (lambda w, x, b, g: _strength(x) ** 0.4, "times the least of 21"),
        (lambda w, x, b, g: _strength(x) ** 0.1, "times the least of 21"),
        (lambda w, x, b, g: _strength(x) ** 0.85, "was asked for"),
        (_by_weight_error, "times the least of 21"),
        (lambda w, x, b, g: 1 / search_solution(w, x, b, g), "times round-to-nearest's"),
        (lambda w, x, b, g: (x.abs().mean(0) * 1e-9) ** 0.35, "above 0 in every channel"),
        (lambda w, x, b, g: 0.35, "Return the scales"),
        (_search_in_place, "weight was changed in place"),
    ],
    "11.4": [
        (_loudest(4), "its weights lose nothing"),
        (_loudest(7), "are too many"),
        (lambda weight, x: weight.norm(dim=0).topk(4).indices.tolist(), "its weights lose nothing"),
        (lambda weight, x: x.abs().amax(0).topk(4).indices.tolist(), "its weights lose nothing"),
        (lambda weight, x: columns_solution(weight, x)[:1], "a third was asked for"),
        (lambda weight, x: [3, 17, 90, 143], "a third was asked for"),
        (lambda weight, x: [], "times that of keeping none"),
        (lambda weight, x: range(256), "are too many"),
        (lambda weight, x: [256], "Columns are numbers"),
        (lambda weight, x: "3", "Return a list of columns"),
    ],
    "11.5": [
        (search_solution, "times that of AWQ's search"),
        (lambda w, x, b, g: x.abs().mean(0), "times that of AWQ's search"),
        (lambda w, x, b, g: torch.ones(256), "times that of AWQ's search"),
        (lambda w, x, b, g: w.abs().mean(0), "times that of AWQ's search"),
        (lambda w, x, b, g: w, "Return the scales"),
    ],
}
