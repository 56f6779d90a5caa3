"""ExecuTorch files of layers and models, where it is installed; and what is refused, and said, everywhere.

python -m recipes.engines executorch makes the environment in which all of these run.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab import PerAxis, PerGroup, PerTensor, quantize_tensor
from quantlab.export import engines, executorch
from quantlab.export.executorch_run import check_weight, executorch_session, expected_executorch, holds_codes
from quantlab.export.torchao import to_torchao
from quantlab.gptq import Hessian, gptq_quantize

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and ExecuTorch's, about themselves
needs_executorch = pytest.mark.skipif(
    not engines.engine_here("executorch"), reason="ExecuTorch is not here: python -m recipes.engines executorch"
)
EIGHT = quantize_tensor(torch.eye(24, 128), bits=8, granularity=PerAxis(0))
KINDS = [(8, PerAxis(0)), (4, PerAxis(0)), (4, PerGroup(32)), (4, PerGroup(64))]


def matrix(rows: int = 24, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 10


def kept(q) -> bytes:
    """The codes as XNNPACK keeps them, code by code: two of 4 bits share a byte, the first in the low half."""
    codes = q.codes.flatten().tolist()
    if q.bits == 8:
        return bytes(code % 256 for code in codes)
    return bytes((low + 8) | (high + 8) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))


# --- everywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "rule"),
    [
        (quantize_tensor(matrix(), bits=8, granularity=PerAxis(0), symmetric=False), "symmetric signed codes"),
        (quantize_tensor(matrix(), bits=8, granularity=PerAxis(0), signed=False), "symmetric signed codes"),
        (quantize_tensor(matrix(), bits=3, granularity=PerAxis(0)), "4 or 8 bits, got 3"),
        (quantize_tensor(matrix()[None], bits=8, granularity=PerAxis(1)), "matrices"),
        (quantize_tensor(matrix(), bits=8, granularity=PerTensor()), "one scale a row"),
        (quantize_tensor(matrix(), bits=8, granularity=PerAxis(1)), "one scale a row"),
        (quantize_tensor(matrix(), bits=8, granularity=PerGroup(32)), "8 bits have one scale a row"),
        (quantize_tensor(matrix(), bits=4, granularity=PerGroup(16)), "a multiple of 32 .* got 16 of 128"),
        (quantize_tensor(matrix(24, 80), bits=4, granularity=PerGroup(32)), "divides the inputs, got 32 of 80"),
        (quantize_tensor(matrix(24, 100), bits=4, granularity=PerAxis(0)), "a multiple of 32 .* got 100 of 100"),
        (matrix(), "q must be a QTensor"),
    ],
)
def test_what_xnnpack_does_not_take_is_refused_by_its_rule(q, rule, tmp_path):
    for call in (check_weight, lambda q: executorch.save_executorch(q, tmp_path / "layer.pte")):
        with pytest.raises(ValueError, match=rule):
            call(q)
    assert not any(tmp_path.iterdir())


def test_codes_in_another_order_of_columns_are_refused():
    q = gptq_quantize(
        matrix(), Hessian(128).add(matrix(300, seed=1)), bits=4, group_size=32, symmetric=True, act_order=True
    )
    with pytest.raises(ValueError, match="in the order of the columns"):
        check_weight(q)


@pytest.mark.parametrize(("bits", "how"), KINDS)
def test_one_other_code_in_a_file_is_found(bits, how, tmp_path):
    q, path = quantize_tensor(matrix(), bits=bits, granularity=how), tmp_path / "file"
    path.write_bytes(b"before" + kept(q) + b"after")
    assert holds_codes(path, q)
    other = bytearray(path.read_bytes())
    other[6 + len(kept(q)) - 1] ^= 16
    path.write_bytes(other)
    assert not holds_codes(path, q)


@pytest.mark.parametrize(("bits", "how"), KINDS)
def test_what_is_expected_is_the_product_of_rounded_tokens(bits, how):
    q, x, bias = quantize_tensor(matrix(), bits=bits, granularity=how), matrix(5, seed=1) + 0.1, matrix(1, 24, 2)[0]
    y = expected_executorch(q, x, bias=bias)
    for token, answer in zip(x, y, strict=True):  # Jacob et al.: 256 codes over a token's range, which holds 0
        low, high = min(token.min().item(), 0), max(token.max().item(), 0)
        step = (high - low) / 255
        zero = round(-low / step)
        grid = (((token / step).round() + zero).clamp(0, 255) - zero) * step
        scale = q.element_qparams().scale
        weight = q.codes * (scale if bits == 8 else scale.bfloat16().float())
        assert torch.allclose(answer, weight @ grid + bias, atol=2e-6)
    assert (y - F.linear(x, q.dequantize(), bias)).abs().max() > 1e-5  # the control: x was rounded
    with pytest.raises(ValueError, match=r"x must be \(tokens, 128\)"):
        expected_executorch(q, x[0])


def test_where_it_is_missing_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    q, path = quantize_tensor(matrix(), bits=8, granularity=PerAxis(0)), tmp_path / "layer.pte"
    said = "executorch is not here; `python -m recipes.engines executorch` gets it"
    with pytest.raises(ModuleNotFoundError, match=said):
        executorch.save_executorch(q, path)
    with pytest.raises(ModuleNotFoundError, match=said):
        executorch.save_executorch_float(nn.Linear(4, 4), path)
    assert not path.exists()
    path.write_bytes(b"\0\0\0\0ET12")
    with pytest.raises(ModuleNotFoundError, match=said):
        executorch_session(path)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"GGUF and more")
    with pytest.raises(ValueError, match="is no ExecuTorch file"):
        executorch_session(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        executorch_session(tmp_path / "none")


# --- with ExecuTorch --------------------------------------------------------------------------------------------------


@needs_executorch
@pytest.mark.parametrize(("bits", "how"), KINDS)
def test_a_layer_answers_as_expected_for_any_number_of_tokens(bits, how, tmp_path):
    q, bias, path = quantize_tensor(matrix(), bits=bits, granularity=how), matrix(1, 24, 2)[0], tmp_path / "layer.pte"
    size = executorch.save_executorch(q, path, bias=bias, tokens=8, verify=True)
    assert size == path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["layer.pte"]
    run = executorch_session(path)
    for tokens in (1, 3, 8):
        x = matrix(tokens, seed=tokens) * 10 + 0.3
        y = expected_executorch(q, x, bias=bias)
        assert run(x).shape == y.shape
        assert (run(x) - y).abs().max() < 0.002 * y.abs().max()
    with pytest.raises(RuntimeError):
        run(matrix(9))
    with pytest.raises(RuntimeError):
        run(matrix(3, 64))


@needs_executorch
def test_a_float_layer_is_the_layer(tmp_path):
    linear, x = nn.Linear(64, 24), matrix(5, 64)
    executorch.save_executorch_float(linear, tmp_path / "layer.pte", tokens=8)
    assert torch.allclose(executorch_session(tmp_path / "layer.pte")(x), linear(x), atol=1e-6)


@needs_executorch
def test_a_file_that_is_not_as_meant_does_not_take_its_place(tmp_path, monkeypatch):
    q, path = quantize_tensor(matrix(), bits=8, granularity=PerAxis(0)), tmp_path / "layer.pte"
    path.write_bytes(b"the old one")
    other = quantize_tensor(matrix(seed=3), bits=8, granularity=PerAxis(0))
    with monkeypatch.context() as patch:
        patch.setattr(executorch, "to_torchao", lambda _, **how: to_torchao(other, **how))
        with pytest.raises(ValueError, match="holds other codes of the layer"):
            executorch.save_executorch(q, path, verify=True)
    with monkeypatch.context() as patch:
        patch.setattr(executorch, "expected_executorch", lambda q, x, **how: expected_executorch(q, 1.1 * x, **how))
        with pytest.raises(ValueError, match="ExecuTorch's answer is .* off"):
            executorch.save_executorch(q, path, verify=True)
    assert path.read_bytes() == b"the old one"


def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 100}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@needs_executorch
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_model_predicts_what_its_codes_do(bits, tmp_path):
    from quantlab.lm import quantize_lm

    model, path, ids = small_model(), tmp_path / "model.pte", torch.arange(7)[None] * 3
    grid = {"bits": bits, "group_size": None if bits == 8 else 32, "symmetric": True}
    new, codes = model, None
    if bits:
        new, report = quantize_lm(model, method="rtn", progress=False, **grid)
        codes = report.qtensors
    size = executorch.save_executorch_model(model, path, qtensors=codes, tokens=16, verify=True)
    assert size == path.stat().st_size
    run, (logits, floats) = executorch_session(path), (m(ids).logits.detach() for m in (new, model))
    assert (run(ids) - logits).abs().max() < (0.03 if bits else 1e-4) * logits.abs().max()
    if bits == 4:  # the control: float weights are farther
        assert (run(ids) - logits).norm() < 0.5 * (run(ids) - floats).norm()
        assert all(holds_codes(path, q) for q in codes.values())
    with pytest.raises(ValueError, match="no nn.Linear 'none'"):
        executorch.save_executorch_model(model, path, qtensors={"none": EIGHT})
