"""A walk that was interrupted goes on where it stopped: every finished block is a file in a folder."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quantlab.arguments import check_path
from quantlab.files import read_json, write_json
from quantlab.lm.report import LayerReport
from quantlab.storage import load_tensors, save_tensors

WALK = "walk.json"


@dataclass
class Checkpoint(Mapping):
    """The finished blocks of one walk. As a mapping: quantized tensors by layer name, read from disk when asked for."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)  # by layer
    _last: tuple = (None, None)  # the file read last, and what it held

    def load(self, i: int) -> list[LayerReport] | None:
        """The report's rows of block i, whose tensors are in the mapping from now on; None if it is not done."""
        path = self._path(i)
        if not path.exists():
            return None
        rows = _rows(path.with_suffix(".json"))
        self.files |= {row.name: path for row in rows}
        return rows

    def save(self, i: int, qtensors: dict, rows: list[LayerReport]) -> None:
        """Write block i. The tensors come last, whole or not at all: they are the sign that the block is done."""
        path = self._path(i)
        write_json(path.with_suffix(".json"), rows)
        save_tensors(path, qtensors)
        self.files |= {name: path for name in qtensors}

    def _path(self, i: int) -> Path:
        return self.folder / f"block_{i:03}.safetensors"

    def __getitem__(self, name: str):
        path = self.files[name]
        if self._last[0] != path:
            self._last = path, load_tensors(path)
        return self._last[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def open_checkpoint(folder, model, tokens: Tensor, what: dict) -> Checkpoint:
    """The checkpoint of this walk (model, tokens, method, settings) in the folder; an empty one if it is new.

    Raises: ValueError if the folder holds another walk, or files that are not of a walk.
    """
    folder = check_path(folder, "checkpoint")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"checkpoint must be a folder, and {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    # As JSON gives it back: a tuple becomes a list
    wanted = json.loads(json.dumps(what | {"model": fingerprint(model), "tokens": hash_tensors({"tokens": tokens})}))
    path = folder / WALK
    if path.exists():
        there = read_json(path, {"model": str, "tokens": str})
        other = sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key))
        if other:
            raise ValueError(f"{folder} holds a walk with another {', '.join(other)}; choose an empty folder")
    elif any(file.suffix != ".part" for file in folder.iterdir()):
        raise ValueError(f"{folder} holds files, but no {WALK}; choose an empty folder")
    else:
        write_json(path, wanted)
    return Checkpoint(folder)


def fingerprint(model) -> str:
    """A hash of all weights by name, and of the configuration but where it was found: equal ones compute the same."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    return hash_tensors(model.state_dict(), about=json.dumps(config, sort_keys=True, default=str))


def hash_tensors(tensors: Mapping[str, Tensor | None], *, about: str = "") -> str:
    """A hash of named tensors, their shapes and dtypes, and of a text about them; None: there is no such tensor."""
    digest = hashlib.sha256(about.encode())
    for name, x in tensors.items():
        digest.update(f"{name} {None if x is None else (tuple(x.shape), str(x.dtype))}".encode())
        if x is not None:
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _rows(path: Path) -> list[LayerReport]:
    """The report's rows in a file. Raises ValueError with its name if it is damaged."""
    try:
        rows = [LayerReport(*row) for row in read_json(path)]
        if not rows or not all(isinstance(row.name, str) for row in rows):
            raise TypeError("a row has no name")
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return rows
