"""llama.cpp's blocks and files: beside the gguf package, llama.cpp itself where it is installed, loops, and edges."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as their_dequantize
from gguf.quants import quantize as their_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantlab import PerAxis, PerGroup, quantize_tensor
from quantlab.export.gguf_blocks import TYPES, dequantize_gguf, quantize_gguf
from quantlab.export.gguf_codes import blocks_of
from quantlab.export.gguf_fits import fit_affine, fit_scale

BLOCKS = [kind for kind, of in TYPES.items() if of.size > 1]
ROUNDED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"]  # what the gguf package quantizes too
LIBRARY = sorted(Path(__file__).parent.parent.glob(".llama_cpp/**/libggml-base.so"))


def weights(rows: int = 24, columns: int = 512, seed: int = 0) -> Tensor:
    """Normal weights, and blocks that are odd: zeros, constants, one large, tiny ones."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    x[0, :256], x[1, :16], x[2, :32], x[3, :32], x[4] = 0, 0, 0.3, -0.3, 0
    x[5, 7], x[6, :32], x[7] = 60.0, 1e-9, x[7].abs()
    return x


def importance(columns: int = 512) -> Tensor:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 3 * 10


def error(x: Tensor, kind: str, packed: Tensor, weighted: Tensor | float = 1.0) -> float:
    return ((dequantize_gguf(packed, kind) - x).square() * weighted).sum().item()


@pytest.mark.parametrize("kind", TYPES)
def test_a_type_is_what_gguf_says_it_is(kind):
    number = gguf.GGMLQuantizationType[kind]
    assert TYPES[kind].number == number
    assert (TYPES[kind].size, TYPES[kind].nbytes) == gguf.GGML_QUANT_SIZES[number]


@pytest.mark.parametrize("kind", ROUNDED)
def test_bytes_are_those_of_the_gguf_package(kind):
    x = weights()
    theirs = np.ascontiguousarray(their_quantize(x.numpy(), gguf.GGMLQuantizationType[kind])).view(np.uint8)
    assert torch.equal(quantize_gguf(x, kind), torch.from_numpy(theirs))


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_those_of_the_gguf_package(kind):
    packed = quantize_gguf(weights(), kind)
    theirs = their_dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind])
    assert torch.equal(dequantize_gguf(packed, kind), torch.from_numpy(theirs.copy()))


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_bytes_mean_what_the_gguf_package_says(kind):
    raw = torch.randint(
        0, 256, (200, TYPES[kind].nbytes), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    with np.errstate(all="ignore"):
        theirs = torch.from_numpy(their_dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind]).copy())
    assert torch.equal(dequantize_gguf(raw, kind).nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.skipif(not LIBRARY, reason="llama.cpp is not here: python -m recipes.llama_cpp")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_llama_cpp_itself_writes_the_same_bytes(kind, weighted):
    """But for sums whose last digits differ: then another start may win by a hair."""
    x, by = weights(96, 1024), importance(1024) if weighted else None
    theirs = torch.zeros_like(ours := quantize_gguf(x, kind, importance=by))
    chunk = ctypes.CDLL(str(LIBRARY[0])).ggml_quantize_chunk
    chunk.restype, pointer = ctypes.c_size_t, ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]
    weights_at = None if by is None else by.data_ptr()
    assert chunk(TYPES[kind].number, x.data_ptr(), theirs.data_ptr(), 0, *x.shape, weights_at) == theirs.numel()
    same = (ours == theirs).double().mean()
    assert same == 1 if kind in ROUNDED and not weighted else same > 0.98
    ratio = error(x, kind, ours, 1.0 if by is None else by) / error(x, kind, theirs, 1.0 if by is None else by)
    assert 0.99 < ratio < 1.01


@pytest.mark.parametrize("kind", BLOCKS)
def test_importance_lowers_the_weighted_error(kind):
    x, by = weights(seed=3)[8:], importance()
    plain, searched = quantize_gguf(x, kind), quantize_gguf(x, kind, importance=by)
    if kind == "Q8_0":
        assert torch.equal(plain, searched)
    else:
        assert error(x, kind, searched, by) < 0.95 * error(x, kind, plain, by)


@pytest.mark.parametrize("kind", BLOCKS)
def test_importance_of_nothing_still_keeps_the_weights(kind):
    x = weights()[8:]
    for by in (torch.zeros(512), importance().index_fill(0, torch.arange(64), 0.0)):
        assert error(x, kind, quantize_gguf(x, kind, importance=by)) < 0.02 * x.square().sum()


@pytest.mark.parametrize("kind", BLOCKS)
def test_zeros_stay_zeros_and_blocks_do_not_see_each_other(kind):
    x, of = weights(), TYPES[kind]
    packed = quantize_gguf(x, kind)
    assert dequantize_gguf(packed, kind)[4].eq(0).all()
    for column in range(0, 512, of.size):
        alone = quantize_gguf(x[:, column : column + of.size], kind)
        assert torch.equal(alone, packed[:, column // of.size * of.nbytes :][:, : of.nbytes])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(1e-4, 1e3), st.sampled_from(BLOCKS))
def test_the_error_is_about_half_a_step(seed, size, kind):
    """Steps are the widest range of a block over the codes; scales of 6 bits may add as much as that again."""
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * size
    codes = {"Q8_0": 254, "Q4_0": 14, "Q5_0": 30, "Q4_1": 15, "Q4_K": 15, "Q5_K": 31, "Q6_K": 62}[kind]
    step = 2 * x.abs().amax(-1, keepdim=True) / codes
    assert ((dequantize_gguf(quantize_gguf(x, kind), kind) - x).abs() <= 1.6 * step).all()


def slow_scale(x: Tensor, w: Tensor, half: int) -> float:
    """The least Σ w (x - s q)² over many scales: what fit_scale looks for, by trying."""
    best, largest = float("inf"), x[x.abs().argmax()].item()
    for k in np.linspace(-1.2, 1.2, 500):
        q = (x * (-(half + k) / largest)).round().clamp(-half, half - 1)
        s = (w * x * q).sum() / (w * q * q).sum()
        best = min(best, (w * (x - s * q).square()).sum().item())
    return best


def test_the_search_for_a_scale_comes_near_the_best():
    x, w = torch.randn(20, 32, generator=torch.Generator().manual_seed(4)).double(), importance(32).double()
    codes, scale = fit_scale(x, w.expand_as(x), 8)
    found = (w * (x - scale * (codes - 8)).square()).sum(-1)
    best = torch.tensor([slow_scale(row, w, 8) for row in x], dtype=torch.float64)
    assert (found < 1.3 * best).all()
    assert found.mean() < 1.1 * best.mean()


def test_the_search_for_scale_and_offset_solves_for_both():
    """With its codes no other scale and offset are better: the slope is 0 in both, or the offset is held at 0."""
    x, w = torch.randn(50, 32, generator=torch.Generator().manual_seed(5)).double(), importance(32).double() + 0.1
    starts = torch.tensor(0.05) * torch.arange(37) - 0.9
    codes, scale, offset = fit_affine(x, w.expand_as(x), 15, starts.double())
    left = scale * codes - offset - x
    slopes = (w * left * codes).sum(-1), (w * left).sum(-1)
    assert (slopes[0].abs() < 1e-9).all()
    assert (slopes[1].abs()[offset.squeeze() > 0] < 1e-9).all()
    assert (offset >= 0).all()
    least = x.amin(-1, keepdim=True).clamp(max=0)
    step = (x.amax(-1, keepdim=True) - least) / 15
    plain = (((x - least) / step).round() * step + least - x).square() * w
    assert (left.square() * w).sum(-1).mean() < 0.8 * plain.sum(-1).mean()


@pytest.mark.parametrize(("bits", "symmetric", "kind"), [(8, True, "Q8_0"), (4, True, "Q4_0"), (4, False, "Q4_1")])
def test_quantlabs_codes_in_llama_cpps_blocks(bits, symmetric, kind):
    q = quantize_tensor(weights(), bits=bits, granularity=PerGroup(32), symmetric=symmetric)
    named, packed = blocks_of(q)
    assert named == kind
    back = dequantize_gguf(packed, kind)
    assert torch.allclose(back, q.dequantize(), rtol=0, atol=2**-10 * q.dequantize().abs().max())
    raw = packed.view(-1, TYPES[kind].nbytes)
    codes = raw[:, 2:].contiguous().view(torch.int8) if bits == 8 else raw[:, -16:]
    ours = (q.codes.int() - q.qparams.qmin).view(-1, 32)
    if bits == 8:
        assert torch.equal(codes.int(), ours + q.qparams.qmin)
    else:
        assert torch.equal(torch.cat([codes & 15, codes >> 4], 1).int(), ours)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize_gguf(torch.ones(2, 48), "Q4_0"), "blocks of 32"),
        (lambda: quantize_gguf(torch.ones(2, 288), "Q4_K"), "blocks of 256"),
        (lambda: quantize_gguf(torch.tensor(1.0), "Q4_0"), "blocks of 32"),
        (lambda: quantize_gguf(torch.ones(2, 32), "Q3_0"), "kind must be one of"),
        (lambda: quantize_gguf(torch.ones(2, 32) * 1e30, "Q4_0"), "float16"),
        (lambda: quantize_gguf(torch.ones(2, 32) * torch.nan, "Q4_0"), "finite"),
        (lambda: quantize_gguf(torch.ones(2, 32), "Q4_0", importance=torch.ones(31)), "importance"),
        (lambda: quantize_gguf(torch.ones(2, 32), "Q4_0", importance=-torch.ones(32)), "not negative"),
        (lambda: dequantize_gguf(torch.ones(2, 17, dtype=torch.uint8), "Q4_0"), "18 bytes"),
        (lambda: dequantize_gguf(torch.ones(2, 18), "Q4_0"), "uint8"),
        (lambda: blocks_of(quantize_tensor(torch.ones(2, 64), bits=3, granularity=PerGroup(32))), "3 bits"),
        (lambda: blocks_of(quantize_tensor(torch.ones(2, 64), bits=4, granularity=PerAxis(0))), "PerAxis"),
        (lambda: blocks_of(torch.ones(2, 32)), "got Tensor"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
