"""Exercises of chapter 13: quantization-aware training."""

import copy
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.checks import Exercise, expect
from quantlab.qat import convert, fake_quant_layers, prepare_qat


def ste_solution(x, scale, zero_point, qmin, qmax):
    """The value of the grid point, the gradient of x where the code was not clamped."""
    code = torch.round(x / scale) + zero_point
    value = scale * (code.clamp(qmin, qmax) - zero_point)
    through = x * ((code >= qmin) & (code <= qmax))
    return through + (value - through).detach()


def _test_ste(f):
    # No x lies at a tie: there right answers differ.
    x = torch.tensor([-9.0, -2.2, -1.3, -0.6, 0.1, 0.4, 1.1, 1.4, 1.7, 9.0], requires_grad=True)
    before = x.detach().clone()
    for grid in ((0.5, 0, -4, 3), (0.5, 3, 0, 7), (0.75, 1, 0, 3)):
        y, right = f(x, *grid), torch.fake_quantize_per_tensor_affine(x, *grid)
        expect(torch.is_tensor(y) and y.shape == x.shape, "Return the rounded tensor, in the shape of x.")
        given, goal = [round(v, 2) for v in y.tolist()], [round(v, 2) for v in right.tolist()]
        expect(
            torch.allclose(y, right, atol=1e-5),
            f"The values should be those of the grid, scale * (code - zero_point): {goal}, not {given}. "
            f"(scale, zero_point, qmin, qmax) = {grid}",
        )
        expect(
            y.requires_grad,
            "No gradient can reach x: the result does not depend on it any more. What must be outside of detach()?",
        )
        _expect_slope(x, torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(right.sum(), x)[0])
    expect(torch.equal(x.detach(), before), "x itself was changed. Return a new tensor.")


def _expect_slope(x, slope, goal):
    """1 where the code was not clamped, 0 where it was."""
    expect(
        bool(slope.any()),
        "The gradient is 0 everywhere: autograd has differentiated the staircase. Add what rounding changed as a "
        "constant: .detach().",
    )
    inside = goal == 1
    expect(
        torch.allclose(slope[inside], torch.ones(int(inside.sum()))),
        f"Where nothing is clamped the gradient should be 1; it is {slope[inside].tolist()}.",
    )
    expect(
        not slope[~inside].all(),
        "The gradient is 1 everywhere, also where the code was clamped. There it must be 0: moving such a weight "
        "a little changes nothing.",
    )
    expect(
        torch.equal(slope, goal),
        f"The gradient should be {goal.tolist()} at {x.tolist()}, not {slope.tolist()}. A value is clamped "
        "if its *code*, zero_point included, lies outside qmin..qmax.",
    )


def step_solution(weight, x, target, scale, rate):
    """The gradient is taken at the rounded weights, the step is made by the float ones."""
    rounded = scale * torch.round(weight / scale)
    gradient = 2 * (x @ rounded.T - target).T @ x / target.numel()
    return weight - rate * gradient


def _test_step(f):
    random = torch.Generator().manual_seed(4)
    x, weight = torch.randn(12, 5, generator=random), torch.randn(3, 5, generator=random)
    target, before = x @ torch.randn(5, 3, generator=random), weight.clone()
    new, right = f(weight, x, target, 0.5, 0.01), step_solution(weight, x, target, 0.5, 0.01)
    expect(torch.equal(weight, before), "weight itself was changed. Return a new tensor.")
    expect(torch.is_tensor(new) and new.shape == weight.shape, "Return the new float weight, (out, in).")
    moved, wanted = new.detach() - weight, right - weight
    rounded = 0.5 * torch.round(weight / 0.5)
    expect(bool(moved.any()), "No weight has moved: the true gradient of a staircase is 0. Go straight through it.")
    expect(
        not torch.allclose(new, 0.5 * torch.round(new / 0.5), atol=1e-6),
        "The weights you return lie on the grid. Then a small step is rounded away for ever: keep the float weights, "
        "and round them in the forward pass only.",
    )
    expect(
        not torch.allclose(new.detach() - rounded, wanted, atol=1e-6),
        "The step was made from the rounded weights: what the float weight remembered of earlier small steps is lost.",
    )
    expect(not torch.allclose(moved, -wanted, atol=1e-6), "This step goes uphill: subtract rate times the gradient.")
    plain = -0.01 * 2 * (x @ weight.T - target).T @ x / target.numel()
    expect(
        not torch.allclose(moved, plain, atol=1e-6),
        "This is the gradient at the float weights. The model will run on rounded ones: round before you multiply.",
    )
    ratio = (moved * wanted).sum() / wanted.square().sum()
    expect(
        torch.allclose(moved, wanted, atol=1e-6),
        f"The step should be -rate times the gradient of the *mean* squared error; yours is {ratio:.3g} times it "
        "(measured along the right one).",
    )


def distill_solution(teacher_logits, student_logits):
    """Over the vocabulary a sum, over the positions a mean; the teacher is a constant."""
    log_p = teacher_logits.detach().log_softmax(-1)
    log_q = student_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _test_distill(f):
    random = torch.Generator().manual_seed(5)
    teacher = (2 * torch.randn(2, 3, 7, generator=random)).requires_grad_()
    student = (2 * torch.randn(2, 3, 7, generator=random)).requires_grad_()
    loss = f(teacher, student)
    expect(torch.is_tensor(loss) and loss.ndim == 0, "Return one number, a tensor without dimensions.")
    right = distill_solution(teacher, student)
    expect(
        abs(f(teacher, teacher + 3.0).item()) < 1e-5,
        f"Logits that differ by a constant are the same prediction, so the loss should be 0; it is "
        f"{f(teacher, teacher + 3.0).item():.3g}. Are both made probabilities by softmax over the vocabulary?",
    )
    backwards = distill_solution(student, teacher)
    expect(
        not torch.isclose(loss, backwards, rtol=1e-4),
        "This is KL(student || teacher). The teacher's probabilities weigh the sum: KL(teacher || student).",
    )
    expect(
        torch.isclose(loss, right, rtol=1e-4),
        f"Expected {right.item():.4f}, got {loss.item():.4f}, {loss.item() / right.item():.3g} times it. Sum over the "
        "7 tokens of the vocabulary, mean over the 2 × 3 positions.",
    )
    given = torch.autograd.grad(loss, (teacher, student), allow_unused=True) if loss.requires_grad else (None, None)
    into_teacher, into_student = given
    expect(into_student is not None, "No gradient reaches the student's logits.")
    expect(
        into_teacher is None or not into_teacher.any(),
        "A gradient flows into the teacher as well: it is a constant here. detach() it.",
    )


@cache
def practice_network():
    """(net, x, labels, fresh x, fresh labels): three spirals, told apart by a float network of three layers."""
    (x, labels), (fresh, fresh_labels) = _spirals(512, 0), _spirals(2048, 1)
    with torch.random.fork_rng():  # the layers draw their weights from the global generator
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    _train(net, x, labels, steps=300, rate=1e-2)
    return net, x, labels, fresh, fresh_labels


def _spirals(count: int, seed: int):
    random = torch.Generator().manual_seed(seed)
    labels, along = torch.randint(3, (count,), generator=random), torch.rand(count, generator=random)
    angle, radius = 2 * math.pi * (labels / 3 + 0.8 * along), 0.15 + 0.85 * along
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return points + 0.03 * torch.randn(count, 2, generator=random), labels


def _train(net, x, labels, *, steps: int, rate: float):
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = F.cross_entropy(net(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_solution(net, x, labels):
    """All three layers rounded to 2 bits a row from the first step on, and a rate that falls to 0."""
    student = prepare_qat(net, bits=2, group_size=None, layers=["0", "2", "4"])
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad])
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 200)
        loss = F.cross_entropy(student(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


GOAL = 0.95


def _accuracy(net, x, labels) -> float:
    with torch.no_grad():
        return (net(x).argmax(1) == labels).float().mean().item()


def _test_train(f):
    net, x, labels, fresh, fresh_labels = practice_network()
    before = copy.deepcopy(net.state_dict())
    student = f(net, x, labels)
    same = all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    net.load_state_dict(before)
    expect(same, "The float network itself was changed. prepare_qat gives a new one: train that.")
    expect(isinstance(student, nn.Module), f"Return the trained network, not {type(student).__name__}.")
    plain = convert(student)[0] if fake_quant_layers(student) else student
    weights = [layer.weight.detach() for layer in plain.modules() if isinstance(layer, nn.Linear)]
    largest = max(len(row.unique()) for weight in weights for row in weight)
    expect(
        largest <= 4,
        f"Two bits a row are four values, and a row of your network has {largest}. All three layers, "
        'layers=["0", "2", "4"], and one scale a row, group_size=None?',
    )
    nearest = prepare_qat(net, bits=2, group_size=None, layers=["0", "2", "4"])
    rounded, reached = (_accuracy(m, fresh, fresh_labels) for m in (nearest, plain))
    expect(
        reached >= GOAL,
        f"{reached:.1%} of fresh points are told right; at least {GOAL:.0%} was asked for, and rounding alone has "
        f"{rounded:.1%}. Was the rounding there while it was trained, did a step follow each gradient, and were there "
        "enough steps, at a rate that falls?",
    )
    whole = _accuracy(net, fresh, fresh_labels)
    return f"{reached:.1%} of fresh points, round-to-nearest {rounded:.1%}, float {whole:.1%}."


EXERCISES = {
    "13.1": Exercise(
        "straight through",
        _test_ste,
        (
            "Compute the value first: code = round(x / scale) + zero_point, clamped, then scale * (code - zero_point).",
            "a + (b - a).detach() has the value of b and the gradient of a. Which a has slope 1 inside and 0 outside?",
            "a = x * ((code >= qmin) & (code <= qmax)), with the code before clamping; b is the value.",
        ),
        ste_solution,
    ),
    "13.2": Exercise(
        "one training step",
        _test_step,
        (
            "Two weights are at play: the rounded one computes the output, the float one makes the step.",
            "The gradient of the mean squared error of x @ R.T is 2 (x @ R.T - target).T @ x / target.numel().",
            "R = scale * round(weight / scale), and the result is weight - rate * gradient.",
        ),
        step_solution,
    ),
    "13.3": Exercise(
        "learn from the float model",
        _test_distill,
        (
            "KL(p || q) = Σ p (log p - log q), p the teacher's probabilities, q the student's.",
            "log_softmax(-1) of both; the sum goes over the vocabulary, the last dimension.",
            "Then the mean over all positions; and teacher_logits.detach().",
        ),
        distill_solution,
    ),
    "13.4": Exercise(
        "two bits, trained",
        _test_train,
        (
            'prepare_qat(net, bits=2, group_size=None, layers=["0", "2", "4"]) rounds all three layers.',
            "Then an ordinary loop over its parameters: cross entropy, zero_grad, backward, step. Adam suits.",
            "Two hundred steps at a rate of 3e-3 that falls to 0: optimizer.param_groups[0]['lr'] = ... in each step.",
        ),
        train_solution,
    ),
}
