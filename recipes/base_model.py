"""Train the small Llama that the workbook ships:  python -m recipes.base_model --help"""

import argparse
import json
import math
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantlab.files import write_json
from quantlab.lm import SEPARATOR, load_lm, perplexity, read_documents, token_stream
from quantlab.train.loop import batch_at, loss_on
from quantlab.train.run import Run


def train_tokenizer(documents, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts `<|endoftext|>` (begin, end and padding in one) before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[SEPARATOR],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, tokenizer.token_to_id(SEPARATOR))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        clean_up_tokenization_spaces=False,
    )


def new_model(
    tokenizer, *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, context: int, seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings. Residual outputs start smaller, as in GPT-2."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.data.div_(math.sqrt(2 * layers))
    return model


def add_dropout(model, p: float) -> None:
    """Drop outputs of the embedding and of each attention and MLP while training (Llama itself has none)."""

    def drop(module, _inputs, output):
        return F.dropout(output, p, module.training)

    for block in model.model.layers:
        block.self_attn.o_proj.register_forward_hook(drop)
        block.mlp.down_proj.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)


def learning_rate(step: int, *, peak: float, steps: int, warmup: int = 100, decay: float = 0.4) -> float:
    """Up in a line, level, then down in a line over the last `decay` of the steps.

    Level in the middle, so that a run can be given more steps before its decay begins without redoing any.
    """
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def bits_per_character(model, tokenizer, documents, *, context: int) -> float:
    """Negative log-likelihood of the documents (one stream, windows of `context`), in bits per character."""
    found = perplexity(model, token_stream(tokenizer, documents), window=context)
    return found.nll * found.tokens / math.log(2) / sum(len(d) for d in documents)


def make_optimizers(model, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norm gains.

    Muon: Jordan 2024, as torch.optim has it, with steps scaled to AdamW's size.
    """
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    rest = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    return [
        torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def mixed_loss(model, ids: Tensor) -> Tensor:
    """The loss of the training loop, computed in bfloat16 autocast."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        return loss_on(model, ids)


def train(model, tokenizer, documents, args: argparse.Namespace) -> list:
    """Train in place, checkpoints in `args.out`.checkpoint; the log: (step, train loss, held-out bits per character).

    The last `args.hold_out` documents are never trained on; they measure progress. A run that goes on may have other
    settings than it had before.
    """
    model.to(args.device)
    add_dropout(model, args.dropout)
    held, documents = documents[len(documents) - args.hold_out :], documents[: len(documents) - args.hold_out]
    stream = token_stream(tokenizer, documents)
    loss = partial(torch.compile(mixed_loss) if args.compile else mixed_loss, model)
    rate = partial(learning_rate, peak=args.rate, steps=args.steps)
    run = Run(model, make_optimizers(model, args.weight_decay), rate=rate, loss=loss, seed=args.seed)
    batch_of = partial(batch_at, stream, batch=args.batch, window=args.context, seed=args.seed)
    measure = partial(bits_per_character, model, tokenizer, held, context=args.context)
    history = run.go(batch_of, args.steps, args.every, measure=measure, folder=f"{args.out}.checkpoint")
    measured = zip(pairwise(history.checked_at), history.held_out[1:], strict=True)
    return [(end, sum(history.losses[begin:end]) / (end - begin), bits) for (begin, end), bits in measured]


SIZES = {"hidden": 256, "intermediate": 768, "layers": 4, "heads": 8, "kv_heads": 4, "vocab": 2048}
LENGTHS = {"context": 512, "batch": 16, "steps": 1600, "every": 100, "seed": 0, "hold_out": 300}
RATES = {"rate": 4e-3, "weight_decay": 0.1, "dropout": 0.0}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.base_model", description=__doc__)
    parser.add_argument("--train", nargs="+", required=True, help="text files, <|endoftext|> between documents")
    parser.add_argument("--out", required=True, help="folder for the model; OUT.checkpoint holds the way there")
    parser.add_argument("--start-from", help="folder of a model to go on from, instead of random weights")
    parser.add_argument("--test", help="text file whose first 300 documents are measured once, at the end")
    for name, value in (SIZES | LENGTHS | RATES).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"({value})")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss: slow at first, then faster")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    """Train, save model and tokenizer in 16 bits, and write what was done to training.json."""
    args, began = parse(argv), time.time()
    out, documents = Path(args.out), read_documents(args.train)
    if args.start_from:
        model, tokenizer = load_lm(args.start_from)
    else:
        tokenizer = train_tokenizer(documents[: len(documents) - args.hold_out], args.vocab)
        sizes = {name: getattr(args, name) for name in SIZES if name != "vocab"}
        model = new_model(tokenizer, **sizes, context=args.context, seed=args.seed)
    log = train(model, tokenizer, documents, args)
    model = model.eval().to(torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": args.steps * args.batch * args.context,
        "seconds_of_this_run": round(time.time() - began),
        "texts": [Path(name).name for name in args.train],
        "settings": {name: getattr(args, name) for name in SIZES | LENGTHS | RATES},
        "log": log,
    }
    if args.test:
        test = read_documents([args.test])[:300]
        report["test_bits_per_character"] = bits_per_character(model.float(), tokenizer, test, context=args.context)
    write_json(out / "training.json", report)
    return report


if __name__ == "__main__":
    print(json.dumps({key: value for key, value in main().items() if key != "log"}))
