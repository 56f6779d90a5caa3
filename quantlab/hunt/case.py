"""A program of the bug hunt: what is printed, what it promises, and what shows whether it keeps its word."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One program. A bug has two mended versions, written differently; a program that is fine, a tempting "repair"."""

    title: str
    promise: str  # what the program is meant to do; a test may rely on this and on nothing else
    chapter: str  # "04": the notebook that takes it apart
    program: Callable  # as it is shown
    demo: Callable  # demo(program) prints something convincing
    test: Callable  # test(program) raises AssertionError if the promise is broken
    hint: str  # a question
    story: str  # what is wrong, or why it is right
    error: str | None = None  # "E5", or None: right though it looks odd
    mended: Callable | None = None
    mended_again: Callable | None = None  # written otherwise
    tempting: Callable | None = None  # the "repair" of a program that is fine, which breaks it
    parts: tuple = ()  # what else is shown with the program

    @property
    def buggy(self) -> bool:
        return self.error is not None


@dataclass(frozen=True)
class Room:
    """Programs about one subject, in the order in which they are numbered."""

    name: str
    title: str
    cases: tuple[Case, ...]


def bug(error: str, *, chapter: str, title: str) -> Callable[[type], Case]:
    """Make a Case of a class that is only a drawer: its docstring is the promise, its functions are the versions."""
    return lambda drawer: _case(drawer, error=error, chapter=chapter, title=title)


def fine(*, chapter: str, title: str) -> Callable[[type], Case]:
    """As bug, for a program that is right though it looks odd."""
    return lambda drawer: _case(drawer, chapter=chapter, title=title)


def _case(drawer: type, **given) -> Case:
    inside = {name: value for name, value in vars(drawer).items() if not name.startswith("__")}
    for name, function in inside.items():
        if inspect.isfunction(function):
            function.__qualname__ = name  # an error message must not tell the drawer's name
    return Case(promise=inspect.getdoc(drawer), **given, **inside)
