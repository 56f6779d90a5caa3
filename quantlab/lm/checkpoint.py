"""A walk that was interrupted goes on where it stopped: every finished block is a file in a folder."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

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
        rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.files |= {row[0]: path for row in rows}
        return [LayerReport(*row) for row in rows]

    def save(self, i: int, qtensors: dict, rows: list[LayerReport]) -> None:
        """Write block i. The tensors come last, whole or not at all: they are the sign that the block is done."""
        path = self._path(i)
        _write(path.with_suffix(".json"), json.dumps(rows))
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # As JSON gives it back: a tuple becomes a list
    wanted = json.loads(json.dumps(what | {"model": fingerprint(model), "tokens": hash_tensors({"tokens": tokens})}))
    path = folder / WALK
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key))
        if other:
            raise ValueError(f"{folder} holds a walk with another {', '.join(other)}; choose an empty folder")
    elif any(file.suffix != ".part" for file in folder.iterdir()):
        raise ValueError(f"{folder} holds files, but no {WALK}; choose an empty folder")
    else:
        _write(path, json.dumps(wanted))
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


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)  # whole or not at all
