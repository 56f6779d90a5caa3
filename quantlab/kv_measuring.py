"""What a cache in few bits costs a model, and the queries that its keys are asked with."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantlab.arguments import check_kind, check_model
from quantlab.kv import KVCache, KVModel
from quantlab.lm import Divergence
from quantlab.lm.measuring import checked_windows
from quantlab.metrics import kl_per_position


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
        agreed = (whole.argmax(-1) == logits.argmax(-1)).double().mean().item()
        found[name] = Divergence(kl.mean().item(), kl.std().item() / len(kl) ** 0.5, agreed, len(kl))
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
