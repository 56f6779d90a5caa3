"""Make data/checkpoints/lsq, ternary and binary:  python -m recipes.learned_steps [lsq2 ternary "lsq2 finer" ...]

The texts, the teacher and the loop are those of recipes/minmax.py, so that its results can stand beside these. A run
that is cut off goes on where it stopped if it is started again with the same --work folder.
"""

import argparse
from functools import partial
from pathlib import Path

from quantlab.blocks import PerGroup
from quantlab.files import write_json
from quantlab.lm import DATA, load_lm
from quantlab.qat import LSQ, convert, prepare_qat
from quantlab.storage import save_tensors
from recipes import minmax

# Learned steps get the training of min-max at the same bits. Three and two values get as long a one as 2 bits; their
# rates are the better of 1e-3 and 3e-3 after 60 steps, 3e-3 lowered for the longer run.
RUNS = {
    "lsq2": {"method": "lsq", **minmax.RUNS["w2"]},
    "lsq3": {"method": "lsq", **minmax.RUNS["w3"]},
    "ternary": {"method": "ternary", "steps": 300, "learning_rate": 1e-3},
    "binary": {"method": "binary", "steps": 300, "learning_rate": 2e-3},
    # The same again from smaller steps.
    "lsq2 finer": {"method": "lsq", **minmax.RUNS["w2"], "start": 0.66},
    "lsq3 finer": {"method": "lsq", **minmax.RUNS["w3"], "start": 0.66},
}
LOG_ONLY = ("lsq3",)  # its weights would take the folder over 5 MB


def train(model, text: dict, *, method: str, bits: int | None = None, start: float = 1.0, **settings):
    """(trained model, log). start multiplies the learned steps before the first training step."""
    learned = partial(LSQ, bits=bits, granularity=PerGroup(minmax.GROUP), start=start)
    student = prepare_qat(model, method=learned if method == "lsq" else method, group_size=minmax.GROUP)
    log = {"method": method, "bits": bits, "group_size": minmax.GROUP, "start": start}
    return student, log | minmax.fit(model, student, text, "both", **settings)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.learned_steps", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=list(RUNS), help=f"{', '.join(RUNS)} (all)")
    parser.add_argument("--work", type=Path, help="a folder for checkpoints, to go on from")
    arguments = parser.parse_args()
    model, tokenizer = load_lm(DATA / "model")
    text = minmax.texts(model, tokenizer)
    for what in arguments.what:
        student, log = train(model, text, folder=arguments.work and arguments.work / what, **RUNS[what])
        out, name = DATA / "checkpoints" / RUNS[what]["method"], what.replace(" ", "_")
        write_json(out / f"{name}.json", log)
        if what not in LOG_ONLY:
            save_tensors(out / f"{name}.safetensors", convert(student)[1])
        print(what, f"KL on the held-out tokens {log['kl_held_out']:.4f}", flush=True)


if __name__ == "__main__":
    main()
