"""Inside a model: its blocks, its linear layers, and what they read."""

import re
from collections.abc import Collection, Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn

from quantlab.arguments import check_choice, check_kind, check_list, check_model, text_config
from quantlab.lm.measuring import checked_windows
from quantlab.modules import evaluating, hooked, linears_in

# What a linear layer of a block is for, by what its name holds. A fused layer has several roles.
ROLES = {
    "query": r"q_proj|q_lin|query|c_attn|qkv|Wqkv|attn_qkv",
    "key": r"k_proj|k_lin|key|c_attn|qkv|Wqkv",
    "value": r"v_proj|v_lin|value|c_attn|qkv|Wqkv",
    "attention output": r"o_proj|out_proj|out_lin|att\w*\.(c_proj|dense|wo)$|att\w*\.output",
    "gate": r"gate_proj|gate_up_proj",
    "up": r"up_proj|fc1|fc_in|c_fc|h_to_4h|lin1|gate_up_proj",
    "down": r"down_proj|fc2|fc_out|mlp\.c_proj|4h_to_h|lin2",
}


def blocks_of(model) -> tuple[str, nn.ModuleList]:
    """The name and list of the decoder blocks: the one list of modules as long as the config says.

    Raises: ValueError if there is none, or more than one (XLM keeps attention and MLP in two), or no attention (Mamba,
    RWKV, xLSTM): this library knows transformers.
    """
    config, text = text_config(check_model(model, values=False)), model
    if hasattr(config, "model_type") and not _has_attention(model, config):
        raise ValueError(f"{type(model).__name__} is no transformer: it has no attention that is known here")
    if config is not model.config and hasattr(model, "get_decoder"):
        text = model.get_decoder()  # a model that also reads pictures has a list of blocks for them, too
    inside, lists = set(text.modules()), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and module in inside:
            lists |= {} if any(name.startswith(f"{outer}.") for outer in lists) else {name: module}
    found = {name: some for name, some in lists.items() if linears_in(some)} or dict(list(lists.items())[:1])
    if len(found) != 1:
        names = f": {', '.join(found)}" if found else ""
        raise ValueError(
            f"need one list of {config.num_hidden_layers} blocks in {type(model).__name__}, found {len(found)}{names}; "
            "is it a decoder-only language model?"
        )
    return next(iter(found.items()))


def _has_attention(model, config) -> bool:
    heads = any(hasattr(config, name) for name in ("num_attention_heads", "n_head", "num_heads"))
    return heads and any(re.search("attention|attn|mla", type(m).__name__, re.I) for m in model.modules())


def linear_layers(model) -> dict[str, nn.Module]:
    """The linear layers inside the blocks by full name: nn.Linear, and GPT-2's Conv1D.

    Embeddings and head are not, nor a mixture's routers, which are small and decide much.
    """
    prefix, blocks = blocks_of(model)
    return {f"{prefix}.{name}": layer for name, layer in linears_in(blocks).items()}


def embedding_layers(model) -> dict[str, nn.Module]:
    """What has a row for each token of the vocabulary, by full name: the embedding, and the head unless it is that."""
    names, found = {module: name for name, module in check_model(model).named_modules()}, {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None and all(module.weight is not other.weight for other in found.values()):
            found[names[module]] = module
    return found


def layers_of_role(model, role: str) -> dict[str, nn.Module]:
    """The linear layers of one role, a layer of each block where it has one, by full name.

    role: "query", "key", "value", "attention output", "gate", "up" or "down". In a model that fuses them (GPT-2's
    c_attn) query, key and value are one layer; without a gate, "gate" is "up". Names that are not known are told by
    their place: the first layer of a block is the query, the last one down, before it up, and before that the output.
    """
    pattern, prefix = ROLES[check_choice(role, "role", ROLES)], blocks_of(model)[0]
    by_block: dict[str, list[str]] = {}
    for name in float_layers(model):
        by_block.setdefault(name.removeprefix(f"{prefix}.").partition(".")[0], []).append(name)
    found = [[name for name in names if re.search(pattern, name)][:1] for names in by_block.values()]
    if role == "gate" and not any(found):
        return layers_of_role(model, "up")
    if not any(found):
        place = {"down": -1, "up": -2, "attention output": -3}.get(role, 0)
        found = [[names[max(place, -len(names))]] for names in by_block.values()]
    layers = linear_layers(model)
    return {name: layers[name] for names in found for name in names}


def float_layers(model) -> dict[str, nn.Module]:
    """linear_layers of a model; ValueError if it has none, as an int8 model has not, or adapters beside them."""
    layers = linear_layers(model)
    of_peft = [n for n, m in model.named_modules() if ".lora_" in n or type(m).__module__.startswith("peft.tuners.")]
    if adapter := next((name for name in of_peft if ".lora_" in name), of_peft[-1] if of_peft else None):
        raise ValueError(f"the model has adapters ({adapter}); merge them first: model.merge_and_unload()")
    if not layers:
        raise ValueError(f"{type(model).__name__} has no float linear layers in its blocks; is it quantized already?")
    return layers


def capture_inputs(model, tokens: Tensor, layers, *, window: int = 512) -> dict[str, Tensor]:
    """What the named layers read while the model reads the tokens: {name: (tokens, in_features)}, float32.

    The model reads as far as the last block with one of these layers, and no further.

    Raises: ValueError if the model has no layer of that name, or one of them reads nothing.
    """
    window, _ = checked_windows(model, tokens, window, None)
    modules, caught = dict(model.named_modules()), {}
    for name in check_list(layers, "layers"):
        caught[check_kind(name, "the name of a layer", str)] = []
        if name not in modules:
            raise ValueError(f"the model has no layer {name!r}; linear_layers(model) lists them")

    def keep(name):
        return lambda _module, inputs: caught[name].append(inputs[0].detach().float().flatten(0, -2).cpu())

    hooks = {modules[name]: keep(name) for name in caught}
    if (block := _block_after(model, list(caught))) is not None:
        hooks[block] = _stop
    _read(model, tokens, window, hooks)
    check_read(caught, [name for name, parts in caught.items() if parts])
    return {name: torch.cat(parts) for name, parts in caught.items()}


def check_read(layers: Iterable[str], read: Collection[str]) -> None:
    """ValueError unless each of these layers is among those that have read something."""
    if silent := [name for name in layers if name not in read]:
        raise ValueError(
            f"{len(silent)} linear layers read nothing on these tokens, {silent[0]} is the first: an expert that no "
            "token reached, or a layer whose weight the model uses by itself"
        )


class _Enough(Exception):
    """All that was asked for has been read."""


def _stop(_module, _inputs):
    raise _Enough


def _block_after(model, names: list[str]) -> nn.Module | None:
    """The block after the last one that holds a module of these names; None if one lies outside the blocks, or last."""
    prefix, blocks = blocks_of(model)
    numbers = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in names]
    after = max(int(number[1]) for number in numbers) + 1 if names and all(numbers) else len(blocks)
    return blocks[after] if after < len(blocks) else None


def activation_scales(model, tokens: Tensor, *, window: int = 512) -> dict[str, Tensor]:
    """The largest |x| that each input channel of each linear layer reads: {layer name: (in_features,)}, float32.

    Bounded memory: one maximum a channel is kept, however many tokens there are. SmoothQuant and AWQ start from it.
    Raises: ValueError if a layer reads nothing: an expert that no token reached, say.
    """
    window, _ = checked_windows(model, tokens, window, None)
    layers, largest = float_layers(model), {}

    def note(name):
        def hook(_module, inputs):
            peak = inputs[0].detach().float().abs().flatten(0, -2).amax(0).cpu()
            largest[name] = torch.maximum(largest[name], peak) if name in largest else peak

        return hook

    _read(model, tokens, window, {layer: note(name) for name, layer in layers.items()})
    check_read(layers, largest)
    return {name: largest[name] for name in layers}


def _read(model, tokens: Tensor, window: int, hooks: dict) -> None:
    """Let the model read the tokens, window by window, with these hooks before its layers."""
    with torch.no_grad(), evaluating(model), hooked(hooks):
        for ids in tokens.split(window):
            with suppress(_Enough):
                model(ids[None].to(model.device), use_cache=False)
