"""A byte-level BPE tokenizer as llama.cpp stores it: tokens, their kinds, merges, the name of the splitting rule."""

import json

from quantlab.lm.texts import begin_token

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens
_PLAIN = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS = {"gpt-2": [_PLAIN], "smollm": [_DIGITS, _PLAIN]}  # llama.cpp's name: what tokenizers do before merging


def tokenizer_metadata(tokenizer, vocabulary: int) -> dict:
    """The keys tokenizer.* of a GGUF file. vocabulary: rows of the embedding; those without a token are marked unused.

    Raises: ValueError if it is no byte-level BPE of the tokenizers library, splits texts as llama.cpp cannot, or has
    more tokens than the embedding has rows.
    """
    stored = _stored(tokenizer)
    tokens = {**stored["model"]["vocab"], **{t["content"]: t["id"] for t in stored["added_tokens"]}}
    if max(tokens.values()) >= vocabulary:
        raise ValueError(f"the tokenizer has ids up to {max(tokens.values())}, the embedding {vocabulary} rows")
    names, kinds = [f"[PAD{i}]" for i in range(vocabulary)], [UNUSED] * vocabulary
    for token, i in tokens.items():
        names[i], kinds[i] = token, NORMAL
    for token in stored["added_tokens"]:
        kinds[token["id"]] = CONTROL if token["special"] else USER
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["model"]["merges"]]
    ids = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {f"{ours}_token_id": getattr(tokenizer, f"{theirs}_token_id") for ours, theirs in ids.items()}
    about = {"model": "gpt2", "pre": _split(stored), "tokens": names, "token_type": kinds, "merges": merges}
    about |= {key: i for key, i in ids.items() if i is not None}
    about |= {"add_bos_token": begin_token(tokenizer) is not None, "add_space_prefix": False}
    template = {"tokenizer.chat_template": tokenizer.chat_template} if isinstance(tokenizer.chat_template, str) else {}
    return {f"tokenizer.ggml.{key}": value for key, value in about.items()} | template


def _stored(tokenizer) -> dict:
    """What tokenizer.json says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    stored = {} if backend is None else json.loads(backend.to_str())
    if stored.get("model", {}).get("type") != "BPE" or stored["model"].get("byte_fallback") or stored["normalizer"]:
        raise ValueError(
            f"need a byte-level BPE tokenizer of the tokenizers library, as GPT-2, SmolLM2 and the bundled model have; "
            f"got {type(tokenizer).__name__}"
        )
    return stored


def _split(stored: dict) -> str:
    found = stored["pre_tokenizer"] or {}
    steps = found.get("pretokenizers", [found])
    for name, rule in SPLITS.items():
        if len(steps) == len(rule) and all(
            want.items() <= step.items() for want, step in zip(rule, steps, strict=True)
        ):
            return name
    raise ValueError(f"this tokenizer splits texts before merging in a way without a name here: {json.dumps(found)}")
