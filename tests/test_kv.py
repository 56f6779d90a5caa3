"""kv: codes against loops that are their definition, the cache against transformers' own, in every family; misuse."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import FAMILIES, VOCABULARY, made
from test_lm import random_model, random_tokens
from transformers import DynamicCache, QuantizedCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from quantlab import ledger, lm
from quantlab.kv import KVCache, KVLayer, KVModel, Stored, quantize_kv
from quantlab.kv_measuring import (
    attention_on_first,
    attention_queries,
    keys_before_rope,
    kv_divergences,
    rounding_errors,
    value_lengths,
)
from quantlab.metrics import kl_per_position
from quantlab.packing import unpack

WHOLE = {"key_bits": 16, "value_bits": 16}
SMALL = {"key_bits": 3, "value_bits": 2, "group_size": 8, "recent": 8}


def states(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)


def half_above(value: float) -> float:
    """The least float16 not below a positive number."""
    steps = 2.0 ** max(math.floor(math.log2(value)) - 10, -24) if value else 0
    return max(math.ceil(value / steps) * steps if steps else 0.0, 2.0**-24)


def slow(x, bits, per, group_size):
    """(codes, reals) by the definition, one group after the other."""
    codes, reals = torch.zeros(x.shape, dtype=torch.uint8), torch.zeros_like(x)
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            matrix = x[b, h] if per == "channel" else x[b, h].T  # groups run down the first dimension
            for line in range(matrix.shape[1]):
                for start in range(0, matrix.shape[0], group_size):
                    group = matrix[start : start + group_size, line].half().double()
                    low = group.min().item()
                    step = half_above((group.max().item() - low) / (2**bits - 1))
                    for i, value in enumerate(group.tolist()):
                        at = (start + i, line) if per == "channel" else (line, start + i)
                        code = min(max(round((value - low) / step), 0), 2**bits - 1)
                        codes[b, h][at], reals[b, h][at] = code, low + step * code
    return codes, reals


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_those_of_the_loops(bits, per):
    x = states(2, 2, 16, 20, seed=bits)  # 20 channels: the last group is short
    q, (codes, reals) = quantize_kv(x, bits=bits, per=per, group_size=8), slow(x, bits, per, 8)
    assert torch.equal(unpack(q.codes, bits=bits, count=x.numel()).view(x.shape), codes)
    torch.testing.assert_close(q.dequantize(), reals, rtol=0, atol=1e-5)
    groups = 2 * 2 * (2 * 20 if per == "channel" else 16 * 3)
    assert q.nbytes == x.numel() * bits // 8 + 4 * groups


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8), st.sampled_from(["channel", "token"]), st.integers(1, 20), st.integers(0, 10**6),
    st.sampled_from([1e-7, 1e-3, 1.0, 1e3]), st.sampled_from([0.0, 1.0, -50.0]),
)  # fmt: skip
def test_no_element_is_off_by_more_than_half_a_step(bits, per, channels, seed, size, shift):
    x = ((states(1, 2, 16, channels, seed=seed) + shift) * size).half().float()
    q = quantize_kv(x, bits=bits, per=per, group_size=8)
    step = q._spread(q.scale.float()).expand(1, 2, 2, 8, channels).flatten(2, 3)
    assert ((q.dequantize() - x).abs() <= step * (0.5 + 1e-4) + x.abs() * 1e-6).all()


@pytest.mark.parametrize("per", ["channel", "token"])
def test_constant_groups_are_exact_and_zero_is_one(per):
    x = torch.tensor([0.0, -7.5, 1e-4, 65504.0]).repeat_interleave(8).half().float().expand(1, 1, 8, 32)
    assert (quantize_kv(x, bits=2, per=per, group_size=8).dequantize() == x).all()


def test_a_channel_far_from_zero_costs_nothing():
    """The range need not hold 0, as that of QParams must."""
    x = states(1, 1, 32, 4)
    near, far = (quantize_kv(y, bits=4, per="channel").dequantize() - y for y in (x, x + 64))
    assert far.square().mean() < 1.1 * near.square().mean() + 1e-3


def stored_by_definition(x, bits, per, group_size, recent, sinks):
    """What a store must give back of all that it was given."""
    whole = max(0, x.shape[2] - sinks - recent) // group_size * group_size
    middle = x[:, :, sinks : sinks + whole]
    rounded = quantize_kv(middle, bits=bits, per=per, group_size=group_size).dequantize() if whole else middle
    return torch.cat([x[:, :, :sinks], rounded, x[:, :, sinks + whole :]], 2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 20), st.integers(0, 5),
    st.sampled_from(["channel", "token"]), st.integers(2, 8),
)  # fmt: skip
def test_a_stream_in_any_pieces_is_stored_as_one(pieces, recent, sinks, per, bits):
    x = states(2, 1, sum(pieces), 6).half().float()
    store = Stored(bits=bits, per=per, group_size=8, recent=recent, sinks=sinks)
    for count, piece in enumerate(x.split(pieces, 2), 1):
        store.append(piece)
        seen = x[:, :, : sum(pieces[:count])]
        assert store.tokens == seen.shape[2]
        assert torch.equal(store.read(torch.float32), stored_by_definition(seen, bits, per, 8, recent, sinks))


def held(cache) -> int:
    """Bytes of memory behind all tensors of a cache, views and what they keep alive included."""
    parts = [s for layer in cache.layers for s in (layer.keys, layer.values)]
    tensors = [t for s in parts for t in (s.first, s.last)]
    tensors += [t for s in parts if s.middle for t in (s.middle.codes, s.middle.scale, s.middle.minimum)]
    known = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(known.values())


@pytest.mark.parametrize("settings_", [WHOLE, SMALL, SMALL | {"sinks": 4}, {"key_bits": 16, "value_bits": 4}, {}])
def test_nbytes_is_the_memory_behind_it(settings_):
    model, ids = random_model("llama"), random_tokens(61)[None]
    cache = KVCache(**settings_)
    with torch.no_grad():
        for part in ids.split([40, 1, 1, 19], 1):
            model(part, past_key_values=cache)
            assert cache.nbytes == held(cache)
    assert cache.get_seq_length() == 61
    cache.crop(-3)
    assert cache.nbytes == held(cache)


def test_bytes_by_the_formula():
    """K and V: tokens in 2 bits and 4 bytes of range for each 32; 32 tokens in 16 bits."""
    cache = KVCache(key_bits=2, value_bits=2)
    cache.update(states(1, 3, 2048, 64), states(1, 3, 2048, 64), 0)
    assert cache.nbytes == 2 * 3 * 64 * (2016 * (2 / 8 + 4 / 32) + 32 * 2)


def read(model, ids, cache, pieces=(11, 1, 1, 12)):
    with torch.no_grad():
        return torch.cat([model(p, past_key_values=cache, use_cache=True).logits for p in ids.split(pieces, 1)], 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_at_16_bits_it_is_the_float_cache_in_every_family(name):
    """And in few bits it runs, near the float cache at 8, further at 2."""
    model, ids = made(name), random_tokens(50, VOCABULARY).view(2, 25)
    wanted = read(model, ids, DynamicCache())
    assert torch.equal(read(model, ids, KVCache(**WHOLE)), wanted)
    few = {"group_size": 8, "recent": 0}
    eight, two = (
        (read(model, ids, KVCache(key_bits=bits, value_bits=bits, **few)) - wanted).square().mean() for bits in (8, 2)
    )
    assert 0 < eight < two


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    model, ids = made("llama", dtype), random_tokens(25, VOCABULARY)[None]
    assert torch.equal(read(model, ids, KVCache(**WHOLE)), read(model, ids, DynamicCache()))
    cache = KVCache(**SMALL)
    assert read(model, ids, cache).dtype == dtype
    assert cache.layers[0].keys.last.dtype == dtype


def generated(model, ids, cache, **options):
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate(options):
    """Greedy and with beams, whose rows are reordered at every step."""
    model, ids = made("llama"), random_tokens(30, VOCABULARY).view(2, 15)
    wanted = generated(model, ids, None, **options)
    assert torch.equal(generated(model, ids, KVCache(**WHOLE), **options), wanted)
    cache = KVCache(**SMALL)
    assert generated(model, ids, cache, **options).shape[0] == wanted.shape[0]
    assert cache.layers[0].keys.middle is not None


def test_generate_with_drafts_is_told_what_it_cannot_do():
    """Prompt lookup forgets tokens again: in float it may; a crop of rounded ones is refused, never wrong."""
    model, ids = made("llama"), torch.tensor([[5, 6, 7, 8, 9] * 4])
    wanted = generated(model, ids, None, prompt_lookup_num_tokens=3)
    assert torch.equal(generated(model, ids, KVCache(**WHOLE), prompt_lookup_num_tokens=3), wanted)
    cache = KVCache(**SMALL)
    written = generated(model, ids, cache, prompt_lookup_num_tokens=3)
    keys = model(written[:, :-1], use_cache=True).past_key_values.layers[0].keys  # of the first layer: no past in them
    stored = cache.layers[0].keys
    recent, rounded = stored.last.shape[2], stored.middle.dequantize()
    torch.testing.assert_close(stored.last.float(), keys[:, :, -recent:], rtol=1e-3, atol=1e-3)
    assert rounded.shape[2] + recent == keys.shape[2] == 39
    assert (rounded - keys[:, :, :-recent]).abs().max() <= 0.51 * stored.middle.scale.float().max()
    with pytest.raises(ValueError, match="3 tokens cannot be forgotten, only the last 2"):
        generated(model, ids, KVCache(**SMALL | {"recent": 0}), prompt_lookup_num_tokens=3)


def filled(batch=3, tokens=29, **settings_):
    cache = KVCache(**SMALL | settings_)
    for layer in range(2):
        cache.update(states(batch, 2, tokens, 6, seed=layer), states(batch, 2, tokens, 6, seed=9 + layer), layer)
    return cache


def contents(cache):
    return [s.read(torch.float32) for layer in cache.layers for s in (layer.keys, layer.values)]


@pytest.mark.parametrize(
    ("change", "index"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
)
def test_rows_move_exactly(change, index):
    cache = filled(sinks=2)
    before = contents(cache)
    change(cache)
    for now, then in zip(contents(cache), before, strict=True):
        assert torch.equal(now, then[index])
    assert cache.nbytes == held(cache)
    cache.update(states(len(index), 2, 9, 6), states(len(index), 2, 9, 6), 0)  # and go on
    assert cache.get_seq_length() == 38


def test_a_batch_of_another_size_is_refused():
    cache = filled()
    with pytest.raises(ValueError, match="holds 3 texts, got 2; a new batch needs a new KVCache"):
        cache.update(states(2, 2, 1, 6), states(2, 2, 1, 6), 0)
    assert cache.get_seq_length() == 29
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    cache.update(states(2, 2, 1, 6), states(2, 2, 1, 6), 0)
    assert cache.get_seq_length() == 1


def test_what_is_refused_leaves_the_cache_as_it_was():
    """Good keys with bad values, too: neither is stored."""
    cache, good = filled(), states(3, 2, 9, 6)
    before = contents(cache)
    for keys, values, rule in (
        (good, good * math.nan, "value_states must be finite"),
        (good, good * 1e6, "must fit into float16"),
        (good, good[:, :, :8], "must belong together"),
        (good[:, :1], good[:, :1], "heads and channels must stay"),
        (good.long(), good, "key_states must be floating point"),
    ):
        with pytest.raises(ValueError, match=rule):
            cache.update(keys, values, 1)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))


def test_crop_forgets_what_is_in_float_and_refuses_the_rest():
    cache = filled()  # 29 tokens: 16 rounded, 13 in float
    before = contents(cache)
    with pytest.raises(ValueError, match="14 tokens cannot be forgotten, only the last 13: those before are rounded"):
        cache.crop(-14)
    for wrong in (5, -30):
        with pytest.raises(ValueError, match="tokens_to_remove"):
            cache.crop(wrong)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), before, strict=True))
    cache.crop(0)
    cache.crop(-13)
    assert all(torch.equal(a, b[:, :, :16]) for a, b in zip(contents(cache), before, strict=True))
    assert not cache.is_croppable


def test_crop_keeps_the_first_tokens():
    """Nothing is rounded yet: 5 first tokens and 4 others, which alone can be forgotten."""
    cache = filled(tokens=9, sinks=5)
    with pytest.raises(ValueError, match="only the last 4: those before are rounded, or kept as the first"):
        cache.crop(-5)
    cache.crop(-4)
    assert cache.get_seq_length() == 5


def test_offloading_is_refused():
    with pytest.raises(ValueError, match="stays on its device"):
        filled().offload(0)


def test_a_copy_goes_its_own_way():
    cache = filled()
    other = copy.deepcopy(cache)
    other.update(states(3, 2, 20, 6), states(3, 2, 20, 6), 0)
    assert (cache.get_seq_length(), other.get_seq_length()) == (29, 49)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), contents(filled()), strict=True))


def test_filled_takes_a_float_cache_and_leaves_it():
    model, ids = made("llama"), random_tokens(40, VOCABULARY)[None]
    past = model(ids, use_cache=True).past_key_values
    keys = past.layers[1].keys.clone()
    cache = KVCache.filled(past, **SMALL)
    fresh = KVCache(**SMALL)
    model(ids, past_key_values=fresh)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache), contents(fresh), strict=True))
    assert torch.equal(past.layers[1].keys, keys)
    assert isinstance(cache.layers[0], KVLayer)
    some = contents(KVCache.filled(past, tokens=17, **WHOLE))
    assert torch.equal(some[2], keys[:, :, :17])
    with pytest.raises(ValueError, match="tokens must be 1..40, got 41"):
        KVCache.filled(past, tokens=41)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"key_bits": 1}, "key_bits must be 2..8, got 1"),
        ({"value_bits": 9}, "value_bits must be 2..8, got 9"),
        ({"key_bits": 4.0}, "key_bits must be an int"),
        ({"group_size": 12}, "group_size must be a multiple of 8"),
        ({"group_size": 0}, "group_size must be at least 8"),
        ({"recent": -1}, "recent must be at least 0"),
        ({"sinks": True}, "sinks must be an int"),
        ({"keys": "axis"}, "keys must be one of channel, token"),
    ],
)
def test_bad_settings_are_refused_by_name(wrong, rule):
    with pytest.raises(ValueError, match=rule):
        KVCache(**wrong)
    with pytest.raises(ValueError, match=rule):
        KVModel(random_model("llama"), **wrong)


def test_bad_states_are_refused():
    good = states(1, 1, 8, 4)
    for x, rule in (
        (good[0], "must be .batch, heads, tokens, channels"),
        (good[:, :, :7], "multiple of group_size=8 tokens, got 7"),
        (good * 1e6, "must fit into float16"),
        ((good * 1e6).bfloat16(), "must fit into float16"),
        (good / 0, "must be finite"),
    ):
        with pytest.raises(ValueError, match=rule):
            quantize_kv(x, bits=4, per="channel", group_size=8)


def test_a_model_with_a_cache_is_read_as_generate_reads():
    """Chunk by chunk: with chunks of one token it is what decoding gives, and at 16 bits the model itself."""
    model, tokens = random_model("llama"), random_tokens(50)
    whole = lm.divergence(model, KVModel(model, chunk=7, **WHOLE), tokens, window=25)
    assert whole.kl < 1e-5  # float32 sums in another order
    cache, steps = KVCache(**SMALL), []
    with torch.no_grad():
        for token in tokens:
            steps.append(model(token.view(1, 1), past_key_values=cache).logits)
        reader = KVModel(model, chunk=1, **SMALL)
        torch.testing.assert_close(reader(tokens[None]).logits, torch.cat(steps, 1))
    assert reader.cache_bytes == cache.nbytes


def test_a_model_with_a_cache_enters_the_ledger(tmp_path):
    model, tokens = random_model("llama"), random_tokens(150)
    rows = [
        ledger.measure(model, KVModel(model, chunk=16, **SMALL | more), tokens, method="cache", bits=bits, window=50)
        for bits, more in ((2, {}), (16, WHOLE))
    ]
    assert rows[0].kl > rows[1].kl
    assert rows[0].cache_bytes < rows[1].cache_bytes == 50 * 2 * 2 * 2 * 6 * 4  # layers, K and V, heads, channels
    assert rows[0].bytes == rows[1].bytes == lm.model_bytes(model)
    assert rows[0].decode is not None
    assert ledger.append(rows[0], tmp_path / "ledger.csv") == rows[:1]
    assert f"cache, 2 bits: {rows[0].cache_bytes / 1000:.0f} kB of keys and values" in str(ledger.Table(rows))


def test_a_story_is_written_with_a_cache_of_few_bits():
    model, tokenizer = lm.load_lm(str(lm.DATA / "model"))
    story = lm.generate(model, tokenizer, "Once upon a time", tokens=60)
    assert lm.generate(KVModel(model, **WHOLE), tokenizer, "Once upon a time", tokens=60) == story
    assert len(lm.generate(KVModel(model, **SMALL), tokenizer, "Once upon a time", tokens=60)) > 40


def test_one_prefill_serves_all_settings():
    """By hand: each cache is filled from the same past, and the rest is read with it."""
    model, tokens = random_model("llama"), random_tokens(60)
    past = model(tokens[None, :40]).past_key_values
    found = kv_divergences(model, past, tokens[32:50], {"few": SMALL, "same": WHOLE}, tokens=32, chunk=5)
    assert found["same"].kl == 0
    assert found["same"].top1 == 1
    logits = []
    for settings_ in (WHOLE, SMALL):
        cache = KVCache.filled(past, tokens=32, **settings_)
        with torch.no_grad():
            parts = [model(p[None], past_key_values=cache).logits[0] for p in tokens[32:50].split(5)]
        logits.append(torch.cat(parts))
    kl = kl_per_position(*logits)
    assert found["few"].kl == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found["few"].stderr == pytest.approx(kl.std().item() / 18**0.5, rel=1e-3)
    assert past.get_seq_length() == 40


def test_queries_and_keys_give_the_models_attention():
    model, tokens = random_model("llama", attn_implementation="sdpa"), random_tokens(20)
    queries = attention_queries(model, tokens)
    keys = model(tokens[None]).past_key_values.layers[1].keys[0].repeat_interleave(2, 0)
    scores = (queries[1] @ keys.transpose(1, 2) / 6**0.5).masked_fill(torch.ones(20, 20).triu(1).bool(), -math.inf)
    model.set_attn_implementation("eager")
    wanted = model(tokens[None], output_attentions=True).attentions[1][0]
    torch.testing.assert_close(scores.softmax(-1), wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="does not compute attention by"):
        attention_queries(made("mpt"), random_tokens(20, VOCABULARY))


@pytest.fixture(scope="module")
def bundled():
    model, tokenizer = lm.load_lm(str(lm.DATA / "model"))
    tokens = lm.token_stream(tokenizer, lm.load_text("eval"))[:100]
    return model, tokens, model(tokens[None]).past_key_values


def test_attention_on_the_first_token(bundled):
    model, tokens, past = bundled
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attentions = eager(tokens[None, :60], output_attentions=True).attentions
    wanted = [layer[0, :, 20:60, 0].mean().item() for layer in attentions]
    assert attention_on_first(model, tokens, past, start=20, stop=60) == pytest.approx(wanted, rel=1e-3)
    with pytest.raises(ValueError, match="stop must be 2..100, got 101"):
        attention_on_first(model, tokens, past, stop=101)


def test_errors_and_lengths_by_hand(bundled):
    _, _, past = bundled
    wanted, lengths = 0.0, torch.zeros(100)
    for layer in past.layers:
        x = layer.keys[:, :, :96]
        wanted += relative(slow(x, 2, "token", 32)[1], x) / len(past.layers)
        for head in layer.values[0]:
            lengths += head.norm(dim=1) / layer.values[0].norm(dim=-1).mean() / 4 / len(past.layers)
    assert rounding_errors(past)["per token"]["keys"] == pytest.approx(wanted, rel=1e-3)
    assert value_lengths(past) == pytest.approx(lengths.tolist(), rel=1e-4)


def relative(x_hat, x):
    return ((x_hat - x).square().sum() / x.square().sum()).item()


def test_keys_before_rope_are_turned_into_the_keys(bundled):
    model, tokens, past = bundled
    raw = keys_before_rope(model, tokens, past)
    cos, sin = model.model.rotary_emb(raw.layers[0].keys, torch.arange(100)[None])
    for before, after in zip(raw.layers, past.layers, strict=True):
        turned = apply_rotary_pos_emb(before.keys, before.keys, cos, sin)[1]
        torch.testing.assert_close(turned, after.keys, rtol=1e-3, atol=1e-3)
    for name, rule in (("gpt2", "makes more than the keys"), ("opt", "not rotated"), ("qwen3", "something else")):
        other, ids = made(name), random_tokens(40, VOCABULARY)
        with pytest.raises(ValueError, match=rule):
            keys_before_rope(other, ids, other(ids[None]).past_key_values)


@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
@pytest.mark.parametrize("bits", [4, 2])
def test_not_worse_than_transformers_own_cache(backend, package, bits, bundled):
    """Same bits and groups, both axes of theirs: KL at most theirs; a rounded token takes the same bytes.

    (Ours always has 32 tokens in float, theirs up to 32; here it has just rounded them all.)
    """
    pytest.importorskip(package)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from benchmarks.kv_cache import their_bytes

    model, _, _ = bundled
    tokens = lm.token_stream(lm.load_lm(str(lm.DATA / "model"))[1], lm.load_text("eval"))[:416]
    past, reader = model(tokens[None, :352]).past_key_values, KVModel(model)

    def read_on(cache):
        with torch.no_grad():
            return reader(tokens[None, 352:], past_key_values=cache).logits

    whole = read_on(KVCache.filled(past, **WHOLE))
    ours = KVCache.filled(past, key_bits=bits, value_bits=bits)
    kl = kl_per_position(whole, read_on(ours)).mean()
    a_token = sum(s.middle.nbytes for layer in ours.layers for s in (layer.keys, layer.values)) / 384
    for axes in ((0, 0), (-1, -1)) if backend == "quanto" else ((0, 0), (1, 1)):
        options = {"axis_key": axes[0], "axis_value": axes[1], "q_group_size": 32, "residual_length": 32}
        theirs = QuantizedCache(backend, model.config, nbits=bits, **options)
        for index, layer in enumerate(past.layers):
            theirs.update(layer.keys.clone(), layer.values.clone(), index)
        assert kl <= kl_per_position(whole, read_on(theirs)).mean()
        assert a_token == pytest.approx(their_bytes(theirs) / 416)
