"""A model with quantlab's codes as a folder that others load: compressed-tensors' kinds, GPTQ's, AWQ's.

transformers' own AutoModelForCausalLM.from_pretrained loads compressed-tensors' where that package is installed (see
load_checkpoint for the one exception); vLLM too. GPTQ's and AWQ's ask for gptqmodel, which wants a newer torch.
"""

import copy
import io
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedTokenizerBase

from quantlab.arguments import check_choice, check_flag, check_kind, check_model, check_path
from quantlab.export.checkpoint_layouts import configuration, layer_codes, layer_parts
from quantlab.export.checkpoint_words import LAYOUTS
from quantlab.export.engines import engine
from quantlab.export.parts import check_close, check_same_codes, meant_logits, some_ids
from quantlab.files import read_json
from quantlab.granularity import QTensor
from quantlab.lm.layers import linear_layers
from quantlab.lm.saving import check_not_online, own_folder
from quantlab.modules import check_codes_fit
from quantlab.quantized import smallest_exact
from quantlab.storage import read_metadata, read_parts

__all__ = ["LAYOUTS", "checkpoint_codes", "layer_codes", "layer_parts", "load_checkpoint", "save_checkpoint"]

WEIGHTS = "model.safetensors"
LOGITS = {"W4A16": 1e-4, "W8A16": 1e-4, "W8A8": 0.1}  # how far apart, of the largest; W8A8 rounds activations too


def save_checkpoint(model, folder, qtensors: Mapping, *, layout: str, tokenizer=None, verify: bool = False) -> int:
    """Write a model as a folder in a layout that others load; returns the bytes of its weights, model.safetensors.

    qtensors: what quantize_weights gave, or the report of quantize_lm, a QTensor for each of linear_layers(model), all
    of one kind (see layer_parts for the layouts). All other tensors are stored exactly. The folder is whole or not
    there. verify: before it takes its place, its codes are read back, and transformers must load it with logits of the
    model with these codes' weights, within a 10,000th of the largest (a tenth for "W8A8", which rounds activations);
    of GPTQ's and AWQ's the codes alone are compared.

    Raises: ValueError if a layer is missing, is a stranger, or does not fit the layout, the folder holds other files,
    or verify finds a difference; ModuleNotFoundError if verify needs compressed-tensors and it is not here.
    """
    folder, layout = check_path(folder, "folder"), check_choice(layout, "layout", LAYOUTS)
    qtensors, verify = _fitting(check_model(model), qtensors, layout), check_flag(verify, "verify")
    tensors, config = _tensors(model, qtensors, layout), copy.deepcopy(model.config)
    config.dtype, config.quantization_config = model.dtype, configuration(model, qtensors, layout)
    symmetric = next(iter(qtensors.values())).symmetric
    with own_folder(folder, "checkpoint of ours", _is_ours) as new:
        config.save_pretrained(new)
        if tokenizer is not None:
            check_kind(tokenizer, "tokenizer", PreTrainedTokenizerBase, "load_lm gives").save_pretrained(new)
        save_file(tensors, new / WEIGHTS, {"format": "pt", "layout": layout, "symmetric": str(symmetric)})
        if verify:
            _compare(new, model, qtensors, layout)
    return (folder / WEIGHTS).stat().st_size


def load_checkpoint(folder):
    """The model of a folder of save_checkpoint, loaded by transformers.

    A plain from_pretrained(folder) does it too, but for "W4A16" with zero points: compressed-tensors 0.20 expects them
    in another shape unless asked to dequantize at once, as is done here.

    Raises: FileNotFoundError if there is no such folder, ModuleNotFoundError if its engine is not here.
    """
    folder = check_path(folder, "folder")
    about = read_json(folder / "config.json", {"quantization_config": dict})["quantization_config"]
    ours = about["quant_method"] == "compressed-tensors"
    engine("compressed_tensors" if ours else "gptqmodel")
    zeros = ours and not about["config_groups"]["group_0"]["weights"]["symmetric"]
    asked = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if zeros else {}
    bars = io.StringIO()  # the engine's; they go to stderr
    with warnings.catch_warnings(), redirect_stderr(bars):
        warnings.simplefilter("ignore")  # of the engines about themselves
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **asked).eval()
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64))  # compressed-tensors unpacks when first called
    return model


def checkpoint_codes(folder) -> dict[str, QTensor]:
    """The codes of a folder of save_checkpoint by layer, read without any engine: signed, scales as stored.

    Raises: FileNotFoundError if there is no such folder, ValueError if save_checkpoint did not write it.
    """
    path, layers = check_path(folder, "folder") / WEIGHTS, {}
    about, tensors = read_parts(path)
    for name, tensor in tensors.items():
        layer, _, end = name.rpartition(".")
        layers.setdefault(layer, {})[end] = tensor
    if about.get("layout") not in LAYOUTS:
        raise ValueError(f"{path} does not say its layout: save_checkpoint did not write it")
    how = {"layout": about["layout"], "symmetric": about["symmetric"] == "True"}
    return {name: layer_codes(p, **how) for name, p in layers.items() if "qweight" in p or "weight_scale" in p}


def _fitting(model, qtensors, layout: str) -> dict[str, QTensor]:
    """qtensors in the model's order; ValueError unless there is one for each linear layer, and all are of one kind."""
    check_not_online(model)
    qtensors, layers = check_kind(qtensors, "qtensors", Mapping, "the report of quantize_lm has"), linear_layers(model)
    if odd := sorted(layers.keys() ^ qtensors.keys()):
        raise ValueError(f"a checkpoint needs codes of all linear layers and no others; {odd[0]!r} is on one side only")
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is a {type(layer).__name__}; checkpoints here are of models of nn.Linear")
        check_codes_fit(name, check_kind(qtensors[name], name, QTensor), layer.weight)
    kinds = {(q.bits, q.granularity, q.symmetric, q.group_index is None) for q in qtensors.values()}
    if len(kinds) > 1:
        raise ValueError(f"one configuration speaks for all layers of a checkpoint; here are {len(kinds)} kinds")
    return {name: qtensors[name] for name in layers}


def _tensors(model, qtensors: dict[str, QTensor], layout: str) -> dict:
    """What goes into the file: parts of layers, and all else of a checkpoint, buffers too; a tied weight once."""
    own = {n: smallest_exact(t) for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    for name, q in qtensors.items():
        del own[f"{name}.weight"]
        own |= {f"{name}.{end}": part for end, part in layer_parts(q, layout).items()}
    return {name: t.cpu().contiguous().clone() for name, t in own.items()}  # a file shares no memory


def _is_ours(folder: Path) -> bool:
    path = folder / WEIGHTS
    return path.is_file() and read_metadata(path).get("layout") in LAYOUTS


def _compare(folder: Path, model, qtensors: dict[str, QTensor], layout: str) -> None:
    stored = checkpoint_codes(folder)
    for name, q in qtensors.items():
        counted = stored[name].codes.short() + 2 ** (q.bits - 1), q.codes.short() - q.qparams.qmin  # from 0
        check_same_codes(*counted, of=name)
    if layout in LOGITS:
        expected = meant_logits(model, qtensors, some_ids(model))
        with torch.no_grad():
            got = load_checkpoint(folder)(some_ids(model), use_cache=False).logits.float()
        check_close(got, expected, LOGITS[layout] * expected.abs().max().item(), "the loaded model")
