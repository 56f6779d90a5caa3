"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import copy

import torch
import torch.nn.functional as F

from quantlab.qat import prepare_qat


def _ste(x, scale, zero_point, qmin, qmax, *, detach=True, mask=True, of_x=False, all_of_it=False, floor=False):
    """Exercise 13.1 with one slip."""
    code = (torch.floor if floor else torch.round)(x / scale) + zero_point
    value = scale * (code.clamp(qmin, qmax) - zero_point)
    if not detach:
        return value
    if all_of_it:
        return value.detach()
    inside = (x / scale >= qmin) & (x / scale <= qmax) if of_x else (code >= qmin) & (code <= qmax)
    through = x * inside if mask else x
    return through + (value - through).detach()


def _ste_scaled(x, scale, zero_point, qmin, qmax):
    """The STE around the codes, with the scale outside of it only once: the gradient is 1 / scale."""
    code = torch.round(x / scale) + zero_point
    through = (x / scale) * ((code >= qmin) & (code <= qmax))
    return through + (scale * (code.clamp(qmin, qmax) - zero_point) - through).detach()


class _AllOnes(torch.autograd.Function):
    """Gradient 1 inside, whatever comes in."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, qmin, qmax):
        code = torch.round(x / scale) + zero_point
        ctx.save_for_backward((code >= qmin) & (code <= qmax))
        return scale * (code.clamp(qmin, qmax) - zero_point)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0].float(), None, None, None, None


def _ste_in_place(x, *grid):
    y = _ste(x, *grid)
    x.data.clamp_(-0.1, 0.1)
    return y


def _step(weight, x, target, scale, rate, *, at="rounded", start="float", sign=1, mean=True, keep="float"):
    """Exercise 13.2 with one slip."""
    rounded = scale * torch.round(weight / scale)
    used = rounded if at == "rounded" else weight
    gradient = 2 * (x @ used.T - target).T @ x / (target.numel() if mean else 1)
    new = (weight if start == "float" else rounded) - sign * rate * gradient
    return new if keep == "float" else scale * torch.round(new / scale)


def _true_gradient(weight, x, target, scale, rate):
    w = weight.clone().requires_grad_()
    F.mse_loss(x @ (scale * torch.round(w / scale)).T, target).backward()
    return weight - rate * w.grad


def _step_in_place(weight, x, target, scale, rate):
    weight -= rate * 2 * (x @ (scale * torch.round(weight / scale)).T - target).T @ x / target.numel()
    return weight


def _distill(teacher, student, *, swapped=False, reduction=None, detach=True, logs=True):
    teacher = teacher.detach() if detach else teacher
    if swapped:
        teacher, student = student, teacher
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1) if logs else student
    if reduction == "mean":  # over the vocabulary too
        return (log_p.exp() * (log_p - log_q)).mean()
    if reduction:
        return F.kl_div(log_q, log_p, log_target=True, reduction=reduction)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _train(net, x, labels, *, steps=200, rate=3e-3, before=True, layers=("0", "2", "4"), forget=False, **how):
    """Exercise 13.4 with one slip."""
    how = {"bits": 2, "group_size": None, "layers": list(layers)} | how
    student = prepare_qat(net, **how) if before else copy.deepcopy(net)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad])
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = F.cross_entropy(student(x), labels)
        optimizer.zero_grad()
        loss.backward()
        if not forget:
            optimizer.step()
    return student if before else prepare_qat(student, **how)


def _train_in_place(net, x, labels):
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    F.cross_entropy(net(x), labels).backward()
    optimizer.step()
    return prepare_qat(net, bits=2, group_size=None, layers=["0", "2", "4"])


WRONG = {
    "13.1": [
        (lambda *a: _ste(*a, detach=False), "gradient is 0 everywhere"),
        (lambda *a: _ste(*a, mask=False), "gradient is 1 everywhere"),
        (lambda *a: _ste(*a, all_of_it=True), "No gradient can reach x"),
        (lambda *a: _ste(*a, of_x=True), "if its *code*, zero_point included"),
        (lambda *a: _ste(*a, floor=True), "floor is not round"),
        (_ste_scaled, "not 1 / scale"),
        (_AllOnes.apply, "Result 2 of 2"),
        (_ste_in_place, "x was changed in place"),
        (lambda x, *a: _ste(x, 0.5, *a[1:]), "was expected"),
        (lambda x, s, z, a, b: _ste(x, s, z, -4, 3), "was expected"),
        (lambda x, *a: None, "A tensor was expected"),
    ],
    "13.2": [
        (_true_gradient, "true gradient of a staircase is 0"),
        (lambda *a: _step(*a, at="float"), "gradient at the float weights"),
        (lambda *a: _step(*a, start="rounded"), "made from the rounded weights"),
        (lambda *a: _step(*a, keep="rounded"), "lie on the grid"),
        (lambda *a: _step(*a, sign=-1), "uphill"),
        (lambda *a: _step(*a, mean=False), "not their sum"),
        (lambda *a: _step(*a).T, "of shape"),
        (_step_in_place, "weight was changed in place"),
    ],
    "13.3": [
        (lambda t, s: _distill(t, s, swapped=True), "KL(student || teacher)"),
        (lambda t, s: _distill(t, s, reduction="mean"), "mean over both"),
        (lambda t, s: _distill(t, s, reduction="batchmean"), "first dimension"),
        (lambda t, s: _distill(t, s, reduction="sum"), "this is their sum"),
        (lambda t, s: _distill(t, s, detach=False), "flows into the teacher"),
        (lambda t, s: _distill(t, s, logs=False), "no logarithms of probabilities"),
        (lambda t, s: _distill(t, s.detach()), "No gradient reaches"),
        (lambda t, s: _distill(t[:, -1:], s[:, -1:]), "Only one position"),
        (lambda t, s: _distill(t, s).detach(), "No gradient reaches"),
        (lambda t, s: F.cross_entropy(s.flatten(0, 1), t.argmax(-1).flatten()), "not for its first choice only"),
    ],
    "13.4": [
        (lambda *a: _train(*a, before=False), "Was the rounding there while it was trained"),
        (lambda *a: _train(*a, forget=True), "did a step follow each gradient"),
        (lambda *a: _train(*a, steps=3), "enough steps"),
        (lambda *a: _train(*a, layers=("2",)), "All three layers"),
        (lambda *a: _train(*a, bits=3), "has 8"),
        (lambda *a: _train(*a, group_size=8), "one scale a row"),
        (lambda net, x, labels: copy.deepcopy(net), "Two bits a row are four values"),
        (lambda *a: torch.nn.ReLU(), "no linear layer"),
        (_train_in_place, "float network itself was changed"),
        (lambda *a: 0.97, "Return the trained network"),
    ],
}
