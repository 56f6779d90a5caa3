"""What films explorers in a kernel; apart from filming.py, whose imports would cost every kernel a second."""

from pathlib import Path


def record(folder: str) -> None:
    """In a kernel: film every explorer that is the result of a cell, as 1, 2, ... in the folder."""
    from IPython import get_ipython

    from quantlab.explorers import Explorer
    from quantlab.explorers.film import film

    made = []

    def keep(result) -> None:
        if isinstance(result.result, Explorer):
            made.append(film(result.result))
            made[-1].save(Path(folder) / str(len(made)))

    get_ipython().events.register("post_run_cell", keep)
