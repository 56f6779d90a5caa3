"""Exercises of chapter 14: learned steps, three values, two values."""

import torch

from quantlab.exercises.material import layer_to_train, off_ties, uniform
from quantlab.granularity import PerAxis, quantize_tensor
from quantlab.judging import Exercise, as_tensor, call, expect, with_gradient
from quantlab.train.few_levels import pack_ternary
from quantlab.train.lsq import LSQ


def lsq_solution(v, step, qmin, qmax):
    """Values, and the derivatives by v and by the step, with the mask of the paper."""
    ratio = v / step
    inside = (ratio > qmin) & (ratio < qmax)
    code = torch.round(ratio).clamp(qmin, qmax)
    by_step = torch.where(inside, code - ratio, code)
    return step * code, inside.to(v.dtype), by_step


def _lsq_cases(random):
    """Inside, in the half step beyond each end, and far outside; no ties."""
    for qmin, qmax in ((-2, 1), (-4, 3), (-1, 1), (0, 7)):
        step = uniform(random, 0.1, 2.0)
        beyond = torch.tensor([qmin - 0.3, qmin - 0.7, qmax + 0.3, qmax + 0.7])
        yield step * torch.cat([off_ties(random, 12, qmin - 3, qmax + 3), beyond]), step, qmin, qmax


def _lsq_edges():
    """The ends themselves, which the paper calls clipped, in numbers that binary holds exactly."""
    yield 0.25 * torch.tensor([-2.0, -1.25, 0.0, 0.75, 1.0, 1.25]), 0.25, -2, 1
    yield 0.5 * torch.tensor([-4.0, -3.75, -9.0, 2.75, 3.0, 7.0]), 0.5, -4, 3


def ternary_solution(x):
    """mean |x| as scale, three codes, and a gradient that passes unchanged."""
    scale = x.detach().abs().mean().clamp(min=1e-30)
    value = scale * torch.round(x.detach() / scale).clamp(-1, 1)
    return x + (value - x).detach()


def _ternary_cases(random):
    """Of several shapes and sizes, and not centred."""
    for shape in ((40,), (6, 9), (3, 4, 5)):
        yield (uniform(random, 0.01, 9.0) * (torch.randn(shape, generator=random) + uniform(random, -0.5, 0.5)),)


def _ternary_edges():
    yield (torch.tensor([0.1, -0.9, 0.4, 1.0]),)
    yield (torch.zeros(4),)


def unpack_solution(packed, count):
    """The digits to base 3 of each byte, the lowest first."""
    digits = packed.long()[:, None] // 3 ** torch.arange(5) % 3
    return (digits - 1).flatten()[:count].to(torch.int8)


def _unpack_cases(random):
    for count in (7, 31, 1000):
        yield pack_ternary(torch.randint(-1, 2, (count,), generator=random, dtype=torch.int8)), count


def _unpack_edges():
    yield pack_ternary(torch.tensor([1, 0, -1, -1, 0], dtype=torch.int8)), 5
    yield pack_ternary(torch.tensor([1], dtype=torch.int8)), 1


def scale_solution(w, codes):
    """Set the derivative of Σ (w - s c)² by s to 0: s = Σ w c / Σ c²."""
    return (w * codes).sum() / codes.square().sum().clamp(min=1)


def _scale_cases(random):
    """Codes of two values, of three, of four, that do not belong to w at all, and a single one."""
    w = uniform(random, 0.05, 5.0) * (torch.randn(200, generator=random) + uniform(random, -0.5, 0.5))
    size = w.abs().mean()
    yield w, w.sign()
    yield w, torch.round(w / size).clamp(-1, 1)
    yield w, torch.round(w / size).clamp(-2, 1)
    yield w, torch.randint(-4, 4, (200,), generator=random).float()
    yield w, torch.zeros(200).index_fill(0, torch.randint(200, (1,), generator=random), -1.0)


def _scale_edges():
    yield torch.tensor([0.5, -1.0, 2.0]), torch.zeros(3)


def train_solution(weight, x):
    """Adam on weights and steps together, on the output error, at a falling rate."""
    trained, lsq = weight.clone().requires_grad_(), LSQ(weight, bits=2, granularity=PerAxis(0))
    optimizer, target = torch.optim.Adam([trained, lsq.step], lr=1e-3), x @ weight.T
    for i in range(300):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - i / 300)
        optimizer.zero_grad()
        (x @ lsq(trained).T - target).square().mean().backward()
        optimizer.step()
    return trained.detach(), lsq.scale.detach()


GOAL = 0.4


def _test_train(f):
    weight, x, fresh = layer_to_train()
    new, step = _trained(call(EXERCISES["14.5"], f, (weight, x)), weight)

    def error(rounded):
        return ((fresh @ (weight - rounded).T).square().sum() / (fresh @ weight.T).square().sum()).item()

    reached = error(step * torch.round(new / step).clamp(-2, 1))
    nearest = error(quantize_tensor(weight, bits=2, granularity=PerAxis(0), symmetric=True).dequantize())
    still = torch.allclose(new, weight, atol=1e-6)
    expect(
        reached <= GOAL * nearest,
        f"At 2 bits, one step a row, your weight has {reached / nearest:.3f} of round-to-nearest's output error on "
        f"fresh inputs; at most {GOAL} was asked for. "
        + (
            "The weight itself has not moved: train it together with the steps."
            if still
            else "More steps, or another learning rate that falls towards the end?"
        ),
    )
    return f"Output error {reached:.4f}, {reached / nearest:.2f} of round-to-nearest's {nearest:.4f}."


def _trained(found, weight):
    """(weight, steps as a column) of an answer, in float32, of any container."""
    two = isinstance(found, tuple | list) and len(found) == 2
    new, step = (as_tensor(t) for t in found) if two else (None, None)
    expect(
        new is not None and step is not None and new.shape == weight.shape,
        "Return two tensors: the trained weight, (out, in), and its steps, one for each row.",
    )
    expect(step.numel() == len(weight), f"There are {len(weight)} rows and {step.numel()} steps: one for each row.")
    expect(bool((step > 0).all()), "Some steps are not above 0. LSQ's `scale` is the magnitude of its `step`.")
    return new.float(), step.float().reshape(-1, 1)


EXERCISES = {
    "14.1": Exercise(
        "the gradient of the step",
        hints=(
            "Three cases: clipped low, inside, clipped high. Write the value of each as a function of the step first.",
            "Inside, v̂ = step * round(v / step): product rule, and the derivative of round(u) is that of u.",
            "By the step: round(v / step) - v / step inside, qmin or qmax where v / step is at or beyond the end.",
        ),
        solution=lsq_solution,
        cases=_lsq_cases,
        edges=_lsq_edges,
        slips={
            "Your derivative by the step is the code. That is the slope of the staircase *between* its jumps. Send the "
            "gradient straight through the rounding, and v / step brings a second term.": (
                "torch.where(inside, code - ratio, code)", "code"
            ),
            "Inside the grid your derivative by the step has the wrong sign.": ("code - ratio", "ratio - code"),
            "Where v is clipped your derivative by the step is 0. But the clipped value is step * qmax (or "
            "step * qmin): it moves with the step.": ("inside, code - ratio, code)", "inside, code - ratio, 0 * code)"),
            "Far outside the grid the value is step * qmin or step * qmax, whose derivative by the step does not "
            "depend on v.": ("torch.where(inside, code - ratio, code)", "code - ratio"),
            "The derivative by the step is one number for each value; they are summed later.": (
                "inside.to(v.dtype), by_step", "inside.to(v.dtype), by_step.sum()"
            ),
            "The paper asks whether v / step lies between qmin and qmax *before* it is rounded.": (
                "inside = (ratio > qmin) & (ratio < qmax)",
                "inside = (torch.round(ratio) >= qmin) & (torch.round(ratio) <= qmax)",
            ),
            "The ends themselves count as clipped: v / step ≤ qmin or ≥ qmax.": (
                "(ratio > qmin) & (ratio < qmax)", "(ratio >= qmin) & (ratio <= qmax)"
            ),
            "The values are clamped: step * clamp(round(v / step), qmin, qmax).": (
                "step * code, inside", "step * torch.round(ratio), inside"
            ),
            "The values are multiples of the step, not codes.": ("return step * code", "return code"),
            "The derivative by v is 0 where v is clipped.": ("inside.to(v.dtype)", "torch.ones_like(v)"),
            "The derivative by v of the staircase is 0; send the gradient straight through: 1 inside.": (
                "inside.to(v.dtype)", "torch.zeros_like(v)"
            ),
            "The derivative by v is 1 inside: v / step is multiplied by step again.": (
                "inside.to(v.dtype)", "inside.to(v.dtype) / step"
            ),
            "Round to the nearest code; floor is not round.": ("torch.round(ratio)", "torch.floor(ratio)"),
            "The order is values, by_v, by_step.": ("inside.to(v.dtype), by_step", "by_step, inside.to(v.dtype)"),
        },
    ),
    "14.2": Exercise(
        "three values",
        hints=(
            "One number for the whole tensor, then codes -1, 0, 1: divide, round, clamp.",
            "a + (b - a).detach() has the value of b and the gradient of a.",
            "scale = x.detach().abs().mean(), kept above 0; a is x, b is scale * round(x / scale).clamp(-1, 1).",
        ),
        solution=ternary_solution,
        cases=_ternary_cases,
        edges=_ternary_edges,
        use=with_gradient,
        slips={
            "The scale is the mean of |x|, not its largest.": (".abs().mean()", ".abs().max()"),
            "Take |x| before the mean: values of both signs cancel.": (".abs().mean()", ".mean().abs()"),
            "The scale is the mean of |x|, not the standard deviation.": (
                "x.detach().abs().mean()", "x.detach().std()"
            ),
            "One scale for the whole tensor, not one for each row.": (
                ".abs().mean()", ".abs().mean(-1, keepdim=True)"
            ),
            "Codes below -1 or above 1 must be clamped.": (".clamp(-1, 1)", ""),
            "A value becomes 0 where |x| is below *half* a scale: round to the nearest, do not cut off.": (
                "torch.round", "torch.trunc"
            ),
            "No value became 0: these are two values, not three.": (
                "torch.round(x.detach() / scale).clamp(-1, 1)", "x.detach().sign()"
            ),
            "Codes were returned: the values are codes times scale.": ("value = scale * ", "value = "),
            "No gradient can reach x: the result does not depend on it any more.": (
                "x + (value - x).detach()", "value.detach()"
            ),
            "The gradient is 0 everywhere: autograd has differentiated the staircase. Add what rounding changed as a "
            "constant.": ("x + (value - x).detach()", "value + 0 * x"),
            "The gradient passes unchanged everywhere, also where the code was clamped.": (
                "x + (value - x).detach()",
                "(t := x * (x.detach().abs() <= 1.5 * scale)) + (value - t).detach()",
            ),
            "Where |x| is large your gradient is 0: it passes unchanged everywhere.": (
                "x + (value - x).detach()", "(t := x * (x.detach().abs() <= scale)) + (value - t).detach()"
            ),
            "The scale is a constant for the gradient: detach() it.": (
                "x.detach().abs()", "x.abs()", "scale * torch.round(x.detach() / scale)",
                "scale * torch.round(x.detach() / scale.detach())", "x + (value - x).detach()",
                "value + x - x.detach()",
            ),
            "A tensor of zeros should stay 0, and yours becomes 0 / 0. Keep the scale above 0.": (
                ".clamp(min=1e-30)", ""
            ),
        },
    ),
    "14.3": Exercise(
        "five codes out of a byte",
        hints=(
            "A byte is a number with five digits to base 3. How do you get the last digit of a number to base 10?",
            "Digit i of a byte is byte // 3**i % 3. Do it for all bytes at once: a column of bytes, a row of powers.",
            "packed.long()[:, None] // 3 ** torch.arange(5) % 3, then codes from digits, in one row, cut to count.",
        ),
        solution=unpack_solution,
        cases=_unpack_cases,
        edges=_unpack_edges,
        slips={
            "These are the digits 0, 1, 2. The codes are -1, 0, 1.": ("(digits - 1)", "digits"),
            "The digits come in the wrong order: the first code is the digit of 3**0.": (
                "(digits - 1)", "(digits.flip(1) - 1)"
            ),
            "The last byte may hold fewer than five codes that count: cut to count.": ("[:count]", ""),
            "The codes that count are the first ones, not the last.": ("[:count]", "[-count:]"),
            "The digits are to base 3, not to base 4, as 2-bit codes would be.": (
                "3 ** torch.arange(5) % 3", "4 ** torch.arange(5) % 4"
            ),
            "Row after row: the five codes of a byte stand side by side.": (".flatten()", ".T.flatten()"),
            "Divide by 3**i and then take what is left of a division by 3.": (" % 3", ""),
            "Take what is left of a division by 3 only after dividing by 3**i.": (
                "packed.long()[:, None] // 3 ** torch.arange(5) % 3",
                "packed.long()[:, None] % 3 ** (torch.arange(5) + 1)",
            ),
            "A byte holds five codes.": ("arange(5)", "arange(4)"),
            "Codes are digits less 1.": ("(digits - 1)", "(1 - digits)"),
        },
    ),
    "14.4": Exercise(
        "the best scale",
        hints=(
            "The codes are fixed, so Σ (w - s c)² is a parabola in s.",
            "Its derivative by s is -2 Σ c (w - s c). Where is it 0?",
            "s Σ c² = Σ w c. If all codes are 0, both sums are 0.",
        ),
        solution=scale_solution,
        cases=_scale_cases,
        edges=_scale_edges,
        slips={
            "If all codes are 0, return 0, not 0 / 0.": (".clamp(min=1)", ""),
            "mean |w| is the answer for two values only: which weights count here?": (
                "(w * codes).sum() / codes.square().sum().clamp(min=1)", "w.abs().mean() * (codes != 0).any()"
            ),
            "Divide by Σ code², not by Σ |code|: they agree only for codes -1, 0 and 1.": (
                "codes.square().sum()", "codes.abs().sum()"
            ),
            "Divide by Σ code², not by the number of weights: codes of 0 do not count.": (
                "codes.square().sum().clamp(min=1)", "w.numel()"
            ),
            "A code that is 0 says nothing of the scale, and w / 0 is no number.": (
                "(w * codes).sum() / codes.square().sum().clamp(min=1)", "(w / codes).mean()"
            ),
            "The mean of w / code weighs all alike; in the squared error large codes count more.": (
                "(w * codes).sum() / codes.square().sum().clamp(min=1)",
                "torch.where(codes != 0, w / codes.where(codes != 0, torch.ones_like(codes)), 0.0).sum()"
                " / (codes != 0).sum().clamp(min=1)",
            ),
            "The square of Σ code is not Σ code².": ("codes.square().sum()", "codes.sum().square()"),
            "The scale may be negative, where codes and weights have other signs: no absolute values.": (
                "(w * codes).sum()", "(w * codes).abs().sum()"
            ),
            "That is the scale of the largest weight, which covers all; the squared error is asked for.": (
                "(w * codes).sum() / codes.square().sum().clamp(min=1)",
                "w.abs().max() / codes.abs().max().clamp(min=1) * (codes != 0).any()",
            ),
        },
    ),
    "14.5": Exercise(
        "two bits, steps learned",
        test=_test_train,
        hints=(
            "The loss is the mean squared difference of two outputs: the given weight's, and the rounded one's.",
            "lsq = LSQ(weight, bits=2, granularity=PerAxis(0)); lsq(trained) rounds, and lsq.step is a parameter too.",
            "Adam([trained, lsq.step]) at 1e-3 over 300 steps, its rate falling to 0; return trained and lsq.scale.",
        ),
        solution=train_solution,
        seconds=120.0,
    ),
}  # fmt: skip
