"""The films of the explorers of a notebook: its cells are run, and each explorer is filmed where it was shown.

A notebook's films lie in a folder whose name is a hash of all they rest on, so they are made once.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import nbformat

from recipes.notebooks import NOTEBOOKS, cells_of, run

ROOT = NOTEBOOKS.parent
FILMS = ROOT / ".films"
RECORDERS = Path(__file__), Path(__file__).with_name("recorder.py")
DONE = "done"  # written last
LARGEST = 2_000_000  # bytes of a film
FIRST_CELL = "import recipes.recorder; recipes.recorder.record({folder!r})"

# How cells begin that take long (three minutes in all) and on which no explorer rests: they are not run.
LEFT_OUT = {
    "13_quantization_aware_training": ("floats_trained = ",),
    "16_a_real_model": ("from quantlab.methods import W8A8", "tensor, token, _, ", "guilty = ", "spared = "),
    "18_kv_cache": (
        "try:\n    larger = ", "if larger:\n    kls = ", "from quantlab.kv_measuring import attention_on_first",
        "here = ", "from quantlab.kv_measuring import value_lengths", "pairs = ", "from quantlab import kl_divergence",
        "from quantlab.kv_measuring import keys_before_rope", "float_cache = ", "if larger:\n    large = ",
    ),
}  # fmt: skip


def shows_explorer(cell) -> bool:
    """Whether the last line of a cell may be an explorer, which is then shown under it."""
    last = (cell.source.strip().splitlines() or [""])[-1]
    return cell.cell_type == "code" and "explore_" in cell.source and last.isidentifier() | ("explore_" in last)


def folder_of(source: Path) -> Path:
    """Where the films of a source lie once they are made."""
    parts = [source, *sorted((ROOT / "quantlab").rglob("*.py")), *sorted((ROOT / "data").rglob("*.safetensors"))]
    hashed = hashlib.sha256()
    for path in [*parts, *sorted((ROOT / "data").rglob("*.txt")), ROOT / "constraints.txt", *RECORDERS]:
        hashed.update(path.read_bytes())
    return FILMS / f"{source.stem}-{hashed.hexdigest()[:12]}"


def make(source: Path) -> Path:
    """Run a source up to its last explorer, unless that was done, and return the folder with one film for each."""
    target = folder_of(source)
    if (target / DONE).exists():
        return target
    for old in FILMS.glob(f"{source.stem}-*"):
        shutil.rmtree(old)
    target.mkdir(parents=True)
    notebook = cells_of(source)
    notebook.cells = cells_to_run(source.stem, notebook.cells)
    if notebook.cells:
        first = nbformat.v4.new_code_cell(FIRST_CELL.format(folder=str(target)))
        notebook.cells = [first, *notebook.cells]
        run_apart(notebook)
    _check(target, sum(map(shows_explorer, notebook.cells)))
    (target / DONE).write_text("")
    return target


def cells_to_run(stem: str, cells: list) -> list:
    """Up to the last explorer, without those that are left out. Raises: RuntimeError where one of these is not met."""
    last = max((i for i, cell in enumerate(cells) if shows_explorer(cell)), default=-1)
    cells, starts = cells[: last + 1], LEFT_OUT.get(stem, ())
    if unmet := [start for start in starts if not any(cell.source.startswith(start) for cell in cells)]:
        raise RuntimeError(f"{stem}: no cell begins with {unmet[0]!r}, which LEFT_OUT in recipes/filming.py names")
    return [cell for cell in cells if cell.cell_type != "code" or not cell.source.startswith(starts)]


def _check(folder: Path, explorers: int) -> None:
    """An error in a kernel's event is only printed there, so what it should have written is counted here."""
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.bin"))]
    if len(sizes) != explorers or max(sizes, default=0) > LARGEST:
        raise RuntimeError(
            f"{folder.name}: {explorers} films of at most {LARGEST:,} bytes were expected (an explorer may name fewer "
            f"states), and there are {len(sizes)} of {', '.join(f'{size:,}' for size in sizes)}"
        )


def run_apart(notebook) -> None:
    """Run it where what its cells write is nobody's."""
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(ROOT / "data", Path(root) / "data")
        (Path(root) / "notebooks").mkdir()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        threads = os.environ.get("OMP_NUM_THREADS", "1")  # others are filmed beside it
        run(notebook, folder=Path(root) / "notebooks", PYTHONPATH=path, OMP_NUM_THREADS=threads)
