"""Train the adapters that notebook 15 shows:  python -m recipes.lora --out data/checkpoints/lora"""

import argparse
import copy
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from quantlab.files import write_json
from quantlab.lm import divergence, load_lm, load_text, perplexity, token_stream
from quantlab.train.loop import finetune
from quantlab.train.lora import RANKS, RECIPE, add_lora, nf4_model, save_adapters, style_tokens
from quantlab.train.memory import training_memory

FULL_RATE = 5e-4  # all weights at the adapters' rate would be far too fast


def measure(model, reference, held: Tensor, stories: Tensor) -> dict:
    """What a model has learnt and what it has forgotten: perplexity of the style, distance to the float model."""
    style, old = perplexity(model, held, window=RECIPE["window"]), divergence(reference, model, stories)
    return {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "memory": training_memory(model).total,
        "style": {"perplexity": style.value, "stderr": style.stderr, "nll": style.nll},
        "stories": {"kl": old.kl, "stderr": old.stderr, "perplexity": perplexity(model, stories).value},
    }


def main(argv=None) -> dict:
    """Train adapters of every rank and what they are compared with; write adapters and log.json; returns the log."""
    parser = argparse.ArgumentParser(prog="python -m recipes.lora", description=__doc__)
    parser.add_argument("--out", required=True, help="folder for rank_*.safetensors and log.json")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--steps", type=int, default=RECIPE["steps"])
    args, threads = parser.parse_args(argv), torch.get_num_threads()
    out, recipe = Path(args.out), RECIPE | {"steps": args.steps}
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_lm()
    train, held = style_tokens(tokenizer)
    stories, base = token_stream(tokenizer, load_text("eval"))[:4096], nf4_model(model)
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    jobs = {f"rank {rank}": (add_lora(base, rank=rank), train, {}) for rank in args.ranks}
    jobs["float base, rank 8"] = add_lora(model), train, {}
    jobs["all weights"] = copy.deepcopy(model), train, {"learning_rate": FULL_RATE}
    jobs["shuffled tokens, rank 8"] = add_lora(base), shuffled, {}
    log = {
        "command": shlex.join(["python", "-m", "recipes.lora", *(sys.argv[1:] if argv is None else argv)]),
        "on": f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}",
        "recipe": recipe | {"full_rate": FULL_RATE},
    }
    log["runs"] = {"float": measure(model, model, held, stories), "rank 0": measure(base, model, held, stories)}
    for name, (learner, tokens, options) in jobs.items():
        history = finetune(learner, tokens, **recipe | options, held_out=held)
        log["runs"][name] = measure(learner, model, held, stories) | {"history": asdict(history)}
        if name.startswith("rank"):
            save_adapters(out / f"{name.replace(' ', '_')}.safetensors", learner)
    write_json(out / "log.json", log)
    return log


if __name__ == "__main__":
    main()
