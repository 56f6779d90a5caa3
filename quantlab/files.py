"""Files that are whole or not there: written beside and renamed; what a killed process left is cleared away."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psutil
from safetensors import SafetensorError

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]  # a shared disk has processes of other machines on it
_NUMBERS = count()


def write_whole(
    path, content: str | bytes | Callable[[Path], object], check: Callable[[Path], object] | None = None
) -> int:
    """Write a file by way of one beside it, which reaches the disk and is renamed; returns its size in bytes.

    content is a text (UTF-8), bytes, or a function that writes to the path it is given; check(path), which may raise,
    looks at what was written. Whatever ends the writing, Ctrl-C included, the old file stays and nothing else does;
    what a killed process left beside it is removed here.

    Raises: FileNotFoundError if there is no such folder, OSError with the file's name if the disk does not take it.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent}")
    _sweep(path)
    part = _beside(path, "part")
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        if check is not None:
            check(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)
    return path.stat().st_size


def write_json(path, content) -> int:
    """Write content as a JSON file, whole or not at all."""
    return write_whole(path, json.dumps(content, indent=1) + "\n")


def read_json(path, keys: dict[str, type | tuple] | None = None):
    """What a JSON file holds. With keys ({"steps": int, ..}) it must be an object with these, of these types.

    Raises: FileNotFoundError if there is no file, ValueError that names the file (and the key) if it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte order mark in front
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is damaged: {error}") from error
    if keys is not None and not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(content).__name__}, not an object")
    for key, types in (keys or {}).items():
        if not isinstance(content.get(key), types):
            raise ValueError(f"{path} is damaged: {key!r} is {content.get(key, 'missing')!r}")
    return content


@contextmanager
def new_folder(folder) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `folder`: the old one is there until the new one is whole.

    Raises: OSError if a folder cannot be made or renamed; the old one is then where it was.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settle(folder)
    new, old = _beside(folder, "new"), _beside(folder, "old")
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def settle(folder) -> None:
    """Undo what a process killed inside new_folder left: the old folder comes back if there is none, the rest goes."""
    folder = Path(folder)
    for left in _leftovers(folder):
        if left.suffix == ".old" and not folder.exists():
            left.rename(folder)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _beside(path: Path, ending: str) -> Path:
    """A name that no other process or thread takes, and that says whose it is."""
    return path.with_name(f"{path.name}.{_HOST}-{os.getpid()}-{next(_NUMBERS)}.{ending}")


def _sweep(path: Path) -> None:
    for left in _leftovers(path):
        left.unlink(missing_ok=True)


def _leftovers(path: Path) -> list[Path]:
    """What processes of this machine that run no more left beside a file or folder."""
    found = []
    for left in sorted(path.parent.glob(f"{_escaped(path.name)}.{_HOST}-*-*.*")) if path.parent.is_dir() else []:
        owner = left.name.removeprefix(f"{path.name}.{_HOST}-").partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            found.append(left)
    return found


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
