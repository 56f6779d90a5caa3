"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab.exercises.learned_steps import (
    lsq_solution,
    scale_solution,
    ternary_solution,
    train_solution,
    unpack_solution,
)
from quantlab.granularity import PerAxis
from quantlab.train.few_levels import ternary
from quantlab.train.lsq import LSQ


def _lsq(change):
    """The solution with its derivative by the step changed: change(ratio, code, clipped, by_step)."""

    def answer(v, step, qmin, qmax):
        values, by_v, by_step = lsq_solution(v, step, qmin, qmax)
        ratio = v / step
        return values, by_v, change(ratio, torch.round(ratio).clamp(qmin, qmax), by_v == 0, by_step)

    return answer


def _mask_by_code(v, step, qmin, qmax):
    ratio = v / step
    code = torch.round(ratio)
    inside = (code >= qmin) & (code <= qmax)
    code = code.clamp(qmin, qmax)
    return step * code, inside.float(), torch.where(inside, code - ratio, code)


def _unclamped(v, step, qmin, qmax):
    return step * torch.round(v / step), *lsq_solution(v, step, qmin, qmax)[1:]


def _all_ones(v, step, qmin, qmax):
    values, by_v, by_step = lsq_solution(v, step, qmin, qmax)
    return values, torch.ones_like(by_v), by_step


def _summed(v, step, qmin, qmax):
    values, by_v, by_step = lsq_solution(v, step, qmin, qmax)
    return values, by_v, by_step.sum()


def _in_place(v, step, qmin, qmax):
    right = lsq_solution(v, step, qmin, qmax)
    v /= step
    return right


def _three(x, scale, *, low=-1, high=1, half=True):
    """Exercise 14.2 with another scale, clamp or threshold."""
    scale = scale.detach().clamp(min=1e-30)
    ratio = x.detach() / scale
    codes = torch.round(ratio) if half else torch.trunc(ratio)
    return x + (scale * codes.clamp(low, high) - x).detach()


def _leaky(x):
    """The scale is not detached."""
    scale = x.abs().mean().clamp(min=1e-30)
    code = torch.round(x.detach() / scale.detach()).clamp(-1, 1)
    return scale * code + x - x.detach()


def _masked(x):
    scale = x.detach().abs().mean().clamp(min=1e-30)
    inside = x * ((x.detach() / scale).abs() <= 1.5)
    return inside + (ternary(x.detach()) - inside).detach()


def _nan(x):
    scale = x.detach().abs().mean()
    value = scale * torch.round(x.detach() / scale).clamp(-1, 1)
    return x + (value - x).detach()


def _step_in_place(x):
    y = ternary_solution(x)
    x.data.clamp_(-0.001, 0.001)
    return y


def _digits(packed, count, *, base=3, order=1, shift=-1):
    digits = packed.long()[:, None] // base ** torch.arange(5)[::1] % base
    return ((digits if order == 1 else digits.flip(1)) + shift).flatten()[:count]


def _divided(w, codes):
    return (w / codes).mean()


def _untrained(weight, x):
    return weight.clone(), LSQ(weight, bits=2, granularity=PerAxis(0)).scale


def _weights_only(weight, x):
    """The float weight of the training, on min-max steps."""
    step = weight.abs().amax(1) / 2
    return train_solution(weight, x)[0], step


def _steps_of_one(weight, x):
    return train_solution(weight, x)[0], torch.tensor(0.05)


def _ignores_what_comes_in(x):
    class Three(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return ternary(x.detach())

        @staticmethod
        def backward(ctx, upstream):
            return torch.ones_like(upstream)

    return Three.apply(x)


def _per_row(x):
    scale = x.detach().abs().mean(-1, keepdim=True).clamp(min=1e-30)
    return x + (scale * torch.round(x.detach() / scale).clamp(-1, 1) - x).detach()


def _negative(weight, x):
    trained, step = train_solution(weight, x)
    return trained, -step


def _train_in_place(weight, x):
    found = train_solution(weight.clone(), x)
    weight.copy_(found[0])
    return found


WRONG = {
    "14.1": [
        (_lsq(lambda ratio, code, clipped, by_step: torch.where(clipped, by_step, code)), "is the code"),
        (_lsq(lambda ratio, code, clipped, by_step: torch.where(clipped, by_step, -by_step)), "wrong sign"),
        (_lsq(lambda ratio, code, clipped, by_step: torch.where(clipped, 0, by_step)), "it moves with the step"),
        (_lsq(lambda ratio, code, clipped, by_step: code - ratio), "does not depend on v"),
        (_lsq(lambda ratio, code, clipped, by_step: torch.where(clipped, by_step, 2 * by_step)), "Result 3 of 3"),
        (_mask_by_code, "before* it is rounded"),
        (_unclamped, "The values are clamped"),
        (_all_ones, "is 0 where v is clipped"),
        (_summed, "summed later"),
        (lambda v, s, a, b: lsq_solution(v, s, a, b)[2], "3 results were expected"),
        (lambda v, s, a, b: lsq_solution(v, s, -2, 1), "was expected"),
        (lambda v, s, a, b: lsq_solution(v, 0.25, a, b), "was expected"),
        (_in_place, "v was changed in place"),
    ],
    "14.2": [
        (lambda x: _three(x, x.abs().max()), "not its largest"),
        (lambda x: _three(x, x.abs().mean(), low=-9, high=9), "must be clamped"),
        (lambda x: _three(x, x.abs().mean(), half=False), "below *half* a scale"),
        (lambda x: x + (x.detach().abs().mean() * x.detach().sign() - x).detach(), "No value became 0"),
        (lambda x: ternary(x.detach()), "No gradient can reach x"),
        (_leaky, "is a constant"),
        (_masked, "passes unchanged"),
        (_nan, "0 / 0"),
        (_per_row, "not one for each row"),
        (_ignores_what_comes_in, "Result 2 of 2"),
        (lambda x: ternary_solution(x)[:1], "of shape"),
        (_step_in_place, "x was changed in place"),
    ],
    "14.3": [
        (lambda packed, count: _digits(packed, count, shift=0), "digits 0, 1, 2"),
        (lambda packed, count: _digits(packed, count, order=-1), "wrong order"),
        (lambda packed, count: _digits(packed, count, base=4), "not to base 4"),
        (lambda packed, count: packed.long()[:, None].repeat(1, 5).flatten()[:count], "was expected"),
        (lambda packed, count: _digits(packed, 10**9), "fewer than five codes"),
        (lambda packed, count: unpack_solution(packed, count).roll(1), "was expected"),
        (lambda packed, count: unpack_solution(packed, count).unsqueeze(0), "of shape (5,) was expected"),
    ],
    "14.4": [
        (lambda w, codes: w.abs().mean(), "was expected"),
        (lambda w, codes: w.abs().mean() * (codes != 0).any(), "for two values only"),
        (lambda w, codes: w.abs().max(), "was expected"),
        (lambda w, codes: (w / codes).mean(), "w / 0 is no number"),
        (lambda w, codes: (w * codes).sum() / codes.square().sum(), "If all codes are 0"),
        (lambda w, codes: (w * codes).mean(), "codes of 0 do not count"),
        (lambda w, codes: (w * codes).sum() / codes.abs().sum().clamp(min=1), "only for codes -1, 0 and 1"),
        (lambda w, codes: w.abs(), "of shape ()"),
        (lambda w, codes: scale_solution(w, codes.mul_(1.0).add_(1)), "codes was changed in place"),
    ],
    "14.5": [
        (_untrained, "The weight itself has not moved"),
        (_weights_only, "More steps, or another learning rate"),
        (_steps_of_one, "one for each row"),
        (_negative, "not above 0"),
        (lambda weight, x: train_solution(weight, x)[0], "Return two tensors"),
        (_train_in_place, "weight was changed in place"),
    ],
}
