"""One layer in many engines as a table: bytes, distance from quantlab's answer, and speed beside the engine's floats.

What an engine that is not installed would give was measured once and is kept: its rows say when and on what processor.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantlab.arguments import check_file, check_function, check_int, check_kind, check_list, check_real, kind
from quantlab.files import read_json

DATA = Path(__file__).resolve().parent.parent.parent / "data"
STORED = DATA / "deployment.json"  # what benchmarks/deployment.py --store measured
WALKED = DATA / "deployment_walked.json"  # what was measured by hand, of engines with an environment of their own
# What python -m recipes.engines NAME measured, of engines in environments that it made.
OWN = {
    "ExecuTorch": DATA / "deployment_executorch.json",
    "Neural Compressor": DATA / "deployment_neural_compressor.json",
}


@dataclass(frozen=True)
class Row:
    """One layer, or model, in one engine."""

    engine: str
    form: str
    nbytes: int
    apart: float  # ‖its answer - ours‖ / ‖ours‖ on the same codes
    times: float | None = None  # the float layer's time over this one's, in the same engine and run
    when: str = ""  # "": measured just now

    def line(self) -> str:
        """The row as a line of a table."""
        speed = "" if self.times is None else f"{self.times:.2f}"
        numbers = f"{self.nbytes:>10,}  {self.apart:>8.1e}  {speed:>6}"
        return f"{self.engine:16} {self.form:34} {numbers}  {self.when}".rstrip()


HEAD = f"{'engine':16} {'form':34} {'bytes':>10}  {'apart':>8}  {'speed':>6}"


def cpu_seconds(*calls: Callable, rounds: int = 5) -> list[float]:
    """The least CPU time of each call, after one that warms up; they take turns, so that a busy machine hits all."""
    best = [float("inf")] * len(calls)
    rounds = check_int(rounds, "rounds", 1, 10_000)
    for call in calls:
        check_function(call, "a call", "nothing")()
    for _ in range(rounds):
        for i, call in enumerate(calls):
            began = time.process_time()
            call()
            best[i] = min(best[i], time.process_time() - began)
    return best


def relative(got: np.ndarray | Tensor, wanted: Tensor) -> float:
    """‖got - wanted‖ / ‖wanted‖. Raises: ValueError if got is no array of reals of wanted's shape, or wanted is 0.

    >>> relative(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])) < 0.24
    True
    """
    got = check_real(torch.from_numpy(got) if isinstance(got, np.ndarray) else got, "got").detach().double()
    wanted = check_real(wanted, "wanted").detach().double()
    if got.shape != wanted.shape or not wanted.any():
        raise ValueError(f"got {tuple(got.shape)} and wanted {tuple(wanted.shape)} must be alike, and wanted not 0")
    return ((got - wanted).norm() / wanted.norm()).item()


def measure(engine: str, form: str, path, run: Callable, x: Tensor, y: Tensor, in_float: Callable) -> Row:
    """A row of the table: a file's bytes, its answer to x beside y, its time for one token beside in_float's.

    run, in_float: functions of an array (tokens, in), as onnx_session gives. x (tokens, in), y (tokens, out).
    Raises: FileNotFoundError if there is no file, ValueError if x or y is no matrix, or the answer is not as y is.
    """
    engine, form = check_kind(engine, "engine", str), check_kind(form, "form", str)
    run, in_float = check_function(run, "run", "an array"), check_function(in_float, "in_float", "an array")
    size, given = check_file(path).stat().st_size, check_real(x).detach()
    if given.ndim != 2 or check_real(y, "y").ndim != 2 or len(y) != len(x):
        raise ValueError(f"x and y must be (tokens, in) and (tokens, out), got {kind(x)} and {kind(y)}")
    one, apart = given[:1].numpy(), relative(run(given.numpy()), y)
    fast, slow = cpu_seconds(lambda: run(one), lambda: in_float(one))
    return Row(engine, form, size, apart, slow / fast)


def stored_rows(engine: str) -> list[Row]:
    """The rows of an engine that were measured once, with their date and processor. None: an empty list."""
    check_kind(engine, "engine", str)
    found = []
    for file in (STORED, WALKED, *OWN.values()):
        if file.is_file():
            kept = read_json(file, {"date": str, "processor": str, "layer": list})
            when = f"stored: {kept['date']}, {kept['processor']}"
            found += [Row(*row, when) for row in kept["layer"] if row[0] == engine]
    return found


def show(rows: list[Row]) -> None:
    """Print rows as a table."""
    print(HEAD)
    for row in check_list(rows, "rows"):
        print(check_kind(row, "a row", Row).line())
