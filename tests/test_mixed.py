"""mixed: sensitivities against quantizing one layer and measuring, allocations against trying every one."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from quantlab import PerAxis, PerGroup, lm, mixed, quantize_tensor
from quantlab.gptq import gptq_quantize
from quantlab.hessian import Hessian
from quantlab.modules import put_weight

SMALL = {"vocab_size": 97, "num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(
        **SMALL, intermediate_size=40, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False
    ),
    "opt": OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=24, max_position_embeddings=64, pad_token_id=1),
    "gpt2": GPT2Config(vocab_size=97, n_layer=3, n_embd=24, n_head=4, n_positions=64),
}


def random_model(family="llama"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # large enough that rounding matters
            parameter.data.mul_(8)
    return model


def random_tokens(count=160):
    return torch.randint(2, 97, (count,), generator=torch.Generator().manual_seed(1))


def with_one_layer_quantized(model, name, bits, group_size):
    """The definition: every other layer keeps its weight."""
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    new, qtensors = lm.quantize_weights(
        model, lambda w: quantize_tensor(w, bits=bits, granularity=granularity, symmetric=False)
    )
    for other, layer in lm.linear_layers(new).items():
        if other != name:
            put_weight(layer, lm.weight_of(lm.linear_layers(model)[other]))
    return new, qtensors[name]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("group_size", [None, 16])
def test_sensitivity_is_quantizing_one_layer_and_measuring(family, group_size):
    model, tokens = random_model(family), random_tokens()
    found = mixed.sensitivity(model, tokens, bits=(4, 2), group_size=group_size, window=32, progress=False)
    assert list(found.costs) == list(found.sizes) == list(found.errors) == list(lm.linear_layers(model))
    assert found.tokens == 160
    assert sum(found.weights.values()) == sum(lm.weight_of(m).numel() for m in lm.linear_layers(model).values())
    for name in found.costs:
        assert list(found.costs[name]) == [2, 4]
        for bits in (2, 4):
            new, q = with_one_layer_quantized(model, name, bits, group_size)
            d = lm.divergence(model, new, tokens, window=32)
            assert found.costs[name][bits] == pytest.approx(d.kl, rel=1e-3, abs=1e-6), (name, bits)
            assert found.errors[name][bits] == pytest.approx(d.stderr, rel=1e-2, abs=1e-6)
            assert found.sizes[name][bits] == q.nbytes


def test_batches_and_their_tail(monkeypatch):
    """Windows in batches of 2, 2 and 1 give what one batch gives; a tail that fills no window is left out."""
    model, tokens = random_model(), random_tokens(5 * 32 + 7)
    whole = mixed.sensitivity(model, tokens[:160], bits=(3,), window=32, progress=False)
    monkeypatch.setattr(mixed, "_LOGITS", 2 * 32 * 97)
    assert [len(ids) for ids in mixed._batches(tokens, 32, 97)] == [2, 2, 1]
    cut = mixed.sensitivity(model, tokens, bits=(3,), window=32, progress=False)
    assert cut.tokens == 160
    for name in whole.costs:
        assert cut.costs[name][3] == pytest.approx(whole.costs[name][3], rel=1e-4)
        assert cut.errors[name][3] == pytest.approx(whole.errors[name][3], rel=1e-2)


def test_a_text_shorter_than_a_window_is_one_window_without_an_error_bar():
    model, tokens = random_model(), random_tokens(20)
    found = mixed.sensitivity(model, tokens, bits=(2,), window=32, progress=False)
    name = next(iter(found.costs))
    new, _ = with_one_layer_quantized(model, name, 2, 128)
    assert found.costs[name][2] == pytest.approx(lm.divergence(model, new, tokens, window=32).kl, rel=1e-3)
    assert math.isnan(found.errors[name][2])


def test_gptq_calibrates_on_what_the_float_model_gives_the_layer():
    model, tokens = random_model(), random_tokens()
    found = mixed.sensitivity(model, tokens, bits=(3,), group_size=None, method="gptq", window=32, progress=False)
    name = list(found.costs)[-1]
    hessian = Hessian(40).add(lm.capture_inputs(model, tokens, [name], window=32)[name])
    new, _ = with_one_layer_quantized(model, name, 3, None)
    weight = lm.weight_of(lm.linear_layers(model)[name])
    put_weight(lm.linear_layers(new)[name], gptq_quantize(weight, hessian, bits=3).dequantize())
    assert found.costs[name][3] == pytest.approx(lm.divergence(model, new, tokens, window=32).kl, rel=1e-3)
    nearest = mixed.sensitivity(model, tokens, bits=(3,), group_size=None, window=32, progress=False)
    assert found.costs[name][3] != pytest.approx(nearest.costs[name][3], rel=1e-3)


def test_the_given_model_is_not_changed_and_keeps_its_mode():
    model, tokens = random_model().train(), random_tokens(64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mixed.sensitivity(model, tokens, bits=(2,), window=32, progress=False)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules())


def test_only_later_blocks_run_again(monkeypatch):
    """A layer of the last block costs one run of that block, not of all."""
    model, tokens, calls = random_model(), random_tokens(32), []
    block = type(lm.blocks_of(model)[1][0])
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda self, *a, **k: calls.append(1) or forward(self, *a, **k))
    mixed.sensitivity(model, tokens, bits=(2, 3), window=32, progress=False)
    assert len(calls) == 3 + 7 * 2 * (3 + 2 + 1)  # the float pass; seven layers a block, two bit widths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": ()}, "at least one"),
        ({"bits": (3, 3)}, "different bit widths"),
        ({"bits": (9,)}, "bits must be"),
        ({"bits": (2.5,)}, "bits must be an int"),
        ({"method": "awq"}, "method must be one of rtn, gptq, got 'awq'"),
        ({"group_size": 0}, "group_size"),
        ({"window": 1}, "window"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixed.sensitivity(random_model(), random_tokens(64), progress=False, **options)


def test_a_sensitivity_prints_as_a_table():
    found = mixed.Sensitivity({"a": {2: 0.5, 4: 0.01}}, {"a": {2: 0.1, 4: 0.1}}, {"a": {2: 8, 4: 16}}, {"a": 32}, 32)
    assert [line.split()[-2:] for line in str(found).splitlines()] == [["4", "bits"], ["5.00e-01", "1.00e-02"]]


# Allocations


def every_allocation(costs, sizes):
    """The definition: try all of them. (bytes, cost) of each."""
    for choice in itertools.product(*(row for row in sizes.values())):
        pairs = list(zip(sizes, choice, strict=True))
        yield sum(sizes[n][b] for n, b in pairs), math.fsum(costs[n][b] for n, b in pairs)


def a_problem(draw_int, draw_cost, layers, choices, unit):
    sizes = {f"l{i}": {b: unit * draw_int() for b in range(2, 2 + choices)} for i in range(layers)}
    return {name: {b: draw_cost() for b in row} for name, row in sizes.items()}, sizes


@st.composite
def problems(draw):
    numbers, costs = st.integers(1, 12), st.floats(0, 10) | st.sampled_from([0.0, 1.0, 2.0])
    return a_problem(
        lambda: draw(numbers),
        lambda: draw(costs),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 7, 4128])),
    )


@given(problems(), st.floats(0, 1.2))
@settings(max_examples=200, deadline=None)
def test_the_knapsack_is_the_best_of_all_and_greedy_no_better(problem, part):
    costs, sizes = problem
    everything = list(every_allocation(costs, sizes))
    least, most = min(e[0] for e in everything), max(e[0] for e in everything)
    budget = int(least + part * (most - least))
    best = min(cost for nbytes, cost in everything if nbytes <= budget)
    exact, quick = mixed.knapsack(costs, sizes, budget), mixed.greedy(costs, sizes, budget)
    assert exact.kl == pytest.approx(best, abs=1e-9)
    assert quick.kl >= exact.kl - 1e-9
    for found in (exact, quick):
        assert found.bits.keys() == sizes.keys()
        assert found.nbytes == sum(sizes[n][b] for n, b in found.bits.items()) <= budget
        assert found.kl == pytest.approx(math.fsum(costs[n][b] for n, b in found.bits.items()))


@given(problems())
@settings(max_examples=100, deadline=None)
def test_the_frontier_is_the_knapsack_of_every_budget(problem):
    costs, sizes = problem
    found = mixed.frontier(costs, sizes)
    assert [a.nbytes for a in found] == sorted({a.nbytes for a in found})
    assert all(after.kl < before.kl + 1e-12 for before, after in itertools.pairwise(found))
    for budget in {nbytes for nbytes, _ in every_allocation(costs, sizes)}:
        best = [a for a in found if a.nbytes <= budget]
        if best:  # below the first there may be cheaper choices only
            assert mixed.knapsack(costs, sizes, budget).kl == pytest.approx(best[-1].kl, abs=1e-9)


def test_more_bytes_never_predict_more_harm():
    pick = random.Random(0)
    costs, sizes = a_problem(lambda: pick.randint(1, 30), pick.random, 12, 4, 8256)
    least = sum(min(row.values()) for row in sizes.values())
    kls = [mixed.knapsack(costs, sizes, least + step * 5000).kl for step in range(100)]
    assert kls == sorted(kls, reverse=True)
    assert kls[0] > 1.5 * kls[-1]


def test_greedy_can_be_worse():
    """The small layer's step is the better bargain, and leaves no room for the large one's."""
    costs = {"small": {2: 2.0, 4: 0.0}, "large": {2: 10.0, 4: 1.0}}
    sizes = {"small": {2: 10, 4: 11}, "large": {2: 10, 4: 20}}
    assert mixed.greedy(costs, sizes, 30) == mixed.Allocation({"small": 4, "large": 2}, 10.0, 21)
    assert mixed.knapsack(costs, sizes, 30) == mixed.Allocation({"small": 2, "large": 4}, 3.0, 30)


def test_ends_of_the_budget():
    costs = {"a": {2: 3.0, 8: 0.0}, "b": {2: 1.0, 8: 2.0}}  # in b eight bits are worse than two
    sizes = {"a": {2: 10, 8: 40}, "b": {2: 10, 8: 40}}
    for allocate in (mixed.greedy, mixed.knapsack):
        assert allocate(costs, sizes, 20).bits == {"a": 2, "b": 2}
        assert allocate(costs, sizes, 10**12).bits == {"a": 8, "b": 2}
        with pytest.raises(ValueError, match="the smallest possible budget is 20 bytes, got 19"):
            allocate(costs, sizes, 19)


@pytest.mark.parametrize("allocate", [mixed.greedy, mixed.knapsack, lambda c, s, _: mixed.frontier(c, s)])
@pytest.mark.parametrize(
    ("costs", "sizes", "message"),
    [
        ({}, {}, "no layer"),
        ({"a": {}}, {"a": {}}, "no layer"),
        ({"a": {2: 1.0}}, {"b": {2: 1}}, "the same layers"),
        ({"a": {2: 1.0}}, {"a": {3: 1}}, "the same bits"),
        ({"a": {2: math.nan}}, {"a": {2: 1}}, "finite"),
        ({"a": {2: math.inf}}, {"a": {2: 1}}, "finite"),
        ({"a": {2: 1.0}}, {"a": {2: 0}}, "sizes must be at least 1"),
        ({"a": {2: 1.0}}, {"a": {2: 1.5}}, "sizes must be an int"),
    ],
)
def test_problems_that_make_no_sense_are_refused(allocate, costs, sizes, message):
    with pytest.raises(ValueError, match=message):
        allocate(costs, sizes, 100)


def test_a_large_model_is_no_problem():
    """A model of 7 billion parameters: 224 layers, eight choices each. Few states, because sizes share a divisor."""
    pick = random.Random(0)
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 3
    sizes = {
        f"{block}.{i}": {b: out * inside * b // 8 + out * inside // 128 * 4 for b in range(1, 9)}
        for block in range(32)
        for i, (out, inside) in enumerate(shapes)
    }
    costs = {name: {b: pick.random() * 4.0**-b for b in row} for name, row in sizes.items()}
    budget = sum(row[4] for row in sizes.values())
    steps = mixed._steps(costs, sizes, budget)
    assert max(map(len, steps)) < 32 * 7 * 8 * 50
    found = mixed.knapsack(costs, sizes, budget)
    assert found.kl <= mixed.greedy(costs, sizes, budget).kl
    assert found.nbytes <= budget


def test_begin_tokens_are_context_only():
    """As in divergence: no text predicts them."""
    model, tokens = random_model(), random_tokens(48)
    model.config.bos_token_id, model.config.eos_token_id = 0, 1
    tokens[[0, 3, 5, 7, 20, 21, 22, 40]] = 0  # more in the first window than in the second
    name = next(iter(lm.linear_layers(model)))
    table = mixed.sensitivity(model, tokens, bits=(3,), group_size=None, window=24, progress=False)
    new, _ = with_one_layer_quantized(model, name, 3, None)
    wanted = lm.divergence(model, new, tokens, window=24)
    assert table.costs[name][3] == pytest.approx(wanted.kl, rel=1e-4)
    assert table.errors[name][3] == pytest.approx(wanted.stderr, rel=1e-4)
    model.config.bos_token_id = None
    counted = mixed.sensitivity(model, tokens, bits=(3,), group_size=None, window=24, progress=False)
    assert counted.costs[name][3] != pytest.approx(table.costs[name][3], rel=1e-4)
