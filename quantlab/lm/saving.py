"""A quantized model as a folder that loads by itself: configuration, tokenizer, and one file of packed weights."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quantlab.lm.layers import linear_layers
from quantlab.modules import put_weight, weight_of
from quantlab.storage import load_tensors, save_tensors

WEIGHTS = "quantized.safetensors"
TOKENIZER_FILES = {  # what transformers writes for a tokenizer, of one kind or another
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
}


def save_quantized(folder, model, qtensors: dict, tokenizer=None) -> int:
    """Save a quantized model as a folder; returns the bytes of its weights file, quantized.safetensors.

    qtensors is what quantize_weights gave, or the report of a method of quantize_lm for weights only: stored packed.
    Every other tensor is stored in the first of bfloat16, float16 and its own dtype that holds its values exactly, so
    the model that load_quantized gives back is equal bit by bit. The folder is written beside and renamed: it is whole,
    or not there.

    Raises: ValueError if a layer of qtensors does not exist or holds other weights, or if the folder holds other files.
    """
    folder = Path(folder)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if (there and WEIGHTS not in there) or folder.is_file():
        raise ValueError(f"{folder} exists and holds no quantized model; nothing was written")
    _check_layers(model, qtensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name) as beside:
        new = Path(beside) / "new"
        model.config.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        size = save_tensors(new / WEIGHTS, _stored(model, qtensors))
        foreign = sorted(there - {path.name for path in new.iterdir()} - TOKENIZER_FILES)
        if foreign:
            raise ValueError(f"{folder} also holds {', '.join(foreign)}; nothing was written")
        _put_in_place(new, folder, Path(beside) / "old")
    return size


def _put_in_place(new: Path, folder: Path, old: Path) -> None:
    """Rename new to folder; what was there before moves out of the way, and back if that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


def load_quantized(folder):
    """(model, tokenizer) of a folder that save_quantized wrote; the tokenizer is None if none was saved.

    Raises: FileNotFoundError if there is no such folder, ValueError if its weights are damaged or of another model.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}; load_lm loads models that are not quantized")
    stored = load_tensors(folder / WEIGHTS)
    with torch.random.fork_rng():  # a new model draws random weights: the caller's seed stays as it is
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    _put_stored(model, stored)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if has_tokenizer else None


def _check_layers(model, qtensors: dict) -> None:
    layers = linear_layers(model)
    for name, q in qtensors.items():
        if isinstance(q, nn.Module):
            raise ValueError(f"{name} is a layer that computes in integers; only weights as floats on a grid are saved")
        if name not in layers:
            raise ValueError(f"the model has no linear layer {name!r}")
        if not torch.equal(weight_of(layers[name]).cpu(), q.dequantize().cpu()):
            raise ValueError(f"the weights of {name} are not those of its quantized tensor; is it another model's?")


def _stored(model, qtensors: dict) -> dict:
    """What goes into the file: the quantized weights by layer name, everything else by its own."""
    packed = {f"{name}.weight" for name in qtensors}
    return {**qtensors, **{n: _smallest(t) for n, t in _own_tensors(model).items() if n not in packed}}


def _own_tensors(model) -> dict[str, Tensor]:
    """Parameters, a shared one once, and the buffers that a checkpoint holds."""
    buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
    return {**dict(model.named_parameters()), **buffers}


def _smallest(x: Tensor) -> Tensor:
    """x in 16 bits where that loses nothing."""
    if not x.is_floating_point():
        return x
    fits = (d for d in (torch.bfloat16, torch.float16) if torch.equal(x.to(d).to(x.dtype), x))
    return x.to(next(fits, x.dtype))


def _put_stored(model: nn.Module, stored: dict) -> None:
    layers, own = linear_layers(model), _own_tensors(model)
    missing = own.keys() - {f"{n}.weight" if n in layers else n for n in stored}
    unknown = stored.keys() - layers.keys() - own.keys()
    if missing or unknown:
        which = ", ".join([*sorted(missing), *sorted(unknown)][:3])
        raise ValueError(f"the weights are those of another model: {which} missing or unknown")
    with torch.no_grad():
        for name, value in stored.items():
            if name in layers:
                put_weight(layers[name], value.dequantize())
            else:
                own[name].copy_(value)
