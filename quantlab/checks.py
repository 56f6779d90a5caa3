"""Exercises that answer back, check("1.1", answer) · hint("1.1") · solution("1.1"); findings: found(holds, claim)"""

import importlib
import inspect
from collections.abc import Callable

from quantlab.exercises import CHAPTERS
from quantlab.judging import Exercise, Wrong, expect, judge
from quantlab.progress import remember

__all__ = ["Exercise", "Wrong", "check", "expect", "find", "found", "hint", "judge", "lm_where", "solution"]

_given: dict[str, int] = {}  # hints shown so far, by exercise


def check(name: str, answer) -> None:
    """Test an answer and print what was found: passed, not attempted yet, or the property that broke and a hint.

    Raises: ValueError if there is no exercise of this name.

    >>> check("1.1", None)
    1.1 quantize: not attempted yet
    """
    exercise = find(name)
    verdict = judge(exercise, answer)
    print(f"{name} {exercise.title}: {verdict}")
    remember(name, passed=verdict.startswith("passed"))


def hint(name: str) -> None:
    """Print the next of an exercise's three hints; after the third, that one again. Raises ValueError as check does."""
    hints = find(name).hints
    number = min(_given.get(name, 0) + 1, len(hints))
    _given[name] = number
    print(f"{name} hint {number} of {len(hints)}: {hints[number - 1]}")


def solution(name: str) -> None:
    """Print an exercise's solution. Raises ValueError as check does."""
    found = find(name).solution
    print(inspect.getsource(found))


def find(name: str) -> Exercise:
    """The exercise of this name, its chapter before the dot.

    Raises: ValueError, with the names of the chapter, if there is none.

    >>> find("10.2").title
    'compensate'
    """
    chapter = str(name).partition(".")[0]
    if chapter not in CHAPTERS:
        raise ValueError(f"no exercise {name!r}: there is no chapter {chapter!r}")
    exercises = importlib.import_module(f"quantlab.exercises.{CHAPTERS[chapter]}").EXERCISES
    if name not in exercises:
        raise ValueError(f"no exercise {name!r}; chapter {chapter} has {', '.join(exercises)}")
    return exercises[name]


def found(holds: bool, claim: str, *, of: str = "model", home: str = "bundled", on: str | None = None) -> None:
    """A finding, which is no law: something measured on one model, its home, or on one machine.

    of="model": on its home it must hold, or AssertionError is raised; on another model (`on`; None: QUANTLAB_MODEL's) a
    line says what does not hold there, and the notebook goes on. of="machine": a time, say; it never raises.

    >>> found(2 < 3, "2 is below 3")
    >>> found(2.5 < 2, "int8 takes 2.50 of float32's time, below 2 where this was written", of="machine")
    Not so on this machine: int8 takes 2.50 of float32's time, below 2 where this was written
    """
    if holds:
        return
    from quantlab.lm import chosen_model  # here, since a notebook without a model asks checks as well

    if of == "model" and (on or chosen_model()) == home:
        raise AssertionError(f"not so, though it was found on this model: {claim}")
    print(f"Not so on this {of}: {claim}")


def lm_where(works: Callable):
    """(model, tokenizer) of load_lm, if works(model) raises no ValueError; else the bundled ones, and a line says why.

    For a chapter that needs of a model what not all have: norms that linear layers alone read, say.
    """
    from quantlab.lm import DATA, load_lm

    model, tokenizer = load_lm()
    try:
        works(model)
    except ValueError as why:
        print(f"On the bundled model, since {why}")
        return load_lm(str(DATA / "model"))
    return model, tokenizer
