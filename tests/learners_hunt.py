"""Tests as learners may write them, from the promises alone: all must be accepted as proof, or clear what is fine.

They differ from the reference tests: the library, torch or a loop is their witness, and their values are others.
"""

import math

import torch
import torch.nn.functional as F
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import nn

import quantlab as ql


def x_of(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decode(program):
    qp = ql.choose_qparams(torch.tensor(-1.0), torch.tensor(3.0), qmin=0, qmax=255)
    codes = torch.arange(256)
    mine = program(codes, qp.scale, qp.zero_point)
    assert torch.allclose(mine, ql.dequantize(codes, qp), atol=1e-5)


def nearest(program):
    x = x_of(200)
    assert ((program(x, 0.1) * 0.1 - x).abs() <= 0.05001).all()


def zero_points(program):
    for low, high in ((-3, -2), (5, 5.5), (-1, 1), (0.1, 100)):
        scale, zero_point = program(float(low), float(high))
        for real in torch.linspace(low, high, 9).tolist():
            code = max(0, min(255, round(real / scale) + zero_point))
            assert abs(scale * (code - zero_point) - real) <= scale * 1.0001


def fits_int8(program):
    codes = program(100 * x_of(100), 0.1, 8)
    assert torch.equal(codes, codes.to(torch.int8).to(codes.dtype))


def padding(program):
    padded = F.pad(x_of(20), (0, 5))
    assert program(padded)[20:].tolist() == [0] * 5


def better_grid(program):
    x = torch.tensor([-3.0, -2, -1, 0, 1, 2, 3]) / 3
    assert (program(x, 3) - x).abs().max() < 1e-5


def nf4_back(program):
    for code in range(16):
        assert abs(program(torch.tensor([code]), 1.0).item() - ql.nf4_levels()[code].item()) < 1e-4


def nf4_blocks(program):
    weight = x_of(4, 64) * torch.tensor([1.0, 10, 100, 1000])[:, None]
    witness = ql.quantize_codebook(weight, ql.nf4_levels(), block_size=64).dequantize()
    assert torch.allclose(program(weight), witness, rtol=1e-4)


def entropy(program):
    assert abs(program(torch.cat([torch.ones(32), torch.zeros(32)])) - 1) < 1e-4


def nf4_levels(program):
    levels = program()
    assert len(levels) == 16
    assert 0.0 in levels.tolist()


def next_half(program):
    for x in (0.25, 3.0, 100.0):
        assert x + program(x) == torch.nextafter(torch.tensor(x).half(), torch.tensor(math.inf).half()).item()


def sixteen_bits(program):
    x = torch.tensor([0.0, 1e5, 54_321.0])
    assert (program(x) - x).abs().max() <= 1.01e5 / 65535


def int8_product(program):
    x, w = x_of(10, 20) * torch.logspace(-1, 1, 20), x_of(5, 20, seed=8)
    y = program(x, w)
    assert (y - x @ w.T).norm() / (x @ w.T).norm() < 0.03


def bytes_dot(program):
    x, w = torch.full((100,), 255), torch.full((100,), -128)
    assert program(x, w) == -255 * 128 * 100


def dynamic(program):
    codes = [program(factor * x_of(3, 8))[0] for factor in (0.001, 1000.0)]
    assert (codes[0] - codes[1]).abs().max() <= 1


def axis(program):
    w = x_of(6, 3)
    codes, scale = program(w)
    assert scale.expand(6, 3)[0].unique().numel() == 3


def llm_int8(program):
    x, w = x_of(1, 16), x_of(4, 16, seed=9)
    step = x.abs().max() / 127
    assert torch.allclose(program(x, w), program(step * torch.round(x / step), w), atol=1e-5)


def packed_bytes(program):
    weight = torch.randn(32, 64)
    q = ql.quantize_tensor(weight, bits=4, granularity=ql.PerAxis(0))
    assert program(32, 64, 4) == ql.pack(q.codes + 8, bits=4).nbytes + q.qparams.scale.nbytes


def as_they_are(program):
    copy, nbytes = program(nn.Linear(16, 16, bias=False))
    assert nbytes == copy.weight.numel() * copy.weight.element_size()


def perplexity(program):
    logits, tokens = x_of(9, 5), torch.tensor([0, 3, 1, 4, 2, 2, 0, 1, 3])
    p = logits.softmax(1)
    wanted = math.exp(-sum(math.log(p[i, tokens[i + 1]]) for i in range(8)) / 8)
    assert abs(program(lambda _: logits, tokens) - wanted) < 1e-3


def clip_of_calibration(program):
    calibration = x_of(500)
    assert program(calibration, calibration)[0] == program(calibration, torch.ones(10) * 50)[0]


def memory(program):
    for weights, activations in ((100, 1), (100, 49), (100, 51), (1, 100)):
        four, eight = weights / 2 + 2 * activations, weights + activations
        assert program(weights, activations) == ("W4A16" if four < eight else "W8A8")


def speed_up(program):
    assert program(1000, 1024, 1024, 1e11, 1e12) < 1.01


def one_grid(program):
    W, X = x_of(4, 6), x_of(50, 6, seed=3) @ torch.diag(torch.arange(1.0, 7))
    for weight in program(W, X.T @ X, 0.3).flatten().tolist():
        assert abs(weight / 0.3 - round(weight / 0.3)) < 1e-4


def torchs_gradient(program):
    grads = []
    for f in (program, lambda x, s: torch.fake_quantize_per_tensor_affine(x, s, 0, -7, 7)):
        x = torch.linspace(-2, 2, 21).requires_grad_()
        f(x, 0.1).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def learns(program):
    x = x_of(80, 6)
    true = 0.25 * torch.tensor([[1.0, -2, 3, -4, 5, -6], [6, 0, 1, 0, 2, 0]])
    weight, _ = program(torch.full((2, 6), 0.1), x, x @ true.T)
    assert torch.allclose(weight, true, atol=1e-5)


def whole_codes(program):
    codes = program(x_of(3, 10), x_of(40, 10, seed=4))[0]
    assert set(codes.flatten().tolist()) <= set(range(-8, 8))


def no_training(program):
    weight, x = x_of(3, 5), x_of(30, 5, seed=6)
    plain, other = program(weight, x, x @ weight.T)[0], program(weight, x, -x @ weight.T)[0]
    assert torch.equal(plain, other)


def real_samples(program):
    samples = torch.arange(100.0).view(10, 10)
    scale, zero_point = program(samples)
    assert scale * (255 - zero_point) >= 99 - scale


def k_quant(program):
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_K]
    assert program({"w": 10 * weights}) == 10 * size


def works(program):
    x, weight = x_of(100, 5), x_of(3, 5, seed=2)
    net, _ = program(weight, x, x @ weight.T)
    net(x[:1])


def centred(program):
    assert program(torch.tensor([0.0, 1.0, 5.0]))[1] == 0


def decoding(program):
    assert program(1e9, 1, 4, 5e10, 1e13) == "nf4"


PROOFS = {
    "ranges.1": decode, "ranges.3": nearest, "ranges.4": zero_points, "ranges.6": fits_int8, "ranges.7": padding,
    "ranges.8": better_grid, "codebooks.1": nf4_back, "codebooks.2": nf4_blocks, "codebooks.4": entropy,
    "codebooks.5": nf4_levels, "codebooks.7": next_half, "codebooks.8": sixteen_bits, "integers.1": int8_product,
    "integers.3": bytes_dot, "integers.4": dynamic, "integers.6": axis, "integers.7": llm_int8,
    "measuring.1": packed_bytes, "measuring.3": as_they_are, "measuring.4": perplexity,
    "measuring.5": clip_of_calibration, "measuring.7": memory, "measuring.8": speed_up, "training.1": one_grid,
    "training.2": torchs_gradient, "training.4": learns, "training.5": whole_codes, "training.6": no_training,
    "tools.1": real_samples, "tools.2": k_quant, "tools.4": works, "tools.5": centred, "tools.6": decoding,
}  # fmt: skip


def halves(program):
    x = torch.tensor([0.4, 0.6, -0.5, 1.5, 2.4999])
    assert ((program(x) - x).abs() <= 0.5).all()


def uint8(program):
    for x in (x_of(50), torch.zeros(3), -torch.rand(20)):
        codes, scale, zero_point = program(x)
        assert ((scale * (codes.float() - zero_point) - x).abs() <= scale * 0.50001).all()


def brute_force(program):
    for value in torch.linspace(-1, 1, 77):
        gap = (ql.nf4_levels() - value).abs().min()
        assert (program(value[None]) - value).abs() <= gap + 1e-7


def small_float(program):
    assert program(0b01111110) == torch.finfo(torch.float8_e4m3fn).max
    assert program(1) == 2**-9


def four_terms(program):
    x, w = [3, 1, 4], [1, 5, 9]
    loop = sum((a - 2) * (b - 6) for a, b in zip(x, w, strict=True))
    assert program(torch.tensor(x), 2, torch.tensor(w), 6) == loop


def bias(program):
    unit, b = 0.03 * 0.002, x_of(9)
    assert ((program(b, 0.03, 0.002) - b / unit).abs() <= 0.51).all()


def joined(program):
    assert abs(program(8.0, 10, 2.0, 10) - 4.0) < 1e-6


def paired(program):
    a = torch.rand(64)
    assert program(a, a + 0.25) < 1e-6


def grows(program):
    step = 1e-3
    moved = (0.1 + step) * 7 - 0.1 * 7
    assert abs(program(torch.tensor([9.0]), 0.1).item() - moved / step) < 1e-2


def gguf_agrees(program):
    weights = x_of(32).numpy()
    block = quantize(weights, GGMLQuantizationType.Q4_0)
    values = torch.from_numpy(dequantize(block, GGMLQuantizationType.Q4_0))
    scale = torch.from_numpy(block[:2].view("float16").astype("float32"))
    codes = torch.round(values / scale).int() + 8
    assert program(codes).tolist() == block[2:].tolist()


CLEARED = {
    "ranges.2": halves, "ranges.5": uint8, "codebooks.3": brute_force, "codebooks.6": small_float,
    "integers.2": four_terms, "integers.5": bias, "measuring.2": joined, "measuring.6": paired, "training.3": grows,
    "tools.3": gguf_agrees,
}  # fmt: skip
