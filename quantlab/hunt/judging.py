"""Run a learner's test on a program and on its mended versions, and say what it showed."""

import ctypes
import inspect
import linecache
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantlab.hunt.case import Case
from quantlab.judging import untouched_state

SECONDS = 20.0  # for one run of a test
ROOMS = Path(__file__).resolve().parent
NO_FILE = "<program>"


class Endless(BaseException):
    """Raised inside a test that does not end; not an Exception, so that `except Exception` lets it pass."""


@dataclass(frozen=True)
class Outcome:
    """What one run of a test did: passed, failed (an assert, or the program raised), or the test itself was no test."""

    kind: str  # "passed", "failed", "raised", "stub", "broken", "endless", "returned"
    note: str = ""
    called: bool = True  # whether the test called the program at all

    @property
    def exposes(self) -> bool:
        return self.kind in ("failed", "raised")


def run_test(test: Callable, case: Case, function: Callable, *, seconds: float = SECONDS) -> Outcome:
    """One run of test(function), in a thread of its own, so that one that never ends can be stopped."""
    calls, found = [], []
    program = disguised(case, function, calls)
    thread = threading.Thread(target=lambda: found.append(_outcome(test, program)), daemon=True)
    thread.start()
    thread.join(seconds)
    _stop(thread)
    outcome = found[0] if found and found[0].kind != "endless" else Outcome("endless", f"stopped after {seconds:g} s")
    return Outcome(outcome.kind, outcome.note, bool(calls))


def _stop(thread: threading.Thread) -> None:
    """Raise Endless in a thread that still runs, but never in the middle of an import, which would stay half done."""
    for _ in range(100):  # the first ones may be caught by the test
        if not thread.is_alive():
            break
        if not _imports(thread):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Endless))
        thread.join(0.2)


def _imports(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident)
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def disguised(case: Case, function: Callable, calls: list) -> Callable:
    """The function without its name and its text: every version looks the same from outside."""
    nameless = _without_text(function)

    def program(*args, **kwargs):
        calls.append(len(args))
        return nameless(*args, **kwargs)

    program.__doc__ = case.promise
    program.__signature__ = inspect.signature(case.program)
    return program


def _without_text(function: Callable) -> Callable:
    """The same function, of which inspect finds no source."""
    code = function.__code__.replace(co_filename=NO_FILE, co_name="program", co_qualname="program")
    return types.FunctionType(code, function.__globals__, "program", function.__defaults__, function.__closure__)


def _outcome(test: Callable, program: Callable) -> Outcome:
    try:
        answer = test(program)
    except NotImplementedError as error:
        return _raised(error) if _inside_program(error) else Outcome("stub")
    except AssertionError as error:
        return Outcome("failed", str(error))
    except Endless:
        return Outcome("endless")
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001  the learner's code may raise anything
        return _raised(error) if _inside_program(error) else Outcome("broken", _where(error, test))
    return Outcome("passed") if answer is None else Outcome("returned", repr(answer)[:60])


def _raised(error: BaseException) -> Outcome:
    return Outcome("raised", f"{type(error).__name__}: {error}")


def _inside_program(error: BaseException) -> bool:
    """Whether an error came out of a program, or of what it returned, and not out of the test alone."""
    files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)} - {__file__}
    return any(file == NO_FILE or Path(file).parent == ROOMS for file in files)


def _where(error: BaseException, test: Callable) -> str:
    """The error, and the line of the test that it came from."""
    file = getattr(getattr(test, "__code__", None), "co_filename", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    text = linecache.getline(file, lines[-1]).strip() if lines else ""
    place = f" at `{text}`" if text else ""
    return f"{type(error).__name__}: {error}{place}"


@dataclass(frozen=True)
class Judgement:
    """What a test was worth: whether it proves a bug, whether it accuses a program that is fine, and what to say."""

    proves: bool
    accuses: bool  # it fails on the program as shown, and was a proper test
    text: str


def judge(case: Case, test: Callable, *, seconds: float = SECONDS) -> Judgement:
    """Run a test on the program as shown, and on two versions that keep the promise, written otherwise.

    The program comes up three times, so that a test which counts its calls, or draws new random numbers and finds the
    bug now and then, is not taken for a proof. Random states are afterwards as they were.
    """
    if not callable(test):
        return _no("Pass the test itself, without brackets: test=f, not test=f(program).")
    outcomes = []
    for version in (case.program, case.mended, case.mended_again, case.program, case.program):
        if version is not None:
            with untouched_state():
                outcomes.append(run_test(test, case, version, seconds=seconds))
            if problem := _improper(outcomes[-1]):
                return _no(problem)
    shown, others = outcomes[:1] + outcomes[-2:], outcomes[1:-2]
    if len({outcome.exposes for outcome in shown}) > 1:
        return _no("Run three times, your test did not say the same each time. Choose fixed values, or a fixed seed.")
    if not shown[0].exposes:
        return _no("Your test passes on the program as it is shown, so it accuses it of nothing.")
    if shown[0].kind == "raised" and not case.buggy:
        return _no(f"Your test makes the program stop ({shown[0].note}). Hand it what the promise names.")
    return _of_mended(others)


def _improper(outcome: Outcome) -> str:
    """Why a run was no test at all, or ""."""
    said = {
        "stub": "not attempted yet",
        "broken": f"Your test itself stopped with {outcome.note}.",
        "endless": f"Your test did not end ({outcome.note}). Is there a loop that never finishes?",
        "returned": f"Your test returned {outcome.note}. A test speaks by `assert`, and returns nothing.",
    }
    if outcome.kind in said:
        return said[outcome.kind]
    return "" if outcome.called else "Your test never called the program: it judges something else."


def _of_mended(outcomes: list[Outcome]) -> Judgement:
    """The judgement on a test that fails on the program as shown."""
    names = ("the mended program", "a second mended program, written otherwise")
    for outcome, which in zip(outcomes, names, strict=False):
        if outcome.kind == "raised":
            return _no(f"Your test makes {which} stop as well ({outcome.note}). Hand it what the promise names.", True)
        if outcome.exposes:
            reason = f" (it says: {outcome.note.splitlines()[0]})" if outcome.note else ""
            return _no(f"Your test fails on {which} as well{reason}. Ask for what the promise says, and no more.", True)
    return Judgement(bool(outcomes), True, "")


def _no(text: str, accuses: bool = False) -> Judgement:
    return Judgement(False, accuses, text)
