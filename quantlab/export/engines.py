"""Engines that run exported files, and that quantlab itself does not need: found, or asked for in one sentence."""

import importlib
from importlib.util import find_spec

from quantlab.arguments import check_kind

PIP = "pip install -e .[deploy] -c constraints.txt"
OWN_COMMAND = {
    "torchao": "pip install -e .[torchao] -c constraints.txt",
    "nncf": "pip install -e .[nncf] -c constraints.txt",
    "tensorrt": "pip install tensorrt (it needs a GPU)",
    "executorch": "python -m recipes.engines executorch",
    "neural_compressor": "python -m recipes.engines neural-compressor",
}


def engine_here(name: str) -> bool:
    """Whether the package of an engine is installed; it is not imported.

    >>> engine_here("torch"), engine_here("no_such_engine")
    (True, False)
    """
    return find_spec(check_kind(name, "name", str)) is not None


def engine(name: str):
    """The package of an engine, imported. Raises: ModuleNotFoundError with the command that installs it."""
    if not engine_here(name):
        raise ModuleNotFoundError(f"{name} is not here; `{OWN_COMMAND.get(name, PIP)}` gets it")
    return importlib.import_module(name)
