"""What the workbook needs, and what to install where if it is missing. It imports nothing it looks for."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from jupyter_core.paths import SYSTEM_JUPYTER_PATH, jupyter_data_dir
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MANAGER = "labextensions/@jupyter-widgets/jupyterlab-manager/package.json"  # the browser's half of a slider


def selftest() -> list[str]:
    """A line for each need: "packages: ok", or one sentence that says what to install where."""
    if trouble := python_trouble(tuple(sys.version_info[:2])):
        return [f"Python: {trouble}"]  # nothing else can be looked for
    if not (ROOT / "pyproject.toml").is_file():
        return [f"workbook: its folder is not here; in a terminal go to it and run  {pip(['-e', '.'])}"]
    import tomllib  # here, because a Python before 3.11 has none

    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = {
        "Python": None,
        "packages": package_trouble(needs, installed),
        "sliders": slider_trouble(lab_python()),
        "model": model_trouble(os.environ.get("QUANTLAB_MODEL")),
        "texts": lacking(ROOT / "data/text", ["eval.txt", "calibration.txt"]),
    }
    return [f"{what}: {trouble or 'ok'}" for what, trouble in found.items()]


def pip(what: list[str], python: str = sys.executable) -> str:
    return " ".join([f'"{python}"', "-m pip install", *what])


def python_trouble(mine: tuple) -> str | None:
    """
    >>> python_trouble((3, 11)), python_trouble((3, 10))[:19]
    (None, 'this kernel is 3.10')
    """
    if mine < (3, 11):
        return (
            "this kernel is {}.{} and the workbook needs 3.11: install it from python.org, then run  "
            "python3.11 run.py lab  in the folder of the workbook"
        ).format(*mine)


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_trouble(needs: list[str], version_of) -> str | None:
    """
    >>> versions = {"torch": "2.13.0+cpu", "ipywidgets": "7.8"}.get
    >>> package_trouble(["torch>=2.9"], versions) is None
    True
    >>> package_trouble(["torch>=2.9", "ipywidgets>=8", "tqdm"], versions).split(":")[0]
    'the environment of this kernel has ipywidgets 7.8 and no tqdm'
    """
    wrong = {}
    for need in map(Requirement, needs):
        there, may_lack = version_of(need.name), need.name == "jupyterlab"  # which can run elsewhere
        if not may_lack and not (there and need.specifier.contains(there, prereleases=True)):
            wrong[f'"{need}"'] = f"{need.name} {there}" if there else f"no {need.name}"
    if wrong:
        return (
            f"the environment of this kernel has {' and '.join(wrong.values())}: restart the kernel "
            f"after running in a terminal  {pip(list(wrong))}"
        )


def lab_python() -> str | None:
    """The Python that runs the Jupyter above this kernel; None where that cannot be told (VS Code, nbval)."""
    try:
        for process in psutil.Process().parents():
            command = process.cmdline()
            if any(Path(word).stem.startswith("jupyter") for word in command[:3]):
                return command[0] if Path(command[0]).parent.name in ("bin", "Scripts") else None
    except psutil.Error:  # a process that has ended, or is somebody else's
        pass


def slider_trouble(lab: str | None) -> str | None:
    """JupyterLab and the kernel may live in two environments, and each needs its half (ipywidgets #3965)."""
    prefix = Path(lab).parent.resolve().parent if lab else Path(sys.prefix)
    folders = [prefix / "share/jupyter", jupyter_data_dir(), *SYSTEM_JUPYTER_PATH]
    found = next((place for place in (Path(f, MANAGER) for f in folders) if place.is_file()), None)
    major = found and int(json.loads(found.read_text(encoding="utf-8"))["version"].split(".")[0])
    if not found or major < 5:  # 5 goes with ipywidgets 8
        command = pip(['"jupyterlab_widgets>=3"'], lab or sys.executable)
        return (
            f"the environment of JupyterLab has {'an old' if found else 'no'} jupyterlab_widgets: "
            f"restart JupyterLab and reload this page after running in a terminal  {command}"
        )


def model_trouble(chosen: str | None) -> str | None:
    folder = Path(chosen or ROOT / "data/model")
    if chosen and not folder.is_dir():
        return None  # a name on the hub; load_lm says what is wrong with it
    weights = [file.name for file in folder.glob("*.safetensors")] or ["model.safetensors"]
    trouble = lacking(folder, ["config.json", *weights])
    return f"{trouble}, or set QUANTLAB_MODEL to a whole one" if trouble and chosen else trouble


def lacking(folder: Path, names: list[str]) -> str | None:
    """Files that are not there, or so small (200 bytes) that only git-lfs's pointer to them is.

    >>> lacking(Path("/nowhere"), ["a.txt", "b.txt"]).split(":")[0].replace(os.sep, "/")
    '/nowhere lacks a.txt, b.txt'
    """
    bad = [name for name in names if not (folder / name).is_file() or (folder / name).stat().st_size < 200]
    if bad:
        return f"{folder} lacks {', '.join(bad)}: get the workbook again, the whole of it"
