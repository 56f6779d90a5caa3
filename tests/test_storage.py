"""Saving quantized tensors and models: what they weigh, back bit by bit, and what is refused."""

import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantlab import Hessian, PerAxis, PerGroup, PerTensor, gptq_quantize, lm, quantize_tensor
from quantlab.awq import awq_search
from quantlab.codebook import fp4_levels, kmeans_levels, nf4_levels, quantize_codebook
from quantlab.floats import FP4_E2M1, FP6_E3M2, FP8_E4M3, mx_quantize, nvfp4_quantize
from quantlab.lm.saving import WEIGHTS
from quantlab.storage import load_tensors, save_tensors

GRANULARITIES = [PerTensor(), PerAxis(0), PerAxis(-1), PerGroup(3), PerGroup(1000)]


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def header(path) -> int:
    """Bytes of a safetensors file before its data: eight that say how long the header is, and the header."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def same(one, other) -> bool:
    qp, also = one.qparams, other.qparams
    pairs = [(one.codes, other.codes), (qp.scale, also.scale), (qp.zero_point, also.zero_point)]
    if one.group_index is not None:
        pairs.append((one.group_index, other.group_index))
    settings = ("bits", "granularity", "symmetric", "dtype")
    return (
        all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
        and all(getattr(one, name) == getattr(other, name) for name in settings)
        and (qp.qmin, qp.qmax) == (also.qmin, also.qmax)
        and torch.equal(one.dequantize(), other.dequantize())
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_tensor_comes_back_bit_by_bit_and_weighs_what_it_says(tmp_path, bits, granularity, symmetric, signed):
    q = quantize_tensor(values(5, 7), bits=bits, granularity=granularity, symmetric=symmetric, signed=signed)
    size = save_tensors(tmp_path / "x", {"w": q})
    assert size == os.path.getsize(tmp_path / "x")
    assert size - header(tmp_path / "x") == q.nbytes
    assert q.bits_per_element == 8 * q.nbytes / 35
    assert same(q, load_tensors(tmp_path / "x")["w"])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    bits=st.integers(1, 8),
    size=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_any_shape_and_group_comes_back(tmp_path_factory, shape, bits, size, dtype):
    path = tmp_path_factory.mktemp("any") / "x"
    q = quantize_tensor(values(*shape, dtype=dtype), bits=bits, granularity=PerGroup(size), symmetric=False)
    assert save_tensors(path, {"w": q}) - header(path) == q.nbytes
    assert same(q, load_tensors(path)["w"])


def test_the_group_index_of_act_order_comes_back(tmp_path):
    x = values(50, 12) * torch.linspace(1, 3, 12)
    q = gptq_quantize(values(6, 12), Hessian(12).add(x), bits=3, group_size=4, act_order=True)
    assert q.group_index is not None
    assert save_tensors(tmp_path / "x", {"w": q}) - header(tmp_path / "x") == q.nbytes
    assert same(q, load_tensors(tmp_path / "x")["w"])


def books():
    x = values(5, 30)
    yield "nf4", quantize_codebook(x, nf4_levels())
    yield "nf4 double", quantize_codebook(x, nf4_levels(), block_size=4, double_quant=True)
    yield "fp4", quantize_codebook(x.bfloat16(), fp4_levels(), block_size=7)
    yield "fp4 of bitsandbytes", quantize_codebook(x, fp4_levels(smallest=1 / 192))
    yield "own levels", quantize_codebook(x.half(), kmeans_levels(x / 4, 5), block_size=1000)
    yield "256 levels", quantize_codebook(x.double(), torch.linspace(-1, 1, 256), block_size=16)


def blocks_of_floats():
    x = values(5, 30)
    yield "mxfp4", mx_quantize(x, FP4_E2M1)
    yield "mxfp6", mx_quantize(x.bfloat16(), FP6_E3M2, block_size=7)
    yield "mxfp8", mx_quantize(x[0], FP8_E4M3)
    yield "nvfp4", nvfp4_quantize(x)


def scaled():
    q, _ = awq_search(values(12, 32), values(50, 32) * torch.linspace(0.1, 9, 32), bits=3, group_size=8)
    yield "awq", q


@pytest.mark.parametrize(("name", "q"), [*books(), *blocks_of_floats()])
def test_other_kinds_come_back_bit_by_bit_and_weigh_what_they_say(tmp_path, name, q):
    assert save_tensors(tmp_path / "x", {"w": q}) - header(tmp_path / "x") == q.nbytes
    back = load_tensors(tmp_path / "x")["w"]
    assert type(back) is type(q)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert (back.block_size, back.dtype, back.nbytes) == (q.block_size, q.dtype, q.nbytes)


@pytest.mark.parametrize(
    "q", [quantize_codebook(values(64), nf4_levels(), block_size=8), mx_quantize(values(64), FP4_E2M1)]
)
def test_other_kinds_with_scales_that_do_not_fit_are_refused(tmp_path, q):
    save_tensors(tmp_path / "x", {"w": q})
    parts, metadata = load_file(tmp_path / "x"), metadata_of(tmp_path / "x")
    scales = "w.absmax" if "w.absmax" in parts else "w.scales"
    save_file(parts | {scales: parts[scales][1:].clone()}, tmp_path / "x", metadata)
    with pytest.raises(ValueError, match="does not fit together"):
        load_tensors(tmp_path / "x")


def test_scaled_weights_of_awq_come_back(tmp_path):
    q = next(scaled())[1]
    assert save_tensors(tmp_path / "x", {"w": q}) - header(tmp_path / "x") == q.nbytes
    back = load_tensors(tmp_path / "x")["w"]
    assert torch.equal(back.dequantize(), q.dequantize())
    assert torch.equal(back.input_scale, q.input_scale)


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    q = quantize_tensor(values(4, 8), bits=4, granularity=PerGroup(4))
    with pytest.raises(ValueError, match="int32"):
        save_tensors(tmp_path / "x", {"w": dataclasses.replace(q, codes=q.codes.int())})
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_tensors(tmp_path / "nowhere" / "x", {"w": q})
    assert list(tmp_path.iterdir()) == []


def test_zero_points_and_codes_that_contradict_their_settings_are_refused(tmp_path):
    q = quantize_tensor(values(4, 8), bits=4, granularity=PerGroup(4))
    shifted = dataclasses.replace(q.qparams, zero_point=q.qparams.zero_point + 1)
    with pytest.raises(ValueError, match="middle code 0 as zero_point"):
        save_tensors(tmp_path / "x", {"w": dataclasses.replace(q, qparams=shifted)})
    book = quantize_codebook(values(64), kmeans_levels(values(64) / 4, 5))  # 5 levels, codes of 3 bits
    save_tensors(tmp_path / "x", {"w": book})
    parts, metadata = load_file(tmp_path / "x"), metadata_of(tmp_path / "x")
    save_file(parts | {"w.codes": torch.full_like(parts["w.codes"], 255)}, tmp_path / "x", metadata)
    with pytest.raises(ValueError, match="5 levels"):
        load_tensors(tmp_path / "x")


def test_names_that_look_like_parts_do_not_mix(tmp_path):
    q = quantize_tensor(values(4, 8), bits=4, granularity=PerGroup(4))
    given = {"w": q, "w.zero_point": values(3), "w.group_index": values(2), "": values(1), "w1": q}
    back = load_tensors_of(tmp_path / "x", given)
    assert list(back) == list(given)
    assert same(back["w"], q)
    assert same(back["w1"], q)
    for name in ("w.zero_point", "w.group_index", ""):
        assert torch.equal(back[name], given[name])
    with pytest.raises(ValueError, match="two tensors would be stored as 'w.codes'"):
        save_tensors(tmp_path / "y", {"w": q, "w.codes": values(3)})


def load_tensors_of(path, tensors):
    save_tensors(path, tensors)
    return load_tensors(path)


def test_shared_memory_and_views_are_stored_as_what_they_show(tmp_path):
    x = values(4, 6)
    back = load_tensors_of(tmp_path / "x", {"x": x, "turned": x.T, "part": x[1]})
    assert torch.equal(back["turned"], x.T)
    assert torch.equal(back["part"], x[1])


@pytest.mark.parametrize("kept", [0, 1, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "x"
    save_tensors(path, {"w": quantize_tensor(values(9, 9), bits=4, granularity=PerGroup(4))})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        load_tensors(path)


def test_foreign_files_are_refused(tmp_path):
    save_file({"w": values(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="not one that save_tensors wrote"):
        load_tensors(tmp_path / "foreign")
    (tmp_path / "text").write_text("Once upon a time")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_tensors(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_tensors(tmp_path / "nothing")
    with pytest.raises(ValueError, match="'w' is a list; known are plain, affine, scaled, mixed, codebook"):
        save_tensors(tmp_path / "x", {"w": [1.0]})


@pytest.mark.parametrize(
    "damage",
    [
        lambda parts, said: parts.pop("w.scale"),
        lambda parts, said: parts.update({"w.codes": parts["w.codes"][:3]}),
        lambda parts, said: parts.update({"w.scale": parts["w.scale"][:, :1].clone()}),
        lambda parts, said: said["w"].update(bits=9),
        lambda parts, said: said["w"].update(dtype="int8"),
        lambda parts, said: said["w"].update(granularity=["nothing"]),
        lambda parts, said: said["w"].pop("shape"),
        lambda parts, said: said["w"].update(kind="other"),
        lambda parts, said: said["w"].update(qmin=2**70),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, damage):
    q = quantize_tensor(values(4, 8), bits=4, granularity=PerGroup(2), symmetric=False)
    save_tensors(tmp_path / "x", {"w": q})
    parts, metadata = load_file(tmp_path / "x"), {"format": "quantlab", "version": "1"}
    said = json.loads(metadata_of(tmp_path / "x")["tensors"])
    damage(parts, said)
    save_file(parts, tmp_path / "x", metadata | {"tensors": json.dumps(said)})
    with pytest.raises(ValueError, match="does not fit together"):
        load_tensors(tmp_path / "x")


def metadata_of(path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[8 : header(path)])["__metadata__"]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x"
    save_tensors(path, {"x": values(3)})
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(path, {"x": values(4)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- whole models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized():
    model, tokenizer = lm.load_lm()
    return *lm.quantize_weights(model, lambda w: quantize_tensor(w, bits=4, granularity=PerGroup(128))), tokenizer


def test_a_model_comes_back_bit_by_bit_and_weighs_what_was_predicted(tmp_path, quantized):
    model, qtensors, tokenizer = quantized
    size = lm.save_quantized(tmp_path / "m", model, qtensors, tokenizer)
    weights = tmp_path / "m" / WEIGHTS
    assert size == os.path.getsize(weights)
    assert size - header(weights) == lm.model_bytes(model, qtensors)
    state = torch.random.get_rng_state()
    back, words = lm.load_quantized(tmp_path / "m")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not back.training
    ids = torch.arange(1, 60)[None]
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    assert words("Once upon a time") == tokenizer("Once upon a time")


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_other_families_come_back(tmp_path, family):
    from test_lm import random_model

    model = random_model(family)
    before = copy.deepcopy(model.state_dict())
    new, qtensors = lm.quantize_weights(model, lambda w: quantize_tensor(w, bits=3, granularity=PerAxis(0)))
    lm.save_quantized(tmp_path / "m", new, qtensors)
    back, tokenizer = lm.load_quantized(tmp_path / "m")
    assert tokenizer is None
    for name, value in new.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_saving_again_replaces_and_other_folders_are_left_alone(tmp_path, quantized):
    model, qtensors, tokenizer = quantized
    for _ in range(2):
        lm.save_quantized(tmp_path / "m", model, qtensors, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / "m" / "notes.txt").write_text("my own words")
    with pytest.raises(ValueError, match="also holds notes.txt; nothing was written"):
        lm.save_quantized(tmp_path / "m", model, qtensors, tokenizer)
    assert (tmp_path / "m" / "notes.txt").read_text() == "my own words"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "essay.txt").write_text("my own words")
    with pytest.raises(ValueError, match="holds no quantized model; nothing was written"):
        lm.save_quantized(tmp_path / "mine", model, qtensors)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["essay.txt"]


def test_what_does_not_belong_together_is_refused(tmp_path, quantized):
    model, qtensors, _ = quantized
    name = next(iter(qtensors))
    with pytest.raises(ValueError, match="no linear layer 'x'"):
        lm.save_quantized(tmp_path / "m", model, {"x": qtensors[name]})
    with pytest.raises(ValueError, match=f"weights of {name} are not those"):
        lm.save_quantized(tmp_path / "m", lm.load_lm()[0], qtensors)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="holds no quantized.safetensors"):
        lm.load_quantized(lm.DATA / "model")
    lm.save_quantized(tmp_path / "m", model, qtensors)
    with pytest.raises(ValueError, match="load_quantized loads it"):
        lm.load_lm(str(tmp_path / "m"))
    stored = load_tensors(tmp_path / "m" / WEIGHTS)
    save_tensors(tmp_path / "m" / WEIGHTS, stored | {"stranger": values(3)})
    with pytest.raises(ValueError, match="of another model"):
        lm.load_quantized(tmp_path / "m")
    stored.pop(name)
    save_tensors(tmp_path / "m" / WEIGHTS, stored)
    with pytest.raises(ValueError, match="of another model"):
        lm.load_quantized(tmp_path / "m")


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path, quantized, monkeypatch):
    model, qtensors, tokenizer = quantized
    lm.save_quantized(tmp_path / "m", model, qtensors, tokenizer)
    before = (tmp_path / "m" / WEIGHTS).read_bytes()
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: rename(self, to) if self.suffix != ".new" else fail())
    with pytest.raises(OSError, match="busy"):
        lm.save_quantized(tmp_path / "m", model, qtensors)
    monkeypatch.undo()
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == before


def fail():
    raise OSError("busy")


def test_layers_that_compute_in_integers_are_refused_by_name(tmp_path, quantized):
    tokens = torch.arange(1, 300)
    new, report = lm.quantize_lm(lm.load_lm()[0], tokens, method="w8a8_dynamic", progress=False)
    with pytest.raises(ValueError, match="a layer that computes in integers"):
        lm.save_quantized(tmp_path / "m", new, report.qtensors)
    with pytest.raises(ValueError, match="is it quantized already"):
        lm.quantize_lm(new, tokens, progress=False)
