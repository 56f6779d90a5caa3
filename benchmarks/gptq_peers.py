"""GPTQ of a whole model beside llm-compressor's: CPU seconds of both on one thread, and the KL of what they made.

python benchmarks/gptq_peers.py --make       makes .venv-llm-compressor (1.5 GB), where the rival runs, and goes on
python benchmarks/gptq_peers.py [--model bundled] [--tokens 16384]     on SmolLM2 half an hour

The same float32 weights, tokens in windows of 512, 4 bits in groups of 64, both kinds of grid, damping 0.01, columns
from left to right. Each starts from a loaded model and ends with one whose linear layers (all but the head) stand on
their grids. Bars: at least twice as fast as the rival, at no higher KL.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantlab.lm import divergence, linear_layers, load_lm, load_text, quantize_lm, token_stream
from quantlab.methods import GPTQ
from quantlab.sweep import TEXTS

FASTER, WINDOW = 2.0, 512
ROOT = Path(__file__).resolve().parent.parent
THEIRS = Path(__file__).with_name("_llm_compressor.py")
# What llm-compressor asks of transformers and compressed-tensors is not what quantlab has.
PINS = (
    "torch==2.13.0", "llmcompressor==0.14.0.1", "transformers==5.17.0", "compressed-tensors==0.19.0", "datasets==5.2.0",
)  # fmt: skip
PYTHON = ROOT / ".venv-llm-compressor" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make() -> None:
    """The environment of the rival, anew."""
    index = os.environ.get("QUANTLAB_TORCH_INDEX")
    extra = [f"--extra-index-url={index}"] if index else []
    print("making .venv-llm-compressor, some minutes ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", PYTHON.parent.parent], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", *extra, *PINS], check=True)


def ours(model, calibration, method: GPTQ):
    """(CPU seconds, the quantized model)."""
    start = time.process_time()
    new, _ = quantize_lm(model, calibration, method, window=WINDOW)
    return time.process_time() - start, new


def theirs(model, tokenizer, calibration, method: GPTQ, folder: Path):
    """The same by llm-compressor, in a process of its own: loading and saving are not in its seconds."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_file({"ids": calibration.view(-1, WINDOW)}, folder / "tokens.safetensors")
    how = {name: method.settings[name] for name in ("bits", "group_size", "symmetric", "act_order", "damping")}
    how["act_order"] = "static" if how["act_order"] else None
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, THEIRS, folder, json.dumps(how)]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    new = type(model)(model.config).eval()
    new.load_state_dict(model.state_dict())
    for name, weight in load_file(folder / "peer.safetensors").items():
        new.get_submodule(name).weight.data.copy_(weight)
    return float(printed.split()[-1]), new


def compare(model, tokenizer, calibration, test, method: GPTQ) -> bool:
    """Print a line for each of the two, and say whether both bars are kept."""
    with tempfile.TemporaryDirectory() as folder:
        rivals = {
            "quantlab": ours(model, calibration, method),
            "llm-compressor": theirs(model, tokenizer, calibration, method, Path(folder)),
        }
    seconds = {name: taken for name, (taken, _) in rivals.items()}
    kl = {name: divergence(model, new, test, window=WINDOW) for name, (_, new) in rivals.items()}
    grid = "symmetric" if method.symmetric else "with zero points"
    for name in rivals:
        print(f"{grid:18}{name:16}{seconds[name]:8.0f}{kl[name].kl:10.4f} ± {kl[name].stderr:.4f}", flush=True)
    ratio = seconds["llm-compressor"] / seconds["quantlab"]
    good = [ratio >= FASTER, kl["quantlab"].kl <= kl["llm-compressor"].kl]
    verdicts = ["kept" if one else "MISSED" for one in good]
    print(f"{ratio:.2f} times as fast (bar {FASTER:g}): {verdicts[0]}; no higher KL: {verdicts[1]}", flush=True)
    return all(good)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="what load_lm takes")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate with")
    parser.add_argument("--make", action="store_true", help="make the rival's environment first")
    options = parser.parse_args()
    if options.make:
        make()
    if not PYTHON.exists():
        print("not measured: llm-compressor is not here (python benchmarks/gptq_peers.py --make gets it)")
        return 0
    torch.set_num_threads(1)
    model, tokenizer = load_lm(options.model)
    texts = TEXTS.get(options.model, ("calibration", "eval"))
    calibration, test = (token_stream(tokenizer, load_text(text)) for text in texts)
    calibration = calibration[: min(options.tokens, len(calibration)) // WINDOW * WINDOW]
    print(f"{options.model}, {len(linear_layers(model))} layers, {len(calibration):,} tokens: CPU seconds and KL, nats")
    methods = [GPTQ(bits=4, group_size=64, symmetric=symmetric) for symmetric in (False, True)]
    return int(not all([compare(model, tokenizer, calibration, test[:2048], method) for method in methods]))


if __name__ == "__main__":
    sys.exit(main())
