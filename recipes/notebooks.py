"""Run notebooks/src/*.py and store them with their outputs as notebooks/*.ipynb:  python run.py notebooks --help"""

import argparse
import ast
import base64
import copy
import io
import os
import re
import sys
import time
from difflib import SequenceMatcher
from pathlib import Path

import jupytext
import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image, ImageChops

from quantlab.files import write_whole

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = ("image/png", "image/jpeg")
VOLATILE = "nbval-ignore-output"  # tag of a cell whose outputs differ from run to run
RAISES = "raises-exception"  # tag of a cell that must end in an error
SAID = {"print": "stream", "plt.show": "display_data"}  # what a call leaves in the outputs
PROGRESS_BAR = re.compile(r"^.*(\d+%\||\d+it \[).*\n?", re.MULTILINE)
MACHINE_PATH = re.compile(r"/(home|root|tmp|work|Users)/|\\Users\\")
MAX_BYTES = 1_000_000
# What nbval overlooks in a text is no difference here either: the same pairs of pattern and replacement.
CONFIG = (NOTEBOOKS.parent / "tests/nbval_sanitize.cfg").read_text(encoding="utf-8")
NUMBERS = [(r" *\d[\d.,]*(e[-+]?\d+)?", "0")]  # with the spaces that pad them
SANITIZE = re.findall(r"^regex: (.*)\nreplace: (.*)$", CONFIG, re.M)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python run.py notebooks", description="Run notebooks/src/*.py, store notebooks/*.ipynb."
    )
    parser.add_argument("names", nargs="*", help="how the names begin (01 07_integer); none means all")
    parser.add_argument("--check", action="store_true", help="run nothing, only say what is not as built")
    parser.add_argument("--fresh", action="store_true", help="replace even outputs that still say the same")
    options = parser.parse_args(arguments)
    found = []
    for source in sorted(NOTEBOOKS.glob("src/*.py")):
        if source.name.startswith(tuple(options.names or [""])):
            found += check(source) if options.check else build(source, fresh=options.fresh)
    for name in options.names:
        if not any(NOTEBOOKS.glob(f"src/{name}*.py")):
            found.append(f"no source in notebooks/src begins with {name}")
    found += [] if options.names else unpaired(NOTEBOOKS)
    for problem in found:
        print(problem, file=sys.stderr)
    return int(bool(found))


def build(source: Path, *, fresh: bool = False) -> list[str]:
    """Run one source and write its notebook; when anything is wrong, say what and write nothing."""
    began, target = time.time(), notebook_of(source)
    print(f"{target.name} ...", end=" ", flush=True)
    notebook = cells_of(source)
    try:
        run(notebook, folder=target.parent)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print("failed")
        return [f"{source.name}: {without_colours(str(error))}"]
    notebook = normal_form(notebook)
    if target.exists() and not fresh:
        keep_old_outputs(normal_form(nbformat.read(target, 4)), notebook)
        notebook = normal_form(notebook)  # an old output may have been that of another number
    text = as_text(notebook)
    found = problems(text, source)
    if not found:
        write_whole(target, text)
    print(f"{time.time() - began:.1f} s, {len(text) / 1000:.0f} kB", "not written" if found else "")
    return found


def check(source: Path) -> list[str]:
    """What is wrong with a source's notebook as it lies on the disk."""
    target = notebook_of(source)
    return problems(target.read_text(encoding="utf-8"), source) if target.exists() else []


def unpaired(folder: Path) -> list[str]:
    """Sources without a notebook and notebooks without a source."""
    sources = {path.stem for path in folder.glob("src/*.py")}
    notebooks = {path.stem for path in folder.glob("*.ipynb")}
    lonely = [f"src/{stem}.py has no notebook" for stem in sorted(sources - notebooks)]
    return lonely + [f"{stem}.ipynb has no source in src" for stem in sorted(notebooks - sources)]


def notebook_of(source: Path) -> Path:
    return source.parent.parent / f"{source.stem}.ipynb"


def cells_of(source: Path) -> NotebookNode:
    """The notebook that a source describes, without outputs."""
    return jupytext.read(source, fmt="py:percent")


class ThisPython(AsyncKernelManager):
    """Starts kernels with the interpreter that runs this script, whatever kernels the user has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


def run(notebook: NotebookNode, *, folder: Path, **environment: str) -> None:
    """Execute the cells in place; an error in a cell that is not tagged for it ends the run."""
    resources = {"metadata": {"path": str(folder)}}
    nobody = os.environ | {"QUANTLAB_PROGRESS": "off"}  # whoever builds a notebook has passed nothing in it
    waiting = {"timeout": 600, "iopub_timeout": 120, "raise_on_iopub_timeout": True}  # else late outputs are dropped
    NotebookClient(
        notebook, kernel_manager_class=ThisPython, record_timing=False, resources=resources, **waiting
    ).execute(env=nobody | environment)


def normal_form(notebook: NotebookNode) -> NotebookNode:
    """A copy without anything that changes from run to run or that only a live kernel could show."""
    cells, runs = [], 0
    for number, old in enumerate(notebook.cells, 1):
        tags = old.metadata.get("tags", [])
        cell = {
            "id": f"cell-{number:03}",
            "cell_type": old.cell_type,
            "source": old.source,
            "metadata": {"tags": tags} if tags else {},
        }
        if old.cell_type == "code":
            runs += 1
            cell |= {"execution_count": runs, "outputs": normal_outputs(old.outputs, runs, tags)}
        cells.append(cell)
    return nbformat.from_dict({"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5})


def normal_outputs(outputs: list, count: int, tags: list) -> list:
    """Each stream in one piece, widgets without the id of their dead model, errors without their frames."""
    kept, streams = [], {}
    for output in copy.deepcopy(outputs):
        if VOLATILE in tags and PROGRESS_BAR.match(output.get("data", {}).get("text/plain", "")):
            continue  # a bar that ended
        if output.output_type == "stream" and output.name in streams:
            streams[output.name].text += output.text
            continue
        kept.append(output)
        if output.output_type == "stream":
            streams[output.name] = output
        elif output.output_type == "error":
            output.traceback = [f"{output.ename}: {output.evalue}"]
        elif len(output.data) > 1:  # the widget's text or picture stays
            output.data.pop(WIDGET, None)
        if output.output_type == "execute_result":
            output.execution_count = count
    for output in streams.values():
        output.text = re.sub(r"^.*\r(?=[^\n])", "", output.text, flags=re.M)  # what a terminal would show
        if output.name == "stderr" and VOLATILE in tags:  # nbval would miss it in any other cell
            output.text = PROGRESS_BAR.sub("", output.text)
    return [output for output in kept if output.get("name") != "stderr" or output.text.strip()]


def keep_old_outputs(old: NotebookNode, new: NotebookNode) -> None:
    """Where a cell's source is as before and its outputs say the same, keep the old ones: no needless change.

    What a volatile cell says counts as the same whatever its numbers. But a learner compares such numbers across
    cells, so those of all volatile cells stay together: kept if the code of the notebook is as before and every
    output says the same, else all of them are those of the new run.
    """
    before, after = ([cell for cell in notebook.cells if cell.cell_type == "code"] for notebook in (old, new))
    sources = [cell.source for cell in before], [cell.source for cell in after]
    told = [
        (was, now, same(was.outputs, now.outputs, volatile=has_tag(now, VOLATILE)))
        for i, j, size in SequenceMatcher(None, *sources, autojunk=False).get_matching_blocks()
        for was, now in zip(before[i : i + size], after[j : j + size], strict=True)
    ]
    one_run = sources[0] == sources[1] and all(equal for *_, equal in told)
    for was, now, equal in told:
        if equal and (one_run or not has_tag(now, VOLATILE)):
            now.outputs = was.outputs


def same(was: list, now: list, *, volatile: bool = False) -> bool:
    """Whether outputs agree in all but what nbval overlooks; with volatile, also numbers and pictures."""
    if [texts(output, volatile) for output in was] != [texts(output, volatile) for output in now]:
        return False
    return volatile or all(alike(a, b) for a, b in zip(pictures(was), pictures(now), strict=True))


def texts(output: NotebookNode, volatile: bool = False) -> dict[str, str]:
    """The texts of one output by kind, without what nbval overlooks; of a picture only that it is there."""
    if output.output_type == "stream":
        found = {output.name: output.text}
    elif output.output_type == "error":
        found = {output.ename: output.evalue}
    else:
        found = {kind: "" if kind in PICTURES else str(data) for kind, data in output.data.items()}
    for pattern, replacement in SANITIZE + (NUMBERS if volatile else []):
        found = {kind: re.sub(pattern, replacement, text) for kind, text in found.items()}
    return found


def pictures(outputs: list) -> list[Image.Image]:
    data = [output.data[kind] for output in outputs for kind in PICTURES if kind in output.get("data", {})]
    return [Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB") for one in data]


def alike(a: Image.Image, b: Image.Image) -> bool:
    """Equal but for rounding: other processors shade the edge of a line by a few of 255 levels otherwise."""
    return a.size == b.size and max(high for _, high in ImageChops.difference(a, b).getextrema()) <= 8


def problems(text: str, source: Path) -> list[str]:
    """What a notebook file must not be: another than its source, unrun, noisy, tied to one machine, large."""
    notebook, found = nbformat.reads(text, 4), []
    if [essence(cell) for cell in notebook.cells] != [essence(cell) for cell in cells_of(source).cells]:
        found.append("its cells differ from the source")
    elif text != as_text(normal_form(notebook)):
        found.append("it is not as recipes/notebooks.py writes it")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        found.append("it has no outputs, so nbval would compare nothing")
    if len(text.encode()) > MAX_BYTES:
        found.append(f"it has {len(text.encode()) / 1e6:.1f} MB")
    found += [f"{problem} in the cell\n{cell.source}" for cell in code for problem in cell_problems(cell)]
    return [f"{notebook_of(source).name}: {problem}" for problem in found]


def cell_problems(cell: NotebookNode) -> list[str]:
    found, outputs = [], "\n".join(text for output in cell.outputs for text in texts(output).values())
    if any(output.get("name") == "stderr" for output in cell.outputs):
        found.append(f"stderr (a progress bar needs the tag {VOLATILE})")
    if "Warning" in outputs:
        found.append("a warning")
    if "Your code stopped in line" in outputs:
        found.append("a stub that is more than its bare raise")
    if path := MACHINE_PATH.search(outputs):
        found.append(f"a path of this machine ({path[0]}...)")
    if has_tag(cell, RAISES) != any(output.output_type == "error" for output in cell.outputs):
        found.append(f"no error in spite of the tag {RAISES}" if has_tag(cell, RAISES) else "an error")
    kinds = {output.output_type for output in cell.outputs}
    found += [f"no output of its {call}()" for call, kind in SAID.items() if call in called(cell) and kind not in kinds]
    return found


def called(cell: NotebookNode) -> set[str]:
    """The functions that a cell calls in whatever case: statements of their own, under no condition."""
    try:
        lines = ast.parse(cell.source).body
    except SyntaxError:  # a magic command
        return set()
    calls = (line.value for line in lines if isinstance(line, ast.Expr) and isinstance(line.value, ast.Call))
    return {ast.unparse(call.func) for call in calls}


def essence(cell: NotebookNode) -> tuple:
    return cell.cell_type, cell.source, cell.metadata.get("tags", [])


def has_tag(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def as_text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook) + "\n"


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


if __name__ == "__main__":
    sys.exit(main())
