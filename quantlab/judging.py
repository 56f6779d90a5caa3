"""How an answer is judged: run under guard on many cases beside the stored solution; a slip is known by what it gives.

An exercise says what goes in (cases, edges), what is right (its solution, or a rule), and which slips learners make.
"""

import _thread
import copy
import dis
import inspect
import linecache
import math
import os
import random as python_random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

LIBRARY = str(Path(__file__).resolve().parent) + os.sep


class Wrong(Exception):
    """The property that broke, what was got, and a likely cause: the text that the learner reads."""


class NotAttempted(Exception):
    """The stub was left as it is."""


def use_plainly(answer, *arguments):
    """An answer is used by calling it."""
    return answer(*arguments)


@dataclass(frozen=True)
class Exercise:
    """One exercise. Right is what gives the solution's results, within the tolerance, on every case: or keeps the rule.

    cases(random) draws argument tuples from a torch.Generator, as many and as different as tell right from wrong;
    edges() has those that are always tried, and tried first. rule(result, *arguments) raises Wrong, and may return a
    sentence to say after "passed". slips maps what to say to the slip: a function, or an edit of the solution's
    source, ("torch.round", "torch.floor"); a learner's results that equal a slip's on every case get its
    message. test(answer), for what needs more than that, does the whole judging.
    """

    title: str
    test: Callable | None = None
    hints: tuple[str, str, str] = ("", "", "")  # from soft to strong
    solution: Callable | None = None  # a function or class
    cases: Callable | None = None
    edges: Callable | None = None
    rule: Callable | None = None
    slips: Mapping[str, object] = field(default_factory=dict)
    use: Callable = use_plainly  # use(answer, *arguments): how a result is got; its gradient as well, say
    tolerance: float = 1e-4  # of the largest number expected
    smallest: float = 1e-7  # differences that never count
    rounds: int = 3  # how often cases are drawn
    seconds: float = 20.0  # what one call may take


def judge(exercise: Exercise, answer) -> str:
    """What check says of an answer: passed, not yet (why), not attempted; never a traceback from inside the checker.

    Random states, threads and default dtype are afterwards as they were.
    """
    if answer is None or answer is ...:
        return "not attempted yet"
    if not callable(answer):
        return "not yet. Pass the function itself, without brackets: check(name, f), not check(name, f(...))"
    try:
        with untouched_state():
            note = exercise.test(answer) if exercise.test else _judge_by_cases(exercise, answer)
    except NotAttempted:
        return "not attempted yet"
    except Wrong as wrong:
        return f"not yet. {wrong}"
    except Exception as error:  # noqa: BLE001  only tests of their own get here: the learner's code failed in one
        return _of_test(error)
    return "passed" if note is None else f"passed. {note}"


def draw(exercise: Exercise, seed: int = 0) -> Iterator[tuple]:
    """The argument tuples that an exercise is tried on: its edges, then cases, each the same for the same seed."""
    if exercise.edges is not None and seed == 0:
        yield from exercise.edges()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(exercise.rounds if exercise.cases else 0):
        yield from exercise.cases(generator)


def _judge_by_cases(exercise: Exercise, answer) -> str | None:
    note, done = None, []
    for arguments in draw(exercise):
        got = call(exercise, answer, arguments)
        done.append((arguments, got, _solved(exercise, arguments)))
        if exercise.rule is None:
            _compare(exercise, answer, done)
        else:
            note = exercise.rule(got, *copied(arguments))
    return note


def _solved(exercise: Exercise, arguments):
    return None if exercise.rule else exercise.use(exercise.solution, *copied(arguments))


def _compare(exercise: Exercise, answer, done: list) -> None:
    """Raise Wrong if the last of the cases done differs, with the message of the slip that the answer seems to make."""
    arguments, got, wanted = done[-1]
    if seen := difference(got, wanted, exercise.tolerance, exercise.smallest):
        raise Wrong(f"{_shown_call(exercise, arguments)}{seen} {_cause(exercise, answer, done)}".strip())


def _cause(exercise: Exercise, answer, done: list) -> str:
    """The message of the slip that gives the learner's results on all cases, or of the only one that does so far."""
    results = [(arguments, got) for arguments, got, _ in done]
    like = [text for text in exercise.slips if _makes(exercise, text, results)]
    more = results + _later(exercise, answer, len(done)) if len(like) else []
    same = [text for text in like if _makes(exercise, text, more[len(done) :])]
    return (same or (like if len(like) == 1 else [""]))[0]


def _later(exercise: Exercise, answer, done: int) -> list:
    """What the answer gives on up to twenty cases more, as far as it does."""
    results = []
    try:
        for arguments in list(draw(exercise))[done : done + 20]:
            results.append((arguments, call(exercise, answer, arguments)))
    except (Wrong, NotAttempted):
        pass
    return results


def _makes(exercise: Exercise, message: str, results: list) -> bool:
    return all(_gives(exercise, slip(exercise, message), arguments, got) for arguments, got in results)


def slip(exercise: Exercise, message: str):
    """The slip behind a message, as a function; an edit is made in the solution's source."""
    found = exercise.slips[message]
    edits = found if isinstance(found, tuple) and found and all(isinstance(text, str) for text in found) else None
    return found if edits is None else edited(exercise.solution, edits)


@cache
def edited(function: Callable, edits: tuple) -> Callable:
    """The function with pieces of its source replaced: edits = (old, new, old, new …).

    Raises: ValueError if a piece does not occur.
    """
    source = inspect.getsource(function)
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        if old not in source:
            raise ValueError(f"{function.__name__} has no {old!r} to replace")
        source = source.replace(old, new)
    names = dict(function.__globals__)
    exec(compile(source, f"<slip of {function.__name__}>", "exec"), names)  # noqa: S102  our own source
    return names[function.__name__]


def _gives(exercise: Exercise, slip, arguments: tuple, got) -> bool:
    try:
        made = exercise.use(slip, *copied(arguments))
    except Exception:  # noqa: BLE001  a slip that fails here gives nothing
        return False
    return difference(got, made, exercise.tolerance, exercise.smallest) is None


# One call of the learner's code


def call(exercise: Exercise, answer, arguments: tuple):
    """What the answer gives for these arguments; Wrong if it fails, is endless, or changes one of them in place."""
    given = copied(arguments)
    try:
        with within(exercise.seconds):
            result = exercise.use(answer, *given)
    except (Wrong, NotAttempted):
        raise
    except Exception as error:  # noqa: BLE001  the learner's own code failed, in any way it likes
        raise _as_theirs(error, exercise, answer, arguments) from None
    for name, before, after in zip(_names(exercise, len(given)), arguments, given, strict=True):
        if is_changed(before, after):
            raise Wrong(f"{name} was changed in place: it belongs to the caller. Work on a copy, {name}.clone(), say.")
    return result


@contextmanager
def within(seconds: float):
    """Stop what runs here after so many seconds, with a word. No limit outside the main thread, where cells run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late = threading.Event()

    def stop():
        late.set()
        _thread.interrupt_main()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    before = signal.getsignal(signal.SIGINT)
    deaf = before in (signal.SIG_IGN, signal.SIG_DFL)  # as a program in the background may be
    if deaf:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        if not late.is_set():
            raise
        raise Wrong(f"No answer after {seconds:g} seconds. Is there a loop that never ends?") from None
    finally:
        timer.cancel()
        if deaf:
            signal.signal(signal.SIGINT, before)


@contextmanager
def untouched_state():
    """Random states, number of threads, default dtype and gradient mode: afterwards as before."""
    states = python_random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  learners use it
    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        python_random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)


def copied(value):
    """A copy that shares no memory with the value; tensors keep their strides and whether they need a gradient."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, tuple | list):
        return type(value)(copied(v) for v in value)
    if isinstance(value, dict):
        return {key: copied(v) for key, v in value.items()}
    if isinstance(value, nn.Module) and sum(p.numel() for p in value.parameters()) > 20_000_000:
        return value  # a large language model: too much to copy for every call
    return copy.deepcopy(value)


def is_changed(before, after) -> bool:
    """Whether an argument, after a call, holds other values than before: tensors, arrays, lists, dicts, modules."""
    if isinstance(before, Tensor):
        return before.shape != after.shape or not torch.equal(before.nan_to_num(), after.nan_to_num())
    if isinstance(before, np.ndarray):
        return not np.array_equal(before, after, equal_nan=before.dtype.kind == "f")
    if isinstance(before, tuple | list):
        return len(before) != len(after) or any(map(is_changed, before, after))
    if isinstance(before, dict):
        return list(before) != list(after) or any(is_changed(before[key], after[key]) for key in before)
    if isinstance(before, nn.Module):
        return is_changed(before.state_dict(), after.state_dict())
    return False


def with_gradient(answer, x: Tensor, *rest):
    """(y, gradient of x) of answer(x, *rest), for a gradient that comes in, not all ones; None where none arrives.

    A `use` for exercises on gradients. What comes in is drawn anew for each shape, always the same.
    """
    x, before = x.detach().clone().requires_grad_(), x
    y = answer(x, *rest)
    expect(not is_changed(before.detach(), x.detach()), "x was changed in place: return a new tensor.")
    if not isinstance(y, Tensor) or not y.requires_grad:
        return y, None
    coming = torch.randn(y.shape, generator=torch.Generator().manual_seed(y.numel())).to(y.dtype)
    return y, torch.autograd.grad(y, x, coming, allow_unused=True)[0]


# Errors in the learner's code


def _as_theirs(error: Exception, exercise: Exercise, answer, arguments: tuple) -> Exception:
    """The error as a Wrong that shows the learner's line, or NotAttempted if it is the stub's own."""
    frames = list(traceback.walk_tb(error.__traceback__))
    theirs = [(frame, line) for frame, line in frames if _is_theirs(frame)]
    if not theirs:
        return _of_call(error, exercise, answer, arguments)
    frame, line = theirs[-1]
    if _is_stub(error, frame, frames[-1][0]):
        return NotAttempted()
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    where = f"in line {line - frame.f_code.co_firstlineno + 1} of {frame.f_code.co_name}" + (source and f", `{source}`")
    return Wrong(f"Your code stopped {where}, with {type(error).__name__}: {error}".rstrip(": "))


def _is_theirs(frame) -> bool:
    """No frame of this library, or of an installed package; a mutant's and a notebook cell's are theirs."""
    file = frame.f_code.co_filename
    return not file.startswith((LIBRARY, sys.prefix, sys.base_prefix, "<frozen", "<__array_function__"))


def _is_stub(error: Exception, frame, last) -> bool:
    """A bare `raise NotImplementedError` in code that does nothing else."""
    bare = isinstance(error, NotImplementedError) and not error.args
    steps = {instruction.opname for instruction in dis.get_instructions(frame.f_code)}
    return bare and frame is last and steps <= {"RESUME", "LOAD_GLOBAL", "RAISE_VARARGS", "COPY_FREE_VARS", "NOP"}


def _of_call(error: Exception, exercise: Exercise, answer, arguments: tuple) -> Wrong:
    """The error of a call that never reached the learner's code, or of a function of the library given as answer."""
    names = ", ".join(_names(exercise, len(arguments)))
    try:
        inspect.signature(answer).bind(*arguments)
    except TypeError as wrong:
        return Wrong(f"Your function is called with ({names}), and its parameters do not take that: {wrong}.")
    except ValueError:
        pass  # a builtin that shows no signature
    return Wrong(f"Called with ({names}), your answer stopped with {type(error).__name__}: {error}")


def _of_test(error: Exception) -> str:
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_theirs(frame)]
    if not frames:
        return (
            "not yet. What your code returned is not of the kind asked for "
            f"({type(error).__name__}: {error}). Did it return, and everything?"
        )
    if _is_stub(error, frames[-1][0], list(traceback.walk_tb(error.__traceback__))[-1][0]):
        return "not attempted yet"
    return f"not yet. Your code stopped with {type(error).__name__}: {error}"


def _names(exercise: Exercise, count: int) -> list[str]:
    names = list(inspect.signature(exercise.solution).parameters)
    return (names + [f"argument {i + 1}" for i in range(len(names), count)])[:count]


# Results of any container and number type


def difference(got, wanted, tolerance: float, smallest: float = 1e-7) -> str | None:
    """None if got is what was wanted; else a sentence that says where it differs.

    Numbers may come as Python's, numpy's or torch's, tensors as arrays or lists, tuples as lists; a shape counts, only
    a single number may be (1,). Whole numbers, words and truth values must be equal, reals lie within tolerance of the
    largest one wanted.
    """
    if isinstance(wanted, Tensor):
        return _tensor_difference(got, wanted, tolerance, smallest)
    if isinstance(wanted, bool | str | None | nn.Module) or callable(wanted):
        return _word_difference(got, wanted)
    if isinstance(wanted, int | float):
        return _number_difference(got, wanted, tolerance, smallest)
    if isinstance(wanted, dict):
        return _dict_difference(got, wanted, tolerance, smallest)
    if isinstance(wanted, tuple | list):
        return _list_difference(got, wanted, tolerance, smallest)
    if isinstance(wanted, np.ndarray):
        return _tensor_difference(got, torch.from_numpy(wanted), tolerance, smallest)
    return None if got == wanted else f"{shown(wanted)} was expected; got {shown(got)}."


def _word_difference(got, wanted) -> str | None:
    plain = got.item() if isinstance(wanted, bool) and getattr(got, "size", None) and _count(got) == 1 else got
    same = plain is wanted or (type(plain) is type(wanted) and not isinstance(wanted, nn.Module) and plain == wanted)
    return None if same else f"{shown(wanted)} was expected; got {shown(got)}."


def two_ends(ends) -> tuple:
    """An answer's (low, high), in any container and of any number type; Wrong unless they are two numbers in order."""
    ends = ends.tolist() if hasattr(ends, "tolist") else ends
    expect(isinstance(ends, tuple | list) and len(ends) == 2, f"Return two numbers, low and high; got {ends!r}.")
    low, high = (as_number(end) for end in ends)
    expect(None not in (low, high), f"Return two numbers, low and high; got {ends!r}.")
    expect(low < high, f"low must lie below high; got {low:.3g} and {high:.3g}.")
    return low, high


def as_number(value) -> float | int | None:
    """A single number of any kind as Python's; None if it is none."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        if _count(value) != 1 or (isinstance(value, Tensor) and value.is_complex()):
            return None
        value = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
        value = value.reshape(-1)[0].item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _number_difference(got, wanted, tolerance: float, smallest: float) -> str | None:
    number = as_number(got)
    if number is None:
        return f"A number was expected; got {shown(got)}."
    exact = isinstance(wanted, int)
    bound = 0.0 if exact or not math.isfinite(wanted) else tolerance * abs(wanted) + smallest
    if number == wanted or abs(number - wanted) <= bound or (math.isnan(number) and math.isnan(wanted)):
        return None
    if exact and not float(number).is_integer():
        return f"A whole number was expected, {wanted}; got {shown(number)}."
    return "{} was expected; got {}.".format(*apart(wanted, number))


def _dict_difference(got, wanted: dict, tolerance: float, smallest: float) -> str | None:
    if not isinstance(got, Mapping):
        return f"A dict was expected; got {shown(got)}."
    if set(got) != set(wanted):
        return f"Keys {sorted(map(str, wanted))} were expected; got {sorted(map(str, got))}."
    for key in wanted:
        if seen := difference(got[key], wanted[key], tolerance, smallest):
            return f"[{key!r}]: {seen}"
    return None


def _list_difference(got, wanted, tolerance: float, smallest: float) -> str | None:
    rows = isinstance(got, Tensor | np.ndarray) and got.ndim > 0
    if not rows and not isinstance(got, tuple | list):
        return f"{len(wanted)} results were expected, as a tuple; got {shown(got)}."
    if len(got) != len(wanted):
        return f"{len(wanted)} results were expected; got {len(got)}."
    for i, (mine, right) in enumerate(zip(got, wanted, strict=True)):
        if seen := difference(mine, right, tolerance, smallest):
            return f"Result {i + 1} of {len(wanted)}: {seen}"
    return None


def _tensor_difference(got, wanted: Tensor, tolerance: float, smallest: float) -> str | None:
    mine = as_tensor(got)
    if mine is None:
        return f"A tensor was expected; got {shown(got)}."
    if mine.shape != wanted.shape and not (mine.numel() == wanted.numel() == 1):
        return f"A tensor of shape {tuple(wanted.shape)} was expected; got {tuple(mine.shape)}."
    right = wanted.detach().double().reshape(mine.shape)
    exact = not wanted.is_floating_point()
    finite = right[right.isfinite()].abs()
    bound = 0.0 if exact else tolerance * (finite.max().item() if finite.numel() else 0.0) + smallest
    same = (mine == right) | ((mine - right).abs() <= bound) | (mine.isnan() & right.isnan())
    if same.all():
        return None
    return _where(mine, right, same)


def _where(mine: Tensor, right: Tensor, same: Tensor) -> str:
    """All values if they are few; else the first that differs, and how many do."""
    if mine.numel() <= 8:
        return "{} was expected; got {}.".format(*apart(right.tolist(), mine.tolist()))
    index = (~same).nonzero()[0].tolist()
    wanted, got = apart(right[tuple(index)].item(), mine[tuple(index)].item())
    place = f"At {index if len(index) > 1 else f'[{index[0]}]'}"
    return f"{place} {wanted} was expected; got {got}; {int((~same).sum())} of {mine.numel()} values differ."


def as_tensor(value) -> Tensor | None:
    """A tensor, array, number or (nested) list of them, as float64; None if it is none of these, or ragged."""
    try:
        if isinstance(value, Tensor):
            return None if value.is_complex() else value.detach().cpu().double()
        if isinstance(value, list | tuple):
            parts = [as_tensor(v) for v in value]
            return None if not parts or any(part is None for part in parts) else torch.stack(parts)
        number = isinstance(value, int | float | np.ndarray | np.generic)
        return torch.as_tensor(np.asarray(value)).double() if number else None
    except (TypeError, ValueError, RuntimeError):
        return None


def _count(value) -> int:
    return value.numel() if isinstance(value, Tensor) else np.size(value)


# What a message shows


def shown(value, digits: int = 4) -> str:
    """A value as a message shows it: short, numbers with a few digits, of a large tensor its shape."""
    if isinstance(value, bool | str | None):
        return repr(value)
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, Tensor | np.ndarray | np.generic):
        small = _count(value) <= 8 and not (isinstance(value, Tensor) and value.is_complex())
        return shown(value.tolist(), digits) if small else f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list) and len(value) <= 16:
        inside = ", ".join(shown(v, digits) for v in value)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, dict) and len(value) <= 6:
        return "{" + ", ".join(f"{key!r}: {shown(v, digits)}" for key, v in value.items()) + "}"
    return str(value) if isinstance(value, int) else f"a {type(value).__name__}"


def apart(wanted, got) -> tuple[str, str]:
    """Both as text, with as many digits as tell them apart."""
    for digits in (4, 7, 10, 17):
        texts = shown(wanted, digits), shown(got, digits)
        if texts[0] != texts[1]:
            break
    return texts


def _shown_call(exercise: Exercise, arguments: tuple) -> str:
    """For x = [0.5, 1], bits = 3: what the answer was called with, as far as it is short."""
    names = _names(exercise, len(arguments))
    parts = [f"{name} = {shown(value)}" for name, value in zip(names, arguments, strict=True)]
    text = ", ".join(part for part in parts if len(part) <= 90)
    return f"For {text}: " if text else ""


def expect(true: bool, message: str) -> None:
    """Raise Wrong(message) unless the property holds."""
    if not true:
        raise Wrong(message)
