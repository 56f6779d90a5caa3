"""What films or times explorers in a kernel; apart from filming.py, whose imports would cost every kernel a second."""

import json
import time
from collections.abc import Callable
from pathlib import Path


def record(folder: str) -> None:
    """In a kernel: film every explorer that is the result of a cell, as 1, 2, ... in the folder."""
    from quantlab.explorers.film import film

    _for_each_explorer(lambda explorer, number: film(explorer).save(Path(folder) / str(number)))


def clock(path: str) -> None:
    """In a kernel: of every explorer that is the result of a cell, the CPU milliseconds of each press, into a file."""
    found = {}

    def keep(explorer, number) -> None:
        found[f"explorer {number}"] = [ms for control in explorer.controls.values() for ms in _presses(control)]
        Path(path).write_text(json.dumps(found))

    _for_each_explorer(keep)


def _presses(control) -> list[float]:
    """Through all values of a control, and back to where it stood."""
    from quantlab.explorers.playing import stops_of

    times, start = [], control.value
    for value in stops_of(control):
        before = time.process_time()
        control.value = value
        times += [1000 * (time.process_time() - before)] if value != start else []
    control.value = start
    return times


def _for_each_explorer(act: Callable) -> None:
    """act(explorer, number) whenever a cell's result is an explorer."""
    from IPython import get_ipython

    from quantlab.explorers import Explorer

    met = []

    def meet(result) -> None:
        if isinstance(result.result, Explorer):
            met.append(result.result)
            act(result.result, len(met))

    get_ipython().events.register("post_run_cell", meet)
