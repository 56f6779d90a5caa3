"""Get an engine that does not go beside the others, in an environment of its own, and keep what it measured.

    python -m recipes.engines executorch
    python -m recipes.engines neural-compressor

The first makes .venv-executorch (2 GB, some minutes of pip; again when its pins change), runs its tests there, and
measures: data/deployment_executorch.json is written anew, which notebook 20 shows with its date. The second likewise.
A word more, plan, prints the commands and runs none.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What quantlab itself needs to load the bundled model and measure it, and what runs its tests there.
SHARED = (
    "torch", "transformers", "safetensors", "tokenizers", "accelerate", "psutil", "filelock", "tqdm", "pytest",
    "pytest-timeout",
)  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """A package with its version, its pins beside constraints.txt, what it measures with, and its tests."""

    package: str
    pins: str
    script: str
    tests: str


ENGINES = {
    "executorch": Engine(
        "executorch==1.5.1", "recipes/executorch.txt", "benchmarks/executorch_rows.py",
        "tests/test_export_executorch.py",
    ),
    "neural-compressor": Engine(
        "neural-compressor-pt==3.10", "recipes/neural-compressor.txt", "benchmarks/neural_compressor_rows.py",
        "tests/test_export_neural_compressor.py",
    ),
}  # fmt: skip


def python_of(name: str) -> Path:
    return ROOT / f".venv-{name}" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def wanted(name: str) -> str:
    """What an environment was made of, as one word: its stamp."""
    of = ENGINES[name]
    files = [(ROOT / file).read_bytes() for file in ("constraints.txt", of.pins)]
    what = [sys.version.encode(), bytes(ROOT), repr(of).encode(), " ".join(SHARED).encode(), *files]
    return hashlib.sha256(b"\n".join(what)).hexdigest()


def is_made(name: str) -> bool:
    stamp = ROOT / f".venv-{name}/complete"
    return stamp.is_file() and stamp.read_text() == wanted(name)


def plan(name: str) -> list[list[str]]:
    """The commands that make the environment, test it and measure in it; the first two only where it is missing."""
    of, python = ENGINES[name], str(python_of(name))
    index = os.environ.get("QUANTLAB_TORCH_INDEX")
    extra = [f"--extra-index-url={index}"] if index else []
    pins = ["-c", "constraints.txt", "-c", of.pins]
    make = [
        [sys.executable, "-m", "venv", "--clear", str(ROOT / f".venv-{name}")],
        [python, "-m", "pip", "install", "--quiet", *extra, of.package, *SHARED, *pins],
    ]
    # The tests' own conftest asks for a browser, which is not there.
    run = [[python, "-m", "pytest", "-q", "--noconftest", of.tests], [python, of.script, "--store"]]
    return run if is_made(name) else make + run


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ENGINES or arguments[1:] not in ([], ["plan"]):
        sys.exit(__doc__)
    name, commands = arguments[0], plan(arguments[0])
    # One thread, as the other rows were measured; quantlab is not installed there, but lies in this folder.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for command in commands:
        print("$", *(part.replace(f"{ROOT}{os.sep}", "") for part in command), flush=True)
        if arguments[1:] == [] and subprocess.call(command, cwd=ROOT, env=environment):
            return 1
        if "pip" in command and arguments[1:] == []:
            (ROOT / f".venv-{name}/complete").write_text(wanted(name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
