"""Which exercises are passed, in a file of the learner's own. Nothing leaves the machine.

python -m quantlab.progress                               what is passed, chapter by chapter
python -m quantlab.progress merge a.json b.json ...       a class: how many passed each exercise
python -m quantlab.progress merge ... --out class.csv     and who passed which, as a table

The file is progress.json beside the folder of notebooks. The environment variable QUANTLAB_PROGRESS names another one,
or, "off", none. While notebooks are built there is none either, nor under pytest, unless the variable names one.
"""

import argparse
import csv
import importlib
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from filelock import FileLock

from quantlab.arguments import check_file, check_kind, check_list, check_path
from quantlab.files import read_json, write_json, write_whole

FORMAT = "quantlab progress 1"
_ROOT = Path(__file__).resolve().parent.parent
_told: set[str] = set()  # what was said once already


def place() -> Path | None:
    """The file of this learner's progress; None where none is kept."""
    chosen = os.environ.get("QUANTLAB_PROGRESS")
    if chosen is not None:
        return None if chosen.strip().lower() in ("", "off") else Path(chosen).expanduser()
    if "PYTEST_VERSION" in os.environ:  # pytest sets it, and kernels and servers that a test starts inherit it
        return None
    return (_ROOT if (_ROOT / "notebooks").is_dir() else Path.cwd()) / "progress.json"


def remember(name: str, passed: bool) -> None:
    """Note that an exercise was passed. Whatever is wrong with the file: one line says so, and nothing is raised."""
    try:
        path = place() if passed else None
        if path is not None:
            _note(name, path)
    except Exception as error:  # noqa: BLE001  a check must not fail because a note of it cannot be kept
        _tell(f"(That this was passed could not be noted: {_reason(error)})")


def _note(name: str, path: Path) -> None:
    with FileLock(f"{path}.lock", timeout=2):
        done = read(path)
        if name not in done:
            write_json(path, {"format": FORMAT, "passed": done | {name: date.today().isoformat()}})


def read(path=None) -> dict[str, str]:
    """{exercise: day on which it was first passed} of a file, by default the learner's own; {} where there is none.

    Raises: ValueError that names the file if it is damaged, or not one of these.
    """
    path = place() if path is None else check_path(path)
    if path is None or not path.exists():
        return {}
    content = read_json(path, {"format": str, "passed": dict})
    if content["format"] != FORMAT or not all(isinstance(day, str) for day in content["passed"].values()):
        raise ValueError(f"{path} is damaged, or no file of progress: its format is {content['format']!r}")
    return content["passed"]


def exercises() -> dict[str, tuple[str, list[str]]]:
    """{chapter: (what it is about, names of its exercises)}, in reading order."""
    from quantlab.exercises import CHAPTERS  # here: its chapters import checks, which import this, as the hunt does
    from quantlab.hunt.playing import EXERCISES

    found = {"21": ("bug hunt", list(EXERCISES))}
    for chapter, file in CHAPTERS.items():
        module = importlib.import_module(f"quantlab.exercises.{file}")
        about = (module.__doc__ or file).splitlines()[0].partition(":")[2].strip(" .") or file
        found[chapter] = about, list(module.EXERCISES)
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


@dataclass(frozen=True)
class Progress:
    """What is passed of what there is; a cell shows it as a map."""

    passed: Mapping[str, str]  # exercise: day
    there: Mapping[str, tuple[str, list[str]]]  # chapter: (about, exercises)

    def __repr__(self) -> str:
        widest = max(len(about) for about, _ in self.there.values())
        lines = [self._line(chapter, about, names, widest) for chapter, (about, names) in self.there.items()]
        todo = [name for _, names in self.there.values() for name in names if name not in self.passed]
        count = sum(len(names) for _, names in self.there.values())
        lines.append(f"{count - len(todo)} of {count} exercises passed" + (f"; next: {todo[0]}" if todo else ""))
        return "\n".join(lines)

    def _line(self, chapter: str, about: str, names: list[str], widest: int) -> str:
        marks = "".join("■" if name in self.passed else "□" for name in names)
        return f"{chapter:>2}  {about:<{widest}}  {marks}".rstrip()


def progress(path=None) -> Progress:
    """The map of what is passed, by default the learner's own; a damaged file counts as empty, and a line says so.

    >>> progress().passed      # nothing is kept while tests run
    {}
    """
    try:
        passed = read(path)
    except (OSError, ValueError) as error:
        _tell(f"({error}; taken as empty)" if path else f"({place().name} cannot be read and is taken as empty)")
        passed = {}
    return Progress(passed, exercises())


def merge(paths: Iterable) -> dict[str, dict[str, str]]:
    """{learner: what is passed} of a class's files; a learner is called as the file is, without its ending.

    Files of one name in several folders (anna/progress.json, ben/progress.json) are told by the folder.
    Raises: FileNotFoundError, ValueError as read.
    """
    paths, found = [check_file(path) for path in check_list(paths, "paths")], {}
    stems = [path.stem for path in paths]
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 else "/".join([*path.parent.parts[-1:], path.stem])
        found[f"{name} ({len(found)})" if name in found else name] = read(path)
    return found


def as_csv(learners: Mapping[str, Mapping[str, str]]) -> str:
    """A row for each learner, a column for each exercise: the day on which it was passed."""
    check_kind(learners, "learners", Mapping, "merge gives")
    names, file = [name for _, some in exercises().values() for name in some], io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["learner", *names])
    writer.writerows([learner, *(passed.get(name, "") for name in names)] for learner, passed in learners.items())
    return file.getvalue()


def summary(learners: Mapping[str, Mapping[str, str]]) -> str:
    """How many of a class passed each exercise, chapter by chapter, and how many each learner passed."""
    check_kind(learners, "learners", Mapping, "merge gives")
    there, lines = exercises(), [f"of {len(learners)} learners, passed by"]
    for chapter, (about, names) in there.items():
        counts = [f"{name}: {sum(name in passed for passed in learners.values())}" for name in names]
        lines.append(f"{chapter:>2}  {about}   {'  '.join(counts)}")
    count = sum(len(names) for _, names in there.values())
    everything = {name for _, names in there.values() for name in names}
    lines += [f"{learner}: {len(everything & passed.keys())} of {count}" for learner, passed in learners.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m quantlab.progress", description=__doc__.splitlines()[0])
    words = parser.add_subparsers(dest="what")
    join = words.add_parser("merge", help="the files of a class")
    join.add_argument("files", nargs="+")
    join.add_argument("--out", help="a .csv file: who passed which exercise, and when")
    chosen = parser.parse_args(arguments)
    if chosen.what is None:
        print(progress())
        return 0
    try:
        learners = merge(chosen.files)
        if chosen.out:
            write_whole(chosen.out, as_csv(learners))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(summary(learners))
    return 0


def _reason(error: Exception) -> str:
    """In words that name no folder of this machine."""
    if isinstance(error, ValueError):
        return "the file of progress is damaged; delete it to begin a new one"
    return getattr(error, "strerror", None) or type(error).__name__


def _tell(line: str) -> None:
    """Once in a session."""
    if line not in _told:
        _told.add(line)
        print(line)


if __name__ == "__main__":
    from quantlab.progress import main as run  # by its own name: quantlab.checks imports the module, too

    sys.exit(run())
