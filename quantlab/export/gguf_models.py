"""What goes beside a GGUF file: the importance of each input, measured, and a model with the file's own values."""

import copy

import torch
from torch import Tensor

from quantlab.arguments import check_model
from quantlab.export.gguf import gguf_name
from quantlab.export.gguf_file import read_gguf
from quantlab.lm.layers import float_layers
from quantlab.lm.measuring import checked_windows
from quantlab.modules import evaluating, hooked, weight_of


def measure_importance(model, tokens: Tensor, *, window: int = 512) -> dict[str, Tensor]:
    """llama.cpp's importance matrix: the mean x² of each input of each linear layer, {name: (in_features,)}, float32.

    It is half the diagonal of GPTQ's Hessian. Shapes: tokens (n,), read in windows.
    """
    window, _ = checked_windows(model, tokens, window, None)
    layers = float_layers(model)
    sums = {name: torch.zeros(weight_of(layer).shape[1], dtype=torch.float64) for name, layer in layers.items()}

    def note(name):
        def hook(_layer, inputs) -> None:
            sums[name] += inputs[0].detach().float().square().flatten(0, -2).sum(0).cpu()

        return hook

    with torch.no_grad(), evaluating(model), hooked({layer: note(name) for name, layer in layers.items()}):
        for ids in tokens.split(window):
            model(ids[None].to(model.device), use_cache=False)
    return {name: (total / len(tokens)).float() for name, total in sums.items()}


def with_values_of(model, path):
    """A copy of a Llama that has the values of a GGUF file of it: what the file's bytes stand for, run by torch.

    Raises: ValueError if the file's tensors are not those of the model.
    """
    new, file = copy.deepcopy(check_model(model)), read_gguf(path)
    names = {name: gguf_name(name) for name, _ in new.named_parameters()}
    if set(names.values()) != file.tensors.keys():
        raise ValueError(
            f"{path} holds other tensors than this model: {sorted(set(names.values()) ^ file.tensors.keys())[0]}"
        )
    for name, parameter in new.named_parameters():
        values = file.tensors[names[name]].dequantize()
        if values.shape != parameter.shape:
            raise ValueError(
                f"{names[name]} is {tuple(values.shape)} in {path}, {tuple(parameter.shape)} in this model"
            )
        parameter.data.copy_(_halves_apart(values, name, new.config))
    return new


def _halves_apart(values: Tensor, name: str, config) -> Tensor:
    """The rows of q and k in transformers' order: the two of a rotary pair half a head apart."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return values
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
