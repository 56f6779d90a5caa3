"""Make data/checkpoints/minmax:  python -m recipes.minmax [w2 w3 w4 texts]

A run that is cut off goes on where it stopped if it is started again with the same --work folder.
"""

import argparse
import os
import platform
import time
from pathlib import Path

import torch

from quantlab.files import write_json
from quantlab.lm import DATA, divergence, load_lm, load_text, token_stream
from quantlab.qat import convert, prepare_qat
from quantlab.storage import save_tensors
from quantlab.train.loop import finetune, sample_text_tokens

OUT = DATA / "checkpoints/minmax"
HELD_OUT = 4096  # the last tokens of the calibration text: not trained on, to choose settings by
# How they were chosen: README.md there. The more bits, the less there is to repair, and the smaller the steps to do it.
RUNS = {
    "w2": {"bits": 2, "steps": 300, "learning_rate": 1e-3},
    "w3": {"bits": 3, "steps": 400, "learning_rate": 5e-4},
    "w4": {"bits": 4, "steps": 400, "learning_rate": 1.5e-4},
}
GROUP, BATCH, WINDOW, SHORT = 128, 4, 128, 60


def texts(model, tokenizer) -> dict[str, torch.Tensor]:
    """The streams to train on, and the tokens held out of all of them."""
    calibration = token_stream(tokenizer, load_text("calibration"))
    stories, held_out = calibration[:-HELD_OUT], calibration[-HELD_OUT:]
    own = sample_text_tokens(model, 128, 256, seed=0).flatten()
    # three times the stories, which are scarce and nearer to what the model is measured on
    return {"stories": stories, "own": own, "both": torch.cat([stories] * 3 + [own]), "held out": held_out}


def fit(model, student, text: dict, stream: str, *, steps, learning_rate, distill=True, folder=None) -> dict:
    """Train the student in place; the log: the loss of every step, and the KL on the held-out tokens."""
    settings = {"steps": steps, "batch": BATCH, "window": WINDOW, "learning_rate": learning_rate}
    teacher, held_out, began = model if distill else None, text["held out"], time.process_time()
    history = finetune(student, text[stream], teacher=teacher, held_out=held_out, folder=folder, **settings)
    # held out: KL(float || student), or the negative log-likelihood where there is no teacher
    kl = divergence(model, convert(student)[0], held_out).kl
    log = settings | {"text": stream, "teacher": distill, "seed": 0}
    log |= {"kl_held_out": kl, "seconds": history.seconds, "cpu_seconds": time.process_time() - began}
    log |= {"losses": [round(loss, 4) for loss in history.losses]}
    log |= {"held_out": [round(loss, 4) for loss in history.held_out], "checked_at": history.checked_at}
    return log | machine()


def train(model, text: dict, stream: str, *, bits: int, **settings):
    """(trained model, log) at so many bits."""
    student = prepare_qat(model, bits=bits, group_size=GROUP)
    return student, {"bits": bits, "group_size": GROUP} | fit(model, student, text, stream, **settings)


def machine() -> dict:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used",
        "torch": torch.__version__,
    }


def compare_texts(model, text: dict) -> dict:
    """Four short trainings at 2 bits: which text, and with a teacher or without."""
    found = {}
    for stream, distill in (("stories", True), ("own", True), ("both", True), ("stories", False)):
        _, log = train(model, text, stream, bits=2, steps=SHORT, learning_rate=1e-3, distill=distill)
        name = stream if distill else f"{stream}, no teacher"
        found[name] = log
        print(name, f"KL on the held-out tokens {log['kl_held_out']:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.minmax", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=[*RUNS, "texts"], help="w2, w3, w4, texts (default: all)")
    parser.add_argument("--work", type=Path, help="a folder for checkpoints, to go on from")
    arguments = parser.parse_args()
    model, tokenizer = load_lm(DATA / "model")
    text = texts(model, tokenizer)
    for what in arguments.what:
        if what == "texts":
            write_json(OUT / "texts.json", compare_texts(model, text))
            continue
        folder = arguments.work and arguments.work / what
        student, log = train(model, text, "both", **RUNS[what], folder=folder)
        size = save_tensors(OUT / f"{what}.safetensors", convert(student)[1])
        write_json(OUT / f"{what}.json", log)
        print(what, f"{size} bytes, KL on the held-out tokens {log['kl_held_out']:.4f}", flush=True)


if __name__ == "__main__":
    main()
