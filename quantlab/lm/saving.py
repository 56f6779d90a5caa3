"""A quantized model as a folder that loads by itself: configuration, tokenizer, and one file of packed weights."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from quantlab.arguments import check_flag, check_kind, check_model, check_path
from quantlab.files import new_folder, settle
from quantlab.linear import PackedLinear, packed_layers
from quantlab.lm.layers import embedding_layers, linear_layers
from quantlab.modules import weight_of
from quantlab.quantized import smallest_exact
from quantlab.rotations import OnlineHadamard
from quantlab.storage import load_tensors, save_tensors

WEIGHTS = "quantized.safetensors"
TOKENIZER_FILES = {  # what transformers writes for a tokenizer, of one kind or another
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
}


def save_quantized(folder, model, qtensors: Mapping | None = None, tokenizer=None) -> int:
    """Save a quantized model as a folder; returns the bytes of its weights file, quantized.safetensors.

    qtensors is what quantize_weights gave, or the report of a method of quantize_lm for weights only: stored packed.
    Beside linear layers it may name the embedding, and a head that is not the embedding (embedding_layers).
    The layers of a packed model (load_quantized(folder, packed=True)) bring their own.
    Every other tensor is stored in the first of bfloat16, float16 and its own dtype that holds its values exactly, so
    the model that load_quantized gives back is equal bit by bit. The folder is written beside and renamed: it is whole,
    or not there.

    Raises: ValueError if a layer of qtensors does not exist or holds other weights, or if the folder holds other files.
    """
    folder, stored = check_path(folder, "folder"), _stored(check_model(model), qtensors)
    with own_folder(folder, "quantized model", lambda path: (path / WEIGHTS).is_file()) as new:
        _config_of(model).save_pretrained(new)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(new)
        if tokenizer is not None:
            check_kind(tokenizer, "tokenizer", PreTrainedTokenizerBase, "load_lm gives")
            tokenizer.save_pretrained(new)
        size = save_tensors(new / WEIGHTS, stored)
    return size


@contextmanager
def own_folder(folder: Path, what: str, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `folder`, if all that lies there is of our own writing.

    what it should hold, in a word; ours(folder): whether it does. Raises: ValueError that names the folder if it does
    not, if files lie there that are not written anew (a tokenizer's aside), or this program runs in it. Nothing is
    changed then.
    """
    folder = folder.resolve()
    if folder == Path.cwd():
        raise ValueError(
            f"{folder} is where this program runs, and a folder is replaced as a whole; name one inside it"
        )
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (there and not ours(folder)):
        raise ValueError(f"{folder} exists and holds no {what}; nothing was written")
    with new_folder(folder) as new:
        yield new
        foreign = sorted(there - {path.name for path in new.iterdir()} - TOKENIZER_FILES)
        if foreign:
            raise ValueError(f"{folder} also holds {', '.join(foreign)}; nothing was written")


def load_quantized(folder, *, packed: bool = False):
    """(model, tokenizer) of a folder that save_quantized wrote; the tokenizer is None if none was saved.

    packed: the weights stay packed, in layers that decode them in each call (quantlab.linear.PackedLinear): the model
    needs the memory that its file has, and packed_layers gives the codes. Else they become floats, on their grids; an
    embedding, in which rows are looked up, always does.

    Raises: FileNotFoundError if there is no such folder, ValueError if its weights are damaged or of another model.
    """
    folder, packed = check_path(folder, "folder"), check_flag(packed, "packed")
    settle(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}; load_lm loads models that are not quantized")
    stored = load_tensors(folder / WEIGHTS)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with no_init_weights():  # memory that nothing has been written to: no random weights that are overwritten at once
        dtype = config.dtype or torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    try:
        _put_stored(model, stored, packed)
    except RuntimeError as error:  # of copy_: another width
        raise ValueError(f"{folder} holds weights of another model than its configuration says: {error}") from error
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False) if has_tokenizer else None


def _config_of(model):
    """The configuration, with the dtype that the model really has."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    return config


def _check_layers(model, qtensors: dict) -> None:
    layers = linear_layers(model) | embedding_layers(model)
    for name, q in qtensors.items():
        if isinstance(q, nn.Module):
            raise ValueError(f"{name} is a layer that computes in integers; only weights as floats on a grid are saved")
        if name not in layers:
            raise ValueError(f"the model has no linear layer {name!r}, nor an embedding of that name")
        if not torch.equal(_weight(layers[name]).cpu(), q.dequantize().cpu()):
            raise ValueError(f"the weights of {name} are not those of its quantized tensor; is it another model's?")


def _weight(layer: nn.Module) -> Tensor:
    """weight_of, for embeddings too: (vocabulary, width)."""
    return layer.weight.detach() if isinstance(layer, nn.Embedding) else weight_of(layer)


def _stored(model, qtensors: Mapping | None) -> dict:
    """What goes into the file: the quantized weights by layer name, everything else by its own."""
    if qtensors is not None:
        check_kind(qtensors, "qtensors", Mapping, "the report of quantize_lm has")
    check_not_online(model)
    own, layers = _own_tensors(model), packed_layers(model)
    _check_layers(model, qtensors or {})
    quantized = dict(qtensors or {}) | {name: layer.q for name, layer in layers.items()}
    if qtensors is None and not layers:
        raise ValueError("there is no quantized layer to save; pass the qtensors of quantize_weights or of the report")
    weights = {f"{name}.weight" for name in quantized}
    return {**quantized, **{name: smallest_exact(t) for name, t in own.items() if name not in weights}}


def check_not_online(model) -> None:
    """ValueError if the model turns activations while it runs: a folder that loads by itself cannot say so."""
    if online := next((name for name, m in model.named_modules() if isinstance(m, OnlineHadamard)), None):
        raise ValueError(f"{online} turns activations, which no configuration says; rotate(online=False) can be saved")


def _own_tensors(model) -> dict[str, Tensor]:
    """Parameters, a shared one once, and the buffers that a checkpoint holds, but for the parts of packed layers."""
    kept, parts = model.state_dict(), tuple(f"{name}." for name in packed_layers(model))
    buffers = {n: b for n, b in model.named_buffers() if n in kept and not n.startswith(parts or ("\0",))}
    return {**dict(model.named_parameters()), **buffers}


def _put_stored(model: nn.Module, stored: dict, packed: bool) -> None:
    linear, own = linear_layers(model), _own_tensors(model)
    layers = linear | embedding_layers(model)
    missing = own.keys() - {f"{n}.weight" if n in layers else n for n in stored}
    unknown = stored.keys() - layers.keys() - own.keys()
    if missing or unknown:
        which = ", ".join([*sorted(missing), *sorted(unknown)][:3])
        raise ValueError(f"the weights are those of another model: {which} missing or unknown")
    with torch.no_grad():
        for name, value in stored.items():
            if name not in layers:
                own[name].copy_(value)
            elif value.shape != _weight(layers[name]).shape:
                shapes = tuple(value.shape), tuple(_weight(layers[name]).shape)
                raise ValueError(f"{name} is stored as {shapes[0]}, and the configuration says {shapes[1]}")
            elif name not in linear or not packed:
                _weight(layers[name]).copy_(value.dequantize())
        for name in linear if packed else ():
            bias = layers[name].bias
            model.set_submodule(name, PackedLinear(stored[name], bias).eval())
