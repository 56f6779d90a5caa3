"""quantlab's codes through ExecuTorch and XNNPACK, a layer and the bundled model: bytes, distance, speed. 10 minutes.

ExecuTorch is in an environment of its own: python -m recipes.engines executorch makes it and runs this there, with
--store, which keeps the rows in data/deployment_executorch.json for notebook 20. CPU seconds of one thread, the least
of rounds taken in turns. A code that is not in the file stops it. --small leaves the model out.
"""

import datetime
import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from _machine import processor
from deployment import Meter, the_layer
from torch import Tensor

from quantlab import PerAxis, PerGroup, quantize_tensor
from quantlab.export.engines import OWN_COMMAND, engine_here
from quantlab.export.executorch import (
    executorch_session,
    expected_executorch,
    save_executorch,
    save_executorch_float,
    save_executorch_model,
)
from quantlab.export.table import OWN, Row, cpu_seconds, relative, show
from quantlab.export.torchao import torchao_model
from quantlab.files import write_json
from quantlab.lm import DATA, load_lm, load_text, quantize_lm, token_stream
from quantlab.metrics import kl_divergence

ENGINE = "ExecuTorch"
PACKAGES = ("executorch", "torch", "torchao", "transformers")
LAYERS = {"int8 rows": (8, PerAxis(0)), "4 bits, rows": (4, PerAxis(0)), "4 bits, groups of 32": (4, PerGroup(32))}
MODELS = {
    "GPTQ 4 bits, x int8": {"method": "gptq", "bits": 4, "group_size": 32},
    "RTN int8 rows, x int8": {"method": "rtn", "bits": 8, "group_size": None},
}


def main(arguments: list[str]) -> int:
    if not engine_here("executorch"):
        print(f"{ENGINE} is not here; `{OWN_COMMAND['executorch']}` gets it: nothing is measured")
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        layer, rounded = layer_rows(Path(name))
        show(layer)
        for model in [[]] if "--small" in arguments else model_rows(Path(name)):
            if "--store" in arguments:  # each time: a model takes minutes
                store(layer, model, {"layers, from expected_executorch": rounded})
    return 0


def store(layer: list[Row], model: list[dict], more: dict) -> None:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    about = {"date": datetime.date.today().isoformat(), "processor": processor(), "versions": versions}
    rows = [[r.engine, r.form, r.nbytes, r.apart, r.times] for r in layer]
    write_json(OWN[ENGINE], about | {"layer": rows, "model": model} | more)


def layer_rows(folder: Path) -> tuple[list[Row], dict[str, float]]:
    """Rows beside the float layer in ExecuTorch, which stands first, beside torch's; how far from what was expected."""
    linear, _, x = the_layer()
    size = save_executorch_float(linear, folder / "float.pte", tokens=len(x))
    in_float = executorch_session(folder / "float.pte")
    slow, fast = cpu_seconds(lambda: linear(x[:1]), lambda: in_float(x[:1]), rounds=50)
    rows = [Row(ENGINE, "float32, beside torch's", size, relative(in_float(x), linear(x)), slow / fast)]
    expected = {}
    for form, (bits, how) in LAYERS.items():
        q, path = quantize_tensor(linear.weight, bits=bits, granularity=how), folder / "layer.pte"
        size = save_executorch(q, path, bias=linear.bias, tokens=len(x), verify=True)
        run, y = executorch_session(path), F.linear(x, q.dequantize(), linear.bias)
        slow, fast = cpu_seconds(lambda: in_float(x[:1]), lambda run=run: run(x[:1]), rounds=50)
        rows.append(Row(ENGINE, form, size, relative(run(x), y), slow / fast))
        expected[form] = relative(run(x), expected_executorch(q, x, bias=linear.bias))
    return rows, expected


def model_rows(folder: Path) -> Iterator[list[dict]]:
    """The bundled model in float32 and with codes, as benchmarks/deployment.py measures others: the rows so far.

    Beside the KL to the float model stand that to quantlab's codes with x in floats, which it would be without rounding
    x, and that to torchao, which rounds x likewise; and the KL of quantlab's codes themselves.
    """
    model, tokenizer = load_lm(str(DATA / "model"))
    read = token_stream(tokenizer, load_text("calibration"))[:4096]
    meter = Meter(model, token_stream(tokenizer, load_text("eval"))[:2048].view(8, 256))
    size = save_executorch_model(model, folder / "model.pte", tokens=256, verify=True)
    meter.row(ENGINE, "float32", size, by_windows(folder / "model.pte"))
    yield meter.rows
    for form, how in MODELS.items():
        new, report = quantize_lm(model, read, symmetric=True, progress=False, **how)
        size = save_executorch_model(model, folder / "model.pte", qtensors=report.qtensors, tokens=256, verify=True)
        run = by_windows(folder / "model.pte")
        meter.row(ENGINE, form, size, run)
        alike, got = torchao_model(model, report.qtensors, activations="int8"), run(meter.windows)
        ours = new(meter.windows, use_cache=False).logits
        theirs = alike(meter.windows, use_cache=False).logits
        meter.rows[-1] |= {"kl to our codes": kl_divergence(ours, got), "kl to torchao": kl_divergence(theirs, got)}
        meter.rows[-1] |= {"kl of our codes": kl_divergence(meter.logits, ours)}
        print(meter.rows[-1], flush=True)
        yield meter.rows


def by_windows(path: Path):
    """A file for one window as a function of many."""
    run = executorch_session(path)

    def all_of(ids: Tensor) -> Tensor:
        return torch.cat([run(one[None]) for one in ids])

    return all_of


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
