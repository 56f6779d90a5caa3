"""A Llama as a GGUF file that llama.cpp, and what is built on it (Ollama, LM Studio), runs."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantlab.arguments import check_choice, check_flag, check_kind, check_model, check_path
from quantlab.export.gguf_blocks import TYPES, BlockType, dequantize_gguf, quantize_gguf
from quantlab.export.gguf_codes import codes_to_gguf
from quantlab.export.gguf_file import GGUFFile, GGUFTensor, read_gguf
from quantlab.export.gguf_mixes import MIXES, tensor_types
from quantlab.export.gguf_tokenizer import tokenizer_metadata
from quantlab.export.gguf_write import write_gguf
from quantlab.modules import check_codes_fit

__all__ = [
    "MIXES", "TYPES", "BlockType", "GGUFFile", "GGUFTensor", "codes_to_gguf", "dequantize_gguf", "gguf_name",
    "quantize_gguf", "read_gguf", "save_gguf", "tensor_types", "types_of",
]  # fmt: skip

_PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def save_gguf(
    model, tokenizer, path, *, mix: str = "Q8_0", importance: Mapping | None = None, qtensors: Mapping | None = None,
    verify: bool = False,
) -> int:  # fmt: skip
    """Write a Llama and its tokenizer as one GGUF file, whole or not at all; returns its size in bytes.

    mix names the types of its tensors (MIXES: "F16", "Q4_0", "Q4_K_M" ..). importance, the mean x² of each input of
    each linear layer by its name, weights the errors that the search for scales makes small. qtensors, what
    quantize_weights gave or the report of quantize_lm, brings codes for the layers it names (groups of 32, 8 or 4
    bits): they are stored as they are. verify: the gguf package reads the file back and must find the same values
    before it takes its place.

    Raises: ValueError if llama.cpp could not run the model (another architecture, rotary scaling, another kind of
    tokenizer), a name in importance or qtensors is no linear layer, or verify finds another value.
    """
    path, verify = check_path(path), check_flag(verify, "verify")
    metadata = {**_architecture(model, check_choice(mix, "mix", MIXES), path.stem)}
    metadata |= tokenizer_metadata(tokenizer, metadata["llama.vocab_size"])
    asked = [
        {} if of is None else dict(check_kind(of, "importance or qtensors", Mapping)) for of in (importance, qtensors)
    ]
    tensors = _tensors(model, mix, *asked)
    return write_gguf(path, metadata, tensors, check=partial(_compare, metadata, tensors) if verify else None)


def types_of(model, mix: str) -> dict[str, str]:
    """The type that each tensor of a model gets in a mix, by llama.cpp's names."""
    shapes = {gguf_name(name): tuple(p.shape) for name, p in check_model(model).named_parameters()}
    return tensor_types(shapes, mix, model.config.num_hidden_layers)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter of a Llama. Raises ValueError if it has none.

    >>> gguf_name("model.layers.2.self_attn.q_proj.weight")
    'blk.2.attn_q.weight'
    """
    stem, _, ending = check_kind(name, "name", str).rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{ending}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if not found or found[2] not in _PARTS:
        raise ValueError(f"a Llama in llama.cpp has no place for {name}")
    return f"blk.{found[1]}.{_PARTS[found[2]]}.{ending}"


def _architecture(model, mix: str, name: str) -> dict:
    c = check_model(model).config
    if c.model_type != "llama":
        raise ValueError(f"need a Llama, got a {c.model_type!r}; llama.cpp's own convert_hf_to_gguf.py knows others")
    rope = c.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rotary scaling of type {rope['rope_type']!r} is not written here, only the default")
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    about = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings, "embedding_length":
        c.hidden_size, "feed_forward_length": c.intermediate_size, "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads, "attention.key_length": width, "attention.value_length":
        width, "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps), "rope.dimension_count": width,
        "rope.freq_base": float(rope["rope_theta"]), "vocab_size": c.vocab_size,
    }  # fmt: skip
    general = {"architecture": "llama", "name": name, "file_type": MIXES[mix][1], "quantization_version": 2}
    return {f"general.{k}": v for k, v in general.items()} | {f"llama.{k}": v for k, v in about.items()}


def _tensors(model, mix: str, importance: dict, qtensors: dict) -> dict[str, GGUFTensor]:
    layers = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.ndim == 2}
    if strangers := sorted({*importance, *qtensors} - layers):
        raise ValueError(f"the model has no linear layer {strangers[0]!r}; linear_layers(model) lists them")
    types, tensors = types_of(model, mix), {}
    for name, parameter in model.named_parameters():
        layer, theirs = name.rpartition(".")[0], gguf_name(name)
        kind, weight = types[theirs], parameter.detach().cpu()
        if name == f"{layer}.weight" and layer in qtensors:
            kind, packed = codes_to_gguf(qtensors[layer])
            check_codes_fit(layer, qtensors[layer], weight)
        else:
            packed = quantize_gguf(weight, kind, importance=importance.get(layer) if weight.ndim == 2 else None)
        rows = packed.view(len(weight), -1)  # of a vector, each value is a row
        tensors[theirs] = GGUFTensor(
            kind, tuple(weight.shape), _in_pairs(rows, layer, model.config).reshape(packed.shape)
        )
    return tensors


def _in_pairs(rows: Tensor, layer: str, config) -> Tensor:
    """The rows of q and k in llama.cpp's order: rotary pairs side by side, which transformers has half a head apart."""
    if not layer.endswith(("q_proj", "k_proj")):
        return rows
    heads = config.num_attention_heads if layer.endswith("q_proj") else config.num_key_value_heads
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _compare(metadata: dict, tensors: dict[str, GGUFTensor], path: Path) -> None:
    """Read a file by the gguf package; ValueError if a key or a tensor is not what was meant."""
    import gguf
    from gguf.quants import dequantize

    read = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in read.fields.items() if not key.startswith("GGUF.")}
    found = {t.name: t for t in read.tensors}
    odd = sorted(metadata.keys() ^ keys.keys()) + sorted(tensors.keys() ^ found.keys())
    odd += [
        k
        for k, v in metadata.items()
        if k in keys and (torch.tensor(v, dtype=torch.float32).ne(keys[k]) if isinstance(v, float) else v != keys[k])
    ]
    for name in tensors.keys() & found.keys():
        values = torch.from_numpy(dequantize(found[name].data, found[name].tensor_type).copy())
        if not torch.equal(values, tensors[name].dequantize()):
            odd.append(name)
    if odd:
        raise ValueError(f"the gguf package reads another {odd[0]} than was written; nothing was saved")
