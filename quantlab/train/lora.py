"""QLoRA: a model frozen in NF4, and small trainable adapters (LoRA) beside its linear layers."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantlab.arguments import check_int, check_number
from quantlab.codebook import nf4_levels, quantize_codebook
from quantlab.linear import PackedLinear, packed_layers
from quantlab.lm import linear_layers, load_text, token_stream
from quantlab.lm.layers import float_layers
from quantlab.modules import weight_of
from quantlab.storage import load_tensors, save_tensors


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """The warnings of one logger off for a while, and then as they were."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


with _quiet("bitsandbytes"):  # peft loads it where it is installed, and it misses a kernel that is not used here
    import peft
    from peft.tuners.lora.layer import Linear as LoraLinear


class PackedLora(LoraLinear):
    """peft's LoRA layer around a PackedLinear. Merging swaps the packed weight for floats, unmerging brings it back.

    peft adds the update to base_layer.weight.data in place. Here that would be a decoded copy, and the update lost.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.base_layer, PackedLinear):
            self._packed = [self.base_layer]  # in a list, so that it is no submodule
            self.base_layer = self.base_layer.to_linear()
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        super().unmerge()
        self.base_layer = self._packed.pop()


def nf4_model(model, *, block_size: int = 64, double_quant: bool = True):
    """A new model, frozen, its linear layers as PackedLinear; embeddings, norms and head stay floats.

    Raises: ValueError if the model has no float linear layers in its blocks.
    """
    new = copy.deepcopy(model).eval().requires_grad_(False)
    for name, layer in float_layers(new).items():
        new.set_submodule(name, nf4_linear(layer, block_size=block_size, double_quant=double_quant))
    return new


def nf4_linear(layer: nn.Module, *, block_size: int = 64, double_quant: bool = True) -> PackedLinear:
    """The layer (nn.Linear, or GPT-2's Conv1D) with its weight packed, rounded to the nearest NF4 values."""
    weight = weight_of(layer).contiguous()
    q = quantize_codebook(weight, nf4_levels(), block_size=block_size, double_quant=double_quant)
    return PackedLinear(q, layer.bias)


def add_lora(model, *, rank: int = 8, alpha: float | None = None, seed: int = 0) -> peft.PeftModel:
    """A new model: the given one frozen, with a LoRA adapter beside each linear layer of its blocks.

        y = layer(x) + (alpha / rank) * (x Aᵀ) Bᵀ      A (rank, in) random, B (out, rank) zero      Hu et al. 2021

    alpha is 2 * rank unless given. The adapters are peft's; its Linear holds float layers as they are, and PackedLinear
    through peft's interface for layers of one's own. At the start the outputs are those of the given model. The norm
    gains, embeddings and head are not trained.

    Raises: ValueError if rank is below 1, alpha is not above 0, or the model has no linear layer.
    """
    rank = check_int(rank, "rank", 1)
    alpha = 2 * rank if alpha is None else check_number(alpha, "alpha", above=0)
    names = linear_layers(model).keys() | packed_layers(model).keys()
    if not names or isinstance(model, peft.PeftModel):
        raise ValueError(f"{type(model).__name__} has no linear layers to put adapters beside, or has adapters already")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted({n.rpartition(".")[2] for n in names}))
    config._register_custom_module({PackedLinear: PackedLora})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type .*PackedLinear")  # it is, see PackedLora
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.random.default_generator.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(model), config).eval()


def merge(model: peft.PeftModel):
    """A new model without adapters, its linear layers float: W + (alpha / rank) * B A, where W is decoded if packed.

    It predicts what the model with adapters predicts, up to float rounding, and weighs what a float model weighs;
    nf4_model(merge(model)) is small again, and no longer the same.
    """
    return copy.deepcopy(model).merge_and_unload().eval()


def lora_layers(model: peft.PeftModel) -> dict[str, LoraLinear]:
    """The layers that have an adapter, by the names they have in the model without."""
    inner = model.get_base_model()
    return {name: m for name, m in inner.named_modules() if isinstance(m, LoraLinear)}


def save_adapters(path, model: peft.PeftModel) -> int:
    """Write the adapters (not the base) to one safetensors file, in 16 bits; returns its size in bytes."""
    state = peft.get_peft_model_state_dict(model)
    return save_tensors(path, {name: t.to(torch.bfloat16) for name, t in state.items()})


def load_adapters(path, model: peft.PeftModel) -> None:
    """Put saved adapters in the place of the model's own.

    Raises: FileNotFoundError if there is no file; ValueError if it holds adapters of another model or rank.
    """
    state, own = load_tensors(path), peft.get_peft_model_state_dict(model)
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in own.items()}:
        raise ValueError(f"{path} holds adapters of another model or rank")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


# --- what notebook 15 trains on, and how -------------------------------------------------------------------------

RANKS = (1, 2, 4, 8, 16)
RECIPE = {"steps": 40, "batch": 8, "window": 128, "learning_rate": 5e-3}


def style_tokens(tokenizer) -> tuple[Tensor, Tensor]:
    """(to train on, held out): the ship's log in data/text/style.txt; every fourth day is held out."""
    days = load_text("style")
    return (
        token_stream(tokenizer, [day for i, day in enumerate(days) if i % 4 != 3]),
        token_stream(tokenizer, days[3::4]),
    )
