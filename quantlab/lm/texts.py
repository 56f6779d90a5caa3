"""Texts: documents from files, and documents as one row of tokens."""

import re
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantlab.arguments import check_kind, check_list, check_path

DATA = Path(__file__).resolve().parent.parent.parent / "data"
SEPARATOR = "<|endoftext|>"  # a line of it stands between two documents of a text file
_LINE = re.compile(rf"^[ \t]*{re.escape(SEPARATOR)}[ \t]*$", re.MULTILINE)


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
            found = [d.strip() for d in _LINE.split(path.read_text(encoding="utf-8-sig"))]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text (save it as UTF-8): {error}") from error
        if not any(found):
            raise ValueError(f"{path} holds no text")
        documents += [d for d in found if d]
    return documents


def load_text(name: str) -> list[str]:
    """The documents of a text of this workbook, or of a text file.

    "eval" and "calibration" are stories, "general" and "general_calibration" English of many kinds, "style" is a ship's
    log, "code" Python; data/text/README.md describes them.
    Raises: FileNotFoundError if it is missing, ValueError if it holds no text.
    """
    path = DATA / "text" / f"{check_path(name, 'name')}.txt"
    return read_documents([path if path.is_file() else name])


def token_stream(tokenizer, documents) -> Tensor:
    """All documents as one row of ids, (tokens,) int64, with what the tokenizer wants between them.

    That is its begin token before each document, if it puts one there itself, or if it is the end token too (GPT-2);
    for a tokenizer without either, an empty line. A document that begins with the begin token, as a chat template's
    text does, gets no second one.
    """
    check_kind(tokenizer, "tokenizer", PreTrainedTokenizerBase, "load_lm gives")
    documents = [documents] if isinstance(documents, str) else check_list(documents, "documents")
    documents = [check_kind(document, "a document", str) for document in documents]
    if not documents:
        raise ValueError("there is no document to make tokens of")
    begin = begin_token(tokenizer)
    if begin is None:
        documents = [*(f"{document}\n\n" for document in documents[:-1]), documents[-1]]
    ids = []
    for row in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids += row if begin is None or row[:1] == [begin] else [begin, *row]
    return torch.tensor(ids, dtype=torch.int64)


def begin_token(tokenizer) -> int | None:
    """The id that stands before a document: the begin token, if the tokenizer puts it there, or if it ends texts too.

    SmolLM2's tokenizer has a begin token that begins turns of a chat, and no document.
    """
    bos = check_kind(tokenizer, "tokenizer", PreTrainedTokenizerBase, "load_lm gives").bos_token_id
    if bos is None or bos == tokenizer.eos_token_id or tokenizer("a")["input_ids"][:1] == [bos]:
        return bos
    return None
