"""Room 6: tools. What files hold, and what engines take."""

import numpy as np
import torch
from torch import nn

from quantlab.affine import choose_qparams
from quantlab.hunt.case import Room, bug, fine


class Int8Kernel(nn.Module):
    """y = x @ W.T on integers: int8 codes in, float out."""

    def __init__(self, codes, scale):
        super().__init__()
        self.codes, self.scale = codes, scale

    def forward(self, x):
        if x.dtype != torch.int8:
            raise NotImplementedError(f"no int8 kernel for {x.dtype}")
        return (x.int() @ self.codes.int().T) * self.scale


def train(weight, x, y, x_scale):
    """The weight after training with fake quantization of x and of itself, its scale, and the losses."""
    weight, scale, losses = weight.clone().requires_grad_(), weight.abs().max() / 127, []
    x_seen = x_scale * torch.round(x / x_scale).clamp(-127, 127)
    for _ in range(100):
        rounded = weight + (scale * torch.round(weight / scale).clamp(-127, 127) - weight).detach()
        loss = (x_seen @ rounded.T - y).square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.1 * gradient).detach().requires_grad_()
        losses.append(loss.item())
    return weight.detach(), scale, losses


@bug("E13", chapter="02", title="Representative data")
class NoiseAsSamples:
    """(scale, zero_point) for an int8 model (codes 0..255) that will read inputs like `samples` (not all 0): each
    value of the samples returns from its code within one scale."""

    def program(samples):
        random = torch.Generator().manual_seed(0)
        representative = torch.rand(100, *samples.shape[1:], generator=random)  # 100 inputs of the right shape
        low, high = representative.min().clamp(max=0), representative.max().clamp(min=0)
        scale = (high - low).item() / 255
        return scale, round(-low.item() / scale)

    def mended(samples):
        low, high = samples.min().clamp(max=0), samples.max().clamp(min=0)
        scale = (high - low).item() / 255
        return scale, round(-low.item() / scale)

    def mended_again(samples):
        qp = choose_qparams(*torch.aminmax(samples), qmin=0, qmax=255)
        return qp.scale.item(), qp.zero_point.item()

    def demo(program):
        images = torch.linspace(0, 1, 8 * 64).view(8, 64)
        scale, zero_point = program(images)
        back = (torch.round(images / scale) + zero_point).clamp(0, 255).sub(zero_point) * scale
        error = (back - images).abs().max()
        print(f"images of 0..1: scale {scale:.5f}, zero point {zero_point}, largest error {error:.4f}")

    def test(program):
        images = torch.linspace(0, 255, 8 * 64).view(8, 64)
        scale, zero_point = program(images)
        back = (torch.round(images / scale) + zero_point).clamp(0, 255).sub(zero_point) * scale
        assert (back - images).abs().max() <= scale

    hint = "What has the result to do with the samples? Hand it images of 0..255."
    story = (
        "Noise in 0..1 has the right shape and nothing else: for images of 0..255 everything above 1 is clamped, "
        "and the model is destroyed. Representative data are real ones, a hundred to five hundred."
    )


@bug("E30", chapter="19", title="The K in Q4_K_M")
class KMeans:
    """Bytes of the tensors of a Q4_K_M file of llama.cpp. tensors: {name: number of weights}, multiples of 256.
    They are Q4_K, but those that are named in `more` are Q6_K; both as gguf's format has them."""

    def program(tensors, more=()):
        codebook = 16 * 2  # K: k-means, 16 centroids in float16 for each block of 256
        codes = 256 * 4 // 8
        return sum(count // 256 * (codebook + codes) for count in tensors.values())  # M: a medium block

    def mended(tensors, more=()):
        q4_k = 2 + 2 + 8 * 2 * 6 // 8 + 256 * 4 // 8  # d, dmin; scales and minima of 8 groups of 32; codes
        q6_k = 2 + 16 + 256 * 6 // 8  # d; scales of 16 groups of 16; codes
        return sum(count // 256 * (q6_k if name in more else q4_k) for name, count in tensors.items())

    def mended_again(tensors, more=()):
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        total = 0
        for name, count in tensors.items():
            kind = GGMLQuantizationType.Q6_K if name in more else GGMLQuantizationType.Q4_K
            block, nbytes = GGML_QUANT_SIZES[kind]
            total += nbytes * count // block
        return total

    def demo(program):
        nbytes = program({"attention": 2_147_483_648, "mlp": 4_328_521_728}, more=("mlp",))
        print(f"6.5 billion weights: {nbytes / 1e9:.2f} GB, {8 * nbytes / 6_476_005_376:.2f} bits a weight")

    def test(program):
        assert program({"a": 256}) == 144
        assert program({"a": 256, "b": 512}, more=("b",)) == 144 + 2 * 210

    hint = (
        "The package gguf knows: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_K] is (weights, bytes) of a block."
    )
    story = (
        "There are no centroids in a K-quant: a super-block of 256 holds 8 evenly spaced grids whose scales are "
        "quantized themselves (6 bits), 144 bytes, 4.5 bits a weight. S, M and L say which tensors get more bits, "
        "here Q6_K."
    )


@fine(chapter="19", title="Neighbours sixteen apart")
class NibbleOrder:
    """The 16 bytes in which llama.cpp's Q4_0 keeps the codes of a block (32 integers, 0..15)."""

    def program(codes):
        low, high = codes[:16], codes[16:]  # byte i holds codes i and i + 16
        return (low | high << 4).to(torch.uint8)

    def tempting(codes):
        low, high = codes[0::2], codes[1::2]  # byte i holds codes 2i and 2i + 1
        return (low | high << 4).to(torch.uint8)

    def demo(program):
        print("codes 0 to 15, twice:", program(torch.arange(32) % 16).tolist()[:6], "...")

    def test(program):
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        codes = torch.arange(32) * 7 % 16
        block = np.concatenate([np.array([1.0], np.float16).view(np.uint8), program(codes).numpy()])
        assert dequantize(block, GGMLQuantizationType.Q4_0).tolist() == (codes - 8).tolist()

    hint = "The package gguf reads it: gguf.quants.dequantize of two bytes of float16 scale and these sixteen."
    story = (
        "Whatever order writer and reader agree on is right. This one unpacks 16 low halves and 16 high halves at "
        "a time, which vector instructions like; neighbours in one byte would read as another weight."
    )


@bug("E10", chapter="13", title="Train, convert, deploy")
class NoQuantizer:
    """(net, losses): a layer trained with fake quantization and then converted to integer arithmetic. net(x) takes
    float x, like those of the training, and gives x @ weight.T within 5 %."""

    def program(weight, x, y):
        x_scale = x.abs().max() / 127
        weight, scale, losses = train(weight, x, y, x_scale)
        codes = torch.round(weight / scale).clamp(-127, 127).to(torch.int8)
        return Int8Kernel(codes, scale * x_scale), losses

    def mended(weight, x, y):
        x_scale = x.abs().max() / 127
        weight, scale, losses = train(weight, x, y, x_scale)
        kernel = Int8Kernel(torch.round(weight / scale).clamp(-127, 127).to(torch.int8), scale * x_scale)
        return lambda x: kernel(torch.round(x / x_scale).clamp(-127, 127).to(torch.int8)), losses

    def mended_again(weight, x, y):
        step = x.abs().max() / 127
        weight, scale, losses = train(weight, x, y, step)

        class Quantize(nn.Module):
            def forward(self, x):
                return (x / step).round().clamp(-128, 127).char()

        kernel = Int8Kernel((weight / scale).round().clamp(-127, 127).char(), scale * step)
        return nn.Sequential(Quantize(), kernel), losses

    def demo(program):
        x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        weight = torch.linspace(-1, 1, 32).view(4, 8)
        _, losses = program(0.9 * weight, x, x @ weight.T)
        print(f"loss {losses[0]:.4f} at first, {losses[-1]:.4f} at the end; converted to int8")

    def test(program):
        x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        weight = torch.linspace(-1, 1, 32).view(4, 8)
        net, _ = program(weight, x, x @ weight.T)
        assert (net(x) - x @ weight.T).norm() <= 0.05 * (x @ weight.T).norm()

    parts = (Int8Kernel, train)
    hint = "The loss is measured before the end. Call what comes out."
    story = (
        "The training is fine; the converted layer wants int8 codes, and nobody makes them of the input. As the "
        "loop runs to its end, the error shows at the first prediction only. Something must quantize what goes in "
        "(QuantStub, Q nodes)."
    )


@bug("E31", chapter="21", title="A Q/DQ pair for TensorRT")
class NotSymmetric:
    """(scale, zero_point) of the Q/DQ pair around activations x (not all 0), for TensorRT, which takes int8 codes
    (-128..127) and symmetric quantization only. Each value of x returns from its code within one scale."""

    def program(x):
        scale = (x.max() - x.min()).item() / 255  # calibrated: the least and the largest value
        zero_point = round(-128 - x.min().item() / scale)
        return scale, zero_point

    def mended(x):
        return x.abs().max().item() / 127, 0

    def mended_again(x):
        low, high = torch.aminmax(x)
        return max(high.item() / 127, -low.item() / 128), 0

    def demo(program):
        scale, zero_point = program(torch.linspace(-1.5, 1.5, 100))
        print(f"activations of -1.5..1.5: scale {scale:.5f}, zero point {zero_point}, codes -128..127")

    def test(program):
        assert program(torch.linspace(0, 6, 100))[1] == 0

    hint = "After a ReLU or a GELU activations are not centred on 0."
    story = (
        "TensorRT's explicit quantization has no zero point. Symmetric data hide that. The calibrators that once "
        "found the range are deprecated since 10.1 and gone in 11; likewise PyTorch Mobile became ExecuTorch, "
        "torch.ao torchao, TFLite LiteRT."
    )


@bug("E18", chapter="15", title="Is NF4 slower?")
class AlwaysSlower:
    """The faster of "float16" and "nf4" for a layer of `weights` weights over `tokens` tokens. Each takes the
    longer of two times: its weights read (2 bytes or 4.5 bits each) / bandwidth, and operations / peak: 2 for
    each weight and token, and for nf4 `unpack` more for each weight."""

    def program(weights, tokens, unpack, bandwidth, peak):
        float16 = 2 * weights * tokens
        nf4 = float16 + unpack * weights  # every weight must be looked up first
        return "float16" if float16 / peak <= nf4 / peak else "nf4"

    def mended(weights, tokens, unpack, bandwidth, peak):
        float16 = max(2 * weights / bandwidth, 2 * weights * tokens / peak)
        nf4 = max(4.5 / 8 * weights / bandwidth, (2 * tokens + unpack) * weights / peak)
        return "float16" if float16 <= nf4 else "nf4"

    def mended_again(weights, tokens, unpack, bandwidth, peak):
        bits, extra = {"float16": 16, "nf4": 4.5}, {"float16": 0, "nf4": unpack}
        seconds = {kind: max(bits[kind] / 8 / bandwidth, (2 * tokens + extra[kind]) / peak) for kind in bits}
        return min(seconds, key=seconds.get)

    def demo(program):
        print("512 tokens at once:", program(10**8, 512, 10, 1e11, 1e13))

    def test(program):
        assert program(10**8, 1, 10, 1e11, 1e13) == "nf4"

    hint = "One token at a time: what does the layer wait for?"
    story = (
        "NF4 is a way to store weights, and whether it is slower depends on what the layer waits for. Over many "
        "tokens the look-ups cost; for one token the reading of the weights decides, and NF4 reads 3.6 times "
        "less, given a kernel that unpacks on the way."
    )


ROOM = Room("tools", "Tools", (NoiseAsSamples, KMeans, NibbleOrder, NoQuantizer, NotSymmetric, AlwaysSlower))
