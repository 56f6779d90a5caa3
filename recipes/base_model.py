"""Train the small Llama that the workbook ships:  python -m recipes.base_model --help"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantlab.lm import SEPARATOR, load_lm, read_documents, token_stream


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


def batch_at(stream: Tensor, step: int, *, batch: int, context: int, seed: int) -> Tensor:
    """The batch of a step, (batch, context + 1): a function of (seed, step) alone, so a resumed run sees the same.

    Each epoch cuts the stream at a new random offset into windows and deals them out in a new random order.
    """
    per_epoch = max(1, (len(stream) - context - 1) // context // batch)
    epoch, index = divmod(step, per_epoch)
    random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    windows = (len(stream) - 1) // context - 1
    offset = torch.randint(context, (1,), generator=random)
    chosen = torch.randperm(windows, generator=random)[index * batch : (index + 1) * batch]
    return stream[(offset + chosen * context)[:, None] + torch.arange(context + 1)]


def learning_rate(step: int, *, peak: float, steps: int, warmup: int = 100, decay: float = 0.4) -> float:
    """Up in a line, level, then down in a line over the last `decay` of the steps.

    Level in the middle, so that a run can be given more steps before its decay begins without redoing any.
    """
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


@torch.no_grad()
def bits_per_character(model, tokenizer, documents, *, context: int) -> float:
    """Negative log-likelihood of the documents (one stream, windows of `context`), in bits per character."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    stream, nll = token_stream(tokenizer, documents), 0.0
    for window in stream.split(context):
        ids = window[None].to(device)
        logits = model(ids).logits[0, :-1].float()
        nll += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    model.train(was_training)
    return nll / math.log(2) / sum(len(d) for d in documents)


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


def save_checkpoint(folder: Path, model, optimizers, tokenizer, step: int, log: list) -> None:
    """Weights and optimizer state (safetensors), then progress (json), which makes the new step count.

    Each file is written whole and renamed, so a run that is cut off goes on from the last complete checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    moments = {
        f"{n}.{i}.{key}": value.contiguous().cpu()
        for n, optimizer in enumerate(optimizers)
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    weights = {name: p.detach().contiguous().cpu() for name, p in model.named_parameters()}
    for name, tensors in {"optimizer": moments, "weights": weights}.items():
        save_file(tensors, folder / f"{name}.part")
        os.replace(folder / f"{name}.part", folder / f"{name}.{step}.safetensors")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "progress.part").write_text(json.dumps({"step": step, "log": log}))
    os.replace(folder / "progress.part", folder / "progress.json")
    for old in folder.glob("*.safetensors"):
        if old.name.split(".")[1] != str(step):
            old.unlink()


def load_checkpoint(folder: Path, model, optimizers) -> tuple[int, list]:
    """Put a checkpoint's weights and optimizer state into place; returns (steps done, log)."""
    progress = json.loads((folder / "progress.json").read_text())
    step = progress["step"]
    weights = load_file(folder / f"weights.{step}.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])
    states: list[dict] = [{} for _ in optimizers]
    for key, value in load_file(folder / f"optimizer.{step}.safetensors").items():
        n, index, name = key.split(".", 2)
        states[int(n)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step, progress["log"]


def next_token_loss(model, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of ids[:, 1:], in nats per token, computed in bfloat16 autocast."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train_step(model, optimizers, ids: Tensor, rate: float, loss_of=next_token_loss) -> float:
    """One step of every optimizer at this learning rate; returns the loss before it."""
    loss = loss_of(model, ids)
    model.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return loss.item()


def train(model, tokenizer, documents, args: argparse.Namespace) -> list:
    """Train in place, checkpoints in `args.out`.checkpoint; the log: (step, train loss, held-out bits per character).

    The last `args.hold_out` documents are never trained on; they measure progress.
    """
    folder, context = Path(f"{args.out}.checkpoint"), args.context
    model.to(args.device).train()
    add_dropout(model, args.dropout)
    optimizers = make_optimizers(model, args.weight_decay)
    start, log = load_checkpoint(folder, model, optimizers) if (folder / "progress.json").exists() else (0, [])
    held, documents = documents[len(documents) - args.hold_out :], documents[: len(documents) - args.hold_out]
    stream = token_stream(tokenizer, documents)
    torch.manual_seed(args.seed + start)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=f"{len(stream):,} tokens an epoch")
    losses, loss_of = [], torch.compile(next_token_loss) if args.compile else next_token_loss
    for step in bar:
        ids = batch_at(stream, step, batch=args.batch, context=context, seed=args.seed).to(args.device)
        losses.append(
            train_step(model, optimizers, ids, learning_rate(step, peak=args.rate, steps=args.steps), loss_of)
        )
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            bits = bits_per_character(model, tokenizer, held, context=context)
            log.append((step + 1, sum(losses) / len(losses), bits))
            losses = []
            bar.set_postfix(loss=f"{log[-1][1]:.3f}", bits_per_char=f"{bits:.4f}")
            save_checkpoint(folder, model, optimizers, tokenizer, step + 1, log)
    return log


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
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    print(json.dumps({key: value for key, value in main().items() if key != "log"}))
