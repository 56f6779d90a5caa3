"""Exercises of chapter 14: learned steps, three values, two values."""

import torch

from quantlab.checks import Exercise, expect
from quantlab.exercises.material import layer_to_train
from quantlab.granularity import PerAxis, quantize_tensor
from quantlab.train.few_levels import pack_ternary, ternary
from quantlab.train.lsq import LSQ


def lsq_solution(v, step, qmin, qmax):
    """Values, and the derivatives by v and by the step, with the mask of the paper."""
    ratio = v / step
    low, high = ratio <= qmin, ratio >= qmax
    code = torch.round(ratio).clamp(qmin, qmax)
    by_step = torch.where(low | high, code, code - ratio)
    return step * code, (~(low | high)).to(v.dtype), by_step


def _test_lsq(f):
    # Ends of the grid, half a step beyond them, far outside, ties, and ordinary values.
    ratios = torch.tensor([-9.0, -2.25, -2.0, -1.375, -0.25, 0.0, 0.125, 0.75, 1.0, 1.25, 2.625, 3.0, 3.25, 7.5])
    for step, qmin, qmax in ((1.0, -2, 1), (0.5, -4, 3), (0.25, -1, 1)):
        v = step * ratios
        before = v.clone()
        found, right = f(v, step, qmin, qmax), lsq_solution(v, step, qmin, qmax)
        expect(torch.equal(v, before), "v itself was changed. Return new tensors.")
        expect(
            isinstance(found, tuple | list) and len(found) == 3,
            "Return three tensors: the rounded values, their derivative by v, their derivative by the step.",
        )
        values, by_v, by_step = (torch.as_tensor(t).detach().float() for t in found)
        expect(
            all(t.shape == v.shape for t in (values, by_v, by_step)),
            f"Each of the three should have the shape of v, {tuple(v.shape)}: one derivative for each value. They are "
            "summed later.",
        )
        where = f"(step {step}, codes {qmin}..{qmax})"
        expect(
            torch.allclose(values, right[0]), f"The values should be step * clamp(round(v / step), qmin, qmax) {where}."
        )
        _explain_by_step(v / step, by_step, right[2], qmin, qmax, where)
        expect(
            torch.equal(by_v, right[1]),
            f"The derivative by v should be 1 inside and 0 where v is clipped; for v / step = {ratios.tolist()} yours "
            f"is {by_v.tolist()} {where}.",
        )


def _explain_by_step(ratio, found, right, qmin, qmax, where):
    code = torch.round(ratio).clamp(qmin, qmax)
    inside = (ratio > qmin) & (ratio < qmax)
    far = (ratio < qmin - 0.5) | (ratio > qmax + 0.5)
    expect(
        not torch.allclose(found[inside], code[inside]),
        "Your derivative by the step is the code. That is the slope of the staircase *between* its jumps. Send the "
        "gradient straight through the rounding, and v / step brings a second term.",
    )
    expect(
        not torch.allclose(found[inside], -right[inside]),
        "Inside the grid your derivative by the step has the wrong sign.",
    )
    expect(
        torch.allclose(found[inside], right[inside], atol=1e-6),
        f"Inside the grid the derivative by the step should lie within ±0.5; for v / step = "
        f"{ratio[inside].tolist()[:4]} you give {found[inside].tolist()[:4]} {where}.",
    )
    expect(
        bool(found[far].any()),
        "Where v is clipped your derivative by the step is 0. But the clipped value is step * qmax (or step * qmin): "
        "it moves with the step.",
    )
    expect(
        torch.allclose(found[far], right[far]),
        f"Far outside the grid the value is step * qmin or step * qmax, whose derivative by the step does not "
        f"depend on v; you give {found[far].tolist()} {where}.",
    )
    expect(
        torch.allclose(found, right, atol=1e-6),
        "Right far inside and far outside, not between: the paper asks whether v / step lies in qmin..qmax, before it "
        "is rounded, and counts the ends themselves as clipped.",
    )


def ternary_solution(x):
    """mean |x| as scale, three codes, and a gradient that passes unchanged."""
    scale = x.detach().abs().mean().clamp(min=1e-30)
    value = scale * torch.round(x.detach() / scale).clamp(-1, 1)
    return x + (value - x).detach()


def _test_ternary(f):
    random = torch.Generator().manual_seed(3)
    for x in (torch.tensor([0.1, -0.9, 0.4, 1.0]), torch.randn(40, 30, generator=random)):
        x, before = x.clone().requires_grad_(), x.clone()
        y, right = f(x), ternary(x)
        expect(torch.equal(x.detach(), before), "x itself was changed. Return a new tensor.")
        expect(torch.is_tensor(y) and y.shape == x.shape, "Return the rounded tensor, in the shape of x.")
        used = y.detach().unique()
        expect(
            len(used) <= 3, f"Your result has {len(used)} different values. Codes below -1 or above 1 must be clamped."
        )
        expect(bool((used == 0).any()), "No value became 0. Of the three values one is 0: x / scale is rounded.")
        scale = used.max().item()
        expect(
            abs(scale / right.max().item() - 1) < 1e-5,
            f"Your scale is {scale:.4f}; the mean of |x| is {right.max().item():.4f}.",
        )
        expect(
            torch.allclose(y.detach(), right.detach(), atol=1e-6),
            "The scale is right, the codes are not: a value becomes 0 where |x| is below *half* a scale.",
        )
        expect(y.requires_grad, "No gradient can reach x: the result does not depend on it any more.")
        (slope,) = torch.autograd.grad(y.sum(), x)
        expect(
            torch.allclose(slope, torch.ones_like(slope), atol=1e-6),
            f"The gradient should pass unchanged, as 1 everywhere; yours runs from {slope.min().item():.3g} to "
            f"{slope.max().item():.3g}. Is the scale a constant, and the rounding gone straight through?",
        )
    zero = f(torch.zeros(4))
    expect(
        bool((zero == 0).all()),
        f"A tensor of zeros should stay 0; yours becomes {zero.tolist()}: 0 / 0. Keep the scale above 0.",
    )


def unpack_solution(packed, count):
    """The digits to base 3 of each byte, the lowest first."""
    digits = packed.long()[:, None] // 3 ** torch.arange(5) % 3
    return (digits - 1).flatten()[:count].to(torch.int8)


def _test_unpack(f):
    random = torch.Generator().manual_seed(4)
    for count in (5, 1, 7, 1000):
        codes = torch.randint(-1, 2, (count,), generator=random, dtype=torch.int8)
        packed = pack_ternary(codes)
        found = torch.as_tensor(f(packed, count))
        expect(
            found.shape == (count,),
            f"Of {len(packed)} bytes and count={count} you made a tensor of the shape {tuple(found.shape)}; the last "
            "byte may hold fewer than five codes that count.",
        )
        first = f"the byte {packed[0].item()} holds {codes[:5].tolist()}, you give {found[:5].tolist()}"
        expect(not torch.equal(found, codes + 1), "These are the digits 0, 1, 2. The codes are -1, 0, 1.")
        expect(
            bool((found.abs() <= 1).all()),
            f"Codes are -1, 0 and 1: {first}. A digit to base 3 is what is left of a division by 3.",
        )
        backwards = codes[:5].flip(0)
        expect(
            count < 5 or torch.equal(codes[:5], backwards) or not torch.equal(found[:5].to(torch.int8), backwards),
            f"The digits come in the wrong order: {first}. The first code is the digit of 3**0.",
        )
        expect(torch.equal(found.to(torch.int8), codes), f"Not the codes that were packed: {first}.")


def scale_solution(w, codes):
    """Set the derivative of Σ (w - s c)² by s to 0: s = Σ w c / Σ c²."""
    return (w * codes).sum() / codes.square().sum().clamp(min=1)


def _test_scale(f):
    random = torch.Generator().manual_seed(5)
    w = torch.randn(200, generator=random) * 0.1 + 0.02
    three = torch.where(w.abs() < 0.06, 0.0, w.sign())
    cases = {"two values": w.sign(), "three values": three, "codes -2..1": torch.round(w / 0.08).clamp(-2, 1)}
    for title, codes in cases.items():
        before = w.clone(), codes.clone()
        found, right = torch.as_tensor(f(w, codes)), scale_solution(w, codes)
        expect(
            torch.equal(w, before[0]) and torch.equal(codes, before[1]), "w or codes were changed. Return a new number."
        )
        expect(found.numel() == 1, f"Return one scale, not {found.numel()}.")
        expect(bool(torch.isfinite(found)), f"Your scale is {found.item()}. Do you divide by codes that are 0?")
        found = found.item()
        expect(
            abs(found - right.item()) < 1e-5,
            f"{title}: with your scale {found:.4f} the squared error is {(w - found * codes).square().sum():.4f}, and "
            f"there is a scale with {(w - right * codes).square().sum():.4f}."
            + (
                " mean |w| is the answer for two values only: which weights count here?"
                if abs(found - w.abs().mean().item()) < 1e-6
                else ""
            ),
        )
    nothing = torch.as_tensor(f(w, torch.zeros(200))).item()
    expect(nothing == 0, f"If all codes are 0, return 0, not {nothing}.")


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
    before = weight.clone()
    found = f(weight, x)
    expect(torch.equal(weight, before), "weight itself was changed. Train a copy: weight.clone().")
    expect(
        isinstance(found, tuple | list) and len(found) == 2 and found[0].shape == weight.shape,
        "Return two tensors: the trained weight, (out, in), and its steps, one for each row.",
    )
    new, step = found[0].detach(), found[1].detach()
    expect(step.numel() == len(weight), f"There are {len(weight)} rows and {step.numel()} steps: one for each row.")
    expect(bool((step > 0).all()), "Some steps are not above 0. LSQ's `scale` is the magnitude of its `step`.")
    step = step.reshape(-1, 1)

    def error(rounded):
        return ((fresh @ (weight - rounded).T).square().sum() / (fresh @ weight.T).square().sum()).item()

    reached = error(step * torch.round(new / step).clamp(-2, 1))
    nearest = error(quantize_tensor(weight, bits=2, granularity=PerAxis(0), symmetric=True).dequantize())
    still = torch.allclose(new, weight, atol=1e-6)
    expect(
        reached <= GOAL * nearest,
        f"At 2 bits, one step a row, your weight has {reached / nearest:.2f} of round-to-nearest's output error on "
        f"fresh inputs; at most {GOAL} was asked for. "
        + (
            "The weight itself has not moved: train it together with the steps."
            if still
            else "More steps, or another learning rate that falls towards the end?"
        ),
    )
    return f"Output error {reached:.4f}, {reached / nearest:.2f} of round-to-nearest's {nearest:.4f}."


EXERCISES = {
    "14.1": Exercise(
        "the gradient of the step",
        _test_lsq,
        (
            "Three cases: clipped low, inside, clipped high. Write the value of each as a function of the step first.",
            "Inside, v̂ = step * round(v / step): product rule, and the derivative of round(u) is that of u.",
            "By the step: round(v / step) - v / step inside, qmin or qmax where v / step is at or beyond the end.",
        ),
        lsq_solution,
    ),
    "14.2": Exercise(
        "three values",
        _test_ternary,
        (
            "One number for the whole tensor, then codes -1, 0, 1: divide, round, clamp.",
            "a + (b - a).detach() has the value of b and the gradient of a.",
            "scale = x.detach().abs().mean(), kept above 0; a is x, b is scale * round(x / scale).clamp(-1, 1).",
        ),
        ternary_solution,
    ),
    "14.3": Exercise(
        "five codes out of a byte",
        _test_unpack,
        (
            "A byte is a number with five digits to base 3. How do you get the last digit of a number to base 10?",
            "Digit i of a byte is byte // 3**i % 3. Do it for all bytes at once: a column of bytes, a row of powers.",
            "packed.long()[:, None] // 3 ** torch.arange(5) % 3, then codes from digits, in one row, cut to count.",
        ),
        unpack_solution,
    ),
    "14.4": Exercise(
        "the best scale",
        _test_scale,
        (
            "The codes are fixed, so Σ (w - s c)² is a parabola in s.",
            "Its derivative by s is -2 Σ c (w - s c). Where is it 0?",
            "s Σ c² = Σ w c. If all codes are 0, both sums are 0.",
        ),
        scale_solution,
    ),
    "14.5": Exercise(
        "two bits, steps learned",
        _test_train,
        (
            "The loss is the mean squared difference of two outputs: the given weight's, and the rounded one's.",
            "lsq = LSQ(weight, bits=2, granularity=PerAxis(0)); lsq(trained) rounds, and lsq.step is a parameter too.",
            "Adam([trained, lsq.step]) at 1e-3 over 300 steps, its rate falling to 0; return trained and lsq.scale.",
        ),
        train_solution,
    ),
}
