"""A machine that attacks the exercises: small changes of each stored solution, every one of which must be refused.

A mutant that gives the solution's results (or keeps the rule) on a thousand inputs that the check does not use is
equivalent, and may pass. By hand:  python -m tests.mutants 1.1 1.2   lists what passed, and why.
"""

import ast
import contextlib
import copy
import functools
import inspect
import io
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from quantlab import checks
from quantlab.judging import (
    Exercise,
    NotAttempted,
    Wrong,
    call,
    copied,
    difference,
    draw,
    judge,
    untouched_state,
    use_plainly,
)

INPUTS = 1000  # that an equivalent mutant answers rightly; where a rule judges, which is slow, some thirty
SECONDS = 2.0  # for one call of a mutant: many never end
OPERATORS = {
    ast.Add: [ast.Sub, ast.Mult], ast.Sub: [ast.Add], ast.Mult: [ast.Div, ast.Add], ast.Div: [ast.Mult, ast.FloorDiv],
    ast.FloorDiv: [ast.Div, ast.Mult], ast.Pow: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd], ast.LShift: [ast.RShift], ast.RShift: [ast.LShift],
}  # fmt: skip
COMPARISONS = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.GtE], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
}  # fmt: skip
NAMES = {
    "round": ["floor", "ceil", "trunc"], "floor": ["round", "ceil"], "ceil": ["floor"],
    "mean": ["sum", "amax", "median"],
    "sum": ["mean", "amax"], "amax": ["amin", "mean"], "amin": ["amax"], "max": ["min"], "min": ["max"],
    "std": ["var"], "log2": ["log", "log10"], "log": ["log2"], "log10": ["log"], "exp": ["exp2"], "abs": ["neg"],
    "argmax": ["argmin"], "argmin": ["argmax"], "log_softmax": ["softmax"], "softmax": ["log_softmax"],
    "square": ["abs"], "sqrt": ["abs"], "norm": ["sum"], "any": ["all"], "all": ["any"], "cumsum": ["flip"],
    "zeros_like": ["ones_like"], "ones_like": ["zeros_like"], "zeros": ["ones"], "ones": ["zeros"],
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    what: str  # the change, as a line of text
    function: Callable


def mutants(exercise: Exercise) -> Iterator[Mutant]:
    """Every small change of a stored solution that is a function, and a few of what goes in and comes out."""
    yield from _of_source(exercise.solution)
    yield from _of_calls(exercise)


def _of_source(solution) -> Iterator[Mutant]:
    source = textwrap.dedent(inspect.getsource(solution))
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    for place, node in enumerate(ast.walk(tree)):
        for changed in _changes(node):
            new = copy.deepcopy(tree)
            _replace(new, place, changed)
            text = ast.unparse(ast.fix_missing_locations(new))
            if text not in seen:
                seen.add(text)
                if made := _made(solution, text):
                    yield Mutant(_line_of_change(ast.unparse(tree), text), made)


def _made(solution, text: str):
    names = dict(solution.__globals__ if inspect.isfunction(solution) else vars(sys.modules[solution.__module__]))
    try:
        exec(compile(text, "<mutant>", "exec"), names)
    except (SyntaxError, NameError, TypeError, ValueError):
        return None
    return names[solution.__name__]


def _replace(tree: ast.AST, place: int, changed: ast.AST | None) -> None:
    """Put another node where the walk of the tree arrives in its place-th step; None deletes a statement."""
    target = next(node for i, node in enumerate(ast.walk(tree)) if i == place)
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, name, changed)
            elif isinstance(value, list) and any(v is target for v in value):
                kept = [changed if v is target else v for v in value]
                setattr(parent, name, [v for v in kept if v is not None] or [ast.Pass()])


def _line_of_change(old: str, new: str) -> str:
    before, after = old.splitlines(), new.splitlines()
    changed = next(((a, b) for a, b in zip(before, after) if a != b), (before[-1], "(a line less)"))  # noqa: B905
    return " -> ".join(text.strip() for text in changed)


def _changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """The nodes that may stand where this one stands."""
    match node:
        case ast.BinOp():
            for operator in OPERATORS.get(type(node.op), []):
                yield ast.BinOp(node.left, operator(), node.right)
            yield ast.BinOp(node.right, node.op, node.left)
            yield node.left
            yield node.right
        case ast.UnaryOp():
            yield node.operand
        case ast.Compare():
            for operator in COMPARISONS.get(type(node.ops[0]), []):
                yield ast.Compare(node.left, [operator(), *node.ops[1:]], node.comparators)
        case ast.BoolOp():
            yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
            yield from node.values
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield from (ast.Constant(v) for v in (node.value + 1, node.value - 1, 2 * node.value))
        case ast.Call():
            yield from _changed_calls(node)
        case ast.Attribute() if node.attr in NAMES:
            yield from (ast.Attribute(node.value, name, node.ctx) for name in NAMES[node.attr])
        case ast.Name(id="min"):
            yield ast.Name("max", node.ctx)
        case ast.Name(id="max"):
            yield ast.Name("min", node.ctx)
        case ast.Subscript(ctx=ast.Load()):
            yield node.value
            yield from _changed_index(node)
        case ast.Tuple(ctx=ast.Load()) if len(node.elts) == 2:
            yield ast.Tuple(node.elts[::-1], node.ctx)
        case ast.AugAssign():
            for operator in OPERATORS.get(type(node.op), []):
                yield ast.AugAssign(node.target, operator(), node.value)
            yield None
        case ast.Assign():
            yield None
        case ast.Expr() if not isinstance(node.value, ast.Constant):
            yield None
        case ast.If():
            yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
            yield ast.If(ast.Constant(True), node.body, node.orelse)
            yield ast.If(ast.Constant(False), node.body, node.orelse)
        case ast.keyword() if isinstance(node.value, ast.Constant):
            yield None


def _changed_calls(node: ast.Call) -> Iterator[ast.AST]:
    """A method left out, or a function of something; two arguments swapped."""
    if isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
    ):
        yield node.func.value
    if node.args:
        yield node.args[0]
    if len(node.args) >= 2:
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
        yield ast.Call(node.func, node.args[:-1], node.keywords)
    if isinstance(node.func, ast.Name) and node.func.id == "round":
        yield ast.Call(ast.Name("int", ast.Load()), node.args, [])
    for i, keyword in enumerate(node.keywords):
        rest = node.keywords[:i] + node.keywords[i + 1 :]
        if isinstance(keyword.value, ast.Constant) or keyword.arg in ("min", "max"):
            yield ast.Call(node.func, node.args, rest)


def _changed_index(node: ast.Subscript) -> Iterator[ast.AST]:
    index = node.slice
    if isinstance(index, ast.Slice):
        for name in ("lower", "upper", "step"):
            if getattr(index, name) is not None:
                yield ast.Subscript(node.value, ast.Slice(**(_fields(index) | {name: None})), node.ctx)
        if index.lower is None:
            yield ast.Subscript(node.value, ast.Slice(**(_fields(index) | {"lower": ast.Constant(1)})), node.ctx)


def _fields(node: ast.AST) -> dict:
    return dict(ast.iter_fields(node))


def _of_calls(exercise: Exercise) -> Iterator[Mutant]:
    """Right inside, wrong at the edge: an argument ignored or changed, a result that is turned or one row for all."""
    solution = exercise.solution
    first = next(iter(draw(exercise)), ())
    names = list(inspect.signature(solution).parameters)[: len(first)]
    for i, name in enumerate(names):
        yield Mutant(f"{name} is always that of the first case", _with_argument(solution, i, first[i]))
        if isinstance(first[i], Tensor) and first[i].is_floating_point() and not first[i].requires_grad:
            yield Mutant(f"{name} is changed in place", _that_spoils(solution, i))
    result = exercise.use(solution, *copied(first))
    for what, change in RESULTS.items():
        if exercise.use is use_plainly and difference(change(result), result, 0.0, 0.0):
            yield Mutant(what, _with_result(solution, change))


def _with_argument(solution, i: int, value):
    def mutant(*given):
        return solution(*given[:i], copy.deepcopy(value), *given[i + 1 :])

    return mutant


def _that_spoils(solution, i: int):
    def mutant(*given):
        result = copy.deepcopy(solution(*given))
        given[i].add_(1)
        return result

    return mutant


def _with_result(solution, change):
    def mutant(*given):
        return change(solution(*given))

    return mutant


def _rows(result):
    return result[:1].expand_as(result).clone() if isinstance(result, Tensor) and result.ndim else result


def _turned(result):
    return result.mT.contiguous() if isinstance(result, Tensor) and result.ndim >= 2 else result


def _negated(result):
    return (
        -result
        if isinstance(result, Tensor | float) and not (isinstance(result, Tensor) and result.dtype == torch.bool)
        else result
    )


def _wrapped(result):
    return result[None] if isinstance(result, Tensor) and result.numel() > 1 else result


def _doubled(result):
    return 2 * result if isinstance(result, int | float | Tensor) and not isinstance(result, bool) else result


RESULTS = {
    "the result is nothing": lambda result: None,
    "the sign is turned": _negated,
    "the first row for all": _rows,
    "rows and columns are swapped": _turned,
    "a dimension too many": _wrapped,
    "one result too many": lambda result: (*result, 0) if isinstance(result, tuple) else result,
    "doubled": _doubled,
}  # fmt: skip


# The judgment


def survivors(exercise: Exercise, some: int | None = None) -> Iterator[tuple[Mutant, str | None]]:
    """The mutants that pass; with each, where it differs from the solution, or None if it is equivalent.

    some: this many of them only, evenly chosen, where one takes long.
    """
    # Why a mutant is refused has tests of its own, so no slips are looked through here.
    quick = replace(exercise, seconds=min(exercise.seconds, SECONDS), slips={})
    found, passed = list(mutants(exercise)), []
    for mutant in found[:: -(-len(found) // some)] if some else found:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if judge(quick, mutant.function).startswith("passed"):
                passed.append(mutant)
    yield from zip(passed, differences(exercise, [mutant.function for mutant in passed]), strict=True)


def differences(exercise: Exercise, answers: list) -> list[str | None]:
    """Where each answer differs from the solution on inputs that the check does not use, which are drawn once for all.

    A rule asks for a target, and what just reaches it misses it now and then: more than once in twenty is a difference.
    """
    seen = [[] for _ in answers]
    inputs = INPUTS if exercise.rule is None else INPUTS // 30
    enough = 1 if exercise.rule is None else inputs // 20 + 1
    with untouched_state():
        for arguments in itertools.islice(_unseen(exercise), inputs if answers and not exercise.test else 0):
            wanted = None if exercise.rule else exercise.use(exercise.solution, *copied(arguments))
            for answer, known in zip(answers, seen, strict=True):
                if len(known) < enough and (text := _seen(exercise, answer, arguments, wanted)):
                    known.append(text)
    return [known[0] if len(known) >= enough else None for known in seen]


def _unseen(exercise: Exercise) -> Iterator[tuple]:
    for seed in itertools.count(1000) if exercise.cases is not None else ():
        yield from draw(exercise, seed)


def _seen(exercise: Exercise, answer, arguments: tuple, wanted) -> str | None:
    try:
        got = call(exercise, answer, arguments)
        if exercise.rule is not None:
            exercise.rule(got, *arguments)
            return None
        return difference(got, wanted, exercise.tolerance, exercise.smallest)
    except (Wrong, NotAttempted) as wrong:
        return str(wrong) or "not attempted"


# Forms of a right answer


def right_forms(exercise: Exercise) -> dict[str, Callable]:
    """The stored solution as learners may write it: in other types, containers and kinds of callable."""
    solution = exercise.solution
    if not inspect.isfunction(solution):
        return {"itself": solution}

    class Callable_:
        def __call__(self, *given):
            return solution(*given)

    forms = {
        "itself": solution,
        "float64": lambda *given: solution(*_converted(given, _double)),
        "result in float64": lambda *given: _converted(solution(*given), _double),
        "numpy": lambda *given: _converted(solution(*given), _numpy),
        "lists": lambda *given: _converted(solution(*given), _python),
        "0-d tensors": lambda *given: _converted(solution(*given), _zero_d),
        "(1,) tensors": lambda *given: _converted(solution(*given), _one_d),
        "list for tuple": lambda *given: _listed(solution(*given)),
        "not contiguous": lambda *given: _converted(solution(*given), _strided),
        "callable object": Callable_(),
        "partial": functools.partial(solution),
        "lambda": lambda *given: solution(*given),
    }
    without_gradient = ("numpy", "lists") if "gradient" in exercise.use.__name__ else ()
    return {form: answer for form, answer in forms.items() if form not in without_gradient}


def _converted(value, change):
    if type(value) in (tuple, list):
        return type(value)(_converted(v, change) for v in value)
    if isinstance(value, dict):
        return {key: _converted(v, change) for key, v in value.items()}
    return change(value)


def _double(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _numpy(value):
    if isinstance(value, Tensor):
        return value.detach().numpy()
    return np.asarray(value)[()] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _python(value):
    return value.tolist() if isinstance(value, Tensor) else value


def _zero_d(value):
    return torch.tensor(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _one_d(value):
    return torch.tensor([value]) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _listed(value):
    return list(value) if type(value) is tuple else value


def _strided(value):
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return torch.stack([value, value], -1)[..., 0]


def main(names: list[str]) -> None:
    for name in names:
        exercise = checks.find(name)
        total = sum(1 for _ in mutants(exercise))
        passed = list(survivors(exercise))
        print(f"{name} {exercise.title}: {total} mutants, {len(passed)} passed")
        for mutant, seen in passed:
            kind = "WRONG" if seen else "not compared" if exercise.test else "equivalent on every input"
            print(f"    {kind}: {mutant.what}" + (f"\n        {seen}" if seen else ""))
        for form, answer in right_forms(exercise).items():
            if not (verdict := judge(exercise, answer)).startswith("passed"):
                print(f"    REFUSED, though right: {form}: {verdict}")


if __name__ == "__main__":
    main(sys.argv[1:])
