"""Exercises of chapter 13: quantization-aware training."""

import copy
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.exercises.material import off_ties, uniform
from quantlab.judging import Exercise, call, expect, is_changed, with_gradient
from quantlab.plots import ERROR, QUANTIZED
from quantlab.qat import convert, fake_quant_layers, prepare_qat


def ste_solution(x, scale, zero_point, qmin, qmax):
    """The value of the grid point, the gradient of x where the code was not clamped."""
    code = torch.round(x / scale) + zero_point
    value = scale * (code.clamp(qmin, qmax) - zero_point)
    through = x * ((code >= qmin) & (code <= qmax))
    return through + (value - through).detach()


def _ste_cases(random):
    """No ties, where right answers differ; in the half step beyond each end, and beyond that."""
    for zero_point, qmin, qmax in ((0, -4, 3), (3, 0, 7), (1, 0, 3), (-5, -8, 7)):
        scale, low, high = uniform(random, 0.1, 2.0), qmin - zero_point, qmax - zero_point
        ends = torch.tensor([low - 0.3, low - 0.7, high + 0.3, high + 0.7])
        yield scale * torch.cat([off_ties(random, 14, low - 3, high + 3), ends]), scale, zero_point, qmin, qmax


def step_solution(weight, x, target, scale, rate):
    """The gradient is taken at the rounded weights, the step is made by the float ones."""
    rounded = scale * torch.round(weight / scale)
    gradient = 2 * (x @ rounded.T - target).T @ x / target.numel()
    return weight - rate * gradient


def _step_cases(random):
    """Layers of several shapes; inputs that are not centred, steps that are seen."""
    for out, inside, tokens in ((3, 5, 12), (7, 4, 6), (2, 9, 30)):
        scale, rate = uniform(random, 0.2, 1.5), uniform(random, 0.05, 0.3)
        x = torch.randn(tokens, inside, generator=random) + 0.3
        target = x @ torch.randn(inside, out, generator=random) + torch.randn(tokens, out, generator=random)
        yield scale * off_ties(random, out * inside, -3, 3).view(out, inside), x, target, scale, rate


def distill_solution(teacher_logits, student_logits):
    """Over the vocabulary a sum, over the positions a mean; the teacher is a constant."""
    log_p = teacher_logits.detach().log_softmax(-1)
    log_q = student_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _distill_cases(random):
    for shape in ((2, 3, 7), (3, 5, 4), (1, 6, 11)):
        yield tuple(2 * torch.randn(shape, generator=random) + uniform(random, -3, 3) for _ in range(2))


def _with_gradients(answer, teacher_logits, student_logits):
    """(loss, gradient of the student's logits, gradient of the teacher's) for a gradient of 1.7 that comes in."""
    leaves = [t.detach().clone().requires_grad_() for t in (teacher_logits, student_logits)]
    loss = answer(*leaves)
    changed = is_changed([teacher_logits, student_logits], [t.detach() for t in leaves])
    expect(not changed, "The logits were changed in place: they belong to the caller.")
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return loss, None, torch.zeros_like(teacher_logits)
    of_teacher, of_student = torch.autograd.grad(loss, leaves, torch.full_like(loss, 1.7), allow_unused=True)
    return loss, of_student, torch.zeros_like(teacher_logits) if of_teacher is None else of_teacher


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


def _use_training(answer, net, x, labels):
    """The answer's network, trained on a net that must be as it was afterwards."""
    before = copy.deepcopy(net.state_dict())
    student = answer(net, x, labels)
    same = not is_changed(before, net.state_dict())
    expect(same, "The float network itself was changed. prepare_qat gives a new one: train that.")
    return student


def _test_train(f):
    net, x, labels, fresh, fresh_labels = practice_network()
    student = call(EXERCISES["13.4"], f, (net, x, labels))
    expect(isinstance(student, nn.Module), f"Return the trained network, not {type(student).__name__}.")
    plain = convert(student)[0] if fake_quant_layers(student) else student
    weights = [layer.weight.detach() for layer in plain.modules() if isinstance(layer, nn.Linear)]
    largest = max((len(row.unique()) for weight in weights for row in weight), default=0)
    expect(largest > 0, "Your network has no linear layer: return what prepare_qat made, trained.")
    expect(
        largest <= 4,
        f"Two bits a row are four values, and a row of your network has {largest}. All three layers, "
        'layers=["0", "2", "4"], and one scale a row, group_size=None?',
    )
    nearest = prepare_qat(net, bits=2, group_size=None, layers=["0", "2", "4"])
    rounded, reached = (_accuracy(m, fresh, fresh_labels) for m in (nearest, plain))
    expect(
        reached >= GOAL,
        f"{reached:.2%} of fresh points are told right; at least {GOAL:.0%} was asked for, and rounding alone has "
        f"{rounded:.1%}. Was the rounding there while it was trained, did a step follow each gradient, and were there "
        "enough steps, at a rate that falls?",
    )
    whole = _accuracy(net, fresh, fresh_labels)
    return f"{reached:.1%} of fresh points, round-to-nearest {rounded:.1%}, float {whole:.1%}."


def draw_node(ax) -> None:
    """Where fake-quant nodes sit: forward in blue, backward in orange (section 3 of the notebook)."""
    for (x, y), text in NODES.items():
        box = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": "0.5"}
        ax.text(x, y, text, ha="center", va="center", bbox=box)
    for arrows, color, style in ((FORWARD, QUANTIZED, "-"), (BACKWARD, ERROR, "--")):
        for start, end in arrows:
            ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "lw": 1.8, "ls": style})
    ax.text(2, -0.55, "gradient × 1 where not clamped, × 0 where clamped", color=ERROR, ha="center")
    ax.set(xlim=(-1, 6.2), ylim=(-0.8, 1.4))
    ax.axis("off")


NODES = {
    (0, 1): "input x", (0, 0): "float weight W", (2, 1): "fake-quant", (2, 0): "fake-quant",
    (4, 0.5): "linear", (5.6, 0.5): "loss",
}  # fmt: skip
FORWARD = (
    ((0.4, 1), (1.4, 1)), ((0.75, 0), (1.4, 0)), ((2.6, 1), (3.6, 0.6)), ((2.6, 0), (3.6, 0.4)),
    ((4.4, 0.5), (5.2, 0.5)),
)  # fmt: skip
BACKWARD = (
    ((5.2, 0.3), (4.4, 0.3)), ((3.6, 0.15), (2.7, -0.2)), ((1.4, -0.2), (0.75, -0.2)), ((3.6, 0.85), (2.7, 1.2)),
    ((1.4, 1.2), (0.4, 1.2)),
)  # fmt: skip

THROUGH = "through + (value - through).detach()"
DIVERGENCE = "(log_p.exp() * (log_p - log_q)).sum(-1).mean()"

EXERCISES = {
    "13.1": Exercise(
        "straight through",
        hints=(
            "Compute the value first: code = round(x / scale) + zero_point, clamped, then scale * (code - zero_point).",
            "a + (b - a).detach() has the value of b and the gradient of a. Which a has slope 1 inside and 0 outside?",
            "a = x * ((code >= qmin) & (code <= qmax)), with the code before clamping; b is the value.",
        ),
        solution=ste_solution,
        cases=_ste_cases,
        use=with_gradient,
        slips={
            "The gradient is 0 everywhere: autograd has differentiated the staircase. Add what rounding changed as a "
            "constant: .detach().": (THROUGH, "value"),
            "The gradient is 1 everywhere, also where the code was clamped. There it must be 0.": (
                " * ((code >= qmin) & (code <= qmax))", ""
            ),
            "No gradient can reach x: the result does not depend on it any more. What must be outside of detach()?": (
                THROUGH, "value.detach()"
            ),
            "A value is clamped if its *code*, zero_point included, lies outside qmin..qmax.": (
                "((code >= qmin) & (code <= qmax))", "((x / scale >= qmin) & (x / scale <= qmax))"
            ),
            "What counts is the rounded code, so the gradient is 1 up to half a step beyond the last grid points.": (
                "((code >= qmin) & (code <= qmax))",
                "((x / scale + zero_point >= qmin) & (x / scale + zero_point <= qmax))",
            ),
            "The first and the last code are on the grid: there nothing is clamped.": (
                "(code >= qmin) & (code <= qmax)", "(code > qmin) & (code < qmax)"
            ),
            "Where nothing is clamped the gradient is 1, not 1 / scale: divided by scale, multiplied by it again.": (
                "through = x *", "through = x / scale *"
            ),
            "The gradient is straight through inside, and also where the code is clamped low.": (
                "((code >= qmin) & (code <= qmax))", "(code <= qmax)"
            ),
            "The gradient is straight through inside, and also where the code is clamped high.": (
                "((code >= qmin) & (code <= qmax))", "(code >= qmin)"
            ),
            "Round to the nearest code; floor is not round.": ("torch.round", "torch.floor"),
            "zero_point is taken off again: scale * (code - zero_point).": ("qmax) - zero_point)", "qmax))"),
            "The codes were not clamped.": (".clamp(qmin, qmax)", ""),
            "These are codes, not values: scale * (code - zero_point).": ("scale * (code.clamp", "(code.clamp"),
            "The value is not rounded at all.": ("(value - through).detach()", "0"),
        },
    ),
    "13.2": Exercise(
        "one training step",
        hints=(
            "Two weights are at play: the rounded one computes the output, the float one makes the step.",
            "The gradient of the mean squared error of x @ R.T is 2 (x @ R.T - target).T @ x / target.numel().",
            "R = scale * round(weight / scale), and the result is weight - rate * gradient.",
        ),
        solution=step_solution,
        cases=_step_cases,
        slips={
            "No weight has moved: the true gradient of a staircase is 0. Go straight through it.": (
                "weight - rate * gradient", "weight.clone()"
            ),
            "The weights you return lie on the grid. Then a small step is rounded away for ever: keep the float "
            "weights, and round them in the forward pass only.": (
                "return weight - rate * gradient", "return scale * torch.round((weight - rate * gradient) / scale)"
            ),
            "The step was made from the rounded weights: what the float weight remembered of earlier small steps is "
            "lost.": ("return weight -", "return rounded -"),
            "The step was made from the rounded weights, and the result rounded again.": (
                "return weight - rate * gradient", "return scale * torch.round((rounded - rate * gradient) / scale)"
            ),
            "This step goes uphill: subtract rate times the gradient.": ("weight - rate", "weight + rate"),
            "This is the gradient at the float weights. The model will run on rounded ones: round before you "
            "multiply.": ("x @ rounded.T", "x @ weight.T"),
            "The loss is the *mean* of the squared differences, over all elements, not their sum.": (
                " / target.numel()", ""
            ),
            "The mean is over all elements of the output, not over the tokens only.": ("target.numel()", "len(x)"),
            "The derivative of a square has a factor of 2.": ("2 * (x", "(x"),
            "This is the gradient alone, not weight - rate * gradient.": ("weight - rate * gradient", "gradient"),
            "The step has the length rate times the gradient: where is rate?": ("rate * gradient", "gradient"),
            "The sign of the gradient is not the gradient.": ("rate * gradient", "rate * gradient.sign()"),
            "The weights are rounded to multiples of scale, not to whole numbers.": (
                "scale * torch.round(weight / scale)", "torch.round(weight)"
            ),
            "The output is x @ rounded.T with rounded = scale * round(weight / scale): where is the first scale?": (
                "scale * torch.round(weight / scale)", "torch.round(weight / scale)"
            ),
            "Straight through, scale times 1 / scale is 1: the gradient is not multiplied by scale once more.": (
                "rate * gradient", "rate * scale * gradient"
            ),
        },
    ),
    "13.3": Exercise(
        "learn from the float model",
        hints=(
            "KL(p || q) = Σ p (log p - log q), p the teacher's probabilities, q the student's.",
            "log_softmax(-1) of both; the sum goes over the vocabulary, the last dimension.",
            "Then the mean over all positions; and teacher_logits.detach().",
        ),
        solution=distill_solution,
        cases=_distill_cases,
        use=_with_gradients,
        slips={
            "This is KL(student || teacher). The teacher's probabilities weigh the sum: KL(teacher || student).": (
                "(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_q - log_p))"
            ),
            "Sum over the vocabulary, mean over the positions: this is the mean over both.": (
                ".sum(-1).mean()", ".mean()"
            ),
            'The mean is over all positions of all rows. (reduction="batchmean" divides by the first dimension.)': (
                ".sum(-1).mean()", ".sum() / len(log_p)"
            ),
            "The mean over the positions is missing: this is their sum.": (".sum(-1).mean()", ".sum()"),
            "One number for all positions: their mean.": (".sum(-1).mean()", ".sum(-1)"),
            "Only one position was measured: the mean over all of them was asked for.": (
                ".sum(-1).mean()", ".sum(-1)[..., -1].mean()"
            ),
            "A gradient flows into the teacher as well: it is a constant here. detach() it.": (".detach()", ""),
            "No gradient reaches the student's logits.": ("student_logits.log", "student_logits.detach().log"),
            "The student's logits are no logarithms of probabilities yet: log_softmax.": (
                "student_logits.log_softmax(-1)", "student_logits"
            ),
            "Softmax over the vocabulary, the last dimension, not over the positions.": (
                "detach().log_softmax(-1)", "detach().log_softmax(1)",
                "student_logits.log_softmax(-1)", "student_logits.log_softmax(1)",
            ),
            "Softmax over each position by itself, not over all of the logits together.": (
                "detach().log_softmax(-1)", "detach().flatten().log_softmax(0).view_as(teacher_logits)",
                "student_logits.log_softmax(-1)", "student_logits.flatten().log_softmax(0).view_as(student_logits)",
            ),
            "This is the cross entropy: KL is less by the teacher's own entropy.": ("(log_p - log_q)", "-log_q"),
            "The teacher is asked for its whole distribution, not for its first choice only.": (
                DIVERGENCE, "F.cross_entropy(log_q.flatten(0, 1), log_p.argmax(-1).flatten())"
            ),
            "The sign is turned: KL is never below 0.": ("(log_p - log_q)", "(log_q - log_p)"),
            "Distances of logits, or of their logarithms, are no KL: weigh by the teacher's probabilities.": (
                "log_p.exp() * (log_p - log_q)", "(log_p - log_q).square()"
            ),
        },
    ),
    "13.4": Exercise(
        "two bits, trained",
        test=_test_train,
        use=_use_training,
        hints=(
            'prepare_qat(net, bits=2, group_size=None, layers=["0", "2", "4"]) rounds all three layers.',
            "Then an ordinary loop over its parameters: cross entropy, zero_grad, backward, step. Adam suits.",
            "Two hundred steps at a rate of 3e-3 that falls to 0: optimizer.param_groups[0]['lr'] = ... in each step.",
        ),
        solution=train_solution,
        seconds=120.0,
    ),
}  # fmt: skip
