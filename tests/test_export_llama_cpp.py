"""llama.cpp itself on our files, where it is installed; and what is said where it is not."""

import pytest
import torch

from quantlab.export import llama_cpp
from quantlab.export.gguf import save_gguf
from quantlab.export.gguf_models import measure_importance, with_values_of
from quantlab.hessian import Hessian
from quantlab.lm import DATA, capture_inputs, linear_layers, load_lm, load_text, token_stream
from quantlab.metrics import kl_divergence

needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp.llama_cpp_here(), reason="llama.cpp is not here: python -m recipes.llama_cpp"
)


@pytest.fixture(scope="module")
def bundled():
    return load_lm(str(DATA / "model"))


@pytest.fixture(scope="module")
def tokens(bundled):
    return token_stream(bundled[1], load_text("eval"))[:128]


@needs_llama_cpp
@pytest.mark.parametrize(("mix", "most"), [("F32", 1e-5), ("Q8_0", 1e-3), ("Q4_K_M", 3e-3)])
def test_llama_cpp_predicts_what_our_weights_do(mix, most, bundled, tokens, tmp_path):
    path = tmp_path / "m.gguf"
    save_gguf(*bundled, path, mix=mix)
    with torch.no_grad():
        ours = with_values_of(bundled[0], path)(tokens[None]).logits
    theirs = llama_cpp.llama_cpp_predictions(path, tokens[None])
    assert theirs.shape == ours.shape
    assert theirs.exp().sum(-1).sub(1).abs().max() < 1e-3
    assert kl_divergence(ours, theirs) < most


@needs_llama_cpp
def test_llama_cpp_reads_and_writes_as_torch_does(bundled, tokens, tmp_path):
    (model, tokenizer), path = bundled, tmp_path / "m.gguf"
    save_gguf(model, tokenizer, path, mix="F32")
    text = "Once upon a time there were 3 dogs, and they said: 你好!"
    assert llama_cpp.llama_cpp_tokens(path, text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    speed = llama_cpp.llama_cpp_speed(path, tokens[:20], tokens=8, rounds=1)
    written = model.generate(tokens[None, :20], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 20:]
    assert list(speed.ids) == written.tolist()
    assert tokenizer.decode(speed.ids) == speed.text
    assert 0 < speed.decode < 5
    assert llama_cpp.torch_speed(model, tokens[:20], tokens=2) > 0


@needs_llama_cpp
def test_what_llama_cpp_cannot_run_is_told(tmp_path, bundled):
    path = tmp_path / "m.gguf"
    save_gguf(*bundled, path, mix="Q4_0")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(RuntimeError, match=r"llama\.cpp did not run m\.gguf"):
        llama_cpp.llama_cpp_tokens(path, "a")


def test_without_llama_cpp_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_LLAMA_CPP", str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert not llama_cpp.llama_cpp_here()
    with pytest.raises(FileNotFoundError, match=r"python -m recipes\.llama_cpp"):
        llama_cpp.llama_cpp_tokens(tmp_path / "m.gguf", "a")
    with pytest.raises(FileNotFoundError, match="no file"):
        llama_cpp.llama_cpp_tokens(tmp_path / "none.gguf", "a")
    assert "Q8_0" in llama_cpp.stored_run("bundled, KL to ours")


def test_bad_windows_are_refused(bundled, tmp_path):
    path = tmp_path / "m.gguf"
    save_gguf(*bundled, path, mix="Q4_0")
    for windows, words in (
        (torch.ones(3).long(), "windows must be ids"),
        (torch.full((1, 3), 2048), "token ids lie in 0..2047"),
        (torch.ones(1, 3), "integers"),
    ):
        with pytest.raises(ValueError, match=words):
            llama_cpp.llama_cpp_predictions(path, windows)
    with pytest.raises(ValueError, match="at least two ids"):
        llama_cpp.llama_cpp_speed(path, torch.ones(1).long())


def test_importance_is_half_of_the_hessians_diagonal(bundled, tokens):
    model, name = bundled[0], list(linear_layers(bundled[0]))[5]
    measured = measure_importance(model, tokens, window=32)
    assert measured.keys() == linear_layers(model).keys()
    x = capture_inputs(model, tokens, [name], window=32)[name]
    assert torch.allclose(measured[name].double(), Hessian(x.shape[1]).add(x).matrix.diagonal() / 2, rtol=1e-5)


def test_values_of_a_file_come_back_into_the_model(bundled, tmp_path):
    model, path = bundled[0], tmp_path / "m.gguf"
    save_gguf(*bundled, path, mix="F32")
    new = with_values_of(model, path)
    for (name, before), (_, after) in zip(model.named_parameters(), new.named_parameters(), strict=True):
        assert torch.equal(before, after), name
        assert before is not after
    from test_lm import random_model

    with pytest.raises(ValueError, match="holds other tensors|in this model"):
        with_values_of(random_model("llama"), path)
