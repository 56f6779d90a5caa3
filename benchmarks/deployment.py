"""quantlab's codes in other engines, a layer and a model: equal codes, how far the answers are, how fast. 20 minutes.

Bars: codes are byte-identical after the round trip; ONNX Runtime's MatMulNBits with GPTQ's codes gives quantlab's
logits within 1e-4 (the bundled model); an int8 prefill of SmolLM2 in ONNX Runtime or OpenVINO, whose likeliest tokens
are the float model's in at least 90 % of places, takes at most 1/1.2 of torch float32's time. CPU seconds of one
thread, the least of rounds taken in turns. A bar whose engine or model is not here is "not measured", and an engine
that is not here has no row (pip install -e .[deploy]; torchao and nncf have commands of their own).
--store keeps rows and bars in data/deployment.json, from which notebook 20 shows what a reader cannot run; --small
leaves SmolLM2 out.
"""

import datetime
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from _machine import processor
from torch import Tensor, nn

from quantlab import PerAxis, PerGroup, choose_qparams, dequantize, quantize, quantize_tensor
from quantlab.codebook import nf4_levels, quantize_codebook
from quantlab.export.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from quantlab.export.checkpoints import load_checkpoint, save_checkpoint
from quantlab.export.engines import PIP, engine_here
from quantlab.export.litert import litert_session, save_litert_int8, save_litert_weights, weight_codes
from quantlab.export.litert_graph import Graph
from quantlab.export.onnx import (
    FORMS,
    INT8_FORMS,
    codes_in,
    expected_int8,
    onnx_session,
    save_onnx_float,
    save_onnx_int8,
    save_onnx_weights,
)
from quantlab.export.onnx_models import save_onnx
from quantlab.export.openvino import openvino_session, save_nncf
from quantlab.export.table import STORED, Row, cpu_seconds, measure, relative, show
from quantlab.export.torchao import from_torchao, to_torchao, torchao_model
from quantlab.files import write_json
from quantlab.linear import StaticInt8Linear
from quantlab.lm import DATA, load_lm, load_text, quantize_lm, token_stream
from quantlab.lm.smollm2 import packaged_gguf
from quantlab.metrics import kl_divergence, top1_agreement
from quantlab.observers import MinMax

ENGINES = (
    "onnx", "onnxruntime", "onnxscript", "openvino", "ai_edge_litert", "bitsandbytes", "compressed_tensors", "nncf",
    "torchao",
)  # fmt: skip
MOST_APART, LEAST_SPEED, LEAST_SAME = 1e-4, 1.2, 0.9
SESSIONS = {"ONNX Runtime": onnx_session, "OpenVINO": openvino_session}
IN_FLOAT = "float32"
GRID = {"bits": 4, "group_size": 128, "symmetric": False}


@dataclass(frozen=True)
class Bar:
    """What was asked for, and what came out; a value of None was not measured."""

    bar: str
    limit: float
    value: float | None
    at_most: bool

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "kept" if (self.value <= self.limit) == self.at_most or self.value == self.limit else "BROKEN"


def main(arguments: list[str]) -> int:
    missing = [name for name in ENGINES if not engine_here(name)]
    print(f"not here: {', '.join(missing)}; {PIP}" if missing else "every engine is here")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        rows = layer_rows(folder)
        show(rows)
        model, apart = model_rows(folder)
        prefill = {} if "--small" in arguments else prefills(folder)
    right = [p["times"] for name, p in prefill.items() if not name.endswith(IN_FLOAT) and p["same"] >= LEAST_SAME]
    bars = [
        Bar("codes that came back changed", 0, 0 if rows else None, True),  # layer_rows stops at the first
        Bar("GPTQ's codes, largest difference of logits", MOST_APART, apart, True),
        Bar("SmolLM2, int8 prefill, times torch float32", LEAST_SPEED, max(right, default=None), False),
    ]
    for bar in bars:
        print(f"{bar.bar}: {bar.value}, {'at most' if bar.at_most else 'at least'} {bar.limit}: {bar.verdict}")
    if "--store" in arguments:
        store(rows, model, prefill, bars)
    return int(any(bar.verdict == "BROKEN" for bar in bars))


def store(rows: list[Row], model: list[dict], prefill: dict, bars: list[Bar]) -> None:
    about = {"date": datetime.date.today().isoformat(), "processor": processor()}
    layer = [[r.engine, r.form, r.nbytes, r.apart, r.times] for r in rows]
    verdicts = [asdict(bar) | {"verdict": bar.verdict} for bar in bars]
    write_json(STORED, about | {"layer": layer, "model": model, "SmolLM2, 128 tokens": prefill, "bars": verdicts})


# One layer


def layer_rows(folder: Path) -> list[Row]:
    """A layer of 1024 x 1024 in every form and engine; an AssertionError if a code is not what was written."""
    linear, observer, x = the_layer()
    rows = []
    if engine_here("onnx") and engine_here("onnxruntime"):
        rows += onnx_rows(linear, observer, x, folder)
    if engine_here("ai_edge_litert"):
        rows += litert_rows(linear, observer, x, folder)
    return rows + list(torch_rows(linear, x))


def the_layer() -> tuple[nn.Linear, MinMax, Tensor]:
    """The layer, an observer that saw inputs like its own, and 32 tokens; the same each time."""
    random = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(1024, 1024), torch.randn(32, 1024, generator=random) + 0.3
    linear.weight.copy_(torch.randn(1024, 1024, generator=random) / 32)
    linear.bias.copy_(torch.randn(1024, generator=random) / 10)
    observer = MinMax()
    observer.update(torch.randn(256, 1024, generator=random) + 0.3)
    return linear, observer, x


def onnx_rows(linear, observer, x: Tensor, folder: Path) -> list[Row]:
    """The ONNX files, each in ONNX Runtime and in OpenVINO."""
    path, rows = folder / "layer.onnx", []
    save_onnx_float(linear, folder / "float.onnx")
    sessions = {name: s for name, s in SESSIONS.items() if name != "OpenVINO" or engine_here("openvino")}
    in_float = {name: session(folder / "float.onnx") for name, session in sessions.items()}
    for name, save, y, codes in layer_files(linear, observer, x):
        save(path)
        assert torch.equal(codes_in(path), codes), f"{name}: other codes came back"
        rows += [measure(e, name, path, session(path), x, y, in_float[e]) for e, session in sessions.items()]
    if "OpenVINO" in sessions:  # the last file, in which weights have 4 bits
        run = openvino_session(path, float_activations=True)
        rows.append(measure("OpenVINO", f"{name}, x left float", path, run, x, y, in_float["OpenVINO"]))
    return rows


def layer_files(linear, observer, x: Tensor) -> Iterator[tuple[str, Callable, Tensor, Tensor]]:
    """(name, how it is written, quantlab's answer, codes) of each form."""
    for bits in (8, 7):
        layer = StaticInt8Linear.from_linear(linear, observer, weight_bits=bits)
        for form in INT8_FORMS if bits == 8 else INT8_FORMS[:1]:
            name = f"int8, {form}" if bits == 8 else f"7 bits, {form}"
            yield name, lambda p, of=layer, f=form: save_onnx_int8(of, p, form=f), layer.exact(x), layer.codes.int()
        if bits == 8:
            y, codes = expected_int8(layer, x, signed=True), layer.codes.int()
            yield "signed int8, Gemm", lambda p, of=layer: save_onnx_int8(of, p, form="Gemm", signed=True), y, codes
    q = quantize_tensor(linear.weight, bits=4, granularity=PerGroup(32), symmetric=False)
    y, codes = x @ q.dequantize().T + linear.bias, q.codes.int() - q.qparams.qmin
    for form, level in [("MatMulNBits", 1), ("MatMulNBits", 4), *((form, 1) for form in FORMS[1:])]:
        name = f"4 bits, {form}" + (f" level {level}" if form == "MatMulNBits" else "")
        how = {"bias": linear.bias, "form": form, "level": level}
        yield name, lambda p, how=how: save_onnx_weights(q, p, **how), y, codes


def litert_rows(linear, observer, x: Tensor, folder: Path) -> list[Row]:
    """LiteRT's files, one token each, beside a float layer in LiteRT."""
    graph, size = Graph(), (1, 1024)
    ends = graph.tensor("x", size), graph.tensor("y", size)
    weight = graph.tensor("w", linear.weight.shape, data=linear.weight.numpy())
    graph.op("FULLY_CONNECTED", [ends[0], weight, graph.tensor("b", (1024,), data=linear.bias.numpy())], ends[1])
    graph.save(*ends, folder / "float.tflite")
    in_float, path, rows = by_rows(folder / "float.tflite"), folder / "layer.tflite", []
    for name, save, y, codes in litert_files(linear, observer, x):
        save(path)
        assert torch.equal(weight_codes(path), codes), f"LiteRT, {name}: other codes came back"
        rows.append(measure("LiteRT", name, path, by_rows(path), x, y, in_float))
    return rows


def by_rows(path: Path) -> Callable:
    """A file for one token as a function of many."""
    run = litert_session(path)
    return lambda x: torch.cat([run(torch.from_numpy(row[None])) for row in x])


def litert_files(linear, observer, x: Tensor) -> Iterator[tuple[str, Callable, Tensor, Tensor]]:
    layer = StaticInt8Linear.from_linear(linear, observer)
    y = layer.exact(x)
    output = choose_qparams(y.min(), y.max(), qmin=0, qmax=255)
    rounded = dequantize(quantize(y, output), output)
    yield "int8, outputs rounded too", lambda p: save_litert_int8(layer, output, p), rounded, layer.codes
    for name, bits, how in (("int8 rows", 8, PerAxis(0)), ("4 bits, groups of 32", 4, PerGroup(32))):
        q = quantize_tensor(linear.weight, bits=bits, granularity=how)
        y = F.linear(x, q.dequantize(), linear.bias)
        yield name, lambda p, q=q: save_litert_weights(q, p, bias=linear.bias), y, q.codes


def torch_rows(linear, x: Tensor) -> Iterator[Row]:
    """Layers that torch runs, with another package's kernels; beside torch's float layer."""
    if engine_here("bitsandbytes"):
        q = quantize_codebook(linear.weight, nf4_levels(), block_size=64)
        layer = to_bitsandbytes(q, bias=linear.bias)
        assert torch.equal(from_bitsandbytes(layer).codes, q.codes), "bitsandbytes: other codes came back"
        yield torch_row("bitsandbytes", "NF4, blocks of 64", q.nbytes, q, layer, linear, x)
    for name, bits, how in (("int8 rows", 8, PerAxis(0)), ("4 bits, groups of 32", 4, PerGroup(32))):
        if engine_here("torchao"):
            q = quantize_tensor(linear.weight, bits=bits, granularity=how)
            weight = to_torchao(q)
            assert torch.equal(from_torchao(weight).codes, q.codes), "torchao: other codes came back"
            nbytes = sum(getattr(weight, part).nbytes for part in weight.__tensor_flatten__()[0])
            yield torch_row("torchao", name, nbytes, q, lambda x, w=weight: F.linear(x, w, linear.bias), linear, x)


def torch_row(engine: str, form: str, nbytes: int, q, run: Callable, linear, x: Tensor) -> Row:
    fast, slow = cpu_seconds(lambda: run(x[:1]), lambda: linear(x[:1]))
    return Row(engine, form, nbytes, relative(run(x), F.linear(x, q.dequantize(), linear.bias)), slow / fast)


# The bundled model


def model_rows(folder: Path) -> tuple[list[dict], float | None]:
    """The bundled model in float and with GPTQ's codes; and how far ONNX Runtime's logits lie from ours on these."""
    model, tokenizer = load_lm(str(DATA / "model"))
    read = token_stream(tokenizer, load_text("calibration"))[:4096]
    meter = Meter(model, token_stream(tokenizer, load_text("eval"))[:2048].view(8, 256))
    new, report = quantize_lm(model, read, method="gptq", progress=False, **GRID)
    apart = None
    if all(map(engine_here, ("onnx", "onnxruntime", "onnxscript"))):
        logits = onnx_models(meter, report.qtensors, folder)
        apart = (logits - new(meter.windows[:1]).logits).abs().max().item()
    if engine_here("compressed_tensors"):
        size = save_checkpoint(model, folder / "W4A16", report.qtensors, layout="W4A16", verify=True)
        loaded = load_checkpoint(folder / "W4A16")
        meter.row("compressed-tensors", "GPTQ 4 bits", size, lambda ids: loaded(ids, use_cache=False).logits)
    if engine_here("torchao"):
        symmetric = quantize_lm(model, read, method="gptq", progress=False, **GRID | {"symmetric": True})[1]
        theirs = torchao_model(model, symmetric.qtensors)
        meter.row("torchao", "GPTQ 4 bits, symmetric", None, lambda ids: theirs(ids, use_cache=False).logits)
    return meter.rows, apart


def onnx_models(meter: "Meter", qtensors: dict, folder: Path) -> Tensor:
    """The model's ONNX files in ONNX Runtime and OpenVINO; the logits of our codes for one window."""
    forms = {"float32": {}, "GPTQ 4 bits": {"qtensors": qtensors},
             "GPTQ 4 bits, x int8": {"qtensors": qtensors, "activations": "int8"}}  # fmt: skip
    paths = {form: folder / f"{form}.onnx" for form in forms}
    sizes = {form: save_onnx(meter.model, paths[form], verify=True, **how) for form, how in forms.items()}
    for form, path in paths.items():
        meter.file("ONNX Runtime", form, sizes[form], onnx_session(path))
    meter.file("ONNX Runtime", "its own int8", *own_int8(paths["float32"], folder / "int8.onnx"))
    if engine_here("openvino"):
        for form in ("float32", "GPTQ 4 bits"):
            meter.file("OpenVINO", form, sizes[form], openvino_session(paths[form]))
    if engine_here("openvino") and engine_here("nncf"):
        size = save_nncf(paths["float32"], folder / "nncf.xml")
        meter.file("OpenVINO", "NNCF's own int8", size, openvino_session(folder / "nncf.xml"))
    return torch.from_numpy(onnx_session(paths["GPTQ 4 bits"])(meter.windows[:1].numpy()))


class Meter:
    """Rows of a table: bytes, KL to the float model, likeliest token the same, speed of 128 tokens beside torch."""

    def __init__(self, model, windows: Tensor):
        self.model, self.windows, self.rows = model, windows, []
        self.logits = model(windows, use_cache=False).logits

    def file(self, engine: str, form: str, nbytes: int | None, run: Callable) -> None:
        """A row of an engine that takes and gives numpy arrays."""
        self.row(engine, form, nbytes, lambda ids: torch.from_numpy(run(ids.numpy())))

    def row(self, engine: str, form: str, nbytes: int | None, run: Callable) -> None:
        one = self.windows[:1, :128]
        own, theirs = cpu_seconds(lambda: self.model(one, use_cache=False), lambda: run(one))
        got = run(self.windows)
        kl, same = kl_divergence(self.logits, got), top1_agreement(self.logits, got)
        numbers = {"bytes": nbytes, "kl": kl, "top1": same, "times": own / theirs}
        self.rows.append({"engine": engine, "form": form} | numbers)
        print(self.rows[-1], flush=True)


def own_int8(path: Path, out: Path, **how) -> tuple[int, Callable]:
    """ONNX Runtime's own dynamic int8 of the products in a float file: its size, and the session."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "weight_type": QuantType.QInt8}
    quantize_dynamic(path, out, **kinds, **how)
    return out.stat().st_size, onnx_session(out)


# SmolLM2


def prefills(folder: Path) -> dict[str, dict]:
    """How many times as fast as torch float32 engines read 128 tokens, and how often they expect the same next."""
    if packaged_gguf() is None or not all(map(engine_here, ("onnx", "onnxruntime", "onnxscript"))):
        print("SmolLM2 or ONNX Runtime is not here: its prefill is not measured")
        return {}
    model, tokenizer = load_lm("smollm2")
    model, ids = model.float(), token_stream(tokenizer, load_text("eval"))[None, :128]
    size, best = save_onnx(model, folder / "smollm2.onnx"), model(ids, use_cache=False).logits.argmax(-1)
    print(f"SmolLM2 in float32: {size:,} bytes", flush=True)
    found = {}
    for name, run in engines(folder):
        own, theirs = cpu_seconds(lambda: model(ids, use_cache=False), lambda r=run: r(ids.numpy()), rounds=3)
        same = (torch.from_numpy(run(ids.numpy())).argmax(-1) == best).double().mean().item()
        print(f"{name}: {own / theirs:.2f} times torch float32, likeliest token the same in {same:.1%}", flush=True)
        found[name] = {"times": own / theirs, "same": same}
    return found


def engines(folder: Path) -> Iterator[tuple[str, Callable]]:
    """(name, session) in float32 and in int8, one after the other, so that one model is in memory at a time."""
    source = folder / "smollm2.onnx"
    for name, session in SESSIONS.items():
        if name != "OpenVINO" or engine_here("openvino"):
            yield f"{name}, {IN_FLOAT}", session(source)
    yield "ONNX Runtime, dynamic int8", own_int8(source, folder / "smollm2-8.onnx")[1]
    yield "ONNX Runtime, weights of 7 bits", own_int8(source, folder / "smollm2-7.onnx", reduce_range=True)[1]
    if engine_here("openvino") and engine_here("nncf"):
        save_nncf(source, folder / "smollm2.xml")
        yield "OpenVINO, NNCF's INT8_ASYM", openvino_session(folder / "smollm2.xml")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
