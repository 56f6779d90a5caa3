"""Room 5: GPTQ, AWQ and training."""

import torch
from torch import nn

from quantlab.hunt.case import Room, bug, fine


def layer_of(outputs: int, inputs: int, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, x) with correlated inputs, two of which are loud: what the print-outs and tests of this room use."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=random) * torch.arange(1, inputs + 1) ** -1.0
    x = torch.randn(tokens, inputs, generator=random) @ mix + 0.1 * torch.randn(tokens, inputs, generator=random)
    x[:, [1, inputs // 2]] *= 8
    return torch.randn(outputs, inputs, generator=random), x


def output_error(weight, other, x) -> float:
    """‖x(W − Ŵ)ᵀ‖² / ‖xWᵀ‖²"""
    return ((x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum()).item()


@bug("E21", chapter="10", title="GPTQ in three lines")
class MoreCarefully:
    """GPTQ: W (outputs, inputs) in multiples of `step`, every weight of them, such that the output error, the
    trace of (W - Q) H (W - Q).T, is below that of rounding to nearest where inputs are correlated. H is x.T @
    x, invertible."""

    def program(W, H, step):
        importance = H.diagonal()
        steps = torch.where(importance >= importance.quantile(0.75), step / 8, step)
        return steps * torch.round(W / steps)  # the important weights are quantized more carefully

    def mended(W, H, step):
        U = torch.linalg.cholesky(torch.linalg.inv(H.double()), upper=True)
        W, Q = W.double().clone(), torch.zeros_like(W)
        for i in range(W.shape[1]):
            Q[:, i] = step * torch.round(W[:, i] / step)
            error = (W[:, i] - Q[:, i]) / U[i, i]
            W[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
        return Q

    def mended_again(W, H, step):
        rest, inverse = W.double(), torch.linalg.inv(H.double())
        columns = []
        while rest.shape[1]:
            columns.append(step * (rest[:, 0] / step).round())
            passed_on = torch.outer(rest[:, 0] - columns[-1], inverse[0, 1:] / inverse[0, 0])
            rest = rest[:, 1:] - passed_on
            inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
        return torch.stack(columns, 1).to(W.dtype)

    def demo(program):
        weight, x = layer_of(8, 16)
        mine, nearest = program(weight, x.T @ x, 0.5), 0.5 * torch.round(weight / 0.5)
        ratio = output_error(weight, mine, x) / output_error(weight, nearest, x)
        print(f"output error: {ratio:.2f} times that of rounding to nearest")

    def test(program):
        weight, x = layer_of(8, 16)
        codes = program(weight, x.T @ x, 0.5).double() / 0.5
        assert (codes - codes.round()).abs().max() < 1e-4

    hint = "Are all the weights multiples of `step`?"
    story = (
        "GPTQ has one grid for all weights and quantizes none of them more carefully. It rounds column after "
        "column and lets those still to come absorb each error, through H⁻¹; the weights end up *farther* from "
        "the originals, the outputs closer."
    )


@bug("E11", chapter="13", title="Straight through")
class NoMask:
    """x rounded to the grid scale · (-7..7). Its gradient is 1 where x lies on the grid's range, and 0 where x
    lies a step or more outside, because it was clamped there."""

    def program(x, scale):
        rounded = scale * torch.round(x / scale).clamp(-7, 7)
        return x + (rounded - x).detach()  # the gradient sees x as it was

    def mended(x, scale):
        inside = x.clamp(-7 * scale, 7 * scale)
        return inside + (scale * torch.round(inside / scale) - inside).detach()

    def mended_again(x, scale):
        codes = torch.round(x.detach() / scale)
        passes = (codes.abs() <= 7).to(x.dtype)
        return scale * codes.clamp(-7, 7) + passes * (x - x.detach())

    def demo(program):
        x = torch.tensor([0.12, -0.31, 0.55], requires_grad=True)
        y = program(x, 0.1)
        y.sum().backward()
        print("values", [round(v, 2) for v in y.tolist()], " gradients", x.grad.tolist())

    def test(program):
        x = torch.tensor([0.3, 2.0, -2.0], requires_grad=True)
        program(x, 0.1).sum().backward()
        assert x.grad.tolist() == [1, 0, 0]

    hint = "None of the values in the print-out is clamped."
    story = (
        "The straight-through estimate treats rounding as if it were not there, but not the clamp: a clamped "
        "value cannot change the output, so its gradient is 0. And nothing here is noise: the same x always gives "
        "the same value."
    )


@fine(chapter="14", title="A gradient where it was clamped")
class StepGradient:
    """The derivative of each element of step · round(clamp(x / step, -8, 7)) with respect to step, where the slope
    of round is taken as 1."""

    def program(x, step):
        v = x / step
        inside = torch.round(v) - v
        return torch.where(v <= -8, -8.0, torch.where(v >= 7, 7.0, inside))

    def tempting(x, step):
        v = x / step
        inside = torch.round(v) - v
        return torch.where((v <= -8) | (v >= 7), 0.0, inside)  # clamped: no gradient

    def demo(program):
        x = torch.tensor([0.26, -0.44, 3.0, -3.0])
        print("x", [round(v, 2) for v in x.tolist()], " gradient", [round(v, 2) for v in program(x, 0.1).tolist()])

    def test(program):
        x, step = torch.tensor([0.26, -0.44, 3.0, -3.0]), torch.tensor(0.1, requires_grad=True)
        for value, gradient in zip(x, program(x, 0.1), strict=True):
            v = (value / step).clamp(-8, 7)
            (right,) = torch.autograd.grad(step * (v + (v.round() - v).detach()), step)
            assert abs(right - gradient) < 1e-4

    hint = "A clamped value sits at 7 steps. What happens to it if the step grows?"
    story = (
        "With respect to x a clamped element has no gradient, but with respect to the *step* it has the largest "
        "one: it sits at 7 steps and moves by 7 when the step grows by 1. That is how LSQ learns how far the grid "
        "should reach."
    )


@bug("E9", chapter="13", title="Quantize, then train")
class QuantizedFirst:
    """Quantization-aware training of y ≈ x @ weight.T + bias from a given weight: (weight, bias), the weight in
    multiples of 0.25 (codes -7..7). If y was made by such a weight (and x is well mixed: about normal, 50 or
    more tokens, at most 8 inputs), it finds it: the mean squared error falls below 1 % of what it was."""

    def program(weight, x, y):
        net = nn.Linear(weight.shape[1], weight.shape[0])
        nn.init.zeros_(net.bias)
        del net.weight  # first it is quantized ...
        net.register_buffer("weight", 0.25 * torch.round(weight / 0.25).clamp(-7, 7))
        for _ in range(300):  # ... and then it is trained
            net.zero_grad()
            (net(x) - y).square().mean().backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
        return net.weight, net.bias.detach()

    def mended(weight, x, y):
        weight, bias = weight.clone().requires_grad_(), torch.zeros(len(weight), requires_grad=True)
        for _ in range(300):
            rounded = 0.25 * torch.round(weight / 0.25).clamp(-7, 7)
            seen = weight + (rounded - weight).detach()
            loss = (x @ seen.T + bias - y).square().mean()
            gradients = torch.autograd.grad(loss, (weight, bias))
            weight, bias = (
                (p - 0.1 * g).detach().requires_grad_() for p, g in zip((weight, bias), gradients, strict=True)
            )
        return 0.25 * torch.round(weight.detach() / 0.25).clamp(-7, 7), bias.detach()

    def mended_again(weight, x, y):
        moving, bias = weight.clone(), y.mean(0) * 0
        for _ in range(500):
            fake = (4 * moving).round().clamp(-7, 7) / 4
            miss = x @ fake.T + bias - y
            moving = moving - 0.1 / len(x) * miss.T @ x
            bias = bias - 0.1 * miss.mean(0)
        return (4 * moving).round().clamp(-7, 7) / 4, bias

    def demo(program):
        x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        y = x @ torch.tensor([[0.5, -0.75, 0.25, 1.0]]).T + 5
        weight, bias = program(torch.tensor([[0.5, -0.5, 0.25, 0.75]]), x, y)
        before, after = y.square().mean(), (x @ weight.T + bias - y).square().mean()
        codes = (weight / 0.25).int().tolist()[0]
        print(f"mean squared error: {before:.2f} at first, {after:.2f} at the end; codes {codes}")

    def test(program):
        x = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
        y = x @ torch.tensor([[0.5, -0.75, 0.25, 1.0]]).T
        weight, bias = program(torch.zeros(1, 4), x, y)
        assert (x @ weight.T + bias - y).square().mean() < 0.01 * y.square().mean()

    hint = "What does net.parameters() hold? Start from a weight of zeros."
    story = (
        "Once the weights are integers in a buffer there is nothing left to train but the bias; the loss falls "
        "all the same. Quantizing first is PTQ. QAT keeps float weights, rounds them in every forward pass, and "
        "quantizes at the end."
    )


@bug("E20", chapter="11", title="AWQ")
class KeepsOnePercent:
    """AWQ: (codes, scale, input_scale), where codes · scale / input_scale stands for the weight. Every code is an
    integer, -8..7; scale is one number for each row, input_scale one for each input; the output error on x is
    not above that of rounding each row to nearest, in steps of max|row| / 7. (No row is all 0.)"""

    def program(weight, x):
        scale = weight.abs().amax(1, keepdim=True) / 7
        codes = torch.round(weight / scale)
        loud = x.abs().mean(0).topk(max(1, weight.shape[1] // 100)).indices
        codes[:, loud] = (weight / scale)[:, loud]  # the most important 1 % keep their digits
        return codes, scale, torch.ones(weight.shape[1])

    def mended(weight, x):
        found = []
        for alpha in (0, 0.25, 0.5, 0.75, 1):
            input_scale = x.abs().mean(0) ** alpha
            scale = (weight * input_scale).abs().amax(1, keepdim=True) / 7
            codes = torch.round(weight * input_scale / scale)
            found.append((output_error(weight, codes * scale / input_scale, x), codes, scale, input_scale))
        return min(found, key=lambda one: one[0])[1:]

    def mended_again(weight, x):
        strength = (x**2).mean(0).sqrt()
        tries = {}
        for power in torch.linspace(0, 1, 9):
            s = strength**power / (strength**power).mean()
            step = (weight * s).abs().max(1, keepdim=True).values / 7
            q = (weight * s / step).round().clamp(-8, 7)
            tries[output_error(weight, q * step / s, x)] = q, step, s
        return tries[min(tries)]

    def demo(program):
        weight, x = layer_of(32, 100)
        codes, scale, input_scale = program(weight, x)
        step = weight.abs().amax(1, keepdim=True) / 7
        nearest = output_error(weight, step * torch.round(weight / step), x)
        ratio = output_error(weight, codes * scale / input_scale, x) / nearest
        print(f"output error {ratio:.2f} times that of rounding to nearest")

    def test(program):
        codes, _, _ = program(*layer_of(8, 16))
        assert torch.equal(codes, codes.round())
        assert codes.abs().max() <= 8

    hint = "Look at the codes. How many different ones can there be in 4 bits?"
    story = (
        "To keep 1 % in float was the experiment that led to AWQ, not the method. AWQ *scales* loud inputs' "
        "weights up before rounding, and everything is quantized: no float leftovers, no second kernel."
    )


@bug("E12", chapter="13", title="Post-training quantization in three steps")
class FineTuned:
    """Post-training quantization of y = x @ weight.T: (codes, scale, x_scale). Each code (-7..7) is the one
    nearest to its weight, with one scale for each row, max|row| / 7; x, the calibration data, decides x_scale
    alone, max|x| / 127."""

    def program(weight, x, y):
        scale, x_scale = weight.abs().amax(1, keepdim=True) / 7, x.abs().max() / 127  # 1. calibrate
        tuned = weight.clone().requires_grad_()
        for _ in range(200):  # 2. fine-tune
            rounded = tuned + (scale * torch.round(tuned / scale).clamp(-7, 7) - tuned).detach()
            (gradient,) = torch.autograd.grad((x @ rounded.T - y).square().mean(), tuned)
            tuned = (tuned - 0.05 * gradient).detach().requires_grad_()
        return torch.round(tuned.detach() / scale).clamp(-7, 7), scale, x_scale  # 3. convert

    def mended(weight, x, y):
        scale = weight.abs().amax(1, keepdim=True) / 7
        return torch.round(weight / scale), scale, x.abs().max() / 127

    def mended_again(weight, x, y):
        scale = torch.maximum(weight.max(1).values, -weight.min(1).values)[:, None] / 7
        grid = torch.arange(-7, 8.0)
        codes = grid[(weight[..., None] - scale[..., None] * grid).abs().argmin(-1)]
        return codes, scale, torch.linalg.vector_norm(x, float("inf")) / 127

    def demo(program):
        x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        weight, better = torch.tensor([[0.7, 0.08, -0.33, 0.21]]), torch.tensor([[0.6, 0.2, -0.4, 0.2]])
        codes, scale, _ = program(weight, x, x @ better.T)
        losses = [(x @ (w - better).T).square().mean().item() for w in (weight, codes * scale)]
        print("loss {:.4f} in float, {:.4f} with four bits".format(*losses))

    def test(program):
        weight, x = torch.tensor([[0.7, 0.08, -0.33, 0.21]]), torch.eye(4)
        codes, scale, _ = program(weight, x, x @ torch.tensor([[0.1, -0.2, 0.3, 0.4]]).T)
        assert (codes * scale - weight).abs().max() <= 0.501 * scale

    hint = "Which weights got another code than the nearest, and what moved them?"
    story = (
        "It works, and that is why it should not be called PTQ: gradients have moved the weights, so this is "
        "training, with its labels, its time and its risks. Calibration looks at data and computes ranges; no "
        "weight gets a gradient."
    )


ROOM = Room(
    "training", "GPTQ and training", (MoreCarefully, NoMask, StepGradient, QuantizedFirst, KeepsOnePercent, FineTuned)
)
