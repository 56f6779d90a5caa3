"""A whole language model as an ONNX file, ids -> logits, with quantlab's codes where a float weight stood."""

import ast
import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from quantlab.arguments import check_choice, check_flag, check_kind, check_model, check_path, longest_context
from quantlab.export.engines import engine
from quantlab.export.onnx_graphs import ENGINE, nbits_constants, nbits_group, write_onnx
from quantlab.export.onnx_run import onnx_session
from quantlab.export.parts import check_close, meant_logits, some_ids
from quantlab.granularity import QTensor
from quantlab.lm.layers import embedding_layers, linear_layers
from quantlab.modules import check_codes_fit, device_of, evaluating, is_linear, weight_of

LEVELS = {"float": 1, "int8": 4}  # MatMulNBits' accuracy_level: what the activations are computed in
TOLERANCE = 1e-3  # of the largest logit, for float activations


def save_onnx(
    model, path, *, qtensors: Mapping | None = None, activations: str = "float", verify: bool = False
) -> int:  # fmt: skip
    """Write a language model, ids (batch, tokens) -> logits, both sizes free; returns the file's size in bytes.

    torch.onnx.export writes the float graph, without a cache. Of each layer that qtensors names (quantize_weights gave
    them, or the report of quantize_lm, with groups of a power of two from 16 on, 4 or 8 bits) the float weight is taken
    out and MatMulNBits with those codes put in. activations: "float", or "int8", in which MatMulNBits rounds them in
    each block. verify: ONNX Runtime must give the logits of the model with the codes' weights, within a thousandth of
    the largest (for "int8", which rounds, within half of it), before the file takes its place.

    Raises: ValueError if a name in qtensors is no linear layer, codes do not fit, there are none for "int8", the
    exporter cannot write the model (a layer that computes in integers), or writes a layer as something else than MatMul
    (one with a bias, and inputs of two dimensions), the file would be larger than 2 GiB, or verify finds a difference;
    ModuleNotFoundError.
    """
    level = LEVELS[check_choice(activations, "activations", LEVELS)]
    qtensors = {} if qtensors is None else dict(check_kind(qtensors, "qtensors", Mapping))
    _check_fits(check_model(model), qtensors)
    path, verify = check_path(path), check_flag(verify, "verify")
    if activations == "int8" and not qtensors:
        raise ValueError('activations="int8" is of MatMulNBits, which stands where a layer has codes: pass qtensors')
    graph = _exported(model)
    _put_codes(graph, qtensors, level)
    return write_onnx(path, graph, partial(_check, model, qtensors, level) if verify else None)


def _check_fits(model, qtensors: dict) -> None:
    layers = linear_layers(model) | {n: m for n, m in embedding_layers(model).items() if is_linear(m)}  # a head
    for name, q in qtensors.items():
        if name not in layers:
            raise ValueError(f"the model has no linear layer {name!r}; linear_layers(model) lists them")
        nbits_group(q)
        check_codes_fit(name, q, weight_of(layers[name]))


class _Logits(nn.Module):
    """ids -> logits and nothing else: what exporters like best."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def _exported(model):
    """The float graph, without what the exporter notes of this machine: its stack traces name folders."""
    engine("onnx"), engine("onnxscript")
    most = min(longest_context(model), 2**31)
    sizes = {"ids": {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("tokens", max=most)}}
    ids = torch.zeros(2, 8, dtype=torch.int64, device=device_of(model))
    names = {"input_names": ["ids"], "output_names": ["logits"]}
    try:
        with evaluating(model), torch.no_grad(), _quiet():
            how = {"dynamo": True, "dynamic_shapes": sizes, "verbose": False}
            return torch.onnx.export(_Logits(model).eval(), (ids,), **how, **names).model_proto
    except torch.onnx.OnnxExporterError as error:
        why = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"torch.onnx.export cannot write this {type(model).__name__}: {why}") from error


@contextmanager
def _quiet():
    """Without what torch says of itself, and of packages that this model does not need."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _put_codes(graph_model, qtensors: dict[str, QTensor], level: int) -> None:
    """Put MatMulNBits in the place of each product with a weight of these layers; leave out the exporter's notes."""
    graph, found = graph_model.graph, set()
    for node in graph.node:
        name = _layer_of(node)
        if name in qtensors and node.op_type == "MatMul":
            _replace(graph, node, name, qtensors[name], level)
            found.add(name)
        node.ClearField("metadata_props"), node.ClearField("doc_string")
    if missing := sorted(qtensors.keys() - found):
        raise ValueError(f"the exporter wrote {missing[0]} as something else than MatMul: its codes have no place")
    _drop_unused(graph)
    if qtensors:
        graph_model.opset_import.append(engine("onnx").helper.make_opsetid("com.microsoft", 1))


def _layer_of(node) -> str | None:
    """The layer that an exported node comes from; the exporter notes the path of modules down to it."""
    scopes = next((m.value for m in node.metadata_props if m.key == "pkg.torch.onnx.name_scopes"), "[]")
    path = ast.literal_eval(scopes)
    return path[-2].removeprefix("model.") if len(path) > 1 else None


def _replace(graph, node, name: str, q: QTensor, level: int) -> None:
    onnx, parts = engine("onnx"), nbits_constants(q)
    names = [f"{name}.{part}" for part in parts]
    graph.initializer.extend(onnx.numpy_helper.from_array(c, n) for n, c in zip(names, parts.values(), strict=True))
    about = {"K": q.shape[1], "N": q.shape[0], "bits": q.bits, "accuracy_level": level}
    made = onnx.helper.make_node(
        "MatMulNBits", [node.input[0], *names], list(node.output), name=node.name, domain="com.microsoft",
        block_size=nbits_group(q), **about,
    )  # fmt: skip
    node.CopyFrom(made)


def _drop_unused(graph) -> None:
    """Take out the constants that no node reads any more: the float weights."""
    read = {name for node in graph.node for name in node.input} | {out.name for out in graph.output}
    for constant in [t for t in graph.initializer if t.name not in read]:
        graph.initializer.remove(constant)


def _check(model, qtensors: dict[str, QTensor], level: int, path: Path) -> None:
    """ONNX Runtime's logits beside those of a copy of the model with the weights that the codes stand for."""
    ids = some_ids(model)
    got, meant = torch.from_numpy(onnx_session(path)(ids.numpy())), meant_logits(model, qtensors, ids)
    check_close(got, meant, (TOLERANCE if level == 1 else 0.5) * meant.abs().max().item(), ENGINE)
