"""lora and memory: packed layers hold the values of NF4, the base never changes, memory is what torch keeps."""

import copy
import json
import re

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from quantlab.codebook import nf4_levels, quantize_codebook
from quantlab.linear import PackedLinear, packed_layers
from quantlab.lm import DATA, divergence, linear_layers, load_lm, load_text, perplexity, quantize_weights, token_stream
from quantlab.train import lora
from quantlab.train.loop import finetune, loss_on
from quantlab.train.lora import (
    RECIPE,
    add_lora,
    load_adapters,
    lora_layers,
    merge,
    nf4_linear,
    nf4_model,
    save_adapters,
    style_tokens,
)
from quantlab.train.memory import Memory, saved_bytes, training_memory
from recipes import lora as recipe

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
QUICK = {"steps": 8, "batch": 4, "window": 16, "learning_rate": 0.02, "progress": False}


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()


def text(n=300):
    return ((3 + torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(0))).cumsum(0) % 60).long()


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def buffers(model):
    """The codes of the packed layers, and what stands beside them."""
    layers = packed_layers(model)
    return {f"{name}.{part}": b.clone() for name, layer in layers.items() for part, b in layer.named_buffers()}


def logits(model):
    with torch.no_grad():
        return model(text(40)[:30][None]).logits


# --- the packed layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True], ids=["float32 absmax", "8-bit absmax"])
@pytest.mark.parametrize("shape", [(4, 64), (3, 7), (1, 1), (5, 64), (7, 33), (40, 600)])
def test_decoded_weights_equal_those_of_the_codebook_tensor(shape, double):
    q = quantize_codebook(weights(*shape), nf4_levels(), double_quant=double)
    layer = PackedLinear(q)
    assert torch.equal(layer.weight, q.dequantize())
    assert layer.nbytes == q.nbytes  # published levels take no room
    assert (layer.in_features, layer.out_features) == shape[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_layer_computes_with_the_decoded_weight(dtype):
    linear = nn.Linear(48, 20).to(dtype)
    layer, x = nf4_linear(linear), weights(3, 5, 48).to(dtype)
    q = quantize_codebook(linear.weight, nf4_levels(), double_quant=True)
    assert torch.equal(layer(x), F.linear(x, q.dequantize(), linear.bias))
    assert torch.equal(layer.to_linear()(x), layer(x))
    assert layer.weight.dtype == dtype


def test_the_gradient_of_the_input_is_that_of_a_float_layer():
    layer = nf4_linear(nn.Linear(48, 20))
    ours, theirs = (weights(3, 5, 48).requires_grad_() for _ in range(2))
    upstream = weights(3, 5, 20, seed=1)
    layer(ours).backward(upstream)
    F.linear(theirs, layer.weight, layer.bias).backward(upstream)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
    assert not layer(weights(1, 48)).requires_grad  # nothing in it to train


def test_the_gradient_against_finite_differences():
    layer = PackedLinear(quantize_codebook(weights(6, 8).double(), nf4_levels()))
    assert torch.autograd.gradcheck(layer, weights(2, 8).double().requires_grad_(), check_forward_ad=False)


def test_the_decoded_weight_does_not_wait_for_the_backward_pass():
    layer, x, kept = nf4_linear(nn.Linear(512, 512)), weights(2, 512).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
        assert kept == []  # not even x: the weight needs no gradient
        F.linear(x, layer.weight)
    assert max(kept) == 512 * 512


def test_state_dict_round_trip(model):
    packed = nf4_model(model)
    other = nf4_model(copy.deepcopy(model).apply(lambda m: None))
    for layer in other.modules():
        if isinstance(layer, PackedLinear):
            layer.codes.zero_()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(logits(other), logits(packed))


# --- a whole model ----------------------------------------------------------------------------------------------


def test_the_packed_model_predicts_what_quantize_weights_does(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    packed = nf4_model(model)
    floats, qtensors = quantize_weights(model, lambda w: quantize_codebook(w, nf4_levels(), double_quant=True))
    assert torch.equal(logits(packed), logits(floats))
    layers = packed_layers(packed)
    assert layers.keys() == qtensors.keys() == linear_layers(model).keys()
    assert all(not p.requires_grad for p in packed.parameters())
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="no float linear layers"):
        nf4_model(packed)


def test_gpt2_stores_its_weights_the_other_way_round():
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    model = AutoModelForCausalLM.from_config(config).eval()
    packed = nf4_model(model)
    floats, _ = quantize_weights(model, lambda w: quantize_codebook(w, nf4_levels(), double_quant=True))
    assert torch.allclose(logits(packed), logits(floats), atol=1e-5)
    with_lora = add_lora(packed, rank=2)
    assert torch.equal(logits(with_lora), logits(packed))
    finetune(with_lora, text(), **QUICK)
    assert torch.allclose(logits(merge(with_lora)), logits(with_lora), atol=1e-4)


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["float base", "NF4 base"])
def test_at_the_start_nothing_is_different(model, packed):
    base = nf4_model(model) if packed else model
    with_lora = add_lora(base, rank=4)
    assert torch.equal(logits(with_lora), logits(base))
    layers = lora_layers(with_lora)
    assert layers.keys() == linear_layers(model).keys()
    for layer in layers.values():
        assert layer.lora_A["default"].weight.abs().max() > 0
        assert layer.lora_B["default"].weight.abs().max() == 0
        assert layer.scaling["default"] == 2.0
    trained = {n for n, p in with_lora.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in with_lora.named_parameters() if ".lora_" in n}
    assert all(p.requires_grad for p in model.parameters())  # the given model stays as it was


def test_the_first_gradient_of_A_is_zero_and_that_of_B_is_not(model):
    with_lora = add_lora(nf4_model(model), rank=4)
    loss_on(with_lora, text(32).view(2, 16)).backward()
    for layer in lora_layers(with_lora).values():
        assert layer.lora_A["default"].weight.grad.abs().max() == 0
        assert layer.lora_B["default"].weight.grad.abs().max() > 0


def test_outputs_and_gradients_equal_lora_written_out_by_hand(model):
    """y = x Wᵀ + alpha / rank * (x Aᵀ) Bᵀ, on one layer, against autograd on plain tensors."""
    with_lora = add_lora(nf4_model(model), rank=3, alpha=12)
    layer = lora_layers(with_lora)["model.layers.0.mlp.up_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data.copy_(weights(*b.shape))
    A, B = (p.detach().clone().requires_grad_() for p in (a, b))
    x, upstream = weights(5, 32), weights(5, 48, seed=2)
    layer(x).backward(upstream)
    y = x @ layer.base_layer.weight.T + 12 / 3 * (x @ A.T) @ B.T
    y.backward(upstream)
    assert torch.allclose(layer(x), y, atol=1e-5)
    assert torch.allclose(a.grad, A.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(b.grad, B.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own call
def test_on_the_decoded_floats_pefts_own_layer_does_the_same(model):
    """The same adapters around PackedLinear (our layer) and around nn.Linear with the decoded weight (peft's)."""
    packed = nf4_model(model)
    floats, _ = quantize_weights(model, lambda w: quantize_codebook(w, nf4_levels(), double_quant=True))
    ours = add_lora(packed, rank=4, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        names = sorted({n.rpartition(".")[2] for n in linear_layers(floats)})
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
        theirs = peft.get_peft_model(copy.deepcopy(floats), config).eval()
    for one in (ours, theirs):
        for i, layer in enumerate(lora_layers(one).values()):
            b = layer.lora_B["default"].weight
            b.data.copy_(0.1 * weights(*b.shape, seed=i))
        loss_on(one, text(32).view(2, 16)).backward()
    assert torch.equal(logits(ours), logits(theirs))
    grads = [{n: p.grad for n, p in one.named_parameters() if p.requires_grad} for one in (ours, theirs)]
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(grads[0][n], grads[1][n], rtol=1e-4, atol=1e-6) for n in grads[0])


def test_the_base_is_bit_identical_after_training(model):
    packed = nf4_model(model)
    with_lora = add_lora(packed, rank=4)
    before = buffers(with_lora)
    frozen = {n: p.clone() for n, p in with_lora.named_parameters() if not p.requires_grad}
    history = finetune(with_lora, text(), **QUICK | {"steps": 20})
    assert history.losses[-1] < history.losses[0] - 0.2
    after = buffers(with_lora)
    assert len(before) == 14 * 4  # codes, and codes, absmax and offset of the scales, in 2 blocks of 7 layers
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(p, frozen[n]) for n, p in with_lora.named_parameters() if n in frozen)
    with with_lora.disable_adapter():
        assert torch.equal(logits(with_lora), logits(packed))


def test_the_seed_decides_and_the_callers_random_numbers_stay(model):
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first, second, other = (add_lora(model, rank=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(2), expected)
    a, b, c = (next(iter(lora_layers(m).values())).lora_A["default"].weight for m in (first, second, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0}, "alpha must be above 0"),
        ({"alpha": "16"}, "alpha must be a finite number, got '16'"),
    ],
)
def test_bad_adapters(model, change, message):
    with pytest.raises(ValueError, match=message):
        add_lora(model, **change)


def test_one_set_of_adapters_only(model):
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(add_lora(model))


# --- merging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["float base", "NF4 base"])
def test_merging_in_floats_changes_nothing_but_rounding(model, packed):
    base = nf4_model(model) if packed else model
    with_lora = add_lora(base, rank=4)
    finetune(with_lora, text(), **QUICK)
    before = buffers(with_lora)
    merged = merge(with_lora)
    assert type(merged) is type(model)
    assert divergence(with_lora, merged, text(60), window=30).kl < 1e-6  # float32's rounding
    assert divergence(base, merged, text(60), window=30).kl > 1e-3  # the adapters did something
    layer, name = next(iter(lora_layers(with_lora).values())), "model.layers.0.self_attn.q_proj"
    update = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(merged.get_submodule(name).weight, layer.base_layer.weight + update, atol=1e-6)
    assert all(torch.equal(b, before[n]) for n, b in buffers(with_lora).items())  # the given one stays packed


def test_requantizing_the_merged_model_costs_something(model):
    with_lora = add_lora(nf4_model(model), rank=4)
    finetune(with_lora, text(), **QUICK)
    merged = merge(with_lora)
    again = nf4_model(merged)
    assert divergence(merged, again, text(60), window=30).kl > 1e-7
    layer = again.model.layers[0].mlp.up_proj
    expected = quantize_codebook(merged.model.layers[0].mlp.up_proj.weight, nf4_levels(), double_quant=True)
    assert torch.equal(layer.weight, expected.dequantize())


def test_pefts_merge_and_unmerge_bring_the_packed_layer_back(model):
    with_lora = add_lora(nf4_model(model), rank=4)
    finetune(with_lora, text(), **QUICK)
    before, expected = buffers(with_lora), logits(with_lora)
    with_lora.merge_adapter()
    assert torch.allclose(logits(with_lora), expected, atol=1e-5)
    assert buffers(with_lora) == {}
    with_lora.unmerge_adapter()
    assert torch.equal(logits(with_lora), expected)
    assert all(torch.equal(b, before[n]) for n, b in buffers(with_lora).items())


# --- files ------------------------------------------------------------------------------------------------------


def test_adapters_are_saved_without_the_base(model, tmp_path):
    base = nf4_model(model)
    trained = add_lora(base, rank=4)
    finetune(trained, text(), **QUICK)
    for p in trained.parameters():
        p.data = p.data.bfloat16().float()  # so that 16 bits lose nothing
    size = save_adapters(tmp_path / "adapters.safetensors", trained)
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    assert 2 * count < size < 2 * count + 10_000
    fresh = add_lora(base, rank=4, seed=9)
    load_adapters(tmp_path / "adapters.safetensors", fresh)
    adapters = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, adapters[n]) for n, p in fresh.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="another model or rank"):
        load_adapters(tmp_path / "adapters.safetensors", add_lora(base, rank=2))
    with pytest.raises(FileNotFoundError):
        load_adapters(tmp_path / "none.safetensors", fresh)


# --- memory -----------------------------------------------------------------------------------------------------


def measured(model, ids):
    """The same three numbers from the tensors that torch holds after one step of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss_on(model, ids).backward()
    optimizer.step()

    def size(tensors):
        memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(memory.values())

    states = [t for state in optimizer.state.values() for t in state.values()]
    return Memory(
        size([*model.parameters(), *model.buffers()]),
        size([p.grad for p in model.parameters() if p.grad is not None]),
        size(states),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_counted_memory_is_what_torch_holds(kind, tied):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | {"tie_word_embeddings": tied}))
    made = {"full": lambda: model, "lora": lambda: add_lora(model, rank=4)}
    made["qlora"] = lambda: add_lora(nf4_model(model), rank=4)
    model = made[kind]()
    assert training_memory(model) == measured(model, text(32).view(2, 16))


def test_memory_of_a_large_model_is_counted_without_it():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, dtype=torch.float32))
    real = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    assert training_memory(model).gradients == training_memory(real).gradients
    assert training_memory(real).total == sum(vars(training_memory(real)).values())


def test_saved_bytes_are_those_of_the_activations(model):
    """Decoding in the backward pass: a packed base holds no more than a float one; a naive layer holds its weights."""

    class Naive(nn.Module):
        def __init__(self, packed):
            super().__init__()
            self.packed, self.bias = packed, packed.bias

        def forward(self, x):
            return F.linear(x, self.packed.weight)

    ids, base = text(32).view(2, 16), nf4_model(model)
    packed, floats = add_lora(base, rank=4), add_lora(model, rank=4)
    assert saved_bytes(packed, ids) == saved_bytes(floats, ids)
    for layer in lora_layers(packed).values():
        layer.base_layer = Naive(layer.base_layer)
    extra = saved_bytes(packed, ids) - saved_bytes(floats, ids)
    per_block = sum(m.weight.numel() for n, m in linear_layers(model).items() if ".0." in n)
    first = sum(p.numel() for n, p in model.model.layers[0].self_attn.named_parameters() if n[0] in "qkv")
    assert extra == 4 * (2 * per_block - first)  # the first q, k, v read the embedding, which needs no gradient
    with pytest.raises(ValueError, match="token ids"):
        saved_bytes(floats, ids + 60)


# --- the runs of notebook 15 ------------------------------------------------------------------------------------


def test_the_style_is_new_and_its_days_differ():
    days = load_text("style")
    assert len(days) >= 60
    assert all(60 <= len(day.split()) <= 140 for day in days)
    _, tokenizer = load_lm(str(DATA / "model"))
    train, held = style_tokens(tokenizer)
    assert len(train) + len(held) == len(token_stream(tokenizer, days))
    words = [re.findall(r"[\w']+", day.split("\n\n")[1].lower()) for day in days]
    runs = [{tuple(w[i : i + 6]) for i in range(len(w) - 5)} for w in words]
    for i, one in enumerate(runs):
        for other in runs[:i]:
            assert len(one & other) == 0  # not six words in a row in common


def test_the_committed_run_is_reproduced_from_its_adapters():
    """The adapters in data/checkpoints/lora, put beside the bundled model in NF4, measure what log.json says."""
    model, tokenizer = load_lm(str(DATA / "model"))
    log = json.loads((DATA / "checkpoints/lora/log.json").read_text(encoding="utf-8"))
    assert log["recipe"] == RECIPE | {"full_rate": recipe.FULL_RATE}
    assert log["command"] == "python -m recipes.lora --out data/checkpoints/lora"
    assert re.fullmatch(r"torch [\w.+]+, \d+ threads?", log["on"])
    _, held = style_tokens(tokenizer)
    with_lora = add_lora(nf4_model(model), rank=2)
    load_adapters(DATA / "checkpoints/lora/rank_2.safetensors", with_lora)
    found, logged = perplexity(with_lora, held, window=128), log["runs"]["rank 2"]["style"]
    assert found.nll == pytest.approx(logged["nll"], abs=0.005)  # the adapters were rounded to 16 bits
    assert found.value < 0.8 * log["runs"]["rank 0"]["style"]["perplexity"]


def test_the_run_writes_adapters_and_its_log(monkeypatch, tmp_path):
    _, tokenizer = load_lm(str(DATA / "model"))
    sizes = SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    small = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()
    monkeypatch.setattr(recipe, "load_lm", lambda: (small, tokenizer))
    for module in (recipe, lora):  # the texts that are measured, and those that are learnt
        monkeypatch.setattr(module, "load_text", lambda name: load_text(name)[:8])
    log = recipe.main(["--out", str(tmp_path / "out"), "--ranks", "1", "--steps", "2"])
    assert json.loads((tmp_path / "out/log.json").read_text()) == json.loads(json.dumps(log))
    assert log["command"] == f"python -m recipes.lora --out {tmp_path}/out --ranks 1 --steps 2"
    assert re.fullmatch(r"torch [\w.+]+, \d+ threads?", log["on"])
    committed = json.loads((DATA / "checkpoints/lora/log.json").read_text(encoding="utf-8"))
    assert committed.keys() == log.keys()
    assert committed["runs"].keys() > log["runs"].keys()
    assert all(committed["runs"][name].keys() == run.keys() for name, run in log["runs"].items())
    names = ["float", "rank 0", "rank 1", "float base, rank 8", "all weights", "shuffled tokens, rank 8"]
    assert list(log["runs"]) == names
    assert log["runs"]["float"]["stories"]["kl"] == 0
    assert len(log["runs"]["rank 1"]["history"]["losses"]) == 2
    assert log["runs"]["rank 1"]["trained"] * 8 == log["runs"]["float base, rank 8"]["trained"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["log.json", "rank_1.safetensors"]
    load_adapters(tmp_path / "out/rank_1.safetensors", add_lora(nf4_model(small), rank=1))
