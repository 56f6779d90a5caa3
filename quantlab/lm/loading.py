"""A language model and its texts, from a folder or the hub."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from quantlab.arguments import check_kind, check_list, check_path
from quantlab.storage import read_names

DATA = Path(__file__).resolve().parent.parent.parent / "data"
SEPARATOR = "<|endoftext|>"  # a line of it stands between two documents of a text file


def load_lm(name_or_path: str = "bundled"):
    """(model, tokenizer) of a causal language model, in float32 on the CPU, ready to evaluate.

    "bundled" is the model in data/model, or what the environment variable QUANTLAB_MODEL names. Else a folder,
    or a hub name like "org/name" or, to pin it, "org/name@revision". Only safetensors are read, no code is run.

    Raises: FileNotFoundError if there is no such folder, or the hub cannot give the model (offline, or unknown);
    ValueError if the folder was written by save_quantized, or its weights are damaged.
    """
    name = str(check_path(name_or_path, "name_or_path"))
    if name == "bundled":
        name = os.environ.get("QUANTLAB_MODEL") or "bundled"
    folder = DATA / "model" if name == "bundled" else Path(name).expanduser()
    if name == "bundled" and not folder.is_dir():
        raise FileNotFoundError(f"no bundled model: {folder} is missing; get the workbook, the whole of it")
    if not name or not folder.is_dir():
        folder = _download(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    if (folder / "quantized.safetensors").is_file():
        raise ValueError(f"{folder} holds a quantized model: load_quantized loads it")
    for file in folder.glob("*.safetensors"):
        read_names(file)
    small = sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 100e6
    with _quiet(small):  # no progress bar for what takes less than a second
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def _quiet(quiet: bool):
    """transformers' own progress bars off for a while, and then as they were."""
    shown = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _download(name: str) -> Path:
    """The local copy of a hub model, fetched through huggingface_hub where it is not yet in its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no model {name!r}: it is no folder here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}). "
            'Check the name and the connection, download it once and pass its folder, or use load_lm("bundled")'
        ) from error


def read_documents(paths) -> list[str]:
    """The documents of UTF-8 text files, which lines `<|endoftext|>` separate; empty ones are dropped.

    Raises: FileNotFoundError if a file is missing, ValueError if one holds no text.
    """
    documents = []
    for path in [paths] if isinstance(paths, str | Path) else check_list(paths, "paths"):
        path = check_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no text file {path}")
        try:
            found = [d.strip() for d in path.read_text(encoding="utf-8-sig").split(SEPARATOR)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text: {error}") from error
        if not any(found):
            raise ValueError(f"{path} holds no text")
        documents += [d for d in found if d]
    return documents


def load_text(name: str) -> list[str]:
    """The documents of "eval", "calibration" (stories), "style" (a ship's log), "code" (Python), or of a text file.

    The four were written for this workbook.

    Raises: FileNotFoundError if it is missing, ValueError if it holds no text.
    """
    path = DATA / "text" / f"{check_path(name, 'name')}.txt"
    return read_documents([path if path.is_file() else name])


def token_stream(tokenizer, documents) -> Tensor:
    """All documents as one row of ids, (tokens,) int64; the begin token, where the model has one, before each."""
    check_kind(tokenizer, "tokenizer", PreTrainedTokenizerBase, "load_lm gives")
    documents = [documents] if isinstance(documents, str) else check_list(documents, "documents")
    documents = [check_kind(document, "a document", str) for document in documents]
    if not documents:
        raise ValueError("there is no document to make tokens of")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in start + row], dtype=torch.int64)
