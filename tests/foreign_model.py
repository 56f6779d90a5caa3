"""Small language models of other kinds than the bundled one, made and trained here for less than a minute, on which
the notebooks must run to their last cell as well:  python tests/foreign_model.py FOLDER [opt | gpt2 | neox]

Nothing of them is the bundled model's: widths that are no multiples of 128, a vocabulary of 1,000, three blocks,
biases, LayerNorm, an untied head, other names, a shorter context.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, PreTrainedTokenizerFast

from quantlab.files import new_folder
from quantlab.lm import load_text, token_stream

VOCABULARY, CONTEXT = 1000, 320
SHAPE = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
KINDS = {
    "opt": OPTConfig(
        hidden_size=96, word_embed_proj_dim=96, ffn_dim=264, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CONTEXT, dropout=0.0, **SHAPE,
    ),
    "gpt2": GPT2Config(
        n_embd=96, n_inner=264, n_layer=3, n_head=4, n_positions=CONTEXT, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, **SHAPE,
    ),
    "neox": GPTNeoXConfig(
        hidden_size=96, intermediate_size=264, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CONTEXT, **SHAPE,
    ),
}  # fmt: skip


def make(folder, kind: str = "opt", *, steps: int = 400) -> Path:
    """A folder with such a model and its tokenizer, made unless it is there."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    stories = load_text("calibration")
    tokenizer = train_tokenizer(stories)
    model = train(KINDS[kind], token_stream(tokenizer, stories), steps)
    with new_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    return folder


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, that puts its begin token before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def train(config, tokens: torch.Tensor, steps: int):
    """Plain AdamW on windows of 128 tokens; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            starts = torch.randint(len(tokens) - 128, (4,))
            ids = torch.stack([tokens[s : s + 128] for s in starts])
            loss = model(ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


if __name__ == "__main__":
    make(*sys.argv[1:])
