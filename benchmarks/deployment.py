"""quantlab's codes in ONNX files, in other engines: equal codes, how far the answers are, how fast. Fifteen minutes.

Bars: codes are byte-identical after the round trip; ONNX Runtime's MatMulNBits with GPTQ's codes gives quantlab's
logits within 1e-4 (the bundled model); an int8 prefill of SmolLM2 in ONNX Runtime or OpenVINO, whose likeliest tokens
are the float model's in at least 90 % of places, takes at most 1/1.2 of torch float32's time. CPU seconds of one
thread, the least of rounds taken in turns. Engines that are not installed are left out (pip install -e .[deploy]).
--store keeps the layer's rows and the bars' figures; --small leaves SmolLM2 out.
"""

import datetime
import sys
import tempfile
from pathlib import Path

import torch
from _machine import processor
from torch import nn

from quantlab import PerGroup, quantize_tensor
from quantlab.export.engines import PIP, engine_here
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
from quantlab.export.table import STORED, Row, cpu_seconds, measure, show
from quantlab.files import write_json
from quantlab.linear import StaticInt8Linear
from quantlab.lm import DATA, load_lm, load_text, quantize_lm, token_stream
from quantlab.lm.smollm2 import packaged_gguf
from quantlab.observers import MinMax

MOST_APART, LEAST_SPEED, LEAST_SAME = 1e-4, 1.2, 0.9
TIMES, SAME = "times torch float32", "likeliest token the same"
SESSIONS = {"ONNX Runtime": onnx_session, "OpenVINO": openvino_session}


def main(arguments: list[str]) -> int:
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript", "openvino", "nncf") if not engine_here(name)]
    print(f"not here: {', '.join(missing)}; {PIP}" if missing else "every engine is here")
    if "onnx" in missing or "onnxruntime" in missing:
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        rows, bars = layer_rows(Path(folder)), {}
        if "onnxscript" not in missing:
            bars["GPTQ's codes, largest difference of logits"] = gptq_apart(Path(folder))
            if "--small" not in arguments and packaged_gguf():
                bars |= prefills(Path(folder), nncf="nncf" not in missing and "openvino" not in missing)
    good = judged(bars)
    print("bars kept" if good else "A BAR IS BROKEN")
    if "--store" in arguments:
        about = {"date": datetime.date.today().isoformat(), "processor": processor()}
        kept = [[r.engine, r.form, r.nbytes, r.apart, r.times] for r in rows]
        write_json(STORED, about | {"layer": kept, "bars": bars})
    return 0 if good else 1


def judged(bars: dict[str, float]) -> bool:
    """Whether what was measured keeps the bars."""
    apart = bars.get("GPTQ's codes, largest difference of logits", 0.0)
    speeds = {name: value for name, value in bars.items() if name.endswith(TIMES)}
    right = [value for name, value in speeds.items() if bars[name.replace(TIMES, SAME)] >= LEAST_SAME]
    return apart <= MOST_APART and (not speeds or max(right, default=0.0) >= LEAST_SPEED)


def layer_rows(folder: Path) -> list[Row]:
    """A layer of 1024 x 1024 in every form and engine; an AssertionError if a code is not what was written."""
    random = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(1024, 1024), torch.randn(32, 1024, generator=random) + 0.3
    linear.weight.copy_(torch.randn(1024, 1024, generator=random) / 32)
    linear.bias.copy_(torch.randn(1024, generator=random) / 10)
    observer, path, rows = MinMax(), folder / "layer.onnx", []
    observer.update(torch.randn(256, 1024, generator=random) + 0.3)
    save_onnx_float(linear, folder / "float.onnx")
    sessions = {name: s for name, s in SESSIONS.items() if name != "OpenVINO" or engine_here("openvino")}
    in_float = {name: session(folder / "float.onnx") for name, session in sessions.items()}
    for name, save, y, codes in layer_files(linear, observer, x):
        save(path)
        assert torch.equal(codes_in(path), codes), f"{name}: other codes came back"
        rows += [measure(e, name, path, session(path), x, y, in_float[e]) for e, session in sessions.items()]
    show(rows)
    return rows


def layer_files(linear, observer, x):
    """(name, how it is written, quantlab's answer, codes) of each form."""
    for bits in (8, 7):
        layer = StaticInt8Linear.from_linear(linear, observer, weight_bits=bits)
        for form in INT8_FORMS if bits == 8 else INT8_FORMS[:1]:
            name = f"int8, {form}" if bits == 8 else f"weights of 7 bits, {form}"
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


def gptq_apart(folder: Path) -> float:
    """The largest difference between ONNX Runtime's logits on GPTQ's codes and ours; the bundled model, 256 tokens."""
    model, tokenizer = load_lm(str(DATA / "model"))
    read = token_stream(tokenizer, load_text("calibration"))[:4096]
    how = {"bits": 4, "group_size": 128, "symmetric": False}
    new, report = quantize_lm(model, read, method="gptq", progress=False, **how)
    size = save_onnx(model, folder / "gptq.onnx", qtensors=report.qtensors, verify=True)
    ids = token_stream(tokenizer, load_text("eval"))[None, :256]
    apart = (torch.from_numpy(onnx_session(folder / "gptq.onnx")(ids.numpy())) - new(ids).logits).abs().max().item()
    print(f"GPTQ, 4 bits, as MatMulNBits: {size:,} bytes, logits {apart:.1e} from quantlab's, bar {MOST_APART}")
    return apart


def prefills(folder: Path, *, nncf: bool) -> dict[str, float]:
    """How many times as fast as torch float32 int8 engines read 128 tokens, and how often they expect the same next."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model, tokenizer = load_lm("smollm2")
    model, ids = model.float(), token_stream(tokenizer, load_text("eval"))[None, :128]
    size, best = save_onnx(model, folder / "float.onnx"), model(ids, use_cache=False).logits.argmax(-1)
    print(f"SmolLM2 in float32: {size:,} bytes", flush=True)
    runs = {}
    for name, how in {"8 bits": {}, "weights of 7 bits": {"reduce_range": True}}.items():
        out = folder / f"{name}.onnx"
        linear = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "weight_type": QuantType.QInt8}
        quantize_dynamic(folder / "float.onnx", out, **linear, **how)
        runs[f"ONNX Runtime dynamic int8, {name}"] = onnx_session(out)
    if nncf:
        save_nncf(folder / "float.onnx", folder / "nncf.xml", mode="INT8_ASYM")
        runs["OpenVINO, NNCF's INT8_ASYM"] = openvino_session(folder / "nncf.xml")
    fast = {}
    for name, run in runs.items():
        own, theirs = cpu_seconds(lambda: model(ids, use_cache=False), lambda r=run: r(ids.numpy()), rounds=3)
        same = (torch.from_numpy(run(ids.numpy())).argmax(-1) == best).double().mean().item()
        print(f"{name}: {own / theirs:.2f} times torch float32, likeliest token the same in {same:.1%}", flush=True)
        fast |= {f"{name}: {TIMES}": own / theirs, f"{name}: {SAME}": same}
    return fast


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
