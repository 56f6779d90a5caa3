"""What a press on a slider costs the kernel, for every explorer of every notebook. Twenty minutes for all of them.

Each notebook runs up to its last explorer. Then every control of each explorer goes through its values, one press after
the other, while the others stand where they stood: CPU milliseconds from the press to the new picture and numbers. To
them the browser adds its round trip, which benchmarks/slider_latency.py measures.

python benchmarks/drawing_speed.py [01 02 ...]
"""

import json
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes import filming
from recipes.notebooks import NOTEBOOKS, cells_of

# In ms. Of a press (median 50, 95 % within 100) a round trip of browser and kernel takes some 20 on an idle machine.
MEDIAN, P95 = 30, 80
FIRST_CELL = "import recipes.recorder; recipes.recorder.clock({path!r})"


def presses(source: Path) -> dict[str, list[float]]:
    """{what the explorer is: milliseconds of each press}"""
    notebook = cells_of(source)
    notebook.cells = filming.cells_to_run(source.stem, notebook.cells)
    if not notebook.cells:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "presses.json"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST_CELL.format(path=str(path))))
        filming.run_apart(notebook)
        return json.loads(path.read_text())


def main(names: list[str]) -> int:
    slow, every = [], []
    print(f"{'CPU ms of a press':40}{'presses':>8}{'median':>8}{'95 %':>8}")
    chosen = [path for path in sorted(NOTEBOOKS.glob("src/*.py")) if path.stem.startswith(tuple(names or [""]))]
    for source in chosen:
        for number, times in presses(source).items():
            median, p95 = np.percentile(times, 50), np.percentile(times, 95)
            late = median > MEDIAN or p95 > P95
            slow += [f"{source.stem}, {number}"] if late else []
            every += times
            line = f"{source.stem + ', ' + number:40}{len(times):8}{median:8.1f}{p95:8.1f}"
            print(line + ("  MISSED" if late else ""), flush=True)
    print(f"{'all':40}{len(every):8}{np.percentile(every, 50):8.1f}{np.percentile(every, 95):8.1f}")
    print(f"bars: median {MEDIAN}, 95 % within {P95}: " + (f"MISSED by {'; '.join(slow)}" if slow else "kept by all"))
    return len(slow)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
