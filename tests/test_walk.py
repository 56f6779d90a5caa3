"""quantize_lm's walk: interrupted and resumed, in place, in bounded memory, with own bits for each layer."""

import csv
import json
import weakref

import pytest
import torch
from test_lm import random_model, random_tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantlab import Hessian, PerGroup, gptq_quantize, lm, quantize_tensor
from quantlab.clipping import quantize_clipped
from quantlab.granularity import split_rows
from quantlab.lm import checkpoint, walk
from quantlab.methods import GPTQ

WEIGHTS = {
    "rtn": {"bits": 3, "group_size": 16, "clip_search": True},
    "nf4": {"group_size": 16},
    "gptq": {"bits": 3, "group_size": 16, "act_order": True},
    "awq": {"bits": 3, "group_size": 16, "steps": 4},
}


def quantized(model, tokens, method="gptq", **more):
    return lm.quantize_lm(model, tokens, method=method, window=64, progress=False, **WEIGHTS[method], **more)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", WEIGHTS)
def test_interrupted_and_resumed_is_as_never_interrupted(method, tmp_path, monkeypatch):
    model, tokens = random_model("llama"), random_tokens()
    whole, report = quantized(model, tokens, method)
    rounded, real = [], walk._round_block

    def second_fails(prefix, *rest):
        if rounded:
            raise KeyboardInterrupt
        rounded.append(prefix)
        return real(prefix, *rest)

    monkeypatch.setattr(walk, "_round_block", second_fails)
    with pytest.raises(KeyboardInterrupt):
        quantized(model, tokens, method, checkpoint=tmp_path / "walk")
    monkeypatch.setattr(walk, "_round_block", lambda prefix, *rest: rounded.append(prefix) or real(prefix, *rest))
    new, again = quantized(model, tokens, method, checkpoint=tmp_path / "walk")
    assert rounded == ["model.layers.0.", "model.layers.1."]  # the first block was not done twice
    assert same(whole, new)
    untimed = [[row._replace(seconds=0) for row in one.layers] for one in (again, report)]
    assert untimed[0] == untimed[1]
    assert (again.nbytes, list(again.qtensors)) == (report.nbytes, list(report.qtensors))
    for name, q in report.qtensors.items():
        assert torch.equal(again.qtensors[name].dequantize(), q.dequantize())
    quantized(model, tokens, method, checkpoint=tmp_path / "walk")
    assert len(rounded) == 2  # all is there: nothing is done again


def test_a_block_counts_as_done_only_when_it_is_whole(tmp_path):
    model, tokens = random_model("llama"), random_tokens()
    whole, _ = quantized(model, tokens, checkpoint=tmp_path)
    (tmp_path / "block_001.safetensors").rename(tmp_path / "block_001.part")  # as a crash while writing leaves it
    new, _ = quantized(model, tokens, checkpoint=tmp_path)
    assert same(whole, new)
    assert (tmp_path / "block_001.safetensors").exists()


def test_a_resumed_model_is_saved_like_any_other(tmp_path):
    model, tokens = random_model("llama"), random_tokens()
    new, report = quantized(model, tokens, checkpoint=tmp_path / "walk")
    lm.save_quantized(tmp_path / "saved", new, report.qtensors)
    assert same(lm.load_quantized(tmp_path / "saved")[0], new)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("bits", "settings"),
        ("method", "method, output errors, settings"),
        ("window", "window"),
        ("tokens", "tokens"),
        ("model", "model"),
    ],
)
def test_the_checkpoint_of_another_walk_is_refused(change, what, tmp_path):
    model, tokens = random_model("llama"), random_tokens()
    arguments = {"method": "rtn", "window": 64, "checkpoint": tmp_path, "progress": False}
    lm.quantize_lm(model, tokens, **arguments)
    if change == "model":
        model.get_input_embeddings().weight.data[0] += 1
    tokens = tokens.flip(0) if change == "tokens" else tokens
    other = {"bits": {"bits": 3}, "method": {"method": "gptq"}, "window": {"window": 32}}.get(change, {})
    with pytest.raises(ValueError, match=f"holds a walk with another {what}; choose an empty folder"):
        lm.quantize_lm(model, tokens, **arguments | other)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear ...")
    with pytest.raises(ValueError, match=r"holds files, but no walk\.json"):
        quantized(random_model("llama"), random_tokens(), checkpoint=tmp_path)


@pytest.mark.parametrize("options", [{"checkpoint": "x"}, {"in_place": True}])
def test_integer_layers_have_no_checkpoint(options):
    with pytest.raises(ValueError, match="for methods that round weights alone, got LLMInt8"):
        lm.quantize_lm(random_model("llama"), random_tokens(), method="llm_int8", window=64, **options)


def test_the_fingerprint_sees_every_weight():
    model = random_model("gpt2")
    before = checkpoint.fingerprint(model)
    model.transformer.h[1].ln_2.bias.data[3] += 1e-6
    assert checkpoint.fingerprint(model) != before


def test_the_fingerprint_sees_what_the_weights_do_not_say():
    """The same weights with another configuration compute something else; where they were found does not matter."""
    model = random_model("llama")
    before = checkpoint.fingerprint(model)
    model.config._name_or_path = "elsewhere"
    assert checkpoint.fingerprint(model) == before
    model.config.rms_norm_eps *= 10
    assert checkpoint.fingerprint(model) != before


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_in_place_gives_the_same_without_a_second_model(family):
    model, tokens = random_model(family), random_tokens()
    whole, _ = quantized(model, tokens)
    assert not same(whole, model)
    new, _ = quantized(model, tokens, in_place=True)
    assert new is model
    assert same(whole, model)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it took at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given | self.alive.keys():
                storage = x.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


def test_the_meter_sees_what_is_alive_at_one_time():
    with Peak() as peak:
        x = torch.zeros(1000)
        del x
        y = torch.ones(500)
        z = y.view(5, 100) + 1
    assert peak.most == 4000
    assert sum(peak.alive.values()) == 4000
    assert len(z) == 5


def walk_peak(model, tokens, folder, window=512) -> int:
    with Peak() as peak:
        lm.quantize_lm(model, tokens, method="gptq", in_place=True, checkpoint=folder, window=window, progress=False)
    return peak.most


def test_the_walk_holds_one_block_and_its_inputs(tmp_path):
    """Beyond the float model at most 1.5 blocks, and what a block reads and gives out on 16k tokens.

    The Hessian of down_proj (768 x 768 in float64) takes 1.5 blocks by itself, its factor as much.
    """
    model, tokenizer = lm.load_lm(str(lm.DATA / "model"))
    tokens = lm.token_stream(tokenizer, lm.load_text("calibration"))[:16384]
    block = sum(4 * p.numel() for p in lm.blocks_of(model)[1][0].parameters())
    activations = 4 * len(tokens) * model.config.hidden_size
    peak = walk_peak(model, tokens, tmp_path)
    assert peak <= 1.5 * block + 2 * activations
    assert peak >= block  # the meter does see the walk


def test_the_walk_needs_no_more_for_more_blocks(tmp_path):
    shallow, deep = random_model("llama", blocks=2), random_model("llama", blocks=8)
    few = walk_peak(shallow, random_tokens(), tmp_path / "2", window=64)
    many = walk_peak(deep, random_tokens(), tmp_path / "8", window=64)
    assert many <= 1.02 * few


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_each_layer_gets_its_own_bits(method):
    model, tokens = random_model("llama"), random_tokens()
    bits = {name: 2 + i % 4 for i, name in enumerate(lm.linear_layers(model))}
    options = WEIGHTS[method] | {"bits": bits}
    _, report = lm.quantize_lm(model, tokens, method=method, window=64, progress=False, **options)
    found = {name: getattr(q, "q", q).bits for name, q in report.qtensors.items()}
    assert found == bits
    uniform = WEIGHTS[method] | {"bits": dict.fromkeys(bits, 3)}
    same_bits, _ = lm.quantize_lm(model, tokens, method=method, window=64, progress=False, **uniform)
    assert same(same_bits, quantized(model, tokens, method)[0])


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_bits_for_other_layers_are_refused(change):
    model = random_model("llama")
    bits = dict.fromkeys(lm.linear_layers(model), 4) | ({"lm_head": 8} if change == "unknown" else {})
    if change == "missing":
        del bits["model.layers.1.mlp.up_proj"]
    odd = "lm_head" if change == "unknown" else "model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=f"must name every linear layer and no other; missing or unknown: {odd}"):
        lm.quantize_lm(model, random_tokens(), bits=bits, window=64)


def test_layers_of_one_input_are_rounded_as_one_tall_matrix():
    random = torch.Generator().manual_seed(0)
    hessian = Hessian(24).add(torch.randn(200, 24, generator=random))
    weights = [torch.randn(rows, 24, generator=random) for rows in (5, 1, 7)]
    options = {"bits": 3, "group_size": 10, "act_order": True}
    for tall, w in zip(GPTQ(**options).round(weights, hessian), weights, strict=True):
        alone = gptq_quantize(w, hessian, **options)
        assert torch.equal(tall.codes, alone.codes)
        torch.testing.assert_close(tall.dequantize(), alone.dequantize())
        assert tall.nbytes == alone.nbytes


def test_rows_are_split_with_their_scales():
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    q = quantize_tensor(x, bits=4, granularity=PerGroup(8), symmetric=False)
    parts = split_rows(q, [1, 5])
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), q.dequantize())
    assert [part.codes.shape[0] for part in parts] == [1, 5]


def test_clip_search_is_the_rtn_of_clipped_tensors():
    model, tokens = random_model("llama"), random_tokens()
    new, report = quantized(model, tokens, "rtn")
    for name, layer in lm.linear_layers(model).items():
        expected = quantize_clipped(layer.weight, bits=3, granularity=PerGroup(16), symmetric=False).dequantize()
        assert torch.equal(lm.linear_layers(new)[name].weight, expected)
    plain, other = lm.quantize_lm(model, tokens, bits=3, group_size=16, window=64, progress=False)
    for clipped, row in zip(report.layers, other.layers, strict=True):
        assert clipped.weight_error < row.weight_error
    assert report.nbytes == other.nbytes


def test_a_report_is_saved_as_json_and_csv(tmp_path):
    model, tokens = random_model("llama"), random_tokens()
    _, report = quantized(model, tokens)
    whole = json.loads(report.save(tmp_path / "report.json").read_text())
    assert whole["method"] == "gptq"
    assert whole["settings"]["act_order"] is True
    assert (whole["nbytes"], whole["calibration_tokens"]) == (report.nbytes, report.calibration_tokens)
    assert [tuple(row.values()) for row in whole["layers"]] == report.layers
    with report.save(tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [row.name for row in report.layers]
    assert [float(row["output_error"]) for row in rows] == [row.output_error for row in report.layers]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.csv", "report.json"]
    with pytest.raises(ValueError, match=r"saved as \.json or \.csv, got 'report\.txt'"):
        report.save(tmp_path / "report.txt")


def test_a_report_of_observers_is_saved_too(tmp_path):
    _, report = lm.quantize_lm(random_model("llama"), random_tokens(), method="w8a8_static", window=64, progress=False)
    assert (
        json.loads(report.save(tmp_path / "r.json").read_text())["settings"]["observer"] == "quantlab.observers.MinMax"
    )


def test_held_out_errors_are_the_output_errors_of_other_tokens():
    """On the very tokens of the calibration they are its errors; on others, in the first block, their definition."""
    model, tokens, others = random_model("llama"), random_tokens(), random_tokens().flip(0)
    new, report = quantized(model, tokens, held_out=tokens)
    plain, without = quantized(model, tokens)
    assert same(new, plain)
    assert [row.held_out_error for row in without.layers] == [None] * len(without.layers)
    assert [row.held_out_error for row in report.layers] == pytest.approx([row.output_error for row in report.layers])
    new, report = quantized(model, tokens, held_out=others)
    first = [row for row in report.layers if row.name.startswith(f"{lm.blocks_of(model)[0]}.0.")]
    inputs = lm.capture_inputs(model, others[: len(others) // 64 * 64], [row.name for row in first], window=64)
    for row in first:
        w, q = (lm.weight_of(lm.linear_layers(m)[row.name]).double() for m in (model, new))
        x = inputs[row.name].double()
        wanted = ((x @ (w - q).T).square().sum() / (x @ w.T).square().sum()).item()
        assert row.held_out_error == pytest.approx(wanted, rel=1e-4)
        assert row.held_out_error != row.output_error
    assert "held-out error" in str(report)
    assert "held-out" not in str(without)


def test_held_out_tokens_and_a_method_without_data_or_a_checkpoint(tmp_path):
    model, tokens = random_model("llama"), random_tokens()
    _, report = quantized(model, None, "rtn", held_out=tokens)
    assert all(row.output_error is None and 0 < row.held_out_error < 1 for row in report.layers)
    _, first = quantized(model, tokens, held_out=tokens.flip(0), checkpoint=tmp_path)
    _, again = quantized(model, tokens, held_out=tokens.flip(0), checkpoint=tmp_path)
    assert first.layers == again.layers
    with pytest.raises(ValueError, match="another held-out tokens"):
        quantized(model, tokens, held_out=tokens, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="held_out is for methods that round weights alone"):
        lm.quantize_lm(model, tokens, method="w8a8_static", held_out=tokens, window=64, progress=False)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        quantized(model, tokens, held_out=tokens[:1])
