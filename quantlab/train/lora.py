"""QLoRA: a model frozen in NF4, and small trainable adapters (LoRA) beside its linear layers.

python -m quantlab.train.lora --out data/checkpoints/lora  trains the adapters that notebook 15 shows, and writes the log of the run.
"""

import argparse
import copy
import json
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.arguments import check_int
from quantlab.codebook import CodebookTensor, DoubleQuantized, nf4_levels, quantize_codebook
from quantlab.lm import divergence, linear_layers, load_lm, load_text, perplexity, token_stream, weight_of
from quantlab.lm.measuring import checked_windows
from quantlab.storage import load_tensors, save_tensors
from quantlab.train.loop import finetune


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


class NF4Linear(nn.Module):
    """A linear layer whose frozen weight is kept as packed NF4 codes and decoded each time it is needed.

    y = x Ŵᵀ + bias, and on the way back dL/dx = dL/dy Ŵ, where Ŵ is decoded a second time rather than kept: what
    waits for the backward pass is the codes alone. The weight has no gradient. Buffers: two codes in a byte, the first
    in the low half, and the absmax of the blocks, in 8 bits or as float32.
    """

    def __init__(self, q: CodebookTensor, bias: Tensor | None = None):
        super().__init__()
        if not torch.equal(q.levels.cpu(), nf4_levels()) or q.codes.ndim != 2:
            raise ValueError(
                f"need an NF4 tensor of shape (out, in), got {len(q.levels)} levels, {tuple(q.codes.shape)}"
            )
        self.out_features, self.in_features = q.codes.shape
        self.block_size, self.dtype = q.block_size, q.dtype
        self.register_buffer("codes", q.packed())
        double = isinstance(q.absmax, DoubleQuantized)
        for name, value in (vars(q.absmax) if double else {"absmax": q.absmax}).items():
            self.register_buffer(f"scale_{name}", value.clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_linear(cls, layer: nn.Module, *, block_size: int = 64, double_quant: bool = True) -> "NF4Linear":
        """The layer (nn.Linear, or GPT-2's Conv1D) with its weight rounded to the nearest NF4 values."""
        q = quantize_codebook(weight_of(layer).clone(), nf4_levels(), block_size=block_size, double_quant=double_quant)
        return cls(q, layer.bias)

    @property
    def absmax(self) -> Tensor:
        """The absmax of each block, float32, (blocks,)."""
        if hasattr(self, "scale_codes"):
            return DoubleQuantized(self.scale_codes, self.scale_absmax, self.scale_offset).dequantize()
        return self.scale_absmax

    @property
    def weight(self) -> Tensor:
        """Ŵ, (out, in), decoded anew at each call: level times absmax of the block."""
        count, absmax = self.out_features * self.in_features, self.absmax
        pairs = _pairs().to(self.codes.device)
        values = torch.index_select(pairs, 0, self.codes.int()).view(torch.float32)[:count]
        if count % self.block_size:
            absmax = absmax.repeat_interleave(self.block_size)[:count]
        else:
            values, absmax = values.view(-1, self.block_size), absmax[:, None]
        return (values * absmax).view(self.out_features, self.in_features).to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and absmax (and bias)."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        return _Decoding.apply(x, self)

    def to_linear(self) -> nn.Linear:
        """The same layer with its decoded weight as floats, frozen."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}"


class _Decoding(torch.autograd.Function):
    """x Ŵᵀ + bias that decodes Ŵ again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.weight, None


@cache
def _pairs() -> Tensor:
    """The two levels that each byte stands for, the low half first, as one 64-bit word: (256,)."""
    byte = torch.arange(256)
    return nf4_levels()[torch.stack([byte & 15, byte >> 4], dim=1)].view(torch.float64).flatten()


class NF4Lora(LoraLinear):
    """peft's LoRA layer around an NF4Linear. Merging swaps the packed weight for floats, unmerging brings it back.

    peft adds the update to base_layer.weight.data in place. Here that would be a decoded copy, and the update lost.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.base_layer, NF4Linear):
            self._packed = [self.base_layer]  # in a list, so that it is no submodule
            self.base_layer = self.base_layer.to_linear()
        super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        super().unmerge()
        self.base_layer = self._packed.pop()


def nf4_model(model, *, block_size: int = 64, double_quant: bool = True):
    """A new model, frozen, its linear layers as NF4Linear; embeddings, norms and head stay floats.

    Raises: ValueError if the model has no float linear layers in its blocks.
    """
    new = copy.deepcopy(model).eval().requires_grad_(False)
    layers = linear_layers(new)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no float linear layers in its blocks")
    for name, layer in layers.items():
        packed = NF4Linear.from_linear(layer, block_size=block_size, double_quant=double_quant)
        new.set_submodule(name, packed)
    return new


def add_lora(model, *, rank: int = 8, alpha: float | None = None, seed: int = 0) -> peft.PeftModel:
    """A new model: the given one frozen, with a LoRA adapter beside each linear layer of its blocks.

        y = layer(x) + (alpha / rank) * (x Aᵀ) Bᵀ      A (rank, in) random, B (out, rank) zero      Hu et al. 2021

    alpha is 2 * rank unless given. The adapters are peft's; its Linear holds float layers as they are, and NF4Linear
    through peft's interface for layers of one's own. At the start the outputs are those of the given model. The norm
    gains, embeddings and head are not trained.

    Raises: ValueError if rank is below 1, alpha is not above 0, or the model has no linear layer.
    """
    rank, alpha = check_int(rank, "rank", 1), 2 * rank if alpha is None else alpha
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    new = copy.deepcopy(model)
    names = {n for n, m in new.named_modules() if isinstance(m, NF4Linear)} | set(linear_layers(new))
    if not names or isinstance(model, peft.PeftModel):
        raise ValueError(f"{type(model).__name__} has no linear layers to put adapters beside, or has adapters already")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted({n.rpartition(".")[2] for n in names}))
    config._register_custom_module({NF4Linear: NF4Lora})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type .*NF4Linear")  # it is, see NF4Lora
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.random.default_generator.manual_seed(seed)
        return peft.get_peft_model(new, config).eval()


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


# --- memory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """What training a model with AdamW keeps in memory all the time, in bytes; activations come on top."""

    weights: int  # parameters and buffers
    gradients: int  # one for each trainable parameter
    optimizer: int  # AdamW: two averages for each trainable parameter, and a step count for each tensor

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def training_memory(model) -> Memory:
    """Counted from shapes and dtypes; the model may be on the meta device.

    >>> training_memory(nn.Linear(10, 3))
    Memory(weights=132, gradients=132, optimizer=272)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return Memory(weights, gradients, 2 * gradients + 4 * len(trained))


def saved_bytes(model, ids: Tensor) -> int:
    """Bytes that a forward pass over ids (batch, tokens) leaves waiting for the backward pass, weights not counted.

    Measured: autograd hands over each tensor that it saves; tensors that share memory count once.
    """
    checked_windows(model, ids.flatten(), ids.shape[-1], None)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def look(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            saved[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        model(ids, use_cache=False)
    return sum(saved.values())


# --- the runs that notebook 15 shows ----------------------------------------------------------------------------

RANKS = (1, 2, 4, 8, 16)
RECIPE = {"steps": 40, "batch": 8, "window": 128, "learning_rate": 5e-3}
FULL_RATE = 5e-4  # all weights at the adapters' rate would be far too fast


def style_tokens(tokenizer) -> tuple[Tensor, Tensor]:
    """(to train on, held out): the ship's log in data/text/style.txt; every fourth day is held out."""
    days = load_text("style")
    return (
        token_stream(tokenizer, [day for i, day in enumerate(days) if i % 4 != 3]),
        token_stream(tokenizer, days[3::4]),
    )


def measure(model, reference, held: Tensor, stories: Tensor) -> dict:
    """What a model has learnt and what it has forgotten: perplexity of the style, distance to the float model."""
    style, old = perplexity(model, held, window=RECIPE["window"]), divergence(reference, model, stories)
    return {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "memory": training_memory(model).total,
        "style": {"perplexity": style.value, "stderr": style.stderr, "nll": style.nll},
        "stories": {"kl": old.kl, "stderr": old.stderr, "perplexity": perplexity(model, stories).value},
    }


def main(argv=None) -> dict:
    """Train adapters of every rank and what they are compared with; write adapters and log.json; returns the log."""
    parser = argparse.ArgumentParser(prog="python -m quantlab.train.lora", description=__doc__)
    parser.add_argument("--out", required=True, help="folder for rank_*.safetensors and log.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--steps", type=int, default=RECIPE["steps"])
    args, threads = parser.parse_args(argv), torch.get_num_threads()
    out, recipe = Path(args.out), RECIPE | {"steps": args.steps}
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_lm()
    train, held = style_tokens(tokenizer)
    stories, base = token_stream(tokenizer, load_text("eval"))[:4096], nf4_model(model)
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    jobs = {f"rank {rank}": (add_lora(base, rank=rank), train, {}) for rank in args.ranks}
    jobs["float base, rank 8"] = add_lora(model), train, {}
    jobs["all weights"] = copy.deepcopy(model), train, {"learning_rate": FULL_RATE}
    jobs["shuffled tokens, rank 8"] = add_lora(base), shuffled, {}
    log = {
        "command": shlex.join(["python", "-m", "quantlab.train.lora", *(sys.argv[1:] if argv is None else argv)]),
        "on": f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}",
        "recipe": recipe | {"full_rate": FULL_RATE},
    }
    log["runs"] = {"float": measure(model, model, held, stories), "rank 0": measure(base, model, held, stories)}
    for name, (learner, tokens, options) in jobs.items():
        history = finetune(learner, tokens, **recipe | options, held_out=held)
        log["runs"][name] = measure(learner, model, held, stories) | {"history": asdict(history)}
        if name.startswith("rank"):
            save_adapters(out / f"{name.replace(' ', '_')}.safetensors", learner)
    (out / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return log


if __name__ == "__main__":
    main()
