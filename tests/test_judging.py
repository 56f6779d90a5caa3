"""How answers are judged: containers, number types, errors shown as the learner's, arguments, state, endless loops."""

# ruff: noqa: NPY002  learners seed numpy's old generator

import functools
import math
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from quantlab.judging import (
    Exercise,
    Wrong,
    as_tensor,
    call,
    copied,
    difference,
    expect,
    is_changed,
    judge,
    shown,
    with_gradient,
)  # fmt: skip


def scaled_solution(x, factor):
    return x * factor


def cases(random):
    for factor in (2.0, -0.5):
        yield torch.randn(3, generator=random), factor


SCALED = Exercise("scaled", hints=("a", "b", "c"), solution=scaled_solution, cases=cases, seconds=1.0,
                  slips={"Multiply, do not divide.": ("x * factor", "x / factor")})  # fmt: skip


def stub(x, factor):
    raise NotImplementedError


def half_written(x, factor):
    if factor > 0:
        return x * factor
    raise NotImplementedError


def deep_error(x, factor):
    return helper(x) * factor


def helper(x):
    return x["name"]


class Stopping(nn.Module):
    def forward(self, x, factor):
        return x @ torch.ones(7, 7)


class Calling:
    def __call__(self, x, factor):
        return {}["missing"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (scaled_solution, "passed"),
        (stub, "not attempted yet"),
        (None, "not attempted yet"),
        (3.0, "Pass the function itself"),
        (lambda x, factor: x / factor, "Multiply, do not divide."),
        (lambda x, factor: torch.histc(x.int(), 16), "Your code stopped in line 1 of <lambda>"),
        (half_written, "line 4 of half_written, `raise NotImplementedError`"),
        (deep_error, 'line 2 of helper, `return x["name"]`'),
        (Stopping(), "line 2 of forward"),
        (Calling(), "line 2 of __call__"),
        (functools.partial(deep_error, factor=2.0), "factor"),
        (functools.partial(lambda y, x, factor: y.nothing, 1), "has no attribute 'nothing'"),
        (lambda x: x, "called with (x, factor), and its parameters do not take that"),
        (lambda x, factor, more: x, "called with (x, factor)"),
        (lambda x, factor: x.mul_(factor), "x was changed in place"),
        (lambda x, factor: "word", "A tensor was expected; got 'word'"),
        (lambda x, factor: (x * factor)[:2], "shape (3,) was expected; got (2,)"),
        (lambda x, factor: None, "A tensor was expected; got None"),
        (lambda x, factor: (x * factor).numpy(), "passed"),
        (lambda x, factor: (x * factor).tolist(), "passed"),
        (lambda x, factor: [v for v in x * factor], "passed"),
        (lambda x, factor: (x.double() * factor), "passed"),
    ],
)
def test_verdicts(answer, words):
    assert words in judge(SCALED, answer)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN, signal.SIG_DFL])
def test_an_endless_loop_is_stopped_with_a_word(handler):
    def endless(x, factor):
        while True:
            pass

    began, before = time.monotonic(), signal.signal(signal.SIGINT, handler)  # ignored: in the background, say
    try:
        assert "No answer after 1 seconds" in judge(SCALED, endless)
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 20


def test_an_interrupt_by_hand_goes_through():
    def interrupted(x, factor):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(SCALED, interrupted)


def test_the_learners_state_is_untouched():
    def seeds(x, factor):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        torch.set_default_dtype(torch.float64), torch.set_grad_enabled(False), torch.set_num_threads(threads + 1)
        return x * factor

    def numbers():
        return torch.rand(1), np.random.rand(), random.random()

    threads = torch.get_num_threads()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    wanted = numbers()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert judge(SCALED, seeds) == "passed"
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert numbers() == wanted


NAN = float("nan")


@pytest.mark.parametrize(
    ("got", "wanted", "same"),
    [
        (3, 3, True), (3.0, 3, True), (np.int64(3), 3, True), (torch.tensor([3]), 3, True), (3.5, 3, False),
        (True, 1, False), (True, True, True), (np.bool_(True), True, True), (torch.tensor(True), True, True),
        (1, True, False), (NAN, NAN, True), (math.inf, math.inf, True), (math.inf, -math.inf, False), (NAN, 1.0, False),
        (1.00001, 1.0, True), (1.001, 1.0, False), ("a", "a", True), ("a", "b", False), (None, None, True),
        (0, None, False),
        ([1, 2], (1, 2), True), (torch.tensor([1, 2]), (1, 2), True), ((1, 2, 3), (1, 2), False), (3, (1, 2), False),
        ({"a": 1}, {"a": 1.0}, True), ({"b": 1}, {"a": 1}, False), ([("a", 1)], {"a": 1}, False),
        ([[1, 2], [3, 4]], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), True), ([[1], [3, 4]], torch.zeros(2, 2), False),
        (torch.tensor([1, 2]), torch.tensor([[1, 2]]), False), (torch.tensor([[1.0]]), torch.tensor(1.0), True),
        (torch.tensor([NAN, 1.0]), torch.tensor([NAN, 1.0]), True), (-0.0, 0.0, True),
        (torch.tensor([1j]), torch.tensor([1.0]), False), (np.zeros((2, 2)), torch.zeros(2, 2), True),
    ],
)  # fmt: skip
def test_difference(got, wanted, same):
    assert (difference(got, wanted, 1e-4) is None) == same


def test_a_difference_is_shown_with_as_many_digits_as_it_needs():
    assert difference(0.12345678, 0.12345, 1e-6) == "0.12345 was expected; got 0.1234568."
    few = torch.arange(12.0) * (torch.arange(12) < 10)
    assert "2 of 12 values differ" in difference(few, torch.arange(12.0), 1e-4)


def test_arguments_are_copied_and_compared():
    linear, x = nn.Linear(2, 2), torch.randn(3, 4).t()
    assert copied(x).stride() == x.stride()
    given = [x, {"a": (x, 1)}, linear, "word", np.ones(3)]
    twin = copied(given)
    assert not is_changed(given, twin)
    twin[1]["a"][0][0, 0] = 9.0
    assert is_changed(given, twin)
    assert not is_changed(torch.tensor([NAN]), torch.tensor([NAN]))
    with torch.no_grad():
        twin = copied(linear)
        twin.weight[0, 0] += 1
    assert is_changed(linear, twin)


def test_gradients_come_in_uneven():
    y, gradient = with_gradient(lambda x: 3 * x, torch.ones(4))
    assert (y == 3).all()
    assert gradient.unique().numel() == 4
    assert with_gradient(lambda x: x.detach(), torch.ones(4))[1] is None


def test_call_and_expect():
    assert call(SCALED, scaled_solution, (torch.ones(1), 2.0)) == 2
    expect(True, "never")
    with pytest.raises(Wrong, match="so"):
        expect(False, "so")


def test_shown():
    assert shown(torch.tensor([0.123456, 2.0])) == "[0.1235, 2]"
    assert shown(torch.zeros(3, 5)) == "Tensor of shape (3, 5)"
    assert shown({"a": 1.0}) == "{'a': 1}"
    assert as_tensor([]) is None
