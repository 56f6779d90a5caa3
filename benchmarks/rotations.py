"""What rotations give back, against the bars, and the time of the transform:  python -m benchmarks.rotations [tokens]

The planted bundled model and SmolLM2 (where installed), each as it is, smoothed, rotated, and by a learned rotation;
8 bits with a fixed scale a tensor and with one a token, 4 bits a token. About ten minutes on one idle core.
"""

import sys
import time

import torch

from quantlab.lm import (
    DATA,
    activation_scales,
    capture_inputs,
    divergence,
    linear_layers,
    load_lm,
    load_text,
    quantize_lm,
    token_stream,
)
from quantlab.methods import W4A4, W8A8
from quantlab.outliers import plant_outliers, smooth
from quantlab.rotations import fold_norms, hadamard, hadamard_transform, learn_rotation, random_hadamard, rotate

STATIC, TOKEN = W8A8(per="static"), W8A8(per="token")
NEAREST, CLIP = W4A4(), W4A4(rounding="clip")


def transform_speed() -> bool:
    """Medians of the ratio in turns, on one thread."""
    torch.set_num_threads(1)
    x, matrix = torch.randn(4096, 1536), hadamard(1536)
    ways = {"copy": x.clone, "transform": lambda: hadamard_transform(x), "product": lambda: x @ matrix}
    times = {way: [] for way in ways}
    for _ in range(7):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - start)
    copy, fast, product = (min(row) for row in times.values())
    met = fast <= 3 * copy
    print(
        f"transform of (4096, 1536): {fast / copy:.1f} times a copy, {product / fast:.1f} times as fast as the product"
        f"   at most 3 copies: {'met' if met else 'MISSED'}"
    )
    return met


def learned(model, calibration, steps: int = 100):
    """A rotation learned on a share of what the norms give out, and of the weights that read them."""
    folded = fold_norms(model)
    width, layers = folded.config.hidden_size, linear_layers(folded)
    reads = [name for name in layers if name.endswith(("q_proj", "gate_proj"))]
    x = torch.cat([x[:: len(reads) // 2] for x in capture_inputs(folded, calibration[:256], reads).values()])
    rows = torch.cat([m.weight.detach() for m in layers.values() if m.in_features == width])
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: len(x)]
    return learn_rotation([x, rows[some]], start=random_hadamard(width), steps=steps, learning_rate=0.005)


def ratios(name: str, model, reference, calibration, text, methods: dict, bars: dict) -> bool:
    """KL of every way and method, one line each; a bar is on KL(rotated) over KL(as it is)."""
    makers = {
        "as it is": lambda: model,
        "smoothed": lambda: smooth(model, activation_scales(model, calibration)),
        "rotated": lambda: rotate(model),
        "learned": lambda: rotate(model, learned(model, calibration)),
    }
    kl = {}
    for way, make in makers.items():
        new = make()
        for what, method in methods.items():
            tokens = None if not method.needs_data else calibration
            kl[way, what] = divergence(reference, quantize_lm(new, tokens, method, progress=False)[0], text).kl
            print(f"{name:10}{way:10}{what:22}KL {kl[way, what]:.5f}", flush=True)
    met = True
    for what, bar in bars.items():
        ratio = kl["rotated", what] / kl["as it is", what]
        met &= ratio <= bar
        said = "met" if ratio <= bar else "MISSED"
        print(f"{name:10}{what:22}rotated over as it is {ratio:.3f}   at most {bar}: {said}")
    return met


def main(count: int = 1024) -> int:
    met = [transform_speed()]
    methods = {"W8A8 static": STATIC, "W8A8 token": TOKEN, "W4A4 nearest": NEAREST, "W4A4 clip": CLIP}
    model, tokenizer = load_lm(str(DATA / "model"))
    texts = [token_stream(tokenizer, load_text(name))[:count] for name in ("calibration", "eval")]
    planted = plant_outliers(model, channels=range(0, 240, 40), factor=100)
    met.append(
        ratios(
            "planted",
            planted,
            model,
            *texts,
            methods | {"W8A8 tensor": W8A8()},
            {"W8A8 tensor": 0.1, "W8A8 static": 0.1},
        )
    )
    try:
        large, tokenizer = load_lm("smollm2")
    except FileNotFoundError as why:
        print("SmolLM2 is left out:", why)
    else:
        texts = [token_stream(tokenizer, load_text(name))[:count] for name in ("general_calibration", "general")]
        met.append(ratios("SmolLM2", large, large, *texts, methods, {"W8A8 static": 0.35, "W4A4 clip": 0.35}))
    return 0 if all(met) else 1


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main(*map(int, sys.argv[1:])))
