"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab import PerAxis, PerGroup, quantize_tensor
from quantlab.exercises.awq import keep_solution, scaling_solution, search_solution
from quantlab.exercises.material import layer_with_peaks, planted_layer


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
    weight, x = layer_with_peaks()
    return x.abs().mean(0).topk(count).indices.tolist()


WRONG = {
    "11.1": [
        (lambda w, r, x, share: _keep(w, r, x, share, by=w.norm(dim=0)), "the largest *weights*"),
        (lambda w, r, x, share: _keep(w, r, x, share, by=x.mean(0).abs()), "take |x| before the mean"),
        (lambda w, r, x, share: _keep(w, r, x, share, by=x.abs().amax(0)), "one single token"),
        (lambda w, r, x, share: _keep(w, r, x, share, largest=False), "the quietest channels"),
        (lambda w, r, x, share: _keep(w, r, x, share, rows=True), "a whole column"),
        (_keep_values, "a whole column"),
        (lambda w, r, x, share: _keep(w, r, x, share, count=int(share * w.numel() / 24 * 2)), "you kept 4"),
        (lambda w, r, x, share: _keep(w, r, x, share, count=round(share * 20)), "at least one column"),
        (lambda w, r, x, share: _keep(w, r, x, share, by=torch.arange(20.0)), "by mean |x|"),
        (lambda w, r, x, share: keep_solution(w, r, x, share)[:, :2], "Return the whole weight"),
        (lambda w, r, x, share: keep_solution(w, r, x, share) * 1.01, "neither float nor rounded"),
        (_keep_in_place, "changed in place"),
    ],
    "11.2": [
        (lambda w, s, b, g: _scale(w, torch.ones_like(s), b, g), "s has had no effect"),
        (lambda w, s, b, g: _scale(w, s, b, g, back=False), "not divided back"),
        (lambda w, s, b, g: _scale(w, 1 / s, b, g), "The wrong way round"),
        (lambda w, s, b, g: _scale(w, s, b, g, rows=True), "s belongs to the columns"),
        (lambda w, s, b, g: _scale(w, s, b, g) / s, "twice"),
        (lambda w, s, b, g: _scale(w, s, b, g, granularity=PerAxis(0)), "Groups of group_size"),
        (lambda w, s, b, g: _scale(w, s, b, g, symmetric=True), "symmetric=False"),
        (lambda w, s, b, g: _scale(w, s, 4, g), "use the bits"),
        (lambda w, s, b, g: _scale(w, s, b, 8), "use the group_size"),
        (lambda w, s, b, g: _scale(w, s.round(decimals=1).clamp(min=0.1), b, g), "s itself"),
        (_scale_in_place, "changed in place"),
    ],
    "11.3": [
        (lambda w, x, b, g: torch.ones(x.shape[1]), "times the least of 21"),
        (lambda w, x, b, g: _strength(x), "times round-to-nearest's"),
        (lambda w, x, b, g: _strength(x) ** 0.4, "planted outliers"),
        (lambda w, x, b, g: _strength(x) ** 0.1, "times the least of 21"),
        (lambda w, x, b, g: _strength(x) ** 0.85, "3 bits"),
        (_by_weight_error, "times the least of 21"),
        (lambda w, x, b, g: 1 / search_solution(w, x, b, g), "times round-to-nearest's"),
        (lambda w, x, b, g: (x.abs().mean(0) * 1e-9) ** 0.35, "above 0 in every channel"),
        (lambda w, x, b, g: 0.35, "Return the scales"),
    ],
    "11.4": [
        (lambda: _loudest(4), "its weights lose nothing"),
        (lambda: _loudest(7), "are too many"),
        (lambda: layer_with_peaks()[0].norm(dim=0).topk(4).indices.tolist(), "its weights lose nothing"),
        (lambda: layer_with_peaks()[1].abs().amax(0).topk(4).indices.tolist(), "its weights lose nothing"),
        (list, "times that of keeping none"),
        (lambda: range(256), "are too many"),
    ],
    "11.5": [
        (search_solution, "times that of AWQ's search"),
        (lambda w, x, b, g: x.abs().mean(0), "times that of AWQ's search"),
        (lambda w, x, b, g: torch.ones(256), "times that of AWQ's search"),
        (lambda w, x, b, g: w.abs().mean(0), "times that of AWQ's search"),
        (lambda w, x, b, g: planted_layer()[0], "Return the scales"),
    ],
}
