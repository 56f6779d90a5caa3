"""Twenty-one architectures, tiny and random, through load, perplexity, every method, save and load; what is refused."""

import copy
import json
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file

from quantlab import ledger, lm
from quantlab.lm.report import left_in_float
from quantlab.methods import METHODS, W8A8
from quantlab.mixed import sensitivity
from quantlab.modules import linears_in
from recipes.base_model import train_tokenizer

VOCABULARY, LENGTH = 300, 48
SIZES = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 1,
          "pad_token_id": 1}  # fmt: skip
GROUPED = SIZES | COMMON | {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {
    "llama": hf.LlamaConfig(**GROUPED),
    "qwen2": hf.Qwen2Config(**GROUPED),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": hf.MistralConfig(**GROUPED, sliding_window=16),
    "gemma2": hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=16),
    "gemma3": hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=16),
    "phi3": hf.Phi3Config(**GROUPED),
    "opt": hf.OPTConfig(**SIZES | COMMON, ffn_dim=72, word_embed_proj_dim=32),
    "opt-350m": hf.OPTConfig(**SIZES | COMMON, ffn_dim=72, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": hf.GPT2Config(n_embd=32, n_inner=72, n_layer=2, n_head=4, n_positions=LENGTH, vocab_size=VOCABULARY,
                          bos_token_id=0, eos_token_id=0),
    "gpt-neox": hf.GPTNeoXConfig(**SIZES | COMMON),
    "bloom": hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    "falcon": hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY),
    "mpt": hf.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=LENGTH, vocab_size=VOCABULARY),
    "starcoder2": hf.Starcoder2Config(**GROUPED),
    "mixtral": hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=4, head_dim=8),
    "olmo2": hf.Olmo2Config(**GROUPED),
    "smollm3": hf.SmolLM3Config(**GROUPED),
    "granite": hf.GraniteConfig(**GROUPED),
    "cohere": hf.CohereConfig(**GROUPED),
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
WEIGHTS_ONLY = ("rtn", "nf4", "gptq", "awq")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def made(family: str, dtype=torch.float32):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]), dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # so that attention mixes positions
            parameter.data.mul_(4)
    return model


def text(count: int = 3 * 32) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(text(32)[None], use_cache=False).logits


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_every_method(family, dtype):
    model, tokens = made(family, dtype), text()
    before = lm.perplexity(model, tokens, window=32)
    for method in METHODS:
        new, report = quantized(model, tokens, method)
        if new is None:
            assert (method, family) in REFUSED
            continue
        assert report.layers
        assert {row.name for row in report.layers} == set(lm.linear_layers(model)), method
        d = lm.divergence(model, new, tokens, window=32)
        assert 0 < d.kl < 3, method
        assert lm.perplexity(model, tokens, window=32) == before, "the given model was changed"


REFUSED = {("smoothquant", family) for family in ("opt-350m", "olmo2", "gemma2", "gemma3")}


def quantized(model, tokens, method: str):
    bits = {"bits": 4, "group_size": 16} if method in ("rtn", "gptq", "awq") else {}
    try:
        return lm.quantize_lm(model, tokens, method=method, window=32, progress=False, **bits)
    except ValueError as error:  # smoothing goes into norms, which must stand before linear layers
        if "norm" not in str(error):
            raise
        return None, None


def test_the_norms_that_smoothquant_cannot_use_are_few():
    """The families in REFUSED are refused for what they are, and no other is."""
    for family in FAMILIES:
        new, _ = quantized(made(family), text(), "smoothquant")
        assert (new is None) == (("smoothquant", family) in REFUSED), family


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_saved_and_loaded_bit_by_bit(family, dtype, tmp_path):
    model = made(family, dtype)
    for method in WEIGHTS_ONLY:
        new, report = quantized(model, text(), method)
        lm.save_quantized(tmp_path / method, new, report.qtensors)
        loaded, _ = lm.load_quantized(tmp_path / method)
        assert loaded.dtype == dtype
        assert torch.equal(logits(loaded), logits(new)), method


def test_a_folder_loads_as_it_was_saved(family, tmp_path):
    model = made(family)
    model.save_pretrained(tmp_path)
    train_tokenizer(["a few words to learn bytes from"], VOCABULARY).save_pretrained(tmp_path)
    loaded, tokenizer = lm.load_lm(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert len(lm.generate(loaded, tokenizer, "a few", tokens=3)) >= len("a few")


def test_a_bfloat16_folder_loads_in_float32(family, tmp_path):
    model = made(family, torch.bfloat16)
    model.save_pretrained(tmp_path)
    train_tokenizer(["a few words to learn bytes from"], VOCABULARY).save_pretrained(tmp_path)
    loaded, wanted = lm.load_lm(str(tmp_path))[0].state_dict(), model.state_dict()
    assert {t.dtype for t in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], wanted[name].float()) for name in wanted)


def test_masks_that_older_versions_stored_are_no_strangers(tmp_path):
    config = hf.GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=72,
                             attention_types=[[["global", "local"], 1]], max_position_embeddings=LENGTH)  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    train_tokenizer(["a few words to learn bytes from"], VOCABULARY).save_pretrained(tmp_path)
    file, prefix = tmp_path / "model.safetensors", "transformer.h.0.attn.attention"
    tensors = load_file(file) | {f"{prefix}.bias": torch.ones(1, 1, 8, 8), f"{prefix}.masked_bias": torch.zeros(1)}
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(logits(lm.load_lm(str(tmp_path))[0]), logits(model.eval()))
    save_file(tensors | {"transformer.h.0.attn.attention.surprise": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected: transformer.h.0.attn.attention.surprise \(1 in all\)"):
        lm.load_lm(str(tmp_path))


def test_of_a_repository_one_set_of_weights_is_fetched():
    from huggingface_hub.utils import filter_repo_objects

    from quantlab.lm.hub import COPIES, FILES

    wanted = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "qwen.tiktoken",
              "model-00001-of-00002.safetensors", "own-bf16-00001-of-00002.safetensors",
              "model.safetensors.index.json", "generation_config.json"}  # fmt: skip
    others = {"pytorch_model.bin", "model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "README.md",
              "consolidated.safetensors", "onnx/model.onnx", "original/params.json", "adapter_model.safetensors",
              "adapter_config.json", "model.bf16.safetensors", "modeling_x.py"}  # fmt: skip
    assert set(filter_repo_objects(wanted | others, allow_patterns=FILES, ignore_patterns=COPIES)) == wanted


def test_roles(family):
    model = made(family)
    layers, depth = lm.linear_layers(model), 2
    for role in ("query", "key", "value", "attention output", "gate", "up", "down"):
        found = lm.layers_of_role(model, role)
        assert len(found) == depth, role
        assert all(layers[name] is layer for name, layer in found.items())
    if "moe" not in family and family != "mixtral":
        widths = {lm.weight_of(layer).shape[1] for layer in lm.layers_of_role(model, "down").values()}
        assert widths == {max(lm.weight_of(layer).shape[1] for layer in layers.values())}  # down reads the widest


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_left_in_float_cannot_be_missed(family):
    model, tokens = made(family), text()
    new, report = quantized(model, tokens, "rtn")
    inside = [p for n, p in lm.blocks_of(model)[1].named_parameters() if p.ndim > 1]
    experts = sum(p.numel() for p in inside) - sum(lm.weight_of(m).numel() for m in lm.linear_layers(model).values())
    whole = sum(p.numel() for p in inside)
    assert report.left_in_float == pytest.approx(experts / whole)
    assert report.left_in_float > 0.5
    said = f"left in float: {experts / whole:.0%} of the blocks' weights"
    assert said in str(report)
    row = ledger.measure(model, new, tokens, method="rtn", bits=4, group="16", report=report, window=32)
    assert said in repr(ledger.Table([row]))


def test_nothing_is_left_in_a_plain_model():
    model = made("llama")
    for method in METHODS:
        new, report = quantized(model, text(), method)
        assert report.left_in_float == left_in_float(new, report.qtensors) == 0, method


def test_gptq_on_few_tokens_says_so():
    model = made("llama")  # 72 inputs at most
    for count, said in ((96, "96 tokens are few for 72 inputs"), (160, "")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, report = lm.quantize_lm(model, text(count), method="gptq", bits=4, window=32, progress=False)
            lm.quantize_lm(model, text(count), method="rtn", bits=4, window=32, progress=False)  # reads no token
        assert [str(w.message).partition(":")[0] for w in caught] == [said] * bool(said)
        assert report.note.startswith(said)
        assert bool(report.note) == bool(said)
        assert report.note in str(report)


def test_gptq_of_activations_and_of_one_layer_warns_too():
    model = made("llama")
    with pytest.warns(UserWarning, match="96 tokens are few for 72 inputs"):
        lm.quantize_lm(model, text(96), method=W8A8(per="token", rounding="gptq"), window=32, progress=False)
    with pytest.warns(UserWarning, match="96 tokens are few for 72 inputs"):
        sensitivity(model, text(96), bits=(4,), group_size=None, method="gptq", window=32, progress=False)


NO_TRANSFORMERS = {
    "mamba": hf.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2),
    "mamba2": hf.Mamba2Config(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1),
    "rwkv": hf.RwkvConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, context_length=32),
}


@pytest.mark.parametrize("kind", NO_TRANSFORMERS)
def test_what_is_no_transformer_is_refused(kind):
    model = hf.AutoModelForCausalLM.from_config(NO_TRANSFORMERS[kind])
    with pytest.raises(ValueError, match="is no transformer: it has no attention that is known here"):
        lm.quantize_lm(model, torch.arange(40), method="rtn", window=16, progress=False)


def test_two_lists_of_blocks_are_refused():
    """XLM keeps attention in one list and MLP in another: to quantize the first alone would look like the whole."""
    config = hf.XLMConfig(vocab_size=60, emb_dim=16, n_layers=3, n_heads=2, causal=True)
    model = hf.XLMWithLMHeadModel(config)
    with pytest.raises(ValueError, match=r"need one list of 3 blocks in XLM\w+, found \d: .*attentions, .*ffns"):
        lm.quantize_lm(model, torch.arange(40), method="rtn", window=16, progress=False)


def test_blocks_that_give_a_list():
    """GPT-1's blocks do."""
    config = hf.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=LENGTH)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    _, report = lm.quantize_lm(model, text(), method="gptq", bits=8, window=32, progress=False)
    assert {row.name for row in report.layers} == set(lm.linear_layers(model))


def test_a_model_that_also_sees():
    """Gemma 3 from 4 billion parameters on: its sizes stand in a configuration inside the configuration."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text_part = copy.deepcopy(FAMILIES["gemma3"]).to_dict()
    config = hf.Gemma3Config(text_config=text_part, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model, tokens = hf.Gemma3ForConditionalGeneration(config).eval(), text()
    assert all("language_model" in name for name in lm.linear_layers(model))
    new, report = lm.quantize_lm(model, tokens, method="gptq", bits=3, group_size=16, window=32, progress=False)
    assert report.left_in_float == 0
    assert 0 < lm.divergence(model, new, tokens, window=32).kl < 3
    assert lm.perplexity(new, tokens, window=32).value > 1


def test_routers_stay_float():
    config = hf.Qwen2MoeConfig(**GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=24,
                               decoder_sparse_step=1)  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    gates = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith("shared_expert_gate")}
    assert gates
    assert not gates & lm.linear_layers(model).keys()
    new, _ = lm.quantize_lm(model, text(), method="w8a8_static", window=32, progress=False)
    assert all(isinstance(new.get_submodule(name), torch.nn.Linear) for name in gates)


def test_what_is_a_router():
    """By its name, or a gate beside experts; a gate of an MLP is none."""
    linear = torch.nn.Linear(2, 2)

    def linears(**modules):
        return set(linears_in(torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict(modules)})))

    dense = {"gate": linear, "up": torch.nn.Linear(2, 2), "gate_proj": torch.nn.Linear(2, 2)}
    assert linears(**dense) == {"mlp.gate", "mlp.up", "mlp.gate_proj"}
    experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    mixture = torch.nn.ModuleDict(dense | {"shared_expert_gate": torch.nn.Linear(2, 1)})
    mixture.experts = experts
    assert set(linears_in(torch.nn.ModuleDict({"mlp": mixture}))) == {"mlp.up", "mlp.gate_proj", "mlp.experts.0"}
    assert linears(router=linear) == linears(router_gate=linear) == set()
    assert linears(router=torch.nn.ModuleDict({"layer": linear})) == set()
    nested = torch.nn.ModuleDict({"gate": torch.nn.ModuleDict({"wg": linear})})
    nested.experts = experts
    assert set(linears_in(torch.nn.ModuleDict({"mlp": nested}))) == {"mlp.experts.0"}


def test_layers_that_read_nothing_are_named():
    model, silent = made("llama"), torch.nn.Linear(32, 32, bias=False)
    model.model.layers[1].add_module("unused", silent)
    name = "model.layers.1.unused"
    with pytest.raises(ValueError, match=f"1 linear layers read nothing on these tokens, {name} is the first"):
        lm.activation_scales(model, text(), window=32)
    with pytest.raises(ValueError, match=f"read nothing on these tokens, {name}"):
        lm.capture_inputs(model, text(), [name], window=32)
    with pytest.raises(ValueError, match=f"read nothing on these tokens, {name}"):
        lm.quantize_lm(model, text(), method="w8a8_static", window=32, progress=False)


def test_arguments_by_place_reach_the_blocks():
    """XGLM gives its blocks the causal mask by place: dropped, the walk would calibrate on another model."""
    config = hf.XGLMConfig(vocab_size=VOCABULARY, d_model=32, num_layers=2, attention_heads=4, ffn_dim=72,
                           max_position_embeddings=64)  # fmt: skip
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    name = list(lm.linear_layers(model))[-1]
    _, report = lm.quantize_lm(model, text(), method="gptq", bits=8, window=32, progress=False)
    assert report.layers[-1].name == name
    last = lm.capture_inputs(model, text(), [name], window=32)[name]
    from quantlab.lm.blocks import advance, block_inputs, input_hessians

    with torch.no_grad():
        hidden, arguments = block_inputs(model, text(), 32)
        for block, own in zip(lm.blocks_of(model)[1], arguments, strict=True):
            groups = input_hessians(block, hidden, own)
            advance(block, hidden, own)
    hessian = groups[-1][1].matrix
    torch.testing.assert_close(hessian, 2 / len(last) * last.double().T @ last.double(), rtol=1e-4, atol=1e-4)


def test_a_model_whose_blocks_do_not_follow_each_other_is_refused():
    model, calls = made("llama"), []
    forward = model.model.layers[0].forward

    def another_at_every_call(x, **named):
        calls.append(1)
        return forward(x, **named) * len(calls)

    model.model.layers[0].forward = another_at_every_call
    with pytest.raises(ValueError, match="cannot be run one after the other: their last output is off by"):
        lm.quantize_lm(model, text(), method="gptq", bits=4, window=32, progress=False)


# --- loading ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    made("llama").save_pretrained(tmp_path)
    train_tokenizer(["a few words to learn bytes from"], VOCABULARY).save_pretrained(tmp_path)
    return tmp_path


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "layers.1.mlp.down" not in k}, "missing: .*layers.1.mlp.down_proj"),
        (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "missing: .*unexpected: _orig_mod"),
        (lambda t: t | {"model.layers.7.extra": torch.zeros(2)}, "unexpected: model.layers.7.extra"),
        (lambda t: t | {"model.norm.weight": torch.zeros(31)}, "other tensors than its config.json asks for"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused(saved, change, message, capfd):
    rewritten(saved, change)
    with pytest.raises(ValueError, match=message):
        lm.load_lm(str(saved))
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_files_that_are_damaged_or_foreign_are_named(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"quantized already \(gptq\); load the float model"):
        lm.load_lm(str(saved))
    (saved / "config.json").write_text(json.dumps(config))
    for file in saved.glob("token*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer that can be read"):
        lm.load_lm(str(saved))
    (saved / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="model.safetensors is truncated or no safetensors file"):
        lm.load_lm(str(saved))


# --- measuring --------------------------------------------------------------------------------------------------


def test_begin_tokens_are_context_only():
    model = made("llama")  # bos 0, eos 1
    tokens = text(64)
    tokens[[0, 20, 32]] = 0
    found = lm.perplexity(model, tokens, window=32)
    with torch.no_grad():
        out = model(tokens.view(2, 32), use_cache=False).logits[:, :-1].double()
    nll = F.cross_entropy(out.flatten(0, 1), tokens.view(2, 32)[:, 1:].flatten(), reduction="none")
    counts = tokens.view(2, 32)[:, 1:].flatten() != 0
    assert found.tokens == counts.sum() == 61
    assert found.nll == pytest.approx(nll[counts].mean().item(), rel=1e-6)
    model.config.eos_token_id = [1, 0]  # where begin tokens end texts, a text predicts them
    assert lm.perplexity(model, tokens, window=32).tokens == 62


def test_cross_entropy_is_exact_for_a_large_vocabulary():
    config = hf.LlamaConfig(**GROUPED | {"vocab_size": 49_152})
    torch.manual_seed(0)
    model, tokens = hf.AutoModelForCausalLM.from_config(config).eval(), text(96)
    with torch.no_grad():
        out = model(tokens.view(3, 32), use_cache=False).logits[:, :-1].double()
    exact = F.cross_entropy(out.flatten(0, 1), tokens.view(3, 32)[:, 1:].flatten()).item()
    assert abs(lm.perplexity(model, tokens, window=32).nll - exact) < 2e-6  # the strided sum is 1e-4 off


def test_the_default_dtype_changes_nothing():
    model, tokens = made("llama"), text()
    wanted = {method: quantized(model, tokens, method) for method in METHODS}
    torch.set_default_dtype(torch.bfloat16)
    try:
        for method, (new, report) in wanted.items():
            again, its = quantized(model, tokens, method)
            assert torch.equal(logits(again), logits(new)), method
            assert its.nbytes == report.nbytes
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_dtype_changes_no_range_and_no_bytes_of_gguf():
    code = """
import sys, torch
torch.set_default_dtype(getattr(torch, sys.argv[1]))  # before quantlab makes its tables
from quantlab.export.gguf_blocks import quantize_gguf
from quantlab.observers import MSE

random, float32 = torch.Generator().manual_seed(0), torch.float32
x, weights = torch.randn(64, 256, generator=random, dtype=float32), torch.rand(256, generator=random, dtype=float32)
for symmetric in (False, True):
    print(*(bound.item() for bound in MSE(bits=4, symmetric=symmetric).update(x).min_max()))
for kind in ("Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"):
    for importance in (None, weights + 0.5):
        print(kind, hash(tuple(quantize_gguf(x, kind, importance=importance).flatten().tolist())))
"""
    said = [subprocess.check_output([sys.executable, "-c", code, dtype]) for dtype in ("float32", "bfloat16")]
    assert said[0].count(b"\n") == 12
    assert said[0] == said[1]


def test_nan_weights_are_named():
    model = made("llama")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    doors = {
        "perplexity": lambda: lm.perplexity(broken, text(), window=32),
        "divergence": lambda: lm.divergence(model, broken, text(), window=32),
        "of the reference": lambda: lm.divergence(broken, model, text(), window=32),
        "ledger": lambda: ledger.measure(model, broken, text(), method="x", bits=8, window=32),
        "sensitivity": lambda: sensitivity(broken, text(), bits=(4,), group_size=None, window=32, progress=False),
        "quantize_weights": lambda: lm.quantize_weights(broken, lambda w: w),
    }
    doors |= {method: partial(lm.quantize_lm, broken, text(), method, window=32, progress=False) for method in METHODS}
    for door in doors.values():
        with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight holds NaN"):
            door()


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "on the embedding"])
def test_adapters_are_refused(kind):
    peft = pytest.importorskip("peft")
    how = {"target_modules": ["embed_tokens"] if kind == "on the embedding" else ["q_proj"]}
    how |= {"feedforward_modules": []} if kind == "IA3Config" else {"r": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an old name
        model = peft.get_peft_model(made("llama"), getattr(peft, kind, peft.LoraConfig)(**how))
    with pytest.raises(ValueError, match="adapters .*merge them first"):
        lm.quantize_lm(model, text(), method="rtn", window=32, progress=False)


def test_a_short_context_has_latencies():
    model = made("llama")
    int8, report = quantized(model, text(), "w8a8_dynamic")
    row = ledger.measure(model, int8, text(), method="w8a8", bits=8, report=report, window=32)
    assert min(row.prefill, row.decode) > 0


def test_generation_settings_are_kept_and_obeyed(tmp_path):
    model, tokenizer = made("llama"), train_tokenizer(["a few words to learn bytes from"], VOCABULARY)
    model.generation_config.eos_token_id = list(range(2, VOCABULARY))  # whatever it says ends the text
    assert lm.generate(model, tokenizer, "a few", tokens=8) == "a few"
    new, report = quantized(model, text(), "rtn")
    lm.save_quantized(tmp_path / "m", new, report.qtensors, tokenizer)
    loaded, _ = lm.load_quantized(tmp_path / "m")
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_chat_text_gets_one_begin_token_and_a_separator_in_a_sentence_is_text(tmp_path):
    tokenizer = train_tokenizer(["a few words to learn bytes from"], VOCABULARY)
    begin = tokenizer.bos_token_id
    assert lm.token_stream(tokenizer, [f"{tokenizer.bos_token}a few"]).tolist().count(begin) == 1
    (tmp_path / "t.txt").write_text("one <|endoftext|> in a sentence\n<|endoftext|>\ntwo\n")
    assert lm.read_documents(tmp_path / "t.txt") == ["one <|endoftext|> in a sentence", "two"]
    (tmp_path / "t.txt").write_text("zwölf", encoding="utf-16")
    with pytest.raises(ValueError, match="t.txt is no UTF-8 text"):
        lm.read_documents(tmp_path / "t.txt")


def test_a_ledger_that_a_spreadsheet_saved_is_read(tmp_path):
    path = tmp_path / "ledger.csv"
    path.write_text("\ufeff" + (lm.DATA / "ledger.csv").read_text(encoding="utf-8"), encoding="utf-8")
    assert ledger.read(path) == ledger.read(lm.DATA / "ledger.csv")


def test_the_folder_that_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    model = made("llama")
    new, report = quantized(model, text(), "rtn")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name (a folder|one) inside it"):
        lm.save_quantized(".", new, report.qtensors)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lm.save_quantized("link", new, report.qtensors)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/quantized.safetensors").is_file()


def test_a_budget_is_whole_on_small_models_and_a_share_on_large_ones():
    assert lm.budget(made("llama"), 4096) == 4096
    with torch.device("meta"):
        large = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**GROUPED | {"vocab_size": 500_000}))
    share = int(4096 * 8e6 / sum(p.numel() for p in large.parameters()))
    large = large.to_empty(device="cpu")
    assert lm.budget(large, 4096, least=10) == share < 4096
    assert lm.budget(large, 4096, least=3000) == 3000
    assert lm.budget(large, 100, least=3000) == 100
