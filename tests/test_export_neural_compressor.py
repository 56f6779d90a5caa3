"""Neural Compressor's own codes beside ours, where it is installed; and what is refused, and said, everywhere.

python -m recipes.engines neural-compressor makes the environment in which all of these run.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab import PerAxis, PerGroup, quantize_tensor
from quantlab.export import engines
from quantlab.export.neural_compressor import (
    codes_of,
    from_neural_compressor,
    gptq_by_neural_compressor,
    rtn_by_neural_compressor,
)
from quantlab.lm import quantize_lm

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and its own
needs_it = pytest.mark.skipif(
    not engines.engine_here("neural_compressor"),
    reason="Neural Compressor is not here: python -m recipes.engines neural-compressor",
)


def net(rows: int = 24, columns: int = 128) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(columns, rows))


def small_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 100}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def tokens(count: int = 640) -> Tensor:
    return torch.randint(100, (count,), generator=torch.Generator().manual_seed(0))


def counted(q) -> Tensor:
    return q.codes.int() - q.qparams.qmin


def equal(ours: dict, theirs: dict) -> float:
    """The share of codes that are the same."""
    assert ours.keys() == theirs.keys()
    return torch.cat([(counted(ours[n]) == counted(theirs[n])).flatten() for n in ours]).double().mean().item()


# --- everywhere -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ({"bits": 1}, "bits must be 2..8"), ({"bits": 9}, "bits must be"), ({"group_size": 0}, "group_size must be"),
        ({"symmetric": 1}, "symmetric must be"), ({"bits": 4.5}, "bits must be"),
    ],
)  # fmt: skip
def test_a_grid_that_is_none_is_refused(how, rule):
    with pytest.raises(ValueError, match=rule):
        rtn_by_neural_compressor(net(), **how)
    with pytest.raises(ValueError, match=rule):
        gptq_by_neural_compressor(small_model(), tokens(), **how)


def test_tokens_and_block_sizes_that_are_none_are_refused():
    for how, rule in (({"block_size": 0}, "block_size must be"), ({"act_order": 1}, "act_order must be")):
        with pytest.raises(ValueError, match=rule):
            gptq_by_neural_compressor(small_model(), tokens(), **how)
    with pytest.raises(ValueError, match="token ids lie in"):
        gptq_by_neural_compressor(small_model(), tokens() + 100)


def test_where_it_is_missing_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    for call in (
        lambda: rtn_by_neural_compressor(net()),
        lambda: gptq_by_neural_compressor(small_model(), tokens()),
        lambda: from_neural_compressor(net()[0]),
        lambda: codes_of(net()),
    ):
        with pytest.raises(
            ModuleNotFoundError,
            match="neural_compressor is not here; `python -m recipes.engines neural-compressor` gets it",
        ):
            call()


# --- with Neural Compressor -------------------------------------------------------------------------------------------


@needs_it
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_layers_codes_are_what_it_computes_with(bits, size, symmetric, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old, x = net(), torch.randn(3, 128)
    before = old[0].weight.detach().clone()
    new = rtn_by_neural_compressor(old, bits=bits, group_size=size, symmetric=symmetric)
    q = codes_of(new)["0"]
    assert q.granularity == (PerAxis(0) if size is None else PerGroup(size))
    assert q.symmetric == symmetric
    assert counted(q).max() <= 2**bits - 1
    used = q.dequantize()
    if bits == 8 and not symmetric:  # a code less its zero point is -255..255, which it keeps in an int8
        used = q.qparams.scale.repeat_interleave(size or 128, 1) * (
            (counted(q) - q.qparams.zero_point.repeat_interleave(size or 128, 1)).to(torch.int8)
        )
        assert not torch.allclose(used, q.dequantize(), atol=0.1)
    assert torch.allclose(new(x), F.linear(x, used, old[0].bias), atol=2e-3)
    assert (q.dequantize() - before).abs().max() <= 0.6 * q.qparams.scale.max()  # half a step, and float16's digits
    assert torch.equal(old[0].weight, before)  # and the old one is as it was
    assert not any(tmp_path.iterdir())


@needs_it
def test_asymmetric_codes_are_ours_and_symmetric_ones_have_another_scale():
    old = net()
    for symmetric in (False, True):
        ours = quantize_tensor(old[0].weight, bits=4, granularity=PerGroup(32), symmetric=symmetric)
        theirs = codes_of(rtn_by_neural_compressor(old, symmetric=symmetric))["0"]
        ratio = theirs.qparams.scale / ours.qparams.scale
        assert torch.allclose(ratio, torch.full_like(ratio, 7.5 / 7 if symmetric else 1), rtol=1e-3)
        same = (counted(ours) == counted(theirs)).double().mean()
        assert (same < 0.9) if symmetric else (same > 0.999)


@needs_it
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_its_gptq_gives_our_codes_where_a_block_is_a_group(symmetric, act_order):
    model, how = small_model(), {"group_size": 32, "symmetric": symmetric, "act_order": act_order}
    before = {name: w.clone() for name, w in model.state_dict().items()}
    ours = quantize_lm(model, tokens(), method="gptq", bits=4, window=64, progress=False, **how)[1].qtensors
    blocks = {
        size: codes_of(gptq_by_neural_compressor(model, tokens(), block_size=size, window=64, **how))
        for size in (32, 2048)
    }
    assert equal(ours, blocks[32]) > 0.99
    assert equal(ours, blocks[2048]) < 0.99  # the control
    if act_order:
        assert all(torch.equal(ours[name].group_index, q.group_index) for name, q in blocks[32].items())
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@needs_it
def test_another_layer_has_no_codes_of_its():
    with pytest.raises(ValueError, match="must be an INCWeightOnlyLinear of integers, got"):
        from_neural_compressor(net()[0])
    assert codes_of(net()) == {}
