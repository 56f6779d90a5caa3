"""Make what notebook 14 loads:  python recipes/learned_steps.py [lsq2 ternary ...]     (README.md here says what came of it)

The texts, the teacher and the loop are those of recipes/minmax.py, so that its min-max rows can stand beside these.
A run that is cut off goes on where it stopped if it is started again with the same --work folder.
"""

import argparse
import json
import runpy
import time
from pathlib import Path

from quantlab.lm import divergence, load_lm
from quantlab.qat import convert, fake_quant_layers, prepare_qat
from quantlab.storage import save_tensors
from quantlab.train.loop import finetune

HERE = Path(__file__).resolve().parent
QAT = runpy.run_path(str(HERE.parent / "qat" / "make.py"))
# Learned steps get the training of min-max at the same bits. Three and two values get as long a one as 2 bits; their
# rates are the better of 1e-3 and 3e-3 after 60 steps, 3e-3 lowered for the longer run.
RUNS = {
    "lsq2": {"method": "lsq", **QAT["RUNS"]["w2"]},
    "lsq3": {"method": "lsq", **QAT["RUNS"]["w3"]},
    "ternary": {"method": "ternary", "steps": 300, "learning_rate": 1e-3},
    "binary": {"method": "binary", "steps": 300, "learning_rate": 2e-3},
    # The same again from smaller steps.
    "lsq2 finer": {"method": "lsq", **QAT["RUNS"]["w2"], "start": 0.66},
    "lsq3 finer": {"method": "lsq", **QAT["RUNS"]["w3"], "start": 0.66},
}

LOG_ONLY = ("lsq3",)  # its weights would take the folder over 5 MB


def train(model, text: dict, *, method: str, steps: int, learning_rate: float, bits=None, start=1.0, folder=None):
    """(trained model, log): the loss of every step, and KL(float || student) on the held-out tokens.

    start multiplies the learned steps before the first training step.
    """
    student = prepare_qat(model, method=method, bits=bits, group_size=QAT["GROUP"])
    for layer in fake_quant_layers(student).values():
        if method == "lsq":
            layer.rounding.step.data.mul_(start)
    settings = {key.lower(): QAT[key] for key in ("BATCH", "WINDOW")}
    settings |= {"steps": steps, "learning_rate": learning_rate}
    began, held_out = time.process_time(), text["held out"]
    history = finetune(student, text["both"], teacher=model, held_out=held_out, folder=folder, seed=0, **settings)
    log = {"method": method, "bits": bits, "group_size": QAT["GROUP"], "start": start, **settings, "seed": 0}
    log |= {"seconds": history.seconds, "cpu_seconds": time.process_time() - began}
    log |= {"kl_held_out": divergence(model, convert(student)[0], held_out).kl}
    log |= {"losses": [round(loss, 4) for loss in history.losses]}
    log |= {"held_out": [round(loss, 4) for loss in history.held_out], "checked_at": history.checked_at}
    return student, log | QAT["machine"]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=list(RUNS), help=f"{', '.join(RUNS)} (all)")
    parser.add_argument("--work", type=Path, help="a folder for checkpoints, to go on from")
    arguments = parser.parse_args()
    model, tokenizer = load_lm(HERE.parent / "model")
    text = QAT["texts"](model, tokenizer)
    for what in arguments.what:
        student, log = train(model, text, folder=arguments.work and arguments.work / what, **RUNS[what])
        name = what.replace(" ", "_")
        (HERE / f"{name}.json").write_text(json.dumps(log, indent=1) + "\n")
        if what not in LOG_ONLY:
            save_tensors(HERE / f"{name}.safetensors", convert(student)[1])
        print(what, f"KL on the held-out tokens {log['kl_held_out']:.4f}", flush=True)


if __name__ == "__main__":
    main()
