"""GPTQ of a whole model beside llm-compressor's and GPTQModel's: CPU seconds on one thread, and the KL of the result.

python benchmarks/gptq_peers.py --make       makes an environment for each rival (1.5 GB each), and goes on
python benchmarks/gptq_peers.py [--model bundled] [--tokens 16384]     on SmolLM2 three quarters of an hour

The same float32 weights, tokens in windows of 512, 4 bits in groups of 64, both kinds of grid, damping 0.01, columns
from left to right. Each starts from a loaded model and ends with one whose linear layers (all but the head) stand on
their grids. Bars: at least twice as fast as the faster rival, at no higher KL than either. The standard error is of the
difference, window by window of the same test text.
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
# What they ask of transformers, compressed-tensors and numpy is not what quantlab has.
RIVALS = {
    "llm-compressor": (
        "torch==2.13.0", "llmcompressor==0.14.0.1", "transformers==5.17.0", "compressed-tensors==0.19.0",
        "datasets==5.2.0",
    ),
    "gptqmodel": ("torch==2.13.0", "gptqmodel==7.6.0", "transformers==5.24.0", "numpy==2.2.6", "datasets==5.2.0"),
}  # fmt: skip


def python_of(rival: str) -> Path:
    return ROOT / f".venv-{rival}" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make(rival: str) -> None:
    """The environment of a rival, anew."""
    index, python = os.environ.get("QUANTLAB_TORCH_INDEX"), python_of(rival)
    extra = [f"--extra-index-url={index}"] if index else []
    print(f"making .venv-{rival}, some minutes ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", python.parent.parent], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *extra, *RIVALS[rival]], check=True)


def ours(model, calibration, method: GPTQ):
    """(CPU seconds, the quantized model)."""
    start = time.process_time()
    new, _ = quantize_lm(model, calibration, method, window=WINDOW)
    return time.process_time() - start, new


def theirs(rival: str, model, tokenizer, calibration, method: GPTQ, folder: Path):
    """The same by a rival, in a process of its own: loading and saving are not in its seconds."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_file({"ids": calibration.view(-1, WINDOW)}, folder / "tokens.safetensors")
    how = {name: method.settings[name] for name in ("bits", "group_size", "symmetric", "act_order", "damping")}
    how["act_order"] = "static" if how["act_order"] else None
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).resolve().with_name(f"_{rival.replace('-', '_')}.py")
    command = [python_of(rival), script, folder, json.dumps(how)]
    run = {"env": environment, "cwd": folder, "stdout": subprocess.PIPE, "text": True}  # some write logs where they run
    printed = subprocess.run(command, check=True, **run).stdout
    new = type(model)(model.config).eval()
    new.load_state_dict(model.state_dict())
    for name, weight in load_file(folder / "peer.safetensors").items():
        new.get_submodule(name).weight.data.copy_(weight)
    return float(printed.split()[-1]), new


def compare(rivals: list[str], model, tokenizer, calibration, test, method: GPTQ) -> bool:
    """Print a line for each, and say whether both bars are kept."""
    grid = "symmetric" if method.symmetric else "with zero points"
    seconds, kl = {}, {}
    for name in ("quantlab", *rivals):
        with tempfile.TemporaryDirectory() as folder:
            if name == "quantlab":
                seconds[name], new = ours(model, calibration, method)
            else:
                seconds[name], new = theirs(name, model, tokenizer, calibration, method, Path(folder))
        kl[name] = torch.tensor([divergence(model, new, part, window=WINDOW).kl for part in test.split(WINDOW)])
        print(f"{grid:18}{name:16}{seconds[name]:8.1f}{kl[name].mean():10.4f}", flush=True)
    ratio = min(seconds[name] for name in rivals) / seconds["quantlab"]
    good = [ratio >= FASTER]
    print(f"{ratio:.2f} times as fast (bar {FASTER:g}): {'kept' if good[0] else 'MISSED'}", flush=True)
    for name in rivals:
        more = kl["quantlab"] - kl[name]
        mean, stderr = more.mean().item(), more.std().item() / len(more) ** 0.5
        good.append(mean <= 0)
        print(f"KL less {name}'s: {mean:+.4f} ± {stderr:.4f}: {'kept' if good[-1] else 'MISSED'}", flush=True)
    return all(good)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="what load_lm takes")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate with")
    parser.add_argument("--make", action="store_true", help="make the rivals' environments first")
    options = parser.parse_args()
    for rival in RIVALS if options.make else ():
        make(rival)
    here = [rival for rival in RIVALS if python_of(rival).exists()]
    for rival in RIVALS.keys() - here:
        print(f"not measured: {rival} is not here (python benchmarks/gptq_peers.py --make gets it)")
    if not here:
        return 0
    torch.set_num_threads(1)
    model, tokenizer = load_lm(options.model)
    texts = TEXTS.get(options.model, ("calibration", "eval"))
    calibration, test = (token_stream(tokenizer, load_text(text)) for text in texts)
    calibration = calibration[: min(options.tokens, len(calibration)) // WINDOW * WINDOW]
    print(f"{options.model}, {len(linear_layers(model))} layers, {len(calibration):,} tokens: CPU seconds and KL, nats")
    methods = [GPTQ(bits=4, group_size=64, symmetric=symmetric) for symmetric in (False, True)]
    return int(not all([compare(here, model, tokenizer, calibration, test[:4096], method) for method in methods]))


if __name__ == "__main__":
    sys.exit(main())
