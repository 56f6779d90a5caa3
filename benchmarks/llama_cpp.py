"""llama.cpp on the files that quantlab writes: how far from ours, and how fast. Two minutes; --store keeps the figures.

Bars: KL between llama.cpp's predictions on a Q8_0 file and ours on the same weights at most 1e-3 (the bundled model);
Q4_0 decodes SmolLM2 at least twice as fast as torch in float32. CPU seconds of one thread, the least of rounds taken in
turns. Needs llama.cpp (python -m recipes.llama_cpp).
"""

import datetime
import sys
import tempfile
from pathlib import Path

import torch
from _machine import processor

from quantlab.export.gguf import save_gguf
from quantlab.export.gguf_models import with_values_of
from quantlab.export.llama_cpp import HOW, STORED, llama_cpp_here, llama_cpp_predictions, llama_cpp_speed, torch_speed
from quantlab.files import write_json
from quantlab.lm import DATA, load_lm, load_text, token_stream
from quantlab.lm.smollm2 import packaged_gguf
from quantlab.metrics import kl_divergence

MOST_KL, LEAST_SPEED = 1e-3, 2.0


def main(arguments: list[str]) -> int:
    if not llama_cpp_here():
        print(f"skipped: {HOW}")
        return 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        kl, speed = distances(Path(folder)), speeds(Path(folder))
    good = kl["Q8_0"] <= MOST_KL and (not speed or speed["llama.cpp Q4_0"] >= LEAST_SPEED * speed["torch float32"])
    print("bars kept" if good else "A BAR IS BROKEN")
    if "--store" in arguments:
        run = {"date": datetime.date.today().isoformat(), "processor": processor()}
        write_json(STORED, run | {"bundled, KL to ours": kl, "SmolLM2, tokens a CPU second": speed})
    return 0 if good else 1


def distances(folder: Path) -> dict[str, float]:
    """KL(ours || llama.cpp's) on the same weights, bundled model, 1,024 tokens, by mix."""
    model, tokenizer = load_lm(str(DATA / "model"))
    windows = token_stream(tokenizer, load_text("eval"))[:1024].view(4, 256)
    apart = {}
    for mix in ("F32", "Q8_0", "Q4_0", "Q4_K_M"):
        path = folder / f"{mix}.gguf"
        size = save_gguf(model, tokenizer, path, mix=mix, verify=True)
        ours = with_values_of(model, path)(windows).logits
        apart[mix] = kl_divergence(ours, llama_cpp_predictions(path, windows))
        print(f"{mix:7} {size:>10,} bytes   KL to ours {apart[mix]:.1e}", flush=True)
    return apart


def speeds(folder: Path) -> dict[str, float]:
    """Tokens written in a CPU second by SmolLM2; empty where its package is not installed."""
    if packaged_gguf() is None:
        print("SmolLM2 is not here: its speed is not measured")
        return {}
    model, tokenizer = load_lm("smollm2")
    prompt, path, tokens = token_stream(tokenizer, ["The capital of France is"]), folder / "smollm2.gguf", 24
    save_gguf(model, tokenizer, path, mix="Q4_0")
    theirs, ours = llama_cpp_speed(path, prompt, tokens=tokens), torch_speed(model, prompt, tokens=tokens)
    theirs = min(theirs.decode, llama_cpp_speed(path, prompt, tokens=tokens).decode)
    ours = min(ours, torch_speed(model, prompt, tokens=tokens))
    print(f"SmolLM2, tokens a CPU second: torch {1 / ours:.1f}, llama.cpp {1 / theirs:.1f}: {ours / theirs:.1f} times")
    return {"torch float32": 1 / ours, "llama.cpp Q4_0": 1 / theirs}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
