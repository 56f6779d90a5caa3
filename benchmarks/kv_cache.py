"""A cache of few bits on SmolLM2 at 2,048 tokens, beside the other axes and transformers' own cache. Three minutes.

1,536 tokens are cached (one prefill serves all), the rest is read on 32 at a time. transformers' QuantizedCache is
measured where optimum-quanto or HQQ is installed, in the same groups of 32 with the same number of recent tokens.
"""

import sys

import torch
from transformers import QuantizedCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from quantlab import lm
from quantlab.kv import KVCache, KVModel
from quantlab.metrics import kl_divergence

CACHED, WHOLE = 1536, {"key_bits": 16, "value_bits": 16}
SETTINGS = {
    "K2 per channel": {"key_bits": 2, "value_bits": 16},
    "K2 per token": {"key_bits": 2, "value_bits": 16, "keys": "token"},
    "V2 per token": {"key_bits": 16, "value_bits": 2},
    "V2 per channel": {"key_bits": 16, "value_bits": 2, "values": "channel"},
    "K4 V4": {},
    "K2 V2": {"key_bits": 2, "value_bits": 2},
    "K2 V2, 4 first tokens": {"key_bits": 2, "value_bits": 2, "sinks": 4},
}
THEIRS = {"quanto": (is_optimum_quanto_available, ((0, 0), (-1, -1))), "hqq": (is_hqq_available, ((0, 0), (1, 1)))}


class Bench:
    """SmolLM2 with a float cache of the first tokens, and its predictions of the rest."""

    def __init__(self, model, tokens: torch.Tensor):
        self.model, self.following = KVModel(model), tokens[None, CACHED:]
        self.past = model(tokens[None, :CACHED], logits_to_keep=1).past_key_values
        self.float16 = sum(layer.keys.numel() + layer.values.numel() for layer in self.past.layers) * 2
        self.float16 *= len(tokens) / CACHED  # at the end of the reading
        self.logits = self.read(KVCache.filled(self.past, **WHOLE))

    def read(self, cache):
        return self.model(self.following, past_key_values=cache).logits[0]

    def measure(self, name: str, cache, size=lambda cache: cache.nbytes) -> tuple[float, float]:
        """(KL, bytes over float16's) when the text has been read; one line."""
        kl = kl_divergence(self.logits, self.read(cache))
        share = size(cache) / self.float16
        print(f"{name:36} KL {kl:.4f}   {share:.3f} of float16's bytes", flush=True)
        return kl, share

    def theirs(self, backend: str, bits: int, axes: tuple[int, int]):
        """transformers' cache, filled with the same keys and values."""
        options = {"axis_key": axes[0], "axis_value": axes[1], "q_group_size": 32, "residual_length": 32}
        cache = QuantizedCache(backend, self.model.config, nbits=bits, **options)
        for index, layer in enumerate(self.past.layers):
            cache.update(layer.keys.clone(), layer.values.clone(), index)
        return cache


def their_bytes(cache) -> int:
    """Packed codes, scales and zeros as they lie in memory, and what is in float as float16."""
    total = 0
    for layer in cache.layers:
        for q in (layer._quantized_keys, layer._quantized_values):
            if isinstance(q, tuple):
                parts = q[0], q[1]["scale"], q[1]["zero"]
            else:
                parts = getattr(q._data, "_data", q._data), q._scale, q._shift
            total += sum(part.nbytes if part.dtype == torch.uint8 else 2 * part.numel() for part in parts)
        total += 2 * (layer.keys.numel() + layer.values.numel())
    return total


def bar(what: str, value: float, most: float) -> bool:
    print(f"{what:60} {value:.4f}, at most {most:g}: {'met' if value <= most else 'MISSED'}")
    return value <= most


def main() -> int:
    torch.set_grad_enabled(False)
    try:
        model, tokenizer = lm.load_lm("smollm2")
    except FileNotFoundError as error:
        print(f"left out: {error}")
        return 0
    bench = Bench(model, lm.token_stream(tokenizer, lm.load_text("general"))[:2048])
    found = {name: bench.measure(name, KVCache.filled(bench.past, **s)) for name, s in SETTINGS.items()}
    for backend, (installed, pairs) in THEIRS.items():
        for bits, axes in [(b, axes) for b in (4, 2) for axes in pairs] if installed() else []:
            name = f"{backend}, {bits} bits, axes {axes[0]} {axes[1]}"
            bench.measure(name, bench.theirs(backend, bits, axes), their_bytes)
    kl = {name: values[0] for name, values in found.items()}
    met = [
        bar("2-bit keys, KL per channel over per token", kl["K2 per channel"] / kl["K2 per token"], 0.4),
        bar("2-bit values, KL per token over per channel", kl["V2 per token"] / kl["V2 per channel"], 0.1),
        bar("K4 V4, KL", kl["K4 V4"], 0.005),
        bar("K4 V4, bytes over float16's", found["K4 V4"][1], 0.33),
    ]
    return int(not all(met))


if __name__ == "__main__":
    sys.exit(main())
