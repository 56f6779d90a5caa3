"""Imports in quantlab point downwards, heavy packages stay where they are needed, and nothing unpickles."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantlab

PACKAGE = Path(__file__).resolve().parent.parent / "quantlab"


def layers() -> dict[str, int]:
    """{file or folder: its line} of the table in quantlab's docstring."""
    table = re.findall(r"^    \S+(?: \S+)?  +(\S+(?: \S+)*)(?:  .*)?$", quantlab.__doc__, re.M)
    return {name: number for number, names in enumerate(table) for name in names.split()}


LAYERS = layers()
# no layer, but rules of their own
ABOVE = {"__init__", "plain", "plots", "explorers", "checks", "judging", "predictions", "exercises", "hunt", "progress"}
FILES = sorted(PACKAGE.rglob("*.py"))


def module(path: Path) -> str:
    """The name a rule knows a file by: the first part below quantlab."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it: {"torch.nn", "quantlab.affine.quantize"}."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ("quantlab", *path.relative_to(PACKAGE).parts[:-1])
            parent = [".".join(package[: len(package) - node.level + 1])] if node.level else []
            names |= {".".join([*parent, *filter(None, [node.module]), alias.name]) for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The files of quantlab that a file imports; `from quantlab import mse` counts as __init__."""
    parts = [name.split(".") for name in imported(path) if name.split(".")[0] == "quantlab"]
    known = LAYERS.keys() | ABOVE
    return {part[1] if part[1:] and part[1] in known else "__init__" for part in parts} - {module(path)}


def users(package: str) -> set[str]:
    return {module(path) for path in FILES if any(name.split(".")[0] == package for name in imported(path))}


def test_every_file_has_its_layer():
    assert {module(path) for path in FILES} - LAYERS.keys() - ABOVE == set(), (
        "name it in the table of quantlab/__init__.py, or in ABOVE"
    )


@pytest.mark.parametrize("path", [path for path in FILES if module(path) in LAYERS], ids=module)
def test_numbered_files_import_only_from_lower_numbers(path):
    lower = {name for name, layer in LAYERS.items() if layer < LAYERS[module(path)]}
    assert ours(path) <= lower


def test_plots_import_only_the_lowest_layer():
    lowest = {name for name, layer in LAYERS.items() if layer <= 2}
    assert [ours(path) - lowest for path in FILES if module(path) == "plots"] in ([], [set()])


def test_only_exercises_and_checks_import_explorers_or_checks():
    guilty = {module(path) for path in FILES if ours(path) & {"explorers", "checks"}}
    assert guilty <= {"exercises"}


def test_heavy_packages_stay_in_their_files():
    assert users("transformers") <= {"lm", "kv", "kv_measuring", "export"}
    assert users("ipywidgets") <= {"explorers", "predictions"}
    assert users("peft") <= {"train"}
    assert users("joblib") <= {"sweep"}
    assert users("distributed") | users("dask") == set()  # a user's choice, through joblib


def test_import_quantlab_needs_torch_alone():
    heavy = ["transformers", "matplotlib", "ipywidgets"]
    code = f"import sys, quantlab; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_runs_code_from_a_file(path):
    text = path.read_text(encoding="utf-8")
    assert [word for word in ("pickle", "torch.load", "trust_remote_code=True") if word in text] == []
