"""Intel Neural Compressor's RTN and GPTQ beside ours on the bundled model: are codes equal, and if not, why. 5 minutes.

It is in an environment of its own: python -m recipes.engines neural-compressor makes it and runs this there, with
--store, which keeps the rows in data/deployment_neural_compressor.json for notebook 20. Each comparison has a line;
what a difference comes from is told by a line that takes one cause away, or a control that has this cause alone.
"""

import copy
import datetime
import importlib.metadata
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from _machine import processor
from deployment import Meter, the_layer
from torch import Tensor, nn

from quantlab import PerGroup, QParams, quantize, quantize_tensor
from quantlab.blocks import from_blocks, to_blocks
from quantlab.export.engines import OWN_COMMAND, engine_here
from quantlab.export.neural_compressor import codes_of, gptq_by_neural_compressor, rtn_by_neural_compressor
from quantlab.export.table import OWN, Row, cpu_seconds, relative, show
from quantlab.files import write_json
from quantlab.lm import DATA, linear_layers, load_lm, load_text, quantize_lm, token_stream, weight_of

ENGINE = "Neural Compressor"
PACKAGES = ("neural-compressor-pt", "torch", "transformers")
SIZE = 32
# 2048 is its default: all columns of these layers are one block.
GPTQS = (("asymmetric", 2048), ("asymmetric", SIZE), ("symmetric", SIZE), ("asymmetric, act-order", SIZE))


def main(arguments: list[str]) -> int:
    if not engine_here("neural_compressor"):
        print(f"{ENGINE} is not here; `{OWN_COMMAND['neural_compressor']}` gets it: nothing is measured")
        return 0
    torch.set_num_threads(1)
    model, tokenizer = load_lm(str(DATA / "model"))
    model = model.float()
    read = token_stream(tokenizer, load_text("calibration"))[:4096]
    with torch.no_grad():
        meter = Meter(model, token_stream(tokenizer, load_text("eval"))[:2048].view(8, 256))
        layer, codes = layer_rows(), rtn_lines(model, meter) + gptq_lines(model, read, meter)
    show(layer)
    for line in codes:
        print(f"{line['what']:72} equal {line['equal']:.6f}  first block {line['first block']:.6f}")
    if "--store" in arguments:
        store(layer, meter.rows, codes)
    return 0


def store(layer: list[Row], model: list[dict], codes: list[dict]) -> None:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    about = {"date": datetime.date.today().isoformat(), "processor": processor(), "versions": versions}
    rows = [[r.engine, r.form, r.nbytes, r.apart, r.times] for r in layer]
    write_json(OWN[ENGINE], about | {"layer": rows, "model": model, "codes": codes})


def layer_rows() -> list[Row]:
    """The layer of 1024 x 1024 after its RTN, beside torch's float layer; apart from its own codes' exact answer."""
    linear, _, x = the_layer()
    rows = []
    for bits, symmetric in ((4, False), (4, True), (8, True), (8, False)):
        net = rtn_by_neural_compressor(nn.Sequential(linear), bits=bits, group_size=SIZE, symmetric=symmetric)
        y = F.linear(x, codes_of(net)["0"].dequantize(), linear.bias)
        slow, fast = cpu_seconds(lambda: linear(x[:1]), lambda net=net: net(x[:1]))
        form = f"{bits} bits, groups of {SIZE}, {'' if symmetric else 'a'}symmetric"
        rows.append(Row(ENGINE, form, state_bytes(net), relative(net(x), y), slow / fast))
    return rows


def state_bytes(model: nn.Module) -> int:
    """Bytes of all tensors, one that is shared counted once."""
    return sum({x.data_ptr(): x.nbytes for x in model.state_dict().values()}.values())


def compared(what: str, ours: dict, theirs: dict) -> dict:
    """A line: how many codes are equal, over all layers and in the first block, how far scales and codes are apart."""
    assert ours.keys() == theirs.keys(), "other layers"
    pairs = {name: (counted(ours[name]), counted(theirs[name])) for name in ours}
    same = {name: (a == b).double() for name, (a, b) in pairs.items()}
    first = [x for name, x in same.items() if ".layers.0." in name]
    scales = [(theirs[name].qparams.scale / ours[name].qparams.scale).flatten() for name in ours]
    return {
        "what": what,
        "equal": torch.cat([x.flatten() for x in same.values()]).mean().item(),
        "first block": torch.cat([x.flatten() for x in first]).mean().item(),
        "most apart": max((a - b).abs().max().item() for a, b in pairs.values()),
        "their scale over ours": [torch.cat(scales).min().item(), torch.cat(scales).max().item()],
    }


def counted(q) -> Tensor:
    """Codes from 0 on."""
    return q.codes.int() - q.qparams.qmin


# Round to nearest


def rtn_lines(model, meter: Meter) -> list[dict]:
    weights = {name: weight_of(layer).clone() for name, layer in linear_layers(model).items()}
    lines = []
    for symmetric in (False, True):
        how = {"bits": 4, "granularity": PerGroup(SIZE), "symmetric": symmetric}
        new = rtn_by_neural_compressor(model, group_size=SIZE, symmetric=symmetric)
        theirs, word = codes_of(new), "symmetric" if symmetric else "asymmetric"
        meter.row(ENGINE, f"RTN 4 bits, {word}", state_bytes(new), lambda ids, new=new: new(ids).logits)
        ours = {name: quantize_tensor(w, **how) for name, w in weights.items()}
        lines.append(compared(f"RTN, {word}", ours, theirs))
        if symmetric:
            ours = {name: narrow(w) for name, w in weights.items()}
            lines.append(compared("RTN, symmetric, our rounding on a scale of max / 7", ours, theirs))
        lines[-1] |= where_they_differ(weights, ours, theirs)
    return lines


def narrow(w: Tensor):
    """Our symmetric codes with the scale max |w| / 7 in place of max |w| / 7.5."""
    q, blocks = quantize_tensor(w, bits=4, granularity=PerGroup(SIZE)), to_blocks(w, PerGroup(SIZE))
    scale = blocks.abs().amax(1, keepdim=True) / 7
    codes = quantize(blocks, QParams(scale, torch.zeros_like(scale, dtype=torch.int32), -8, 7))
    qp = replace(q.qparams, scale=scale.view_as(q.qparams.scale))
    return replace(q, codes=from_blocks(codes, PerGroup(SIZE), w.shape), qparams=qp)


def where_they_differ(weights: dict, ours: dict, theirs: dict) -> dict:
    """How many codes differ, and of these those of groups with another zero point; and how far such zero points, and
    the weights of the other codes, are at most from a tie, in steps: near one, any float operation decides.
    """
    found = [from_ties(w, ours[name], theirs[name]) for name, w in weights.items()]
    differ, with_zero, zeros, codes = zip(*found, strict=True)
    counts = {"differ": sum(differ), "differ with their zero point": sum(with_zero)}
    return counts | {"zero points from a tie": max(zeros), "codes from a tie": max(codes)}


def from_ties(w: Tensor, ours, theirs) -> tuple[int, int, float, float]:
    """The same of one layer."""
    steps = to_blocks(w, PerGroup(SIZE)).double() / ours.qparams.scale.double().reshape(-1, 1)
    differ = (counted(ours) != counted(theirs)).view(steps.shape)
    zeros = [(q.qparams.zero_point - q.qparams.qmin).flatten() for q in (ours, theirs)]
    moved = zeros[0] != zeros[1]
    least = steps.amin(1).clamp(max=0)
    off = [(x - x.floor() - 0.5).abs() for x in (least[moved], steps[differ & ~moved[:, None]])]
    return int(differ.sum()), int(differ[moved].sum()), *(x.max().item() if len(x) else 0.0 for x in off)


# GPTQ


def gptq_lines(model, read: Tensor, meter: Meter) -> list[dict]:
    """Each line is GPTQ over all blocks, so that a difference in one makes other inputs for the next."""
    lines = []
    for word, block_size in GPTQS:
        how = {"symmetric": word == "symmetric", "act_order": "act-order" in word}
        ours = our_gptq(model, read, **how)
        new = gptq_by_neural_compressor(model, read, group_size=SIZE, block_size=block_size, **how)
        form = f"{word}, block_size {block_size}"
        meter.row(ENGINE, f"GPTQ 4 bits, {form}", state_bytes(new), lambda ids, new=new: new(ids).logits)
        lines.append(compared(f"GPTQ, {form}", ours, codes_of(new)))
        if block_size == SIZE:
            double = our_gptq(copy.deepcopy(model).double(), read, **how)
            lines.append(compared(f"control: GPTQ, {word}, ours in float64", ours, double))
    damped = our_gptq(model, read, damping=0.011, symmetric=False)
    plain = our_gptq(model, read, symmetric=False)
    return [*lines, compared("control: GPTQ, asymmetric, ours with a damping of 0.011", plain, damped)]


def our_gptq(model, read: Tensor, **how) -> dict:
    grid = {"bits": 4, "group_size": SIZE} | how
    return quantize_lm(model, read, method="gptq", progress=False, **grid)[1].qtensors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
