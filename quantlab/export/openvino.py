"""OpenVINO on the ONNX files of quantlab.export: run, seen as the engine rewrote them, and with NNCF's own codes.

In front of weights of 4 or 8 bits OpenVINO rounds activations to int8 on some processors, unless it is told not to: it
did on one with AVX512-VNNI, and did not on one with AVX2 alone.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quantlab.arguments import check_choice, check_file, check_flag, check_int, check_path
from quantlab.export.engines import engine

MODES = ("INT8_ASYM", "INT8_SYM", "INT4_ASYM", "INT4_SYM", "NF4")


def openvino_session(path, *, float_activations: bool = False) -> Callable[[np.ndarray], np.ndarray]:
    """An ONNX file (or OpenVINO's .xml) as a function of its one input, run by OpenVINO on one thread of the CPU.

    float_activations: tell OpenVINO not to round activations in front of weights of 4 or 8 bits, as it does by itself
    on some processors.
    Raises: FileNotFoundError, ModuleNotFoundError; what OpenVINO says of a file that is none; the function RuntimeError
    if the answer has another number of rows than x (seen, of a file with weights of 4 bits, on a CPU without AVX2).
    """
    compiled = _compiled(path, check_flag(float_activations, "float_activations"))

    def run(x: np.ndarray) -> np.ndarray:
        y = compiled(x)[0]
        if y.shape[:1] != x.shape[:1]:
            raise RuntimeError(f"OpenVINO answers {len(x)} rows of x with {y.shape}: it fails on this processor")
        return y

    return run


def openvino_graph(path) -> list[tuple[str, str]]:
    """(kind, type it computes in) of the operators that OpenVINO runs for a file, inputs and constants left out.

    Raises: FileNotFoundError, ModuleNotFoundError.
    """
    found = []
    for op in _compiled(path, False).get_runtime_model().get_ordered_ops():
        about = op.get_rt_info()
        kind = str(about["layerType"].astype(str)) if "layerType" in about else op.get_type_name()
        if kind not in ("Input", "Output", "Const", "Constant", "Parameter", "Result"):
            found.append((kind, str(about["runtimePrecision"].astype(str)) if "runtimePrecision" in about else "?"))
    return found


def save_nncf(path, out, *, mode: str = "INT8_ASYM", group_size: int | None = None) -> int:
    """Let NNCF round the weights of an ONNX file in a way of its own; returns the size of OpenVINO's two files, bytes.

    mode: one of MODES; those of 4 bits have groups, of all layers. out must end in .xml; its numbers lie in a .bin
    beside it.
    Raises: ValueError if a group_size comes with 8 bits, or out does not end in .xml; FileNotFoundError;
    ModuleNotFoundError if NNCF is not installed (it is none of quantlab's deploy set: 200 MB).
    """
    mode, out, source = check_choice(mode, "mode", MODES), check_path(out, "out"), check_file(path)
    if mode.startswith("INT8") and group_size is not None:
        raise ValueError(f"{mode} has one scale a row: group_size must be None, got {group_size}")
    if out.suffix != ".xml":
        raise ValueError(f"OpenVINO's files end in .xml, got {out.name}")
    more = {} if mode.startswith("INT8") else {"ratio": 1.0, "all_layers": True}
    if group_size is not None:
        more["group_size"] = check_int(group_size, "group_size", 1)
    ov, nncf = engine("openvino"), engine("nncf")
    model = nncf.compress_weights(ov.Core().read_model(source), mode=nncf.CompressWeightsMode[mode], **more)
    return _save(ov, model, out)


def _save(ov, model, out: Path) -> int:
    """Two files by way of a folder beside them; the .xml, which makes them a model, comes last."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent}")
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        part = Path(folder) / out.name
        ov.save_model(model, part, compress_to_fp16=False)
        size = part.stat().st_size + part.with_suffix(".bin").stat().st_size
        part.with_suffix(".bin").replace(out.with_suffix(".bin"))
        part.replace(out)
    return size


def _compiled(path, float_activations: bool):
    path, ov = check_file(path), engine("openvino")
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    if float_activations:
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return ov.Core().compile_model(str(path), "CPU", settings)
