"""A language model and its tokenizer: the bundled one, SmolLM2, a folder, or a name on the hub."""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from quantlab.arguments import check_path
from quantlab.lm.hub import download
from quantlab.lm.smollm2 import smollm2_folder
from quantlab.lm.texts import DATA
from quantlab.storage import read_names

# Masks and frequencies that older versions of transformers stored beside the weights, and newer ones compute.
LEFTOVER = re.compile(r"\.(attn|attention)(\.attention)?\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
WORDS = {"bundled": lambda: DATA / "model", "smollm2": smollm2_folder}  # names of models, and what finds their folders


def load_lm(name_or_path: str = "bundled"):
    """(model, tokenizer) of a causal language model, in float32 on the CPU, ready to evaluate.

    "bundled" is the model in data/model, or what the environment variable QUANTLAB_MODEL names (a folder is looked for
    here, and where the shell stood); "smollm2" is
    SmolLM2-135M-Instruct (quantlab.lm.smollm2 says where it comes from). Else a folder, or a hub name like "org/name"
    or, to pin it, "org/name@revision". Only safetensors are read, no code is run.

    Raises: FileNotFoundError if there is no such folder, or the hub cannot give the model (offline, or unknown);
    ValueError if its weights are damaged, quantized already, or not those that its configuration asks for.
    """
    name = str(check_path(name_or_path, "name_or_path"))
    folder = _folder_of(_from_the_shell(chosen_model()) if name == "bundled" else name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    if (folder / "quantized.safetensors").is_file():
        raise ValueError(f"{folder} holds a quantized model: load_quantized loads it")
    files = list(folder.glob("*.safetensors"))
    for file in files:
        read_names(file)
    small = sum(file.stat().st_size for file in files) < 100e6
    with _quiet(bars=small):  # no progress bar for what takes less than a second
        return _model(folder).eval(), _tokenizer(folder)


def chosen_model() -> str:
    """The model that the workbook runs on: "bundled", or what the environment variable QUANTLAB_MODEL names."""
    return os.environ.get("QUANTLAB_MODEL") or "bundled"


def real_lm():
    """(model, tokenizer, name): SmolLM2, "smollm2", for the chapters on a real model; or what stands in for it.

    Where QUANTLAB_MODEL names another model, or SmolLM2 cannot be had or is not wanted (QUANTLAB_SMOLLM2=0), that is
    the model that the workbook runs on, and the name is chosen_model()'s. Raises: as load_lm.
    """
    if chosen_model() not in ("bundled", "smollm2"):
        return *load_lm(), chosen_model()
    try:
        return *load_lm("smollm2"), "smollm2"
    except FileNotFoundError:
        return *load_lm(), chosen_model()


def _from_the_shell(name: str) -> str:
    """A folder that is not here, but where the user stood who opened JupyterLab: a notebook runs in its own folder."""
    there = Path(os.environ.get("PWD", ".")) / Path(name).expanduser()
    return name if Path(name).expanduser().is_dir() or not there.is_dir() else str(there)


def _folder_of(name: str) -> Path:
    folder = Path(name).expanduser()
    if name in WORDS and not folder.is_dir():
        folder = WORDS[name]()
    if name == "bundled" and not folder.is_dir():
        raise FileNotFoundError(f"no bundled model: {folder} is missing; get the workbook, the whole of it")
    return folder if folder.is_dir() else download(name, words=WORDS)


def _model(folder: Path):
    """The model in a folder, all of its tensors from the file: transformers fills gaps with random numbers."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if scheme := getattr(config, "quantization_config", None):
        scheme = scheme.get("quant_method", "") if isinstance(scheme, dict) else scheme
        raise ValueError(f"{folder} holds weights that are quantized already ({scheme}); load the float model")
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except RuntimeError as error:  # of tensors of another shape
        raise ValueError(f"{folder} holds other tensors than its config.json asks for: {error}") from error
    odd = {what: sorted(map(str, found[f"{what}_keys"])) for what in ("missing", "unexpected", "mismatched")}
    odd["unexpected"] = [key for key in odd["unexpected"] if not LEFTOVER.search(key)]
    if any(odd.values()):
        told = "; ".join(f"{what}: {', '.join(keys[:3])} ({len(keys)} in all)" for what, keys in odd.items() if keys)
        raise ValueError(f"{folder} holds other tensors than its config.json asks for. {told}")
    return model


def _tokenizer(folder: Path):
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{folder} holds no tokenizer that can be read ({reason})") from error


@contextmanager
def _quiet(*, bars: bool):
    """transformers' own table of missing tensors off for a while (and its progress bars), and then as they were."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
