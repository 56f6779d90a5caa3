"""What is refused, by name: an entry that would win without being a smaller model."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from quantlab.capstone.hidden import TEXTS, path_of
from quantlab.lm import embedding_layers, linear_layers, load_quantized
from quantlab.lm.saving import TOKENIZER_FILES, WEIGHTS
from quantlab.storage import load_tensors

CHEATS = {
    "hidden text": "the recipe read the text that it is scored on; choose on the calibration text instead",
    "smuggled tensors": "there are tensors that the model has not, such as floats in buffers; only its weights count",
    "changed tokenizer": "the tokenizer cuts text otherwise than the model's own, and would change what is measured",
    "changed configuration": "the configuration is not the model's own, and numbers hidden there would not be counted",
    "code in the file": "the folder holds a program, or a file that runs one when it is opened; only numbers count",
    "other files": "the folder holds files beside the weights, whose bytes would not be counted",
}
_PROGRAMS = {".py", ".pyc", ".so", ".dll", ".pyd", ".sh", ".exe", ".bat", ".bin", ".pt", ".pth", ".ckpt", ".onnx"}
_PROGRAMS |= {".pkl", ".npy", ".joblib", ".dill"}  # Python runs what these name when it reads them
_ALLOWED = {"config.json", "generation_config.json", WEIGHTS, *TOKENIZER_FILES}
_OWN = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}  # may differ: saving sets them


class Refused(ValueError):
    """An entry that is refused. cheat is the name, a key of CHEATS."""

    def __init__(self, cheat: str, detail: str):
        super().__init__(f"refused: {cheat} ({detail}): {CHEATS[cheat]}")
        self.cheat = cheat


# --- the hidden text --------------------------------------------------------------------------------------------

_watching: list[list] = []  # one list of what was opened for each recipe that runs


def _watch(event: str, arguments: tuple) -> None:
    """Python tells its audit hooks of each file that Python code opens or renames, and of programs that it starts.

    A C library that opens a file by itself, or a program that is not told the name, passes by.
    """
    if not _watching:
        return
    texts = ()
    if event in ("open", "os.rename", "os.link", "os.symlink"):
        texts = [text for text in TEXTS if _same_file(arguments[0], path_of(text))]
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"):
        texts = [text for text in TEXTS if path_of(text).name in repr(arguments)]
    for text in texts:
        _watching[-1].append(path_of(text).name)
        raise Refused("hidden text", f"{path_of(text).name} was opened")


def _same_file(name, path: Path) -> bool:
    """Whether a name, of whatever type and by whatever way, leads to this file."""
    try:
        return isinstance(name, str | bytes | os.PathLike) and os.path.samefile(name, path)
    except (OSError, ValueError):  # there is none of this name, or the name is none
        return False


@contextmanager
def watched() -> Iterator[None]:
    """Refuse to open the hidden text for a while, and afterwards whoever tried, even if it caught the error."""
    if not getattr(sys, "_quantlab_watches", False):  # a hook stays for as long as Python runs, so there is one
        sys.addaudithook(_watch)
        sys._quantlab_watches = True
    seen = []
    _watching.append(seen)
    try:
        yield
    finally:
        _watching.remove(seen)
    if seen:
        raise Refused("hidden text", f"{seen[0]} was opened")


# --- what a recipe gives back -----------------------------------------------------------------------------------


def check_made(model: nn.Module, reference: nn.Module) -> None:
    """Refuse a model with parameters or buffers that the reference has not; packed layers bring their own parts."""
    known = {name for name, _ in [*reference.named_parameters(), *reference.named_buffers()]}
    known |= {f"{n}.{part}" for n, m in model.named_modules() if hasattr(m, "nbytes") for part, _ in m.named_buffers()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in known:
            raise Refused("smuggled tensors", f"{name}: {tensor.dtype} {tuple(tensor.shape)}")


def check_folder(folder: Path, reference: nn.Module, tokenizer):
    """The model in the folder, loaded from its file; refuses whatever else is in the folder.

    Raises: Refused; FileNotFoundError if there are no weights; ValueError if they are damaged.
    """
    _check_files(folder)
    _check_names(folder / WEIGHTS, reference)
    _check_settings(folder, reference)
    model, own = load_quantized(folder)
    if own is not None and _spelled(own) != _spelled(tokenizer):
        raise Refused(
            "changed tokenizer", f"it has {len(own):,} tokens, the model's {len(tokenizer):,}, or other rules"
        )
    check_made(model, reference)
    return model


def _check_files(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in _PROGRAMS or (path.suffix == ".json" and path.is_file() and _names_code(path)):
            raise Refused("code in the file", name)
        if name not in _ALLOWED:
            raise Refused("other files", name)


def _names_code(path: Path) -> bool:
    """Whether a JSON file asks for a class of the folder's own, which transformers would import."""
    return '"auto_map"' in path.read_text(encoding="utf-8", errors="replace")


def _check_names(weights: Path, reference: nn.Module) -> None:
    """The file holds the model's parameters and buffers, as they are or as quantized layers, and nothing else."""
    if not weights.is_file():
        raise FileNotFoundError(f"no {weights.name} in {weights.parent}; save_quantized writes it")
    known = {name for name, _ in [*reference.named_parameters(), *reference.named_buffers()]}
    known |= linear_layers(reference).keys() | embedding_layers(reference).keys()
    for name in load_tensors(weights):
        if name not in known:
            raise Refused("smuggled tensors", f"{name} in {weights.name}")


def _check_settings(folder: Path, reference: nn.Module) -> None:
    """config.json and generation_config.json say what the model's own say."""
    wanted = {"config.json": reference.config, "generation_config.json": getattr(reference, "generation_config", None)}
    for name, config in wanted.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        own = {} if config is None else json.loads(json.dumps(config.to_dict(), default=str))
        differ = sorted(key for key, value in said.items() if key not in _OWN and own.get(key) != value)
        if differ:
            raise Refused("changed configuration", f"{differ[0]!r} in {name}")


def _spelled(tokenizer) -> tuple:
    """All that decides how a tokenizer cuts a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else ""
    return rules, sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id, tokenizer.eos_token_id
