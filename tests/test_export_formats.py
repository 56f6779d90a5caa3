"""Codes in other programs' tensors and files: there and back, beside the engines' own, refused if they do not fit."""

import importlib.util
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_lm import random_model
from torch import Tensor, nn

from quantlab import PerAxis, PerGroup, PerTensor, choose_qparams, dequantize, quantize, quantize_codebook
from quantlab import quantize_tensor as rounded
from quantlab.codebook import fp4_levels, nf4_levels
from quantlab.export import checkpoints
from quantlab.export.checkpoint_words import AWQ_ORDER, LAYOUTS, from_words, to_words
from quantlab.export.checkpoints import checkpoint_codes, layer_codes, layer_parts, load_checkpoint, save_checkpoint
from quantlab.export.parts import int32_bias
from quantlab.gptq import Hessian, gptq_quantize
from quantlab.linear import StaticInt8Linear
from quantlab.lm import load_lm, quantize_lm
from quantlab.observers import MinMax
from quantlab.packing import pack
from quantlab.rotations import rotate

pytestmark = pytest.mark.filterwarnings("ignore")  # the engines', about themselves


def needs(name: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not here: pip install .[deploy]"
    )


def matrix(rows: int = 48, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 10


def seeded_linear(rows: int = 48, columns: int = 128) -> nn.Linear:
    linear = nn.Linear(columns, rows)
    with torch.no_grad():
        linear.weight.copy_(matrix(rows, columns, 4))
        linear.bias.copy_(matrix(1, rows, 5)[0])
    return linear


def same(a, b) -> bool:
    """Codes counted from 0, scales and zero points alike."""
    zeros = a.qparams.zero_point - a.qparams.qmin, b.qparams.zero_point - b.qparams.qmin
    codes = a.codes.short() - a.qparams.qmin, b.codes.short() - b.qparams.qmin
    return torch.equal(*codes) and torch.equal(*zeros) and torch.equal(a.qparams.scale, b.qparams.scale)


# --- checkpoints ------------------------------------------------------------------------------------------------------

KINDS = [(name, symmetric, how) for name, of in LAYOUTS.items() for symmetric in of.grids
         for how in [PerAxis(0)] * of.rows + [PerGroup(32)] * of.groups]  # fmt: skip
HALVES = ("GPTQ", "GPTQ v2", "AWQ")


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 999))
def test_words_hold_the_codes_of_a_loop(bits, rows, runs, odd, seed):
    each = 32 // bits
    codes = torch.randint(2**bits, (rows, runs * each), generator=torch.Generator().manual_seed(seed))
    awq = odd and bits == 4
    order = AWQ_ORDER if awq else range(each)
    words = to_words(codes, bits=bits, awq=awq)
    for r in range(rows):
        for w in range(runs):
            meant = sum(int(codes[r, w * each + place]) << bits * i for i, place in enumerate(order))
            assert int(words[r, w]) % 2**32 == meant
    assert torch.equal(from_words(words, bits=bits, awq=awq), codes.to(torch.uint8))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("layout", "symmetric", "how"), KINDS)
def test_codes_of_a_layer_come_back(layout, symmetric, how, signed):
    q = rounded(matrix(), bits=LAYOUTS[layout].bits, granularity=how, symmetric=symmetric, signed=signed)
    back = layer_codes(layer_parts(q, layout), layout, symmetric=symmetric)
    if layout in HALVES:
        assert torch.equal(back.qparams.scale, q.qparams.scale.half().float())
        back.qparams.scale.copy_(q.qparams.scale)
    assert same(back, q)
    assert (back.granularity, back.bits, back.symmetric) == (how, q.bits, symmetric)


def test_gptq_stores_zero_points_less_one_in_version_1():
    """An unpacking as gptqmodel's: shifts down the inputs of qweight, along the outputs of qzeros."""
    q = rounded(matrix(), bits=4, granularity=PerGroup(32))
    shifts = torch.arange(0, 32, 4)
    for layout, more in {"GPTQ": 1, "GPTQ v2": 0}.items():
        parts = layer_parts(q, layout)
        codes = (parts["qweight"][:, None].long() >> shifts[:, None] & 15).flatten(0, 1)  # (in, out)
        zeros = (parts["qzeros"][..., None].long() >> shifts & 15).flatten(1) + more  # (groups, out)
        index = parts["g_idx"].long()
        weight = parts["scales"].float()[index] * (codes - zeros[index])
        assert torch.allclose(weight.T, q.dequantize(), rtol=2**-10)


def test_act_order_has_a_place_in_gptq_alone():
    hessian = Hessian(64).add(matrix(100, 64, 1) * torch.rand(64))
    q = gptq_quantize(matrix(16, 64), hessian, bits=4, group_size=32, act_order=True)
    assert q.group_index is not None
    back = layer_codes(layer_parts(q, "GPTQ v2"), "GPTQ v2", symmetric=q.symmetric)
    assert torch.equal(back.group_index, q.group_index)
    assert torch.equal(back.codes, q.codes)
    for layout in ("W4A16", "AWQ"):
        with pytest.raises(ValueError, match="act-order"):
            layer_parts(q, layout)


@pytest.mark.parametrize(("layout", "options", "rule"), [
    ("W4A16", {"bits": 8, "granularity": PerAxis(0)}, "4-bit"),
    ("W8A8", {"bits": 8, "granularity": PerGroup(32)}, "one scale a row"),
    ("W8A16", {"bits": 8, "granularity": PerAxis(0), "symmetric": False}, "symmetric"),
    ("GPTQ", {"bits": 4, "granularity": PerGroup(32), "symmetric": False}, "symmetric"),
    ("AWQ", {"bits": 4, "granularity": PerAxis(0)}, "groups"),
    ("W4A16", {"bits": 4, "granularity": PerTensor()}, "one scale a row or groups"),
    ("W5", {"bits": 4, "granularity": PerAxis(0)}, "one of"),
])  # fmt: skip
def test_what_a_layout_does_not_hold_is_refused_by_its_rule(layout, options, rule):
    with pytest.raises(ValueError, match=rule):
        layer_parts(rounded(matrix(), **options), layout)


def test_sizes_that_no_word_holds_and_scales_that_no_half_holds_are_refused():
    with pytest.raises(ValueError, match="share an int32"):
        layer_parts(rounded(matrix(8, 12), bits=4, granularity=PerAxis(0)), "W4A16")
    with pytest.raises(ValueError, match="float16"):
        layer_parts(rounded(matrix() * 1e-8, bits=4, granularity=PerAxis(0)), "GPTQ")
    with pytest.raises(ValueError, match="qweight"):
        layer_codes({}, "AWQ", symmetric=True)


@pytest.fixture(scope="module")
def lm():
    model, tokenizer = load_lm()
    return model, tokenizer


WAYS = {
    "W4A16": {"bits": 4, "group_size": 128, "symmetric": True}, "W4A16, zero points": {"bits": 4, "group_size": 32,
    "symmetric": False}, "W8A16": {"bits": 8, "group_size": None, "symmetric": True}, "W8A8": {"bits": 8, "group_size":
    None, "symmetric": True}, "GPTQ": {"bits": 4, "group_size": 128, "symmetric": True}, "GPTQ v2": {"bits": 4,
    "group_size": 128, "symmetric": False}, "AWQ": {"bits": 4, "group_size": 128, "symmetric": False},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_model_is_what_its_folder_loads_as(lm, tmp_path, way):
    (model, tokenizer), layout = lm, way.partition(",")[0]
    here = layout in HALVES or importlib.util.find_spec("compressed_tensors") is not None
    new, report = quantize_lm(model, method="rtn", progress=False, **WAYS[way])
    folder = tmp_path / "m"
    size = save_checkpoint(model, folder, report.qtensors, layout=layout, tokenizer=tokenizer, verify=here)
    assert size == (folder / "model.safetensors").stat().st_size < 1.02 * report.nbytes
    for name, back in checkpoint_codes(folder).items():
        q = report.qtensors[name]
        assert torch.equal(back.codes.short() - back.qparams.qmin, q.codes.short() - q.qparams.qmin)
    if layout in HALVES or not here:
        return
    ids = torch.arange(20)[None]
    with torch.no_grad():
        apart = (load_checkpoint(folder)(ids).logits - new(ids).logits).abs().max().item()
    assert apart < (1.5 if layout == "W8A8" else 1e-4)


def test_a_folder_is_whole_or_not_there(lm, tmp_path, monkeypatch):
    model, _ = lm
    _, report = quantize_lm(model, method="rtn", progress=False, **WAYS["AWQ"])
    save_checkpoint(model, tmp_path / "m", report.qtensors, layout="AWQ")
    before = load_file(tmp_path / "m" / "model.safetensors")
    monkeypatch.setattr(checkpoints, "layer_parts", lambda q, layout: layer_parts(other(q), layout))
    with pytest.raises(ValueError, match="other codes"):
        save_checkpoint(model, tmp_path / "m", report.qtensors, layout="AWQ", verify=True)
    after = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_of_someone_else_is_left_untouched(lm, tmp_path, monkeypatch):
    (model, _), folder = lm, tmp_path / "mine"
    _, report = quantize_lm(model, method="rtn", progress=False, **WAYS["AWQ"])

    def refused(words: str) -> None:
        before = contents(folder)
        with pytest.raises(ValueError, match=f"{folder}.* {words}"):
            save_checkpoint(model, folder, report.qtensors, layout="AWQ")
        assert contents(folder) == before
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    model.save_pretrained(folder)  # a model.safetensors, and none of ours
    refused("holds no checkpoint of ours")
    (folder / "model.safetensors").write_bytes(b"half a file")
    refused("is truncated or no safetensors file")
    for path in folder.iterdir():
        path.unlink()
    (folder / "letter.txt").write_text("dear")
    refused("holds no checkpoint of ours")
    (folder / "letter.txt").unlink()
    save_checkpoint(model, folder, report.qtensors, layout="AWQ")
    (folder / "letter.txt").write_text("dear")
    refused("also holds letter.txt")
    (folder / "letter.txt").unlink()
    save_checkpoint(model, folder, report.qtensors, layout="AWQ")
    monkeypatch.chdir(folder)
    refused("is where this program runs")


def test_a_model_that_turns_activations_while_it_runs_is_no_checkpoint(tmp_path):
    for online in (True, False):
        turned = rotate(
            random_model("llama", vocab_size=64, hidden_size=32, intermediate_size=64), heads=False, online=online
        )
        new, report = quantize_lm(turned, method="rtn", bits=8, group_size=None, symmetric=True, progress=False)
        if online:
            with pytest.raises(ValueError, match=r"mlp\.down_proj\.rotation turns activations"):
                save_checkpoint(turned, tmp_path / "m", report.qtensors, layout="W8A8")
            assert not (tmp_path / "m").exists()
        else:
            save_checkpoint(turned, tmp_path / "m", report.qtensors, layout="W8A8")


def test_buffers_that_a_checkpoint_holds_are_written(tmp_path):
    model = random_model("llama", vocab_size=64)
    model.model.layers[0].register_buffer("bias_of_router", torch.linspace(0, 1, 7))
    model.model.layers[0].register_buffer("not_kept", torch.ones(7), persistent=False)
    report = quantize_lm(model, method="rtn", bits=8, group_size=None, symmetric=True, progress=False)[1]
    save_checkpoint(model, tmp_path / "m", report.qtensors, layout="W8A8")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(stored["model.layers.0.bias_of_router"], torch.linspace(0, 1, 7))
    weights = {f"{name}.weight_scale" for name in report.qtensors}
    tied = set(model.all_tied_weights_keys)
    assert stored.keys() == (model.state_dict().keys() | weights) - tied


def other(q):
    codes = q.codes.clone()
    codes[0, 0] = codes[0, 0] ^ 1
    return type(q)(codes, q.qparams, q.bits, q.granularity, q.symmetric)


def test_a_checkpoint_needs_all_layers_of_one_kind(lm, tmp_path):
    model, _ = lm
    _, report = quantize_lm(model, method="rtn", progress=False, **WAYS["W4A16"])
    codes, first = dict(report.qtensors), next(iter(report.qtensors))
    with pytest.raises(ValueError, match="one side only"):
        save_checkpoint(model, tmp_path / "m", {first: codes[first]}, layout="W4A16")
    odd = rounded(codes[first].dequantize(), bits=4, granularity=PerGroup(32))
    with pytest.raises(ValueError, match="2 kinds"):
        save_checkpoint(model, tmp_path / "m", codes | {first: odd}, layout="W4A16")
    assert not (tmp_path / "m").exists()


# --- parts ------------------------------------------------------------------------------------------------------------


def test_a_bias_in_steps_of_the_accumulators_fits_an_int32_or_is_refused():
    step = torch.tensor([0.5, 0.25, 2.0**-20])
    bias = torch.tensor([-(2.0**30), 2.0**29 - 32, 1.3])
    slow = [round(b / s) for b, s in zip(bias.tolist(), step.tolist(), strict=True)]
    assert int32_bias(bias, step).tolist() == slow
    assert slow[0] == -(2**31)
    for row, value in ((0, -(2.0**30) - 128), (0, 2.0**30), (2, 4096.0), (1, -1e30)):
        wrong = bias.clone()
        wrong[row] = value
        with pytest.raises(ValueError, match=rf"bias of row {row} is {re.escape(f'{value:.6g}')}, .* int32"):
            int32_bias(wrong, step)


# --- torchao ----------------------------------------------------------------------------------------------------------


@needs("torchao")
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("how", [PerAxis(0), PerGroup(32)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_torchao_holds_our_codes_and_computes_with_them(bits, how, symmetric):
    from quantlab.export.torchao import from_torchao, to_torchao

    q, x = rounded(matrix(), bits=bits, granularity=how, symmetric=symmetric), matrix(5, seed=1)
    weight = to_torchao(q)
    assert same(from_torchao(weight), q)
    assert torch.allclose(F.linear(x, weight), F.linear(x, q.dequantize()), atol=1e-6)
    tokens = rounded(x, bits=8, granularity=PerAxis(0), symmetric=False).dequantize()
    int8 = F.linear(x, to_torchao(q, activations="int8"))
    assert torch.allclose(int8, F.linear(tokens, q.dequantize()), atol=0.02)


@needs("torchao")
@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_torchao_alone_finds_the_same_codes_and_scales(bits, size):
    from quantlab.export.torchao import from_torchao, quantized_by_torchao

    linear = seeded_linear()
    before = linear.weight.detach().clone()
    theirs = quantized_by_torchao(linear, bits=bits, group_size=size)
    how = PerAxis(0) if size is None else PerGroup(size)
    assert same(from_torchao(theirs.weight), rounded(before, bits=bits, granularity=how))
    assert torch.equal(linear.weight, before)
    assert theirs(torch.ones(2, 128)).shape == (2, 48)


@needs("torchao")
def test_the_int8_weights_of_quantize_are_read(lm):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from quantlab.export.torchao import from_torchao

    net = nn.Sequential(seeded_linear(16, 64))
    q = rounded(net[0].weight, bits=8, granularity=PerAxis(0))
    quantize_(net, Int8WeightOnlyConfig())
    assert same(from_torchao(net[0].weight), q)


@needs("torchao")
def test_a_model_with_our_codes_in_torchao(lm):
    from quantlab.export.torchao import torchao_model

    model, ids = lm[0], torch.arange(20)[None]
    new, report = quantize_lm(model, method="rtn", bits=4, group_size=32, symmetric=True, progress=False)
    with torch.no_grad():
        theirs = torchao_model(model, report.qtensors)(ids).logits
        assert torch.allclose(theirs, new(ids).logits, atol=1e-3)
    with pytest.raises(ValueError, match="no nn.Linear"):
        torchao_model(model, {"nobody": next(iter(report.qtensors.values()))})


@needs("torchao")
def test_torchao_refuses_by_its_rules():
    from quantlab.export.torchao import from_torchao, quantized_by_torchao, to_torchao

    for options, rule in (({"granularity": PerTensor()}, "one scale a row"), ({"granularity": PerAxis(0), "signed":
                          False}, "signed")):  # fmt: skip
        with pytest.raises(ValueError, match=rule):
            to_torchao(rounded(matrix(), bits=4, **options))
    with pytest.raises(ValueError, match="would round them"):
        to_torchao(rounded(matrix().bfloat16(), bits=4, granularity=PerAxis(0)))
    with pytest.raises(ValueError, match="of torchao"):
        from_torchao(matrix())
    with pytest.raises(ValueError, match="does not divide"):
        quantized_by_torchao(nn.Linear(8, 4), group_size=3)


# --- LiteRT -----------------------------------------------------------------------------------------------------------


@needs("ai_edge_litert")
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("bits", "how"), [(8, PerAxis(0)), (4, PerAxis(0)), (4, PerGroup(32)), (4, PerGroup(64))])
def test_litert_gives_what_is_expected_of_our_codes(tmp_path, bits, how, tokens):
    from quantlab.export.litert import expected_litert, litert_session, save_litert_weights, weight_codes

    q, x, bias, path = (
        rounded(matrix(), bits=bits, granularity=how),
        matrix(tokens, seed=1),
        matrix(1, 48)[0],
        tmp_path / "w",
    )
    assert save_litert_weights(q, path, bias=bias, tokens=tokens, verify=True) == path.stat().st_size
    assert torch.equal(weight_codes(path), q.codes)
    y, meant = litert_session(path)(x), expected_litert(q, x, bias=bias)
    assert (y - meant).abs().max() < 0.01 * meant.abs().max()  # 1e-6 with the kernels of XNNPACK
    with pytest.raises(ValueError, match="number of tokens"):
        litert_session(path)(matrix(tokens + 1))


def static(bits: int = 8) -> tuple:
    """A static int8 layer and the map of its output."""
    linear, observer, x = seeded_linear(), MinMax(), matrix(256, seed=2) + 0.03
    observer.update(x)
    layer = StaticInt8Linear.from_linear(linear, observer, weight_bits=bits)
    y = layer.exact(x)
    return layer, choose_qparams(y.amin(), y.amax(), qmin=0, qmax=255)


@needs("ai_edge_litert")
def test_litert_computes_an_int8_layer_to_a_step(tmp_path):
    from quantlab.export.litert import litert_session, save_litert_int8, weight_codes

    (layer, output), x, path = static(), matrix(64, seed=3), tmp_path / "s"
    save_litert_int8(layer, output, path, tokens=64, verify=True)
    assert torch.equal(weight_codes(path), layer.codes)
    meant = dequantize(quantize(layer.exact(x), output), output)
    steps = ((litert_session(path)(x) - meant) / output.scale).abs()
    assert steps.max() < 1.01  # of a tie, or where a rounded bias moved it across one
    assert (steps < 0.5).float().mean() > 0.99


@needs("ai_edge_litert")
def test_litert_files_are_whole_or_not_there(tmp_path, monkeypatch):
    from quantlab.export import litert
    from quantlab.export.litert import save_litert_int8, save_litert_weights, weight_codes

    monkeypatch.setattr(litert, "pack", lambda codes, bits: pack(codes.flatten().roll(1), bits=bits))
    q = rounded(matrix(), bits=4, granularity=PerGroup(32))
    with pytest.raises(ValueError, match="other codes"):
        save_litert_weights(q, tmp_path / "w", verify=True)
    assert list(tmp_path.iterdir()) == []
    for bits, how, symmetric, rule in (
        (5, PerAxis(0), True, "4 or 8"), (4, PerGroup(16), True, "multiple of 32"), (4, PerAxis(0), False, "symmetric"),
    ):  # fmt: skip
        odd = rounded(matrix(), bits=bits, granularity=how, symmetric=symmetric)
        with pytest.raises(ValueError, match=rule):
            save_litert_weights(odd, tmp_path / "w")
    with pytest.raises(ValueError, match="have 8 bits"):
        save_litert_int8(*static(7), tmp_path / "w")
    (tmp_path / "text").write_text("no file of theirs")
    with pytest.raises(ValueError, match="TFL3"):
        weight_codes(tmp_path / "text")


@needs("ai_edge_litert")
def test_litert_refuses_a_bias_that_no_int32_holds_and_answers_that_are_wrong(tmp_path, monkeypatch):
    from quantlab.export import litert
    from quantlab.export.litert import save_litert_int8, save_litert_weights

    layer, output = static()
    with torch.no_grad():
        layer.bias[7] = 1e9
    with pytest.raises(ValueError, match=r"bias of row 7 is 1e\+09"):
        save_litert_int8(layer, output, tmp_path / "w")
    q = rounded(matrix(), bits=4, granularity=PerGroup(32))
    monkeypatch.setattr(litert, "expected_litert", lambda q, x, *, bias: torch.ones(len(x), len(bias)))
    with pytest.raises(ValueError, match="LiteRT's answer is .* off"):
        save_litert_weights(q, tmp_path / "w", verify=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(litert, "expected_litert", None)  # without verify nothing is computed
    save_litert_weights(q, tmp_path / "w")


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


@needs("bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_bitsandbytes_computes_with_our_bytes(block_size, double_quant, dtype):
    from quantlab.export.bitsandbytes import from_bitsandbytes, to_bitsandbytes

    # 64 rows: on a CPU with AVX-512 bitsandbytes computes with multiples of 32 alone.
    q = quantize_codebook(matrix(64).to(dtype), nf4_levels(), block_size=block_size, double_quant=double_quant)
    bias, x = matrix(1, 64)[0], matrix(5, seed=1).to(dtype)
    layer = to_bitsandbytes(q, bias=bias)
    back = from_bitsandbytes(layer)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    with torch.no_grad():
        y = layer(x)
    in_bfloat16 = dtype == torch.bfloat16 or layer.support_avx512bf16_for_cpu
    assert torch.allclose(y, F.linear(x, q.dequantize(), bias.to(dtype)), atol=0.02 if in_bfloat16 else 1e-6)
    if layer.support_avx512bf16_for_cpu:
        with pytest.raises(ValueError, match="has packed this layer anew when it computed"):
            from_bitsandbytes(layer)
    else:
        assert torch.equal(from_bitsandbytes(layer).codes, q.codes)


@needs("bitsandbytes")
def test_bitsandbytes_alone_makes_the_same_bytes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb
    from quantlab.export.bitsandbytes import from_bitsandbytes, to_bitsandbytes

    theirs = bnb.nn.Linear4bit(128, 48, bias=False, quant_type="nf4", compress_statistics=False)
    with pytest.raises(ValueError, match="not rounded yet"):
        from_bitsandbytes(theirs)
    theirs.weight = bnb.nn.Params4bit(matrix(), requires_grad=False, quant_type="nf4", compress_statistics=False)
    theirs.to("cpu")
    q = quantize_codebook(matrix(), nf4_levels())
    assert torch.equal(from_bitsandbytes(theirs).codes, q.codes)
    assert torch.equal(theirs.weight.data.flatten(), to_bitsandbytes(q).weight.data.flatten())


@needs("bitsandbytes")
def test_bitsandbytes_refuses_by_its_rules():
    from quantlab.export.bitsandbytes import from_bitsandbytes, to_bitsandbytes

    with pytest.raises(ValueError, match="NF4"):
        to_bitsandbytes(quantize_codebook(matrix(), fp4_levels()))
    for size, columns in ((16, 128), (64, 96)):
        with pytest.raises(ValueError, match="must divide"):
            to_bitsandbytes(quantize_codebook(matrix(8, columns), nf4_levels(), block_size=size))
    with pytest.raises(ValueError, match="Linear4bit"):
        from_bitsandbytes(nn.Linear(2, 2))


def test_a_missing_engine_is_one_sentence(monkeypatch):
    from quantlab.export import engines, torchao

    monkeypatch.setattr(engines, "engine_here", lambda name: False)
    with pytest.raises(ModuleNotFoundError, match="torchao is not here; `pip install"):
        torchao.to_torchao(rounded(matrix(), bits=4, granularity=PerAxis(0)))
