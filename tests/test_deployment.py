"""Chapter 20's exercises on files: forms that differ and are right, and what is said where no engine is."""

import pytest
import torch

from quantlab.checks import find, judge
from quantlab.exercises import deployment
from quantlab.exercises.deployment import file_solution, signed_file_solution
from quantlab.export.engines import engine_here

needs_onnx = pytest.mark.skipif(
    not (engine_here("onnx") and engine_here("onnxruntime")), reason="onnx is not here: pip install -e .[deploy]"
)


def with_matmul(*material):
    """MatMul of the turned weight, and Add: ONNX Runtime itself makes a Gemm of them."""
    from onnx import helper

    model = file_solution(*material)
    del model.graph.node[4]
    model.graph.node.extend([
        helper.make_node("Transpose", ["w_grid"], ["w_turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x_grid", "w_turned"], ["xw"]),
        helper.make_node("Add", ["xw", "b"], ["y"]),
    ])  # fmt: skip
    return model


def made_by_hand(*material):
    """The nodes of the solution in a model that onnx.helper makes."""
    return of_older_format(file_solution(*material))


def of_older_format(model):
    from onnx import helper

    return helper.make_model(model.graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


@needs_onnx
@pytest.mark.parametrize("answer", [with_matmul, made_by_hand])
def test_another_graph_that_fuses_is_right_too(answer):
    assert judge(find("20.2"), answer).startswith("passed")


@needs_onnx
def test_tensorrts_rules_ask_for_no_form():
    def answer(*material):
        return of_older_format(signed_file_solution(*material))

    assert judge(find("20.4"), answer).startswith("passed")


@pytest.mark.parametrize("name", ["20.2", "20.4"])
def test_without_the_engine_nothing_passes(name, monkeypatch):
    monkeypatch.setattr(deployment, "engine_here", lambda _: False)
    assert "Nothing can be checked" in judge(find(name), lambda *_: torch.zeros(1))
    assert judge(find(name), lambda *_: torch.zeros(1)).startswith("not yet.")
