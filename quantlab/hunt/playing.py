"""What a learner calls: show("ranges") · program("ranges.3") · verdict("ranges.3", "bug", test=f) · hint · score()"""

import contextlib
import inspect
import io
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantlab.arguments import check_choice, check_path
from quantlab.files import write_whole
from quantlab.hunt import codebooks, integers, measuring, ranges, tools, training
from quantlab.hunt.atlas import notebooks
from quantlab.hunt.case import Case, Room
from quantlab.hunt.judging import disguised, judge
from quantlab.progress import remember

ROOMS: dict[str, Room] = {
    file.ROOM.name: file.ROOM for file in (ranges, codebooks, integers, measuring, training, tools)
}
CASES: dict[str, Case] = {
    f"{room.name}.{number}": case for room in ROOMS.values() for number, case in enumerate(room.cases, 1)
}
# The exercises of notebook 21, for the map of progress: each is passed when both of its programs are judged rightly.
EXERCISES = {
    "21.1": ("ranges.3", "ranges.4"),
    "21.2": ("codebooks.2", "codebooks.6"),
    "21.3": ("integers.2", "integers.3"),
    "21.4": ("measuring.6", "measuring.8"),
    "21.5": ("training.2", "training.5"),
    "21.6": ("tools.1", "tools.4"),
}
NOT_YET = (None, ...)


@dataclass(frozen=True)
class Record:
    """What was said of one program."""

    right: bool = False  # the bug was proved by a test, or the program called fine and is, before anything told so
    alarm: bool = False  # a program that is fine was accused by a test
    missed: bool = False  # a bug was called fine
    told: bool = False  # revealed before it was right


_said: dict[str, Record] = {}  # by the name of the program


def show(name: str) -> None:
    """Print a program, or all of a room: what it promises, its source with line numbers, and what it prints.

    Raises: ValueError if there is no such room or program.
    """
    if name in ROOMS:
        for one in _names(name):
            print(_page(one), end="\n\n")
    else:
        find(name)
        print(_page(name))


def program(name: str) -> Callable:
    """The program itself, to be called and tried. Raises: ValueError if there is none of this name.

    >>> program("integers.2").__doc__[:40]
    'The sum of (x - x_zero) * (w - w_zero) o'
    """
    case = find(name)
    return disguised(case, case.program, [])


def verdict(name: str, opinion: str, test: Callable | None = None) -> None:
    """Say "bug" or "fine" of a program, and print how it went. A bug needs a test: f(program) that asserts.

    The test must fail on the program as shown, and pass on two versions that keep the promise, which you do not see.

    Raises: ValueError if there is no such program, or the opinion is another word.
    """
    case = find(name)
    if opinion in NOT_YET:
        return _say(name, "not attempted yet")
    if check_choice(opinion, "opinion", ("bug", "fine")) == "fine":
        _say(name, _called_fine(name, case))
    elif test in NOT_YET:
        _say(name, 'a bug is proved by a test: verdict(name, "bug", test=f), where f(program) asserts what must hold')
    else:
        _say(name, _called_bug(name, case, test))


def hint(name: str) -> None:
    """Print a question that helps. Raises: ValueError if there is no such program."""
    print(f"{name}: {find(name).hint}")


def reveal(name: str) -> None:
    """Print what is the matter with a program, how it is mended, and a test. Raises: ValueError if there is none.

    What you have not found before then counts as told.
    """
    case = find(name)
    if not _said.get(name, Record()).right:
        _note(name, told=True)
    print(f"{name} {_truth(case)}")
    versions = (case.mended, case.mended_again) if case.buggy else ()
    for function in (*versions, case.test):
        print("\n" + _source(function), end="")


def restart() -> None:
    """Forget all that was said."""
    _said.clear()


def save(path: str | Path = "hunt.json") -> None:
    """Write what was said so far, to go on another day with resume()."""
    said = {name: [what for what, true in vars(record).items() if true] for name, record in _said.items()}
    write_whole(check_path(path), json.dumps(said, indent=1))


def resume(path: str | Path = "hunt.json") -> None:
    """Read what save() wrote, in the place of what was said since; if there is no such file, nothing happens.

    Raises: ValueError if the file is something else.
    """
    path = check_path(path)
    if not path.exists():
        return
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        records = {name: Record(**dict.fromkeys(whats, True)) for name, whats in said.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is no saved hunt: {error}") from None
    for name in records:
        find(name)
    _said.clear()
    _said.update(records)


@dataclass(frozen=True)
class Score:
    """How a hunt stands."""

    bugs: int  # of all
    found: int  # proved by a test
    cleared: int  # called fine, and they are
    alarms: tuple[str, ...]  # programs that are fine, accused
    missed: tuple[str, ...]  # bugs called fine
    told: tuple[str, ...]  # revealed
    open: int  # nothing valid said yet
    chapters: tuple[str, ...]  # to read again

    def __repr__(self) -> str:
        again = [f"  {title}, for {programs}" for title, _, programs in self._again()]
        return "\n".join([*self._counts(), *again])

    def _repr_markdown_(self) -> str:
        again = [f"  - [{title}]({file}), for {programs}" for title, file, programs in self._again()]
        return "\n".join([*(f"- {line}" for line in self._counts()), *again])

    def _counts(self) -> list[str]:
        lines = [f"bugs proved by a test: {self.found} of {self.bugs}; programs rightly called fine: {self.cleared}"]
        for title in ("alarms", "missed", "told"):
            names = getattr(self, title)
            lines.append(f"{TITLES[title]}: {len(names)}" + (f" ({', '.join(names)})" if names else ""))
        return [*lines, f"still open: {self.open}", "to read again:" + ("" if self.chapters else " nothing so far")]

    def _again(self) -> list[tuple[str, str, str]]:
        """(title, file, programs) of each chapter to read again."""
        wrong, files = {*self.alarms, *self.missed, *self.told}, notebooks()
        return [
            (*files.get(chapter, (f"notebook {chapter}", "")), ", ".join(n for n in CASES if n in wrong & _of(chapter)))
            for chapter in self.chapters
        ]


TITLES = {"alarms": "false alarms", "missed": "bugs called fine", "told": "revealed"}


def score() -> Score:
    """Bugs found, false alarms, and the chapters that take apart what went wrong."""

    def those(what: str) -> tuple[str, ...]:
        return tuple(name for name in CASES if getattr(_said.get(name, Record()), what))

    right, wrong = those("right"), {*those("alarm"), *those("missed"), *those("told")}
    return Score(
        bugs=sum(case.buggy for case in CASES.values()),
        found=sum(CASES[name].buggy for name in right),
        cleared=sum(not CASES[name].buggy for name in right),
        alarms=those("alarm"),
        missed=those("missed"),
        told=those("told"),
        open=len(CASES.keys() - set(right) - wrong),
        chapters=tuple(sorted({CASES[name].chapter for name in wrong})),
    )


def _of(chapter: str) -> set[str]:
    """The programs that a chapter takes apart."""
    return {name for name, case in CASES.items() if case.chapter == chapter}


def find(name: str) -> Case:
    """The program of this name. Raises: ValueError, with the names of its room, if there is none."""
    room = str(name).partition(".")[0]
    if room not in ROOMS:
        raise ValueError(f"the hunt has no program {name!r}: the rooms are {', '.join(ROOMS)}")
    if name not in CASES:
        raise ValueError(f"the hunt has no program {name!r}; the room has {', '.join(_names(room))}")
    return CASES[name]


def _called_fine(name: str, case: Case) -> str:
    said = _said.get(name, Record())
    if case.buggy:
        _note(name, missed=not said.right)
        return f"there is a bug in it. Find it, and write a test that shows it. {case.hint}"
    _note(name, right=not (said.alarm or said.told))
    return _truth(case)


def _called_bug(name: str, case: Case, test: Callable) -> str:
    judged, said = judge(case, test), _said.get(name, Record())
    if judged.proves:
        _note(name, right=not said.told)
        return f"found, and proved. {_truth(case)}"
    if judged.accuses and not case.buggy:
        _note(name, alarm=not said.right)
        return f"a false alarm: your test asks for more than the promise. {_truth(case)}"
    return judged.text


def _truth(case: Case) -> str:
    kind = f"A bug ({case.error})" if case.buggy else "Fine, though it looks odd"
    return f"{kind}. {case.story} (Chapter {case.chapter})"


def _note(name: str, **what: bool) -> None:
    before = vars(_said.get(name, Record()))
    _said[name] = Record(**{key: old or what.get(key, False) for key, old in before.items()})
    for exercise, programs in EXERCISES.items():
        if name in programs:
            remember(exercise, passed=all(_said.get(one, Record()).right for one in programs))


def _say(name: str, text: str) -> None:
    print(textwrap.fill(f"{name} {CASES[name].title}: {text}", 110))


def _names(room: str) -> list[str]:
    return [name for name, case in CASES.items() if name.partition(".")[0] == room]


def _page(name: str) -> str:
    """One program as it is shown."""
    case = CASES[name]
    source = "".join(_source(part) + "\n\n" for part in case.parts) + _source(case.program)
    lines = [f"{number:3}  {line}".rstrip() for number, line in enumerate(source.splitlines(), 1)]
    promise = textwrap.indent(textwrap.fill(case.promise, 100), "     ")
    prints = textwrap.indent(printed(case), "     ")
    return "\n".join([f"── {name}  {case.title}", "It promises:", promise, *lines, "It prints:", prints.rstrip()])


def _source(function: Callable) -> str:
    return textwrap.dedent(inspect.getsource(function))


def printed(case: Case, version: Callable | None = None) -> str:
    """What the demonstration of a program prints; of another version of it, if one is given."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        case.demo(version or case.program)
    return out.getvalue()
