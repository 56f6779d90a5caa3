"""Keys and values in a few bits: a cache that transformers' forward and generate take."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from quantlab.arguments import check_choice, check_int, check_kind, check_model
from quantlab.kv_codes import DIM, Chunks, check_group, check_states, quantize_kv, to_half

__all__ = ["Chunks", "KVCache", "KVLayer", "KVModel", "Stored", "quantize_kv"]


class Stored:
    """The keys, or the values, of one layer: first tokens and last ones in float, between them chunks in a few bits.

    At 16 bits all stay as they come. Otherwise floats are kept in 16 bits, in the model's own kind if it has such.
    """

    def __init__(self, *, bits: int, per: str, group_size: int, recent: int, sinks: int):
        self.bits, self.per, self.group_size, self.recent, self.sinks = bits, per, group_size, recent, sinks
        self.first = self.middle = self.last = None

    def check(self, x: Tensor) -> None:
        """ValueError unless x can be stored beside what is."""
        self.as_kept(x)
        if self.last is not None and len(x) != len(self.last):
            raise ValueError(f"the cache holds {len(self.last)} texts, got {len(x)}; a new batch needs a new KVCache")
        if self.last is not None and (x.shape[1], x.shape[3]) != (self.last.shape[1], self.last.shape[3]):
            shapes = tuple(self.last.shape), tuple(x.shape)
            raise ValueError(f"heads and channels must stay, (batch, heads, tokens, channels) {shapes[0]}, {shapes[1]}")

    def as_kept(self, x: Tensor) -> Tensor:
        return x.detach() if self.bits == 16 else to_half(x.detach())

    def append(self, x: Tensor) -> None:
        """Store what follows; chunks of which no token is among the most recent ones go into a few bits."""
        x = self.as_kept(x)
        if self.last is None:
            self.first = self.last = x[:, :, :0].clone()
        window = torch.cat([self.last, x], 2)
        wanted = self.sinks - self.first.shape[2] if self.middle is None else 0
        self.first = torch.cat([self.first, window[:, :, :wanted]], 2)
        window = window[:, :, wanted:]
        full = 0 if self.bits == 16 else max(0, window.shape[2] - self.recent) // self.group_size * self.group_size
        if full:
            new = quantize_kv(window[:, :, :full], bits=self.bits, per=self.per, group_size=self.group_size)
            self.middle = new if self.middle is None else self.middle.followed_by(new)
        self.last = window[:, :, full:].clone()  # a view would keep the whole window in memory

    def read(self, dtype: torch.dtype) -> Tensor:
        """All tokens so far, (batch, heads, tokens, channels), as the codes have them."""
        parts = (self.first, None if self.middle is None else self.middle.dequantize(), self.last)
        return torch.cat([part.to(dtype) for part in parts if part is not None], 2)

    def change(self, how: Callable) -> None:
        """The same change of rows made to all that is stored."""
        self.first, self.last = how(self.first), how(self.last)
        self.middle = None if self.middle is None else self.middle.change(how)

    @property
    def tokens(self) -> int:
        middle = 0 if self.middle is None else self.middle.codes.shape[2] * self.group_size
        return 0 if self.last is None else self.first.shape[2] + middle + self.last.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(0 if part is None else part.nbytes for part in (self.first, self.middle, self.last))


class KVLayer(CacheLayerMixin):
    """What transformers asks of one layer's cache, in this version of its Cache interface."""

    is_croppable = False  # what has been rounded cannot be put back as it was

    def __init__(self, keys: dict, values: dict):
        super().__init__()
        self.settings = keys, values
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """(keys, values) for attention: the past as it is stored, and the new ones as they came; then stores these."""
        key_states, value_states = self._check(key_states, value_states)
        whole = []
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            whole.append(torch.cat([stored.read(new.dtype), new], 2) if stored.tokens else new.contiguous())
            stored.append(new)
        self.is_initialized = True
        return tuple(whole)

    def get_seq_length(self) -> int:
        return self.keys.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1  # none

    def reset(self) -> None:
        """As it was when new."""
        self.keys, self.values = (Stored(**settings) for settings in self.settings)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a number below 0, as transformers has it), while they are still in float."""
        count = -check_int(tokens_to_remove, "tokens_to_remove", high=0, low=-self.get_seq_length())
        stored = (self.keys, self.values) if count else ()
        left = min((s.last.shape[2] for s in stored), default=0)
        if count > left:
            kept = f"{count} tokens cannot be forgotten, only the last {left}: those before"
            raise ValueError(f"{kept} are rounded, or kept as the first")
        for s in stored:
            s.last = s.last[:, :, : s.last.shape[2] - count].clone()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beam search has them; exact, since codes move and are not rounded anew."""
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda part: part[indices])

    def offload(self) -> None:
        raise ValueError("a KVCache stays on its device; offloading is not supported")

    prefetch = offload

    def _change(self, how: Callable) -> None:
        for stored in (self.keys, self.values) if self.is_initialized else ():
            stored.change(how)

    def _check(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Both, before either is stored."""
        states = [check_states(keys, "key_states"), check_states(values, "value_states")]
        if states[0].shape[:3] != states[1].shape[:3]:
            raise ValueError(f"keys and values must belong together, got {tuple(keys.shape)} and {tuple(values.shape)}")
        for stored, new in zip((self.keys, self.values), states, strict=True):
            stored.check(new)
        return states


class KVCache(Cache):
    """A cache for forward and generate, `past_key_values=KVCache(...)`: keys and values of the past in a few bits.

    key_bits, value_bits: 2..8, or 16 for floats as they come. recent: at least so many last tokens stay in float
    (fewer than group_size more, until their chunk is full). sinks: so many first tokens as well; in a batch padded on
    the left these are padding. keys, values: whose range is shared, "channel" or "token" (see quantize_kv).

    >>> cache = KVCache(key_bits=2, value_bits=2, group_size=8, recent=8)
    >>> keys, values = cache.update(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), layer_idx=0)
    >>> cache.get_seq_length(), cache.nbytes   # 640 floats of each: 512 in 2 bits, 64 ranges of 4 bytes, 128 floats
    (40, 1280)
    """

    def __init__(
        self, *, key_bits: int = 4, value_bits: int = 4, group_size: int = 32, recent: int = 32, sinks: int = 0,
        keys: str = "channel", values: str = "token",
    ):  # fmt: skip
        both = {"group_size": check_group(group_size), "recent": check_int(recent, "recent", 0)}
        both |= {"sinks": check_int(sinks, "sinks", 0)}
        key = both | {"bits": _check_bits(key_bits, "key_bits"), "per": check_choice(keys, "keys", DIM)}
        value = both | {"bits": _check_bits(value_bits, "value_bits"), "per": check_choice(values, "values", DIM)}
        super().__init__(layer_class_to_replicate=partial(KVLayer, key, value))

    @classmethod
    def filled(cls, past: Cache, *, tokens: int | None = None, **settings) -> "KVCache":
        """A new cache with what a float cache (DynamicCache) holds of the first `tokens`, or of all; past stays."""
        cache, most = cls(**settings), check_kind(past, "past", Cache).get_seq_length()
        count = most if tokens is None else check_int(tokens, "tokens", 1, most)
        for index, layer in enumerate(past.layers):
            states = (check_states(layer.keys, "keys"), check_states(layer.values, "values"))
            cache.update(*(x[:, :, :count] for x in states), index)
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored: packed codes, their ranges, and what is in float."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)


class KVModel(nn.Module):
    """A model that reads through a KVCache, a few tokens at a time: lm.divergence, lm.generate, ledger.measure take it.

    A text read in one go would see all its own tokens in float, since only the past is rounded; read `chunk` at a time,
    every token sees the rounded past that it would see in generate. The model's weights are shared, not copied.

    cache_bytes: of the cache of the longest text read so far. Raises: ValueError for settings that KVCache refuses.
    """

    def __init__(self, model, *, chunk: int = 32, **settings):
        super().__init__()
        self.new_cache = partial(KVCache, **settings)
        self.new_cache()  # refuses bad settings now
        self.model, self.chunk, self.cache_bytes = check_model(model), check_int(chunk, "chunk", 1), 0
        self.config, self.generation_config = model.config, getattr(model, "generation_config", None)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, input_ids: Tensor, past_key_values: Cache | None = None, use_cache: bool = True):
        """As the model's own, (batch, tokens) to logits (batch, tokens, vocabulary)."""
        cache = self.new_cache() if past_key_values is None else past_key_values
        parts = [self.model(p, past_key_values=cache, use_cache=True).logits for p in input_ids.split(self.chunk, 1)]
        self.cache_bytes = max(self.cache_bytes, getattr(cache, "nbytes", 0) // len(input_ids))
        return CausalLMOutputWithPast(logits=torch.cat(parts, 1), past_key_values=cache if use_cache else None)


def _check_bits(bits, name: str) -> int:
    bits = check_int(bits, name)
    return bits if bits == 16 else check_int(bits, name, 2, 8)
