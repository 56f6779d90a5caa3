"""What a cache in few bits costs a model, and the queries that its keys are asked with."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantlab.arguments import check_int, check_kind, check_model
from quantlab.kv import KVCache, KVModel
from quantlab.kv_codes import DIM, quantize_kv
from quantlab.lm import Divergence, capture_inputs, layers_of_role
from quantlab.lm.measuring import checked_windows
from quantlab.metrics import kl_per_position, top1_agreement


def kv_divergences(
    model, past: Cache, following: Tensor, settings: Mapping, *, tokens: int | None = None, chunk: int = 32
) -> dict:
    """What each cache does to the predictions on `following`: {name: Divergence} to those with the float cache.

    past: a float cache of the text before (one prefill serves all), of which `tokens` are taken, or all; following
    (n,): what comes next, read `chunk` tokens at a time; settings {name: what KVCache takes}. The standard error takes
    positions as independent, and so is too small.
    """
    checked_windows(model, following, 2, None)
    check_kind(settings, "settings", Mapping)
    reader, found = KVModel(model, chunk=chunk), {}
    whole = _read_on(reader, past, following, tokens, {"key_bits": 16, "value_bits": 16})
    for name, setting in settings.items():
        logits = _read_on(reader, past, following, tokens, check_kind(setting, f"settings[{name!r}]", Mapping))
        kl = torch.cat([kl_per_position(*some) for some in zip(whole.split(64), logits.split(64), strict=True)])
        stderr = kl.std().item() / len(kl) ** 0.5
        found[name] = Divergence(kl.mean().item(), stderr, top1_agreement(whole, logits), len(kl))
    return found


def _read_on(reader: KVModel, past: Cache, following: Tensor, tokens: int | None, setting: Mapping) -> Tensor:
    cache = KVCache.filled(past, tokens=tokens, **setting)
    with torch.no_grad():
        return reader(following[None].to(reader.device), past_key_values=cache).logits[0].float().cpu()


def attention_queries(model, tokens: Tensor) -> list[Tensor]:
    """The queries of each layer, (heads, tokens, channels), as they meet the keys: after RoPE, before scaling.

    Raises: ValueError if the model's attention is not one that transformers' sdpa interface computes.
    """
    checked_windows(check_model(model), tokens, 2, None)
    caught, known = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, *rest, **options):
        caught.append(query[0].detach().float().cpu())
        return known(module, query, *rest, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy
    try:
        with torch.no_grad():
            model(tokens[None].to(model.device), use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = known
    if not caught:
        raise ValueError(f"{type(model).__name__} does not compute attention by transformers' sdpa interface")
    return caught


def attention_on_first(model, tokens: Tensor, past: Cache, *, start: int = 64, stop: int = 256) -> list[float]:
    """The part of their attention that tokens start..stop-1 give the first token, a mean for each layer.

    past: a float cache of the same tokens. Raises: ValueError as attention_queries does, or for too few tokens.
    """
    checked_windows(model, tokens, 2, None)
    stop = check_int(stop, "stop", 2, min(len(tokens), check_kind(past, "past", Cache).get_seq_length()))
    start, shares = check_int(start, "start", 1, stop - 1), []
    later = torch.arange(stop) > torch.arange(start, stop)[:, None]
    for query, layer in zip(attention_queries(model, tokens[:stop]), past.layers, strict=True):
        keys = layer.keys[0, :, :stop].float().cpu().repeat_interleave(len(query) // layer.keys.shape[1], 0)
        scores = query[:, start:] @ keys.transpose(1, 2) / query.shape[-1] ** 0.5
        shares.append(scores.masked_fill(later, -torch.inf).softmax(-1)[:, :, 0].mean().item())
    return shares


def value_lengths(past: Cache) -> list[float]:
    """The length of each token's value, over that of the mean token: a mean over layers and heads of the first text."""
    values = [layer.values[0].float().norm(dim=-1) for layer in check_kind(past, "past", Cache).layers]
    return (sum((x / x.mean()).mean(0) for x in values) / len(values)).tolist()


def rounding_errors(past: Cache, *, bits: int = 2) -> dict[str, dict[str, float]]:
    """{"per channel" or "per token": {"keys" or "values": ‖x̂ - x‖² / ‖x‖², a mean over layers}} in groups of 32.

    Raises: ValueError if the cache holds fewer than 32 tokens.
    """
    whole = check_kind(past, "past", Cache).get_seq_length() // 32 * 32
    errors = {f"per {per}": {"keys": 0.0, "values": 0.0} for per in DIM}
    for layer in past.layers:
        for kind, x in (("keys", layer.keys[:, :, :whole]), ("values", layer.values[:, :, :whole])):
            for per in DIM:
                error = quantize_kv(x, bits=bits, per=per).dequantize() - x.float()
                share = error.square().sum() / x.float().square().sum()
                errors[f"per {per}"][kind] += share.item() / len(past.layers)
    return errors


def keys_before_rope(model, tokens: Tensor, past: Cache) -> DynamicCache:
    """The cache `past` of these tokens with its keys as they were before their rotation by position.

    Raises: ValueError if they are no plain output of a layer of their own, or were not only rotated: a rotation keeps
    lengths.
    """
    checked_windows(model, tokens, 2, None)
    makers = layers_of_role(model, "key")
    inputs, pairs = capture_inputs(model, tokens, makers, window=len(tokens)), []
    for (name, maker), layer in zip(makers.items(), check_kind(past, "past", Cache).layers, strict=True):
        _, heads, count, channels = layer.keys.shape
        with torch.no_grad():
            raw = maker(inputs[name].to(layer.keys))
        if raw.numel() != layer.keys.numel():
            raise ValueError(f"{name} makes more than the keys")
        raw = raw.view(count, heads, channels).transpose(0, 1)[None]
        if torch.equal(raw, layer.keys) or not torch.allclose(raw.norm(dim=-1), layer.keys.norm(dim=-1), rtol=1e-3):
            raise ValueError(f"the keys of {name} are not rotated, or something else is done to them as well")
        pairs.append((raw, layer.values))
    return DynamicCache(pairs)
