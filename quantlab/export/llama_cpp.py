"""llama.cpp itself on a GGUF file, by way of Node and its package node-llama-cpp, which recipes.llama_cpp gets."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantlab.arguments import check_codes, check_file, check_int, check_kind, check_model
from quantlab.export.gguf_file import read_gguf
from quantlab.files import read_json
from quantlab.modules import evaluating

HOW = "llama.cpp is not here; `python -m recipes.llama_cpp` gets it (80 MB; Node 20 must be installed, no compiler)"
FOLDER = Path(__file__).resolve().parent.parent.parent / ".llama_cpp"  # where the recipe puts it
STORED = FOLDER.parent / "data" / "llama_cpp.json"  # what benchmarks/llama_cpp.py --store measured
SCRIPT = Path(__file__).with_name("llama_cpp.mjs")


@dataclass(frozen=True)
class Speed:
    """What one thread of the CPU needs, in CPU seconds, and what was written in them."""

    decode: float  # per token written
    ids: tuple[int, ...]
    text: str


def llama_cpp_here() -> bool:
    """Whether llama.cpp can be run: Node is on the path, node-llama-cpp in its folder (or in QUANTLAB_LLAMA_CPP)."""
    return shutil.which("node") is not None and _package().is_file()


def llama_cpp_predictions(path, windows: Tensor) -> Tensor:
    """log p of each next token by llama.cpp, (windows, tokens, vocabulary), float32: what it predicts after each token.

    Shapes: windows (windows, tokens), ids. Each is read from the start. Chances below 1e-30 count as that.
    Raises: FileNotFoundError if there is no file, or no llama.cpp; RuntimeError with its words if it fails.
    """
    if check_codes(windows, "windows").ndim != 2 or windows.numel() == 0:
        raise ValueError(f"windows must be ids (windows, tokens), got shape {tuple(windows.shape)}")
    vocabulary = read_gguf(path).metadata["llama.vocab_size"]
    if windows.min() < 0 or windows.max() >= vocabulary:
        raise ValueError(f"token ids lie in 0..{vocabulary - 1}, got {int(windows.min())}..{int(windows.max())}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "probabilities"
        _run(path, context=windows.shape[1] + 1, windows=windows.tolist(), out=str(out))
        chances = torch.from_numpy(np.fromfile(out, np.float32))
    return chances.view(*windows.shape, vocabulary).clamp(min=1e-30).log()


def llama_cpp_speed(path, prompt: Tensor, *, tokens: int = 32, rounds: int = 2) -> Speed:
    """How fast llama.cpp goes on after a prompt (tokens,), with the likeliest tokens; the least time of the rounds.

    Raises: FileNotFoundError, RuntimeError as llama_cpp_predictions does.
    """
    tokens, rounds = check_int(tokens, "tokens", 1), check_int(rounds, "rounds", 1)
    if check_codes(prompt, "prompt").ndim != 1 or len(prompt) < 2:
        raise ValueError(f"prompt must be at least two ids, got shape {tuple(prompt.shape)}")
    room = len(prompt) + tokens + 1
    got = _run(path, context=room, prompt=prompt.tolist(), tokens=tokens, rounds=rounds)
    return Speed(got["decode"], tuple(got["said"]), got["written"])


def torch_speed(model, prompt: Tensor, *, tokens: int = 32) -> float:
    """CPU seconds that torch needs for each token it writes after the prompt: the likeliest, with a cache."""
    tokens = check_int(tokens, "tokens", 1)
    with torch.no_grad(), evaluating(check_model(model)):
        out = model(prompt[None], use_cache=True)
        began = time.process_time()
        for _ in range(tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return (time.process_time() - began) / tokens


def llama_cpp_tokens(path, text: str) -> list[int]:
    """The ids that llama.cpp makes of a text, without the begin token."""
    return _run(path, context=64, text=check_kind(text, "text", str))["ids"]


def stored_run(key: str) -> str:
    """What was measured once, on another machine, with its date and processor; for readers who have no llama.cpp."""
    run = read_json(STORED, {key: dict, "date": str, "processor": str})
    return (
        ", ".join(f"{what} {value:.3g}" for what, value in run[key].items()) + f" ({run['date']}, {run['processor']})"
    )


def _package() -> Path:
    folder = Path(os.environ.get("QUANTLAB_LLAMA_CPP") or FOLDER)
    return folder / "node_modules" / "node-llama-cpp" / "dist" / "index.js"


def _run(path, **request) -> dict:
    path = check_file(path).resolve()
    if not llama_cpp_here():
        raise FileNotFoundError(HOW)
    request |= {"package": str(_package()), "model": str(path)}
    done = subprocess.run(["node", str(SCRIPT)], input=json.dumps(request), capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"llama.cpp did not run {path.name}: {done.stderr.strip()[-600:]}")
    return json.loads(done.stdout.splitlines()[-1])
